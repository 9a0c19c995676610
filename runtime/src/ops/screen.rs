//! Rows as integers of a few bits with a scale each, states as integers with a scale each: what estimates of logits are
//! made of.
//!
//! Rows come in tiles of [`SCREEN_ROWS`], [`SCREEN_STEP`] elements of each in turn, so that a tile is one sequential
//! stream. An element is `bits` bits in two's complement, least significant first, so these elements of a row are
//! `4 · bits` bytes. Sums are integers and exact, so every level may add them up as it likes.

use ternion_kernels_ref::lanes::LANES;

/// Rows of a tile.
pub const SCREEN_ROWS: usize = 8;

/// Elements of a row that follow each other in a tile.
pub const SCREEN_STEP: usize = 32;

/// The largest magnitude of a state's integers.
const STATE_LEVELS: usize = 8191;

/// Bytes that so many elements of a tile take.
#[must_use]
pub const fn screen_step_bytes(bits: usize) -> usize {
    SCREEN_ROWS * SCREEN_STEP / 8 * bits
}

/// Some elements of a state, in the two forms that levels multiply with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct ScreenState {
    /// The integers.
    whole: [i16; SCREEN_STEP],
    /// Those integers as `128 · high + low`, `low` from 0 to 127.
    high: [i8; SCREEN_STEP],
    low: [i8; SCREEN_STEP],
}

impl ScreenState {
    /// Zeros.
    pub const ZERO: Self = Self { whole: [0; SCREEN_STEP], high: [0; SCREEN_STEP], low: [0; SCREEN_STEP] };

    fn set(&mut self, at: usize, p: i16) {
        (self.whole[at], self.high[at], self.low[at]) = (p, (p >> 7) as i8, (p & 127) as i8);
    }
}

/// Packs up to a step of a row's elements, one signed byte each, into its bytes in a tile.
pub(crate) fn pack_screen(bits: usize, elements: &[u8], row: &mut [u8]) {
    for (eight, bytes) in elements.chunks(8).zip(row.chunks_exact_mut(bits)) {
        let field = |(at, q): (usize, &u8)| u64::from(q & (u8::MAX >> (8 - bits))) << (at * bits);
        let word = eight.iter().enumerate().map(field).fold(0, |word, field| word | field);
        bytes.copy_from_slice(&word.to_le_bytes()[..bits]);
    }
}

/// The elements of whole bytes of a row, one signed byte each.
pub(crate) fn unpack_screen(bits: usize, row: &[u8], elements: &mut [u8]) {
    for (eight, bytes) in elements.chunks_exact_mut(8).zip(row.chunks_exact(bits)) {
        let mut word = [0; 8];
        word[..bits].copy_from_slice(bytes);
        let word = u64::from_le_bytes(word);
        for (at, element) in eight.iter_mut().enumerate() {
            // Its sign is brought to the top and back.
            let upper = ((word >> (at * bits) << (8 - bits)) as u8).cast_signed();
            *element = (upper >> (8 - bits)).cast_unsigned();
        }
    }
}

/// Whether this CPU's level unpacks fewer than 8 bits about as fast as it reads them.
pub(crate) fn unpacks_fast() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx2");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// One level's way of adding up products of a state and rows of `BITS` bits.
trait Level<const BITS: usize>: Copy {
    /// A step of two rows, unpacked.
    type Rows: Copy;
    /// Sums of two rows that are not added up yet.
    type Sums: Copy;
    /// How many states' sums its registers hold.
    const STATES: usize;

    /// Sums of nothing, for a state whose integers add up to `total`.
    fn begin(self, total: i32) -> Self::Sums;
    /// `rows` is `8 · BITS` bytes.
    fn unpack(self, rows: &[u8]) -> Self::Rows;
    fn add(self, sums: Self::Sums, state: &ScreenState, rows: Self::Rows) -> Self::Sums;
    fn end(self, sums: Self::Sums) -> [i32; 2];
}

/// Plain integers.
#[derive(Clone, Copy)]
struct Portable;

