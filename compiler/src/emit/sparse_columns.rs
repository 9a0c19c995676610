//! `sparse-columns`: a weighted sum of some columns, which a list names.
//!
//! An activation that is 0 contributes nothing, whatever its column of the down-projection holds. Columns lie one after
//! the other as records; the list holds where each begins, and the activations come in the order of the list. Four
//! records are interleaved byte by byte, so that the four bytes of a 32-bit lane are four columns of the same four rows,
//! and a multiply-add with the four activations in every lane adds up all of them. Which row a lane belongs to is settled
//! by the packing ([`Layout::Columns`](crate::Layout::Columns)), so that results come out in order.
//!
//! ```text
//! fill the results with −Σa
//! for 4 · unroll records of the list
//!   for vector of m
//!     ask for as much of the records `prefetch` places on
//!     interleave 4 records (per quad), giving 4 vectors
//!     for vector, for place in byte: load results, (shift, and, multiply-add) per quad, store results
//! ```

use super::Rules;
use crate::listed::GROUP;
use crate::machine::{Argument, Machine, Vector, advance, repeat, while_at_least};
use crate::{ActivationFormat, Columns, Cpu, KernelSpec, Layout, MachineKind, Multiply, Schedule, ScheduleError};

/// Records that are interleaved.
const QUAD: usize = 4;

/// Records that are worked on at once.
fn records(schedule: &Schedule) -> usize {
    QUAD * usize::from(schedule.unroll)
}

/// The family.
pub(super) struct SparseColumns;

impl Rules for SparseColumns {
    fn name(&self) -> &'static str {
        "sparse-columns"
    }

    fn multiplies(&self) -> bool {
        true
    }

    fn list(&self) -> Option<Columns> {
        Some(Columns::ListedColumns)
    }

    fn activation_format(&self) -> ActivationFormat {
        ActivationFormat::Plain
    }

    fn check(&self, schedule: &Schedule, cpu: &Cpu) -> Result<(), ScheduleError> {
        let Layout::Columns { chunk } = schedule.layout else {
            return Err(schedule.layout_error("columns16, columns32 or columns64"));
        };
        if usize::from(chunk) != schedule.machine.vector_bytes() {
            let whole = schedule.layout_error("columns<bytes of a vector>");
            return schedule.check_width(chunk.into()).and(Err(whole));
        }
        if records(schedule) > GROUP {
            let (name, value) = ("unroll", schedule.unroll.into());
            return Err(ScheduleError::Parameter { name, value, expected: "1 or 2 times four records" });
        }
        schedule.check_multiply(schedule.unroll.into(), cpu)
    }

    fn layouts(&self, machine: MachineKind) -> Vec<Layout> {
        vec![Layout::Columns { chunk: machine.vector_bytes() as u8 }]
    }

    fn unrolls(&self) -> Vec<u8> {
        vec![1, 2]
    }

    fn ntiles(&self, _: MachineKind) -> Vec<u8> {
        vec![1]
    }

    fn emit(&self, m: &mut dyn Machine, spec: &KernelSpec, schedule: &Schedule) {
        emit(m, spec, schedule);
    }
}

fn emit(m: &mut dyn Machine, spec: &KernelSpec, schedule: &Schedule) {
    let (record, width) = (schedule.layout.row_bytes(spec.k), m.vector_bytes());
    let (quads, records) = (usize::from(schedule.unroll), records(schedule));
    fill(m, record);

    let (list, activations, left) =
        (m.argument(Argument::List), m.argument(Argument::Activations), m.argument(Argument::Tiles));
    let [list, activations, left] = [list, activations, left].map(|start| m.int_variable(start));
    while_at_least(m, left, records as i32, |m| {
        let here = m.get_int(list);
        let column = m.get_int(activations);
        let factors: Vec<_> = (0..quads)
            .map(|quad| {
                let four = m.load_splat32(column, 4 * quad as i32);
                m.vector_variable(four)
            })
            .collect();
        let (out, zero) = (m.argument(Argument::Out), m.constant(0));
        let [out, position] = [out, zero].map(|start| m.int_variable(start));
        repeat(m, record / width, |m| {
            let (weights, at) = (m.argument(Argument::Weights), m.get_int(position));
            let weights = m.add(weights, at);
            let record = |m: &mut dyn Machine, place: usize| {
                let offset = m.load32(here, 4 * place as i32);
                m.add(weights, offset)
            };
            if schedule.prefetch > 0 {
                for r in 0..records {
                    let ahead = record(m, usize::from(schedule.prefetch) + r);
                    m.prefetch_second_level(ahead, 0);
                }
            }
            let mask = m.splat8(3);
            let mut codes: Vec<[Vector; 4]> = Vec::with_capacity(quads);
            for quad in 0..quads {
                let bytes = std::array::from_fn(|r| {
                    let bytes = record(m, QUAD * quad + r);
                    m.load(bytes, 0)
                });
                codes.push(interleave(m, bytes));
            }
            let factors: Vec<_> = factors.iter().map(|factor| m.get(*factor)).collect();
            let target = m.get_int(out);
            for part in 0..4 {
                for place in 0..4 {
                    let offset = ((4 * part + place) * width) as i32;
                    let mut total = m.load_result(target, offset);
                    // With `pairs`, a 16-bit sum; `Schedule::check` knows that it fits.
                    let mut sum: Option<Vector> = None;
                    for (quad, factor) in codes.iter_mut().zip(&factors) {
                        if place > 0 {
                            quad[part] = m.shift_right16(quad[part], 2);
                        }
                        let codes = m.and(quad[part], mask);
                        match schedule.multiply {
                            Multiply::Dot => total = m.dot(total, codes, *factor),
                            Multiply::Pairs => {
                                let pairs = m.multiply_add_pairs(codes, *factor);
                                sum = Some(match sum {
                                    None => pairs,
                                    Some(sum) => m.add16(sum, pairs),
                                });
                            }
                        }
                    }
                    if let Some(sum) = sum {
                        let wide = m.sum_pairs16(sum);
                        total = m.add32(total, wide);
                    }
                    m.store(target, offset, total);
                }
            }
            advance(m, position, width as i32);
            advance(m, out, 16 * width as i32);
        });
        advance(m, list, 4 * records as i32);
        advance(m, activations, records as i32);
        advance(m, left, -(records as i32));
    });
}

/// Fills all results with −Σa, which turns sums of codes into sums of trits.
fn fill(m: &mut dyn Machine, record: usize) {
    let width = m.vector_bytes();
    let (sums, out) = (m.argument(Argument::Sums), m.argument(Argument::Out));
    let (sum, zero) = (m.load_splat32(sums, 0), m.zero());
    let negative = m.sub32(zero, sum);
    let (negative, out) = (m.vector_variable(negative), m.int_variable(out));
    repeat(m, record / width, |m| {
        let (target, negative) = (m.get_int(out), m.get(negative));
        for vector in 0..16 {
            m.store(target, (vector * width) as i32, negative);
        }
        advance(m, out, 16 * width as i32);
    });
}

/// Four vectors' bytes in turn, within every 128 bits: from their first quarters, their second, third and last.
fn interleave(m: &mut dyn Machine, [a, b, c, d]: [Vector; 4]) -> [Vector; 4] {
    let ([ab_low, ab_high], [cd_low, cd_high]) = (m.interleave8(a, b), m.interleave8(c, d));
    let ([first, second], [third, last]) =
        (m.interleave16_within(ab_low, cd_low), m.interleave16_within(ab_high, cd_high));
    [first, second, third, last]
}
