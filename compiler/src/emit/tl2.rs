//! `tl2`: three trits are a sign and an index into a table of their sums, 1.67 bits per weight.
//!
//! A vector lane is a row, so all lanes look up the same table. Of the 27 sums of three trits and activations 13 are the
//! opposites of 13 others and one is 0: a table has 14 entries `v`, at most 3·127, and a sign turns v into −v. A byte
//! shuffle returns bytes, so `v = l + 31·h + 16` comes in two signed ones (see [`ActivationFormat::TripleTables`]), in such
//! a way that flipping all of their bits is the change of sign: nothing is added for it and nothing must be counted.
//!
//! Both parts are in −16..=15, so the eight lookups of a byte of signs, [`BLOCK`] weights, add up within a byte that starts
//! at [`BIAS`], which makes it unsigned. It is then widened as in [`tl1`](super::tl1): read as 16-bit lanes `e + 256·o`,
//! `Σ(lane >> 8)` is the sum of the odd bytes and `Σ lane − 256·Σ(lane >> 8)`, modulo 2¹⁶, that of the even ones. Both stay
//! below 2¹⁶ for [`MAX_BLOCKS`] additions, after which they go to the 32-bit results in memory.

use super::{Rules, for_each_tile};
use crate::activations::TRIPLE_BASE;
use crate::machine::{Int, Machine, Vector, VectorVariable, advance, repeat};
use crate::{ActivationFormat, Cpu, KernelSpec, Layout, MachineKind, Schedule, ScheduleError};

/// Lookups of a block: as many as there are signs in a byte.
const LOOKUPS: usize = 8;

/// What a byte sum of a block starts with.
const BIAS: u8 = 128;
const _: () = assert!(LOOKUPS * 16 <= BIAS as usize && LOOKUPS * 15 + (BIAS as usize) < 256);

/// Weights of a block.
const BLOCK: usize = 3 * LOOKUPS;

/// Bytes of a row in a block: signs, then two indices to a byte.
const BLOCK_BYTES: usize = 1 + LOOKUPS / 2;

/// Bytes of a table: low parts, then high parts.
const TABLE_BYTES: usize = 32;

/// Blocks whose byte sums 16 bits can take.
pub(crate) const MAX_BLOCKS: usize = 65535 / (BIAS as usize + LOOKUPS * 15);

/// The family.
pub(super) struct Tl2;

impl Rules for Tl2 {
    fn name(&self) -> &'static str {
        "tl2"
    }

    fn prefetches(&self) -> bool {
        true
    }

    fn activation_format(&self) -> ActivationFormat {
        ActivationFormat::TripleTables
    }

    fn check(&self, schedule: &Schedule, cpu: &Cpu) -> Result<(), ScheduleError> {
        let Layout::Threes { rows: rows @ 1..=192 } = schedule.layout else {
            return Err(schedule.layout_error("threes16 to threes192"));
        };
        schedule.check_width(rows.into())?;
        Schedule::check_lookup(cpu, "tl2")?;
        let parameter =
            |name, value: u8, expected| Err(ScheduleError::Parameter { name, value: value.into(), expected });
        if !matches!(schedule.unroll, 1 | 2 | 4) {
            return parameter("unroll", schedule.unroll, "1, 2 or 4 blocks of 24 weights");
        }
        if schedule.ntile != 1 {
            return parameter("ntile", schedule.ntile, "1: a table serves one column");
        }
        Ok(())
    }

    fn layouts(&self, machine: MachineKind) -> Vec<Layout> {
        let width = machine.vector_bytes();
        (width..=192).step_by(width).map(|rows| Layout::Threes { rows: rows as u8 }).collect()
    }

    fn unrolls(&self) -> Vec<u8> {
        vec![1, 2, 4]
    }

    fn ntiles(&self, _: MachineKind) -> Vec<u8> {
        vec![1]
    }

    fn registers(&self, schedule: &Schedule) -> Option<usize> {
        // Of every vector of rows the 16-bit sums; of all of them or of one at a time the byte sums, indices and signs; two
        // tables, and what is looked up.
        let vectors = schedule.layout.tile_rows() / schedule.machine.vector_bytes();
        Some(if schedule.machine == MachineKind::Avx512 { (4 + 2 + 2) * vectors + 5 } else { 4 * vectors + 2 + 1 + 5 })
    }

    fn emit(&self, m: &mut dyn Machine, spec: &KernelSpec, schedule: &Schedule) {
        emit_with(m, spec, schedule, MAX_BLOCKS);
    }
}

