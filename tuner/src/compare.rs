//! Held-out rounds: how one set of choices compares with another, apart from the search that found it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use serde::Serialize;
use ternion_compiler::{Cpu, Family, Schedule};

use crate::bench::{Bench, KernelBench};
use crate::buffer::Buffer;
use crate::choose::{entries, measuring_bytes};
use crate::contest::Entrant;
use crate::held_out::{ROUNDS, Rounds, interval, rounds, total};
use crate::profile::Warning;
use crate::request::{Budget, Choices, Found, Problem, Request, Source};
use crate::shortlist::Shortlist;
use crate::space::{WHOLE_SPACE, legal};
use crate::{CacheDir, Choice, Class, MachineProfile, NoSchedule, ProfileKey, SystemStopwatch, Workers, choose, probe};

/// Legal schedules of a class that stand for all of them, and rounds that they run.
const SPREAD: usize = 32;
const SPREAD_ROUNDS: usize = 3;

/// Samples of a round; the median is the round's.
const SAMPLES: usize = 15;

/// Which of two choices is faster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Which {
    /// The same schedule.
    Same,
    /// The confidence intervals overlap.
    Equal,
    /// Ours.
    Faster,
    /// The other.
    Slower,
}

impl fmt::Display for Which {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Same => "the same schedule",
            Self::Equal => "equal within the confidence intervals",
            Self::Faster => "faster",
            Self::Slower => "SLOWER",
        })
    }
}

/// One class of one shape, compared.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// Rows.
    pub m: usize,
    /// Length of a row.
    pub k: usize,
    /// The class; `None` for all, weighted as the workload meets them, per token.
    pub class: Option<Class>,
    /// Mean of our rounds and half the width of its 95 % confidence interval, in microseconds.
    pub ours_us: (f64, f64),
    /// The same for the other.
    pub theirs_us: (f64, f64),
    /// How many times faster ours is.
    pub ratio: f64,
    /// What that means.
    pub verdict: Which,
}

/// The untuned guess for every shape of a request.
#[must_use]
pub fn guess(request: &Request, cpu: &Cpu) -> BTreeMap<(usize, usize), Choice> {
    let of = |Problem { m, k, .. }: &Problem| {
        Some(((*m, *k), Shortlist::new(*k, cpu, Budget::RACE.seeds(), &|_, _| false).guess()?))
    };
    request.problems.iter().filter_map(of).collect()
}

/// The choices of a request if all of them are known well enough, so that nothing has to be measured.
///
/// # Errors
/// A shape that no legal schedule exists for.
pub fn known(request: &Request, cpu: &Cpu, threads: usize, cache: &CacheDir) -> Result<Option<Choices>, NoSchedule> {
    if request.again {
        return Ok(None);
    }
    let (profile, _) = cache.load(&ProfileKey::new(&probe(), cpu, threads), cpu);
    if !profile.suffices(request) {
        return Ok(None);
    }
    let nothing = Request { budget: Budget::NONE, ..request.clone() };
    let choices = choose(&nothing, cpu, &Idle(threads), cache, &|_| {})?;
    Ok(Some(choices).filter(|choices| choices.found.iter().all(|found| found.source == Source::Known)))
}

/// A number of threads that measure nothing.
pub(crate) struct Idle(pub(crate) usize);

impl Workers for Idle {
    fn threads(&self) -> usize {
        self.0
    }

    fn run(&self, work: &(dyn Fn(usize) + Sync)) {
        (0..self.0).for_each(work);
    }
}

/// How much a class of a shape gains over the median of what is legal.
#[derive(Clone, Debug, Serialize)]
pub struct Gain {
    /// Rows.
    pub m: usize,
    /// Length of a row.
    pub k: usize,
    /// The class.
    pub class: Class,
    /// The choice's time, in microseconds.
    pub ours_us: f64,
    /// The median's.
    pub median_us: f64,
    /// How many times faster the choice is.
    pub gain: f64,
    /// Legal schedules.
    pub legal: usize,
    /// Of these, how many were measured: every so many-th of the list of all.
    pub measured: usize,
}

/// Measures `choices` against a sample of all legal schedules, evenly spread over the list of them, each a few times in
/// interleaved rounds.
#[must_use]
pub fn gains(request: &Request, choices: &Choices, cpu: &Cpu, workers: &dyn Workers) -> Vec<Gain> {
    let stopwatch = SystemStopwatch::start();
    let (bytes, tile) = measuring_bytes(request, &probe());
    let Some(buffer) = Buffer::of_codes(bytes, tile, workers, || false) else { return Vec::new() };
    let mut bench = KernelBench::new(*cpu, workers, &stopwatch, buffer);
    let mut gains = Vec::new();
    for Found { problem, choice, .. } in &choices.found {
        for class in Class::ALL {
            let spec = class.spec(problem.k);
            let space = legal(&Family::ALL, &spec, cpu, &Budget::search(WHOLE_SPACE), Duration::MAX);
            let mut schedules: Vec<Schedule> =
                (0..SPREAD.min(space.len())).map(|at| space[at * space.len() / SPREAD.min(space.len())]).collect();
            schedules.retain(|schedule| schedule.check(&spec, cpu).is_ok());
            let jobs: Vec<_> = schedules.iter().chain([&choice.of(class)]).map(|schedule| (spec, *schedule)).collect();
            let missing: Vec<_> = jobs.iter().filter(|job| !bench.is_ready(**job)).copied().collect();
            bench.compile(&missing);
            let mut times: Vec<Vec<f64>> = vec![Vec::new(); jobs.len()];
            for _ in 0..SPREAD_ROUNDS {
                for ((_, schedule), times) in jobs.iter().zip(&mut times) {
                    times.extend(bench.sample(problem, class, *schedule).map(|time| time.as_secs_f64() * 1e6));
                }
            }
            let mut medians: Vec<f64> = times.iter_mut().filter_map(|times| median(times)).collect();
            let Some(ours_us) = medians.pop().filter(|_| times.last().is_some_and(|times| !times.is_empty())) else {
                continue;
            };
            let measured = medians.len();
            let Some(median_us) = median(&mut medians) else { continue };
            let (Problem { m, k, .. }, legal) = (*problem, space.len());
            gains.push(Gain { m, k, class, ours_us, median_us, gain: median_us / ours_us, legal, measured });
        }
    }
    gains
}

