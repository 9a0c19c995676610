//! Quantisation of weights (absmean, per tensor) and activations (absmax int8, per token), as BitNet b1.58 defines it.
//!
//! Weights: `s = max(mean|W|, 1e-5)`, `T = clamp(round(W · (1/s)), −1, 1)`.
//! Activations: `q = 127 / max(max|x|, 1e-5)`, `a = clamp(round(x · q), −127, 127)`.
//! Both round half to even. A projection is then `y = (Σ T·a) · (s / q)`.

use crate::{TernaryMatrix, Trit};

/// The smallest scale of a tensor and the smallest absolute maximum of a token.
pub const MIN_SCALE: f32 = 1e-5;

/// A ternary matrix and the one factor that turns it back into weights.
#[derive(Clone, Debug, PartialEq)]
pub struct Absmean {
    /// The ternary weights, `[m, k]`.
    pub trits: TernaryMatrix,
    /// Factor `s` of the whole matrix.
    pub scale: f32,
}

/// The absmean scale of a tensor: absolute values summed in `f64` in index order, divided by their number, rounded to
/// `f32` once.
#[must_use]
pub fn absmean_scale(weights: impl IntoIterator<Item = f32>) -> f32 {
    let (sum, count) = weights.into_iter().fold((0.0, 0u64), |(sum, count), w| (sum + f64::from(w.abs()), count + 1));
    ((sum / count.max(1) as f64) as f32).max(MIN_SCALE)
}

/// The trit of one weight under an absmean scale; `reciprocal` is `1 / s` in `f32`. NaN becomes 0.
#[must_use]
pub fn absmean_trit(weight: f32, reciprocal: f32) -> Trit {
    match (weight * reciprocal).round_ties_even() {
        t if t >= 1.0 => Trit::Plus,
        t if t <= -1.0 => Trit::Minus,
        _ => Trit::Zero,
    }
}

/// Quantises `weights`, `[m, k]` row-major.
///
/// # Panics
/// If `weights` does not have `m · k` elements.
#[must_use]
pub fn absmean(m: usize, k: usize, weights: &[f32]) -> Absmean {
    assert_eq!(weights.len(), m * k, "absmean: [m, k] weights");
    let scale = absmean_scale(weights.iter().copied());
    let reciprocal = 1.0 / scale;
    let trits = TernaryMatrix::from_fn(m, k, |row, column| absmean_trit(weights[row * k + column], reciprocal));
    Absmean { trits, scale }
}

/// The activations of one token as int8, never −128, with their scale.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizedRow {
    values: Vec<i8>,
    q: f32,
}

impl QuantizedRow {
    /// Quantises one token's activations. NaN becomes 0.
    #[must_use]
    pub fn new(x: &[f32]) -> Self {
        let q = absmax_scale(x);
        Self { values: x.iter().map(|x| absmax_value(*x, q)).collect(), q }
    }

    /// Takes int8 values as they are, with scale 1; `None` if one of them is −128.
    #[must_use]
    pub fn from_values(values: Vec<i8>) -> Option<Self> {
        values.iter().all(|v| *v != i8::MIN).then_some(Self { values, q: 1.0 })
    }

    /// The int8 values, each in [−127, 127].
    #[must_use]
    pub fn values(&self) -> &[i8] {
        &self.values
    }

    /// The scale q: `x ≈ a / q`.
    #[must_use]
    pub fn q(&self) -> f32 {
        self.q
    }

    /// `Σ a`, which kernels on codes `T + 1` subtract.
    #[must_use]
    pub fn sum(&self) -> i32 {
        self.values.iter().map(|v| i32::from(*v)).sum()
    }
}

/// `q = 127 / max(max|x|, 1e-5)`. The maximum does not depend on order; NaN does not take part in it.
#[must_use]
pub fn absmax_scale(x: &[f32]) -> f32 {
    127.0 / x.iter().fold(0.0, |max: f32, x| max.max(x.abs())).max(MIN_SCALE)
}

/// `clamp(round(x · q), −127, 127)`.
#[must_use]
pub fn absmax_value(x: f32, q: f32) -> i8 {
    (x * q).round_ties_even().clamp(-127.0, 127.0) as i8
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn weights_round_half_to_even() {
        // The scale is exactly 1: halves stay 0, anything beyond becomes ±1.
        let quantised = absmean(1, 8, &[0.5, -0.5, 0.500_001, -0.500_001, 3.0, -3.0, 0.0, 0.0]);
        let trits: Vec<i32> = (0..8).map(|column| quantised.trits.trit(0, column).value()).collect();
        assert!((quantised.scale - 1.0).abs() < 1e-6);
        assert_eq!(trits, [0, 0, 1, -1, 1, -1, 0, 0]);
    }

    #[test]
    fn an_all_zero_tensor_and_an_all_zero_token_have_the_smallest_scale() {
        assert_eq!(absmean(2, 2, &[0.0; 4]).scale, MIN_SCALE);
        let row = QuantizedRow::new(&[0.0; 5]);
        assert_eq!(row.q(), 127.0 / MIN_SCALE);
        assert_eq!(row.values(), [0; 5]);
    }

    #[test]
    fn minus_128_cannot_enter_a_row() {
        assert!(QuantizedRow::from_values(vec![0, -128]).is_none());
        assert!(QuantizedRow::from_values(vec![127, -127]).is_some());
    }

    proptest! {
        #[test]
        fn the_largest_activation_becomes_127_and_every_error_is_at_most_half_a_step(
            x in prop::collection::vec(-1e4f32..1e4, 1..300)
        ) {
            let row = QuantizedRow::new(&x);
            let absmax = x.iter().fold(0.0f32, |max, x| max.max(x.abs()));
            prop_assume!(absmax > 1e-3);
            prop_assert_eq!(row.values().iter().map(|v| v.unsigned_abs()).max(), Some(127));
            for (a, x) in row.values().iter().zip(&x) {
                prop_assert!((f64::from(*a) / f64::from(row.q()) - f64::from(*x)).abs() <= 0.5001 / f64::from(row.q()));
            }
        }

        #[test]
        fn quantising_any_floats_at_all_stays_in_range(x in prop::collection::vec(any::<f32>(), 0..50)) {
            prop_assert!(QuantizedRow::new(&x).values().iter().all(|v| *v != i8::MIN));
        }

        #[test]
        fn absmean_of_its_own_ternary_weights_keeps_the_trits(
            trits in prop::collection::vec(prop::sample::select(&Trit::ALL[..]), 32), s in 1e-3f32..10.0
        ) {
            let weights: Vec<f32> = trits.iter().map(|t| t.value() as f32 * s).collect();
            let quantised = absmean(4, 8, &weights);
            for (i, trit) in trits.iter().enumerate() {
                prop_assert_eq!(quantised.trits.trit(i / 8, i % 8), *trit);
            }
        }
    }
}
