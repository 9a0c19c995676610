//! A model of decoding speed on paper, made from what `ternion doctor` and `ternion lab` measure, checked on whole models,
//! and what it says of larger ones.
//!
//! One token of a dense model takes `T = bytes / min(s · B, c · R)`:
//!
//! - `bytes` are what a token reads: packed projections and the screen of the head;
//! - `B` is the bandwidth of memory that doctor reports for `c` threads, and `s` the share of it that the lab sees the tuned
//!   kernel of the shape's gate reach when its weights are cold, at most 1: what is more came from a cache or in a better moment;
//! - `R` is what one of the `c` cores gets through when its weights are in its own cache.
//!
//! No time of a whole model is put in: all of those are checks.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use clap::Parser;
use ternion_benches::model::{median, read};
use ternion_compiler::{Cpu, Schedule};
use ternion_lab::{Bench, Case, Shape as Rows, Weights};
use ternion_runtime::formats::synth::Recipe;
use ternion_runtime::formats::{Activation, Checkpoint, ModelConfig, Projection};
use ternion_runtime::model::{KernelChoice, Model, Session, SessionOptions, problems};
use ternion_runtime::team::Team;
use ternion_runtime::verify::some_tokens;
use ternion_tuner::{Budget, CacheDir, Choices, Class, Request, SystemStopwatch, Workers as _, choose, probe};

/// Paper machines: what their memory can deliver at most, in bytes per second (transfers per second times width).
const MACHINES: [(&str, f64); 3] = [
    ("laptop, 128 bits of LPDDR5X-7500", 7500e6 * 16.0),
    ("desktop, 2 channels of DDR5-5600", 5600e6 * 16.0),
    ("server, 12 channels of DDR5-4800", 4800e6 * 96.0),
];

/// The shapes to say something of.
const ON_PAPER: [&str; 3] = ["3B", "8B", "100B"];

/// Rounds of the lab.
const ROUNDS: usize = 101;

/// A model of decoding speed made from doctor's and the lab's figures, its errors, and what follows from it
#[derive(Debug, Parser)]
struct Arguments {
    /// Numbers of threads
    #[arg(short, long, value_delimiter = ',', default_values = ["1", "2"])]
    threads: Vec<usize>,
    /// Shapes to check the model on
    #[arg(long, value_delimiter = ',', default_values = ["125M", "0.7B", "Falcon3-1B", "2B-4T"])]
    check: Vec<String>,
    /// Tokens to time per shape
    #[arg(short, default_value = "24")]
    n: usize,
}

/// What the largest of the checked shapes says of other machines.
struct Largest {
    /// Share of the bandwidth.
    share: f64,
    /// Bytes per second of one core.
    core: f64,
}

/// A shape as measured.
struct Shape {
    config: ModelConfig,
    choices: Choices,
    /// Bytes that a token reads.
    bytes: f64,
    /// Median seconds per token.
    seconds: f64,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let machine = probe();
    println!("{}\n", machine.brand);
    let stopwatch = SystemStopwatch::start();
    let mut last = None;
    for threads in arguments.threads {
        let team = Arc::new(Team::new(threads)?);
        let memory = machine.memory_bandwidth(&*team, &stopwatch).context("too little memory")?;
        let mut bench = Bench::new(&*team, &stopwatch)?;
        println!("{threads} threads: doctor reads {:.1} GB/s\n", memory / 1e9);
        println!(
            "| {threads} threads | MB per token | s | c · R, GB/s | ms measured | ms on paper | error |\n\
             |---|---|---|---|---|---|---|"
        );
        for name in &arguments.check {
            let shape = measure(name, &team, arguments.n)?;
            let (m, k) = Projection::Gate.shape(&shape.config);
            let schedule = shape.choices.get(m, k).context("no kernel was chosen for the gate")?.of(Class::One);
            let cold = rate(&mut bench, schedule, Rows { m, k }, Weights::Cold)?.min(memory);
            let hot = rate(&mut bench, schedule, Rows { m: 512, k }, Weights::Hot)?;
            let predicted = shape.bytes / cold.min(hot);
            println!(
                "| {name} | {:.0} | {:.2} | {:.0} | {:.2} | {:.2} | {:+.0} % |",
                shape.bytes / 1e6,
                cold / memory,
                hot / 1e9,
                shape.seconds * 1e3,
                predicted * 1e3,
                (predicted / shape.seconds - 1.0) * 100.0
            );
            last = Some(Largest { share: cold / memory, core: hot / threads as f64 });
        }
        println!();
    }
    last.as_ref().map_or(Ok(()), on_paper)
}

