//! What a kernel computes, as a value.

use std::fmt;
use std::str::FromStr;

/// How many columns (tokens) a kernel is called with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Columns {
    /// Exactly one: decoding.
    One,
    /// Any number from 1: prompts and batches.
    Many,
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
        let n = match self.columns {
            Columns::One => "1",
            Columns::Many => "many",
        };
        write!(f, "ternary-gemm k={} n={n}", self.k)
    }
}

/// A line that describes no kernel.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no kernel: expected `ternary-gemm k=<K> n=<1|many>`")]
pub struct ParseSpecError(String);

impl FromStr for KernelSpec {
    type Err = ParseSpecError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (k, n) = text.strip_prefix("ternary-gemm k=")?.split_once(" n=")?;
            let columns = match n {
                "1" => Columns::One,
                "many" => Columns::Many,
                _ => return None,
            };
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
        for columns in [Columns::One, Columns::Many] {
            let spec = KernelSpec { k: 6912, columns };
            assert_eq!(spec.to_string().parse(), Ok(spec));
        }
        assert_eq!(KernelSpec { k: 2560, columns: Columns::Many }.to_string(), "ternary-gemm k=2560 n=many");
        assert!("ternary-gemm k=2560 n=2".parse::<KernelSpec>().is_err());
        assert!("gemm".parse::<KernelSpec>().is_err());
    }
}
