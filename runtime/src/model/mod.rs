//! The forward pass of decoder-only transformers with ternary projections.
//!
//! - [`Model`]: a checkpoint's weights, repacked for this machine, bound to compiled kernels.
//! - [`Session`]: one sequence on it: KV cache, scratch, prompts in chunks, decoding token by token.
//! - [`reference`]: the same forward pass on `kernels-ref` alone, which every session must equal bit for bit.

mod activations;
mod error;
mod forward;
mod general;
mod kernels;
pub mod kv_cache;
pub(crate) mod low_rank;
mod observe;
pub mod reference;
mod rope;
mod session;
mod weights;

pub use error::ModelError;
pub use kernels::{KernelChoice, problems};
pub use kv_cache::KvType;
pub use observe::Observer;
pub use session::{DEFAULT_CHUNK, Session, SessionOptions};
pub use weights::{LoadProgress, LoadReport, Model};
