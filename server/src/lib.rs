//! Serves ternion models over HTTP, as OpenAI's clients expect.
//!
//! - [`engine`]: one thread per model; continuous batching, prompts in chunks, prefix reuse, a fair and bounded queue.
//! - [`api`]: routes, requests and answers; the door that every request passes.
//! - [`listen`]: connections, TLS, limits, draining.
//! - [`metrics`], [`monitor`], [`trace`]: what happened, for machines and for people.
//!
//! Tokens are a function of model, prompt, settings and seed: what else runs, is cached or was asked before changes
//! none of them.

#![forbid(unsafe_code)]

pub mod api;
pub mod engine;
pub mod filter;
pub mod keys;
pub mod listen;
mod live;
pub mod metrics;
pub mod monitor;
mod outgoing;
pub mod process;
pub mod responses;
pub mod sanitise;
pub mod security_log;
mod served;
pub mod trace;
#[cfg(feature = "page")]
mod web;

use std::future::Future;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::http::HeaderValue;
use tokio_rustls::TlsAcceptor;

use api::{ApiError, Fields, Hosts, RateLimit};
use engine::{Engine, EngineOptions, Parts};
use filter::Filter;
use keys::Keys;
use listen::ConnectionLimits;
use live::Recent;
use metrics::Metrics;
use monitor::{Alert, Monitor, Sample, Thresholds};
use process::Usage;
use responses::Responses;
use security_log::{SecurityLog, now};
pub use served::{Offer, Served};
use trace::Tracer;

/// Threads that read requests and write answers. They are idle most of the time: the work is done elsewhere.
const HTTP_THREADS: usize = 2;
/// How often a running server asks whether it is to stop.
const STOP_INTERVAL: Duration = Duration::from_millis(50);

/// Limits of a request.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most tokens of a prompt.
    pub input_tokens: usize,
    /// Most tokens to generate.
    pub output_tokens: usize,
    /// Most bytes of a body.
    pub body_bytes: usize,
    /// Time for a body to arrive.
    pub body_time: Duration,
    /// Time from a request to its last token.
    pub request_time: Duration,
    /// Requests of a client in a minute.
    pub per_minute: Option<NonZeroU32>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            input_tokens: 4096,
            output_tokens: 1024,
            body_bytes: 4 << 20,
            body_time: Duration::from_secs(30),
            request_time: Duration::from_secs(300),
            per_minute: NonZeroU32::new(60),
        }
    }
}

/// Everything about a server but its models.
pub struct Options {
    /// Limits of requests.
    pub limits: Limits,
    /// Limits of connections.
    pub connections: ConnectionLimits,
    /// Keys that open it; `None`: it is open.
    pub keys: Option<Keys>,
    /// What neither requests nor answers may say.
    pub filter: Filter,
    /// Where spans of requests are sent; `None`: nowhere.
    pub tracer: Option<Tracer>,
    /// Where requests are noted.
    pub log: SecurityLog,
    /// Bytes that kept answers may take; 0 keeps none.
    pub response_bytes: usize,
    /// The seed of requests that name none; `None` draws one for each.
    pub seed: Option<u64>,
    /// Measured read bandwidth of main memory in bytes per second, for the live panel.
    pub bandwidth: Option<f64>,
    /// When to raise alerts.
    pub thresholds: Thresholds,
    /// Where alerts are sent, as JSON by POST.
    pub webhook: Option<String>,
    /// The names that it may be asked under.
    pub hosts: Hosts,
    /// The origin whose pages may read answers.
    pub cors: Option<HeaderValue>,
    /// Whether there is a web page, if it is built in.
    pub page: bool,
    /// Encrypts connections.
    pub tls: Option<TlsAcceptor>,
    /// Time between saying that the server stops and accepting nothing more.
    pub drain_delay: Duration,
}

