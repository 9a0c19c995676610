//! Text in and out of a model: tokenizer, incremental detokenisation, chat templates.

mod chat;
mod detokenize;
mod python_json;
pub(crate) mod sentencepiece;
mod tokenizer;
pub(crate) mod vocabulary;

pub use chat::{ChatError, ChatTemplate, Message};
pub use detokenize::Detokenizer;
pub use tokenizer::{Tokenizer, TokenizerConfig, TokenizerError};
