//! The size of a matrix, as people write it.

use std::fmt;
use std::str::FromStr;

use ternion_compiler::KernelSpec;

/// `M`x`K`: rows times the length of a row, the order of `W[m, k]` everywhere in ternion. Prints and parses back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Rows: results per column.
    pub m: usize,
    /// Length of a row: weights per result.
    pub k: usize,
}

/// A text that describes no shape.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("shape `{0}`: expected rows x row length, for example 2560x6912, rows of 1 to {max} weights", max = KernelSpec::MAX_K)]
pub struct ParseShapeError(String);

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.m, self.k)
    }
}

impl FromStr for Shape {
    type Err = ParseShapeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let shape = text.split_once('x').and_then(|(m, k)| Some(Self { m: m.parse().ok()?, k: k.parse().ok()? }));
        shape
            .filter(|shape| shape.m >= 1 && (1..=KernelSpec::MAX_K).contains(&shape.k))
            .ok_or_else(|| ParseShapeError(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_rows_times_row_length() {
        let shape: Shape = "2560x6912".parse().unwrap();
        assert_eq!((shape.m, shape.k, shape.to_string()), (2560, 6912, "2560x6912".to_owned()));
        for text in ["", "2560", "2560x", "0x4", "4x0", "4x1048577", "4x4x4", "-1x4"] {
            assert!(text.parse::<Shape>().is_err(), "{text}");
        }
    }
}
