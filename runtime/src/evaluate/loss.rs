//! The loss on a text: the mean of `−ln p(token | tokens before it in its window)`.

use std::ops::ControlFlow;

use ternion_kernels_ref::head::{argmax, log_probability};

use super::EvaluateError;
use crate::model::{ModelError, Observer, Session};

/// How a text is cut into windows. Window `i` begins at token `i · stride`; of its tokens those are predicted that no
/// window before has held, each from all tokens of the window before it. A window's first token is never predicted, so
/// with `stride = context` one token per window is left out, and with less every token but the text's first is predicted,
/// from at least `context − stride` others (unless the text begins later).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Windows {
    /// Tokens in a window, at least 2.
    pub context: usize,
    /// Tokens from the beginning of one window to that of the next, from 1 to `context`.
    pub stride: usize,
}

/// A token that has been predicted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scored {
    /// Its place in the text.
    pub index: usize,
    /// The token.
    pub token: u32,
    /// `ln p`.
    pub log_probability: f64,
    /// Whether no other token is more likely (of equals, the lowest id counts).
    pub greedy: bool,
}

impl Scored {
    /// What `logits` say about the token that follows.
    pub(super) fn new(index: usize, token: u32, logits: &[f32]) -> Self {
        let greedy = argmax(logits) == Some(token as usize);
        Self { index, token, log_probability: log_probability(logits, token as usize), greedy }
    }
}

/// The loss on a text.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Loss {
    /// Tokens that have been predicted.
    pub tokens: usize,
    /// `−Σ ln p` in order of position.
    pub total: f64,
    /// Tokens that no other was more likely than.
    pub greedy: usize,
}

impl Loss {
    fn add(&mut self, scored: &Scored) {
        self.tokens += 1;
        self.total -= scored.log_probability;
        self.greedy += usize::from(scored.greedy);
    }

    /// Mean in nats per token.
    #[must_use]
    pub fn mean(&self) -> f64 {
        self.total / self.tokens as f64
    }

    /// `e^mean`
    #[must_use]
    pub fn perplexity(&self) -> f64 {
        libm::exp(self.mean())
    }
}

/// Predicts the tokens of a text. `visit` sees each that has been predicted, in order; `progress` is told how many tokens
/// of the text are done, window by window, and can stop: the loss is then that of the part. With an observer all windows
/// are read completely, their tokens seen as often as they are read.
///
/// # Errors
/// If there is too little text, the windows make no sense or are longer than the session's context, or a token is none
/// of the model's.
pub fn loss(
    session: &mut Session,
    tokens: &[u32],
    windows: Windows,
    mut observer: Option<&mut dyn Observer>,
    visit: &mut dyn FnMut(&Scored),
    progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<Loss, EvaluateError> {
    let Windows { context, stride } = windows;
    if context < 2 || stride == 0 || stride > context {
        return Err(EvaluateError::Windows { context, stride });
    }
    if context > session.context() {
        return Err(ModelError::Context { asked: context, limit: session.context() }.into());
    }
    if tokens.len() < 2 {
        return Err(EvaluateError::TooShort { tokens: tokens.len() });
    }
    // The last token of a window is only predicted, so no session ever looks at it.
    let vocabulary = session.model().config().vocabulary;
    if let Some(token) = tokens.iter().find(|token| **token as usize >= vocabulary) {
        return Err(ModelError::NoSuchToken { token: *token, vocabulary }.into());
    }
    let mut loss = Loss::default();
    let mut add = |scored: Scored| {
        loss.add(&scored);
        visit(&scored);
    };
    let (mut start, mut done) = (0, 0);
    while done < tokens.len() {
        let window = &tokens[start..tokens.len().min(start + context)];
        // The first token to be predicted; none if the window is a single one.
        let first = done.max(start + 1) - start;
        session.truncate(0);
        if observer.is_some() {
            let mut see = |position: usize, logits: &[f32]| {
                if let Some(next) = window.get(position + 1).filter(|_| position + 1 >= first) {
                    add(Scored::new(start + position + 1, *next, logits));
                }
            };
            session.prefill_observed(window, &mut see, &mut observer)?;
        } else {
            predict(session, window, first, &mut |index, scored| add(Scored { index: start + index, ..scored }))?;
        }
        done = start + window.len();
        start += stride;
        if progress(done).is_break() {
            break;
        }
    }
    Ok(loss)
}

/// Predicts `tokens[first..]`, each from all before it; `first` is at least 1. What the session holds already of
/// `tokens[..first]` is not read again. Logits are computed only where they are needed.
pub(super) fn predict(
    session: &mut Session,
    tokens: &[u32],
    first: usize,
    visit: &mut dyn FnMut(usize, Scored),
) -> Result<(), ModelError> {
    let Some(next) = tokens.get(first) else { return Ok(()) };
    let known = session.reuse(&tokens[..first]);
    let logits = session.prefill(&tokens[known..first])?;
    visit(first, Scored::new(first, *next, logits));
    let rest = &tokens[first..tokens.len() - 1];
    if rest.is_empty() {
        return Ok(());
    }
    session.prefill_all(rest, &mut |position, logits| {
        visit(position + 1, Scored::new(position + 1, tokens[position + 1], logits));
    })
}
