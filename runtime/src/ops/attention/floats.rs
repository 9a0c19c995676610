//! Blocks of floats.

use ternion_kernels_ref::attention::KEY_BLOCK;
use ternion_kernels_ref::lanes::LANES;

use super::{CachedBlock, Factors, Group, Groups, Running, Scores, VECTORS, fetch, mask, merge_lanes, merge_weights};
use crate::ops::half;
use crate::ops::lanes::Lanes;

/// Groups in a row of halves: what 512 bits work on at a time.
pub const F16_ROW: usize = 2;

/// Groups in a row of `f32`, a row being a cache line.
pub const F32_ROW: usize = 1;

/// Sixteen elements as `f32`.
pub(super) trait Widen<E>: Fn(&[E; LANES]) -> Lanes + Copy {}

impl<E, F: Fn(&[E; LANES]) -> Lanes + Copy> Widen<E> for F {}

/// One block of one key-value head.
struct Block<'a, E, W> {
    cached: CachedBlock<'a, E>,
    keys: &'a [[E; LANES]],
    values: &'a [[E; LANES]],
    next_keys: &'a [[E; LANES]],
    scale: f32,
    widen: W,
}

impl<'a, E: Copy, W: Widen<E>> Block<'a, E, W> {
    #[inline(always)]
    fn new(cached: CachedBlock<'a, E>, scale: f32, widen: W) -> Self {
        let [keys, values, next_keys] =
            [cached.keys, cached.values, cached.next_keys].map(|elements| elements.as_chunks().0);
        Self { cached, keys, values, next_keys, scale, widen }
    }

