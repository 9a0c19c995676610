//! How a packed matrix lies in memory, as a value.
//!
//! Most layouts hold the bytes of the canonical packing (four k-neighbours in a byte), only their order differs; two take
//! less than two bits a weight ([`dense`]). Rows come in tiles; a tile is one sequential stream, which is what memory and
//! its prefetchers like best. Rows past `m` and columns past `k` are padding of trit 0.

mod dense;
mod repack;

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use ternion_kernels_ref::matrix::ZERO_BYTE;
use ternion_kernels_ref::{InvalidCode, PackedMatrix, TernaryMatrix};

use self::dense::Dense;

/// The order of the bytes of a packed `[m, k]` matrix. Prints to one word and parses back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Layout {
    /// `canonical`: row after row, no padding.
    Canonical,
    /// `rows4x64`: tiles of `rows` rows; within a tile, `chunk` bytes of each row in turn.
    Rows {
        /// Rows of a tile.
        rows: u8,
        /// Bytes of one row before the next row's: 16, 32 or 64.
        chunk: u8,
    },
    /// `lanes32` and `lanes16x4`: tiles of `rows` rows, transposed: a group of 1 or 4 bytes of each row in turn, so that
    /// a vector lane of 8 or 32 bits is a row.
    Lanes {
        /// Rows of a tile; a multiple of 16 bytes of them lies together.
        rows: u8,
        /// Bytes of one row before the next row's: 1 or 4.
        group: u8,
    },
    /// `fives16`: as `lanes16x4`, but a byte holds five weights instead of four: `Σ code(5i + j) · 3ʲ`, at most 242.
    Fives {
        /// Rows of a tile, a multiple of 4.
        rows: u8,
    },
    /// `threes64`: as `lanes64`, but 24 weights of a row take five bytes: a sign for each three, then the indices of two
    /// threes to a byte. The index is `|Σ trit(3i + j) · 3ʲ|`, at most 13; bit i of the signs says that the sum is not
    /// negative.
    Threes {
        /// Rows of a tile, a multiple of 16.
        rows: u8,
    },
    /// `columns64`: row after row, each padded to 64 bytes; within every `chunk` bytes, which hold `4 · chunk` weights, in
    /// the order in which `sparse-columns` meets them. Of a transposed matrix, since a row here is a column there: field j
    /// of byte `16l + 4x + i` is weight `(4x + j) · chunk / 4 + 4l + i`, with i, j and x below 4.
    Columns {
        /// Bytes of a vector: 16, 32 or 64.
        chunk: u8,
    },
}

impl Layout {
    /// Rows that are stored together; `m` is padded to a multiple of it.
    #[must_use]
    pub const fn tile_rows(self) -> usize {
        match self {
            Self::Canonical | Self::Columns { .. } => 1,
            Self::Rows { rows, .. } | Self::Lanes { rows, .. } | Self::Fives { rows } | Self::Threes { rows } => {
                rows as usize
            }
        }
    }

    /// Number of tiles of a matrix with `m` rows.
    #[must_use]
    pub const fn tiles(self, m: usize) -> usize {
        m.div_ceil(self.tile_rows())
    }

    /// Bytes that one row of `k` weights takes, padding included.
    #[must_use]
    pub const fn row_bytes(self, k: usize) -> usize {
        let bytes = PackedMatrix::row_bytes(k);
        match self {
            Self::Canonical => bytes,
            Self::Rows { chunk: part, .. } | Self::Lanes { group: part, .. } => bytes.next_multiple_of(part as usize),
            Self::Fives { .. } => Dense::Fives.row_bytes(k),
            Self::Threes { .. } => Dense::Threes.row_bytes(k),
            Self::Columns { .. } => bytes.next_multiple_of(64),
        }
    }

    /// Bytes of one tile.
    #[must_use]
    pub const fn tile_bytes(self, k: usize) -> usize {
        self.tile_rows() * self.row_bytes(k)
    }

    /// Bytes of a whole `[m, k]` matrix, or `None` if that overflows.
    #[must_use]
    pub const fn bytes(self, m: usize, k: usize) -> Option<usize> {
        if k > usize::MAX / 1024 {
            return None;
        }
        self.tiles(m).checked_mul(self.tile_bytes(k))
    }

