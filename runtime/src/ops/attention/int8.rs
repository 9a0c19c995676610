//! Blocks of int8, multiplied with whole numbers and added up as such.

use std::marker::PhantomData;

use ternion_kernels_ref::attention::{KEY_BLOCK, MIN_STEP, WEIGHT_LEVELS};
use ternion_kernels_ref::lanes::LANES;

use super::{CachedBlock, Factors, Group, Groups, Running, Scores, VECTORS, fetch, mask, merge_lanes, merge_weights};
use crate::memory::prefetch;
use crate::ops::lanes::Lanes;
use crate::ops::norm::{absolute_larger, quantize, to_whole};

/// Groups in a row: what 512 bits work on at a time.
pub const ROW: usize = 4;

/// Elements of a key that lie side by side.
pub const KEYS_ALONG: usize = 4;

/// Elements of the values of a dimension that lie side by side.
pub const VALUES_ALONG: usize = 2;

/// Four elements of the keys of each of sixteen positions.
type Quads = [i8; KEYS_ALONG * LANES];

/// The values of two positions in each of sixteen dimensions.
type Pairs = [i8; VALUES_ALONG * LANES];

/// Pairs of positions in a block.
const PAIRS: usize = KEY_BLOCK / VALUES_ALONG;

/// Queries as int8 with a step each, as keys are.
#[derive(Clone, Copy, Debug)]
pub struct QuantizedQueries<'a> {
    /// `[heads, head_dim]`, each with zeros up to whole quads ([`KEYS_ALONG`]).
    pub values: &'a [i8],
    /// `[heads]`
    pub steps: &'a [f32],
    /// Sums of each query's values, `[heads]`.
    pub sums: &'a [i32],
}

/// One way of multiplying elements of sixteen sums with factors, the same for all, and adding up.
trait Products: Copy {
    /// Some elements of each of the sixteen.
    type Elements: Copy;
    /// As many factors.
    type Factors;
    type Loaded: Copy;
    type Sums: Copy;

    /// Sums of nothing, where all factors that will come add up to `factors`.
    fn start(self, factors: i32) -> Self::Sums;
    fn load(self, elements: &Self::Elements) -> Self::Loaded;
    fn add(self, sums: Self::Sums, factors: &Self::Factors, elements: Self::Loaded) -> Self::Sums;
    /// The sums, rounded to `f32`.
    fn floats(self, sums: Self::Sums) -> Lanes;
}

/// Products of plain integers: `N` elements, of which `P` belong to one sum.
#[derive(Clone, Copy)]
struct Portable<F, const P: usize, const N: usize>(PhantomData<F>);

impl<F: Copy + Into<i32>, const P: usize, const N: usize> Products for Portable<F, P, N> {
    type Elements = [i8; N];
    type Factors = [F; P];
    type Loaded = [i8; N];
    type Sums = [i32; LANES];

    #[inline(always)]
    fn start(self, _: i32) -> [i32; LANES] {
        [0; LANES]
    }

    #[inline(always)]
    fn load(self, elements: &[i8; N]) -> [i8; N] {
        *elements
    }

