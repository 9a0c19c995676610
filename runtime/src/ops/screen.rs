//! Rows as int8, and integer dot products of one vector with many of them: estimates of logits.

use ternion_kernels_ref::lanes::LANES;

/// Elements of a step: a vector of 16-bit products on the widest machines.
const STEP: usize = 32;
/// Rows worked on at once.
const ROWS: usize = 4;

/// Largest magnitude of the vector's elements for which sums of `k` products with int8 rows stay within `i32`.
#[must_use]
pub fn screen_limit(k: usize) -> i16 {
    (i32::MAX as usize / (127 * k.max(1))).min(i16::MAX as usize) as i16
}

/// One pair of products for each of sixteen 32-bit lanes: the shape that compilers turn into `pmaddwd`.
#[inline(always)]
fn add_pairs(sum: &mut [i32; STEP / 2], x: &[i16; STEP], row: &[u8; STEP]) {
    for (i, sum) in sum.iter_mut().enumerate() {
        let low = i32::from(x[2 * i]) * i32::from(i16::from(row[2 * i].cast_signed()));
        let high = i32::from(x[2 * i + 1]) * i32::from(i16::from(row[2 * i + 1].cast_signed()));
        *sum += low + high;
    }
}

#[inline(always)]
fn screen_some<const R: usize>(x: &[[i16; STEP]], rows: &[[u8; STEP]], sums: &mut [i32; R]) {
    let rows: [&[[u8; STEP]]; R] = std::array::from_fn(|row| &rows[row * x.len()..][..x.len()]);
    let mut lanes = [[0; STEP / 2]; R];
    for (i, x) in x.iter().enumerate() {
        for (lanes, row) in lanes.iter_mut().zip(rows) {
            add_pairs(lanes, x, &row[i]);
        }
    }
    *sums = lanes.map(|lanes| lanes.into_iter().sum());
}

#[inline(always)]
fn screen_rows_body(x: &[i16], rows: &[u8], sums: &mut [i32]) {
    assert_eq!(rows.len(), sums.len() * x.len(), "screen_rows: as many rows as results");
    let (x, tail) = x.as_chunks::<STEP>();
    assert!(tail.is_empty(), "screen_rows: whole steps");
    let rows = rows.as_chunks::<STEP>().0;
    let (groups, rest) = sums.as_chunks_mut::<ROWS>();
    let done = groups.len() * ROWS;
    for (i, sums) in groups.iter_mut().enumerate() {
        screen_some::<ROWS>(x, &rows[i * ROWS * x.len()..][..ROWS * x.len()], sums);
    }
    for (i, sum) in rest.iter_mut().enumerate() {
        screen_some::<1>(x, &rows[(done + i) * x.len()..][..x.len()], std::array::from_mut(sum));
    }
}

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

    /// `sums[v] = Σ x[i] · rows[v][i]`, exact. `rows` holds `sums.len()` rows of `x.len()` elements, a multiple of 32, each the
    /// bits of a signed byte; no element of `x` is larger than [`screen_limit`], and none of a row is −128.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn screen_rows(x: &[i16], rows: &[u8], sums: &mut [i32]) = screen_rows_body;
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn sums_are_exact_at_every_level(steps in 1usize..6, rows in 0usize..11, seed in any::<u64>(), extreme in any::<bool>()) {
            let mut state = seed;
            let mut next = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 40) as i64
            };
            let (k, limit) = (STEP * steps, i64::from(screen_limit(STEP * steps)));
            let x: Vec<i16> =
                (0..k).map(|_| (if extreme { limit } else { next() % (2 * limit + 1) - limit }) as i16).collect();
            let w: Vec<u8> = (0..k * rows).map(|_| (if extreme { 127 } else { next() % 255 - 127 }) as u8).collect();
            let dot = |row: &[u8]| x.iter().zip(row).map(|(x, w)| i64::from(*x) * i64::from(w.cast_signed())).sum::<i64>();
            let expected: Vec<i64> = w.chunks_exact(k).map(dot).collect();
            for screen in [screen_rows as fn(&[i16], &[u8], &mut [i32]), screen_rows_body] {
                let mut sums = vec![0; rows];
                screen(&x, &w, &mut sums);
                prop_assert_eq!(sums.into_iter().map(i64::from).collect::<Vec<_>>(), expected.clone());
            }
        }
    }

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

    #[test]
    fn the_limit_keeps_the_largest_sums_within_32_bits() {
        for k in [1, 32, 256, 2560, 8192, 1 << 20] {
            let largest = 127 * k as u64 * screen_limit(k) as u64;
            assert!(largest <= i32::MAX as u64, "{k}");
        }
        assert_eq!(screen_limit(2560), 6605);
    }
}
