//! Looking for better schedules of one shape: batch after batch of what the [cost model](crate::cost) expects most of and
//! of what differs from the best so far in one parameter, each measured a few times and learned from.

use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use ternion_compiler::{Columns, Layout, Schedule};

use crate::bench::{Bench, Job};
use crate::contest::Entrant;
use crate::cost::CostModel;
use crate::drift::Drift;
use crate::frontier::{Candidate, Frontier};
use crate::profile::MachineProfile;
use crate::request::{Phase, Problem, Trial};
use crate::search::{FINAL_LAYOUTS, FINAL_SCHEDULES, Outcome, Search};
use crate::space::legal;
use crate::tried::{Timed, Tried};
use crate::{Choice, Class};

/// Of the time for exploring, waiting for the list of all schedules takes at most this part. It is the system's time: the
/// list is made by threads that no script knows of.
const LISTING_SHARE: f64 = 0.4;

/// Samples of a trial.
const TRIAL_SAMPLES: usize = 3;

/// Who takes so many times as long as the best by its fastest of one sample, of two, needs no further one.
const HOPELESS: [f64; TRIAL_SAMPLES - 1] = [4.0, 1.5];

/// Samples without which nobody leads: of hundreds that were measured three times, the fastest has been lucky.
const LEADING_SAMPLES: usize = 9;

/// Of the time that exploring leaves, the final has at least this part; before that, those who may be in it are measured
/// again.
const FINAL_SHARE: f64 = 0.75;

/// Candidates that are compiled and tried at a time.
const BATCH: usize = 8;

/// The layouts that may still win: neighbours of their fastest are tried, too.
const LAYOUTS: usize = 3;

/// Schedules that are taken from one ranking of all that are open.
const QUEUE: usize = 32;

/// Samples of a kind of kernel in a layout before the model's opinion of it counts: until then it may be the fastest.
const LEAST_SAMPLES: usize = 2;

/// Who takes no more than so many times the best may be as fast: trials are few, and noise is large.
const NEAR: f64 = 1.2;

/// Trials of a class in a layout before its best there says how fast the class may be.
const HOPEFUL: usize = 6;

/// Kernels so many times slower than the best of their class are forgotten, for memory's sake, if they do not lead their
/// layout.
const WORTH_KEEPING: f64 = 1.3;

/// The search for one shape.
pub(crate) struct ShapeSearch<'a, 'b> {
    pub(crate) search: &'a Search<'b>,
    pub(crate) problem: &'a Problem,
    /// Which shape of how many this is.
    pub(crate) place: (usize, usize),
    pub(crate) known: &'a MachineProfile,
    pub(crate) guess: Option<Choice>,
    pub(crate) tried: Tried,
    pub(crate) outcome: &'a mut Outcome,
}

/// What measures, and what learns from it.
pub(crate) struct Tools<'a> {
    pub(crate) bench: &'a mut dyn Bench,
    pub(crate) news: &'a mut MachineProfile,
    pub(crate) model: &'a mut CostModel,
}

impl ShapeSearch<'_, '_> {
    pub(crate) fn job(&self, entrant: &Entrant) -> Job {
        (entrant.class.spec(self.problem.k), entrant.schedule)
    }

    /// Tries schedules until everything is tried, or until what is left of the time until `deadline` is what the final
    /// will take, but between a third of `reserve` and all of it; `first` before all others.
    pub(crate) fn explore(&mut self, first: &[Schedule], tools: &mut Tools<'_>, deadline: Duration, reserve: Duration) {
        let patience = deadline.saturating_sub(self.search.stopwatch.elapsed() + reserve).mul_f64(LISTING_SHARE);
        let mut open = self.open(patience);
        let done = [Columns::One, Columns::Many].map(|columns| self.tried_for(columns).len());
        let total = open.len() + done.iter().sum::<usize>();
        let mut drift = Drift::default();
        for (entrant, Timed { schedule, seconds, .. }) in self.tried.iter() {
            tools.model.learn(self.problem, entrant.class, schedule, self.search.threads, *seconds);
            if tools.bench.is_ready(self.job(&entrant)) {
                drift.begin(entrant, *seconds);
            }
        }
        let both = |schedule: &Schedule| [Columns::One, Columns::Many].map(|columns| (columns, *schedule));
        let mut batch: Vec<Candidate> = first.iter().flat_map(both).collect();
        batch.retain(|(columns, schedule)| open.take(*columns, schedule));
        loop {
            if batch.is_empty() {
                batch = self.promising(&mut open, tools.model);
            }
            let until = deadline.saturating_sub(self.final_cost().clamp(reserve / 3, reserve));
            if batch.is_empty() || self.search.stopwatch.elapsed() >= until {
                break;
            }
            let (shape, shapes) = self.place;
            let tried = total - open.len() - batch.len();
            self.search.report(Phase::Exploring { problem: *self.problem, shape, shapes, tried, legal: total });
            self.try_out(&batch, tools, &mut drift, until);
            batch.clear();
        }
        let until = deadline.saturating_sub(reserve.mul_f64(FINAL_SHARE));
        while self.settle(FINAL_SCHEDULES, tools, &drift, until) {
            self.look_at(&mut drift, tools.bench);
        }
        self.outcome.reference.extend(drift.ratios);
    }

