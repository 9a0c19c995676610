//! `mad`: unpack two-bit codes, multiply-add bytes.
//!
//! A weight byte holds the codes of four k-neighbours. Shifting and masking a vector of bytes gives four vectors of
//! codes 0..=2, each of which meets a vector of the matching activation plane. `Σ code·a − Σ a = Σ T·a`.
//!
//! ```text
//! for tile of rows                       weights: one sequential stream
//!   for ntile columns                    the tile stays in cache
//!     for chunk of k                     `unroll` chunks per turn
//!       for vector in chunk, row in tile: 4 × (shift, and), then 4 multiply-adds per column
//!     add up lanes, subtract Σa, store
//! ```

use super::{Rules, Tile, for_each_tile, mad_lanes};
use crate::activations::plane_bytes;
use crate::machine::Int;
use crate::machine::{Machine, Vector, advance, repeat};
use crate::{ActivationFormat, Cpu, KernelSpec, Layout, MachineKind, Multiply, Schedule, ScheduleError};

/// The family.
pub(super) struct Mad;

impl Rules for Mad {
    fn name(&self) -> &'static str {
        "mad"
    }

    fn multiplies(&self) -> bool {
        true
    }

    fn activation_format(&self) -> ActivationFormat {
        ActivationFormat::Planes
    }

    fn check(&self, schedule: &Schedule, cpu: &Cpu) -> Result<(), ScheduleError> {
        // Vectors of codes whose products are summed in 16 bits before they are widened.
        let vectors = match schedule.layout {
            Layout::Rows { rows: 4 | 8, chunk } => {
                schedule.check_width(chunk.into())?;
                4 * usize::from(chunk) / schedule.machine.vector_bytes() * usize::from(schedule.unroll)
            }
            Layout::Lanes { rows: rows @ 1..=64, group: 4 } => {
                schedule.check_width(4 * usize::from(rows))?;
                4 * mad_lanes::max_pair_groups(4)
            }
            _ => return Err(schedule.layout_error("rows4x…, rows8x… or lanes4x4 to lanes64x4")),
        };
        schedule.check_multiply(vectors, cpu)
    }

    fn layouts(&self, machine: MachineKind) -> Vec<Layout> {
        let rows = [4, 8].into_iter().flat_map(|rows| [16, 32, 64].map(|chunk| Layout::Rows { rows, chunk }));
        rows.chain(mad_lanes::heights(machine).map(|rows| Layout::Lanes { rows, group: 4 })).collect()
    }

    fn unrolls(&self) -> Vec<u8> {
        vec![1, 2, 4]
    }

    fn ntiles(&self, _: MachineKind) -> Vec<u8> {
        (1..=32).collect()
    }

    fn least_registers(&self, schedule: &Schedule) -> usize {
        match schedule.layout {
            Layout::Lanes { .. } => mad_lanes::least_registers(schedule),
            // A sum for every row in every column, whose lanes are added up at the end.
            _ => schedule.layout.tile_rows() * usize::from(schedule.ntile),
        }
    }

    fn emit(&self, m: &mut dyn Machine, spec: &KernelSpec, schedule: &Schedule) {
        match schedule.layout {
            Layout::Lanes { .. } => mad_lanes::emit(m, spec, schedule),
            _ => emit(m, spec, schedule),
        }
    }
}

/// The compile-time facts of one kernel.
struct Facts {
    rows: usize,
    /// Bytes of one row in a chunk.
    chunk: usize,
    /// Chunks of a row.
    chunks: usize,
    unroll: usize,
    multiply: Multiply,
    prefetch: i32,
    /// Bytes from one activation plane to the next.
    plane: usize,
    /// Bytes from one prepared column to the next.
    column: usize,
}

fn emit(m: &mut dyn Machine, spec: &KernelSpec, schedule: &Schedule) {
    let Layout::Rows { rows, chunk } = schedule.layout else { return };
    let mad = Facts {
        rows: rows.into(),
        chunk: chunk.into(),
        chunks: schedule.layout.row_bytes(spec.k) / usize::from(chunk),
        unroll: schedule.unroll.into(),
        multiply: schedule.multiply,
        prefetch: schedule.prefetch.into(),
        plane: plane_bytes(spec.k, 4),
        column: schedule.activation_format().bytes(spec.k),
    };
    for_each_tile(m, spec, schedule, |m, tile| mad.tile(m, tile));
}

impl Facts {
    /// One tile times a few columns.
    fn tile(&self, m: &mut dyn Machine, tile: &Tile) {
        let zero = m.zero();
        let totals: Vec<_> = (0..self.rows * tile.columns).map(|_| m.vector_variable(zero)).collect();
        let (weights, activations) = (m.int_variable(tile.weights), m.int_variable(tile.activations));
        let chunks = |m: &mut dyn Machine, count: usize| {
            let (start, column) = (m.get_int(weights), m.get_int(activations));
            let mut values: Vec<_> = totals.iter().map(|total| m.get(*total)).collect();
            self.chunks(m, count, start, column, &mut values);
            for (total, value) in totals.iter().zip(values) {
                m.set(*total, value);
            }
            advance(m, weights, (count * self.rows * self.chunk) as i32);
            advance(m, activations, (count * self.chunk) as i32);
        };
        repeat(m, self.chunks / self.unroll, |m| chunks(m, self.unroll));
        repeat(m, (self.chunks % self.unroll).min(1), |m| chunks(m, self.chunks % self.unroll));

        tile.for_each_column(m, |m, c, out| {
            let sum = m.load_splat32(tile.sums, 4 * c as i32);
            for r in (0..self.rows).step_by(4) {
                let quad = std::array::from_fn(|i| m.get(totals[c * self.rows + r + i]));
                let dots = m.sum_lanes32(quad);
                let result = m.sub32(dots, sum);
                m.store_low128(out, 4 * r as i32, result);
            }
        });
    }

    /// Adds `count` chunks of all rows to `totals`, `[columns, rows]` vectors of 32-bit lanes.
    fn chunks(&self, m: &mut dyn Machine, count: usize, weights: Int, activations: Int, totals: &mut [Vector]) {
        let width = m.vector_bytes();
        let mask = m.splat8(3);
        // With `pairs`, 16-bit sums of this turn; `Schedule::check` knows that they fit.
        let mut sums: Vec<Option<Vector>> = vec![None; totals.len()];
        for (chunk, vector) in (0..count).flat_map(|chunk| (0..self.chunk / width).map(move |v| (chunk, v * width))) {
            for row in 0..self.rows {
                let offset = ((chunk * self.rows + row) * self.chunk + vector) as i32;
                let bytes = m.load(weights, offset);
                if self.prefetch > 0 && offset % 64 == 0 {
                    m.prefetch(weights, offset + self.prefetch);
                }
                for place in 0..4 {
                    let shifted = if place == 0 { bytes } else { m.shift_right16(bytes, 2 * place as u8) };
                    let codes = m.and(shifted, mask);
                    for c in 0..totals.len() / self.rows {
                        let offset = c * self.column + place * self.plane + chunk * self.chunk + vector;
                        let activations = m.load(activations, offset as i32);
                        let at = c * self.rows + row;
                        match self.multiply {
                            Multiply::Dot => totals[at] = m.dot(totals[at], codes, activations),
                            Multiply::Pairs => {
                                let pairs = m.multiply_add_pairs(codes, activations);
                                sums[at] = Some(match sums[at] {
                                    None => pairs,
                                    Some(sum) => m.add16(sum, pairs),
                                });
                            }
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
}
