//! From `(spec, schedule)` to checked machine code.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use cranelift_jit::{JITBuilder, JITModule};
use cranelift_module::{Linkage, Module};

use crate::check::{Mismatch, check_each};
use crate::harness::Fault;
use crate::kernel::{CodeMemory, Kernel, place};
use crate::machine::{Code, LoopNote, Machine, clif, disassembly, wide};
use crate::{Arch, Cpu, KernelSpec, MachineKind, Schedule, ScheduleError, StepSpec, emit, perf};

/// Why a kernel was not handed out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CompileError {
    /// The schedule is not legal.
    #[error("{schedule} for {spec}: {error}")]
    Schedule {
        /// What was to be compiled.
        spec: KernelSpec,
        /// How.
        schedule: Schedule,
        /// Why not.
        error: ScheduleError,
    },
    /// The code generator or the operating system refused, or the code wrote where it must not.
    #[error("{schedule} for {spec}: {reason}")]
    Code {
        /// What was to be compiled.
        spec: KernelSpec,
        /// How.
        schedule: Schedule,
        /// What it said.
        reason: String,
    },
    /// The kernel's results differ from the reference.
    #[error("{schedule} for {spec}: {mismatch}; please report this as a bug")]
    Mismatch {
        /// What was compiled.
        spec: KernelSpec,
        /// How.
        schedule: Schedule,
        /// The first difference.
        mismatch: Mismatch,
    },
    /// A step on activations cannot be compiled for the CPU, or its results differ from the reference.
    #[error("{spec}: {reason}")]
    Step {
        /// What was to be compiled.
        spec: StepSpec,
        /// What is wrong.
        reason: String,
    },
}

/// Compiles the kernel of every job, in parallel, and checks each against `kernels-ref` before handing it out. Equal
/// jobs share one kernel; all of them share one region of executable memory, never writable and executable at once.
///
/// # Errors
/// The error of the first job that has one.
pub fn compile(jobs: &[(KernelSpec, Schedule)], cpu: &Cpu) -> Result<Vec<Kernel>, CompileError> {
    compile_each(jobs, cpu).into_iter().collect()
}

/// As [`compile`], but with a result for every job: one that fails does not spoil the others.
#[must_use]
pub fn compile_each(jobs: &[(KernelSpec, Schedule)], cpu: &Cpu) -> Vec<Result<Kernel, CompileError>> {
    let mut unique: Vec<_> = jobs.to_vec();
    unique.sort_unstable();
    unique.dedup();

    let codes = in_parallel(&unique, |(spec, schedule)| machine_code(spec, schedule, cpu));
    let mut results = BTreeMap::new();
    let mut placed = Vec::new();
    for (job, code) in unique.into_iter().zip(codes) {
        match code {
            Ok(code) => placed.push((job, code)),
            Err(error) => drop(results.insert(job, Err(error))),
        }
    }
    let (placed, codes): (Vec<_>, Vec<_>) = placed.into_iter().unzip();
    match load(&codes, cpu, |i| perf::symbol(&placed[i].0, &placed[i].1)) {
        Ok((memory, addresses)) => {
            let places = addresses.into_iter().zip(&codes);
            let functions = placed.iter().zip(places);
            let kernels = place(
                &memory,
                functions.map(|((spec, schedule), (address, code))| (*spec, *schedule, address, code.bytes.len())),
            );
            let checked = check_each(&kernels);
            for (kernel, outcome) in kernels.into_iter().zip(checked) {
                let (spec, schedule) = (kernel.spec(), kernel.schedule());
                let result = match outcome {
                    Ok(()) => Ok(kernel),
                    Err(Fault::Mismatch(mismatch)) => Err(CompileError::Mismatch { spec, schedule, mismatch }),
                    Err(fault) => Err(CompileError::Code { spec, schedule, reason: fault.to_string() }),
                };
                results.insert((spec, schedule), result);
            }
        }
        Err(reason) => {
            for (spec, schedule) in placed {
                results.insert((spec, schedule), Err(CompileError::Code { spec, schedule, reason: reason.clone() }));
            }
        }
    }
    jobs.iter().map(|job| results[job].clone()).collect()
}

/// The code of a kernel whose schedule is legal, not yet placed anywhere.
pub(crate) fn machine_code(&spec: &KernelSpec, &schedule: &Schedule, cpu: &Cpu) -> Result<Code, CompileError> {
    schedule.check(&spec, cpu).map_err(|error| CompileError::Schedule { spec, schedule, error })?;
    let emit = |m: &mut dyn Machine| emit::emit(m, &spec, &schedule);
    emitted(schedule.machine, cpu, emit).map_err(|reason| CompileError::Code { spec, schedule, reason })
}

/// The code of what `emit` describes, by `machine`.
pub(crate) fn emitted(machine: MachineKind, cpu: &Cpu, emit: impl FnOnce(&mut dyn Machine)) -> Result<Code, String> {
    match wide::Target::new(machine, cpu) {
        None => clif::compile(cpu, emit).map_err(|error| error.to_string()),
        Some(target) => wide::compile(target, emit),
    }
}

/// A kernel that nothing has checked, so that tests can show what the checks prevent.
#[cfg(test)]
pub(crate) fn compile_unchecked(spec: KernelSpec, schedule: Schedule, cpu: &Cpu) -> Kernel {
    compile_anything(spec, schedule, cpu, |m| emit::emit(m, &spec, &schedule))
}

