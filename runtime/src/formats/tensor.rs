//! The two kinds of matrices a model has: ternary ones in a packed layout, and others, stored as in their file.

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};
use ternion_compiler::Layout;
use ternion_compiler::layout::transpose_columns;
use ternion_kernels_ref::widen::{bf16_to_f32, f16_to_f32};
use ternion_kernels_ref::{InvalidCode, PackedMatrix, TernaryMatrix};

use super::{Bytes, RowType};

/// Columns that are transposed at a time: a few pages of the source are read and as many written.
const BLOCK: usize = 512;

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

    /// Packs the matrix once more, record by record: a record is a row, or a column of the `transposed` matrix.
    ///
    /// # Panics
    /// If `bytes` or `room` is not as long as layout and shape ask for.
    pub(crate) fn pack_records(&self, layout: Layout, transposed: bool, room: &mut [u8]) {
        let (m, k) = (self.m, self.k);
        if !transposed {
            return self.layout.repack_tiles(layout, [m, k], &self.bytes, 0..layout.tiles(m), room);
        }
        let mut own = Vec::new();
        let bytes = if self.layout == Layout::Canonical {
            &*self.bytes
        } else {
            own.resize(m * PackedMatrix::row_bytes(k), 0);
            self.layout.unpack_rows(m, k, &self.bytes, 0..m, &mut own);
            &own
        };
        let source = PackedMatrix::new(m, k, bytes).expect("the bytes of its shape, which loading has checked");
        let record = layout.row_bytes(m);
        let mut columns = vec![0; BLOCK.min(k) * PackedMatrix::row_bytes(m)];
        for start in (0..k).step_by(BLOCK) {
            let range = start..k.min(start + BLOCK);
            let columns = &mut columns[..range.len() * PackedMatrix::row_bytes(m)];
            transpose_columns(source, range.clone(), columns);
            let block = PackedMatrix::new(range.len(), m, columns).expect("the size it was just made with");
            layout.pack_tiles(block, 0..range.len(), &mut room[range.start * record..range.end * record]);
        }
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

/// A float matrix `[rows, columns]`, row-major, stored as in its file.
#[derive(Clone, Debug)]
pub struct FloatMatrix {
    /// Number of rows.
    pub rows: usize,
    /// Length of a row in elements.
    pub columns: usize,
    /// How a row is stored; it holds rows of `columns`.
    pub dtype: RowType,
    /// `rows · dtype.row_bytes(columns)` bytes, numbers little-endian; no alignment is promised.
    pub bytes: Bytes,
}

impl FloatMatrix {
    /// Bytes of one row.
    #[must_use]
    pub const fn row_bytes(&self) -> usize {
        self.dtype.row_bytes(self.columns)
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
        self.dtype.widen_row(self.row(row), target);
    }

    /// Some rows as plain numbers, and their type: where they lie, if they are that, else computed into `wide`.
    ///
    /// # Panics
    /// If there are no such rows.
    pub(crate) fn plain_rows<'a>(&'a self, rows: Range<usize>, wide: &'a mut Vec<u8>) -> (RowType, &'a [u8]) {
        let row_bytes = self.row_bytes();
        let bytes = &self.bytes[rows.start * row_bytes..rows.end * row_bytes];
        if self.dtype.plain().is_some() {
            return (self.dtype, bytes);
        }
        let mut values = vec![0.0; self.columns];
        wide.clear();
        for row in bytes.chunks_exact(row_bytes.max(1)) {
            self.dtype.widen_row(row, &mut values);
            wide.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        }
        (RowType::F32, wide)
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
            let matrix = FloatMatrix { rows: 2, columns: 2, dtype: dtype.into(), bytes: Bytes::from(encode(dtype)) };
            let mut row = [0.0; 2];
            matrix.widen_row(1, &mut row);
            assert_eq!(row, values[2..], "{dtype}");
        }
    }
}
