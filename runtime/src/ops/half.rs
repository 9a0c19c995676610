//! IEEE half precision without a branch, so that sixteen conversions are a few vector instructions everywhere.

use ternion_kernels_ref::lanes::LANES;

use super::lanes::Lanes;

/// Exponent of `f32` less that of half precision, in place.
const REBIAS: u32 = (127 - 15) << 23;

/// Half to `f32`, always exact. NaN becomes quiet and keeps its payload.
#[must_use]
#[inline(always)]
pub fn f16_to_f32(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let magnitude = u32::from(bits & 0x7fff);
    let shifted = magnitude << 13;
    let normal = shifted + REBIAS;
    // Infinity and NaN keep an exponent of all ones; NaN gets its quiet bit.
    let special = (shifted + 2 * REBIAS) | if magnitude > 0x7c00 { 1 << 22 } else { 0 };
    // A subnormal is what its mantissa adds to the smallest normal number.
    let smallest = REBIAS + (1 << 23);
    let subnormal = (f32::from_bits(shifted + smallest) - f32::from_bits(smallest)).to_bits();
    let finite = if magnitude < 0x0400 { subnormal } else { normal };
    f32::from_bits(sign | if magnitude < 0x7c00 { finite } else { special })
}

/// `f32` to half, rounding half to even. NaN becomes quiet and keeps the upper bits of its payload.
#[must_use]
#[inline(always)]
pub fn f32_to_f16(x: f32) -> u16 {
    /// The smallest `f32` that rounds to infinity, 65520.
    const OVERFLOW: u32 = 0x477f_f000;
    /// The smallest normal half, 2⁻¹⁴.
    const NORMAL: u32 = REBIAS + (1 << 23);
    /// 0.5: its last bit is worth 2⁻²⁴, the smallest half, so that adding it rounds to subnormals.
    const HALF: u32 = 0x3f00_0000;

    let bits = x.to_bits();
    let sign = (bits >> 16) & 0x8000;
    let magnitude = bits & 0x7fff_ffff;
    let odd = (magnitude >> 13) & 1;
    let normal = magnitude.wrapping_sub(REBIAS).wrapping_add(0x0fff + odd) >> 13;
    let subnormal = (f32::from_bits(magnitude) + f32::from_bits(HALF)).to_bits().wrapping_sub(HALF);
    let nan = 0x7e00 | ((magnitude >> 13) & 0x03ff);
    let finite = if magnitude < NORMAL { subnormal } else { normal };
    let ordered = if magnitude < OVERFLOW { finite } else { 0x7c00 };
    (sign | if magnitude > 0x7f80_0000 { nan } else { ordered }) as u16
}

/// Widens sixteen halves.
#[inline(always)]
pub(super) fn widen_lanes(bits: &[u16; LANES]) -> Lanes {
    let mut lanes = Lanes::ZERO;
    for (lane, bits) in lanes.0.iter_mut().zip(bits) {
        *lane = f16_to_f32(*bits);
    }
    lanes
}

/// As [`widen_lanes`], with the instruction for it.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx,f16c")]
pub(super) fn widen_lanes_f16c(bits: &[u16; LANES]) -> Lanes {
    use std::arch::x86_64::{_mm_loadu_si128, _mm256_cvtph_ps, _mm256_store_ps};

    let mut lanes = Lanes::ZERO;
    for half in 0..2 {
        // SAFETY: both halves of `bits` are 16 bytes, those of `lanes` 32 bytes, aligned as `Lanes` is.
        unsafe {
            let bits = _mm_loadu_si128(bits.as_ptr().add(half * 8).cast());
            _mm256_store_ps(lanes.0.as_mut_ptr().add(half * 8), _mm256_cvtph_ps(bits));
        }
    }
    lanes
}

