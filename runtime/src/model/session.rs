//! One sequence on a model: what has been read so far and what comes next.

use std::sync::Arc;

use ternion_tuner::Workers;

use super::forward::{Forward, Scratch};
use super::kv_cache::KvCache;
use super::rope::RopeTable;
use super::{KvType, Model, ModelError, Observer};
use crate::team::Team;

/// Tokens of a prompt that go through the layers together, unless asked otherwise: enough to share the reading of
/// weights, few enough for their activations to stay in a cache.
pub const DEFAULT_CHUNK: usize = 64;

/// How a session runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionOptions {
    /// Precision of the KV cache.
    pub kv: KvType,
    /// Longest sequence in tokens; the model's own context if `None`.
    pub context: Option<usize>,
    /// Tokens of a prompt that go through the layers together, at least 1. Results do not depend on it.
    pub chunk: usize,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self { kv: KvType::default(), context: None, chunk: DEFAULT_CHUNK }
    }
}

/// A sequence of tokens on a model.
#[derive(Debug)]
pub struct Session {
    model: Arc<Model>,
    team: Arc<Team>,
    context: usize,
    chunk: usize,
    tokens: Vec<u32>,
    cache: KvCache,
    rope: RopeTable,
    scratch: Scratch,
    /// Logits after the last token.
    logits: Vec<f32>,
    /// Logits of a whole chunk, if they have been asked for.
    all_logits: Vec<f32>,
}

impl Session {
    /// An empty sequence on `model`, run by `team`.
    ///
    /// # Errors
    /// If the context is longer than the model's, or memory runs out.
    pub fn new(model: Arc<Model>, team: Arc<Team>, options: &SessionOptions) -> Result<Self, ModelError> {
        let config = model.config();
        let context = options.context.unwrap_or(config.context);
        if context == 0 || context > config.context {
            return Err(ModelError::Context { asked: context, limit: config.context });
        }
        let chunk = options.chunk.clamp(1, context);
        Ok(Self {
            context,
            chunk,
            tokens: Vec::with_capacity(context),
            cache: KvCache::new(options.kv, config.layers, config.kv_heads, config.head_dim),
            rope: RopeTable::new(config.head_dim / 2, model.frequencies.len()),
            scratch: Scratch::new(&model, chunk, team.threads())?,
            logits: vec![0.0; config.vocabulary],
            all_logits: Vec::new(),
            model,
            team,
        })
    }

    /// Reads more tokens; returns the logits after the last.
    ///
    /// # Errors
    /// If there are none, too many for the context, or one that the model does not have. Nothing has been read then.
    pub fn prefill(&mut self, tokens: &[u32]) -> Result<&[f32], ModelError> {
        self.check(tokens)?;
        let chunks = tokens.len().div_ceil(self.chunk);
        for (i, chunk) in tokens.chunks(self.chunk).enumerate() {
            let logits = (i + 1 == chunks).then_some(&mut self.logits);
            let forward = Forward { model: &self.model, team: &self.team, start: self.tokens.len(), n: chunk.len() };
            forward.run(chunk, &mut self.cache, &mut self.rope, &mut self.scratch, &mut None);
            if let Some(logits) = logits {
                forward.logits(chunk.len() - 1, &mut self.scratch, logits);
            }
            self.tokens.extend(chunk);
        }
        Ok(&self.logits)
    }

    /// As [`prefill`](Self::prefill), but `visit` sees the logits after every token, with the token's position.
    ///
    /// # Errors
    /// As [`prefill`](Self::prefill).
    pub fn prefill_all(&mut self, tokens: &[u32], visit: &mut dyn FnMut(usize, &[f32])) -> Result<(), ModelError> {
        self.prefill_observed(tokens, visit, &mut None)
    }

