//! One product on all threads: the piece that everyone who measures kernels shares.

use std::sync::atomic::{AtomicBool, Ordering};

use ternion_compiler::{Activations, Kernel, OutRows};

use crate::Workers;
use crate::workers::share;

/// A kernel, the number of tiles that it multiplies, and the prepared columns that it multiplies them with.
#[derive(Clone, Copy, Debug)]
pub struct Product<'a> {
    /// The kernel, none that reads a list.
    pub kernel: &'a Kernel,
    /// Tiles of the matrix.
    pub tiles: usize,
    /// The columns.
    pub activations: Activations<'a>,
}

impl Product<'_> {
    /// Results of all columns, padding rows included.
    #[must_use]
    pub fn results(&self) -> usize {
        self.tiles * self.kernel.layout().tile_rows() * self.activations.sums.len()
    }

    /// Computes the product `repeats` times, time `i` with `weights(i)`, all `workers` sharing the tiles evenly. Threads
    /// do not wait for each other between two times.
    ///
    /// # Panics
    /// If a slice is too short: `weights(i)` for the tiles, `out` for the [`results`](Self::results).
    pub fn compute<'w>(
        &self,
        workers: &dyn Workers,
        repeats: usize,
        weights: &(dyn Fn(usize) -> &'w [u8] + Sync),
        out: &mut [i32],
    ) {
        let threads = workers.threads().max(1);
        let out = OutRows::new(out, self.tiles * self.kernel.layout().tile_rows());
        let taken: Vec<AtomicBool> = (0..threads).map(|_| AtomicBool::new(false)).collect();
        workers.run(&|thread| {
            if taken.get(thread).is_none_or(|taken| taken.swap(true, Ordering::Relaxed)) {
                return;
            }
            let tiles = share(self.tiles, threads, thread);
            for repeat in 0..repeats {
                // SAFETY: `taken` admits every thread number once, and shares of different numbers are disjoint; nobody
                // else has `out`.
                unsafe { self.kernel.run(weights(repeat), tiles.clone(), &self.activations, &out) };
            }
        });
    }
}
