//! Compiled steps on activations, and the safe side of calling them.

use std::sync::Arc;

use crate::compile::{CompileError, emitted, in_parallel, load};
use crate::harness::{self, FloatData, FloatRow, Placement};
use crate::kernel::CodeMemory;
use crate::machine::{Code, Machine, clif, disassembly};
use crate::{ActivationFormat, Arch, Cpu, MachineKind, Step, StepSpec, emit};

/// The one argument of a step. Fields are eight bytes each, in the order of
/// [`ActivationArgument`](crate::machine::ActivationArgument).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct StepArgs {
    pub(crate) input: *const u8,
    pub(crate) weights: *const f32,
    pub(crate) epsilon: *const f32,
    pub(crate) output: *mut u8,
    pub(crate) result: *mut Quantized,
    pub(crate) scratch: *mut u8,
}

#[cfg(target_arch = "x86_64")]
type Entry = unsafe extern "sysv64" fn(*const StepArgs);
#[cfg(not(target_arch = "x86_64"))]
type Entry = unsafe extern "C" fn(*const StepArgs);

/// What quantising finds out about one token's activations besides their int8 values.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub struct Quantized {
    /// The scale q: `x ≈ a / q`.
    pub q: f32,
    /// `Σ a`.
    pub sum: i32,
}

/// Memory that a step may use as it likes.
#[repr(align(64))]
struct Scratch {
    _bytes: [u8; StepSpec::SCRATCH],
}

/// A step in executable memory, checked against its reference. Cheap to clone; shared by threads.
#[derive(Clone)]
pub struct StepKernel {
    spec: StepSpec,
    machine: MachineKind,
    entry: Entry,
    code_bytes: usize,
    _memory: Arc<CodeMemory>,
}

impl StepKernel {
    /// What it computes.
    #[must_use]
    pub const fn spec(&self) -> StepSpec {
        self.spec
    }

    /// What emitted it.
    #[must_use]
    pub const fn machine(&self) -> MachineKind {
        self.machine
    }

    /// Bytes of machine code.
    #[must_use]
    pub const fn code_bytes(&self) -> usize {
        self.code_bytes
    }

    /// Quantises `x`, `[k]`, into `values`: a column of [`ActivationFormat::Plain`].
    ///
    /// # Panics
    /// If this is another step, or a length is not `k`'s.
    pub fn quantize(&self, x: &[f32], values: &mut [i8]) -> Quantized {
        assert_eq!(self.spec.step, Step::Quantize, "a kernel that quantises");
        self.to_int8(x, &[], 0.0, values)
    }

    /// Quantises `x`, `[k]`, after the norm with these weights, `[k]`, into `values`: a column of
    /// [`ActivationFormat::Plain`].
    ///
    /// # Panics
    /// If this is another step, or a length is not `k`'s.
    pub fn norm_quantize(&self, x: &[f32], weights: &[f32], epsilon: f32, values: &mut [i8]) -> Quantized {
        assert_eq!(self.spec.step, Step::NormQuantize, "a kernel that normalises and quantises");
        assert_eq!(weights.len(), self.spec.k, "one weight per activation");
        self.to_int8(x, weights, epsilon, values)
    }

    fn to_int8(&self, x: &[f32], weights: &[f32], epsilon: f32, values: &mut [i8]) -> Quantized {
        assert_eq!(x.len(), self.spec.k, "as many activations as were compiled in");
        assert_eq!(values.len(), ActivationFormat::Plain.bytes(self.spec.k), "a plain column of results");
        let mut result = Quantized::default();
        self.run(x.as_ptr().cast(), weights, &epsilon, values.as_mut_ptr().cast(), &mut result);
        result
    }

    /// Prepares a column of [`ActivationFormat::Plain`] in this step's format.
    ///
    /// # Panics
    /// If this step prepares nothing, or a length is not `k`'s.
    pub fn prepare(&self, values: &[i8], column: &mut [u8]) {
        let Step::Prepare(format) = self.spec.step else { panic!("a kernel that prepares") };
        assert_eq!(values.len(), ActivationFormat::Plain.bytes(self.spec.k), "a plain column");
        assert_eq!(column.len(), format.bytes(self.spec.k), "bytes of a column");
        self.run(values.as_ptr().cast(), &[], &0.0, column.as_mut_ptr(), &mut Quantized::default());
    }

    fn run(&self, input: *const u8, weights: &[f32], epsilon: &f32, output: *mut u8, result: &mut Quantized) {
        let mut scratch = std::mem::MaybeUninit::<Scratch>::uninit();
        let (weights, scratch) = (weights.as_ptr(), scratch.as_mut_ptr().cast());
        let args = StepArgs { input, weights, epsilon, output, result, scratch };
        // SAFETY: the callers have checked that input, weights and output are as long as this step's `k` asks for; result
        // and scratch are ours alone.
        unsafe { self.enter(&raw const args) }
    }

