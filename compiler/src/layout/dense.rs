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
    /// Bytes that a row of `k` weights takes: whole blocks.
    pub(super) const fn row_bytes(self, k: usize) -> usize {
        match self {
            Self::Fives => k.div_ceil(5).next_multiple_of(4),
            Self::Threes => k.div_ceil(BLOCK) * BLOCK_BYTES,
        }
    }

    /// Packs the first `k` weights of a canonical row, or of an empty one; all of `row` is written.
    pub(super) fn pack(self, canonical: &[u8], k: usize, row: &mut [u8]) {
        match self {
            Self::Fives => pack_blocks::<5, 4>(canonical, k, row, |codes| {
                [0, 10, 20, 30].map(|shift| FIVE_TRITS[(codes >> shift) as usize % FIVE_TRITS.len()])
            }),
            Self::Threes => pack_blocks::<6, BLOCK_BYTES>(canonical, k, row, |codes| {
                let mut block = [0; BLOCK_BYTES];
                for group in 0..8 {
                    let three = THREE_TRITS[(codes >> (6 * group)) as usize % THREE_TRITS.len()];
                    block[0] |= three >> 4 << group;
                    block[1 + group / 2] |= (three & 15) << (group % 2 * 4);
                }
                block
            }),
        }
    }

    /// Reads `k` weights of a packed row back into a canonical one.
    pub(super) fn unpack(self, row: &[u8], k: usize, canonical: &mut [u8]) {
        match self {
            Self::Fives => unpack_blocks::<5, 4>(row, k, canonical, |block| {
                block.iter().rev().fold(0, |codes, byte| codes << 10 | u64::from(FIVE_CODES[usize::from(*byte)]))
            }),
            Self::Threes => unpack_blocks::<6, BLOCK_BYTES>(row, k, canonical, |block| {
                (0..8).rev().fold(0, |codes, group| {
                    let index = block[1 + group / 2] >> (group % 2 * 4) & 15;
                    let three = index | (block[0] >> group & 1) << 4;
                    codes << 6 | u64::from(THREE_CODES[usize::from(three)])
                })
            }),
        }
    }
}

/// Packs blocks of `C` canonical bytes into `P` each, of codes as one number, the first lowest.
fn pack_blocks<const C: usize, const P: usize>(
    canonical: &[u8],
    k: usize,
    row: &mut [u8],
    pack: impl Fn(u64) -> [u8; P],
) {
    let pack = |bytes: &[u8; C]| pack(bytes.iter().rev().fold(0, |codes, byte| codes << 8 | u64::from(*byte)));
    let whole = canonical[..(k / 4).min(canonical.len())].as_chunks::<C>().0;
    let (of_whole, rest) = row.as_chunks_mut::<P>().0.split_at_mut(whole.len());
    of_whole.iter_mut().zip(whole).for_each(|(target, bytes)| *target = pack(bytes));
    rest.fill(pack(&[ZERO_BYTE; C]));
    if let Some(first) = rest.first_mut() {
        let (mut bytes, left) = ([ZERO_BYTE; C], &canonical[whole.as_flattened().len()..]);
        bytes[..left.len()].copy_from_slice(left);
        end(&mut bytes, k - 4 * C * whole.len());
        *first = pack(&bytes);
    }
}

/// The way back.
fn unpack_blocks<const C: usize, const P: usize>(
    row: &[u8],
    k: usize,
    canonical: &mut [u8],
    unpack: impl Fn(&[u8; P]) -> u64,
) {
    let (whole, rest) = canonical.as_chunks_mut::<C>();
    let mut blocks = row.as_chunks::<P>().0.iter().map(|block| unpack(block).to_le_bytes());
    for (target, bytes) in whole.iter_mut().zip(blocks.by_ref()) {
        target.copy_from_slice(&bytes[..C]);
    }
    if let Some(bytes) = blocks.next() {
        rest.copy_from_slice(&bytes[..rest.len()]);
    }
    end(canonical, k);
}

/// Makes what is past the first `k` codes of a byte trit 0.
fn end(canonical: &mut [u8], k: usize) {
    if let Some(byte) = canonical.get_mut(k / 4) {
        let kept = (1 << (2 * (k % 4))) - 1;
        *byte = *byte & kept | ZERO_BYTE & !kept;
    }
}

