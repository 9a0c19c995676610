//! Model files: what is in them, as configuration, typed tensors and texts, whatever format they have.
//!
//! [`Checkpoint`] opens a model: a Hugging Face directory (`config.json`, safetensors in any of the dresses that
//! ternary weights come in) or a prepared `.tern` file, which [`tern::write`] makes from any of them. Nothing that a
//! file says is believed before it is checked: a damaged, foreign or malicious file gives a [`FormatError`].

mod bytes;
mod checkpoint;
mod config;
mod dress;
mod error;
mod family;
mod generation;
mod hf;
mod safetensors;
mod tensor;
pub mod tern;

pub use bytes::Bytes;
pub use checkpoint::Checkpoint;
pub use config::{Activation, LayerNorm, ModelConfig, Projection};
pub use error::FormatError;
pub use generation::GenerationDefaults;
pub use tensor::{FloatMatrix, FloatType, TernaryTensor};
