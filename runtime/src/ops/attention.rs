//! Attention of the query heads of one group over one block of cached positions.
//!
//! Keys lie transposed, `[KEY_BLOCK / 16, head_dim, 16]`: a score is a sum along the head dimension, so sixteen
//! positions are sixteen lanes and no sum is horizontal. Values lie `[KEY_BLOCK, width]` with `width` the head dimension
//! padded to whole groups of lanes. Elements of int8 have a step per position. Blocks are merged into a [`Running`]
//! result in order of position.

use ternion_kernels_ref::attention::KEY_BLOCK;
use ternion_kernels_ref::lanes::LANES;
use ternion_kernels_ref::math;

use super::half;
use super::lanes::Lanes;

/// Groups of lanes in a block.
const VECTORS: usize = KEY_BLOCK / LANES;

/// Attention of some query heads over the blocks so far, as [`ternion_kernels_ref::attention::Partial`] each.
#[derive(Debug)]
pub struct Running<'a> {
    /// Largest scores, one per head; starts as −∞.
    pub max: &'a mut [f32],
    /// Sums of exponentials, one per head; starts as 0.
    pub sum: &'a mut [f32],
    /// Weighted values, `[heads, width]`; starts as 0.
    pub values: &'a mut [f32],
}

impl Running<'_> {
    /// Itself, for one more call.
    pub fn again(&mut self) -> Running<'_> {
        Running { max: self.max, sum: self.sum, values: self.values }
    }

    /// Attention over nothing: `zero`, which is 0 of either sign, in sums.
    pub fn clear(&mut self, zero: f32) {
        self.max.fill(f32::NEG_INFINITY);
        self.sum.fill(zero);
        self.values.fill(zero);
    }
}

/// One block of at most [`KEY_BLOCK`] positions of one key-value head, as it is cached.
#[derive(Clone, Copy, Debug)]
pub struct CachedBlock<'a, E> {
    /// `[KEY_BLOCK / 16, head_dim, 16]`
    pub keys: &'a [E],
    /// `[KEY_BLOCK, width]`
    pub values: &'a [E],
    /// What the elements of each position's key are multiplied with, `[KEY_BLOCK]`; empty for types without steps.
    pub key_steps: &'a [f32],
    /// As `key_steps`, of values.
    pub value_steps: &'a [f32],
    /// Positions before it, which a sliding window has left behind, do not count.
    pub first: usize,
    /// Nor do those from here on.
    pub positions: usize,
}

/// A type that keys and values are cached in.
trait Element: Copy {
    /// Whether each position has a step.
    const STEPS: bool;
}

impl Element for i8 {
    const STEPS: bool = true;
}

impl Element for u16 {
    const STEPS: bool = false;
}

impl Element for f32 {
    const STEPS: bool = false;
}

/// Sixteen elements as `f32`.
trait Widen<E>: Fn(&[E; LANES]) -> Lanes + Copy {}

impl<E, F: Fn(&[E; LANES]) -> Lanes + Copy> Widen<E> for F {}

/// One block of one key-value head.
struct Block<'a, E, W> {
    keys: &'a [[E; LANES]],
    values: &'a [[E; LANES]],
    key_steps: &'a [[f32; LANES]],
    value_steps: &'a [[f32; LANES]],
    first: usize,
    positions: usize,
    scale: f32,
    widen: W,
}

