//! Causal attention of one query head over cached keys and values.
//!
//! Positions are worked through in blocks of [`KEY_BLOCK`], aligned to position 0. A block gives a partial result: its
//! maximum score, the sum of its exponentials and its weighted values. Partial results are merged in order of position
//! ([`Partial::merge`]). That order is a property of the positions alone, so threads may share out blocks and prompts
//! may be cut into chunks as they like.
//!
//! Two kinds of caches exist ([`Cached`]):
//!
//! - [`Rows`] of floats, `f32` or widened from IEEE half. A score is `(Σ q[d] · k[d]) · scale`, summed along the head
//!   dimension in order, with fused multiply-adds, and values are accumulated position by position in the same way. Fast
//!   versions keep keys transposed and do sixteen positions at once without a single horizontal sum.
//! - [`QuantizedRows`] of int8 with one step per position and head, that of [`QuantizedRow`], `1 / q`. What they are
//!   multiplied with is rounded too, so that sums are whole numbers and exact in any order: queries to int8 as keys are, the
//!   weights of a block, which may be large and small, to int16. A score is `(Σ q[d] · k[d]) · (scale · query step · key step)`.
//!   A value's weight is `round(e^(score − max) · (value step · q))`, half to even, with `q` = [`WEIGHT_LEVELS`] over the
//!   largest value step of the block: no weight is above its step, and all heads share one `q`.
//!
//! [`QuantizedRow`]: crate::QuantizedRow

use crate::lanes::{self, LANES};
use crate::{QuantizedRow, math};

/// Positions in one block.
pub const KEY_BLOCK: usize = 128;

/// The largest weight of an int8 value: all bits of int16, while a block's sums of products fit 32 bits.
pub const WEIGHT_LEVELS: f32 = i16::MAX as f32;
const _: () = assert!(i16::MAX as usize * 127 * KEY_BLOCK <= i32::MAX as usize);

/// The smallest step of values that weights are divided by: below it, all of a block count as 0 or nearly so.
pub const MIN_STEP: f32 = 1e-30;

/// Cached vectors, position by position.
pub trait Cached: Copy {
    /// The same in blocks of [`KEY_BLOCK`] positions, in order.
    fn blocks(self, head_dim: usize) -> impl Iterator<Item = Self>;

    /// The product of `query`, `[head_dim]`, with every vector, times `scale`.
    fn scores(self, query: &[f32], scale: f32) -> Vec<f32>;

    /// The sum of all vectors, each times its weight: `[head_dim]`.
    fn weighted(self, weights: &[f32], head_dim: usize) -> Vec<f32>;
}

/// Vectors of floats, `[positions, head_dim]`.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a>(pub &'a [f32]);

impl Cached for Rows<'_> {
    fn blocks(self, head_dim: usize) -> impl Iterator<Item = Self> {
        self.0.chunks(KEY_BLOCK * head_dim).map(Self)
    }

    fn scores(self, query: &[f32], scale: f32) -> Vec<f32> {
        let dot = |key: &[f32]| query.iter().zip(key).fold(0.0, |sum: f32, (q, k)| q.mul_add(*k, sum));
        self.0.chunks_exact(query.len()).map(|key| dot(key) * scale).collect()
    }

    fn weighted(self, weights: &[f32], head_dim: usize) -> Vec<f32> {
        let mut weighted = vec![0.0; head_dim];
        for (weight, value) in weights.iter().zip(self.0.chunks_exact(head_dim)) {
            for (sum, v) in weighted.iter_mut().zip(value) {
                *sum = weight.mul_add(*v, *sum);
            }
        }
        weighted
    }
}

/// Vectors of int8 with steps.
#[derive(Clone, Copy, Debug)]
pub struct QuantizedRows<'a> {
    /// `[positions, head_dim]`, none of them −128.
    pub elements: &'a [i8],
    /// What the elements of each position are multiplied with, `[positions]`.
    pub steps: &'a [f32],
}

