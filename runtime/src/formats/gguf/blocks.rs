//! Quantised embeddings and heads become float matrices.
//!
//! Every weight is computed in `f32` as ggml defines it, once, when the matrix is read. The result is `f16` if that
//! holds every weight exactly, else `f32`: never an approximation of what the file says.

use std::ops::Range;
use std::thread;

use ternion_kernels_ref::widen::f16_to_f32;

use super::types::TensorType;
use crate::formats::{Bytes, FloatMatrix, FloatType};

/// Reads a `[rows, columns]` matrix of any type that is not ternary; `bytes` are as long as that needs.
///
/// # Errors
/// The type, if it cannot hold floats.
pub(super) fn float_matrix(
    kind: TensorType,
    rows: usize,
    columns: usize,
    bytes: Bytes,
) -> Result<FloatMatrix, TensorType> {
    let decode: fn(&[u8], &mut [f32]) = match kind {
        TensorType::Float(dtype) => return Ok(FloatMatrix { rows, columns, dtype, bytes }),
        TensorType::Q4_0 => q4_0,
        TensorType::Q8_0 => q8_0,
        TensorType::Q4K => q4_k,
        TensorType::Q6K => q6_k,
        TensorType::Tq1_0 | TensorType::Tq2_0 | TensorType::I2S => return Err(kind),
    };
    let (block, block_bytes) = kind.block();
    let row_bytes = columns / block * block_bytes;
    let row = |row: usize, values: &mut [f32]| {
        let source = &bytes[row * row_bytes..][..row_bytes];
        for (source, values) in source.chunks_exact(block_bytes).zip(values.chunks_exact_mut(block)) {
            decode(source, values);
        }
    };
    let exact = in_parallel(rows, |rows| {
        let mut values = vec![0.0; columns];
        rows.into_iter().all(|at| {
            row(at, &mut values);
            values.iter().all(|value| half::f16::from_f32(*value).to_f32().to_bits() == value.to_bits())
        })
    });
    let dtype = if exact.into_iter().all(|exact| exact) { FloatType::F16 } else { FloatType::F32 };
    let parts = in_parallel(rows, |rows| {
        let mut values = vec![0.0; columns];
        let mut bytes = Vec::with_capacity(rows.len() * columns * dtype.bytes());
        for at in rows {
            row(at, &mut values);
            match dtype {
                FloatType::F16 => bytes.extend(values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes())),
                _ => bytes.extend(values.iter().flat_map(|value| value.to_le_bytes())),
            }
        }
        bytes
    });
    Ok(FloatMatrix { rows, columns, dtype, bytes: Bytes::from(parts.concat()) })
}

/// Calls `work` for parts of `0..rows` on all cores; returns the results in order.
fn in_parallel<T: Send>(rows: usize, work: impl Fn(Range<usize>) -> T + Sync) -> Vec<T> {
    let workers = thread::available_parallelism().map_or(1, usize::from);
    let part = rows.div_ceil(workers).max(1);
    thread::scope(|scope| {
        let parts: Vec<_> = (0..rows)
            .step_by(part)
            .map(|start| {
                let work = &work;
                scope.spawn(move || work(start..rows.min(start + part)))
            })
            .collect();
        let join = |part: thread::ScopedJoinHandle<'_, T>| part.join().unwrap_or_else(|p| std::panic::resume_unwind(p));
        parts.into_iter().map(join).collect()
    })
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16_to_f32(u16::from_le_bytes([block[at], block[at + 1]]))
}

/// 32 weights: f16 `d`, 32 × i8; `d · q`.
fn q8_0(block: &[u8], values: &mut [f32]) {
    let d = half_at(block, 0);
    for (value, q) in values.iter_mut().zip(&block[2..]) {
        *value = d * f32::from(i8::from_le_bytes([*q]));
    }
}

/// 32 weights: f16 `d`, 16 bytes with weights i and i + 16; `d · (q − 8)`.
fn q4_0(block: &[u8], values: &mut [f32]) {
    let d = half_at(block, 0);
    let (low, high) = values.split_at_mut(16);
    for ((q, low), high) in block[2..].iter().zip(low).zip(high) {
        *low = d * (f32::from(q & 15) - 8.0);
        *high = d * (f32::from(q >> 4) - 8.0);
    }
}

/// 256 weights in 8 groups of 32: f16 `d`, f16 `dmin`, 12 bytes of 6-bit scales and minima, 128 bytes of 4-bit codes;
/// `(d · scale) · q − dmin · min`.
fn q4_k(block: &[u8], values: &mut [f32]) {
    let (d, dmin, packed) = (half_at(block, 0), half_at(block, 2), &block[4..16]);
    for (group, values) in values.chunks_exact_mut(32).enumerate() {
        let (scale, min) = match group {
            0..4 => (packed[group] & 63, packed[group + 4] & 63),
            _ => {
                (packed[group + 4] & 15 | packed[group - 4] >> 6 << 4, packed[group + 4] >> 4 | packed[group] >> 6 << 4)
            }
        };
        let (d, min) = (d * f32::from(scale), dmin * f32::from(min));
        let codes = &block[16 + group / 2 * 32..][..32];
        for (value, code) in values.iter_mut().zip(codes) {
            let q = if group % 2 == 0 { code & 15 } else { code >> 4 };
            *value = d * f32::from(q) - min;
        }
    }
}

/// 256 weights in 16 groups of 16: 128 bytes of low nibbles, 64 of upper bits, 16 × i8 scales, f16 `d`;
/// `(d · scale) · (q − 32)`.
fn q6_k(block: &[u8], values: &mut [f32]) {
    let (low, high, scales, d) = (&block[..128], &block[128..192], &block[192..208], half_at(block, 208));
    for (at, value) in values.iter_mut().enumerate() {
        let (half, within) = (at / 128, at % 128);
        let nibbles = low[half * 64 + within % 64];
        let nibble = if within < 64 { nibbles & 15 } else { nibbles >> 4 };
        let upper = high[half * 32 + within % 32] >> (2 * (within / 32)) & 3;
        let q = i16::from(nibble | upper << 4) - 32;
        let scale = f32::from(i8::from_le_bytes([scales[at / 16]]));
        *value = d * scale * f32::from(q);
    }
}
