//! What a model is: its sizes and the places its tensors have in it, whatever file it came from.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The largest accepted length of a row and number of rows of a projection: int32 sums of products of 127 stay exact
/// far beyond it, and no size computed from it overflows.
const MAX_WIDTH: usize = 1 << 20;
/// The largest accepted vocabulary and context.
const MAX_TOKENS: usize = 1 << 24;
/// The largest accepted number of layers.
const MAX_LAYERS: usize = 1 << 12;

/// The activation function of the gated feed-forward network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `max(x, 0)²`
    Relu2,
    /// `x · sigmoid(x)`
    Silu,
    /// GELU in its tanh approximation
    GeluTanh,
}

/// Sizes and constants of a decoder-only transformer with ternary projections.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// The architecture by the name its `config.json` gives it.
    pub architecture: String,
    /// Number of layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the feed-forward network.
    pub ffn: usize,
    /// Number of query heads.
    pub heads: usize,
    /// Number of key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head; even.
    pub head_dim: usize,
    /// Rows of the embedding; token ids are below it.
    pub vocabulary: usize,
    /// Longest sequence in tokens that the model was made for.
    pub context: usize,
    /// Base of the rotary embedding's frequencies.
    pub rope_theta: f64,
    /// Added to the mean square in every RMSNorm.
    pub norm_eps: f32,
    /// Activation function of the feed-forward network.
    pub activation: Activation,
    /// Whether an RMSNorm precedes the output and down projections (BitNet's sub-norms).
    pub sub_norms: bool,
    /// Whether the head's rows are the embedding's.
    pub tied_head: bool,
    /// Which projections add a bias: `y + b`, in `f32`, after the ternary product and its multiplier.
    #[serde(default, skip_serializing_if = "is_default")]
    pub biases: Biases,
    /// Whether every query and key head is normalised before its rotation: `head ← rms_norm(head, eps = norm_eps) · w`,
    /// with one weight vector `[head_dim]` for all query heads and one for all key heads.
    #[serde(default, skip_serializing_if = "is_default")]
    pub qk_norm: bool,
    /// Epsilon of the RMSNorms that stand in front of each of the seven projections, or `None` without them:
    /// `y = projection(rms_norm(x, eps) · w)`, `w` being `[k]` and the projection's own, after any sub-norm.
    #[serde(default, skip_serializing_if = "is_default")]
    pub projection_norm_eps: Option<f32>,
    /// Whether attention and feed-forward network end in an RMSNorm each, before their results are added to the
    /// residual stream: `x + rms_norm(attention(…)) · w`, `x + rms_norm(ffn(…)) · w`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub post_norms: bool,
    /// What embedding rows are multiplied with when a token enters the residual stream (never in the head).
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub embedding_scale: f32,
    /// How rotary frequencies are changed for long contexts; [`ModelConfig::inverse_frequencies`] has the formulas.
    #[serde(default, skip_serializing_if = "is_default")]
    pub rope_scaling: RopeScaling,
    /// Layers that see only the latest positions, or `None` if all see everything.
    #[serde(default, skip_serializing_if = "is_default")]
    pub sliding: Option<SlidingAttention>,
    /// How one vector is made of a text, for embedding models; `None` for models that generate.
    #[serde(default, skip_serializing_if = "is_default")]
    pub pooling: Option<Pooling>,
}

/// Which projections have a bias.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Biases {
    /// Queries, keys and values.
    pub qkv: bool,
    /// The attention's output.
    pub output: bool,
    /// Gate, up and down.
    pub ffn: bool,
}

/// A change of the rotary frequencies `f[i] = θ^(−2i/d)`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum RopeScaling {
    /// None.
    #[default]
    None,
    /// `f[i] / factor`
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1's: with `w = 2π / f[i]` and `n = original_context`, `f[i]` if `w < n / high`, `f[i] / factor` if
    /// `w > n / low`, and between them `(1 − t) · f[i] / factor + t · f[i]` with `t = (n / w − low) / (high − low)`.
    Llama3 {
        /// Divisor of low frequencies.
        factor: f64,
        /// `low`
        low: f64,
        /// `high`
        high: f64,
        /// `n`
        original_context: f64,
    },
    /// `f[i] / factors[i]`, `head_dim / 2` of them (the tensor `rope_freqs.weight` of a GGUF file).
    Factors {
        /// One divisor for each pair.
        factors: Vec<f32>,
    },
}

