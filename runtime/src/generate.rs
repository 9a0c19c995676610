//! Generation: prompt, then token after token until the model stops, the limit is reached or the context is full.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use crate::draft::Drafter;
use crate::model::{Candidate, ModelError, Session};
use crate::sampling::{Sampler, Sampling};

/// When to stop, and how to choose tokens.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Number of the sequence, for the random numbers: 0 for a single one.
    pub sequence: u64,
    /// Most tokens to generate; `None` leaves it to the model and the context.
    pub limit: Option<usize>,
    /// Tokens that end the text; they are not part of it.
    pub stop: Vec<u32>,
    /// Most tokens to draft at a time, 0 for none. Drafting changes how long a text takes and nothing else.
    pub draft: usize,
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// The model produced a stop token.
    Stop,
    /// The limit is reached or the context is full.
    Length,
    /// The caller asked for it.
    Cancelled,
}

impl StopReason {
    /// One lower-case word.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Cancelled => "cancelled",
        }
    }
}

/// What was generated, and how long it took.
#[derive(Clone, Debug)]
pub struct Generated {
    /// The new tokens, without the stop token.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub reason: StopReason,
    /// Tokens of the prompt that had to be worked through.
    pub prompt_tokens: usize,
    /// Time for the prompt, until the first token could be chosen.
    pub prompt_time: Duration,
    /// Time for all forward passes after the prompt, and to choose tokens after them.
    pub decode_time: Duration,
    /// Tokens that those passes read and that are part of the text.
    pub decode_tokens: usize,
    /// Tokens that were drafted.
    pub drafted: usize,
    /// Drafted tokens that turned out right.
    pub accepted: usize,
}

impl Generated {
    /// Prompt tokens per second; `None` if there was no time to measure.
    #[must_use]
    pub fn prompt_speed(&self) -> Option<f64> {
        speed(self.prompt_tokens, self.prompt_time)
    }

    /// Generated tokens per second; `None` if there was nothing to measure.
    #[must_use]
    pub fn decode_speed(&self) -> Option<f64> {
        speed(self.decode_tokens, self.decode_time)
    }
}

fn speed(tokens: usize, time: Duration) -> Option<f64> {
    (tokens > 0 && !time.is_zero()).then(|| tokens as f64 / time.as_secs_f64())
}

/// Works through `prompt` after what the session already holds, and generates. `on_token` gets each token as soon as it is
/// chosen and ends generation by returning [`ControlFlow::Break`].
///
/// Afterwards the session holds the prompt and the new tokens but the last, which nothing has followed yet.
///
/// # Errors
/// If the prompt is empty, holds a token that the model does not have, or does not fit into the context.
pub fn generate(
    session: &mut Session,
    prompt: &[u32],
    options: &GenerateOptions,
    on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
) -> Result<Generated, ModelError> {
    let start = Instant::now();
    session.read(prompt)?;
    let mut text = Vec::with_capacity(session.context() + 1);
    text.extend_from_slice(session.tokens());
    let mut sampler = Sampler::new(options.sampling, options.sequence, &text);
    let mut drafter = Drafter::new(options.draft.min(session.exploration() - 1));
    let mut generated = Generated {
        tokens: Vec::new(),
        reason: StopReason::Length,
        prompt_tokens: prompt.len(),
        prompt_time: Duration::ZERO,
        decode_time: Duration::ZERO,
        decode_tokens: 0,
        drafted: 0,
        accepted: 0,
    };
    let left = |generated: &Generated| options.limit.map_or(usize::MAX, |limit| limit - generated.tokens.len());
    if left(&generated) == 0 {
        generated.prompt_time = start.elapsed();
        return Ok(generated);
    }
    let mut next = sampler.sample(session.candidates(sampler.wanted(0), sampler.penalised()));
    generated.prompt_time = start.elapsed();
    let mut ahead = Ahead::default();
    while let Some(token) = next {
        if options.stop.contains(&token) {
            generated.reason = StopReason::Stop;
            break;
        }
        generated.tokens.push(token);
        text.push(token);
        sampler.accept(token);
        if on_token(token).is_break() {
            generated.reason = StopReason::Cancelled;
            break;
        }
        if left(&generated) == 0 || text.len() > session.context() {
            break;
        }
        let begin = Instant::now();
        if ahead.accepts(token) {
            generated.accepted += 1;
        } else {
            ahead.settle(session, &mut drafter);
            ahead.explore(session, &sampler, &mut drafter, &text, left(&generated))?;
            generated.drafted += ahead.read.len() - 1;
        }
        next = sampler.sample(&mut ahead.found[ahead.at]);
        generated.decode_time += begin.elapsed();
        generated.decode_tokens += 1;
    }
    ahead.settle(session, &mut drafter);
    Ok(generated)
}

/// What has been read ahead of the text: a token of it, and drafts of those that follow.
#[derive(Debug, Default)]
struct Ahead {
    read: Vec<u32>,
    /// Candidates after each token that has been read.
    found: Vec<Vec<Candidate>>,
    /// Drafts that have been accepted.
    at: usize,
    /// Tokens that may need their logits because a penalty changes them, in rising order.
    always: Vec<u32>,
}

impl Ahead {
    /// Whether the next token of the text has been read already.
    fn accepts(&mut self, token: u32) -> bool {
        let accepted = self.read.get(self.at + 1) == Some(&token);
        self.at += usize::from(accepted);
        accepted
    }

    /// Makes the session forget the drafts that were wrong.
    fn settle(&mut self, session: &mut Session, drafter: &mut Drafter) {
        if !self.read.is_empty() {
            session.keep(self.at + 1);
            drafter.judge(self.at);
            self.read.clear();
        }
    }

    /// Reads the last token of `text`, and what the drafter expects after it if that is not more than the text has `left`.
    fn explore(
        &mut self,
        session: &mut Session,
        sampler: &Sampler,
        drafter: &mut Drafter,
        text: &[u32],
        left: usize,
    ) -> Result<(), ModelError> {
        // The last token of the text is never read, so there is nothing to draft for it.
        let drafts = drafter.propose(text, (left - 1).min(session.room() - 1));
        self.read.extend(text.last());
        self.read.extend(drafts);
        self.always.clear();
        self.always.extend(sampler.penalised());
        if sampler.penalises() {
            self.always.extend(drafts);
            self.always.sort_unstable();
            self.always.dedup();
        }
        self.at = 0;
        session.explore(&self.read, |ahead| sampler.wanted(ahead), &self.always, &mut self.found)
    }
}