fn median(values: &mut [f64]) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// How many schedules an exhaustive search of a request has to compile, and how long it takes at the pace of the search that
/// has found `choices`; `None` if that one tried nothing.
#[must_use]
pub fn exhaustive_cost(request: &Request, choices: &Choices, cpu: &Cpu) -> (usize, Option<Duration>) {
    let tried = choices.trials.iter().map(|trial| (trial.m, trial.k, trial.class.columns(), trial.schedule));
    let tried = tried.collect::<BTreeSet<_>>().len();
    let shapes = request.problems.iter().map(|problem| (problem.m, problem.k)).collect::<BTreeSet<_>>();
    let legal = |k: usize, class: Class| {
        legal(&Family::ALL, &class.spec(k), cpu, &Budget::search(WHOLE_SPACE), Duration::MAX).len()
    };
    let all = shapes.into_iter().map(|(_, k)| legal(k, Class::One) + legal(k, Class::Chunk)).sum();
    let pace = (tried > 0).then(|| choices.phases.exploring.as_secs_f64() / tried as f64);
    (all, pace.map(|pace| Duration::from_secs_f64(pace * all as f64)))
}

/// What a search has found, as a profile that can be compared with or handed on.
#[must_use]
pub fn profile_of(choices: &Choices, request: &Request, key: ProfileKey) -> MachineProfile {
    let mut profile = MachineProfile::new(key);
    let provisional = choices.warnings.iter().any(|warning| matches!(warning, Warning::Busy { .. }));
    // What was known was measured once as well.
    let measured = choices.found.iter().filter(|found| !found.results.is_empty());
    let measured: Vec<Found> = measured.map(|found| Found { source: Source::Raced, ..found.clone() }).collect();
    let entries = entries(&measured, &BTreeMap::new(), request, provisional);
    entries.into_iter().for_each(|entry| profile.insert(entry));
    profile
}

/// Measures `choices` against `rival` in ten interleaved rounds per shape and class.
#[must_use]
pub fn compare(
    request: &Request,
    choices: &Choices,
    rival: &BTreeMap<(usize, usize), Choice>,
    cpu: &Cpu,
    workers: &dyn Workers,
) -> Vec<Comparison> {
    let stopwatch = SystemStopwatch::start();
    let (bytes, tile) = measuring_bytes(request, &probe());
    let Some(buffer) = Buffer::of_codes(bytes, tile, workers, || false) else { return Vec::new() };
    let mut bench = KernelBench::new(*cpu, workers, &stopwatch, buffer);
    let mut all = Vec::new();
    for Found { problem, choice, .. } in &choices.found {
        let Some(theirs) = rival.get(&(problem.m, problem.k)) else { continue };
        let pair = |class| [choice, theirs].map(|choice| Entrant { class, schedule: choice.of(class) });
        let pairs = Class::ALL.map(pair);
        let jobs: Vec<_> =
            pairs.iter().flatten().map(|entrant| (entrant.class.spec(problem.k), entrant.schedule)).collect();
        bench.compile(&jobs);
        let measured: Vec<(Class, Rounds)> = pairs
            .iter()
            .map(|pair| {
                let one = std::slice::from_ref(pair);
                let rounds = rounds(&mut bench, problem, one, SAMPLES, &stopwatch, Duration::MAX);
                (pair[0].class, rounds.into_iter().next().unwrap_or_default())
            })
            .filter(|(_, rounds)| rounds.0.len() == ROUNDS)
            .collect();
        let same = |class: Class| choice.of(class) == theirs.of(class);
        all.extend(measured.iter().map(|(class, rounds)| compared(problem, Some(*class), same(*class), rounds)));
        if measured.len() == Class::ALL.len() {
            let total = total(&measured, &request.workload.weights());
            all.push(compared(problem, None, choice == theirs, &total));
        }
    }
    all
}

/// The rounds of one class, or of all; `same` if both sides run the same schedules.
fn compared(problem: &Problem, class: Option<Class>, same: bool, rounds: &Rounds) -> Comparison {
    let side = |which: usize| interval(&rounds.0.iter().map(|times| times[which] * 1e6).collect::<Vec<_>>());
    let (ours_us, theirs_us) = (side(0), side(1));
    let verdict = match () {
        () if same => Which::Same,
        () if (ours_us.0 - theirs_us.0).abs() <= ours_us.1 + theirs_us.1 => Which::Equal,
        () if ours_us.0 < theirs_us.0 => Which::Faster,
        () => Which::Slower,
    };
    Comparison { m: problem.m, k: problem.k, class, ours_us, theirs_us, ratio: theirs_us.0 / ours_us.0, verdict }
}
