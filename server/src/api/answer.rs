//! What chat and plain completions have in common: from prompts to an answer, all at once or piece by piece.

use std::sync::Arc;

use axum::Json;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::settings::{Settings, submit};
use super::stream::{Encode, collect, respond};
use super::{ApiError, Client, identity};
use crate::engine::{Done, Event, TokenLogprob};
use crate::{App, Served};

/// How an interface writes its answers. A choice is an object without `index` and `finish_reason`.
pub(super) trait Form: Send + Unpin + 'static {
    /// What ids begin with.
    const ID: &'static str;
    /// What a whole answer calls itself, and a piece of a stream.
    const OBJECTS: [&'static str; 2];

    /// The choice of a whole text.
    fn whole(&mut self, at: usize, text: &str, logprobs: Option<&[TokenLogprob]>) -> Value;

    /// The choice that comes before the first piece of a text.
    fn first(&self) -> Option<Value>;

    /// The choice of a piece of text `at`.
    fn piece(&mut self, at: usize, text: &str, logprobs: Option<&[TokenLogprob]>) -> Value;

    /// The choice that ends a text.
    fn last(&self) -> Value;
}

/// Generates what the settings ask for each of the prompts.
///
/// # Errors
/// If a prompt cannot be read, the queue is full, or a text fails before anything has been sent.
pub(super) async fn generate(
    app: Arc<App>,
    served: Arc<Served>,
    client: Client,
    settings: Settings,
    prompts: &[Vec<u32>],
    form: impl Form,
) -> Result<Response, ApiError> {
    let mut jobs = Vec::new();
    for prompt in prompts {
        jobs.extend(settings.jobs(&app, &served, &client, prompt)?);
    }
    let texts = jobs.len();
    let events = submit(&served, &client, jobs)?;
    let mut answer = Answer::new(&app, served, &settings, prompts, texts, form);
    if settings.stream {
        return respond(app, events, answer).await;
    }
    let texts = collect(events).await?;
    let choices: Vec<Value> = texts
        .into_iter()
        .enumerate()
        .map(|(at, text)| {
            let logprobs = answer.logprobs.then_some(&text.logprobs[..]);
            let choice = answer.form.whole(at, &text.text, logprobs);
            answer.choice(at, choice, text.done)
        })
        .collect();
    Ok(Json(answer.object(0, choices, Some(answer.usage()))).into_response())
}

/// What all objects of an answer have in common.
struct Answer<F> {
    form: F,
    id: String,
    created: u64,
    served: Arc<Served>,
    logprobs: bool,
    include_usage: bool,
    prompt_tokens: usize,
    completion_tokens: usize,
    /// Tokens of each prompt that none of its texts had to read.
    cached: Vec<usize>,
    /// Whether each text's first object has been sent.
    begun: Vec<bool>,
}

impl<F: Form> Answer<F> {
    fn new(app: &App, served: Arc<Served>, settings: &Settings, prompts: &[Vec<u32>], texts: usize, form: F) -> Self {
        let (id, created) = identity(F::ID, app);
        let lengths: Vec<usize> = prompts.iter().map(Vec::len).collect();
        Self {
            form,
            id,
            created,
            served,
            logprobs: settings.logprobs(),
            include_usage: settings.include_usage,
            prompt_tokens: lengths.iter().sum(),
            completion_tokens: 0,
            cached: lengths,
            begun: vec![false; texts],
        }
    }

    /// An object: the whole (0) or a piece (1).
    fn object(&self, which: usize, choices: Vec<Value>, usage: Option<Value>) -> Value {
        let mut object = json!({
            "id": self.id, "object": F::OBJECTS[which], "created": self.created, "model": self.served.name,
            "system_fingerprint": self.served.fingerprint, "choices": choices,
        });
        if let Some(usage) = usage {
            object["usage"] = usage;
        }
        object
    }

    /// Puts the number of its text into a choice, and how that ended if it has.
    fn choice(&mut self, at: usize, mut choice: Value, done: Option<Done>) -> Value {
        choice["index"] = at.into();
        choice["finish_reason"] = done.map(|done| done.finish.name()).into();
        if let Some(done) = done {
            self.completion_tokens += done.completion_tokens;
            let of_prompt = at * self.cached.len() / self.begun.len();
            self.cached[of_prompt] = self.cached[of_prompt].min(done.cached_tokens);
        }
        choice
    }

    fn piece(&mut self, at: usize, choice: Value, done: Option<Done>) -> Value {
        let choice = self.choice(at, choice, done);
        self.object(1, vec![choice], self.include_usage.then_some(Value::Null))
    }

    fn usage(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached.iter().sum::<usize>()},
        })
    }
}

impl<F: Form> Encode for Answer<F> {
    fn encode(&mut self, at: usize, event: Event) -> Vec<Value> {
        let mut objects = Vec::new();
        if !std::mem::replace(&mut self.begun[at], true)
            && let Some(first) = self.form.first()
        {
            objects.push(self.piece(at, first, None));
        }
        match event {
            Event::Text { text, logprobs } => {
                let piece = self.form.piece(at, &text, self.logprobs.then_some(&logprobs[..]));
                objects.push(self.piece(at, piece, None));
            }
            Event::Done(done) => {
                let last = self.form.last();
                objects.push(self.piece(at, last, Some(done)));
            }
            Event::Embedding(_) | Event::Failed(_) => {}
        }
        objects
    }

    fn finish(&mut self) -> Vec<Value> {
        let last = || self.object(1, Vec::new(), Some(self.usage()));
        self.include_usage.then(last).into_iter().collect()
    }
}
