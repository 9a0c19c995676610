//! A kernel in the forms in which it can be read or linked.

use ternion_compiler::object::ObjectError;
use ternion_compiler::{
    CompileError, Cpu, Family, KernelSpec, MachineKind, Schedule, asm_text, clif_text, code_bytes, object,
};

/// What a kernel is written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Cranelift's intermediate representation as text.
    Clif,
    /// x86-64 machine code as text.
    Asm,
    /// The bytes of the machine code.
    Bytes,
    /// A relocatable ELF file with the function [`SYMBOL`].
    Object,
}

/// The function in an object file.
const SYMBOL: &str = "ternion_kernel";

/// Why nothing was emitted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EmitError {
    /// The compiler refused.
    #[error(transparent)]
    Compile(#[from] CompileError),
    /// No object file.
    #[error(transparent)]
    Object(#[from] ObjectError),
    /// The schedule's code is not made from Cranelift's IR.
    #[error("{0} is assembled without Cranelift and has no clif: use --as asm")]
    NoClif(MachineKind),
    /// There is no disassembler for this architecture.
    #[error("assembly text is for x86-64 only, not for {0}: use --as object and a disassembler of its own")]
    NoDisassembler(Cpu),
    /// The family has no schedule to choose.
    #[error("{family} has no schedule for {spec} on {cpu}: `ternion lab list` says why")]
    NoSchedule {
        /// The family.
        family: Family,
        /// The kernel.
        spec: KernelSpec,
        /// The CPU.
        cpu: Cpu,
    },
}

/// The schedule of `family` that is most often the fastest.
///
/// # Errors
/// If `cpu` allows none.
pub fn choose(family: Family, spec: &KernelSpec, cpu: &Cpu) -> Result<Schedule, EmitError> {
    let candidates = Schedule::candidates(spec, cpu);
    let first = candidates.into_iter().find(|schedule| schedule.family == family);
    first.ok_or(EmitError::NoSchedule { family, spec: *spec, cpu: *cpu })
}

/// The kernel as `form`. Text begins with three comment lines that name kernel, schedule and CPU. Code is emitted for
/// `cpu`, whichever this one is, and is not run.
///
/// # Errors
/// If the schedule is not legal for `spec` on `cpu`, or has no such form.
pub fn emit(spec: &KernelSpec, schedule: &Schedule, cpu: &Cpu, form: Form) -> Result<Vec<u8>, EmitError> {
    if form == Form::Clif && schedule.machine != MachineKind::Clif128 {
        return Err(EmitError::NoClif(schedule.machine));
    }
    let titled = |text: String| format!("; {spec}\n; {schedule}\n; {cpu}\n{text}").into_bytes();
    Ok(match form {
        Form::Clif => titled(clif_text(spec, schedule, cpu)?),
        Form::Asm => titled(asm_text(spec, schedule, cpu)?.ok_or(EmitError::NoDisassembler(*cpu))?),
        Form::Bytes => code_bytes(spec, schedule, cpu)?,
        Form::Object => object(&[(*spec, *schedule, SYMBOL)], cpu)?,
    })
}
