//! Rows as int8 with a scale each, states as 12 bits with a scale each: what estimates of logits are made of.
//!
//! Rows come in tiles of [`SCREEN_ROWS`], [`SCREEN_STEP`] elements of each in turn, so that a tile is one sequential
//! stream. Sums are integers and exact, so every level may add them up as it likes.

use ternion_kernels_ref::lanes::LANES;

/// Rows of a tile.
pub const SCREEN_ROWS: usize = 8;

/// Elements of a row that follow each other in a tile.
pub const SCREEN_STEP: usize = 32;

/// Some elements of each row of a tile: the bits of signed bytes.
pub type ScreenTile = [[u8; SCREEN_STEP]; SCREEN_ROWS];

/// As many elements of a state.
pub type ScreenState = [i16; SCREEN_STEP];

/// One level's way of adding up products of a state and a row.
trait Level: Copy {
    /// Sums that are not added up yet.
    type Sums: Copy;
    /// Whether its registers hold the sums of two states.
    const PAIRS: bool;

    fn zero(self) -> Self::Sums;
    fn add(self, sums: Self::Sums, state: &ScreenState, row: &[u8; SCREEN_STEP]) -> Self::Sums;
    fn total(self, sums: Self::Sums) -> i32;
}

/// Plain integers.
#[derive(Clone, Copy)]
struct Portable;

impl Level for Portable {
    type Sums = i32;
    const PAIRS: bool = false;

    #[inline(always)]
    fn zero(self) -> i32 {
        0
    }

    #[inline(always)]
    fn add(self, sum: i32, state: &ScreenState, row: &[u8; SCREEN_STEP]) -> i32 {
        let products = state.iter().zip(row).map(|(x, w)| i32::from(*x) * i32::from(w.cast_signed()));
        // A damaged file may have a −128, which bounds do not reckon with.
        products.fold(sum, i32::wrapping_add)
    }

    #[inline(always)]
    fn total(self, sum: i32) -> i32 {
        sum
    }
}

/// One pass over some tiles for `N` states of `steps` steps each.
#[inline(always)]
fn dot_some<L: Level, const N: usize>(
    level: L,
    states: [&[ScreenState]; N],
    tiles: &[ScreenTile],
    mut targets: [&mut [[i32; SCREEN_ROWS]]; N],
) {
    let steps = states[0].len();
    for (at, tile) in tiles.chunks_exact(steps.max(1)).enumerate() {
        let mut sums = [[level.zero(); SCREEN_ROWS]; N];
        for (step, rows) in tile.iter().enumerate() {
            for (sums, state) in sums.iter_mut().zip(states) {
                for (sum, row) in sums.iter_mut().zip(rows) {
                    *sum = level.add(*sum, &state[step], row);
                }
            }
        }
        for (target, sums) in targets.iter_mut().zip(sums) {
            target[at] = sums.map(|sums| level.total(sums));
        }
    }
}

