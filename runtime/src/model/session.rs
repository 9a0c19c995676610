//! One text on a model: what has been read so far and what comes next.

use std::sync::Arc;

use super::{Batch, Candidate, HeadScratch, KvType, Model, ModelError, Observer, Part, Query, Sequence, Wanted};
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

/// A sequence of tokens with everything that it takes to run it.
#[derive(Debug)]
pub struct Session {
    sequence: Sequence,
    batch: Batch,
    head: HeadScratch,
    /// Logits after the last token, or room for them.
    logits: Vec<f32>,
    /// Candidates to be the next token.
    candidates: Vec<Candidate>,
}

impl Session {
    /// An empty sequence on `model`, run by `team`.
    ///
    /// # Errors
    /// If the context is longer than the model's, or memory runs out.
    pub fn new(model: Arc<Model>, team: Arc<Team>, options: &SessionOptions) -> Result<Self, ModelError> {
        let sequence = Sequence::new(&model, options.kv, options.context)?;
        let batch = Batch::new(model, team, options.chunk.clamp(1, sequence.context()))?;
        let (head, logits, candidates) = (HeadScratch::default(), Vec::new(), Vec::new());
        Ok(Self { sequence, batch, head, logits, candidates })
    }

    /// Reads more tokens.
    ///
    /// # Errors
    /// If there are none, too many for the context, or one that the model does not have. Nothing has been read then.
    pub fn read(&mut self, tokens: &[u32]) -> Result<(), ModelError> {
        self.sequence.check(tokens, self.batch.model().config().vocabulary)?;
        for tokens in tokens.chunks(self.batch.capacity()) {
            self.batch.forward(&mut [Part { sequence: &mut self.sequence, tokens }])?;
        }
        Ok(())
    }

