//! Who wins a race: the decisions, apart from everything that is measured.
//!
//! Entrants run in interleaved rounds, so that drift (heat, clock, neighbours) hits all of them alike, and every other
//! round backwards, so that it does not favour the first. After each stage the slower half of each class retires. One
//! copy of the weights serves all classes, so what is ranked is not a schedule but a set of schedules that share a
//! layout, one per class, by their weighted total time; where two copies are allowed, sets of two layouts as well.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use ternion_compiler::{Layout, Schedule};

use crate::{Class, Stopwatch};

/// Rounds of a stage: at least, since fewer decide nothing, and at most, since more teach nothing.
const MIN_ROUNDS: usize = 3;
pub(crate) const MAX_ROUNDS: usize = 40;

/// Rounds after which a leader that has won every single one of them has won.
const CLEAR_ROUNDS: usize = 6;

/// A median so many times the minimum means that samples are interrupted all the time: the machine is busy. Ordinary
/// noise stays far below.
const DISTURBED: f64 = 2.0;

/// How much more a stage counts than the one before it. Less, and who gets slower wins by its start; more, and what the
/// first stage has measured is lost.
const LATER: f64 = 1.5;

/// A sample so many times the fastest is no time of a kernel but an interruption's.
const INTERRUPTED: f64 = 3.0;

/// A schedule in the race, for one class.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Entrant {
    pub(crate) class: Class,
    pub(crate) schedule: Schedule,
}

impl Entrant {
    fn layout(&self) -> Layout {
        self.schedule.layout
    }
}

/// What was measured of a schedule: times of one matrix product in microseconds, its part of preparing the activations
/// included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Fastest sample.
    pub minimum_us: f64,
    /// Median sample.
    pub median_us: f64,
    /// Number of samples.
    pub samples: usize,
}

/// The fastest schedule of every class that races, as indices of entrants, and their weighted total in seconds per token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Standing {
    pub(crate) total: f64,
    pub(crate) set: [Option<usize>; 6],
}

impl Standing {
    fn winners(&self) -> impl Iterator<Item = usize> + use<> {
        self.set.into_iter().flatten()
    }
}

/// The winners.
#[derive(Debug)]
pub(crate) struct Verdict {
    /// The best set that shares one layout.
    pub(crate) one_copy: Standing,
    /// The best set of two layouts, if two are allowed and faster.
    pub(crate) two_copies: Option<Standing>,
    /// Figures of all entrants.
    pub(crate) figures: Vec<Figures>,
    /// How many times longer each took than the winner of its class, in the stages that both ran in; infinite if in none.
    pub(crate) paces: Vec<f64>,
}

/// What is to be decided.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    /// Products per token of each class ([`Workload::weights`](crate::Workload::weights)).
    pub(crate) weights: [f64; 6],
    /// Whether a set may have two layouts.
    pub(crate) two_copies: bool,
}

/// Times of one entrant.
#[derive(Default)]
struct Record {
    /// The samples of each stage, one per complete round, in seconds.
    stages: Vec<Vec<f64>>,
    /// What taking a sample last cost, which is what the next one is expected to cost.
    cost: Option<Duration>,
}

impl Record {
    /// The time that counts, in seconds: `typical` times of the stages, each weighted by its rounds and more than the one
    /// before, so that who gets slower cannot live on a fast start. Rivals have the same rounds in the same stages, so
    /// drift is the same for all.
    fn time(&self, typical: fn(&[f64]) -> f64) -> f64 {
        self.time_until(self.stages.len(), typical)
    }

    /// As [`time`](Self::time), of the first few stages.
    fn time_until(&self, stages: usize, typical: fn(&[f64]) -> f64) -> f64 {
        let (mut sum, mut weights, mut weight) = (0.0, 0.0, 1.0);
        for samples in self.stages[..stages].iter().filter(|samples| !samples.is_empty()) {
            let weighted = weight * samples.len() as f64;
            (sum, weights, weight) = (sum + weighted * typical(&sorted(samples)), weights + weighted, LATER * weight);
        }
        sum / weights
    }

    fn samples(&self) -> impl Iterator<Item = f64> {
        self.stages.iter().flatten().copied()
    }

    fn slowest(&self) -> f64 {
        self.samples().fold(0.0, f64::max)
    }

    fn fastest(&self) -> f64 {
        self.samples().fold(f64::INFINITY, f64::min)
    }