    /// Every legal schedule that has neither been refused nor tried; where listing them takes longer than `patience`,
    /// what deserves it most.
    fn open(&self, patience: Duration) -> Frontier {
        let begin = Instant::now();
        let Search { families, cpu, request, .. } = self.search;
        let mut open = Vec::new();
        for class in [Class::One, Class::Chunk] {
            let spec = class.spec(self.problem.k);
            let refused: BTreeSet<String> = self.known.refused_for(&spec);
            let tried = self.tried_for(spec.columns);
            let allowed = |schedule: &&Schedule| {
                (refused.is_empty() || !refused.contains(&schedule.to_string())) && !tried.contains(schedule)
            };
            let left = patience.saturating_sub(begin.elapsed());
            let schedules = legal(families, &spec, cpu, &request.budget, left);
            open.extend(schedules.iter().filter(allowed).map(|schedule| (spec.columns, *schedule)));
        }
        Frontier::new(open.into_iter())
    }

    /// Schedules that every class of so many columns has tried.
    fn tried_for(&self, columns: Columns) -> BTreeSet<Schedule> {
        let of = |class| self.tried.iter().filter(move |(entrant, _)| entrant.class == class).map(|(_, t)| t.schedule);
        let mut classes = Class::ALL.into_iter().filter(|class| class.columns() == columns);
        let first: BTreeSet<Schedule> = classes.next().into_iter().flat_map(of).collect();
        classes.fold(first, |all, class| &all & &of(class).collect())
    }

    /// Compiles and measures, until `deadline`.
    fn try_out(&mut self, batch: &[Candidate], tools: &mut Tools<'_>, drift: &mut Drift, deadline: Duration) {
        let problem = self.problem;
        let classes =
            |of: &Columns| Class::ALL.into_iter().filter(|class| class.columns() == *of).collect::<Vec<Class>>();
        let mut jobs: Vec<Job> =
            batch.iter().map(|(of, schedule)| (classes(of)[0].spec(problem.k), *schedule)).collect();
        jobs.retain(|job| !tools.bench.is_ready(*job) && job.1.check(&job.0, self.search.cpu).is_ok());
        if !jobs.is_empty() {
            self.search.refuse(tools.bench.compile(&jobs), tools.news, self.outcome);
        }
        self.look_at(drift, tools.bench);
        let mut trials = Vec::new();
        for (of, schedule) in batch {
            for class in classes(of) {
                let entrant = Entrant { class, schedule: *schedule };
                if self.tried.get(entrant).is_some() || self.search.stopwatch.elapsed() >= deadline {
                    continue;
                }
                let best = self.tried.best(class).map(|best| best.seconds);
                let Some(seconds) = self.measure(entrant, tools.bench, drift, best) else { continue };
                drift.begin(entrant, seconds);
                tools.model.learn(problem, class, schedule, self.search.threads, seconds);
                let Problem { m, k, .. } = *problem;
                trials.push(Trial { m, k, class, schedule: *schedule, us: seconds * 1e6 });
            }
        }
        (self.search.note)(&trials);
        self.settle(1, tools, drift, deadline);
        // Whoever may be in the final is compiled again if need be.
        let good = |job: &&Job| {
            classes(&job.0.columns).into_iter().any(|class| {
                let mut first = self.tried.of(class, job.1.layout).iter().take(FINAL_SCHEDULES);
                let entrant = Entrant { class, schedule: job.1 };
                let time = self.tried.get(entrant).zip(self.tried.best(class));
                let close = time.is_some_and(|(timed, best)| timed.seconds < WORTH_KEEPING * best.seconds);
                close || first.any(|timed| timed.schedule == job.1) || drift.reference() == Some(entrant)
            })
        };
        jobs.iter().filter(|job| !good(job)).for_each(|job| tools.bench.forget(*job));
    }

