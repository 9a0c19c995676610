//! `norm-quantize`: RMSNorm and then [`quantize`](super::quantize), in one.
//!
//! `y = (x · r) · w` with `r = 1 / √(Σx² / k + eps)`, as [`ternion_kernels_ref::norm::rms_norm`]. `Σx²` keeps the order of
//! [`ternion_kernels_ref::lanes`] whatever the width of a vector: element i is added in lane i mod 16 by a fused
//! multiply-add, and neighbouring lanes are added first. `y` is computed twice, for its maximum and for its int8 values,
//! which is cheaper than storing it.

use ternion_kernels_ref::lanes::LANES;

use super::floats::{Floats, for_each_block, vectors};
use super::quantize::quantize;
use crate::machine::{ActivationArgument as Argument, Machine, Vector, fold_lanes, splat_float};

pub(super) fn emit(m: &mut dyn Machine, k: usize) {
    let [input, weights, scratch] =
        [Argument::Input, Argument::Weights, Argument::Scratch].map(|argument| m.field(argument as usize));
    let x = Floats::new(m, k, input, scratch, 0);
    let weights = Floats::new(m, k, weights, scratch, 1);
    let r = inverse_rms(m, k, &x);
    quantize(m, k, [&x, &weights], |m, [x, weights], i| {
        let x = x.load(m, i);
        let scaled = m.multiply_float(x, r);
        let weight = weights.load(m, i);
        m.multiply_float(scaled, weight)
    });
}

/// `1 / √(Σx² / k + eps)` in every lane.
fn inverse_rms(m: &mut dyn Machine, k: usize, x: &Floats) -> Vector {
    let square_sum = square_sum(m, k, x);
    let length = splat_float(m, k as f32);
    let mean = m.divide_float(square_sum, length);
    let eps = m.field(Argument::Epsilon as usize);
    let eps = m.load_splat32(eps, 0);
    let sum = m.add_float(mean, eps);
    let rms = m.square_root_float(sum);
    let one = splat_float(m, 1.0);
    m.divide_float(one, rms)
}

fn square_sum(m: &mut dyn Machine, k: usize, x: &Floats) -> Vector {
    let zero = m.zero();
    // The sixteen lanes, in as many vectors as it takes.
    let sums: Vec<_> = (0..4 * LANES / m.vector_bytes()).map(|_| m.vector_variable(zero)).collect();
    for_each_block(m, k, [x], |m, [x]| {
        let mut values: Vec<_> = sums.iter().map(|sum| m.get(*sum)).collect();
        for i in 0..vectors(m) {
            let (x, part) = (x.load(m, i), i % sums.len());
            values[part] = m.multiply_add_float(x, x, values[part]);
        }
        sums.iter().zip(values).for_each(|(sum, value)| m.set(*sum, value));
    });
    let mut sums: Vec<_> = sums.into_iter().map(|sum| m.get(sum)).collect();
    sums.iter_mut().for_each(|sum| *sum = fold_lanes(m, *sum, |m, a, b| m.add_float(a, b)));
    while sums.len() > 1 {
        sums = sums.chunks(2).map(|pair| m.add_float(pair[0], pair[1])).collect();
    }
    sums[0]
}
