//! The forward pass on compiled kernels.
//!
//! The tokens of a batch, of one sequence or several, go through the layers together. Each step shares its work among the team in a way that does not
//! show in the results: products by row tiles, attention by
//! heads, tokens or positions, everything else by tokens. With one
//! token the small steps stay on the calling thread: waking the others would take longer.

use std::ops::Range;

use ternion_compiler::{ActivationFormat, Kernel, OutRows};
use ternion_tuner::Workers;

use super::activations::ActivationBuffer;
use super::attention::AttentionScratch;
use super::rope::RopeTable;
use super::weights::{Layer, Linear};
use super::{Model, ModelError, Part};
use crate::formats::{LayerNorm, ModelConfig, Projection};
use crate::ops;
use crate::team::{SharedSlice, Team, share};

/// Where a token stands.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// Number of the part that it belongs to.
    part: usize,
    /// Its position in that part's sequence.
    position: usize,
}

/// What a pass of tokens needs on its way, allocated once per batch.
#[derive(Debug)]
pub(super) struct Scratch {
    /// One per token.
    places: Vec<Place>,
    /// The residual stream, `[tokens, hidden]`.
    hidden: Vec<f32>,
    /// The residual stream after the last norm, `[tokens, hidden]`.
    normed: Vec<f32>,
    /// `[tokens, heads · head_dim]`
    queries: Vec<f32>,
    /// `[tokens, kv_heads · head_dim]`
    keys: Vec<f32>,
    /// `[tokens, kv_heads · head_dim]`
    values: Vec<f32>,
    /// Attention output, `[tokens, heads · head_dim]`.
    attention: Vec<f32>,
    /// `activation(gate) · up`, `[tokens, ffn]`.
    gated: Vec<f32>,
    /// Integer sums of up to three projections of the same activations, `[tokens, padded rows]`.
    sums: [Vec<i32>; 3],
    activations: ActivationBuffer,
    heads: AttentionScratch,
}

impl Scratch {
    /// For passes of up to `tokens` tokens.
    pub(super) fn new(model: &Model, tokens: usize) -> Result<Self, ModelError> {
        let config = model.config();
        let (all_heads, kv_heads) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let floats = |width: usize| vec![0.0; tokens * width];
        let padded = |projections: &[Projection]| {
            let of = |linear: &Linear| linear.padded_rows();
            let layers = model.layers.iter();
            let rows = layers.flat_map(|layer| projections.iter().map(move |p| of(layer.linear(*p)))).max();
            vec![0; tokens * rows.unwrap_or(0)]
        };
        let formats: Vec<ActivationFormat> = model.linears().flat_map(Linear::activation_formats).collect();
        let longest = all_heads.max(config.hidden).max(config.ffn);
        let activations = ActivationBuffer::new(tokens, longest, formats.into_iter());
        Ok(Self {
            places: Vec::with_capacity(tokens),
            hidden: floats(config.hidden),
            normed: floats(config.hidden),
            queries: floats(all_heads),
            keys: floats(kv_heads),
            values: floats(kv_heads),
            attention: floats(all_heads),
            gated: floats(config.ffn),
            sums: [
                padded(&[Projection::Query, Projection::Output, Projection::Gate, Projection::Down]),
                padded(&[Projection::Key, Projection::Up]),
                padded(&[Projection::Value]),
            ],
            activations: activations.map_err(|source| ModelError::Memory { bytes: tokens * longest, source })?,
            heads: AttentionScratch::new(config, tokens),
        })
    }
}

impl Linear {
    /// Rows including those that fill the last tile.
    fn padded_rows(&self) -> usize {
        let layout = self.kernels.one.layout();
        layout.tiles(self.m) * layout.tile_rows()
    }

    fn activation_formats(&self) -> [ActivationFormat; 2] {
        [&self.kernels.one, &self.kernels.many].map(|kernel| kernel.activation_format())
    }

    /// The kernel for `n` tokens.
    fn kernel(&self, n: usize) -> &Kernel {
        if n == 1 { &self.kernels.one } else { &self.kernels.many }
    }

