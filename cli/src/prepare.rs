//! `ternion prepare` and `ternion setup`: one file that holds a model, in the order that this machine likes best.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::{Args, ValueEnum};
use ternion_compiler::Layout;
use ternion_runtime::formats::tern::{self, Form, HeadType};
use ternion_runtime::formats::{Checkpoint, FormatError, Projection};
use ternion_runtime::model::{KernelChoice, ready_form};
use ternion_tuner::{Budget, Choices, Class, Source};

use crate::UsageError;
use crate::arguments::{Prepare, Setup, Threads, TuningBudget};
use crate::export::with_bar;
use crate::memory::Watch;
use crate::model::{cpu, open};
use crate::output::print;
use crate::purpose::Purpose;
use crate::terminal::{bytes, note, time};
use crate::tune::{per_token, request, search};

/// How the rows of the head are stored, which are the embedding's in most models.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct HeadOption {
    /// Store the head like this, which changes the model: the rounded rows are its head then
    #[arg(long, value_name = "TYPE", default_value = "own")]
    head: Head,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Head {
    /// As the model has it, nothing is rounded
    Own,
    /// 16 bits per weight
    F16,
    /// 8 bits per weight
    Int8,
    /// 6.6 bits per weight
    #[value(name = "q6_k")]
    Q6K,
}

impl From<HeadOption> for HeadType {
    fn from(option: HeadOption) -> Self {
        match option.head {
            Head::Own => Self::Own,
            Head::F16 => Self::F16,
            Head::Int8 => Self::Int8,
            Head::Q6K => Self::Q6K,
        }
    }
}

