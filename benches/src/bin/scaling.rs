//! A model of decoding speed on paper, checked on shapes that it was not made from, and what it says of larger ones.
//!
//! One token of a dense model takes `T = max(bytes / (e · B), bytes / (c · R)) + layers · o`:
//!
//! - `bytes` are what a token reads: packed projections and the screen of the head, as the loader reports them;
//! - `B` is the memory bandwidth that `ternion doctor` reports for these threads;
//! - `R` is what one core gets through when its weights are in a cache, and `c` the number of threads: the lab's figure
//!   for the tuned kernel of a small matrix;
//! - `e`, the share of the bandwidth that a forward pass reaches, and `o`, what a layer takes besides reading, are solved
//!   from the times of two small shapes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::Parser;
use ternion_benches::Matrix;
use ternion_benches::model::{median, read};
use ternion_compiler::{Columns, Cpu, KernelSpec, compile};
use ternion_runtime::formats::synth::Recipe;
use ternion_runtime::formats::{Activation, Checkpoint, Projection};
use ternion_runtime::model::{KernelChoice, Model, Session, SessionOptions, problems};
use ternion_runtime::team::Team;
use ternion_runtime::verify::some_tokens;
use ternion_tuner::{Budget, CacheDir, Choices, Class, Request, SystemStopwatch, choose, probe};

/// The shapes that the model is made from.
const MADE_FROM: [&str; 2] = ["125M", "0.7B"];

/// Paper machines: what their memory can deliver at most, in bytes per second (transfers per second times width).
const MACHINES: [(&str, f64); 3] = [
    ("laptop, 128 bits of LPDDR5X-7500", 7500e6 * 16.0),
    ("desktop, 2 channels of DDR5-5600", 5600e6 * 16.0),
    ("server, 12 channels of DDR5-4800", 4800e6 * 96.0),
];

/// The shapes to say something of.
const ON_PAPER: [&str; 3] = ["3B", "8B", "100B"];