    /// As [`prefill_all`](Self::prefill_all), while `observer`, if there is one, watches the layers. The logits are the
    /// same bits; they take longer.
    ///
    /// # Errors
    /// As [`prefill`](Self::prefill).
    pub fn prefill_observed(
        &mut self,
        tokens: &[u32],
        visit: &mut dyn FnMut(usize, &[f32]),
        observer: &mut Option<&mut dyn Observer>,
    ) -> Result<(), ModelError> {
        self.check(tokens)?;
        let vocabulary = self.model.config().vocabulary;
        self.all_logits.resize(self.chunk.min(tokens.len()) * vocabulary, 0.0);
        for chunk in tokens.chunks(self.chunk) {
            let start = self.tokens.len();
            let forward = Forward { model: &self.model, team: &self.team, start, n: chunk.len() };
            forward.run(chunk, &mut self.cache, &mut self.rope, &mut self.scratch, observer);
            let logits = &mut self.all_logits[..chunk.len() * vocabulary];
            forward.logits(0, &mut self.scratch, logits);
            self.tokens.extend(chunk);
            for (i, logits) in logits.chunks_exact(vocabulary).enumerate() {
                visit(start + i, logits);
            }
            self.logits.copy_from_slice(&logits[(chunk.len() - 1) * vocabulary..]);
        }
        Ok(())
    }

    /// Reads more tokens without any logits; `visit` sees the last norm's output, `[hidden]`, after every token, with the
    /// token's position. It is what embeddings are made of.
    ///
    /// # Errors
    /// As [`prefill`](Self::prefill).
    pub fn prefill_hidden(&mut self, tokens: &[u32], visit: &mut dyn FnMut(usize, &[f32])) -> Result<(), ModelError> {
        self.check(tokens)?;
        let hidden = self.model.config().hidden;
        for chunk in tokens.chunks(self.chunk) {
            let start = self.tokens.len();
            let forward = Forward { model: &self.model, team: &self.team, start, n: chunk.len() };
            forward.run(chunk, &mut self.cache, &mut self.rope, &mut self.scratch, &mut None);
            let rows = forward.last_norm(0, &mut self.scratch).chunks_exact(hidden);
            rows.enumerate().for_each(|(i, row)| visit(start + i, row));
            self.tokens.extend(chunk);
        }
        Ok(())
    }

    /// Reads one token; returns the logits after it.
    ///
    /// # Errors
    /// If the context is full or the model does not have the token.
    pub fn step(&mut self, token: u32) -> Result<&[f32], ModelError> {
        self.prefill(&[token])
    }

    fn check(&self, tokens: &[u32]) -> Result<(), ModelError> {
        if tokens.is_empty() {
            return Err(ModelError::EmptyPrompt);
        }
        if tokens.len() > self.room() {
            let (used, context) = (self.tokens.len(), self.context);
            return Err(ModelError::PromptTooLong { tokens: tokens.len(), used, context });
        }
        let vocabulary = self.model.config().vocabulary;
        match tokens.iter().find(|token| **token as usize >= vocabulary) {
            Some(token) => Err(ModelError::NoSuchToken { token: *token, vocabulary }),
            None => Ok(()),
        }
    }

    /// Logits after the last token; all zero if there is none.
    #[must_use]
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// The logits after the last token, for a sampler to change.
    pub fn logits_mut(&mut self) -> &mut [f32] {
        &mut self.logits
    }

    /// The tokens read so far.
    #[must_use]
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Number of tokens read so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether nothing has been read.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
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

    /// The model.
    #[must_use]
    pub const fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Forgets all but the first `len` tokens. The logits are those of the last token read until the next is.
    pub fn truncate(&mut self, len: usize) {
        self.tokens.truncate(len);
        self.cache.release(self.tokens.len());
    }

    /// Keeps as much of what has been read as `tokens` begins with, at least one token less than all of it; returns how
    /// many of `tokens` need not be read again. The next turn of a chat reads only what is new this way.
    pub fn reuse(&mut self, tokens: &[u32]) -> usize {
        let common = self.tokens.iter().zip(tokens).take_while(|(old, new)| old == new).count();
        let common = common.min(tokens.len().saturating_sub(1));
        self.truncate(common);
        common
    }
}
