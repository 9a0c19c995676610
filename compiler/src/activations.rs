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
