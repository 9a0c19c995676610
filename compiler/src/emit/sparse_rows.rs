//! `sparse-rows`: the product of some rows, which a list names.
//!
//! In a model with relu² every gate at 0 or below makes its neuron's row of the up-projection useless. Rows lie one after
//! the other as records; the list holds where each begins. A record is read from its beginning to its end before the next,
//! since that is what the hardware's own prefetchers expect, and the records that come later are asked for meanwhile:
//! nothing else tells the memory which they are.
//!
//! ```text
//! for 4 records of the list
//!   for record
//!     for vector of k                    `unroll` vectors per turn
//!       4 × (shift, and, multiply-add); ask for as much of the record `prefetch` places on
//!   add up lanes, subtract Σa, store 4 results
//! ```

use super::Rules;
use crate::activations::plane_bytes;
use crate::machine::{Argument, Int, Machine, Vector, advance, repeat, while_at_least};
use crate::{ActivationFormat, Columns, Cpu, KernelSpec, Layout, MachineKind, Multiply, Schedule, ScheduleError};

/// Records whose lanes are added up at once.
const RECORDS: usize = 4;

/// Planes of activations. With [`Multiply::Dot`] each has sums of its own while a record is read: one chain of forty dependent
/// instructions would take longer than the record takes to arrive.
const PLANES: usize = 4;

/// The family.
pub(super) struct SparseRows;

impl Rules for SparseRows {
    fn name(&self) -> &'static str {
        "sparse-rows"
    }

    fn multiplies(&self) -> bool {
        true
    }

    fn list(&self) -> Option<Columns> {
        Some(Columns::ListedRows)
    }

    fn activation_format(&self) -> ActivationFormat {
        ActivationFormat::Planes
    }

    fn check(&self, schedule: &Schedule, cpu: &Cpu) -> Result<(), ScheduleError> {
        let Layout::Rows { rows: 1, chunk: 64 } = schedule.layout else {
            return Err(schedule.layout_error("rows1x64"));
        };
        schedule.check_multiply(4 * usize::from(schedule.unroll), cpu)
    }

    fn layouts(&self, _: MachineKind) -> Vec<Layout> {
        vec![Layout::Rows { rows: 1, chunk: 64 }]
    }

    fn unrolls(&self) -> Vec<u8> {
        vec![1, 2, 4]
    }

    fn ntiles(&self, _: MachineKind) -> Vec<u8> {
        vec![1]
    }

    fn registers(&self, schedule: &Schedule) -> Option<usize> {
        // The sums of four records, the last still apart or, with pairs, one of 16 bits; bytes, codes and their mask.
        Some(RECORDS - 1 + if schedule.multiply == Multiply::Pairs { 2 } else { PLANES } + 3)
    }

    fn emit(&self, m: &mut dyn Machine, spec: &KernelSpec, schedule: &Schedule) {
        emit(m, spec, schedule);
    }
}

fn emit(m: &mut dyn Machine, spec: &KernelSpec, schedule: &Schedule) {
    let (record, width) = (schedule.layout.row_bytes(spec.k), m.vector_bytes());
    let (vectors, unroll) = (record / width, usize::from(schedule.unroll));
    let (list, out, left) = (m.argument(Argument::List), m.argument(Argument::Out), m.argument(Argument::Tiles));
    let [list, out, left] = [list, out, left].map(|start| m.int_variable(start));
    m.name_loop(Some("records of the list"));
    while_at_least(m, left, RECORDS as i32, |m| {
        let totals: [_; RECORDS] = std::array::from_fn(|r| {
            let (here, weights) = (m.get_int(list), m.argument(Argument::Weights));
            let offset = m.load32(here, 4 * r as i32);
            let start = m.add(weights, offset);
            let bytes = m.int_variable(start);
            let chains = if schedule.multiply == Multiply::Dot { PLANES } else { 1 };
            let zeros: Vec<_> = (0..chains).map(|_| m.zero()).collect();
            let totals: Vec<_> = zeros.into_iter().map(|zero| m.vector_variable(zero)).collect();
            let activations = m.argument(Argument::Activations);
            let activations = m.int_variable(activations);
            let ahead = (schedule.prefetch > 0).then(|| {
                let offset = m.load32(here, 4 * (i32::from(schedule.prefetch) + r as i32));
                let start = m.add(weights, offset);
                m.int_variable(start)
            });
            let turn = |m: &mut dyn Machine, count: usize| {
                let (start, column) = (m.get_int(bytes), m.get_int(activations));
                let mut sums: Vec<_> = totals.iter().map(|total| m.get(*total)).collect();
                add_vectors(m, schedule, plane_bytes(spec.k, PLANES), count, start, column, &mut sums);
                totals.iter().zip(sums).for_each(|(total, sum)| m.set(*total, sum));
                if let Some(ahead) = ahead {
                    let start = m.get_int(ahead);
                    for line in (0..count * width).step_by(64) {
                        m.prefetch_second_level(start, line as i32);
                    }
                    advance(m, ahead, (count * width) as i32);
                }
                advance(m, bytes, (count * width) as i32);
                advance(m, activations, (count * width) as i32);
            };
            m.name_loop(Some("vectors of a row, unroll at a time"));
            repeat(m, vectors / unroll, |m| turn(m, unroll));
            repeat(m, (vectors % unroll).min(1), |m| turn(m, vectors % unroll));
            let sums: Vec<_> = totals.iter().map(|total| m.get(*total)).collect();
            let all = sums.into_iter().reduce(|all, sum| m.add32(all, sum)).expect("at least one");
            m.vector_variable(all)
        });
        let sums = m.argument(Argument::Sums);
        let sum = m.load_splat32(sums, 0);
        let totals = totals.map(|total| m.get(total));
        let dots = m.sum_lanes32(totals);
        let result = m.sub32(dots, sum);
        let target = m.get_int(out);
        m.store128(target, 0, result, 0);
        advance(m, list, 4 * RECORDS as i32);
        advance(m, out, 4 * RECORDS as i32);
        advance(m, left, -(RECORDS as i32));
    });
}

/// Adds to `totals`, vectors of 32-bit lanes, one for each plane or one for all, what `count` vectors of a record give.
fn add_vectors(
    m: &mut dyn Machine,
    schedule: &Schedule,
    plane: usize,
    count: usize,
    record: Int,
    activations: Int,
    totals: &mut [Vector],
) {
    let width = m.vector_bytes();
    let (mask, chains) = (m.splat8(3), totals.len());
    // With `pairs`, 16-bit sums of this turn; `Schedule::check` knows that they fit.
    let mut sum: Option<Vector> = None;
    for at in (0..count).map(|vector| vector * width) {
        let bytes = m.load(record, at as i32);
        for place in 0..PLANES {
            let shifted = if place == 0 { bytes } else { m.shift_right16(bytes, 2 * place as u8) };
            let codes = m.and(shifted, mask);
            let activations = m.load(activations, (place * plane + at) as i32);
            match schedule.multiply {
                Multiply::Dot => {
                    let total = &mut totals[place % chains];
                    *total = m.dot(*total, codes, activations);
                }
                Multiply::Pairs => {
                    let pairs = m.multiply_add_pairs(codes, activations);
                    sum = Some(match sum {
                        None => pairs,
                        Some(sum) => m.add16(sum, pairs),
                    });
                }
            }
        }
    }
    if let Some(sum) = sum {
        let wide = m.sum_pairs16(sum);
        totals[0] = m.add32(totals[0], wide);
    }
}