impl<const BITS: usize> Level<BITS> for Portable {
    /// Signed bytes.
    type Rows = [[u8; SCREEN_STEP]; 2];
    type Sums = [i32; 2];
    const STATES: usize = 1;

    #[inline(always)]
    fn begin(self, _: i32) -> [i32; 2] {
        [0; 2]
    }

    #[inline(always)]
    fn unpack(self, rows: &[u8]) -> [[u8; SCREEN_STEP]; 2] {
        let mut unpacked = [[0; SCREEN_STEP]; 2];
        if BITS == 8 {
            unpacked.as_flattened_mut().copy_from_slice(rows);
        } else {
            unpack_screen(BITS, rows, unpacked.as_flattened_mut());
        }
        unpacked
    }

    #[inline(always)]
    fn add(self, mut sums: [i32; 2], state: &ScreenState, rows: [[u8; SCREEN_STEP]; 2]) -> [i32; 2] {
        for (sum, row) in sums.iter_mut().zip(&rows) {
            for (x, w) in state.whole.iter().zip(row) {
                // A damaged file may have the lowest number, which bounds do not reckon with.
                *sum = sum.wrapping_add(i32::from(*x) * i32::from(w.cast_signed()));
            }
        }
        sums
    }

    #[inline(always)]
    fn end(self, sums: [i32; 2]) -> [i32; 2] {
        sums
    }
}

/// One pass over some tiles for `N` states of `steps` steps each.
#[inline(always)]
fn dot_some<const BITS: usize, L: Level<BITS>, const N: usize>(
    level: L,
    states: [&[ScreenState]; N],
    totals: [i32; N],
    tiles: &[u8],
    mut targets: [&mut [[i32; SCREEN_ROWS]]; N],
) {
    let steps = states[0].len();
    for (at, tile) in tiles.chunks_exact((steps * screen_step_bytes(BITS)).max(1)).enumerate() {
        let mut sums = [[level.begin(0); SCREEN_ROWS / 2]; N];
        for (sums, total) in sums.iter_mut().zip(totals) {
            *sums = [level.begin(total); SCREEN_ROWS / 2];
        }
        for (step, rows) in tile.chunks_exact(screen_step_bytes(BITS)).enumerate() {
            for (pair, rows) in rows.chunks_exact(8 * BITS).enumerate() {
                let rows = level.unpack(rows);
                for (sums, state) in sums.iter_mut().zip(states) {
                    sums[pair] = level.add(sums[pair], &state[step], rows);
                }
            }
        }
        for (target, sums) in targets.iter_mut().zip(sums) {
            for (target, sums) in target[at].as_chunks_mut::<2>().0.iter_mut().zip(sums) {
                *target = level.end(sums);
            }
        }
    }
}

