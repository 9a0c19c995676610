//! `quantize`: one token's activations as int8, by their largest magnitude.
//!
//! `q = 127 / max(max|x|, 10⁻⁵)` and `a = round(x · q)`, ties to even, as [`ternion_kernels_ref::QuantizedRow::new`].
//! The reference also clamps, which has nothing to do here: a number is at most the maximum, `q` is at most
//! `127 / maximum · (1 + 2⁻²⁴)`, so their product rounds to at most 127; and where the maximum is infinite, `q` is 0 and
//! every product is 0 or NaN, which gives 0.
//!
//! ```text
//! for block of 64: max = larger(|x|, max)         lanes apart, NaN takes no part
//! q = 127 / larger(max, 1e-5)
//! for block of 64: a = round(x · q), sum += a     int8 values, padded with zeros to a whole block
//! ```

use ternion_kernels_ref::quantize::MIN_SCALE;

use super::floats::{BLOCK, Block, Floats, for_each_block, vectors};
use crate::machine::{ActivationArgument as Argument, Machine, Vector, advance, fold_lanes, splat_float};

/// Largest values that are looked for side by side, so that one need not wait for another.
const MAXIMA: usize = 4;

pub(super) fn emit(m: &mut dyn Machine, k: usize) {
    let [input, scratch] = [Argument::Input, Argument::Scratch].map(|argument| m.field(argument as usize));
    let x = Floats::new(m, k, input, scratch, 0);
    quantize(m, k, [&x], |m, [x], i| x.load(m, i));
}

/// Emits the quantisation of `k` floats, of which `element` gives vector `i` of a block.
pub(super) fn quantize<const N: usize>(
    m: &mut dyn Machine,
    k: usize,
    rows: [&Floats; N],
    element: impl Fn(&mut dyn Machine, &[Block; N], usize) -> Vector,
) {
    let max = absolute_max(m, k, rows, &element);
    let (smallest, largest) = (splat_float(m, MIN_SCALE), splat_float(m, 127.0));
    let max = m.larger_float(max, smallest);
    let q = m.divide_float(largest, max);

    let zero = m.zero();
    let sum = m.vector_variable(zero);
    let output = m.field(Argument::Output as usize);
    let output = m.int_variable(output);
    for_each_block(m, k, rows, |m, blocks| {
        let target = m.get_int(output);
        let ones = m.splat8(1);
        for group in 0..vectors(m) / 4 {
            let numbers = [0, 1, 2, 3].map(|i| {
                let x = element(m, blocks, 4 * group + i);
                let scaled = m.multiply_float(x, q);
                m.round_float(scaled)
            });
            // The lowest byte of every number.
            let ([low, _], [high, _]) =
                (m.deinterleave8(numbers[0], numbers[1]), m.deinterleave8(numbers[2], numbers[3]));
            let [values, _] = m.deinterleave8(low, high);
            m.store(target, (group * m.vector_bytes()) as i32, values);
            let pairs = m.multiply_add_pairs(ones, values);
            let quads = m.sum_pairs16(pairs);
            let before = m.get(sum);
            let after = m.add32(before, quads);
            m.set(sum, after);
        }
        advance(m, output, BLOCK as i32);
    });
    let sum = m.get(sum);
    let sum = fold_lanes(m, sum, |m, a, b| m.add32(a, b));
    let result = m.field(Argument::Result as usize);
    m.store32(result, 0, q);
    m.store32(result, 4, sum);
}

/// The largest magnitude, in every lane; 0 if all are NaN.
fn absolute_max<const N: usize>(
    m: &mut dyn Machine,
    k: usize,
    rows: [&Floats; N],
    element: &impl Fn(&mut dyn Machine, &[Block; N], usize) -> Vector,
) -> Vector {
    let zero = m.zero();
    let maxima = [(); MAXIMA].map(|()| m.vector_variable(zero));
    for_each_block(m, k, rows, |m, blocks| {
        let mut values = maxima.map(|max| m.get(max));
        let without_sign = m.splat32(i32::MAX);
        for i in 0..vectors(m) {
            let x = element(m, blocks, i);
            let magnitude = m.and(x, without_sign);
            values[i % MAXIMA] = m.larger_float(magnitude, values[i % MAXIMA]);
        }
        maxima.iter().zip(values).for_each(|(max, value)| m.set(*max, value));
    });
    let [a, b, c, d] = maxima.map(|max| m.get(max));
    let (low, high) = (m.larger_float(a, b), m.larger_float(c, d));
    let max = m.larger_float(low, high);
    fold_lanes(m, max, |m, a, b| m.larger_float(a, b))
}