/// Layers whose attention reaches only the latest positions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlidingAttention {
    /// Number of positions that a query sees, its own included: key `j` of query `i` if `i − window < j ≤ i`.
    pub window: usize,
    /// Base of the rotary embedding in these layers; never scaled.
    pub rope_theta: f64,
    /// These layers, ascending; the others see every position.
    pub layers: Vec<usize>,
}

/// How an embedding model makes one vector of a text. The result is divided by its Euclidean length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pooling {
    /// The last position's final norm.
    Last,
    /// The mean over all positions of the final norm.
    Mean,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

const fn one() -> f32 {
    1.0
}

fn is_one(value: &f32) -> bool {
    *value == 1.0
}

impl Default for ModelConfig {
    /// Nothing but ones and zeros: a base for `..`, refused by [`check`](ModelConfig::check).
    fn default() -> Self {
        Self {
            architecture: String::new(),
            layers: 0,
            hidden: 0,
            ffn: 0,
            heads: 0,
            kv_heads: 0,
            head_dim: 0,
            vocabulary: 0,
            context: 0,
            rope_theta: 10_000.0,
            norm_eps: 1e-5,
            activation: Activation::Silu,
            sub_norms: false,
            tied_head: false,
            biases: Biases::default(),
            qk_norm: false,
            projection_norm_eps: None,
            post_norms: false,
            embedding_scale: 1.0,
            rope_scaling: RopeScaling::None,
            sliding: None,
            pooling: None,
        }
    }
}

