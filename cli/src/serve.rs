//! `ternion serve`: models behind an HTTP interface that OpenAI's clients understand.

mod plan;

use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::num::NonZeroU32;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use ternion_compiler::Cpu;
use ternion_runtime::formats::Checkpoint;
use ternion_runtime::model::{DEFAULT_CHUNK, KernelChoice, KvType, start_request};
use ternion_runtime::team::Team;
use ternion_server::api::Hosts;
use ternion_server::engine::EngineOptions;
use ternion_server::filter::Filter;
use ternion_server::keys::{Keys, new_key};
use ternion_server::listen::{ConnectionLimits, tls};
use ternion_server::monitor::{Alert, Thresholds};
use ternion_server::security_log::SecurityLog;
use ternion_server::trace::Tracer;
use ternion_server::{App, Limits, Offer, Options};
use ternion_tuner::{CpuProfile, SystemStopwatch, probe};

use crate::arguments::{ForcedKernel, ReadOptions, Threads, parse_kernel, parse_time};
use crate::model::{cpu, forced, load, open, schedules};
use crate::output::print;
use crate::purpose::Preset;
use crate::serve::plan::{Plan, Wishes, plan, preset, threads};
use crate::terminal::note;
use crate::{UsageError, interrupt};

/// What is served, where, to whom and within which limits.
#[derive(Debug, Args)]
#[command(
    after_help = "The interface, every limit and what is measured: docs/src/server.md. The first Ctrl-C or SIGTERM lets \
    open requests end, the second does not wait."
)]
pub(crate) struct Serve {
    /// A model to serve, as PATH or NAME=PATH: a prepared file (.tern), a Hugging Face directory, a GGUF file or the name
    /// of a pulled model; may be given several times; without it, the embedded model is served
    #[arg(short, long, value_name = "[NAME=]MODEL")]
    model: Vec<String>,
    #[command(flatten)]
    read: ReadOptions,
    /// Address to listen at; the default is reachable from this machine alone
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    host: IpAddr,
    /// Port to listen at; 0 takes a free one
    #[arg(long, default_value_t = 8080)]
    port: u16,
    #[command(flatten)]
    layout: Layout,
    #[command(flatten)]
    limits: RequestLimits,
    #[command(flatten)]
    security: Security,
    #[command(flatten)]
    alerts: Alerts,
    #[command(flatten)]
    traces: Traces,
}

/// How models run.
#[derive(Debug, Args)]
#[command(next_help_heading = "How models run (what is not given is chosen, and said with the reason)")]
struct Layout {
    /// Lay the server out for this use [default: what the machine is good for]
    #[arg(long = "for", value_name = "USE")]
    preset: Option<Preset>,
    #[command(flatten)]
    threads: Threads,
    /// Memory for each model with its keys and values, in MB [default: half of what is free, or what --for says]
    #[arg(long, value_name = "MB")]
    memory_limit: Option<u64>,
    /// Texts that run at the same time, of each model
    #[arg(long, value_name = "TEXTS")]
    parallel: Option<NonZeroUsize>,
    /// Tokens that a text may have, read and generated
    #[arg(short, long, value_name = "TOKENS")]
    context: Option<NonZeroUsize>,
    /// Prompt tokens that a pass takes besides the running texts: more makes prompts faster and running texts wait longer
    #[arg(long, value_name = "TOKENS", default_value_t = NonZeroUsize::new(DEFAULT_CHUNK).expect("not zero"))]
    chunk: NonZeroUsize,
    /// Type of the key-value cache
    #[arg(long, value_name = "TYPE", default_value = "f16")]
    kv: KvType,
    /// Memory for keys and values of finished texts, which spare reading what a new prompt begins with, in MB
    #[arg(long, value_name = "MB")]
    prefix_cache: Option<u64>,
    /// Memory for answers that are given again without a pass, in MB; 0 keeps none
    #[arg(long, value_name = "MB", default_value_t = 16)]
    response_cache: usize,
    /// Seed of requests that name none: a number, or `random` for another one each time
    #[arg(long, value_name = "SEED", default_value = "0", value_parser = parse_seed)]
    seed: Seed,
    /// Use this kernel family or this very schedule instead of the fastest known; tokens stay the same
    #[arg(long, value_name = "FAMILY|SCHEDULE", value_parser = parse_kernel)]
    kernel: Option<ForcedKernel>,
}

