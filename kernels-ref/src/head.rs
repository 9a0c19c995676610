//! From the last hidden state to logits, and what is read off them without sampling.

use crate::lanes;

/// `logits[v] = Σ x[i] · rows[v][i]` for every row of the head, each by [`lanes::dot`].
///
/// `rows` is `[vocabulary, hidden]`, widened to `f32` from the file's own bf16 or f16.
#[must_use]
pub fn logits<'a>(x: &[f32], rows: impl IntoIterator<Item = &'a [f32]>) -> Vec<f32> {
    rows.into_iter().map(|row| lanes::dot(x, row)).collect()
}

/// Index of the largest logit; ties go to the lowest index. `None` if there is none. NaN never wins.
#[must_use]
pub fn argmax(logits: &[f32]) -> Option<usize> {
    let mut best = None;
    for (i, logit) in logits.iter().enumerate() {
        if !logit.is_nan() && best.is_none_or(|best: usize| *logit > logits[best]) {
            best = Some(i);
        }
    }
    best
}

/// `ln softmax(logits)[token]` in `f64`, exponentials summed in index order.
///
/// # Panics
/// If `token` is out of range.
#[must_use]
pub fn log_probability(logits: &[f32], token: usize) -> f64 {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|logit| libm::exp(f64::from(*logit) - max)).sum();
    f64::from(logits[token]) - max - libm::log(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn argmax_takes_the_lowest_of_equals_and_skips_nan() {
        assert_eq!(argmax(&[f32::NAN, 1.0, 3.0, 3.0]), Some(2));
        assert_eq!(argmax(&[f32::NEG_INFINITY]), Some(0));
        assert_eq!(argmax(&[]), None);
    }

    #[test]
    fn log_probabilities_are_those_of_a_softmax() {
        let logits = [0.5, -1.0, 2.0];
        let total: f64 = (0..3).map(|token| log_probability(&logits, token).exp()).sum();
        assert!((total - 1.0).abs() < 1e-12);
    }
}
