//! Looking for better schedules of one shape: batch after batch of what the [cost model](crate::cost) expects most of and
//! of what differs from the best so far in one parameter, each measured a few times and learned from.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use ternion_compiler::{Layout, Schedule};

use crate::bench::{Bench, Job};
use crate::contest::Entrant;
use crate::cost::CostModel;
use crate::profile::MachineProfile;
use crate::request::{Effort, Phase, Problem, Trial};
use crate::search::{Outcome, Search};
use crate::space::{distance, legal};
use crate::{Choice, Class};

/// Of the time for exploring, waiting for the list of all schedules takes at most this part. It is the system's time: the
/// list is made by threads that no script knows of.
const LISTING_SHARE: f64 = 0.4;

/// Samples of a trial; the median counts.
const TRIAL_SAMPLES: usize = 3;

/// Who takes so many times as long as the best needs no second sample.
const HOPELESS: f64 = 4.0;

/// Schedules that are compiled and tried at a time.
const BATCH: usize = 8;

/// How many of them are neighbours of the best, as far as there are any.
const NEIGHBOURS: usize = 4;

/// The layouts that may still win: neighbours of their fastest are tried, too.
const LAYOUTS: usize = 3;

/// Schedules that are taken from one ranking of all that are open: ranking takes a while.
const QUEUE: usize = 32;

/// Batches that must have brought nothing before exploring ends early.
const IDLE_BATCHES: usize = 24;

/// Samples of a kind of kernel in a layout before the model's opinion of it counts: until then it may be the fastest.
const LEAST_SAMPLES: usize = 2;

/// Kernels so many times slower than the best of their class are forgotten, for memory's sake.
const WORTH_KEEPING: f64 = 1.3;

/// The search for one shape.
pub(crate) struct ShapeSearch<'a, 'b> {
    pub(crate) search: &'a Search<'b>,
    pub(crate) problem: &'a Problem,
    /// Which shape of how many this is.
    pub(crate) place: (usize, usize),
    pub(crate) known: &'a MachineProfile,
    pub(crate) guess: Option<Choice>,
    /// Seconds of one product.
    pub(crate) tried: BTreeMap<Entrant, f64>,
    pub(crate) outcome: &'a mut Outcome,
}

impl ShapeSearch<'_, '_> {
    pub(crate) fn job(&self, entrant: &Entrant) -> Job {
        (entrant.class.spec(self.problem.k), entrant.schedule)
    }

    /// Tries schedules until `deadline`, or until nothing promising is left; `first` before all others.
    pub(crate) fn explore(
        &mut self,
        first: &[Schedule],
        bench: &mut dyn Bench,
        news: &mut MachineProfile,
        model: &mut CostModel,
        deadline: Duration,
    ) {
        let now = self.search.stopwatch.elapsed();
        let mut open = self.open(deadline.saturating_sub(now).mul_f64(LISTING_SHARE));
        let total = open.len();
        open.retain(|entrant| !self.tried.contains_key(entrant));
        for (entrant, seconds) in &self.tried {
            model.learn(self.problem, entrant.class, &entrant.schedule, self.search.threads, *seconds);
        }
        let exhaustive = self.search.request.budget.effort == Effort::Exhaustive;
        let mut drift = Drift::new(self.tried.iter().find(|(entrant, _)| bench.is_ready(self.job(entrant))));
        let mut queue = VecDeque::new();
        let mut batch = first.to_vec();
        let mut idle = 0;
        while !batch.is_empty() && self.search.stopwatch.elapsed() < deadline && (exhaustive || idle < IDLE_BATCHES) {
            let (shape, shapes) = self.place;
            let tried = total - open.len();
            self.search.report(Phase::Exploring { problem: *self.problem, shape, shapes, tried, legal: total });
            let entrants: Vec<Entrant> = open.iter().filter(|open| batch.contains(&open.schedule)).copied().collect();
            open.retain(|entrant| !batch.contains(&entrant.schedule));
            idle = if self.try_out(&entrants, bench, news, model, &mut drift, deadline) { 0 } else { idle + 1 };
            batch = self.promising(&open, &mut queue, model);
        }
        self.outcome.reference.extend(drift.times);
    }

