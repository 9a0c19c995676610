//! Soak test: generates without a pause for minutes and looks at whether memory stays flat and speed what it was.
//!
//! Text after text is sampled until the context is full. Memory is compared where it is most and the same work has been
//! done: at the end of each text. What counts is anonymous memory, since pages of the model's file come in as tokens need
//! them. The verdict on memory is the exit code; speed is reported, for a machine may have other things to do.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use ternion_benches::model::{load, median};
use ternion_runtime::formats::GenerationDefaults;
use ternion_runtime::generate::{GenerateOptions, generate};
use ternion_runtime::model::{Session, SessionOptions};
use ternion_runtime::sampling::{Sampling, SamplingOptions};
use ternion_runtime::team::available_threads;
use ternion_runtime::verify::some_tokens;

/// Growth over a run that allocators and page sizes explain: as a share, and in bytes.
const FLAT: (f64, f64) = (0.002, 2e6);
/// Texts that it takes to judge, however long they take.
const ENOUGH: usize = 20;
/// Tokens of each text's prompt.
const PROMPT: usize = 8;

/// Memory and speed over minutes of continuous generation
#[derive(Debug, Parser)]
struct Arguments {
    /// A prepared file
    model: PathBuf,
    /// How long, in minutes; the text that is under way is finished
    #[arg(short, long, default_value = "10")]
    minutes: f64,
    /// Threads; without it, every processor that this process may use
    #[arg(short, long)]
    threads: Option<usize>,
    /// Length of each text in tokens, its prompt included
    #[arg(short, long, value_name = "TOKENS", default_value = "256")]
    context: usize,
    /// Tokens to draft at a time at most
    #[arg(long, value_name = "TOKENS", default_value = "0")]
    draft: usize,
    /// Seconds between two lines of output
    #[arg(long, value_name = "SECONDS", default_value = "10")]
    every: f64,
}

/// Bytes of this process.
#[derive(Clone, Copy, Debug)]
struct Memory {
    resident: f64,
    anonymous: f64,
}

impl Memory {
    fn now() -> Result<Self> {
        let status = std::fs::read_to_string("/proc/self/status").context("memory is read from /proc/self/status")?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            Some(1024.0 * line.trim_end_matches("kB").trim().parse::<f64>().ok()?)
        };
        let fields = field("VmRSS:").zip(field("RssAnon:"));
        let (resident, anonymous) = fields.context("/proc/self/status has no VmRSS and RssAnon")?;
        Ok(Self { resident, anonymous })
    }
}

/// A text that has been generated.
#[derive(Clone, Copy, Debug)]
struct Text {
    /// When it ended, in seconds since the start.
    end: f64,
    /// Tokens per second.
    speed: f64,
    /// Anonymous memory at its end, in bytes.
    memory: f64,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let time = |seconds: f64| Duration::try_from_secs_f64(seconds).ok().filter(|time| !time.is_zero());
    let duration = time(arguments.minutes * 60.0).context("--minutes: expected a time above 0")?;
    let every = time(arguments.every).context("--every: expected a time above 0")?;
    ensure!(arguments.context > PROMPT, "--context: expected more than {PROMPT} tokens");
    let (model, team) = load(&arguments.model, arguments.threads.unwrap_or_else(available_threads))?;
    let context = arguments.context.min(model.config().context);
    let prompt = some_tokens(PROMPT.min(context - 1), model.config().vocabulary, 0);
    let options = SessionOptions { context: Some(context), ..SessionOptions::default() };
    let mut session = Session::new(model, team, &options)?;
    let sampling = SamplingOptions { temperature: Some(1.0), top_k: Some(40), ..SamplingOptions::default() };
    let sampling = Sampling::new(&sampling, &GenerationDefaults::default())?;

