//! A search in a child process, so that a candidate that crashes takes only the child down.
//!
//! The child reads one [`Order`] from its standard input and writes one [`Message`] per line to its standard output. It
//! says which kernels it is about to run for the first time, and when they have run. If it dies in between, one of them
//! is to blame: a new child runs those one at a time, and the one that kills it too is refused like a kernel with a
//! wrong result, by name, and never runs again. What is on standard output and is no message is ignored.

use std::cell::RefCell;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use ternion_compiler::{Cpu, Schedule};

use crate::bench::{Job, Observer};
use crate::choose::choose_observed;
use crate::compare::Idle;
use crate::profile::{CacheDir, MachineProfile, ProfileKey, Refusal, Warning};
use crate::request::{Choices, NoSchedule, Progress, Request};
use crate::{Workers, choose, probe};

/// More children than this die of something else than a candidate.
const MAX_CHILDREN: usize = 24;

/// A search that has so little time left is not begun again.
const LEAST_TIME: Duration = Duration::from_millis(200);

/// A kernel, as text.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Suspect {
    spec: String,
    schedule: Schedule,
}

impl Suspect {
    fn of(job: &Job) -> Self {
        Self { spec: job.0.to_string(), schedule: job.1 }
    }

    fn job(&self) -> Option<Job> {
        Some((self.spec.parse().ok()?, self.schedule))
    }
}

/// What a child is to do.
#[derive(Serialize, Deserialize)]
pub struct Order {
    request: Request,
    /// Threads of its team.
    pub threads: usize,
    cache: CacheDir,
    /// Kernels of which one has killed another child.
    suspects: Vec<Suspect>,
}

/// What a child says.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Message {
    /// These kernels run for the first time now.
    Trying(Vec<Suspect>),
    /// They have run.
    Tried,
    Progress(Progress),
    Done(Box<Choices>),
    /// Nothing can be chosen for an `[m, k]` matrix.
    Impossible(usize, usize),
}

/// Why a search in a child process did not end.
#[derive(Debug, thiserror::Error)]
pub enum IsolationError {
    /// There is nothing to choose from.
    #[error(transparent)]
    NoSchedule(#[from] NoSchedule),
    /// No child can be started.
    #[error("cannot start the process that measures kernels ({0}): check limits on processes and memory")]
    Start(#[source] std::io::Error),
    /// Children die without having named a kernel.
    #[error(
        "the process that measures kernels ended early ({status}): please report this with the output of `ternion doctor`"
    )]
    Died {
        /// How the last one ended.
        status: ExitStatus,
    },
    /// The caller asked for it.
    #[error("interrupted: what was found so far is kept")]
    Interrupted,
}

/// As [`choose`], in child processes that `command` starts; they have to call [`serve`]. `interrupted` is asked now and
/// then whether to give up.
///
/// # Errors
/// If nothing can be chosen, no child can be started, or children die of something else than a candidate.
pub fn choose_isolated(
    request: &Request,
    cpu: &Cpu,
    threads: usize,
    cache: &CacheDir,
    command: &dyn Fn() -> std::io::Result<Command>,
    progress: &dyn Fn(Progress),
    interrupted: &dyn Fn() -> bool,
) -> Result<Choices, IsolationError> {
    let begin = Instant::now();
    let key = ProfileKey::new(&probe(), cpu, threads);
    let mut order = Order { request: request.clone(), threads, cache: cache.clone(), suspects: Vec::new() };
    let mut crashes: Vec<Warning> = Vec::new();
    for _ in 0..MAX_CHILDREN {
        let spent = begin.elapsed();
        order.request.budget.time = request.budget.time.saturating_sub(spent);
        if order.request.budget.time < LEAST_TIME {
            break;
        }
        let on_progress = |update: Progress| progress(Progress { spent: spent + update.spent, ..update });
        match run_child(&order, command, &on_progress, interrupted)? {
            Ended::Done(mut choices) => {
                choices.warnings.extend(crashes);
                choices.spent = begin.elapsed();
                return Ok(*choices);
            }
            Ended::Impossible(m, k) => return Err(NoSchedule { m, k, cpu: *cpu }.into()),
            Ended::Died { status, running } => match running.as_slice() {
                [] => return Err(IsolationError::Died { status }),
                [culprit] => {
                    let warning = refuse(culprit, status, &key, cache);
                    crashes.extend(warning);
                    order.suspects.retain(|suspect| suspect != culprit);
                }
                several => order.suspects = several.to_vec(),
            },
        }
    }
    // No time is left: what is known by now, or a guess.
    let nothing = Request { budget: crate::Budget::NONE, ..request.clone() };
    let mut choices = choose(&nothing, cpu, &Idle(threads), cache, progress)?;
    choices.warnings.extend(crashes);
    Ok(choices)
}

