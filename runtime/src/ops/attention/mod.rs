//! Attention of the query heads of one group over one block of cached positions.
//!
//! Keys lie `[KEY_BLOCK / 16c, head_dim / p, c, 16, p]` and values `[width / 16c, KEY_BLOCK / p, c, 16, p]`, with `width` the
//! head dimension padded to whole groups of lanes: what is summed over runs along, so sixteen positions or sixteen dimensions
//! are sixteen lanes and no sum is horizontal. Floats lie one by one (`p` is 1), int8 as CPUs add products: four of int8 of a
//! key, two of int16 of values. `c` groups lie side by side ([`INT8_ROW`], [`F16_ROW`], [`F32_ROW`]), so that what is worked on
//! at a time is read in one stream; groups of values that are left come last, one after the other. Blocks are merged into a
//! [`Running`] result in order of position.

use std::ops::Range;

use ternion_kernels_ref::attention::KEY_BLOCK;
use ternion_kernels_ref::lanes::LANES;
use ternion_kernels_ref::math;

use super::lanes::Lanes;
use crate::memory::prefetch;

mod floats;
mod int8;
#[cfg(test)]
mod tests;

pub use floats::{F16_ROW, F32_ROW, attend_block_f16, attend_block_f32};
pub use int8::{
    KEYS_ALONG as INT8_KEYS_ALONG, QuantizedQueries, ROW as INT8_ROW, VALUES_ALONG as INT8_VALUES_ALONG,
    attend_block_int8, quantize_query,
};

/// Groups of lanes in a block.
const VECTORS: usize = KEY_BLOCK / LANES;

/// Attention of some query heads over the blocks so far, as [`ternion_kernels_ref::attention::Partial`] each.
#[derive(Debug)]
pub struct Running<'a> {
    /// Largest scores, one per head; starts as −∞.
    pub max: &'a mut [f32],
    /// Sums of exponentials in lanes, one per head; starts as 0.
    pub sum: &'a mut [[f32; LANES]],
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
        self.sum.fill([zero; LANES]);
        self.values.fill(zero);
    }
}

/// One block of at most [`KEY_BLOCK`] positions of one key-value head, as it is cached.
#[derive(Clone, Copy, Debug)]
pub struct CachedBlock<'a, E> {
    /// `[KEY_BLOCK / 16c, head_dim / p, c, 16, p]`
    pub keys: &'a [E],
    /// `[width / 16c, KEY_BLOCK / p, c, 16, p]`, then what is left `[.., KEY_BLOCK / p, 16, p]`
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

    /// Whether all positions of the block are seen.
    #[inline(always)]
    fn whole(&self) -> bool {
        self.first == 0 && self.positions == KEY_BLOCK
    }
}

/// Fetches what is read later while as much is read now: `count` vectors from `at` on, if there are so many.
#[inline(always)]
fn fetch<T>(later: &[T], at: usize, count: usize) {
    if let Some(later) = later.get(at..at + count) {
        prefetch(later);
    }
}

/// All elements of one group of lanes, of a block's that lie `[groups / C, len, C]`.
#[derive(Clone, Copy)]
struct Group<'a, T, const C: usize> {
    rows: &'a [[T; C]],
    at: usize,
}

impl<'a, T: Copy, const C: usize> Group<'a, T, C> {
    /// `V` groups from `first` on.
    #[inline(always)]
    fn several<const V: usize>(elements: &'a [T], len: usize, first: usize) -> [Self; V] {
        let mut groups = [Self { rows: &[], at: 0 }; V];
        for (group, number) in groups.iter_mut().zip(first..) {
            *group = Self { rows: elements[number / C * C * len..][..C * len].as_chunks().0, at: number % C };
        }
        groups
    }

    #[inline(always)]
    fn at(&self, i: usize) -> &'a T {
        &self.rows[i][self.at]
    }
}

/// Scores of one head with the positions of a block, also those past its end.
type Scores = [Lanes; VECTORS];

/// Factors of a head's values: of what came before a block, and of the block's own.
type Factors = (f32, f32);

/// Scores of positions that are not to be seen count as −∞, whose exponential is 0. It is not inlined since what it needs would
/// be made ready for all blocks, which are seen whole but for one or two.
#[cold]
#[inline(never)]
fn mask<const G: usize>(scores: &mut [Scores; G], seen: Range<usize>) {
    for scores in scores {
        for (vector, scores) in scores.iter_mut().enumerate() {
            for (lane, score) in scores.0.iter_mut().enumerate() {
                *score = if seen.contains(&(vector * LANES + lane)) { *score } else { f32::NEG_INFINITY };
            }
        }
    }
}

