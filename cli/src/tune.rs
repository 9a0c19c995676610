//! `ternion tune`: the fastest kernels for a model on this machine, why, and how sure that is.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{ArgGroup, Args};
use ternion_compiler::Cpu;
use ternion_runtime::formats::ModelConfig;
use ternion_runtime::formats::synth::Recipe;
use ternion_runtime::model;
use ternion_runtime::team::Team;
use ternion_tuner::{
    Budget, CacheDir, Choices, Class, IsolationError, MachineProfile, Order, Phase, Problem, ProfileKey, Progress,
    Report, Request, Source, SparseChoice, SystemStopwatch, choose_isolated, probe, profile_of, serve,
};

use crate::arguments::{ReadOptions, Threads, TuningBudget};
use crate::model::{cpu, open};
use crate::output::{self, print};
use crate::purpose::Purpose;
use crate::terminal::{Bar, note, time};
use crate::tune_check::{self, Check};
use crate::{UsageError, interrupt};

#[derive(Debug, Args)]
#[command(group(ArgGroup::new("files").args(["show", "export", "import", "merge", "forget"])))]
pub(crate) struct Tune {
    /// A prepared file (.tern), a Hugging Face directory or a GGUF file; without it, the embedded model
    pub(crate) model: Option<PathBuf>,
    #[command(flatten)]
    read: ReadOptions,
    /// Tune for the shapes of a published model that is not here, for example 2B4T
    #[arg(long, value_name = "NAME", conflicts_with = "model")]
    shapes: Option<String>,
    /// Tune matrices of one shape only: rows x length of a row, for example 640x2560
    #[arg(long, value_name = "MxK", value_parser = shape)]
    only: Option<(usize, usize)>,
    #[command(flatten)]
    threads: Threads,
    #[command(flatten)]
    budget: TuningBudget,
    /// Try every legal schedule, however long it takes; goes on where it was interrupted
    #[arg(long, conflicts_with = "budget")]
    exhaustive: bool,
    #[command(flatten)]
    purpose: Purpose,
    /// Print the report as one JSON object
    #[arg(long)]
    json: bool,
    /// Write the report as one self-contained page
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write what was found to a file, as --export does
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
    /// Afterwards measure the choice anew: against the untuned guess in 10 held-out interleaved rounds, and against the
    /// median of a sample of all legal schedules
    #[arg(long)]
    check: bool,
    /// With --check, also against the choices of an exported profile, of a second search with the same budget (`again`), or
    /// of an exhaustive one (`exhaustive`, which takes hours unless it has been made before: see --only)
    #[arg(long, value_name = "FILE|again|exhaustive", requires = "check")]
    against: Option<PathBuf>,
    /// Show what is known for this machine and stop
    #[arg(long)]
    show: bool,
    /// Write what is known for this machine to a file and stop
    #[arg(long, value_name = "FILE")]
    export: Option<PathBuf>,
    /// Replace what is known by an exported file and stop
    #[arg(long, value_name = "FILE")]
    import: Option<PathBuf>,
    /// Add an exported file to what is known and stop; of two choices the one that was looked for longer stays
    #[arg(long, value_name = "FILE")]
    merge: Option<PathBuf>,
    /// Forget what is known for this machine and stop
    #[arg(long)]
    forget: bool,
}

