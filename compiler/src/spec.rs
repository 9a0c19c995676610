//! What a kernel computes, as a value.

use std::fmt;
use std::str::FromStr;

/// How many columns (tokens) a kernel is called with, and which part of the matrix it reads for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Columns {
    /// Exactly one: decoding.
    One,
    /// Any number from 1: prompts and batches.
    Many,
    /// One, times the rows of the matrix that a list names: `y[i] = W[list[i], k] · a[k]`.
    ListedRows,
    /// One, of which a list names the elements that are not 0: `y[k] = Σ a[i] · W[list[i], k]`. The matrix lies
    /// transposed: a column of `k` weights is one record.
    ListedColumns,
}

impl Columns {
    /// All of them, with the words they print to.
    const ALL: [(Self, &'static str); 4] = [
        (Self::One, "n=1"),
        (Self::Many, "n=many"),
        (Self::ListedRows, "n=1 rows=listed"),
        (Self::ListedColumns, "n=1 columns=listed"),
    ];

    /// Whether a kernel reads a list of records.
    #[must_use]
    pub const fn are_listed(self) -> bool {
        matches!(self, Self::ListedRows | Self::ListedColumns)
    }
}

/// The ternary product `y[n, m] = W[m, k] · a[n, k]`, weights ternary, activations int8, results `i32`.
///
/// `k` is compiled in. The rows and the number of columns are run-time values, so matrices of equal `k` share a kernel.
/// Prints to one line and parses back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KernelSpec {
    /// Length of a row.
    pub k: usize,
    /// Columns per call.
    pub columns: Columns,
}

impl KernelSpec {
    /// The longest row that ternion compiles: far beyond any model, and sums of `2·127·k` stay within `i32`.
    pub const MAX_K: usize = 1 << 20;
}

impl fmt::Display for KernelSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (_, words) = Columns::ALL[self.columns as usize];
        write!(f, "ternary-gemm k={} {words}", self.k)
    }
}

/// A line that describes no kernel.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no kernel: expected `ternary-gemm k=<K> n=<1|many>`, or `n=1` with `rows=listed` or `columns=listed`"
)]
pub struct ParseSpecError(String);

impl FromStr for KernelSpec {
    type Err = ParseSpecError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (k, words) = text.strip_prefix("ternary-gemm k=")?.split_once(' ')?;
            let (columns, _) = Columns::ALL.into_iter().find(|(_, known)| *known == words)?;
            Some(Self { k: k.parse().ok()?, columns })
        };
        parse().ok_or_else(|| ParseSpecError(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spec_prints_and_parses_back() {
        for (columns, _) in Columns::ALL {
            let spec = KernelSpec { k: 6912, columns };
            assert_eq!(spec.to_string().parse(), Ok(spec));
        }
        assert_eq!(KernelSpec { k: 2560, columns: Columns::Many }.to_string(), "ternary-gemm k=2560 n=many");
        assert!("ternary-gemm k=2560 n=2".parse::<KernelSpec>().is_err());
        assert!("gemm".parse::<KernelSpec>().is_err());
    }
}
