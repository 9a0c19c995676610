//! `ternion bench`: tokens per second, in the table that users of similar programs know, and where the time goes.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;
use serde::Serialize;
use ternion_runtime::formats::{Checkpoint, ModelConfig, Projection};
use ternion_runtime::model::{KernelChoice, KvType, Model, Session, SessionOptions, Wanted, start_request};
use ternion_runtime::team::{Team, available_threads};
use ternion_tuner::{Choices, Class, SystemStopwatch, probe};

use crate::UsageError;
use crate::arguments::{ForcedKernel, ReadOptions, parse_kernel};
use crate::model::{cpu, forced, load, open, origin, schedules};
use crate::output::{self, print};
use crate::terminal::{Bar, bytes, note};

#[derive(Debug, Args)]
pub(crate) struct Bench {
    /// A prepared file (.tern), a Hugging Face directory or a GGUF file; without it, the embedded model
    model: Option<PathBuf>,
    #[command(flatten)]
    read: ReadOptions,
    /// Prompt lengths in tokens (pp); 0 for none
    #[arg(short = 'p', long = "n-prompt", value_name = "TOKENS", value_delimiter = ',', default_value = "128")]
    prompts: Vec<usize>,
    /// Numbers of tokens to generate (tg); 0 for none
    #[arg(short = 'n', long = "n-gen", value_name = "TOKENS", value_delimiter = ',', default_value = "64")]
    generate: Vec<usize>,
    /// Numbers of threads [default: every processor that this process may use]
    #[arg(short, long, value_delimiter = ',')]
    threads: Vec<NonZeroUsize>,
    /// Rounds; every test runs once in each
    #[arg(short, long, value_name = "ROUNDS", default_value = "5")]
    repetitions: NonZeroUsize,
    /// Type of the key-value cache
    #[arg(long, value_name = "TYPE", default_value = "f16")]
    kv: KvType,
    /// Use this kernel family or schedule instead of the fastest known
    #[arg(long, value_name = "FAMILY|SCHEDULE", value_parser = parse_kernel)]
    kernel: Option<ForcedKernel>,
    /// Also show which kernels the layers run on, and what each takes of a token's time
    #[arg(long)]
    kernels: bool,
    /// Print one JSON object
    #[arg(long, conflicts_with = "csv")]
    json: bool,
    /// Print comma-separated values
    #[arg(long)]
    csv: bool,
}

/// What one test does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Pp,
    Tg,
}

/// A test and its times.
struct Test {
    kind: Kind,
    tokens: usize,
    /// Which of the teams.
    team: usize,
    seconds: Vec<f64>,
}

#[derive(Serialize)]
struct Line {
    model: String,
    size_bytes: u64,
    parameters: u64,
    threads: usize,
    test: String,
    tokens_per_s: f64,
    /// Half the distance between the quartiles.
    spread: f64,
    samples: Vec<f64>,
    /// Bytes of weights that one generated token reads.
    bytes_per_token: Option<u64>,
    /// Of the measured memory bandwidth, in percent.
    memory_roofline_percent: Option<f64>,
}

#[derive(Serialize)]
struct Outcome {
    ternion: &'static str,
    cpu: String,
    lines: Vec<Line>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    kernels: Vec<KernelLine>,
    starts: Vec<Start>,
}

/// What a start took on one number of threads.
#[derive(Serialize)]
struct Start {
    threads: usize,
    /// Looking up schedules, or racing them, in milliseconds.
    schedules_ms: f64,
    /// Whether all of them were known.
    known: bool,
    /// Compiling and checking kernels, in milliseconds.
    compile_ms: f64,
    /// Reading and repacking weights, in milliseconds.
    weights_ms: f64,
    /// Bytes of weights that are used as they lie in the file.
    stored_bytes: usize,
    /// Bytes of weights that were computed from others.
    converted_bytes: usize,
    #[serde(skip)]
    origin: String,
}

