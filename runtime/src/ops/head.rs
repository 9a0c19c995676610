//! Dot products of one vector with many rows of a float matrix in its file's own type.

use ternion_kernels_ref::lanes::LANES;
use ternion_kernels_ref::widen::bf16_to_f32;

use super::half::f16_to_f32;
use super::lanes::Lanes;
use crate::formats::RowType;

/// Rows worked on at once: enough chains of dependent additions to hide the latency of each.
const ROWS: usize = 8;

/// A type that elements of a row are stored in, little-endian.
trait Element<const BYTES: usize> {
    fn widen(bytes: [u8; BYTES]) -> f32;
}

struct Bf16;
struct F16;
struct F32;

impl Element<2> for Bf16 {
    #[inline(always)]
    fn widen(bytes: [u8; 2]) -> f32 {
        bf16_to_f32(u16::from_le_bytes(bytes))
    }
}

impl Element<2> for F16 {
    #[inline(always)]
    fn widen(bytes: [u8; 2]) -> f32 {
        f16_to_f32(u16::from_le_bytes(bytes))
    }
}

impl Element<4> for F32 {
    #[inline(always)]
    fn widen(bytes: [u8; 4]) -> f32 {
        f32::from_le_bytes(bytes)
    }
}

/// `R` dot products at once; `rows` holds the elements of `R` rows.
#[inline(always)]
fn dot_some<E: Element<B>, const B: usize, const R: usize>(x: &[f32], rows: &[[u8; B]], target: &mut [f32; R]) {
    let (chunks, tail) = x.as_chunks::<LANES>();
    let rows: [&[[u8; B]]; R] = std::array::from_fn(|row| &rows[row * x.len()..][..x.len()]);
    let row_chunks = rows.map(|row| &row.as_chunks::<LANES>().0[..chunks.len()]);
    let mut sums = [Lanes::ZERO; R];
    for (i, x) in chunks.iter().enumerate() {
        for (sum, row) in sums.iter_mut().zip(row_chunks) {
            let mut wide = Lanes::ZERO;
            for (wide, bytes) in wide.0.iter_mut().zip(row[i]) {
                *wide = E::widen(bytes);
            }
            *sum = Lanes(*x).mul_add(wide, *sum);
        }
    }
    for ((mut sum, row), target) in sums.into_iter().zip(rows).zip(target) {
        for ((sum, x), bytes) in sum.0.iter_mut().zip(tail).zip(&row[x.len() - tail.len()..]) {
            *sum = x.mul_add(E::widen(*bytes), *sum);
        }
        *target = sum.tree_sum();
    }
}

#[inline(always)]
fn dot_all<E: Element<B>, const B: usize>(x: &[f32], rows: &[u8], target: &mut [f32]) {
    let k = x.len();
    assert_eq!(rows.len(), target.len() * k * B, "dot_rows: as many rows as results");
    let rows = rows.as_chunks::<B>().0;
    let (groups, rest) = target.as_chunks_mut::<ROWS>();
    let done = groups.len() * ROWS;
    for (i, target) in groups.iter_mut().enumerate() {
        dot_some::<E, B, ROWS>(x, &rows[i * ROWS * k..][..ROWS * k], target);
    }
    for (i, target) in rest.iter_mut().enumerate() {
        dot_some::<E, B, 1>(x, &rows[(done + i) * k..][..k], std::array::from_mut(target));
    }
}

#[inline(always)]
fn dot_rows_body(x: &[f32], dtype: RowType, rows: &[u8], target: &mut [f32]) {
    match dtype {
        RowType::Bf16 => dot_all::<Bf16, 2>(x, rows, target),
        RowType::F16 => dot_all::<F16, 2>(x, rows, target),
        RowType::F32 => dot_all::<F32, 4>(x, rows, target),
        RowType::Int8 | RowType::Q4_0 | RowType::Q8_0 | RowType::Q4K | RowType::Q6K => {
            dot_coded(x, dtype, rows, target);
        }
    }
}

