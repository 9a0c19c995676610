//! Rotary position embedding of all heads of one token.

#[inline(always)]
fn rotate_body(heads: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    assert!(sin.len() == half && heads.len().is_multiple_of((2 * half).max(1)), "rotate: heads of twice the table");
    for head in heads.chunks_exact_mut((2 * half).max(1)) {
        let (low, high) = head.split_at_mut(half);
        for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
            (*a, *b) = (a.mul_add(*cos, -(*b * sin)), b.mul_add(*cos, *a * sin));
        }
    }
}

for_every_level! {
    /// Rotates `heads`, `[heads, 2 · cos.len()]`, in place by the angles of one position, as
    /// [`ternion_kernels_ref::rope::Rotation::apply`] each of them.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn rotate(heads: &mut [f32], cos: &[f32], sin: &[f32]) = rotate_body;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::tests::{assert_same_bits, floats};
    use proptest::prelude::*;
    use ternion_kernels_ref::rope::{Rotation, inverse_frequencies};

    proptest! {
        #[test]
        fn heads_turn_as_in_the_reference(
            (half, heads) in (1usize..40, 1usize..4).prop_flat_map(|(half, n)| (Just(half), floats(2 * half * n))),
            position in 0usize..5000
        ) {
            let rotation = Rotation::at(position, &inverse_frequencies(2 * half, 10000.0));
            let mut expected = heads.clone();
            expected.chunks_exact_mut(2 * half).for_each(|head| rotation.apply(head));
            for rotate in [rotate as fn(&mut [f32], &[f32], &[f32]), rotate_body] {
                let mut heads = heads.clone();
                rotate(&mut heads, &rotation.cos, &rotation.sin);
                assert_same_bits(&heads, &expected);
            }
        }
    }
}
