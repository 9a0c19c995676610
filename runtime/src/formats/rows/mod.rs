//! How rows of embeddings and heads are stored, and what values they stand for.
//!
//! A row is never brought into another type when it is read: what a file says is computed in `f32`, as the type defines
//! it, whenever the row is needed. So every type is exact, mapped where it lies, and as small in memory as in its file.
//!
//! | type | a row of `k` values | value |
//! |---|---|---|
//! | `bf16`, `f16`, `f32` | `k` numbers | the number |
//! | `int8` | f32 scale `s`, `k` × i8 | `s · q` |
//! | `q8_0` | blocks of 32: f16 `d`, 32 × i8 | `d · q` |
//! | `q4_0` | blocks of 32: f16 `d`, 16 bytes with values i and i + 16 | `d · (q − 8)` |
//! | `q4_k` | blocks of 256 in 8 groups: f16 `d`, f16 `dmin`, 12 bytes of 6-bit scales and minima, 128 of 4-bit codes | `(d · scale) · q − dmin · min` |
//! | `q6_k` | blocks of 256 in 16 groups: 128 bytes of low nibbles, 64 of upper bits, 16 × i8 scales, f16 `d` | `(d · scale) · (q − 32)` |

mod encode;

use std::fmt;

use serde::{Deserialize, Serialize};
use ternion_kernels_ref::widen::f16_to_f32;

pub(super) use encode::encode_row;

use super::FloatType;

/// How a row is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RowType {
    /// The upper halves of `f32`s.
    Bf16,
    /// IEEE halves.
    F16,
    /// IEEE singles.
    F32,
    /// Signed bytes and one `f32` scale for the whole row.
    Int8,
    /// ggml's Q4_0.
    #[serde(rename = "q4_0")]
    Q4_0,
    /// ggml's Q8_0.
    #[serde(rename = "q8_0")]
    Q8_0,
    /// ggml's Q4_K.
    #[serde(rename = "q4_k")]
    Q4K,
    /// ggml's Q6_K.
    #[serde(rename = "q6_k")]
    Q6K,
}

impl From<FloatType> for RowType {
    fn from(dtype: FloatType) -> Self {
        match dtype {
            FloatType::Bf16 => Self::Bf16,
            FloatType::F16 => Self::F16,
            FloatType::F32 => Self::F32,
        }
    }
}

impl RowType {
    /// The type of its numbers, if a row is nothing but numbers.
    #[must_use]
    pub const fn plain(self) -> Option<FloatType> {
        match self {
            Self::Bf16 => Some(FloatType::Bf16),
            Self::F16 => Some(FloatType::F16),
            Self::F32 => Some(FloatType::F32),
            Self::Int8 | Self::Q4_0 | Self::Q8_0 | Self::Q4K | Self::Q6K => None,
        }
    }

    /// Values and bytes of a block; a row of `int8` is one block with its scale before it.
    pub(super) const fn block(self) -> (usize, usize) {
        match self {
            Self::Bf16 | Self::F16 => (1, 2),
            Self::F32 => (1, 4),
            Self::Int8 => (1, 1),
            Self::Q4_0 => (32, 2 + 16),
            Self::Q8_0 => (32, 2 + 32),
            Self::Q4K => (256, 2 + 2 + 12 + 128),
            Self::Q6K => (256, 128 + 64 + 16 + 2),
        }
    }

    /// Whether rows of `columns` values can be stored like this: blocks are whole.
    #[must_use]
    pub const fn holds(self, columns: usize) -> bool {
        columns.is_multiple_of(self.block().0)
    }

    /// Bytes of a row of `columns` values that it [`holds`](Self::holds).
    #[must_use]
    pub const fn row_bytes(self, columns: usize) -> usize {
        let (values, bytes) = self.block();
        let scale = if matches!(self, Self::Int8) { 4 } else { 0 };
        scale + columns / values * bytes
    }

