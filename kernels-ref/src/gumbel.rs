//! Random choice as a maximum: a token is drawn with the probabilities of a softmax if it is the one with the largest
//! `logit / temperature + g`, `g` being a number of the standard Gumbel distribution for each token (Gumbel, *Statistical
//! Theory of Extreme Values*, 1954).
//!
//! `g` is a function of the seed, the sequence, the position and the token alone. So the choice depends neither on the order
//! in which tokens are looked at nor on which unlikely ones are never looked at.

use std::cmp::Ordering;

use crate::SplitMix64;

/// The first number of [`SplitMix64`] for both together: for one `state`, another number for every `input`.
#[must_use]
#[inline(always)]
pub const fn mix(state: u64, input: u64) -> u64 {
    SplitMix64::new(state ^ input).next_u64()
}

/// What the numbers of all tokens at a position of a sequence are made of: a token's bits are `mix(key, token)`.
#[must_use]
pub const fn key(seed: u64, sequence: u64, position: u64) -> u64 {
    mix(mix(mix(0, seed), sequence), position)
}

/// A number between 0 and 1, neither of them: the upper 52 of the `bits` and a half more, all of it exact.
#[must_use]
#[inline(always)]
pub const fn uniform(bits: u64) -> f64 {
    (f64::from_bits(1f64.to_bits() | bits >> 12) - 1.0) + f64::EPSILON / 2.0
}

/// `−ln(−ln(1 − u))` of a [`uniform`] `u`.
#[must_use]
pub fn gumbel(bits: u64) -> f64 {
    -libm::log(-libm::log(1.0 - uniform(bits)))
}

/// What is compared: `logit · (1 / temperature) + gumbel(mix(key, token))` in `f64`, the inverse rounded first.
#[must_use]
pub fn score(key: u64, temperature: f32, logit: f32, token: u32) -> f64 {
    f64::from(logit) * (1.0 / f64::from(temperature)) + gumbel(mix(key, u64::from(token)))
}

/// The token that is drawn from those with a logit each: the largest [`score`], the lowest token among equals. `None` if
/// there are none. No logit may be NaN.
#[must_use]
pub fn draw(key: u64, temperature: f32, candidates: &[(f32, u32)]) -> Option<u32> {
    let scored = candidates.iter().map(|(logit, token)| (score(key, temperature, *logit, *token), *token));
    let order = |a: &(f64, u32), b: &(f64, u32)| a.0.partial_cmp(&b.0).unwrap_or(Ordering::Equal).then(b.1.cmp(&a.1));
    scored.max_by(order).map(|(_, token)| token)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uniform_numbers_stay_between_zero_and_one_at_both_ends() {
        assert_eq!(uniform(0), 2f64.powi(-53));
        assert_eq!(uniform(0xfff), uniform(0));
        assert_eq!(uniform(u64::MAX), 1.0 - 2f64.powi(-53));
        assert_eq!(uniform(1 << 63), 0.5 + 2f64.powi(-53));
        assert!((gumbel(0) - 53.0 * std::f64::consts::LN_2).abs() < 1e-12);
        assert!(gumbel(u64::MAX) < -3.6);
    }

    #[test]
    fn numbers_have_the_moments_of_the_distribution() {
        let numbers = (0..100_000).map(|token| gumbel(mix(key(1, 2, 3), token)));
        let [sum, squares] = numbers.fold([0.0; 2], |[sum, squares], g| [sum + g, squares + g * g]);
        let (mean, square) = (sum / 1e5, squares / 1e5);
        // Euler's constant, and π²/6.
        assert!((mean - 0.577_215_664_9).abs() < 0.02, "{mean}");
        assert!((square - mean * mean - 1.644_934_066_8).abs() < 0.05, "{square}");
    }

    #[test]
    fn equals_go_to_the_lowest_token_and_nothing_beats_what_is_infinitely_likely() {
        let infinite = f32::INFINITY;
        assert_eq!(draw(7, 1.0, &[(infinite, 5), (infinite, 3), (0.0, 1)]), Some(3));
        assert_eq!(draw(7, 1.0, &[(-infinite, 5), (-infinite, 3)]), Some(3));
        assert_eq!(draw(7, 1e-45, &[(1.0, 0), (1.000_001, 1)]), Some(1));
        assert_eq!(draw(7, 1.0, &[]), None);
    }
}
