//! The command line as clap sees it. What an option means is said here and nowhere else.

use std::ffi::OsString;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use ternion_compiler::{Family, Schedule};
use ternion_runtime::formats::gguf::I2sLayout;
use ternion_runtime::formats::{Activation, OpenOptions};
use ternion_runtime::model::KvType;

use crate::bench::Bench;
use crate::embed::Embed;
use crate::eval::Eval;
use crate::export::Export;
use crate::lab::Lab;
use crate::prepare::HeadOption;
use crate::pull::Pull;
use crate::purpose::{Purpose, Room};
#[cfg(feature = "server")]
use crate::serve::Serve;
use crate::synth::Synth;
use crate::tune::Tune;

/// Runs 1-bit language models on CPUs, with kernels compiled for exactly this machine and this model.
#[derive(Debug, Parser)]
#[command(name = "ternion", version, propagate_version = true, disable_help_subcommand = true)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Generate text, or chat
    Run(Box<Run>),
    /// Serve models over HTTP, as OpenAI's clients expect
    #[cfg(feature = "server")]
    Serve(Box<Serve>),
    /// Prepare a model and tune its kernels for this machine: all that a model needs, in one command
    Setup(Setup),
    /// Turn a model directory into one prepared file (.tern)
    Prepare(Prepare),
    /// Measure a model: loss on a text, multiple choice, how much of it is zero
    Eval(Box<Eval>),
    /// Turn texts into vectors
    Embed(Box<Embed>),
    /// Fetch a model from a hub
    Pull(Pull),
    /// Write a model in the formats of other engines: GGUF, or a Hugging Face directory
    Export(Export),
    /// Make up a model of a published shape, for measuring speed
    Synth(Synth),
    /// Prove that kernels, threads, batches and drafts do not change a single bit of the logits
    Verify(Verify),
    /// Find the fastest kernels for a model on this machine, and say why
    Tune(Box<Tune>),
    /// Measure tokens per second: prompts (pp) and generation (tg)
    Bench(Box<Bench>),
    /// Measures kernels for a parent process
    #[command(hide = true)]
    TuneWorker,
    /// Study kernels: list them, and emit them as text, bytes or object files
    Lab(Lab),
    /// Show what this machine offers and what would make it faster
    Doctor(Doctor),
}

/// Heading of their options: one for a whole group would be that of all options after it, too.
const READING: &str = "Reading model files";

/// What a model's files leave open: GGUF has no place for an order, nor for an activation function.
#[derive(Clone, Copy, Debug, Default, Args)]
pub(crate) struct ReadOptions {
    /// How I2_S matrices are ordered: 128 for released files, 64 for files quantised on ARM, rows4 for builds without
    /// ACT_PARALLEL; a wrong choice gives a model that talks nonsense
    #[arg(long, value_name = "LAYOUT", default_value = "128", help_heading = READING)]
    pub(crate) i2s_layout: I2sOrder,
    /// Take the scales of a GGUF file's ternary matrices for reciprocals
    #[arg(long, help_heading = READING)]
    pub(crate) invert_scale: bool,
    /// The activation function, instead of the one that the model's files stand for
    #[arg(long, value_name = "FUNCTION", help_heading = READING)]
    pub(crate) activation: Option<ActivationName>,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub(crate) enum I2sOrder {
    #[default]
    #[value(name = "128")]
    Blocks128,
    #[value(name = "64")]
    Blocks64,
    #[value(name = "rows4")]
    Rows4,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum ActivationName {
    Relu2,
    Silu,
}

impl From<&ReadOptions> for OpenOptions {
    fn from(options: &ReadOptions) -> Self {
        Self {
            i2s_layout: match options.i2s_layout {
                I2sOrder::Blocks128 => I2sLayout::Blocks128,
                I2sOrder::Blocks64 => I2sLayout::Blocks64,
                I2sOrder::Rows4 => I2sLayout::Rows4,
            },
            invert_scale: options.invert_scale,
            activation: options.activation.map(|activation| match activation {
                ActivationName::Relu2 => Activation::Relu2,
                ActivationName::Silu => Activation::Silu,
            }),
        }
    }
}

/// The model and how it is run.
#[derive(Debug, Args)]
pub(crate) struct ModelOptions {
    /// A prepared file (.tern), a Hugging Face directory, a GGUF file or the name of a pulled model; without it, the
    /// embedded model runs
    pub(crate) model: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) read: ReadOptions,
    #[command(flatten)]
    pub(crate) threads: Threads,
    #[command(flatten)]
    pub(crate) room: Room,
    /// Type of the key-value cache
    #[arg(long, value_name = "TYPE", default_value = "f16")]
    pub(crate) kv: KvType,
    /// Use this kernel family (mad, tl1, vlut, t5) or this very schedule instead of the fastest known; tokens stay the same
    #[arg(long, value_name = "FAMILY|SCHEDULE", value_parser = parse_kernel)]
    pub(crate) kernel: Option<ForcedKernel>,
    /// Apply the PEFT LoRA adapter in this directory, with this scale (1 without); may be given several times
    #[arg(long, value_name = "PATH[:SCALE]", value_parser = parse_lora)]
    pub(crate) lora: Vec<LoraOption>,
}

/// An adapter and the scale to apply it with.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct LoraOption {
    pub(crate) path: PathBuf,
    pub(crate) scale: f32,
}

