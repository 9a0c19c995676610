//! `tl1`: two trits are the index into a table of their sums.
//!
//! A vector lane is a row, so all lanes look up the same table. A table entry `b = T₀·x + T₁·y + 254` is in 0..=508 and
//! comes in two bytes, `b mod 64` and `b / 64` (see [`ActivationFormat::PairTables`]), because a byte shuffle returns
//! bytes. Low parts are at most 63, so four of them add up within a byte before they must be widened; high parts are at
//! most 7, so [`MAX_UNROLL`] steps of two lookups do.
//!
//! Widening sixteen bytes costs no unpacking: read as eight 16-bit lanes `e + 256·o`, `Σ(lane >> 8)` is the sum of the
//! odd bytes and `Σ lane − 256·Σ(lane >> 8)`, modulo 2¹⁶, that of the even ones. Both stay below 2¹⁶ for
//! [`MAX_GROUPS`] additions, after which they go to the 32-bit results in memory.
//!
//! [`ActivationFormat::PairTables`]: crate::ActivationFormat::PairTables

use super::Rules;
use crate::activations::PAIR_BIAS;
use crate::machine::{Argument, Int, Machine, Vector, VectorVariable, advance, repeat, while_at_least};
use crate::{ActivationFormat, Cpu, KernelSpec, Layout, MachineKind, Schedule, ScheduleError};

/// Steps after which the byte sums of high parts must be widened: two lookups of at most 7 each.
const MAX_UNROLL: usize = 255 / (2 * 7);

/// Groups of at most four lookups (two steps) whose low parts 16-bit sums can take: 4·63 each.
const MAX_GROUPS: usize = 65535 / (4 * 63);

/// The family.
pub(super) struct Tl1;

impl Rules for Tl1 {
    fn name(&self) -> &'static str {
        "tl1"
    }

    fn activation_format(&self) -> ActivationFormat {
        ActivationFormat::PairTables
    }

    fn check(&self, schedule: &Schedule, cpu: &Cpu) -> Result<(), ScheduleError> {
        let Layout::Lanes { rows: rows @ (16 | 32 | 48 | 64 | 128), group: 1 } = schedule.layout else {
            return Err(schedule.layout_error("lanes16, lanes32, lanes48, lanes64 or lanes128"));
        };
        schedule.check_width(rows.into())?;
        Schedule::check_lookup(cpu, "tl1")?;
        let parameter = |name, value: u8, expected| ScheduleError::Parameter { name, value: value.into(), expected };
        let unroll = schedule.unroll;
        if unroll == 0 || !unroll.is_multiple_of(2) || usize::from(unroll) > MAX_UNROLL {
            return Err(parameter("unroll", unroll, "an even number of bytes up to 18"));
        }
        if schedule.ntile != 1 {
            return Err(parameter("ntile", schedule.ntile, "1: a table serves one column"));
        }
        Ok(())
    }

    fn layouts(&self, _: MachineKind) -> Vec<Layout> {
        [16, 32, 48, 64, 128].map(|rows| Layout::Lanes { rows, group: 1 }).to_vec()
    }

    fn unrolls(&self) -> Vec<u8> {
        (2..=MAX_UNROLL as u8).step_by(2).collect()
    }

    fn ntiles(&self, _: MachineKind) -> Vec<u8> {
        vec![1]
    }

    fn emit(&self, m: &mut dyn Machine, spec: &KernelSpec, schedule: &Schedule) {
        emit(m, spec, schedule);
    }
}

/// The compile-time facts of one kernel.
struct Facts {
    rows: usize,
    unroll: usize,
    /// Weight bytes of a row.
    steps: usize,
    tile_bytes: usize,
    /// Bytes from one prepared column to the next.
    column_bytes: usize,
}

/// Bytes of the tables of one step: four activations, two pairs, low and high parts.
const STEP_TABLE_BYTES: usize = 64;

fn emit(m: &mut dyn Machine, spec: &KernelSpec, schedule: &Schedule) {
    let tl1 = Facts {
        rows: schedule.layout.tile_rows(),
        unroll: schedule.unroll.into(),
        steps: schedule.layout.row_bytes(spec.k),
        tile_bytes: schedule.layout.tile_bytes(spec.k),
        column_bytes: schedule.activation_format().bytes(spec.k),
    };
    let weights = m.argument(Argument::Weights);
    let out = m.argument(Argument::Out);
    let tiles = m.argument(Argument::Tiles);
    let (weights, out, tiles) = (m.int_variable(weights), m.int_variable(out), m.int_variable(tiles));
    while_at_least(m, tiles, 1, |m| {
        let column = m.argument(Argument::Activations);
        let left = m.argument(Argument::Columns);
        let first = m.get_int(out);
        let [column, left, column_out] = [column, left, first].map(|start| m.int_variable(start));
        while_at_least(m, left, 1, |m| {
            let (tile, tables, results) = (m.get_int(weights), m.get_int(column), m.get_int(column_out));
            tl1.tile(m, tile, tables, results);
            advance(m, column, tl1.column_bytes as i32);
            let stride = m.argument(Argument::OutStride);
            let next = m.add(results, stride);
            m.set_int(column_out, next);
            advance(m, left, -1);
        });
        advance(m, weights, tl1.tile_bytes as i32);
        advance(m, out, 4 * tl1.rows as i32);
        advance(m, tiles, -1);
    });
}

