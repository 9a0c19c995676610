//! Rows as int8 with a scale each: what estimates of logits are made of.

use ternion_kernels_ref::lanes::LANES;

/// A row `w = s·q + e` in its int8 form, but for `q` itself. Norms are sums in `f64` without any promise of order.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScreenForm {
    /// `s`, a 127th of the largest magnitude.
    pub scale: f32,
    /// `‖w‖²`
    pub whole: f64,
    /// `‖e‖²`
    pub error: f64,
    /// `‖s·q‖²`
    pub form: f64,
}

/// Sixteen elements: their integers, and their part of the three sums.
#[inline(always)]
fn form_lanes(row: &[f32; LANES], scale: f32, inverse: f32, target: &mut [u8; LANES], sums: &mut [[f64; LANES]; 3]) {
    for (i, (w, target)) in row.iter().zip(target).enumerate() {
        let q = (w * inverse).round_ties_even().clamp(-127.0, 127.0);
        *target = (q as i8).cast_unsigned();
        let (w, form) = (f64::from(*w), f64::from(q) * f64::from(scale));
        let error = w - form;
        for (sum, x) in sums.iter_mut().zip([w, error, form]) {
            sum[i] += x * x;
        }
    }
}

#[inline(always)]
fn screen_form_body(row: &[f32], target: &mut [u8]) -> ScreenForm {
    assert_eq!(row.len(), target.len(), "screen_form: as many bytes as elements");
    let (chunks, tail) = row.as_chunks::<LANES>();
    let mut largest = [0f32; LANES];
    for row in chunks {
        largest.iter_mut().zip(row).for_each(|(largest, w)| *largest = largest.max(w.abs()));
    }
    let largest = largest.iter().chain(tail).fold(0f32, |largest, w| largest.max(w.abs()));
    let scale = largest / 127.0;
    // Where the inverse is no number, of a row of almost nothing, the form is 0 and the row its own error.
    let inverse = if (1.0 / scale).is_finite() { 1.0 / scale } else { 0.0 };
    let mut sums = [[0f64; LANES]; 3];
    let (targets, tail_target) = target.as_chunks_mut::<LANES>();
    for (row, target) in chunks.iter().zip(targets) {
        form_lanes(row, scale, inverse, target, &mut sums);
    }
    let (mut last, mut last_target) = ([0.0; LANES], [0; LANES]);
    last[..tail.len()].copy_from_slice(tail);
    form_lanes(&last, scale, inverse, &mut last_target, &mut sums);
    tail_target.copy_from_slice(&last_target[..tail.len()]);
    let [whole, error, form] = sums.map(|sum| sum.iter().sum());
    ScreenForm { scale, whole, error, form }
}

for_every_level! {
    /// Brings a row into its int8 form: writes the bits of its `q`, −127 to 127.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn screen_form(row: &[f32], target: &mut [u8]) -> ScreenForm = screen_form_body;
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn forms_are_near_their_rows_and_say_how_near(row in crate::ops::tests::floats(70), len in 0usize..70) {
            let row = &row[..len];
            for screen_form in [screen_form as fn(&[f32], &mut [u8]) -> ScreenForm, screen_form_body] {
                let mut q = vec![0; len];
                let found = screen_form(row, &mut q);
                let form = |q: &u8| f64::from(q.cast_signed()) * f64::from(found.scale);
                let (mut whole, mut error, mut squares) = (0.0, 0.0, 0.0);
                for (w, q) in row.iter().zip(&q) {
                    let (w, form) = (f64::from(*w), form(q));
                    prop_assert!(q.cast_signed() != -128);
                    prop_assert!((w - form).abs() <= f64::from(found.scale) * 0.5001 + 1e-36, "{w} {form}");
                    (whole, error, squares) = (whole + w * w, error + (w - form) * (w - form), squares + form * form);
                }
                for (found, expected) in [(found.whole, whole), (found.error, error), (found.form, squares)] {
                    prop_assert!((found - expected).abs() <= expected * 1e-12, "{found} {expected}");
                }
            }
        }
    }
}
