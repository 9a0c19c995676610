//! Compares engines on made-up models of one shape, in turns, and prints a table.
//!
//! For every number of threads and every round, each engine is started and reads the short prompt: that is its time to
//! load and to the first token. Then the engines take turns at every task, so that whatever else the machine does hits
//! all alike. The table has medians, and how far the fastest and the slowest run are from them.

mod energy;
mod engines;
mod models;

use std::io::{BufRead as _, Write as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};
use engines::{Engine, Memory, Running, Task};
use models::{Shape, Workshop};
use ternion_benches::model::{load, median, read};
use ternion_runtime::model::{Session, SessionOptions};
use ternion_runtime::verify::some_tokens;
use ternion_tuner::probe;

/// The prompt whose end is the first token of a program that has just been started.
const FIRST: Task = Task::Prompt(128);

/// Speed of ternion and other engines, measured in turns
#[derive(Debug, Parser)]
#[command(args_conflicts_with_subcommands = true)]
struct Arguments {
    /// The table of engines
    #[arg(long, default_value_os_t = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("peers/engines.toml"))]
    engines: PathBuf,
    /// Where models and llama.cpp's environment are kept
    #[arg(long, default_value_os_t = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/peers"))]
    directory: PathBuf,
    /// A Python that has llama_cpp already, instead of an environment of its own
    #[arg(long)]
    python: Option<PathBuf>,
    /// The shape
    #[arg(long, default_value = "2B-4T")]
    shape: Shape,
    /// Numbers of threads
    #[arg(short, long, value_delimiter = ',', default_values = ["1", "2"])]
    threads: Vec<usize>,
    /// Rounds: the more, the less chance
    #[arg(short, long, default_value = "3")]
    rounds: usize,
    /// What to measure: prompt-N reads N tokens at once, generate-N one by one
    #[arg(long, value_delimiter = ',', default_values = ["prompt-128", "prompt-512", "generate-64"])]
    tasks: Vec<Task>,
    /// Only engines whose name contains one of these
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Make the models and stop
    #[arg(long)]
    prepare: bool,
    #[command(subcommand)]
    command: Option<Hidden>,
}

#[derive(Debug, Subcommand)]
enum Hidden {
    /// Run ternion for the comparison: answers `prompt N` and `generate N` with seconds
    #[command(hide = true)]
    Serve { model: PathBuf, threads: usize },
}

/// What was measured of an engine with some number of threads.
#[derive(Clone, Debug, Default)]
struct Measured {
    /// Seconds, one list per task.
    tasks: Vec<Vec<f64>>,
    /// Joules per token of generation, where the machine tells.
    joules: Vec<f64>,
    load: Vec<f64>,
    first_token: Vec<f64>,
    memory: Memory,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if let Some(Hidden::Serve { model, threads }) = &arguments.command {
        return serve(model, *threads);
    }
    let mut engines = engines::read(&arguments.engines)?;
    let only = &arguments.only;
    engines.retain(|engine| only.is_empty() || only.iter().any(|part| engine.name.contains(part.as_str())));
    std::fs::create_dir_all(&arguments.directory)?;
    let directory = arguments.directory.canonicalize()?;
    let python = arguments.python.unwrap_or_else(|| directory.join("venv/bin/python"));
    let workshop = Workshop { directory, python };
    if engines.iter().any(|engine| engine.weights.extension() == "gguf") {
        workshop.install()?;
    }
    let files = engines
        .iter()
        .map(|engine| workshop.file(arguments.shape, engine.weights))
        .collect::<Result<Vec<PathBuf>>>()?;
    workshop.tidy(arguments.shape)?;
    if arguments.prepare {
        return Ok(());
    }
    println!("{}, {}", arguments.shape.name(), probe().brand);
    if energy::now().is_none() {
        println!("joules: this machine does not tell (no readable /sys/class/powercap/*/energy_uj)");
    }
    let tasks = &arguments.tasks;
    for threads in arguments.threads {
        let unmeasured = Measured { tasks: vec![Vec::new(); tasks.len()], ..Measured::default() };
        let mut measured = vec![unmeasured; engines.len()];
        for round in 0..arguments.rounds {
            eprintln!("{threads} threads, round {} of {}", round + 1, arguments.rounds);
            measure(&engines, &files, (threads, tasks), &workshop, &mut measured)?;
        }
        print(&engines, (threads, tasks), &mut measured);
    }
    Ok(())
}