#[derive(Clone, Copy, Debug)]
struct Seed(Option<u64>);

fn parse_seed(text: &str) -> Result<Seed, String> {
    match text {
        "random" => Ok(Seed(None)),
        _ => text.parse().map(|seed| Seed(Some(seed))).map_err(|_| "expected a whole number or `random`".to_owned()),
    }
}

/// What one request, one client and all of them together may ask for.
#[derive(Debug, Args)]
#[command(next_help_heading = "Limits")]
struct RequestLimits {
    /// Most tokens of a prompt
    #[arg(long, value_name = "TOKENS", default_value = "4096")]
    max_input: NonZeroUsize,
    /// Most tokens that a request may have generated, and what it gets if it does not say
    #[arg(long, value_name = "TOKENS", default_value = "1024")]
    max_output: NonZeroUsize,
    /// Most bytes of a request's body, in kB
    #[arg(long, value_name = "KB", default_value = "4096")]
    max_body: NonZeroUsize,
    /// Requests of one client in a minute; 0 does not count them
    #[arg(long, value_name = "REQUESTS", default_value = "60")]
    rate_limit: u32,
    /// Requests that may wait for each model; more are told to come back
    #[arg(long, value_name = "REQUESTS", default_value = "256")]
    queue: usize,
    /// Time from a request to its last token
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = parse_time)]
    request_time: Duration,
    /// Time for a request's body to arrive
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_time)]
    body_time: Duration,
    /// Time for a request's head to arrive, for a TLS handshake, and for a client to take what is sent
    #[arg(long, value_name = "TIME", default_value = "20s", value_parser = parse_time)]
    patience: Duration,
    /// Connections at the same time; more wait to be accepted
    #[arg(long, value_name = "CONNECTIONS", default_value = "512")]
    connections: NonZeroUsize,
    /// Time that open requests have to end when the server stops
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_time)]
    drain: Duration,
    /// Time to go on accepting requests, while /health/ready says no, before the server stops: for load balancers
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = parse_time)]
    drain_delay: Duration,
}

/// Who may ask, and what.
#[derive(Debug, Args)]
#[command(next_help_heading = "Security")]
struct Security {
    /// Let in only clients with one of the keys in this file (made by --add-key)
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Make a key under this name, add its digest to the key file, print the key, and end
    #[arg(long, value_name = "NAME", requires = "api_key_file")]
    add_key: Option<String>,
    /// The new key may also read reports (/admin)
    #[arg(long, requires = "add_key")]
    admin: bool,
    /// Refuse requests and cut off answers that match a regular expression in this file, one a line
    #[arg(long, value_name = "FILE")]
    filter: Option<PathBuf>,
    /// Add a JSON line for each request to this file: who, what and how it ended, never what was said
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// Encrypt with this certificate chain (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// The certificate's key (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Let requests in that ask for this host (a proxy's name, say) and refuse other names; addresses and localhost are
    /// always let in; may be given several times; `*` lets all in [default: none with a local --host, else all]
    #[arg(long, value_name = "NAME", value_parser = parse_host)]
    allow_host: Vec<String>,
    /// Let the pages of this origin ask, for example https://example.org; `*` lets all
    #[arg(long, value_name = "ORIGIN", value_parser = parse_origin)]
    cors: Option<String>,
    /// Serve no web page
    #[arg(long)]
    no_page: bool,
}

fn parse_host(text: &str) -> Result<String, String> {
    let is_name = |text: &str| text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte));
    match text.strip_suffix('.').unwrap_or(text) {
        name if name == "*" || !name.is_empty() && is_name(name) => Ok(name.to_owned()),
        _ => Err("expected a host's name, without https:// and port, or *".to_owned()),
    }
}

