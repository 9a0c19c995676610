//! The forward pass on compiled kernels.
//!
//! The tokens of a batch, of one sequence or several, go through the layers together. Each step shares its work among the team in a way that does not
//! show in the results: products by row tiles, attention by
//! heads, tokens or positions, everything else by tokens. With one
//! token the small steps stay on the calling thread: waking the others would take longer.

use std::ops::Range;

use ternion_compiler::{ActivationFormat, Kernel, OutRows, Step};

use super::activations::ActivationBuffer;
use super::attention::AttentionScratch;
use super::general::GeneralScratch;
use super::rope::RopeTable;
use super::sparse::{SparseFfn, SparseScratch};
use super::weights::{Layer, Linear};
use super::{Model, ModelError, Observer, Part};
use crate::formats::{LayerNorm, ModelConfig, Projection};
use crate::ops;
use crate::team::{PART_BYTES, SharedSlice, Team};

/// Where a token stands.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    /// Number of the part that it belongs to.
    part: usize,
    /// Its position in that part's sequence.
    pub(super) position: usize,
}

/// What a pass of tokens needs on its way, allocated once per batch.
#[derive(Debug)]
pub(super) struct Scratch {
    /// One per token.
    pub(super) places: Vec<Place>,
    /// The residual stream, `[tokens, hidden]`.
    pub(super) hidden: Vec<f32>,
    /// The residual stream after the last norm, `[tokens, hidden]`.
    normed: Vec<f32>,
    /// `[tokens, heads · head_dim]`
    pub(super) queries: Vec<f32>,
    /// `[tokens, kv_heads · head_dim]`
    pub(super) keys: Vec<f32>,
    /// `[tokens, kv_heads · head_dim]`
    pub(super) values: Vec<f32>,
    /// Attention output, `[tokens, heads · head_dim]`.
    pub(super) attention: Vec<f32>,
    /// `activation(gate) · up`, `[tokens, ffn]`.
    pub(super) gated: Vec<f32>,
    /// Integer sums of up to three projections of the same activations, `[tokens, padded rows]`.
    pub(super) sums: [Vec<i32>; 3],
    pub(super) activations: ActivationBuffer,
    sparse: SparseScratch,
    pub(super) heads: AttentionScratch,
    /// For layers that need it, and for observed ones from the first time on.
    pub(super) general: Option<GeneralScratch>,
}

impl Scratch {
    /// For passes of up to `tokens` tokens.
    pub(super) fn new(model: &Model, tokens: usize, threads: usize) -> Result<Self, ModelError> {
        let config = model.config();
        let (all_heads, kv_heads) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let floats = |width: usize| vec![0.0; tokens * width];
        let padded = |projections: &[Projection]| {
            let of = |linear: &Linear| linear.padded_rows();
            let layers = model.layers.iter();
            let rows = layers.flat_map(|layer| projections.iter().map(move |p| of(layer.linear(*p)))).max();
            vec![0; tokens * rows.unwrap_or(0)]
        };
        let listed = model.sparse.iter().map(|sparse| sparse.rows().activation_format());
        let formats: Vec<ActivationFormat> =
            model.linears().flat_map(Linear::activation_formats).chain(listed).collect();
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
            sparse: SparseScratch::new(config.ffn, model.sparse.as_ref().map_or(0, SparseFfn::results), threads),
            activations: activations.map_err(|source| ModelError::Memory { bytes: tokens * longest, source })?,
            heads: AttentionScratch::new(config, tokens),
            general: (!model.is_plain()).then(|| GeneralScratch::new(model, tokens)),
        })
    }
}

impl Linear {
    /// Rows including those that fill the last tile, in the layout where that takes most.
    fn padded_rows(&self) -> usize {
        let padded = |kernel: &Kernel| kernel.layout().tiles(self.m) * kernel.layout().tile_rows();
        self.kernels.all().iter().map(padded).max().unwrap_or(self.m)
    }

    pub(super) fn activation_formats(&self) -> impl Iterator<Item = ActivationFormat> {
        self.kernels.all().iter().map(Kernel::activation_format)
    }