    #[inline(always)]
    fn add(self, mut sums: [i32; LANES], factors: &[F; P], elements: [i8; N]) -> [i32; LANES] {
        for (sum, elements) in sums.iter_mut().zip(elements.as_chunks::<P>().0) {
            for (factor, element) in factors.iter().zip(elements) {
                *sum += (*factor).into() * i32::from(*element);
            }
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
    //! Products by instructions that no compiler finds by itself.

    use std::arch::x86_64::{
        __m256i, __m512i, _mm_loadu_si128, _mm256_abs_epi8, _mm256_add_epi32, _mm256_cvtepi8_epi16, _mm256_cvtepi32_ps,
        _mm256_loadu_si256, _mm256_madd_epi16, _mm256_maddubs_epi16, _mm256_set1_epi16, _mm256_set1_epi32,
        _mm256_setzero_si256, _mm256_sign_epi8, _mm256_storeu_ps, _mm512_cvtepi8_epi16, _mm512_cvtepi32_ps,
        _mm512_dpbusd_epi32, _mm512_dpwssd_epi32, _mm512_loadu_si512, _mm512_set1_epi8, _mm512_set1_epi32,
        _mm512_storeu_ps, _mm512_xor_si512,
    };
    use std::marker::PhantomData;

    use super::{LANES, Lanes, Pairs, Products, Quads};

    /// Two int16 as one number, the first in its lower half.
    #[inline(always)]
    fn both(factors: [i16; 2]) -> i32 {
        i32::from(factors[0]) & 0xffff | i32::from(factors[1]) << 16
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn start_avx2(_: i32) -> [__m256i; 2] {
        [_mm256_setzero_si256(); 2]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn load_pairs_avx2(pairs: &Pairs) -> [__m256i; 2] {
        // SAFETY: each half is 16 bytes.
        let halves =
            unsafe { [_mm_loadu_si128(pairs.as_ptr().cast()), _mm_loadu_si128(pairs.as_ptr().add(LANES).cast())] };
        [_mm256_cvtepi8_epi16(halves[0]), _mm256_cvtepi8_epi16(halves[1])]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn add_pairs_avx2(sums: [__m256i; 2], factors: &[i16; 2], pairs: [__m256i; 2]) -> [__m256i; 2] {
        let factors = _mm256_set1_epi32(both(*factors));
        [
            _mm256_add_epi32(sums[0], _mm256_madd_epi16(factors, pairs[0])),
            _mm256_add_epi32(sums[1], _mm256_madd_epi16(factors, pairs[1])),
        ]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn load_quads_avx2(quads: &Quads) -> [__m256i; 2] {
        // SAFETY: each half is 32 bytes.
        unsafe { [_mm256_loadu_si256(quads.as_ptr().cast()), _mm256_loadu_si256(quads.as_ptr().add(2 * LANES).cast())] }
    }

    /// `k · f` is `|k| · (f with k's sign)`. Neither is −128, so that sums of two products fit 16 bits.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn add_quads_avx2(sums: [__m256i; 2], factors: &[i8; 4], quads: [__m256i; 2]) -> [__m256i; 2] {
        let factors = _mm256_set1_epi32(i32::from_le_bytes(factors.map(|factor| factor as u8)));
        let ones = _mm256_set1_epi16(1);
        let mut results = sums;
        for (result, quads) in results.iter_mut().zip(quads) {
            let twos = _mm256_maddubs_epi16(_mm256_abs_epi8(quads), _mm256_sign_epi8(factors, quads));
            *result = _mm256_add_epi32(*result, _mm256_madd_epi16(twos, ones));
        }
        results
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
    pub(super) fn start_pairs_vnni(_: i32) -> __m512i {
        _mm512_set1_epi32(0)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) fn load_pairs_vnni(pairs: &Pairs) -> __m512i {
        // SAFETY: the pairs are 32 bytes.
        _mm512_cvtepi8_epi16(unsafe { _mm256_loadu_si256(pairs.as_ptr().cast()) })
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn add_pairs_vnni(sums: __m512i, factors: &[i16; 2], pairs: __m512i) -> __m512i {
        _mm512_dpwssd_epi32(sums, _mm512_set1_epi32(both(*factors)), pairs)
    }

    /// The instruction takes unsigned elements: 128 is added to each, so 128 times the factors is taken off.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn start_quads_vnni(factors: i32) -> __m512i {
        _mm512_set1_epi32(-128 * factors)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) fn load_quads_vnni(quads: &Quads) -> __m512i {
        // SAFETY: the quads are 64 bytes.
        _mm512_xor_si512(unsafe { _mm512_loadu_si512(quads.as_ptr().cast()) }, _mm512_set1_epi8(-128))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn add_quads_vnni(sums: __m512i, factors: &[i8; 4], quads: __m512i) -> __m512i {
        let factors = i32::from_le_bytes(factors.map(|factor| factor as u8));
        _mm512_dpbusd_epi32(sums, quads, _mm512_set1_epi32(factors))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn floats_avx512(sums: __m512i) -> Lanes {
        let mut floats = Lanes::ZERO;
        // SAFETY: sixteen lanes are 64 bytes.
        unsafe { _mm512_storeu_ps(floats.0.as_mut_ptr(), _mm512_cvtepi32_ps(sums)) };
        floats
    }

    /// Products made of functions that only one level may call.
    #[derive(Clone, Copy)]
    pub(super) struct By<E, F, Z, W, A, T> {
        pub(super) start: Z,
        pub(super) load: W,
        pub(super) add: A,
        pub(super) floats: T,
        pub(super) of: PhantomData<(E, F)>,
    }

    impl<E: Copy, F: Copy, X, S, Z, W, A, T> Products for By<E, F, Z, W, A, T>
    where
        X: Copy,
        S: Copy,
        Z: Fn(i32) -> S + Copy,
        W: Fn(&E) -> X + Copy,
        A: Fn(S, &F, X) -> S + Copy,
        T: Fn(S) -> Lanes + Copy,
    {
        type Elements = E;
        type Factors = F;
        type Loaded = X;
        type Sums = S;

        #[inline(always)]
        fn start(self, factors: i32) -> S {
            (self.start)(factors)
        }

        #[inline(always)]
        fn load(self, elements: &E) -> X {
            (self.load)(elements)
        }

        #[inline(always)]
        fn add(self, sums: S, factors: &F, elements: X) -> S {
            (self.add)(sums, factors, elements)
        }

        #[inline(always)]
        fn floats(self, sums: S) -> Lanes {
            (self.floats)(sums)
        }
    }
}

/// Sums of `V` groups of lanes for the factors of `G` heads, which add up to `totals`. `fetch` is called with the number of
/// each step.
#[inline(always)]
fn dots<P: Products, const G: usize, const V: usize, const C: usize>(
    products: P,
    (factors, totals): ([&[P::Factors]; G], [i32; G]),
    groups: [Group<'_, P::Elements, C>; V],
    fetch: impl Fn(usize),
) -> [[Lanes; V]; G] {
    let steps = factors[0].len();
    let factors = factors.map(|factors| &factors[..steps]);
    let groups = groups.map(|group| Group { rows: &group.rows[..steps], ..group });
    let mut sums = [[products.start(0); V]; G];
    for (sums, total) in sums.iter_mut().zip(totals) {
        *sums = [products.start(total); V];
    }
    for step in 0..steps {
        fetch(step);
        let elements: [P::Loaded; V] = std::array::from_fn(|v| products.load(groups[v].at(step)));
        for (sums, factors) in sums.iter_mut().zip(factors) {
            for (sum, elements) in sums.iter_mut().zip(elements) {
                *sum = products.add(*sum, &factors[step], elements);
            }
        }
    }
    // Not by `map`, which may become a call of a function without the level's features.
    let mut floats = [[Lanes::ZERO; V]; G];
    for (floats, sums) in floats.iter_mut().zip(sums) {
        for (floats, sums) in floats.iter_mut().zip(sums) {
            *floats = products.floats(sums);
        }
    }
    floats
}

/// The query of one head.
#[derive(Clone, Copy)]
struct Query<'a> {
    quads: &'a [[i8; KEYS_ALONG]],
    /// The scores' scale times its step.
    scale: f32,
    sum: i32,
}

/// One block of one key-value head.
struct Block<'a> {
    cached: CachedBlock<'a, i8>,
    keys: &'a [Quads],
    values: &'a [Pairs],
    key_steps: &'a [[f32; LANES]],
    value_steps: &'a [[f32; LANES]],
}

impl<'a> Block<'a> {
    #[inline(always)]
    fn new(cached: CachedBlock<'a, i8>) -> Self {
        let (keys, values) = (cached.keys.as_chunks().0, cached.values.as_chunks().0);
        let (key_steps, value_steps) = (cached.key_steps.as_chunks().0, cached.value_steps.as_chunks().0);
        Self { cached, keys, values, key_steps, value_steps }
    }

    /// Scores of `G` queries with all positions of the block, also those past its end, `V` groups of positions at a time. On
    /// the way, `later` is fetched: half as many bytes as a block has of keys.
    #[inline(always)]
    fn scores<P, const G: usize, const V: usize>(
        &self,
        products: P,
        queries: [Query<'_>; G],
        later: &[i8],
    ) -> [Scores; G]
    where
        P: Products<Elements = Quads, Factors = [i8; KEYS_ALONG]>,
    {
        let quads = queries[0].quads.len();
        let factors = (queries.map(|query| query.quads), queries.map(|query| query.sum));
        let mut scores = [[Lanes::ZERO; VECTORS]; G];
        for round in 0..self.cached.positions.div_ceil(V * LANES) {
            let keys: [Group<'_, _, ROW>; V] = Group::several(self.keys, quads, round * V);
            let bytes = V * size_of::<Quads>() / 2;
            let fetch = |quad| fetch(later, (round * quads + quad) * bytes, bytes);
            let sums = dots(products, factors, keys, fetch);
            for ((scores, sums), query) in scores.iter_mut().zip(sums).zip(queries) {
                let scores = &mut scores.as_chunks_mut::<V>().0[round];
                let steps = &self.key_steps.as_chunks::<V>().0[round];
                for ((score, sum), steps) in scores.iter_mut().zip(sums).zip(steps) {
                    *score = sum.zip(Lanes(*steps), |sum, step| sum * (query.scale * step));
                }
            }
        }
        scores
    }

    /// Steps of the values, 0 past the block's end.
    #[inline(always)]
    fn known_value_steps(&self) -> [[f32; LANES]; VECTORS] {
        let mut steps = [[0.0; LANES]; VECTORS];
        steps.copy_from_slice(self.value_steps);
        if self.cached.positions < KEY_BLOCK {
            steps.as_flattened_mut()[self.cached.positions..].fill(0.0);
        }
        steps
    }

    /// Weighted values in `D` groups of dimensions from `group` on, merged into `targets`, `[G, width]` groups.
    #[inline(always)]
    fn weighted<P, const G: usize, const D: usize, const C: usize>(
        &self,
        products: P,
        weights: [&[[i16; VALUES_ALONG]]; G],
        step: f32,
        factors: [Factors; G],
        targets: &mut [[f32; LANES]],
        (group, width): (usize, usize),
    ) where
        P: Products<Elements = Pairs, Factors = [i16; VALUES_ALONG]>,
    {
        let values: [Group<'_, _, C>; D] = Group::several(self.values, PAIRS, group);
        let (first, bytes) = (group * PAIRS * size_of::<Pairs>(), D * size_of::<Pairs>());
        let fetch = |pair| fetch(self.cached.next_keys, first + pair * bytes, bytes);
        let sums = dots(products, (weights, [0; G]), values, fetch);
        for g in 0..G {
            for (d, sum) in sums[g].into_iter().enumerate() {
                let values = sum.map(|sum| sum * step);
                merge_lanes(&mut targets[g * width + group + d], values, factors[g]);
            }
        }
    }
}

/// Weights times the steps of values, rounded in levels of 16 bits over the largest step; and the step of what they are then.
/// No weight is above 1, so none is above the levels. NaN becomes 0.
#[inline(always)]
fn round_weights<const G: usize>(
    weights: &[Scores; G],
    steps: &[[f32; LANES]; VECTORS],
) -> ([[[i16; VALUES_ALONG]; PAIRS]; G], f32) {
    let mut largest = Lanes::ZERO;
    for steps in steps {
        largest = absolute_larger(largest, Lanes(*steps));
    }
    let q = WEIGHT_LEVELS / largest.largest().max(MIN_STEP);
    let mut rounded = [[[0; VALUES_ALONG]; PAIRS]; G];
    for (rounded, weights) in rounded.iter_mut().zip(weights) {
        let rounded = rounded.as_flattened_mut().as_chunks_mut::<LANES>().0;
        for ((rounded, weights), steps) in rounded.iter_mut().zip(weights).zip(steps) {
            let scaled = weights.zip(Lanes(*steps), |weight, step| weight * (step * q)).whole();
            for (rounded, scaled) in rounded.iter_mut().zip(scaled.0) {
                *rounded = to_whole(scaled, WEIGHT_LEVELS) as i16;
            }
        }
    }
    (rounded, 1.0 / q)
}

/// Merges a block into what came before, for `G` heads, `V` vectors at a time.
#[inline(always)]
fn merge<Q, P, const G: usize, const V: usize>(
    (quads, pairs): (Q, P),
    block: &Block<'_>,
    queries: [Query<'_>; G],
    running: Running<'_>,
) where
    Q: Products<Elements = Quads, Factors = [i8; KEYS_ALONG]>,
    P: Products<Elements = Pairs, Factors = [i16; VALUES_ALONG]>,
{
    let Running { max, sum, values } = running;
    let CachedBlock { first, positions, values: cached, .. } = block.cached;
    // Half of the values are fetched while keys are scored, which takes less time than reading, and half while scores become
    // weights.
    let (early, late) = cached.split_at(cached.len() / 2);
    let mut scores = block.scores::<Q, G, V>(quads, queries, early);
    if !block.cached.whole() {
        mask(&mut scores, first..positions);
    }
    let bytes = late.len() / (G * VECTORS);
    let factors = merge_weights(&mut scores, max, sum, |vector| fetch(late, vector * bytes, bytes));
    let (weights, step) = round_weights(&scores, &block.known_value_steps());
    let weights = std::array::from_fn(|g| &weights[g][..positions.div_ceil(VALUES_ALONG)]);
    let width = values.len() / G / LANES;
    let (targets, _) = values.as_chunks_mut::<LANES>();
    let (rows, mut group) = (width / ROW * ROW, 0);
    while group < width {
        if group + V <= rows {
            block.weighted::<P, G, V, ROW>(pairs, weights, step, factors, targets, (group, width));
            group += V;
        } else if group < rows {
            block.weighted::<P, G, 1, ROW>(pairs, weights, step, factors, targets, (group, width));
            group += 1;
        } else {
            block.weighted::<P, G, 1, 1>(pairs, weights, step, factors, targets, (group, width));
            group += 1;
        }
    }
}

/// `ONE`, `TWO` and `FOUR` are the vectors worked on at a time for so many heads: as many sums as registers hold.
#[inline(always)]
fn attend<Q, P, const ONE: usize, const TWO: usize, const FOUR: usize>(
    products: (Q, P),
    queries: QuantizedQueries<'_>,
    cached: CachedBlock<'_, i8>,
    scale: f32,
    running: Running<'_>,
) where
    Q: Products<Elements = Quads, Factors = [i8; KEYS_ALONG]>,
    P: Products<Elements = Pairs, Factors = [i16; VALUES_ALONG]>,
{
    let heads = running.max.len();
    let len = queries.values.len() / heads.max(1);
    assert_eq!(len * heads, queries.values.len(), "attend: queries of equal length");
    assert_eq!([heads; 2], [queries.steps.len(), queries.sums.len()], "attend: a step and a sum per query");
    assert!(len.is_multiple_of(KEYS_ALONG), "attend: queries of whole quads");

    cached.check(len, &running, true);

    // Steps are not fetched with the block before.
    prefetch(cached.key_steps);
    prefetch(cached.value_steps);
    let block = Block::new(cached);
    for (first, running) in Groups::new(running, len.next_multiple_of(LANES)) {
        let query = |g: usize| Query {
            quads: queries.values[(first + g) * len..][..len].as_chunks().0,
            scale: scale * queries.steps[first + g],
            sum: queries.sums[first + g],
        };
        match running.max.len() {
            1 => merge::<_, _, _, ONE>(products, &block, [query(0)], running),
            2 => merge::<_, _, _, TWO>(products, &block, [query(0), query(1)], running),
            _ => merge::<_, _, _, FOUR>(products, &block, [query(0), query(1), query(2), query(3)], running),
        }
    }
}

/// By plain integers, which a test can call where others are chosen.
#[inline(always)]
pub(super) fn attend_portable(
    queries: QuantizedQueries<'_>,
    block: CachedBlock<'_, i8>,
    scale: f32,
    running: Running<'_>,
) {
    let products = (Portable::<i8, _, _>(PhantomData), Portable::<i16, _, _>(PhantomData));
    attend::<_, _, 4, 2, 1>(products, queries, block, scale, running);
}

/// Products made of a level's functions, called by closures, which have the features of the function that they are in.
#[cfg(target_arch = "x86_64")]
macro_rules! by {
    ($start:ident, $load:ident, $add:ident, $floats:ident) => {
        x86::By {
            start: |factors| x86::$start(factors),
            load: |elements: &_| x86::$load(elements),
            add: |sums, factors: &_, elements| x86::$add(sums, factors, elements),
            floats: |sums| x86::$floats(sums),
            of: PhantomData,
        }
    };
}

/// By 256 bits, which a test can call where 512 are chosen.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,bmi2")]
pub(super) fn attend_avx2(queries: QuantizedQueries<'_>, block: CachedBlock<'_, i8>, scale: f32, running: Running<'_>) {
    let quads = by!(start_avx2, load_quads_avx2, add_quads_avx2, floats_avx2);
    let pairs = by!(start_avx2, load_pairs_avx2, add_pairs_avx2, floats_avx2);
    attend::<_, _, 4, 2, 1>((quads, pairs), queries, block, scale, running);
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
pub fn attend_block_int8(queries: QuantizedQueries<'_>, block: CachedBlock<'_, i8>, scale: f32, running: Running<'_>) {
    multiversion::target::match_target! {
        "x86_64+avx512f+avx512vnni" => {
            let quads = by!(start_quads_vnni, load_quads_vnni, add_quads_vnni, floats_avx512);
            let pairs = by!(start_pairs_vnni, load_pairs_vnni, add_pairs_vnni, floats_avx512);
            attend::<_, _, 4, 4, 4>((quads, pairs), queries, block, scale, running);
        }
        "x86_64+avx2" => attend_avx2(queries, block, scale, running),
        _ => attend_portable(queries, block, scale, running),
    }
}

/// Rounds one head's query to int8 as keys are, with zeros up to the end of `target`; returns its step and the sum of its
/// values.
///
/// # Panics
/// If `target` is not as long as the query in whole quads ([`KEYS_ALONG`]).
pub fn quantize_query(query: &[f32], target: &mut [i8]) -> (f32, i32) {
    assert_eq!(target.len(), query.len().next_multiple_of(KEYS_ALONG), "quantize_query: whole quads");
    let (target, rest) = target.split_at_mut(query.len());
    rest.fill(0);
    let step = 1.0 / quantize(query, target);
    (step, target.iter().map(|value| i32::from(*value)).sum())
}
