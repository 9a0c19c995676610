//! Activation functions of gated feed-forward networks.

use crate::math;

/// Square root of 2/π, of the tanh approximation of GELU.
const SQRT_2_OVER_PI: f32 = 0.797_884_6;

/// `max(x, 0)²`.
#[must_use]
#[inline(always)]
pub fn relu2(x: f32) -> f32 {
    let x = x.max(0.0);
    x * x
}

/// `x · sigmoid(x)`, as `x / (1 + e^−x)`.
#[must_use]
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    x / (1.0 + math::exp(-x))
}

/// `x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))`: the tanh approximation that Gemma uses.
#[must_use]
#[inline(always)]
pub fn gelu_tanh(x: f32) -> f32 {
    let inner = SQRT_2_OVER_PI * (0.044_715 * x * x).mul_add(x, x);
    0.5 * x * (1.0 + math::tanh(inner))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relu2_is_zero_below_zero() {
        assert_eq!((relu2(-3.0), relu2(0.0), relu2(3.0)), (0.0, 0.0, 9.0));
    }

    #[test]
    fn silu_and_gelu_agree_with_their_formulas_in_f64() {
        for step in -100..=100 {
            let x = step as f32 * 0.1;
            let wide = f64::from(x);
            assert!((f64::from(silu(x)) - wide / (1.0 + libm::exp(-wide))).abs() < 2e-6);
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (wide + 0.044715 * wide * wide * wide);
            assert!((f64::from(gelu_tanh(x)) - 0.5 * wide * (1.0 + libm::tanh(inner))).abs() < 2e-6);
        }
    }
}