    /// Computes the values of one row.
    ///
    /// # Panics
    /// If `row` does not have [`row_bytes`](Self::row_bytes) bytes for the values of `target`.
    pub fn widen_row(self, row: &[u8], target: &mut [f32]) {
        assert_eq!(row.len(), self.row_bytes(target.len()), "widen_row: a row of as many values as the target");
        match (self, self.plain()) {
            (_, Some(dtype)) => dtype.widen(row, target),
            (Self::Q4_0, _) => blocks::<32, 18>(row, target, q4_0),
            (Self::Q8_0, _) => blocks::<32, 34>(row, target, q8_0),
            (Self::Q4K, _) => blocks::<256, 144>(row, target, q4_k),
            (Self::Q6K, _) => blocks::<256, 210>(row, target, q6_k),
            _ => int8(row, target),
        }
    }
}

impl fmt::Display for RowType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::F32 => "f32",
            Self::Int8 => "int8",
            Self::Q4_0 => "q4_0",
            Self::Q8_0 => "q8_0",
            Self::Q4K => "q4_k",
            Self::Q6K => "q6_k",
        })
    }
}

fn blocks<const VALUES: usize, const BYTES: usize>(
    row: &[u8],
    target: &mut [f32],
    decode: impl Fn(&[u8; BYTES], &mut [f32; VALUES]),
) {
    for (block, values) in row.as_chunks().0.iter().zip(target.as_chunks_mut().0) {
        decode(block, values);
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16_to_f32(u16::from_le_bytes([block[at], block[at + 1]]))
}

fn int8(row: &[u8], target: &mut [f32]) {
    let Some((scale, codes)) = row.split_first_chunk() else { return };
    let scale = f32::from_le_bytes(*scale);
    for (value, q) in target.iter_mut().zip(codes) {
        *value = scale * f32::from(q.cast_signed());
    }
}

fn q8_0(block: &[u8; 34], values: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (value, q) in values.iter_mut().zip(&block[2..]) {
        *value = d * f32::from(q.cast_signed());
    }
}

fn q4_0(block: &[u8; 18], values: &mut [f32; 32]) {
    let d = half_at(block, 0);
    let (low, high) = values.split_at_mut(16);
    for ((q, low), high) in block[2..].iter().zip(low).zip(high) {
        *low = d * (f32::from(q & 15) - 8.0);
        *high = d * (f32::from(q >> 4) - 8.0);
    }
}

fn q4_k(block: &[u8; 144], values: &mut [f32; 256]) {
    let (d, dmin, packed) = (half_at(block, 0), half_at(block, 2), &block[4..16]);
    for (group, values) in values.chunks_exact_mut(32).enumerate() {
        let (scale, min) = match group {
            0..4 => (packed[group] & 63, packed[group + 4] & 63),
            _ => {
                (packed[group + 4] & 15 | packed[group - 4] >> 6 << 4, packed[group + 4] >> 4 | packed[group] >> 6 << 4)
            }
        };
        let (d, min) = (d * f32::from(scale), dmin * f32::from(min));
        let codes = &block[16 + group / 2 * 32..][..32];
        for (value, code) in values.iter_mut().zip(codes) {
            let q = if group % 2 == 0 { code & 15 } else { code >> 4 };
            *value = d * f32::from(q) - min;
        }
    }
}

fn q6_k(block: &[u8; 210], values: &mut [f32; 256]) {
    let (low, high, scales, d) = (&block[..128], &block[128..192], &block[192..208], half_at(block, 208));
    for (group, values) in values.chunks_exact_mut(16).enumerate() {
        let scale = d * f32::from(scales[group].cast_signed());
        // Halves of 128 values; in each, 64 low nibbles, 64 high ones, and four planes of 32 upper bits.
        let (half, within) = (group / 8, group % 8 * 16);
        let nibbles = &low[half * 64 + within % 64..][..16];
        let (nibble, plane) = (within / 64 * 4, within / 32 * 2);
        let uppers = &high[half * 32 + within % 32..][..16];
        for ((value, nibbles), upper) in values.iter_mut().zip(nibbles).zip(uppers) {
            let q = (nibbles >> nibble & 15 | (upper >> plane & 3) << 4) as i8 - 32;
            *value = scale * f32::from(q);
        }
    }
}
