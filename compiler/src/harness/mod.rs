//! One harness that checks any compiled kernel against `kernels-ref` and times it.
//!
//! A kernel is right if every result equals the reference's, and safe if it reads and writes nothing but what its
//! contract names: its tiles of weights, its columns, their sums, its argument record, its scratch, and whole tiles of
//! results. The harness puts each of them into a buffer of its own, next to guard pages if asked to ([`Placement`]), makes
//! the inputs read-only, separates columns of results by poison, and computes the tiles in two calls, the later tiles
//! first: then it looks whether everything that should be there is, and whether everything else is as it was.
//!
//! A read or write beyond a guard ends the process: whoever uses guards runs the harness in a process that may end.

mod buffer;
mod listed;
mod problem;
mod steps;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::time::Duration;

use ternion_kernels_ref::QuantizedRow;

pub use buffer::Placement;
pub use problem::{Data, Problem};
pub use steps::{FloatData, FloatRow, check_step};

use crate::check::Mismatch;
use crate::kernel::KernelArgs;
use crate::{Activations, Columns, Kernel, OutRows};
use buffer::{Buffer, Line, POISON};

/// What is wrong with a kernel.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// A result differs from the reference.
    #[error("{0}")]
    Mismatch(Mismatch),
    /// It wrote into or around the results where it must not.
    #[error("the kernel wrote {offset} bytes from its first result, where nothing is to be written")]
    StrayWrite {
        /// Bytes from the first result of the first column.
        offset: isize,
    },
    /// It wrote around its scratch.
    #[error("the kernel wrote {offset} bytes from the start of its scratch, where nothing is to be written")]
    StrayScratch {
        /// Bytes from the first byte of scratch.
        offset: isize,
    },
    /// What a step on activations wrote differs from the reference.
    #[error("{what} {at}: the reference gives {expected}, the kernel {found}")]
    Differs {
        /// What is different.
        what: &'static str,
        /// Which of them.
        at: usize,
        /// What the reference says.
        expected: i64,
        /// What the kernel says.
        found: i64,
    },
    /// Not the kernel: the system gave no memory to run it in.
    #[error("no memory to run the kernel in: {0}")]
    Memory(String),
}

impl From<region::Error> for Fault {
    fn from(error: region::Error) -> Self {
        Self::Memory(error.to_string())
    }
}

/// Runs `kernel` on `problem` and compares. A kernel for one column is run on each column in turn, one that reads a list on
/// the first, with records drawn from the problem's seed.
///
/// # Errors
/// The first fault that is found.
///
/// # Panics
/// If the problem's rows (columns, for a kernel that reads them as records) are not as long as the kernel's.
pub fn check(kernel: &Kernel, problem: &Problem, placement: Placement) -> Result<(), Fault> {
    check_and_time(kernel, problem, placement, 0, &mut || Duration::ZERO).map(drop)
}

/// As [`check`], and then computes all tiles `repeats` times more in the same memory and returns the time of each call:
/// of all columns, or of the first for a kernel for one column. Weights are as warm as their size allows. `clock` tells
/// the time that has passed since some fixed moment.
///
/// # Errors
/// The first fault that is found. Times are never judged.
///
/// # Panics
/// If the problem's rows are not as long as the kernel's.
pub fn check_and_time(
    kernel: &Kernel,
    problem: &Problem,
    placement: Placement,
    repeats: usize,
    clock: &mut dyn FnMut() -> Duration,
) -> Result<Vec<Duration>, Fault> {
    let per_call = match kernel.spec().columns {
        Columns::One => 1,
        Columns::Many => problem.columns().len().max(1),
        Columns::ListedRows | Columns::ListedColumns => {
            return listed::check_and_time(kernel, problem, placement, repeats, clock);
        }
    };
    assert_eq!(problem.k(), kernel.spec().k, "a problem with rows of the kernel's length");
    let weights = Buffer::read_only(&problem.pack(kernel.layout()), placement)?;
    let columns = problem.columns();
    let mut first = None;
    for (call, columns) in columns.chunks(per_call).enumerate() {
        let mut run = Run::new(kernel, problem, placement, &weights, call * per_call, columns)?;
        run.check()?;
        first.get_or_insert(run);
    }
    first.map_or(Ok(Vec::new()), |mut run| run.time(repeats, clock))
}

/// Results between two columns, never to be written.
const RESULT_GAP: usize = 3;

/// What a result is before anyone has written it.
const UNTOUCHED: i32 = i32::from_ne_bytes([POISON; 4]);

/// A kernel and all that it reads and writes in one call.
struct Run<'a> {
    kernel: &'a Kernel,
    problem: &'a Problem,
    placement: Placement,
    weights: &'a Buffer<u8>,
    /// Index of the first column in the problem.
    first_column: usize,
    activations: Buffer<u8>,
    sums: Buffer<i32>,
    results: Buffer<i32>,
    result_stride: usize,
    scratch: Buffer<Line>,
}

