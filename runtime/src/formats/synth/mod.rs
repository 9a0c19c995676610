//! Made-up models of published shapes, for measuring speed where real weights are out of reach. They talk nonsense.
//!
//! A model is a function of its [`Recipe`]: the same seed gives the same bytes on every machine, with any number of
//! threads. Weights are made when they are asked for, so that one is written without ever being in memory.
//!
//! # Sparse activations
//!
//! Random weights would leave half of a relu² model's gates at 0 or below, a trained model leaves 70 to 90 %. To get
//! there, a few channels of the residual stream, the *offset channels*, hold the same positive value for every token:
//! the embedding puts it there and no layer adds to it (the rows of the output and down projections that end there are
//! all 0). Every row of a gate projection has −1 or 0 in these channels, which shifts its sum down. With `b` such
//! channels, a share `p` of −1 in them, `n` other channels of standard deviation σ (in units of the constant) and zero
//! fraction `z`, a gate is distributed as
//!
//! ```text
//! normal(−b·p, n·(1 − z)·σ² + b·p·(1 − p))
//! ```
//!
//! and `p` is chosen, layer by layer since σ grows with the residual stream, such that it is ≤ 0 with the probability
//! asked for. Zero fractions elsewhere are adapted, so that every matrix has the one asked for.

mod preset;
mod random;

use std::thread;

use half::bf16;
use random::{NormalTable, Random, TritTable, normal_quantile};
use serde_json::json;
use ternion_compiler::Layout;
use ternion_kernels_ref::PackedMatrix;
use ternion_kernels_ref::matrix::ZERO_BYTE;

use super::{
    Activation, Bytes, FloatMatrix, FloatType, GenerationDefaults, LayerNorm, ModelConfig, Projection, RowType,
    TernaryTensor,
};
use crate::text::TokenizerConfig;

/// Standard deviation of the embedding's values: logits are then some units apart.
const EMBEDDING_DEVIATION: f64 = 1.0 / 16.0;
/// Variance that all layers together add to the residual stream, in units of the embedding's.
const ADDED_VARIANCE: f64 = 0.25;
/// Largest share of −1 in the offset channels: above it, more channels are used.
const LARGEST_SHARE: f64 = 0.75;

/// What a made-up model is made of.
#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    /// Shape and architecture.
    pub config: ModelConfig,
    /// Seed of all weights.
    pub seed: u64,
    /// Share of weights that are 0, in every matrix: from 0 to 0.9.
    pub zero_fraction: f64,
    /// Share of gates at 0 or below, from 0.5 to 0.95; only for relu².
    pub gate_sparsity: Option<f64>,
}

impl Recipe {
    /// Names of all presets.
    pub fn presets() -> impl Iterator<Item = &'static str> {
        preset::PRESETS.iter().map(|preset| preset.name)
    }

    /// A published shape with the usual fractions: 0.45 of the weights are 0 and, for relu², 0.8 of the gates.
    ///
    /// # Errors
    /// A name that is none of [`presets`](Self::presets); case and hyphens do not count.
    pub fn preset(name: &str) -> Result<Self, RecipeError> {
        // `2B4T` is what most people write.
        let plain = |name: &str| name.replace('-', "").to_ascii_lowercase();
        let preset = preset::PRESETS.iter().find(|preset| plain(preset.name) == plain(name));
        let config = preset
            .ok_or_else(|| RecipeError::UnknownPreset { name: name.to_owned(), known: Self::presets().collect() })?;
        let config = config.config();
        let gate_sparsity = (config.activation == Activation::Relu2).then_some(0.8);
        Ok(Self { config, seed: 0, zero_fraction: 0.45, gate_sparsity })
    }
}

/// Why a recipe cannot be followed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RecipeError {
    /// No such preset.
    #[error("no shape is called {name}: choose one of {}", known.join(", "))]
    UnknownPreset {
        /// What was asked for.
        name: String,
        /// What there is.
        known: Vec<&'static str>,
    },
    /// Sizes that do not fit each other.
    #[error("the shape is impossible: {0}")]
    Shape(String),
    /// A fraction that cannot be had.
    #[error("a {what} of {value} is not possible: choose one from {low} to {high}")]
    Fraction {
        /// Which fraction.
        what: &'static str,
        /// Its value.
        value: f64,
        /// The smallest.
        low: f64,
        /// The largest.
        high: f64,
    },
    /// Gates of other activations are not sparse.
    #[error("a gate sparsity is for relu² models only: leave it away")]
    NotRelu2,
    /// The shape is too narrow for the sparsity that was asked for.
    #[error("a hidden size of {0} is too small for this gate sparsity: choose a smaller sparsity or a wider shape")]
    TooNarrow(usize),
}

