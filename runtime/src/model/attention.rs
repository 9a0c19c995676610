//! Attention of a pass: which thread works on which keys, in which order.
//!
//! Positions are worked through block by block ([`KEY_BLOCK`]), and for each block token by token, so that a block of
//! keys and values is read from memory once for all tokens of a pass that see it. Many tokens are shared out by
//! key-value head and token, every thread with all the blocks it needs. A few tokens would leave threads without work,
//! and each would read almost everything: they are shared out by key-value head and block. A thread that starts in the
//! middle of a text then keeps the result of each block for itself, and these are merged in order afterwards, which is
//! the same, bit for bit, as one block after the other.

use std::ops::Range;

use ternion_kernels_ref::attention::KEY_BLOCK;
use ternion_kernels_ref::lanes::LANES;
use ternion_tuner::Workers;

use super::Part;
use super::forward::Forward;
use super::weights::Layer;
use crate::formats::ModelConfig;
use crate::model::kv_cache::{KvType, Queries};
use crate::ops::{self, QuantizedQueries, Running};
use crate::team::{SharedSlice, Team, share};

/// Passes of up to this many tokens are shared out by blocks.
const FEW: usize = 8;

/// Results of a head and a block that one thread merges in the time that it takes to wake another.
const MERGES: usize = 64;

/// The tokens of one part of a pass.
#[derive(Clone, Debug)]
struct Span {
    /// Number of the part.
    part: usize,
    /// Its tokens among all of the pass.
    tokens: Range<usize>,
    /// Position of the first.
    position: usize,
    /// Blocks that the last of them sees.
    blocks: usize,
    /// Blocks of all spans before.
    blocks_before: usize,
    /// Blocks times tokens, summed over all spans before.
    results_before: usize,
}

impl Span {
    /// Positions up to that of a token, its own included.
    fn positions(&self, token: usize) -> usize {
        self.position + token - self.tokens.start + 1
    }
}

/// Attention that is not finished, as [`Running`], of any number of heads.
#[derive(Debug, Default)]
struct Results {
    max: Vec<f32>,
    sum: Vec<[f32; LANES]>,
    values: Vec<f32>,
    width: usize,
}

impl Results {
    fn new(heads: usize, width: usize) -> Self {
        let mut results = Self { width, ..Self::default() };
        results.grow(heads);
        results
    }

    /// Makes room for at least so many heads.
    fn grow(&mut self, heads: usize) {
        if heads > self.max.len() {
            self.max.resize(heads, 0.0);
            self.sum.resize(heads, [0.0; LANES]);
            self.values.resize(heads * self.width, 0.0);
        }
    }

    fn share(&mut self) -> SharedResults<'_> {
        let Self { max, sum, values, width } = self;
        let (max, sum, values) = (SharedSlice::new(max), SharedSlice::new(sum), SharedSlice::new(values));
        SharedResults { max, sum, values, width: *width }
    }
}

/// [`Results`] that the threads of a team work on, each with heads of its own.
struct SharedResults<'a> {
    max: SharedSlice<'a, f32>,
    sum: SharedSlice<'a, [f32; LANES]>,
    values: SharedSlice<'a, f32>,
    width: usize,
}

impl SharedResults<'_> {
    /// Some heads.
    ///
    /// # Safety
    /// As of [`SharedSlice::part`].
    unsafe fn part(&self, heads: Range<usize>) -> Running<'_> {
        let values = heads.start * self.width..heads.end * self.width;
        // SAFETY: the caller keeps these heads to itself, and values of different heads are disjoint.
        unsafe {
            Running { max: self.max.part(heads.clone()), sum: self.sum.part(heads), values: self.values.part(values) }
        }
    }
}

/// What attention needs on its way, allocated once per batch but for results of blocks, which grow with the text.
#[derive(Debug)]
pub(super) struct AttentionScratch {
    spans: Vec<Span>,
    /// Queries rounded for an int8 cache, as [`QuantizedQueries`] of `[tokens, heads]`.
    quantized: Vec<i8>,
    steps: Vec<f32>,
    sums: Vec<i32>,
    /// Results over all blocks so far, `[tokens, heads]`.
    running: Results,
    /// Results of single blocks, `[kv_heads, spans: [tokens, blocks], group]`.
    single: Results,
}

