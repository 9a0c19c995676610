//! What the server counts, as Prometheus reads it.

use std::time::Duration;

use prometheus::core::Collector;
use prometheus::{
    Counter, Encoder, Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    Opts, Registry, TextEncoder,
};

use crate::process::Usage;

/// All metrics of a server. Clones count together.
#[derive(Clone)]
pub struct Metrics {
    registry: Registry,
    /// Requests by route and status.
    pub requests: IntCounterVec,
    /// Seconds from a request's head to its answer's, by route.
    pub request_time: HistogramVec,
    /// Errors by code.
    pub errors: IntCounterVec,
    /// Answers from the response cache.
    pub cache_hits: IntCounter,
    /// Questions that it had no answer to.
    pub cache_misses: IntCounter,
    /// Bytes of the answers in it.
    pub cache_bytes: IntGauge,
    /// Open connections.
    pub connections: IntGauge,
    /// Lines that the log could not take.
    pub log_failures: IntCounter,
    /// Bytes of memory of this process.
    pub memory: IntGauge,
    /// Seconds of processor time of this process.
    pub cpu: Counter,
    engines: EngineFamilies,
}

/// Metrics that each model has its own of.
#[derive(Clone)]
struct EngineFamilies {
    counters: [IntCounterVec; 5],
    gauges: [IntGaugeVec; 3],
    histograms: [HistogramVec; 6],
}

/// What one engine counts.
#[derive(Clone, Debug)]
pub struct EngineMetrics {
    /// Tokens of prompts.
    pub prompt_tokens: IntCounter,
    /// Tokens of prompts that did not have to be read again.
    pub cached_tokens: IntCounter,
    /// Tokens generated.
    pub completion_tokens: IntCounter,
    /// Texts whose client went away.
    pub cancelled: IntCounter,
    /// Passes that failed: bugs.
    pub failed_passes: IntCounter,
    /// Texts that wait.
    pub waiting: IntGauge,
    /// Texts that run.
    pub running: IntGauge,
    /// Bytes of keys and values, those that texts share counted for each.
    pub kv_bytes: IntGauge,
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
    /// Seconds of a pass: layers, head and the choice of tokens.
    pub pass_time: Histogram,
}

/// Makes metrics and puts them into a registry.
struct Maker(Registry);

impl Maker {
    fn add<C: Collector + Clone + 'static>(&self, made: prometheus::Result<C>) -> C {
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

    fn histograms(&self, name: &str, help: &str, label: &str, buckets: &[f64]) -> HistogramVec {
        self.add(HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), &[label]))
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
        let labelled =
            |name: &str, help: &str, labels: &[&str]| make.add(IntCounterVec::new(Opts::new(name, help), labels));
        let gauges = |name: &str, help: &str| make.add(IntGaugeVec::new(Opts::new(name, help), &["model"]));
        let counters = |name: &str, help: &str| labelled(name, help, &["model"]);
        let histograms = |name: &str, help: &str, buckets: &[f64]| make.histograms(name, help, "model", buckets);
        let started =
            make.add(Gauge::new("process_start_time_seconds", "When this process started, seconds since 1970"));
        started.set(crate::security_log::now());
        Self {
            requests: labelled("ternion_requests_total", "Requests by route and status", &["route", "status"]),
            request_time: make.histograms(
                "ternion_request_seconds",
                "Time until the answer begins, by route",
                "route",
                &REQUEST_SECONDS,
            ),
            errors: labelled("ternion_errors_total", "Errors by code", &["code"]),
            cache_hits: make.counter("ternion_response_cache_hits_total", "Answers from the response cache"),
            cache_misses: make.counter("ternion_response_cache_misses_total", "Questions new to the response cache"),
            cache_bytes: make.gauge("ternion_response_cache_bytes", "Bytes of the answers in the response cache"),
            connections: make.gauge("ternion_connections", "Open connections"),
            log_failures: make.counter("ternion_log_failures_total", "Lines that the log file could not take"),
            memory: make.gauge("process_resident_memory_bytes", "Memory of this process"),
            cpu: make.add(Counter::new("process_cpu_seconds_total", "Processor time of this process")),
            engines: EngineFamilies {
                counters: [
                    counters("ternion_prompt_tokens_total", "Tokens of prompts"),
                    counters("ternion_prefix_cached_tokens_total", "Tokens of prompts not read again"),
                    counters("ternion_completion_tokens_total", "Tokens generated"),
                    counters("ternion_cancelled_total", "Texts whose client went away"),
                    counters("ternion_failed_passes_total", "Passes that failed: please report"),
                ],
                gauges: [
                    gauges("ternion_queue_length", "Texts that wait"),
                    gauges("ternion_running_texts", "Texts that run"),
                    gauges("ternion_kv_bytes", "Bytes of keys and values"),
                ],
                histograms: [
                    histograms("ternion_queue_seconds", "Time in the queue", &REQUEST_SECONDS),
                    histograms("ternion_first_token_seconds", "Time to first token", &REQUEST_SECONDS),
                    histograms("ternion_token_seconds", "Time from token to token", &STEP_SECONDS),
                    histograms("ternion_batch_tokens", "Tokens in a pass", &SIZES),
                    histograms("ternion_batch_texts", "Texts that got a token in a pass", &SIZES),
                    histograms("ternion_pass_seconds", "Time of a pass", &STEP_SECONDS),
                ],
            },
            registry,
        }
    }
}

