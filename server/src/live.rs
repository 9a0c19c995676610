//! What the machine is doing right now: `GET /admin/live.json`, for the web page's panel.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::Serialize;
use ternion_runtime::formats::Projection;
use ternion_runtime::team::Workers;
use ternion_tuner::Class;

use crate::metrics::Totals;
use crate::process::Usage;
use crate::{App, Served};

/// Samples that rates are taken over, one a second.
const SAMPLES: usize = 4;

/// What has lately been counted: when, by this process, and by every engine.
#[derive(Debug, Default)]
pub(crate) struct Recent(Mutex<VecDeque<(Duration, Usage, Vec<Totals>)>>);

impl Recent {
    pub(crate) fn push(&self, time: Duration, usage: Usage, totals: Vec<Totals>) {
        let mut samples = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if samples.len() == SAMPLES {
            samples.pop_front();
        }
        samples.push_back((time, usage, totals));
    }
}

/// The answer.
#[derive(Debug, Serialize)]
pub(crate) struct Live {
    version: &'static str,
    uptime_seconds: u64,
    draining: bool,
    /// Requests since the start.
    requests: u64,
    connections: i64,
    memory_bytes: u64,
    /// Percent of all processors.
    cpu_percent: f64,
    cache_hits: u64,
    cache_misses: u64,
    /// Measured read bandwidth of main memory.
    memory_bandwidth: Option<f64>,
    models: Vec<LiveModel>,
}

/// Rates are those of the last seconds.
#[derive(Debug, Serialize)]
struct LiveModel {
    name: String,
    kind: &'static str,
    threads: usize,
    parallel: usize,
    context: usize,
    /// Texts that run and that wait.
    running: i64,
    waiting: i64,
    kv_bytes: i64,
    /// Bytes of weights that a pass reads.
    bytes_per_pass: usize,
    /// Generated tokens per second, of all texts together.
    tokens_per_second: f64,
    prompt_tokens_per_second: f64,
    passes_per_second: f64,
    /// Texts that got a token in a pass, on average; `null` if there was none.
    batch: Option<f64>,
    /// Milliseconds of a pass.
    pass_ms: Option<f64>,
    /// Bytes of weights that passes read while they ran, in percent of the memory's bandwidth. A model that fits into a
    /// cache may exceed 100.
    roofline_percent: Option<f64>,
    /// Tokens since the start.
    prompt_tokens: u64,
    cached_tokens: u64,
    completion_tokens: u64,
    kernels: Vec<Kernel>,
}

/// The kernels of one shape.
#[derive(Debug, Serialize)]
struct Kernel {
    m: usize,
    k: usize,
    /// The matrices of a layer that have it.
    projections: Vec<String>,
    /// By the number of tokens in a pass, from few to many.
    schedules: Vec<Schedule>,
}

#[derive(Debug, Serialize)]
struct Schedule {
    tokens: &'static str,
    schedule: String,
}

pub(crate) fn live(app: &App) -> Live {
    let samples = app.recent.0.lock().unwrap_or_else(PoisonError::into_inner);
    let ends = samples.front().zip(samples.back());
    let seconds = ends.map_or(0.0, |(first, last)| (last.0 - first.0).as_secs_f64());
    let used = ends.map_or(0.0, |(first, last)| last.1.cpu.saturating_sub(first.1.cpu).as_secs_f64());
    let rate = |count: f64| if seconds > 0.0 { count / seconds } else { 0.0 };
    let models = app.models.iter().enumerate().map(|(at, served)| {
        let lately = ends.map_or(Totals::default(), |(first, last)| last.2[at] - first.2[at]);
        model(app, served, lately, &rate)
    });
    Live {
        version: env!("CARGO_PKG_VERSION"),
        uptime_seconds: app.started.elapsed().as_secs(),
        draining: app.draining.load(Ordering::SeqCst),
        requests: app.requests.load(Ordering::Relaxed),
        connections: app.metrics.connections.get(),
        memory_bytes: Usage::now().memory,
        cpu_percent: 100.0 * rate(used) / app.processors as f64,
        cache_hits: app.metrics.cache_hits.get(),
        cache_misses: app.metrics.cache_misses.get(),
        memory_bandwidth: app.options.bandwidth,
        models: models.collect(),
    }
}

fn model(app: &App, served: &Served, lately: Totals, rate: &dyn Fn(f64) -> f64) -> LiveModel {
    let (engine, metrics) = (&served.engine, served.engine.metrics());
    let totals = metrics.totals();
    let bytes = bytes_per_pass(served);
    let per_pass = |sum: f64| (lately.passes > 0).then(|| sum / lately.passes as f64);
    let speed = |seconds: f64| (lately.passes as f64 * bytes as f64) / seconds.max(1e-9);
    LiveModel {
        name: served.name.clone(),
        kind: served.kind(),
        threads: engine.team().threads(),
        parallel: engine.options().parallel,
        context: engine.options().context,
        running: metrics.running.get(),
        waiting: metrics.waiting.get(),
        kv_bytes: metrics.kv_bytes.get(),
        bytes_per_pass: bytes,
        tokens_per_second: rate(lately.completion_tokens as f64),
        prompt_tokens_per_second: rate(lately.prompt_tokens as f64),
        passes_per_second: rate(lately.passes as f64),
        batch: per_pass(lately.pass_texts),
        pass_ms: per_pass(1e3 * lately.pass_seconds),
        roofline_percent: app
            .options
            .bandwidth
            .filter(|_| lately.passes > 0)
            .map(|bandwidth| 100.0 * speed(lately.pass_seconds) / bandwidth),
        prompt_tokens: totals.prompt_tokens,
        cached_tokens: totals.cached_tokens,
        completion_tokens: totals.completion_tokens,
        kernels: kernels(served),
    }
}

/// The ternary matrices, and the head or its screen.
fn bytes_per_pass(served: &Served) -> usize {
    let (report, config) = (served.engine.model().report(), served.engine.model().config());
    let head = if report.screen_bytes > 0 { report.screen_bytes } else { config.vocabulary * config.hidden * 2 };
    report.packed_bytes + report.mapped_bytes + if config.pooling.is_some() { 0 } else { head }
}

fn kernels(served: &Served) -> Vec<Kernel> {
    let (model, mut kernels) = (served.engine.model(), Vec::<Kernel>::new());
    for projection in Projection::ALL {
        let (m, k) = projection.shape(model.config());
        let name = projection.to_string();
        match kernels.iter_mut().find(|kernel| (kernel.m, kernel.k) == (m, k)) {
            Some(kernel) => kernel.projections.push(name),
            None => {
                let schedule = |class: Class| {
                    let schedule = model.schedule(projection, class.measured()).to_string();
                    Schedule { tokens: class.name(), schedule }
                };
                kernels.push(Kernel { m, k, projections: vec![name], schedules: Class::ALL.map(schedule).into() });
            }
        }
    }
    kernels
}
