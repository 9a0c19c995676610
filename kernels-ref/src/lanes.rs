//! The fixed order of floating-point sums.
//!
//! Element `i` is added in lane `i mod 16`; the sixteen lanes are then added pairwise, neighbours first:
//! `((l0+l1)+(l2+l3)) + … `. Sixteen lanes are one AVX-512 register, two of AVX2 and four of 128 bits, so every machine
//! can follow the order at full width.

/// Number of lanes of every floating-point sum.
pub const LANES: usize = 16;

/// Adds sixteen lanes in one pairwise tree.
#[must_use]
pub fn tree_sum(lanes: [f32; LANES]) -> f32 {
    let mut sums = lanes;
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            sums[i] = sums[2 * i] + sums[2 * i + 1];
        }
        width /= 2;
    }
    sums[0]
}

/// `Σ x[i]`, not yet added across lanes.
#[must_use]
pub fn lane_sums(x: &[f32]) -> [f32; LANES] {
    let mut lanes = [0.0; LANES];
    for (i, x) in x.iter().enumerate() {
        lanes[i % LANES] += x;
    }
    lanes
}

/// `Σ x[i]`.
#[must_use]
pub fn sum(x: &[f32]) -> f32 {
    tree_sum(lane_sums(x))
}

/// `Σ a[i] · b[i]`, every step one fused multiply-add.
///
/// # Panics
/// If the lengths differ.
#[must_use]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len(), "dot: equal lengths");
    let mut lanes = [0.0; LANES];
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        lanes[i % LANES] = a.mul_add(*b, lanes[i % LANES]);
    }
    tree_sum(lanes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tree_adds_neighbours_first() {
        // Next to 1e8, whose neighbour in f32 is 8 away, a lone 4 is lost but two 4s added to each other first are not.
        let mut lanes = [0.0; LANES];
        (lanes[0], lanes[2], lanes[3]) = (1e8, 4.0, 4.0);
        assert_eq!(tree_sum(lanes), 100_000_008.0);
        lanes.swap(1, 3);
        assert_eq!(tree_sum(lanes), 100_000_000.0);
    }

    #[test]
    fn sums_and_dots_of_any_length() {
        for length in 0..40 {
            let x: Vec<f32> = (0..length).map(|i| i as f32).collect();
            let expected = (0..length).sum::<i32>() as f32;
            assert_eq!(sum(&x), expected);
            assert_eq!(dot(&x, &vec![2.0; x.len()]), 2.0 * expected);
        }
    }
}
