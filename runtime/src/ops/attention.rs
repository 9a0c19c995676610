//! Attention of the query heads of one group over one block of cached positions.
//!
//! Keys lie transposed, `[KEY_BLOCK / 16, head_dim, 16]`: a score is a sum along the head dimension, so sixteen
//! positions are sixteen lanes and no sum is horizontal. Values lie `[KEY_BLOCK, width]` with `width` the head dimension
//! padded to whole groups of lanes. Blocks are merged into a [`Running`] result in order of position.

use std::ops::Range;

use ternion_kernels_ref::attention::KEY_BLOCK;
use ternion_kernels_ref::lanes::LANES;
use ternion_kernels_ref::math;

use super::half::widen_lanes;
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
}

/// A type that keys and values are cached in.
trait Cached: Copy {
    fn widen(values: &[Self; LANES]) -> Lanes;
}

impl Cached for u16 {
    #[inline(always)]
    fn widen(values: &[Self; LANES]) -> Lanes {
        widen_lanes(values)
    }
}

impl Cached for f32 {
    #[inline(always)]
    fn widen(values: &[Self; LANES]) -> Lanes {
        Lanes(*values)
    }
}

/// One block of one key-value head.
struct Block<'a, E> {
    keys: &'a [[E; LANES]],
    values: &'a [[E; LANES]],
    /// Positions before it, which a sliding window has left behind, are not seen.
    first: usize,
    positions: usize,
    scale: f32,
}

