//! From the integer sums of a projection to floats: alone, added to the residual stream, or as gate and up together.

use ternion_kernels_ref::activation::{gelu_tanh, relu2, silu};

use crate::formats::Activation;

#[inline(always)]
fn dequantize_body(sums: &[i32], step: f32, target: &mut [f32]) {
    assert_eq!(sums.len(), target.len(), "dequantize: equal lengths");
    for (target, sum) in target.iter_mut().zip(sums) {
        *target = *sum as f32 * step;
    }
}

#[inline(always)]
fn add_dequantized_body(sums: &[i32], step: f32, target: &mut [f32]) {
    assert_eq!(sums.len(), target.len(), "add_dequantized: equal lengths");
    for (target, sum) in target.iter_mut().zip(sums) {
        *target += *sum as f32 * step;
    }
}

/// Integer sums of a projection and the factor that makes them floats.
pub type Sums<'a> = (&'a [i32], f32);

#[inline(always)]
fn gated_body(activation: Activation, gate: Sums<'_>, up: Sums<'_>, target: &mut [f32]) {
    match activation {
        Activation::Relu2 => gated_by(relu2, gate, up, target),
        Activation::Silu => gated_by(silu, gate, up, target),
        Activation::GeluTanh => gated_by(gelu_tanh, gate, up, target),
    }
}

#[inline(always)]
fn gated_by(activation: impl Fn(f32) -> f32, gate: Sums<'_>, up: Sums<'_>, target: &mut [f32]) {
    assert!(gate.0.len() == target.len() && up.0.len() == target.len(), "gated: equal lengths");
    for ((target, g), u) in target.iter_mut().zip(gate.0).zip(up.0) {
        *target = activation(*g as f32 * gate.1) * (*u as f32 * up.1);
    }
}

#[inline(always)]
fn gated_floats_body(activation: Activation, gate: &[f32], up: &[f32], target: &mut [f32]) {
    match activation {
        Activation::Relu2 => gated_floats_by(relu2, gate, up, target),
        Activation::Silu => gated_floats_by(silu, gate, up, target),
        Activation::GeluTanh => gated_floats_by(gelu_tanh, gate, up, target),
    }
}

#[inline(always)]
fn gated_floats_by(activation: impl Fn(f32) -> f32, gate: &[f32], up: &[f32], target: &mut [f32]) {
    assert!(gate.len() == target.len() && up.len() == target.len(), "gated_floats: equal lengths");
    for ((target, gate), up) in target.iter_mut().zip(gate).zip(up) {
        *target = activation(*gate) * up;
    }
}

for_every_level! {
    /// `target[i] = sums[i] · step`, as [`ternion_kernels_ref::gemm::bit_linear`]; `step` is the matrix's scale by q.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn dequantize(sums: &[i32], step: f32, target: &mut [f32]) = dequantize_body;

    /// `target[i] += sums[i] · step`, the product rounded before it is added.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn add_dequantized(sums: &[i32], step: f32, target: &mut [f32]) = add_dequantized_body;

    /// `target[i] = activation(gate[i] · gate_step) · (up[i] · up_step)`, from the integer sums of both projections.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn gated(activation: Activation, gate: Sums<'_>, up: Sums<'_>, target: &mut [f32]) = gated_body;

    /// `target[i] = activation(gate[i]) · up[i]`.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn gated_floats(activation: Activation, gate: &[f32], up: &[f32], target: &mut [f32]) = gated_floats_body;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::tests::{assert_same_bits, floats};
    use proptest::prelude::*;

    fn sums(len: usize) -> impl Strategy<Value = Vec<i32>> {
        prop::collection::vec(prop_oneof![3 => -3000i32..3000, 1 => any::<i32>(), 1 => Just(0)], len)
    }

    type Gated = fn(Activation, Sums<'_>, Sums<'_>, &mut [f32]);

    proptest! {
        #[test]
        fn sums_become_floats_as_in_the_reference(
            (sums, up, residual) in (0usize..100).prop_flat_map(|len| (sums(len), sums(len), floats(len))),
            steps in prop::array::uniform2(1e-4f32..10.0)
        ) {
            let expected: Vec<f32> = sums.iter().map(|sum| *sum as f32 * steps[0]).collect();
            for (dequantize, add) in [
                (dequantize as fn(&[i32], f32, &mut [f32]), add_dequantized as fn(&[i32], f32, &mut [f32])),
                (dequantize_body, add_dequantized_body),
            ] {
                let mut target = vec![0.0; sums.len()];
                dequantize(&sums, steps[0], &mut target);
                assert_same_bits(&target, &expected);
                let mut target = residual.clone();
                add(&sums, steps[0], &mut target);
                let added: Vec<f32> = residual.iter().zip(&expected).map(|(x, y)| x + y).collect();
                assert_same_bits(&target, &added);
            }
            for (kind, scalar) in [
                (Activation::Relu2, relu2 as fn(f32) -> f32), (Activation::Silu, silu), (Activation::GeluTanh, gelu_tanh)
            ] {
                let expected: Vec<f32> = expected.iter().zip(&up)
                    .map(|(gate, up)| scalar(*gate) * (*up as f32 * steps[1])).collect();
                for gated in [gated as Gated, gated_body] {
                    let mut target = vec![0.0; sums.len()];
                    gated(kind, (&sums, steps[0]), (&up, steps[1]), &mut target);
                    assert_same_bits(&target, &expected);
                }
                let floats = |sums: &[i32], step: f32| sums.iter().map(|sum| *sum as f32 * step).collect::<Vec<_>>();
                let (gate, up) = (floats(&sums, steps[0]), floats(&up, steps[1]));
                for gated in [gated_floats as fn(Activation, &[f32], &[f32], &mut [f32]), gated_floats_body] {
                    let mut target = vec![0.0; sums.len()];
                    gated(kind, &gate, &up, &mut target);
                    assert_same_bits(&target, &expected);
                }
            }
        }
    }
}
