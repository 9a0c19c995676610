//! From one layout into another.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use ternion_kernels_ref::PackedMatrix;

use super::Layout;

/// Bytes that a thread repacks at a time: few enough that the last ones do not wait for each other, and that they and
/// what they were are in the cache.
const PART_BYTES: usize = 256 << 10;

impl Layout {
    /// Brings an `[m, k]` matrix from this layout into another, on all processors. Every weight stays what it is; padding
    /// is made anew.
    ///
    /// # Panics
    /// If `bytes` does not have [`bytes(m, k)`](Self::bytes) bytes.
    #[must_use]
    pub fn repack(self, to: Self, m: usize, k: usize, bytes: &[u8]) -> Vec<u8> {
        let (tiles, tile_bytes) = (to.tiles(m), to.tile_bytes(k));
        let mut target = vec![0; tiles * tile_bytes];
        if target.is_empty() {
            return target;
        }
        let part = (PART_BYTES / tile_bytes).max(1);
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(tiles.div_ceil(part));
        let parts = Mutex::new(target.chunks_mut(part * tile_bytes).enumerate());
        let next = || parts.lock().unwrap_or_else(PoisonError::into_inner).next();
        let work = || {
            while let Some((i, target)) = next() {
                self.repack_tiles(to, [m, k], bytes, i * part..tiles.min((i + 1) * part), target);
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..threads {
                scope.spawn(work);
            }
            work();
        });
        target
    }

    /// As [`repack`](Self::repack), but only the tiles `tiles` of the layout `to`, and on this thread: disjoint ranges can
    /// be repacked in parallel.
    ///
    /// # Panics
    /// If `bytes` or `target`, the bytes of exactly these tiles, has another length, or a tile lies past the last.
    pub fn repack_tiles(self, to: Self, [m, k]: [usize; 2], bytes: &[u8], tiles: Range<usize>, target: &mut [u8]) {
        assert!(tiles.end <= to.tiles(m), "repack_tiles: tiles of the matrix");
        let rows = m.min(tiles.start * to.tile_rows())..m.min(tiles.end * to.tile_rows());
        let row_bytes = PackedMatrix::row_bytes(k);
        let mut own = Vec::new();
        let canonical = if self == Self::Canonical {
            assert_eq!(Some(bytes.len()), self.bytes(m, k), "repack_tiles: bytes of the matrix");
            &bytes[rows.start * row_bytes..rows.end * row_bytes]
        } else {
            own.resize(rows.len() * row_bytes, 0);
            self.unpack_rows(m, k, bytes, rows.clone(), &mut own);
            &own
        };
        // A matrix of these rows alone has the same tiles, since the first row begins one.
        let rows = PackedMatrix::new(rows.len(), k, canonical).expect("bytes of its rows");
        to.pack_tiles(rows, 0..tiles.len(), target);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use ternion_kernels_ref::{TernaryMatrix, Trit};

    use super::super::tests::layouts;
    use super::*;

    fn matrix(m: usize, k: usize, seed: u64) -> TernaryMatrix {
        let mut state = seed;
        TernaryMatrix::from_fn(m, k, |_, _| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            Trit::ALL[(state >> 33) as usize % 3]
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn repacking_is_packing_and_there_is_a_way_back(
            from in layouts(), to in layouts(), m in 1usize..150, k in 1usize..300, seed in any::<u64>(),
        ) {
            let matrix = matrix(m, k, seed);
            let packed = from.pack(matrix.view());
            let repacked = from.repack(to, m, k, &packed);
            prop_assert_eq!(&repacked, &to.pack(matrix.view()));
            prop_assert_eq!(to.repack(from, m, k, &repacked), packed);
        }
    }

    #[test]
    fn large_matrices_are_repacked_in_parts() {
        // Of many parts, the last of which is short, with rows that fill no tile.
        let (m, k) = (1999, 2000);
        let matrix = matrix(m, k, 1);
        let (from, to) = (Layout::Threes { rows: 64 }, Layout::Rows { rows: 4, chunk: 64 });
        assert!(to.bytes(m, k).expect("its size") > 3 * PART_BYTES);
        assert_eq!(from.repack(to, m, k, &from.pack(matrix.view())), to.pack(matrix.view()));
        assert_eq!(to.repack(from, m, k, &to.pack(matrix.view())), from.pack(matrix.view()));
        assert!(Layout::Canonical.repack(to, 0, k, &[]).is_empty());
    }
}
