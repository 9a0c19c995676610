//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use ternion_runtime::text::{Message, Tokenizer};
use tokio::task::block_in_place;

use super::settings::{MOST_ALTERNATIVES, Settings};
use super::stream::{Encode, Merged, collect, respond};
use super::{ApiError, Client, Fields, JsonBody, Usage, identity};
use crate::engine::{Event, TokenLogprob};
use crate::{App, Served};

/// Most messages of a conversation.
const MOST_MESSAGES: usize = 1024;

pub(super) async fn complete(
    State(app): State<Arc<App>>,
    client: Client,
    JsonBody(fields): JsonBody,
) -> Result<Response, ApiError> {
    let served = app.model(&fields)?;
    served.generates()?;
    let alternatives = fields.integer("top_logprobs", 0..=MOST_ALTERNATIVES)?;
    let logprobs = fields.boolean("logprobs")?.then(|| alternatives.unwrap_or(0));
    if alternatives.is_some() && logprobs.is_none() {
        return Err(ApiError::field("top_logprobs", "needs logprobs to be true"));
    }
    let (settings, prompt) = block_in_place(|| {
        let settings = Settings::read(&app, &served, &fields, logprobs)?;
        let messages = messages(&app, &served, &fields)?;
        let rendered = served.template.render(&messages, true);
        let rendered = rendered.map_err(|error| ApiError::field("messages", error.to_string()))?;
        // The template writes its own BOS.
        Ok::<_, ApiError>((settings, served.encode(&rendered, false)?))
    })?;
    let events = Merged::new(served.engine.submit(settings.jobs(&app, &served, client, &prompt)?)?);
    let (id, created) = identity("chatcmpl", &app);
    let usage = Usage { prompt: prompt.len(), ..Usage::default() };
    let mut answer = Answer {
        id,
        created,
        served,
        usage,
        logprobs: logprobs.is_some(),
        include_usage: settings.include_usage,
        begun: vec![false; settings.n],
    };
    if settings.stream {
        return respond(app, events, answer).await;
    }
    let texts = collect(events).await?;
    let choices: Vec<Value> = texts
        .into_iter()
        .enumerate()
        .map(|(index, text)| {
            answer.usage.add(text.done);
            let logprobs = answer.logprobs.then(|| logprobs_json(&answer.served.tokenizer, &text.logprobs));
            json!({
                "index": index,
                "message": {"role": "assistant", "content": text.text, "refusal": null},
                "logprobs": logprobs,
                "finish_reason": text.done.map(|done| done.finish.name()),
            })
        })
        .collect();
    Ok(Json(answer.object("chat.completion", &Value::from(choices), Some(&answer.usage.json()))).into_response())
}

/// The conversation, made harmless.
fn messages(app: &App, served: &Served, fields: &Fields) -> Result<Vec<Message>, ApiError> {
    let Value::Array(messages) = fields.required("messages")? else {
        return Err(ApiError::field("messages", "expected a list"));
    };
    if messages.is_empty() || messages.len() > MOST_MESSAGES {
        return Err(ApiError::field("messages", format!("expected 1 to {MOST_MESSAGES} messages")));
    }
    messages
        .iter()
        .enumerate()
        .map(|(at, message)| {
            let role = match message["role"].as_str() {
                Some(role @ ("system" | "user" | "assistant")) => role,
                Some("developer") => "system",
                _ => {
                    let expected = "expected system, developer, user or assistant";
                    return Err(ApiError::field(format!("messages[{at}].role"), expected));
                }
            };
            let content = content(&message["content"]).ok_or_else(|| {
                ApiError::field(format!("messages[{at}].content"), "expected text or parts of type text")
            })?;
            // Before and after, so that neither the filter nor the tokenizer sees something else than it should.
            let content = served.sanitiser.content(&content);
            if app.filter.find(&content).is_some() {
                return Err(ApiError::filtered());
            }
            Ok(Message::new(role, content))
        })
        .collect()
}

/// A string, or a list of parts with text.
fn content(content: &Value) -> Option<String> {
    match content {
        Value::String(text) => Some(text.clone()),
        Value::Array(parts) => {
            let text = |part: &Value| part["text"].as_str().filter(|_| part["type"] == "text").map(str::to_owned);
            parts.iter().map(text).collect()
        }
        _ => None,
    }
}

fn logprobs_json(tokenizer: &Tokenizer, logprobs: &[TokenLogprob]) -> Value {
    let entry = |token: u32, logprob: f32| {
        let bytes = tokenizer.token_bytes(token);
        json!({"token": String::from_utf8_lossy(bytes), "logprob": logprob, "bytes": bytes})
    };
    let content: Vec<Value> = logprobs
        .iter()
        .map(|one| {
            let mut own = entry(one.token, one.logprob);
            own["top_logprobs"] = one.top.iter().map(|(token, logprob)| entry(*token, *logprob)).collect();
            own
        })
        .collect();
    json!({"content": content, "refusal": null})
}

/// What all objects of an answer have in common.
struct Answer {
    id: String,
    created: u64,
    served: Arc<Served>,
    usage: Usage,
    logprobs: bool,
    include_usage: bool,
    /// Whether each text's first object has been sent.
    begun: Vec<bool>,
}

impl Answer {
    fn object(&self, kind: &str, choices: &Value, usage: Option<&Value>) -> Value {
        let mut object = json!({
            "id": self.id, "object": kind, "created": self.created, "model": self.served.name,
            "system_fingerprint": self.served.fingerprint, "choices": choices,
        });
        if let Some(usage) = usage {
            object["usage"] = usage.clone();
        }
        object
    }

    fn chunk(&self, at: usize, delta: &Value, logprobs: &Value, finish: Option<&str>) -> Value {
        let choices = json!([{"index": at, "delta": delta, "logprobs": logprobs, "finish_reason": finish}]);
        let usage = self.include_usage.then_some(Value::Null);
        self.object("chat.completion.chunk", &choices, usage.as_ref())
    }
}

impl Encode for Answer {
    fn encode(&mut self, at: usize, event: Event) -> Vec<Value> {
        let mut objects = Vec::new();
        if !std::mem::replace(&mut self.begun[at], true) {
            objects.push(self.chunk(at, &json!({"role": "assistant", "content": ""}), &Value::Null, None));
        }
        match event {
            Event::Text { text, logprobs } => {
                let logprobs =
                    if self.logprobs { logprobs_json(&self.served.tokenizer, &logprobs) } else { Value::Null };
                objects.push(self.chunk(at, &json!({"content": text}), &logprobs, None));
            }
            Event::Done(done) => {
                self.usage.add(Some(done));
                objects.push(self.chunk(at, &json!({}), &Value::Null, Some(done.finish.name())));
            }
            Event::Embedding(_) | Event::Failed(_) => {}
        }
        objects
    }

    fn finish(&mut self) -> Vec<Value> {
        let usage = self.usage.json();
        let last = || self.object("chat.completion.chunk", &json!([]), Some(&usage));
        self.include_usage.then(last).into_iter().collect()
    }
}
