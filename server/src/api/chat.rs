//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use serde_json::{Value, json};
use ternion_runtime::text::{Message, Tokenizer};
use tokio::task::block_in_place;

use super::answer::{Form, generate};
use super::settings::{MOST_ALTERNATIVES, Settings};
use super::{ApiError, Client, Fields, JsonBody};
use crate::engine::TokenLogprob;
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
    let form = Chat { served: Arc::clone(&served) };
    generate(app, served, client, settings, &[prompt], form).await
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

/// Messages, and the deltas of one.
struct Chat {
    served: Arc<Served>,
}

impl Chat {
    fn logprobs(&self, logprobs: Option<&[TokenLogprob]>) -> Option<Value> {
        logprobs.map(|logprobs| logprobs_json(&self.served.tokenizer, logprobs))
    }
}

impl Form for Chat {
    const ID: &'static str = "chatcmpl";
    const OBJECTS: [&'static str; 2] = ["chat.completion", "chat.completion.chunk"];

    fn whole(&mut self, _: usize, text: &str, logprobs: Option<&[TokenLogprob]>) -> Value {
        let message = json!({"role": "assistant", "content": text, "refusal": null});
        json!({"message": message, "logprobs": self.logprobs(logprobs)})
    }

    fn first(&self) -> Option<Value> {
        Some(json!({"delta": {"role": "assistant", "content": ""}, "logprobs": null}))
    }

    fn piece(&mut self, _: usize, text: &str, logprobs: Option<&[TokenLogprob]>) -> Value {
        json!({"delta": {"content": text}, "logprobs": self.logprobs(logprobs)})
    }

    fn last(&self) -> Value {
        json!({"delta": {}, "logprobs": null})
    }
}
