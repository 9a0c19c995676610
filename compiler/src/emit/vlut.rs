//! `vlut`: one table of sums for many tokens; the weight byte is the row number.
//!
//! A lane is a column. For four activations of every column there are 81 sums with four trits; a weight byte names one
//! of them, so one load and one add of 16-bit lanes do the work of four multiply-adds in every column. Rows of the table
//! are numbered by the byte as it is (0 to 0xAA, 81 of them used), so no other packing is needed. The tables of a few
//! groups of four activations stay in the first-level cache while all rows of the call go by.
//!
//! ```text
//! for a vector of columns
//!   for 64 groups of k                   as many as 16-bit sums can take
//!     transpose the activations          lane = column
//!     for `unroll` groups
//!       build their tables
//!       for tile, row in tile: 16-bit sum += table[byte], for each group
//!     for tile, row in tile: 32-bit sum += 16-bit sum
//!   transpose the 32-bit sums to the results
//! ```
//!
//! The last vector of columns may have fewer columns; its other lanes repeat the last column and are not stored. A byte
//! that is no code reads a row that nobody wrote, or the guard behind the last table: memory of this kernel in any case.

use super::Rules;
use crate::activations::plane_bytes;
use crate::machine::{Argument, Int, IntVariable, Machine, Vector, advance, repeat, while_at_least};
use crate::{ActivationFormat, Cpu, KernelSpec, Layout, MachineKind, Schedule, ScheduleError};

/// Groups that 16-bit sums can take: a sum of four products is at most 4·127.
pub(crate) const MAX_GROUPS: usize = i16::MAX as usize / (4 * 127);

/// Rows of a table, of which byte 0xAA names the last.
const TABLE_ROWS: usize = 0xAA + 1;

/// Rows behind the last table that bytes which are no codes may name.
const GUARD_ROWS: usize = 0xFF - 0xAA;

/// Rows whose lookups are written out one after the other; tiles have a multiple of it.
const ROWS_PER_TURN: usize = 4;

/// Columns that are transposed together.
const OCTET: usize = 8;

/// The family.
pub(super) struct Vlut;

impl Rules for Vlut {
    fn name(&self) -> &'static str {
        "vlut"
    }

    fn activation_format(&self) -> ActivationFormat {
        ActivationFormat::Planes
    }

    fn scratch_bytes(&self, schedule: &Schedule, tiles: usize) -> usize {
        let (width, rows) = (schedule.machine.vector_bytes(), schedule.layout.tile_rows());
        sums_offset(width, schedule.unroll.into()) + tiles * rows * 3 * width
    }

    fn check(&self, schedule: &Schedule, _: &Cpu) -> Result<(), ScheduleError> {
        let Layout::Lanes { rows: 1..=32, .. } = schedule.layout else {
            return Err(schedule.layout_error("lanes<R> or lanes<R>x4 with at most 32 rows"));
        };
        let parameter =
            |name, value: u8, expected| Err(ScheduleError::Parameter { name, value: value.into(), expected });
        if usize::from(schedule.ntile) != schedule.machine.vector_bytes() / 2 {
            let expected = "8, 16 or 32: the 16-bit lanes of the machine's vectors";
            return parameter("ntile", schedule.ntile, expected);
        }
        if !matches!(schedule.unroll, 4 | 8 | 16 | 32) {
            return parameter("unroll", schedule.unroll, "4, 8, 16 or 32 groups");
        }
        Ok(())
    }

    fn layouts(&self, _: MachineKind) -> Vec<Layout> {
        let groups = (4..=32).step_by(4).map(|rows| Layout::Lanes { rows, group: 4 });
        groups.chain([16, 32].map(|rows| Layout::Lanes { rows, group: 1 })).collect()
    }

    fn unrolls(&self) -> Vec<u8> {
        vec![4, 8, 16, 32]
    }

    fn ntiles(&self, machine: MachineKind) -> Vec<u8> {
        vec![machine.vector_bytes() as u8 / 2]
    }

    fn emit(&self, m: &mut dyn Machine, spec: &KernelSpec, schedule: &Schedule) {
        emit_with(m, spec, schedule, MAX_GROUPS);
    }
}

