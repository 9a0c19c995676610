//! Traces: what a request spent its time on, as spans for an OpenTelemetry collector (OTLP over HTTP, protobuf).
//!
//! A request's span begins at the door and ends with the last of its texts. Under it each text has `queue`, `prefill` and
//! `decode`, one after the other, as far as it came. Spans hold names, numbers and codes, never what was said. They are
//! sent by a thread of their own: no request waits for the collector, and what it does not take is lost.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use axum::http::{HeaderMap, Request, Response};
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{Span, SpanKind, Status, TraceContextExt, Tracer as _, TracerProvider};
use opentelemetry::{Array, Context, Key, KeyValue, StringValue, Value};
use opentelemetry_http::{Bytes, HeaderExtractor, HttpClient, HttpError};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};
use ureq::Agent;

use crate::outgoing;

/// Time for a collector to answer, and for what is left to be sent when the server stops.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why there can be no traces.
#[derive(Debug, thiserror::Error)]
#[error("traces cannot be sent to {endpoint}: {source}")]
pub struct TraceError {
    endpoint: String,
    source: opentelemetry_otlp::ExporterBuildError,
}

/// Makes spans and sends them.
#[derive(Debug)]
pub struct Tracer {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

impl Tracer {
    /// Sends to the collector at `endpoint`, whose path for traces is `/v1/traces`. Names, headers, sampling and batches can
    /// be set by OpenTelemetry's environment variables. `warn` is told once when the collector cannot be reached, and again only
    /// after it could be.
    ///
    /// # Errors
    /// If the endpoint, or one of those variables, makes no sense.
    pub fn new(endpoint: &str, warn: impl Fn(&str) + Send + Sync + 'static) -> Result<Self, TraceError> {
        let url = format!("{}/v1/traces", endpoint.trim_end_matches('/'));
        let client = Client { agent: outgoing::agent(PATIENCE), warn: Box::new(warn), away: AtomicBool::new(false) };
        let exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(client)
            .with_endpoint(&url)
            .with_protocol(Protocol::HttpBinary)
            .build()
            .map_err(|source| TraceError { endpoint: url, source })?;
        let name = Resource::builder().build().get(&Key::from_static_str("service.name"));
        let resource = Resource::builder().with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")));
        // The library's own guess is of no use.
        let resource = match name {
            Some(name) if !name.as_str().starts_with("unknown_service") => resource,
            _ => resource.with_service_name("ternion"),
        };
        let provider =
            SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource.build()).build();
        Ok(Self { tracer: provider.tracer("ternion"), provider })
    }

    /// A request begins; it goes on the trace that its headers name (W3C Trace Context), if any.
    pub(crate) fn request(&self, method: &str, route: &str, headers: &HeaderMap) -> Trace {
        let parent = TraceContextPropagator::new().extract_with_context(&Context::new(), &HeaderExtractor(headers));
        let span = self
            .tracer
            .span_builder(format!("{method} {route}"))
            .with_kind(SpanKind::Server)
            .with_attributes([
                KeyValue::new("http.request.method", method.to_owned()),
                KeyValue::new("http.route", route.to_owned()),
            ])
            .start_with_context(&self.tracer, &parent);
        let is_wanted = span.is_recording();
        Trace(is_wanted.then(|| Open { context: parent.with_span(span), tracer: self.tracer.clone() }))
    }

    /// Sends what is left, in bounded time.
    pub(crate) fn stop(&self) {
        // Whoever is to be warned of a collector that is away has been.
        let _ = self.provider.shutdown_with_timeout(PATIENCE);
    }
}

/// A request's span; ends when the last of its clones has gone. Without a tracer, or where a caller wants no trace, nothing.
#[derive(Clone, Debug, Default)]
pub struct Trace(Option<Open>);

#[derive(Clone, Debug)]
struct Open {
    context: Context,
    tracer: SdkTracer,
}

impl Trace {
    /// The model that it asks.
    pub(crate) fn model(&self, name: &str) {
        if let Some(open) = &self.0 {
            open.context.span().set_attribute(KeyValue::new("gen_ai.request.model", name.to_owned()));
        }
    }

    /// How its answer begins.
    pub(crate) fn answered(&self, status: u16, code: &'static str) {
        let Some(open) = &self.0 else { return };
        let span = open.context.span();
        span.set_attribute(KeyValue::new("http.response.status_code", i64::from(status)));
        if code != "ok" {
            span.set_attribute(KeyValue::new("error.type", code));
        }
        if status >= 500 {
            span.set_status(Status::error(code));
        }
    }

    /// Its text of this number, submitted now.
    pub(crate) fn text(&self, number: u64) -> TextTrace {
        TextTrace(self.0.clone().map(|request| {
            Box::new(Text {
                request,
                number: i64::try_from(number).unwrap_or(i64::MAX),
                submitted: Instant::now(),
                started: None,
                first: None,
                prompt: 0,
                cached: 0,
                generated: 0,
                end: End::Cancelled,
            })
        }))
    }
}

