//! `prepare-planes`: every fourth int8 value side by side, for
//! [`ActivationFormat::Planes`](crate::ActivationFormat::Planes).
//!
//! Four vectors of values become one vector of each plane: bytes at even and at odd places are parted, twice.

use crate::ActivationFormat;
use crate::activations::plane_bytes;
use crate::machine::{ActivationArgument as Argument, Machine, Vector, advance, repeat};

pub(super) fn emit(m: &mut dyn Machine, k: usize) {
    let places = [Argument::Input, Argument::Output].map(|argument| m.field(argument as usize));
    let [input, output] = places.map(|place| m.int_variable(place));
    let (vector, plane) = (m.vector_bytes(), plane_bytes(k, 4));
    // Values come padded with zeros to 64 bytes, so there are whole vectors of them.
    let vectors = ActivationFormat::Plain.bytes(k) / vector;
    let step = |m: &mut dyn Machine, vectors: usize| {
        let (from, to) = (m.get_int(input), m.get_int(output));
        let values = [0, 1, 2, 3].map(|i| if i < vectors { m.load(from, (i * vector) as i32) } else { m.zero() });
        for (j, bytes) in deal(m, values).into_iter().enumerate() {
            m.store(to, (j * plane) as i32, bytes);
        }
        advance(m, input, (4 * vector) as i32);
        advance(m, output, vector as i32);
    };
    repeat(m, vectors / 4, |m| step(m, 4));
    let mut done = vectors / 4;
    if !vectors.is_multiple_of(4) {
        step(m, vectors % 4);
        done += 1;
    }

    // Zeros to the end of each plane, and after the last.
    let (zero, output) = (m.zero(), m.field(Argument::Output as usize));
    let ends = (0..4).flat_map(|j| (j * plane + done * vector..(j + 1) * plane).step_by(vector));
    for at in ends.chain((4 * plane..ActivationFormat::Planes.bytes(k)).step_by(vector)) {
        m.store(output, at as i32, zero);
    }
}

/// The bytes of four vectors, one after the other, dealt out by turns to four vectors.
pub(super) fn deal(m: &mut dyn Machine, [a, b, c, d]: [Vector; 4]) -> [Vector; 4] {
    let ([even_low, odd_low], [even_high, odd_high]) = (m.deinterleave8(a, b), m.deinterleave8(c, d));
    let ([first, third], [second, fourth]) = (m.deinterleave8(even_low, even_high), m.deinterleave8(odd_low, odd_high));
    [first, second, third, fourth]
}
