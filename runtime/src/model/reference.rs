//! The forward pass on `kernels-ref` alone: one token after the other, one function call per formula.
//!
//! It is what every [`Session`](super::Session) must equal bit for bit, so nothing clever may enter it: no threads, no
//! chunks, no compiled kernels, no fast operations. It takes seconds per token on a model of billions of weights.

use ternion_kernels_ref::attention::{QuantizedRows, Rows, attention_from};
use ternion_kernels_ref::gemm::bit_linear;
use ternion_kernels_ref::norm::rms_norm;
use ternion_kernels_ref::rope::Rotation;
use ternion_kernels_ref::widen::{f16_to_f32, f32_to_f16};
use ternion_kernels_ref::{QuantizedRow, TernaryMatrix, activation, lanes};

use super::kv_cache::attention_scale;
use super::low_rank::LowRank;
use super::{KvType, ModelError};
use crate::formats::{Activation, Checkpoint, FloatMatrix, LayerNorm, ModelConfig, Projection};

/// How activations enter a ternary projection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// As int8 with a scale per token: the model as it is.
    #[default]
    Int8,
    /// As `f32`: for tests alone. Without the rounding of activations, which amplifies every difference before it, a
    /// forward pass can be compared closely with another implementation's. `y = (Σ T·x) · scale` by [`lanes::dot`].
    Float,
}

struct Linear {
    trits: TernaryMatrix,
    scale: f32,
    bias: Vec<f32>,
    adapters: Vec<LowRank>,
}

struct Layer {
    norms: [Vec<f32>; LayerNorm::ALL.len()],
    projections: Vec<Linear>,
}

/// A model's weights as the reference reads them.
pub struct Reference {
    config: ModelConfig,
    embedding: FloatMatrix,
    head: FloatMatrix,
    final_norm: Vec<f32>,
    layers: Vec<Layer>,
}

impl Reference {
    /// Reads all weights and checks every code.
    ///
    /// # Errors
    /// If the checkpoint is damaged.
    pub fn load(checkpoint: &Checkpoint) -> Result<Self, ModelError> {
        let config = checkpoint.config().clone();
        let mut layers = Vec::with_capacity(config.layers);
        for layer in 0..config.layers {
            let mut norms = LayerNorm::ALL.map(|_| Vec::new());
            for (norm, weights) in LayerNorm::ALL.into_iter().zip(&mut norms) {
                *weights = checkpoint.norm(layer, norm)?;
            }
            let mut projections = Vec::with_capacity(Projection::ALL.len());
            for projection in Projection::ALL {
                let tensor = checkpoint.projection(layer, projection)?;
                let trits = tensor.to_matrix().map_err(|source| ModelError::Code { layer, projection, source })?;
                let bias = checkpoint.bias(layer, projection)?;
                projections.push(Linear { trits, scale: tensor.scale, bias, adapters: Vec::new() });
            }
            layers.push(Layer { norms, projections });
        }
        let embedding = checkpoint.embedding()?;
        let head = checkpoint.head()?.unwrap_or_else(|| embedding.clone());
        Ok(Self { embedding, head, final_norm: checkpoint.final_norm()?, layers, config })
    }

    /// Adds to a projection what `addition` computes, after everything added before.
    pub(crate) fn add_low_rank(&mut self, layer: usize, projection: Projection, addition: LowRank) {
        self.layers[layer].projections[projection as usize].adapters.push(addition);
    }

    /// Sizes and constants.
    #[must_use]
    pub const fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// An empty sequence.
    #[must_use]
    pub fn session(&self, kv: KvType, precision: Precision) -> ReferenceSession<'_> {
        let layers = self.layers.iter().map(|_| vec![CachedHead::new(kv); self.config.kv_heads]).collect();
        let frequencies = (0..self.config.layers).map(|layer| self.config.inverse_frequencies(layer)).collect();
        ReferenceSession { model: self, kv, precision, frequencies, layers, len: 0 }
    }
}