    /// The kernel for `n` tokens.
    fn kernel(&self, n: usize) -> &Kernel {
        self.kernels.of(n)
    }

    /// What an integer sum is multiplied with when its activations have scale `q`.
    pub(super) fn step(&self, q: f32) -> f32 {
        self.scale / q
    }

    /// One token's rows of `sums`, padding left out.
    pub(super) fn row<'a>(&self, sums: &'a [i32], token: usize) -> &'a [i32] {
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
    pub(super) fn run(
        &self,
        parts: &mut [Part<'_>],
        rope: &mut RopeTable,
        scratch: &mut Scratch,
        observer: &mut Option<&mut dyn Observer>,
    ) {
        let (model, config) = (self.model, self.config());
        scratch.places.clear();
        scratch.heads.begin(parts, config, self.team);
        for (index, Part { sequence, tokens }) in parts.iter().enumerate() {
            let start = sequence.tokens.len();
            let end = start + tokens.len();
            rope.reserve(end, &model.frequencies);
            scratch.places.extend((start..end).map(|position| Place { part: index, position }));
        }
        let tokens = parts.iter().flat_map(|part| part.tokens);
        for (token, hidden) in tokens.zip(scratch.hidden.chunks_exact_mut(config.hidden)) {
            model.embedding.widen_row(*token as usize, hidden);
            if config.embedding_scale != 1.0 {
                hidden.iter_mut().for_each(|x| *x *= config.embedding_scale);
            }
        }
        let plain = model.is_plain() && observer.is_none();
        for (index, layer) in model.layers.iter().enumerate() {
            if plain {
                self.attention(index, layer, parts, rope, scratch);
                self.feed_forward(index, layer, scratch);
            } else {
                self.attention_in_general((index, layer), parts, rope, scratch, observer);
                self.feed_forward_in_general((index, layer), scratch, observer);
            }
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

    pub(super) fn config(&self) -> &ModelConfig {
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
            let (cos, sin) = rope.at(layer.rope, places[token].position);
            ops::dequantize(query.row(query_sums, token), query.step(q), queries);
            ops::rotate(queries, cos, sin);
            ops::dequantize(key.row(key_sums, token), key.step(q), keys);
            ops::rotate(keys, cos, sin);
            ops::dequantize(value.row(value_sums, token), value.step(q), values);
        });
        self.store(index, parts, places, keys, values);
        self.attend((index, layer), parts, queries, attention, heads);

        self.quantize(attention, all_heads, layer.norm(LayerNorm::AttentionSub), &[output], activations);
        self.project([(output, query_sums)], activations);
        self.add(output, query_sums, activations, hidden);
    }

    fn feed_forward(&self, index: usize, layer: &Layer, scratch: &mut Scratch) {
        let config = self.config();
        let [gate, up, down] = [Projection::Gate, Projection::Up, Projection::Down].map(|p| layer.linear(p));
        let Scratch { hidden, gated, sums, activations, sparse: scratch, .. } = scratch;
        let [gate_sums, up_sums, _] = sums;

        // One token may leave out what is multiplied with 0.
        let sparse = self.model.sparse.as_ref().filter(|_| self.n == 1);
        self.quantize(hidden, config.hidden, layer.norm(LayerNorm::PostAttention), &[gate, up], activations);
        self.project([(gate, gate_sums)], activations);
        let q = activations.scale(0);
        let done = sparse.filter(|_| gate.step(q) > 0.0).is_some_and(|sparse| {
            let gate = (gate.row(gate_sums, 0), [gate.step(q), up.step(q)]);
            let column = activations.read(1, sparse.rows());
            sparse.up(index, self.team, gate, &column, scratch, &mut gated[..config.ffn])
        });
        if !done {
            self.project([(up, up_sums)], activations);
            let shared = SharedSlice::new(gated);
            self.each_token(&|token| {
                let q = activations.scale(token);
                // SAFETY: every token is in one part of the work, and rows of different tokens are disjoint.
                let gated = unsafe { shared.part(token * config.ffn..(token + 1) * config.ffn) };
                let gate = (gate.row(gate_sums, token), gate.step(q));
                ops::gated(config.activation, gate, (up.row(up_sums, token), up.step(q)), gated);
            });
        }

        self.quantize(gated, config.ffn, layer.norm(LayerNorm::FfnSub), &[down], activations);
        let done = sparse
            .is_some_and(|sparse| sparse.down(index, self.team, activations.values(0, config.ffn), scratch, gate_sums));
        if !done {
            self.project([(down, gate_sums)], activations);
        }
        self.add(down, gate_sums, activations, hidden);
    }

    /// Puts the tokens' keys and values, `[n, kv_heads · head_dim]` each, into their sequences' caches.
    pub(super) fn store(&self, layer: usize, parts: &mut [Part<'_>], places: &[Place], keys: &[f32], values: &[f32]) {
        let width = self.config().kv_heads * self.config().head_dim;
        let rows = keys.chunks_exact(width).zip(values.chunks_exact(width));
        for (place, (key, value)) in places.iter().zip(rows) {
            parts[place.part].sequence.cache.store(layer, place.position, key, value);
        }
    }

    /// Calls `work` once for every token, sharing them among the team.
    pub(super) fn each_token(&self, work: &(dyn Fn(usize) + Sync)) {
        if self.n == 1 {
            return work(0);
        }
        self.team.share_out(self.n, 1, &|tokens| tokens.for_each(work));
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
        self.quantize_by(rows, width, (norm, self.config().norm_eps), readers, activations);
    }

    /// [`quantize`](Self::quantize) with an epsilon of the norm's own.
    pub(super) fn quantize_by(
        &self,
        rows: &[f32],
        width: usize,
        (norm, eps): (&[f32], f32),
        readers: &[&Linear],
        activations: &mut ActivationBuffer,
    ) {
        // Whoever reads a list of rows of this length reads these activations too, if at all.
        let listed = self.model.sparse.iter().filter(|_| self.n == 1).map(SparseFfn::rows);
        let listed = listed.filter(|rows| rows.spec().k == width);
        let steps = &self.model.steps;
        let writer = activations.writer(width, steps, readers.iter().map(|linear| linear.kernel(self.n)).chain(listed));
        self.each_token(&|token| {
            let row = &rows[token * width..(token + 1) * width];
            let quantize = |target: &mut [i8]| match norm {
                [] => steps.of(Step::Quantize, width).quantize(row, target),
                weights => steps.of(Step::NormQuantize, width).norm_quantize(row, weights, eps, target),
            };
            // SAFETY: every token is in one part of the work.
            unsafe { writer.write(token, quantize) }
        });
    }

    /// Integer sums of some projections of the same activations, shared by row tiles.
    pub(super) fn project<const P: usize>(
        &self,
        linears: [(&Linear, &mut Vec<i32>); P],
        activations: &ActivationBuffer,
    ) {
        let jobs = linears.map(|(linear, sums)| (linear, OutRows::new(sums, linear.padded_rows())));
        let layout = |linear: &Linear| linear.kernel(self.n).layout();
        let of_tiles = |(linear, _): &(&Linear, OutRows)| layout(linear).tiles(linear.m);
        let tile_bytes = jobs.iter().map(|(linear, _)| layout(linear).tile_bytes(linear.k())).max().unwrap_or(1);
        // One projection's tiles after the other's.
        self.team.share_out(jobs.iter().map(of_tiles).sum(), PART_BYTES / (tile_bytes * self.n), &|range| {
            let mut first = 0;
            for job in &jobs {
                let (linear, out) = job;
                let end = first + of_tiles(job);
                let tiles = range.start.max(first)..range.end.min(end);
                if !tiles.is_empty() {
                    let kernel = linear.kernel(self.n);
                    let (tiles, activations) =
                        (tiles.start - first..tiles.end - first, activations.read(self.n, kernel));
                    // SAFETY: every tile is in one part of the work, and nobody reads the sums before all are done.
                    unsafe { kernel.run(self.model.weights(linear, kernel.layout()), tiles, &activations, out) }
                }
                first = end;
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