impl<E: Cached> Block<'_, E> {
    /// Scores of `G` queries with all positions of the block, also those past its end.
    #[inline(always)]
    fn scores<const G: usize>(&self, queries: [&[f32]; G]) -> [[Lanes; VECTORS]; G] {
        let head_dim = queries[0].len();
        let mut scores = [[Lanes::ZERO; VECTORS]; G];
        // Two groups of positions at a time, so that enough sums are in flight.
        for (pair, keys) in self.keys.chunks_exact(2 * head_dim).enumerate().take(self.positions.div_ceil(2 * LANES)) {
            let (low, high) = keys.split_at(head_dim);
            let mut sums = [[Lanes::ZERO; 2]; G];
            for (d, (low, high)) in low.iter().zip(high).enumerate() {
                let (low, high) = (E::widen(low), E::widen(high));
                for (sums, query) in sums.iter_mut().zip(queries) {
                    let q = Lanes::splat(query[d]);
                    sums[0] = q.mul_add(low, sums[0]);
                    sums[1] = q.mul_add(high, sums[1]);
                }
            }
            for (scores, sums) in scores.iter_mut().zip(sums) {
                for (score, sum) in scores[2 * pair..].iter_mut().zip(sums) {
                    *score = sum.map(|sum| sum * self.scale);
                }
            }
        }
        scores
    }

    /// Turns scores into weights `e^(score − max)`, 0 for what is not seen; returns the maximum and the sum of the
    /// weights.
    #[inline(always)]
    fn weigh(&self, scores: &mut [Lanes; VECTORS]) -> (f32, f32) {
        let within = |vector: usize| {
            let lane = |position: usize| position.saturating_sub(vector * LANES);
            lane(self.first)..lane(self.positions)
        };
        let mut max = Lanes::splat(f32::NEG_INFINITY);
        for (vector, scores) in scores.iter().enumerate() {
            let seen = within(vector);
            for (lane, (max, score)) in max.0.iter_mut().zip(scores.0).enumerate() {
                *max = if seen.contains(&lane) && score > *max { score } else { *max };
            }
        }
        let max = max.0.into_iter().fold(f32::NEG_INFINITY, f32::max);
        let mut sum = Lanes::ZERO;
        for (vector, scores) in scores.iter_mut().enumerate() {
            let seen = within(vector);
            for (lane, (sum, score)) in sum.0.iter_mut().zip(&mut scores.0).enumerate() {
                let weight = math::exp(*score - max);
                *score = if seen.contains(&lane) { weight } else { 0.0 };
                *sum += *score;
            }
        }
        (max, sum.tree_sum())
    }

    /// Merges this block into what came before, for `G` heads.
    #[inline(always)]
    fn merge<const G: usize>(&self, queries: [&[f32]; G], max: &mut [f32], sum: &mut [f32], values: &mut [f32]) {
        let mut weights = self.scores(queries);
        let (mut old, mut new) = ([0.0; G], [0.0; G]);
        for g in 0..G {
            let (block_max, block_sum) = self.weigh(&mut weights[g]);
            let larger = max[g].max(block_max);
            (old[g], new[g]) = (math::exp(max[g] - larger), math::exp(block_max - larger));
            sum[g] = sum[g].mul_add(old[g], block_sum * new[g]);
            max[g] = larger;
        }
        let width = values.len() / G / LANES;
        let (targets, _) = values.as_chunks_mut::<LANES>();
        // Two groups of dimensions at a time, so that enough sums are in flight.
        let mut group = 0;
        while group < width {
            if group + 2 <= width {
                self.weighted::<G, 2>(&weights, old, new, targets, (group, width));
                group += 2;
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
            let values: [Lanes; D] = std::array::from_fn(|d| E::widen(&values[group + d]));
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

#[inline(always)]
fn attend<E: Cached>(
    queries: &[f32],
    keys: &[E],
    values: &[E],
    positions: Range<usize>,
    scale: f32,
    running: Running<'_>,
) {
    let heads = running.max.len();
    assert!(heads > 0 && running.sum.len() == heads, "attend: a maximum and a sum per head");
    assert!(!positions.is_empty() && positions.end <= KEY_BLOCK, "attend: positions of one block");
    let (head_dim, width) = (queries.len() / heads, running.values.len() / heads);
    assert!(head_dim > 0 && head_dim * heads == queries.len(), "attend: queries of equal length");
    assert_eq!(keys.len(), head_dim * KEY_BLOCK, "attend: keys of one block");
    assert_eq!(width, head_dim.next_multiple_of(LANES), "attend: values of whole groups of lanes");
    assert_eq!(values.len(), width * KEY_BLOCK, "attend: values of one block");

    let (keys, values) = (keys.as_chunks().0, values.as_chunks().0);
    let block = Block { keys, values, first: positions.start, positions: positions.end, scale };
    let mut done = 0;
    while done < heads {
        let query = |g: usize| &queries[(done + g) * head_dim..][..head_dim];
        let count = match heads - done {
            1 => 1,
            2 | 3 => 2,
            _ => 4,
        };
        let (max, sum) = (&mut running.max[done..], &mut running.sum[done..]);
        let values = &mut running.values[done * width..][..count * width];
        match count {
            1 => block.merge([query(0)], max, sum, values),
            2 => block.merge([query(0), query(1)], max, sum, values),
            _ => block.merge([query(0), query(1), query(2), query(3)], max, sum, values),
        }
        done += count;
    }
}

#[inline(always)]
fn attend_f16_body(
    queries: &[f32],
    keys: &[u16],
    values: &[u16],
    positions: Range<usize>,
    scale: f32,
    running: Running<'_>,
) {
    attend(queries, keys, values, positions, scale, running);
}

#[inline(always)]
fn attend_f32_body(
    queries: &[f32],
    keys: &[f32],
    values: &[f32],
    positions: Range<usize>,
    scale: f32,
    running: Running<'_>,
) {
    attend(queries, keys, values, positions, scale, running);
}

#[inline(always)]
fn finish_body(sum: f32, values: &[f32], target: &mut [f32]) {
    assert!(values.len() >= target.len(), "finish_attention: a value per result");
    for (target, value) in target.iter_mut().zip(values) {
        *target = value / sum;
    }
}

for_every_level! {
    /// Merges the next block of at most [`KEY_BLOCK`] positions, cached as halves, into `running`: those in `positions`,
    /// the others are not seen. `queries` is `[heads, head_dim]`, all reading the same key-value head.
    ///
    /// # Panics
    /// If the lengths do not fit each other.
    pub fn attend_block_f16(
        queries: &[f32], keys: &[u16], values: &[u16], positions: Range<usize>, scale: f32, running: Running<'_>
    ) = attend_f16_body;

    /// As [`attend_block_f16`], cached as `f32`.
    ///
    /// # Panics
    /// If the lengths do not fit each other.
    pub fn attend_block_f32(
        queries: &[f32], keys: &[f32], values: &[f32], positions: Range<usize>, scale: f32, running: Running<'_>
    ) = attend_f32_body;

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
    use ternion_kernels_ref::{attention, widen};

    type Attend<E> = fn(&[f32], &[E], &[E], Range<usize>, f32, Running<'_>);
    type Finish = fn(f32, &[f32], &mut [f32]);
    type Level = (Attend<u16>, Attend<f32>, Finish);

    const LEVELS: [Level; 2] =
        [(attend_block_f16, attend_block_f32, finish_attention), (attend_f16_body, attend_f32_body, finish_body)];

    /// A block's keys and values in cached order; what lies past the end is NaN.
    fn cached<E: Copy>(rows: &[&[E]], head_dim: usize, nan: E) -> (Vec<E>, Vec<E>) {
        let width = head_dim.next_multiple_of(LANES);
        let (mut keys, mut values) = (vec![nan; head_dim * KEY_BLOCK], vec![nan; width * KEY_BLOCK]);
        for (position, row) in rows.iter().enumerate() {
            for d in 0..head_dim {
                keys[(position / LANES * head_dim + d) * LANES + position % LANES] = row[d];
                values[position * width + d] = row[head_dim + d];
            }
        }
        (keys, values)
    }

    fn run<E: Copy>(
        attend: Attend<E>,
        finish: Finish,
        queries: &[f32],
        heads: usize,
        rows: &[&[E]],
        first: usize,
        nan: E,
    ) -> Vec<f32> {
        let head_dim = queries.len() / heads;
        let width = head_dim.next_multiple_of(LANES);
        let (mut max, mut sum) = (vec![f32::NEG_INFINITY; heads], vec![0.0; heads]);
        let mut values = vec![0.0; heads * width];
        for (block, rows) in rows.chunks(KEY_BLOCK).enumerate().skip(first / KEY_BLOCK) {
            let (keys, cached_values) = cached(rows, head_dim, nan);
            let running = Running { max: &mut max, sum: &mut sum, values: &mut values };
            let seen = first.saturating_sub(block * KEY_BLOCK)..rows.len();
            attend(queries, &keys, &cached_values, seen, 0.37, running);
        }
        let mut output = vec![0.0; heads * head_dim];
        for (h, output) in output.chunks_exact_mut(head_dim).enumerate() {
            finish(sum[h], &values[h * width..], output);
        }
        output
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn heads_attend_as_in_the_reference_in_both_cache_types(
            (head_dim, heads, queries, cache, first) in (1usize..20, 1usize..8, 1usize..200)
                .prop_flat_map(|(half, heads, positions)| {
                    let head_dim = 2 * half;
                    let queries = floats_within(heads * head_dim, 4.0);
                    let first = prop_oneof![Just(0), 0..positions];
                    (Just(head_dim), Just(heads), queries, floats_within(positions * 2 * head_dim, 4.0), first)
                })
        ) {
            let halves: Vec<u16> = cache.iter().map(|x| widen::f32_to_f16(*x)).collect();
            let rounded: Vec<f32> = halves.iter().map(|bits| widen::f16_to_f32(*bits)).collect();
            let expected = |cache: &[f32]| -> Vec<f32> {
                let half = |from: usize| -> Vec<f32> {
                    cache.chunks_exact(2 * head_dim).flat_map(|row| &row[from..from + head_dim]).copied().collect()
                };
                let (keys, values) = (half(0), half(head_dim));
                let heads = queries.chunks_exact(head_dim);
                heads.flat_map(|q| attention::attention_from(q, &keys, &values, first, 0.37)).collect()
            };
            for (attend_f16, attend_f32, finish) in LEVELS {
                let rows: Vec<&[u16]> = halves.chunks_exact(2 * head_dim).collect();
                assert_same_bits(&run(attend_f16, finish, &queries, heads, &rows, first, 0x7e00), &expected(&rounded));
                let rows: Vec<&[f32]> = cache.chunks_exact(2 * head_dim).collect();
                assert_same_bits(&run(attend_f32, finish, &queries, heads, &rows, first, f32::NAN), &expected(&cache));
            }
        }
    }
}