fn parse_origin(text: &str) -> Result<String, String> {
    let is_origin = |origin: &str| {
        let host = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
        host.is_some_and(|host| !host.is_empty() && host.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/'))
    };
    if text == "*" || is_origin(text) {
        Ok(text.to_owned())
    } else {
        Err("expected http://HOST, https://HOST or *, without a path".to_owned())
    }
}

/// Thresholds, looked at every minute; 0 turns one off.
#[derive(Debug, Args)]
#[command(next_help_heading = "Alerts (looked at every minute; 0 turns one off)")]
struct Alerts {
    /// Memory above that at the start, in MB
    #[arg(long, value_name = "MB", default_value_t = 1024.0, value_parser = parse_threshold)]
    alert_memory: f64,
    /// Use of all processors, in percent
    #[arg(long, value_name = "PERCENT", default_value_t = 80.0, value_parser = parse_threshold)]
    alert_cpu: f64,
    /// Fewer tokens per second and text
    #[arg(long, value_name = "TOKENS", default_value_t = 5.0, value_parser = parse_threshold)]
    alert_speed: f64,
    /// Requests that end with an error of the server, in percent
    #[arg(long, value_name = "PERCENT", default_value_t = 5.0, value_parser = parse_threshold)]
    alert_errors: f64,
    /// Time until an answer begins, on average, in ms
    #[arg(long, value_name = "MS", default_value_t = 5000.0, value_parser = parse_threshold)]
    alert_latency: f64,
    /// Send alerts to this address too, as JSON by POST
    #[arg(long, value_name = "URL", value_parser = parse_url)]
    alert_webhook: Option<String>,
}

fn parse_threshold(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number| (0.0..1e12).contains(number));
    number.ok_or_else(|| "expected a number from 0".to_owned())
}

fn parse_url(text: &str) -> Result<String, String> {
    match text.starts_with("http://") || text.starts_with("https://") {
        true => Ok(text.to_owned()),
        false => Err("expected http://… or https://…".to_owned()),
    }
}

/// Spans of requests for a collector.
#[derive(Debug, Args)]
#[command(next_help_heading = "Traces")]
struct Traces {
    /// Send traces of requests (times, tokens, codes; never what was said) to this OpenTelemetry collector, by OTLP over HTTP,
    /// for example http://127.0.0.1:4318 [default: OTEL_EXPORTER_OTLP_ENDPOINT of the environment, or else nowhere]
    #[arg(long, value_name = "URL", value_parser = parse_url)]
    otlp_endpoint: Option<String>,
}

impl Traces {
    fn tracer(&self) -> Result<Option<Tracer>> {
        let variable = "OTEL_EXPORTER_OTLP_ENDPOINT";
        let endpoint = match (&self.otlp_endpoint, std::env::var(variable)) {
            (Some(endpoint), _) => endpoint.clone(),
            (None, Ok(endpoint)) if !endpoint.is_empty() => {
                parse_url(&endpoint).map_err(|error| UsageError(format!("{variable} {endpoint:?}: {error}")))?
            }
            _ => return Ok(None),
        };
        Ok(Some(Tracer::new(&endpoint, |warning| note(&format!("warning: {warning}")))?))
    }
}

impl Alerts {
    fn thresholds(&self) -> Thresholds {
        let on = |threshold: f64| (threshold > 0.0).then_some(threshold);
        Thresholds {
            memory_mb: on(self.alert_memory),
            cpu_percent: on(self.alert_cpu),
            tokens_per_second: on(self.alert_speed),
            error_percent: on(self.alert_errors),
            latency_ms: on(self.alert_latency),
        }
    }
}

pub(crate) fn serve(options: &Serve) -> Result<ExitCode> {
    if let (Some(name), Some(path)) = (&options.security.add_key, &options.security.api_key_file) {
        return add_key(name, options.security.admin, path);
    }
    let address = SocketAddr::new(options.host, options.port);
    // Loading takes a while: what would fail after it is better found before.
    drop(TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))?);
    let server = server_options(options)?;
    let machine = probe();
    let wishes = options.layout.wishes(&options.limits);
    let team = {
        let threads = threads(&wishes);
        let (preset, reason) = preset(&wishes, &machine);
        note(&format!("for {}: {reason}", preset.name()));
        note(&format!("threads {threads}"));
        Arc::new(Team::new(threads.value)?)
    };
    let server = Options { bandwidth: machine.memory_bandwidth(&*team, &SystemStopwatch::start()), ..server };
    let offers = offers(options, &wishes, &machine, &team)?;
    let app = Arc::new(App::new(server, offers)?);
    warn(options);
    let scheme = if options.security.tls_cert.is_some() { "https" } else { "http" };
    let listening = |address| note(&format!("listening on {scheme}://{address}"));
    let alert = |alert: &Alert| note(&format!("alert: {alert}"));
    let answered = ternion_server::run(app, address, interrupt::requested, listening, alert)?;
    if !answered {
        bail!("not all requests ended in time: the rest were told so (--drain gives them longer)");
    }
    note("stopped: all requests were answered");
    Ok(ExitCode::SUCCESS)
}