/// Remembers a kernel that killed a process; returns what the user should know.
fn refuse(culprit: &Suspect, status: ExitStatus, key: &ProfileKey, cache: &CacheDir) -> Vec<Warning> {
    let Suspect { spec, schedule } = culprit;
    let reason = format!("crashes ({status}) on the data of seed {:#x}", ternion_compiler::check::CHECK_SEED);
    let mut news = MachineProfile::new(key.clone());
    news.refused.push(Refusal { spec: spec.clone(), schedule: schedule.to_string(), reason: reason.clone() });
    let mut warnings =
        vec![Warning::Refused { reason: format!("{schedule} for {spec}: {reason}; please report this as a bug") }];
    warnings.extend(cache.remember(&news).err());
    warnings
}

/// How a child ended.
enum Ended {
    Done(Box<Choices>),
    Impossible(usize, usize),
    /// It died while these kernels ran.
    Died {
        status: ExitStatus,
        running: Vec<Suspect>,
    },
}

fn run_child(
    order: &Order,
    command: &dyn Fn() -> std::io::Result<Command>,
    progress: &dyn Fn(Progress),
    interrupted: &dyn Fn() -> bool,
) -> Result<Ended, IsolationError> {
    let mut command = command().map_err(IsolationError::Start)?;
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut child = Reaped(child.map_err(IsolationError::Start)?);
    if let Some(mut input) = child.0.stdin.take() {
        let mut text = serde_json::to_vec(order).unwrap_or_default();
        text.push(b'\n');
        // A child that does not read has died, which shows below.
        let _ = input.write_all(&text);
    }
    let mut running = Vec::new();
    let lines = child.0.stdout.take().map(|output| BufReader::new(output).lines());
    for line in lines.into_iter().flatten().map_while(Result::ok) {
        match serde_json::from_str(&line) {
            Ok(Message::Trying(jobs)) => running = jobs,
            Ok(Message::Tried) => running.clear(),
            Ok(Message::Progress(update)) => progress(update),
            Ok(Message::Done(choices)) => return Ok(Ended::Done(choices)),
            Ok(Message::Impossible(m, k)) => return Ok(Ended::Impossible(m, k)),
            Err(_) => {}
        }
        if interrupted() {
            return Err(IsolationError::Interrupted);
        }
    }
    if interrupted() {
        return Err(IsolationError::Interrupted);
    }
    let status = child.0.wait().map_err(IsolationError::Start)?;
    Ok(Ended::Died { status, running })
}

/// A child that does not outlive its parent's interest in it.
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Order {
    /// Reads the order that a child is given.
    ///
    /// # Errors
    /// If the input holds none.
    pub fn read(input: &mut dyn Read) -> std::io::Result<Self> {
        let mut line = String::new();
        BufReader::new(input).read_line(&mut line)?;
        serde_json::from_str(&line).map_err(std::io::Error::from)
    }
}

/// The child's part: carries out `order` with `workers` and tells the parent over `output`.
///
/// # Errors
/// If the parent has gone away.
pub fn serve(order: &Order, workers: &dyn Workers, cpu: &Cpu, output: &mut (dyn Write + Send)) -> std::io::Result<()> {
    serve_with(order, workers, cpu, output, &|_| {})
}

/// As [`serve`]; `before` is called with the kernels that are about to run for the first time.
fn serve_with(
    order: &Order,
    workers: &dyn Workers,
    cpu: &Cpu,
    output: &mut (dyn Write + Send),
    before: &dyn Fn(&[Job]),
) -> std::io::Result<()> {
    let parent = Parent { output: RefCell::new(output), suspects: &order.suspects, before };
    let progress = |update| {
        if parent.say(&Message::Progress(update)).is_err() {
            // The parent has gone away: nobody wants what else would be found.
            std::process::exit(1);
        }
    };
    let chosen = choose_observed(&order.request, cpu, workers, &order.cache, &progress, Some(&parent));
    parent.say(&match chosen {
        Ok(choices) => Message::Done(Box::new(choices)),
        Err(NoSchedule { m, k, .. }) => Message::Impossible(m, k),
    })
}

/// Who a child reports to.
struct Parent<'a> {
    output: RefCell<&'a mut (dyn Write + Send)>,
    suspects: &'a [Suspect],
    before: &'a dyn Fn(&[Job]),
}

