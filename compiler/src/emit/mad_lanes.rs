//! `mad` and `t5` over lanes: a 32-bit lane is a row, so nothing is added up across lanes.
//!
//! A lane holds four weight bytes of its row, sixteen or twenty weights. Unpacking gives four or five vectors of codes,
//! each of which meets four activations of a plane, the same for every row: 32 bits of memory in every lane. With many
//! columns the codes are unpacked once for all of them.
//!
//! ```text
//! for tile of rows                       weights: one sequential stream
//!   for ntile columns                    the tile stays in cache
//!     for group of 16 (20) k             `unroll` groups per turn
//!       for place in byte: codes of all vectors of rows, then for each column a multiply-add per vector
//!     subtract Σa, store
//! ```
//!
//! With `dot` the 32-bit results stay in registers; as many columns as there are registers hide its latency. With few
//! columns each place of a byte gets sums of its own, and these may be sums of 4, 16 or 64 times the codes: masking is
//! then enough, and one shift at the end takes the place of one per vector. With `pairs` the registers hold 16-bit sums, which go to the
//! results in memory before they can overflow.

use super::{Tile, for_each_tile, passes, t5};
use crate::activations::plane_bytes;
use crate::machine::{Int, Machine, Vector, advance, repeat};
use crate::{KernelSpec, Layout, MachineKind, Multiply, Schedule};

/// Groups of bytes whose products 16-bit sums of pairs can take: 64 times at most 2·2·127, `planes` times per group.
pub(super) const fn max_pair_groups(planes: usize) -> usize {
    i16::MAX as usize / (2 * 2 * 127) / planes
}

/// Rows of a tile that fill whole vectors of a machine's 32-bit lanes.
pub(super) fn heights(machine: MachineKind) -> impl Iterator<Item = u8> {
    let lanes = machine.vector_bytes() / 4;
    (lanes..=64).step_by(lanes).map(|rows| rows as u8)
}

/// See [`Rules::registers`](super::Rules::registers).
pub(super) fn registers(schedule: &Schedule) -> usize {
    let vectors = 4 * schedule.layout.tile_rows() / schedule.machine.vector_bytes();
    let wide = schedule.machine == MachineKind::Avx512;
    let of_pass = |columns: usize| {
        let results = vectors * columns;
        let scaled = schedule.multiply == Multiply::Dot && may_scale(results);
        let planes = if let Layout::Fives { .. } = schedule.layout { 5 } else { 4 };
        let sums = match schedule.multiply {
            Multiply::Pairs => results,
            Multiply::Dot => results * spread(results, planes, scaled),
        };
        // Bytes and codes of all vectors, and what they meet: activations, or a mask before that.
        let others = match (planes, schedule.multiply) {
            // Splitting five weights takes another two, or with a table of 128 bytes one.
            (5, _) => 2 * vectors + if wide { 2 } else { 3 },
            // Activations that meet one vector are read from memory where they meet it.
            (_, Multiply::Dot) if wide && scaled && vectors == 1 => 2,
            // Products are values of their own before they are added.
            (_, Multiply::Pairs) if results > vectors && vectors > 1 => 2 * vectors + 2,
            _ => 2 * vectors + 1,
        };
        sums + others
    };
    passes(schedule.ntile).map(of_pass).max().unwrap_or_default()
}

/// Whether there are so few results that each place of a byte may have sums of its own.
const fn may_scale(results: usize) -> bool {
    4 * results <= CHAINS
}

/// Sums of each result.
fn spread(results: usize, planes: usize, scaled: bool) -> usize {
    if scaled { planes } else { (CHAINS / results).clamp(1, 4) }
}

/// Sums that should be under way at once: a multiply-add takes some four cycles, and a CPU starts up to two per cycle.
const CHAINS: usize = 8;

/// What one turn of the loop over k multiplies.
struct Turn {
    groups: usize,
    /// Address of the groups' weights.
    weights: Int,
    /// Address of what they meet in the first plane of the first column.
    activations: Int,
    columns: usize,
    /// Whether codes stay at their places in a byte: codes 1 to 3 are 4, 16 and 64 times as large, the fifth 81 times.
    scaled: bool,
}