impl Default for Options {
    /// Open to whoever reaches it, within the usual limits, with a web page.
    fn default() -> Self {
        Self {
            limits: Limits::default(),
            connections: ConnectionLimits::default(),
            keys: None,
            filter: Filter::default(),
            tracer: None,
            log: SecurityLog::default(),
            response_bytes: 16_000_000,
            seed: Some(0),
            bandwidth: None,
            thresholds: Thresholds::default(),
            webhook: None,
            hosts: Hosts::default(),
            cors: None,
            page: true,
            tls: None,
            drain_delay: Duration::ZERO,
        }
    }
}

/// Why a server could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// There are no models.
    #[error("there is no model to serve")]
    NoModels,
    /// Two models have the same name.
    #[error("two models are called {0}: give one another name (--model NAME=PATH)")]
    SameName(String),
    /// A context that the model does not have.
    #[error("{name}: a context of {asked} tokens: this model has 1 to {limit}")]
    Context {
        /// The model.
        name: String,
        /// What was asked for.
        asked: usize,
        /// What it has.
        limit: usize,
    },
    /// The system refuses something.
    #[error("{what}: {source}")]
    System {
        /// What it refuses.
        what: String,
        /// How it says so.
        source: std::io::Error,
    },
}

/// The state that all requests share.
pub struct App {
    options: Options,
    models: Vec<Arc<Served>>,
    metrics: Metrics,
    monitor: Monitor,
    filter: Arc<Filter>,
    responses: Arc<Responses>,
    rate: RateLimit,
    log: SecurityLog,
    draining: AtomicBool,
    recent: Recent,
    processors: usize,
    /// When it started, by a clock that never jumps, and by the one on the wall.
    started: Instant,
    created: u64,
    requests: AtomicU64,
    answers: AtomicU64,
    /// Makes digests of clients, and names of requests, those of this run.
    salt: [u8; 16],
    run: String,
}

impl App {
    /// Starts an engine for each model.
    ///
    /// # Errors
    /// If there are none, two have the same name, or the system refuses a thread or random numbers.
    pub fn new(mut options: Options, offers: Vec<(Offer, EngineOptions)>) -> Result<Self, StartError> {
        if offers.is_empty() {
            return Err(StartError::NoModels);
        }
        let system = |what: &str, source| StartError::System { what: what.to_owned(), source };
        let mut salt = [0; 16];
        getrandom::fill(&mut salt).map_err(|error| system("no random numbers", std::io::Error::other(error)))?;
        let metrics = Metrics::default();
        let filter = Arc::new(std::mem::take(&mut options.filter));
        let responses = Arc::new(Responses::new(options.response_bytes, metrics.clone()));
        let mut models: Vec<Arc<Served>> = Vec::new();
        for (offer, engine) in offers {
            if models.iter().any(|served| served.name == offer.name) {
                return Err(StartError::SameName(offer.name));
            }
            let limit = offer.model.config().context;
            if engine.context == 0 || engine.context > limit {
                return Err(StartError::Context { name: offer.name, asked: engine.context, limit });
            }
            let parts = Parts {
                model: Arc::clone(&offer.model),
                team: Arc::clone(&offer.team),
                tokenizer: Arc::clone(&offer.tokenizer),
                stop_tokens: offer.stop_tokens.clone(),
                filter: Arc::clone(&filter),
                metrics: metrics.engine(&offer.name),
                responses: Arc::clone(&responses),
            };
            let engine = Engine::start(&offer.name, parts, engine).map_err(|error| system("no thread", error))?;
            models.push(Arc::new(Served::new(offer, engine)));
        }
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self {
            rate: RateLimit::new(options.limits.per_minute),
            monitor: Monitor::new(options.thresholds, Usage::now(), processors),
            recent: Recent::default(),
            processors,
            log: std::mem::take(&mut options.log),
            run: keys::hex(&salt[..4]),
            draining: AtomicBool::new(false),
            started: Instant::now(),
            created: now() as u64,
            requests: AtomicU64::new(0),
            answers: AtomicU64::new(0),
            options,
            models,
            metrics,
            filter,
            responses,
            salt,
        })
    }

    /// The model that a request names, or the first.
    fn model(&self, fields: &Fields) -> Result<Arc<Served>, ApiError> {
        self.model_named(fields.string("model")?)
    }

    fn model_named(&self, name: Option<&str>) -> Result<Arc<Served>, ApiError> {
        let found = match name {
            None => self.models.first(),
            Some(name) => self.models.iter().find(|served| served.name == name),
        };
        let names = || self.models.iter().map(|served| served.name.as_str()).collect::<Vec<_>>();
        found.cloned().ok_or_else(|| ApiError::no_model(name.unwrap_or_default(), &names()))
    }
}