/// A made-up model.
pub(super) struct Synthetic {
    recipe: Recipe,
    pub(super) generation: GenerationDefaults,
    pub(super) tokenizer: TokenizerConfig,
    /// Number of offset channels, the first of the residual stream; a multiple of 4.
    offsets: usize,
    /// Share of −1 in the offset channels of each layer's gate projection.
    shares: Vec<f64>,
}

impl Synthetic {
    pub(super) fn new(recipe: Recipe) -> Result<Self, RecipeError> {
        let Recipe { config, zero_fraction, gate_sparsity, .. } = &recipe;
        config.check().map_err(RecipeError::Shape)?;
        let needed = SPECIAL.len() + 256;
        if config.vocabulary < needed {
            return Err(RecipeError::Shape(format!("a vocabulary of {} has no room for bytes", config.vocabulary)));
        }
        let fraction = |what, value: f64, low: f64, high: f64| {
            let possible = (low..=high).contains(&value);
            if possible { Ok(()) } else { Err(RecipeError::Fraction { what, value, low, high }) }
        };
        fraction("zero fraction", *zero_fraction, 0.0, 0.9)?;
        let (mut offsets, mut shares) = (0, Vec::new());
        if let Some(sparsity) = gate_sparsity {
            fraction("gate sparsity", *sparsity, 0.5, 0.95)?;
            if config.activation != Activation::Relu2 {
                return Err(RecipeError::NotRelu2);
            }
            let quantile = normal_quantile(*sparsity);
            loop {
                offsets += 4;
                if offsets * 4 > config.hidden {
                    return Err(RecipeError::TooNarrow(config.hidden));
                }
                shares = (0..config.layers).map(|layer| share(&recipe, offsets, layer, quantile)).collect();
                if shares.iter().all(|share| *share <= LARGEST_SHARE) {
                    break;
                }
            }
        }
        let token = |name: &str| SPECIAL.iter().position(|special| *special == name).map_or(0, |id| id as u32);
        Ok(Self {
            generation: GenerationDefaults {
                do_sample: Some(false),
                eos: vec![token("<|end_of_text|>"), token("<|eot_id|>")],
                bos: Some(token("<|begin_of_text|>")),
                ..GenerationDefaults::default()
            },
            tokenizer: TokenizerConfig {
                add_bos: Some(true),
                bos_token: Some("<|begin_of_text|>".to_owned()),
                eos_token: Some("<|end_of_text|>".to_owned()),
                ..TokenizerConfig::default()
            },
            offsets,
            shares,
            recipe,
        })
    }

    pub(super) fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    pub(super) fn config(&self) -> &ModelConfig {
        &self.recipe.config
    }

    pub(super) fn projection(&self, layer: usize, projection: Projection) -> TernaryTensor {
        let config = self.config();
        let (m, k) = projection.shape(config);
        let writes_residual = matches!(projection, Projection::Output | Projection::Down);
        // Rows or columns whose weights are not the usual ones, and the share of zeros in them.
        let (zero_rows, zero_columns) = match projection {
            Projection::Output | Projection::Down => (self.offsets, 0),
            Projection::Gate => (0, self.offsets),
            _ => (0, 0),
        };
        let share = self.shares.get(layer).copied().unwrap_or(0.0);
        let special_zeros = if writes_residual { 1.0 } else { 1.0 - share };
        let part = (zero_rows as f64 / m as f64).max(zero_columns as f64 / k as f64);
        let zeros = ((self.recipe.zero_fraction - part * special_zeros) / (1.0 - part)).clamp(0.0, 1.0);
        let usual = TritTable::new([(1.0 - zeros) / 2.0, zeros, (1.0 - zeros) / 2.0]);
        let offset = TritTable::new([share, 1.0 - share, 0.0]);

        let row_bytes = PackedMatrix::row_bytes(k);
        let mut bytes = vec![ZERO_BYTE; m * row_bytes];
        let id = (layer * Projection::ALL.len() + projection as usize) as u64;
        for (row, bytes) in bytes.chunks_exact_mut(row_bytes).enumerate().skip(zero_rows) {
            let mut random = Random::new(self.recipe.seed, PROJECTIONS + id, row);
            let (special, rest) = bytes.split_at_mut(zero_columns / 4);
            offset.fill(&mut random, special);
            usual.fill(&mut random, rest);
            // Places past the row's end hold 0.
            if let Some((last, used)) = bytes.last_mut().zip(Some(k % 4)).filter(|(_, used)| *used > 0) {
                let mask = 0xff << (2 * used);
                *last = *last & !mask | ZERO_BYTE & mask;
            }
        }
        let deviation = ((1.0 - self.recipe.zero_fraction) * k as f64).sqrt();
        let added = (ADDED_VARIANCE / (2 * config.layers) as f64).sqrt() * EMBEDDING_DEVIATION;
        let scale = if writes_residual { added } else { 1.0 } / deviation;
        TernaryTensor { m, k, layout: Layout::Canonical, bytes: Bytes::from(bytes), scale: scale as f32 }
    }

