//! What the benches of this crate share: matrices at 2B4T's shapes, cold weights, threads.
//!
//! Benches report, they never judge: `cargo bench -p ternion-benches`.

pub mod model;
pub mod soak;

use std::ops::Range;

use ternion_compiler::{Activations, Kernel, OutRows};
use ternion_kernels_ref::QuantizedRow;
use ternion_tuner::Workers;

/// `[m, k]` of the four kinds of projections of BitNet b1.58 2B4T: q and o, k and v, gate and up, down.
pub const SHAPES_2B4T: [(usize, usize); 4] = [(2560, 2560), (640, 2560), (6912, 2560), (2560, 6912)];

/// One matrix shape with as many copies of its weights as it takes for none of them to be in a cache when its turn comes.
pub struct Matrix<'a> {
    kernel: &'a Kernel,
    weights: &'a [u8],
    tiles: usize,
    copies: usize,
    prepared: Vec<u8>,
    stride: usize,
    sums: Vec<i32>,
    results: Vec<i32>,
}

impl<'a> Matrix<'a> {
    /// An `[m, k]` matrix for `kernel` and `n` columns, whose copies fill `weights`.
    ///
    /// # Panics
    /// If `weights` does not hold a single copy.
    #[must_use]
    pub fn new(kernel: &'a Kernel, m: usize, n: usize, weights: &'a [u8]) -> Self {
        let (k, layout, format) = (kernel.spec().k, kernel.layout(), kernel.activation_format());
        let bytes = layout.bytes(m, k).expect("a matrix that fits in memory");
        assert!(weights.len() >= bytes, "room for one copy");
        let column = QuantizedRow::new(&(0..k).map(|i| (i % 251) as f32 - 125.0).collect::<Vec<_>>());
        let stride = format.bytes(k);
        let mut prepared = vec![0; n * stride];
        for target in prepared.chunks_exact_mut(stride) {
            format.prepare(column.values(), target);
        }
        let rows = layout.tiles(m) * layout.tile_rows();
        Self {
            kernel,
            weights,
            tiles: layout.tiles(m),
            copies: weights.len() / bytes,
            prepared,
            stride,
            sums: vec![column.sum(); n],
            results: vec![0; n * rows],
        }
    }

    /// Bytes of packed weights that one product reads.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        self.tiles * self.kernel.layout().tile_bytes(self.kernel.spec().k)
    }

    /// Computes the product `times` times, each time on the next copy of the weights, on all threads.
    pub fn run(&mut self, workers: &dyn Workers, times: u64) {
        for time in 0..times {
            self.run_copy(workers, (time % self.copies as u64) as usize);
        }
    }

    /// Computes the product once, on copy `copy` of the weights or the one that follows after the last, on all threads.
    pub fn run_copy(&mut self, workers: &dyn Workers, copy: usize) {
        let bytes = self.weight_bytes();
        let (kernel, tiles) = (self.kernel, self.tiles);
        let copy = &self.weights[copy % self.copies * bytes..][..bytes];
        let activations = Activations { columns: &self.prepared, stride: self.stride, sums: &self.sums };
        let rows = self.results.len() / self.sums.len();
        let out = OutRows::new(&mut self.results, rows);
        let threads = workers.threads();
        workers.run(&|thread| {
            let part: Range<usize> = tiles * thread / threads..tiles * (thread + 1) / threads;
            // SAFETY: each thread has its own tiles, and nobody reads the results meanwhile.
            unsafe { kernel.run(copy, part, &activations, &out) }
        });
    }
}