/// The compile-time facts of one kernel.
struct MadLanes {
    /// Vectors of rows.
    vectors: usize,
    /// Bytes of one group of all rows.
    group_bytes: usize,
    /// Groups of a row.
    groups: usize,
    unroll: usize,
    multiply: Multiply,
    prefetch: i32,
    /// Whether 32 bits hold the sum of 64 times the codes of one place in all bytes of a row.
    may_scale: bool,
    /// Weights in a byte, activation planes.
    planes: usize,
    /// Bytes from one activation plane to the next.
    plane: usize,
    /// Bytes from one prepared column to the next.
    column: usize,
}

pub(super) fn emit(m: &mut dyn Machine, spec: &KernelSpec, schedule: &Schedule) {
    let planes = match schedule.layout {
        Layout::Lanes { group: 4, .. } => 4,
        Layout::Fives { .. } => 5,
        _ => return,
    };
    let group_bytes = 4 * schedule.layout.tile_rows();
    let mad = MadLanes {
        vectors: group_bytes / m.vector_bytes(),
        group_bytes,
        groups: schedule.layout.row_bytes(spec.k) / 4,
        unroll: schedule.unroll.into(),
        multiply: schedule.multiply,
        prefetch: schedule.prefetch.into(),
        may_scale: schedule.layout.row_bytes(spec.k) <= i32::MAX as usize / (64 * 2 * 127),
        planes,
        plane: plane_bytes(spec.k, planes),
        column: schedule.activation_format().bytes(spec.k),
    };
    for_each_tile(m, spec, schedule, |m, tile| match mad.multiply {
        Multiply::Dot => mad.tile_of_dots(m, tile),
        Multiply::Pairs => mad.tile_of_pairs(m, tile),
    });
}

impl MadLanes {
    /// One tile times a few columns, in 32-bit sums.
    fn tile_of_dots(&self, m: &mut dyn Machine, tile: &Tile) {
        let results = self.vectors * tile.columns;
        let scaled = may_scale(results) && self.may_scale && m.dot_takes_any_byte();
        let spread = spread(results, self.planes, scaled);
        let zero = m.zero();
        // `[columns, vectors, spread]`.
        let totals: Vec<_> = (0..results * spread).map(|_| m.vector_variable(zero)).collect();
        self.for_each_turn(m, tile, self.groups, |m, count, weights, activations| {
            let mut values: Vec<_> = totals.iter().map(|total| m.get(*total)).collect();
            let turn = Turn { groups: count, weights, activations, columns: tile.columns, scaled };
            self.products(m, &turn, |m, [c, v, place], codes, activations| {
                let at = (c * self.vectors + v) * spread + place % spread;
                values[at] = m.dot(values[at], codes, activations);
            });
            for (total, value) in totals.iter().zip(values) {
                m.set(*total, value);
            }
        });
        let width = m.vector_bytes();
        tile.for_each_column(m, |m, c, out| {
            let sum = m.load_splat32(tile.sums, 4 * c as i32);
            for v in 0..self.vectors {
                let mut result = None;
                for place in 0..spread {
                    let total = m.get(totals[(c * self.vectors + v) * spread + place]);
                    let total = match place {
                        0 => total,
                        _ if !scaled => total,
                        4 => t5::unscale_sum(m, total),
                        _ => m.shift_right_signed32(total, 2 * place as u8),
                    };
                    result = Some(match result {
                        None => m.sub32(total, sum),
                        Some(result) => m.add32(result, total),
                    });
                }
                let Some(result) = result else { continue };
                m.store(out, (v * width) as i32, result);
            }
        });
    }

