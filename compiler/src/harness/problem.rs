//! What kernels are run on: matrices and activations made from a seed, and what the reference computes from them.

use std::fmt;

use ternion_kernels_ref::{PackedMatrix, QuantizedRow, SplitMix64, TernaryMatrix, Trit, gemm};

use crate::Layout;
use crate::layout::transpose_columns;

/// The numbers of a [`Problem`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Data {
    /// `random`: every weight and every activation.
    Random,
    /// `bounds`: the first row all +1, the second all −1, the first column all 127; the rest random.
    Bounds,
    /// `same-sign`: rows of +1 and of −1 by turns, columns of 127 and of −127 by turns: every partial sum is as large
    /// as it can be.
    SameSign,
    /// `full-parts`: as `same-sign`, but activations are 127 and 66 by turns. The table entry of such a pair in
    /// [`PairTables`](crate::ActivationFormat::PairTables) is 193 + 254 = 6·64 + 63: the largest low part.
    FullParts,
    /// `full-triples`: as `same-sign`, but activations are 124. Three of them are 372 = 12·31: with that sum the parts in
    /// [`TripleTables`](crate::ActivationFormat::TripleTables) are −16, and 15 where its sign is the other one.
    FullTriples,
    /// `zeros`: rows of 0 and random ones by turns, columns of 0 and random ones by turns.
    Zeros,
    /// `identity`: weight `(r, c)` is +1 where `c mod m = r` and 0 elsewhere; random activations.
    Identity,
    /// `one-hot`: one activation of each column is ±127, all others are 0; random weights. Results are single weights.
    OneHot,
    /// `alternating`: +1 and −1 by turns along both k and m, activations 127 and −127 by turns: the largest sums with
    /// both signs in every table and every pair.
    Alternating,
    /// `invalid`: weight bytes of any value. Code 3 is no weight, so results may be anything; that kernels stay within
    /// their buffers holds all the same.
    InvalidCodes,
}

impl Data {
    /// All kinds of data.
    pub const ALL: [Self; 10] = [
        Self::Random,
        Self::Bounds,
        Self::SameSign,
        Self::FullParts,
        Self::FullTriples,
        Self::Zeros,
        Self::Identity,
        Self::OneHot,
        Self::Alternating,
        Self::InvalidCodes,
    ];
}

impl fmt::Display for Data {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Random => "random",
            Self::Bounds => "bounds",
            Self::SameSign => "same-sign",
            Self::FullParts => "full-parts",
            Self::FullTriples => "full-triples",
            Self::Zeros => "zeros",
            Self::Identity => "identity",
            Self::OneHot => "one-hot",
            Self::Alternating => "alternating",
            Self::InvalidCodes => "invalid",
        })
    }
}

/// A matrix `[m, k]`, `n` columns of activations, and their product by `kernels-ref`. All of it follows from the five
/// values that [`Display`](fmt::Display) prints.
#[derive(Clone, Debug)]
pub struct Problem {
    data: Data,
    seed: u64,
    weights: TernaryMatrix,
    columns: Vec<QuantizedRow>,
    expected: Vec<i32>,
}

impl Problem {
    /// Makes the numbers and computes their product, in about `m·k·n` steps.
    #[must_use]
    pub fn new(data: Data, m: usize, k: usize, n: usize, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let weights = TernaryMatrix::from_fn(m, k, |row, column| match (data, row) {
            (Data::Bounds, 0) => Trit::Plus,
            (Data::Bounds, 1) => Trit::Minus,
            (Data::SameSign | Data::FullParts | Data::FullTriples, _) => sign(row),
            (Data::Zeros, _) if row.is_multiple_of(2) => Trit::Zero,
            (Data::Identity, _) if column % m == row => Trit::Plus,
            (Data::Identity, _) => Trit::Zero,
            (Data::Alternating, _) => sign(row + column),
            _ => random.trit(),
        });
        let columns: Vec<_> = (0..n).map(|column| activations(data, k, column, &mut random)).collect();
        let expected = gemm::gemm(weights.view(), &columns);
        Self { data, seed, weights, columns, expected }
    }

    /// Rows of the matrix.
    #[must_use]
    pub fn m(&self) -> usize {
        self.weights.view().m()
    }

    /// Length of a row.
    #[must_use]
    pub fn k(&self) -> usize {
        self.weights.view().k()
    }

    /// The columns of activations.
    #[must_use]
    pub fn columns(&self) -> &[QuantizedRow] {
        &self.columns
    }

    /// What its numbers are.
    #[must_use]
    pub const fn data(&self) -> Data {
        self.data
    }

