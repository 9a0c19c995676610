//! A kernel in the forms in which it can be read or linked.

use ternion_compiler::machine::LoopNote;
use ternion_compiler::object::ObjectError;
use ternion_compiler::{
    CompileError, Cpu, Family, KernelSpec, MachineKind, Schedule, StepSpec, asm_text, clif_text, code_bytes, loops,
    object, step_asm_text, step_clif_text, step_code_bytes, step_object,
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

/// The kernel as `form`. Text begins with three comment lines that name kernel, schedule and CPU, and says where loops
/// begin and end. Code is emitted for
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
        Form::Clif => titled(annotated_clif(&clif_text(spec, schedule, cpu)?, &loops(spec, schedule, cpu)?)),
        Form::Asm => {
            let text = asm_text(spec, schedule, cpu)?.ok_or(EmitError::NoDisassembler(*cpu))?;
            titled(annotated_asm(&text, &loops(spec, schedule, cpu)?))
        }
        Form::Bytes => code_bytes(spec, schedule, cpu)?,
        Form::Object => object(&[(*spec, *schedule, SYMBOL)], cpu)?,
    })
}

/// A step on activations as `form`, by Cranelift for its IR and else by the machine of `cpu` with the widest vectors. Text
/// begins with three comment lines that name step, machine and CPU.
///
/// # Errors
/// If `cpu` cannot carry it out, or it has no such form.
pub fn emit_step(spec: &StepSpec, cpu: &Cpu, form: Form) -> Result<Vec<u8>, EmitError> {
    let machine = spec.machine(cpu).filter(|_| form != Form::Clif).unwrap_or(MachineKind::Clif128);
    let titled = |text: String| format!("; {spec}\n; {machine}\n; {cpu}\n{text}").into_bytes();
    Ok(match form {
        Form::Clif => titled(step_clif_text(spec, cpu)?),
        Form::Asm => titled(step_asm_text(spec, machine, cpu)?.ok_or(EmitError::NoDisassembler(*cpu))?),
        Form::Bytes => step_code_bytes(spec, machine, cpu)?,
        Form::Object => step_object(&[(*spec, machine, SYMBOL)], cpu)?,
    })
}

/// Cranelift IR with a comment before the first block of every loop.
fn annotated_clif(text: &str, loops: &[LoopNote]) -> String {
    let mut annotated = String::new();
    for line in text.lines() {
        let block: Option<u32> = line.strip_prefix("block").and_then(|rest| {
            let digits = rest.find(|c: char| !c.is_ascii_digit())?;
            rest[..digits].parse().ok()
        });
        for (number, note) in loops.iter().enumerate().filter(|(_, note)| block.is_some() && note.block == block) {
            annotated += &format!("; loop {}: {note}\n", number + 1);
        }
        annotated += line;
        annotated.push('\n');
    }
    annotated
}

/// Assembly, whose lines begin with a mark and an address, with a comment where every loop begins and where it goes back.
fn annotated_asm(text: &str, loops: &[LoopNote]) -> String {
    let mut annotated = String::new();
    let address = |line: &str| usize::from_str_radix(line.get(1..)?.split(' ').next()?, 16).ok();
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        let (here, next) = (address(line), lines.peek().and_then(|line| address(line)));
        for (number, note) in loops.iter().enumerate() {
            if note.code.as_ref().is_some_and(|code| Some(code.start) == here) {
                annotated += &format!("; loop {}: {note}\n", number + 1);
            }
        }
        annotated += line;
        annotated.push('\n');
        for (number, note) in loops.iter().enumerate() {
            if note.code.as_ref().is_some_and(|code| Some(code.end) == next) {
                annotated += &format!("; back to loop {}\n", number + 1);
            }
        }
    }
    annotated
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(schedule: &str, cpu: &str, form: Form) -> String {
        let spec = "ternary-gemm k=1024 n=many".parse().unwrap();
        let bytes = emit(&spec, &schedule.parse().unwrap(), &cpu.parse().unwrap(), form).unwrap();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn a_listing_of_wide_code_says_where_every_loop_is_and_what_it_carries() {
        let wide = "x86-64 +avx2 +avx512f +avx512bw +avx512dq +avx512vl +avx512vnni";
        let asm = listing("mad/avx512 layout=lanes16x4 multiply=dot unroll=2 ntile=8", wide, Form::Asm);
        let begins: Vec<_> = asm.lines().filter_map(|line| line.strip_prefix("; loop ")).collect();
        // Of rows, and two for each of 8, 4, 2 and 1 columns.
        assert_eq!(begins.len(), 9, "{asm}");
        assert_eq!(begins[0], "1: tiles of rows, until none is left");
        assert_eq!(begins[1], "2: columns, ntile at a time, until none is left");
        // 64 groups of four bytes, two per turn; a sum for every column.
        assert_eq!(begins[2], "3: groups of k, unroll at a time, 32 turns, carries zmm0-zmm7");
        for number in 1..=9 {
            assert_eq!(asm.matches(&format!("; back to loop {number}\n")).count(), 1, "{asm}");
        }
        let first: usize = asm[..asm.find("vpdpbusd").unwrap()].matches("; loop ").count();
        assert_eq!(first, 3, "the first product is in the innermost loop");
    }

    #[test]
    fn cranelift_code_is_annotated_in_both_forms() {
        let (schedule, cpu) = ("mad/clif128 layout=rows4x16 multiply=pairs unroll=1 ntile=2", "x86-64 +ssse3");
        for form in [Form::Asm, Form::Clif] {
            let text = listing(schedule, cpu, form);
            for words in [
                "1: tiles of rows, until none",
                "2: columns, ntile at a time",
                "3: chunks of k, unroll at a time, 16 turns",
                "4: columns that are left, by halves",
                "5: chunks of k, unroll at a time, 16 turns",
            ] {
                assert_eq!(text.matches(&format!("; loop {words}")).count(), 1, "{words}: {text}");
            }
            let before: Vec<_> =
                text.lines().zip(text.lines().skip(1)).filter(|(line, _)| line.starts_with("; loop ")).collect();
            assert!(before.iter().all(|(_, next)| next.starts_with(['>', ';']) || next.starts_with("block")), "{text}");
        }
    }
}
