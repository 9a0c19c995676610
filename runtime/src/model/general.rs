//! Layers whose projections are more than ternary products: with norms of their own in front, biases, low-rank adapters
//! beside them, norms of heads or of results; and any layer while it is observed.
//!
//! Here every projection's result becomes `f32` by itself. A plain layer gives the same bits this way as on the fused
//! path of [`forward`](super::forward), only more slowly.

use std::ops::Range;

use super::activations::ActivationBuffer;
use super::forward::{Forward, Scratch};
use super::low_rank::LowRank;
use super::rope::RopeTable;
use super::weights::{Layer, Linear};
use super::{Model, Observer, Part};
use crate::formats::{FloatMatrix, LayerNorm, Projection};
use crate::ops;
use crate::team::{PART_BYTES, SharedSlice};

/// Multiply-adds that take longer than waking the other threads.
const WORTH_SHARING: usize = 1 << 15;

/// What these layers need besides [`Scratch`].
#[derive(Debug)]
pub(super) struct GeneralScratch {
    /// What projections read before norms of their own, `[tokens, widest]`.
    inputs: Vec<f32>,
    /// `[tokens, ffn]`
    gate: Vec<f32>,
    /// `[tokens, ffn]`
    up: Vec<f32>,
    /// What is added to the residual stream, `[tokens, hidden]`.
    result: Vec<f32>,
    /// `A·x` of an adapter, `[tokens, rank]`.
    low: Vec<f32>,
    /// `B·(A·x)` of an adapter, `[tokens, m]`.
    high: Vec<f32>,
}

impl GeneralScratch {
    /// For chunks of up to `tokens` tokens.
    pub(super) fn new(model: &Model, tokens: usize) -> Self {
        let config = model.config();
        let widest = config.hidden.max(config.ffn).max(config.heads * config.head_dim);
        let floats = |width: usize| vec![0.0; tokens * width];
        let rank = model.linears().flat_map(|linear| &linear.adapters).map(|adapter| adapter.a.rows).max().unwrap_or(0);
        Self {
            inputs: floats(widest),
            gate: floats(config.ffn),
            up: floats(config.ffn),
            result: floats(config.hidden),
            low: floats(rank),
            high: floats(if rank > 0 { widest } else { 0 }),
        }
    }
}

/// Projections of the same inputs, and what the way from inputs to results needs.
struct Projections<'a> {
    index: usize,
    layer: &'a Layer,
    inputs: &'a [f32],
    activations: &'a mut ActivationBuffer,
    low: &'a mut Vec<f32>,
    high: &'a mut Vec<f32>,
}