    /// Every legal schedule of every class that has not been refused, class by class; where listing them takes longer than
    /// `patience`, what deserves it most.
    fn open(&self, patience: Duration) -> Vec<Entrant> {
        let begin = Instant::now();
        let Search { families, cpu, request, .. } = self.search;
        let mut open = Vec::new();
        for class in Class::ALL {
            let spec = class.spec(self.problem.k);
            let refused: BTreeSet<String> = self.known.refused_for(&spec);
            let allowed = |schedule: &&Schedule| refused.is_empty() || !refused.contains(&schedule.to_string());
            let left = patience.saturating_sub(begin.elapsed());
            let schedules = legal(families, &spec, cpu, &request.budget, left);
            open.extend(schedules.iter().filter(allowed).map(|schedule| Entrant { class, schedule: *schedule }));
        }
        open
    }

    /// Compiles and measures; returns whether any of them is the best of its class.
    fn try_out(
        &mut self,
        entrants: &[Entrant],
        bench: &mut dyn Bench,
        news: &mut MachineProfile,
        model: &mut CostModel,
        drift: &mut Drift,
        deadline: Duration,
    ) -> bool {
        let problem = self.problem;
        let mut jobs: Vec<Job> = entrants.iter().map(|entrant| self.job(entrant)).collect();
        jobs.sort_unstable();
        jobs.dedup();
        jobs.retain(|job| !bench.is_ready(*job) && job.1.check(&job.0, self.search.cpu).is_ok());
        if !jobs.is_empty() {
            self.search.refuse(bench.compile(&jobs), news, self.outcome);
        }
        let scale = drift.scale(problem, bench);
        let mut best = Class::ALL.map(|class| self.best(class));
        let (mut better, mut trials) = (false, Vec::new());
        for entrant in entrants {
            if self.search.stopwatch.elapsed() >= deadline {
                break;
            }
            let best = &mut best[entrant.class.index()];
            let Some(seconds) = trial(problem, *entrant, bench, *best) else { continue };
            let seconds = seconds * scale;
            drift.begin(*entrant, seconds);
            better |= best.is_none_or(|best| seconds < 0.99 * best);
            *best = Some(best.map_or(seconds, |best| best.min(seconds)));
            model.learn(problem, entrant.class, &entrant.schedule, self.search.threads, seconds);
            self.tried.insert(*entrant, seconds);
            let (Problem { m, k, .. }, Entrant { class, schedule }) = (*problem, *entrant);
            trials.push(Trial { m, k, class, schedule, us: seconds * 1e6 });
        }
        (self.search.note)(&trials);
        // Whoever may be in the final is compiled again if need be.
        let good = |entrant: &&Entrant| {
            let time = self.tried.get(entrant).copied().zip(best[entrant.class.index()]);
            drift.is_of(entrant) || time.is_some_and(|(time, best)| time < WORTH_KEEPING * best)
        };
        let good: BTreeSet<Job> = entrants.iter().filter(good).map(|entrant| self.job(entrant)).collect();
        jobs.iter().filter(|job| !good.contains(job)).for_each(|job| bench.forget(*job));
        better
    }

    fn best(&self, class: Class) -> Option<f64> {
        self.leader(class, None).map(|(_, seconds)| seconds)
    }

    /// The fastest of a class so far, of all or of one layout.
    fn leader(&self, class: Class, layout: Option<Layout>) -> Option<(Schedule, f64)> {
        let fits =
            |entrant: &Entrant| entrant.class == class && layout.is_none_or(|layout| entrant.schedule.layout == layout);
        let of_class = self.tried.iter().filter(|(entrant, _)| fits(entrant));
        let fastest = of_class.min_by(|a, b| a.1.total_cmp(b.1));
        fastest.map(|(entrant, seconds)| (entrant.schedule, *seconds))
    }

