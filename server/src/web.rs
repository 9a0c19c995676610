//! The web page: plain files inside the binary, at `/`, `/page.css` and `/page.js`.
//!
//! It talks to the same interface as everybody else: `/v1/models`, `/v1/chat/completions`, and for its panel
//! `/admin/live.json`, which is for keys with the role `admin`, or for local clients where there are no keys. That is
//! [`Live`](crate::live::Live):
//!
//! ```json
//! {
//!   "version": "0.1.0", "uptime_seconds": 12, "draining": false,
//!   "requests": 3, "connections": 1, "memory_bytes": 98000000, "cpu_percent": 41.0,
//!   "cache_hits": 0, "cache_misses": 2, "memory_bandwidth": 2.5e10,
//!   "models": [{
//!     "name": "ternary-tales", "kind": "generation", "threads": 2, "parallel": 8, "context": 512,
//!     "running": 1, "waiting": 0, "kv_bytes": 1300000, "bytes_per_pass": 5200000,
//!     "tokens_per_second": 310.0, "prompt_tokens_per_second": 12.0, "passes_per_second": 305.0,
//!     "batch": 1.0, "pass_ms": 3.2, "roofline_percent": 6.5,
//!     "prompt_tokens": 40, "cached_tokens": 0, "completion_tokens": 900,
//!     "kernels": [{
//!       "m": 256, "k": 256, "projections": ["q_proj", "o_proj"],
//!       "schedules": [{"tokens": "1", "schedule": "mad/…"}, {"tokens": "2-4", "schedule": "…"}]
//!     }]
//!   }]
//! }
//! ```
//!
//! Rates are those of the last three seconds; `memory_bandwidth`, `batch`, `pass_ms` and `roofline_percent` are `null`
//! where nothing has been measured.

use std::sync::Arc;

use axum::Router;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use crate::App;

/// Nothing from elsewhere, and nothing that is not in the page's own files.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

fn file(kind: &'static str, content: &'static str) -> Response {
    let headers = [
        (header::CONTENT_TYPE, kind),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::CACHE_CONTROL, "no-cache"),
        (header::REFERRER_POLICY, "no-referrer"),
    ];
    (headers, content).into_response()
}

/// Path, kind and content of each.
const FILES: [(&str, &str, &str); 6] = [
    ("/", "text/html; charset=utf-8", include_str!("web/index.html")),
    ("/page.css", "text/css; charset=utf-8", include_str!("web/page.css")),
    ("/page.js", SCRIPT, include_str!("web/page.js")),
    ("/chat.js", SCRIPT, include_str!("web/chat.js")),
    ("/live.js", SCRIPT, include_str!("web/live.js")),
    ("/markdown.js", SCRIPT, include_str!("web/markdown.js")),
];
const SCRIPT: &str = "text/javascript; charset=utf-8";

pub(crate) fn router() -> Router<Arc<App>> {
    FILES.into_iter().fold(Router::new(), |router, (path, kind, content)| {
        router.route(path, get(move || async move { file(kind, content) }))
    })
}
