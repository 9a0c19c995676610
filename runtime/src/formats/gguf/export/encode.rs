//! Trits into GGUF's ternary types: the inverse of reading them.

use half::f16;
use ternion_compiler::layout::transpose_codes;
use ternion_kernels_ref::PackedMatrix;

use super::TernaryType;
use crate::formats::gguf::ternary::I2S_TAIL;

/// Encodes a matrix whose shape fits the type, `factor` being what its trits stand for.
pub(super) fn encode(kind: TernaryType, matrix: PackedMatrix<'_>, factor: f32) -> Vec<u8> {
    let d = f16::from_f32(factor).to_le_bytes();
    match kind {
        TernaryType::Tq2_0 => {
            let mut bytes = Vec::with_capacity(matrix.bytes().len() / 64 * 66);
            for codes in matrix.bytes().as_chunks::<64>().0 {
                let mut block = [0; 64];
                planes::<32>(&codes[..32], &mut block[..32], false);
                planes::<32>(&codes[32..], &mut block[32..], false);
                bytes.extend(block);
                bytes.extend(d);
            }
            bytes
        }
        TernaryType::Tq1_0 => {
            let mut bytes = Vec::with_capacity(matrix.bytes().len() / 64 * 54);
            for codes in matrix.bytes().as_chunks::<64>().0 {
                bytes.extend(base_3(codes));
                bytes.extend(d);
            }
            bytes
        }
        TernaryType::I2S => {
            let mut bytes = vec![0; matrix.bytes().len()];
            for (codes, block) in matrix.bytes().chunks_exact(32).zip(bytes.chunks_exact_mut(32)) {
                planes::<32>(codes, block, true);
            }
            // bitnet.cpp leaves the rest of the tail as it was; zeros make the file the same each time.
            bytes.extend(factor.to_le_bytes());
            bytes.resize(bytes.len() + I2S_TAIL - 4, 0);
            bytes
        }
        TernaryType::F16 => {
            let values = [-factor, 0.0, factor].map(|value| f16::from_f32(value).to_le_bytes());
            let code = |at: usize| matrix.code(at / matrix.k(), at % matrix.k());
            (0..matrix.m() * matrix.k()).flat_map(|at| values[usize::from(code(at).min(2))]).collect()
        }
    }
}

/// `N` canonical bytes into `N` bytes of four planes.
fn planes<const N: usize>(codes: &[u8], block: &mut [u8], reversed: bool) {
    for (j, bytes) in block.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        let mut planes = [0, 1, 2, 3].map(|n| codes[n * (N / 4) + j]);
        if reversed {
            planes.reverse();
        }
        *bytes = transpose_codes(planes);
    }
}

/// The 52 bytes of a TQ1_0 block.
fn base_3(codes: &[u8; 64]) -> [u8; 52] {
    let code = |at: usize| codes[at / 4] >> (2 * (at % 4)) & 3;
    let mut bytes = [0; 52];
    for (range, start, trits) in [(0..32, 0, 5), (32..48, 160, 5), (48..52, 240, 4)] {
        let width = range.len();
        for (i, byte) in bytes[range].iter_mut().enumerate() {
            // Five trits; where there are only four, the last is 0.
            let value = (0..5)
                .fold(0u16, |value, n| value * 3 + if n < trits { u16::from(code(start + n * width + i)) } else { 0 });
            *byte = (value * 256).div_ceil(243) as u8;
        }
    }
    bytes
}