impl<E: Element, W: Widen<E>> Block<'_, E, W> {
    /// Scores of `G` queries with all positions of the block, also those past its end. `V` groups of positions are worked
    /// on at a time, so that enough sums are in flight.
    #[inline(always)]
    fn scores<const G: usize, const V: usize>(&self, queries: [&[f32]; G]) -> [[Lanes; VECTORS]; G] {
        let head_dim = queries[0].len();
        let mut scores = [[Lanes::ZERO; VECTORS]; G];
        let rounds = self.keys.chunks_exact(V * head_dim).take(self.positions.div_ceil(V * LANES));
        for (round, keys) in rounds.enumerate() {
            let keys: [&[[E; LANES]]; V] = std::array::from_fn(|v| &keys[v * head_dim..][..head_dim]);
            let mut sums = [[Lanes::ZERO; V]; G];
            for d in 0..head_dim {
                let keys: [Lanes; V] = std::array::from_fn(|v| (self.widen)(&keys[v][d]));
                for (sums, query) in sums.iter_mut().zip(queries) {
                    let q = Lanes::splat(query[d]);
                    for (sum, key) in sums.iter_mut().zip(keys) {
                        *sum = q.mul_add(key, *sum);
                    }
                }
            }
            let factors: [Lanes; V] = std::array::from_fn(|v| {
                if E::STEPS {
                    Lanes(self.key_steps[round * V + v]).map(|step| self.scale * step)
                } else {
                    Lanes::splat(self.scale)
                }
            });
            for (scores, sums) in scores.iter_mut().zip(sums) {
                for ((score, sum), factor) in scores[round * V..].iter_mut().zip(sums).zip(factors) {
                    *score = sum.zip(factor, |sum, factor| sum * factor);
                }
            }
        }
        scores
    }

    /// Turns scores into weights `e^(score − max)`, 0 for what does not count; returns the maximum and the sum of the
    /// weights.
    #[inline(always)]
    fn weigh(&self, scores: &mut [Lanes; VECTORS]) -> (f32, f32) {
        let mut max = Lanes::splat(f32::NEG_INFINITY);
        for (vector, scores) in scores.iter_mut().enumerate() {
            // e^−∞ is 0.
            let lane = |position: usize| position.saturating_sub(vector * LANES).min(LANES);
            scores.0[..lane(self.first)].fill(f32::NEG_INFINITY);
            if self.positions < (vector + 1) * LANES {
                scores.0[lane(self.positions)..].fill(f32::NEG_INFINITY);
            }
            max = max.zip(*scores, |max, score| if score > max { score } else { max });
        }
        let max = max.largest();
        let mut sum = Lanes::ZERO;
        for scores in scores {
            *scores = scores.map(|score| math::exp(score - max));
            sum = sum.zip(*scores, |sum, weight| sum + weight);
        }
        (max, sum.tree_sum())
    }

    /// Merges this block into what came before, for `G` heads, `V` vectors at a time.
    #[inline(always)]
    fn merge<const G: usize, const V: usize>(&self, queries: [&[f32]; G], running: Running<'_>) {
        let Running { max, sum, values } = running;
        let mut weights = self.scores::<G, V>(queries);
        let (mut old, mut new) = ([0.0; G], [0.0; G]);
        for g in 0..G {
            let (block_max, block_sum) = self.weigh(&mut weights[g]);
            let larger = max[g].max(block_max);
            (old[g], new[g]) = (math::exp(max[g] - larger), math::exp(block_max - larger));
            sum[g] = sum[g].mul_add(old[g], block_sum * new[g]);
            max[g] = larger;
            if E::STEPS {
                for (weights, steps) in weights[g].iter_mut().zip(self.value_steps) {
                    *weights = weights.zip(Lanes(*steps), |weight, step| weight * step);
                }
            }
        }
        let width = values.len() / G / LANES;
        let (targets, _) = values.as_chunks_mut::<LANES>();
        let mut group = 0;
        while group < width {
            if group + V <= width {
                self.weighted::<G, V>(&weights, old, new, targets, (group, width));
                group += V;
            } else {
                self.weighted::<G, 1>(&weights, old, new, targets, (group, width));
                group += 1;
            }
        }
    }

    /// Weighted values in `D` groups of dimensions from `group` on, merged into `targets`, `[G, width]` groups.
    #[inline(always)]
    fn weighted<const G: usize, const D: usize>(
        &self,
        weights: &[[Lanes; VECTORS]; G],
        old: [f32; G],
        new: [f32; G],
        targets: &mut [[f32; LANES]],
        (group, width): (usize, usize),
    ) {
        let mut sums = [[Lanes::ZERO; D]; G];
        for (position, values) in self.values.chunks_exact(width).enumerate().take(self.positions).skip(self.first) {
            let values: [Lanes; D] = std::array::from_fn(|d| (self.widen)(&values[group + d]));
            for (sums, weights) in sums.iter_mut().zip(weights) {
                let weight = Lanes::splat(weights[position / LANES].0[position % LANES]);
                for (sum, values) in sums.iter_mut().zip(values) {
                    *sum = weight.mul_add(values, *sum);
                }
            }
        }
        for g in 0..G {
            for (d, sum) in sums[g].iter().enumerate() {
                let target = &mut targets[g * width + group + d];
                let scaled = sum.map(|sum| sum * new[g]);
                *target = Lanes(*target).mul_add(Lanes::splat(old[g]), scaled).0;
            }
        }
    }
}