    /// The weights.
    #[must_use]
    pub fn weights(&self) -> PackedMatrix<'_> {
        self.weights.view()
    }

    /// The seed.
    #[must_use]
    pub const fn seed(&self) -> u64 {
        self.seed
    }

    /// The weights in `layout`; with [`Data::InvalidCodes`] as many bytes of any value.
    #[must_use]
    pub fn pack(&self, layout: Layout) -> Vec<u8> {
        self.pack_matrix(self.weights.view(), layout)
    }

    /// As [`pack`](Self::pack), of the transposed matrix.
    #[must_use]
    pub fn pack_transposed(&self, layout: Layout) -> Vec<u8> {
        let (m, k) = (self.m(), self.k());
        let mut transposed = vec![0; k * PackedMatrix::row_bytes(m)];
        transpose_columns(self.weights.view(), 0..k, &mut transposed);
        self.pack_matrix(PackedMatrix::new(k, m, &transposed).expect("its size"), layout)
    }

    fn pack_matrix(&self, matrix: PackedMatrix<'_>, layout: Layout) -> Vec<u8> {
        let mut bytes = layout.pack(matrix);
        if self.data == Data::InvalidCodes {
            let mut random = Random::new(self.seed);
            bytes.fill_with(|| random.next() as u8);
        }
        bytes
    }

    /// The product, `[n, m]`, one column after the other; `None` with [`Data::InvalidCodes`].
    #[must_use]
    pub fn expected(&self) -> Option<&[i32]> {
        (self.data != Data::InvalidCodes).then_some(&self.expected)
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { data, seed, columns, .. } = self;
        write!(f, "data={data} m={} k={} n={} seed={seed:#x}", self.m(), self.k(), columns.len())
    }
}

/// +1 and −1 by turns.
fn sign(index: usize) -> Trit {
    if index.is_multiple_of(2) { Trit::Plus } else { Trit::Minus }
}

fn activations(data: Data, k: usize, column: usize, random: &mut Random) -> QuantizedRow {
    let sign = if column.is_multiple_of(2) { 1 } else { -1 };
    let hot = (random.next() % k.max(1) as u64) as usize;
    let value = |at: usize| match data {
        Data::Bounds if column == 0 => 127,
        Data::SameSign => 127 * sign,
        Data::FullParts => [127, 66][at % 2] * sign,
        Data::FullTriples => 124 * sign,
        Data::Zeros if column.is_multiple_of(2) => 0,
        Data::OneHot => i8::from(at == hot) * 127 * sign,
        Data::Alternating => [127, -127][at % 2] * sign,
        _ => ((random.next() % 255) as i16 - 127) as i8,
    };
    QuantizedRow::from_values((0..k).map(value).collect()).expect("no value is -128")
}

/// Random words, and random trits cut out of them.
pub(super) struct Random {
    words: SplitMix64,
    /// What is left of a number that trits are taken from: a fraction of 64 bits.
    fraction: u64,
    /// Trits that may still be taken from it; each takes log₂ 3 bits.
    left: u32,
}

impl Random {
    pub(super) const fn new(seed: u64) -> Self {
        Self { words: SplitMix64::new(seed), fraction: 0, left: 0 }
    }

    pub(super) const fn next(&mut self) -> u64 {
        self.words.next_u64()
    }

    fn trit(&mut self) -> Trit {
        if self.left == 0 {
            (self.fraction, self.left) = (self.next(), 16);
        }
        self.left -= 1;
        let tripled = u128::from(self.fraction) * 3;
        self.fraction = tripled as u64;
        Trit::ALL[(tripled >> 64) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extreme_data_reaches_the_largest_sums() {
        for data in [Data::SameSign, Data::Alternating] {
            let problem = Problem::new(data, 2, 100, 2, 1);
            assert_eq!(problem.expected(), Some(&[12_700, -12_700, -12_700, 12_700][..]), "{data}");
        }
        assert_eq!(Problem::new(Data::Bounds, 2, 100, 1, 1).expected(), Some(&[12_700, -12_700][..]));
        assert_eq!(Problem::new(Data::FullParts, 1, 100, 1, 1).expected(), Some(&[193 * 50][..]));
        assert_eq!(Problem::new(Data::FullTriples, 1, 99, 1, 1).expected(), Some(&[372 * 33][..]));
    }

    #[test]
    fn structured_data_gives_results_that_can_be_told_by_hand() {
        let hot = Problem::new(Data::OneHot, 50, 64, 1, 3);
        assert!(hot.expected().unwrap().iter().all(|sum| [-127, 0, 127].contains(sum)));
        let identity = Problem::new(Data::Identity, 64, 64, 1, 4);
        let values: Vec<_> = identity.columns()[0].values().iter().map(|value| i32::from(*value)).collect();
        assert_eq!(identity.expected(), Some(values.as_slice()));
        let zeros = Problem::new(Data::Zeros, 4, 64, 2, 5);
        assert_eq!(zeros.expected().unwrap()[..4], [0; 4]);
        assert_eq!(zeros.expected().unwrap()[4], 0);
    }

    #[test]
    fn invalid_codes_have_no_expected_results() {
        let problem = Problem::new(Data::InvalidCodes, 8, 512, 1, 6);
        assert_eq!(problem.expected(), None);
        assert!(
            problem.pack(Layout::Canonical).iter().any(|byte| ternion_kernels_ref::matrix::has_invalid_code(*byte))
        );
    }

    #[test]
    fn a_problem_prints_what_it_is_made_of() {
        let problem = Problem::new(Data::OneHot, 3, 20, 2, 255);
        assert_eq!(problem.to_string(), "data=one-hot m=3 k=20 n=2 seed=0xff");
    }
}
