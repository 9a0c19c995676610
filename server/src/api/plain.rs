//! What is answered without the engine: models, tokens, health, metrics, reports.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use tokio::task::block_in_place;

use super::{ApiError, JsonBody};
use crate::live;
use crate::monitor::Report;
use crate::process::Usage;
use crate::{App, Served};

fn model_json(served: &Served, app: &App) -> Value {
    json!({
        "id": served.name, "object": "model", "created": app.created, "owned_by": "ternion",
        "context": served.engine.options().context, "vocabulary": served.vocabulary, "kind": served.kind(),
    })
}

pub(super) async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    let data: Vec<Value> = app.models.iter().map(|served| model_json(served, &app)).collect();
    Json(json!({"object": "list", "data": data}))
}

pub(super) async fn model(
    State(app): State<Arc<App>>,
    name: Result<Path<String>, PathRejection>,
) -> Result<Json<Value>, ApiError> {
    let Path(name) = name.map_err(|_| ApiError::no_route())?;
    Ok(Json(model_json(&*app.model_named(Some(&name))?, &app)))
}

pub(super) async fn tokenize(State(app): State<Arc<App>>, JsonBody(fields): JsonBody) -> Result<Json<Value>, ApiError> {
    let served = app.model(&fields)?;
    let text = fields.string("content")?.ok_or_else(|| ApiError::field("content", "is missing"))?;
    let tokens = block_in_place(|| served.encode(text, fields.boolean("add_special")? && served.tokenizer.adds_bos()))?;
    Ok(Json(json!({"tokens": tokens, "count": tokens.len()})))
}

pub(super) async fn detokenize(
    State(app): State<Arc<App>>,
    JsonBody(fields): JsonBody,
) -> Result<Json<Value>, ApiError> {
    let served = app.model(&fields)?;
    let tokens = served.tokens(fields.required("tokens")?).ok_or_else(|| {
        let expected = format!("expected a list of token ids below {}", served.vocabulary);
        ApiError::field("tokens", expected)
    })?;
    Ok(Json(json!({"content": served.tokenizer.decode(&tokens)})))
}

pub(super) async fn live(State(app): State<Arc<App>>) -> Response {
    // An engine that has ended by a bug does not come back: only a new process helps.
    if !app.models.iter().all(|served| served.engine.is_running()) {
        return (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"status": "broken"}))).into_response();
    }
    Json(json!({"status": "ok"})).into_response()
}

pub(super) async fn ready(State(app): State<Arc<App>>) -> Response {
    if app.draining.load(Ordering::SeqCst) {
        return (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"status": "draining"}))).into_response();
    }
    let names: Vec<&str> = app.models.iter().map(|served| served.name.as_str()).collect();
    Json(json!({"status": "ok", "models": names})).into_response()
}

pub(super) async fn version() -> Json<Value> {
    Json(json!({"name": "ternion", "version": env!("CARGO_PKG_VERSION")}))
}

pub(super) async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], include_str!("openapi.json")).into_response()
}

pub(super) async fn metrics(State(app): State<Arc<App>>) -> Response {
    app.metrics.observe(Usage::now());
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], app.metrics.text()).into_response()
}

pub(super) async fn report(State(app): State<Arc<App>>) -> Json<Report> {
    Json(app.monitor.report())
}

pub(crate) async fn live_panel(State(app): State<Arc<App>>) -> Response {
    Json(live::live(&app)).into_response()
}