/// `ONE`, `TWO` and `FOUR` are the vectors worked on at a time for so many heads: as many sums as registers hold.
#[inline(always)]
fn attend<E: Element, const ONE: usize, const TWO: usize, const FOUR: usize>(
    queries: &[f32],
    cached: CachedBlock<'_, E>,
    scale: f32,
    running: Running<'_>,
    widen: impl Widen<E>,
) {
    let CachedBlock { keys, values, key_steps, value_steps, first, positions } = cached;
    let heads = running.max.len();
    assert!(heads > 0 && running.sum.len() == heads, "attend: a maximum and a sum per head");
    assert!(first < positions && positions <= KEY_BLOCK, "attend: positions of one block");
    let (head_dim, width) = (queries.len() / heads, running.values.len() / heads);
    assert!(head_dim > 0 && head_dim * heads == queries.len(), "attend: queries of equal length");
    assert_eq!(keys.len(), head_dim * KEY_BLOCK, "attend: keys of one block");
    assert_eq!(width, head_dim.next_multiple_of(LANES), "attend: values of whole groups of lanes");
    assert_eq!(values.len(), width * KEY_BLOCK, "attend: values of one block");
    let steps = if E::STEPS { KEY_BLOCK } else { 0 };
    assert!(
        [key_steps, value_steps].iter().all(|s| s.len() == steps),
        "attend: a step per position, where there are any"
    );

    let (keys, values) = (keys.as_chunks().0, values.as_chunks().0);
    let (key_steps, value_steps) = (key_steps.as_chunks().0, value_steps.as_chunks().0);
    let block = Block { keys, values, key_steps, value_steps, first, positions, scale, widen };
    let mut done = 0;
    while done < heads {
        let query = |g: usize| &queries[(done + g) * head_dim..][..head_dim];
        let count = match heads - done {
            1 => 1,
            2 | 3 => 2,
            _ => 4,
        };
        let range = done..done + count;
        let values = &mut running.values[done * width..][..count * width];
        let running = Running { max: &mut running.max[range.clone()], sum: &mut running.sum[range], values };
        match count {
            1 => block.merge::<1, ONE>([query(0)], running),
            2 => block.merge::<2, TWO>([query(0), query(1)], running),
            _ => block.merge::<4, FOUR>([query(0), query(1), query(2), query(3)], running),
        }
        done += count;
    }
}

/// Sixteen int8 values as `f32`.
#[inline(always)]
fn widen_int8(elements: &[i8; LANES]) -> Lanes {
    let mut lanes = Lanes::ZERO;
    for (lane, element) in lanes.0.iter_mut().zip(elements) {
        *lane = f32::from(*element);
    }
    lanes
}

/// Sixteen `f32` values as they are.
#[inline(always)]
fn widen_f32(elements: &[f32; LANES]) -> Lanes {
    Lanes(*elements)
}

