//! Model files: what is in them, as configuration, typed tensors and texts, whatever format they have.
//!
//! [`Checkpoint`] opens a model: a Hugging Face directory (`config.json`, safetensors in any of the dresses that
//! ternary weights come in), a GGUF file, or a prepared `.tern` file, which [`tern::write`] makes from any of them. Nothing that a
//! file says is believed before it is checked: a damaged, foreign or malicious file gives a [`FormatError`].

mod bytes;
mod checkpoint;
mod config;
mod config_file;
mod dress;
pub(crate) mod error;
pub mod export_hf;
mod family;
mod generation;
pub mod gguf;
mod hf;
mod rows;
pub(crate) mod safetensors;
pub mod synth;
mod tensor;
pub mod tern;

pub use bytes::Bytes;
pub use checkpoint::{Checkpoint, OpenOptions};
pub use config::{Activation, Biases, LayerNorm, ModelConfig, Pooling, Projection, RopeScaling, SlidingAttention};
pub use error::FormatError;
pub use generation::GenerationDefaults;
pub use rows::RowType;
pub use tensor::{FloatMatrix, FloatType, TernaryTensor};
