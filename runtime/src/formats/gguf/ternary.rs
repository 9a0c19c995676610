//! Ternary matrices in GGUF's types become trits and one multiplier.
//!
//! | type | unit | how weights lie in it |
//! |---|---|---|
//! | TQ2_0 | 256 weights, 64 bytes, f16 `d` | in each half of 32 bytes, bits 2n of byte i are weight i + 32n |
//! | TQ1_0 | 256 weights, 52 bytes, f16 `d` | base 3, see [`tq1_0_codes`] |
//! | I2_S | the whole matrix, then 32 bytes that begin with an f32 scale | see [`I2sLayout`] |
//! | Q4_0 | 32 weights, f16 `d`, 16 bytes | a ternary row has codes 0, 8 and 15 only: see [`q4_0`] |
//!
//! Blocks carry their own `d`. In a BitNet model all are equal, or 0 where a block is all zero; a file in which they
//! differ was quantised from weights that are not ternary and is refused.

use ternion_compiler::Layout;
use ternion_compiler::layout::transpose_codes;
use ternion_kernels_ref::matrix::ZERO_BYTE;
use ternion_kernels_ref::widen::f16_to_f32;
use ternion_kernels_ref::{PackedMatrix, TernaryMatrix};

use super::types::TensorType;
use crate::formats::{Bytes, TernaryTensor};

/// Bytes after the codes of an I2_S tensor.
pub(super) const I2S_TAIL: usize = 32;

/// How the weights of an I2_S tensor are ordered; the file does not say. `j` counts weights within a unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum I2sLayout {
    /// 128 weights in 32 bytes, weight `j` in byte `j mod 32`, bits `6 − 2·(j div 32)`: all released files.
    #[default]
    Blocks128,
    /// 64 weights in 16 bytes, weight `j` in byte `j mod 16`, bits `6 − 2·(j div 16)`: files quantised on ARM by
    /// builds of bitnet.cpp since late 2025.
    Blocks64,
    /// Four rows in a byte, the first in bits 6-7: files of builds without `ACT_PARALLEL`.
    Rows4,
}

/// Decodes a matrix `[m, k]`; the tensor's bytes are as long as its type and shape need.
///
/// # Errors
/// What is wrong, as the end of a sentence about the tensor.
pub(super) fn decode(
    kind: TensorType,
    (m, k): (usize, usize),
    bytes: &[u8],
    i2s: I2sLayout,
) -> Result<(TernaryMatrix, f32), String> {
    if !k.is_multiple_of(4) {
        return Err(format!("has rows of {k} weights, no multiple of 4"));
    }
    let mut codes = vec![ZERO_BYTE; m * PackedMatrix::row_bytes(k)];
    let scale = match kind {
        TensorType::Tq2_0 => blocks::<66, 64>(bytes, &mut codes, |block, target| {
            for (half, target) in block[..64].chunks_exact(32).zip(target.chunks_exact_mut(32)) {
                transpose_planes::<32>(half, target, false);
            }
            scale_of(&block[64..])
        })?,
        TensorType::Tq1_0 => blocks::<54, 64>(bytes, &mut codes, |block, target| {
            tq1_0_codes(&block[..52], target);
            scale_of(&block[52..])
        })?,
        TensorType::Q4_0 => q4_0(bytes, &mut codes)?,
        TensorType::I2S => i2s_codes(bytes, (m, k), i2s, &mut codes)?,
        other => {
            return Err(format!("is {other}, no type for ternary weights: take a GGUF of type I2_S, TQ1_0 or TQ2_0"));
        }
    };
    if !(scale.is_normal() && scale > 0.0) {
        return Err(format!("has the scale {scale}, not a positive number"));
    }
    let matrix = TernaryMatrix::from_bytes(m, k, codes).map_err(|invalid| {
        format!("has two-bit code 3 at row {}, column {}, which is no ternary weight", invalid.row, invalid.column)
    })?;
    Ok((matrix, scale))
}