/// The compile-time facts of one kernel.
struct Facts {
    /// Bytes of a vector.
    width: usize,
    /// Columns of a vector.
    lanes: usize,
    rows: usize,
    /// Bytes of a row that lie together.
    group: usize,
    /// Groups of four activations, weight bytes of a row.
    groups: usize,
    /// Groups whose tables exist at a time.
    unroll: usize,
    /// Groups after which 16-bit sums are added to the 32-bit ones, a multiple of 64.
    flush: usize,
    tile_bytes: usize,
    /// Bytes from one activation plane to the next.
    plane: usize,
    /// Bytes from one prepared column to the next.
    column: usize,
}

/// Where the tables are in the scratch, behind 64 groups of transposed activations, four bytes for each column.
const fn tables_offset(width: usize) -> usize {
    64 * 4 * (width / 2)
}

/// Where the sums are, behind the tables.
const fn sums_offset(width: usize, unroll: usize) -> usize {
    tables_offset(width) + (unroll * TABLE_ROWS + GUARD_ROWS) * width
}

/// Emits the kernel with any number of groups between flushes.
pub(crate) fn emit_with(m: &mut dyn Machine, spec: &KernelSpec, schedule: &Schedule, flush: usize) {
    let Layout::Lanes { rows, group } = schedule.layout else { return };
    let width = m.vector_bytes();
    let vlut = Facts {
        width,
        lanes: width / 2,
        rows: rows.into(),
        group: group.into(),
        groups: schedule.layout.row_bytes(spec.k),
        unroll: schedule.unroll.into(),
        flush,
        tile_bytes: schedule.layout.tile_bytes(spec.k),
        plane: plane_bytes(spec.k, 4),
        column: schedule.activation_format().bytes(spec.k),
    };
    let activations = m.argument(Argument::Activations);
    let out = m.argument(Argument::Out);
    let left = m.argument(Argument::Columns);
    let [column, out, left] = [activations, out, left].map(|start| m.int_variable(start));
    while_at_least(m, left, 1, |m| {
        vlut.clear_sums(m);
        vlut.products(m, column);
        vlut.store_results(m, out, left);
        // `products` has moved past the first plane.
        advance(m, column, (vlut.lanes * vlut.column) as i32 - vlut.plane as i32);
        advance(m, left, -(vlut.lanes as i32));
    });
}

/// Where one tile is, or how far it has been walked through.
struct Place<T> {
    weights: T,
    sums: T,
}

impl Facts {
    /// Bytes of the sums of one tile: 16-bit ones of all rows, then 32-bit ones.
    const fn tile_sums(&self) -> usize {
        3 * self.width * self.rows
    }

    /// Where the 32-bit sums of a row are within the sums of its tile.
    const fn wide_sums(&self, row: usize) -> usize {
        self.width * (self.rows + 2 * row)
    }

    /// Emits the loop over the tiles of the call; `body` gets where a tile's weights and sums are, the weights of the first
    /// tile being at `weights` instead of where they start, and says how far it has moved in them.
    fn for_each_tile(
        &self,
        m: &mut dyn Machine,
        weights: Option<Int>,
        body: impl FnOnce(&mut dyn Machine, Place<IntVariable>) -> Place<usize>,
    ) {
        let weights = weights.unwrap_or_else(|| m.argument(Argument::Weights));
        let scratch = m.argument(Argument::Scratch);
        let sums = m.add_constant(scratch, sums_offset(self.width, self.unroll) as i32);
        let tiles = m.argument(Argument::Tiles);
        let [weights, sums, tiles] = [weights, sums, tiles].map(|start| m.int_variable(start));
        while_at_least(m, tiles, 1, |m| {
            let moved = body(m, Place { weights, sums });
            advance(m, weights, (self.tile_bytes - moved.weights) as i32);
            advance(m, sums, (self.tile_sums() - moved.sums) as i32);
            advance(m, tiles, -1);
        });
    }

    fn clear_sums(&self, m: &mut dyn Machine) {
        self.for_each_tile(m, None, |m, tile| {
            let (zero, sums) = (m.zero(), m.get_int(tile.sums));
            for offset in (0..self.tile_sums()).step_by(self.width) {
                m.store(sums, offset as i32, zero);
            }
            Place { weights: 0, sums: 0 }
        });
    }

