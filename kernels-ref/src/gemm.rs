//! Ternary × int8 products, the ten lines that every compiled kernel is checked against.

use crate::{PackedMatrix, QuantizedRow};

/// `y[row] = Σ_column (code(row, column) − 1) · a[column]` in `i32`, for one token.
///
/// # Panics
/// If the row of activations is not `w.k()` long.
#[must_use]
pub fn gemv(w: PackedMatrix<'_>, a: &QuantizedRow) -> Vec<i32> {
    assert_eq!(a.values().len(), w.k(), "gemv: activations of length k");
    (0..w.m()).map(|row| row_product(w, row, a)).collect()
}

/// One element of [`gemv`].
#[must_use]
pub fn row_product(w: PackedMatrix<'_>, row: usize, a: &QuantizedRow) -> i32 {
    let codes = w.row(row);
    let weight = |column: usize| i32::from(codes[column / 4] >> (2 * (column % 4)) & 3) - 1;
    a.values().iter().enumerate().map(|(column, a)| weight(column) * i32::from(*a)).sum()
}

/// [`gemv`] for `n` tokens: the result is `[n, m]`, one token after the other.
///
/// # Panics
/// If a row of activations is not `w.k()` long.
#[must_use]
pub fn gemm(w: PackedMatrix<'_>, a: &[QuantizedRow]) -> Vec<i32> {
    a.iter().flat_map(|a| gemv(w, a)).collect()
}

/// One projection of one token: `y = (Σ T·a) · (scale / q)` in `f32`.
#[must_use]
pub fn bit_linear(w: PackedMatrix<'_>, scale: f32, a: &QuantizedRow) -> Vec<f32> {
    let step = scale / a.q();
    gemv(w, a).into_iter().map(|sum| sum as f32 * step).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{TernaryMatrix, Trit};

    #[test]
    fn a_product_by_hand() {
        let w = TernaryMatrix::from_fn(2, 5, |row, column| Trit::ALL[(row + column) % 3]);
        // Row 0: − 0 + − 0; row 1: 0 + − 0 +.
        let a = QuantizedRow::from_values(vec![10, 20, 30, -40, 50]).unwrap();
        assert_eq!(gemv(w.view(), &a), [-10 + 30 + 40, 20 - 30 + 50]);
        assert_eq!(gemm(w.view(), &[a.clone(), a]), [60, 40, 60, 40]);
    }

    #[test]
    fn the_largest_sum_of_a_long_row_is_exact() {
        let w = TernaryMatrix::from_fn(1, 65536, |_, _| Trit::Minus);
        let a = QuantizedRow::from_values(vec![127; 65536]).unwrap();
        assert_eq!(gemv(w.view(), &a), [-127 * 65536]);
    }
}