    /// What to try next: some neighbours of the leaders, and for the rest what heads the queue, which is ranked anew when
    /// it is empty.
    fn promising(&self, open: &[Entrant], queue: &mut VecDeque<Schedule>, model: &CostModel) -> Vec<Schedule> {
        let layouts = self.layouts();
        let leading = layouts.first().map(|(_, layout)| *layout);
        let mut batch = self.neighbours(open, layouts.iter().take(LAYOUTS).map(|(_, layout)| *layout), model);
        while batch.len() < BATCH {
            if queue.is_empty() {
                *queue = self.ranked(open, leading, model);
                // All that is open is in the batch.
                if queue.iter().all(|schedule| batch.contains(schedule)) {
                    queue.clear();
                    break;
                }
            }
            let next = queue.pop_front();
            batch.extend(next.filter(|next| !batch.contains(next) && open.iter().any(|open| open.schedule == *next)));
        }
        batch
    }

    /// What should come close to the best of its class, as a ratio to it.
    fn expected(&self, entrant: &Entrant, best: &[Option<f64>; 6], model: &CostModel) -> f64 {
        let expected = model.predict(self.problem, entrant.class, &entrant.schedule, self.search.threads);
        let ratio = expected / best[entrant.class.index()].unwrap_or(expected);
        let known = model.samples(entrant.class, &entrant.schedule) >= LEAST_SAMPLES;
        if known { ratio } else { ratio.min(0.9) }
    }

    /// Open schedules that differ in one parameter from the fastest of their class, or from the fastest of their class in
    /// one of the best layouts: the model knows nothing of what it does not count, and whatever made these fast has been
    /// found.
    fn neighbours(&self, open: &[Entrant], layouts: impl Iterator<Item = Layout>, model: &CostModel) -> Vec<Schedule> {
        let of: Vec<_> = std::iter::once(None).chain(layouts.map(Some)).collect();
        let leaders: [Vec<_>; 6] =
            Class::ALL.map(|class| of.iter().filter_map(|layout| self.leader(class, *layout)).collect());
        let best = Class::ALL.map(|class| self.best(class));
        let mut near: Vec<(f64, Entrant)> = Vec::new();
        for entrant in open {
            let leaders = leaders[entrant.class.index()].iter();
            let of = leaders.filter(|(leader, _)| distance(leader, &entrant.schedule) == 1);
            // What the model expects of the difference alone.
            let best = best[entrant.class.index()];
            let ratio = |(leader, seconds): &(Schedule, f64)| {
                let [mine, its] = [&entrant.schedule, leader]
                    .map(|schedule| model.predict(self.problem, entrant.class, schedule, self.search.threads));
                mine / its * seconds / best.unwrap_or(*seconds)
            };
            near.extend(of.map(|leader| (ratio(leader), *entrant)));
        }
        near.sort_by(|a, b| a.0.total_cmp(&b.0));
        // Decoding has a space of its own and gets its part.
        let mut chosen: Vec<Schedule> = Vec::new();
        for (limit, alone) in [(NEIGHBOURS / 2, true), (NEIGHBOURS, false)] {
            for (_, Entrant { class, schedule }) in &near {
                if chosen.len() < limit && (*class == Class::One) == alone && !chosen.contains(schedule) {
                    chosen.push(*schedule);
                }
            }
        }
        chosen
    }

