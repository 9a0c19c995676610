//! The floating-point steps of a forward pass, as fast as this CPU allows and bit for bit what `kernels-ref` returns.
//!
//! Everything is plain Rust over groups of sixteen lanes ([`lanes::Lanes`]), compiled once for each of a few feature
//! levels; the level is chosen when a function is called for the first time. Each step has a body that is inlined into
//! all levels, so that a test can also run the level without any feature, where a fused multiply-add is a library call.
//!
//! Nothing here allocates. Lengths are the caller's business and asserted.

/// Compiles each function for every feature level. A function is its name and the body that the levels share.
macro_rules! for_every_level {
    ($($(#[$meta:meta])* $vis:vis fn $name:ident($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)? = $body:path;)*)
    => {$(
        $(#[$meta])*
        #[multiversion::multiversion(targets(
            "x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma+bmi2+f16c",
            "x86_64+avx2+fma+bmi2+f16c",
            "aarch64+neon",
        ))]
        $vis fn $name($($argument: $type),*) $(-> $result)? {
            $body($($argument),*)
        }
    )*};
}

mod attention;
mod bounds;
mod gumbel;
mod half;
mod head;
mod lanes;
mod norm;
mod projection;
mod rope;
mod screen;

pub use attention::{
    CachedBlock, F16_ROW, F32_ROW, INT8_KEYS_ALONG, INT8_ROW, INT8_VALUES_ALONG, QuantizedQueries, Running,
    attend_block_f16, attend_block_f32, attend_block_int8, finish_attention, merge_attention, quantize_query,
};
pub(crate) use bounds::SLACK;
pub use bounds::{RowBounds, SCREEN_BLOCK, StateBounds, intervals, largest};
pub use gumbel::{gumbel_bounds, perturb};
pub use half::{f16_to_f32, f32_to_f16, narrow_f16, widen_f16};
pub use head::dot_rows;
pub use norm::{quantize, rms_norm, rms_norm_in_place};
pub use projection::{Sums, add_dequantized, dequantize, gated, gated_floats};
pub use rope::rotate;
pub use screen::{
    SCREEN_ROWS, SCREEN_STEP, ScreenForm, ScreenState, StateForm, dot_screen, screen_form, screen_state,
    screen_step_bytes,
};
pub(crate) use screen::{pack_screen, unpack_screen, unpacks_fast};

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    /// Floats of all magnitudes whose products and sums of squares stay finite, zeros and subnormals among them.
    pub(super) fn floats(len: usize) -> impl Strategy<Value = Vec<f32>> {
        let float = prop_oneof![
            4 => -10f32..10.0,
            1 => (-1f32..1.0, -30i32..30).prop_map(|(x, e)| x * 2f32.powi(e)),
            1 => prop::sample::select(vec![0.0, -0.0, 1e-40, -1e-44, f32::MIN_POSITIVE, 1e12, -1e12]),
        ];
        prop::collection::vec(float, len)
    }

    /// Floats of one magnitude.
    pub(super) fn floats_within(len: usize, limit: f32) -> impl Strategy<Value = Vec<f32>> {
        prop::collection::vec(prop_oneof![9 => -limit..limit, 1 => Just(0.0)], len)
    }

    #[track_caller]
    pub(super) fn assert_same_bits(found: &[f32], expected: &[f32]) {
        assert_eq!(found.len(), expected.len());
        for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
            assert_eq!(found.to_bits(), expected.to_bits(), "element {i}: {found:e}, expected {expected:e}");
        }
    }
}