/// The compile-time facts of one kernel.
struct Facts {
    rows: usize,
    unroll: usize,
    /// Blocks of a row.
    blocks: usize,
    /// Blocks after which 16-bit sums are added to the results, a multiple of `unroll`.
    flush: usize,
    prefetch: i32,
    /// Whether there are registers for all that the vectors of rows of a tile have in use at once: they then share each
    /// table that is loaded. Else they take turns, and load signs each time they are needed.
    roomy: bool,
}

/// Emits the kernel with at most so many blocks between flushes.
pub(crate) fn emit_with(m: &mut dyn Machine, spec: &KernelSpec, schedule: &Schedule, flush: usize) {
    let unroll = schedule.unroll.into();
    let tl2 = Facts {
        rows: schedule.layout.tile_rows(),
        unroll,
        blocks: spec.k.div_ceil(BLOCK),
        flush: flush / unroll * unroll,
        prefetch: schedule.prefetch.into(),
        roomy: schedule.machine == MachineKind::Avx512,
    };
    for_each_tile(m, spec, schedule, |m, tile| tl2.tile(m, tile.weights, tile.activations, tile.out));
}

/// The running sums of one vector of rows, in 16-bit lanes.
struct Sums {
    low: Halves,
    high: Halves,
}

/// `Σ (even + 256·odd)` and `Σ odd` of byte sums.
#[derive(Clone, Copy)]
struct Halves {
    both: VectorVariable,
    odd: VectorVariable,
}

impl Facts {
    /// One tile times one column.
    fn tile(&self, m: &mut dyn Machine, weights: Int, tables: Int, out: Int) {
        let width = m.vector_bytes();
        // `Σ (l + 31h + 16)` of a block, l and h each with [`BIAS`] in their sums: of the bias only 31 times one is left.
        const { assert!(16 * LOOKUPS == BIAS as usize) };
        let bias = m.splat32(-TRIPLE_BASE * i32::from(BIAS) * self.blocks as i32);
        for offset in (0..4 * self.rows).step_by(width) {
            m.store(out, offset as i32, bias);
        }
        let (weights, tables) = (m.int_variable(weights), m.int_variable(tables));
        let flushed = |m: &mut dyn Machine, blocks: usize| {
            let zero = m.zero();
            let sums: Vec<Sums> = (0..self.rows / width)
                .map(|_| {
                    let [low, high] =
                        std::array::from_fn(|_| Halves { both: m.vector_variable(zero), odd: m.vector_variable(zero) });
                    Sums { low, high }
                })
                .collect();
            let turns = |m: &mut dyn Machine, times: usize, count: usize| {
                repeat(m, times, |m| {
                    let [start, table] = [weights, tables].map(|now| m.get_int(now));
                    for block in 0..count {
                        self.block(m, start, table, block, &sums);
                    }
                    advance(m, weights, (count * self.rows * BLOCK_BYTES) as i32);
                    advance(m, tables, (count * LOOKUPS * TABLE_BYTES) as i32);
                });
            };
            turns(m, blocks / self.unroll, self.unroll);
            turns(m, (blocks % self.unroll).min(1), blocks % self.unroll);
            for (i, sums) in sums.iter().enumerate() {
                flush(m, sums, out, 4 * i * width);
            }
        };
        repeat(m, self.blocks / self.flush, |m| flushed(m, self.flush));
        repeat(m, (self.blocks % self.flush).min(1), |m| flushed(m, self.blocks % self.flush));
    }