impl Parent<'_> {
    fn say(&self, message: &Message) -> std::io::Result<()> {
        let mut output = self.output.borrow_mut();
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        output.write_all(&line)?;
        output.flush()
    }
}

impl Observer for Parent<'_> {
    fn trying(&self, jobs: &[Job]) {
        // If the parent has gone away, the result is still worth remembering.
        let _ = self.say(&Message::Trying(jobs.iter().map(Suspect::of).collect()));
        (self.before)(jobs);
    }

    fn tried(&self) {
        let _ = self.say(&Message::Tried);
    }

    fn suspects(&self) -> Vec<Job> {
        self.suspects.iter().filter_map(Suspect::job).collect()
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use crate::request::{Budget, Effort, Problem, Source};
    use crate::workers::test_team::Scoped;
    use ternion_compiler::Family;

    /// Kernels that fault: by a signal, as an illegal instruction or a wild read does. Some of the families of which every
    /// CPU races one beside `mad`.
    fn is_faulty((_, schedule): &Job) -> bool {
        [(Family::T5, 2), (Family::Tl1, 4)].contains(&(schedule.family, schedule.unroll))
    }

    const SIGNAL: &str = "TERNION_TEST_SIGNAL";

    /// The child of the tests below: this test binary, told by the environment which signal to raise.
    #[test]
    fn child() {
        let Some(signal) = std::env::var(SIGNAL).ok().and_then(|signal| signal.parse().ok()) else { return };
        let order = Order::read(&mut std::io::stdin()).unwrap();
        let cpu = Cpu::host().unwrap();
        let fault = |jobs: &[Job]| {
            if jobs.iter().any(is_faulty) {
                // SAFETY: raising a signal touches no memory of ours.
                unsafe { libc::raise(signal) };
            }
        };
        serve_with(&order, &Scoped(order.threads), &cpu, &mut std::io::stdout(), &fault).unwrap();
    }

    fn search(signal: i32) -> (Result<Choices, IsolationError>, MachineProfile) {
        let directory = tempfile::tempdir().unwrap();
        let cache = CacheDir::at(directory.path());
        let cpu = Cpu::host().unwrap();
        let budget = Budget { time: Duration::from_secs(120), effort: Effort::Race };
        let request = Request::new(vec![Problem { m: 64, k: 96, count: 1 }], budget);
        let command = || {
            let mut command = Command::new(std::env::current_exe()?);
            command.args(["isolate::tests::child", "--exact", "--nocapture"]).env(SIGNAL, signal.to_string());
            Ok(command)
        };
        let choices = choose_isolated(&request, &cpu, 1, &cache, &command, &|_| {}, &|| false);
        let key = ProfileKey::new(&probe(), &cpu, 1);
        (choices, cache.load(&key, &cpu).0)
    }

    #[test]
    fn a_kernel_that_faults_is_refused_by_name_and_the_search_goes_on() {
        for signal in [libc::SIGSEGV, libc::SIGILL] {
            let (choices, known) = search(signal);
            let choices = choices.unwrap();
            assert_eq!(choices.found[0].source, Source::Raced);
            let crashes: Vec<String> = choices.warnings.iter().map(ToString::to_string).collect();
            assert!(!crashes.is_empty());
            let is_crash = |line: &String| (line.contains("t5/") || line.contains("tl1/")) && line.contains("signal");
            assert!(crashes.iter().all(is_crash), "{crashes:?}");
            assert_eq!(known.refused.len(), crashes.len());
            let refused = |schedule: &Schedule| known.refused.iter().any(|r| r.schedule == schedule.to_string());
            assert!(!choices.found[0].choice.schedules.iter().any(refused));
        }
    }

    #[test]
    fn a_child_that_cannot_start_is_an_error_that_says_so() {
        let request = Request::new(vec![Problem { m: 64, k: 96, count: 1 }], Budget::search(Duration::from_secs(5)));
        let command = || Ok(Command::new("/nonexistent/ternion"));
        let cpu = Cpu::host().unwrap();
        let error = choose_isolated(&request, &cpu, 1, &CacheDir::at("unused"), &command, &|_| {}, &|| false);
        assert!(matches!(error, Err(IsolationError::Start(_))));
        let command = || Ok(Command::new("true"));
        let error = choose_isolated(&request, &cpu, 1, &CacheDir::at("unused"), &command, &|_| {}, &|| false);
        assert!(matches!(error, Err(IsolationError::Died { .. })));
    }
}