    /// Scores of `G` queries with all positions of the block, also those past its end. `V` groups of positions are worked
    /// on at a time, so that enough sums are in flight.
    #[inline(always)]
    fn scores<const G: usize, const V: usize, const C: usize>(&self, queries: [&[f32]; G]) -> [Scores; G] {
        let head_dim = queries[0].len();
        let mut scores = [[Lanes::ZERO; VECTORS]; G];
        for round in 0..self.cached.positions.div_ceil(V * LANES) {
            let keys: [Group<'_, _, C>; V] = Group::several(self.keys, head_dim, round * V);
            let mut sums = [[Lanes::ZERO; V]; G];
            for d in 0..head_dim {
                fetch(self.values, (round * head_dim + d) * V, V);
                let keys: [Lanes; V] = std::array::from_fn(|v| (self.widen)(keys[v].at(d)));
                for (sums, query) in sums.iter_mut().zip(queries) {
                    let q = Lanes::splat(query[d]);
                    for (sum, key) in sums.iter_mut().zip(keys) {
                        *sum = q.mul_add(key, *sum);
                    }
                }
            }
            for (scores, sums) in scores.iter_mut().zip(sums) {
                let scores = &mut scores.as_chunks_mut::<V>().0[round];
                for (score, sum) in scores.iter_mut().zip(sums) {
                    *score = sum.map(|sum| sum * self.scale);
                }
            }
        }
        scores
    }

    /// Weighted values in `D` groups of dimensions from `group` on, merged into `targets`, `[G, width]` groups.
    #[inline(always)]
    fn weighted<const G: usize, const D: usize, const C: usize>(
        &self,
        weights: &[Scores; G],
        factors: [Factors; G],
        targets: &mut [[f32; LANES]],
        (group, width): (usize, usize),
    ) {
        let groups: [Group<'_, _, C>; D] = Group::several(self.values, KEY_BLOCK, group);
        let mut sums = [[Lanes::ZERO; D]; G];
        for position in self.cached.first..self.cached.positions {
            fetch(self.next_keys, group * KEY_BLOCK + position * D, D);
            let values: [Lanes; D] = std::array::from_fn(|d| (self.widen)(groups[d].at(position)));
            for (sums, weights) in sums.iter_mut().zip(weights) {
                let weight = Lanes::splat(weights[position / LANES].0[position % LANES]);
                for (sum, values) in sums.iter_mut().zip(values) {
                    *sum = weight.mul_add(values, *sum);
                }
            }
        }
        for g in 0..G {
            for (d, sum) in sums[g].into_iter().enumerate() {
                merge_lanes(&mut targets[g * width + group + d], sum, factors[g]);
            }
        }
    }
}

/// Merges a block into what came before, for `G` heads, `V` vectors at a time.
#[inline(always)]
fn merge<E: Copy, W: Widen<E>, const C: usize, const G: usize, const V: usize>(
    block: &Block<'_, E, W>,
    queries: [&[f32]; G],
    running: Running<'_>,
) {
    let Running { max, sum, values } = running;
    let mut weights = block.scores::<G, V, C>(queries);
    if !block.cached.whole() {
        mask(&mut weights, block.cached.first..block.cached.positions);
    }
    let factors = merge_weights(&mut weights, max, sum, |_| {});
    let width = values.len() / G / LANES;
    let (targets, _) = values.as_chunks_mut::<LANES>();
    let (rows, mut group) = (width / C * C, 0);
    while group < width {
        if group + V <= rows {
            block.weighted::<G, V, C>(&weights, factors, targets, (group, width));
            group += V;
        } else if group < rows {
            block.weighted::<G, 1, C>(&weights, factors, targets, (group, width));
            group += 1;
        } else {
            block.weighted::<G, 1, 1>(&weights, factors, targets, (group, width));
            group += 1;
        }
    }
}

/// `ONE`, `TWO` and `FOUR` are the vectors worked on at a time for so many heads: as many sums as registers hold.
#[inline(always)]
pub(super) fn attend<E: Copy, const C: usize, const ONE: usize, const TWO: usize, const FOUR: usize>(
    queries: &[f32],
    cached: CachedBlock<'_, E>,
    scale: f32,
    running: Running<'_>,
    widen: impl Widen<E>,
) {
    let heads = running.max.len();
    let head_dim = queries.len() / heads.max(1);
    assert_eq!(head_dim * heads, queries.len(), "attend: queries of equal length");

    cached.check(head_dim, &running, false);

    let block = Block::new(cached, scale, widen);
    for (first, running) in Groups::new(running, head_dim.next_multiple_of(LANES)) {
        let query = |g: usize| &queries[(first + g) * head_dim..][..head_dim];
        match running.max.len() {
            1 => merge::<_, _, C, _, ONE>(&block, [query(0)], running),
            2 => merge::<_, _, C, _, TWO>(&block, [query(0), query(1)], running),
            _ => merge::<_, _, C, _, FOUR>(&block, [query(0), query(1), query(2), query(3)], running),
        }
    }
}

/// Sixteen `f32` values as they are.
#[inline(always)]
pub(super) fn widen_f32(elements: &[f32; LANES]) -> Lanes {
    Lanes(*elements)
}

/// Attention for every feature level. Levels differ in how many sums their registers hold, and for halves in the instruction
/// that widens them, which no compiler finds by itself.
macro_rules! attend_at_every_level {
    ($($(#[$meta:meta])* $vis:vis $name:ident($element:ty), $row:expr, $widen_avx512:path, $widen_avx2:path, $widen:path;)*) => {$(
        $(#[$meta])*
        #[multiversion::multiversion(targets(
            "x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma+bmi2+f16c",
            "x86_64+avx2+fma+bmi2+f16c",
            "aarch64+neon",
        ))]
        $vis fn $name(queries: &[f32], block: CachedBlock<'_, $element>, scale: f32, running: Running<'_>) {
            multiversion::target::match_target! {
                "x86_64+avx512f" => attend::<_, { $row }, 4, 4, 2>(queries, block, scale, running, |e: &_| $widen_avx512(e)),
                "x86_64+avx2+f16c" => attend::<_, { $row }, 4, 2, 1>(queries, block, scale, running, |e: &_| $widen_avx2(e)),
                _ => attend::<_, { $row }, 4, 2, 1>(queries, block, scale, running, $widen),
            }
        }
    )*};
}

attend_at_every_level! {
    /// Merges the next block of at most [`KEY_BLOCK`] positions, cached as halves, into `running`. `queries` is
    /// `[heads, head_dim]`, all reading the same key-value head.
    ///
    /// # Panics
    /// If the lengths do not fit each other.
    pub attend_block_f16(u16), F16_ROW, half::widen_lanes_avx512, half::widen_lanes_f16c, half::widen_lanes;

    /// As [`attend_block_f16`], cached as `f32`.
    ///
    /// # Panics
    /// If the lengths do not fit each other.
    pub attend_block_f32(f32), F32_ROW, widen_f32, widen_f32, widen_f32;
}