/// As [`compile_unchecked`], but with code that is not the schedule's.
#[cfg(test)]
pub(crate) fn compile_anything(
    spec: KernelSpec,
    schedule: Schedule,
    cpu: &Cpu,
    emit: impl FnOnce(&mut dyn Machine),
) -> Kernel {
    let code = emitted(schedule.machine, cpu, emit).expect("code");
    let code_bytes = code.bytes.len();
    let (memory, addresses) = load(&[code], cpu, |_| perf::symbol(&spec, &schedule)).expect("memory for code");
    place(&memory, addresses.into_iter().map(|address| (spec, schedule, address, code_bytes))).remove(0)
}

/// The Cranelift IR of a kernel as text, for reading.
///
/// # Errors
/// If the schedule is not legal or the target unknown to Cranelift.
pub fn clif_text(spec: &KernelSpec, schedule: &Schedule, cpu: &Cpu) -> Result<String, CompileError> {
    let (spec, schedule) = (*spec, *schedule);
    schedule.check(&spec, cpu).map_err(|error| CompileError::Schedule { spec, schedule, error })?;
    clif::text(cpu, |m| emit::emit(m, &spec, &schedule)).map_err(|error| CompileError::Code {
        spec,
        schedule,
        reason: error.to_string(),
    })
}

/// The machine code of a kernel as text, for reading; `None` for a CPU that is not x86-64.
///
/// # Errors
/// If the schedule is not legal or the code generator refuses.
pub fn asm_text(spec: &KernelSpec, schedule: &Schedule, cpu: &Cpu) -> Result<Option<String>, CompileError> {
    let code = machine_code(spec, schedule, cpu)?;
    Ok((cpu.arch() == Arch::X86_64).then(|| disassembly::text(&code)))
}

/// The loops of a kernel's code, in the order in which they begin: what they go over, and where they are in the text of
/// [`asm_text`] (by address) or [`clif_text`] (by block).
///
/// # Errors
/// If the schedule is not legal or the code generator refuses.
pub fn loops(spec: &KernelSpec, schedule: &Schedule, cpu: &Cpu) -> Result<Vec<LoopNote>, CompileError> {
    let (spec, schedule) = (*spec, *schedule);
    let mut code = machine_code(&spec, &schedule, cpu)?;
    if wide::Target::new(schedule.machine, cpu).is_none() {
        clif::locate_loops(cpu, |m| emit::emit(m, &spec, &schedule), &mut code)
            .map_err(|error| CompileError::Code { spec, schedule, reason: error.to_string() })?;
    }
    Ok(code.loops)
}

/// The machine code of a kernel with its constants, not placed anywhere and not checked by running it.
///
/// # Errors
/// If the schedule is not legal or the code generator refuses.
pub fn code_bytes(spec: &KernelSpec, schedule: &Schedule, cpu: &Cpu) -> Result<Vec<u8>, CompileError> {
    machine_code(spec, schedule, cpu).map(|code| code.bytes)
}

/// Copies code into memory that becomes executable once it is no longer writable; returns where each function begins.
/// `symbol` names them for profilers.
pub(crate) fn load(
    codes: &[Code],
    cpu: &Cpu,
    symbol: impl Fn(usize) -> String,
) -> Result<(Arc<CodeMemory>, Vec<*const u8>), String> {
    if Cpu::host().is_none_or(|host| host.arch() != cpu.arch() || cpu.features().any(|feature| !host.has(feature))) {
        return Err(format!("code for {cpu} cannot run on this machine"));
    }
    let isa = clif::isa(cpu).map_err(|error| error.to_string())?;
    let mut module = JITModule::new(JITBuilder::with_isa(isa, cranelift_module::default_libcall_names()));
    let mut functions = Vec::new();
    for (i, code) in codes.iter().enumerate() {
        let signature = module.make_signature();
        let id = module
            .declare_function(&format!("kernel{i}"), Linkage::Local, &signature)
            .map_err(|error| error.to_string())?;
        module.define_function_bytes(id, code.alignment, &code.bytes, &[]).map_err(|error| error.to_string())?;
        functions.push(id);
    }
    module.finalize_definitions().map_err(|error| error.to_string())?;
    let addresses: Vec<_> = functions.into_iter().map(|id| module.get_finalized_function(id)).collect();
    let places = addresses.iter().zip(codes).enumerate();
    perf::name(places.map(|(i, (address, code))| (symbol(i), *address, code.bytes.len())))?;
    Ok((CodeMemory::new(module), addresses))
}

/// `work` of every item, on as many threads as there are processors, results in the order of the items.
pub(crate) fn in_parallel<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(items.len());
    if threads <= 1 {
        return items.iter().map(work).collect();
    }
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::with_capacity(items.len()));
    let turn = || {
        while let Some((i, item)) = {
            let i = next.fetch_add(1, Ordering::Relaxed);
            items.get(i).map(|item| (i, item))
        } {
            let result = work(item);
            done.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push((i, result));
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(turn);
        }
        turn();
    });
    let mut done = done.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    done.sort_unstable_by_key(|(i, _)| *i);
    done.into_iter().map(|(_, result)| result).collect()
}
