//! Rotary position embedding, rotate-half pairs `(i, i + d/2)`.

/// `θ^(−2i/d)` for `i` in `0..d/2`: computed in `f64`, rounded once to `f32`.
#[must_use]
pub fn inverse_frequencies(head_dim: usize, theta: f64) -> Vec<f32> {
    (0..head_dim / 2).map(|i| libm::pow(theta, -2.0 * i as f64 / head_dim as f64) as f32).collect()
}

/// Cosine and sine of one position's angles, each `[d/2]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Rotation {
    /// Cosines.
    pub cos: Vec<f32>,
    /// Sines.
    pub sin: Vec<f32>,
}

impl Rotation {
    /// Angles are `position · frequency` rounded to `f32`, as the reference implementations have them; their sine and
    /// cosine are computed in `f64` and rounded once.
    #[must_use]
    pub fn at(position: usize, inverse_frequencies: &[f32]) -> Self {
        let angles = inverse_frequencies.iter().map(|f| f64::from(position as f32 * f));
        Self {
            cos: angles.clone().map(|angle| libm::cos(angle) as f32).collect(),
            sin: angles.map(|angle| libm::sin(angle) as f32).collect(),
        }
    }

    /// Rotates one head in place: with `a = x[i]`, `b = x[i + d/2]`,
    /// `x[i] = fma(a, cos, −(b · sin))` and `x[i + d/2] = fma(b, cos, a · sin)`.
    ///
    /// # Panics
    /// If `head` is not twice as long as the table.
    pub fn apply(&self, head: &mut [f32]) {
        let half = self.cos.len();
        assert_eq!(head.len(), 2 * half, "rope: head of length d");
        let (low, high) = head.split_at_mut(half);
        for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(&self.cos).zip(&self.sin) {
            (*a, *b) = (a.mul_add(*cos, -(*b * sin)), b.mul_add(*cos, *a * sin));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn position_zero_changes_nothing() {
        let mut head = [1.0, 2.0, 3.0, 4.0];
        Rotation::at(0, &inverse_frequencies(4, 10000.0)).apply(&mut head);
        assert_eq!(head, [1.0, 2.0, 3.0, 4.0]);
    }

    #[test]
    fn rotation_keeps_lengths_and_relative_angles() {
        let frequencies = inverse_frequencies(8, 10000.0);
        let product = |p: usize, q: usize| {
            let (mut a, mut b) =
                ([0.5, -1.0, 2.0, 0.1, 0.7, 0.3, -0.9, 1.5], [1.0, 0.2, -0.4, 0.8, 0.6, 1.1, 0.9, -1.0]);
            Rotation::at(p, &frequencies).apply(&mut a);
            Rotation::at(q, &frequencies).apply(&mut b);
            crate::lanes::dot(&a, &b)
        };
        // The product of two rotated heads depends on the distance of their positions alone.
        assert!((product(3, 7) - product(103, 107)).abs() < 1e-4);
        assert!((product(3, 7) - product(3, 8)).abs() > 1e-2);
    }
}
