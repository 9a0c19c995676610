//! Opening a model and making it ready to run: checkpoint, thread team, schedules, kernels.

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use ternion_compiler::{Cpu, Schedule};
use ternion_runtime::formats::{Checkpoint, Projection};
use ternion_runtime::lora::Adapter;
use ternion_runtime::model::{KernelChoice, LoadReport, Model, start_request};
use ternion_runtime::team::{Team, available_threads};
use ternion_tuner::{CacheDir, Choice, Choices, Request, choose};

use crate::arguments::{ForcedKernel, LoraOption, ModelOptions, ReadOptions};
use crate::terminal::{Bar, bytes, note};
use crate::{embedded, pull};

/// A model that is ready to run, and how long that took.
pub(crate) struct Ready {
    pub(crate) checkpoint: Checkpoint,
    pub(crate) model: Arc<Model>,
    pub(crate) team: Arc<Team>,
    pub(crate) times: ReadyTimes,
}

/// Times of getting ready.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ReadyTimes {
    /// Opening files, reading and repacking weights.
    pub(crate) load: Duration,
    /// Looking up or racing schedules.
    pub(crate) tune: Duration,
    /// Whether schedules had to be raced.
    pub(crate) raced: bool,
    /// Compiling and checking kernels.
    pub(crate) compile: Duration,
}

/// Opens the model at `path`, or the embedded one.
///
/// What had to be guessed or corrected while reading it is said once.
pub(crate) fn open(path: Option<&Path>, read: &ReadOptions) -> Result<Checkpoint> {
    let options = read.into();
    let checkpoint = match path {
        Some(path) if pull::may_be_a_name(path) && !path.exists() => match pull::pulled(path) {
            Some(pulled) => Checkpoint::open_with(&pulled, &options)?,
            None => {
                bail!("{0}: no such file, and no model of this name has been pulled: ternion pull {0}", path.display())
            }
        },
        Some(path) => Checkpoint::open_with(path, &options)?,
        None => embedded::open(&options)?,
    };
    checkpoint.notes().iter().for_each(|line| note(&format!("note: {line}")));
    Ok(checkpoint)
}

/// Which weights were used as they lie in the file, and which were computed when the model was loaded.
pub(crate) fn origin(report: &LoadReport) -> String {
    let kinds = [
        ("matrices", report.mapped_bytes, report.packed_bytes),
        ("records", report.mapped_record_bytes, report.record_bytes - report.mapped_record_bytes),
        ("screen", report.stored_screen_bytes, report.screen_bytes - report.stored_screen_bytes),
    ];
    let list = |part: fn(&(&str, usize, usize)) -> usize| {
        let some = kinds.iter().filter(|kind| part(kind) > 0);
        let words: Vec<String> = some.map(|kind| format!("{} {}", kind.0, bytes(part(kind) as u64))).collect();
        if words.is_empty() { "nothing".to_owned() } else { words.join(", ") }
    };
    format!("as in the file: {} · converted: {}", list(|kind| kind.1), list(|kind| kind.2))
}

/// The CPU that kernels are compiled for.
pub(crate) fn cpu() -> Result<Cpu> {
    Cpu::host().context("ternion emits code for x86-64 and aarch64 only, and this CPU is neither")
}

/// A team of the threads that were asked for, or of all that this process may use.
pub(crate) fn team(threads: Option<NonZeroUsize>) -> Result<Arc<Team>> {
    Ok(Arc::new(Team::new(threads.map_or_else(available_threads, usize::from))?))
}

/// The schedules that `request` asks for: remembered ones, or the winners of a race. Warnings go to the terminal.
pub(crate) fn schedules(request: &Request, cpu: &Cpu, team: &Team) -> Result<Choices> {
    // A short race is over before a bar can be read.
    let choices = choose(request, cpu, team, &CacheDir::default(), &|_| {})?;
    for warning in &choices.warnings {
        note(&format!("warning: {warning}"));
    }
    Ok(choices)
}

/// Opens and loads the model that `options` name, which is to predict tokens.
///
/// # Errors
/// As [`ready`], and if it is an embedding model.
pub(crate) fn ready_to_generate(options: &ModelOptions) -> Result<Ready> {
    let ready = ready(options)?;
    if ready.model.config().pooling.is_some() {
        let name = ready.checkpoint.name();
        bail!("{name} is an embedding model, which has no words of its own: use `ternion embed`");
    }
    Ok(ready)
}

/// The kernels that the user insists on.
pub(crate) fn forced(kernel: ForcedKernel) -> KernelChoice {
    match kernel {
        ForcedKernel::Family(family) => KernelChoice::Family(family),
        // One column is taken one at a time, whatever the schedule says of many.
        ForcedKernel::Schedule(schedule) => {
            KernelChoice::Schedules(Choice::pair(Schedule { ntile: 1, ..schedule }, schedule))
        }
    }
}

/// Opens and loads the model that `options` name.
pub(crate) fn ready(options: &ModelOptions) -> Result<Ready> {
    let begin = Instant::now();
    let checkpoint = open(options.model.as_deref(), &options.read)?;
    let (cpu, team) = (cpu()?, team(NonZeroUsize::new(options.room.threads(&options.threads)))?);
    // Said before anything is loaded.
    options.room.context(checkpoint.config(), options.kv, None)?;
    let mut times = ReadyTimes { load: begin.elapsed(), ..ReadyTimes::default() };
    let kernels = match options.kernel {
        Some(kernel) => forced(kernel),
        None => {
            let second_copies = options.room.second_copies(checkpoint.config());
            let request = Request { second_copies, ..start_request(&checkpoint) };
            let choices = schedules(&request, &cpu, &team)?;
            times.tune = choices.spent;
            times.raced = !choices.all_known();
            KernelChoice::Tuned(choices)
        }
    };
    let begin = Instant::now();
    let adapter = |lora: &LoraOption| Adapter::open(&lora.path, checkpoint.config(), lora.scale);
    let adapters = options.lora.iter().map(adapter).collect::<Result<Vec<_>, _>>()?;
    times.load += begin.elapsed();
    let mut model = load(&checkpoint, &kernels, &cpu, &team)?;
    adapters.iter().for_each(|adapter| adapter.apply(&mut model));
    times.compile = model.report().compile;
    times.load += model.report().weights;
    Ok(Ready { checkpoint, model: Arc::new(model), team, times })
}

/// Reads and repacks the weights, with a bar on a terminal.
pub(crate) fn load(checkpoint: &Checkpoint, kernels: &KernelChoice, cpu: &Cpu, team: &Team) -> Result<Model> {
    let matrices = checkpoint.config().layers * Projection::ALL.len();
    let bar = Bar::count("loading", matrices as u64);
    Ok(Model::load(checkpoint, kernels, cpu, team, &|progress| bar.set(progress.done as u64))?)
}
