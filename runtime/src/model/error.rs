//! What can go wrong with loading a model and running it. Each message is one line: what, where, and what to do.

use std::io;

use ternion_compiler::{CompileError, Cpu, Family};
use ternion_kernels_ref::InvalidCode;

use crate::formats::{FormatError, Projection};

/// Why a model could not be loaded or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The model's files.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// A kernel could not be compiled.
    #[error("cannot compile a kernel: {0}")]
    Compile(#[from] CompileError),
    /// There are no schedules for a shape.
    #[error("no {family} kernel for rows of {k} weights on this CPU ({cpu}): choose another kernel family")]
    NoKernel {
        /// The family that was asked for.
        family: Family,
        /// Length of a row.
        k: usize,
        /// The CPU.
        cpu: Cpu,
    },
    /// The choice of kernels leaves out a shape, or has two layouts for it.
    #[error("the kernels chosen do not fit a {m}x{k} matrix: choose them again for this model")]
    NotChosen {
        /// Rows.
        m: usize,
        /// Length of a row.
        k: usize,
    },
    /// A matrix is not of the shape that the configuration says.
    #[error("layer {layer}, {projection}: {bytes} bytes are no {m}x{k} matrix: prepare the model again")]
    Shape {
        /// The layer.
        layer: usize,
        /// The matrix.
        projection: Projection,
        /// Rows expected.
        m: usize,
        /// Length of a row expected.
        k: usize,
        /// Bytes found.
        bytes: usize,
    },
    /// A tensor outside the layers is not of the shape that the configuration says.
    #[error("the model's {what} has {found} elements instead of {expected}: prepare the model again")]
    Elements {
        /// The tensor.
        what: &'static str,
        /// Elements found.
        found: usize,
        /// Elements expected.
        expected: usize,
    },
    /// A weight that is none.
    #[error("layer {layer}, {projection}: {source}: the model is damaged, prepare it again")]
    Code {
        /// The layer.
        layer: usize,
        /// The matrix.
        projection: Projection,
        /// Where.
        source: InvalidCode,
    },
    /// There is not enough memory for the weights.
    #[error("no memory for {bytes} bytes of weights ({source}): close other programs or choose a smaller model")]
    Memory {
        /// Bytes that were asked for.
        bytes: usize,
        /// What the system said.
        source: io::Error,
    },
    /// There is not enough memory for keys and values.
    #[error("no memory for the KV cache of {tokens} tokens ({source}): choose a shorter context or an int8 cache")]
    CacheMemory {
        /// Tokens of the sequence.
        tokens: usize,
        /// What the system said.
        source: io::Error,
    },
    /// A context length that the model does not have.
    #[error("a context of {asked} tokens: this model has 1 to {limit}")]
    Context {
        /// What was asked for.
        asked: usize,
        /// The model's context.
        limit: usize,
    },
    /// More tokens than the context holds.
    #[error(
        "the prompt has {tokens} tokens after {used} others, but the context holds {context}: shorten it or raise the context"
    )]
    PromptTooLong {
        /// New tokens.
        tokens: usize,
        /// Tokens in the context already.
        used: usize,
        /// Tokens that it holds.
        context: usize,
    },
    /// More tokens than a batch has room for.
    #[error("{tokens} tokens in one pass: this batch holds {capacity}, read them in several passes")]
    BatchTooLarge {
        /// Tokens of all parts.
        tokens: usize,
        /// Tokens that a pass may have.
        capacity: usize,
    },
    /// Nothing to run.
    #[error("the prompt is empty: give at least one token")]
    EmptyPrompt,
    /// A token that the model does not have.
    #[error("token {token} is outside the model's vocabulary of {vocabulary}: it comes from another tokenizer")]
    NoSuchToken {
        /// The token.
        token: u32,
        /// Tokens of the model.
        vocabulary: usize,
    },
}