    /// Reads more tokens; returns the logits after the last.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn prefill(&mut self, tokens: &[u32]) -> Result<&[f32], ModelError> {
        self.read(tokens)?;
        Ok(self.logits())
    }

    /// As [`prefill`](Self::prefill), but `visit` sees the logits after every token, with the token's position.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn prefill_all(&mut self, tokens: &[u32], visit: &mut dyn FnMut(usize, &[f32])) -> Result<(), ModelError> {
        self.prefill_observed(tokens, visit, &mut None)
    }

    /// As [`prefill_all`](Self::prefill_all), while `observer`, if there is one, watches the layers. The logits are the
    /// same bits; they take longer.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn prefill_observed(
        &mut self,
        tokens: &[u32],
        visit: &mut dyn FnMut(usize, &[f32]),
        observer: &mut Option<&mut dyn Observer>,
    ) -> Result<(), ModelError> {
        let vocabulary = self.batch.model().config().vocabulary;
        self.sequence.check(tokens, vocabulary)?;
        let mut logits = vec![0.0; self.batch.capacity().min(tokens.len()) * vocabulary];
        for tokens in tokens.chunks(self.batch.capacity()) {
            let start = self.sequence.tokens().len();
            self.batch.forward_observed(&mut [Part { sequence: &mut self.sequence, tokens }], observer)?;
            let logits = &mut logits[..tokens.len() * vocabulary];
            let (model, team) = (Arc::clone(self.batch.model()), Arc::clone(self.batch.team()));
            model.head().logits(&team, self.batch.states(0..tokens.len()), logits);
            for (i, logits) in logits.chunks_exact(vocabulary).enumerate() {
                visit(start + i, logits);
            }
        }
        Ok(())
    }

    /// Reads more tokens without any logits; `visit` sees the final norm's output, `[hidden]`, after every token, with
    /// the token's position. It is what embeddings are made of.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn prefill_hidden(&mut self, tokens: &[u32], visit: &mut dyn FnMut(usize, &[f32])) -> Result<(), ModelError> {
        let hidden = self.batch.model().config().hidden;
        self.sequence.check(tokens, self.batch.model().config().vocabulary)?;
        for tokens in tokens.chunks(self.batch.capacity()) {
            let start = self.sequence.tokens().len();
            self.batch.forward(&mut [Part { sequence: &mut self.sequence, tokens }])?;
            let states = self.batch.states(0..tokens.len()).chunks_exact(hidden);
            states.enumerate().for_each(|(i, state)| visit(start + i, state));
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

    /// Logits after the last token, computed now; all zero if nothing has been read.
    pub fn logits(&mut self) -> &[f32] {
        let model = self.batch.model();
        self.logits.resize(model.config().vocabulary, 0.0);
        match self.sequence.state() {
            [] => self.logits.fill(0.0),
            state => model.head().logits(self.batch.team(), state, &mut self.logits),
        }
        &self.logits
    }

    /// Candidates to be the next token, in rising order of tokens: those that are `wanted`, those in `always` (in rising
    /// order), and perhaps others. Empty if nothing has been read.
    pub fn candidates(&mut self, wanted: Wanted, always: &[u32]) -> &mut Vec<Candidate> {
        let state = self.sequence.state();
        let queries = state.chunks(state.len().max(1)).map(|state| Query { state, wanted, always });
        self.candidates.clear();
        let found = &mut std::slice::from_mut(&mut self.candidates)[..queries.len()];
        self.batch.model().head().candidates(self.batch.team(), queries, &mut self.head, found);
        &mut self.candidates
    }

    /// Most tokens that [`explore`](Self::explore) reads.
    #[must_use]
    pub const fn exploration(&self) -> usize {
        self.batch.capacity()
    }

    /// Reads `tokens` in one pass, and puts the [`candidates`](Self::candidates) after each of them into `found`, which
    /// grows as it has to; after the first, what is `wanted(0)`. What turns out to have been wrong is taken back by [`keep`](Self::keep).
    ///
    /// # Errors
    /// As [`read`](Self::read), or if there are more than [`exploration`](Self::exploration).
    pub fn explore(
        &mut self,
        tokens: &[u32],
        wanted: impl Fn(usize) -> Wanted + Copy + Sync,
        always: &[u32],
        found: &mut Vec<Vec<Candidate>>,
    ) -> Result<(), ModelError> {
        self.batch.forward(&mut [Part { sequence: &mut self.sequence, tokens }])?;
        found.resize_with(found.len().max(tokens.len()), Vec::new);
        let (model, team) = (Arc::clone(self.batch.model()), Arc::clone(self.batch.team()));
        let states = self.batch.states(0..tokens.len()).chunks_exact(model.config().hidden);
        let queries = states.enumerate().map(|(at, state)| Query { state, wanted: wanted(at), always });
        model.head().candidates(&team, queries, &mut self.head, &mut found[..tokens.len()]);
        Ok(())
    }

    /// Keeps the first `kept ≥ 1` tokens of the last [`explore`](Self::explore).
    ///
    /// # Panics
    /// If it did not read so many.
    pub fn keep(&mut self, kept: usize) {
        self.batch.keep(&mut self.sequence, kept);
    }

    /// The sequence.
    #[must_use]
    pub const fn sequence(&self) -> &Sequence {
        &self.sequence
    }

    /// The tokens read so far.
    #[must_use]
    pub fn tokens(&self) -> &[u32] {
        self.sequence.tokens()
    }

    /// Number of tokens read so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tokens().len()
    }

    /// Whether nothing has been read.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tokens().is_empty()
    }

    /// Tokens that the context holds.
    #[must_use]
    pub const fn context(&self) -> usize {
        self.sequence.context()
    }

    /// Tokens that still fit.
    #[must_use]
    pub fn room(&self) -> usize {
        self.sequence.room()
    }

    /// Bytes of the KV cache so far.
    #[must_use]
    pub fn kv_bytes(&self) -> usize {
        self.sequence.kv_bytes()
    }

    /// The model.
    #[must_use]
    pub const fn model(&self) -> &Arc<Model> {
        self.batch.model()
    }

    /// As [`Sequence::truncate`].
    pub fn truncate(&mut self, len: usize) {
        self.sequence.truncate(len);
    }

    /// As [`Sequence::reuse`].
    pub fn reuse(&mut self, tokens: &[u32]) -> usize {
        self.sequence.reuse(tokens)
    }
}
