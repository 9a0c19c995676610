//! Blocks of int8, multiplied with int16 and added up as whole numbers.

use ternion_kernels_ref::attention::{KEY_BLOCK, WideRow};
use ternion_kernels_ref::lanes::LANES;

use super::{CachedBlock, Factors, Groups, Running, Scores, VECTORS, fetch, merge_values, merge_weights};
use crate::memory::prefetch;
use crate::ops::lanes::Lanes;
use crate::ops::norm::{absolute_larger, absolute_max, to_whole};

/// Two elements of each of sixteen positions, or of sixteen dimensions.
type Pairs = [i8; 2 * LANES];

/// Pairs of positions in a block.
const PAIRS: usize = KEY_BLOCK / 2;

/// Queries as int16 with a step each, as [`WideRow`].
#[derive(Clone, Copy, Debug)]
pub struct WideQueries<'a> {
    /// `[heads, head_dim]`
    pub values: &'a [i16],
    /// `[heads]`
    pub steps: &'a [f32],
}

/// One level's way of adding up products of pairs.
trait Level: Copy {
    /// Sixteen pairs of int16.
    type Wide: Copy;
    /// Sixteen sums.
    type Sums: Copy;

    fn zero(self) -> Self::Sums;
    fn widen(self, pairs: &Pairs) -> Self::Wide;
    /// Adds to each sum its two elements, times the two of `factors`.
    fn add(self, sums: Self::Sums, factors: [i16; 2], pairs: Self::Wide) -> Self::Sums;
    /// The sums, rounded to `f32`.
    fn floats(self, sums: Self::Sums) -> Lanes;
}

/// Plain integers.
#[derive(Clone, Copy)]
struct Portable;

impl Level for Portable {
    type Wide = Pairs;
    type Sums = [i32; LANES];

    #[inline(always)]
    fn zero(self) -> [i32; LANES] {
        [0; LANES]
    }

    #[inline(always)]
    fn widen(self, pairs: &Pairs) -> Pairs {
        *pairs
    }

    #[inline(always)]
    fn add(self, mut sums: [i32; LANES], factors: [i16; 2], pairs: Pairs) -> [i32; LANES] {
        for (sum, pair) in sums.iter_mut().zip(pairs.as_chunks::<2>().0) {
            *sum += i32::from(factors[0]) * i32::from(pair[0]) + i32::from(factors[1]) * i32::from(pair[1]);
        }
        sums
    }