    /// One tile times a few columns, in 16-bit sums of pairs and 32-bit results in memory.
    fn tile_of_pairs(&self, m: &mut dyn Machine, tile: &Tile) {
        let width = m.vector_bytes();
        let zero = m.zero();
        tile.for_each_column(m, |m, c, out| {
            let sum = m.load_splat32(tile.sums, 4 * c as i32);
            let negative = m.sub32(zero, sum);
            for v in 0..self.vectors {
                m.store(out, (v * width) as i32, negative);
            }
        });
        let (weights, activations) = (m.int_variable(tile.weights), m.int_variable(tile.activations));
        let block = max_pair_groups(self.planes) / self.unroll * self.unroll;
        let block_of = |m: &mut dyn Machine, groups: usize| {
            let zero = m.zero();
            // `[columns, vectors]`.
            let sums: Vec<_> = (0..tile.columns * self.vectors).map(|_| m.vector_variable(zero)).collect();
            let [first, column] = [weights, activations].map(|start| m.get_int(start));
            let part = Tile { weights: first, activations: column, ..*tile };
            self.for_each_turn(m, &part, groups, |m, count, weights, activations| {
                let mut values: Vec<_> = sums.iter().map(|sum| m.get(*sum)).collect();
                let turn = Turn { groups: count, weights, activations, columns: tile.columns, scaled: false };
                self.products(m, &turn, |m, [c, v, _], codes, activations| {
                    let pairs = m.multiply_add_pairs(codes, activations);
                    let at = c * self.vectors + v;
                    values[at] = m.add16(values[at], pairs);
                });
                for (sum, value) in sums.iter().zip(values) {
                    m.set(*sum, value);
                }
            });
            tile.for_each_column(m, |m, c, out| {
                for v in 0..self.vectors {
                    let sum = m.get(sums[c * self.vectors + v]);
                    let wide = m.sum_pairs16(sum);
                    let old = m.load_result(out, (v * width) as i32);
                    let new = m.add32(old, wide);
                    m.store(out, (v * width) as i32, new);
                }
            });
            advance(m, weights, (groups * self.group_bytes) as i32);
            advance(m, activations, 4 * groups as i32);
        };
        m.name_loop(Some("blocks of k that 16-bit sums can take"));
        repeat(m, self.groups / block, |m| block_of(m, block));
        repeat(m, (self.groups % block).min(1), |m| block_of(m, self.groups % block));
    }

    /// Emits the loop over `groups` groups from the start of `tile`, `unroll` per turn, then the rest. `turn` gets the
    /// number of groups and the addresses of their weights and of the first column's activations.
    fn for_each_turn(
        &self,
        m: &mut dyn Machine,
        tile: &Tile,
        groups: usize,
        mut turn: impl FnMut(&mut dyn Machine, usize, Int, Int),
    ) {
        let (weights, activations) = (m.int_variable(tile.weights), m.int_variable(tile.activations));
        let mut turns = |m: &mut dyn Machine, times: usize, count: usize| {
            m.name_loop(Some("groups of k, unroll at a time"));
            repeat(m, times, |m| {
                let (start, column) = (m.get_int(weights), m.get_int(activations));
                turn(m, count, start, column);
                advance(m, weights, (count * self.group_bytes) as i32);
                advance(m, activations, 4 * count as i32);
            });
        };
        turns(m, groups / self.unroll, self.unroll);
        turns(m, (groups % self.unroll).min(1), groups % self.unroll);
    }

    /// Unpacks the codes of some groups and emits `multiply` for every column, vector of rows and place in a byte, with
    /// the codes and the activations that they meet.
    fn products(
        &self,
        m: &mut dyn Machine,
        turn: &Turn,
        mut multiply: impl FnMut(&mut dyn Machine, [usize; 3], Vector, Vector),
    ) {
        let width = m.vector_bytes();
        let Turn { weights, activations, columns, scaled, .. } = *turn;
        for group in 0..turn.groups {
            let first = group * self.group_bytes;
            let mut bytes: Vec<_> = (0..self.vectors).map(|v| m.load(weights, (first + v * width) as i32)).collect();
            if self.prefetch > 0 {
                for line in (first.next_multiple_of(64)..first + self.group_bytes).step_by(64) {
                    m.prefetch(weights, line as i32 + self.prefetch);
                }
            }
            // The fifth place first: what it leaves are bytes of four places.
            for place in [4, 0, 1, 2, 3].into_iter().filter(|place| *place < self.planes) {
                let unpack = |bytes: &mut Vector| {
                    if place == 4 {
                        let [fifth, four] = t5::split(m, *bytes);
                        *bytes = four;
                        return if scaled { fifth } else { t5::unscale_code(m, fifth) };
                    }
                    let bits = 2 * place as u8;
                    if scaled || place == 0 {
                        let mask = m.splat8(3 << bits);
                        return m.and(*bytes, mask);
                    }
                    let (shifted, mask) = (m.shift_right16(*bytes, bits), m.splat8(3));
                    m.and(shifted, mask)
                };
                let codes: Vec<_> = bytes.iter_mut().map(unpack).collect();
                for c in 0..columns {
                    let offset = c * self.column + place * self.plane + 4 * group;
                    let activations = m.load_splat32(activations, offset as i32);
                    for (v, codes) in codes.iter().enumerate() {
                        multiply(m, [c, v, place], *codes, activations);
                    }
                }
            }
        }
    }
}