impl Start {
    fn of(runner: &Runner) -> Self {
        let report = runner.session.model().report();
        let choices = runner.choices.as_ref();
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        Self {
            threads: runner.threads,
            schedules_ms: choices.map_or(0.0, |choices| ms(choices.spent)),
            known: choices.is_none_or(Choices::all_known),
            compile_ms: ms(report.compile),
            weights_ms: ms(report.weights),
            stored_bytes: report.stored(),
            converted_bytes: report.converted(),
            origin: origin(&report),
        }
    }

    fn line(&self) -> String {
        let Self { threads, schedules_ms, known, compile_ms, weights_ms, origin, .. } = self;
        let schedules = if *known { "known schedules" } else { "raced schedules" };
        format!(
            "start with {threads} threads: {schedules} {schedules_ms:.1} ms · compile {compile_ms:.0} ms · weights {weights_ms:.0} ms ({origin})"
        )
    }
}

/// What one projection of all layers takes.
#[derive(Serialize)]
struct KernelLine {
    threads: usize,
    projection: String,
    m: usize,
    k: usize,
    layers: usize,
    class: Class,
    schedule: String,
    /// One product, in microseconds.
    us: Option<f64>,
    /// All layers' products, in milliseconds per token.
    ms_per_token: Option<f64>,
    /// Of the measured time of a token, in percent.
    percent: Option<f64>,
}

/// A number of threads, and the model as it runs on them.
struct Runner {
    threads: usize,
    session: Session,
    choices: Option<Choices>,
    bandwidth: Option<f64>,
}

pub(crate) fn bench(options: &Bench) -> Result<ExitCode> {
    let checkpoint = open(options.model.as_deref(), &options.read)?;
    let config = checkpoint.config().clone();
    let longest = options.prompts.iter().chain(&options.generate).copied().max().unwrap_or(0);
    if longest == 0 {
        return Err(UsageError("nothing to measure: give -p or -n".to_owned()).into());
    }
    if longest > config.context {
        let context = config.context;
        return Err(UsageError(format!("the model's context holds {context} tokens, not {longest}")).into());
    }
    let mut runners = runners(options, &checkpoint, longest)?;
    let mut tests = tests(options, runners.len());
    run_all(&mut tests, &mut runners, config.vocabulary, options.repetitions.get())?;
    let outcome = outcome(options, &checkpoint, &config, &tests, &runners);
    if options.json {
        output::json(&outcome)?;
    } else if options.csv {
        print(&csv(&outcome))?;
    } else {
        print(&table(&outcome))?;
        outcome.starts.iter().for_each(|start| note(&start.line()));
    }
    Ok(ExitCode::SUCCESS)
}

/// One for each number of threads.
fn runners(options: &Bench, checkpoint: &Checkpoint, longest: usize) -> Result<Vec<Runner>> {
    let cpu = cpu()?;
    let mut threads: Vec<usize> = options.threads.iter().map(|threads| threads.get()).collect();
    if threads.is_empty() {
        threads.push(available_threads());
    }
    threads.dedup();
    let make = |threads: usize| {
        let team = Arc::new(Team::new(threads)?);
        let (kernels, choices) = match options.kernel {
            Some(kernel) => (forced(kernel), None),
            None => {
                let choices = schedules(&start_request(checkpoint), &cpu, &team)?;
                (KernelChoice::Tuned(choices.clone()), Some(choices))
            }
        };
        let bandwidth = probe().memory_bandwidth(&*team, &SystemStopwatch::start());
        let model: Model = load(checkpoint, &kernels, &cpu, &team)?;
        let session = SessionOptions { kv: options.kv, context: Some(longest), ..SessionOptions::default() };
        let session = Session::new(Arc::new(model), team, &session)?;
        Ok(Runner { threads, session, choices, bandwidth })
    };
    threads.into_iter().map(make).collect()
}

fn tests(options: &Bench, teams: usize) -> Vec<Test> {
    let prompts = options.prompts.iter().map(|tokens| (Kind::Pp, *tokens));
    let generate = options.generate.iter().map(|tokens| (Kind::Tg, *tokens));
    let all: Vec<(Kind, usize)> = prompts.chain(generate).filter(|(_, tokens)| *tokens > 0).collect();
    let of =
        |team| all.iter().map(move |(kind, tokens)| Test { kind: *kind, tokens: *tokens, team, seconds: Vec::new() });
    (0..teams).flat_map(of).collect()
}