#[inline(always)]
fn dot_screen_body<const BITS: usize, L: Level<BITS>>(
    level: L,
    states: &[ScreenState],
    totals: &[i32],
    tiles: &[u8],
    targets: &mut [[i32; SCREEN_ROWS]],
) {
    let (count, steps) = (totals.len(), states.len() / totals.len().max(1));
    let tile_bytes = (steps * screen_step_bytes(BITS)).max(1);
    let of_tiles = tiles.len() / tile_bytes;
    assert_eq!(states.len(), count * steps, "dot_screen: states of one length");
    assert_eq!(tiles.len(), of_tiles * tile_bytes, "dot_screen: whole tiles");
    assert_eq!(targets.len(), count * of_tiles, "dot_screen: a group of results for every state and tile");
    let states = states.chunks((L::STATES * steps).max(1)).zip(totals.chunks(L::STATES));
    for ((states, totals), targets) in states.zip(targets.chunks_mut((L::STATES * of_tiles).max(1))) {
        if let (2, [a, b]) = (L::STATES, totals) {
            let (totals, (a, b)) = ([*a, *b], states.split_at(steps));
            let (to_a, to_b) = targets.split_at_mut(of_tiles);
            dot_some(level, [a, b], totals, tiles, [to_a, to_b]);
        } else if let [total] = totals {
            dot_some(level, [states], [*total], tiles, [targets]);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! Levels whose instructions no compiler finds by itself.

    use std::arch::x86_64::{
        __m256i, __m512i, _MM_HINT_T0, _mm_add_epi32, _mm_cvtsi128_si32, _mm_loadu_si128, _mm_prefetch,
        _mm_shuffle_epi32, _mm256_add_epi32, _mm256_broadcastsi128_si256, _mm256_castsi256_si128, _mm256_cvtepi8_epi16,
        _mm256_extracti128_si256, _mm256_loadu_si256, _mm256_madd_epi16, _mm256_mullo_epi16, _mm256_setr_epi32,
        _mm256_setzero_si256, _mm256_shuffle_epi8, _mm256_srai_epi16, _mm512_add_epi32, _mm512_broadcast_i64x4,
        _mm512_castsi512_si256, _mm512_dpbusd_epi32, _mm512_extracti64x4_epi64, _mm512_loadu_si512,
        _mm512_maskz_loadu_epi8, _mm512_multishift_epi64_epi8, _mm512_permutexvar_epi8, _mm512_set1_epi8,
        _mm512_setzero_si512, _mm512_slli_epi32, _mm512_ternarylogic_epi32, _mm512_xor_si512,
    };

    use super::{SCREEN_STEP, ScreenState};

    /// How far ahead of the rows in use memory is asked for more: without that Intel's cores read half as fast.
    const AHEAD: usize = 4096;

    #[inline]
    #[target_feature(enable = "sse")]
    fn ask_ahead(rows: &[u8]) {
        // For each of the two: once for both is slower on Zen 4, though that asks for every line.
        _mm_prefetch::<_MM_HINT_T0>(rows.as_ptr().wrapping_add(AHEAD).cast());
        _mm_prefetch::<_MM_HINT_T0>(rows.as_ptr().wrapping_add(AHEAD + rows.len() / 2).cast());
    }

    /// Sums of `high` and of `low`, each of two rows: one in the lower half, one in the upper.
    pub(super) type SumsVnni = [__m512i; 2];

    /// Rows are multiplied as they are above their lowest number, which is taken off here for all elements.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn begin_vnni<const BITS: usize>(total: i32) -> SumsVnni {
        // As all sums it wraps: the result fits.
        let offset = (total << (BITS - 1)).wrapping_neg();
        let half = _mm256_setr_epi32(offset, 0, 0, 0, 0, 0, 0, 0);
        [_mm512_setzero_si512(), _mm512_broadcast_i64x4(half)]
    }

    /// Sixty-four elements, eight of which are `BITS` bytes: where the bytes of each eight come from, and the bits of each
    /// element within its eight.
    const fn spread<const BITS: usize>() -> [[u8; 64]; 2] {
        let (mut bytes, mut bits) = ([0; 64], [0; 64]);
        let mut at = 0;
        while at < 64 {
            let (eight, i) = (at / 8, at % 8);
            bytes[at] = if i < BITS { (eight * BITS + i) as u8 } else { 0 };
            bits[at] = (i * BITS) as u8;
            at += 1;
        }
        [bytes, bits]
    }

    struct Spread<const BITS: usize>;

    impl<const BITS: usize> Spread<BITS> {
        const WIDE: [[u8; 64]; 2] = spread::<BITS>();
        const NARROW: [Half; 2] = [half::<BITS>(0), half::<BITS>(1)];
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    pub(super) fn unpack_vnni<const BITS: usize>(rows: &[u8]) -> __m512i {
        debug_assert_eq!(rows.len(), 8 * BITS);
        ask_ahead(rows);
        let sign = _mm512_set1_epi8(i8::MIN.cast_unsigned().wrapping_shr(8 - BITS as u32).cast_signed());
        if BITS == 8 {
            // SAFETY: the rows are 64 bytes.
            return _mm512_xor_si512(unsafe { _mm512_loadu_si512(rows.as_ptr().cast()) }, sign);
        }
        let [bytes, bits] = &Spread::<BITS>::WIDE;
        // SAFETY: the tables are 64 bytes each, and of the rows no more is read than there is.
        let (bytes, bits, packed) = unsafe {
            let packed = _mm512_maskz_loadu_epi8((1 << (8 * BITS % 64)) - 1, rows.as_ptr().cast());
            (_mm512_loadu_si512(bytes.as_ptr().cast()), _mm512_loadu_si512(bits.as_ptr().cast()), packed)
        };
        let fields = _mm512_multishift_epi64_epi8(bits, _mm512_permutexvar_epi8(bytes, packed));
        let mask = _mm512_set1_epi8((u8::MAX >> (8 - BITS)).cast_signed());
        // Both at once: the element's bits alone, and above the lowest number.
        _mm512_ternarylogic_epi32::<0b0110_1010>(fields, mask, sign)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn add_vnni(sums: SumsVnni, state: &ScreenState, rows: __m512i) -> SumsVnni {
        // SAFETY: both are 32 bytes.
        let (high, low) =
            unsafe { (_mm256_loadu_si256(state.high.as_ptr().cast()), _mm256_loadu_si256(state.low.as_ptr().cast())) };
        let (high, low) = (_mm512_broadcast_i64x4(high), _mm512_broadcast_i64x4(low));
        [_mm512_dpbusd_epi32(sums[0], rows, high), _mm512_dpbusd_epi32(sums[1], rows, low)]
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx2")]
    pub(super) fn end_vnni(sums: SumsVnni) -> [i32; 2] {
        let sums = _mm512_add_epi32(_mm512_slli_epi32::<7>(sums[0]), sums[1]);
        [total_avx2(_mm512_castsi512_si256(sums)), total_avx2(_mm512_extracti64x4_epi64::<1>(sums))]
    }

    /// How sixteen elements, half a row's step, come out of sixteen bytes.
    #[derive(Clone, Copy)]
    struct Half {
        /// Where these bytes begin.
        start: usize,
        /// The two bytes that hold an element, little end first.
        bytes: [u8; 32],
        /// What brings the element to the upper end of these.
        times: [i16; 16],
    }

    const fn half<const BITS: usize>(which: usize) -> Half {
        let first = 2 * BITS * which;
        // Nothing behind the row is read.
        let start = if first + 16 > 4 * BITS { 4 * BITS - 16 } else { first };
        let mut half = Half { start, bytes: [0; 32], times: [0; 16] };
        let mut at = 0;
        while at < 16 {
            let bit = 8 * (first - start) + BITS * at;
            half.bytes[2 * at] = (bit / 8) as u8;
            // Past the last byte there is nothing of this element.
            half.bytes[2 * at + 1] = if bit / 8 + 1 < 16 { (bit / 8 + 1) as u8 } else { 0x80 };
            half.times[at] = 1 << (16 - BITS - bit % 8);
            at += 1;
        }
        half
    }

    /// Sixteen elements each of two halves of two rows.
    pub(super) type RowsAvx2 = [[__m256i; 2]; 2];

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn unpack_avx2<const BITS: usize>(rows: &[u8]) -> RowsAvx2 {
        debug_assert_eq!(rows.len(), 8 * BITS);
        ask_ahead(rows);
        let mut unpacked = [[_mm256_setzero_si256(); 2]; 2];
        for (row, unpacked) in unpacked.iter_mut().enumerate() {
            for (half, unpacked) in Spread::<BITS>::NARROW.iter().zip(unpacked) {
                // SAFETY: sixteen bytes from there are within the row, and the tables are 32 bytes each.
                *unpacked = unsafe {
                    let packed = _mm_loadu_si128(rows.as_ptr().add(4 * BITS * row + half.start).cast());
                    if BITS == 8 {
                        _mm256_cvtepi8_epi16(packed)
                    } else {
                        let bytes = _mm256_loadu_si256(half.bytes.as_ptr().cast());
                        let words = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(packed), bytes);
                        let upper = _mm256_mullo_epi16(words, _mm256_loadu_si256(half.times.as_ptr().cast()));
                        match BITS {
                            6 => _mm256_srai_epi16::<10>(upper),
                            _ => _mm256_srai_epi16::<9>(upper),
                        }
                    }
                };
            }
        }
        unpacked
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn add_avx2(mut sums: [__m256i; 2], state: &ScreenState, rows: RowsAvx2) -> [__m256i; 2] {
        for half in 0..2 {
            // SAFETY: each half of the state is 32 bytes.
            let state = unsafe { _mm256_loadu_si256(state.whole.as_ptr().add(SCREEN_STEP / 2 * half).cast()) };
            for (sums, row) in sums.iter_mut().zip(rows) {
                *sums = _mm256_add_epi32(*sums, _mm256_madd_epi16(state, row[half]));
            }
        }
        sums
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn begin_avx2() -> [__m256i; 2] {
        [_mm256_setzero_si256(); 2]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn end_avx2(sums: [__m256i; 2]) -> [i32; 2] {
        [total_avx2(sums[0]), total_avx2(sums[1])]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn total_avx2(sums: __m256i) -> i32 {
        let four = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256::<1>(sums));
        let two = _mm_add_epi32(four, _mm_shuffle_epi32::<0b00_00_11_10>(four));
        _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32::<0b00_00_00_01>(two)))
    }
}

/// A level made of functions that only it may call.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
struct By<B, U, A, E, const STATES: usize>(B, U, A, E);

#[cfg(target_arch = "x86_64")]
impl<R, S, B, U, A, E, const STATES: usize, const BITS: usize> Level<BITS> for By<B, U, A, E, STATES>
where
    R: Copy,
    S: Copy,
    B: Fn(i32) -> S + Copy,
    U: Fn(&[u8]) -> R + Copy,
    A: Fn(S, &ScreenState, R) -> S + Copy,
    E: Fn(S) -> [i32; 2] + Copy,
{
    type Rows = R;
    type Sums = S;
    const STATES: usize = STATES;

    #[inline(always)]
    fn begin(self, total: i32) -> S {
        (self.0)(total)
    }

    #[inline(always)]
    fn unpack(self, rows: &[u8]) -> R {
        (self.1)(rows)
    }

    #[inline(always)]
    fn add(self, sums: S, state: &ScreenState, rows: R) -> S {
        (self.2)(sums, state, rows)
    }

    #[inline(always)]
    fn end(self, sums: S) -> [i32; 2] {
        (self.3)(sums)
    }
}

/// [`dot_screen`] by 256 bits, which a test can call where 512 are chosen.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn dot_screen_avx2<const BITS: usize>(
    states: &[ScreenState],
    totals: &[i32],
    tiles: &[u8],
    targets: &mut [[i32; SCREEN_ROWS]],
) {
    let unpack = |rows: &[u8]| x86::unpack_avx2::<BITS>(rows);
    let add = |sums, state: &ScreenState, rows| x86::add_avx2(sums, state, rows);
    let level = By::<_, _, _, _, 1>(|_| x86::begin_avx2(), unpack, add, |sums| x86::end_avx2(sums));
    dot_screen_body::<BITS, _>(level, states, totals, tiles, targets);
}

/// And by 512.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vnni,avx2")]
fn dot_screen_vnni<const BITS: usize>(
    states: &[ScreenState],
    totals: &[i32],
    tiles: &[u8],
    targets: &mut [[i32; SCREEN_ROWS]],
) {
    let (begin, unpack) = (|total| x86::begin_vnni::<BITS>(total), |rows: &[u8]| x86::unpack_vnni::<BITS>(rows));
    let add = |sums, state: &ScreenState, rows| x86::add_vnni(sums, state, rows);
    let level = By::<_, _, _, _, 2>(begin, unpack, add, |sums| x86::end_vnni(sums));
    dot_screen_body::<BITS, _>(level, states, totals, tiles, targets);
}

/// `targets[n][t][r] = Σ x[i] · w[i]`, `x` the state `n` and `w` the row `r`, of `bits` bits, of tile `t`: `states` is
/// `[n, steps]`, `totals` the sums of their integers, `tiles` `[t, steps]` of [`screen_step_bytes`], all zero past the end of
/// a row. Sums must fit 32 bits, as those of [`screen_state`] do.
///
/// # Panics
/// If the lengths do not fit, or `bits` is not 6, 7 or 8.
#[multiversion::multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512vbmi+avx512vnni+avx2",
    "x86_64+avx2",
    "aarch64+neon",
))]
pub fn dot_screen(
    bits: usize,
    states: &[ScreenState],
    totals: &[i32],
    tiles: &[u8],
    targets: &mut [[i32; SCREEN_ROWS]],
) {
    macro_rules! with_bits {
        ($bits:ident => $call:expr) => {
            match bits {
                6 => {
                    const $bits: usize = 6;
                    $call
                }
                7 => {
                    const $bits: usize = 7;
                    $call
                }
                8 => {
                    const $bits: usize = 8;
                    $call
                }
                _ => panic!("dot_screen: rows of {bits} bits"),
            }
        };
    }
    multiversion::target::match_target! {
        "x86_64+avx512f+avx512bw+avx512vbmi+avx512vnni+avx2" => {
            with_bits!(BITS => dot_screen_vnni::<BITS>(states, totals, tiles, targets));
        }
        "x86_64+avx2" => with_bits!(BITS => dot_screen_avx2::<BITS>(states, totals, tiles, targets)),
        _ => with_bits!(BITS => dot_screen_body::<BITS, _>(Portable, states, totals, tiles, targets)),
    }
}