impl AttentionScratch {
    /// For passes of up to `tokens` tokens.
    pub(super) fn new(config: &ModelConfig, tokens: usize) -> Self {
        let width = config.head_dim.next_multiple_of(LANES);
        Self {
            spans: Vec::with_capacity(tokens),
            quantized: vec![0; tokens * config.heads * quantized_len(config.head_dim)],
            steps: vec![0.0; tokens * config.heads],
            sums: vec![0; tokens * config.heads],
            running: Results::new(tokens * config.heads, width),
            single: Results::new(0, width),
        }
    }

    /// Prepares for a pass of `parts`.
    pub(super) fn begin(&mut self, parts: &[Part<'_>], config: &ModelConfig, team: &Team) {
        self.spans.clear();
        let (mut token, mut blocks_before, mut results_before) = (0, 0, 0);
        for (part, Part { sequence, tokens }) in parts.iter().enumerate().filter(|(_, part)| !part.tokens.is_empty()) {
            let (position, count) = (sequence.tokens.len(), tokens.len());
            let blocks = (position + count).div_ceil(KEY_BLOCK);
            let tokens = token..token + count;
            self.spans.push(Span { part, tokens, position, blocks, blocks_before, results_before });
            token += count;
            blocks_before += blocks;
            results_before += blocks * count;
        }
        if token <= FEW && team.threads() > 1 {
            self.single.grow(results_before * config.heads);
        }
    }
}

/// Attention of one layer.
struct Job<'a> {
    layer: usize,
    /// Number of positions that a token sees, its own included.
    window: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    parts: &'a [Part<'a>],
    spans: &'a [Span],
    /// `[tokens, heads, head_dim]`
    queries: &'a [f32],
    /// The same rounded, where the cache is of int8.
    quantized: QuantizedQueries<'a>,
    /// `[tokens, heads, head_dim]`
    output: SharedSlice<'a, f32>,
    running: SharedResults<'a>,
    single: SharedResults<'a>,
}

impl Forward<'_> {
    /// Attention of every query head of every token over the positions that its layer sees, up to its own.
    pub(super) fn attend(
        &self,
        (layer, &Layer { window, .. }): (usize, &Layer),
        parts: &[Part<'_>],
        queries: &[f32],
        output: &mut [f32],
        scratch: &mut AttentionScratch,
    ) {
        let ModelConfig { heads, kv_heads, head_dim, .. } = *self.model.config();
        let AttentionScratch { spans, quantized, steps, sums, running, single } = scratch;
        self.quantize_queries(parts, spans, queries, (quantized, steps, sums));
        let quantized = QuantizedQueries { values: quantized, steps, sums };
        let (output, running, single) = (SharedSlice::new(output), running.share(), single.share());
        let job =
            Job { layer, window, heads, kv_heads, head_dim, parts, spans, queries, quantized, output, running, single };
        let threads = self.team.threads();
        if self.n > FEW {
            let items = kv_heads * self.n;
            // SAFETY: every item is in one part of the work.
            self.team.share_out(items, FEW, &|items| unsafe { job.by_tokens(self.n, items) });
            return;
        }
        let blocks = job.blocks() * kv_heads;
        // SAFETY: every block of every key-value head is in one part of the work.
        self.team.divide(threads, &|part| unsafe { job.by_blocks(share(blocks, threads, part)) });
        // SAFETY: the work above is done, and every item is in one part of the work.
        let merge = |part: usize, of: usize| unsafe { job.merge(threads, part, of) };
        let (groups, merges) = job.splits(threads).fold((0, 0), |(groups, merges), Split { span, merged, .. }| {
            let tokens = span.tokens.len();
            (groups + tokens, merges + tokens * (span.blocks - merged) * job.group())
        });
        match groups {
            0 => {}
            2.. if merges > MERGES => self.team.divide(threads, &|part| merge(part, threads)),
            _ => merge(0, 1),
        }
    }

    /// Rounds the queries of tokens whose cache is of int8.
    fn quantize_queries(
        &self,
        parts: &[Part<'_>],
        spans: &[Span],
        queries: &[f32],
        (values, steps, sums): (&mut [i8], &mut [f32], &mut [i32]),
    ) {
        let ModelConfig { heads, head_dim, .. } = *self.model.config();
        let tokens = || spans.iter().filter(|s| parts[s.part].sequence.cache.kind() == KvType::Int8);
        if tokens().next().is_none() {
            return;
        }
        let (values, steps, sums) = (SharedSlice::new(values), SharedSlice::new(steps), SharedSlice::new(sums));
        let len = quantized_len(head_dim);
        // SAFETY: every head of every token is in one part of the work.
        let round = |all: Range<usize>| unsafe {
            for span in tokens() {
                let first = (span.tokens.start * heads).max(all.start);
                for head in first..(span.tokens.end * heads).min(all.end) {
                    let query = &queries[head * head_dim..(head + 1) * head_dim];
                    let (step, sum) = ops::quantize_query(query, values.part(head * len..(head + 1) * len));
                    steps.part(head..head + 1)[0] = step;
                    sums.part(head..head + 1)[0] = sum;
                }
            }
        };
        if self.n > FEW {
            self.team.share_out(self.n * heads, heads, &round);
        } else {
            round(0..self.n * heads);
        }
    }
}

/// Elements of a query for an int8 cache.
const fn quantized_len(head_dim: usize) -> usize {
    head_dim.next_multiple_of(ops::INT8_KEYS_ALONG)
}

/// The tokens of a span and a key-value head whose blocks are in more than one part of the work.
struct Split<'a> {
    span: &'a Span,
    kv_head: usize,
    /// Blocks that the first part has merged already.
    merged: usize,
}