impl Forward<'_> {
    pub(super) fn attention_in_general(
        &self,
        (index, layer): (usize, &Layer),
        parts: &mut [Part<'_>],
        rope: &RopeTable,
        scratch: &mut Scratch,
        observer: &mut Option<&mut dyn Observer>,
    ) {
        let config = self.config();
        let (all_heads, kv_heads) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let Scratch { places, hidden, queries, keys, values, attention, sums, activations, heads, general, .. } =
            scratch;
        let general = general.get_or_insert_with(|| GeneralScratch::new(self.model, hidden.len() / config.hidden));
        let GeneralScratch { inputs, result, low, high, .. } = general;
        let [query_sums, key_sums, value_sums] = sums;

        self.normalise(hidden, layer.norm(LayerNorm::Input), config.hidden, inputs);
        let targets = [
            (Projection::Query, query_sums, &mut *queries),
            (Projection::Key, key_sums, &mut *keys),
            (Projection::Value, value_sums, &mut *values),
        ];
        self.results(Projections { index, layer, inputs, activations, low, high }, targets, observer);
        let shared = [&mut *queries, &mut *keys].map(|slice| SharedSlice::new(slice));
        self.each_token(&|token| {
            let (cos, sin) = rope.at(layer.rope, places[token].position);
            let norms = [LayerNorm::QueryHead, LayerNorm::KeyHead];
            for ((shared, norm), width) in shared.iter().zip(norms).zip([all_heads, kv_heads]) {
                // SAFETY: every token is in one part of the work, and rows of different tokens are disjoint.
                let heads = unsafe { shared.part(token * width..(token + 1) * width) };
                if config.qk_norm {
                    for head in heads.chunks_exact_mut(config.head_dim) {
                        ops::rms_norm_in_place(head, layer.norm(norm), config.norm_eps);
                    }
                }
                ops::rotate(heads, cos, sin);
            }
        });
        self.store(index, parts, places, keys, values);
        self.attend((index, layer), parts, queries, attention, heads);

        self.normalise(attention, layer.norm(LayerNorm::AttentionSub), all_heads, inputs);
        let targets = [(Projection::Output, &mut sums[0], &mut *result)];
        self.results(Projections { index, layer, inputs, activations, low, high }, targets, observer);
        self.add_result(result, layer.norm(LayerNorm::AttentionResult), hidden);
    }

    pub(super) fn feed_forward_in_general(
        &self,
        (index, layer): (usize, &Layer),
        scratch: &mut Scratch,
        observer: &mut Option<&mut dyn Observer>,
    ) {
        let config = self.config();
        let Scratch { hidden, gated, sums, activations, general, .. } = scratch;
        let general = general.get_or_insert_with(|| GeneralScratch::new(self.model, hidden.len() / config.hidden));
        let GeneralScratch { inputs, gate, up, result, low, high } = general;
        let [gate_sums, up_sums, _] = sums;

        self.normalise(hidden, layer.norm(LayerNorm::PostAttention), config.hidden, inputs);
        let targets = [(Projection::Gate, gate_sums, &mut *gate), (Projection::Up, up_sums, &mut *up)];
        self.results(Projections { index, layer, inputs, activations, low, high }, targets, observer);
        if let Some(observer) = observer {
            gate.chunks_exact(config.ffn).take(self.n).for_each(|gate| observer.gate(index, gate));
        }
        let shared = SharedSlice::new(gated);
        self.each_token(&|token| {
            let row = token * config.ffn..(token + 1) * config.ffn;
            // SAFETY: every token is in one part of the work, and rows of different tokens are disjoint.
            let gated = unsafe { shared.part(row.clone()) };
            ops::gated_floats(config.activation, &gate[row.clone()], &up[row], gated);
        });

        self.normalise(gated, layer.norm(LayerNorm::FfnSub), config.ffn, inputs);
        let targets = [(Projection::Down, &mut sums[0], &mut *result)];
        self.results(Projections { index, layer, inputs, activations, low, high }, targets, observer);
        self.add_result(result, layer.norm(LayerNorm::FfnResult), hidden);
    }

    /// `rows`, `[n, width]`, after the norm with these weights, or as they are without any.
    fn normalise(&self, rows: &[f32], norm: &[f32], width: usize, target: &mut [f32]) {
        let eps = self.config().norm_eps;
        let shared = SharedSlice::new(target);
        self.each_token(&|token| {
            let row = token * width..(token + 1) * width;
            // SAFETY: every token is in one part of the work, and rows of different tokens are disjoint.
            let target = unsafe { shared.part(row.clone()) };
            match norm {
                [] => target.copy_from_slice(&rows[row]),
                weights => ops::rms_norm(&rows[row], weights, eps, target),
            }
        });
    }

    /// Results of projections of the same inputs, `[n, m]` each: norm, ternary product, bias, adapters.
    fn results<const P: usize>(
        &self,
        projections: Projections<'_>,
        targets: [(Projection, &mut Vec<i32>, &mut Vec<f32>); P],
        observer: &mut Option<&mut dyn Observer>,
    ) {
        let Projections { index, layer, inputs, activations, low, high } = projections;
        let readers = targets.each_ref().map(|(projection, ..)| layer.linear(*projection));
        let mut quantised: Option<&[f32]> = None;
        for (projection, sums, target) in targets {
            let linear = layer.linear(projection);
            let norm = layer.norm(LayerNorm::Projection(projection));
            // Without norms of their own, all projections read the same int8 values.
            if !norm.is_empty() || quantised.is_none() {
                let eps = self.config().projection_norm_eps.unwrap_or_default();
                self.quantize_by(inputs, linear.k(), (norm, eps), &readers, activations);
                quantised = Some(norm);
            }
            if let Some(observer) = observer {
                (0..self.n)
                    .for_each(|token| observer.activations(index, projection, activations.values(token, linear.k())));
            }
            self.project([(linear, sums)], activations);
            self.dequantise(linear, sums, activations, target);
            for adapter in &linear.adapters {
                self.add_low_rank(adapter, inputs, low, high, target);
            }
        }
    }

    /// `sums · step + bias`
    fn dequantise(&self, linear: &Linear, sums: &[i32], activations: &ActivationBuffer, target: &mut [f32]) {
        let shared = SharedSlice::new(target);
        self.each_token(&|token| {
            // SAFETY: every token is in one part of the work, and rows of different tokens are disjoint.
            let target = unsafe { shared.part(token * linear.m..(token + 1) * linear.m) };
            ops::dequantize(linear.row(sums, token), linear.step(activations.scale(token)), target);
            if !linear.bias.is_empty() {
                target.iter_mut().zip(&linear.bias).for_each(|(target, bias)| *target += bias);
            }
        });
    }

    /// Adds what [`LowRank::add`] defines to the results of a projection of `inputs`.
    fn add_low_rank(&self, adapter: &LowRank, inputs: &[f32], low: &mut [f32], high: &mut [f32], target: &mut [f32]) {
        let LowRank { a, b, scale } = adapter;
        let low = &mut low[..self.n * a.rows];
        self.float_product(a, &inputs[..self.n * a.columns], low);
        let high = &mut high[..self.n * b.rows];
        self.float_product(b, low, high);
        target.iter_mut().zip(&*high).for_each(|(target, u)| *target = u.mul_add(*scale, *target));
    }

    /// `target[token][row] = Σ inputs[token] · matrix[row]`, `[n, rows]`, shared by rows.
    fn float_product(&self, matrix: &FloatMatrix, inputs: &[f32], target: &mut [f32]) {
        let shared = SharedSlice::new(target);
        let product = |rows: Range<usize>| {
            let bytes = &matrix.bytes[rows.start * matrix.row_bytes()..rows.end * matrix.row_bytes()];
            for (token, input) in inputs.chunks_exact(matrix.columns).enumerate() {
                let at = token * matrix.rows;
                // SAFETY: every row is in one part of the work.
                let target = unsafe { shared.part(at + rows.start..at + rows.end) };
                ops::dot_rows(input, matrix.dtype, bytes, target);
            }
        };
        if self.n * matrix.rows * matrix.columns < WORTH_SHARING {
            return product(0..matrix.rows);
        }
        self.team.share_out(matrix.rows, PART_BYTES / matrix.row_bytes().max(1), &product);
    }

    /// Adds what attention or feed-forward network give to the residual stream, after the norm with these weights, if
    /// there are any.
    fn add_result(&self, result: &mut [f32], norm: &[f32], hidden: &mut [f32]) {
        let (width, eps) = (self.config().hidden, self.config().norm_eps);
        let shared = [result, hidden].map(SharedSlice::new);
        self.each_token(&|token| {
            let row = token * width..(token + 1) * width;
            // SAFETY: every token is in one part of the work, and rows of different tokens are disjoint.
            let [result, hidden] = unsafe { [shared[0].part(row.clone()), shared[1].part(row)] };
            if !norm.is_empty() {
                ops::rms_norm_in_place(result, norm, eps);
            }
            hidden.iter_mut().zip(result).for_each(|(hidden, result)| *hidden += *result);
        });
    }
}