/// A state `x = t·p + d` in its integer form, but for `p` itself. Norms are sums in `f64` without any promise of order.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StateForm {
    /// `t`
    pub scale: f32,
    /// The sum of all `p`.
    pub total: i32,
    /// `‖x‖²`
    pub whole: f64,
    /// `‖d‖²`
    pub error: f64,
}

/// Brings a state into its integer form: writes its `p`, −8191 to 8191, or fewer if sums of products with bytes, −127 to
/// 127, would not fit 32 bits, and zeros behind. `None` for a state with an element that is no number, or whose scale is
/// none.
///
/// # Panics
/// If `target` is not as many steps as the state needs.
pub fn screen_state(state: &[f32], target: &mut [ScreenState]) -> Option<StateForm> {
    assert_eq!(target.len(), state.len().div_ceil(SCREEN_STEP), "screen_state: as many steps as the state needs");
    let levels = (i32::MAX as usize / (127 * state.len().max(1))).clamp(1, STATE_LEVELS) as f32;
    target.fill(ScreenState::ZERO);
    let largest = state.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    let scale = largest / levels;
    let inverse = 1.0 / scale;
    if !inverse.is_finite() || !state.iter().all(|x| x.is_finite()) {
        return None;
    }
    let (mut total, mut whole, mut error) = (0, 0.0, 0.0);
    for (state, target) in state.chunks(SCREEN_STEP).zip(target) {
        for (at, x) in state.iter().enumerate() {
            let p = (x * inverse).round_ties_even().clamp(-levels, levels);
            target.set(at, p as i16);
            total += p as i32;
            let d = f64::from(*x) - f64::from(p) * f64::from(scale);
            whole += f64::from(*x) * f64::from(*x);
            error += d * d;
        }
    }
    Some(StateForm { scale, total, whole, error })
}