/// Turns scores of some heads into weights `e^(score − max)` and merges the maxima of scores and the sums of weights into what
/// came before. Heads go abreast: one after the other, each would wait for its maximum and its exponentials. `fetch` is
/// called with the number of each vector of scores.
#[inline(always)]
fn merge_weights<const G: usize>(
    scores: &mut [Scores; G],
    max: &mut [f32],
    sum: &mut [[f32; LANES]],
    fetch: impl Fn(usize),
) -> [Factors; G] {
    const { assert!(2 * G <= LANES, "two exponentials a head") };
    let mut block_max = [0.0; G];
    for (max, scores) in block_max.iter_mut().zip(&*scores) {
        let mut lanes = scores[0];
        for scores in &scores[1..] {
            lanes = lanes.zip(*scores, |max, score| if score > max { score } else { max });
        }
        *max = lanes.largest();
    }
    let mut exponents = Lanes::ZERO;
    for g in 0..G {
        let larger = max[g].max(block_max[g]);
        (exponents.0[g], exponents.0[G + g]) = (max[g] - larger, block_max[g] - larger);
        max[g] = larger;
    }
    let mut sums = [Lanes::ZERO; G];
    for (g, (scores, (sum, max))) in scores.iter_mut().zip(sums.iter_mut().zip(block_max)).enumerate() {
        for (vector, scores) in scores.iter_mut().enumerate() {
            fetch(g * VECTORS + vector);
            *scores = scores.map(|score| math::exp(score - max));
            *sum = sum.zip(*scores, |sum, weight| sum + weight);
        }
    }
    // All at once: one after the other each would take as long as sixteen.
    let exponentials = exponents.map(math::exp);
    let mut factors = [(0.0, 0.0); G];
    for g in 0..G {
        factors[g] = (exponentials.0[g], exponentials.0[G + g]);
        merge_lanes(&mut sum[g], sums[g], factors[g]);
    }
    factors
}

/// Merges a block's sums in one group of lanes into what came before.
#[inline(always)]
fn merge_lanes(target: &mut [f32; LANES], values: Lanes, (old, new): Factors) {
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

/// Adds the results of the next positions to that of all before, one after the other, each as
/// [`ternion_kernels_ref::attention::Partial::merge`].
#[inline(always)]
fn merge_body(running: Running<'_>, next: &Running<'_>) {
    let (heads, results) = (running.max.len(), next.max.len());
    assert!(heads > 0 && results.is_multiple_of(heads), "merge: results of all heads");
    assert_eq!([heads, results], [running.sum.len(), next.sum.len()], "merge: a sum per head");
    let width = running.values.len() / heads;
    assert!(width.is_multiple_of(LANES), "merge: whole groups of lanes");
    assert_eq!(
        [width * heads, width * results],
        [running.values.len(), next.values.len()],
        "merge: heads of equal width"
    );

    for result in (0..results).step_by(heads) {
        // They may come from another core's cache.
        fetch(next.values, (result + 2 * heads) * width, heads * width);
        for first in (0..heads).step_by(LANES / 2) {
            let some = first..heads.min(first + LANES / 2);
            let mut exponents = Lanes::ZERO;
            for (exponents, head) in exponents.0.as_chunks_mut::<2>().0.iter_mut().zip(some.clone()) {
                let (old, new) = (running.max[head], next.max[result + head]);
                let larger = old.max(new);
                *exponents = [old - larger, new - larger];
                running.max[head] = larger;
            }
            let exponentials = exponents.map(math::exp);
            for (&[old, new], head) in exponentials.0.as_chunks::<2>().0.iter().zip(some) {
                merge_lanes(&mut running.sum[head], Lanes(next.sum[result + head]), (old, new));
                let values = running.values[head * width..][..width].as_chunks_mut().0;
                let next = next.values[(result + head) * width..][..width].as_chunks().0;
                for (values, next) in values.iter_mut().zip(next) {
                    merge_lanes(values, Lanes(*next), (old, new));
                }
            }
        }
    }
}

#[inline(always)]
fn finish_body(sum: &[f32; LANES], values: &[f32], target: &mut [f32]) {
    assert!(values.len() >= target.len(), "finish_attention: a value per result");
    let sum = Lanes(*sum).tree_sum();
    for (target, value) in target.iter_mut().zip(values) {
        *target = value / sum;
    }
}

for_every_level! {
    /// Merges what was found over the next blocks, over each for itself, into what was found over all before: any number of
    /// results, `[results, heads]`. Attention over one block after the other is the same as this, bit for bit.
    ///
    /// # Panics
    /// If there are no heads, results of part of them, or the widths differ or are not whole groups of lanes.
    pub fn merge_attention(running: Running<'_>, next: &Running<'_>) = merge_body;

    /// The output of one head: its weighted values over the sum of its exponentials, whose lanes are added pairwise.
    ///
    /// # Panics
    /// If there are fewer values than results.
    pub fn finish_attention(sum: &[f32; LANES], values: &[f32], target: &mut [f32]) = finish_body;
}