impl Cached for QuantizedRows<'_> {
    fn blocks(self, head_dim: usize) -> impl Iterator<Item = Self> {
        let elements = self.elements.chunks(KEY_BLOCK * head_dim);
        elements.zip(self.steps.chunks(KEY_BLOCK)).map(|(elements, steps)| Self { elements, steps })
    }

    fn scores(self, query: &[f32], scale: f32) -> Vec<f32> {
        let query = QuantizedRow::new(query);
        let scale = scale * (1.0 / query.q());
        let dot = |key: &[i8]| query.values().iter().zip(key).map(|(q, k)| i32::from(*q) * i32::from(*k)).sum::<i32>();
        let keys = self.elements.chunks_exact(query.values().len()).zip(self.steps);
        keys.map(|(key, step)| dot(key) as f32 * (scale * step)).collect()
    }

    fn weighted(self, weights: &[f32], head_dim: usize) -> Vec<f32> {
        let largest = self.steps.iter().fold(0f32, |largest, step| largest.max(*step));
        let q = WEIGHT_LEVELS / largest.max(MIN_STEP);
        let mut sums = vec![0i32; head_dim];
        for ((weight, step), value) in weights.iter().zip(self.steps).zip(self.elements.chunks_exact(head_dim)) {
            let weight = (weight * (step * q)).round_ties_even() as i16;
            for (sum, v) in sums.iter_mut().zip(value) {
                *sum += i32::from(weight) * i32::from(*v);
            }
        }
        let step = 1.0 / q;
        sums.into_iter().map(|sum| sum as f32 * step).collect()
    }
}

/// The result of attention over some positions, not yet divided by the sum of its exponentials.
#[derive(Clone, Debug, PartialEq)]
pub struct Partial {
    /// Largest score.
    pub max: f32,
    /// `Σ e^(score − max)` in lanes: position `i` of a block is in lane `i mod 16`.
    pub sum: [f32; LANES],
    /// `Σ e^(score − max) · v`, `[head_dim]`.
    pub values: Vec<f32>,
}

impl Partial {
    /// Over no positions at all.
    #[must_use]
    pub fn empty(head_dim: usize) -> Self {
        Self { max: f32::NEG_INFINITY, sum: [0.0; LANES], values: vec![0.0; head_dim] }
    }

    /// Over one block of at most [`KEY_BLOCK`] positions.
    ///
    /// Scores of positions before `first`, which is one of the block's, count as −∞.
    #[must_use]
    pub fn block<C: Cached>(query: &[f32], keys: C, values: C, first: usize, scale: f32) -> Self {
        let mut scores = keys.scores(query, scale);
        scores[..first].fill(f32::NEG_INFINITY);
        let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weights: Vec<f32> = scores.iter().map(|s| math::exp(s - max)).collect();
        Self { max, sum: lanes::lane_sums(&weights), values: values.weighted(&weights, query.len()) }
    }

    /// Adds the result of the next positions: both are brought to the larger maximum, `self` first.
    pub fn merge(&mut self, next: &Self) {
        let max = self.max.max(next.max);
        let (old, new) = (math::exp(self.max - max), math::exp(next.max - max));
        for (sum, next) in self.sum.iter_mut().zip(next.sum) {
            *sum = sum.mul_add(old, next * new);
        }
        for (v, next) in self.values.iter_mut().zip(&next.values) {
            *v = v.mul_add(old, next * new);
        }
        self.max = max;
    }

    /// The attention output, `[head_dim]`: values over the sum of the lanes, added pairwise.
    #[must_use]
    pub fn finish(self) -> Vec<f32> {
        let sum = lanes::tree_sum(self.sum);
        self.values.into_iter().map(|v| v / sum).collect()
    }
}

/// Attention of `query` (`[head_dim]`) over all of `keys` and `values`.
#[must_use]
pub fn attention<C: Cached>(query: &[f32], keys: C, values: C, scale: f32) -> Vec<f32> {
    attention_from(query, keys, values, 0, scale)
}

