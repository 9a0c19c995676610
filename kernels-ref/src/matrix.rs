//! The canonical packing: what the prepared file stores and every other layout is made from.
//!
//! Row-major `[m, k]`. Four neighbours along k share a byte, the first in bits 0-1; a row takes `⌈k/4⌉` bytes and a
//! last, partial byte is filled with trit 0 (code 1).

use crate::Trit;

/// Code 1 (trit 0) in all four places of a byte: what padding is made of.
pub const ZERO_BYTE: u8 = 0b01_01_01_01;

/// A byte of a packed matrix held code 3, which stands for no weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("row {row}, column {column}: two-bit code 3 is no ternary weight")]
pub struct InvalidCode {
    /// Row of the weight.
    pub row: usize,
    /// Column of the weight.
    pub column: usize,
}

/// Whether one of the four codes in `byte` is 3.
#[must_use]
pub const fn has_invalid_code(byte: u8) -> bool {
    byte & (byte >> 1) & 0b01_01_01_01 != 0
}

/// A borrowed ternary matrix `[m, k]` in canonical packing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedMatrix<'a> {
    m: usize,
    k: usize,
    bytes: &'a [u8],
}

impl<'a> PackedMatrix<'a> {
    /// Bytes of one row of `k` weights.
    #[must_use]
    pub const fn row_bytes(k: usize) -> usize {
        k.div_ceil(4)
    }

    /// Views `bytes` as an `[m, k]` matrix. Codes are not looked at; see [`validate`](Self::validate).
    ///
    /// Returns `None` unless `bytes` has exactly `m · ⌈k/4⌉` bytes.
    #[must_use]
    pub fn new(m: usize, k: usize, bytes: &'a [u8]) -> Option<Self> {
        (m.checked_mul(Self::row_bytes(k))? == bytes.len()).then_some(Self { m, k, bytes })
    }

    /// Checks that no code is 3.
    ///
    /// # Errors
    /// The first invalid weight.
    pub fn validate(&self) -> Result<(), InvalidCode> {
        // Every byte of a model passes here: many at a time, without a branch for each, a compiler makes vectors of.
        const BLOCK: usize = 64;
        let seen = |block: &[u8]| block.iter().fold(0, |seen, byte| seen | (byte & (byte >> 1)));
        let Some(block) = self.bytes.chunks(BLOCK).position(|block| seen(block) & 0b01_01_01_01 != 0) else {
            return Ok(());
        };
        let start = block * BLOCK;
        let at = self.bytes[start..].iter().position(|byte| has_invalid_code(*byte)).map_or(start, |at| start + at);
        let place = (0..4).find(|j| self.bytes[at] >> (2 * j) & 3 == 3).unwrap_or(0);
        let row_bytes = Self::row_bytes(self.k);
        Err(InvalidCode { row: at / row_bytes, column: at % row_bytes * 4 + place })
    }

    /// Number of rows (outputs).
    #[must_use]
    pub const fn m(&self) -> usize {
        self.m
    }

    /// Length of a row (inputs).
    #[must_use]
    pub const fn k(&self) -> usize {
        self.k
    }

    /// The packed bytes, row after row.
    #[must_use]
    pub const fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The packed bytes of one row.
    #[must_use]
    pub fn row(&self, row: usize) -> &'a [u8] {
        let row_bytes = Self::row_bytes(self.k);
        &self.bytes[row * row_bytes..][..row_bytes]
    }

    /// The two-bit code at `(row, column)`; 3 if the matrix is invalid there.
    #[must_use]
    pub fn code(&self, row: usize, column: usize) -> u8 {
        self.row(row)[column / 4] >> (2 * (column % 4)) & 3
    }
}

/// An owned ternary matrix `[m, k]` in canonical packing; every code is valid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TernaryMatrix {
    m: usize,
    k: usize,
    bytes: Vec<u8>,
}

impl TernaryMatrix {
    /// Packs the matrix whose weight at `(row, column)` is `trit(row, column)`.
    #[must_use]
    pub fn from_fn(m: usize, k: usize, mut trit: impl FnMut(usize, usize) -> Trit) -> Self {
        let row_bytes = PackedMatrix::row_bytes(k);
        let mut bytes = vec![ZERO_BYTE; m * row_bytes];
        for row in 0..m {
            for column in 0..k {
                let shift = 2 * (column % 4);
                let byte = &mut bytes[row * row_bytes + column / 4];
                *byte = *byte & !(3 << shift) | trit(row, column).code() << shift;
            }
        }
        Self { m, k, bytes }
    }

    /// Takes bytes that are already in canonical packing.
    ///
    /// # Errors
    /// The first weight whose code is 3.
    ///
    /// # Panics
    /// If `bytes` does not have `m · ⌈k/4⌉` bytes.
    pub fn from_bytes(m: usize, k: usize, bytes: Vec<u8>) -> Result<Self, InvalidCode> {
        PackedMatrix::new(m, k, &bytes).expect("length of a packed matrix").validate()?;
        Ok(Self { m, k, bytes })
    }

    /// A view of the whole matrix.
    #[must_use]
    pub fn view(&self) -> PackedMatrix<'_> {
        PackedMatrix { m: self.m, k: self.k, bytes: &self.bytes }
    }

    /// The weight at `(row, column)`.
    #[must_use]
    pub fn trit(&self, row: usize, column: usize) -> Trit {
        Trit::from_code(self.view().code(row, column)).expect("an owned matrix holds valid codes")
    }

    /// The packed bytes, row after row.
    #[must_use]
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn trits(max_m: usize, max_k: usize) -> impl Strategy<Value = (usize, usize, Vec<Trit>)> {
        (1..=max_m, 1..=max_k).prop_flat_map(|(m, k)| {
            (Just(m), Just(k), prop::collection::vec(prop::sample::select(&Trit::ALL[..]), m * k))
        })
    }

    proptest! {
        #[test]
        fn packing_then_unpacking_gives_the_same_trits((m, k, trits) in trits(9, 37)) {
            let packed = TernaryMatrix::from_fn(m, k, |row, column| trits[row * k + column]);
            for row in 0..m {
                for column in 0..k {
                    prop_assert_eq!(packed.trit(row, column), trits[row * k + column]);
                }
            }
            let bytes = packed.clone().into_bytes();
            prop_assert_eq!(bytes.len(), m * k.div_ceil(4));
            prop_assert_eq!(TernaryMatrix::from_bytes(m, k, bytes), Ok(packed));
        }

        #[test]
        fn an_invalid_code_is_found_where_it_is((m, k, trits) in trits(5, 23), at in any::<prop::sample::Index>()) {
            let at = at.index(m * k);
            let mut bytes = TernaryMatrix::from_fn(m, k, |row, column| trits[row * k + column]).into_bytes();
            bytes[at / k * k.div_ceil(4) + at % k / 4] |= 3 << (2 * (at % k % 4));
            prop_assert_eq!(TernaryMatrix::from_bytes(m, k, bytes), Err(InvalidCode { row: at / k, column: at % k }));
        }
    }

    #[test]
    fn a_view_of_the_wrong_length_is_refused() {
        assert!(PackedMatrix::new(2, 8, &[0; 4]).is_some());
        assert!(PackedMatrix::new(2, 8, &[0; 5]).is_none());
        assert!(PackedMatrix::new(usize::MAX, 8, &[0; 4]).is_none());
    }
}
