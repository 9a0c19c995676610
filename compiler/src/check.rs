//! The check that every kernel passes before its first use.
//!
//! Two row tiles and a tail at full k, on seeded data, against `kernels-ref`: [`harness`](crate::harness) on
//! [`Data::Bounds`], so that sums reach their bounds, and without guard pages, so that it is cheap.

use std::fmt;

use crate::harness::{self, Data, Fault, Placement, Problem};
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

/// Runs `kernel` on seeded data and compares every result.
pub(crate) fn check(kernel: &Kernel) -> Result<(), Fault> {
    let columns = match kernel.spec().columns {
        Columns::One => 2,
        // One pass of `ntile` columns and one column left over.
        Columns::Many => usize::from(kernel.schedule().ntile) + 1,
    };
    let m = 2 * kernel.layout().tile_rows() + 1;
    let problem = Problem::new(Data::Bounds, m, kernel.spec().k, columns, CHECK_SEED);
    harness::check(kernel, &problem, Placement::Heap)
}
