//! A text on a model: its tokens, their keys and values, and what the model makes of the last of them.

use super::kv_cache::KvCache;
use super::{KvType, Model, ModelError};

/// One text. It does nothing by itself: a [`Batch`](super::Batch) reads tokens into any number of sequences at once.
#[derive(Debug)]
pub struct Sequence {
    context: usize,
    pub(super) tokens: Vec<u32>,
    pub(super) cache: KvCache,
    /// The final norm's output for the last token; empty as long as there is none.
    pub(super) state: Vec<f32>,
}

impl Sequence {
    /// An empty sequence of at most `context` tokens, the model's own limit if `None`.
    ///
    /// # Errors
    /// If the context is longer than the model's.
    pub fn new(model: &Model, kv: KvType, context: Option<usize>) -> Result<Self, ModelError> {
        let config = model.config();
        let context = context.unwrap_or(config.context);
        if context == 0 || context > config.context {
            return Err(ModelError::Context { asked: context, limit: config.context });
        }
        let cache = KvCache::new(kv, config.layers, config.kv_heads, config.head_dim);
        // Both grow to what they will ever hold before the first token, so that reading allocates nothing but pages.
        let (tokens, state) = (Vec::with_capacity(context), Vec::with_capacity(config.hidden));
        Ok(Self { context, tokens, cache, state })
    }

    /// The tokens read so far.
    #[must_use]
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The final norm's output for the last token, `[hidden]`: what the head turns into logits. Empty if nothing has
    /// been read since the start or the last [`truncate`](Self::truncate).
    #[must_use]
    pub fn state(&self) -> &[f32] {
        &self.state
    }

    /// Tokens that the context holds.
    #[must_use]
    pub const fn context(&self) -> usize {
        self.context
    }

    /// Tokens that still fit.
    #[must_use]
    pub fn room(&self) -> usize {
        self.context - self.tokens.len()
    }

    /// Bytes of the KV cache so far.
    #[must_use]
    pub fn kv_bytes(&self) -> usize {
        self.cache.bytes()
    }

    /// Makes room for keys and values of `more` tokens.
    pub(super) fn reserve(&mut self, more: usize) -> Result<(), ModelError> {
        let reserved = self.cache.reserve(self.tokens.len()..self.tokens.len() + more);
        reserved.map_err(|source| ModelError::CacheMemory { tokens: self.tokens.len() + more, source })
    }

    /// Forgets all but the first `len` tokens.
    pub fn truncate(&mut self, len: usize) {
        if len < self.tokens.len() {
            self.tokens.truncate(len);
            self.state.clear();
        }
        self.cache.release(self.tokens.len());
    }

    /// A sequence of its own that has read the first `len` tokens of this one, or all if there are fewer. They share
    /// keys and values as long as both go on behind them.
    #[must_use]
    pub fn fork(&self, len: usize) -> Self {
        let len = len.min(self.tokens.len());
        let mut tokens = Vec::with_capacity(self.context);
        tokens.extend_from_slice(&self.tokens[..len]);
        let state = if len == self.tokens.len() { self.state.clone() } else { Vec::with_capacity(self.state.len()) };
        Self { context: self.context, tokens, cache: self.cache.fork(len), state }
    }

    /// Keeps as much of what has been read as `tokens` begins with, at least one token less than all of it; returns how
    /// many of `tokens` need not be read again. The next turn of a chat reads only what is new this way.
    pub fn reuse(&mut self, tokens: &[u32]) -> usize {
        let common = self.tokens.iter().zip(tokens).take_while(|(old, new)| old == new).count();
        let common = common.min(tokens.len().saturating_sub(1));
        self.truncate(common);
        common
    }

    /// Whether `tokens` can be read next.
    ///
    /// # Errors
    /// If there are none, too many for the context, or one that the model does not have.
    pub fn check(&self, tokens: &[u32], vocabulary: usize) -> Result<(), ModelError> {
        if tokens.is_empty() {
            return Err(ModelError::EmptyPrompt);
        }
        if tokens.len() > self.room() {
            let (used, context) = (self.tokens.len(), self.context);
            return Err(ModelError::PromptTooLong { tokens: tokens.len(), used, context });
        }
        match tokens.iter().find(|token| **token as usize >= vocabulary) {
            Some(token) => Err(ModelError::NoSuchToken { token: *token, vocabulary }),
            None => Ok(()),
        }
    }
}
