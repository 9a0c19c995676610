//! Elementary functions with the same bits on every machine.

/// `e^x` in `f32`, within two units in the last place; 0 below about −103.9, infinite above about 88.7.
///
/// Range reduction `x = n·ln 2 + r`, `|r| ≤ ln 2 / 2`, ln 2 in two parts (Cody and Waite); the Taylor polynomial of
/// degree seven in r by Horner's rule with fused multiply-adds; the power of two multiplied on in two halves, so that
/// the result underflows gradually. There is no branch, so that a compiler can do sixteen at once.
#[must_use]
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    /// Adding and subtracting 1.5·2²³ rounds to an integer, half to even.
    const ROUND: f32 = 12_582_912.0;

    let x = x.clamp(-105.0, 90.0);
    let rounded = x.mul_add(LOG2_E, ROUND);
    let n = rounded - ROUND;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, x));
    let mut p: f32 = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p.mul_add(r, c);
    }
    // The integer is in the last bits of the rounded number: unlike a conversion, which saturates, a subtraction.
    let n = rounded.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    let half = n >> 1;
    p * power_of_two(half) * power_of_two(n - half)
}

/// `2^n` for `n` in [−126, 127].
#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// `1 / (1 + e^−x)`.
#[must_use]
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `tanh x = 1 − 2 / (e^2x + 1)`.
#[must_use]
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    1.0 - 2.0 / (exp(2.0 * x) + 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let mut worst: f64 = 0.0;
        for step in -87_000..=88_700 {
            let x = step as f32 * 1e-3;
            let exact = libm::exp(f64::from(x));
            let unit = f64::from(f32::EPSILON) * exact;
            worst = worst.max((f64::from(exp(x)) - exact).abs() / unit);
        }
        assert!(worst < 2.0, "off by {worst} units");
    }

    #[test]
    fn exp_at_its_ends() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e30), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(-100.0) > 0.0, "underflow is gradual");
    }

    #[test]
    fn sigmoid_and_tanh_saturate() {
        assert_eq!((sigmoid(0.0), sigmoid(200.0), sigmoid(-200.0)), (0.5, 1.0, 0.0));
        assert_eq!((tanh(0.0), tanh(50.0), tanh(-50.0)), (0.0, 1.0, -1.0));
        for step in -80..=80 {
            let x = step as f32 * 0.1;
            assert!((f64::from(tanh(x)) - libm::tanh(f64::from(x))).abs() < 3e-7);
        }
    }
}
