//! A token drawn at random: the one with the largest sum of scaled logit and noise, which few logits are needed to find.

use ternion_kernels_ref::gumbel::{gumbel, key, mix};

use super::Candidate;
use crate::ops::{self, gumbel_bounds};

/// The draw of one token, as [`ternion_kernels_ref::gumbel::draw`] defines it: a function of the logits and of what it is
/// made of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    key: u64,
    inverse_temperature: f64,
}

impl Draw {
    /// For position `position` of sequence number `sequence`, at a temperature above 0.
    #[must_use]
    pub fn new(seed: u64, sequence: u64, position: usize, temperature: f32) -> Self {
        Self { key: key(seed, sequence, position as u64), inverse_temperature: 1.0 / f64::from(temperature) }
    }

    /// The token that is drawn from those with a logit each, in any order; `None` if there are none. No logit may be NaN.
    #[must_use]
    pub fn choose(&self, candidates: &[Candidate]) -> Option<u32> {
        let mut best: Option<(f64, u32)> = None;
        for (logit, token) in candidates {
            let scaled = f64::from(*logit) * self.inverse_temperature;
            let bits = mix(self.key, u64::from(*token));
            // Two logarithms are spared where they cannot make it the largest.
            if best.is_some_and(|(largest, _)| scaled + gumbel_bounds(bits).1 < largest) {
                continue;
            }
            let score = scaled + gumbel(bits);
            if best.is_none_or(|(largest, lowest)| score > largest || score == largest && *token < lowest) {
                best = Some((score, *token));
            }
        }
        best.map(|(_, token)| token)
    }

    /// Turns intervals of logits of the tokens from `first` on into intervals of what is compared.
    pub(super) fn perturb(&self, first: usize, lower: &mut [f32], upper: &mut [f32]) {
        ops::perturb(self.key, self.inverse_temperature, first as u32, lower, upper);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use ternion_kernels_ref::gumbel;

    proptest! {
        #[test]
        fn the_token_is_the_references(
            seed in any::<u64>(), position in 0usize..1000, t in -20i32..7, equal in any::<bool>(),
            logits in prop::collection::vec(prop_oneof![9 => -8f32..8.0, 1 => Just(f32::NEG_INFINITY)], 0..200),
        ) {
            let temperature = 2f32.powi(t);
            let logit = |logit: f32| if equal { -1.0 } else { logit };
            let mut candidates: Vec<Candidate> = logits.into_iter().map(logit).zip(0..).collect();
            let expected = gumbel::draw(key(seed, 1, position as u64), temperature, &candidates);
            let draw = Draw::new(seed, 1, position, temperature);
            prop_assert_eq!(draw.choose(&candidates), expected);
            candidates.reverse();
            prop_assert_eq!(draw.choose(&candidates), expected);
        }
    }

    #[test]
    fn frequencies_are_those_of_a_softmax() {
        const DRAWS: usize = 20_000;
        let logits: Vec<f32> = (0..40).map(|i| (i * 29 % 41) as f32 * 0.12 - 3.0).collect();
        for temperature in [0.5f32, 1.0, 2.5] {
            let candidates: Vec<Candidate> = logits.iter().copied().zip(0..).collect();
            // Once over the positions of a text, once over first tokens of many.
            for texts in [false, true] {
                let mut counts = vec![0usize; logits.len()];
                for i in 0..DRAWS {
                    let (sequence, position) = if texts { (i as u64, 5) } else { (0, i) };
                    counts[Draw::new(11, sequence, position, temperature).choose(&candidates).unwrap() as usize] += 1;
                }
                let weights = logits.iter().map(|logit| f64::from(logit / temperature).exp());
                let total: f64 = weights.clone().sum();
                let squares: f64 = weights
                    .zip(counts)
                    .map(|(weight, count)| {
                        let expected = weight / total * DRAWS as f64;
                        (count as f64 - expected).powi(2) / expected
                    })
                    .sum();
                // χ² of 39 degrees of freedom: 39 ± 8.8.
                assert!((10.0..80.0).contains(&squares), "temperature {temperature}: {squares}");
            }
        }
    }
}
