//! From the engine's events to an answer: all at once, or piece by piece as server-sent events.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use hyper::body::Frame;
use serde_json::Value;
use tokio::sync::mpsc::UnboundedReceiver;

use super::ApiError;
use crate::App;
use crate::engine::{Done, Event, Failure, TokenLogprob};

/// Many texts' events as they come. Dropping it cancels what is not finished.
#[derive(Debug)]
pub(super) struct Merged {
    receivers: Vec<Option<UnboundedReceiver<Event>>>,
}

impl Merged {
    /// Of texts that are numbered in this order.
    #[must_use]
    pub(super) fn new(receivers: Vec<UnboundedReceiver<Event>>) -> Self {
        Self { receivers: receivers.into_iter().map(Some).collect() }
    }

    /// The next event and its text's number; `None` when all have ended.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<(usize, Event)>> {
        let mut open = false;
        for (at, slot) in self.receivers.iter_mut().enumerate() {
            let Some(receiver) = slot else { continue };
            match receiver.poll_recv(context) {
                Poll::Ready(Some(event)) => {
                    if matches!(event, Event::Done(_) | Event::Failed(_)) {
                        *slot = None;
                    }
                    return Poll::Ready(Some((at, event)));
                }
                // The engine has gone without a word.
                Poll::Ready(None) => {
                    *slot = None;
                    return Poll::Ready(Some((at, Event::Failed(Failure::Internal))));
                }
                Poll::Pending => open = true,
            }
        }
        if open { Poll::Pending } else { Poll::Ready(None) }
    }

    /// As [`poll`](Self::poll).
    pub(super) async fn next(&mut self) -> Option<(usize, Event)> {
        poll_fn(|context| self.poll(context)).await
    }
}

/// A finished text.
#[derive(Clone, Debug)]
pub(super) struct Text {
    /// The text.
    pub text: String,
    /// Its tokens' probabilities, if asked for.
    pub logprobs: Vec<TokenLogprob>,
    /// Its vector, if that was the task.
    pub embedding: Vec<f32>,
    /// How it ended.
    pub done: Option<Done>,
}

/// Waits for `n` texts to the end.
///
/// # Errors
/// If one of them fails; the others are cancelled then.
pub(super) async fn collect(mut events: Merged) -> Result<Vec<Text>, ApiError> {
    let empty = Text { text: String::new(), logprobs: Vec::new(), embedding: Vec::new(), done: None };
    let mut texts = vec![empty; events.receivers.len()];
    while let Some((at, event)) = events.next().await {
        match event {
            Event::Text { text, logprobs } => {
                texts[at].text.push_str(&text);
                texts[at].logprobs.extend(logprobs);
            }
            Event::Embedding(embedding) => texts[at].embedding = embedding,
            Event::Done(done) => texts[at].done = Some(done),
            Event::Failed(failure) => return Err(failure.into()),
        }
    }
    Ok(texts)
}

/// Turns events into the objects of a stream.
pub(super) trait Encode: Send + Unpin + 'static {
    /// Objects for an event of text `at`.
    fn encode(&mut self, at: usize, event: Event) -> Vec<Value>;
    /// Objects after the last event.
    fn finish(&mut self) -> Vec<Value>;
}

/// A body of server-sent events.
struct EventBody<E> {
    app: Arc<App>,
    events: Merged,
    encode: E,
    ready: VecDeque<Bytes>,
    ended: bool,
}

impl<E: Encode> EventBody<E> {
    fn take(&mut self, at: usize, event: Event) {
        if let Event::Failed(failure) = event {
            let error = ApiError::from(failure);
            self.app.metrics.errors.with_label_values(&[error.code().0]).inc();
            self.app.monitor.broke_off();
            // The first error is the last that is heard; the other texts are cancelled.
            self.events = Merged::new(Vec::new());
            self.ready.extend([line(&error.json()), LAST]);
            self.ended = true;
            return;
        }
        let objects = self.encode.encode(at, event);
        self.ready.extend(objects.iter().map(line));
    }
}

/// What ends a stream.
const LAST: Bytes = Bytes::from_static(b"data: [DONE]\n\n");

fn line(object: &Value) -> Bytes {
    format!("data: {object}\n\n").into()
}

impl<E: Encode> hyper::body::Body for EventBody<E> {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        loop {
            if let Some(bytes) = self.ready.pop_front() {
                return Poll::Ready(Some(Ok(Frame::data(bytes))));
            }
            if self.ended {
                return Poll::Ready(None);
            }
            match self.events.poll(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Some((at, event))) => self.take(at, event),
                Poll::Ready(None) => {
                    let last = self.encode.finish();
                    self.ready.extend(last.iter().map(line));
                    self.ready.push_back(LAST);
                    self.ended = true;
                }
            }
        }
    }
}

/// The answer as a stream. Waits for the first event, so that what fails before it has a status that says so.
///
/// # Errors
/// If the first event is a failure.
pub(super) async fn respond(app: Arc<App>, mut events: Merged, encode: impl Encode) -> Result<Response, ApiError> {
    let first = events.next().await;
    if let Some((_, Event::Failed(failure))) = first {
        return Err(failure.into());
    }
    let mut body = EventBody { app, events, encode, ready: VecDeque::new(), ended: false };
    if let Some((at, event)) = first {
        body.take(at, event);
    }
    let mut response = Response::new(Body::new(body));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Proxies must not hold pieces back.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}