/// Keys or values of one head, as the cache's type holds them.
#[derive(Clone, Debug)]
enum CachedRows {
    /// `[positions, head_dim]`, also of halves.
    Floats(Vec<f32>),
    /// `[positions, head_dim]` and `[positions]`
    Quantized(Vec<i8>, Vec<f32>),
}

impl CachedRows {
    const fn new(kv: KvType) -> Self {
        match kv {
            KvType::F16 | KvType::F32 => Self::Floats(Vec::new()),
            KvType::Int8 => Self::Quantized(Vec::new(), Vec::new()),
        }
    }

    fn push(&mut self, kv: KvType, row: &[f32]) {
        match self {
            Self::Floats(elements) if kv == KvType::F16 => {
                elements.extend(row.iter().map(|x| f16_to_f32(f32_to_f16(*x))));
            }
            Self::Floats(elements) => elements.extend(row),
            Self::Quantized(elements, steps) => {
                let row = QuantizedRow::new(row);
                elements.extend(row.values());
                steps.push(1.0 / row.q());
            }
        }
    }
}

/// What is cached of one head.
#[derive(Clone, Debug)]
struct CachedHead {
    keys: CachedRows,
    values: CachedRows,
}

impl CachedHead {
    const fn new(kv: KvType) -> Self {
        Self { keys: CachedRows::new(kv), values: CachedRows::new(kv) }
    }

    /// Attention over the positions from `first` on.
    fn attend(&self, query: &[f32], first: usize) -> Vec<f32> {
        let scale = attention_scale(query.len());
        match (&self.keys, &self.values) {
            (CachedRows::Floats(keys), CachedRows::Floats(values)) => {
                attention_from(query, Rows(keys), Rows(values), first, scale)
            }
            (CachedRows::Quantized(keys, key_steps), CachedRows::Quantized(values, value_steps)) => {
                let keys = QuantizedRows { elements: keys, steps: key_steps };
                let values = QuantizedRows { elements: values, steps: value_steps };
                attention_from(query, keys, values, first, scale)
            }
            _ => unreachable!("keys and values are of one type"),
        }
    }
}

/// A sequence of tokens on the reference.
pub struct ReferenceSession<'a> {
    model: &'a Reference,
    kv: KvType,
    precision: Precision,
    /// One set per layer.
    frequencies: Vec<Vec<f32>>,
    /// One per layer and key-value head.
    layers: Vec<Vec<CachedHead>>,
    len: usize,
}