/// The tuned kernels of a shape.
fn tuned(recipe: &Recipe, team: &Team) -> Result<Choices> {
    let cpu = Cpu::host().context("ternion emits code for x86-64 and aarch64 only")?;
    let request = Request::new(problems(&recipe.config), Budget::RACE);
    Ok(choose(&request, &cpu, team, &CacheDir::default(), &|_| {})?)
}

/// Bytes per second of a kernel in the lab.
fn rate(bench: &mut Bench<'_>, schedule: Schedule, shape: Rows, weights: Weights) -> Result<f64> {
    let case = Case { shape, n: 1, schedule, weights, zeros: 0 };
    let bytes = case.matrix_bytes().context("no room for the lab's matrices")?;
    let mut entrants = bench.prepare(&[case]).into_iter().collect::<Result<Vec<_>, _>>()?;
    let mut samples = bench.measure(&mut entrants, ROUNDS, &mut |_| false);
    let times = samples.products.first_mut().context("nothing was measured")?;
    Ok(bytes as f64 / median(times))
}

/// Times a dense model of a shape.
fn measure(name: &str, team: &Arc<Team>, n: usize) -> Result<Shape> {
    eprintln!("measuring {name} with {} threads", team.threads());
    let cpu = Cpu::host().context("ternion emits code for x86-64 and aarch64 only")?;
    let mut recipe = Recipe::preset(name)?;
    recipe.config.activation = Activation::Silu;
    recipe.gate_sparsity = None;
    let (choices, config) = (tuned(&recipe, team)?, recipe.config.clone());
    let checkpoint = Checkpoint::synthetic(recipe)?;
    let model = Model::load(&checkpoint, &KernelChoice::Tuned(choices.clone()), &cpu, &**team, &|_| {})?;
    let report = model.report();
    let bytes = (report.packed_bytes + report.mapped_bytes + report.screen_bytes) as f64;
    let text = some_tokens(n, model.config().vocabulary, 0);
    let mut session = Session::new(Arc::new(model), Arc::clone(team), &SessionOptions::default())?;
    let mut times = Vec::with_capacity(n);
    for token in text {
        times.push(read(&mut session, &[token])?.1);
    }
    Ok(Shape { config, choices, bytes, seconds: median(&mut times).as_secs_f64() })
}

/// Weights of some projections of all layers.
fn weights(config: &ModelConfig, projections: &[Projection]) -> f64 {
    let weights = projections.iter().map(|p| p.shape(config)).map(|(m, k)| (m * k) as f64).sum::<f64>();
    weights * config.layers as f64
}

/// Larger shapes on other machines.
fn on_paper(largest: &Largest) -> Result<()> {
    println!("| tokens/s at most | bytes per token | {} |", MACHINES.map(|(name, _)| name).join(" | "));
    println!("|---|---|---|---|---|");
    for name in ON_PAPER {
        let config = Recipe::preset(name)?.config;
        let all = weights(&config, &Projection::ALL);
        let (up, down) = (weights(&config, &[Projection::Up]), weights(&config, &[Projection::Down]));
        let head = (config.vocabulary * config.hidden) as f64;
        // What a trained relu² model shows: 80 % of gates and 90 % of down_proj's inputs are 0. Gathered bytes count twice.
        let sparse = 2.0 * (0.2 * up + 0.1 * down);
        for (what, bits) in [
            ("2 bits", all * 2.0),
            ("1.6 bits", all * 1.6),
            ("2 bits, sparse", (all - up - down + sparse) * 2.0),
            ("1.6 bits, sparse", (all - up - down) * 1.6 + sparse * 2.0),
        ] {
            let bytes = bits / 8.0 + head;
            let mut row = format!("| {name}, {what} | {:.2} GB |", bytes / 1e9);
            for (_, bandwidth) in MACHINES {
                // As many cores as the memory keeps busy.
                row += &format!(" {:.1} |", largest.share * bandwidth / bytes);
            }
            println!("{row}");
        }
    }
    println!("\nCores that it takes to keep up with the memory, at this CPU's {:.1} GB/s each:", largest.core / 1e9);
    for (name, bandwidth) in MACHINES {
        println!("- {name}: {:.0}", (largest.share * bandwidth / largest.core).ceil());
    }
    Ok(())
}
