//! The check that every kernel passes before its first use.
//!
//! Two row tiles and a tail at full k, on seeded data, against `kernels-ref`: [`harness`](crate::harness) on
//! [`Data::Bounds`], so that sums reach their bounds, and without guard pages, so that it is cheap.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::compile::in_parallel;
use crate::harness::{self, Data, Fault, Placement, Problem};
use crate::listed::GROUP;
use crate::{Columns, Kernel};

/// Seed of the data that kernels are checked on.
pub const CHECK_SEED: u64 = 0x7465_726e_696f_6e21;

/// The first result in which a kernel differs from the reference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// Seed of the data.
    pub seed: u64,
    /// Row of the result.
    pub row: usize,
    /// Column of the result.
    pub column: usize,
    /// What the reference says.
    pub expected: i32,
    /// What the kernel says.
    pub found: i32,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, row, column, expected, found } = self;
        write!(f, "seed {seed:#x}, row {row}, column {column}: the reference gives {expected}, the kernel {found}")
    }
}

/// Runs each kernel on seeded data and compares every result. Making the data and the reference's results takes longer
/// than running a kernel, so kernels of equal shape share them.
pub(crate) fn check_each(kernels: &[Kernel]) -> Vec<Result<(), Fault>> {
    let shapes: BTreeSet<_> = kernels.iter().map(shape).collect();
    let shapes: Vec<_> = shapes.into_iter().collect();
    let problems = in_parallel(&shapes, |[m, k, n]| Problem::new(Data::Bounds, *m, *k, *n, CHECK_SEED));
    let problems: BTreeMap<_, _> = shapes.into_iter().zip(problems).collect();
    in_parallel(kernels, |kernel| harness::check(kernel, &problems[&shape(kernel)], Placement::Heap))
}

/// Rows, length of a row and columns that a kernel is checked on.
fn shape(kernel: &Kernel) -> [usize; 3] {
    let k = kernel.spec().k;
    let columns = match kernel.spec().columns {
        Columns::ListedRows => return [2 * GROUP + 1, k, 1],
        // Columns are records.
        Columns::ListedColumns => return [k, 2 * GROUP + 1, 1],
        Columns::One => 2,
        // One pass of `ntile` columns and one column left over.
        Columns::Many => usize::from(kernel.schedule().ntile) + 1,
    };
    [2 * kernel.layout().tile_rows() + 1, k, columns]
}