impl<'a> Job<'a> {
    /// Query heads that share a key-value head.
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Blocks of all spans.
    fn blocks(&self) -> usize {
        self.spans.last().map_or(0, |last| last.blocks_before + last.blocks)
    }

    /// The group of heads of a token that reads a key-value head, among all heads of the pass.
    fn of_token(&self, kv_head: usize, token: usize) -> Range<usize> {
        let start = token * self.heads + kv_head * self.group();
        start..start + self.group()
    }

    /// The same group of heads among the results of single blocks, for some of them.
    fn of_blocks(&self, span: &Span, kv_head: usize, token: usize, blocks: Range<usize>) -> Range<usize> {
        let per_head = self.spans.last().map_or(0, |last| last.results_before + last.blocks * last.tokens.len());
        let before = kv_head * per_head + span.results_before + (token - span.tokens.start) * span.blocks;
        (before + blocks.start) * self.group()..(before + blocks.end) * self.group()
    }

    /// Positions that a token sees.
    fn seen(&self, span: &Span, token: usize) -> Range<usize> {
        let end = span.positions(token);
        end.saturating_sub(self.window)..end
    }

    /// Those of some blocks of which a token sees anything.
    fn seen_of(&self, span: &Span, token: usize, blocks: Range<usize>) -> Range<usize> {
        let seen = self.seen(span, token);
        blocks.start.max(seen.start / KEY_BLOCK)..blocks.end.min(seen.end.div_ceil(KEY_BLOCK))
    }

    /// Whether a token sees anything of a block.
    fn sees(&self, span: &Span, token: usize, block: usize) -> bool {
        !self.seen_of(span, token, block..block + 1).is_empty()
    }

    /// Merges a block into what a token's heads have found.
    fn attend(&self, span: &Span, kv_head: usize, token: usize, block: usize, running: Running<'_>) {
        let heads = self.of_token(kv_head, token);
        let of_heads = |len: usize| heads.start * len..heads.end * len;
        let QuantizedQueries { values, steps, sums } = self.quantized;
        let values = &values[of_heads(quantized_len(self.head_dim))];
        let quantized = QuantizedQueries { values, steps: &steps[heads.clone()], sums: &sums[heads.clone()] };
        let queries = Queries { floats: &self.queries[of_heads(self.head_dim)], quantized };
        let cache = &self.parts[span.part].sequence.cache;
        cache.attend(self.layer, kv_head, block, self.seen(span, token), queries, running);
    }

    /// Attention of some tokens over `blocks`, which begin with the first.
    ///
    /// # Safety
    /// Nobody else may work on these heads of these tokens.
    unsafe fn attend_from_start(&self, span: &Span, kv_head: usize, tokens: Range<usize>, blocks: Range<usize>) {
        for block in blocks {
            for token in tokens.clone() {
                // SAFETY: the caller's contract.
                let mut running = unsafe { self.running.part(self.of_token(kv_head, token)) };
                if block == 0 {
                    running.clear(0.0);
                }
                if self.sees(span, token, block) {
                    self.attend(span, kv_head, token, block, running);
                }
            }
        }
    }