/// [`attention`] over the positions from `first` on: what a sliding window leaves to see. Blocks stay aligned to
/// position 0; those that end before `first` take no part.
#[must_use]
pub fn attention_from<C: Cached>(query: &[f32], keys: C, values: C, first: usize, scale: f32) -> Vec<f32> {
    let mut result = Partial::empty(query.len());
    let blocks = keys.blocks(query.len()).zip(values.blocks(query.len()));
    for (i, (keys, values)) in blocks.enumerate().skip(first / KEY_BLOCK) {
        result.merge(&Partial::block(query, keys, values, first.saturating_sub(i * KEY_BLOCK), scale));
    }
    result.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The textbook formula.
    fn exact(query: &[f32], keys: &[f32], values: &[f32], scale: f64) -> Vec<f64> {
        let dot = |key: &[f32]| query.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>();
        let weights: Vec<f64> = keys.chunks_exact(query.len()).map(|key| (dot(key) * scale).exp()).collect();
        let total: f64 = weights.iter().sum();
        let values = || weights.iter().zip(values.chunks_exact(query.len()));
        (0..query.len()).map(|d| values().map(|(w, value)| w / total * f64::from(value[d])).sum()).collect()
    }

    proptest! {
        #[test]
        fn blocks_merged_in_order_agree_with_the_textbook_formula(
            positions in 1usize..300,
            seed in prop::collection::vec(-2f32..2.0, 4 * 601),
            steps in prop::collection::vec(0.25f32..2.0, 2 * 300),
        ) {
            let (query, rest) = seed.split_at(4);
            let (keys, values) = (&rest[..4 * positions], &rest[1200..][..4 * positions]);
            let output = attention(query, Rows(keys), Rows(values), 0.5);
            for (output, exact) in output.iter().zip(exact(query, keys, values, 0.5)) {
                prop_assert!((f64::from(*output) - exact).abs() < 3e-5);
            }

            // Of an int8 cache weights are rounded, to 16 bits, and the query, which the formula gets as it is then.
            let (key_steps, value_steps) = (&steps[..positions], &steps[300..][..positions]);
            let int8 = |x: &[f32]| -> Vec<i8> { x.iter().map(|x| (x * 63.0) as i8).collect() };
            let (keys, values) = (int8(keys), int8(values));
            let wide = |elements: &[i8], steps: &[f32]| -> Vec<f32> {
                let rows = elements.chunks_exact(4).zip(steps);
                rows.flat_map(|(row, step)| row.iter().map(move |x| f32::from(*x) * (step / 63.0))).collect()
            };
            let rounded = QuantizedRow::new(query);
            let rounded: Vec<f32> = rounded.values().iter().map(|x| f32::from(*x) / rounded.q()).collect();
            let exact = exact(&rounded, &wide(&keys, key_steps), &wide(&values, value_steps), 0.5);
            let small = |steps: &[f32]| -> Vec<f32> { steps.iter().map(|step| step / 63.0).collect() };
            let (key_steps, value_steps) = (small(key_steps), small(value_steps));
            let keys = QuantizedRows { elements: &keys, steps: &key_steps };
            let values = QuantizedRows { elements: &values, steps: &value_steps };
            for (output, exact) in attention(query, keys, values, 0.5).iter().zip(exact) {
                prop_assert!((f64::from(*output) - exact).abs() < 3e-3, "{output} {exact}");
            }
        }
    }

    #[test]
    fn a_window_sees_nothing_of_what_lies_before_it() {
        let keys: Vec<f32> = (0..600).map(|i| (i * 37 % 101) as f32 * 0.02 - 1.0).collect();
        let values: Vec<f32> = (0..600).map(|i| (i * 53 % 97) as f32 * 0.02 - 1.0).collect();
        let query = [0.7, -0.3];
        let rows = |elements: &[f32], first: usize| {
            let (keys, values) = elements.split_at(elements.len() / 2);
            attention_from(&query, Rows(keys), Rows(values), first, 0.5)
        };
        let both = |from: usize| [&keys[from..], &values[from..]].concat();
        for first in [1, 127, 128, 129, 299] {
            let seen = rows(&both(0), first);
            let mut others = both(0);
            others[..2 * first].fill(9.0);
            others[600..][..2 * first].fill(-9.0);
            assert_eq!(seen, rows(&others, first));
            // The same positions alone, in other blocks.
            let alone = rows(&both(2 * first), 0);
            assert!(seen.iter().zip(&alone).all(|(a, b)| (a - b).abs() < 1e-6), "{seen:?} {alone:?}");
        }
    }

    #[test]
    fn one_position_returns_its_value() {
        assert_eq!(attention(&[1.0, 2.0], Rows(&[3.0, 4.0]), Rows(&[5.0, 6.0]), 1.0), [5.0, 6.0]);
    }
}