#[derive(Debug, Args)]
pub(crate) struct Threads {
    /// Threads; without it, every processor that this process may use
    #[arg(short, long)]
    pub(crate) threads: Option<NonZeroUsize>,
}

#[derive(Debug, Args)]
pub(crate) struct Run {
    #[command(flatten)]
    pub(crate) model: ModelOptions,
    /// The text to go on from; `-` reads it from standard input
    #[arg(short, long, allow_hyphen_values = true, required_unless_present = "chat")]
    pub(crate) prompt: Option<OsString>,
    /// Tokens to generate at most; without it, until the model stops or its context is full
    #[arg(short, long, value_name = "TOKENS")]
    pub(crate) n: Option<NonZeroUsize>,
    /// Context length in tokens, at most the model's own [default: that, or what --for or --memory-limit leaves room for]
    #[arg(short, long, value_name = "TOKENS")]
    pub(crate) context: Option<NonZeroUsize>,
    /// Draft up to this many tokens from what the text has said before, and check them in one pass; tokens stay the same
    #[arg(long, value_name = "TOKENS", default_value = "0")]
    pub(crate) draft: usize,
    /// Talk in turns through the model's chat template; also spelled -cnv
    #[arg(long, visible_alias = "conversation")]
    pub(crate) chat: bool,
    /// The system message that opens a chat
    #[arg(long, requires = "chat")]
    pub(crate) system: Option<String>,
    /// Print JSON lines instead of text: one object per piece of text, then one with the outcome and timings
    #[arg(long)]
    pub(crate) json: bool,
    /// Do not repeat the prompt before the text that follows it
    #[arg(long, conflicts_with_all = ["chat", "json"])]
    pub(crate) no_echo: bool,
    /// Do not print the summary of times
    #[arg(short, long)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    pub(crate) sampling: SamplingOptions,
}

/// One chain: repetition penalty, top-k, top-p, min-p, temperature. What is not given comes from the model's
/// generation_config.json, or else is off.
#[derive(Debug, Args)]
#[command(next_help_heading = "Sampling (penalty, then top-k, top-p, min-p, temperature)")]
pub(crate) struct SamplingOptions {
    /// Temperature; 0 always takes the most likely token [default: the model's, or 0]
    #[arg(long = "temp", value_name = "T", allow_negative_numbers = true)]
    pub(crate) temperature: Option<f32>,
    /// Keep the k most likely tokens; 0 keeps all [default: the model's, or 0]
    #[arg(long, value_name = "K")]
    pub(crate) top_k: Option<usize>,
    /// Keep the most likely tokens that together have this probability [default: the model's, or 1]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub(crate) top_p: Option<f32>,
    /// Keep tokens at least this fraction as likely as the most likely one [default: the model's, or 0]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub(crate) min_p: Option<f32>,
    /// Divide the positive logits of tokens seen before by this, multiply negative ones [default: the model's, or 1]
    #[arg(long, value_name = "R", allow_negative_numbers = true)]
    pub(crate) repeat_penalty: Option<f32>,
    /// Seed of the random numbers; the same seed gives the same text on every machine
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
}

#[derive(Debug, Args)]
pub(crate) struct Setup {
    /// A Hugging Face directory, a GGUF file, a prepared file or the name of a pulled model; without it, the embedded
    /// model's kernels are tuned
    pub(crate) model: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) read: ReadOptions,
    /// The prepared file to write [default: the model's name with .tern, in this directory]
    #[arg(short, long, value_name = "FILE", requires = "model")]
    pub(crate) output: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) head: HeadOption,
    #[command(flatten)]
    pub(crate) threads: Threads,
    #[command(flatten)]
    pub(crate) budget: TuningBudget,
    #[command(flatten)]
    pub(crate) purpose: Purpose,
}

#[derive(Debug, Args)]
pub(crate) struct Prepare {
    /// A Hugging Face directory, a GGUF file, a prepared file or the name of a pulled model
    pub(crate) source: PathBuf,
    #[command(flatten)]
    pub(crate) read: ReadOptions,
    /// The prepared file to write
    #[arg(short, long, value_name = "FILE", required_unless_present = "dry_run")]
    pub(crate) output: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) head: HeadOption,
    /// Write nothing, but say what would be written and how large it would be
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Store the weights in the order that this machine's fastest kernels read, so that they are mapped and not repacked
    #[arg(long)]
    pub(crate) for_this_machine: bool,
    #[command(flatten)]
    pub(crate) threads: Threads,
    #[command(flatten)]
    pub(crate) budget: TuningBudget,
    #[command(flatten)]
    pub(crate) purpose: Purpose,
}

