//! `ternion embed`: vectors of texts, as JSON lines or a NumPy file.

use std::io::{Read, Write};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;
use ternion_runtime::embedding::{self, Embedding, Precision};
use ternion_runtime::model::{Session, SessionOptions};

use crate::arguments::ModelOptions;
use crate::model::{Ready, ready};
use crate::output;
use crate::terminal::{Bar, note};
use crate::{UsageError, interrupt};

/// What to embed.
#[derive(Debug, Args)]
#[command(
    group = clap::ArgGroup::new("texts").required(true).args(["prompt", "file"]),
    after_help = "Embedding models pool as they say, of others the last position is taken; vectors have length 1. \
    More: docs/src/evaluation.md"
)]
pub(crate) struct Embed {
    #[command(flatten)]
    model: ModelOptions,
    /// A text; may be given several times
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: Vec<String>,
    /// A file of texts, one a line, or one JSON value a line if its name ends in .jsonl: a string or {"text": "…"};
    /// `-` reads lines from standard input
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Write the vectors to this file, .npy (an array of one row for each text) or .jsonl, instead of standard output
    #[arg(short, long, value_name = "FILE", value_parser = parse_output)]
    output: Option<PathBuf>,
    /// Precision of the elements: f32, int8 (with a scale for each text) or binary (one bit each)
    #[arg(long, value_name = "TYPE", default_value = "f32")]
    quantize: Precision,
    /// Context length in tokens, at most the model's own
    #[arg(short, long, value_name = "TOKENS")]
    context: Option<NonZeroUsize>,
    /// Leave out the end of texts that are longer than the context, instead of refusing them
    #[arg(long)]
    truncate: bool,
}

fn parse_output(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("npy" | "jsonl") => Ok(path),
        _ => Err("expected a name that ends in .npy or .jsonl".to_owned()),
    }
}

/// One line of output.
#[derive(Serialize)]
struct Line<'a> {
    index: usize,
    tokens: usize,
    embedding: Values<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    scale: Option<f32>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Values<'a> {
    F32(&'a [f32]),
    Int8(&'a [i8]),
    Binary(&'a [u8]),
}

pub(crate) fn embed(options: &Embed) -> Result<ExitCode> {
    let texts = match &options.file {
        Some(path) => read_texts(path)?,
        None => options.prompt.clone(),
    };
    let Ready { checkpoint, model, team, .. } = ready(&options.model)?;
    let tokenizer = checkpoint.tokenizer()?;
    let context = options.context.map(usize::from);
    let session_options = SessionOptions { kv: options.model.kv, context, ..SessionOptions::default() };
    let mut session = Session::new(model, team, &session_options)?;
    // Everything is encoded first: a text that does not fit is found before time is spent on the others.
    let mut encoded = Vec::with_capacity(texts.len());
    for (index, text) in texts.iter().enumerate() {
        let mut tokens = embedding::encode(&tokenizer, text).with_context(|| format!("text {}", index + 1))?;
        let (length, limit) = (tokens.len(), session.context());
        if length > limit && !options.truncate {
            bail!("text {} has {length} tokens, the context {limit}: shorten it, or let --truncate do so", index + 1);
        }
        if length == 0 {
            bail!("text {} is empty, and the model begins and ends texts with nothing", index + 1);
        }
        if length > limit {
            // The token that ends a text is what the last position is about.
            let end = tokens.pop().filter(|_| tokenizer.ending().is_some());
            tokens.truncate(limit - usize::from(end.is_some()));
            tokens.extend(end);
        }
        encoded.push(tokens);
    }
    let mut output = Output::new(options, texts.len())?;
    let bar = Bar::count("embedding", texts.len() as u64);
    for (index, tokens) in encoded.iter().enumerate() {
        let vector = embedding::embed(&mut session, tokens)?;
        output.write(index, tokens.len(), &Embedding::new(vector, options.quantize))?;
        bar.set(index as u64 + 1);
        if interrupt::requested() {
            drop(bar);
            note("interrupted: not all texts have been embedded");
            return Ok(ExitCode::from(interrupt::EXIT_CODE));
        }
    }
    drop(bar);
    output.finish()?;
    Ok(ExitCode::SUCCESS)
}

/// Texts of a file, one a line.
fn read_texts(path: &Path) -> Result<Vec<String>> {
    let shown = path.display();
    let mut bytes = Vec::new();
    if path == Path::new("-") {
        std::io::stdin().lock().read_to_end(&mut bytes).context("standard input cannot be read")?;
    } else {
        bytes = std::fs::read(path).with_context(|| format!("{shown} cannot be read"))?;
    }
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        UsageError(format!("{shown} is not UTF-8 (byte {at}): convert it first"))
    })?;
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Value {
        Text(String),
        Object { text: String },
    }
    let json = path.extension().is_some_and(|extension| extension == "jsonl");
    let line = |(at, line): (usize, &str)| {
        if !json {
            return Ok(line.to_owned());
        }
        match serde_json::from_str(line) {
            Ok(Value::Text(text) | Value::Object { text }) => Ok(text),
            Err(_) => bail!("{shown}, line {}: expected a string or an object with a text", at + 1),
        }
    };
    let texts: Vec<String> = text.lines().enumerate().map(line).collect::<Result<_>>()?;
    if texts.is_empty() {
        bail!("{shown} is empty: there is nothing to embed");
    }
    Ok(texts)
}