    /// Measures the drift's reference again.
    fn look_at(&self, drift: &mut Drift, bench: &mut dyn Bench) {
        let trial = drift.reference().and_then(|entrant| self.trial(entrant, bench, None));
        trial.into_iter().for_each(|(samples, _)| drift.note(samples[samples.len() / 2]));
    }

    /// Takes a few samples of an entrant that is ready; returns its time as it is known by now.
    fn measure(&mut self, entrant: Entrant, bench: &mut dyn Bench, drift: &Drift, best: Option<f64>) -> Option<f64> {
        let (mut samples, cost) = self.trial(entrant, bench, best)?;
        samples.iter_mut().for_each(|sample| *sample *= drift.scale());
        self.tried.add(entrant, &samples, cost);
        self.tried.get(entrant).map(|timed| timed.seconds)
    }

    /// A few samples, sorted, in seconds, and what one of them cost; fewer if they are far slower than the `best` so far.
    fn trial(&self, entrant: Entrant, bench: &mut dyn Bench, best: Option<f64>) -> Option<(Vec<f64>, Duration)> {
        let begin = self.search.stopwatch.elapsed();
        let mut samples = Vec::with_capacity(TRIAL_SAMPLES);
        let mut fastest = f64::INFINITY;
        while samples.len() < TRIAL_SAMPLES {
            let sample = bench.sample(self.problem, entrant.class, entrant.schedule)?.as_secs_f64();
            samples.push(sample);
            fastest = fastest.min(sample);
            if HOPELESS.get(samples.len() - 1).zip(best).is_some_and(|(times, best)| fastest > times * best) {
                break;
            }
        }
        samples.sort_by(f64::total_cmp);
        let cost = self.search.stopwatch.elapsed().saturating_sub(begin) / samples.len() as u32;
        Some((samples, cost))
    }

    /// Measures those again, until `deadline`, who are among the first `depth` of their class by few samples, in a layout
    /// near the best. Returns whether there was anybody: by and by nobody leads by luck, nor by a fast moment.
    fn settle(&mut self, depth: usize, tools: &mut Tools<'_>, drift: &Drift, deadline: Duration) -> bool {
        let mut unsettled = BTreeSet::new();
        let layouts = self.near_layouts();
        for class in Class::ALL {
            let best = self.tried.best(class).map(|best| best.schedule.layout);
            let first =
                layouts.iter().copied().chain(best).flat_map(|layout| self.tried.of(class, layout).iter().take(depth));
            let few = first.filter(|timed| timed.samples() < LEADING_SAMPLES);
            unsettled.extend(few.map(|timed| Entrant { class, schedule: timed.schedule }));
        }
        let jobs: BTreeSet<Job> = unsettled.iter().map(|entrant| self.job(entrant)).collect();
        let missing: Vec<Job> = jobs.into_iter().filter(|job| !tools.bench.is_ready(*job)).collect();
        if !missing.is_empty() {
            self.search.refuse(tools.bench.compile(&missing), tools.news, self.outcome);
        }
        let mut any = false;
        for entrant in unsettled {
            if self.search.stopwatch.elapsed() >= deadline {
                return false;
            }
            any |= self.measure(entrant, tools.bench, drift, None).is_some();
        }
        any
    }

    /// The layouts of the final: the first few of those that serve every class.
    pub(crate) fn layouts(&self) -> Vec<Layout> {
        self.first_layouts(FINAL_LAYOUTS, &|_, _| false)
    }

    /// The layouts that are so near the best that their order may be luck.
    fn near_layouts(&self) -> Vec<Layout> {
        let layouts = self.tried.layouts(&self.search.request.workload.weights(), &|_, _| false);
        let least = layouts.first().map_or(0.0, |(total, _)| *total);
        layouts.into_iter().take_while(|(total, _)| *total < NEAR * least).map(|(_, layout)| layout).collect()
    }

    /// The first few layouts if whatever has hardly been tried turns out well.
    fn hopeful_layouts(&self, open: &Frontier) -> Vec<Layout> {
        self.first_layouts(LAYOUTS, &|class, layout| {
            self.tried.of(class, layout).len() < HOPEFUL && open.has_layout(class.columns(), layout)
        })
    }

    fn first_layouts(&self, count: usize, hopeful: &dyn Fn(Class, Layout) -> bool) -> Vec<Layout> {
        let layouts = self.tried.layouts(&self.search.request.workload.weights(), hopeful);
        layouts.into_iter().take(count).map(|(_, layout)| layout).collect()
    }

