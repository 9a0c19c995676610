//! The two kinds of matrices a model has: ternary ones in a packed layout, and float ones in their file's own type.

use std::fmt;

use serde::{Deserialize, Serialize};
use ternion_compiler::Layout;
use ternion_kernels_ref::widen::{bf16_to_f32, f16_to_f32};
use ternion_kernels_ref::{InvalidCode, TernaryMatrix};

use super::Bytes;

/// A ternary matrix `[m, k]`: `y = Σ T·a · (scale / q)`.
#[derive(Clone, Debug)]
pub struct TernaryTensor {
    /// Rows (outputs).
    pub m: usize,
    /// Columns (inputs).
    pub k: usize,
    /// The order of `bytes`.
    pub layout: Layout,
    /// `layout.bytes(m, k)` packed bytes. From a prepared file they are mapped and not looked at: a code may be 3 there
    /// if the file was damaged after it was written.
    pub bytes: Bytes,
    /// The multiplier of the integer sums, whatever convention the model's file had.
    pub scale: f32,
}

impl TernaryTensor {
    /// The matrix in canonical packing, every code checked.
    ///
    /// # Errors
    /// The first weight whose code is 3.
    pub fn to_matrix(&self) -> Result<TernaryMatrix, InvalidCode> {
        self.layout.unpack(self.m, self.k, &self.bytes)
    }
}

/// Element type of a float matrix, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FloatType {
    /// The upper half of an `f32`.
    Bf16,
    /// IEEE half.
    F16,
    /// IEEE single.
    F32,
}

impl FloatType {
    /// Bytes of one element.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    /// Widens elements to `f32`, exactly.
    ///
    /// # Panics
    /// If `source` does not have `self.bytes()` bytes for each element of `target`.
    pub fn widen(self, source: &[u8], target: &mut [f32]) {
        assert_eq!(source.len(), target.len() * self.bytes(), "widen: as many elements as the target has");
        match self {
            Self::Bf16 => {
                for (source, target) in source.as_chunks().0.iter().zip(target) {
                    *target = bf16_to_f32(u16::from_le_bytes(*source));
                }
            }
            Self::F16 => {
                for (source, target) in source.as_chunks().0.iter().zip(target) {
                    *target = f16_to_f32(u16::from_le_bytes(*source));
                }
            }
            Self::F32 => {
                for (source, target) in source.as_chunks().0.iter().zip(target) {
                    *target = f32::from_le_bytes(*source);
                }
            }
        }
    }
}

impl fmt::Display for FloatType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::F32 => "f32",
        })
    }
}

/// A float matrix `[rows, columns]`, row-major, in its file's own type.
#[derive(Clone, Debug)]
pub struct FloatMatrix {
    /// Number of rows.
    pub rows: usize,
    /// Length of a row in elements.
    pub columns: usize,
    /// Type of the elements.
    pub dtype: FloatType,
    /// `rows · columns · dtype.bytes()` little-endian bytes; no alignment is promised.
    pub bytes: Bytes,
}

impl FloatMatrix {
    /// Bytes of one row.
    #[must_use]
    pub const fn row_bytes(&self) -> usize {
        self.columns * self.dtype.bytes()
    }

    /// The bytes of one row.
    ///
    /// # Panics
    /// If `row` is not below `rows`.
    #[must_use]
    pub fn row(&self, row: usize) -> &[u8] {
        &self.bytes[row * self.row_bytes()..][..self.row_bytes()]
    }

    /// Widens one row into `target`, `columns` elements.
    ///
    /// # Panics
    /// If `row` is not below `rows`, or `target` has another length.
    pub fn widen_row(&self, row: usize, target: &mut [f32]) {
        self.dtype.widen(self.row(row), target);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_float_type_is_widened_exactly() {
        let values = [1.0f32, -0.5, 0.0, 1024.0];
        let encode = |dtype: FloatType| -> Vec<u8> {
            values
                .iter()
                .flat_map(|value| match dtype {
                    FloatType::Bf16 => half::bf16::from_f32(*value).to_le_bytes().to_vec(),
                    FloatType::F16 => half::f16::from_f32(*value).to_le_bytes().to_vec(),
                    FloatType::F32 => value.to_le_bytes().to_vec(),
                })
                .collect()
        };
        for dtype in [FloatType::Bf16, FloatType::F16, FloatType::F32] {
            let matrix = FloatMatrix { rows: 2, columns: 2, dtype, bytes: Bytes::from(encode(dtype)) };
            let mut row = [0.0; 2];
            matrix.widen_row(1, &mut row);
            assert_eq!(row, values[2..], "{dtype}");
        }
    }
}