    /// The schedules that may be the fastest of their class, half of them those in the leading layout. Of schedules that
    /// differ in how far they prefetch, which the model does not count, one.
    fn ranked(&self, open: &[Entrant], leading: Option<Layout>, model: &CostModel) -> VecDeque<Schedule> {
        let best = Class::ALL.map(|class| self.best(class));
        let mut ranked: Vec<(f64, &Entrant)> =
            open.iter().map(|entrant| (self.expected(entrant, &best, model), entrant)).collect();
        ranked.sort_by(|(a, _), (b, _)| a.total_cmp(b));
        let mut kernels = BTreeSet::new();
        let mut take = |mut entrants: &mut dyn Iterator<Item = &Entrant>| {
            let new = |entrant: &&Entrant| kernels.insert(Schedule { prefetch: 0, ..entrant.schedule });
            let next = Iterator::find(&mut entrants, new);
            next.map(|entrant| entrant.schedule)
        };
        let mut all = ranked.iter().map(|(_, entrant)| *entrant);
        let mut of_leader = all.clone().filter(|entrant| Some(entrant.schedule.layout) == leading);
        let mut queue = VecDeque::new();
        while queue.len() < QUEUE {
            let pair = [take(&mut of_leader), take(&mut all)];
            if pair == [None, None] {
                break;
            }
            queue.extend(pair.into_iter().flatten());
        }
        queue
    }

    /// The layouts that serve every class, by their weighted totals of what has been tried.
    pub(crate) fn layouts(&self) -> Vec<(f64, Layout)> {
        let weights = self.search.request.workload.weights();
        let mut best: BTreeMap<Layout, [f64; 6]> = BTreeMap::new();
        for (entrant, seconds) in &self.tried {
            let best = best.entry(entrant.schedule.layout).or_insert([f64::INFINITY; 6]);
            best[entrant.class.index()] = best[entrant.class.index()].min(*seconds);
        }
        let total = |times: [f64; 6]| times.iter().zip(weights).map(|(time, weight)| time * weight).sum::<f64>();
        let mut layouts: Vec<(f64, Layout)> = best.into_iter().map(|(layout, times)| (total(times), layout)).collect();
        layouts.retain(|(total, _)| total.is_finite());
        layouts.sort_by(|a, b| a.0.total_cmp(&b.0));
        layouts
    }
}

/// The median of a few samples, in seconds; of one, if that is far slower than the `best` so far.
fn trial(problem: &Problem, entrant: Entrant, bench: &mut dyn Bench, best: Option<f64>) -> Option<f64> {
    let mut samples = [0.0; TRIAL_SAMPLES];
    for sample in &mut samples {
        *sample = bench.sample(problem, entrant.class, entrant.schedule)?.as_secs_f64();
        if best.is_some_and(|best| *sample > HOPELESS * best) {
            return Some(*sample);
        }
    }
    samples.sort_by(f64::total_cmp);
    Some(samples[TRIAL_SAMPLES / 2])
}

/// How much slower or faster the machine has become since the first trial: batches are minutes apart in a long search, and
/// their trials must compare. The first schedule is measured again with each batch.
struct Drift {
    reference: Option<(Entrant, f64)>,
    /// What the reference took each time, over what it took first.
    times: Vec<f64>,
}

impl Drift {
    /// `known` is a trial of an interrupted search, which this one goes on from.
    fn new(known: Option<(&Entrant, &f64)>) -> Self {
        Self { reference: known.map(|(entrant, seconds)| (*entrant, *seconds)), times: Vec::new() }
    }

    fn begin(&mut self, entrant: Entrant, seconds: f64) {
        self.reference.get_or_insert((entrant, seconds));
    }

    fn is_of(&self, entrant: &Entrant) -> bool {
        self.reference.is_some_and(|(reference, _)| reference == *entrant)
    }

    /// What times are multiplied with to be those of the beginning.
    fn scale(&mut self, problem: &Problem, bench: &mut dyn Bench) -> f64 {
        let Some((entrant, first)) = self.reference else { return 1.0 };
        let Some(now) = trial(problem, entrant, bench, None) else { return 1.0 };
        self.times.push(now / first);
        // A moment's noise is not drift: only as much as a clock may change is believed.
        (first / now).clamp(0.67, 1.5)
    }
}
