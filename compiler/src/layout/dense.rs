//! Rows in less than two bits a weight: five weights in a byte, or three in an index and a sign.
//!
//! Both forms are written down row by row, as the bytes that [`Layout`](super::Layout) then deals out to a tile. Weights
//! that a row does not have are trit 0. A code that is no weight becomes a byte or an index that stands for none, and takes
//! its neighbours with it.

use ternion_kernels_ref::matrix::ZERO_BYTE;

/// How many weights go together, and into what.
#[derive(Clone, Copy)]
pub(super) enum Dense {
    /// Five weights, one byte.
    Fives,
    /// Twenty-four weights, five bytes: the signs of eight threes, then their indices, two to a byte.
    Threes,
}

/// Weights of a block of [`Dense::Threes`], which is as many as there are signs in a byte.
pub(super) const BLOCK: usize = 3 * 8;

/// Bytes of such a block.
pub(super) const BLOCK_BYTES: usize = 1 + 4;

/// Where three zeros are in `-13..=13`: `Σ code(j) · 3ʲ` is this much more than `Σ trit(j) · 3ʲ`.
const ZEROS: u8 = 1 + 3 + 9;

impl Dense {
    /// Bytes of a row that lie together in a tile.
    pub(super) const fn group(self) -> usize {
        match self {
            Self::Fives => 4,
            Self::Threes => 1,
        }
    }

    /// Bytes that a row of `k` weights takes.
    pub(super) const fn row_bytes(self, k: usize) -> usize {
        match self {
            Self::Fives => k.div_ceil(5).next_multiple_of(self.group()),
            Self::Threes => k.div_ceil(BLOCK) * BLOCK_BYTES,
        }
    }

    /// Where byte `i` of row `r` is in a tile of `rows` rows.
    pub(super) const fn place(self, rows: usize, r: usize, i: usize) -> usize {
        let group = self.group();
        (i / group * rows + r) * group + i % group
    }

    /// Packs the first `k` weights of a canonical row; all of `row` is written.
    pub(super) fn pack(self, canonical: &[u8], k: usize, row: &mut [u8]) {
        match self {
            Self::Fives => {
                // Five bytes hold the weights of four.
                let whole = canonical[..(k / 4).min(canonical.len())].as_chunks::<5>().0;
                let (row, rest) = row.split_at_mut(4 * whole.len());
                for (bytes, row) in whole.iter().zip(row.as_chunks_mut::<4>().0) {
                    let codes = bytes.iter().rev().fold(0, |codes, byte| codes << 8 | u64::from(*byte));
                    *row = [0, 10, 20, 30].map(|shift| FIVE_TRITS[(codes >> shift) as usize % FIVE_TRITS.len()]);
                }
                let mut codes = codes_of(&canonical[whole.as_flattened().len()..], k - 20 * whole.len());
                let mut next = || codes.next().unwrap_or(1);
                rest.fill_with(|| five_trits(std::array::from_fn(|_| next())));
            }
            Self::Threes => {
                let mut codes = codes_of(canonical, k);
                let mut next = || codes.next().unwrap_or(1);
                for block in row.as_chunks_mut::<BLOCK_BYTES>().0 {
                    *block = [0; BLOCK_BYTES];
                    for group in 0..8 {
                        let (index, positive) = three_trits(std::array::from_fn(|_| next()));
                        block[0] |= u8::from(positive) << group;
                        block[1 + group / 2] |= index << (group % 2 * 4);
                    }
                }
            }
        }
    }

    /// Reads `k` weights of a packed row back into a canonical one.
    pub(super) fn unpack(self, row: &[u8], k: usize, canonical: &mut [u8]) {
        canonical.fill(ZERO_BYTE);
        let mut at = 0;
        let mut put = |code: u8| {
            if at < k {
                let (byte, shift) = (&mut canonical[at / 4], 2 * (at % 4));
                *byte = *byte & !(3 << shift) | code << shift;
            }
            at += 1;
        };
        match self {
            Self::Fives => row.iter().for_each(|byte| five_codes(*byte).into_iter().for_each(&mut put)),
            Self::Threes => {
                for block in row.as_chunks::<BLOCK_BYTES>().0 {
                    for group in 0..8 {
                        let index = block[1 + group / 2] >> (group % 2 * 4) & 15;
                        three_codes(index, block[0] >> group & 1 != 0).into_iter().for_each(&mut put);
                    }
                }
            }
        }
    }
}

