//! A compiled kernel with all that it needs for a product but weights.

use ternion_compiler::listed::GROUP;
use ternion_compiler::{Activations, Columns, Kernel, RecordList};
use ternion_kernels_ref::SplitMix64;
use ternion_tuner::{Product, Workers, fill_shared, share};

use crate::Case;

/// A kernel that is ready to run.
pub struct Entrant {
    case: Case,
    kernel: Kernel,
    /// Bytes of one copy of the matrix.
    matrix_bytes: usize,
    /// Prepared columns, one every `stride` bytes from `start` on.
    columns: Vec<u8>,
    start: usize,
    stride: usize,
    sums: Vec<i32>,
    results: Vec<i32>,
    list: RecordList,
    random: SplitMix64,
}

impl Entrant {
    /// `kernel` is that of `case`, whose matrix has `matrix_bytes` bytes, for `threads` threads.
    pub(crate) fn new(case: Case, kernel: Kernel, matrix_bytes: usize, threads: usize) -> Self {
        let (k, format) = (kernel.spec().k, kernel.activation_format());
        let stride = format.bytes(k);
        let mut columns = vec![0; case.n * stride + 64];
        let start = columns.as_ptr().align_offset(64).min(64);
        let mut sums = Vec::with_capacity(case.n);
        for (column, target) in columns[start..][..case.n * stride].chunks_exact_mut(stride).enumerate() {
            let values: Vec<i8> = (0..k).map(|at| (((at * 31 + column * 17) % 255) as i16 - 127) as i8).collect();
            sums.push(values.iter().map(|value| i32::from(*value)).sum());
            format.prepare(&values, target);
        }
        let layout = kernel.layout();
        let results = match kernel.spec().columns {
            Columns::One | Columns::Many => layout.tiles(case.shape.m) * layout.tile_rows() * case.n,
            Columns::ListedRows => case.records().next_multiple_of(GROUP),
            Columns::ListedColumns => threads * 4 * layout.row_bytes(k),
        };
        let (results, list) = (vec![0; results], RecordList::with_capacity(case.records()));
        Self { case, kernel, matrix_bytes, columns, start, stride, sums, results, list, random: SplitMix64::new(1) }
    }

    /// What is measured.
    #[must_use]
    pub fn case(&self) -> &Case {
        &self.case
    }

    /// Bytes of one copy of the matrix.
    pub(crate) fn matrix_bytes(&self) -> usize {
        self.matrix_bytes
    }

    /// Bytes of machine code.
    pub(crate) fn code_bytes(&self) -> usize {
        self.kernel.code_bytes()
    }

    /// Chooses other records to list, which no sample shares with the one before; nothing for families without a list.
    pub(crate) fn choose(&mut self) {
        if self.kernel.spec().columns.are_listed() {
            let record = self.kernel.layout().row_bytes(self.kernel.spec().k);
            let (zeros, random) = (usize::from(self.case.zeros), &mut self.random);
            let listed = (0..self.case.records()).filter(|_| random.below(100) >= zeros);
            self.list.fill(listed.map(|at| ((at * record) as u32, (at % 127) as i8)));
        }
    }

    /// Computes the product `repeats` times, time `i` with `weights(i)`. A list is the same each time.
    pub(crate) fn compute<'w>(
        &mut self,
        workers: &dyn Workers,
        repeats: usize,
        weights: &(dyn Fn(usize) -> &'w [u8] + Sync),
    ) {
        let Self { kernel, list, results, .. } = self;
        let activations = Activations { columns: &self.columns[self.start..], stride: self.stride, sums: &self.sums };
        match kernel.spec().columns {
            Columns::One | Columns::Many => {
                let tiles = kernel.layout().tiles(self.case.shape.m);
                Product { kernel, tiles, activations }.compute(workers, repeats, weights, results);
            }
            Columns::ListedRows => {
                let results = &mut results[..list.groups() * GROUP];
                for repeat in 0..repeats {
                    fill_shared(workers, results, GROUP, &|start, part| {
                        let groups = start / GROUP..(start + part.len()) / GROUP;
                        kernel.run_listed_rows(weights(repeat), list, groups, &activations, part);
                    });
                }
            }
            Columns::ListedColumns => {
                let width = 4 * kernel.layout().row_bytes(kernel.spec().k);
                let threads = results.len() / width;
                for repeat in 0..repeats {
                    fill_shared(workers, results, width, &|start, part| {
                        let groups = share(list.groups(), threads, start / width);
                        kernel.run_listed_columns(weights(repeat), list, groups, part);
                    });
                    // A thread's columns give sums of all rows: adding them up is part of the product.
                    let (first, rest) = results.split_at_mut(width);
                    for partial in rest.chunks_exact(width) {
                        first.iter_mut().zip(partial).for_each(|(sum, partial)| *sum += partial);
                    }
                }
            }
        }
    }
}