pub(crate) fn tune(options: &Tune) -> Result<ExitCode> {
    let cpu = cpu()?;
    let threads = options.purpose.room.threads(&options.threads);
    let key = ProfileKey::new(&probe(), &cpu, threads);
    let cache = CacheDir::default();
    if options.show || options.forget || options.export.is_some() || options.import.is_some() || options.merge.is_some()
    {
        return files(options, &cache, &key, &cpu);
    }
    let config = match &options.shapes {
        Some(name) => Recipe::preset(published(name)).map_err(|error| UsageError(error.to_string()))?.config,
        None => open(options.model.as_deref(), &options.read)?.config().clone(),
    };
    let budget = if options.exhaustive { Budget::EXHAUSTIVE } else { Budget::search(options.budget.budget) };
    let mut request = Request { again: !options.exhaustive, ..request(&config, budget, &options.purpose) };
    if let Some(shape) = options.only {
        restrict(&mut request, shape)?;
    }
    let choices = search(&request, &cpu, threads)?;
    report(options, &config, &request, &choices, threads)?;
    if let Some(path) = &options.save {
        let profile = profile_of(&choices, &request, key);
        CacheDir::export(&profile, path)?;
        note(&format!("wrote {} shapes to {}", profile.shapes.len(), path.display()));
    }
    if options.check {
        let against = options.against.as_deref();
        tune_check::check(
            &Check { request: &request, choices: &choices, cpu: &cpu, threads, json: options.json },
            against,
        )?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A shape as it is written: `MxK`.
fn shape(text: &str) -> Result<(usize, usize), String> {
    let parts = text.split_once('x').and_then(|(m, k)| Some((m.parse().ok()?, k.parse().ok()?)));
    parts.ok_or_else(|| "expected rows x length of a row, for example 640x2560".to_owned())
}

/// Leaves nothing in a request but matrices of one shape.
fn restrict(request: &mut Request, (m, k): (usize, usize)) -> Result<()> {
    let shapes: BTreeSet<_> = request.problems.iter().map(|problem| (problem.m, problem.k)).collect();
    if !shapes.contains(&(m, k)) {
        let shapes: Vec<String> = shapes.into_iter().map(|(m, k)| format!("{m}x{k}")).collect();
        return Err(UsageError(format!("--only {m}x{k}: the model's matrices are {}", shapes.join(", "))).into());
    }
    // A token still reads the others.
    let others = request.problems.extract_if(.., |problem| (problem.m, problem.k) != (m, k));
    request.beside = others.map(|problem| problem.bytes()).fold(request.beside, usize::saturating_add);
    request.sparse = None;
    Ok(())
}

/// The name of a published shape, however its dashes are written.
fn published(name: &str) -> &str {
    let plain = |name: &str| name.replace(['-', '_'], "").to_ascii_lowercase();
    Recipe::presets().find(|known| plain(known) == plain(name)).unwrap_or(name)
}

/// What is asked of the tuner for a model and a purpose.
pub(crate) fn request(config: &ModelConfig, budget: Budget, purpose: &Purpose) -> Request {
    Request {
        workload: purpose.workload(),
        second_copies: purpose.room.second_copies(config),
        energy: purpose.energy,
        ..model::request(config, budget)
    }
}

/// The full search, in a process of its own, with a bar on a terminal. Warnings go to standard error.
pub(crate) fn search(request: &Request, cpu: &Cpu, threads: usize) -> Result<Choices> {
    let known = ternion_tuner::known(request, cpu, threads, &CacheDir::default())?;
    let choices = match known {
        Some(choices) => choices,
        None => {
            let bar = Bar::time("tuning", request.budget.time.min(Duration::from_secs(24 * 3600)));
            let last = RefCell::new(String::new());
            let progress = |progress: Progress| {
                *last.borrow_mut() = words(&progress.phase);
                bar.say(u64::try_from(progress.spent.as_millis()).unwrap_or(u64::MAX), last.borrow().clone());
            };
            let command = || Ok(worker(&std::env::current_exe()?));
            choose_isolated(request, cpu, threads, &CacheDir::default(), &command, &progress, &interrupt::requested)?
        }
    };
    for warning in &choices.warnings {
        note(&format!("warning: {warning}"));
    }
    Ok(choices)
}

fn worker(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.arg("tune-worker");
    command
}

fn words(phase: &Phase) -> String {
    match phase {
        Phase::Compiling { done, total } => format!("compiling {done} of {total}"),
        Phase::Exploring { problem: Problem { m, k, .. }, shape, shapes, tried, legal } => {
            format!("{m}x{k} ({} of {shapes}): tried {tried} of {legal}", shape + 1)
        }
        Phase::Racing { problem: Problem { m, k, .. }, shape, shapes, left } => {
            format!("{m}x{k} ({} of {shapes}): {left} schedules left", shape + 1)
        }
    }
}

/// Whether an error is only that the user has pressed Ctrl-C.
pub(crate) fn was_interrupted(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(IsolationError::Interrupted))
}

/// The hidden command that [`search`] starts: measures kernels on behalf of its parent.
pub(crate) fn work() -> Result<ExitCode> {
    let order = Order::read(&mut std::io::stdin()).context("tune-worker is for ternion's own use")?;
    let team = Team::new(order.threads)?;
    serve(&order, &team, &cpu()?, &mut std::io::stdout())?;
    Ok(ExitCode::SUCCESS)
}

/// Prints and writes what was found.
fn report(options: &Tune, config: &ModelConfig, request: &Request, choices: &Choices, threads: usize) -> Result<()> {
    let machine = probe();
    let bandwidth = machine.memory_bandwidth(&Team::new(threads)?, &SystemStopwatch::start());
    let report = Report::new(request, choices, machine, threads, bandwidth);
    if let Some(path) = &options.html {
        output::write_file(path, report.html().as_bytes())?;
        note(&format!("wrote {}", path.display()));
    }
    if options.json {
        output::json(&report)?;
    } else {
        print(&report.table())?;
    }
    if let Some(sparse) = choices.sparse.as_ref().filter(|_| !options.json) {
        print(&format!("{}\n", lists(sparse).join("\n")))?;
    }
    let guessed = choices.found.iter().filter(|found| found.source == Source::Guess).count();
    if guessed > 0 {
        note(&format!("{guessed} shapes got no time and keep the guess: give a larger --budget"));
    }
    let copies = choices.found.iter().filter(|found| found.choice.layouts().len() > 1).count();
    if copies > 0 {
        note(&format!("{copies} shapes get a second copy of their weights"));
    }
    // One shape says nothing of a whole token.
    if options.only.is_none() {
        note(&options.purpose.recommendation(config, &per_token(choices)));
    }
    note(&format!("tuned for {threads} threads in {}", time(choices.spent)));
    Ok(())
}

/// When reading lists of records pays, in words.
fn lists(choice: &SparseChoice) -> [String; 2] {
    [("rows of up", &choice.rows), ("columns of down", &choice.columns)].map(|(what, list)| {
        let pays = match list.worth {
            worth if worth <= 0.0 => "are never read alone".to_owned(),
            worth => format!("are read alone up to {:.0} % of them", 100.0 * worth),
        };
        format!("{what} {pays}: {}", list.schedule)
    })
}

/// Seconds that all matrices take per token, by class.
pub(crate) fn per_token(choices: &Choices) -> Vec<(Class, f64)> {
    let of = |class: Class| {
        let times = choices.found.iter().map(|found| {
            found.result(class).map(|result| result.figures.median_us * 1e-6 * found.problem.count as f64)
        });
        times.sum::<Option<f64>>().map(|seconds| (class, seconds / class.measured() as f64))
    };
    Class::ALL.into_iter().filter_map(of).collect()
}

/// `--show`, `--export`, `--import`, `--merge` and `--forget`.
fn files(options: &Tune, cache: &CacheDir, key: &ProfileKey, cpu: &Cpu) -> Result<ExitCode> {
    let (known, warnings) = cache.load(key, cpu);
    warnings.iter().for_each(|warning| note(&format!("warning: {warning}")));
    if options.show {
        return show(options, cache, key, &known);
    }
    if let Some(path) = &options.export {
        if known.shapes.is_empty() {
            return Err(UsageError(format!("nothing is known for {} threads: tune first", key.threads)).into());
        }
        CacheDir::export(&known, path)?;
        note(&format!("wrote {} shapes to {}", known.shapes.len(), path.display()));
    } else if let Some(path) = &options.import {
        let profile = CacheDir::read_exported(path)?;
        let to = cache.import(&profile)?;
        foreign(&profile, key);
        note(&format!("imported {} shapes to {}", profile.shapes.len(), to.display()));
    } else if let Some(path) = &options.merge {
        let profile = CacheDir::read_exported(path)?;
        cache.remember(&profile)?;
        foreign(&profile, key);
        note(&format!("merged {} shapes", profile.shapes.len()));
    } else {
        let what = if cache.forget(key)? { "forgotten" } else { "there was nothing to forget" };
        note(&format!("{what} (for {} threads)", key.threads));
    }
    Ok(ExitCode::SUCCESS)
}

/// Says that a profile is of no use here.
fn foreign(profile: &MachineProfile, key: &ProfileKey) {
    if profile.key != *key {
        note("warning: it was made by another CPU, version or number of threads, and is used only there");
    }
}

fn show(options: &Tune, cache: &CacheDir, key: &ProfileKey, known: &MachineProfile) -> Result<ExitCode> {
    if options.json {
        output::json(known)?;
        return Ok(ExitCode::SUCCESS);
    }
    let path = cache.profile_path(key).map_or("no cache directory".to_owned(), |path| path.display().to_string());
    let mut text = format!("{}\n{} threads, {}\n{path}\n", key.cpu, key.threads, key.features);
    for entry in &known.shapes {
        let state = if entry.provisional { ", provisional: measured on a busy machine" } else { "" };
        text += &format!("\n{}x{} (best of {}, {} ms{state})\n", entry.m, entry.k, entry.raced, entry.budget_ms);
        for class in Class::ALL {
            let result = entry.results.iter().find(|result| result.class == class);
            let time = result.map_or(String::new(), |result| format!("{:.1} µs", result.figures.median_us));
            text += &format!("  n={:<7} {time:>12}  {}\n", class.name(), entry.choice.of(class));
        }
    }
    for entry in &known.sparse {
        let state = if entry.provisional { " (provisional)" } else { "" };
        text += &format!("\nfeed-forward {}x{}{state}\n", entry.shape.ffn, entry.shape.hidden);
        lists(&entry.choice).iter().for_each(|line| text += &format!("  {line}\n"));
    }
    for refusal in &known.refused {
        text += &format!("\nrefused: {} for {}: {}\n", refusal.schedule, refusal.spec, refusal.reason);
    }
    if known.shapes.is_empty() {
        text += "\nnothing is known: run `ternion tune MODEL`\n";
    }
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}
