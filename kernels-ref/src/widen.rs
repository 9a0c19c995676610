//! Sixteen-bit floats: how they become `f32` and back.

/// bf16 to `f32`: a shift, always exact.
#[must_use]
#[inline(always)]
pub const fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits((bits as u32) << 16)
}

/// IEEE half to `f32`, always exact.
#[must_use]
pub fn f16_to_f32(bits: u16) -> f32 {
    half::f16::from_bits(bits).to_f32_const()
}

/// `f32` to IEEE half, rounding half to even.
#[must_use]
pub fn f32_to_f16(x: f32) -> u16 {
    half::f16::from_f32_const(x).to_bits()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_survives_the_round_trip() {
        for bits in 0..=u16::MAX {
            let wide = f16_to_f32(bits);
            if !wide.is_nan() {
                assert_eq!(f32_to_f16(wide), bits);
            }
        }
    }
}
