//! The door: every request passes here first. Who is it, may they, are they too many; and afterwards, how it went.

use std::net::{IpAddr, Ipv6Addr};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use governor::clock::{Clock, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use sha2::{Digest, Sha256};

use super::origin::is_foreign;
use super::{ApiError, Client, Code};
use crate::App;
use crate::keys::Caller;
use crate::listen::Peer;
use crate::security_log::{Entry, now};

/// A limit of requests per minute for each client.
pub struct RateLimit(Option<DefaultKeyedRateLimiter<u64>>);

impl RateLimit {
    /// `None` limits nothing.
    pub fn new(per_minute: Option<NonZeroU32>) -> Self {
        Self(per_minute.map(|limit| RateLimiter::keyed(Quota::per_minute(limit))))
    }

    /// Forgets clients that have been quiet for so long that it makes no difference.
    pub(crate) fn forget_quiet(&self) {
        if let Some(limiter) = &self.0 {
            limiter.retain_recent();
        }
    }

    /// Counts a request.
    ///
    /// # Errors
    /// The seconds to wait, if there were too many.
    fn count(&self, client: u64) -> Result<(), u64> {
        let Some(limiter) = &self.0 else { return Ok(()) };
        limiter.check_key(&client).map_err(|until| until.wait_time_from(DefaultClock::default().now()).as_secs() + 1)
    }
}

/// What a path needs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Needs {
    /// Nothing: health, version, the page and the description of the interface.
    Nothing,
    /// A key, where there are keys.
    Key,
    /// The same, but as often as wanted: what machines look at.
    Watcher,
    /// A key with the role `admin`, or a local client where there are no keys.
    Admin,
}

fn needs(path: &str) -> Needs {
    match path {
        _ if path.starts_with("/admin/") => Needs::Admin,
        "/metrics" => Needs::Watcher,
        "/tokenize" | "/detokenize" => Needs::Key,
        _ if path.starts_with("/v1/") => Needs::Key,
        _ => Needs::Nothing,
    }
}

pub(super) async fn pass(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let start = Instant::now();
    let number = format!("req-{}{:08x}", app.run, app.requests.fetch_add(1, Ordering::Relaxed));
    let route = request.extensions().get::<MatchedPath>().map_or("none".to_owned(), |path| path.as_str().to_owned());
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    // Nobody wants traces of those who watch.
    let tracer = app.options.tracer.as_ref().filter(|_| needs(&path) == Needs::Key);
    let trace = tracer.map(|tracer| tracer.request(method.as_str(), &route, request.headers())).unwrap_or_default();
    let (client, admitted) = admit(&app, &request, &path);
    let mut response = match admitted {
        // A browser asks first whether it may.
        _ if app.options.cors.is_some() && method == Method::OPTIONS => StatusCode::NO_CONTENT.into_response(),
        Ok(()) => {
            request.extensions_mut().insert(Client { number: client, trace: trace.clone() });
            next.run(request).await
        }
        Err(error) => error.into_response(),
    };
    let (status, time) = (response.status().as_u16(), start.elapsed());
    let code = response.extensions().get::<Code>().map_or("ok", |code| code.0);
    app.metrics.requests.with_label_values(&[route.as_str(), &status.to_string()]).inc();
    app.metrics.request_time.with_label_values(&[route.as_str()]).observe(time.as_secs_f64());
    if code != "ok" {
        app.metrics.errors.with_label_values(&[code]).inc();
    }
    app.monitor.request(status, time);
    trace.answered(status, code);
    let logged = app.log.write(&Entry {
        time: now(),
        event: code,
        request: &number,
        client: &format!("{client:016x}"),
        method: method.as_str(),
        path: &path,
        status,
        ms: u64::try_from(time.as_millis()).unwrap_or(u64::MAX),
    });
    if logged.is_err() {
        app.metrics.log_failures.inc();
    }
    let headers = response.headers_mut();
    if let Ok(number) = HeaderValue::from_str(&number) {
        headers.insert("x-request-id", number);
    }
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    if let Some(origin) = &app.options.cors {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
        // Clients have headers of their own; the star stands for all but the key's.
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static("authorization, *"));
        headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static("retry-after, x-request-id"));
    }
    response
}

/// Who asks, as a number, and whether they may.
fn admit(app: &App, request: &Request, path: &str) -> (u64, Result<(), ApiError>) {
    let peer = request.extensions().get::<Peer>().map(|peer| peer.0.ip().to_canonical());
    let authorization = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let bearer = authorization.and_then(|value| value.split_once(' '));
    let key = bearer.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer")).map(|(_, key)| key);
    let caller = app.options.keys.as_ref().zip(key).and_then(|(keys, key)| keys.find(key.trim()));
    let mut digest = Sha256::new();
    digest.update(app.salt);
    match caller {
        Some(Caller { index, .. }) => digest.update(format!("key {index}")),
        None => digest.update(format!("peer {:?}", peer.map(network))),
    }
    let digest: [u8; 32] = digest.finalize().into();
    let client = u64::from_le_bytes(std::array::from_fn(|at| digest[at]));
    let needs = needs(path);
    let admitted = match (&app.options.keys, needs) {
        (_, Needs::Nothing) => Ok(()),
        _ if !app.options.hosts.allow(request) => Err(ApiError::unknown_host()),
        _ if is_foreign(request) && !is_let_in(app.options.cors.as_ref(), request) => Err(ApiError::foreign()),
        (Some(_), _) if caller.is_none() => Err(ApiError::unauthorised()),
        (Some(_), Needs::Admin) if caller.is_some_and(|caller| !caller.admin) => Err(ApiError::forbidden()),
        (None, Needs::Admin) if peer.is_some_and(|peer| !peer.is_loopback()) => Err(ApiError::forbidden()),
        _ => Ok(()),
    };
    // Those who watch are not counted; wrong keys are, so that nobody tries many.
    let counted = match needs {
        Needs::Nothing => Ok(()),
        Needs::Admin | Needs::Watcher if admitted.is_ok() => Ok(()),
        _ => app.rate.count(client).map_err(ApiError::rate_limited),
    };
    (client, counted.and(admitted))
}

/// Whether `--cors` is for the page that asks.
fn is_let_in(cors: Option<&HeaderValue>, request: &Request) -> bool {
    cors.is_some_and(|origin| origin == "*" || request.headers().get(header::ORIGIN) == Some(origin))
}

/// What one client has of addresses: one of version 4, or 2^64 of version 6.
fn network(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
    }
}
