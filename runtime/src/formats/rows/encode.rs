//! Rounding rows to the types that a head may be stored in.

use half::f16;

use super::RowType;
use crate::ops;

/// Appends a row of finite values in type `kind`, rounded to what it can hold.
///
/// # Errors
/// The place of a value that is beyond the type.
pub(in crate::formats) fn encode_row(kind: RowType, row: &[f32], target: &mut Vec<u8>) -> Result<(), usize> {
    let places = |target: &mut Vec<u8>, count: usize| {
        let start = target.len();
        target.resize(start + count, 0);
        start
    };
    match kind {
        RowType::F32 => target.extend(row.iter().flat_map(|value| value.to_le_bytes())),
        RowType::F16 | RowType::Bf16 => {
            let half = |value: f32| match kind {
                RowType::F16 => f16::from_f32(value).to_bits(),
                _ => half::bf16::from_f32(value).to_bits(),
            };
            let largest = if kind == RowType::F16 { f16::MAX.to_f32() } else { half::bf16::MAX.to_f32() };
            if let Some(at) = row.iter().position(|value| value.abs() > largest) {
                return Err(at);
            }
            target.extend(row.iter().flat_map(|value| half(*value).to_le_bytes()));
        }
        RowType::Int8 => {
            let start = places(target, 4 + row.len());
            // The very form that a head's screen of 8 bits has.
            let scale = ops::screen_form(8, row, &mut target[start + 4..]).scale;
            target[start..start + 4].copy_from_slice(&scale.to_le_bytes());
        }
        RowType::Q8_0 => row.as_chunks().0.iter().for_each(|block| target.extend(q8_0(block))),
        RowType::Q6K => row.as_chunks().0.iter().for_each(|block| target.extend(q6_k(block))),
        RowType::Q4_0 | RowType::Q4K => unreachable!("nothing is rounded to four bits"),
    }
    Ok(())
}

