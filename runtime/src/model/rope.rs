//! Cosines and sines of all positions so far.
//!
//! They are the reference's own ([`ternion_kernels_ref::rope::Rotation`]), computed once per position and session, a
//! block of positions at a time.

use ternion_kernels_ref::rope::Rotation;

/// Positions added at a time.
const BLOCK: usize = 64;

/// Angles of positions `0..len`.
#[derive(Clone, Debug)]
pub(super) struct RopeTable {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    /// An empty table for heads of `2 · half`.
    pub(super) const fn new(half: usize) -> Self {
        Self { half, cos: Vec::new(), sin: Vec::new() }
    }

    /// Adds positions until there are at least `positions`.
    pub(super) fn reserve(&mut self, positions: usize, inverse_frequencies: &[f32]) {
        while self.len() < positions {
            for position in self.len()..self.len() + BLOCK {
                let rotation = Rotation::at(position, inverse_frequencies);
                self.cos.extend(rotation.cos);
                self.sin.extend(rotation.sin);
            }
        }
    }

    fn len(&self) -> usize {
        self.cos.len() / self.half
    }

    /// Cosines and sines of one position, each `[half]`.
    ///
    /// # Panics
    /// If there is no room for the position ([`reserve`](Self::reserve)).
    pub(super) fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let range = position * self.half..(position + 1) * self.half;
        (&self.cos[range.clone()], &self.sin[range])
    }
}
