//! A model of decoding speed on paper, made from what `ternion doctor` and `ternion lab` measure, checked on whole models,
//! and what it says of larger ones.
//!
//! One token of a dense model takes `T = bytes / min(B, c · R) + calls · o`:
//!
//! - `bytes` are what a token reads: packed projections and the screen of the head;
//! - `B` is the bandwidth of memory that doctor reports for `c` threads; for a model that fits into the last cache, what the
//!   lab reads of as many bytes again and again;
//! - `R` is what one of these `c` cores gets through when its weights are in its own cache, and `o` what starting and ending
//!   a product on all of them takes: the slope and the intercept of the lab's times of the tuned kernel on two hot matrices;
//! - `calls` is how often a token sets all threads to work: six times a layer, and for the head.
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

/// The matrices that the lab measures: a few rows and four times as many of 2B4T's hidden size, which the second cache of
/// every CPU since 2013 holds.
const HOT: [Rows; 2] = [Rows { m: 256, k: 2560 }, Rows { m: 1024, k: 2560 }];

/// Rounds of the lab.
const ROUNDS: usize = 101;

/// How often a layer of a dense model sets all threads to work: query, key and value at once, attention, output, gate, up, down.
const CALLS_PER_LAYER: usize = 6;

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

/// A shape as measured.
struct Shape {
    name: String,
    layers: usize,
    /// Bytes that a token reads.
    bytes: f64,
    /// Median seconds per token.
    seconds: f64,
}

/// The model of one number of threads, but for the bandwidth: the lab's figures.
struct Paper {
    threads: usize,
    /// R, bytes per second and core.
    core: f64,
    /// o, seconds.
    call: f64,
}

