//! How good a model is, and how sparse: loss on a text, multiple choice, statistics of weights and activations.
//!
//! Logits are the same bits with any kernel, number of threads and chunk; what is computed from them here has one fixed
//! order ([`ternion_kernels_ref::head::log_probability`], sums in order of position), so all figures are too.

mod choices;
mod loss;
mod statistics;

pub use choices::{ChoiceScore, Question, QuestionScore, Summary, read_questions, score, summarise};
pub use loss::{Loss, Scored, Windows, loss};
pub use statistics::{ActivationCounts, LayerActivations, WeightCounts, weights};

use std::path::PathBuf;

use crate::model::ModelError;
use crate::text::TokenizerError;

/// Why a model could not be evaluated.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvaluateError {
    /// The model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A text that cannot be encoded.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// Too little text.
    #[error("the text has {tokens} tokens: at least 2 are needed to predict one from another")]
    TooShort {
        /// Tokens, BOS included.
        tokens: usize,
    },
    /// Windows that cannot cover a text.
    #[error("windows of {context} tokens, {stride} apart: at least 2 tokens, and a stride of 1 to the window's length")]
    Windows {
        /// Length of a window.
        context: usize,
        /// Distance of their beginnings.
        stride: usize,
    },
    /// A file of questions.
    #[error("{}, line {line}: {problem}", path.display())]
    Question {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// A question that cannot be scored.
    #[error("question {question}, choice {choice}: {problem}")]
    Choice {
        /// The question, from 1.
        question: usize,
        /// The choice, from 0.
        choice: usize,
        /// Why not.
        problem: String,
    },
}