    /// Packs the tiles `tiles` of `source` into `target`, the bytes of exactly these tiles. Disjoint ranges can be
    /// packed in parallel.
    ///
    /// # Panics
    /// If `target` does not have `tiles.len() · tile_bytes(k)` bytes or a tile lies past the last.
    pub fn pack_tiles(self, source: PackedMatrix<'_>, tiles: Range<usize>, target: &mut [u8]) {
        assert!(tiles.end <= self.tiles(source.m()), "pack_tiles: tiles of the matrix");
        assert_eq!(target.len(), tiles.len() * self.tile_bytes(source.k()), "pack_tiles: bytes of the tiles");
        let tile_rows = self.tile_rows();
        for (tile, target) in tiles.zip(target.chunks_exact_mut(self.tile_bytes(source.k()).max(1))) {
            let rows = tile * tile_rows..source.m().min((tile + 1) * tile_rows);
            match self {
                Self::Canonical => target.copy_from_slice(source.row(tile)),
                Self::Columns { chunk } => reorder_columns(source.row(tile), target, chunk.into(), true),
                Self::Rows { chunk: part, .. } | Self::Lanes { group: part @ 2.., .. } => {
                    target.fill(ZERO_BYTE);
                    for (r, row) in rows.enumerate() {
                        for (c, bytes) in source.row(row).chunks(part.into()).enumerate() {
                            target[(c * tile_rows + r) * usize::from(part)..][..bytes.len()].copy_from_slice(bytes);
                        }
                    }
                }
                Self::Fives { .. } => pack_dense(Dense::Fives, source, rows, tile_rows, target),
                Self::Threes { .. } => pack_dense(Dense::Threes, source, rows, tile_rows, target),
                Self::Lanes { .. } => {
                    if rows.len() < tile_rows {
                        target.fill(ZERO_BYTE);
                    }
                    for (r, row) in rows.enumerate() {
                        for (byte, target) in source.row(row).iter().zip(target[r..].iter_mut().step_by(tile_rows)) {
                            *target = *byte;
                        }
                    }
                }
            }
        }
    }

    /// Packs a whole matrix.
    #[must_use]
    pub fn pack(self, source: PackedMatrix<'_>) -> Vec<u8> {
        let tiles = self.tiles(source.m());
        let mut bytes = vec![0; tiles * self.tile_bytes(source.k())];
        self.pack_tiles(source, 0..tiles, &mut bytes);
        bytes
    }

    /// Reads rows `rows` of an `[m, k]` matrix back into the canonical order; `target` has
    /// `rows.len() · ⌈k/4⌉` bytes. Disjoint ranges can be unpacked in parallel.
    ///
    /// # Panics
    /// If a length does not fit.
    pub fn unpack_rows(self, m: usize, k: usize, bytes: &[u8], rows: Range<usize>, target: &mut [u8]) {
        assert_eq!(Some(bytes.len()), self.bytes(m, k), "unpack_rows: bytes of the matrix");
        assert!(rows.end <= m, "unpack_rows: rows of the matrix");
        let row_bytes = PackedMatrix::row_bytes(k);
        assert_eq!(target.len(), rows.len() * row_bytes, "unpack_rows: bytes of the rows");
        let tile_rows = self.tile_rows();
        for (row, target) in rows.zip(target.chunks_exact_mut(row_bytes.max(1))) {
            let tile = &bytes[row / tile_rows * self.tile_bytes(k)..][..self.tile_bytes(k)];
            let r = row % tile_rows;
            match self {
                Self::Canonical => target.copy_from_slice(tile),
                Self::Columns { chunk } => {
                    let mut row = vec![0; tile.len()];
                    reorder_columns(tile, &mut row, chunk.into(), false);
                    target.copy_from_slice(&row[..row_bytes]);
                }
                // What most prepared files have, and what models wait for when they are loaded.
                Self::Lanes { group: 4, .. } => {
                    let (whole, tail) = target.as_chunks_mut::<4>();
                    let mut groups = tile.as_chunks::<4>().0[r..].iter().step_by(tile_rows);
                    whole.iter_mut().zip(groups.by_ref()).for_each(|(target, bytes)| *target = *bytes);
                    if let Some(bytes) = groups.next().filter(|_| !tail.is_empty()) {
                        tail.copy_from_slice(&bytes[..tail.len()]);
                    }
                }
                Self::Rows { chunk: part, .. } | Self::Lanes { group: part @ 2.., .. } => {
                    for (c, target) in target.chunks_mut(part.into()).enumerate() {
                        target.copy_from_slice(&tile[(c * tile_rows + r) * usize::from(part)..][..target.len()]);
                    }
                }
                Self::Fives { .. } => unpack_dense(Dense::Fives, tile, r, tile_rows, k, target),
                Self::Threes { .. } => unpack_dense(Dense::Threes, tile, r, tile_rows, k, target),
                Self::Lanes { .. } => {
                    for (target, byte) in target.iter_mut().zip(tile[r..].iter().step_by(tile_rows)) {
                        *target = *byte;
                    }
                }
            }
        }
    }