    println!("seconds  tokens/s  VmRSS MB  anonymous MB");
    let (start, mut texts) = (Instant::now(), Vec::new());
    let (mut line, mut counted) = (start, 0u32);
    let mut failed = None;
    for sequence in 0.. {
        if start.elapsed() >= duration && texts.len() >= ENOUGH {
            break;
        }
        session.truncate(0);
        let options = GenerateOptions { sampling, sequence, limit: None, stop: Vec::new(), draft: arguments.draft };
        let begin = Instant::now();
        let generated = generate(&mut session, &prompt, &options, &mut |_| {
            counted += 1;
            if line.elapsed() >= every {
                match Memory::now() {
                    Ok(Memory { resident, anonymous }) => println!(
                        "{:7.0}  {:8.1}  {:8.1}  {:12.1}",
                        start.elapsed().as_secs_f64(),
                        f64::from(counted) / line.elapsed().as_secs_f64(),
                        resident / 1e6,
                        anonymous / 1e6
                    ),
                    Err(error) => failed = Some(error),
                }
                (line, counted) = (Instant::now(), 0);
            }
            if failed.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        if let Some(error) = failed {
            return Err(error);
        }
        let speed = generated.tokens.len() as f64 / begin.elapsed().as_secs_f64();
        texts.push(Text { end: start.elapsed().as_secs_f64(), speed, memory: Memory::now()?.anonymous });
    }
    Ok(judge(&texts))
}

/// Prints the verdict; success is flat memory.
fn judge(texts: &[Text]) -> ExitCode {
    let tenth = texts.len() / 10;
    let [first, last] = [&texts[..tenth], &texts[texts.len() - tenth..]].map(speed);
    // Buffers grow to their sizes while the first texts are generated.
    let settled = &texts[tenth..];
    let (slope, mean) = slope(settled);
    let growth = slope * (settled[settled.len() - 1].end - settled[0].end);
    let flat = growth <= (FLAT.0 * mean).max(FLAT.1);
    println!(
        "{} texts; anonymous memory {:.1} MB, slope {:+.4} MB per minute, {:+.2} MB over the run: {}",
        texts.len(),
        mean / 1e6,
        slope * 60.0 / 1e6,
        growth / 1e6,
        if flat { "flat" } else { "GROWING" }
    );
    let change = last.0 / first.0 - 1.0;
    let noise = first.1.max(last.1);
    println!(
        "first tenth {:.1} tokens/s ± {:.1} %, last tenth {:.1} tokens/s ± {:.1} %: {:+.1} %, {} the spread",
        first.0,
        first.1 * 100.0,
        last.0,
        last.1 * 100.0,
        change * 100.0,
        if change.abs() <= noise { "within" } else { "beyond" }
    );
    if flat { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Median speed of some texts, and how far the furthest is from it, as a share of it.
fn speed(texts: &[Text]) -> (f64, f64) {
    let mut speeds: Vec<f64> = texts.iter().map(|text| text.speed).collect();
    let middle = median(&mut speeds);
    (middle, speeds.iter().map(|speed| (speed / middle - 1.0).abs()).fold(0.0, f64::max))
}

/// The least-squares slope of memory in bytes per second, and its mean.
fn slope(texts: &[Text]) -> (f64, f64) {
    let n = texts.len() as f64;
    let mean = |of: fn(&Text) -> f64| texts.iter().map(of).sum::<f64>() / n;
    let (time, memory) = (mean(|text| text.end), mean(|text| text.memory));
    let spread: f64 = texts.iter().map(|text| (text.end - time).powi(2)).sum();
    let together: f64 = texts.iter().map(|text| (text.end - time) * (text.memory - memory)).sum();
    (together / spread.max(f64::MIN_POSITIVE), memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(leak: f64) -> Vec<Text> {
        let text = |i: u32| {
            let i = f64::from(i);
            Text { end: 2.0 * i, speed: 50.0 + i % 3.0, memory: 1e9 + leak * i + i % 2.0 * 1e5 }
        };
        (1..=100).map(text).collect()
    }

    #[test]
    fn a_leak_of_30_kb_per_text_is_found_and_noise_is_none() {
        assert_eq!(judge(&texts(30_000.0)), ExitCode::FAILURE);
        assert_eq!(judge(&texts(0.0)), ExitCode::SUCCESS);
        assert!((slope(&texts(30_000.0)).0 - 15_000.0).abs() < 100.0, "bytes per second");
    }
}