/// Rows that are more than plain numbers: each is computed, then multiplied.
#[inline(always)]
fn dot_coded(x: &[f32], dtype: RowType, rows: &[u8], target: &mut [f32]) {
    let row_bytes = dtype.row_bytes(x.len());
    assert_eq!(rows.len(), target.len() * row_bytes, "dot_rows: as many rows as results");
    let mut wide = vec![0.0; x.len()];
    let (chunks, tail) = x.as_chunks::<LANES>();
    for (row, target) in rows.chunks_exact(row_bytes.max(1)).zip(target) {
        dtype.widen_row(row, &mut wide);
        let (wide_chunks, wide_tail) = wide.as_chunks::<LANES>();
        let mut sum = Lanes::ZERO;
        for (x, wide) in chunks.iter().zip(wide_chunks) {
            sum = Lanes(*x).mul_add(Lanes(*wide), sum);
        }
        for ((sum, x), wide) in sum.0.iter_mut().zip(tail).zip(wide_tail) {
            *sum = x.mul_add(*wide, *sum);
        }
        *target = sum.tree_sum();
    }
}

for_every_level! {
    /// `target[v] = Σ x[i] · rows[v][i]`, each row as [`ternion_kernels_ref::lanes::dot`]. `rows` holds
    /// `target.len()` rows of `x.len()` values stored as `dtype` says, at any alignment.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn dot_rows(x: &[f32], dtype: RowType, rows: &[u8], target: &mut [f32]) = dot_rows_body;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::tests::{assert_same_bits, floats};
    use proptest::prelude::*;
    use ternion_kernels_ref::{head, widen};

    /// Elements that are not NaN, and their bytes.
    fn encode(dtype: RowType, values: &[f32]) -> (Vec<f32>, Vec<u8>) {
        let (mut wide, mut bytes) = (Vec::new(), Vec::new());
        for value in values {
            match dtype {
                RowType::Bf16 => {
                    let bits = (value.to_bits() >> 16) as u16;
                    wide.push(widen::bf16_to_f32(bits));
                    bytes.extend(bits.to_le_bytes());
                }
                RowType::F16 => {
                    let bits = widen::f32_to_f16(value.clamp(-60000.0, 60000.0));
                    wide.push(widen::f16_to_f32(bits));
                    bytes.extend(bits.to_le_bytes());
                }
                _ => {
                    wide.push(*value);
                    bytes.extend(value.to_le_bytes());
                }
            }
        }
        (wide, bytes)
    }

    proptest! {
        #[test]
        fn rows_of_every_type_and_length_give_the_references_logits(
            (x, rows) in (1usize..70, 0usize..20).prop_flat_map(|(k, rows)| (floats(k), floats(k * rows)))
        ) {
            for dtype in [RowType::Bf16, RowType::F16, RowType::F32] {
                let (wide, bytes) = encode(dtype, &rows);
                let expected = head::logits(&x, wide.chunks_exact(x.len()));
                for dot_rows in [dot_rows as fn(&[f32], RowType, &[u8], &mut [f32]), dot_rows_body] {
                    let mut logits = vec![0.0; expected.len()];
                    dot_rows(&x, dtype, &bytes, &mut logits);
                    assert_same_bits(&logits, &expected);
                    // At an odd address.
                    let shifted: Vec<u8> = std::iter::once(0).chain(bytes.iter().copied()).collect();
                    dot_rows(&x, dtype, &shifted[1..], &mut logits);
                    assert_same_bits(&logits, &expected);
                }
            }
        }

        #[test]
        fn coded_rows_give_the_logits_of_the_values_they_stand_for(
            // Without some bits every scale is a number below 1.
            x in floats(512), bytes in prop::collection::vec(any::<u8>().prop_map(|byte| byte & 0x3b), 3 * 512 * 2),
        ) {
            for dtype in [RowType::Int8, RowType::Q4_0, RowType::Q8_0, RowType::Q4K, RowType::Q6K] {
                let row_bytes = dtype.row_bytes(x.len());
                let rows: Vec<Vec<f32>> = bytes[..3 * row_bytes].chunks_exact(row_bytes).map(|row| {
                    let mut wide = vec![0.0; x.len()];
                    dtype.widen_row(row, &mut wide);
                    wide
                }).collect();
                let expected = head::logits(&x, rows.iter().map(Vec::as_slice));
                for dot_rows in [dot_rows as fn(&[f32], RowType, &[u8], &mut [f32]), dot_rows_body] {
                    let mut logits = vec![0.0; 3];
                    dot_rows(&x, dtype, &bytes[..3 * row_bytes], &mut logits);
                    assert_same_bits(&logits, &expected);
                }
            }
        }
    }
}
