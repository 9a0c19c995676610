//! Held-out rounds: how one set of choices compares with another, apart from the search that found it.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::Serialize;
use ternion_compiler::Cpu;

use crate::bench::{Bench, KernelBench};
use crate::buffer::Buffer;
use crate::choose::measuring_bytes;
use crate::contest::Entrant;
use crate::held_out::{ROUNDS, Rounds, interval, rounds, total};
use crate::request::{Budget, Choices, Found, Problem, Request, Source};
use crate::shortlist::Shortlist;
use crate::{CacheDir, Choice, Class, NoSchedule, SystemStopwatch, Workers, choose, probe};

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
    let (profile, _) = cache.load(&crate::ProfileKey::new(&probe(), cpu, threads), cpu);
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
    let (bytes, tile) = measuring_bytes(&request.problems, &probe());
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