impl ModelConfig {
    /// Checks that sizes fit each other and are small enough that nothing computed from them overflows.
    ///
    /// # Errors
    /// What is wrong, as the end of a sentence.
    pub fn check(&self) -> Result<(), String> {
        for (name, size, limit) in [
            ("number of layers", self.layers, MAX_LAYERS),
            ("hidden size", self.hidden, MAX_WIDTH),
            ("feed-forward size", self.ffn, MAX_WIDTH),
            ("number of heads", self.heads, MAX_WIDTH),
            ("number of key-value heads", self.kv_heads, MAX_WIDTH),
            ("head size", self.head_dim, MAX_WIDTH),
            ("width of all heads", self.heads.saturating_mul(self.head_dim), MAX_WIDTH),
            ("vocabulary", self.vocabulary, MAX_TOKENS),
            ("context", self.context, MAX_TOKENS),
        ] {
            if size == 0 || size > limit {
                return Err(format!("the {name} is {size}, outside 1..={limit}"));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(format!("{} heads cannot share {} key-value heads evenly", self.heads, self.kv_heads));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(format!("the head size {} is odd: rotary embedding needs pairs", self.head_dim));
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 0.0) {
            return Err(format!("the rotary base is {}, not a positive number", self.rope_theta));
        }
        for eps in [Some(self.norm_eps), self.projection_norm_eps].into_iter().flatten() {
            if !(eps.is_finite() && eps >= 0.0) {
                return Err(format!("the norms' epsilon is {eps}, not a number from 0"));
            }
        }
        if !self.embedding_scale.is_normal() {
            return Err(format!("the embedding's scale is {}", self.embedding_scale));
        }
        self.check_rope_scaling()?;
        self.check_sliding()
    }

    fn check_rope_scaling(&self) -> Result<(), String> {
        let positive = |values: &[f64]| values.iter().all(|value| value.is_finite() && *value > 0.0);
        let sound = match &self.rope_scaling {
            RopeScaling::None => true,
            RopeScaling::Linear { factor } => positive(&[*factor]),
            RopeScaling::Llama3 { factor, low, high, original_context } => {
                positive(&[*factor, *low, *high, *original_context]) && low < high
            }
            RopeScaling::Factors { factors } => {
                factors.len() == self.head_dim / 2 && factors.iter().all(|factor| positive(&[(*factor).into()]))
            }
        };
        if sound { Ok(()) } else { Err(format!("the rotary scaling {:?} makes no sense", self.rope_scaling)) }
    }

    fn check_sliding(&self) -> Result<(), String> {
        let Some(SlidingAttention { window, rope_theta, layers }) = &self.sliding else { return Ok(()) };
        if *window == 0 || *window > MAX_TOKENS || !(rope_theta.is_finite() && *rope_theta > 0.0) {
            return Err(format!("the sliding window is {window} positions with rotary base {rope_theta}"));
        }
        if !layers.is_sorted_by(|a, b| a < b) || layers.last().is_some_and(|last| *last >= self.layers) {
            return Err(format!("the layers with a sliding window are not layers below {}, ascending", self.layers));
        }
        Ok(())
    }

    /// Number of positions that a query of a layer sees, its own included; `None` if it sees all.
    #[must_use]
    pub fn window(&self, layer: usize) -> Option<usize> {
        self.sliding_at(layer).map(|sliding| sliding.window)
    }

    fn sliding_at(&self, layer: usize) -> Option<&SlidingAttention> {
        self.sliding.as_ref().filter(|sliding| sliding.layers.binary_search(&layer).is_ok())
    }

    /// Rotary frequencies of a layer, `head_dim / 2` of them: `θ^(−2i/d)` with the layer's base, changed as
    /// [`rope_scaling`](Self::rope_scaling) says (not in layers with a sliding window). Computed in `f64`, rounded once.
    #[must_use]
    pub fn inverse_frequencies(&self, layer: usize) -> Vec<f32> {
        let Some(SlidingAttention { rope_theta, .. }) = self.sliding_at(layer) else {
            let frequencies = (0..self.head_dim / 2).map(|i| (i, frequency(self.rope_theta, i, self.head_dim)));
            return frequencies.map(|(i, frequency)| self.rope_scaling.apply(i, frequency) as f32).collect();
        };
        (0..self.head_dim / 2).map(|i| frequency(*rope_theta, i, self.head_dim) as f32).collect()
    }
}

/// `θ^(−2i/d)`, as `kernels-ref` has it before rounding.
fn frequency(theta: f64, i: usize, head_dim: usize) -> f64 {
    libm::pow(theta, -2.0 * i as f64 / head_dim as f64)
}

impl RopeScaling {
    fn apply(&self, i: usize, frequency: f64) -> f64 {
        match self {
            Self::None => frequency,
            Self::Linear { factor } => frequency / factor,
            Self::Llama3 { factor, low, high, original_context } => {
                let turns = original_context * frequency / std::f64::consts::TAU;
                let t = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                (1.0 - t) * frequency / factor + t * frequency
            }
            Self::Factors { factors } => frequency / f64::from(factors[i]),
        }
    }
}

/// One of the seven ternary matrices of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Projection {
    /// Queries, `[heads · head_dim, hidden]`.
    Query,
    /// Keys, `[kv_heads · head_dim, hidden]`.
    Key,
    /// Values, `[kv_heads · head_dim, hidden]`.
    Value,
    /// Output of the attention, `[hidden, heads · head_dim]`.
    Output,
    /// Gate of the feed-forward network, `[ffn, hidden]`.
    Gate,
    /// Up projection of the feed-forward network, `[ffn, hidden]`.
    Up,
    /// Down projection of the feed-forward network, `[hidden, ffn]`.
    Down,
}

impl Projection {
    /// All seven, in the order in which a forward pass uses them.
    pub const ALL: [Self; 7] = [Self::Query, Self::Key, Self::Value, Self::Output, Self::Gate, Self::Up, Self::Down];

    /// `(m, k)`: rows (outputs) and columns (inputs).
    #[must_use]
    pub const fn shape(self, config: &ModelConfig) -> (usize, usize) {
        let (all_heads, kv_heads) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        match self {
            Self::Query => (all_heads, config.hidden),
            Self::Key | Self::Value => (kv_heads, config.hidden),
            Self::Output => (config.hidden, all_heads),
            Self::Gate | Self::Up => (config.ffn, config.hidden),
            Self::Down => (config.hidden, config.ffn),
        }
    }

