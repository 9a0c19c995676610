//! How the int8 activations of one token are laid out for a kernel.
//!
//! Preparing costs O(k) once per token and is shared by all rows of all matrices that read the same activations.

/// The form in which a kernel family reads a column of `k` activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ActivationFormat {
    /// Four planes, plane j holding the activations of the j-th weight of every byte: `a[j], a[4+j], a[8+j] …`. A
    /// vector of any width then meets its weights without a shuffle. Planes are padded with zeros to 64 bytes, and
    /// columns to an odd number of cache lines: side by side they then fall into different sets of the cache.
    Planes,
    /// The same with five planes, for five weights in a byte.
    FivePlanes,
    /// For each pair of activations `(x, y)` a table over the 4-bit index `c₀ + 4·c₁` of two codes: entry
    /// `b = (c₀−1)·x + (c₁−1)·y + 254` in 0..=508, as 16 bytes `b mod 64` and then 16 bytes `b / 64`. Indices with a
    /// code 3 give 0. Two pairs (four activations, one weight byte) take 64 bytes.
    PairTables,
    /// For each three activations `(x, y, z)` a table over the index of [`Layout::Threes`](crate::Layout::Threes): entry i
    /// is `v = t₀·x + t₁·y + t₂·z`, of the trits with `t₀ + 3t₁ + 9t₂ = i`, as `v = l + 31·h + 16` with l and h signed bytes
    /// in −16..=15: 16 bytes l, then 16 bytes h. With all bits of both flipped, which makes them `−1 − l` and `−1 − h`, they
    /// are −v. Indices 14 and 15 hold what 0 holds. Activations are padded with zeros to whole blocks of 24 (eight tables,
    /// five weight bytes).
    TripleTables,
    /// As they are, padded with zeros to 64 bytes.
    Plain,
}

/// What [`ActivationFormat::PairTables`] adds to every sum so that entries are unsigned.
pub const PAIR_BIAS: i32 = 254;

impl ActivationFormat {
    /// Bytes of one prepared column of `k` activations, a multiple of 64.
    #[must_use]
    pub const fn bytes(self, k: usize) -> usize {
        match self {
            Self::Planes => planes_bytes(k, 4),
            Self::FivePlanes => planes_bytes(k, 5),
            Self::PairTables => k.div_ceil(4) * 64,
            Self::TripleTables => k.div_ceil(24) * 8 * 32,
            Self::Plain => k.next_multiple_of(64),
        }
    }

    /// Prepares one column.
    ///
    /// # Panics
    /// If `target` does not have `bytes(values.len())` bytes.
    pub fn prepare(self, values: &[i8], target: &mut [u8]) {
        assert_eq!(target.len(), self.bytes(values.len()), "prepare: bytes of a column");
        match self {
            Self::Planes => planes::<4>(values, target),
            Self::FivePlanes => planes::<5>(values, target),
            Self::PairTables => pair_tables(values, target),
            Self::TripleTables => triple_tables(values, target),
            Self::Plain => {
                let (bytes, padding) = target.split_at_mut(values.len());
                bytes.iter_mut().zip(values).for_each(|(byte, value)| *byte = value.cast_unsigned());
                padding.fill(0);
            }
        }
    }
}

/// Bytes of one of the planes that `k` activations are dealt out to.
pub(crate) const fn plane_bytes(k: usize, planes: usize) -> usize {
    k.div_ceil(planes).next_multiple_of(64)
}

/// Bytes of all planes and as much padding as makes an odd number of cache lines.
const fn planes_bytes(k: usize, planes: usize) -> usize {
    64 * ((planes * plane_bytes(k, planes) / 64) | 1)
}

fn planes<const N: usize>(values: &[i8], target: &mut [u8]) {
    let (whole, tail) = values.as_chunks::<N>();
    let plane_bytes = plane_bytes(values.len(), N);
    let (planes, padding) = target.split_at_mut(N * plane_bytes);
    padding.fill(0);
    for (j, plane) in planes.chunks_exact_mut(plane_bytes).enumerate() {
        let (bytes, rest) = plane.split_at_mut(whole.len());
        for (byte, values) in bytes.iter_mut().zip(whole) {
            *byte = values[j].cast_unsigned();
        }
        rest.fill(0);
        if let (Some(byte), Some(value)) = (rest.first_mut(), tail.get(j)) {
            *byte = value.cast_unsigned();
        }
    }
}

fn pair_tables(values: &[i8], target: &mut [u8]) {
    for (i, table) in target.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let [x, y] = [2 * i, 2 * i + 1].map(|at| values.get(at).map_or(0, |v| i16::from(*v)));
        *table = [0; 32];
        for (c1, row) in [-y, 0, y].into_iter().enumerate() {
            for (c0, sum) in [row - x, row, row + x].into_iter().enumerate() {
                let biased = sum + PAIR_BIAS as i16;
                table[4 * c1 + c0] = (biased & 63) as u8;
                table[16 + 4 * c1 + c0] = (biased >> 6) as u8;
            }
        }
    }
}

/// What the high part of [`ActivationFormat::TripleTables`] counts.
pub const TRIPLE_BASE: i32 = 31;