/// What a user may not have meant.
fn warn(options: &Serve) {
    let open = options.security.api_key_file.is_none();
    if !options.host.is_loopback() && open {
        note("warning: whoever reaches this machine may use the server: --api-key-file asks for keys");
    }
    if !options.host.is_loopback() && !open && options.security.tls_cert.is_none() {
        note("warning: keys and texts travel unencrypted: --tls-cert, or a proxy in front, encrypts");
    }
}

/// Adds a line to the key file, which only its owner may read.
fn add_key(name: &str, admin: bool, path: &Path) -> Result<ExitCode> {
    if name.is_empty() || name.starts_with('#') || name.contains(char::is_whitespace) {
        return Err(UsageError(format!("--add-key {name:?}: expected a name without spaces")).into());
    }
    let shown = path.display();
    let known = match std::fs::read_to_string(path) {
        Ok(known) => known,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error).with_context(|| format!("{shown} cannot be read")),
    };
    Keys::parse(&known).map_err(|error| anyhow::anyhow!("{shown}, {error}"))?;
    if known.lines().any(|line| line.split_whitespace().next() == Some(name)) {
        bail!("{shown} has a key called {name}: take its line out or choose another name");
    }
    let (key, line) = new_key(name, admin).context("the system has no random numbers")?;
    let break_line = if known.is_empty() || known.ends_with('\n') { "" } else { "\n" };
    let mut open = std::fs::OpenOptions::new();
    open.create(true).append(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut open, 0o600);
    let written = open.open(path).and_then(|mut file| write!(file, "{break_line}{line}"));
    written.with_context(|| format!("{shown} cannot be written"))?;
    note(&format!("added {name} to {shown}; the key is shown this once:"));
    print(&format!("{key}\n"))?;
    Ok(ExitCode::SUCCESS)
}

/// Everything but models.
fn server_options(options: &Serve) -> Result<Options> {
    let Serve { layout, limits, security, alerts, traces, .. } = options;
    let read =
        |path: &Path| std::fs::read_to_string(path).with_context(|| format!("{} cannot be read", path.display()));
    let keys = security.api_key_file.as_deref().map(|path| {
        let keys = Keys::parse(&read(path)?).map_err(|error| anyhow::anyhow!("{}, {error}", path.display()))?;
        if keys.is_empty() {
            bail!("{} holds no key, so nobody could come in: make one with --add-key NAME", path.display());
        }
        Ok(keys)
    });
    let filter = match &security.filter {
        Some(path) => Filter::parse(&read(path)?).with_context(|| path.display().to_string())?,
        None => Filter::default(),
    };
    let log = match &security.log {
        Some(path) => SecurityLog::open(path).with_context(|| format!("{} cannot be written", path.display()))?,
        None => SecurityLog::default(),
    };
    let tls = match (&security.tls_cert, &security.tls_key) {
        (Some(certificate), Some(key)) => Some(tls(certificate, key).map_err(anyhow::Error::msg)?),
        _ => None,
    };
    Ok(Options {
        limits: Limits {
            input_tokens: limits.max_input.get(),
            output_tokens: limits.max_output.get(),
            body_bytes: limits.max_body.get().saturating_mul(1000),
            body_time: limits.body_time,
            request_time: limits.request_time,
            per_minute: NonZeroU32::new(limits.rate_limit),
        },
        connections: ConnectionLimits {
            connections: limits.connections.get(),
            patience: limits.patience,
            drain: limits.drain,
        },
        keys: keys.transpose()?,
        tracer: traces.tracer()?,
        filter,
        log,
        response_bytes: layout.response_cache.saturating_mul(1_000_000),
        seed: layout.seed.0,
        bandwidth: None,
        thresholds: alerts.thresholds(),
        webhook: alerts.alert_webhook.clone(),
        hosts: Hosts::new(options.host, &security.allow_host),
        cors: security.cors.as_deref().map(|origin| origin.parse().expect("checked with the arguments")),
        page: !security.no_page,
        tls,
        drain_delay: limits.drain_delay,
    })
}