    /// Reads a whole `[m, k]` matrix back.
    ///
    /// # Errors
    /// The first weight whose code is 3.
    ///
    /// # Panics
    /// If `bytes` does not have [`bytes(m, k)`](Self::bytes) bytes.
    pub fn unpack(self, m: usize, k: usize, bytes: &[u8]) -> Result<TernaryMatrix, InvalidCode> {
        let mut canonical = vec![0; m * PackedMatrix::row_bytes(k)];
        self.unpack_rows(m, k, bytes, 0..m, &mut canonical);
        TernaryMatrix::from_bytes(m, k, canonical)
    }
}

/// Brings a row into the order of [`Layout::Columns`] (`forth`), or back. What the target has more than the source is
/// filled with trit 0.
fn reorder_columns(source: &[u8], target: &mut [u8], chunk: usize, forth: bool) {
    let byte = |at: usize| source.get(at).copied().unwrap_or(ZERO_BYTE);
    for start in (0..target.len()).step_by(chunk) {
        // Four bytes whose 16 codes change places among them: of weights `(4x + j) · chunk / 4 + 4l + 0..4`, for all j.
        for (l, x) in (0..chunk / 16).flat_map(|l| (0..4).map(move |x| (l, x))) {
            let canonical = |j: usize| start + (4 * x + j) * chunk / 16 + l;
            let ordered = |i: usize| start + 16 * l + 4 * x + i;
            let codes = std::array::from_fn(|at| if forth { byte(canonical(at)) } else { byte(ordered(at)) });
            for (at, codes) in transpose_codes(codes).into_iter().enumerate() {
                target[if forth { ordered(at) } else { canonical(at) }] = codes;
            }
        }
    }
}

/// Transposes a 4×4 matrix of two-bit codes: code `j` of byte `i` becomes code `i` of byte `j`.
#[inline(always)]
#[must_use]
pub fn transpose_codes(bytes: [u8; 4]) -> [u8; 4] {
    let mut x = u32::from_le_bytes(bytes);
    // Swap the off-diagonal codes of each 2×2 block, then the off-diagonal blocks.
    let t = (x ^ x >> 6) & 0x00cc_00cc;
    x ^= t ^ t << 6;
    let t = (x ^ x >> 12) & 0x0000_f0f0;
    x ^= t ^ t << 12;
    x.to_le_bytes()
}

/// Columns `columns` of a matrix as rows in canonical order, `columns.len() · ⌈m/4⌉` bytes: what is packed for kernels
/// that read columns as records. Disjoint ranges can be transposed in parallel; ranges that begin at a multiple of 4 are
/// the fastest.
///
/// # Panics
/// If `target` has another length or a column lies past the last.
pub fn transpose_columns(source: PackedMatrix<'_>, columns: Range<usize>, target: &mut [u8]) {
    let (m, bytes) = (source.m(), PackedMatrix::row_bytes(source.m()));
    assert!(columns.end <= source.k(), "transpose_columns: columns of the matrix");
    assert_eq!(target.len(), columns.len() * bytes, "transpose_columns: bytes of the columns");
    target.fill(ZERO_BYTE);
    for at in 0..bytes {
        let rows: [&[u8]; 4] = std::array::from_fn(|r| if 4 * at + r < m { source.row(4 * at + r) } else { &[] });
        for byte in columns.start / 4..columns.end.div_ceil(4) {
            let codes = transpose_codes(rows.map(|row| row.get(byte).copied().unwrap_or(ZERO_BYTE)));
            for (i, codes) in codes.into_iter().enumerate() {
                let column = 4 * byte + i;
                if columns.contains(&column) {
                    target[(column - columns.start) * bytes + at] = codes;
                }
            }
        }
    }
}