    /// Adds all products of a vector of columns, the first of which is at `column`, which moves past its first plane.
    fn products(&self, m: &mut dyn Machine, column: IntVariable) {
        let first = m.argument(Argument::Weights);
        let last = m.argument(Argument::LastColumn);
        let [weights, last] = [first, last].map(|start| m.int_variable(start));
        let flushed = |m: &mut dyn Machine, groups: usize| {
            for first in (0..groups).step_by(64) {
                self.transpose(m, column, last);
                advance(m, column, 64);
                advance(m, last, 64);
                let scratch = m.argument(Argument::Scratch);
                let activations = m.int_variable(scratch);
                let pass = |m: &mut dyn Machine, times: usize, groups: usize| {
                    repeat(m, times, |m| {
                        self.build_tables(m, activations, groups);
                        let now = m.get_int(weights);
                        self.for_each_tile(m, Some(now), |m, tile| self.look_up(m, groups, &tile));
                        advance(m, weights, (groups * self.rows) as i32);
                    });
                };
                let part = (groups - first).min(64);
                pass(m, part / self.unroll, self.unroll);
                pass(m, (part % self.unroll).min(1), part % self.unroll);
            }
            self.for_each_tile(m, None, |m, tile| self.flush(m, &tile));
        };
        repeat(m, self.groups / self.flush, |m| flushed(m, self.flush));
        repeat(m, (self.groups % self.flush).min(1), |m| flushed(m, self.groups % self.flush));
    }

    /// Transposes 64 groups of the activations of a vector of columns: for each group and each of its four activations,
    /// one byte of every column.
    fn transpose(&self, m: &mut dyn Machine, column: IntVariable, last: IntVariable) {
        let scratch = m.argument(Argument::Scratch);
        let first = m.get_int(column);
        let [octet, target] = [first, scratch].map(|start| m.int_variable(start));
        repeat(m, self.lanes / OCTET, |m| {
            let (first, target_now, last) = (m.get_int(octet), m.get_int(target), m.get_int(last));
            let mut next = first;
            for (place, vector) in (0..4).flat_map(|place| (0..64 / self.width).map(move |v| (place, v))) {
                let offset = (place * self.plane + vector * self.width) as i32;
                next = first;
                let mut bytes = Vec::with_capacity(OCTET);
                for _ in 0..OCTET {
                    bytes.push(m.load(next, offset));
                    next = m.add_constant(next, self.column as i32);
                    next = m.min(next, last);
                }
                // Three times interleaved with the one half a turn away, eight columns' bytes lie together.
                for _ in 0..3 {
                    let pairs: Vec<_> = (0..OCTET / 2).map(|i| m.interleave8(bytes[i], bytes[i + OCTET / 2])).collect();
                    bytes = pairs.into_iter().flatten().collect();
                }
                for (i, bytes) in bytes.into_iter().enumerate() {
                    for part in 0..self.width / 8 {
                        let group = vector * self.width + part / 2 * 16 + 2 * i + part % 2;
                        m.store64(target_now, ((group * 4 + place) * self.lanes) as i32, bytes, part);
                    }
                }
            }
            m.set_int(octet, next);
            advance(m, target, OCTET as i32);
        });
    }

    /// Builds the tables of `groups` groups from their transposed activations, which it moves past.
    fn build_tables(&self, m: &mut dyn Machine, activations: IntVariable, groups: usize) {
        let scratch = m.argument(Argument::Scratch);
        let tables = m.add_constant(scratch, tables_offset(self.width) as i32);
        let table = m.int_variable(tables);
        repeat(m, groups, |m| {
            let (from, table_now) = (m.get_int(activations), m.get_int(table));
            let places: Vec<_> = (0..4).map(|j| m.load_widened8(from, (j * self.lanes) as i32)).collect();
            let zero = m.zero();
            self.build_rows(m, table_now, &places, 0, zero);
            advance(m, activations, (4 * self.lanes) as i32);
            advance(m, table, (TABLE_ROWS * self.width) as i32);
        });
    }