/// ggml's Q8_0: `d = max |w| / 127`, codes `round(w / d)`, halves away from 0.
fn q8_0(block: &[f32; 32]) -> [u8; 34] {
    let largest = block.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
    let d = largest / 127.0;
    let reciprocal = if d == 0.0 { 0.0 } else { 1.0 / d };
    let mut bytes = [0; 34];
    bytes[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    for (byte, value) in bytes[2..].iter_mut().zip(block) {
        *byte = ((value * reciprocal).round() as i8).cast_unsigned();
    }
    bytes
}

/// Codes of one group of Q6_K, −32 to 31.
type Group = [i8; 16];

/// How far from 32 codes the largest value of a group is tried at, in tenths.
const TRIED: [i8; 7] = [-9, -6, -3, 0, 3, 6, 9];

/// Q6_K: each group of 16 gets the scale with the least squared error among a few, rounded to an eighth-bit multiple of
/// `d`, then the nearest codes.
fn q6_k(block: &[f32; 256]) -> [u8; 210] {
    let groups = block.as_chunks::<16>().0;
    let scales: Vec<f32> = groups.iter().map(best_scale).collect();
    let largest =
        scales.iter().fold(0.0f32, |largest, scale| if scale.abs() > largest.abs() { *scale } else { largest });
    // The largest scale becomes −128, the longer end of a signed byte.
    let d = f16::from_f32(largest / -128.0);
    let mut bytes = [0; 210];
    bytes[208..].copy_from_slice(&d.to_le_bytes());
    let d = d.to_f32();
    for (at, (group, scale)) in groups.iter().zip(scales).enumerate() {
        let multiple = if d == 0.0 { 0.0 } else { (scale / d).round().clamp(-128.0, 127.0) };
        bytes[192 + at] = (multiple as i8).cast_unsigned();
        let (half, within) = (at / 8, at % 8 * 16);
        for (i, code) in codes(group, d * multiple).into_iter().enumerate() {
            let code = (code + 32).cast_unsigned();
            bytes[half * 64 + within % 64 + i] |= (code & 15) << (within / 64 * 4);
            bytes[128 + half * 32 + within % 32 + i] |= code >> 4 << (within / 32 * 2);
        }
    }
    bytes
}

/// The nearest codes for a scale.
fn codes(group: &[f32; 16], scale: f32) -> Group {
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    // A scale too small for a reciprocal is one of zeros.
    let inverse = if inverse.is_finite() { inverse } else { 0.0 };
    group.map(|value| (value * inverse).round_ties_even().clamp(-32.0, 31.0) as i8)
}

/// Of a few sets of codes, the one that some multiple of comes closest to the group; returns that multiple.
fn best_scale(group: &[f32; 16]) -> f32 {
    let largest =
        group.iter().fold(0.0f32, |largest, value| if value.abs() > largest.abs() { *value } else { largest });
    let mut best = (0.0f64, 0.0f32);
    for tenths in TRIED {
        // Least squares: for codes q the best scale is (w·q) / (q·q), and it takes (w·q)² / (q·q) off the error.
        let codes = codes(group, -largest / (32.0 + f32::from(tenths) / 10.0));
        let dot: f64 = group.iter().zip(codes).map(|(w, q)| f64::from(*w) * f64::from(q)).sum();
        let square: f64 = codes.iter().map(|q| f64::from(*q) * f64::from(*q)).sum();
        if square > 0.0 && dot * dot / square > best.0 {
            best = (dot * dot / square, (dot / square) as f32);
        }
    }
    best.1
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn round_trip(kind: RowType, row: &[f32]) -> Vec<f32> {
        let mut bytes = Vec::new();
        encode_row(kind, row, &mut bytes).unwrap();
        assert_eq!(bytes.len(), kind.row_bytes(row.len()), "{kind}");
        let mut values = vec![0.0; row.len()];
        kind.widen_row(&bytes, &mut values);
        values
    }

    proptest! {
        #[test]
        fn rounding_is_as_fine_as_the_type_promises(row in prop::collection::vec(-4f32..4.0, 512), e in -30i32..20) {
            let row: Vec<f32> = row.into_iter().map(|value| value * 2f32.powi(e)).collect();
            let largest = row.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
            // Half a 127th of the largest; of Q6_K's 32 steps one, for a value as large as the largest with the other
            // sign, and what rounding the scales adds. Below f16's normal numbers, its scales are too coarse to say.
            for (kind, step) in [(RowType::F32, 0.0), (RowType::Int8, 0.51 / 127.0), (RowType::Q6K, 1.3 / 31.0)] {
                if kind == RowType::Q6K && !(-8..8).contains(&e) {
                    continue;
                }
                for (value, rounded) in row.iter().zip(round_trip(kind, &row)) {
                    prop_assert!((value - rounded).abs() <= step * largest, "{kind}: {value} became {rounded}");
                }
            }
        }

        #[test]
        fn an_int8_row_that_is_stored_again_keeps_its_values(row in prop::collection::vec(-4f32..4.0, 1..100)) {
            let once = round_trip(RowType::Int8, &row);
            for (a, b) in once.iter().zip(round_trip(RowType::Int8, &once)) {
                prop_assert!((a - b).abs() <= a.abs() * f32::EPSILON, "{a} became {b}");
            }
        }
    }

    #[test]
    fn rows_of_zeros_stay_zeros_and_what_f16_cannot_hold_is_refused() {
        for kind in [RowType::Int8, RowType::Q6K, RowType::Q8_0, RowType::F16, RowType::Bf16] {
            assert_eq!(round_trip(kind, &[0.0; 256]), [0.0; 256], "{kind}");
        }
        let mut row = [1.0; 32];
        row[7] = 65_520.0;
        assert_eq!(encode_row(RowType::F16, &row, &mut Vec::new()), Err(7));
    }
}