    /// What an integer sum is multiplied with when its activations have scale `q`.
    fn step(&self, q: f32) -> f32 {
        self.scale / q
    }

    /// One token's rows of `sums`, padding left out.
    fn row<'a>(&self, sums: &'a [i32], token: usize) -> &'a [i32] {
        &sums[token * self.padded_rows()..][..self.m]
    }
}

/// One forward pass of `n` tokens.
pub(super) struct Forward<'a> {
    pub(super) model: &'a Model,
    pub(super) team: &'a Team,
    pub(super) n: usize,
}

impl Forward<'_> {
    /// Runs the tokens of all `parts` through all layers. Their keys and values are in the caches afterwards, their last
    /// hidden states in `scratch`.
    pub(super) fn run(&self, parts: &mut [Part<'_>], rope: &mut RopeTable, scratch: &mut Scratch) {
        let (model, config) = (self.model, self.config());
        scratch.places.clear();
        scratch.heads.begin(parts, config, self.team);
        for (index, Part { sequence, tokens }) in parts.iter().enumerate() {
            let start = sequence.tokens.len();
            let end = start + tokens.len();
            rope.reserve(end, &model.inverse_frequencies);
            scratch.places.extend((start..end).map(|position| Place { part: index, position }));
        }
        let tokens = parts.iter().flat_map(|part| part.tokens);
        for (token, hidden) in tokens.zip(scratch.hidden.chunks_exact_mut(config.hidden)) {
            model.embedding.widen_row(*token as usize, hidden);
        }
        for (index, layer) in model.layers.iter().enumerate() {
            self.attention(index, layer, parts, rope, scratch);
            self.feed_forward(layer, scratch);
        }
    }

    /// The final norm's output for some tokens of the pass, `[tokens, hidden]`.
    pub(super) fn states<'b>(&self, tokens: Range<usize>, scratch: &'b mut Scratch) -> &'b [f32] {
        let width = self.config().hidden;
        let range = tokens.start * width..tokens.end * width;
        let (rows, normed) = (&scratch.hidden[range.clone()], &mut scratch.normed[range]);
        for (row, normed) in rows.chunks_exact(width).zip(normed.chunks_exact_mut(width)) {
            ops::rms_norm(row, &self.model.final_norm, self.config().norm_eps, normed);
        }
        normed
    }

    fn config(&self) -> &ModelConfig {
        self.model.config()
    }

    fn attention(&self, index: usize, layer: &Layer, parts: &mut [Part<'_>], rope: &RopeTable, scratch: &mut Scratch) {
        let config = self.config();
        let [query, key, value, output] =
            [Projection::Query, Projection::Key, Projection::Value, Projection::Output].map(|p| layer.linear(p));
        let Scratch { places, hidden, queries, keys, values, attention, sums, activations, heads, .. } = scratch;
        let [query_sums, key_sums, value_sums] = sums;

        self.quantize(hidden, config.hidden, layer.norm(LayerNorm::Input), &[query, key, value], activations);
        self.project([(query, query_sums), (key, key_sums), (value, value_sums)], activations);
        let (all_heads, kv_heads) = (query.m, key.m);
        let shared = [&mut *queries, &mut *keys, &mut *values].map(|slice| SharedSlice::new(slice));
        self.each_token(&|token| {
            let q = activations.scale(token);
            // SAFETY: every token is in one part of the work, and rows of different tokens are disjoint.
            let [queries, keys, values] = unsafe {
                [(0, all_heads), (1, kv_heads), (2, kv_heads)]
                    .map(|(of, width)| shared[of].part(token * width..(token + 1) * width))
            };
            let (cos, sin) = rope.at(places[token].position);
            ops::dequantize(query.row(query_sums, token), query.step(q), queries);
            ops::rotate(queries, cos, sin);
            ops::dequantize(key.row(key_sums, token), key.step(q), keys);
            ops::rotate(keys, cos, sin);
            ops::dequantize(value.row(value_sums, token), value.step(q), values);
        });
        let rows = keys.chunks_exact(kv_heads).zip(values.chunks_exact(kv_heads));
        for (place, (key, value)) in places.iter().zip(rows) {
            parts[place.part].sequence.cache.store(index, place.position, key, value);
        }
        self.attend(index, parts, queries, attention, heads);

        self.quantize(attention, all_heads, layer.norm(LayerNorm::AttentionSub), &[output], activations);
        self.project([(output, query_sums)], activations);
        self.add(output, query_sums, activations, hidden);
    }

    fn feed_forward(&self, layer: &Layer, scratch: &mut Scratch) {
        let config = self.config();
        let [gate, up, down] = [Projection::Gate, Projection::Up, Projection::Down].map(|p| layer.linear(p));
        let Scratch { hidden, gated, sums, activations, .. } = scratch;
        let [gate_sums, up_sums, _] = sums;

        self.quantize(hidden, config.hidden, layer.norm(LayerNorm::PostAttention), &[gate, up], activations);
        self.project([(gate, gate_sums), (up, up_sums)], activations);
        let shared = SharedSlice::new(gated);
        self.each_token(&|token| {
            let q = activations.scale(token);
            // SAFETY: every token is in one part of the work, and rows of different tokens are disjoint.
            let gated = unsafe { shared.part(token * config.ffn..(token + 1) * config.ffn) };
            let gate = (gate.row(gate_sums, token), gate.step(q));
            ops::gated(config.activation, gate, (up.row(up_sums, token), up.step(q)), gated);
        });

        self.quantize(gated, config.ffn, layer.norm(LayerNorm::FfnSub), &[down], activations);
        self.project([(down, gate_sums)], activations);
        self.add(down, gate_sums, activations, hidden);
    }

    /// Calls `work` once for every token, sharing them among the team.
    fn each_token(&self, work: &(dyn Fn(usize) + Sync)) {
        if self.n == 1 {
            return work(0);
        }
        self.team.divide(&|part| share(self.n, self.team.threads(), part).for_each(work));
    }

    /// Quantises `rows`, `[n, width]`, after the norm with these weights (if there are any), for `readers`.
    fn quantize(
        &self,
        rows: &[f32],
        width: usize,
        norm: &[f32],
        readers: &[&Linear],
        activations: &mut ActivationBuffer,
    ) {
        let writer = activations.writer(width, readers.iter().map(|linear| linear.kernel(self.n)));
        let eps = self.config().norm_eps;
        self.each_token(&|token| {
            let row = &rows[token * width..(token + 1) * width];
            let quantize = |target: &mut [i8]| match norm {
                [] => ops::quantize(row, target),
                weights => ops::rms_norm_quantize(row, weights, eps, target),
            };
            // SAFETY: every token is in one part of the work.
            unsafe { writer.write(token, quantize) }
        });
    }

    /// Integer sums of some projections of the same activations, shared by row tiles.
    fn project<const P: usize>(&self, linears: [(&Linear, &mut Vec<i32>); P], activations: &ActivationBuffer) {
        let jobs = linears.map(|(linear, sums)| (linear, OutRows::new(sums, linear.padded_rows())));
        let threads = self.team.threads();
        self.team.divide(&|part| {
            for (linear, out) in &jobs {
                let kernel = linear.kernel(self.n);
                let tiles = share(kernel.layout().tiles(linear.m), threads, part);
                let activations = activations.read(self.n, kernel);
                // SAFETY: every tile is in one part of the work, and nobody reads the sums before all parts are done.
                unsafe { kernel.run(self.model.weights(linear), tiles, &activations, out) }
            }
        });
    }

    /// Adds a projection's result to the residual stream.
    fn add(&self, linear: &Linear, sums: &[i32], activations: &ActivationBuffer, hidden: &mut [f32]) {
        let width = linear.m;
        let shared = SharedSlice::new(hidden);
        self.each_token(&|token| {
            // SAFETY: every token is in one part of the work, and rows of different tokens are disjoint.
            let hidden = unsafe { shared.part(token * width..(token + 1) * width) };
            ops::add_dequantized(linear.row(sums, token), linear.step(activations.scale(token)), hidden);
        });
    }
}
