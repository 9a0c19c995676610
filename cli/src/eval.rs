//! `ternion eval`: loss on a text, multiple choice, and how much of a model is zero.

use std::fmt::Write as _;
use std::io::{BufWriter, Write as _};
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use serde::Serialize;
use ternion_runtime::evaluate::{
    ActivationCounts, LayerActivations, Loss, QuestionScore, Scored, Summary, WeightCounts, Windows, loss,
    read_questions, score, summarise, weights,
};
use ternion_runtime::formats::Projection;
use ternion_runtime::model::{Observer, Session, SessionOptions};
use ternion_runtime::text::Tokenizer;

use crate::arguments::ModelOptions;
use crate::model::{Ready, ready_to_generate};
use crate::output::{self, print};
use crate::terminal::{Bar, note};
use crate::{UsageError, interrupt, plot};

/// Longest windows of a text, unless asked otherwise: attention over much more takes longer than it tells.
const WINDOW: usize = 4096;

/// What to measure.
#[derive(Debug, Args)]
#[command(
    group = clap::ArgGroup::new("what").required(true).multiple(true).args(["text", "choices", "stats"]),
    after_help = "Figures are the same with any kernel, number of threads and machine. Definitions, file formats \
    and what published models reach: docs/src/evaluation.md"
)]
pub(crate) struct Eval {
    #[command(flatten)]
    model: ModelOptions,
    /// Measure the loss on this text (UTF-8)
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Tokens that a prediction sees at most [default: the model's context, for a text at most 4096]
    #[arg(short, long, value_name = "TOKENS")]
    context: Option<NonZeroUsize>,
    /// Tokens from one window of the text to the next; less than the context lets predictions see more, and takes longer
    /// [default: the context]
    #[arg(long, value_name = "TOKENS", requires = "text")]
    stride: Option<NonZeroUsize>,
    /// Write the log-probability of every token of the text to this file, one JSON object a line
    #[arg(long, value_name = "FILE", requires = "text")]
    logprobs: Option<PathBuf>,
    /// Answer these questions: a JSON object a line, {"context": "…", "choices": ["…", "…"], "gold": 0}
    #[arg(long, value_name = "FILE")]
    choices: Option<PathBuf>,
    /// What stands between context and choice
    #[arg(long, value_name = "TEXT", default_value = " ", requires = "choices")]
    delimiter: String,
    /// Write how each question was answered to this file, one JSON object a line
    #[arg(long, value_name = "FILE", requires = "choices")]
    answers: Option<PathBuf>,
    /// Count zeros, layer by layer: among the weights and, with --text, in what flows through them
    #[arg(long)]
    stats: bool,
    /// Draw the counts of --stats into this file (.svg or .html)
    #[arg(long, value_name = "FILE", requires = "stats", value_parser = parse_plot)]
    plot: Option<PathBuf>,
    /// Print one JSON object instead of a page
    #[arg(long)]
    json: bool,
}

fn parse_plot(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("svg" | "html") => Ok(path),
        _ => Err("expected a name that ends in .svg or .html".to_owned()),
    }
}

/// What was found. Fractions are between 0 and 1, losses in nats per token.
#[derive(Debug, Default, Serialize)]
struct Report {
    model: String,
    kv: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<TextReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    choices: Option<ChoicesReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    statistics: Option<Statistics>,
}

#[derive(Debug, Serialize)]
struct TextReport {
    file: String,
    tokens: usize,
    context: usize,
    stride: usize,
    predicted: usize,
    loss: f64,
    perplexity: f64,
    bits_per_byte: f64,
    /// Fraction of the predicted tokens that no other was more likely than.
    greedy: f64,
}

#[derive(Debug, Serialize)]
struct ChoicesReport {
    file: String,
    questions: usize,
    truncated: usize,
    acc: f64,
    acc_stderr: Option<f64>,
    acc_norm: f64,
    acc_norm_stderr: Option<f64>,
}

/// Zeros, as fractions.
#[derive(Debug, Serialize)]
pub(crate) struct Statistics {
    /// Zeros among all ternary weights.
    pub(crate) zero_weights: f64,
    pub(crate) layers: Vec<LayerStatistics>,
}