/// The running sums of one vector of rows.
struct Sums {
    /// Low parts, `Σ (even + 256·odd)` in 16-bit lanes.
    low: VectorVariable,
    /// Low parts of odd rows in 16-bit lanes.
    low_odd: VectorVariable,
    /// High parts of even rows in 16-bit lanes.
    high_even: VectorVariable,
    /// High parts of odd rows in 16-bit lanes.
    high_odd: VectorVariable,
}

impl Facts {
    /// One tile times one column.
    fn tile(&self, m: &mut dyn Machine, tile: Int, tables: Int, out: Int) {
        let width = m.vector_bytes();
        let bias = m.splat32(-PAIR_BIAS * 2 * self.steps as i32);
        for offset in (0..4 * self.rows).step_by(width) {
            m.store(out, offset as i32, bias);
        }
        let (weights, tables) = (m.int_variable(tile), m.int_variable(tables));
        let turns = 2 * MAX_GROUPS / self.unroll;
        let block = turns * self.unroll;
        let block_of = |m: &mut dyn Machine, steps: usize| {
            let zero = m.zero();
            let sums: Vec<Sums> = (0..self.rows / width)
                .map(|_| {
                    let [low, low_odd, high_even, high_odd] = std::array::from_fn(|_| m.vector_variable(zero));
                    Sums { low, low_odd, high_even, high_odd }
                })
                .collect();
            let turn = |m: &mut dyn Machine, count: usize| {
                let (start, table) = (m.get_int(weights), m.get_int(tables));
                self.steps(m, count, start, table, &sums);
                advance(m, weights, (count * self.rows) as i32);
                advance(m, tables, (count * STEP_TABLE_BYTES) as i32);
            };
            repeat(m, steps / self.unroll, |m| turn(m, self.unroll));
            repeat(m, (steps % self.unroll).min(1), |m| turn(m, steps % self.unroll));
            for (i, sums) in sums.iter().enumerate() {
                flush(m, sums, out, 4 * i * width);
            }
        };
        repeat(m, self.steps / block, |m| block_of(m, block));
        repeat(m, (self.steps % block).min(1), |m| block_of(m, self.steps % block));
    }

    /// Adds `count` steps of all rows to the sums.
    fn steps(&self, m: &mut dyn Machine, count: usize, weights: Int, tables: Int, sums: &[Sums]) {
        let width = m.vector_bytes();
        let (nibble, low_byte) = (m.splat8(15), m.splat16(255));
        let mut high: Vec<Option<Vector>> = vec![None; sums.len()];
        for first in (0..count).step_by(2) {
            let mut low: Vec<Option<Vector>> = vec![None; sums.len()];
            for step in first..count.min(first + 2) {
                let table = (step * STEP_TABLE_BYTES) as i32;
                for (i, (low, high)) in low.iter_mut().zip(&mut high).enumerate() {
                    let bytes = m.load(weights, (step * self.rows + i * width) as i32);
                    for pair in 0..2 {
                        let shifted = if pair == 0 { bytes } else { m.shift_right16(bytes, 4) };
                        let index = m.and(shifted, nibble);
                        for (sum, part) in [(&mut *low, 0), (&mut *high, 16)] {
                            let part = m.load_table(tables, table + 32 * pair + part);
                            let looked_up = m.lookup(part, index);
                            *sum = Some(match *sum {
                                None => looked_up,
                                Some(sum) => m.add8(sum, looked_up),
                            });
                        }
                    }
                }
            }
            for (sums, low) in sums.iter().zip(low) {
                let Some(low) = low else { continue };
                let odd = m.shift_right16(low, 8);
                add_to(m, sums.low, low);
                add_to(m, sums.low_odd, odd);
            }
        }
        for (sums, high) in sums.iter().zip(high) {
            let Some(high) = high else { continue };
            let (even, odd) = (m.and(high, low_byte), m.shift_right16(high, 8));
            add_to(m, sums.high_even, even);
            add_to(m, sums.high_odd, odd);
        }
    }
}

/// `sum += value` in 16-bit lanes.
fn add_to(m: &mut dyn Machine, sum: VectorVariable, value: Vector) {
    let old = m.get(sum);
    let new = m.add16(old, value);
    m.set(sum, new);
}

/// Adds one vector of rows to its 32-bit results at `out + offset`: `low + 64·high`.
fn flush(m: &mut dyn Machine, sums: &Sums, out: Int, offset: usize) {
    let width = m.vector_bytes();
    let [low, low_odd, high_even, high_odd] =
        [sums.low, sums.low_odd, sums.high_even, sums.high_odd].map(|sum| m.get(sum));
    let odd_shifted = m.shift_left16(low_odd, 8);
    let low_even = m.sub16(low, odd_shifted);
    let low = m.interleave16(low_even, low_odd);
    let high = m.interleave16(high_even, high_odd);
    for (half, (low, high)) in low.into_iter().zip(high).enumerate() {
        for (quarter, (low, high)) in m.widen16(low).into_iter().zip(m.widen16(high)).enumerate() {
            let at = (offset + (2 * half + quarter) * width) as i32;
            let high = m.shift_left32(high, 6);
            let sum = m.add32(low, high);
            let old = m.load_result(out, at);
            let new = m.add32(old, sum);
            m.store(out, at, new);
        }
    }
}
