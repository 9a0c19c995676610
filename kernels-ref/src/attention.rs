//! Causal attention of one query head over cached keys and values.
//!
//! Positions are worked through in blocks of [`KEY_BLOCK`], aligned to position 0. A block gives a partial result: its
//! maximum score, the sum of its exponentials and its weighted values. Partial results are merged in order of position
//! ([`Partial::merge`]). That order is a property of the positions alone, so threads may share out blocks and prompts
//! may be cut into chunks as they like.
//!
//! A score is `(Σ q[d] · k[d]) · scale`, summed along the head dimension in order, with fused multiply-adds. Fast
//! versions keep keys transposed and do sixteen positions at once without a single horizontal sum.

use crate::{lanes, math};

/// Positions in one block.
pub const KEY_BLOCK: usize = 64;

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

    /// Over one block of at most [`KEY_BLOCK`] positions; `keys` and `values` are `[positions, head_dim]`.
    ///
    /// Exponentials are summed as [`lanes::sum`] does, by position within the block; values are accumulated position by
    /// position. Scores of positions before `first`, which is one of the block's, count as −∞.
    #[must_use]
    pub fn block(query: &[f32], keys: &[f32], values: &[f32], first: usize, scale: f32) -> Self {
        let head_dim = query.len();
        let mut scores: Vec<f32> = keys.chunks_exact(head_dim).map(|key| score(query, key) * scale).collect();
        scores[..first].fill(f32::NEG_INFINITY);
        let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weights: Vec<f32> = scores.iter().map(|s| math::exp(s - max)).collect();
        let mut weighted = vec![0.0; head_dim];
        for (weight, value) in weights.iter().zip(values.chunks_exact(head_dim)) {
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

/// Attention of `query` (`[head_dim]`) over all of `keys` and `values` (`[positions, head_dim]`).
#[must_use]
pub fn attention(query: &[f32], keys: &[f32], values: &[f32], scale: f32) -> Vec<f32> {
    attention_from(query, keys, values, 0, scale)
}

/// [`attention`] over the positions from `first` on: what a sliding window leaves to see. Blocks stay aligned to
/// position 0; those that end before `first` take no part.
#[must_use]
pub fn attention_from(query: &[f32], keys: &[f32], values: &[f32], first: usize, scale: f32) -> Vec<f32> {
    let mut result = Partial::empty(query.len());
    let block = KEY_BLOCK * query.len();
    for (i, (keys, values)) in keys.chunks(block).zip(values.chunks(block)).enumerate().skip(first / KEY_BLOCK) {
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
            positions in 1usize..200, seed in prop::collection::vec(-2f32..2.0, 4 * 401)
        ) {
            let (query, rest) = seed.split_at(4);
            let (keys, values) = (&rest[..4 * positions], &rest[800..][..4 * positions]);
            let scores: Vec<f64> = keys.chunks_exact(4)
                .map(|key| query.iter().zip(key).map(|(q, k)| f64::from(q * k)).sum::<f64>() * 0.5).collect();
            let total: f64 = scores.iter().map(|s| s.exp()).sum();
            let output = attention(query, keys, values, 0.5);
            for d in 0..4 {
                let exact: f64 = scores.iter().zip(values.chunks_exact(4))
                    .map(|(s, value)| s.exp() / total * f64::from(value[d])).sum();
                prop_assert!((f64::from(output[d]) - exact).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn a_window_sees_nothing_of_what_lies_before_it() {
        let keys: Vec<f32> = (0..200).map(|i| (i * 37 % 101) as f32 * 0.02 - 1.0).collect();
        let values: Vec<f32> = (0..200).map(|i| (i * 53 % 97) as f32 * 0.02 - 1.0).collect();
        let query = [0.7, -0.3];
        assert_eq!(attention_from(&query, &keys, &values, 0, 0.5), attention(&query, &keys, &values, 0.5));
        for first in [1, 63, 64, 65, 99] {
            let mut others = (keys.clone(), values.clone());
            others.0[..2 * first].fill(9.0);
            others.1[..2 * first].fill(-9.0);
            let seen = attention_from(&query, &keys, &values, first, 0.5);
            assert_eq!(seen, attention_from(&query, &others.0, &others.1, first, 0.5));
            // The same positions alone, in other blocks.
            let alone = attention(&query, &keys[2 * first..], &values[2 * first..], 0.5);
            assert!(seen.iter().zip(&alone).all(|(a, b)| (a - b).abs() < 1e-6), "{seen:?} {alone:?}");
        }
    }

    #[test]
    fn one_position_returns_its_value() {
        assert_eq!(attention(&[1.0, 2.0], &[3.0, 4.0], &[5.0, 6.0], 1.0), [5.0, 6.0]);
    }
}