#[derive(Debug, Serialize)]
pub(crate) struct LayerStatistics {
    /// Zeros among the weights of q, k, v, o, gate, up and down.
    pub(crate) zero_weights: [f64; Projection::ALL.len()],
    /// Zeros among all weights of the layer.
    pub(crate) zero_weights_of_all: f64,
    /// Results of the gate projection that are not positive.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) gate_not_positive: Option<f64>,
    /// Zeros among the int8 activations that q, k, v, o, gate, up and down read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) zero_inputs: Option<[f64; Projection::ALL.len()]>,
}

/// Names of the projections in tables and charts.
pub(crate) const NAMES: [&str; Projection::ALL.len()] = ["q", "k", "v", "o", "gate", "up", "down"];

pub(crate) fn eval(options: &Eval) -> Result<ExitCode> {
    let text = options.text.as_deref().map(read).transpose()?;
    let questions = options.choices.as_deref().map(|path| Ok::<_, anyhow::Error>(read_questions(path, &read(path)?)?));
    let questions = questions.transpose()?;
    let Ready { checkpoint, model, team, .. } = ready_to_generate(&options.model)?;
    let weight_counts = if options.stats { Some(weights(&checkpoint, &*team)?) } else { None };
    let tokenizer = checkpoint.tokenizer()?;
    let context = options.context.map(usize::from);
    let session_options = SessionOptions { kv: options.model.kv, context, ..SessionOptions::default() };
    let mut session = Session::new(model, team, &session_options)?;
    let mut report = Report { model: checkpoint.name(), kv: options.model.kv.to_string(), ..Report::default() };

    let mut counts = options.stats.then(|| ActivationCounts::new(checkpoint.config()));
    if let (Some(path), Some(text)) = (&options.text, &text) {
        report.text = Some(measure(options, path, text, &mut session, &tokenizer, &mut counts)?);
    }
    if let (Some(path), Some(questions)) = (&options.choices, &questions) {
        let bar = Bar::count("answering", questions.len() as u64);
        session.truncate(0);
        let scores = score(&mut session, &tokenizer, questions, &options.delimiter, &mut |done| go_on(&bar, done))?;
        drop(bar);
        if let Some(path) = options.answers.as_ref().filter(|_| !interrupt::requested()) {
            write_answers(path, &scores)?;
        }
        report.choices = (!scores.is_empty()).then(|| ChoicesReport::new(path, summarise(&scores)));
    }
    if let Some(weights) = &weight_counts {
        let activations = counts.as_ref().filter(|_| text.is_some());
        let statistics = Statistics::new(weights, activations);
        if let Some(path) = options.plot.as_ref().filter(|_| !interrupt::requested()) {
            plot::write(path, &report.model, &statistics)?;
        }
        report.statistics = Some(statistics);
    }
    if interrupt::requested() {
        note("interrupted: the figures are those of what was done by then, and no file has been written");
    }
    if options.json {
        output::json(&report)?
    } else {
        print(&page(&report))?
    }
    Ok(if interrupt::requested() { ExitCode::from(interrupt::EXIT_CODE) } else { ExitCode::SUCCESS })
}

/// A text file.
fn read(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).with_context(|| format!("{} cannot be read", path.display()))?;
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        UsageError(format!("{} is not UTF-8 (byte {at}): convert it first", path.display())).into()
    })
}

fn go_on(bar: &Bar, done: usize) -> ControlFlow<()> {
    bar.set(done as u64);
    if interrupt::requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
}

/// One line of `--logprobs`.
#[derive(Serialize)]
struct LogProbability<'a> {
    index: usize,
    token: u32,
    text: &'a str,
    logprob: f64,
    greedy: bool,
}

