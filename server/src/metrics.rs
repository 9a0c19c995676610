//! What the server counts, as Prometheus reads it.

use std::time::Duration;

use prometheus::{
    Encoder, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts, Registry, TextEncoder,
};

/// All metrics of a server. Clones count together.
#[derive(Clone)]
pub struct Metrics {
    registry: Registry,
    /// Requests by route and status.
    pub requests: IntCounterVec,
    /// Seconds from the first byte of a request to the last of its answer's head, by route.
    pub request_time: HistogramVec,
    /// Errors by code.
    pub errors: IntCounterVec,
    /// Tokens of prompts.
    pub prompt_tokens: IntCounter,
    /// Tokens of prompts that did not have to be read again.
    pub cached_tokens: IntCounter,
    /// Tokens generated.
    pub completion_tokens: IntCounter,
    /// Seconds in the queue.
    pub queue_time: Histogram,
    /// Seconds from a request to its first token.
    pub first_token_time: Histogram,
    /// Seconds from one token of a text to the next.
    pub token_time: Histogram,
    /// Tokens in a pass.
    pub batch_tokens: Histogram,
    /// Texts that got a token in a pass.
    pub batch_texts: Histogram,
    /// Seconds of a pass through the layers.
    pub pass_time: Histogram,
    /// Jobs that wait.
    pub waiting: IntGauge,
    /// Texts that run.
    pub running: IntGauge,
    /// Bytes of keys and values.
    pub kv_bytes: IntGauge,
    /// Answers from the response cache.
    pub cache_hits: IntCounter,
    /// Questions that it had no answer to.
    pub cache_misses: IntCounter,
    /// Texts whose client went away.
    pub cancelled: IntCounter,
    /// Passes that failed: bugs.
    pub panics: IntCounter,
    /// Open connections.
    pub connections: IntGauge,
    /// Bytes of memory of this process.
    pub memory: IntGauge,
    /// Milliseconds of processor time of this process.
    pub cpu: IntGauge,
}

/// Makes metrics and puts them into a registry.
struct Maker(Registry);

impl Maker {
    fn add<C: prometheus::core::Collector + Clone + 'static>(&self, made: prometheus::Result<C>) -> C {
        let made = made.expect("names of our own are legal");
        self.0.register(Box::new(made.clone())).expect("names of our own are different");
        made
    }

    fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.add(IntCounter::new(name, help))
    }

    fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.add(IntGauge::new(name, help))
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        self.add(Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec())))
    }
}

/// Upper ends in seconds: of requests, and of single tokens and passes.
const REQUEST_SECONDS: [f64; 12] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0];
const STEP_SECONDS: [f64; 12] = [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0];
const SIZES: [f64; 9] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];

impl Default for Metrics {
    fn default() -> Self {
        let registry = Registry::new();
        let make = Maker(registry.clone());
        let requests = Opts::new("ternion_requests_total", "Requests by route and status");
        let time = HistogramOpts::new("ternion_request_seconds", "Time until the answer begins, by route")
            .buckets(REQUEST_SECONDS.to_vec());
        let errors = Opts::new("ternion_errors_total", "Errors by code");
        Self {
            requests: make.add(IntCounterVec::new(requests, &["route", "status"])),
            request_time: make.add(HistogramVec::new(time, &["route"])),
            errors: make.add(IntCounterVec::new(errors, &["code"])),
            prompt_tokens: make.counter("ternion_prompt_tokens_total", "Tokens of prompts"),
            cached_tokens: make.counter("ternion_prefix_cached_tokens_total", "Tokens of prompts not read again"),
            completion_tokens: make.counter("ternion_completion_tokens_total", "Tokens generated"),
            queue_time: make.histogram("ternion_queue_seconds", "Time in the queue", &REQUEST_SECONDS),
            first_token_time: make.histogram("ternion_first_token_seconds", "Time to first token", &REQUEST_SECONDS),
            token_time: make.histogram("ternion_token_seconds", "Time from token to token", &STEP_SECONDS),
            batch_tokens: make.histogram("ternion_batch_tokens", "Tokens in a pass", &SIZES),
            batch_texts: make.histogram("ternion_batch_texts", "Texts that got a token in a pass", &SIZES),
            pass_time: make.histogram("ternion_pass_seconds", "Time of a pass through the layers", &STEP_SECONDS),
            waiting: make.gauge("ternion_queue_length", "Texts that wait"),
            running: make.gauge("ternion_running_texts", "Texts that run"),
            kv_bytes: make.gauge("ternion_kv_bytes", "Bytes of keys and values"),
            cache_hits: make.counter("ternion_response_cache_hits_total", "Answers from the response cache"),
            cache_misses: make.counter("ternion_response_cache_misses_total", "Questions new to the response cache"),
            cancelled: make.counter("ternion_cancelled_total", "Texts whose client went away"),
            panics: make.counter("ternion_failed_passes_total", "Passes that failed: please report"),
            connections: make.gauge("ternion_connections", "Open connections"),
            memory: make.gauge("ternion_memory_bytes", "Memory of this process"),
            cpu: make.gauge("ternion_cpu_milliseconds", "Processor time of this process"),
            registry,
        }
    }
}

impl Metrics {
    /// Counts a pass of `tokens` tokens that `texts` texts got a token from.
    pub(crate) fn pass(&self, tokens: usize, texts: usize, time: Duration) {
        self.batch_tokens.observe(tokens as f64);
        self.batch_texts.observe(texts as f64);
        self.pass_time.observe(time.as_secs_f64());
    }

    /// Prometheus' text format.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text).expect("memory can be written to");
        String::from_utf8_lossy(&text).into_owned()
    }
}
