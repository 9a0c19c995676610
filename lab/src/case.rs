//! What is measured: a schedule on a matrix.

use serde::{Deserialize, Serialize};
use ternion_compiler::{Columns, Family, KernelSpec, Schedule};

use crate::Shape;

/// The kernel of `family` for a matrix: for one column or many, unless the family reads a list, which leaves it no
/// choice. Columns of a matrix are records as long as it has rows.
#[must_use]
pub fn spec(family: Family, shape: Shape, many: bool) -> KernelSpec {
    let dense = if many { Columns::Many } else { Columns::One };
    let columns = family.list().unwrap_or(dense);
    KernelSpec { k: if columns == Columns::ListedColumns { shape.m } else { shape.k }, columns }
}

/// Where the weights are when they are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Weights {
    /// In main memory: each product reads another copy, the one that was read longest ago.
    Cold,
    /// In the nearest cache that is large enough: all products read the same copy.
    Hot,
}

/// A schedule on a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Case {
    /// The matrix.
    pub shape: Shape,
    /// Columns, at least 1; 1 for families that read a list.
    pub n: usize,
    /// How it is multiplied.
    pub schedule: Schedule,
    /// Where its weights are.
    pub weights: Weights,
    /// Records that the list leaves out, in percent; 0 for families that read none.
    pub zeros: u8,
}

impl Case {
    /// What is compiled.
    #[must_use]
    pub fn spec(&self) -> KernelSpec {
        spec(self.schedule.family, self.shape, self.n > 1)
    }

    /// Rows or columns that a list chooses among.
    pub(crate) fn records(&self) -> usize {
        if self.spec().columns == Columns::ListedColumns { self.shape.k } else { self.shape.m }
    }

    /// Bytes of the whole matrix in the schedule's layout, or `None` if that overflows.
    #[must_use]
    pub fn matrix_bytes(&self) -> Option<usize> {
        let rows = if self.schedule.family.list().is_some() { self.records() } else { self.shape.m };
        self.schedule.layout.bytes(rows, self.spec().k)
    }

    /// The part of the matrix that one product reads, from 0 to 1.
    fn share(&self) -> f64 {
        1.0 - f64::from(self.zeros) / 100.0
    }

    /// Bytes of weights that one product reads, padding included.
    pub(crate) fn read_bytes(&self) -> f64 {
        self.matrix_bytes().unwrap_or(0) as f64 * self.share()
    }

    /// Weights that one product reads.
    pub(crate) fn read_weights(&self) -> f64 {
        self.shape.m as f64 * self.shape.k as f64 * self.share()
    }

    /// Multiply-adds of one product.
    pub(crate) fn macs(&self) -> f64 {
        self.read_weights() * self.n as f64
    }
}