pub(crate) fn prepare(options: &Prepare) -> Result<ExitCode> {
    let checkpoint = open(Some(&options.source), &options.read)?;
    let output = options.output.as_deref();
    output.map_or(Ok(()), |output| refuse_own_source(&options.source, output))?;
    let choices = if options.for_this_machine {
        Some(tune(&checkpoint, &options.threads, &options.budget, &options.purpose)?)
    } else {
        None
    };
    match output.filter(|_| !options.dry_run) {
        Some(output) => {
            let form = form_of(&checkpoint, choices.as_ref(), options.head)?;
            write(&checkpoint, output, choices.as_ref(), form)?;
        }
        None => {
            let form = form_of(&checkpoint, choices.as_ref(), options.head)?;
            let planned = tern::planned_bytes(&checkpoint, &layout_of(choices.as_ref()), form)?;
            let config = checkpoint.config();
            print(&format!(
                "{}: {}, {} layers, {} ternary matrices: a file of {}\n",
                options.source.display(),
                config.architecture,
                config.layers,
                config.layers * Projection::ALL.len(),
                bytes(planned)
            ))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn setup(options: &Setup) -> Result<ExitCode> {
    let checkpoint = open(options.model.as_deref(), &options.read)?;
    let output = match (&options.model, &options.output) {
        (None, _) => None,
        (Some(_), Some(output)) => Some(output.clone()),
        (Some(model), None) => Some(default_output(model)?),
    };
    let in_place = options.model.as_ref().zip(output.as_ref()).is_some_and(|(model, output)| is_same(model, output));
    // A prepared file may be put into another order where it is, but not lose what a rounded head loses.
    if let (true, Some(output), false) = (in_place, &output, matches!(options.head.head, Head::Own)) {
        refuse_own_source(output, output)?;
    }
    let choices = tune(&checkpoint, &options.threads, &options.budget, &options.purpose)?;
    match output {
        Some(output) => {
            let form = form_of(&checkpoint, Some(&choices), options.head)?;
            if in_place && tern::has_form(&checkpoint, &layout_of(Some(&choices)), form.clone())? {
                note(&format!("{} is in its fastest form for this machine already", output.display()));
            } else {
                write(&checkpoint, &output, Some(&choices), form)?;
                note(&format!("{} is in its fastest form for this machine", output.display()));
            }
            note(&format!("next: ternion run {} -p \"Once upon a time\"", output.display()));
        }
        None => note("next: ternion run -p \"Once upon a time\""),
    }
    Ok(ExitCode::SUCCESS)
}

/// The model's name with `.tern`, in this directory.
fn default_output(model: &Path) -> Result<PathBuf> {
    let full = model.canonicalize().unwrap_or_else(|_| model.to_owned());
    // A prepared file keeps its stem; a directory may well have dots in its name.
    let name = if full.is_file() { full.file_stem() } else { full.file_name() };
    match name {
        Some(name) => {
            let mut name = name.to_owned();
            name.push(".tern");
            Ok(PathBuf::from(name))
        }
        None => Err(UsageError(format!("{}: has no name, give one with -o", model.display())).into()),
    }
}

/// A prepared file is not replaced by what may be less than it.
fn refuse_own_source(source: &Path, output: &Path) -> Result<()> {
    if is_same(source, output) {
        return Err(UsageError(format!("{}: is the source itself, give another name with -o", output.display())).into());
    }
    Ok(())
}

/// Whether two paths lead to one file that exists.
fn is_same(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

/// The full search, and what it found.
fn tune(checkpoint: &Checkpoint, threads: &Threads, budget: &TuningBudget, purpose: &Purpose) -> Result<Choices> {
    let threads = purpose.room.threads(threads);
    let request = request(checkpoint.config(), Budget::search(budget.budget), purpose);
    let choices = search(&request, &cpu()?, threads)?;
    for found in &choices.found {
        let how = match found.source {
            Source::Known => "known".to_owned(),
            Source::Raced => format!("best of {}", found.raced),
            Source::Shipped => "no time to measure, shipped for this CPU".to_owned(),
            Source::Guess => "no time to measure, a guess".to_owned(),
        };
        note(&format!("{}x{}: {} ({how})", found.problem.m, found.problem.k, found.choice.of(Class::One)));
    }
    note(&purpose.recommendation(checkpoint.config(), &per_token(&choices)));
    note(&format!("tuned for {threads} threads in {}", time(choices.spent)));
    Ok(choices)
}

/// The layouts of `choices`, or plain.
fn layout_of(choices: Option<&Choices>) -> impl Fn(usize, Projection, usize, usize) -> Layout {
    move |_, _, m, k| choices.and_then(|choices| choices.get(m, k)).map_or(Layout::Canonical, |choice| choice.layout())
}

/// What is stored beside the model: for the kernels of `choices` whatever loading would have to compute, or nothing.
fn form_of(checkpoint: &Checkpoint, choices: Option<&Choices>, head: HeadOption) -> Result<Form> {
    match choices {
        Some(choices) => {
            Ok(ready_form(checkpoint, &KernelChoice::Tuned(choices.clone()), &cpu()?, HeadType::from(head))?)
        }
        None => Ok(HeadType::from(head).into()),
    }
}

/// Writes the prepared file with the layouts of `choices`, or plain, and says what that took.
fn write(checkpoint: &Checkpoint, output: &Path, choices: Option<&Choices>, form: Form) -> Result<()> {
    let layout = layout_of(choices);
    let (start, memory) = (Instant::now(), Watch::start());
    let summary = with_bar(|progress| tern::write_with(checkpoint, output, &layout, form, progress));
    if matches!(summary, Err(FormatError::Cancelled { .. })) {
        note(&format!("what is done is kept in {}.part: the same command continues it", output.display()));
    }
    let (summary, spent) = (summary?, start.elapsed());
    note(&format!(
        "wrote {} ({}, {} ternary matrices, digest {:016x})",
        output.display(),
        bytes(summary.bytes),
        summary.matrices,
        summary.digest
    ));
    if summary.derived > 0 {
        note(&format!("{} of it so that loading has nothing to compute", bytes(summary.derived)));
    }
    if summary.resumed > 0 {
        note(&format!("{} of it were there already, from an interrupted run", bytes(summary.resumed)));
    }
    if summary.head_error > 0.0 {
        note(&format!(
            "head as {}: its rows are off by {:.1e} of their size (root mean square); `ternion eval --text` measures what \
             that means for the loss",
            summary.head, summary.head_error
        ));
    }
    let rate = (summary.bytes - summary.resumed) as f64 / spent.as_secs_f64() / 1e9;
    let memory = memory.peak().map_or_else(String::new, |peak| format!(", at most {} of memory", bytes(peak)));
    note(&format!("{} at {rate:.2} GB/s{memory}", time(spent)));
    Ok(())
}