impl ReferenceSession<'_> {
    /// Reads one token; returns the logits after it.
    ///
    /// # Errors
    /// If the context is full or the model does not have the token.
    pub fn step(&mut self, token: u32) -> Result<Vec<f32>, ModelError> {
        let x = self.hidden(token)?;
        let Reference { config, head, .. } = self.model;
        let mut row = vec![0.0; config.hidden];
        let logits = (0..config.vocabulary).map(|token| {
            head.widen_row(token, &mut row);
            lanes::dot(&x, &row)
        });
        Ok(logits.collect())
    }

    /// Reads one token; returns the last norm's output.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn hidden(&mut self, token: u32) -> Result<Vec<f32>, ModelError> {
        let Reference { config, embedding, final_norm, layers, .. } = self.model;
        if self.len == config.context {
            return Err(ModelError::PromptTooLong { tokens: 1, used: self.len, context: config.context });
        }
        if token as usize >= config.vocabulary {
            return Err(ModelError::NoSuchToken { token, vocabulary: config.vocabulary });
        }
        let mut x = vec![0.0; config.hidden];
        embedding.widen_row(token as usize, &mut x);
        x.iter_mut().for_each(|x| *x *= config.embedding_scale);
        for (index, layer) in layers.iter().enumerate() {
            let attention = self.attention(index, layer, &self.norm(layer, LayerNorm::Input, &x));
            add(&mut x, &self.norm(layer, LayerNorm::AttentionResult, &attention));
            let feed_forward = self.feed_forward(layer, &self.norm(layer, LayerNorm::PostAttention, &x));
            add(&mut x, &self.norm(layer, LayerNorm::FfnResult, &feed_forward));
        }
        self.len += 1;
        Ok(rms_norm(&x, final_norm, config.norm_eps))
    }

    fn attention(&mut self, index: usize, layer: &Layer, x: &[f32]) -> Vec<f32> {
        let ModelConfig { heads, kv_heads, head_dim, .. } = self.model.config;
        let [mut queries, mut keys, values] =
            [Projection::Query, Projection::Key, Projection::Value].map(|p| self.project(layer, p, x));
        let rotation = Rotation::at(self.len, &self.frequencies[index]);
        for (heads, norm) in [(&mut queries, LayerNorm::QueryHead), (&mut keys, LayerNorm::KeyHead)] {
            for head in heads.chunks_exact_mut(head_dim) {
                head.copy_from_slice(&self.norm(layer, norm, head));
                rotation.apply(head);
            }
        }

        let rows = keys.chunks_exact(head_dim).zip(values.chunks_exact(head_dim));
        for (cache, (key, value)) in self.layers[index].iter_mut().zip(rows) {
            cache.keys.push(self.kv, key);
            cache.values.push(self.kv, value);
        }
        let seen = self.model.config.window(index).unwrap_or(usize::MAX);
        let first = (self.len + 1).saturating_sub(seen);
        let mut output = Vec::with_capacity(heads * head_dim);
        for (head, query) in queries.chunks_exact(head_dim).enumerate() {
            let cache = &self.layers[index][head / (heads / kv_heads)];
            output.extend(cache.attend(query, first));
        }
        self.project(layer, Projection::Output, &self.norm(layer, LayerNorm::AttentionSub, &output))
    }

    fn feed_forward(&self, layer: &Layer, x: &[f32]) -> Vec<f32> {
        let activation = match self.model.config.activation {
            Activation::Relu2 => activation::relu2,
            Activation::Silu => activation::silu,
            Activation::GeluTanh => activation::gelu_tanh,
        };
        let [gate, up] = [Projection::Gate, Projection::Up].map(|p| self.project(layer, p, x));
        let gated: Vec<f32> = gate.iter().zip(&up).map(|(gate, up)| activation(*gate) * up).collect();
        self.project(layer, Projection::Down, &self.norm(layer, LayerNorm::FfnSub, &gated))
    }

    /// A norm of the layer, or nothing if the model has no such norm.
    fn norm(&self, layer: &Layer, norm: LayerNorm, x: &[f32]) -> Vec<f32> {
        match &layer.norms[norm.index()][..] {
            [] => x.to_vec(),
            weights => rms_norm(x, weights, self.model.config.norm_eps),
        }
    }

    fn project(&self, layer: &Layer, projection: Projection, x: &[f32]) -> Vec<f32> {
        let Linear { trits, scale, bias, adapters } = &layer.projections[projection as usize];
        let normed = match &layer.norms[LayerNorm::Projection(projection).index()][..] {
            [] => x.to_vec(),
            weights => rms_norm(x, weights, self.model.config.projection_norm_eps.unwrap_or_default()),
        };
        let mut y: Vec<f32> = match self.precision {
            Precision::Int8 => bit_linear(trits.view(), *scale, &QuantizedRow::new(&normed)),
            Precision::Float => {
                let (view, k) = (trits.view(), trits.view().k());
                let row = |row| (0..k).map(|column| f32::from(view.code(row, column)) - 1.0).collect::<Vec<f32>>();
                (0..view.m()).map(|m| lanes::dot(&row(m), &normed) * scale).collect()
            }
        };
        y.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
        adapters.iter().for_each(|adapter| adapter.add(x, &mut y));
        y
    }
}

/// `x += y`
fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}