/// A row `w = s·q + e` in its form of a few bits, but for `q` itself. Norms are sums in `f64`, sixteen lanes first and then these in
/// order: the same bits on every machine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScreenForm {
    /// `s`, the largest magnitude over the largest `q`: 127 of 8 bits.
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
fn form_lanes(
    row: &[f32; LANES],
    [scale, inverse, levels]: [f32; 3],
    target: &mut [u8; LANES],
    sums: &mut [[f64; LANES]; 3],
) {
    for (i, (w, target)) in row.iter().zip(target).enumerate() {
        let q = (w * inverse).round_ties_even().clamp(-levels, levels);
        *target = (q as i8).cast_unsigned();
        let (w, form) = (f64::from(*w), f64::from(q) * f64::from(scale));
        let error = w - form;
        for (sum, x) in sums.iter_mut().zip([w, error, form]) {
            sum[i] += x * x;
        }
    }
}

#[inline(always)]
fn screen_form_body(bits: usize, row: &[f32], target: &mut [u8]) -> ScreenForm {
    assert_eq!(row.len(), target.len(), "screen_form: as many bytes as elements");
    let (chunks, tail) = row.as_chunks::<LANES>();
    let mut largest = [0f32; LANES];
    for row in chunks {
        largest.iter_mut().zip(row).for_each(|(largest, w)| *largest = largest.max(w.abs()));
    }
    let largest = largest.iter().chain(tail).fold(0f32, |largest, w| largest.max(w.abs()));
    let levels = (127 >> 8usize.saturating_sub(bits)) as f32;
    let scale = largest / levels;
    // Where the inverse is no number, of a row of almost nothing, the form is 0 and the row its own error.
    let inverse = if (1.0 / scale).is_finite() { 1.0 / scale } else { 0.0 };
    let mut sums = [[0f64; LANES]; 3];
    let (targets, tail_target) = target.as_chunks_mut::<LANES>();
    for (row, target) in chunks.iter().zip(targets) {
        form_lanes(row, [scale, inverse, levels], target, &mut sums);
    }
    let (mut last, mut last_target) = ([0.0; LANES], [0; LANES]);
    last[..tail.len()].copy_from_slice(tail);
    form_lanes(&last, [scale, inverse, levels], &mut last_target, &mut sums);
    tail_target.copy_from_slice(&last_target[..tail.len()]);
    let [whole, error, form] = sums.map(|sum| sum.iter().sum());
    ScreenForm { scale, whole, error, form }
}

