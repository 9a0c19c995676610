//! Softmax over one row.

use crate::{lanes, math};

/// `e^(x[i] − max) / Σ e^(x[j] − max)`; the sum follows [`lanes::sum`]. An empty row stays empty.
#[must_use]
pub fn softmax(x: &[f32]) -> Vec<f32> {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exps: Vec<f32> = x.iter().map(|x| math::exp(x - max)).collect();
    let sum = lanes::sum(&exps);
    exps.into_iter().map(|e| e / sum).collect()
}

#[cfg(test)]
mod tests {
    use super::softmax;

    #[test]
    fn probabilities_add_up_to_one_and_keep_the_order() {
        let p = softmax(&[1.0, 3.0, 2.0, -50.0]);
        assert!((p.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        assert!(p[1] > p[2] && p[2] > p[0] && p[0] > p[3]);
        assert!(softmax(&[]).is_empty());
    }

    #[test]
    fn a_common_offset_does_not_matter() {
        assert_eq!(softmax(&[1.0, 2.0]), softmax(&[1001.0, 1002.0]));
    }
}