    pub(super) fn norm(&self, norm: LayerNorm) -> Vec<f32> {
        vec![1.0; norm.width(self.config())]
    }

    pub(super) fn final_norm(&self) -> Vec<f32> {
        vec![1.0; self.config().hidden]
    }

    pub(super) fn bias(&self, projection: Projection) -> Vec<f32> {
        vec![0.0; projection.shape(self.config()).0]
    }

    pub(super) fn embedding(&self) -> FloatMatrix {
        self.token_rows(EMBEDDING, self.offsets)
    }

    pub(super) fn head(&self) -> Option<FloatMatrix> {
        (!self.config().tied_head).then(|| self.token_rows(HEAD, 0))
    }

    /// Normally distributed rows; the first `offsets` values of each are one standard deviation.
    fn token_rows(&self, part: u64, offsets: usize) -> FloatMatrix {
        let (rows, columns) = (self.config().vocabulary, self.config().hidden);
        let table = NormalTable::new(EMBEDDING_DEVIATION);
        let constant = bf16::from_f64(EMBEDDING_DEVIATION).to_le_bytes();
        let row_bytes = columns * FloatType::Bf16.bytes();
        let mut bytes = vec![0; rows * row_bytes];
        let workers = thread::available_parallelism().map_or(1, usize::from);
        let rows_each = rows.div_ceil(workers);
        thread::scope(|scope| {
            for (worker, bytes) in bytes.chunks_mut(rows_each * row_bytes).enumerate() {
                let table = &table;
                scope.spawn(move || {
                    for (row, bytes) in bytes.chunks_exact_mut(row_bytes).enumerate() {
                        table.fill(&mut Random::new(self.recipe.seed, part, worker * rows_each + row), bytes);
                        bytes[..2 * offsets].chunks_exact_mut(2).for_each(|value| value.copy_from_slice(&constant));
                    }
                });
            }
        });
        FloatMatrix { rows, columns, dtype: RowType::Bf16, bytes: Bytes::from(bytes) }
    }

    /// A byte-level `tokenizer.json`: special tokens, the 256 bytes, and, so that every id of the vocabulary is some
    /// text, words that nobody writes.
    pub(super) fn tokenizer_json(&self) -> Bytes {
        let mut tokens: Vec<String> = SPECIAL.iter().map(|token| (*token).to_owned()).collect();
        let mut alphabet: Vec<char> =
            tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
        alphabet.sort_unstable();
        tokens.extend(alphabet.into_iter().map(String::from));
        tokens.extend((tokens.len()..self.config().vocabulary).map(|id| format!("Ġw{id}")));
        let vocab: serde_json::Map<_, _> = tokens.into_iter().enumerate().map(|(id, t)| (t, id.into())).collect();
        let added: Vec<_> = SPECIAL
            .iter()
            .enumerate()
            .map(|(id, token)| {
                json!({
                    "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": true,
                })
            })
            .collect();
        let byte_level =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        let json = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
            "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "vocab": vocab, "merges": [],
            },
        });
        Bytes::from(json.to_string().into_bytes())
    }
}

/// Numbers of the parts that have random weights.
const EMBEDDING: u64 = 0;
const HEAD: u64 = 1;
const PROJECTIONS: u64 = 2;

