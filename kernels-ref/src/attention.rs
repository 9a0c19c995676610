//! Causal attention of one query head over cached keys and values.
//!
//! Positions are worked through in blocks of [`KEY_BLOCK`], aligned to position 0. A block gives a partial result: its
//! maximum score, the sum of its exponentials and its weighted values. Partial results are merged in order of position
//! ([`Partial::merge`]). That order is a property of the positions alone, so threads may share out blocks and prompts
//! may be cut into chunks as they like.
//!
//! A cached vector is `x[d] = element[d] · step`, with one step per position and head ([`Rows`]). Elements are what the
//! cache's type holds: `f32` and IEEE half as they are, with step 1, or int8 with the step of [`QuantizedRow`], `1 / q`.
//!
//! A score is `(Σ q[d] · k[d]) · (scale · step)`, summed over the elements along the head dimension in order, with fused
//! multiply-adds; a value's elements are accumulated with the weight `e^(score − max) · step`. So a step is never
//! multiplied into a single element, and one of 1 changes no bit. Fast versions keep keys transposed and do sixteen
//! positions at once without a single horizontal sum.
//!
//! [`QuantizedRow`]: crate::QuantizedRow

use crate::{lanes, math};

/// Positions in one block.
pub const KEY_BLOCK: usize = 64;

/// Cached vectors, position by position.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// `[positions, head_dim]`
    pub elements: &'a [f32],
    /// What the elements of each position are multiplied with, `[positions]`.
    pub steps: &'a [f32],
}

impl<'a> Rows<'a> {
    /// Vectors of `head_dim` elements with their steps.
    fn iter(self, head_dim: usize) -> impl Iterator<Item = (&'a [f32], f32)> {
        self.elements.chunks_exact(head_dim).zip(self.steps.iter().copied())
    }

    /// The same in blocks of [`KEY_BLOCK`].
    fn blocks(self, head_dim: usize) -> impl Iterator<Item = Self> {
        let elements = self.elements.chunks(KEY_BLOCK * head_dim);
        elements.zip(self.steps.chunks(KEY_BLOCK)).map(|(elements, steps)| Self { elements, steps })
    }
}

/// The result of attention over some positions, not yet divided by the sum of its exponentials.
#[derive(Clone, Debug, PartialEq)]
pub struct Partial {
    /// Largest score.
    pub max: f32,
    /// `Σ e^(score − max)`.
    pub sum: f32,
    /// `Σ e^(score − max) · v`, `[head_dim]`.
    pub values: Vec<f32>,
}

impl Partial {
    /// Over no positions at all.
    #[must_use]
    pub fn empty(head_dim: usize) -> Self {
        Self { max: f32::NEG_INFINITY, sum: 0.0, values: vec![0.0; head_dim] }
    }

    /// Over one block of at most [`KEY_BLOCK`] positions.
    ///
    /// Exponentials are summed as [`lanes::sum`] does, by position within the block; values are accumulated position by
    /// position. Scores of positions before `first`, which is one of the block's, count as −∞.
    #[must_use]
    pub fn block(query: &[f32], keys: Rows<'_>, values: Rows<'_>, first: usize, scale: f32) -> Self {
        let head_dim = query.len();
        let mut scores: Vec<f32> = keys.iter(head_dim).map(|(key, step)| score(query, key) * (scale * step)).collect();
        scores[..first].fill(f32::NEG_INFINITY);
        let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weights: Vec<f32> = scores.iter().map(|s| math::exp(s - max)).collect();
        let mut weighted = vec![0.0; head_dim];
        for (weight, (value, step)) in weights.iter().zip(values.iter(head_dim)) {
            let weight = weight * step;
            for (sum, v) in weighted.iter_mut().zip(value) {
                *sum = weight.mul_add(*v, *sum);
            }
        }
        Self { max, sum: lanes::sum(&weights), values: weighted }
    }

