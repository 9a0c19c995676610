//! Held-out rounds: how one set of choices compares with another, apart from the search that found it.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;
use ternion_compiler::Cpu;

use crate::bench::{Bench, KernelBench};
use crate::buffer::Buffer;
use crate::choose::measuring_bytes;
use crate::request::{Budget, Choices, Problem, Request, Source};
use crate::shortlist::Shortlist;
use crate::{CacheDir, Choice, Class, NoSchedule, SystemStopwatch, Workers, choose, probe};

/// Rounds of a comparison.
const ROUNDS: usize = 10;

/// Samples of a round; the median is the round's.
const SAMPLES: usize = 15;

/// Two-sided 95 % quantile of Student's t with `ROUNDS − 1` degrees of freedom.
const T: f64 = 2.262;

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
    let enough = |problem: &Problem| {
        let entry = profile.shape(problem.m, problem.k);
        entry.is_some_and(|entry| entry.budget_ms >= request.budget.milliseconds() / 10 * 9)
    };
    if !request.problems.iter().all(enough) {
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
    let mut compared = Vec::new();
    for found in &choices.found {
        let Some(theirs) = rival.get(&(found.problem.m, found.problem.k)) else { continue };
        let pairs: Vec<Pair> = Class::ALL
            .into_iter()
            .filter_map(|class| Pair::measure(&mut bench, &found.problem, class, &found.choice, theirs))
            .collect();
        compared.extend(pairs.iter().map(|pair| pair.compared(&found.problem)));
        if pairs.len() == Class::ALL.len() {
            compared.push(total(&pairs, &request.workload.weights()).compared(&found.problem));
        }
    }
    compared
}

/// The rounds of two schedules, in microseconds.
struct Pair {
    class: Option<Class>,
    same: bool,
    times: [Vec<f64>; 2],
}

impl Pair {
    fn measure(bench: &mut dyn Bench, problem: &Problem, class: Class, ours: &Choice, theirs: &Choice) -> Option<Self> {
        let schedules = [ours.of(class), theirs.of(class)];
        bench.compile(&schedules.map(|schedule| (class.spec(problem.k), schedule)));
        let mut times = [Vec::new(), Vec::new()];
        for round in 0..ROUNDS {
            let mut samples = [Vec::new(), Vec::new()];
            for turn in 0..2 * SAMPLES {
                // Every other round begins with the other.
                let which = (turn + round) % 2;
                samples[which].push(bench.sample(problem, class, schedules[which])?.as_secs_f64() * 1e6);
            }
            for (times, mut samples) in times.iter_mut().zip(samples) {
                samples.sort_by(f64::total_cmp);
                times.push(samples[SAMPLES / 2]);
            }
        }
        Some(Self { class: Some(class), same: schedules[0] == schedules[1], times })
    }

    fn compared(&self, problem: &Problem) -> Comparison {
        let [ours_us, theirs_us] = [0, 1].map(|which| interval(&self.times[which]));
        let verdict = match () {
            () if self.same => Which::Same,
            () if (ours_us.0 - theirs_us.0).abs() <= ours_us.1 + theirs_us.1 => Which::Equal,
            () if ours_us.0 < theirs_us.0 => Which::Faster,
            () => Which::Slower,
        };
        let (m, k, class) = (problem.m, problem.k, self.class);
        Comparison { m, k, class, ours_us, theirs_us, ratio: theirs_us.0 / ours_us.0, verdict }
    }
}

/// All classes together, round by round.
fn total(pairs: &[Pair], weights: &[f64; 6]) -> Pair {
    let round =
        |which: usize, round: usize| pairs.iter().zip(weights).map(|(pair, w)| w * pair.times[which][round]).sum();
    let times = [0, 1].map(|which| (0..ROUNDS).map(|at| round(which, at)).collect());
    Pair { class: None, same: pairs.iter().all(|pair| pair.same), times }
}

/// Mean, and half the width of its 95 % confidence interval.
fn interval(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (n - 1.0);
    (mean, T * (variance / n).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_holds_its_mean_and_grows_with_the_spread() {
        let (mean, narrow) = interval(&[1.0, 1.1, 0.9, 1.0, 1.0, 1.1, 0.9, 1.0, 1.0, 1.0]);
        let (_, wide) = interval(&[1.0, 2.0, 0.1, 1.0, 1.0, 1.9, 0.1, 1.0, 0.9, 1.0]);
        assert!((mean - 1.0).abs() < 1e-9 && narrow < wide);
        // Standard deviation √(0.04/9), over √10, by 2.262.
        assert!((narrow - 2.262 * (0.04f64 / 9.0 / 10.0).sqrt()).abs() < 1e-9);
    }
}
