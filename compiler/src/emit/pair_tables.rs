//! `prepare-pair-tables`: the sums of two trits with each pair of activations, for
//! [`ActivationFormat::PairTables`](crate::ActivationFormat::PairTables).
//!
//! A 32-bit lane is entry `c₀ + 4·c₁` of the tables of two pairs, in 16 bits each: `c₀·x + c₁·y` is one byte multiply-add
//! of the codes, the same for all tables, with four activations in every lane. From that `x + y`, one more of them, is
//! subtracted. Low and high parts go into the two bytes of the 16 bits, and dealing out the bytes by fours puts them into
//! the four halves of the two tables.

use super::planes::deal;
use crate::activations::PAIR_BIAS;
use crate::machine::{ActivationArgument as Argument, Machine, advance, repeat};

/// Activations of two pairs, which share 32 bits.
const GROUP: usize = 4;

/// Bytes of their two tables.
const GROUP_BYTES: usize = 64;

pub(super) fn emit(m: &mut dyn Machine, k: usize) {
    let places = [Argument::Input, Argument::Output].map(|argument| m.field(argument as usize));
    let [input, output] = places.map(|place| m.int_variable(place));
    // As many groups at a time as fill four vectors.
    let (vector, at_once) = (m.vector_bytes(), m.vector_bytes() / 16);
    let entries = |byte: fn(usize, usize) -> u8| -> [u8; GROUP_BYTES] {
        std::array::from_fn(|i| match (i / 4 % 4, i / 16) {
            (c0, c1) if c0 < 3 && c1 < 3 => byte(i, [c0, c1][i % 2]),
            _ => 0,
        })
    };
    let (codes, valid) = (entries(|_, code| code as u8), entries(|_, _| 0xff));
    let step = |m: &mut dyn Machine, groups: usize| {
        let (from, to) = (m.get_int(input), m.get_int(output));
        let (ones, bias) = (m.splat8(1), m.splat16(PAIR_BIAS as u16));
        let (low_bits, high_bits) = (m.splat16(0x003f), m.splat16(0x0700));
        let parts = [0, 1, 2, 3].map(|part| {
            // Activations come padded with zeros to 64, so there are whole groups of groups of them.
            let (group, first) = (part * vector / GROUP_BYTES, part * vector % GROUP_BYTES);
            let activations = m.load_splat32(from, (group * GROUP) as i32);
            let (codes, valid) =
                (m.constant_bytes(&codes[first..first + vector]), m.constant_bytes(&valid[first..first + vector]));
            let sum = m.multiply_add_pairs(codes, activations);
            let both = m.multiply_add_pairs(ones, activations);
            let shift = m.sub16(bias, both);
            let entry = m.add16(sum, shift);
            let entry = m.and(entry, valid);
            let low = m.and(entry, low_bits);
            let high = m.shift_left16(entry, 2);
            let high = m.and(high, high_bits);
            m.add16(low, high)
        });
        let halves = deal(m, parts);
        for group in 0..groups {
            for (half, bytes) in halves.into_iter().enumerate() {
                m.store128(to, (group * GROUP_BYTES + 16 * half) as i32, bytes, group);
            }
        }
        advance(m, input, (groups * GROUP) as i32);
        advance(m, output, (groups * GROUP_BYTES) as i32);
    };
    let groups = k.div_ceil(GROUP);
    repeat(m, groups / at_once, |m| step(m, at_once));
    if !groups.is_multiple_of(at_once) {
        step(m, groups % at_once);
    }
}