/// One byte of five codes.
const fn five_trits([a, b, c, d, e]: [u8; 5]) -> u8 {
    if a == 3 || b == 3 || c == 3 || d == 3 || e == 3 {
        return u8::MAX;
    }
    a + 3 * (b + 3 * (c + 3 * (d + 3 * e)))
}

/// The five codes of a byte, all 3 if it is no byte of five weights.
const fn five_codes(byte: u8) -> [u8; 5] {
    if byte > 242 {
        return [3; 5];
    }
    [byte % 3, byte / 3 % 3, byte / 9 % 3, byte / 27 % 3, byte / 81]
}

/// The index of three codes, which is `|Σ trit(j) · 3ʲ|`, and in bit 4 whether that sum is not negative.
const fn three_trits([a, b, c]: [u8; 3]) -> u8 {
    if a == 3 || b == 3 || c == 3 {
        return 0x1f;
    }
    let number = a + 3 * (b + 3 * c);
    number.abs_diff(ZEROS) | ((number >= ZEROS) as u8) << 4
}

/// The three codes of such an index, all 3 if it is no index of three weights.
const fn three_codes(three: u8) -> [u8; 3] {
    let index = three & 15;
    if index > ZEROS {
        return [3; 3];
    }
    let number = if three >> 4 == 0 { ZEROS - index } else { ZEROS + index };
    [number % 3, number / 3 % 3, number / 9]
}

/// Code `at` of a number of codes.
const fn code(codes: usize, at: usize) -> u8 {
    (codes >> (2 * at) & 3) as u8
}

/// Codes as one number, the first lowest.
const fn number<const N: usize>(codes: [u8; N]) -> u16 {
    let (mut number, mut at) = (0, N);
    while at > 0 {
        at -= 1;
        number = number << 2 | codes[at] as u16;
    }
    number
}

/// [`five_trits`] of five codes in ten bits.
static FIVE_TRITS: [u8; 1 << 10] = {
    let (mut bytes, mut codes) = ([0; 1 << 10], 0);
    while codes < bytes.len() {
        bytes[codes] = five_trits([code(codes, 0), code(codes, 1), code(codes, 2), code(codes, 3), code(codes, 4)]);
        codes += 1;
    }
    bytes
};

/// [`five_codes`] of a byte in ten bits.
static FIVE_CODES: [u16; 1 << 8] = {
    let (mut codes, mut byte) = ([0; 1 << 8], 0);
    while byte < codes.len() {
        codes[byte] = number(five_codes(byte as u8));
        byte += 1;
    }
    codes
};

/// [`three_trits`] of three codes in six bits.
static THREE_TRITS: [u8; 1 << 6] = {
    let (mut threes, mut codes) = ([0; 1 << 6], 0);
    while codes < threes.len() {
        threes[codes] = three_trits([code(codes, 0), code(codes, 1), code(codes, 2)]);
        codes += 1;
    }
    threes
};

/// [`three_codes`] in six bits.
static THREE_CODES: [u16; 1 << 5] = {
    let (mut codes, mut three) = ([0; 1 << 5], 0);
    while three < codes.len() {
        codes[three] = number(three_codes(three as u8));
        three += 1;
    }
    codes
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_weights_are_a_sign_and_an_index_below_fourteen() {
        let mut seen = std::collections::BTreeSet::new();
        for number in 0..27 {
            let codes = [1, 3, 9].map(|power| number / power % 3);
            let three = three_trits(codes);
            assert!(three & 15 <= 13 && seen.insert(three));
            assert_eq!(three_codes(three), codes);
        }
        assert_eq!(three_trits([1; 3]), 1 << 4);
        assert_eq!(three_trits([0, 1, 2]), 1 << 4 | 8);
        assert_eq!(three_trits([2, 1, 0]), 8);
        for index in [14, 15] {
            assert_eq!(three_codes(1 << 4 | index), [3; 3]);
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
        let mut row = [0; 4];
        Dense::Fives.pack(&source, 6, &mut row);
        // Codes 1 2 1 0 2, 2 with padding, and padding.
        assert_eq!(row, [1 + 2 * 3 + 9 + 2 * 81, 2 + 3 + 9 + 27 + 81, 121, 121]);
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
