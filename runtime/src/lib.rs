//! Loads BitNet b1.58 models and runs them on compiled ternary kernels.
//!
//! - [`embedding`]: vectors of texts.
//! - [`evaluate`]: loss on a text, multiple choice, sparsity.
//! - [`formats`]: model files, from a Hugging Face directory to the prepared `.tern` file, as one [`formats::Checkpoint`].
//! - [`model`]: the forward pass: weights bound to compiled kernels, sessions, and the reference they must equal.
//! - [`lora`]: low-rank adapters beside the ternary products.
//! - [`ops`]: every floating-point step, vectorised, with the very bits of `kernels-ref`.
//! - [`generate`]: the loop from prompt to text, and [`draft`], which lets it take several tokens in one pass.
//! - [`text`]: tokenizer, incremental detokenisation, chat templates.
//!
//! Results are exact: the tokens are a function of the model, the stated precision of head and KV cache, the prompt,
//! the sampling settings and the seed. No kernel, layout, thread count or batch size changes a bit of them.

pub mod draft;
pub mod embedding;
pub mod evaluate;
pub mod formats;
pub mod generate;
pub mod lora;
pub mod memory;
pub mod model;
pub mod ops;
pub mod sampling;
mod screen;
pub mod team;
pub mod text;
pub mod verify;
