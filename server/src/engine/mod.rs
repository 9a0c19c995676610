//! The engine: one thread per model that owns the batch, and the queue that leads to it.
//!
//! Requests come in through [`Engine::submit`] from any thread and are answered by [`Event`]s. The thread runs one pass
//! over the weights after the other; each pass takes the next token of every running text and a bounded piece of the
//! prompts that are still to be read. What a text becomes depends on nothing else in the pass, bit for bit.

mod grammar;
mod prefix;
mod queue;
mod scheduler;
mod slot;
mod text;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ternion_runtime::model::{KvType, Model};
use ternion_runtime::sampling::Sampling;
use ternion_runtime::team::Team;
use ternion_runtime::text::Tokenizer;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

pub use grammar::{Grammar, GrammarError, Grammars};

use crate::filter::Filter;
use crate::metrics::EngineMetrics;
use crate::responses::{Key, Responses};
use crate::trace::{End, TextTrace};

/// How an engine runs its model.
#[derive(Clone, Copy, Debug)]
pub struct EngineOptions {
    /// Texts that run at the same time, at least 1.
    pub parallel: usize,
    /// Tokens of prompts that a pass may take besides the running texts, at least 1.
    pub chunk: usize,
    /// Requests that may wait.
    pub queue: usize,
    /// Bytes that keys and values of finished texts may take.
    pub prefix_bytes: usize,
    /// Precision of the KV cache.
    pub kv: KvType,
    /// Tokens that a text may have in all.
    pub context: usize,
}

/// What is asked of a text.
#[derive(Clone, Debug)]
pub enum Task {
    /// Go on with it.
    Generate(Box<Generation>),
    /// Make a vector of it.
    Embed,
}

/// How a text goes on.
#[derive(Clone, Debug)]
pub struct Generation {
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Number of the text among those of one request, for the random numbers.
    pub sequence: u64,
    /// Most tokens to generate, at least 1.
    pub limit: usize,
    /// Texts that end it; they are not part of it.
    pub stop: Vec<String>,
    /// Whether the model's own end is ignored.
    pub ignore_eos: bool,
    /// Number of alternatives whose logarithmic probabilities are wanted with each token; `None`: not even its own.
    pub logprobs: Option<usize>,
    /// What the text has to conform to.
    pub grammar: Option<Grammar>,
}

/// One text to be worked on.
#[derive(Debug)]
pub struct Job {
    /// Its tokens so far, at least one.
    pub prompt: Vec<u32>,
    /// What is asked.
    pub task: Task,
    /// When it has to be done.
    pub deadline: Instant,
    /// Who asks; clients take turns.
    pub client: u64,
    /// Under which key the answer may be kept.
    pub key: Option<Key>,
    /// When it was submitted.
    pub since: Instant,
    /// What is told of it.
    pub trace: TextTrace,
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model, a stop text or the grammar ended it.
    Stop,
    /// The limit is reached or the context is full.
    Length,
    /// The content filter cut it off.
    ContentFilter,
}

impl Finish {
    /// As the API calls it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::ContentFilter => "content_filter",
        }
    }
}

/// A token and its natural logarithmic probability before penalties and temperature.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub token: u32,
    /// Of the token.
    pub logprob: f32,
    /// The most likely tokens and theirs, in falling order.
    pub top: Vec<(u32, f32)>,
}

/// Why a job was not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// Its deadline has passed.
    Timeout,
    /// The server stops, and can wait no longer.
    Draining,
    /// There is no memory for its keys and values.
    Memory,
    /// Its grammar lets no token come next, or takes too much time or memory.
    Grammar,
    /// A bug: a pass failed.
    Internal,
}

impl Failure {
    /// A word for it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Timeout => "timeout",
            Self::Draining => "draining",
            Self::Memory => "memory",
            Self::Grammar => "grammar",
            Self::Internal => "internal",
        }
    }
}

/// What a job hears.
#[derive(Clone, Debug)]
pub enum Event {
    /// Some tokens have become text. Either may be empty.
    Text {
        /// The text.
        text: String,
        /// The tokens' probabilities, if asked for.
        logprobs: Vec<TokenLogprob>,
    },
    /// A vector, `[hidden]`, of length 1.
    Embedding(Vec<f32>),
    /// The end.
    Done(Done),
    /// The end, too early.
    Failed(Failure),
}

impl Event {
    /// Bytes that it takes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        size_of::<Self>()
            + match self {
                Self::Text { text, logprobs } => {
                    text.len() + logprobs.iter().map(|one| size_of_val(one) + size_of_val(&one.top[..])).sum::<usize>()
                }
                Self::Embedding(vector) => size_of_val(&vector[..]),
                Self::Done(_) | Self::Failed(_) => 0,
            }
    }
}

/// How a job ended.
#[derive(Clone, Copy, Debug)]
pub struct Done {
    /// Why.
    pub finish: Finish,
    /// Tokens generated, a stop token included.
    pub completion_tokens: usize,
    /// Tokens of the prompt that did not have to be read again.
    pub cached_tokens: usize,
}

/// Why a job was not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The queue is full.
    Full,
    /// The server is about to stop.
    Draining,
}

/// A job on its way, with the sender of its answer.
struct Submitted {
    job: Job,
    events: UnboundedSender<Event>,
}