    /// Runs the code.
    ///
    /// # Safety
    /// `args` points to a record of what the step reads and writes, each as long as its contract says: `k` floats or a
    /// plain column, `k` weights and an epsilon if it normalises, a column of results, a [`Quantized`] if it quantises,
    /// [`StepSpec::SCRATCH`] bytes that nothing else uses.
    pub(crate) unsafe fn enter(&self, args: *const StepArgs) {
        // SAFETY: the code was compiled for this CPU and stays within what the caller vouches for.
        unsafe { (self.entry)(args) }
    }
}

impl std::fmt::Debug for StepKernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "StepKernel({}, {})", self.spec, self.machine)
    }
}

/// Compiles each step by the widest machine that `cpu` has for it, in parallel, and checks it against its reference. All
/// of them share one region of executable memory. Results are in the order of `specs`.
///
/// # Errors
/// The first that cannot be compiled on `cpu`, or differs from the reference.
pub fn compile_steps(specs: &[StepSpec], cpu: &Cpu) -> Result<Vec<StepKernel>, CompileError> {
    let refused = |spec: &StepSpec| CompileError::Step { spec: *spec, reason: format!("no machine on {cpu} does it") };
    let jobs = specs.iter().map(|spec| Ok((*spec, spec.machine(cpu).ok_or_else(|| refused(spec))?)));
    compile_steps_on(&jobs.collect::<Result<Vec<_>, _>>()?, cpu)
}

/// As [`compile_steps`], by the machines that are given.
///
/// # Errors
/// As [`compile_steps`].
pub fn compile_steps_on(jobs: &[(StepSpec, MachineKind)], cpu: &Cpu) -> Result<Vec<StepKernel>, CompileError> {
    let codes: Result<Vec<_>, _> =
        in_parallel(jobs, |(spec, machine)| step_code(spec, *machine, cpu)).into_iter().collect();
    let codes = codes?;
    let Some((first, _)) = jobs.first() else { return Ok(Vec::new()) };
    let failed = |spec: &StepSpec, reason: String| CompileError::Step { spec: *spec, reason };
    let (memory, addresses) =
        load(&codes, cpu, |i| format!("ternion::{}", jobs[i].0.to_string().replace([' ', '='], "_")))
            .map_err(|reason| failed(first, reason))?;
    let kernels: Vec<_> = jobs
        .iter()
        .zip(&codes)
        .zip(addresses)
        .map(|(((spec, machine), code), address)| StepKernel {
            spec: *spec,
            machine: *machine,
            // SAFETY: `address` is a finalised function of the module, emitted with the signature of `Entry`.
            entry: unsafe { std::mem::transmute::<*const u8, Entry>(address) },
            code_bytes: code.bytes.len(),
            _memory: Arc::clone(&memory),
        })
        .collect();
    for kernel in &kernels {
        let row = FloatRow::new(FloatData::Random, kernel.spec.k, crate::check::CHECK_SEED);
        harness::check_step(kernel, &row, Placement::Heap).map_err(|fault| {
            failed(&kernel.spec, format!("under {}: {fault}; please report this as a bug", kernel.machine))
        })?;
    }
    Ok(kernels)
}

/// The code of a step that `machine` carries out, not yet placed anywhere.
pub(crate) fn step_code(spec: &StepSpec, machine: MachineKind, cpu: &Cpu) -> Result<Code, CompileError> {
    let failed = |reason: String| CompileError::Step { spec: *spec, reason };
    spec.check(machine, cpu).map_err(|error| failed(error.to_string()))?;
    emitted(machine, cpu, |m: &mut dyn Machine| emit::emit_step(m, spec)).map_err(failed)
}

/// The Cranelift IR of a step as text, for reading.
///
/// # Errors
/// If `cpu` cannot carry it out.
pub fn step_clif_text(spec: &StepSpec, cpu: &Cpu) -> Result<String, CompileError> {
    let failed = |reason: String| CompileError::Step { spec: *spec, reason };
    spec.check(MachineKind::Clif128, cpu).map_err(|error| failed(error.to_string()))?;
    clif::text(cpu, |m| emit::emit_step(m, spec)).map_err(|error| failed(error.to_string()))
}

/// The machine code of a step as text, for reading; `None` for a CPU that is not x86-64.
///
/// # Errors
/// If `machine` cannot carry it out on `cpu`.
pub fn step_asm_text(spec: &StepSpec, machine: MachineKind, cpu: &Cpu) -> Result<Option<String>, CompileError> {
    let code = step_code(spec, machine, cpu)?;
    Ok((cpu.arch() == Arch::X86_64).then(|| disassembly::text(&code)))
}

/// The machine code of a step with its constants.
///
/// # Errors
/// If `machine` cannot carry it out on `cpu`.
pub fn step_code_bytes(spec: &StepSpec, machine: MachineKind, cpu: &Cpu) -> Result<Vec<u8>, CompileError> {
    step_code(spec, machine, cpu).map(|code| code.bytes)
}