#[derive(Debug, Args)]
pub(crate) struct TuningBudget {
    /// Time to look for the fastest kernels, for example 20s or 500ms
    #[arg(long, value_name = "TIME", default_value = "20s", value_parser = parse_time)]
    pub(crate) budget: Duration,
}

#[derive(Debug, Args)]
pub(crate) struct Verify {
    /// A prepared file (.tern), a Hugging Face directory, a GGUF file or the name of a pulled model; without it, the
    /// embedded model
    pub(crate) model: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) read: ReadOptions,
    /// Verify with 1, 2, 3 and this many threads, but no more than this; without it, every processor that this process
    /// may use, and at least 3
    #[arg(short, long)]
    pub(crate) threads: Option<NonZeroUsize>,
    /// Tokens to compare; of more than 64, threads also share the key-value cache by blocks of positions
    #[arg(short, long, value_name = "TOKENS", default_value = "32")]
    pub(crate) n: NonZeroUsize,
    /// Type of the key-value cache
    #[arg(long, value_name = "TYPE", default_value = "f16")]
    pub(crate) kv: KvType,
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Doctor {
    #[command(flatten)]
    pub(crate) threads: Threads,
    /// Print one JSON object instead of a page
    #[arg(long)]
    pub(crate) json: bool,
}

/// A kernel that the user insists on.
#[derive(Clone, Copy, Debug)]
pub(crate) enum ForcedKernel {
    Family(Family),
    Schedule(Schedule),
}

pub(crate) fn parse_kernel(text: &str) -> Result<ForcedKernel, String> {
    if text.contains('/') {
        text.parse()
            .map(ForcedKernel::Schedule)
            .map_err(|error: ternion_compiler::schedule::ParseScheduleError| error.to_string())
    } else {
        text.parse()
            .map(ForcedKernel::Family)
            .map_err(|error: ternion_compiler::schedule::ParseScheduleError| error.to_string())
    }
}

fn parse_lora(text: &str) -> Result<LoraOption, String> {
    let option = |path: &str, scale| LoraOption { path: path.into(), scale };
    match text.rsplit_once(':').and_then(|(path, scale)| Some((path, scale.parse::<f32>().ok()?))) {
        // A directory's name may end in a colon and a number.
        Some((path, scale)) if !path.is_empty() && !std::path::Path::new(text).is_dir() => {
            if scale.is_finite() {
                Ok(option(path, scale))
            } else {
                Err(format!("a scale of {scale}"))
            }
        }
        _ => Ok(option(text, 1.0)),
    }
}

pub(crate) fn parse_time(text: &str) -> Result<Duration, String> {
    let (number, unit) = text.split_at(text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len()));
    let scale = match unit {
        "ms" => 1e-3,
        "s" | "" => 1.0,
        "m" | "min" => 60.0,
        _ => return Err(format!("unit `{unit}`: expected ms, s or m")),
    };
    let number: f64 = number.parse().map_err(|_| format!("`{number}` is no number"))?;
    Duration::try_from_secs_f64(number * scale)
        .ok()
        .filter(|time| *time <= Duration::from_secs(24 * 3600))
        .ok_or_else(|| "expected between 0 and 24 hours".to_owned())
}

/// The arguments of this process, with the customary `-cnv` (which clap would read as `-c nv`) spelled out.
pub(crate) fn of_process() -> impl Iterator<Item = OsString> {
    std::env::args_os().map(|argument| if argument == "-cnv" { "--chat".into() } else { argument })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_of_the_command_line_is_consistent() {
        use clap::CommandFactory;
        Arguments::command().debug_assert();
    }

    #[test]
    fn an_adapter_may_have_a_scale() {
        let parsed = |text| parse_lora(text).map(|LoraOption { path, scale }| (path.display().to_string(), scale));
        assert_eq!(parsed("a/b"), Ok(("a/b".to_owned(), 1.0)));
        assert_eq!(parsed("a/b:-0.5"), Ok(("a/b".to_owned(), -0.5)));
        assert_eq!(parsed("C:\\b"), Ok(("C:\\b".to_owned(), 1.0)));
        assert!(parsed("a:inf").is_err());
    }

    #[test]
    fn times_have_units() {
        assert_eq!(parse_time("20s"), Ok(Duration::from_secs(20)));
        assert_eq!(parse_time("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_time("1.5m"), Ok(Duration::from_secs(90)));
        for text in ["", "s", "-1s", "nans", "1e99s", "5h", "25000m"] {
            assert!(parse_time(text).is_err(), "{text}");
        }
    }
}