/// Trit j of every index of [`ActivationFormat::TripleTables`].
pub(crate) const TRIPLES: [[i16; 16]; 3] = {
    let mut trits = [[0; 16]; 3];
    let mut index = 0;
    while index <= 13 {
        // In base 3 the digits of `index + 1 + 3 + 9` are the trits plus 1.
        let number = index as i16 + 13;
        (trits[0][index], trits[1][index], trits[2][index]) = (number % 3 - 1, number / 3 % 3 - 1, number / 9 - 1);
        index += 1;
    }
    trits
};

fn triple_tables(values: &[i8], target: &mut [u8]) {
    // Sums are made positive by a multiple of the base that is larger than any, so that a division is a multiplication.
    const BASE: u16 = TRIPLE_BASE as u16;
    const LIFT: u16 = 13;
    const RECIPROCAL: u32 = (1 << 16) / BASE as u32 + 1;
    for (i, table) in target.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let [x, y, z] = std::array::from_fn(|j| values.get(3 * i + j).map_or(0, |value| i16::from(*value)));
        for index in 0..16 {
            let sum = TRIPLES[0][index] * x + TRIPLES[1][index] * y + TRIPLES[2][index] * z;
            let lifted = sum.wrapping_add_unsigned(LIFT * BASE).cast_unsigned();
            let high = ((u32::from(lifted) * RECIPROCAL) >> 16) as u16;
            table[index] = (lifted.wrapping_sub(high.wrapping_mul(BASE)) as u8).wrapping_sub(16);
            table[16 + index] = (high as u8).wrapping_sub(LIFT as u8);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn planes_hold_every_fourth_activation_and_zeros() {
        let values: Vec<i8> = (1..=10).collect();
        let mut target = vec![0xff; ActivationFormat::Planes.bytes(10)];
        ActivationFormat::Planes.prepare(&values, &mut target);
        let plane = |j: usize| &target[64 * j..][..64];
        assert_eq!((&plane(0)[..3], &plane(1)[..3]), (&[1, 5, 9][..], &[2, 6, 10][..]));
        assert_eq!((&plane(2)[..3], &plane(3)[..3]), (&[3, 7, 0][..], &[4, 8, 0][..]));
        assert!((0..4).all(|j| plane(j)[3..].iter().all(|b| *b == 0)));
    }

    #[test]
    fn five_planes_hold_every_fifth_activation_and_zeros() {
        let values: Vec<i8> = (1..=13).collect();
        let mut target = vec![0xff; ActivationFormat::FivePlanes.bytes(13)];
        ActivationFormat::FivePlanes.prepare(&values, &mut target);
        assert_eq!(target.len(), 5 * 64, "already an odd number of cache lines");
        let first: Vec<_> = (0..5).map(|j| &target[64 * j..][..4]).collect();
        assert_eq!(first, [[1, 6, 11, 0], [2, 7, 12, 0], [3, 8, 13, 0], [4, 9, 0, 0], [5, 10, 0, 0]]);
    }

    #[test]
    fn tables_hold_every_sum_of_three_trits_and_its_opposite() {
        for values in [[127, 127, 127], [-127, -127, -127], [127, -127, 66], [124, 124, 124], [-1, 1, 0], [5, -90, 0]] {
            let mut target = vec![0x55; ActivationFormat::TripleTables.bytes(27)];
            let repeated: Vec<i8> = values.into_iter().cycle().take(26).collect();
            ActivationFormat::TripleTables.prepare(&repeated, &mut target);
            assert_eq!(target.len(), 16 * 32);
            for (i, table) in target.as_chunks::<32>().0.iter().enumerate() {
                let at = |j: usize| repeated.get(3 * i + j).map_or(0, |value| i32::from(*value));
                for index in 0..14 {
                    let trit = |j: u32| (index + 13) / 3_i32.pow(j) % 3 - 1;
                    let sum = trit(0) * at(0) + trit(1) * at(1) + trit(2) * at(2);
                    let parts = [table[index as usize], table[16 + index as usize]];
                    for (flip, expected) in [(0, sum), (0xff, -sum)] {
                        let [low, high] = parts.map(|part| i32::from((part ^ flip).cast_signed()));
                        assert!((-16..16).contains(&low) && (-16..16).contains(&high), "{low} {high}");
                        assert_eq!(low + TRIPLE_BASE * high + 16, expected, "{values:?} {index}");
                    }
                }
                assert_eq!((table[14], table[15], table[30]), (table[0], table[0], table[16]));
            }
        }
    }

    #[test]
    fn tables_hold_every_sum_of_two_trits() {
        let values = [127, -127, 5];
        let mut target = vec![0xff; ActivationFormat::PairTables.bytes(3)];
        ActivationFormat::PairTables.prepare(&values, &mut target);
        for (pair, table) in target.as_chunks::<32>().0.iter().enumerate() {
            let [x, y] = [2 * pair, 2 * pair + 1].map(|at| values.get(at).map_or(0, |v| i32::from(*v)));
            for c0 in 0..3 {
                for c1 in 0..3 {
                    let index = (c0 + 4 * c1) as usize;
                    let entry = i32::from(table[index]) + 64 * i32::from(table[16 + index]);
                    assert_eq!(entry - PAIR_BIAS, (c0 - 1) * x + (c1 - 1) * y);
                }
            }
        }
    }
}