impl Paper {
    /// Seconds of a token that reads `bytes`, which come at `bandwidth`.
    fn seconds(&self, bytes: f64, bandwidth: f64, layers: usize) -> f64 {
        let calls = CALLS_PER_LAYER * layers + 1;
        bytes / bandwidth.min(self.core * self.threads as f64) + calls as f64 * self.call
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let machine = probe();
    println!("{}\n", machine.brand);
    let last_level = machine.last_level_bytes() as f64;
    let stopwatch = SystemStopwatch::start();
    let mut papers = Vec::new();
    for threads in arguments.threads {
        let team = Arc::new(Team::new(threads)?);
        let memory = machine.memory_bandwidth(&*team, &stopwatch).context("too little memory")?;
        let mut bench = Bench::new(&*team, &stopwatch)?;
        let schedule = tuned(&Recipe::preset("2B-4T")?, &team)?
            .get(640, 2560)
            .context("no kernel was chosen for 640x2560")?
            .of(Class::One);
        let (core, call) = cores(&mut bench, schedule)?;
        let paper = Paper { threads, core, call };
        println!(
            "{threads} threads: doctor reads {:.1} GB/s; the lab: a core gets through {:.1} GB/s of cached weights with \
             `{schedule}`, a call takes {:.1} µs\n",
            memory / 1e9,
            core / 1e9,
            call * 1e6
        );
        println!(
            "| {threads} threads | MB per token | GB/s of as many bytes | ms measured | ms on paper | error |\n|---|---|---|---|---|---|"
        );
        for name in &arguments.check {
            let shape = measure(name, &team, arguments.n)?;
            let bandwidth = if shape.bytes < last_level { cached(&mut bench, schedule, shape.bytes)? } else { memory };
            let predicted = paper.seconds(shape.bytes, bandwidth, shape.layers);
            println!(
                "| {} | {:.0} | {:.1} | {:.2} | {:.2} | {:+.0} % |",
                shape.name,
                shape.bytes / 1e6,
                bandwidth / 1e9,
                shape.seconds * 1e3,
                predicted * 1e3,
                (predicted / shape.seconds - 1.0) * 100.0
            );
        }
        println!();
        papers.push(paper);
    }
    if let Some(paper) = papers.last() {
        on_paper(paper)?;
    }
    Ok(())
}

/// The tuned kernels of a shape.
fn tuned(recipe: &Recipe, team: &Team) -> Result<Choices> {
    let cpu = Cpu::host().context("ternion emits code for x86-64 and aarch64 only")?;
    let request = Request::new(problems(&recipe.config), Budget::RACE);
    Ok(choose(&request, &cpu, team, &CacheDir::default(), &|_| {})?)
}

/// Bytes per second that one core gets through when its weights are in its cache, and the seconds that a product takes
/// besides.
fn cores(bench: &mut Bench<'_>, schedule: Schedule) -> Result<(f64, f64)> {
    let cases = HOT.map(|shape| Case { shape, n: 1, schedule, weights: Weights::Hot, zeros: 0 });
    let bytes = cases.map(|case| case.matrix_bytes());
    let [Some(few), Some(many)] = bytes else { anyhow::bail!("no room for the lab's matrices") };
    let mut entrants = bench.prepare(&cases).into_iter().collect::<Result<Vec<_>, _>>()?;
    let mut samples = bench.measure(&mut entrants, ROUNDS, &mut |_| false);
    let times: Vec<f64> = samples.products.iter_mut().map(|times| median(times)).collect();
    let per_byte = (times[1] - times[0]).max(f64::MIN_POSITIVE) / (many - few) as f64;
    let call = (times[0] - few as f64 * per_byte).max(0.0);
    Ok((1.0 / (per_byte * bench.threads() as f64), call))
}

/// Bytes per second of reading as many bytes as a token does again and again, as the lab reads beside hot kernels.
fn cached(bench: &mut Bench<'_>, schedule: Schedule, bytes: f64) -> Result<f64> {
    let k = HOT[0].k;
    let rows = Case { shape: Rows { m: 64, k }, n: 1, schedule, weights: Weights::Hot, zeros: 0 };
    let row_bytes = rows.matrix_bytes().context("a matrix that fits in memory")? as f64 / 64.0;
    let case = Case { shape: Rows { m: (bytes / row_bytes) as usize, k }, ..rows };
    let mut entrants = bench.prepare(&[case]).into_iter().collect::<Result<Vec<_>, _>>()?;
    let mut limits = bench.measure(&mut entrants, 10, &mut |_| false).limits;
    let speeds = limits.hot.iter_mut().filter(|speeds| !speeds.is_empty()).map(|speeds| median(speeds));
    speeds.reduce(f64::max).context("nothing was read")
}

/// Times a dense model of a shape.
fn measure(name: &str, team: &Arc<Team>, n: usize) -> Result<Shape> {
    eprintln!("measuring {name} with {} threads", team.threads());
    let cpu = Cpu::host().context("ternion emits code for x86-64 and aarch64 only")?;
    let mut recipe = Recipe::preset(name)?;
    recipe.config.activation = Activation::Silu;
    recipe.gate_sparsity = None;
    let (choices, layers) = (tuned(&recipe, team)?, recipe.config.layers);
    let checkpoint = Checkpoint::synthetic(recipe)?;
    let model = Model::load(&checkpoint, &KernelChoice::Tuned(choices), &cpu, &**team, &|_| {})?;
    let report = model.report();
    let bytes = (report.packed_bytes + report.mapped_bytes + report.screen_bytes) as f64;
    let text = some_tokens(n, model.config().vocabulary, 0);
    let mut session = Session::new(Arc::new(model), Arc::clone(team), &SessionOptions::default())?;
    let mut times = Vec::with_capacity(n);
    for token in text {
        times.push(read(&mut session, &[token])?.1);
    }
    Ok(Shape { name: name.to_owned(), layers, bytes, seconds: median(&mut times).as_secs_f64() })
}

/// Weights of some projections of all layers.
fn weights(config: &ModelConfig, projections: &[Projection]) -> f64 {
    let weights = projections.iter().map(|p| p.shape(config)).map(|(m, k)| (m * k) as f64).sum::<f64>();
    weights * config.layers as f64
}

/// Larger shapes on other machines.
fn on_paper(paper: &Paper) -> Result<()> {
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
                let seconds = bytes / bandwidth + (CALLS_PER_LAYER * config.layers + 1) as f64 * paper.call;
                row += &format!(" {:.1} |", 1.0 / seconds);
            }
            println!("{row}");
        }
    }
    println!("\nCores that it takes to keep up with the memory, at this CPU's {:.1} GB/s each:", paper.core / 1e9);
    for (name, bandwidth) in MACHINES {
        println!("- {name}: {:.0}", (bandwidth / paper.core).ceil());
    }
    Ok(())
}