    /// Whether the model has a bias `[m]` for it.
    #[must_use]
    pub const fn has_bias(self, config: &ModelConfig) -> bool {
        match self {
            Self::Query | Self::Key | Self::Value => config.biases.qkv,
            Self::Output => config.biases.output,
            Self::Gate | Self::Up | Self::Down => config.biases.ffn,
        }
    }
}

impl fmt::Display for Projection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Query => "self_attn.q_proj",
            Self::Key => "self_attn.k_proj",
            Self::Value => "self_attn.v_proj",
            Self::Output => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        })
    }
}

/// One of the RMSNorms of a layer. Weights are what is multiplied with: where a family's files hold `w` and mean
/// `1 + w` (Gemma), the one is added when they are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LayerNorm {
    /// Before the attention, `[hidden]`.
    Input,
    /// Before the output projection, `[heads · head_dim]`; only with sub-norms.
    AttentionSub,
    /// Before the feed-forward network, `[hidden]`.
    PostAttention,
    /// Before the down projection, `[ffn]`; only with sub-norms.
    FfnSub,
    /// Of every query head, `[head_dim]`; only with `qk_norm`.
    QueryHead,
    /// Of every key head, `[head_dim]`; only with `qk_norm`.
    KeyHead,
    /// Of the attention's result, `[hidden]`; only with `post_norms`.
    AttentionResult,
    /// Of the feed-forward network's result, `[hidden]`; only with `post_norms`.
    FfnResult,
    /// In front of a projection, `[k]`; only with `projection_norm_eps`.
    Projection(Projection),
}

impl LayerNorm {
    /// All there can be, in the order of the prepared file.
    pub const ALL: [Self; 15] = [
        Self::Input,
        Self::AttentionSub,
        Self::PostAttention,
        Self::FfnSub,
        Self::QueryHead,
        Self::KeyHead,
        Self::AttentionResult,
        Self::FfnResult,
        Self::Projection(Projection::Query),
        Self::Projection(Projection::Key),
        Self::Projection(Projection::Value),
        Self::Projection(Projection::Output),
        Self::Projection(Projection::Gate),
        Self::Projection(Projection::Up),
        Self::Projection(Projection::Down),
    ];

    /// Its place in [`ALL`](Self::ALL).
    #[must_use]
    pub const fn index(self) -> usize {
        match self {
            Self::Input => 0,
            Self::AttentionSub => 1,
            Self::PostAttention => 2,
            Self::FfnSub => 3,
            Self::QueryHead => 4,
            Self::KeyHead => 5,
            Self::AttentionResult => 6,
            Self::FfnResult => 7,
            Self::Projection(projection) => 8 + projection as usize,
        }
    }

    /// Number of weights; 0 if the model has no such norm.
    #[must_use]
    pub const fn width(self, config: &ModelConfig) -> usize {
        match self {
            Self::Input | Self::PostAttention => config.hidden,
            Self::AttentionSub if config.sub_norms => config.heads * config.head_dim,
            Self::FfnSub if config.sub_norms => config.ffn,
            Self::QueryHead | Self::KeyHead if config.qk_norm => config.head_dim,
            Self::AttentionResult | Self::FfnResult if config.post_norms => config.hidden,
            Self::Projection(projection) if config.projection_norm_eps.is_some() => projection.shape(config).1,
            _ => 0,
        }
    }
}

impl fmt::Display for LayerNorm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Input => "input_layernorm",
            Self::AttentionSub => "self_attn.attn_sub_norm",
            Self::PostAttention => "post_attention_layernorm",
            Self::FfnSub => "mlp.ffn_sub_norm",
            Self::QueryHead => "self_attn.q_norm",
            Self::KeyHead => "self_attn.k_norm",
            Self::AttentionResult => "attention_result_layernorm",
            Self::FfnResult => "ffn_result_layernorm",
            Self::Projection(projection) => return write!(f, "{projection}.norm"),
        })
    }
}

