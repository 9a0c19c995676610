//! Kernel families, one file each, written once over the [`Machine`](crate::machine::Machine).

mod family;
mod five_planes;
mod floats;
mod mad;
mod mad_lanes;
mod norm_quantize;
mod pair_tables;
mod plain;
mod planes;
mod quantize;
mod sparse_columns;
mod sparse_rows;
mod t5;
mod tl1;
pub(crate) mod tl2;
mod triple_tables;
pub(crate) mod vlut;

use crate::machine::{Argument, Int, IntVariable, Machine, advance, while_at_least};
use crate::{ActivationFormat, Columns, KernelSpec, Schedule, Step, StepSpec};

pub use family::{Family, Rules};
pub(crate) use floats::SCRATCH as STEP_SCRATCH;

/// Emits the body of the kernel for a schedule that [`Schedule::check`] has found legal.
pub(crate) fn emit(m: &mut dyn Machine, spec: &KernelSpec, schedule: &Schedule) {
    schedule.family.rules().emit(m, spec, schedule);
}

/// Emits the body of a step that [`StepSpec::check`] has found legal.
pub(crate) fn emit_step(m: &mut dyn Machine, spec: &StepSpec) {
    let emit = match spec.step {
        Step::Quantize => quantize::emit,
        Step::NormQuantize => norm_quantize::emit,
        Step::Prepare(ActivationFormat::Plain) => plain::emit,
        Step::Prepare(ActivationFormat::Planes) => planes::emit,
        Step::Prepare(ActivationFormat::FivePlanes) => five_planes::emit,
        Step::Prepare(ActivationFormat::PairTables) => pair_tables::emit,
        Step::Prepare(ActivationFormat::TripleTables) => triple_tables::emit,
    };
    emit(m, spec.k);
}

/// One tile of rows and a few columns: where they are while the kernel runs.
pub struct Tile {
    /// Address of the tile's weights.
    pub weights: Int,
    /// Address of the first prepared column; the others follow, one right after the other.
    pub activations: Int,
    /// Address of `Σa` of the first column, `i32` each.
    pub sums: Int,
    /// Address of the result of the first row in the first column.
    pub out: Int,
    /// Number of columns.
    pub columns: usize,
}

impl Tile {
    /// Emits `body` for every column with its number and the address of its first result.
    pub fn for_each_column(&self, m: &mut dyn Machine, mut body: impl FnMut(&mut dyn Machine, usize, Int)) {
        let mut out = self.out;
        for c in 0..self.columns {
            body(m, c, out);
            if c + 1 < self.columns {
                let stride = m.argument(Argument::OutStride);
                out = m.add(out, stride);
            }
        }
    }
}

/// The widths of the passes over the columns of a call: `ntile` at a time, then what is left by halves of that.
pub(crate) fn passes(ntile: u8) -> impl Iterator<Item = usize> {
    std::iter::successors(Some(usize::from(ntile)), |columns| Some(columns / 2)).take_while(|columns| *columns > 0)
}

/// Emits the loops over the tiles of a call and, within a tile, over its columns: `ntile` at a time, then what is left by
/// halves of that, so that a few columns are not read one by one.
pub fn for_each_tile(
    m: &mut dyn Machine,
    spec: &KernelSpec,
    schedule: &Schedule,
    body: impl Fn(&mut dyn Machine, &Tile),
) {
    let layout = schedule.layout;
    let column_bytes = schedule.activation_format().bytes(spec.k);
    let weights = m.argument(Argument::Weights);
    let out = m.argument(Argument::Out);
    let tiles = m.argument(Argument::Tiles);
    let [weights, out, tiles] = [weights, out, tiles].map(|start| m.int_variable(start));
    m.name_loop(Some("tiles of rows"));
    while_at_least(m, tiles, 1, |m| {
        let activations = m.argument(Argument::Activations);
        let sums = m.argument(Argument::Sums);
        let (tile, first_out) = (m.get_int(weights), m.get_int(out));
        if spec.columns == Columns::One {
            body(m, &Tile { weights: tile, activations, sums, out: first_out, columns: 1 });
        } else {
            let left = m.argument(Argument::Columns);
            let [column, sums, column_out, left] =
                [activations, sums, first_out, left].map(|start| m.int_variable(start));
            for columns in passes(schedule.ntile) {
                let all = columns == usize::from(schedule.ntile);
                m.name_loop(Some(if all { "columns, ntile at a time" } else { "columns that are left, by halves" }));
                while_at_least(m, left, columns as i32, |m| {
                    let [activations, sums_now, out] = [column, sums, column_out].map(|now| m.get_int(now));
                    body(m, &Tile { weights: tile, activations, sums: sums_now, out, columns });
                    advance(m, column, (columns * column_bytes) as i32);
                    advance(m, sums, 4 * columns as i32);
                    advance_by(m, column_out, Argument::OutStride, columns);
                    advance(m, left, -(columns as i32));
                });
            }
        }
        advance(m, weights, layout.tile_bytes(spec.k) as i32);
        advance(m, out, 4 * layout.tile_rows() as i32);
        advance(m, tiles, -1);
    });
}

/// `variable += times · argument`.
fn advance_by(m: &mut dyn Machine, variable: IntVariable, argument: Argument, times: usize) {
    let step = m.argument(argument);
    for _ in 0..times {
        let value = m.get_int(variable);
        let next = m.add(value, step);
        m.set_int(variable, next);
    }
}