/// The loss on a text.
fn measure(
    options: &Eval,
    path: &Path,
    text: &str,
    session: &mut Session,
    tokenizer: &Tokenizer,
    counts: &mut Option<ActivationCounts>,
) -> Result<TextReport> {
    let tokens = tokenizer.encode(text, tokenizer.adds_bos())?;
    let context = options.context.map_or(session.context().min(WINDOW), usize::from);
    let windows = Windows { context, stride: options.stride.map_or(context, usize::from) };
    if windows.stride > context {
        let problem = format!("--stride: {} tokens are more than the context of {context}", windows.stride);
        return Err(UsageError(problem).into());
    }
    let mut lines = match &options.logprobs {
        Some(path) => Some((path, BufWriter::new(output::create(path)?))),
        None => None,
    };
    let (mut bytes, mut failed) = (0, None);
    let mut visit = |scored: &Scored| {
        let token = tokenizer.token_bytes(scored.token);
        bytes += token.len();
        if let Some((_, lines)) = &mut lines
            && failed.is_none()
        {
            let Scored { index, token: id, log_probability, greedy } = *scored;
            let text = &String::from_utf8_lossy(token);
            let line = serde_json::to_writer(
                &mut *lines,
                &LogProbability { index, token: id, text, logprob: log_probability, greedy },
            );
            failed = line.map_err(std::io::Error::from).and_then(|()| lines.write_all(b"\n")).err();
        }
    };
    let bar = Bar::count("reading", tokens.len() as u64);
    let observer = counts.as_mut().map(|counts| counts as &mut dyn Observer);
    let loss = loss(session, &tokens, windows, observer, &mut visit, &mut |done| go_on(&bar, done));
    let loss: Loss = loss.with_context(|| path.display().to_string())?;
    drop(bar);
    if let Some((path, lines)) = lines {
        let written = match failed {
            Some(error) => Err(error),
            None => lines.into_inner().map_err(std::io::IntoInnerError::into_error),
        };
        let file = written.with_context(|| format!("{} cannot be written", path.display()))?;
        // Half of the tokens are no file of them.
        if !interrupt::requested() {
            output::finish(file, path)?;
        }
    }
    Ok(TextReport {
        file: path.display().to_string(),
        tokens: tokens.len(),
        context,
        stride: windows.stride,
        predicted: loss.tokens,
        loss: loss.mean(),
        perplexity: loss.perplexity(),
        bits_per_byte: loss.total / std::f64::consts::LN_2 / bytes as f64,
        greedy: loss.greedy as f64 / loss.tokens as f64,
    })
}

/// One line of `--answers`.
#[derive(Serialize)]
struct Answer {
    question: usize,
    gold: usize,
    likeliest: usize,
    likeliest_per_byte: usize,
    logprobs: Vec<f64>,
    greedy: Vec<bool>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    truncated: bool,
}

fn write_answers(path: &Path, scores: &[QuestionScore]) -> Result<()> {
    let mut file = BufWriter::new(output::create(path)?);
    let mut write = || -> std::io::Result<()> {
        for (question, score) in scores.iter().enumerate() {
            let answer = Answer {
                question,
                gold: score.gold,
                likeliest: score.likeliest,
                likeliest_per_byte: score.likeliest_per_byte,
                logprobs: score.choices.iter().map(|choice| choice.log_probability).collect(),
                greedy: score.choices.iter().map(|choice| choice.greedy).collect(),
                truncated: score.truncated,
            };
            serde_json::to_writer(&mut file, &answer)?;
            file.write_all(b"\n")?;
        }
        Ok(())
    };
    write().with_context(|| format!("{} cannot be written", path.display()))?;
    let file = file.into_inner().map_err(std::io::IntoInnerError::into_error);
    output::finish(file.with_context(|| format!("{} cannot be written", path.display()))?, path)
}

impl ChoicesReport {
    fn new(path: &Path, summary: Summary) -> Self {
        let Summary { questions, truncated, acc, acc_stderr, acc_norm, acc_norm_stderr } = summary;
        Self { file: path.display().to_string(), questions, truncated, acc, acc_stderr, acc_norm, acc_norm_stderr }
    }
}