const SPECIAL: [&str; 3] = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"];

/// The share of −1 in `offsets` offset channels that puts the gates' `quantile` at 0: see the module.
fn share(recipe: &Recipe, offsets: usize, layer: usize, quantile: f64) -> f64 {
    let config = &recipe.config;
    let (b, n) = (offsets as f64, (config.hidden - offsets) as f64);
    // Before this layer's FFN, 2·layer + 1 of 2·layers outputs have been added.
    let variance = 1.0 + ADDED_VARIANCE * (2 * layer + 1) as f64 / (2 * config.layers) as f64;
    let mut p = 0.0;
    for _ in 0..50 {
        let zeros = ((recipe.zero_fraction * (b + n) - b * (1.0 - p)) / n).clamp(0.0, 1.0);
        p = quantile * (n * (1.0 - zeros) * variance + b * p * (1.0 - f64::min(p, 1.0))).sqrt() / b;
    }
    p
}

#[cfg(test)]
mod tests {
    use super::*;
    use ternion_kernels_ref::{QuantizedRow, gemm, norm};

    fn small(sparsity: f64) -> Synthetic {
        let config = ModelConfig { hidden: 512, ffn: 1024, vocabulary: 400, ..ModelConfig::small() };
        Synthetic::new(Recipe { config, seed: 5, zero_fraction: 0.45, gate_sparsity: Some(sparsity) }).unwrap()
    }

    #[test]
    fn every_matrix_has_the_zero_fraction_that_was_asked_for() {
        let model = small(0.8);
        for layer in 0..2 {
            for projection in Projection::ALL {
                let tensor = model.projection(layer, projection);
                let matrix = tensor.to_matrix().unwrap();
                let zeros =
                    (0..tensor.m * tensor.k).filter(|at| matrix.trit(at / tensor.k, at % tensor.k).value() == 0);
                let fraction = zeros.count() as f64 / (tensor.m * tensor.k) as f64;
                assert!((fraction - 0.45).abs() < 0.01, "layer {layer}, {projection}: {fraction}");
            }
        }
    }

    #[test]
    fn gates_of_the_first_layer_are_as_sparse_as_was_asked_for() {
        for sparsity in [0.5, 0.7, 0.8, 0.9] {
            let model = small(sparsity);
            let (embedding, gate) = (model.embedding(), model.projection(0, Projection::Gate).to_matrix().unwrap());
            let (mut row, mut at_most_0, mut all) = (vec![0.0; 512], 0, 0);
            for token in 0..40 {
                embedding.widen_row(token, &mut row);
                let row = QuantizedRow::new(&norm::rms_norm(&row, &[1.0; 512], 1e-5));
                let gates = gemm::gemv(gate.view(), &row);
                at_most_0 += gates.iter().filter(|gate| **gate <= 0).count();
                all += gates.len();
            }
            let measured = at_most_0 as f64 / all as f64;
            assert!((measured - sparsity).abs() < 0.03, "{sparsity}: {measured}");
        }
    }

    #[test]
    fn recipes_that_cannot_be_followed_are_refused() {
        assert!(matches!(Recipe::preset("2B"), Err(RecipeError::UnknownPreset { .. })));
        let recipe = Recipe::preset("2b-4t").unwrap();
        let error = |recipe| Synthetic::new(recipe).map(drop).unwrap_err().to_string();
        assert!(error(Recipe { zero_fraction: 1.0, ..recipe.clone() }).contains("zero fraction of 1"));
        assert!(error(Recipe { gate_sparsity: Some(0.99), ..recipe.clone() }).contains("gate sparsity of 0.99"));
        let silu = Recipe { gate_sparsity: Some(0.8), ..Recipe::preset("3B").unwrap() };
        assert!(error(silu).contains("relu²"));
        let narrow = ModelConfig { hidden: 32, ..ModelConfig::small() };
        assert!(error(Recipe { config: narrow, gate_sparsity: Some(0.95), ..recipe }).contains("hidden size of 32"));
    }

    #[test]
    fn every_preset_is_a_possible_shape() {
        for name in Recipe::presets() {
            let model = Synthetic::new(Recipe::preset(name).unwrap()).unwrap();
            assert!(model.offsets * 20 < model.config().hidden, "{name}: {} offset channels", model.offsets);
        }
    }
}
