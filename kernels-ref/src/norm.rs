//! RMSNorm.

use crate::lanes;

/// `y[i] = (x[i] · r) · w[i]` with `r = 1 / √(Σx² / len + eps)`.
///
/// The square sum follows [`lanes::dot`]; division and square root are correctly rounded.
///
/// # Panics
/// If the lengths of `x` and `weight` differ.
#[must_use]
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    assert_eq!(x.len(), weight.len(), "rms_norm: one weight per element");
    let r = inverse_rms(lanes::dot(x, x), x.len(), eps);
    x.iter().zip(weight).map(|(x, w)| (x * r) * w).collect()
}

/// `1 / √(square_sum / len + eps)`.
#[must_use]
pub fn inverse_rms(square_sum: f32, len: usize, eps: f32) -> f32 {
    1.0 / (square_sum / len as f32 + eps).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vector_of_equal_values_becomes_its_weights() {
        assert_eq!(rms_norm(&[3.0; 20], &[0.5; 20], 0.0), [0.5; 20]);
    }

    #[test]
    fn eps_keeps_a_zero_vector_zero() {
        assert_eq!(rms_norm(&[0.0; 3], &[1.0; 3], 1e-5), [0.0; 3]);
    }
}
