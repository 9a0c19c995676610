//! Attention of the query heads of one group over one block of cached positions.
//!
//! Keys lie `[KEY_BLOCK / 16, head_dim / p, 16, p]` and values `[width / 16, KEY_BLOCK / p, 16, p]`, with `width` the head
//! dimension padded to whole groups of lanes: what is summed over runs along, so sixteen positions or sixteen dimensions
//! are sixteen lanes and no sum is horizontal. Floats lie one by one (`p` is 1), int8 in pairs, since CPUs add the products
//! of two int16 at a time. Blocks are merged into a [`Running`] result in order of position.

use ternion_kernels_ref::attention::KEY_BLOCK;
use ternion_kernels_ref::lanes::LANES;
use ternion_kernels_ref::math;

use super::lanes::Lanes;
use crate::memory::prefetch;

mod floats;
mod int8;
#[cfg(test)]
mod tests;

pub use floats::{attend_block_f16, attend_block_f32};
pub use int8::{WideQueries, attend_block_int8, widen_query};

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
    /// `[KEY_BLOCK / 16, head_dim / p, 16, p]`
    pub keys: &'a [E],
    /// `[width / 16, KEY_BLOCK / p, 16, p]`
    pub values: &'a [E],
    /// What the elements of each position's key are multiplied with, `[KEY_BLOCK]`; empty for types without steps.
    pub key_steps: &'a [f32],
    /// As `key_steps`, of values.
    pub value_steps: &'a [f32],
    /// Keys that are probably read next, or nothing: they are fetched on the way.
    pub next_keys: &'a [E],
    /// Positions before it, which a sliding window has left behind, do not count.
    pub first: usize,
    /// Nor do those from here on.
    pub positions: usize,
}

impl<E> CachedBlock<'_, E> {
    /// Checks all lengths but those of queries; `steps` is whether elements have steps.
    ///
    /// # Panics
    /// If they do not fit each other.
    #[inline(always)]
    fn check(&self, head_dim: usize, running: &Running<'_>, steps: bool) {
        let heads = running.max.len();
        assert!(heads > 0 && running.sum.len() == heads, "attend: a maximum and a sum per head");
        assert!(self.first < self.positions && self.positions <= KEY_BLOCK, "attend: positions of one block");
        assert!(head_dim > 0, "attend: heads of some length");
        assert_eq!(self.keys.len(), head_dim * KEY_BLOCK, "attend: keys of one block");
        let width = head_dim.next_multiple_of(LANES);
        assert_eq!(running.values.len(), width * heads, "attend: values of whole groups of lanes");
        assert_eq!(self.values.len(), width * KEY_BLOCK, "attend: values of one block");
        let steps = if steps { KEY_BLOCK } else { 0 };
        let given = [self.key_steps, self.value_steps];
        assert!(given.iter().all(|s| s.len() == steps), "attend: a step per position, where there are any");
    }
}

/// Fetches what is read later while as much is read now: `count` vectors from `at` on, if there are so many.
#[inline(always)]
fn fetch<T>(later: &[T], at: usize, count: usize) {
    if let Some(later) = later.get(at..at + count) {
        prefetch(later);
    }
}

/// Scores of one head with the positions of a block, also those past its end.
type Scores = [Lanes; VECTORS];

/// Factors of a head's values: of what came before a block, and of the block's own.
type Factors = (f32, f32);

/// Turns scores of some heads into weights `e^(score − max)`, 0 for what is not among the block's positions, and merges
/// the maxima of scores and the sums of weights into what came before. Heads go abreast: one after the other, each would wait
/// for its maximum, its exponentials and its sum.
#[inline(always)]
fn merge_weights<E, const G: usize>(
    scores: &mut [Scores; G],
    &CachedBlock { first, positions, .. }: &CachedBlock<'_, E>,
    max: &mut [f32],
    sum: &mut [f32],
) -> [Factors; G] {
    const { assert!(2 * G <= LANES, "two exponentials a head") };
    if first > 0 || positions < KEY_BLOCK {
        // e^−∞ is 0.
        for scores in scores.iter_mut() {
            for (vector, scores) in scores.iter_mut().enumerate() {
                let seen = |lane: usize| (first..positions).contains(&(vector * LANES + lane));
                for (lane, score) in scores.0.iter_mut().enumerate() {
                    *score = if seen(lane) { *score } else { f32::NEG_INFINITY };
                }
            }
        }
    }
    let (mut block_max, mut exponents) = ([0.0; G], Lanes::ZERO);
    for (max, scores) in block_max.iter_mut().zip(&*scores) {
        let mut lanes = scores[0];
        for scores in &scores[1..] {
            lanes = lanes.zip(*scores, |max, score| if score > max { score } else { max });
        }
        *max = lanes.largest();
    }
    for g in 0..G {
        let larger = max[g].max(block_max[g]);
        (exponents.0[g], exponents.0[G + g]) = (max[g] - larger, block_max[g] - larger);
        max[g] = larger;
    }
    let mut sums = [Lanes::ZERO; G];
    for ((scores, sum), max) in scores.iter_mut().zip(&mut sums).zip(block_max) {
        for scores in scores {
            *scores = scores.map(|score| math::exp(score - max));
            *sum = sum.zip(*scores, |sum, weight| sum + weight);
        }
    }
    // All at once: one after the other each would take as long as sixteen.
    let exponentials = exponents.map(math::exp);
    let mut factors = [(0.0, 0.0); G];
    for g in 0..G {
        let (old, new) = (exponentials.0[g], exponentials.0[G + g]);
        sum[g] = sum[g].mul_add(old, sums[g].tree_sum() * new);
        factors[g] = (old, new);
    }
    factors
}

/// Merges a block's weighted values in one group of lanes into what came before.
#[inline(always)]
fn merge_values(target: &mut [f32; LANES], values: Lanes, (old, new): Factors) {
    let scaled = values.map(|value| value * new);
    *target = Lanes(*target).mul_add(Lanes::splat(old), scaled).0;
}

/// Heads in groups of 4, 2 and 1, each with its results. A closure for each group would be a function of its own, compiled
/// without the features of the level that it is for.
struct Groups<'a> {
    rest: Running<'a>,
    done: usize,
    width: usize,
}

impl<'a> Groups<'a> {
    /// All heads of `running`, whose values are `width` each.
    #[inline(always)]
    fn new(running: Running<'a>, width: usize) -> Self {
        Self { rest: running, done: 0, width }
    }
}

impl<'a> Iterator for Groups<'a> {
    /// The first head, and the results of the group.
    type Item = (usize, Running<'a>);

    #[inline(always)]
    fn next(&mut self) -> Option<Self::Item> {
        let count = match self.rest.max.len() {
            0 => return None,
            1 => 1,
            2 | 3 => 2,
            _ => 4,
        };
        let first = self.done;
        self.done += count;
        let max = self.rest.max.split_off_mut(..count)?;
        let sum = self.rest.sum.split_off_mut(..count)?;
        let values = self.rest.values.split_off_mut(..count * self.width)?;
        Some((first, Running { max, sum, values }))
    }
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
