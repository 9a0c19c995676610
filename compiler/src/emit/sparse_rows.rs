//! `sparse-rows`: the product of some rows, which a list names.
//!
//! In a model with relu² every gate at 0 or below makes its neuron's row of the up-projection useless. Rows lie one after
//! the other as records; the list holds where each begins. Four records at a time meet the activations as in `mad`, and
//! the records that come next are asked for meanwhile: nothing else tells the memory which they are.
//!
//! ```text
//! for 4 records of the list
//!   ask for the records `prefetch` places on
//!   for vector of k                      `unroll` vectors per turn
//!     for record: 4 × (shift, and, multiply-add)
//!   add up lanes, subtract Σa, store 4 results
//! ```

use crate::activations::plane_bytes;
use crate::machine::{Argument, Int, Machine, Vector, advance, repeat, while_at_least};
use crate::{KernelSpec, Multiply, Schedule};

/// Records that are worked on at once.
pub(crate) const RECORDS: usize = 4;

pub(super) fn emit(m: &mut dyn Machine, spec: &KernelSpec, schedule: &Schedule) {
    let record = schedule.layout.row_bytes(spec.k);
    let (list, out, left) = (m.argument(Argument::List), m.argument(Argument::Out), m.argument(Argument::Tiles));
    let [list, out, left] = [list, out, left].map(|start| m.int_variable(start));
    while_at_least(m, left, RECORDS as i32, |m| {
        let here = m.get_int(list);
        ask_ahead(m, here, RECORDS, record, schedule);
        let weights = m.argument(Argument::Weights);
        let records: Vec<_> = (0..RECORDS)
            .map(|r| {
                let offset = m.load32(here, 4 * r as i32);
                let start = m.add(weights, offset);
                m.int_variable(start)
            })
            .collect();
        let activations = m.argument(Argument::Activations);
        let activations = m.int_variable(activations);
        let zero = m.zero();
        let totals: Vec<_> = (0..RECORDS).map(|_| m.vector_variable(zero)).collect();
        let (width, unroll) = (m.vector_bytes(), usize::from(schedule.unroll));
        let vectors = |m: &mut dyn Machine, count: usize| {
            let starts: Vec<_> = records.iter().map(|record| m.get_int(*record)).collect();
            let column = m.get_int(activations);
            let mut values: Vec<_> = totals.iter().map(|total| m.get(*total)).collect();
            add_vectors(m, schedule, plane_bytes(spec.k, 4), count, &starts, column, &mut values);
            for (total, value) in totals.iter().zip(values) {
                m.set(*total, value);
            }
            for variable in records.iter().chain([&activations]) {
                advance(m, *variable, (count * width) as i32);
            }
        };
        let all = record / width;
        repeat(m, all / unroll, |m| vectors(m, unroll));
        repeat(m, (all % unroll).min(1), |m| vectors(m, all % unroll));

        let sums = m.argument(Argument::Sums);
        let sum = m.load_splat32(sums, 0);
        let dots = std::array::from_fn(|r| m.get(totals[r]));
        let dots = m.sum_lanes32(dots);
        let result = m.sub32(dots, sum);
        let target = m.get_int(out);
        m.store_low128(target, 0, result);
        advance(m, list, 4 * RECORDS as i32);
        advance(m, out, 4 * RECORDS as i32);
        advance(m, left, -(RECORDS as i32));
    });
}

/// Asks for the `records` records that follow `prefetch` places after the list's place `here`.
pub(super) fn ask_ahead(m: &mut dyn Machine, here: Int, records: usize, record: usize, schedule: &Schedule) {
    if schedule.prefetch == 0 {
        return;
    }
    let weights = m.argument(Argument::Weights);
    for r in 0..records {
        let offset = m.load32(here, 4 * (i32::from(schedule.prefetch) + r as i32));
        let ahead = m.add(weights, offset);
        for line in (0..record).step_by(64) {
            m.prefetch_second_level(ahead, line as i32);
        }
    }
}

/// Adds `count` vectors of every record to `totals`, vectors of 32-bit lanes.
fn add_vectors(
    m: &mut dyn Machine,
    schedule: &Schedule,
    plane: usize,
    count: usize,
    records: &[Int],
    activations: Int,
    totals: &mut [Vector],
) {
    let width = m.vector_bytes();
    let mask = m.splat8(3);
    // With `pairs`, 16-bit sums of this turn; `Schedule::check` knows that they fit.
    let mut sums: Vec<Option<Vector>> = vec![None; totals.len()];
    for at in (0..count).map(|vector| vector * width) {
        let mut bytes: Vec<_> = records.iter().map(|record| m.load(*record, at as i32)).collect();
        for place in 0..4 {
            let activations = m.load(activations, (place * plane + at) as i32);
            for (r, bytes) in bytes.iter_mut().enumerate() {
                if place > 0 {
                    *bytes = m.shift_right16(*bytes, 2);
                }
                let codes = m.and(*bytes, mask);
                match schedule.multiply {
                    Multiply::Dot => totals[r] = m.dot(totals[r], codes, activations),
                    Multiply::Pairs => {
                        let pairs = m.multiply_add_pairs(codes, activations);
                        sums[r] = Some(match sums[r] {
                            None => pairs,
                            Some(sum) => m.add16(sum, pairs),
                        });
                    }
                }
            }
        }
    }
    for (total, sum) in totals.iter_mut().zip(sums) {
        if let Some(sum) = sum {
            let wide = m.sum_pairs16(sum);
            *total = m.add32(*total, wide);
        }
    }
}
