//! The HTTP interface: OpenAI's, and what an operator needs.

mod answer;
mod chat;
mod completions;
mod door;
mod embeddings;
mod error;
mod fields;
mod origin;
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
use axum::routing::{MethodRouter, get, post};

pub use door::RateLimit;
pub use error::{ApiError, Code};
pub use fields::Fields;
pub use origin::Hosts;

use crate::App;
use crate::security_log::now;
use crate::trace::Trace;

/// What is served: method, path and handler. `openapi.json` describes the same, which a test checks.
fn routes() -> [(&'static str, &'static str, MethodRouter<Arc<App>>); 15] {
    [
        ("post", "/v1/chat/completions", post(chat::complete)),
        ("post", "/v1/completions", post(completions::complete)),
        ("post", "/v1/embeddings", post(embeddings::embed)),
        ("get", "/v1/models", get(plain::models)),
        ("get", "/v1/models/{model}", get(plain::model)),
        ("post", "/tokenize", post(plain::tokenize)),
        ("post", "/detokenize", post(plain::detokenize)),
        ("get", "/health", get(plain::ready)),
        ("get", "/health/live", get(plain::live)),
        ("get", "/health/ready", get(plain::ready)),
        ("get", "/version", get(plain::version)),
        ("get", "/openapi.json", get(plain::openapi)),
        ("get", "/metrics", get(plain::metrics)),
        ("get", "/admin/live.json", get(plain::live_panel)),
        ("get", "/admin/report.json", get(plain::report)),
    ]
}

/// All routes, with the door in front of them.
pub fn router(app: Arc<App>) -> Router {
    let router = routes().into_iter().fold(Router::new(), |router, (_, path, handler)| router.route(path, handler));
    #[cfg(feature = "page")]
    let router = if app.options.page { router.merge(crate::web::router()) } else { router };
    router
        .fallback(|| async { ApiError::no_route() })
        .method_not_allowed_fallback(|| async { ApiError::no_method() })
        .layer(from_fn_with_state(Arc::clone(&app), door::pass))
        .with_state(app)
}

/// Who asks.
#[derive(Clone, Debug, Default)]
pub struct Client {
    /// A number that says nothing about them outside this run of the server.
    number: u64,
    /// The trace of what they ask.
    trace: Trace,
}

impl FromRequestParts<Arc<App>> for Client {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &Arc<App>) -> Result<Self, ApiError> {
        Ok(parts.extensions.get::<Self>().cloned().unwrap_or_default())
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

/// A name for an answer, and when it was made.
fn identity(kind: &str, app: &App) -> (String, u64) {
    let number = app.answers.fetch_add(1, Ordering::Relaxed);
    (format!("{kind}-{}{number:08x}", app.run), now() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;
    use std::collections::BTreeSet;

    #[test]
    fn the_description_has_every_route_and_no_other() {
        let description: Value = serde_json::from_str(include_str!("openapi.json")).unwrap();
        assert_eq!(description["info"]["version"], env!("CARGO_PKG_VERSION"));
        let paths = description["paths"].as_object().unwrap();
        let methods = |(path, methods): (&String, &Value)| -> Vec<(String, String)> {
            methods.as_object().unwrap().keys().map(|method| (method.clone(), path.clone())).collect()
        };
        let described: BTreeSet<_> = paths.iter().flat_map(methods).collect();
        let served: BTreeSet<_> = routes().map(|(method, path, _)| (method.to_owned(), path.to_owned())).into();
        assert_eq!(described, served);
    }

    #[test]
    fn every_reference_of_the_description_leads_somewhere() {
        fn visit(value: &Value, root: &Value, found: &mut usize) {
            match value {
                Value::Object(fields) => {
                    if let Some(target) = fields.get("$ref").and_then(Value::as_str) {
                        assert!(root.pointer(target.trim_start_matches('#')).is_some(), "{target}");
                        *found += 1;
                    }
                    fields.values().for_each(|value| visit(value, root, found));
                }
                Value::Array(items) => items.iter().for_each(|value| visit(value, root, found)),
                _ => {}
            }
        }
        let description: Value = serde_json::from_str(include_str!("openapi.json")).unwrap();
        let mut found = 0;
        visit(&description, &description, &mut found);
        assert!(found > 20, "{found}");
    }
}
