//! Cosines and sines of all positions so far.
//!
//! They are the reference's own ([`ternion_kernels_ref::rope::Rotation`]), computed once per position and session, a
//! block of positions at a time. Layers with a sliding window may turn by other frequencies than the rest, so there is
//! one table for each different set.

use ternion_kernels_ref::rope::Rotation;

/// Positions added at a time.
const BLOCK: usize = 64;

/// Angles of positions `0..len`, one table for each set of frequencies.
#[derive(Clone, Debug)]
pub(super) struct RopeTable {
    half: usize,
    tables: Vec<Table>,
}

#[derive(Clone, Debug, Default)]
struct Table {
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    /// Empty tables for heads of `2 · half`, turned by `sets` different sets of frequencies.
    pub(super) fn new(half: usize, sets: usize) -> Self {
        Self { half, tables: vec![Table::default(); sets] }
    }

    /// Adds positions until there are at least `positions`. `frequencies` are the sets, `[sets][half]`.
    pub(super) fn reserve(&mut self, positions: usize, frequencies: &[Vec<f32>]) {
        for (table, frequencies) in self.tables.iter_mut().zip(frequencies) {
            while table.cos.len() < positions * self.half {
                let start = table.cos.len() / self.half;
                for position in start..start + BLOCK {
                    let rotation = Rotation::at(position, frequencies);
                    table.cos.extend(rotation.cos);
                    table.sin.extend(rotation.sin);
                }
            }
        }
    }

    /// Cosines and sines of one position, each `[half]`, by the frequencies of set `set`.
    ///
    /// # Panics
    /// If there is no room for the position ([`reserve`](Self::reserve)).
    pub(super) fn at(&self, set: usize, position: usize) -> (&[f32], &[f32]) {
        let range = position * self.half..(position + 1) * self.half;
        let table = &self.tables[set];
        (&table.cos[range.clone()], &table.sin[range])
    }
}
