//! `POST /v1/completions`.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use serde_json::{Map, Value, json};
use ternion_runtime::text::Tokenizer;
use tokio::task::block_in_place;

use super::answer::{Form, generate};
use super::settings::Settings;
use super::{ApiError, Client, JsonBody};
use crate::engine::TokenLogprob;
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
    let texts = prompts.len() * settings.n;
    let form = Plain { served: Arc::clone(&served), offsets: vec![0; texts] };
    generate(app, served, client, settings, &prompts, form).await
}

/// Texts.
struct Plain {
    served: Arc<Served>,
    /// Characters of each text so far.
    offsets: Vec<usize>,
}

impl Form for Plain {
    const ID: &'static str = "cmpl";
    const OBJECTS: [&'static str; 2] = ["text_completion"; 2];

    fn whole(&mut self, at: usize, text: &str, logprobs: Option<&[TokenLogprob]>) -> Value {
        self.piece(at, text, logprobs)
    }

    fn first(&self) -> Option<Value> {
        None
    }

    fn piece(&mut self, at: usize, text: &str, logprobs: Option<&[TokenLogprob]>) -> Value {
        let logprobs = logprobs.map(|logprobs| logprobs_json(&self.served.tokenizer, logprobs, &mut self.offsets[at]));
        json!({"text": text, "logprobs": logprobs})
    }

    fn last(&self) -> Value {
        json!({"text": "", "logprobs": null})
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