    /// Adds one block of all rows to the sums; `weights` and `tables` are where the first block of this turn is.
    fn block(&self, m: &mut dyn Machine, weights: Int, tables: Int, block: usize, sums: &[Sums]) {
        let width = m.vector_bytes();
        let (first, first_table) = (block * self.rows * BLOCK_BYTES, block * LOOKUPS * TABLE_BYTES);
        if self.prefetch > 0 {
            let end = first + self.rows * BLOCK_BYTES;
            for line in (first.next_multiple_of(64)..end).step_by(64) {
                m.prefetch(weights, line as i32 + self.prefetch);
            }
        }
        let at = |byte: usize, vector: usize| (first + byte * self.rows + vector * width) as i32;
        let load_signs = |m: &mut dyn Machine, vector| m.load(weights, at(0, vector));
        let together = if self.roomy { sums.len() } else { 1 };
        for (turn, sums) in sums.chunks(together).enumerate() {
            let vectors = turn * together..turn * together + sums.len();
            let kept = vectors.clone().filter(|_| self.roomy);
            let kept: Vec<_> = kept.map(|vector| load_signs(m, vector)).collect();
            let bias = m.splat8(BIAS);
            let mut totals = vec![[bias; 2]; sums.len()];
            for byte in 0..LOOKUPS / 2 {
                let indices: Vec<_> = vectors.clone().map(|vector| m.load(weights, at(1 + byte, vector))).collect();
                for half in [1, 0] {
                    let group = 2 * byte + half;
                    let table = (first_table + group * TABLE_BYTES) as i32;
                    let parts = [0, 16].map(|part| m.load_signed_table(tables, table + part));
                    for (i, total) in totals.iter_mut().enumerate() {
                        let index = if half == 1 { m.shift_right16(indices[i], 4) } else { indices[i] };
                        let signs = kept.get(i).copied().unwrap_or_else(|| load_signs(m, vectors.start + i));
                        let found = m.lookup_signed(parts, index, signs, group as u8);
                        *total = [0, 1].map(|part| m.add8(total[part], found[part]));
                    }
                }
            }
            for (sums, [low, high]) in sums.iter().zip(totals) {
                add_to(m, sums.low, low);
                add_to(m, sums.high, high);
            }
        }
    }
}

/// Adds byte sums to sums of 16 bits.
fn add_to(m: &mut dyn Machine, sums: Halves, bytes: Vector) {
    let odd = m.shift_right16(bytes, 8);
    for (sum, value) in [(sums.both, bytes), (sums.odd, odd)] {
        let old = m.get(sum);
        let new = m.add16(old, value);
        m.set(sum, new);
    }
}

/// Adds one vector of rows to its 32-bit results at `out + offset`: `low + 31·high`.
fn flush(m: &mut dyn Machine, sums: &Sums, out: Int, offset: usize) {
    let width = m.vector_bytes();
    let [low, high] = [sums.low, sums.high].map(|sum| {
        let [both, odd] = [sum.both, sum.odd].map(|part| m.get(part));
        let shifted = m.shift_left16(odd, 8);
        let even = m.sub16(both, shifted);
        m.interleave16(even, odd)
    });
    for (half, (low, high)) in low.into_iter().zip(high).enumerate() {
        for (quarter, (low, high)) in m.widen16(low).into_iter().zip(m.widen16(high)).enumerate() {
            let at = (offset + (2 * half + quarter) * width) as i32;
            const { assert!(TRIPLE_BASE == (1 << 5) - 1) };
            let more = m.shift_left32(high, 5);
            let high = m.sub32(more, high);
            let sum = m.add32(low, high);
            let old = m.load_result(out, at);
            let new = m.add32(old, sum);
            m.store(out, at, new);
        }
    }
}