/// Serves at `address` until `stop` is ready, then sees what is open to its end. `listening` is told the address, with
/// the port that the system chose if it was 0, and `alert` what passes a threshold. Returns whether everything that had
/// been accepted was answered.
///
/// # Errors
/// If the address cannot be bound.
pub async fn serve(
    app: Arc<App>,
    address: SocketAddr,
    stop: impl Future<Output = ()>,
    listening: impl FnOnce(SocketAddr),
    alert: impl Fn(&Alert) + Send + 'static,
) -> Result<bool, StartError> {
    let bound = listen::bind(address).await;
    let refused = |source| StartError::System { what: format!("cannot listen on {address}"), source };
    let listener = bound.map_err(refused)?;
    listening(listener.local_addr().map_err(refused)?);
    let watching = tokio::spawn(watch(Arc::clone(&app), alert));
    let stopping = async {
        stop.await;
        app.draining.store(true, Ordering::SeqCst);
        tokio::time::sleep(app.options.drain_delay).await;
    };
    let (router, limits) = (api::router(Arc::clone(&app)), app.options.connections);
    let tls = app.options.tls.clone();
    let give_up = || app.models.iter().for_each(|served| served.engine.give_up());
    let answered = listen::serve(listener, tls, router, limits, app.metrics.clone(), stopping, give_up).await;
    watching.abort();
    // All requests have their answers: what still runs has no reader.
    give_up();
    let engines = Arc::clone(&app);
    let joined = tokio::task::spawn_blocking(move || {
        let ended = engines.models.iter().all(|served| served.engine.join(Duration::from_secs(5)));
        if let Some(tracer) = &engines.options.tracer {
            tracer.stop();
        }
        ended
    });
    // Waited for even if not all was answered: engines end their texts, and traces are sent.
    let joined = joined.await.unwrap_or(false);
    Ok(answered && joined)
}

/// [`serve`] on a runtime of its own, until `stop` says so.
///
/// # Errors
/// If the address cannot be bound, or the system refuses threads.
pub fn run(
    app: Arc<App>,
    address: SocketAddr,
    stop: impl Fn() -> bool,
    listening: impl FnOnce(SocketAddr),
    alert: impl Fn(&Alert) + Send + 'static,
) -> Result<bool, StartError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(HTTP_THREADS)
        .thread_name("http")
        .enable_all()
        .build()
        .map_err(|source| StartError::System { what: "no threads".to_owned(), source })?;
    let stopped = async {
        while !stop() {
            tokio::time::sleep(STOP_INTERVAL).await;
        }
    };
    runtime.block_on(serve(app, address, stopped, listening, alert))
}

/// Looks at the system every second, and raises alerts.
async fn watch(app: Arc<App>, alert: impl Fn(&Alert) + Send + 'static) {
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        app.rate.forget_quiet();
        let (time, usage) = (app.started.elapsed(), Usage::now());
        app.metrics.observe(usage);
        let totals: Vec<_> = app.models.iter().map(|served| served.engine.metrics().totals()).collect();
        let sample = Sample { time, usage, totals: totals.iter().copied().sum() };
        app.recent.push(time, usage, totals);
        for raised in app.monitor.tick(sample) {
            alert(&raised);
            if let Some(url) = app.options.webhook.clone() {
                // A webhook that does not answer must not stop the watch.
                tokio::task::spawn_blocking(move || monitor::post(&url, &raised));
            }
        }
    }
}
