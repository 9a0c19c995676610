//! `ternion synth`: made-up models of published shapes, for measuring speed where real weights are out of reach.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Result;
use clap::Args;
use ternion_compiler::{Family, Layout};
use ternion_runtime::evaluate::{ActivationCounts, LayerActivations, WeightCounts, weights};
use ternion_runtime::formats::synth::Recipe;
use ternion_runtime::formats::{Activation, Checkpoint, Projection, tern};
use ternion_runtime::model::{KernelChoice, Session, SessionOptions};
use ternion_runtime::verify::some_tokens;

use crate::export::with_bar;
use crate::model::{cpu, load, team};
use crate::terminal::{bytes, note};
use crate::{UsageError, output};

/// Tokens that the sparsity is measured on: hundreds of thousands of gates.
const TOKENS: usize = 16;

/// What to make up.
#[derive(Debug, Args)]
#[command(
    after_help = "The text of such a model is nonsense. Sparse gates come from a few channels of the residual stream that \
    hold a constant and that gate rows weigh with -1. What results is measured and said at the end; layer by layer \
    `ternion eval FILE --stats --text TEXT` does."
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
    note(&measured(&Checkpoint::open(path)?)?);
    Ok(ExitCode::SUCCESS)
}

/// What the file has in fact: zeros among the weights and, for relu², in what flows through the layers.
fn measured(model: &Checkpoint) -> Result<String> {
    let percent = |part: u64, whole: u64| 100.0 * part as f64 / whole.max(1) as f64;
    let team = team(None)?;
    let (zeros, all) = weights(model, &*team)?
        .iter()
        .flatten()
        .fold((0, 0), |(zeros, all), count: &WeightCounts| (zeros + count.zeros, all + count.weights));
    let line = format!("{:.1} % of the weights are 0", percent(zeros, all));
    if model.config().activation != Activation::Relu2 {
        return Ok(line);
    }
    let loaded = load(model, &KernelChoice::Family(Family::Mad), &cpu()?, &team)?;
    let options = SessionOptions { context: Some(TOKENS), ..SessionOptions::default() };
    let mut session = Session::new(Arc::new(loaded), team, &options)?;
    let mut counts = ActivationCounts::new(model.config());
    let tokens = some_tokens(TOKENS.min(model.config().context), model.config().vocabulary, 0);
    session.prefill_observed(&tokens, &mut |_, _| {}, &mut Some(&mut counts))?;
    let LayerActivations { gates, gates_not_positive, inputs, zero_inputs } = counts.total();
    let down = Projection::Down as usize;
    Ok(format!(
        "{line}; of {} tokens {:.1} % of the gates are at or below 0 and {:.1} % of the down projection's inputs are 0",
        tokens.len(),
        percent(gates_not_positive, gates),
        percent(zero_inputs[down], inputs[down])
    ))
}