/// What the engine's thread shares with everyone.
struct Shared {
    model: Arc<Model>,
    team: Arc<Team>,
    tokenizer: Arc<Tokenizer>,
    stop_tokens: Vec<u32>,
    options: EngineOptions,
    filter: Arc<Filter>,
    metrics: EngineMetrics,
    responses: Arc<Responses>,
    draining: AtomicBool,
    giving_up: AtomicBool,
}

/// Everything that an engine is made of.
pub struct Parts {
    /// The model.
    pub model: Arc<Model>,
    /// Its threads; several engines may share them.
    pub team: Arc<Team>,
    /// Its tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// Tokens that end a text.
    pub stop_tokens: Vec<u32>,
    /// Watches what is generated.
    pub filter: Arc<Filter>,
    /// Counts.
    pub metrics: EngineMetrics,
    /// Keeps answers.
    pub responses: Arc<Responses>,
}

/// A handle on an engine.
pub struct Engine {
    shared: Arc<Shared>,
    jobs: Mutex<Option<mpsc::Sender<Vec<Submitted>>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Engine {
    /// Starts an engine.
    ///
    /// # Errors
    /// If the system refuses the thread.
    pub fn start(name: &str, parts: Parts, options: EngineOptions) -> std::io::Result<Self> {
        let Parts { model, team, tokenizer, stop_tokens, filter, metrics, responses } = parts;
        let (draining, giving_up) = (AtomicBool::new(false), AtomicBool::new(false));
        let shared = Arc::new(Shared {
            model,
            team,
            tokenizer,
            stop_tokens,
            options,
            filter,
            metrics,
            responses,
            draining,
            giving_up,
        });
        let (sender, receiver) = mpsc::channel();
        let thread = std::thread::Builder::new().name(format!("engine {name}")).spawn({
            let shared = Arc::clone(&shared);
            move || scheduler::run(&shared, &receiver)
        })?;
        Ok(Self { shared, jobs: Mutex::new(Some(sender)), thread: Mutex::new(Some(thread)) })
    }

    /// Hands in jobs, all or none of them; returns how each can be heard. Dropping a receiver cancels its job.
    ///
    /// # Errors
    /// If the queue has no room for all, or the server is about to stop. Nothing has been started then.
    pub fn submit(&self, jobs: Vec<Job>) -> Result<Vec<UnboundedReceiver<Event>>, Refused> {
        let (mut receivers, mut submitted) = (Vec::with_capacity(jobs.len()), Vec::new());
        for mut job in jobs {
            let (events, receiver) = unbounded_channel();
            receivers.push(receiver);
            match job.key.as_ref().and_then(|key| self.shared.responses.get(key)) {
                Some(answer) => {
                    job.trace.ended(End::Known, job.prompt.len());
                    // The receiver is in our hands.
                    answer.iter().for_each(|event| drop(events.send(event.clone())));
                }
                None => submitted.push(Submitted { job, events }),
            }
        }
        if submitted.is_empty() {
            return Ok(receivers);
        }
        // Held until they are on their way, so that nobody else takes the room that they have been promised.
        let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(jobs) = jobs.as_ref().filter(|_| !self.shared.draining.load(Ordering::SeqCst)) else {
            return Err(Refused::Draining);
        };
        let (waiting, more) = (&self.shared.metrics.waiting, i64::try_from(submitted.len()).unwrap_or(i64::MAX));
        if waiting.get().saturating_add(more) > i64::try_from(self.shared.options.queue).unwrap_or(i64::MAX) {
            return Err(Refused::Full);
        }
        waiting.add(more);
        if jobs.send(submitted).is_err() {
            waiting.sub(more);
            return Err(Refused::Draining);
        }
        Ok(receivers)
    }

    /// How it runs its model.
    #[must_use]
    pub fn options(&self) -> &EngineOptions {
        &self.shared.options
    }

    /// What it counts.
    #[must_use]
    pub fn metrics(&self) -> &EngineMetrics {
        &self.shared.metrics
    }

    /// Its model.
    #[must_use]
    pub fn model(&self) -> &Model {
        &self.shared.model
    }

    /// Its threads.
    #[must_use]
    pub fn team(&self) -> &Team {
        &self.shared.team
    }

    /// Whether its thread runs: it ends when it is told to, or by a bug.
    #[must_use]
    pub fn is_running(&self) -> bool {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Accepts nothing more from now on; what has been accepted goes on.
    pub fn drain(&self) {
        self.shared.draining.store(true, Ordering::SeqCst);
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// Ends what has been accepted with [`Failure::Draining`], instead of going on with it.
    pub fn give_up(&self) {
        self.shared.giving_up.store(true, Ordering::SeqCst);
        self.drain();
    }

    /// Waits until all that has been accepted is done, at most for `limit`; returns whether it is. [`drain`](Self::drain)
    /// comes first.
    pub fn join(&self, limit: Duration) -> bool {
        let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() else { return true };
        let end = Instant::now() + limit;
        while !thread.is_finished() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(10));
        }
        thread.is_finished() && thread.join().is_ok()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // The thread ends by itself once nobody can send it anything and its texts have lost their readers.
        self.drain();
    }
}
