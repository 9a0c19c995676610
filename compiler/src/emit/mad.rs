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

use crate::activations::plane_bytes;
use crate::machine::{Argument, Int, IntVariable, Machine, Vector, advance, repeat, while_at_least};
use crate::{Columns, KernelSpec, Layout, Multiply, Schedule};

/// The compile-time facts of one kernel.
struct Mad {
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
    tile_bytes: usize,
}

pub(super) fn emit(m: &mut dyn Machine, spec: &KernelSpec, schedule: &Schedule) {
    let Layout::Rows { rows, chunk } = schedule.layout else { return };
    let mad = Mad {
        rows: rows.into(),
        chunk: chunk.into(),
        chunks: schedule.layout.row_bytes(spec.k) / usize::from(chunk),
        unroll: schedule.unroll.into(),
        multiply: schedule.multiply,
        prefetch: schedule.prefetch.into(),
        plane: plane_bytes(spec.k),
        tile_bytes: schedule.layout.tile_bytes(spec.k),
    };
    let weights = m.argument(Argument::Weights);
    let out = m.argument(Argument::Out);
    let tiles = m.argument(Argument::Tiles);
    let (weights, out, tiles) = (m.int_variable(weights), m.int_variable(out), m.int_variable(tiles));
    while_at_least(m, tiles, 1, |m| {
        let tile = m.get_int(weights);
        let first = m.get_int(out);
        match spec.columns {
            Columns::One => {
                let column = m.argument(Argument::Activations);
                let sums = m.argument(Argument::Sums);
                mad.tile(m, tile, &[column], sums, &[first]);
            }
            Columns::Many => mad.columns(m, schedule.ntile.into(), tile, first),
        }
        advance(m, weights, mad.tile_bytes as i32);
        advance(m, out, 4 * mad.rows as i32);
        advance(m, tiles, -1);
    });
}

impl Mad {
    /// One tile times all columns: `ntile` at a time, then one by one.
    fn columns(&self, m: &mut dyn Machine, ntile: usize, tile: Int, out: Int) {
        let column = m.argument(Argument::Activations);
        let sums = m.argument(Argument::Sums);
        let left = m.argument(Argument::Columns);
        let [column, sums, out, left] = [column, sums, out, left].map(|start| m.int_variable(start));
        self.columns_by(m, ntile, tile, column, sums, out, left);
        if ntile > 1 {
            self.columns_by(m, 1, tile, column, sums, out, left);
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the running pointers of one loop")]
    fn columns_by(
        &self,
        m: &mut dyn Machine,
        ntile: usize,
        tile: Int,
        column: IntVariable,
        sums: IntVariable,
        out: IntVariable,
        left: IntVariable,
    ) {
        while_at_least(m, left, ntile as i32, |m| {
            let column_stride = m.argument(Argument::ActivationStride);
            let out_stride = m.argument(Argument::OutStride);
            let (first_column, first_out, first_sum) = (m.get_int(column), m.get_int(out), m.get_int(sums));
            let (mut columns, mut outs) = (vec![first_column], vec![first_out]);
            for c in 1..ntile {
                columns.push(m.add(columns[c - 1], column_stride));
                outs.push(m.add(outs[c - 1], out_stride));
            }
            self.tile(m, tile, &columns, first_sum, &outs);
            let next = m.add(columns[ntile - 1], column_stride);
            m.set_int(column, next);
            let next = m.add(outs[ntile - 1], out_stride);
            m.set_int(out, next);
            advance(m, sums, 4 * ntile as i32);
            advance(m, left, -(ntile as i32));
        });
    }

    /// One tile times a few columns, whose prepared activations, sums (one after the other) and results are given.
    fn tile(&self, m: &mut dyn Machine, tile: Int, columns: &[Int], sums: Int, outs: &[Int]) {
        let zero = m.zero();
        let totals: Vec<_> = (0..self.rows * columns.len()).map(|_| m.vector_variable(zero)).collect();
        let weights = m.int_variable(tile);
        let columns: Vec<_> = columns.iter().map(|column| m.int_variable(*column)).collect();
        let chunks = |m: &mut dyn Machine, count: usize| {
            let start = m.get_int(weights);
            let starts: Vec<_> = columns.iter().map(|column| m.get_int(*column)).collect();
            let mut values: Vec<_> = totals.iter().map(|total| m.get(*total)).collect();
            self.chunks(m, count, start, &starts, &mut values);
            for (total, value) in totals.iter().zip(values) {
                m.set(*total, value);
            }
            advance(m, weights, (count * self.rows * self.chunk) as i32);
            for column in &columns {
                advance(m, *column, (count * self.chunk) as i32);
            }
        };
        repeat(m, self.chunks / self.unroll, |m| chunks(m, self.unroll));
        repeat(m, (self.chunks % self.unroll).min(1), |m| chunks(m, self.chunks % self.unroll));

        for (c, out) in outs.iter().enumerate() {
            let sum = m.load_splat32(sums, 4 * c as i32);
            for r in (0..self.rows).step_by(4) {
                let quad = std::array::from_fn(|i| m.get(totals[c * self.rows + r + i]));
                let dots = m.sum_lanes32(quad);
                let result = m.sub32(dots, sum);
                m.store_low128(*out, 4 * r as i32, result);
            }
        }
    }

    /// Adds `count` chunks of all rows to `totals`, `[columns, rows]` vectors of 32-bit lanes.
    fn chunks(&self, m: &mut dyn Machine, count: usize, weights: Int, columns: &[Int], totals: &mut [Vector]) {
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
                    for (c, column) in columns.iter().enumerate() {
                        let offset = place * self.plane + chunk * self.chunk + vector;
                        let activations = m.load(*column, offset as i32);
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
