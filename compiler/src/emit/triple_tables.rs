//! `prepare-triple-tables`: the sums of three trits with each three activations, for
//! [`ActivationFormat::TripleTables`](crate::ActivationFormat::TripleTables).
//!
//! A 32-bit lane is an entry of a table: byte multiply-adds of its codes, trits plus 1, with four activations in every
//! lane, the fourth by 0, give `Σ code·x`; from that `Σ x` is subtracted. A multiplication by the reciprocal divides by the
//! base of the parts, and dealing out bytes by fours puts the parts apart, as for [`pair_tables`](super::pair_tables).

use super::planes::deal;
use crate::ActivationFormat;
use crate::activations::{TRIPLE_BASE, TRIPLES};
use crate::machine::{ActivationArgument as Argument, Machine, advance, repeat};

/// Activations of a table.
const TRIPLE: usize = 3;

/// Bytes of its entries in 32 bits each.
const ENTRIES_BYTES: usize = 64;

/// Bytes of a table.
const TABLE_BYTES: usize = 32;

/// What makes every sum positive: a multiple of the base that is larger than any.
const LIFT: i32 = 13;

pub(super) fn emit(m: &mut dyn Machine, k: usize) {
    let places = [Argument::Input, Argument::Output].map(|argument| m.field(argument as usize));
    let [input, output] = places.map(|place| m.int_variable(place));
    // As many tables at a time as fill four vectors with entries.
    let (vector, at_once) = (m.vector_bytes(), m.vector_bytes() / 16);
    // Tables from number `first` on, of which only those near the end of the activations must know it.
    let step = |m: &mut dyn Machine, first: usize| {
        let (from, to) = (m.get_int(input), m.get_int(output));
        let (lift, reciprocal) = (m.splat32(LIFT * TRIPLE_BASE), m.splat32((1 << 16) / TRIPLE_BASE + 1));
        let (byte, low_bias, high_bias) = (m.splat32(0xff), m.splat32(16), m.splat32(LIFT));
        let parts = [0, 1, 2, 3].map(|part| {
            let (table, entry) = (part * vector / ENTRIES_BYTES, part * vector % ENTRIES_BYTES);
            // Four activations that lie wholly within the row are read; those of the table may come last among them.
            let end = TRIPLE * (first + table) + 4;
            let shift = end.saturating_sub(ActivationFormat::Plain.bytes(k));
            let four = m.load_splat32(from, (TRIPLE * table) as i32 - shift as i32);
            let [codes, ones] = [codes, ones].map(|bytes| bytes(shift));
            let [codes, ones] = [codes, ones].map(|bytes| m.constant_bytes(&bytes[entry..entry + vector]));
            let (coded, plain) = (m.multiply_add_pairs(codes, four), m.multiply_add_pairs(ones, four));
            let pairs = m.sub16(coded, plain);
            let sum = m.sum_pairs16(pairs);
            let lifted = m.add32(sum, lift);
            let product = m.multiply32(lifted, reciprocal);
            let high = m.shift_right_signed32(product, 16);
            // l = lifted − 31·high − 16.
            let times_32 = m.shift_left32(high, 5);
            let low = m.sub32(lifted, times_32);
            let low = m.add32(low, high);
            let low = m.sub32(low, low_bias);
            let low = m.and(low, byte);
            let high = m.sub32(high, high_bias);
            let high = m.shift_left32(high, 8);
            m.add32(low, high)
        });
        let [low, high, ..] = deal(m, parts);
        for table in 0..at_once {
            m.store128(to, (table * TABLE_BYTES) as i32, low, table);
            m.store128(to, (table * TABLE_BYTES + 16) as i32, high, table);
        }
        advance(m, input, (at_once * TRIPLE) as i32);
        advance(m, output, (at_once * TABLE_BYTES) as i32);
    };
    let steps = ActivationFormat::TripleTables.bytes(k) / TABLE_BYTES / at_once;
    let inside = ((ActivationFormat::Plain.bytes(k) - 1) / TRIPLE / at_once).min(steps);
    repeat(m, inside, |m| step(m, 0));
    (inside..steps).for_each(|number| step(m, number * at_once));
}

/// Trits plus 1 of every entry, for activations that begin at byte `shift` of four.
fn codes(shift: usize) -> [u8; ENTRIES_BYTES] {
    std::array::from_fn(|i| match (i % 4).checked_sub(shift) {
        Some(place) if place < TRIPLE => (TRIPLES[place][i / 4] + 1) as u8,
        _ => 0,
    })
}

/// 1 for each of these activations.
fn ones(shift: usize) -> [u8; ENTRIES_BYTES] {
    std::array::from_fn(|i| u8::from((i % 4).checked_sub(shift).is_some_and(|place| place < TRIPLE)))
}