    fn figures(&self) -> Figures {
        let sorted = sorted(&self.stages.concat());
        let at = |index: usize| sorted.get(index).map_or(0.0, |seconds| seconds * 1e6);
        Figures { minimum_us: at(0), median_us: at(sorted.len() / 2), samples: sorted.len() }
    }
}

/// The mean of the middle three quarters: nearly as precise as a mean, and blind to interruptions.
fn middle(sorted: &[f64]) -> f64 {
    let sorted = &sorted[..sorted.partition_point(|sample| *sample <= INTERRUPTED * sorted[0])];
    let end = sorted.len() / 8;
    mean(&sorted[end..sorted.len() - end])
}

/// The mean of the fastest quarter, where most samples are interrupted: less precise, and all that is left.
fn fast_end(sorted: &[f64]) -> f64 {
    mean(&sorted[..sorted.len().div_ceil(4)])
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn sorted(samples: &[f64]) -> Vec<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    sorted
}

/// The race of one shape.
struct Contest<'a> {
    entrants: &'a [Entrant],
    rules: Rules,
    records: Vec<Record>,
    /// Indices of those still racing.
    alive: Vec<usize>,
    stopwatch: &'a dyn Stopwatch,
    deadline: Duration,
}

/// How a round ended.
enum Round {
    Complete,
    OutOfTime,
}

/// Lets `entrants` race until `deadline` (as `stopwatch` counts) at the latest, or until a winner is clear. `sample`
/// takes one sample of the entrant with this index and returns the time of one product; `None` ends the race. `alive` is
/// told how many still race. `None` if time ended before every entrant had run a few times: there is nothing to compare then.
pub(crate) fn contest(
    entrants: &[Entrant],
    rules: Rules,
    stopwatch: &dyn Stopwatch,
    deadline: Duration,
    sample: &mut dyn FnMut(usize) -> Option<Duration>,
    alive: &mut dyn FnMut(usize),
) -> Option<Verdict> {
    let mut contest = Contest {
        entrants,
        rules,
        records: entrants.iter().map(|_| Record::default()).collect(),
        alive: (0..entrants.len()).collect(),
        stopwatch,
        deadline,
    };
    contest.retire_the_lonely();
    let mut first = true;
    loop {
        alive(contest.alive.len());
        let stage = contest.stage(sample);
        let one_copy = contest.standings(1).first().copied()?;
        // A stage that looks clear is not enough: the next one must look the same.
        let clear = !first && contest.is_clear(&one_copy);
        first = false;
        let two_copies = contest.best_of_two().filter(|pair| pair.total < one_copy.total);
        if matches!(stage, Round::OutOfTime) || clear || !contest.halve() {
            let figures = contest.records.iter().map(Record::figures).collect();
            let paces = (0..entrants.len()).map(|entrant| contest.pace(entrant, &one_copy)).collect();
            return Some(Verdict { one_copy, two_copies, figures, paces });
        }
    }
}