impl Statistics {
    fn new(weights: &[[WeightCounts; Projection::ALL.len()]], activations: Option<&ActivationCounts>) -> Self {
        let fraction = |part: u64, whole: u64| part as f64 / whole.max(1) as f64;
        let of_all = |counts: &mut dyn Iterator<Item = &WeightCounts>| {
            let sum = |(zeros, weights), count: &WeightCounts| (zeros + count.zeros, weights + count.weights);
            let (zeros, weights) = counts.fold((0, 0), sum);
            fraction(zeros, weights)
        };
        let layer = |(index, weights): (usize, &[WeightCounts; Projection::ALL.len()])| {
            let counts = activations.map(|activations| &activations.layers[index]);
            let inputs =
                |counts: &LayerActivations| std::array::from_fn(|i| fraction(counts.zero_inputs[i], counts.inputs[i]));
            LayerStatistics {
                zero_weights: weights.map(|count| fraction(count.zeros, count.weights)),
                zero_weights_of_all: of_all(&mut weights.iter()),
                gate_not_positive: counts.map(|counts| fraction(counts.gates_not_positive, counts.gates)),
                zero_inputs: counts.map(inputs),
            }
        };
        Self {
            zero_weights: of_all(&mut weights.iter().flatten()),
            layers: weights.iter().enumerate().map(layer).collect(),
        }
    }
}

/// `62.34 ± 1.20 %`
fn percent(fraction: f64, error: Option<f64>) -> String {
    let error = error.map_or(String::new(), |error| format!(" ± {:.2}", error * 100.0));
    format!("{:.2}{error} %", fraction * 100.0)
}

/// The report as text.
fn page(report: &Report) -> String {
    let mut page = format!("{}, {} cache\n", report.model, report.kv);
    // Writing to a string cannot fail.
    if let Some(text) = &report.text {
        let TextReport { file, tokens, context, stride, predicted, loss, perplexity, bits_per_byte, greedy } = text;
        let _ = write!(
            page,
            "\n{file}: {tokens} tokens, windows of {context}, {stride} apart\n\
             predicted      {predicted} tokens\n\
             loss           {loss:.6} nats per token\n\
             perplexity     {perplexity:.4}\n\
             bits per byte  {bits_per_byte:.4}\n\
             greedy         {} of the tokens are the most likely ones\n",
            percent(*greedy, None)
        );
    }
    if let Some(choices) = &report.choices {
        let ChoicesReport { file, questions, truncated, acc, acc_stderr, acc_norm, acc_norm_stderr } = choices;
        let _ = write!(
            page,
            "\n{file}: {questions} questions\n\
             acc            {}\n\
             acc_norm       {} (log-probability per byte)\n",
            percent(*acc, *acc_stderr),
            percent(*acc_norm, *acc_norm_stderr)
        );
        if *truncated > 0 {
            let _ = writeln!(page, "truncated      {truncated} questions: their contexts were too long");
        }
    }
    if let Some(statistics) = &report.statistics {
        page.push('\n');
        page.push_str(&table(statistics));
    }
    page
}

/// Statistics as a table, in per cent.
pub(crate) fn table(statistics: &Statistics) -> String {
    let mut table = format!("zeros among the weights: {}, by layer:\n", percent(statistics.zero_weights, None));
    let active = statistics.layers.iter().any(|layer| layer.gate_not_positive.is_some());
    let mut row = |name: &str, weights: &dyn Fn(usize) -> String, others: [String; 2]| {
        let _ = write!(table, "{name:>5}");
        for i in 0..NAMES.len() {
            let _ = write!(table, "{:>7}", weights(i));
        }
        if active {
            let _ = write!(table, "{:>10}{:>14}", others[0], others[1]);
        }
        table.push('\n');
    };
    row("layer", &|i| NAMES[i].to_owned(), ["gate ≤ 0".to_owned(), "down input 0".to_owned()]);
    for (index, layer) in statistics.layers.iter().enumerate() {
        let number = |fraction: f64| format!("{:.2}", fraction * 100.0);
        let others = [layer.gate_not_positive, layer.zero_inputs.map(|inputs| inputs[Projection::Down as usize])];
        row(&index.to_string(), &|i| number(layer.zero_weights[i]), others.map(|x| x.map_or(String::new(), number)));
    }
    table
}