/// Runs every test once to warm up, and then once per round, so that a noisy moment hits all alike.
fn run_all(tests: &mut [Test], runners: &mut [Runner], vocabulary: usize, rounds: usize) -> Result<()> {
    let bar = Bar::count("measuring", ((rounds + 1) * tests.len()) as u64);
    let mut done = 0;
    for round in 0..=rounds {
        for test in tests.iter_mut() {
            bar.set(done);
            done += 1;
            let time = run(test.kind, test.tokens, &mut runners[test.team].session, vocabulary)?;
            if round > 0 {
                test.seconds.push(time.as_secs_f64());
            }
            if crate::interrupt::requested() {
                return Err(ternion_tuner::IsolationError::Interrupted.into());
            }
        }
    }
    Ok(())
}

/// Time of one test on an empty sequence. Which tokens go through does not matter for the time.
fn run(kind: Kind, tokens: usize, session: &mut Session, vocabulary: usize) -> Result<Duration> {
    session.truncate(0);
    let token = |at: usize| (at.wrapping_mul(7919) % vocabulary) as u32;
    let prompt: Vec<u32> = (0..tokens).map(token).collect();
    let begin = Instant::now();
    match kind {
        Kind::Pp => {
            session.read(&prompt)?;
            session.candidates(Wanted::Top(1), &[]);
        }
        Kind::Tg => {
            for token in prompt {
                session.read(&[token])?;
                session.candidates(Wanted::Top(1), &[]);
            }
        }
    }
    Ok(begin.elapsed())
}

fn outcome(
    options: &Bench,
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    tests: &[Test],
    runners: &[Runner],
) -> Outcome {
    let lines: Vec<Line> = tests.iter().map(|test| line(checkpoint, config, test, &runners[test.team])).collect();
    let kernels = if options.kernels {
        tests.iter().zip(&lines).flat_map(|(test, line)| kernels(config, test, line, &runners[test.team])).collect()
    } else {
        Vec::new()
    };
    let starts = runners.iter().map(Start::of).collect();
    Outcome { ternion: env!("CARGO_PKG_VERSION"), cpu: probe().signature(), lines, kernels, starts }
}

fn line(checkpoint: &Checkpoint, config: &ModelConfig, test: &Test, runner: &Runner) -> Line {
    let mut speeds: Vec<f64> = test.seconds.iter().map(|seconds| test.tokens as f64 / seconds).collect();
    speeds.sort_by(f64::total_cmp);
    let tokens_per_s = median(&speeds);
    let quartile = |part: usize| speeds[(speeds.len() - 1) * part / 4];
    let model = runner.session.model();
    let report = model.report();
    let ternary = (report.packed_bytes + report.mapped_bytes) as u64;
    let screened = report.screen_bytes as u64;
    let head = if screened > 0 { screened } else { (config.vocabulary * config.hidden * 2) as u64 };
    let per_token = (test.kind == Kind::Tg).then_some(ternary + head);
    let percent = per_token.zip(runner.bandwidth).map(|(bytes, roof)| 100.0 * bytes as f64 * tokens_per_s / roof);
    let kind = if test.kind == Kind::Pp { "pp" } else { "tg" };
    Line {
        model: checkpoint.name(),
        size_bytes: crate::purpose::model_bytes(config),
        parameters: parameters(config),
        threads: runner.threads,
        test: format!("{kind}{}", test.tokens),
        tokens_per_s,
        spread: (quartile(3) - quartile(1)) / 2.0,
        samples: test.seconds.iter().map(|seconds| test.tokens as f64 / seconds).collect(),
        bytes_per_token: per_token,
        memory_roofline_percent: percent,
    }
}

fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}

/// Weights of all matrices; the head counts once if it is the embedding.
fn parameters(config: &ModelConfig) -> u64 {
    let layer: usize = Projection::ALL.iter().map(|projection| projection.shape(config)).map(|(m, k)| m * k).sum();
    let tables = if config.tied_head { 1 } else { 2 };
    (layer * config.layers + tables * config.vocabulary * config.hidden) as u64
}

