//! `prepare-plain`: int8 values as they are, for [`ActivationFormat::Plain`](crate::ActivationFormat::Plain).

use crate::ActivationFormat;
use crate::machine::{ActivationArgument as Argument, Machine, advance, repeat};

pub(super) fn emit(m: &mut dyn Machine, k: usize) {
    let places = [Argument::Input, Argument::Output].map(|argument| m.field(argument as usize));
    let [input, output] = places.map(|place| m.int_variable(place));
    let vector = m.vector_bytes();
    repeat(m, ActivationFormat::Plain.bytes(k) / vector, |m| {
        let (from, to) = (m.get_int(input), m.get_int(output));
        let values = m.load(from, 0);
        m.store(to, 0, values);
        advance(m, input, vector as i32);
        advance(m, output, vector as i32);
    });
}