/// Adds the result of the next positions to that of all before, as [`ternion_kernels_ref::attention::Partial::merge`].
#[inline(always)]
fn merge_body(running: Running<'_>, next: &Running<'_>) {
    let heads = running.max.len();
    assert_eq!([heads; 3], [running.sum.len(), next.max.len(), next.sum.len()], "merge: equally many heads");
    assert_eq!(running.values.len(), next.values.len(), "merge: heads of equal width");
    let width = running.values.len() / heads.max(1);
    let values = running.values.chunks_exact_mut(width.max(1)).zip(next.values.chunks_exact(width.max(1)));
    for (g, (values, next_values)) in values.enumerate() {
        let larger = running.max[g].max(next.max[g]);
        let (old, new) = (math::exp(running.max[g] - larger), math::exp(next.max[g] - larger));
        running.sum[g] = running.sum[g].mul_add(old, next.sum[g] * new);
        for (value, next) in values.iter_mut().zip(next_values) {
            *value = value.mul_add(old, next * new);
        }
        running.max[g] = larger;
    }
}

#[inline(always)]
fn finish_body(sum: f32, values: &[f32], target: &mut [f32]) {
    assert!(values.len() >= target.len(), "finish_attention: a value per result");
    for (target, value) in target.iter_mut().zip(values) {
        *target = value / sum;
    }
}

/// Attention for every feature level. Levels differ in how many sums their registers hold, and for halves in the instruction
/// that widens them, which no compiler finds by itself.
macro_rules! attend_at_every_level {
    ($($(#[$meta:meta])* $vis:vis $name:ident($element:ty), $widen_avx512:path, $widen_avx2:path, $widen:path;)*) => {$(
        $(#[$meta])*
        #[multiversion::multiversion(targets(
            "x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma+bmi2+f16c",
            "x86_64+avx2+fma+bmi2+f16c",
            "aarch64+neon",
        ))]
        $vis fn $name(queries: &[f32], block: CachedBlock<'_, $element>, scale: f32, running: Running<'_>) {
            multiversion::target::match_target! {
                "x86_64+avx512f" => attend::<_, 4, 4, 4>(queries, block, scale, running, |e: &_| $widen_avx512(e)),
                "x86_64+avx2+f16c" => attend::<_, 4, 2, 1>(queries, block, scale, running, |e: &_| $widen_avx2(e)),
                _ => attend::<_, 4, 2, 1>(queries, block, scale, running, $widen),
            }
        }
    )*};
}

attend_at_every_level! {
    /// Merges the next block of at most [`KEY_BLOCK`] positions, cached as halves, into `running`. `queries` is
    /// `[heads, head_dim]`, all reading the same key-value head.
    ///
    /// # Panics
    /// If the lengths do not fit each other.
    pub attend_block_f16(u16), half::widen_lanes_avx512, half::widen_lanes_f16c, half::widen_lanes;

    /// As [`attend_block_f16`], cached as int8 with steps.
    ///
    /// # Panics
    /// If the lengths do not fit each other.
    pub attend_block_int8(i8), widen_int8, widen_int8, widen_int8;

    /// As [`attend_block_f16`], cached as `f32`.
    ///
    /// # Panics
    /// If the lengths do not fit each other.
    pub attend_block_f32(f32), widen_f32, widen_f32, widen_f32;
}

