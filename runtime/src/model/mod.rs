//! The forward pass of decoder-only transformers with ternary projections.
//!
//! - [`Model`]: a checkpoint's weights, repacked for this machine, bound to compiled kernels.
//! - [`Sequence`]: a text: its tokens and their KV cache.
//! - [`Batch`]: one pass over the weights for the next tokens of any number of sequences.
//! - [`Head`]: from what a pass leaves behind to logits, or provably to the largest of them.
//! - [`Session`]: a sequence with a batch of its own: prompts in chunks, decoding token by token.
//! - [`reference`]: the same forward pass on `kernels-ref` alone, which every session must equal bit for bit.

mod activations;
mod attention;
mod batch;
mod draw;
mod error;
mod forward;
mod general;
mod head;
mod kernels;
pub mod kv_cache;
pub(crate) mod low_rank;
mod observe;
mod ready;
pub mod reference;
mod rope;
mod sequence;
mod session;
mod sparse;
mod steps;
mod weights;

pub use batch::{Batch, Part};
pub use draw::Draw;
pub use error::ModelError;
pub use head::{Candidate, Head, HeadScratch, Query, Wanted};
pub use kernels::{KernelChoice, held, problems, request, sparse_shape, start_request};
pub use kv_cache::KvType;
pub use observe::Observer;
pub use ready::ready_form;
pub use sequence::Sequence;
pub use session::{DEFAULT_CHUNK, Session, SessionOptions};
pub use weights::{LoadProgress, LoadReport, Model};