/// Where vectors go.
enum Output<'a> {
    Terminal,
    Json(NamedTempFile, &'a Path),
    Numpy { file: NamedTempFile, path: &'a Path, rows: usize },
}

impl<'a> Output<'a> {
    fn new(options: &'a Embed, rows: usize) -> Result<Self> {
        let Some(path) = &options.output else { return Ok(Self::Terminal) };
        let file = output::create(path)?;
        if path.extension().is_some_and(|extension| extension == "npy") {
            return Ok(Self::Numpy { file, path, rows });
        }
        Ok(Self::Json(file, path))
    }

    fn write(&mut self, index: usize, tokens: usize, embedding: &Embedding) -> Result<()> {
        let (values, scale) = match embedding {
            Embedding::F32(values) => (Values::F32(values), None),
            Embedding::Int8 { values, scale } => (Values::Int8(values), Some(*scale)),
            Embedding::Binary(bytes) => (Values::Binary(bytes), None),
        };
        match self {
            Self::Terminal => output::json(&Line { index, tokens, embedding: values, scale }),
            Self::Json(file, path) => {
                let mut line = serde_json::to_vec(&Line { index, tokens, embedding: values, scale })?;
                line.push(b'\n');
                file.write_all(&line).with_context(|| format!("{} cannot be written", path.display()))
            }
            Self::Numpy { file, path, rows } => {
                let mut bytes = if index == 0 { values.numpy_header(*rows) } else { Vec::new() };
                values.append_bytes(&mut bytes);
                file.write_all(&bytes).with_context(|| format!("{} cannot be written", path.display()))
            }
        }
    }

    fn finish(self) -> Result<()> {
        match self {
            Self::Terminal => Ok(()),
            Self::Json(file, path) | Self::Numpy { file, path, .. } => output::finish(file, path),
        }
    }
}

impl Values<'_> {
    /// The header of a NumPy file, version 1.0: <https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html>.
    fn numpy_header(&self, rows: usize) -> Vec<u8> {
        let (descr, columns) = match self {
            Self::F32(values) => ("<f4", values.len()),
            Self::Int8(values) => ("|i1", values.len()),
            Self::Binary(values) => ("|u1", values.len()),
        };
        let dictionary = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({rows}, {columns}), }}");
        // Magic, version and length are 10 bytes; a line feed ends the header, at a multiple of 64.
        let length = (10 + dictionary.len() + 1).next_multiple_of(64) - 10;
        let mut header = b"\x93NUMPY\x01\x00".to_vec();
        header.extend(u16::try_from(length).unwrap_or(u16::MAX).to_le_bytes());
        header.extend(format!("{dictionary:width$}\n", width = length - 1).bytes());
        header
    }

    fn append_bytes(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::F32(values) => bytes.extend(values.iter().flat_map(|value| value.to_le_bytes())),
            Self::Int8(values) => bytes.extend(values.iter().map(|value| value.cast_unsigned())),
            Self::Binary(values) => bytes.extend_from_slice(values),
        }
    }
}
