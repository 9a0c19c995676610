//! `ternion synth`: made-up models of published shapes, for measuring speed where real weights are out of reach.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use ternion_compiler::Layout;
use ternion_runtime::formats::synth::Recipe;
use ternion_runtime::formats::{Activation, Checkpoint, tern};

use crate::export::with_bar;
use crate::terminal::{bytes, note};
use crate::{UsageError, output};

/// What to make up.
#[derive(Debug, Args)]
#[command(
    after_help = "The text of such a model is nonsense. Sparse gates come from a few channels of the residual stream that \
    hold a constant and that gate rows weigh with -1; `ternion eval FILE --stats` measures what results."
)]
pub(crate) struct Synth {
    /// A published shape: 125M, 0.7B, 2B-4T, 3B, 8B, Falcon3-1B, Falcon3-3B, Falcon3-7B, Falcon3-10B or 100B
    preset: String,
    /// The prepared file to write
    #[arg(short, long, value_name = "FILE", required_unless_present = "dry_run")]
    output: Option<PathBuf>,
    /// Seed of all weights: the same seed gives the same bytes on every machine
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Share of weights that are 0, in every matrix
    #[arg(long, value_name = "SHARE", default_value_t = 0.45)]
    zeros: f64,
    /// Share of gates at or below 0, 0.5 to 0.95, for shapes with relu² [default: 0.8]
    #[arg(long, value_name = "SHARE")]
    ffn_sparsity: Option<f64>,
    /// Layers, instead of the shape's own
    #[arg(long)]
    layers: Option<usize>,
    /// Use SiLU instead of relu², as llama.cpp does for these shapes: nothing is sparse then
    #[arg(long, conflicts_with = "ffn_sparsity")]
    silu: bool,
    /// Write nothing, but say how large what would be
    #[arg(long)]
    dry_run: bool,
}

pub(crate) fn synth(options: &Synth) -> Result<ExitCode> {
    let mut recipe = Recipe::preset(&options.preset).map_err(|error| UsageError(error.to_string()))?;
    recipe.seed = options.seed;
    recipe.zero_fraction = options.zeros;
    recipe.config.layers = options.layers.unwrap_or(recipe.config.layers);
    if options.silu {
        recipe.config.activation = Activation::Silu;
        recipe.gate_sparsity = None;
    }
    recipe.gate_sparsity = options.ffn_sparsity.or(recipe.gate_sparsity);
    let config = recipe.config.clone();
    let model = Checkpoint::synthetic(recipe)?;
    let canonical = |_: usize, _, _: usize, _: usize| Layout::Canonical;
    let planned = tern::planned_bytes(&model, &canonical, tern::HeadType::Own)?;
    let Some(path) = options.output.as_deref().filter(|_| !options.dry_run) else {
        output::print(&format!(
            "{}: {} layers, hidden {}, ffn {}, {} heads ({} for keys), vocabulary {}: a file of {}\n",
            options.preset,
            config.layers,
            config.hidden,
            config.ffn,
            config.heads,
            config.kv_heads,
            config.vocabulary,
            bytes(planned)
        ))?;
        return Ok(ExitCode::SUCCESS);
    };
    let written = with_bar(|progress| tern::write(&model, path, &canonical, progress))?;
    note(&format!("wrote {} ({}, {} ternary matrices)", path.display(), bytes(written.bytes), written.matrices));
    Ok(ExitCode::SUCCESS)
}