/// The matrix as a tensor in canonical layout.
pub(super) fn tensor(matrix: TernaryMatrix, scale: f32) -> TernaryTensor {
    let (m, k) = (matrix.view().m(), matrix.view().k());
    TernaryTensor { m, k, layout: Layout::Canonical, bytes: Bytes::from(matrix.into_bytes()), scale }
}

/// Decodes block after block; `decode` fills the canonical bytes of one and returns its `d`. Returns the one `d` that
/// all blocks with weights have, 1 if none has any.
fn blocks<const SOURCE: usize, const TARGET: usize>(
    bytes: &[u8],
    codes: &mut [u8],
    decode: impl Fn(&[u8; SOURCE], &mut [u8; TARGET]) -> f32,
) -> Result<f32, String> {
    let mut common = 0.0;
    for (block, target) in bytes.as_chunks().0.iter().zip(codes.as_chunks_mut().0) {
        let d = decode(block, target);
        if d == 0.0 {
            // Whatever the codes are, the weights are 0.
            target.fill(ZERO_BYTE);
        } else if common == 0.0 || d == common {
            common = d;
        } else {
            return Err(format!(
                "has blocks with different scales ({common} and {d}): it was quantised from weights that are not \
                 ternary; quantise it again from the ternary model"
            ));
        }
    }
    Ok(if common == 0.0 { 1.0 } else { common })
}

fn scale_of(bytes: &[u8]) -> f32 {
    f16_to_f32(u16::from_le_bytes([bytes[0], bytes[1]]))
}

/// The scale of a tensor whose type holds ternary weights alone, without decoding it; `None` for other types and for
/// tensors without a weight.
pub(super) fn scale_at_a_glance(kind: TensorType, bytes: &[u8]) -> Option<f32> {
    match kind {
        TensorType::I2S => {
            bytes.len().checked_sub(I2S_TAIL).and_then(|tail| Some(f32::from_le_bytes(*bytes[tail..].first_chunk()?)))
        }
        TensorType::Tq1_0 | TensorType::Tq2_0 => {
            let mut blocks = bytes.chunks_exact(kind.block().1);
            blocks.find_map(|block| Some(scale_of(&block[block.len() - 2..])).filter(|scale| *scale != 0.0))
        }
        _ => None,
    }
}

/// `N` bytes with four planes of `N` codes each, one after the other: plane n in bits 2n, or, `reversed`, in bits
/// 6 − 2n. Four neighbours of a plane become one canonical byte.
fn transpose_planes<const N: usize>(source: &[u8], target: &mut [u8], reversed: bool) {
    for (j, bytes) in source.as_chunks::<4>().0.iter().enumerate() {
        let mut planes = transpose_codes(*bytes);
        if reversed {
            planes.reverse();
        }
        for (n, plane) in planes.into_iter().enumerate() {
            target[n * (N / 4) + j] = plane;
        }
    }
}

/// TQ1_0: a byte holds `⌈v · 256 / 243⌉` where `v` is a number of base 3, first trit most significant; its trit n is
/// `(((byte · 3ⁿ) mod 256) · 3) >> 8`. 32 bytes of 5 trits, 16 of 5, then 4 of 4: trit n of byte i of a part of N bytes
/// is weight `i + N·n` of that part.
fn tq1_0_codes(source: &[u8], target: &mut [u8; 64]) {
    let mut codes = [0u8; 256];
    let mut at = 0;
    for (range, trits) in [(0..32, 5), (32..48, 5), (48..52, 4)] {
        let mut power = 1u8;
        for _ in 0..trits {
            for byte in &source[range.clone()] {
                codes[at] = ((u16::from(byte.wrapping_mul(power)) * 3) >> 8) as u8;
                at += 1;
            }
            power = power.wrapping_mul(3);
        }
    }
    for (codes, byte) in codes.as_chunks::<4>().0.iter().zip(target) {
        *byte = codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6;
    }
}

