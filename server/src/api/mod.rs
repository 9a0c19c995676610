//! The HTTP interface: OpenAI's, and what an operator needs.

mod chat;
mod completions;
mod door;
mod embeddings;
mod error;
mod fields;
mod plain;
mod settings;
mod stream;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Router;
use axum::body::to_bytes;
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::request::Parts;
use axum::middleware::from_fn_with_state;
use axum::routing::{get, post};
use serde_json::{Value, json};

pub use door::RateLimit;
pub use error::{ApiError, Code};
pub use fields::Fields;

use crate::App;
use crate::engine::Done;
use crate::security_log::now;

/// All routes, with the door in front of them.
pub fn router(app: Arc<App>) -> Router {
    let router = Router::new()
        .route("/v1/chat/completions", post(chat::complete))
        .route("/v1/completions", post(completions::complete))
        .route("/v1/embeddings", post(embeddings::embed))
        .route("/v1/models", get(plain::models))
        .route("/v1/models/{model}", get(plain::model))
        .route("/tokenize", post(plain::tokenize))
        .route("/detokenize", post(plain::detokenize))
        .route("/health", get(plain::ready))
        .route("/health/live", get(plain::live))
        .route("/health/ready", get(plain::ready))
        .route("/version", get(plain::version))
        .route("/openapi.json", get(plain::openapi))
        .route("/metrics", get(plain::metrics))
        .route("/admin/live.json", get(plain::live_panel))
        .route("/admin/report.json", get(plain::report));
    #[cfg(feature = "page")]
    let router = if app.options.page { router.merge(crate::web::router()) } else { router };
    router
        .fallback(|| async { ApiError::no_route() })
        .method_not_allowed_fallback(|| async { ApiError::no_method() })
        .layer(from_fn_with_state(Arc::clone(&app), door::pass))
        .with_state(app)
}

/// Who asks, as a number that says nothing about them outside this run of the server.
#[derive(Clone, Copy, Debug)]
pub struct Client(pub u64);

impl FromRequestParts<Arc<App>> for Client {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &Arc<App>) -> Result<Self, ApiError> {
        Ok(parts.extensions.get::<Self>().copied().unwrap_or(Self(0)))
    }
}

/// A body that is a JSON object, of bounded size, that arrives in bounded time.
pub struct JsonBody(pub Fields);

impl FromRequest<Arc<App>> for JsonBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        let limits = &app.options.limits;
        let body = to_bytes(request.into_body(), limits.body_bytes);
        let body = tokio::time::timeout(limits.body_time, body).await.map_err(|_| ApiError::slow())?;
        Fields::parse(&body.map_err(|_| ApiError::too_large(limits.body_bytes))?).map(Self)
    }
}

/// Tokens of a request.
#[derive(Clone, Copy, Debug, Default)]
struct Usage {
    prompt: usize,
    completion: usize,
    cached: usize,
}

impl Usage {
    fn add(&mut self, done: Option<Done>) {
        self.completion += done.map_or(0, |done| done.completion_tokens);
        self.cached = self.cached.max(done.map_or(0, |done| done.cached_tokens));
    }

    fn json(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        })
    }
}

/// A name for an answer, and when it was made.
fn identity(kind: &str, app: &App) -> (String, u64) {
    let number = app.answers.fetch_add(1, Ordering::Relaxed);
    (format!("{kind}-{}{number:08x}", app.run), now() as u64)
}
