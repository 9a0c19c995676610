//! Loads BitNet b1.58 models and runs them on compiled ternary kernels.
//!
//! - [`formats`]: model files, from a Hugging Face directory to the prepared `.tern` file, as one [`formats::Checkpoint`].
//! - [`ops`]: every floating-point step, vectorised, with the very bits of `kernels-ref`.
//! - [`text`]: tokenizer, incremental detokenisation, chat templates.
//!
//! Results are exact: the tokens are a function of the model, the stated precision of head and KV cache, the prompt,
//! the sampling settings and the seed. No kernel, layout, thread count or batch size changes a bit of them.

pub mod formats;
pub mod memory;
pub mod ops;
pub mod team;
pub mod text;
