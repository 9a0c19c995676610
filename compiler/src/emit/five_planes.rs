//! `prepare-five-planes`: every fifth int8 value side by side, for
//! [`ActivationFormat::FivePlanes`](crate::ActivationFormat::FivePlanes).
//!
//! Five vectors of 16 values become one vector of each plane: byte i of plane j is value 5i + j, which a byte shuffle
//! fetches from one of the five vectors while the others give 0. On 128-bit vectors only: wider ones shuffle within 128
//! bits all the same, and would first have to be put together from places 80 bytes apart.

use crate::ActivationFormat;
use crate::activations::plane_bytes;
use crate::machine::{ActivationArgument as Argument, Machine, advance, repeat};

const PLANES: usize = 5;

pub(super) fn emit(m: &mut dyn Machine, k: usize) {
    let places = [Argument::Input, Argument::Output].map(|argument| m.field(argument as usize));
    let [input, output] = places.map(|place| m.int_variable(place));
    let (vector, plane) = (m.vector_bytes(), plane_bytes(k, PLANES));
    let vectors = ActivationFormat::Plain.bytes(k) / vector;
    let step = |m: &mut dyn Machine, vectors: usize| {
        let (from, to) = (m.get_int(input), m.get_int(output));
        let values: Vec<_> = (0..vectors).map(|source| m.load(from, (source * vector) as i32)).collect();
        for j in 0..PLANES {
            let mut bytes = m.zero();
            for (source, values) in values.iter().enumerate() {
                let places: Vec<_> = (0..vector).map(|i| place(PLANES * i + j, source * vector, vector)).collect();
                let places = m.constant_bytes(&places);
                let found = m.lookup(*values, places);
                bytes = m.add8(bytes, found);
            }
            m.store(to, (j * plane) as i32, bytes);
        }
        advance(m, input, (PLANES * vector) as i32);
        advance(m, output, vector as i32);
    };
    repeat(m, vectors / PLANES, |m| step(m, PLANES));
    let mut done = vectors / PLANES;
    if !vectors.is_multiple_of(PLANES) {
        step(m, vectors % PLANES);
        done += 1;
    }

    // Zeros to the end of each plane, and after the last.
    let (zero, output) = (m.zero(), m.field(Argument::Output as usize));
    let ends = (0..PLANES).flat_map(|j| (j * plane + done * vector..(j + 1) * plane).step_by(vector));
    for at in ends.chain((PLANES * plane..ActivationFormat::FivePlanes.bytes(k)).step_by(vector)) {
        m.store(output, at as i32, zero);
    }
}

/// Where value `number` is in the vector whose first value is number `first`; 128 if it is not there.
fn place(number: usize, first: usize, vector: usize) -> u8 {
    number.checked_sub(first).filter(|place| *place < vector).map_or(128, |place| place as u8)
}
