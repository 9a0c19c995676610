//! RMSNorm, and rounding to int8 as activations are before a projection.

use ternion_kernels_ref::norm::inverse_rms;
use ternion_kernels_ref::quantize::MIN_SCALE;

use super::lanes::Lanes;

/// `Σ x²`, in the order of [`ternion_kernels_ref::lanes::dot`].
#[inline(always)]
fn square_sum(x: &[f32]) -> f32 {
    let (chunks, tail) = x.as_chunks();
    let mut sums = Lanes::ZERO;
    for x in chunks {
        sums = Lanes(*x).mul_add(Lanes(*x), sums);
    }
    for (sum, x) in sums.0.iter_mut().zip(tail) {
        *sum = x.mul_add(*x, *sum);
    }
    sums.tree_sum()
}

#[inline(always)]
fn rms_norm_body(x: &[f32], weight: &[f32], eps: f32, target: &mut [f32]) {
    assert_eq!(x.len(), weight.len(), "rms_norm: one weight per element");
    assert_eq!(x.len(), target.len(), "rms_norm: as many results as elements");
    let r = inverse_rms(square_sum(x), x.len(), eps);
    for ((target, x), weight) in target.iter_mut().zip(x).zip(weight) {
        *target = (x * r) * weight;
    }
}

#[inline(always)]
fn rms_norm_in_place_body(x: &mut [f32], weight: &[f32], eps: f32) {
    assert_eq!(x.len(), weight.len(), "rms_norm_in_place: one weight per element");
    let r = inverse_rms(square_sum(x), x.len(), eps);
    for (x, weight) in x.iter_mut().zip(weight) {
        *x = (*x * r) * weight;
    }
}

/// The larger of `max` and `|x|`, lane by lane. NaN compares as false and so takes no part.
#[inline(always)]
pub(super) fn absolute_larger(max: Lanes, x: Lanes) -> Lanes {
    max.zip(x, |max, x| if x.abs() > max { x.abs() } else { max })
}

/// The largest `|x|` of each lane, 0 where there is none.
#[inline(always)]
pub(super) fn absolute_max(x: &[f32]) -> Lanes {
    let (chunks, tail) = x.as_chunks();
    let (mut max, mut last) = (Lanes::ZERO, Lanes::ZERO);
    for chunk in chunks {
        max = absolute_larger(max, Lanes(*chunk));
    }
    last.0[..tail.len()].copy_from_slice(tail);
    absolute_larger(max, last)
}

/// `x`, rounded half to even and limited to whole numbers from `-levels` to `levels`, in the low bits; 0 for NaN. Clamping
/// before rounding is the same as after it, since the ends are whole numbers, and adding 1.5·2²³ rounds.
#[inline(always)]
pub(super) fn to_whole(x: f32, levels: f32) -> u32 {
    const ROUND: f32 = 12_582_912.0;
    ((if x.is_nan() { 0.0 } else { x }).clamp(-levels, levels) + ROUND).to_bits()
}

#[inline(always)]
fn quantize_body(x: &[f32], target: &mut [i8]) -> f32 {
    assert_eq!(x.len(), target.len(), "quantize: as many results as elements");
    let q = 127.0 / absolute_max(x).largest().max(MIN_SCALE);
    for (target, x) in target.iter_mut().zip(x) {
        *target = to_whole(*x * q, 127.0) as i8;
    }
    q
}

for_every_level! {
    /// `target[i] = (x[i] · r) · weight[i]` with `r = 1 / √(Σx² / len + eps)`, as
    /// [`ternion_kernels_ref::norm::rms_norm`].
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, target: &mut [f32]) = rms_norm_body;

    /// [`rms_norm`] of a vector into itself.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn rms_norm_in_place(x: &mut [f32], weight: &[f32], eps: f32) = rms_norm_in_place_body;

    /// Rounds a vector to int8 and returns the scale q, as [`ternion_kernels_ref::QuantizedRow::new`]. What a projection
    /// reads is made by compiled steps instead ([`ternion_compiler::Step`]).
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn quantize(x: &[f32], target: &mut [i8]) -> f32 = quantize_body;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::tests::{assert_same_bits, floats};
    use proptest::prelude::*;
    use ternion_kernels_ref::{QuantizedRow, norm};

    type Level = (fn(&[f32], &[f32], f32, &mut [f32]), fn(&[f32], &mut [i8]) -> f32);

    const LEVELS: [Level; 2] = [(rms_norm, quantize), (rms_norm_body, quantize_body)];

    proptest! {
        #[test]
        fn norms_are_the_references_at_every_level(
            (x, weight) in (1usize..200).prop_flat_map(|len| (floats(len), floats(len))), eps in 0f32..1e-3
        ) {
            for (rms_norm, _) in LEVELS {
                let mut normalised = vec![0.0; x.len()];
                rms_norm(&x, &weight, eps, &mut normalised);
                assert_same_bits(&normalised, &norm::rms_norm(&x, &weight, eps));
            }
        }

        #[test]
        fn any_floats_at_all_quantise_as_the_reference_does(x in prop::collection::vec(any::<f32>(), 0..70)) {
            let expected = QuantizedRow::new(&x);
            for (_, quantize) in LEVELS {
                let mut values = vec![0; x.len()];
                prop_assert_eq!(quantize(&x, &mut values).to_bits(), expected.q().to_bits());
                prop_assert_eq!(&values[..], expected.values());
            }
        }
    }

    #[test]
    fn halves_round_to_even() {
        let mut x: Vec<f32> = (0..32).map(|i| i as f32 - 15.5).collect();
        x.push(127.0);
        let mut values = vec![0; x.len()];
        assert_eq!(quantize(&x, &mut values), 1.0);
        assert_eq!(values, QuantizedRow::new(&x).values());
        assert_eq!(values[..4], [-16, -14, -14, -12]);
    }
}