/// Packs rows of less than two bits a weight into one tile.
fn pack_dense(dense: Dense, source: PackedMatrix<'_>, rows: Range<usize>, tile_rows: usize, target: &mut [u8]) {
    let mut packed = vec![0; dense.row_bytes(source.k())];
    for r in 0..tile_rows {
        let row: &[u8] = if r < rows.len() { source.row(rows.start + r) } else { &[] };
        dense.pack(row, source.k(), &mut packed);
        match dense {
            Dense::Fives => {
                let places = target.as_chunks_mut::<4>().0[r..].iter_mut().step_by(tile_rows);
                places.zip(packed.as_chunks::<4>().0).for_each(|(place, bytes)| *place = *bytes);
            }
            Dense::Threes => {
                let places = target[r..].iter_mut().step_by(tile_rows);
                places.zip(&packed).for_each(|(place, byte)| *place = *byte);
            }
        }
    }
}

/// Reads one row of a tile of such rows back into the canonical order.
fn unpack_dense(dense: Dense, tile: &[u8], r: usize, tile_rows: usize, k: usize, target: &mut [u8]) {
    let mut packed = vec![0; dense.row_bytes(k)];
    match dense {
        Dense::Fives => {
            let places = tile.as_chunks::<4>().0[r..].iter().step_by(tile_rows);
            packed.as_chunks_mut::<4>().0.iter_mut().zip(places).for_each(|(bytes, place)| *bytes = *place);
        }
        Dense::Threes => {
            packed.iter_mut().zip(tile[r..].iter().step_by(tile_rows)).for_each(|(byte, place)| *byte = *place);
        }
    }
    dense.unpack(&packed, k, target);
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Canonical => f.write_str("canonical"),
            Self::Rows { rows, chunk } => write!(f, "rows{rows}x{chunk}"),
            Self::Lanes { rows, group: 1 } => write!(f, "lanes{rows}"),
            Self::Lanes { rows, group } => write!(f, "lanes{rows}x{group}"),
            Self::Fives { rows } => write!(f, "fives{rows}"),
            Self::Threes { rows } => write!(f, "threes{rows}"),
            Self::Columns { chunk } => write!(f, "columns{chunk}"),
        }
    }
}

/// A word that names no layout.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no layout: expected canonical, rows<R>x<16|32|64>, lanes<R>, lanes<R>x4, fives<R>, threes<R> or columns<16|32|64>"
)]
pub struct ParseLayoutError(String);

impl FromStr for Layout {
    type Err = ParseLayoutError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parsed = if text == "canonical" {
            Some(Self::Canonical)
        } else if let Some((rows, chunk)) = text.strip_prefix("rows").and_then(|sizes| sizes.split_once('x')) {
            match (rows.parse(), chunk.parse()) {
                (Ok(rows @ 1..), Ok(chunk @ (16 | 32 | 64))) => Some(Self::Rows { rows, chunk }),
                _ => None,
            }
        } else if let Some(chunk) = text.strip_prefix("columns") {
            chunk.parse().ok().filter(|chunk| matches!(chunk, 16 | 32 | 64)).map(|chunk| Self::Columns { chunk })
        } else if let Some(rows) = text.strip_prefix("fives") {
            rows.parse().ok().filter(|rows| rows % 4 == 0 && *rows > 0).map(|rows| Self::Fives { rows })
        } else if let Some(rows) = text.strip_prefix("threes") {
            rows.parse().ok().filter(|rows| rows % 16 == 0 && *rows > 0).map(|rows| Self::Threes { rows })
        } else {
            let sizes = text.strip_prefix("lanes").map(|sizes| sizes.split_once('x').unwrap_or((sizes, "1")));
            match sizes.map(|(rows, group)| (rows.parse(), group.parse())) {
                Some((Ok(rows @ 1_u8..), Ok(group @ (1 | 4))))
                    if (usize::from(rows) * usize::from(group)) % 16 == 0 =>
                {
                    Some(Self::Lanes { rows, group })
                }
                _ => None,
            }
        };
        // A layout has one spelling: `rows04x16` is none.
        parsed.filter(|layout| layout.to_string() == text).ok_or_else(|| ParseLayoutError(text.to_owned()))
    }
}