    #[inline(always)]
    fn floats(self, sums: [i32; LANES]) -> Lanes {
        let mut floats = Lanes::ZERO;
        for (float, sum) in floats.0.iter_mut().zip(sums) {
            *float = sum as f32;
        }
        floats
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! Levels whose instructions no compiler finds by itself.

    use std::arch::x86_64::{
        __m256i, __m512i, _mm_loadu_si128, _mm256_add_epi32, _mm256_cvtepi8_epi16, _mm256_cvtepi32_ps,
        _mm256_loadu_si256, _mm256_madd_epi16, _mm256_set1_epi32, _mm256_setzero_si256, _mm256_storeu_ps,
        _mm512_cvtepi8_epi16, _mm512_cvtepi32_ps, _mm512_dpwssd_epi32, _mm512_set1_epi32, _mm512_setzero_si512,
        _mm512_storeu_ps,
    };

    use super::{LANES, Lanes, Level, Pairs};

    /// Two int16 as one number, the first in its lower half.
    #[inline(always)]
    fn both(factors: [i16; 2]) -> i32 {
        i32::from(factors[0]) & 0xffff | i32::from(factors[1]) << 16
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn zero_avx2() -> [__m256i; 2] {
        [_mm256_setzero_si256(); 2]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn widen_avx2(pairs: &Pairs) -> [__m256i; 2] {
        // SAFETY: each half is 16 bytes.
        let halves =
            unsafe { [_mm_loadu_si128(pairs.as_ptr().cast()), _mm_loadu_si128(pairs.as_ptr().add(LANES).cast())] };
        [_mm256_cvtepi8_epi16(halves[0]), _mm256_cvtepi8_epi16(halves[1])]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn add_avx2(sums: [__m256i; 2], factors: [i16; 2], pairs: [__m256i; 2]) -> [__m256i; 2] {
        let factors = _mm256_set1_epi32(both(factors));
        [
            _mm256_add_epi32(sums[0], _mm256_madd_epi16(factors, pairs[0])),
            _mm256_add_epi32(sums[1], _mm256_madd_epi16(factors, pairs[1])),
        ]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn floats_avx2(sums: [__m256i; 2]) -> Lanes {
        let mut floats = Lanes::ZERO;
        // SAFETY: each half is 32 bytes.
        unsafe {
            _mm256_storeu_ps(floats.0.as_mut_ptr(), _mm256_cvtepi32_ps(sums[0]));
            _mm256_storeu_ps(floats.0.as_mut_ptr().add(LANES / 2), _mm256_cvtepi32_ps(sums[1]));
        }
        floats
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn zero_avx512() -> __m512i {
        _mm512_setzero_si512()
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) fn widen_avx512(pairs: &Pairs) -> __m512i {
        // SAFETY: the pairs are 32 bytes.
        _mm512_cvtepi8_epi16(unsafe { _mm256_loadu_si256(pairs.as_ptr().cast()) })
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn add_vnni(sums: __m512i, factors: [i16; 2], pairs: __m512i) -> __m512i {
        _mm512_dpwssd_epi32(sums, _mm512_set1_epi32(both(factors)), pairs)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn floats_avx512(sums: __m512i) -> Lanes {
        let mut floats = Lanes::ZERO;
        // SAFETY: sixteen lanes are 64 bytes.
        unsafe { _mm512_storeu_ps(floats.0.as_mut_ptr(), _mm512_cvtepi32_ps(sums)) };
        floats
    }

    /// A level made of functions that only it may call.
    #[derive(Clone, Copy)]
    pub(super) struct By<Z, W, A, T> {
        pub(super) zero: Z,
        pub(super) widen: W,
        pub(super) add: A,
        pub(super) floats: T,
    }

    impl<X, S, Z, W, A, T> Level for By<Z, W, A, T>
    where
        X: Copy,
        S: Copy,
        Z: Fn() -> S + Copy,
        W: Fn(&Pairs) -> X + Copy,
        A: Fn(S, [i16; 2], X) -> S + Copy,
        T: Fn(S) -> Lanes + Copy,
    {
        type Wide = X;
        type Sums = S;

        #[inline(always)]
        fn zero(self) -> S {
            (self.zero)()
        }

        #[inline(always)]
        fn widen(self, pairs: &Pairs) -> X {
            (self.widen)(pairs)
        }

        #[inline(always)]
        fn add(self, sums: S, factors: [i16; 2], pairs: X) -> S {
            (self.add)(sums, factors, pairs)
        }

        #[inline(always)]
        fn floats(self, sums: S) -> Lanes {
            (self.floats)(sums)
        }
    }
}

/// Sums over all pairs of `V` groups of lanes, for the factors of `G` heads. `fetch` is called with the number of each pair.
#[inline(always)]
fn dots<L: Level, const G: usize, const V: usize>(
    level: L,
    factors: [&[[i16; 2]]; G],
    groups: [&[Pairs]; V],
    fetch: impl Fn(usize),
) -> [[Lanes; V]; G] {
    let pairs = factors[0].len();
    let (factors, groups) = (factors.map(|factors| &factors[..pairs]), groups.map(|group| &group[..pairs]));
    let mut sums = [[level.zero(); V]; G];
    for pair in 0..pairs {
        fetch(pair);
        let wide: [L::Wide; V] = std::array::from_fn(|v| level.widen(&groups[v][pair]));
        for (sums, factors) in sums.iter_mut().zip(factors) {
            for (sum, wide) in sums.iter_mut().zip(wide) {
                *sum = level.add(*sum, factors[pair], wide);
            }
        }
    }
    // Not by `map`, which may become a call of a function without the level's features.
    let mut floats = [[Lanes::ZERO; V]; G];
    for (floats, sums) in floats.iter_mut().zip(sums) {
        for (floats, sums) in floats.iter_mut().zip(sums) {
            *floats = level.floats(sums);
        }
    }
    floats
}

/// One block of one key-value head.
struct Block<'a, L> {
    cached: CachedBlock<'a, i8>,
    keys: &'a [Pairs],
    values: &'a [Pairs],
    key_steps: &'a [[f32; LANES]],
    value_steps: &'a [[f32; LANES]],
    next_keys: &'a [Pairs],
    level: L,
}

impl<L: Level> Block<'_, L> {
    /// Scores of `G` queries with all positions of the block, also those past its end, `V` groups of positions at a time.
    /// `scales` are the scores' scale times the step of each query.
    #[inline(always)]
    fn scores<const G: usize, const V: usize>(&self, queries: [&[[i16; 2]]; G], scales: [f32; G]) -> [Scores; G] {
        let pairs = queries[0].len();
        let mut scores = [[Lanes::ZERO; VECTORS]; G];
        let rounds = self.keys.chunks_exact(V * pairs).take(self.cached.positions.div_ceil(V * LANES));
        for (round, keys) in rounds.enumerate() {
            let keys = std::array::from_fn(|v| &keys[v * pairs..][..pairs]);
            let fetch = |pair| fetch(self.values, (round * pairs + pair) * V, V);
            let sums = dots::<L, G, V>(self.level, queries, keys, fetch);
            for ((scores, sums), scale) in scores.iter_mut().zip(sums).zip(scales) {
                let scores = &mut scores.as_chunks_mut::<V>().0[round];
                let steps = &self.key_steps.as_chunks::<V>().0[round];
                for ((score, sum), steps) in scores.iter_mut().zip(sums).zip(steps) {
                    *score = sum.zip(Lanes(*steps), |sum, step| sum * (scale * step));
                }
            }
        }
        scores
    }

    /// Merges this block into what came before, for `G` heads, `V` vectors at a time.
    #[inline(always)]
    fn merge<const G: usize, const V: usize>(&self, queries: [&[[i16; 2]]; G], scales: [f32; G], running: Running<'_>) {
        let Running { max, sum, values } = running;
        let mut scores = self.scores::<G, V>(queries, scales);
        let factors = merge_weights(&mut scores, &self.cached, max, sum);
        let (weights, steps) = self.widen_weights(scores);
        let weights = std::array::from_fn(|g| &weights[g][..self.cached.positions.div_ceil(2)]);
        let width = values.len() / G / LANES;
        let (targets, _) = values.as_chunks_mut::<LANES>();
        let mut group = 0;
        while group < width {
            if group + V <= width {
                self.weighted::<G, V>(weights, steps, factors, targets, (group, width));
                group += V;
            } else {
                self.weighted::<G, 1>(weights, steps, factors, targets, (group, width));
                group += 1;
            }
        }
    }

    /// Weights times the steps of values, rounded as [`WideRow::new`] does, and the steps of that. Heads go abreast.
    #[inline(always)]
    fn widen_weights<const G: usize>(&self, mut weights: [Scores; G]) -> ([[[i16; 2]; PAIRS]; G], [f32; G]) {
        let mut q = [0.0; G];
        for (q, weights) in q.iter_mut().zip(&mut weights) {
            let mut max = Lanes::ZERO;
            for (weights, steps) in weights.iter_mut().zip(self.value_steps) {
                *weights = weights.zip(Lanes(*steps), |weight, step| weight * step);
                max = absolute_larger(max, *weights);
            }
            *q = wide_scale(max, KEY_BLOCK);
        }
        let (mut wide, mut steps) = ([[[0; 2]; PAIRS]; G], [0.0; G]);
        for g in 0..G {
            for (wide, weights) in wide[g].as_flattened_mut().as_chunks_mut::<LANES>().0.iter_mut().zip(weights[g]) {
                round(&weights.0, q[g], KEY_BLOCK, wide);
            }
            steps[g] = 1.0 / q[g];
        }
        (wide, steps)
    }

    /// Weighted values in `D` groups of dimensions from `group` on, merged into `targets`, `[G, width]` groups.
    #[inline(always)]
    fn weighted<const G: usize, const D: usize>(
        &self,
        weights: [&[[i16; 2]]; G],
        steps: [f32; G],
        factors: [Factors; G],
        targets: &mut [[f32; LANES]],
        (group, width): (usize, usize),
    ) {
        let values = std::array::from_fn(|d| &self.values[(group + d) * PAIRS..][..PAIRS]);
        let fetch = |pair| fetch(self.next_keys, group * PAIRS + pair * D, D);
        let sums = dots::<L, G, D>(self.level, weights, values, fetch);
        for g in 0..G {
            for (d, sum) in sums[g].into_iter().enumerate() {
                let values = sum.map(|sum| sum * steps[g]);
                merge_values(&mut targets[g * width + group + d], values, factors[g]);
            }
        }
    }
}

/// `ONE`, `TWO` and `FOUR` are the vectors worked on at a time for so many heads: as many sums as registers hold.
#[inline(always)]
fn attend<L: Level, const ONE: usize, const TWO: usize, const FOUR: usize>(
    level: L,
    queries: WideQueries<'_>,
    cached: CachedBlock<'_, i8>,
    scale: f32,
    running: Running<'_>,
) {
    let heads = running.max.len();
    let head_dim = queries.values.len() / heads.max(1);
    assert_eq!(head_dim * heads, queries.values.len(), "attend: queries of equal length");
    assert_eq!(heads, queries.steps.len(), "attend: a step per query");
    assert!(head_dim.is_multiple_of(2), "attend: heads of whole pairs");
    cached.check(head_dim, &running, true);

    // Steps lie apart from what is read in a stream.
    prefetch(cached.key_steps);
    prefetch(cached.value_steps);
    let [keys, values, next_keys] =
        [cached.keys, cached.values, cached.next_keys].map(|elements| elements.as_chunks().0);
    let [key_steps, value_steps] = [cached.key_steps, cached.value_steps].map(|steps| steps.as_chunks().0);
    let block = Block { cached, keys, values, key_steps, value_steps, next_keys, level };
    for (first, running) in Groups::new(running, head_dim.next_multiple_of(LANES)) {
        let query = |g: usize| queries.values[(first + g) * head_dim..][..head_dim].as_chunks().0;
        let scale = |g: usize| scale * queries.steps[first + g];
        match running.max.len() {
            1 => block.merge::<1, ONE>([query(0)], [scale(0)], running),
            2 => block.merge::<2, TWO>([0, 1].map(query), [0, 1].map(scale), running),
            _ => block.merge::<4, FOUR>([0, 1, 2, 3].map(query), [0, 1, 2, 3].map(scale), running),
        }
    }
}

/// By plain integers, which a test can call where others are chosen.
#[inline(always)]
pub(super) fn attend_portable(queries: WideQueries<'_>, block: CachedBlock<'_, i8>, scale: f32, running: Running<'_>) {
    attend::<_, 4, 2, 1>(Portable, queries, block, scale, running);
}

/// By 256 bits, which a test can call where 512 are chosen.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,bmi2")]
pub(super) fn attend_avx2(queries: WideQueries<'_>, block: CachedBlock<'_, i8>, scale: f32, running: Running<'_>) {
    let level = x86::By {
        zero: || x86::zero_avx2(),
        widen: |pairs: &Pairs| x86::widen_avx2(pairs),
        add: |sums, factors, pairs| x86::add_avx2(sums, factors, pairs),
        floats: |sums| x86::floats_avx2(sums),
    };
    attend::<_, 4, 2, 1>(level, queries, block, scale, running);
}

/// As [`attend_block_f16`](super::attend_block_f16), cached as int8 with steps.
///
/// # Panics
/// If the lengths do not fit each other.
#[multiversion::multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx512vnni+avx2+fma+bmi2",
    "x86_64+avx2+fma+bmi2",
    "aarch64+neon",
))]
pub fn attend_block_int8(queries: WideQueries<'_>, block: CachedBlock<'_, i8>, scale: f32, running: Running<'_>) {
    multiversion::target::match_target! {
        "x86_64+avx512f+avx512vnni" => {
            let level = x86::By {
                zero: || x86::zero_avx512(),
                widen: |pairs: &Pairs| x86::widen_avx512(pairs),
                add: |sums, factors, pairs| x86::add_vnni(sums, factors, pairs),
                floats: |sums| x86::floats_avx512(sums),
            };
            attend::<_, 4, 4, 4>(level, queries, block, scale, running);
        }
        "x86_64+avx2" => attend_avx2(queries, block, scale, running),
        _ => attend_portable(queries, block, scale, running),
    }
}

/// What numbers are multiplied with before they are rounded, for the largest of each lane's magnitudes and a row's length.
#[inline(always)]
fn wide_scale(max: Lanes, len: usize) -> f32 {
    WideRow::levels(len) / max.largest().max(WideRow::MIN)
}

/// Rounds some numbers of a row of length `len`.
#[inline(always)]
fn round(x: &[f32], q: f32, len: usize, target: &mut [i16]) {
    let levels = WideRow::levels(len);
    for (target, x) in target.iter_mut().zip(x) {
        *target = to_whole(*x * q, levels) as i16;
    }
}

#[inline(always)]
fn widen_query_body(query: &[f32], target: &mut [i16]) -> f32 {
    assert_eq!(query.len(), target.len(), "widen_query: as many results as elements");
    let q = wide_scale(absolute_max(query), query.len());
    round(query, q, query.len(), target);
    1.0 / q
}

for_every_level! {
    /// Rounds one head's query to int16 as [`WideRow::new`] does; returns its step.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn widen_query(query: &[f32], target: &mut [i16]) -> f32 = widen_query_body;
}
