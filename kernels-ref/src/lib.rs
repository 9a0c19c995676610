//! The exact scalar reference of every operation that ternion runs.
//!
//! A fast kernel is right if and only if it returns the same bits as the function here. That only helps if this crate
//! is obviously right itself, so nothing clever ever enters it: no `unsafe`, no threads, no instruction sets, one loop
//! per formula.
//!
//! # Integers
//!
//! A BitNet b1.58 projection is `y = Σ T·a`, `T ∈ {−1, 0, 1}`, `a ∈ [−127, 127]` ([`quantize`], [`gemm`]). The sum is
//! an integer with `|y| ≤ 127·K`, exact in `i32` for every K a model has, so order does not matter and equality is the
//! only acceptable comparison.
//!
//! # Floating point
//!
//! Everything else is `f32` with one fixed order ([`lanes`]): sums run in sixteen lanes (element `i` in lane
//! `i mod 16`) that one pairwise tree adds up, every multiply that feeds an add is a fused multiply-add, and no
//! function of the operating system's libm is called ([`math`]; rotary tables use the `libm` crate in `f64`). `+ − × ÷ √`
//! and `mul_add` are correctly rounded by IEEE 754, so the same order gives the same bits on every machine.
//!
//! # Vocabulary
//!
//! `m` is the number of output rows of a matrix, `k` the length of a row, `n` the number of tokens. Matrices are
//! `[m, k]`, row-major. Token batches are `[n, k]`, one token after the other.

#![forbid(unsafe_code)]

pub mod activation;
pub mod attention;
pub mod gemm;
pub mod gumbel;
pub mod head;
pub mod lanes;
pub mod math;
pub mod matrix;
pub mod norm;
pub mod quantize;
pub mod random;
pub mod rope;
pub mod softmax;
pub mod trit;
pub mod widen;

pub use matrix::{InvalidCode, PackedMatrix, TernaryMatrix};
pub use quantize::{Absmean, QuantizedRow};
pub use random::SplitMix64;
pub use trit::Trit;