    /// Adds the result of the next positions: both are brought to the larger maximum, `self` first.
    pub fn merge(&mut self, next: &Self) {
        let max = self.max.max(next.max);
        let (old, new) = (math::exp(self.max - max), math::exp(next.max - max));
        self.sum = self.sum.mul_add(old, next.sum * new);
        for (v, next) in self.values.iter_mut().zip(&next.values) {
            *v = v.mul_add(old, next * new);
        }
        self.max = max;
    }

    /// The attention output, `[head_dim]`.
    #[must_use]
    pub fn finish(self) -> Vec<f32> {
        self.values.into_iter().map(|v| v / self.sum).collect()
    }
}

/// `Σ q[d] · k[d]`, in order of d.
fn score(query: &[f32], key: &[f32]) -> f32 {
    query.iter().zip(key).fold(0.0, |sum, (q, k)| q.mul_add(*k, sum))
}

/// Attention of `query` (`[head_dim]`) over all of `keys` and `values`.
#[must_use]
pub fn attention(query: &[f32], keys: Rows<'_>, values: Rows<'_>, scale: f32) -> Vec<f32> {
    attention_from(query, keys, values, 0, scale)
}

/// [`attention`] over the positions from `first` on: what a sliding window leaves to see. Blocks stay aligned to
/// position 0; those that end before `first` take no part.
#[must_use]
pub fn attention_from(query: &[f32], keys: Rows<'_>, values: Rows<'_>, first: usize, scale: f32) -> Vec<f32> {
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

    proptest! {
        #[test]
        fn blocks_merged_in_order_agree_with_the_textbook_formula(
            positions in 1usize..200,
            seed in prop::collection::vec(-2f32..2.0, 4 * 401),
            steps in prop::collection::vec(0.25f32..2.0, 2 * 200),
        ) {
            let (query, rest) = seed.split_at(4);
            let (keys, values) = (&rest[..4 * positions], &rest[800..][..4 * positions]);
            let keys = Rows { elements: keys, steps: &steps[..positions] };
            let values = Rows { elements: values, steps: &steps[200..][..positions] };
            let scores: Vec<f64> = keys.iter(4).map(|(key, step)| {
                query.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>() * f64::from(step) * 0.5
            }).collect();
            let total: f64 = scores.iter().map(|s| s.exp()).sum();
            let output = attention(query, keys, values, 0.5);
            for d in 0..4 {
                let exact: f64 = scores.iter().zip(values.iter(4))
                    .map(|(s, (value, step))| s.exp() / total * f64::from(value[d]) * f64::from(step)).sum();
                prop_assert!((f64::from(output[d]) - exact).abs() < 3e-5);
            }
        }
    }

    #[test]
    fn a_window_sees_nothing_of_what_lies_before_it() {
        let keys: Vec<f32> = (0..200).map(|i| (i * 37 % 101) as f32 * 0.02 - 1.0).collect();
        let values: Vec<f32> = (0..200).map(|i| (i * 53 % 97) as f32 * 0.02 - 1.0).collect();
        let (query, steps) = ([0.7, -0.3], [1.0; 100]);
        let rows = |elements: &[f32], first: usize| {
            let (keys, values) = elements.split_at(elements.len() / 2);
            let rows = |elements| Rows { elements, steps: &steps[..keys.len() / 2] };
            attention_from(&query, rows(keys), rows(values), first, 0.5)
        };
        let both = |from: usize| [&keys[from..], &values[from..]].concat();
        for first in [1, 63, 64, 65, 99] {
            let seen = rows(&both(0), first);
            let mut others = both(0);
            others[..2 * first].fill(9.0);
            others[200..][..2 * first].fill(-9.0);
            assert_eq!(seen, rows(&others, first));
            // The same positions alone, in other blocks.
            let alone = rows(&both(2 * first), 0);
            assert!(seen.iter().zip(&alone).all(|(a, b)| (a - b).abs() < 1e-6), "{seen:?} {alone:?}");
        }
    }

    #[test]
    fn one_position_returns_its_value() {
        let row = |elements| Rows { elements, steps: &[1.0] };
        assert_eq!(attention(&[1.0, 2.0], row(&[3.0, 4.0]), row(&[5.0, 6.0]), 1.0), [5.0, 6.0]);
    }
}