    /// Turns what has been found into the output.
    ///
    /// # Safety
    /// Nobody else may work on these heads.
    unsafe fn finish(&self, heads: Range<usize>) {
        let width = self.running.width;
        // SAFETY: the caller's contract.
        let (output, running) = unsafe {
            let output = self.output.part(heads.start * self.head_dim..heads.end * self.head_dim);
            (output, self.running.part(heads))
        };
        let heads = output.chunks_exact_mut(self.head_dim).zip(running.values.chunks_exact(width));
        for ((output, values), sum) in heads.zip(running.sum) {
            ops::finish_attention(sum, values, output);
        }
    }

    /// Whole attention for some of `kv_heads · n` items, key-value head by key-value head, token by token.
    ///
    /// # Safety
    /// Nobody else may work on these items.
    unsafe fn by_tokens(&self, n: usize, mut items: Range<usize>) {
        while !items.is_empty() {
            let (kv_head, token) = (items.start / n, items.start % n);
            let span = &self.spans[self.spans.partition_point(|span| span.tokens.end <= token)];
            let tokens = token..span.tokens.end.min(token + items.len());
            items.start += tokens.len();
            // SAFETY: the items are the heads of these tokens that read this key-value head: the caller's contract.
            unsafe {
                self.attend_from_start(span, kv_head, tokens.clone(), 0..span.blocks);
                tokens.for_each(|token| self.finish(self.of_token(kv_head, token)));
            }
        }
    }

    /// Attention over some of `kv_heads · blocks()` blocks, key-value head by key-value head, span by span.
    ///
    /// # Safety
    /// Nobody else may work on these blocks.
    unsafe fn by_blocks(&self, mut items: Range<usize>) {
        let per_head = self.blocks();
        while !items.is_empty() {
            let (kv_head, item) = (items.start / per_head, items.start % per_head);
            let span = &self.spans[self.spans.partition_point(|span| span.blocks_before + span.blocks <= item)];
            let first = item - span.blocks_before;
            let blocks = first..span.blocks.min(first + items.len());
            items.start += blocks.len();
            if first == 0 {
                let all = blocks.end == span.blocks;
                // SAFETY: whoever has the first block, and that is the caller alone, has what begins there.
                unsafe {
                    self.attend_from_start(span, kv_head, span.tokens.clone(), blocks);
                    if all {
                        span.tokens.clone().for_each(|token| self.finish(self.of_token(kv_head, token)));
                    }
                }
                continue;
            }
            for block in blocks {
                for token in span.tokens.clone().filter(|token| self.sees(span, *token, block)) {
                    let result = self.of_blocks(span, kv_head, token, block..block + 1);
                    // SAFETY: a result of a block that the caller alone works on.
                    let mut result = unsafe { self.single.part(result) };
                    // What is added to −0 stays what it is, also if it is −0.
                    result.clear(-0.0);
                    self.attend(span, kv_head, token, block, result);
                }
            }
        }
    }

    /// What [`by_blocks`](Self::by_blocks) in `threads` shares leaves to be merged.
    fn splits(&self, threads: usize) -> impl Iterator<Item = Split<'a>> {
        let (kv_heads, per_head, spans) = (self.kv_heads, self.blocks(), self.spans);
        let runs = (0..kv_heads).flat_map(move |kv_head| spans.iter().map(move |span| (kv_head, span)));
        let mut part = 0;
        runs.filter_map(move |(kv_head, span)| {
            let first = kv_head * per_head + span.blocks_before;
            while share(kv_heads * per_head, threads, part).end <= first {
                part += 1;
            }
            let merged = span.blocks.min(share(kv_heads * per_head, threads, part).end - first);
            (merged < span.blocks).then_some(Split { span, kv_head, merged })
        })
    }

    /// Merges results of single blocks into what is before them and finishes: part `part` of `of`.
    ///
    /// # Safety
    /// Nobody else may work on this part, or on blocks.
    unsafe fn merge(&self, threads: usize, part: usize, of: usize) {
        let groups = self.splits(threads).flat_map(|Split { span, kv_head, merged }| {
            span.tokens.clone().map(move |token| (span, kv_head, merged, token))
        });
        for (span, kv_head, merged, token) in groups.skip(part).step_by(of) {
            let target = self.of_token(kv_head, token);
            let blocks = self.seen_of(span, token, merged..span.blocks);
            if !blocks.is_empty() {
                let results = self.of_blocks(span, kv_head, token, blocks);
                // SAFETY: the caller's contract: groups of heads are in one part each.
                unsafe { ops::merge_attention(self.running.part(target.clone()), &self.single.part(results)) };
            }
            // SAFETY: as above.
            unsafe { self.finish(target) };
        }
    }
}
