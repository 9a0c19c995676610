//! Bounds of Gumbel numbers without a logarithm, and intervals of what they are added to.

use std::f64::consts::LN_2;

use ternion_kernels_ref::gumbel::{mix, uniform};

/// More than all roundings of a bound and of the number itself.
const SLACK: f64 = 1e-9;
/// More than `log₂(1 + m) − m` is for any `m` in [0, 1], and the bits that [`log2_below`] leaves out.
const BEND: f64 = 0.0862;
/// More than what rounding to `f32` changes, as a part.
const NARROW: f64 = 2e-7;

/// At most `log₂ x` of a positive, normal `x`, and more than `log₂ x − BEND`: for `x = 2^e · (1 + m)` it is `e + m`, but
/// for the last bits, and can be read off the bits of `x`.
#[inline(always)]
fn log2_below(x: f64) -> f64 {
    f64::from((x.to_bits() >> 32) as i32) * 2f64.powi(-20) - 1023.0
}

/// Two numbers that [`gumbel`](ternion_kernels_ref::gumbel::gumbel)`(bits)` lies between.
///
/// With `u` for the uniform number, `u / (1 − u/2) ≤ −ln(1 − u) ≤ u / (1 − u)`. So its negative logarithm lies between
/// `−ln u + ln(1 − u)` and `−ln u + ln(1 − u/2) ≤ −ln u − u/2`.
#[must_use]
#[inline(always)]
pub fn gumbel_bounds(bits: u64) -> (f64, f64) {
    let u = uniform(bits);
    let log = log2_below(u);
    let lower = (log2_below(1.0 - u) - log - BEND) * LN_2 - SLACK;
    let upper = -log * LN_2 - 0.5 * u + SLACK;
    (lower, upper)
}

#[inline(always)]
fn perturb_body(key: u64, inverse_temperature: f64, first: u32, lower: &mut [f32], upper: &mut [f32]) {
    assert_eq!(lower.len(), upper.len(), "perturb: as many lower as upper ends");
    for ((lower, upper), token) in lower.iter_mut().zip(upper).zip(u64::from(first)..) {
        let (least, most) = gumbel_bounds(mix(key, token));
        let (least, most) =
            (f64::from(*lower) * inverse_temperature + least, f64::from(*upper) * inverse_temperature + most);
        *lower = (least - (least.abs() * NARROW + SLACK)) as f32;
        *upper = (most + (most.abs() * NARROW + SLACK)) as f32;
    }
}

for_every_level! {
    /// Turns intervals of logits of the tokens from `first` on into intervals of their
    /// [scores](ternion_kernels_ref::gumbel::score).
    ///
    /// A score is two operations on its logit and its Gumbel number, each of which rounds a larger exact result to one that
    /// is not smaller. So ends that are put through the same operations are ends of the score.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn perturb(key: u64, inverse_temperature: f64, first: u32, lower: &mut [f32], upper: &mut [f32]) = perturb_body;
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use ternion_kernels_ref::gumbel::{gumbel, score};

    /// Bits of all magnitudes, of both ends, and around powers of two.
    fn bits() -> impl Strategy<Value = u64> {
        prop_oneof![
            any::<u64>(),
            (any::<u64>(), 0u32..64).prop_map(|(bits, shift)| bits >> shift),
            (any::<u64>(), 0u32..64).prop_map(|(bits, shift)| !(bits >> shift)),
            (0u32..64, -2i64..3).prop_map(|(shift, step)| (1u64 << shift).wrapping_add_signed(step << 12)),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]

        #[test]
        fn numbers_lie_between_their_bounds(bits in bits()) {
            let (lower, upper) = gumbel_bounds(bits);
            let exact = gumbel(bits);
            prop_assert!(lower <= exact && exact <= upper, "{bits:#x}: {lower} {exact} {upper}");
            // Near enough to be of use where it counts, among the largest.
            prop_assert!(exact < 2.0 || upper - lower < 0.3, "{bits:#x}: {lower} {exact} {upper}");
        }

        #[test]
        fn scores_lie_in_their_intervals(
            key in any::<u64>(), first in any::<u32>().prop_map(|first| first / 2), t in -40i32..8,
            logits in prop::collection::vec((-30f32..30.0, 0f32..1.0, 0f32..1.0), 1..40),
        ) {
            let temperature = 2f32.powi(t);
            let inverse = 1.0 / f64::from(temperature);
            for perturb in [perturb as fn(u64, f64, u32, &mut [f32], &mut [f32]), perturb_body] {
                let mut lower: Vec<f32> = logits.iter().map(|(logit, below, _)| logit - below).collect();
                let mut upper: Vec<f32> = logits.iter().map(|(logit, _, above)| logit + above).collect();
                perturb(key, inverse, first, &mut lower, &mut upper);
                for ((token, (logit, _, _)), (lower, upper)) in (first..).zip(&logits).zip(lower.iter().zip(&upper)) {
                    let score = score(key, temperature, *logit, token);
                    prop_assert!(f64::from(*lower) <= score && score <= f64::from(*upper), "{lower} {score} {upper}");
                }
            }
        }
    }

    #[test]
    fn what_has_no_bound_stays_so() {
        let (mut lower, mut upper) = ([f32::NEG_INFINITY; 20], [f32::INFINITY; 20]);
        perturb(3, 0.01, 5, &mut lower, &mut upper);
        assert_eq!((lower, upper), ([f32::NEG_INFINITY; 20], [f32::INFINITY; 20]));
    }
}