fn measure(
    engines: &[Engine],
    files: &[PathBuf],
    (threads, tasks): (usize, &[Task]),
    workshop: &Workshop,
    measured: &mut [Measured],
) -> Result<()> {
    let mut running = Vec::new();
    for ((engine, file), measured) in engines.iter().zip(files).zip(&mut *measured) {
        let mut server = Running::start(engine, file, threads, workshop)?;
        // The first run of a task is not counted, except as what a user waits for.
        let first = server.run(FIRST)?;
        if let Some(load) = server.load() {
            measured.load.push(load.as_secs_f64());
            measured.first_token.push((load + first).as_secs_f64());
        }
        running.push(server);
    }
    for (index, task) in tasks.iter().enumerate() {
        for ((server, measured), engine) in running.iter_mut().zip(&mut *measured).zip(engines) {
            let before = energy::now();
            let time = server.run(*task).with_context(|| engine.name.clone())?;
            measured.tasks[index].push(time.as_secs_f64());
            if let (Task::Generate(tokens), Some(joules)) = (task, energy::since(before)) {
                measured.joules.push(joules / *tokens as f64);
            }
        }
    }
    for (server, measured) in running.iter().zip(measured) {
        if let Some(memory) = server.memory() {
            measured.memory.peak = measured.memory.peak.max(memory.peak);
            measured.memory.anonymous = measured.memory.anonymous.max(memory.anonymous);
            measured.memory.file = measured.memory.file.max(memory.file);
        }
    }
    Ok(())
}

fn print(engines: &[Engine], (threads, tasks): (usize, &[Task]), measured: &mut [Measured]) {
    let titles: String = tasks.iter().map(|task| format!(" {task} |")).collect();
    println!(
        "\n| {threads} threads |{titles} load s | first token s | peak MB | anonymous MB | file MB | joules per token |"
    );
    println!("|---|{}---|---|---|---|---|---|", "---|".repeat(tasks.len()));
    for (engine, measured) in engines.iter().zip(&mut *measured) {
        let mut row = format!("| {} |", engine.name);
        for (task, times) in tasks.iter().zip(&mut measured.tasks) {
            let (middle, spread) = summary(times);
            row += &format!(" {:.1} ± {:.0} % |", task.tokens() as f64 / middle, spread * 100.0);
        }
        for times in [&mut measured.load, &mut measured.first_token] {
            row += &if times.is_empty() { " |".to_owned() } else { format!(" {:.2} |", median(times)) };
        }
        let Memory { peak, anonymous, file } = measured.memory;
        for bytes in [peak, anonymous, file] {
            row += &if bytes == 0 { " |".to_owned() } else { format!(" {:.0} |", bytes as f64 / 1e6) };
        }
        let joules = &mut measured.joules;
        row += &if joules.is_empty() { " |".to_owned() } else { format!(" {:.2} |", median(joules)) };
        println!("{row}");
    }
    let Some(base) = measured.first().cloned() else { return };
    println!("\n| {threads} threads, times as fast as {} |{titles} first token |", engines[0].name);
    println!("|---|{}---|", "---|".repeat(tasks.len()));
    for (engine, measured) in engines.iter().zip(&*measured).skip(1) {
        let ratios = |ours: &[f64], theirs: &[f64]| -> String {
            // Runs of one round stood next to each other: their ratios are compared, not the times.
            let mut ratios: Vec<f64> = theirs.iter().zip(ours).map(|(theirs, ours)| theirs / ours).collect();
            if ratios.is_empty() {
                return " |".to_owned();
            }
            let (middle, spread) = summary(&mut ratios);
            format!(" {middle:.2} ± {:.0} % |", spread * 100.0)
        };
        let mut row = format!("| {} |", engine.name);
        for (ours, theirs) in measured.tasks.iter().zip(&base.tasks) {
            row += &ratios(ours, theirs);
        }
        row += &ratios(&measured.first_token, &base.first_token);
        println!("{row}");
    }
}

/// The median and how far the furthest value is from it, as a share of it.
fn summary(values: &mut [f64]) -> (f64, f64) {
    let middle = median(values);
    let furthest = values.iter().map(|value| (value / middle - 1.0).abs()).fold(0.0, f64::max);
    (middle, furthest)
}

/// Ternion as an engine.
fn serve(model: &std::path::Path, threads: usize) -> Result<()> {
    let (model, team) = load(model, threads)?;
    let mut session = Session::new(Arc::clone(&model), team, &SessionOptions::default())?;
    let mut output = std::io::stdout().lock();
    writeln!(output, "{{\"ready\":true}}")?;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let (what, count) = line.split_once(' ').context("expected a task and a number of tokens")?;
        let text = some_tokens(count.parse()?, model.config().vocabulary, 0);
        session.truncate(0);
        let start = Instant::now();
        // A prompt is read at once, what is generated one by one.
        for part in text.chunks(if what == "prompt" { text.len() } else { 1 }) {
            read(&mut session, part)?;
        }
        let time = start.elapsed();
        writeln!(output, "{{\"seconds\":{}}}", time.as_secs_f64())?;
    }
    Ok(())
}
