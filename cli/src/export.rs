//! `ternion export`: a model in the formats that other engines read.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, ValueEnum};
use ternion_runtime::formats::gguf::{TernaryType, TokenRowType};
use ternion_runtime::formats::{Activation, export_hf, gguf};

use crate::arguments::ReadOptions;
use crate::interrupt;
use crate::model::open;
use crate::terminal::{Bar, bytes, note};

/// What to write.
#[derive(Debug, Args)]
pub(crate) struct Export {
    /// A prepared file (.tern), a Hugging Face directory, a GGUF file or the name of a pulled model; without it, the
    /// embedded model
    model: Option<PathBuf>,
    #[command(flatten)]
    read: ReadOptions,
    /// Write a GGUF file
    #[arg(long, value_name = "FILE", required_unless_present = "hf", conflicts_with = "hf")]
    gguf: Option<PathBuf>,
    /// How the GGUF file has ternary matrices: tq2_0 and tq1_0 for llama.cpp, i2_s for bitnet.cpp, f16 for everything
    #[arg(long = "type", value_name = "TYPE", default_value = "tq2_0", requires = "gguf")]
    kind: Kind,
    /// How the GGUF file has embedding and head
    #[arg(long, value_name = "TYPE", default_value = "own", requires = "gguf")]
    head: HeadKind,
    /// Write a Hugging Face directory: packed safetensors, as transformers loads them
    #[arg(long, value_name = "DIRECTORY")]
    hf: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Kind {
    #[value(name = "tq2_0")]
    Tq2_0,
    #[value(name = "tq1_0")]
    Tq1_0,
    #[value(name = "i2_s")]
    I2S,
    F16,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum HeadKind {
    /// As the model has them, exactly
    Own,
    /// Rounded to f16
    F16,
    /// Rounded to 8.5 bits per weight
    #[value(name = "q8_0")]
    Q8_0,
}

pub(crate) fn export(options: &Export) -> Result<ExitCode> {
    let checkpoint = open(options.model.as_deref(), &options.read)?;
    match (&options.gguf, &options.hf) {
        (Some(path), _) => {
            let ternary = match options.kind {
                Kind::Tq2_0 => TernaryType::Tq2_0,
                Kind::Tq1_0 => TernaryType::Tq1_0,
                Kind::I2S => TernaryType::I2S,
                Kind::F16 => TernaryType::F16,
            };
            let head = match options.head {
                HeadKind::Own => TokenRowType::Own,
                HeadKind::F16 => TokenRowType::F16,
                HeadKind::Q8_0 => TokenRowType::Q8_0,
            };
            let written = with_bar(|progress| gguf::export(&checkpoint, path, ternary, head, progress))?;
            note(&format!("wrote {} ({}, {} tensors)", path.display(), bytes(written.bytes), written.tensors));
            if written.rounded_scales > 0 {
                note(&format!("note: this type has scales of 16 bits, {} were rounded", written.rounded_scales));
            }
            if checkpoint.config().activation == Activation::Relu2 {
                note(
                    "note: only bitnet.cpp reads models with relu²; for llama.cpp's speed, not its text, export with \
                     --activation silu",
                );
            }
        }
        (None, Some(path)) => {
            let written = with_bar(|progress| export_hf::export(&checkpoint, path, progress))?;
            note(&format!("wrote {} ({})", path.display(), bytes(written)));
        }
        // clap asks for one of them.
        (None, None) => {}
    }
    Ok(ExitCode::SUCCESS)
}

/// Calls `work` with a progress function that draws a bar and listens for an interruption.
pub(crate) fn with_bar<T, E>(
    work: impl FnOnce(&mut (dyn FnMut(u64, u64) -> ControlFlow<()> + Send)) -> Result<T, E>,
) -> Result<T, E> {
    let mut bar = None;
    work(&mut |done, total| {
        bar.get_or_insert_with(|| Bar::bytes("writing", total)).set(done);
        if interrupt::requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })
}