impl<'a> Run<'a> {
    fn new(
        kernel: &'a Kernel,
        problem: &'a Problem,
        placement: Placement,
        weights: &'a Buffer<u8>,
        first_column: usize,
        columns: &[QuantizedRow],
    ) -> Result<Self, Fault> {
        let format = kernel.activation_format();
        let column_bytes = format.bytes(problem.k());
        let mut activations = vec![POISON; columns.len() * column_bytes];
        for (column, target) in columns.iter().zip(activations.chunks_mut(column_bytes)) {
            format.prepare(column.values(), target);
        }
        let sums: Vec<i32> = columns.iter().map(QuantizedRow::sum).collect();
        let layout = kernel.layout();
        let rows = layout.tiles(problem.m()) * layout.tile_rows();
        let result_stride = rows + RESULT_GAP;
        let scratch_bytes = kernel.schedule().scratch_bytes(layout.tiles(problem.m()));
        Ok(Self {
            kernel,
            problem,
            placement,
            weights,
            first_column,
            activations: Buffer::read_only(&activations, placement)?,
            sums: Buffer::read_only(&sums, placement)?,
            results: Buffer::poisoned((columns.len() - 1) * result_stride + rows, placement)?,
            result_stride,
            scratch: Buffer::poisoned(scratch_bytes.div_ceil(size_of::<Line>()), placement)?,
        })
    }

    /// The argument record of one call for `tiles`.
    fn arguments(&mut self, tiles: Range<usize>) -> Result<Option<Buffer<KernelArgs>>, Fault> {
        let activations = Activations {
            columns: self.activations.elements(),
            stride: self.kernel.activation_format().bytes(self.problem.k()),
            sums: self.sums.elements(),
        };
        let out = OutRows::new(self.results.elements_mut(), self.result_stride);
        let scratch = self.scratch.elements_mut().as_mut_ptr().cast();
        let args = self.kernel.arguments(self.weights.elements(), tiles, &activations, &out, scratch);
        Ok(args.map(|args| Buffer::read_only(&[args], self.placement)).transpose()?)
    }

    /// Computes `tiles`.
    fn compute(&mut self, tiles: Range<usize>) -> Result<(), Fault> {
        if let Some(args) = self.arguments(tiles)? {
            // SAFETY: the record points to buffers of `self`, which is borrowed exclusively.
            unsafe { self.kernel.enter(args.elements().as_ptr()) }
        }
        Ok(())
    }

    fn check(&mut self) -> Result<(), Fault> {
        let tiles = self.kernel.layout().tiles(self.problem.m());
        let middle = tiles / 2;
        self.compute(middle..tiles)?;
        self.verify(middle..tiles)?;
        self.compute(0..middle)?;
        self.verify(0..tiles)
    }

    /// Whether the rows of `tiles` are right and nothing else has been written.
    fn verify(&self, tiles: Range<usize>) -> Result<(), Fault> {
        if let Some(offset) = self.results.stray_write() {
            return Err(Fault::StrayWrite { offset });
        }
        if let Some(offset) = self.scratch.stray_write() {
            return Err(Fault::StrayScratch { offset });
        }
        let (m, tile_rows) = (self.problem.m(), self.kernel.layout().tile_rows());
        let computed = tiles.start * tile_rows..tiles.end * tile_rows;
        for (column, results) in self.results.elements().chunks(self.result_stride).enumerate() {
            let expected = self.problem.expected().map(|all| &all[(self.first_column + column) * m..][..m]);
            for (row, found) in results.iter().copied().enumerate() {
                if !computed.contains(&row) {
                    if found != UNTOUCHED {
                        let offset = (4 * (column * self.result_stride + row)).cast_signed();
                        return Err(Fault::StrayWrite { offset });
                    }
                } else if let Some(expected) = expected.and_then(|rows| rows.get(row)).copied()
                    && found != expected
                {
                    let (seed, column) = (self.problem.seed(), self.first_column + column);
                    return Err(Fault::Mismatch(Mismatch { seed, row, column, expected, found }));
                }
            }
        }
        Ok(())
    }

    fn time(&mut self, repeats: usize, clock: &mut dyn FnMut() -> Duration) -> Result<Vec<Duration>, Fault> {
        let mut times = Vec::with_capacity(repeats);
        let tiles = self.kernel.layout().tiles(self.problem.m());
        if let Some(args) = self.arguments(0..tiles)? {
            for _ in 0..repeats {
                let start = clock();
                // SAFETY: as in `compute`.
                unsafe { self.kernel.enter(args.elements().as_ptr()) };
                times.push(clock().saturating_sub(start));
            }
        }
        Ok(times)
    }
}