/// A model of decoding speed, its errors, and what follows from it
#[derive(Debug, Parser)]
struct Arguments {
    /// Numbers of threads
    #[arg(short, long, value_delimiter = ',', default_values = ["1", "2"])]
    threads: Vec<usize>,
    /// Shapes to check the model on
    #[arg(long, value_delimiter = ',', default_values = ["Falcon3-1B", "2B-4T"])]
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

/// The model of one number of threads.
struct Paper {
    threads: usize,
    /// What doctor reports, bytes per second.
    bandwidth: f64,
    /// Bytes per second and core on weights in a cache.
    cached: f64,
    /// e
    share: f64,
    /// o, in seconds.
    per_layer: f64,
}

impl Paper {
    fn seconds(&self, bytes: f64, layers: usize) -> f64 {
        let memory = bytes / (self.share * self.bandwidth);
        memory.max(bytes / (self.cached * self.threads as f64)) + layers as f64 * self.per_layer
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let machine = probe();
    println!("{}\n", machine.brand);
    let mut papers = Vec::new();
    for threads in arguments.threads {
        let team = Arc::new(Team::new(threads)?);
        let measure = |name: &str| measure(name, &team, arguments.n);
        let made_from = MADE_FROM.map(measure);
        let [small, large] = made_from;
        let (small, large) = (small?, large?);
        let bandwidth = machine.memory_bandwidth(&*team, &SystemStopwatch::start()).context("too little memory")?;
        // Two equations in 1 / e and o.
        let (a, b) = (small.bytes / bandwidth, large.bytes / bandwidth);
        let determinant = a * large.layers as f64 - b * small.layers as f64;
        let inverse = (small.seconds * large.layers as f64 - large.seconds * small.layers as f64) / determinant;
        let per_layer = (a * large.seconds - b * small.seconds) / determinant;
        let paper = Paper { threads, bandwidth, cached: cached()?, share: 1.0 / inverse, per_layer };
        println!(
            "{threads} threads: doctor reads {:.1} GB/s; a core gets through {:.1} GB/s of cached weights; \
             e = {:.2}, o = {:.0} µs\n",
            bandwidth / 1e9,
            paper.cached / 1e9,
            paper.share,
            per_layer * 1e6
        );
        println!("| {threads} threads | MB per token | ms measured | ms on paper | error |\n|---|---|---|---|---|");
        let checks = arguments.check.iter().map(|name| measure(name)).collect::<Result<Vec<_>>>()?;
        for (shape, used) in [(small, true), (large, true)].into_iter().chain(checks.into_iter().map(|s| (s, false))) {
            let predicted = paper.seconds(shape.bytes, shape.layers);
            let error = if used {
                "made from it".to_owned()
            } else {
                format!("{:+.0} %", (predicted / shape.seconds - 1.0) * 100.0)
            };
            println!(
                "| {} | {:.0} | {:.2} | {:.2} | {error} |",
                shape.name,
                shape.bytes / 1e6,
                shape.seconds * 1e3,
                predicted * 1e3
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
fn tuned(recipe: &Recipe, cpu: &Cpu, team: &Team) -> Result<Choices> {
    let request = Request::new(problems(&recipe.config), Budget::RACE);
    Ok(choose(&request, cpu, team, &CacheDir::default(), &|_| {})?)
}

/// Times a dense model of a shape.
fn measure(name: &str, team: &Arc<Team>, n: usize) -> Result<Shape> {
    eprintln!("measuring {name} with {} threads", ternion_tuner::Workers::threads(&**team));
    let cpu = Cpu::host().context("ternion emits code for x86-64 and aarch64 only")?;
    let mut recipe = Recipe::preset(name)?;
    recipe.config.activation = Activation::Silu;
    recipe.gate_sparsity = None;
    let (choices, layers) = (tuned(&recipe, &cpu, team)?, recipe.config.layers);
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

/// Bytes of weights per second that one core gets through when they are in a cache.
fn cached() -> Result<f64> {
    /// The key and value projections of 2B4T: 400 kB, in the second cache of every CPU since 2013.
    const SHAPE: (usize, usize) = (640, 2560);
    let cpu = Cpu::host().context("ternion emits code for x86-64 and aarch64 only")?;
    let team = Team::new(1)?;
    let choices = tuned(&Recipe::preset("2B-4T")?, &cpu, &team)?;
    let schedule = choices.get(SHAPE.0, SHAPE.1).context("no kernel was chosen")?.of(Class::One);
    let spec = KernelSpec { k: SHAPE.1, columns: Columns::One };
    let kernels = compile(&[(spec, schedule)], &cpu)?;
    let kernel = kernels.first().context("no kernel was compiled")?;
    let bytes = kernel.layout().bytes(SHAPE.0, SHAPE.1).context("a matrix that fits in memory")?;
    let weights = vec![0u8; bytes];
    let mut matrix = Matrix::new(kernel, SHAPE.0, 1, &weights);
    let mut best = Duration::MAX;
    for _ in 0..50 {
        let start = Instant::now();
        matrix.run(&team, 20);
        best = best.min(start.elapsed() / 20);
    }
    Ok(matrix.weight_bytes() as f64 / best.as_secs_f64())
}

/// Larger shapes on other machines.
fn on_paper(paper: &Paper) -> Result<()> {
    println!("| tokens/s at most | bytes per token | {} |", MACHINES.map(|(name, _)| name).join(" | "));
    println!("|---|---|---|---|---|");
    for name in ON_PAPER {
        let config = Recipe::preset(name)?.config;
        let weights = |projections: &[Projection]| -> f64 {
            let weights = projections.iter().map(|p| p.shape(&config)).map(|(m, k)| (m * k) as f64).sum::<f64>();
            weights * config.layers as f64
        };
        let all = weights(&Projection::ALL);
        let (up, down) = (weights(&[Projection::Up]), weights(&[Projection::Down]));
        let head = (config.vocabulary * config.hidden) as f64;
        // What a trained relu² model shows: 80 % of gates and 90 % of down_proj's inputs are 0. Gathered bytes count twice.
        let sparse = 2.0 * (0.2 * up + 0.1 * down);
        for (what, weights) in [
            ("2 bits", all * 2.0),
            ("1.6 bits", all * 1.6),
            ("2 bits, sparse", (all - up - down + sparse) * 2.0),
            ("1.6 bits, sparse", (all - up - down) * 1.6 + sparse * 2.0),
        ] {
            let bytes = weights / 8.0 + head;
            let mut row = format!("| {name}, {what} | {:.2} GB |", bytes / 1e9);
            for (_, bandwidth) in MACHINES {
                let seconds = bytes / (paper.share * bandwidth) + config.layers as f64 * paper.per_layer;
                row += &format!(" {:.1} |", 1.0 / seconds);
            }
            println!("{row}");
        }
    }
    println!("\nCores that it takes to keep up with the memory, at this CPU's {:.1} GB/s each:", paper.cached / 1e9);
    for (name, bandwidth) in MACHINES {
        println!("- {name}: {:.0}", (paper.share * bandwidth / paper.cached).ceil());
    }
    Ok(())
}
