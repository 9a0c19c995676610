//! Many sequences through the layers at once: one pass over the weights serves them all.
//!
//! Every step of a forward pass treats its tokens independently, except attention, where a token sees the positions of
//! its own sequence. So what a sequence becomes does not depend on what else is in the batch, bit for bit.

use std::ops::Range;
use std::sync::Arc;

use ternion_tuner::Workers;

use super::forward::{Forward, Scratch};
use super::rope::RopeTable;
use super::{Model, ModelError, Observer, Sequence};
use crate::team::Team;

/// What one sequence reads in a pass.
#[derive(Debug)]
pub struct Part<'a> {
    /// The sequence.
    pub sequence: &'a mut Sequence,
    /// Its next tokens, at least one.
    pub tokens: &'a [u32],
}

/// Runs passes of up to [`capacity`](Self::capacity) tokens on a model.
#[derive(Debug)]
pub struct Batch {
    model: Arc<Model>,
    team: Arc<Team>,
    capacity: usize,
    rope: RopeTable,
    scratch: Scratch,
    /// Tokens of the last pass.
    n: usize,
}

impl Batch {
    /// For passes of up to `capacity ≥ 1` tokens in all, run by `team`.
    ///
    /// # Errors
    /// If memory runs out.
    pub fn new(model: Arc<Model>, team: Arc<Team>, capacity: usize) -> Result<Self, ModelError> {
        let capacity = capacity.max(1);
        let rope = RopeTable::new(model.config().head_dim / 2, model.frequencies.len());
        let scratch = Scratch::new(&model, capacity, team.threads())?;
        Ok(Self { model, team, capacity, rope, scratch, n: 0 })
    }

    /// The model.
    #[must_use]
    pub const fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// The threads.
    #[must_use]
    pub const fn team(&self) -> &Arc<Team> {
        &self.team
    }

    /// Most tokens of a pass.
    #[must_use]
    pub const fn capacity(&self) -> usize {
        self.capacity
    }

    /// Reads each part's tokens into its sequence, all in one pass over the weights.
    ///
    /// # Errors
    /// If a part has no tokens, too many for its context, or one that the model does not have; or if there are more than
    /// [`capacity`](Self::capacity) in all; or if memory runs out. Nothing has been read then.
    pub fn forward(&mut self, parts: &mut [Part<'_>]) -> Result<(), ModelError> {
        self.forward_observed(parts, &mut None)
    }

    /// [`forward`](Self::forward) while `observer`, if there is one, watches the layers. The results are the same bits;
    /// they take longer.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_observed(
        &mut self,
        parts: &mut [Part<'_>],
        observer: &mut Option<&mut dyn Observer>,
    ) -> Result<(), ModelError> {
        let (mut n, config) = (0, self.model.config());
        for part in &*parts {
            part.sequence.check(part.tokens, config.vocabulary)?;
            n += part.tokens.len();
        }
        if n > self.capacity {
            return Err(ModelError::BatchTooLarge { tokens: n, capacity: self.capacity });
        }
        self.n = n;
        if n == 0 {
            return Ok(());
        }
        for Part { sequence, tokens } in &mut *parts {
            sequence.reserve(tokens.len())?;
        }
        let forward = Forward { model: &self.model, team: &self.team, n };
        forward.run(parts, &mut self.rope, &mut self.scratch, observer);
        let mut end = 0;
        for Part { sequence, tokens } in parts {
            end += tokens.len();
            sequence.tokens.extend_from_slice(tokens);
            sequence.state.clear();
            sequence.state.extend_from_slice(forward.states(end - 1..end, &mut self.scratch));
        }
        Ok(())
    }

    /// The final norm's output for some tokens of the last pass, `[tokens, hidden]`. Tokens count in order of the parts.
    ///
    /// # Panics
    /// If the pass did not have so many.
    pub fn states(&mut self, tokens: Range<usize>) -> &[f32] {
        assert!(tokens.end <= self.n, "states: tokens of the last pass");
        Forward { model: &self.model, team: &self.team, n: self.n }.states(tokens, &mut self.scratch)
    }

    /// Makes `sequence` forget all that it has read in the last pass but `kept` tokens, at least one. The pass was its
    /// alone.
    ///
    /// # Panics
    /// If it has not read so many.
    pub fn keep(&mut self, sequence: &mut Sequence, kept: usize) {
        assert!((1..=self.n).contains(&kept), "keep: tokens of the last pass");
        if kept < self.n {
            sequence.truncate(sequence.tokens.len() - (self.n - kept));
            self.n = kept;
            sequence.state.extend_from_slice(self.states(kept - 1..kept));
        }
    }
}