/// As [`widen_lanes`], with the instruction for it.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
pub(super) fn widen_lanes_avx512(bits: &[u16; LANES]) -> Lanes {
    use std::arch::x86_64::{_MM_FROUND_CUR_DIRECTION, _mm256_loadu_si256, _mm512_cvt_roundph_ps, _mm512_store_ps};

    let mut lanes = Lanes::ZERO;
    // Widening rounds nothing. `_mm512_cvtph_ps` would suppress exceptions, which the instruction cannot do with an
    // operand in memory: with a register it also needs a port that multiplies.
    // SAFETY: `bits` is 32 bytes, `lanes` 64 bytes and aligned to as many.
    unsafe {
        let bits = _mm256_loadu_si256(bits.as_ptr().cast());
        _mm512_store_ps(lanes.0.as_mut_ptr(), _mm512_cvt_roundph_ps::<_MM_FROUND_CUR_DIRECTION>(bits));
    }
    lanes
}

#[inline(always)]
fn widen_body(source: &[u16], target: &mut [f32]) {
    assert_eq!(source.len(), target.len(), "widen_f16: equal lengths");
    for (bits, target) in source.iter().zip(target) {
        *target = f16_to_f32(*bits);
    }
}

#[inline(always)]
fn narrow_body(source: &[f32], target: &mut [u16]) {
    assert_eq!(source.len(), target.len(), "narrow_f16: equal lengths");
    for (x, target) in source.iter().zip(target) {
        *target = f32_to_f16(*x);
    }
}

for_every_level! {
    /// [`f16_to_f32`] of every element.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn widen_f16(source: &[u16], target: &mut [f32]) = widen_body;

    /// [`f32_to_f16`] of every element.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn narrow_f16(source: &[f32], target: &mut [u16]) = narrow_body;
}

#[cfg(test)]
mod tests {
    use super::*;
    use ternion_kernels_ref::widen;

    fn all_halves() -> Vec<u16> {
        (0..=u16::MAX).collect()
    }

    #[test]
    fn all_65536_halves_widen_as_the_reference_does() {
        let mut wide = vec![0.0; 1 << 16];
        widen_f16(&all_halves(), &mut wide);
        for (bits, wide) in all_halves().into_iter().zip(wide) {
            assert_eq!(wide.to_bits(), widen::f16_to_f32(bits).to_bits(), "{bits:#06x}");
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn all_65536_halves_widen_the_same_by_instruction() {
        for bits in all_halves().as_chunks().0 {
            let expected = widen_lanes(bits).0.map(f32::to_bits);
            if is_x86_feature_detected!("f16c") {
                // SAFETY: the CPU has it.
                assert_eq!(unsafe { widen_lanes_f16c(bits) }.0.map(f32::to_bits), expected, "{bits:x?}");
            }
            if is_x86_feature_detected!("avx512f") {
                // SAFETY: the CPU has it.
                assert_eq!(unsafe { widen_lanes_avx512(bits) }.0.map(f32::to_bits), expected, "{bits:x?}");
            }
        }
    }

    #[test]
    fn every_half_and_everything_around_the_middle_of_two_narrows_as_the_reference_does() {
        let mut floats = Vec::new();
        for bits in all_halves() {
            let at = widen::f16_to_f32(bits).to_bits();
            // Neighbours in half precision are 2¹³ apart in the bits of `f32`, and much further below 2⁻¹⁴.
            for middle in [at, at.wrapping_add(1 << 12), at.wrapping_add(1 << 22), at.wrapping_sub(1 << 12)] {
                floats.extend((0..5).map(|step| f32::from_bits(middle.wrapping_add(step).wrapping_sub(2))));
            }
        }
        // Below 2⁻¹⁴ the middles are odd multiples of 2⁻²⁵.
        for step in 0..=2048u32 {
            let at = (step as f32 * 2f32.powi(-25)).to_bits();
            floats.extend(
                [at, at + 1, at.wrapping_sub(1)]
                    .into_iter()
                    .flat_map(|bits| [f32::from_bits(bits), f32::from_bits(bits | 0x8000_0000)]),
            );
        }
        let mut state = 1u64;
        floats.extend((0..200_000).map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            f32::from_bits((state >> 32) as u32)
        }));
        let mut narrow = vec![0; floats.len()];
        narrow_f16(&floats, &mut narrow);
        for (x, narrow) in floats.into_iter().zip(narrow) {
            assert_eq!(narrow, widen::f32_to_f16(x), "{x:e} = {:#010x}", x.to_bits());
        }
    }
}