impl Metrics {
    /// Those of a model's engine.
    #[must_use]
    pub fn engine(&self, model: &str) -> EngineMetrics {
        let EngineFamilies { counters, gauges, histograms } = &self.engines;
        let [prompt_tokens, cached_tokens, completion_tokens, cancelled, failed_passes] =
            counters.each_ref().map(|family| family.with_label_values(&[model]));
        let [waiting, running, kv_bytes] = gauges.each_ref().map(|family| family.with_label_values(&[model]));
        let [queue_time, first_token_time, token_time, batch_tokens, batch_texts, pass_time] =
            histograms.each_ref().map(|family| family.with_label_values(&[model]));
        EngineMetrics {
            prompt_tokens,
            cached_tokens,
            completion_tokens,
            cancelled,
            failed_passes,
            waiting,
            running,
            kv_bytes,
            queue_time,
            first_token_time,
            token_time,
            batch_tokens,
            batch_texts,
            pass_time,
        }
    }

    /// Takes note of what the process uses.
    pub(crate) fn observe(&self, usage: Usage) {
        self.memory.set(i64::try_from(usage.memory).unwrap_or(i64::MAX));
        // Processor time only grows; of two at the same time one may count a hundredth less.
        self.cpu.inc_by((usage.cpu.as_secs_f64() - self.cpu.get()).max(0.0));
    }

    /// Prometheus' text format.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text).expect("memory can be written to");
        String::from_utf8_lossy(&text).into_owned()
    }
}

impl EngineMetrics {
    /// Counts a pass of `tokens` tokens that `texts` texts got a token from.
    pub(crate) fn pass(&self, tokens: usize, texts: usize, time: Duration) {
        self.batch_tokens.observe(tokens as f64);
        self.batch_texts.observe(texts as f64);
        self.pass_time.observe(time.as_secs_f64());
    }

    /// All that grows.
    pub(crate) fn totals(&self) -> Totals {
        Totals {
            prompt_tokens: self.prompt_tokens.get(),
            cached_tokens: self.cached_tokens.get(),
            completion_tokens: self.completion_tokens.get(),
            token_seconds: self.token_time.get_sample_sum(),
            token_steps: self.token_time.get_sample_count(),
            pass_seconds: self.pass_time.get_sample_sum(),
            passes: self.pass_time.get_sample_count(),
            pass_texts: self.batch_texts.get_sample_sum(),
        }
    }
}

/// Sums since the start; their differences are what happened in between.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Totals {
    /// Tokens of prompts.
    pub prompt_tokens: u64,
    /// Tokens of prompts that did not have to be read again.
    pub cached_tokens: u64,
    /// Tokens generated.
    pub completion_tokens: u64,
    /// Seconds from token to token, all together.
    pub token_seconds: f64,
    /// Number of those.
    pub token_steps: u64,
    /// Seconds of all passes.
    pub pass_seconds: f64,
    /// Passes.
    pub passes: u64,
    /// Texts that got a token in a pass, of all passes.
    pub pass_texts: f64,
}

impl std::ops::Sub for Totals {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            prompt_tokens: self.prompt_tokens - before.prompt_tokens,
            cached_tokens: self.cached_tokens - before.cached_tokens,
            completion_tokens: self.completion_tokens - before.completion_tokens,
            token_seconds: self.token_seconds - before.token_seconds,
            token_steps: self.token_steps - before.token_steps,
            pass_seconds: self.pass_seconds - before.pass_seconds,
            passes: self.passes - before.passes,
            pass_texts: self.pass_texts - before.pass_texts,
        }
    }
}

impl std::iter::Sum for Totals {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, one| Self {
            prompt_tokens: sum.prompt_tokens + one.prompt_tokens,
            cached_tokens: sum.cached_tokens + one.cached_tokens,
            completion_tokens: sum.completion_tokens + one.completion_tokens,
            token_seconds: sum.token_seconds + one.token_seconds,
            token_steps: sum.token_steps + one.token_steps,
            pass_seconds: sum.pass_seconds + one.pass_seconds,
            passes: sum.passes + one.passes,
            pass_texts: sum.pass_texts + one.pass_texts,
        })
    }
}
