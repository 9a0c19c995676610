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
        if !(self.norm_eps.is_finite() && self.norm_eps >= 0.0) {
            return Err(format!("the norms' epsilon is {}, not a number from 0", self.norm_eps));
        }
        Ok(())
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

/// One of the RMSNorms of a layer.
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
}

impl LayerNorm {
    /// All four, in the order in which a forward pass uses them.
    pub const ALL: [Self; 4] = [Self::Input, Self::AttentionSub, Self::PostAttention, Self::FfnSub];

    /// Number of weights; 0 if the model has no such norm.
    #[must_use]
    pub const fn width(self, config: &ModelConfig) -> usize {
        match self {
            Self::Input | Self::PostAttention => config.hidden,
            Self::AttentionSub if config.sub_norms => config.heads * config.head_dim,
            Self::FfnSub if config.sub_norms => config.ffn,
            Self::AttentionSub | Self::FfnSub => 0,
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
        })
    }
}