for_every_level! {
    /// Merges what was found over the next positions, for itself, into what was found over all before. Attention over one
    /// block after the other is the same as attention over each for itself and merging them in order, bit for bit.
    ///
    /// # Panics
    /// If the numbers of heads or their widths differ.
    pub fn merge_attention(running: Running<'_>, next: &Running<'_>) = merge_body;

    /// The output of one head: its weighted values over the sum of its exponentials.
    ///
    /// # Panics
    /// If there are fewer values than results.
    pub fn finish_attention(sum: f32, values: &[f32], target: &mut [f32]) = finish_body;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::tests::{assert_same_bits, floats_within};
    use proptest::prelude::*;
    use ternion_kernels_ref::attention::{Rows, attention_from};
    use ternion_kernels_ref::{QuantizedRow, widen};

    type Attend<E> = fn(&[f32], CachedBlock<'_, E>, f32, Running<'_>);

    /// Merging and finishing at one level.
    #[derive(Clone, Copy)]
    struct Level {
        int8: Attend<i8>,
        f16: Attend<u16>,
        f32: Attend<f32>,
        merge: fn(Running<'_>, &Running<'_>),
        finish: fn(f32, &[f32], &mut [f32]),
    }

    const LEVELS: [Level; 2] = [
        Level {
            int8: attend_block_int8,
            f16: attend_block_f16,
            f32: attend_block_f32,
            merge: merge_attention,
            finish: finish_attention,
        },
        Level {
            int8: |queries, block, scale, running| attend::<_, 4, 2, 1>(queries, block, scale, running, widen_int8),
            f16: |queries, block, scale, running| {
                attend::<_, 4, 2, 1>(queries, block, scale, running, half::widen_lanes)
            },
            f32: |queries, block, scale, running| attend::<_, 4, 2, 1>(queries, block, scale, running, widen_f32),
            merge: merge_body,
            finish: finish_body,
        },
    ];

    const SCALE: f32 = 0.37;

    /// Keys and values of some positions, `[positions, head_dim]`, with steps if there are any.
    struct Cache<E> {
        head_dim: usize,
        keys: Vec<E>,
        values: Vec<E>,
        key_steps: Vec<f32>,
        value_steps: Vec<f32>,
    }

    /// Keys, values, their steps and the number of positions of one block.
    type TestBlock<E> = (Vec<E>, Vec<E>, [Vec<f32>; 2], usize);

    impl<E: Copy> Cache<E> {
        /// One of the two after the other in cached order; what lies past the end is `nan`.
        fn blocks(&self, nan: E) -> Vec<TestBlock<E>> {
            let (head_dim, width) = (self.head_dim, self.head_dim.next_multiple_of(LANES));
            let count = self.keys.len() / head_dim;
            let starts = (0..count).step_by(KEY_BLOCK);
            let blocks = starts.map(|start| {
                let positions = KEY_BLOCK.min(count - start);
                let (mut keys, mut values) = (vec![nan; head_dim * KEY_BLOCK], vec![nan; width * KEY_BLOCK]);
                for position in 0..positions {
                    for d in 0..head_dim {
                        let at = (start + position) * head_dim + d;
                        keys[(position / LANES * head_dim + d) * LANES + position % LANES] = self.keys[at];
                        values[position * width + d] = self.values[at];
                    }
                }
                let steps = [&self.key_steps, &self.value_steps].map(|steps| match &steps[..] {
                    [] => Vec::new(),
                    steps => {
                        let mut block = steps[start..start + positions].to_vec();
                        block.resize(KEY_BLOCK, f32::NAN);
                        block
                    }
                });
                (keys, values, steps, positions)
            });
            blocks.collect()
        }

        /// Attention of `heads` heads at one level; blocks from `split` on are worked out for themselves and then merged.
        fn attend(
            &self,
            level: Level,
            attend: Attend<E>,
            queries: &[f32],
            heads: usize,
            nan: E,
            (split, first): (usize, usize),
        ) -> Vec<f32> {
            let width = self.head_dim.next_multiple_of(LANES);
            let results = || (vec![f32::NAN; heads], vec![f32::NAN; heads], vec![f32::NAN; heads * width]);
            let (mut max, mut sum, mut values) = results();
            let mut running = Running { max: &mut max, sum: &mut sum, values: &mut values };
            running.clear(0.0);
            let blocks = self.blocks(nan);
            for (i, (keys, values, [key_steps, value_steps], positions)) in
                blocks.iter().enumerate().skip(first / KEY_BLOCK)
            {
                let (first, positions) = (first.saturating_sub(i * KEY_BLOCK), *positions);
                let block = CachedBlock { keys, values, key_steps, value_steps, first, positions };
                if i < split {
                    attend(queries, block, SCALE, running.again());
                } else {
                    let (mut max, mut sum, mut values) = results();
                    let mut single = Running { max: &mut max, sum: &mut sum, values: &mut values };
                    single.clear(-0.0);
                    attend(queries, block, SCALE, single.again());
                    (level.merge)(running.again(), &single);
                }
            }
            let mut output = vec![0.0; heads * self.head_dim];
            for (h, output) in output.chunks_exact_mut(self.head_dim).enumerate() {
                (level.finish)(sum[h], &values[h * width..], output);
            }
            output
        }

        /// The same by the reference.
        fn expected(&self, queries: &[f32], first: usize, widen: impl Fn(E) -> f32) -> Vec<f32> {
            let ones = vec![1.0; self.keys.len() / self.head_dim];
            let wide = |elements: &[E]| -> Vec<f32> { elements.iter().map(|e| widen(*e)).collect() };
            let (keys, values) = (wide(&self.keys), wide(&self.values));
            let steps = |steps: &'_ [f32]| if steps.is_empty() { ones.clone() } else { steps.to_vec() };
            let (key_steps, value_steps) = (steps(&self.key_steps), steps(&self.value_steps));
            let keys = Rows { elements: &keys, steps: &key_steps };
            let values = Rows { elements: &values, steps: &value_steps };
            queries.chunks_exact(self.head_dim).flat_map(|q| attention_from(q, keys, values, first, SCALE)).collect()
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn heads_attend_as_in_the_reference_in_all_cache_types(
            (head_dim, heads, queries, cache, first) in (1usize..40, 1usize..8, 1usize..200)
                .prop_flat_map(|(half, heads, positions)| {
                    let head_dim = 2 * half;
                    let queries = floats_within(heads * head_dim, 4.0);
                    let first = prop_oneof![Just(0), 0..positions];
                    (Just(head_dim), Just(heads), queries, floats_within(positions * 2 * head_dim, 4.0), first)
                }),
            split in 0usize..4,
        ) {
            let (keys, values) = cache.split_at(cache.len() / 2);
            let halves = |all: &[f32]| -> Vec<u16> { all.iter().map(|x| widen::f32_to_f16(*x)).collect() };
            let quantized = |all: &[f32]| -> (Vec<Vec<i8>>, Vec<f32>) {
                let rows = all.chunks_exact(head_dim).map(QuantizedRow::new);
                rows.map(|row| (row.values().to_vec(), 1.0 / row.q())).unzip()
            };
            let f16 = Cache { keys: halves(keys), values: halves(values), key_steps: vec![], value_steps: vec![], head_dim };
            let f32 = Cache { keys: keys.to_vec(), values: values.to_vec(), key_steps: vec![], value_steps: vec![], head_dim };
            let ((keys, key_steps), (values, value_steps)) = (quantized(keys), quantized(values));
            let int8 = Cache { head_dim, keys: keys.concat(), values: values.concat(), key_steps, value_steps };
            for level in LEVELS {
                let found = f16.attend(level, level.f16, &queries, heads, 0x7e00, (split, first));
                assert_same_bits(&found, &f16.expected(&queries, first, widen::f16_to_f32));
                let found = f32.attend(level, level.f32, &queries, heads, f32::NAN, (split, first));
                assert_same_bits(&found, &f32.expected(&queries, first, |x| x));
                let found = int8.attend(level, level.int8, &queries, heads, 99, (split, first));
                assert_same_bits(&found, &int8.expected(&queries, first, f32::from));
            }
        }
    }
}