for_every_level! {
    /// Brings a row into its form of `bits` bits (8, or fewer): writes its `q`, −127 to 127 of 8 bits, one signed byte each.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn screen_form(bits: usize, row: &[f32], target: &mut [u8]) -> ScreenForm = screen_form_body;
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type DotScreen = fn(&[ScreenState], &[i32], &[u8], &mut [[i32; SCREEN_ROWS]]);

    /// This CPU's levels.
    fn levels<const BITS: usize>() -> Vec<DotScreen> {
        let mut levels: Vec<DotScreen> = vec![
            |states, totals, tiles, targets| dot_screen(BITS, states, totals, tiles, targets),
            |states, totals, tiles, targets| dot_screen_body::<BITS, _>(Portable, states, totals, tiles, targets),
        ];
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the CPU has it.
            levels.push(|states, totals, tiles, targets| unsafe {
                dot_screen_avx2::<BITS>(states, totals, tiles, targets)
            });
        }
        levels
    }

    proptest! {
        #[test]
        fn tiles_give_the_dot_products_of_every_state(
            (bits, k, states, rows) in (6usize..9, 1usize..100, 0usize..4, 0usize..3).prop_flat_map(|(bits, k, states, tiles)| {
                let states = prop::collection::vec(-8191i16..=8191, k * states);
                (Just(bits), Just(k), states, prop::collection::vec(any::<i8>(), k * tiles * SCREEN_ROWS))
            })
        ) {
            let steps = k.div_ceil(SCREEN_STEP);
            let (n, count) = (states.len() / k, rows.len() / k);
            // Even the lowest number, which no screen of ours has.
            let rows: Vec<i8> = rows.iter().map(|w| w >> (8 - bits)).collect();
            let mut padded = vec![ScreenState::ZERO; n * steps];
            for (at, x) in states.iter().enumerate() {
                padded[at / k * steps + at % k / SCREEN_STEP].set(at % k % SCREEN_STEP, *x);
            }
            let row_bytes = screen_step_bytes(bits) / SCREEN_ROWS;
            let mut tiles = vec![0; count / SCREEN_ROWS * steps * screen_step_bytes(bits)];
            for (row, elements) in rows.chunks(k).enumerate() {
                let elements: Vec<u8> = elements.iter().map(|w| w.cast_unsigned()).collect();
                for (step, elements) in elements.chunks(SCREEN_STEP).enumerate() {
                    let step = row / SCREEN_ROWS * steps + step;
                    let bytes = &mut tiles[(step * SCREEN_ROWS + row % SCREEN_ROWS) * row_bytes..][..row_bytes];
                    pack_screen(bits, elements, bytes);
                }
            }
            let totals: Vec<i32> = states.chunks(k).map(|x| x.iter().map(|x| i32::from(*x)).sum()).collect();
            let product = |x: &[i16], w: &[i8]| x.iter().zip(w).map(|(x, w)| i32::from(*x) * i32::from(*w)).sum::<i32>();
            let expected: Vec<i32> =
                states.chunks(k).flat_map(|x| rows.chunks(k).map(move |w| product(x, w))).collect();
            for level in match bits { 6 => levels::<6>(), 7 => levels::<7>(), _ => levels::<8>() } {
                let mut found = vec![[7; SCREEN_ROWS]; n * count / SCREEN_ROWS];
                level(&padded, &totals, &tiles, &mut found);
                prop_assert_eq!(found.as_flattened(), &expected);
            }
        }

        #[test]
        fn states_are_near_their_forms_and_say_how_near(state in crate::ops::tests::floats(70), len in 0usize..70) {
            let state = &state[..len];
            let mut p = vec![ScreenState { low: [1; SCREEN_STEP], ..ScreenState::ZERO }; len.div_ceil(SCREEN_STEP)];
            let Some(found) = screen_state(state, &mut p) else { return Ok(()) };
            let halves = |step: &ScreenState| [0; SCREEN_STEP].iter().enumerate().map(|(at, _)| {
                128 * i16::from(step.high[at]) + i16::from(step.low[at])
            }).collect::<Vec<_>>();
            prop_assert!(p.iter().all(|step| halves(step) == step.whole && step.low.iter().all(|low| *low >= 0)));
            let p: Vec<i16> = p.iter().flat_map(|step| step.whole).collect();
            prop_assert_eq!(p.iter().map(|p| i32::from(*p)).sum::<i32>(), found.total);
            prop_assert!(p[len..].iter().all(|p| *p == 0));
            let (mut whole, mut error) = (0.0, 0.0);
            for (x, p) in state.iter().zip(&p) {
                let d = f64::from(*x) - f64::from(found.scale) * f64::from(*p);
                prop_assert!(p.abs() <= 8191 && d.abs() <= f64::from(found.scale) * 0.5001, "{x} {p}");
                (whole, error) = (whole + f64::from(*x) * f64::from(*x), error + d * d);
            }
            for (found, expected) in [(found.whole, whole), (found.error, error)] {
                prop_assert!((found - expected).abs() <= expected * 1e-12, "{found} {expected}");
            }
        }

        #[test]
        fn forms_are_near_their_rows_and_say_how_near(
            bits in 6usize..9, row in crate::ops::tests::floats(70), len in 0usize..70
        ) {
            let row = &row[..len];
            for screen_form in [screen_form as fn(usize, &[f32], &mut [u8]) -> ScreenForm, screen_form_body] {
                let mut q = vec![0; len];
                let found = screen_form(bits, row, &mut q);
                let form = |q: &u8| f64::from(q.cast_signed()) * f64::from(found.scale);
                let (mut whole, mut error, mut squares) = (0.0, 0.0, 0.0);
                for (w, q) in row.iter().zip(&q) {
                    let (w, form) = (f64::from(*w), form(q));
                    prop_assert!(i32::from(q.cast_signed()).abs() < 1 << (bits - 1));
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