#[cfg(test)]
impl ModelConfig {
    /// A small model in 2B4T's architecture.
    pub(crate) fn small() -> Self {
        Self {
            architecture: "BitNetForCausalLM".to_owned(),
            layers: 2,
            hidden: 256,
            ffn: 512,
            heads: 4,
            kv_heads: 2,
            head_dim: 64,
            vocabulary: 300,
            context: 128,
            rope_theta: 10_000.0,
            norm_eps: 1e-5,
            activation: Activation::Relu2,
            sub_norms: true,
            tied_head: true,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_norm_knows_its_place() {
        let places: Vec<usize> = LayerNorm::ALL.into_iter().map(LayerNorm::index).collect();
        assert_eq!(places, (0..LayerNorm::ALL.len()).collect::<Vec<_>>());
    }

    #[test]
    fn frequencies_without_scaling_are_those_of_kernels_ref() {
        let config = ModelConfig::small();
        let expected = ternion_kernels_ref::rope::inverse_frequencies(config.head_dim, config.rope_theta);
        assert_eq!(config.inverse_frequencies(0), expected);
    }

    #[test]
    fn llama3_scaling_keeps_high_frequencies_divides_low_ones_and_blends_between() {
        let scaling = RopeScaling::Llama3 { factor: 32.0, low: 1.0, high: 4.0, original_context: 8192.0 };
        let config = ModelConfig { rope_theta: 500_000.0, rope_scaling: scaling, ..ModelConfig::small() };
        config.check().unwrap();
        let plain = ModelConfig { rope_scaling: RopeScaling::None, ..config.clone() }.inverse_frequencies(0);
        let scaled = config.inverse_frequencies(0);
        assert_eq!(scaled[0], plain[0]);
        assert_eq!(scaled[31], plain[31] / 32.0);
        let between: Vec<usize> = (0..32).filter(|i| scaled[*i] < plain[*i] && scaled[*i] > plain[*i] / 32.0).collect();
        // Wavelengths between 2048 and 8192: θ^(i/32) = wavelength / 2π.
        assert_eq!(between, [15, 16, 17]);
    }

    #[test]
    fn layers_with_a_window_have_a_base_of_their_own() {
        let sliding = SlidingAttention { window: 16, rope_theta: 100.0, layers: vec![1] };
        let scaling = RopeScaling::Linear { factor: 8.0 };
        let config = ModelConfig { sliding: Some(sliding), rope_scaling: scaling, ..ModelConfig::small() };
        config.check().unwrap();
        assert_eq!(config.inverse_frequencies(0)[0], 1.0 / 8.0);
        assert_eq!(config.inverse_frequencies(1), ternion_kernels_ref::rope::inverse_frequencies(64, 100.0));
    }

    #[test]
    fn settings_that_make_no_sense_are_refused() {
        let small = ModelConfig::small;
        let sliding = |layers| Some(SlidingAttention { window: 4, rope_theta: 1e4, layers });
        for config in [
            ModelConfig { rope_scaling: RopeScaling::Linear { factor: 0.0 }, ..small() },
            ModelConfig { rope_scaling: RopeScaling::Factors { factors: vec![1.0; 31] }, ..small() },
            ModelConfig { sliding: sliding(vec![2]), ..small() },
            ModelConfig { sliding: sliding(vec![1, 1]), ..small() },
            ModelConfig { embedding_scale: f32::NAN, ..small() },
            ModelConfig { projection_norm_eps: Some(-1.0), ..small() },
        ] {
            assert!(config.check().is_err(), "{config:?}");
        }
    }

    #[test]
    fn a_plain_model_is_written_without_the_fields_it_does_not_need() {
        let json = serde_json::to_value(ModelConfig::small()).unwrap();
        assert_eq!(json.as_object().unwrap().len(), 14);
        assert_eq!(serde_json::from_value::<ModelConfig>(json).unwrap(), ModelConfig::small());
    }
}
