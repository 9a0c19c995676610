//! Blocks of floats.

use ternion_kernels_ref::attention::KEY_BLOCK;
use ternion_kernels_ref::lanes::LANES;

use super::{CachedBlock, Factors, Groups, Running, Scores, VECTORS, fetch, merge_values, merge_weights};
use crate::ops::half;
use crate::ops::lanes::Lanes;

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

impl<E: Copy, W: Widen<E>> Block<'_, E, W> {
    /// Scores of `G` queries with all positions of the block, also those past its end. `V` groups of positions are worked
    /// on at a time, so that enough sums are in flight.
    #[inline(always)]
    fn scores<const G: usize, const V: usize>(&self, queries: [&[f32]; G]) -> [Scores; G] {
        let head_dim = queries[0].len();
        let mut scores = [[Lanes::ZERO; VECTORS]; G];
        let rounds = self.keys.chunks_exact(V * head_dim).take(self.cached.positions.div_ceil(V * LANES));
        for (round, keys) in rounds.enumerate() {
            let keys: [&[[E; LANES]]; V] = std::array::from_fn(|v| &keys[v * head_dim..][..head_dim]);
            let mut sums = [[Lanes::ZERO; V]; G];
            for d in 0..head_dim {
                fetch(self.values, (round * head_dim + d) * V, V);
                let keys: [Lanes; V] = std::array::from_fn(|v| (self.widen)(&keys[v][d]));
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

    /// Merges this block into what came before, for `G` heads, `V` vectors at a time.
    #[inline(always)]
    fn merge<const G: usize, const V: usize>(&self, queries: [&[f32]; G], running: Running<'_>) {
        let Running { max, sum, values } = running;
        let mut weights = self.scores::<G, V>(queries);
        let factors = merge_weights(&mut weights, &self.cached, max, sum);
        let width = values.len() / G / LANES;
        let (targets, _) = values.as_chunks_mut::<LANES>();
        let mut group = 0;
        while group < width {
            if group + V <= width {
                self.weighted::<G, V>(&weights, factors, targets, (group, width));
                group += V;
            } else {
                self.weighted::<G, 1>(&weights, factors, targets, (group, width));
                group += 1;
            }
        }
    }

    /// Weighted values in `D` groups of dimensions from `group` on, merged into `targets`, `[G, width]` groups.
    #[inline(always)]
    fn weighted<const G: usize, const D: usize>(
        &self,
        weights: &[Scores; G],
        factors: [Factors; G],
        targets: &mut [[f32; LANES]],
        (group, width): (usize, usize),
    ) {
        let groups: [&[[E; LANES]]; D] = std::array::from_fn(|d| &self.values[(group + d) * KEY_BLOCK..][..KEY_BLOCK]);
        let mut sums = [[Lanes::ZERO; D]; G];
        for position in self.cached.first..self.cached.positions {
            fetch(self.next_keys, group * KEY_BLOCK + position * D, D);
            let values: [Lanes; D] = std::array::from_fn(|d| (self.widen)(&groups[d][position]));
            for (sums, weights) in sums.iter_mut().zip(weights) {
                let weight = Lanes::splat(weights[position / LANES].0[position % LANES]);
                for (sum, values) in sums.iter_mut().zip(values) {
                    *sum = weight.mul_add(values, *sum);
                }
            }
        }
        for g in 0..G {
            for (d, sum) in sums[g].into_iter().enumerate() {
                merge_values(&mut targets[g * width + group + d], sum, factors[g]);
            }
        }
    }
}

/// `ONE`, `TWO` and `FOUR` are the vectors worked on at a time for so many heads: as many sums as registers hold.
#[inline(always)]
pub(super) fn attend<E: Copy, const ONE: usize, const TWO: usize, const FOUR: usize>(
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

    let [keys, values, next_keys] =
        [cached.keys, cached.values, cached.next_keys].map(|elements| elements.as_chunks().0);
    let block = Block { cached, keys, values, next_keys, scale, widen };
    for (first, running) in Groups::new(running, head_dim.next_multiple_of(LANES)) {
        let query = |g: usize| &queries[(first + g) * head_dim..][..head_dim];
        match running.max.len() {
            1 => block.merge::<1, ONE>([query(0)], running),
            2 => block.merge::<2, TWO>([query(0), query(1)], running),
            _ => block.merge::<4, FOUR>([query(0), query(1), query(2), query(3)], running),
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
    ($($(#[$meta:meta])* $vis:vis $name:ident($element:ty), $widen_avx512:path, $widen_avx2:path, $widen:path;)*) => {$(
        $(#[$meta])*
        #[multiversion::multiversion(targets(
            "x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma+bmi2+f16c",
            "x86_64+avx2+fma+bmi2+f16c",
            "aarch64+neon",
        ))]
        $vis fn $name(queries: &[f32], block: CachedBlock<'_, $element>, scale: f32, running: Running<'_>) {
            multiversion::target::match_target! {
                "x86_64+avx512f" => attend::<_, 4, 4, 2>(queries, block, scale, running, |e: &_| $widen_avx512(e)),
                "x86_64+avx2+f16c" => attend::<_, 4, 2, 1>(queries, block, scale, running, |e: &_| $widen_avx2(e)),
                _ => attend::<_, 4, 2, 1>(queries, block, scale, running, $widen),
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
    pub attend_block_f16(u16), half::widen_lanes_avx512, half::widen_lanes_f16c, half::widen_lanes;

    /// As [`attend_block_f16`], cached as `f32`.
    ///
    /// # Panics
    /// If the lengths do not fit each other.
    pub attend_block_f32(f32), widen_f32, widen_f32, widen_f32;
}