    /// Stores `sum` plus each combination of the activations in `places`, whose codes come in front of `byte`.
    fn build_rows(&self, m: &mut dyn Machine, table: Int, places: &[Vector], byte: usize, sum: Vector) {
        let Some((last, places)) = places.split_last() else {
            m.store(table, (byte * self.width) as i32, sum);
            return;
        };
        for code in 0..3 {
            let with = match code {
                0 => m.sub16(sum, *last),
                1 => sum,
                _ => m.add16(sum, *last),
            };
            self.build_rows(m, table, places, 4 * byte + code, with);
        }
    }

    /// Adds the rows of `groups` tables that the weights of one tile name to its 16-bit sums.
    fn look_up(&self, m: &mut dyn Machine, groups: usize, tile: &Place<IntVariable>) -> Place<usize> {
        let scratch = m.argument(Argument::Scratch);
        repeat(m, self.rows / ROWS_PER_TURN, |m| {
            let [weights, sums] = [tile.weights, tile.sums].map(|now| m.get_int(now));
            for row in 0..ROWS_PER_TURN {
                let at = (row * self.width) as i32;
                let mut sum = m.load_result(sums, at);
                for g in 0..groups {
                    let byte = (g / self.group * self.rows + row) * self.group + g % self.group;
                    let byte = m.load_byte(weights, byte as i32);
                    let offset = m.shift_left(byte, self.width.trailing_zeros() as u8);
                    let entry = m.add(scratch, offset);
                    let entry = m.load_result(entry, (tables_offset(self.width) + g * TABLE_ROWS * self.width) as i32);
                    sum = m.add16(sum, entry);
                }
                m.store(sums, at, sum);
            }
            advance(m, tile.weights, (ROWS_PER_TURN * self.group) as i32);
            advance(m, tile.sums, (ROWS_PER_TURN * self.width) as i32);
        });
        Place { weights: self.rows * self.group, sums: self.rows * self.width }
    }

    /// Adds the 16-bit sums of one tile to its 32-bit sums and clears them.
    fn flush(&self, m: &mut dyn Machine, tile: &Place<IntVariable>) -> Place<usize> {
        let (zero, sums) = (m.zero(), m.get_int(tile.sums));
        for row in 0..self.rows {
            let narrow = m.load_result(sums, (row * self.width) as i32);
            m.store(sums, (row * self.width) as i32, zero);
            for (half, wide) in m.widen_signed16(narrow).into_iter().enumerate() {
                let at = (self.wide_sums(row) + half * self.width) as i32;
                let old = m.load_result(sums, at);
                let new = m.add32(old, wide);
                m.store(sums, at, new);
            }
        }
        Place { weights: 0, sums: 0 }
    }

    /// Stores the 32-bit sums of the columns that exist and moves `out` past them.
    fn store_results(&self, m: &mut dyn Machine, out: IntVariable, left: IntVariable) {
        let all = m.get_int(left);
        let lanes = m.constant(self.lanes as i32);
        let columns = m.min(all, lanes);
        let first_out = m.get_int(out);
        let tile_out = m.int_variable(first_out);
        self.for_each_tile(m, None, |m, tile| {
            let (sums, first) = (m.get_int(tile.sums), m.get_int(tile_out));
            let [from, to, left] = [sums, first, columns].map(|start| m.int_variable(start));
            while_at_least(m, left, 1, |m| {
                let (from_now, to_now) = (m.get_int(from), m.get_int(to));
                for row in 0..self.rows {
                    m.copy32(from_now, self.wide_sums(row) as i32, to_now, 4 * row as i32);
                }
                advance(m, from, 4);
                let stride = m.argument(Argument::OutStride);
                let next = m.add(to_now, stride);
                m.set_int(to, next);
                advance(m, left, -1);
            });
            advance(m, tile_out, 4 * self.rows as i32);
            Place { weights: 0, sums: 0 }
        });
        let left = m.int_variable(columns);
        while_at_least(m, left, 1, |m| {
            let (now, stride) = (m.get_int(out), m.argument(Argument::OutStride));
            let next = m.add(now, stride);
            m.set_int(out, next);
            advance(m, left, -1);
        });
    }
}