/// Q4_0 of a ternary row, the fallback where 256 does not divide its length: with `d = w / −8` for the first non-zero
/// weight `w` of a block, weights of its sign get code 0, the others code 15 (they lose an eighth of their magnitude,
/// not their sign), zeros code 8. The scale is `8·|d|`.
fn q4_0(bytes: &[u8], codes: &mut [u8]) -> Result<f32, String> {
    let foreign = std::cell::Cell::new(None);
    let scale = blocks::<18, 8>(bytes, codes, |block, target| {
        let d = scale_of(block);
        // Trit codes of Q4_0's codes 0 and 15.
        let [low, high] = if d < 0.0 { [2, 0] } else { [0, 2] };
        let mut weights = [1u8; 32];
        for (i, byte) in block[2..].iter().enumerate() {
            for (code, weight) in [(byte & 15, i), (byte >> 4, i + 16)] {
                weights[weight] = match code {
                    0 => low,
                    8 => 1,
                    15 => high,
                    other => {
                        foreign.set(Some(other));
                        1
                    }
                };
            }
        }
        for (codes, byte) in weights.as_chunks::<4>().0.iter().zip(target) {
            *byte = codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6;
        }
        8.0 * d.abs()
    })?;
    match foreign.get() {
        None => Ok(scale),
        Some(code) => Err(format!(
            "is Q4_0 and holds code {code}: its weights are not ternary, and ternion runs ternary models only"
        )),
    }
}

fn i2s_codes(bytes: &[u8], (m, k): (usize, usize), layout: I2sLayout, codes: &mut [u8]) -> Result<f32, String> {
    // The size follows from the shape, so that there is a tail.
    let (source, tail) = bytes.split_at(bytes.len() - I2S_TAIL);
    let scale = f32::from_le_bytes([tail[0], tail[1], tail[2], tail[3]]);
    let unit = match layout {
        I2sLayout::Blocks128 => 128,
        I2sLayout::Blocks64 => 64,
        I2sLayout::Rows4 => 4 * k,
    };
    if !(m * k).is_multiple_of(unit) {
        return Err(format!(
            "has {m} rows of {k} weights, which are no whole units of {unit}: try another I2_S layout"
        ));
    }
    match layout {
        I2sLayout::Blocks128 => {
            for (source, target) in source.chunks_exact(32).zip(codes.chunks_exact_mut(32)) {
                transpose_planes::<32>(source, target, true);
            }
        }
        I2sLayout::Blocks64 => {
            for (source, target) in source.chunks_exact(16).zip(codes.chunks_exact_mut(16)) {
                transpose_planes::<16>(source, target, true);
            }
        }
        // `k` bytes for four rows are four planes of `k` codes, each of which is a row.
        I2sLayout::Rows4 => {
            for (source, target) in source.chunks_exact(k).zip(codes.chunks_exact_mut(k)) {
                for (j, bytes) in source.as_chunks::<4>().0.iter().enumerate() {
                    let mut planes = transpose_codes(*bytes);
                    planes.reverse();
                    for (n, plane) in planes.into_iter().enumerate() {
                        target[n * (k / 4) + j] = plane;
                    }
                }
            }
        }
    }
    Ok(scale)
}

/// Undoes the permutation that llama.cpp's converter applies to the rows of q and k for its interleaved rotary pairs:
/// within each head, row `2j + h` of the file is row `h · d/2 + j`, `h` being 0 or 1.
pub(super) fn unpermute_rows(matrix: TernaryMatrix, heads: usize) -> TernaryMatrix {
    let (m, k) = (matrix.view().m(), matrix.view().k());
    let row_bytes = PackedMatrix::row_bytes(k);
    let mut bytes = Vec::with_capacity(m * row_bytes);
    for row in 0..m {
        bytes.extend_from_slice(matrix.view().row(permuted_row(row, m / heads.max(1))));
    }
    TernaryMatrix::from_bytes(m, k, bytes).expect("rows of a valid matrix")
}

/// Where a permuted file has row `row`; heads have `d` rows.
pub(super) const fn permuted_row(row: usize, d: usize) -> usize {
    let (head, within) = (row / d, row % d);
    head * d + within % (d / 2) * 2 + within / (d / 2)
}
