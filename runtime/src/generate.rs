//! Generation: prompt, then token after token until the model stops, the limit is reached or the context is full.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use crate::model::{ModelError, Session};
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
    /// Time for all forward passes after the prompt.
    pub decode_time: Duration,
    /// Number of those passes.
    pub decode_steps: usize,
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
        speed(self.decode_steps, self.decode_time)
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
    let mut generated = Generated {
        tokens: Vec::new(),
        reason: StopReason::Length,
        prompt_tokens: prompt.len(),
        prompt_time: start.elapsed(),
        decode_time: Duration::ZERO,
        decode_steps: 0,
    };
    let mut sampler = Sampler::new(options.sampling, options.sequence, session.tokens());
    while options.limit.is_none_or(|limit| generated.tokens.len() < limit) {
        let begin = Instant::now();
        let candidates = session.candidates(sampler.wanted(), sampler.penalised());
        let Some(token) = sampler.sample(candidates) else { break };
        let time = if generated.tokens.is_empty() { &mut generated.prompt_time } else { &mut generated.decode_time };
        *time += begin.elapsed();
        if options.stop.contains(&token) {
            generated.reason = StopReason::Stop;
            break;
        }
        generated.tokens.push(token);
        sampler.accept(token);
        if on_token(token).is_break() {
            generated.reason = StopReason::Cancelled;
            break;
        }
        let wanted = options.limit.is_none_or(|limit| generated.tokens.len() < limit);
        if !wanted || session.room() == 0 {
            break;
        }
        let begin = Instant::now();
        session.read(&[token])?;
        generated.decode_time += begin.elapsed();
        generated.decode_steps += 1;
    }
    Ok(generated)
}
