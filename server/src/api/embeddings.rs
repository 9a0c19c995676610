//! `POST /v1/embeddings`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Value, json};
use ternion_runtime::embedding;
use tokio::task::block_in_place;

use super::settings::{check_prompt, job, submit};
use super::stream::collect;
use super::{ApiError, Client, JsonBody};
use crate::App;
use crate::engine::Task;

pub(super) async fn embed(
    State(app): State<Arc<App>>,
    client: Client,
    JsonBody(fields): JsonBody,
) -> Result<Response, ApiError> {
    let served = app.model(&fields)?;
    let base64 = match fields.string("encoding_format")? {
        None | Some("float") => false,
        Some("base64") => true,
        Some(_) => return Err(ApiError::field("encoding_format", "expected float or base64")),
    };
    if fields.integer("dimensions", 1..=served.hidden)?.is_some_and(|dimensions| dimensions != served.hidden) {
        return Err(ApiError::field("dimensions", format!("this model's vectors have {}", served.hidden)));
    }
    let texts = block_in_place(|| {
        served.texts(&app, "input", fields.required("input")?, |served, text| {
            embedding::encode(&served.tokenizer, text).map_err(|error| ApiError::field("input", error.to_string()))
        })
    })?;
    let mut jobs = Vec::new();
    for tokens in &texts {
        check_prompt(&app, &served, tokens)?;
        jobs.push(job(&app, &client, tokens, Task::Embed, None));
    }
    let vectors = collect(submit(&served, &client, jobs)?).await?;
    let data = vectors.into_iter().enumerate().map(|(index, text)| {
        let embedding = if base64 { Vector::Base64(to_base64(&text.embedding)) } else { Vector::Float(text.embedding) };
        Data { object: "embedding", index, embedding }
    });
    let tokens: usize = texts.iter().map(Vec::len).sum();
    let usage = json!({"prompt_tokens": tokens, "total_tokens": tokens});
    Ok(Json(List { object: "list", data: data.collect(), model: &served.name, usage }).into_response())
}

/// The answer. Typed, because a JSON value would write every element with the digits of an `f64`.
#[derive(Serialize)]
struct List<'a> {
    object: &'static str,
    data: Vec<Data>,
    model: &'a str,
    usage: Value,
}

#[derive(Serialize)]
struct Data {
    object: &'static str,
    index: usize,
    embedding: Vector,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Vector {
    Float(Vec<f32>),
    Base64(String),
}

/// The little-endian bytes of the elements in base 64 (RFC 4648), as OpenAI's client asks for them.
fn to_base64(vector: &[f32]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let bits = group.iter().enumerate().fold(0u32, |bits, (at, byte)| bits | u32::from(*byte) << (16 - 8 * at));
        for digit in 0..4 {
            let code = ALPHABET[(bits >> (18 - 6 * digit)) as usize & 63];
            text.push(if digit <= group.len() { char::from(code) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::to_base64;

    #[test]
    fn base_64_is_padded_to_whole_groups() {
        assert_eq!(to_base64(&[1.0]), "AACAPw==");
        assert_eq!(to_base64(&[1.0, -2.0]), "AACAPwAAAMA=");
        assert_eq!(to_base64(&[1.0, -2.0, 0.5]), "AACAPwAAAMAAAAA/");
    }
}
