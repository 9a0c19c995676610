//! `POST /v1/completions`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};
use ternion_runtime::text::Tokenizer;
use tokio::task::block_in_place;

use super::settings::Settings;
use super::stream::{Encode, Merged, collect, respond};
use super::{ApiError, Client, JsonBody, Usage, identity};
use crate::engine::{Event, TokenLogprob};
use crate::{App, Served};

/// Most alternatives to a token, as this older interface has it.
const MOST_ALTERNATIVES: usize = 5;

pub(super) async fn complete(
    State(app): State<Arc<App>>,
    client: Client,
    JsonBody(fields): JsonBody,
) -> Result<Response, ApiError> {
    let served = app.model(&fields)?;
    served.generates()?;
    let logprobs = fields.integer("logprobs", 0..=MOST_ALTERNATIVES)?;
    let (settings, prompts) = block_in_place(|| {
        let settings = Settings::read(&app, &served, &fields, logprobs)?;
        let encode = |served: &Served, text: &str| served.encode(text, served.tokenizer.adds_bos());
        Ok::<_, ApiError>((settings, served.texts(&app, "prompt", fields.required("prompt")?, encode)?))
    })?;
    let mut jobs = Vec::new();
    for prompt in &prompts {
        jobs.extend(settings.jobs(&app, &served, client, prompt)?);
    }
    let receivers = served.engine.submit(jobs)?;
    let (id, created) = identity("cmpl", &app);
    let usage = Usage { prompt: prompts.iter().map(Vec::len).sum(), ..Usage::default() };
    let offsets = vec![0; receivers.len()];
    let mut answer = Answer {
        id,
        created,
        served,
        usage,
        logprobs: logprobs.is_some(),
        include_usage: settings.include_usage,
        offsets,
    };
    let events = Merged::new(receivers);
    if settings.stream {
        return respond(app, events, answer).await;
    }
    let texts = collect(events).await?;
    let choices: Vec<Value> = texts
        .into_iter()
        .enumerate()
        .map(|(at, text)| {
            answer.usage.add(text.done);
            answer.choice(at, &text.text, &text.logprobs, text.done.map(|done| done.finish.name()))
        })
        .collect();
    Ok(Json(answer.object(&Value::from(choices), Some(&answer.usage.json()))).into_response())
}

/// What all objects of an answer have in common.
struct Answer {
    id: String,
    created: u64,
    served: Arc<Served>,
    usage: Usage,
    logprobs: bool,
    include_usage: bool,
    /// Characters of each text so far.
    offsets: Vec<usize>,
}

impl Answer {
    fn object(&self, choices: &Value, usage: Option<&Value>) -> Value {
        let mut object = json!({
            "id": self.id, "object": "text_completion", "created": self.created, "model": self.served.name,
            "system_fingerprint": self.served.fingerprint, "choices": choices,
        });
        if let Some(usage) = usage {
            object["usage"] = usage.clone();
        }
        object
    }

    fn choice(&mut self, at: usize, text: &str, logprobs: &[TokenLogprob], finish: Option<&str>) -> Value {
        let logprobs = self.logprobs.then(|| logprobs_json(&self.served.tokenizer, logprobs, &mut self.offsets[at]));
        json!({"index": at, "text": text, "logprobs": logprobs, "finish_reason": finish})
    }
}

fn logprobs_json(tokenizer: &Tokenizer, logprobs: &[TokenLogprob], offset: &mut usize) -> Value {
    let text = |token: u32| String::from_utf8_lossy(tokenizer.token_bytes(token)).into_owned();
    let (mut tokens, mut own, mut top, mut offsets) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for one in logprobs {
        let token = text(one.token);
        offsets.push(*offset);
        *offset += token.chars().count();
        tokens.push(token);
        own.push(one.logprob);
        let alternatives = one.top.iter().map(|(token, logprob)| (text(*token), Value::from(*logprob)));
        top.push(Value::from(alternatives.collect::<Map<_, _>>()));
    }
    json!({"tokens": tokens, "token_logprobs": own, "top_logprobs": top, "text_offset": offsets})
}

impl Encode for Answer {
    fn encode(&mut self, at: usize, event: Event) -> Vec<Value> {
        let choice = match event {
            Event::Text { text, logprobs } => self.choice(at, &text, &logprobs, None),
            Event::Done(done) => {
                self.usage.add(Some(done));
                self.choice(at, "", &[], Some(done.finish.name()))
            }
            Event::Embedding(_) | Event::Failed(_) => return Vec::new(),
        };
        let usage = self.include_usage.then_some(Value::Null);
        vec![self.object(&json!([choice]), usage.as_ref())]
    }

    fn finish(&mut self) -> Vec<Value> {
        let usage = self.usage.json();
        self.include_usage.then(|| self.object(&json!([]), Some(&usage))).into_iter().collect()
    }
}