/// The first `k` codes of a canonical row.
fn codes_of(canonical: &[u8], k: usize) -> impl Iterator<Item = u8> {
    canonical.iter().flat_map(|byte| [0, 2, 4, 6].map(|shift| byte >> shift & 3)).take(k)
}

/// One byte of five codes.
const fn five_trits([a, b, c, d, e]: [u8; 5]) -> u8 {
    if a == 3 || b == 3 || c == 3 || d == 3 || e == 3 {
        return u8::MAX;
    }
    a + 3 * (b + 3 * (c + 3 * (d + 3 * e)))
}

/// [`five_trits`] of five codes in ten bits.
static FIVE_TRITS: [u8; 1 << 10] = {
    let mut bytes = [0; 1 << 10];
    let mut bits = 0;
    while bits < bytes.len() {
        bytes[bits] = five_trits([
            (bits & 3) as u8,
            (bits >> 2 & 3) as u8,
            (bits >> 4 & 3) as u8,
            (bits >> 6 & 3) as u8,
            (bits >> 8 & 3) as u8,
        ]);
        bits += 1;
    }
    bytes
};

/// The five codes of a byte, all 3 if it is no byte of five weights.
fn five_codes(byte: u8) -> [u8; 5] {
    if byte > 242 { [3; 5] } else { [1, 3, 9, 27, 81].map(|power| byte / power % 3) }
}

/// The index of three codes, which is `|Σ trit(j) · 3ʲ|`, and whether that sum is not negative.
fn three_trits(codes: [u8; 3]) -> (u8, bool) {
    if codes.contains(&3) {
        return (15, true);
    }
    let number = codes[0] + 3 * codes[1] + 9 * codes[2];
    (number.abs_diff(ZEROS), number >= ZEROS)
}

/// The three codes of an index and a sign, all 3 if it is no index of three weights.
fn three_codes(index: u8, positive: bool) -> [u8; 3] {
    if index > ZEROS {
        return [3; 3];
    }
    let number = if positive { ZEROS + index } else { ZEROS - index };
    [1, 3, 9].map(|power| number / power % 3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_weights_are_a_sign_and_an_index_below_fourteen() {
        let mut seen = std::collections::BTreeSet::new();
        for number in 0..27 {
            let codes = [1, 3, 9].map(|power| number / power % 3);
            let (index, positive) = three_trits(codes);
            assert!(index <= 13 && seen.insert((index, positive)));
            assert_eq!(three_codes(index, positive), codes);
        }
        assert_eq!(three_trits([1; 3]), (0, true));
        assert_eq!(three_trits([0, 1, 2]), (8, true));
        assert_eq!(three_trits([2, 1, 0]), (8, false));
        for index in [14, 15] {
            assert_eq!(three_codes(index, true), [3; 3]);
        }
    }

    #[test]
    fn a_block_is_a_byte_of_signs_and_four_of_indices() {
        // Weights +1 −1 0 −1, then nothing: 1 − 3 = −2, and −1.
        let mut row = [0xff; 5];
        Dense::Threes.pack(&[0b00_01_00_10], 4, &mut row);
        assert_eq!(row, [0b1111_1100, 0x12, 0, 0, 0]);
    }

    #[test]
    fn a_code_that_is_no_weight_stays_one_and_takes_its_neighbours_along() {
        let source = [0b00_01_10_01, 0b01_11_10_10];
        let mut row = [0; 2];
        Dense::Fives.pack(&source, 6, &mut row);
        // Codes 1 2 1 0 2, and 2 with padding.
        assert_eq!(row, [1 + 2 * 3 + 9 + 2 * 81, 2 + 3 + 9 + 27 + 81]);
        Dense::Fives.pack(&source, 8, &mut row);
        assert_eq!(row[1], 255);
        for (dense, first) in [(Dense::Fives, 5), (Dense::Threes, 6)] {
            let (mut row, mut back) = (vec![0; dense.row_bytes(8)], [0; 2]);
            dense.pack(&source, 8, &mut row);
            dense.unpack(&row, 8, &mut back);
            for at in 0..8 {
                let code = |bytes: [u8; 2]| bytes[at / 4] >> (2 * (at % 4)) & 3;
                assert_eq!(code(back), if at < first { code(source) } else { 3 });
            }
        }
    }
}