impl Layout {
    fn wishes(&self, limits: &RequestLimits) -> Wishes {
        let megabytes = |mb: Option<u64>| mb.map(|mb| mb.saturating_mul(1_000_000));
        Wishes {
            preset: self.preset,
            threads: self.threads.threads.map(usize::from),
            parallel: self.parallel.map(usize::from),
            context: self.context.map(usize::from),
            prefix_cache: megabytes(self.prefix_cache),
            memory: megabytes(self.memory_limit),
            request: limits.max_input.get().saturating_add(limits.max_output.get()),
        }
    }
}

/// The models, ready to run.
fn offers(
    options: &Serve,
    wishes: &Wishes,
    machine: &CpuProfile,
    team: &Arc<Team>,
) -> Result<Vec<(Offer, EngineOptions)>> {
    let cpu = cpu()?;
    let named: Vec<(Option<&str>, Option<&Path>)> = match &options.model[..] {
        [] => vec![(None, None)],
        models => models.iter().map(|model| split(model)).map(|(name, path)| (name, Some(path))).collect(),
    };
    let models = named.len();
    let offer = |(name, path): (Option<&str>, Option<&Path>)| {
        let checkpoint = open(path, &options.read)?;
        let name = name.map_or_else(|| short(&checkpoint.name()), str::to_owned);
        let plan = plan(wishes, checkpoint.config(), options.layout.kv, machine, models);
        let Plan { parallel, context, prefix_cache } = &plan;
        note(&format!("{name}: parallel {parallel}"));
        note(&format!("{name}: context {context}"));
        note(&format!("{name}: prefix cache {prefix_cache}"));
        let offer = offer(name, options, &checkpoint, &cpu, team)?;
        Ok((offer, options.layout.engine(&options.limits, &plan)))
    };
    named.into_iter().map(offer).collect()
}

/// `NAME=PATH`, unless there is a file of that name.
fn split(model: &str) -> (Option<&str>, &Path) {
    match model.split_once('=') {
        Some((name, path)) if !name.is_empty() && !name.contains(['/', '\\']) && !Path::new(model).exists() => {
            (Some(name), Path::new(path))
        }
        _ => (None, Path::new(model)),
    }
}

/// A model's name without what its file's name says besides.
fn short(name: &str) -> String {
    let name = name.strip_suffix(" (embedded)").unwrap_or(name);
    let name = [".tern", ".gguf"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
    name.to_owned()
}

impl Layout {
    fn engine(&self, limits: &RequestLimits, plan: &Plan) -> EngineOptions {
        EngineOptions {
            parallel: plan.parallel.value,
            chunk: self.chunk.get(),
            queue: limits.queue,
            prefix_bytes: plan.prefix_cache.value.saturating_mul(1_000_000),
            kv: self.kv,
            context: plan.context.value,
        }
    }
}

fn offer(name: String, options: &Serve, checkpoint: &Checkpoint, cpu: &Cpu, team: &Arc<Team>) -> Result<Offer> {
    let kernels = match options.layout.kernel {
        Some(kernel) => forced(kernel),
        None => KernelChoice::Tuned(schedules(&start_request(checkpoint), cpu, team)?),
    };
    let model = load(checkpoint, &kernels, cpu, team)?;
    Ok(Offer::new(name, checkpoint, Arc::new(model), Arc::clone(team))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_may_have_a_name() {
        assert_eq!(split("small=models/a.tern"), (Some("small"), Path::new("models/a.tern")));
        assert_eq!(split("models/a=b.tern"), (None, Path::new("models/a=b.tern")));
        assert_eq!(split("a.tern"), (None, Path::new("a.tern")));
        assert_eq!(["a.tern", "b.gguf", "ternary-tales (embedded)"].map(short), ["a", "b", "ternary-tales"]);
    }

    #[test]
    fn hosts_have_no_port() {
        assert_eq!(parse_host("chat.example.org."), Ok("chat.example.org".to_owned()));
        assert_eq!(parse_host("*"), Ok("*".to_owned()));
        for host in ["", ".", "example.org:80", "http://example.org", "a b", "*.example.org", "[::1]"] {
            assert!(parse_host(host).is_err(), "{host:?}");
        }
    }

    #[test]
    fn origins_have_no_path() {
        for origin in ["*", "https://example.org", "http://localhost:3000"] {
            assert!(parse_origin(origin).is_ok(), "{origin}");
        }
        for origin in ["", "example.org", "https://", "https://example.org/", "https://a b", "https://a\n"] {
            assert!(parse_origin(origin).is_err(), "{origin:?}");
        }
    }
}