#[inline(always)]
fn dot_screen_body<L: Level>(
    level: L,
    states: &[ScreenState],
    steps: usize,
    tiles: &[ScreenTile],
    targets: &mut [[i32; SCREEN_ROWS]],
) {
    let (count, of_tiles) = (states.len() / steps.max(1), tiles.len() / steps.max(1));
    assert_eq!(states.len(), count * steps, "dot_screen: whole states");
    assert_eq!(tiles.len(), of_tiles * steps, "dot_screen: whole tiles");
    assert_eq!(targets.len(), count * of_tiles, "dot_screen: a group of results for every state and tile");
    let at_once = if L::PAIRS { 2 } else { 1 };
    let states = states.chunks((at_once * steps).max(1));
    for (states, targets) in states.zip(targets.chunks_mut((at_once * of_tiles).max(1))) {
        if states.len() == 2 * steps {
            let ((a, b), (to_a, to_b)) = (states.split_at(steps), targets.split_at_mut(of_tiles));
            dot_some(level, [a, b], tiles, [to_a, to_b]);
        } else {
            dot_some(level, [states], tiles, [targets]);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! Levels whose instructions no compiler finds by itself.

    use std::arch::x86_64::{
        __m256i, __m512i, _MM_HINT_T0, _mm_add_epi32, _mm_cvtsi128_si32, _mm_loadu_si128, _mm_prefetch,
        _mm_shuffle_epi32, _mm256_add_epi32, _mm256_castsi256_si128, _mm256_cvtepi8_epi16, _mm256_extracti128_si256,
        _mm256_loadu_si256, _mm256_madd_epi16, _mm256_setzero_si256, _mm512_cvtepi8_epi16, _mm512_dpwssd_epi32,
        _mm512_loadu_si512, _mm512_reduce_add_epi32, _mm512_setzero_si512,
    };

    use super::{SCREEN_STEP, ScreenState};

    /// How far ahead of the row in use memory is asked for more: without that Intel's cores read half as fast.
    const AHEAD: usize = 4096;

    #[inline]
    #[target_feature(enable = "sse")]
    fn ask_ahead(row: &[u8; SCREEN_STEP]) {
        _mm_prefetch::<_MM_HINT_T0>(row.as_ptr().wrapping_add(AHEAD).cast());
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) fn add_vnni(sums: __m512i, state: &ScreenState, row: &[u8; SCREEN_STEP]) -> __m512i {
        ask_ahead(row);
        // SAFETY: the state is 64 bytes, the row 32.
        let (state, row) =
            unsafe { (_mm512_loadu_si512(state.as_ptr().cast()), _mm256_loadu_si256(row.as_ptr().cast())) };
        _mm512_dpwssd_epi32(sums, state, _mm512_cvtepi8_epi16(row))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn zero_avx512() -> __m512i {
        _mm512_setzero_si512()
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn total_avx512(sums: __m512i) -> i32 {
        _mm512_reduce_add_epi32(sums)
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn add_avx2(mut sums: __m256i, state: &ScreenState, row: &[u8; SCREEN_STEP]) -> __m256i {
        ask_ahead(row);
        for half in 0..2 {
            // SAFETY: each half of the state is 32 bytes, of the row 16.
            let (state, row) = unsafe {
                let state = _mm256_loadu_si256(state.as_ptr().add(16 * half).cast());
                (state, _mm_loadu_si128(row.as_ptr().add(16 * half).cast()))
            };
            sums = _mm256_add_epi32(sums, _mm256_madd_epi16(state, _mm256_cvtepi8_epi16(row)));
        }
        sums
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn zero_avx2() -> __m256i {
        _mm256_setzero_si256()
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn total_avx2(sums: __m256i) -> i32 {
        let four = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256::<1>(sums));
        let two = _mm_add_epi32(four, _mm_shuffle_epi32::<0b00_00_11_10>(four));
        _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32::<0b00_00_00_01>(two)))
    }
}

/// A level made of functions that only it may call.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
struct By<Z, A, T, const PAIRS: bool>(Z, A, T);

#[cfg(target_arch = "x86_64")]
impl<S, Z, A, T, const PAIRS: bool> Level for By<Z, A, T, PAIRS>
where
    S: Copy,
    Z: Fn() -> S + Copy,
    A: Fn(S, &ScreenState, &[u8; SCREEN_STEP]) -> S + Copy,
    T: Fn(S) -> i32 + Copy,
{
    type Sums = S;
    const PAIRS: bool = PAIRS;

    #[inline(always)]
    fn zero(self) -> S {
        (self.0)()
    }

    #[inline(always)]
    fn add(self, sums: S, state: &ScreenState, row: &[u8; SCREEN_STEP]) -> S {
        (self.1)(sums, state, row)
    }

    #[inline(always)]
    fn total(self, sums: S) -> i32 {
        (self.2)(sums)
    }
}

/// [`dot_screen`] by 256 bits, which a test can call where 512 are chosen.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn dot_screen_avx2(states: &[ScreenState], steps: usize, tiles: &[ScreenTile], targets: &mut [[i32; SCREEN_ROWS]]) {
    let add = |sums, state: &ScreenState, row: &[u8; SCREEN_STEP]| x86::add_avx2(sums, state, row);
    let level = By::<_, _, _, false>(|| x86::zero_avx2(), add, |sums| x86::total_avx2(sums));
    dot_screen_body(level, states, steps, tiles, targets);
}

/// `targets[n][t][r] = Σ x[i] · w[i]`, `x` the state `n` and `w` the row `r` of tile `t`: `states` is `[n, steps]`, `tiles`
/// `[t, steps]`, both zero past the end of a row. Sums must fit 32 bits, as those of [`screen_state`] do.
///
/// # Panics
/// If the lengths do not fit.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512bw+avx512vnni+avx2", "x86_64+avx2", "aarch64+neon",))]
pub fn dot_screen(states: &[ScreenState], steps: usize, tiles: &[ScreenTile], targets: &mut [[i32; SCREEN_ROWS]]) {
    multiversion::target::match_target! {
        "x86_64+avx512f+avx512bw+avx512vnni" => {
            let level = By::<_, _, _, true>(
                || x86::zero_avx512(), |s, x: &_, w: &_| x86::add_vnni(s, x, w), |s| x86::total_avx512(s),
            );
            dot_screen_body(level, states, steps, tiles, targets);
        }
        "x86_64+avx2" => dot_screen_avx2(states, steps, tiles, targets),
        _ => dot_screen_body(Portable, states, steps, tiles, targets),
    }
}

/// A state `x = t·p + d` in its integer form, but for `p` itself. Norms are sums in `f64` without any promise of order.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StateForm {
    /// `t`
    pub scale: f32,
    /// `‖x‖²`
    pub whole: f64,
    /// `‖d‖²`
    pub error: f64,
}

/// Brings a state into its integer form: writes its `p`, −2047 to 2047, or fewer if sums of products with bytes, −127 to
/// 127, would not fit 32 bits, and zeros behind. `None` for a state with an element that is no number, or whose scale is
/// none.
///
/// # Panics
/// If `target` is not as many steps as the state needs.
pub fn screen_state(state: &[f32], target: &mut [ScreenState]) -> Option<StateForm> {
    assert_eq!(target.len(), state.len().div_ceil(SCREEN_STEP), "screen_state: as many steps as the state needs");
    let levels = (i32::MAX as usize / (127 * state.len().max(1))).clamp(1, 2047) as f32;
    let target = target.as_flattened_mut();
    target.fill(0);
    let largest = state.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    let scale = largest / levels;
    let inverse = 1.0 / scale;
    if !inverse.is_finite() || !state.iter().all(|x| x.is_finite()) {
        return None;
    }
    let (mut whole, mut error) = (0.0, 0.0);
    for (x, target) in state.iter().zip(target) {
        let p = (x * inverse).round_ties_even().clamp(-levels, levels);
        *target = p as i16;
        let d = f64::from(*x) - f64::from(p) * f64::from(scale);
        whole += f64::from(*x) * f64::from(*x);
        error += d * d;
    }
    Some(StateForm { scale, whole, error })
}

/// A row `w = s·q + e` in its int8 form, but for `q` itself. Norms are sums in `f64`, sixteen lanes first and then these in
/// order: the same bits on every machine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScreenForm {
    /// `s`, a 127th of the largest magnitude.
    pub scale: f32,
    /// `‖w‖²`
    pub whole: f64,
    /// `‖e‖²`
    pub error: f64,
    /// `‖s·q‖²`
    pub form: f64,
}

/// Sixteen elements: their integers, and their part of the three sums.
#[inline(always)]
fn form_lanes(row: &[f32; LANES], scale: f32, inverse: f32, target: &mut [u8; LANES], sums: &mut [[f64; LANES]; 3]) {
    for (i, (w, target)) in row.iter().zip(target).enumerate() {
        let q = (w * inverse).round_ties_even().clamp(-127.0, 127.0);
        *target = (q as i8).cast_unsigned();
        let (w, form) = (f64::from(*w), f64::from(q) * f64::from(scale));
        let error = w - form;
        for (sum, x) in sums.iter_mut().zip([w, error, form]) {
            sum[i] += x * x;
        }
    }
}

#[inline(always)]
fn screen_form_body(row: &[f32], target: &mut [u8]) -> ScreenForm {
    assert_eq!(row.len(), target.len(), "screen_form: as many bytes as elements");
    let (chunks, tail) = row.as_chunks::<LANES>();
    let mut largest = [0f32; LANES];
    for row in chunks {
        largest.iter_mut().zip(row).for_each(|(largest, w)| *largest = largest.max(w.abs()));
    }
    let largest = largest.iter().chain(tail).fold(0f32, |largest, w| largest.max(w.abs()));
    let scale = largest / 127.0;
    // Where the inverse is no number, of a row of almost nothing, the form is 0 and the row its own error.
    let inverse = if (1.0 / scale).is_finite() { 1.0 / scale } else { 0.0 };
    let mut sums = [[0f64; LANES]; 3];
    let (targets, tail_target) = target.as_chunks_mut::<LANES>();
    for (row, target) in chunks.iter().zip(targets) {
        form_lanes(row, scale, inverse, target, &mut sums);
    }
    let (mut last, mut last_target) = ([0.0; LANES], [0; LANES]);
    last[..tail.len()].copy_from_slice(tail);
    form_lanes(&last, scale, inverse, &mut last_target, &mut sums);
    tail_target.copy_from_slice(&last_target[..tail.len()]);
    let [whole, error, form] = sums.map(|sum| sum.iter().sum());
    ScreenForm { scale, whole, error, form }
}

for_every_level! {
    /// Brings a row into its int8 form: writes the bits of its `q`, −127 to 127.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn screen_form(row: &[f32], target: &mut [u8]) -> ScreenForm = screen_form_body;
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type DotScreen = fn(&[ScreenState], usize, &[ScreenTile], &mut [[i32; SCREEN_ROWS]]);

    /// This CPU's level and those below it.
    fn levels() -> Vec<DotScreen> {
        let mut levels: Vec<DotScreen> =
            vec![dot_screen, |states, steps, tiles, targets| dot_screen_body(Portable, states, steps, tiles, targets)];
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the CPU has it.
            levels.push(|states, steps, tiles, targets| unsafe { dot_screen_avx2(states, steps, tiles, targets) });
        }
        levels
    }

    proptest! {
        #[test]
        fn tiles_give_the_dot_products_of_every_state(
            (k, states, rows) in (1usize..100, 0usize..4, 0usize..3).prop_flat_map(|(k, states, tiles)| {
                let states = prop::collection::vec(-2047i16..=2047, k * states);
                (Just(k), states, prop::collection::vec(any::<i8>(), k * tiles * SCREEN_ROWS))
            })
        ) {
            let steps = k.div_ceil(SCREEN_STEP);
            let (n, count) = (states.len() / k, rows.len() / k);
            let mut padded = vec![[0; SCREEN_STEP]; n * steps];
            for (at, x) in states.iter().enumerate() {
                padded[at / k * steps + at % k / SCREEN_STEP][at % k % SCREEN_STEP] = *x;
            }
            let mut tiles = vec![[[0; SCREEN_STEP]; SCREEN_ROWS]; count / SCREEN_ROWS * steps];
            for (at, w) in rows.iter().enumerate() {
                let (row, i) = (at / k, at % k);
                let tile = &mut tiles[row / SCREEN_ROWS * steps + i / SCREEN_STEP];
                tile[row % SCREEN_ROWS][i % SCREEN_STEP] = w.cast_unsigned();
            }
            let product = |x: &[i16], w: &[i8]| x.iter().zip(w).map(|(x, w)| i32::from(*x) * i32::from(*w)).sum::<i32>();
            let expected: Vec<i32> =
                states.chunks(k).flat_map(|x| rows.chunks(k).map(move |w| product(x, w))).collect();
            for level in levels() {
                let mut found = vec![[7; SCREEN_ROWS]; n * count / SCREEN_ROWS];
                level(&padded, steps, &tiles, &mut found);
                prop_assert_eq!(found.as_flattened(), &expected);
            }
        }

        #[test]
        fn states_are_near_their_forms_and_say_how_near(state in crate::ops::tests::floats(70), len in 0usize..70) {
            let state = &state[..len];
            let mut p = vec![[1; SCREEN_STEP]; len.div_ceil(SCREEN_STEP)];
            let Some(found) = screen_state(state, &mut p) else { return Ok(()) };
            let p = p.as_flattened();
            prop_assert!(p[len..].iter().all(|p| *p == 0));
            let (mut whole, mut error) = (0.0, 0.0);
            for (x, p) in state.iter().zip(p) {
                let d = f64::from(*x) - f64::from(found.scale) * f64::from(*p);
                prop_assert!(p.abs() <= 2047 && d.abs() <= f64::from(found.scale) * 0.5001, "{x} {p}");
                (whole, error) = (whole + f64::from(*x) * f64::from(*x), error + d * d);
            }
            for (found, expected) in [(found.whole, whole), (found.error, error)] {
                prop_assert!((found - expected).abs() <= expected * 1e-12, "{found} {expected}");
            }
        }

        #[test]
        fn forms_are_near_their_rows_and_say_how_near(row in crate::ops::tests::floats(70), len in 0usize..70) {
            let row = &row[..len];
            for screen_form in [screen_form as fn(&[f32], &mut [u8]) -> ScreenForm, screen_form_body] {
                let mut q = vec![0; len];
                let found = screen_form(row, &mut q);
                let form = |q: &u8| f64::from(q.cast_signed()) * f64::from(found.scale);
                let (mut whole, mut error, mut squares) = (0.0, 0.0, 0.0);
                for (w, q) in row.iter().zip(&q) {
                    let (w, form) = (f64::from(*w), form(q));
                    prop_assert!(q.cast_signed() != -128);
                    prop_assert!((w - form).abs() <= f64::from(found.scale) * 0.5001 + 1e-36, "{w} {form}");
                    (whole, error, squares) = (whole + w * w, error + (w - form) * (w - form), squares + form * form);
                }
                for (found, expected) in [(found.whole, whole), (found.error, error), (found.form, squares)] {
                    prop_assert!((found - expected).abs() <= expected * 1e-12, "{found} {expected}");
                }
            }
        }
    }
}
