//! Rows as int8 with a scale each: what estimates of logits are made of.
//!
//! Rows come in tiles of [`SCREEN_ROWS`], sixteen elements of each in turn, so that a tile is one sequential stream.

use ternion_kernels_ref::lanes::LANES;

use super::lanes::Lanes;

/// Rows of a tile.
pub const SCREEN_ROWS: usize = 8;

/// Sixteen elements of each row of a tile: the bits of signed bytes.
pub type ScreenTile = [[u8; LANES]; SCREEN_ROWS];

#[inline(always)]
fn dot_screen_body(x: &[f32], tiles: &[ScreenTile], target: &mut [[f32; SCREEN_ROWS]]) {
    let steps = x.len().div_ceil(LANES);
    assert_eq!(tiles.len(), target.len() * steps, "dot_screen: a tile for every group of results");
    let (chunks, tail) = x.as_chunks::<LANES>();
    let mut last = [0.0; LANES];
    last[..tail.len()].copy_from_slice(tail);
    let last = std::slice::from_ref(&last);
    let chunks = || chunks.iter().chain(if tail.is_empty() { &[] } else { last });
    for (tile, target) in tiles.chunks_exact(steps.max(1)).zip(target) {
        let mut sums = [Lanes::ZERO; SCREEN_ROWS];
        for (x, rows) in chunks().zip(tile) {
            for (sum, row) in sums.iter_mut().zip(rows) {
                *sum = Lanes(*x).mul_add(Lanes(row.map(|byte| f32::from(byte.cast_signed()))), *sum);
            }
        }
        *target = sums.map(Lanes::tree_sum);
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

    /// `target[t][r] = Σ x[i] · w[i]`, `w` the row `r` of tile `t`, each as [`ternion_kernels_ref::lanes::dot`] but for
    /// the sign of a zero. There are `⌈x.len() / 16⌉` parts of each tile, zero past the end of a row.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn dot_screen(x: &[f32], tiles: &[ScreenTile], target: &mut [[f32; SCREEN_ROWS]]) = dot_screen_body;
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use ternion_kernels_ref::head;

    proptest! {
        #[test]
        fn tiles_give_the_references_dot_products(
            (x, rows) in (1usize..70, 0usize..3).prop_flat_map(|(k, tiles)| {
                (crate::ops::tests::floats(k), prop::collection::vec(any::<i8>(), k * tiles * SCREEN_ROWS))
            })
        ) {
            let (k, steps) = (x.len(), x.len().div_ceil(LANES));
            let count = rows.len() / k;
            let mut tiles = vec![[[0; LANES]; SCREEN_ROWS]; count / SCREEN_ROWS * steps];
            for (at, w) in rows.iter().enumerate() {
                let (row, i) = (at / k, at % k);
                tiles[row / SCREEN_ROWS * steps + i / LANES][row % SCREEN_ROWS][i % LANES] = w.cast_unsigned();
            }
            let wide: Vec<f32> = rows.iter().map(|w| f32::from(*w)).collect();
            let expected = head::logits(&x, wide.chunks_exact(k));
            for dot in [dot_screen as fn(&[f32], &[ScreenTile], &mut [[f32; SCREEN_ROWS]]), dot_screen_body] {
                let mut found = vec![[0.0; SCREEN_ROWS]; count / SCREEN_ROWS];
                dot(&x, &tiles, &mut found);
                prop_assert_eq!(found.as_flattened(), &expected);
            }
        }

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