/// How a text ended.
#[derive(Clone, Copy, Debug)]
pub(crate) enum End {
    /// Its client went away.
    Cancelled,
    /// It did not run: its answer was known.
    Known,
    /// For this reason.
    Finished(&'static str),
    /// It was not done, by this cause.
    Failed(&'static str),
}

/// What happens to a text; its spans are made when it is dropped.
#[derive(Debug, Default)]
pub struct TextTrace(Option<Box<Text>>);

#[derive(Debug)]
struct Text {
    request: Open,
    number: i64,
    submitted: Instant,
    started: Option<Instant>,
    first: Option<Instant>,
    prompt: usize,
    cached: usize,
    generated: usize,
    end: End,
}

impl TextTrace {
    /// It leaves the queue; it has this many tokens.
    pub(crate) fn started(&mut self, prompt: usize) {
        if let Some(text) = &mut self.0 {
            (text.started, text.prompt) = (Some(Instant::now()), prompt);
        }
    }

    /// A token has been chosen.
    pub(crate) fn token(&mut self) {
        if let Some(text) = &mut self.0 {
            text.first.get_or_insert_with(Instant::now);
            text.generated += 1;
        }
    }

    /// It ends; it did not have to read `cached` tokens of its prompt.
    pub(crate) fn ended(&mut self, end: End, cached: usize) {
        if let Some(text) = &mut self.0 {
            (text.end, text.cached) = (end, cached);
        }
    }
}

impl Drop for Text {
    fn drop(&mut self) {
        let request = self.request.context.span();
        if matches!(self.end, End::Known) {
            return request.set_attribute(KeyValue::new("ternion.response_cached", true));
        }
        if let End::Failed(cause) = self.end {
            request.set_attribute(KeyValue::new("error.type", cause));
            request.set_status(Status::error(cause));
        }
        let count = |name: &'static str, n: usize| KeyValue::new(name, i64::try_from(n).unwrap_or(i64::MAX));
        let (end, now) = (Instant::now(), SystemTime::now());
        let wall = |instant: Instant| now.checked_sub(end - instant).unwrap_or(now);
        let (started, first) = (self.started, self.first);
        let queued = self.submitted..started.unwrap_or(end);
        self.span("queue", queued, wall, started.is_none(), []);
        if let Some(started) = started {
            let tokens = [
                count("gen_ai.usage.input_tokens", self.prompt),
                count("gen_ai.usage.cache_read.input_tokens", self.cached),
            ];
            self.span("prefill", started..first.unwrap_or(end), wall, first.is_none(), tokens);
        }
        if let Some(first) = first {
            self.span("decode", first..end, wall, true, [count("gen_ai.usage.output_tokens", self.generated)]);
        }
    }
}

impl Text {
    /// A span that has been; `wall` tells the time of day. The last one says how the text ended.
    fn span<const N: usize>(
        &self,
        name: &'static str,
        time: Range<Instant>,
        wall: impl Fn(Instant) -> SystemTime,
        is_last: bool,
        attributes: [KeyValue; N],
    ) {
        let Open { context, tracer } = &self.request;
        let builder = tracer.span_builder(name).with_start_time(wall(time.start)).with_attributes(attributes);
        let mut span = builder.start_with_context(tracer, context);
        span.set_attribute(KeyValue::new("ternion.text", self.number));
        match self.end {
            End::Finished(reason) if is_last => {
                let reasons = Value::Array(Array::String(vec![StringValue::from(reason)]));
                span.set_attribute(KeyValue::new("gen_ai.response.finish_reasons", reasons));
            }
            End::Failed(cause) if is_last => {
                span.set_attribute(KeyValue::new("error.type", cause));
                span.set_status(Status::error(cause));
            }
            End::Cancelled if is_last => span.set_attribute(KeyValue::new("error.type", "cancelled")),
            _ => {}
        }
        span.end_with_timestamp(wall(time.end));
    }
}

/// Sends what the exporter hands over.
struct Client {
    agent: Agent,
    warn: Box<dyn Fn(&str) + Send + Sync>,
    /// Whether the last attempt failed.
    away: AtomicBool,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Client")
    }
}

impl Client {
    fn send(&self, request: Request<Bytes>) -> Result<Response<Bytes>, ureq::Error> {
        let (head, body) = request.into_parts();
        let (head, mut body) = self.agent.run(Request::from_parts(head, &body[..]))?.into_parts();
        Ok(Response::from_parts(head, body.read_to_vec()?.into()))
    }

    /// Tells of the first of several failures.
    fn note(&self, failure: Option<String>) {
        let was_away = self.away.swap(failure.is_some(), Ordering::Relaxed);
        if let Some(failure) = failure.filter(|_| !was_away) {
            (self.warn)(&format!(
                "traces do not arrive ({failure}): spans are lost until they do, requests are not affected"
            ));
        }
    }
}

#[async_trait::async_trait]
impl HttpClient for Client {
    // Called by the exporter's own thread, which may wait.
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let url = request.uri().clone();
        let sent = self.send(request);
        self.note(match &sent {
            Ok(response) if response.status().is_success() => None,
            Ok(response) => Some(format!("{url}: status {}", response.status().as_u16())),
            Err(error) => Some(format!("{url}: {error}")),
        });
        Ok(sent?)
    }
}