    /// Parts of the search that classes have: half of it in equal parts, half as they have parts of all the time.
    fn shares(&self) -> [f64; 6] {
        let weights = self.search.request.workload.weights();
        let times =
            Class::ALL.map(|class| weights[class.index()] * self.tried.best(class).map_or(0.0, |best| best.seconds));
        let sum = times.iter().sum::<f64>().max(f64::MIN_POSITIVE);
        times.map(|time| (time / sum + 1.0 / 6.0) / 2.0)
    }

    /// What to try next, in turn for each class: a neighbour of its leaders, or what heads its queue.
    fn promising(&self, open: &mut Frontier, model: &CostModel) -> Vec<Candidate> {
        let shares = self.shares();
        let mut batch = Vec::with_capacity(BATCH);
        while batch.len() < BATCH {
            let Some((class, turn)) = open.turn(&shares) else { break };
            let neighbour = if turn % 2 == 1 { self.neighbour(class, open, model) } else { None };
            let Some(next) = neighbour.or_else(|| self.next(class, open, model)) else { break };
            open.take(class.columns(), &next);
            batch.push((class.columns(), next));
        }
        batch
    }

    /// Seconds that a product should take.
    fn predict(&self, class: Class, schedule: &Schedule, model: &CostModel) -> f64 {
        model.predict(self.problem, class, schedule, self.search.threads)
    }

    /// The most promising open schedule that differs in one parameter from the fastest of a class, or from its fastest in
    /// one of the best layouts: the model knows nothing of what it does not count, and whatever made these fast has been
    /// found.
    fn neighbour(&self, class: Class, open: &Frontier, model: &CostModel) -> Option<Schedule> {
        let of_layouts =
            self.hopeful_layouts(open).into_iter().filter_map(|layout| self.tried.of(class, layout).first());
        let leaders = self.tried.best(class).into_iter().chain(of_layouts);
        let near = leaders.flat_map(|leader| {
            let expected = self.predict(class, &leader.schedule, model);
            let near = open.neighbours(class.columns(), &leader.schedule).into_iter();
            // What the model expects of the difference alone.
            near.map(move |near| (self.predict(class, &near, model) / expected * leader.seconds, near))
        });
        near.min_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, near)| near)
    }

    /// What heads the queue of a class, which is ranked anew when it is empty.
    fn next(&self, class: Class, open: &mut Frontier, model: &CostModel) -> Option<Schedule> {
        for _ in 0..2 {
            while let Some(next) = open.queues[class.index()].pop_front() {
                if open.has(class.columns(), &next) {
                    return Some(next);
                }
            }
            open.queues[class.index()] = self.ranked(class, open, model);
        }
        None
    }

    /// The schedules that may be the fastest of a class: some in each of the layouts that may win, some in any. Of schedules
    /// that differ in how far they prefetch, which the model does not count, one: the others are its neighbours.
    fn ranked(&self, class: Class, open: &Frontier, model: &CostModel) -> VecDeque<Schedule> {
        let best = self.tried.best(class).map_or(0.0, |best| best.seconds);
        let mut ranked: Vec<(f64, &Schedule)> = open
            .of(class.columns())
            .map(|schedule| {
                let expected = self.predict(class, schedule, model);
                let known = model.samples(class, schedule) >= LEAST_SAMPLES;
                (if known { expected } else { expected.min(0.9 * best) }, schedule)
            })
            .collect();
        ranked.sort_by(|(a, _), (b, _)| a.total_cmp(b));
        let ranked: Vec<&Schedule> = ranked.into_iter().map(|(_, schedule)| schedule).collect();
        let kernel = |schedule: &Schedule| Schedule { prefetch: 0, ..*schedule };
        let mut kernels: BTreeSet<Schedule> = self.tried_for(class.columns()).iter().map(kernel).collect();
        let layouts: Vec<Option<Layout>> =
            self.hopeful_layouts(open).into_iter().map(Some).chain(std::iter::once(None)).collect();
        let mut of: Vec<_> = layouts
            .iter()
            .map(|of| ranked.iter().filter(move |schedule| of.is_none_or(|layout| schedule.layout == layout)))
            .collect();
        let mut queue = VecDeque::new();
        while queue.len() < QUEUE {
            let before = queue.len();
            for schedules in &mut of {
                queue.extend(schedules.find(|schedule| kernels.insert(kernel(schedule))).map(|next| **next));
            }
            if queue.len() == before {
                break;
            }
        }
        if queue.is_empty() {
            queue.extend(ranked.into_iter().take(QUEUE));
        }
        queue
    }
}