impl Contest<'_> {
    /// Rounds until the stage's part of the time is used up.
    fn stage(&mut self, sample: &mut dyn FnMut(usize) -> Option<Duration>) -> Round {
        let begin = self.stopwatch.elapsed();
        // Half of what is left, while there are many to run; the rest for the last two sets.
        let stages = if self.alive.len() <= 2 * self.classes().count() { 1 } else { 2 };
        let end = begin + self.deadline.saturating_sub(begin) / stages;
        self.alive.iter().for_each(|entrant| self.records[*entrant].stages.push(Vec::new()));
        for round in 0..MAX_ROUNDS {
            if let Round::OutOfTime = self.round(round, sample) {
                return Round::OutOfTime;
            }
            let cost: Duration = self.alive.iter().filter_map(|entrant| self.records[*entrant].cost).sum();
            let late = self.stopwatch.elapsed() + cost > end;
            let clear = || self.standings(1).first().is_some_and(|standing| self.is_clear(standing));
            if round + 1 >= MIN_ROUNDS && (late || clear()) {
                break;
            }
        }
        Round::Complete
    }

    /// One sample of everyone. A round that the deadline cuts short leaves no samples: they would compare unequal
    /// moments.
    fn round(&mut self, round: usize, sample: &mut dyn FnMut(usize) -> Option<Duration>) -> Round {
        let mut order = self.alive.clone();
        if round % 2 == 1 {
            order.reverse();
        }
        let mut taken = Vec::with_capacity(order.len());
        for entrant in order {
            let start = self.stopwatch.elapsed();
            // Who has not run yet is expected to cost what the costliest so far did.
            let known = self.records.iter().filter_map(|record| record.cost).max();
            let expected = self.records[entrant].cost.or(known).unwrap_or_default();
            if start + expected >= self.deadline {
                return Round::OutOfTime;
            }
            let Some(time) = sample(entrant) else { return Round::OutOfTime };
            taken.push((entrant, time));
            self.records[entrant].cost = Some(self.stopwatch.elapsed().saturating_sub(start));
        }
        for (entrant, time) in taken {
            if let Some(stage) = self.records[entrant].stages.last_mut() {
                stage.push(time.as_secs_f64());
            }
        }
        Round::Complete
    }

    /// Which of a stage's samples tell the time: the middle ones, or on a busy machine the fast ones. The same for all.
    fn typical(&self) -> fn(&[f64]) -> f64 {
        let figures = self.alive.iter().map(|entrant| self.records[*entrant].figures());
        let ratios: Vec<f64> = figures.map(|figures| figures.median_us / figures.minimum_us).collect();
        let usual = sorted(&ratios).get(ratios.len() / 2).copied();
        if usual.is_some_and(|ratio| ratio > DISTURBED) { fast_end } else { middle }
    }

    fn of_class(&self, class: Class) -> impl Iterator<Item = usize> {
        self.alive.iter().copied().filter(move |entrant| self.entrants[*entrant].class == class)
    }

    /// The classes that race.
    fn classes(&self) -> impl Iterator<Item = Class> {
        Class::ALL.into_iter().filter(|class| self.entrants.iter().any(|entrant| entrant.class == *class))
    }

    /// The fastest of each class in each layout, with its time.
    fn fastest(&self) -> BTreeMap<Layout, [Option<(f64, usize)>; 6]> {
        let typical = self.typical();
        let mut fastest: BTreeMap<Layout, [Option<(f64, usize)>; 6]> = BTreeMap::new();
        for entrant in self.alive.iter().copied() {
            let Entrant { class, .. } = self.entrants[entrant];
            let time = self.records[entrant].time(typical);
            let best = &mut fastest.entry(self.entrants[entrant].layout()).or_default()[class.index()];
            if best.is_none_or(|(best, _)| time < best) {
                *best = Some((time, entrant));
            }
        }
        fastest
    }

    /// How many times longer an entrant took than the winner of its class, in the stages that both ran in: who has retired
    /// early ran at another time of day.
    fn pace(&self, entrant: usize, winners: &Standing) -> f64 {
        let Some(winner) = winners.set[self.entrants[entrant].class.index()] else { return f64::INFINITY };
        let [ours, theirs] = [entrant, winner].map(|at| &self.records[at]);
        let stages = ours.stages.len().min(theirs.stages.len());
        let [ours, theirs] = [ours, theirs].map(|record| record.time_until(stages, self.typical()));
        if ours.is_finite() && theirs > 0.0 { ours / theirs } else { f64::INFINITY }
    }

    /// All sets of `copies` layouts (1 or 2) that serve every class, best first. None before there are enough rounds to
    /// say so.
    fn standings(&self, copies: usize) -> Vec<Standing> {
        if self.alive.iter().any(|entrant| self.records[*entrant].samples().count() < MIN_ROUNDS) {
            return Vec::new();
        }
        let fastest: Vec<_> = self.fastest().into_values().collect();
        let mut standings: Vec<Standing> = match copies {
            1 => fastest.iter().filter_map(|best| self.standing(best)).collect(),
            _ => {
                let pairs = fastest.iter().enumerate().flat_map(|(i, a)| fastest[i + 1..].iter().map(move |b| (a, b)));
                pairs.filter_map(|(a, b)| self.standing(&faster_of(a, b))).collect()
            }
        };
        standings.sort_by(|a, b| a.total.total_cmp(&b.total));
        standings
    }

    fn standing(&self, best: &[Option<(f64, usize)>; 6]) -> Option<Standing> {
        let mut standing = Standing { total: 0.0, set: [None; 6] };
        for class in self.classes() {
            let (time, entrant) = best[class.index()]?;
            standing.total += self.rules.weights[class.index()] * time;
            standing.set[class.index()] = Some(entrant);
        }
        Some(standing)
    }

    /// Whether more rounds would change nothing: every sample of the winners is faster than every sample of their rivals
    /// of the same layout, and the slowest samples of the winners make a better set than the fastest of any other layout.
    fn is_clear(&self, standing: &Standing) -> bool {
        let Some(layout) = standing.winners().next().map(|winner| self.entrants[winner].layout()) else { return true };
        let beaten = standing.winners().all(|winner| {
            let record = &self.records[winner];
            let class = self.entrants[winner].class;
            let mut rivals = self.of_class(class).filter(|rival| self.entrants[*rival].layout() == layout);
            record.samples().count() >= CLEAR_ROUNDS
                && rivals.all(|rival| rival == winner || self.records[rival].fastest() > record.slowest())
        });
        let worst: f64 = standing.winners().map(|winner| self.weighted(winner, Record::slowest)).sum();
        beaten
            && self.fastest().iter().filter(|(other, _)| **other != layout).all(|(other, _)| {
                let best_of = |class| {
                    let entrants = self.of_class(class).filter(|entrant| self.entrants[*entrant].layout() == *other);
                    entrants.map(|entrant| self.weighted(entrant, Record::fastest)).fold(f64::INFINITY, f64::min)
                };
                self.classes().map(best_of).sum::<f64>() > worst
            })
    }

    fn weighted(&self, entrant: usize, time: fn(&Record) -> f64) -> f64 {
        self.rules.weights[self.entrants[entrant].class.index()] * time(&self.records[entrant])
    }

    /// Retires the slower half of each class and of the layouts, but of the layouts not all but one before there is
    /// nobody else to retire. Returns whether anybody did.
    fn halve(&mut self) -> bool {
        let layouts = self.standings(1).len();
        self.keep(layouts.div_ceil(2).max(2)) || self.keep(1)
    }

    /// Keeps the faster half of each class and the best sets of the best `layouts`, whole. An entrant is as good as the
    /// best set it belongs to.
    fn keep(&mut self, layouts: usize) -> bool {
        let fastest = self.fastest();
        let typical = self.typical();
        let mut kept: Vec<usize> = self.standings(1).iter().take(layouts).flat_map(Standing::winners).collect();
        kept.extend(self.best_of_two().iter().flat_map(Standing::winners));
        for class in Class::ALL {
            let mut ranked: Vec<(f64, usize)> = self
                .of_class(class)
                .map(|entrant| {
                    let mut set = fastest[&self.entrants[entrant].layout()];
                    set[class.index()] = Some((self.records[entrant].time(typical), entrant));
                    (self.standing(&set).map_or(f64::INFINITY, |standing| standing.total), entrant)
                })
                .collect();
            ranked.sort_by(|(a, _), (b, _)| a.total_cmp(b));
            kept.extend(ranked.iter().take(ranked.len().div_ceil(2)).map(|(_, entrant)| *entrant));
        }
        let before = self.alive.len();
        self.alive.retain(|entrant| kept.contains(entrant));
        self.retire_the_lonely();
        self.alive.len() < before
    }

    /// The best set of two layouts, where that is allowed.
    fn best_of_two(&self) -> Option<Standing> {
        if self.rules.two_copies { self.standings(2).first().copied() } else { None }
    }

    /// Retires whose layout does not serve every class, where one has to.
    fn retire_the_lonely(&mut self) {
        if self.rules.two_copies {
            return;
        }
        let mut served: BTreeMap<Layout, [bool; 6]> = BTreeMap::new();
        for entrant in &self.alive {
            let Entrant { class, schedule } = self.entrants[*entrant];
            served.entry(schedule.layout).or_default()[class.index()] = true;
        }
        let classes: Vec<Class> = self.classes().collect();
        let entrants = self.entrants;
        let whole = |layout| classes.iter().all(|class| served[&layout][class.index()]);
        self.alive.retain(|entrant| whole(entrants[*entrant].layout()));
    }
}

/// The faster of two layouts, class by class.
fn faster_of(a: &[Option<(f64, usize)>; 6], b: &[Option<(f64, usize)>; 6]) -> [Option<(f64, usize)>; 6] {
    std::array::from_fn(|class| match (a[class], b[class]) {
        (Some(a), Some(b)) => Some(if b.0 < a.0 { b } else { a }),
        (a, b) => a.or(b),
    })
}

#[cfg(test)]
mod tests;