/// What each projection takes of a token's time, by the tuner's measurements.
fn kernels(config: &ModelConfig, test: &Test, line: &Line, runner: &Runner) -> Vec<KernelLine> {
    let class = match test.kind {
        Kind::Tg => Class::One,
        Kind::Pp => Class::of(test.tokens.min(ternion_runtime::model::DEFAULT_CHUNK)),
    };
    let of = |projection: &Projection| {
        let (m, k) = projection.shape(config);
        let choices = runner.choices.as_ref();
        let found = choices?.found.iter().find(|found| (found.problem.m, found.problem.k) == (m, k))?;
        // A short race measures two classes; the nearest tells what a product costs.
        let nearest = |result: &&ternion_tuner::ClassResult| result.class.index().abs_diff(class.index());
        let same_kind = found.results.iter().filter(|result| (result.class == Class::One) == (class == Class::One));
        let result = same_kind.min_by_key(nearest);
        let us = result.map(|result| result.figures.median_us);
        let ms = result
            .map(|result| result.figures.median_us * 1e-3 * config.layers as f64 / result.class.measured() as f64);
        Some(KernelLine {
            threads: runner.threads,
            projection: format!("{projection:?}").to_lowercase(),
            m,
            k,
            layers: config.layers,
            class,
            schedule: found.choice.of(class).to_string(),
            us,
            ms_per_token: ms,
            percent: ms.map(|ms| 100.0 * ms * 1e-3 * line.tokens_per_s),
        })
    };
    Projection::ALL.iter().filter_map(of).collect()
}

/// A markdown table.
fn table(outcome: &Outcome) -> String {
    let mut text = String::from(
        "| model | size | params | threads | test | t/s | read per token | of memory |\n\
         | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n",
    );
    for line in &outcome.lines {
        text += &format!(
            "| {} | {} | {:.2} B | {} | {} | {:.2} ± {:.2} | {} | {} |\n",
            line.model,
            bytes(line.size_bytes),
            line.parameters as f64 / 1e9,
            line.threads,
            line.test,
            line.tokens_per_s,
            line.spread,
            line.bytes_per_token.map_or("".to_owned(), bytes),
            line.memory_roofline_percent.map_or("".to_owned(), |percent| format!("{percent:.0} %")),
        );
    }
    if !outcome.kernels.is_empty() {
        text += "\n| threads | n | projection | matrix | layers | µs | ms per token | of the time | schedule |\n\
                 | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | --- |\n";
    }
    let number = |value: Option<f64>, digits: usize| value.map_or("".to_owned(), |value| format!("{value:.digits$}"));
    for line in &outcome.kernels {
        text += &format!(
            "| {} | {} | {} | {}x{} | {} | {} | {} | {} | {} |\n",
            line.threads,
            line.class,
            line.projection,
            line.m,
            line.k,
            line.layers,
            number(line.us, 1),
            number(line.ms_per_token, 3),
            line.percent.map_or("".to_owned(), |percent| format!("{percent:.1} %")),
            line.schedule
        );
    }
    if outcome.kernels.iter().any(|line| line.us.is_none()) {
        text += "\nWithout µs: not timed itself, for example the file's own layout where it is nearly as fast as the fastest.\n";
    }
    text
}

fn csv(outcome: &Outcome) -> String {
    let mut text = String::from(
        "model,size_bytes,parameters,threads,test,tokens_per_s,spread,bytes_per_token,memory_roofline_percent\n",
    );
    for line in &outcome.lines {
        // Quoted as RFC 4180 has it.
        text += &format!(
            "\"{}\",{},{},{},{},{},{},{},{}\n",
            line.model.replace('"', "\"\""),
            line.size_bytes,
            line.parameters,
            line.threads,
            line.test,
            line.tokens_per_s,
            line.spread,
            line.bytes_per_token.map_or(String::new(), |bytes| bytes.to_string()),
            line.memory_roofline_percent.map_or(String::new(), |percent| format!("{percent:.2}")),
        );
    }
    text
}