impl From<Layout> for String {
    fn from(layout: Layout) -> Self {
        layout.to_string()
    }
}

impl TryFrom<String> for Layout {
    type Error = ParseLayoutError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use ternion_kernels_ref::Trit;

    pub(super) fn layouts() -> impl Strategy<Value = Layout> {
        prop_oneof![
            Just(Layout::Canonical),
            (1u8..=16, prop::sample::select(vec![16, 32, 64])).prop_map(|(rows, chunk)| Layout::Rows { rows, chunk }),
            (1u8..=4).prop_map(|groups| Layout::Lanes { rows: 16 * groups, group: 1 }),
            (1u8..=8).prop_map(|groups| Layout::Lanes { rows: 4 * groups, group: 4 }),
            (1u8..=8).prop_map(|groups| Layout::Fives { rows: 4 * groups }),
            (1u8..=4).prop_map(|groups| Layout::Threes { rows: 16 * groups }),
            prop::sample::select(vec![16, 32, 64]).prop_map(|chunk| Layout::Columns { chunk }),
        ]
    }

    proptest! {
        #[test]
        fn packing_is_undone_by_unpacking(layout in layouts(), m in 1usize..70, k in 1usize..600, seed in any::<u64>()) {
            let mut state = seed;
            let matrix = TernaryMatrix::from_fn(m, k, |_, _| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                Trit::ALL[(state >> 33) as usize % 3]
            });
            let packed = layout.pack(matrix.view());
            prop_assert_eq!(Some(packed.len()), layout.bytes(m, k));
            prop_assert_eq!(layout.unpack(m, k, &packed), Ok(matrix.clone()));

            // The same in two parts.
            let (cut, mut parts) = (layout.tiles(m) / 2, vec![0; packed.len()]);
            let (low, high) = parts.split_at_mut(cut * layout.tile_bytes(k));
            layout.pack_tiles(matrix.view(), 0..cut, low);
            layout.pack_tiles(matrix.view(), cut..layout.tiles(m), high);
            prop_assert_eq!(parts, packed);
        }

        #[test]
        fn columns_become_rows(m in 1usize..40, k in 1usize..60, cuts in (0usize..60, 0usize..60), seed in any::<u64>()) {
            let mut state = seed;
            let matrix = TernaryMatrix::from_fn(m, k, |_, _| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                Trit::ALL[(state >> 33) as usize % 3]
            });
            let columns = cuts.0.min(cuts.1).min(k)..cuts.0.max(cuts.1).min(k);
            let mut target = vec![0; columns.len() * PackedMatrix::row_bytes(m)];
            transpose_columns(matrix.view(), columns.clone(), &mut target);
            let found = PackedMatrix::new(columns.len(), m, &target).unwrap();
            for (row, column) in columns.enumerate() {
                for at in 0..m {
                    prop_assert_eq!(found.code(row, at), matrix.view().code(at, column));
                }
            }
        }

        #[test]
        fn a_layout_prints_and_parses_back(layout in layouts()) {
            prop_assert_eq!(layout.to_string().parse(), Ok(layout));
        }
    }

    #[test]
    fn words_that_name_no_layout_are_refused() {
        for text in [
            "",
            "rows",
            "rows0x16",
            "rows4x15",
            "rows04x16",
            "rows4x",
            "lanes",
            "lanes8",
            "lanes272",
            "lanes16x1",
            "lanes16x2",
            "lanes6x4",
            "fives0",
            "fives6",
            "threes0",
            "threes24",
            "columns8",
            "columns064",
            "tiles",
        ] {
            assert!(text.parse::<Layout>().is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_that_overflow_are_none() {
        assert_eq!(Layout::Canonical.bytes(usize::MAX, 8), None);
        assert_eq!(Layout::Lanes { rows: 16, group: 1 }.bytes(16, usize::MAX), None);
    }
}
