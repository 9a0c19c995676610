//! The search: from a few seeds over the whole legal space to the finalists of each shape, and their race.
//!
//! Seeds of all shapes are compiled first, in turn, so that a short budget is shared fairly. Then each shape has its part
//! of the time: a little more than half to explore (batch after batch of the schedules that the [cost
//! model](crate::cost) expects most of, each measured a few times and learned from), the rest for the finalists' contest.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use ternion_compiler::{Cpu, Layout, Schedule};

use crate::bench::Bench;
use crate::contest::{Entrant, Rules, Standing, Verdict, contest};
use crate::cost::CostModel;
use crate::energy::EnergyMeter;
use crate::profile::{MachineProfile, Refusal, Warning};
use crate::request::{ClassResult, Effort, Found, Phase, Phases, Problem, Progress, Request, Source, Trial};
use crate::seeds::compile;
use crate::shortlist::Shortlist;
use crate::space::legal;
use crate::{Choice, Class, Stopwatch};

/// Of a shape's time, exploring takes at most this part.
const EXPLORING_SHARE: f64 = 0.55;

/// Samples of a trial; the median counts.
const TRIAL_SAMPLES: usize = 3;

/// Who takes so many times as long as the best needs no second sample.
const HOPELESS: f64 = 4.0;

/// Schedules that are compiled and tried at a time.
const BATCH: usize = 8;

/// Batches that must have brought nothing before exploring ends early.
const IDLE_BATCHES: usize = 8;

/// Samples of a kind of kernel before the model's opinion of it counts: until then it may be the fastest of all.
const LEAST_SAMPLES: usize = 4;

/// Layouts that reach the final, and schedules of each class in each of them.
const FINAL_LAYOUTS: usize = 3;
const FINAL_SCHEDULES: usize = 4;

/// With an energy meter: who is at most so many times slower than the fastest may be chosen for its energy, which is
/// measured for so long.
const NEARLY: f64 = 1.25;
const ENERGY_TIME: Duration = Duration::from_millis(60);

/// The final of an exhaustive search, which has no other end.
const EXHAUSTIVE_FINAL: Duration = Duration::from_secs(4);

/// Everything about a choice but the kernels.
pub(crate) struct Search<'a> {
    pub(crate) cpu: &'a Cpu,
    pub(crate) request: &'a Request,
    pub(crate) stopwatch: &'a dyn Stopwatch,
    pub(crate) progress: &'a dyn Fn(Progress),
    /// Threads that share a product.
    pub(crate) threads: usize,
    /// Kernels to compile at a time while seeds are compiled.
    pub(crate) batch: usize,
    /// Tells energy, if that is what is to be saved.
    pub(crate) meter: Option<&'a EnergyMeter>,
    /// Where trials of an exhaustive search are noted, so that the next one goes on from there.
    pub(crate) note: &'a dyn Fn(&[Trial]),
}

/// What a search has found out.
#[derive(Default)]
pub(crate) struct Outcome {
    pub(crate) trials: Vec<Trial>,
    pub(crate) warnings: Vec<Warning>,
    pub(crate) phases: Phases,
    /// For some shapes a choice that needs a second copy of the weights, and the seconds per token it saves per matrix.
    pub(crate) second: Vec<(usize, Choice, f64)>,
}

impl Search<'_> {
    /// Whether a shape is unknown, or known from a race with less time than there is now. What is shipped is better than
    /// a short race.
    pub(crate) fn wants_race(&self, found: &Found, known: &MachineProfile) -> bool {
        let Request { budget, again, .. } = self.request;
        if budget.effort == Effort::Nothing || found.source == Source::Shipped && !budget.explores() {
            return false;
        }
        let known = known.shape(found.problem.m, found.problem.k);
        // What a budget leaves after the start of a child process is nearly all of it.
        *again || known.is_none_or(|entry| entry.budget_ms < budget.milliseconds() / 10 * 9)
    }

    pub(crate) fn shortlist(&self, problem: Problem, known: &MachineProfile) -> Shortlist {
        let refused = |spec: &_, schedule: &_| known.is_refused(spec, schedule);
        Shortlist::new(problem.k, self.cpu, self.request.budget.seeds(), &refused)
    }

    /// The shortlist, with what is known or shipped first.
    fn seeds(&self, found: &Found, known: &MachineProfile) -> Shortlist {
        let mut list = self.shortlist(found.problem, known);
        if found.choice.layouts().len() == 1 {
            list.promote(found.choice);
        }
        list
    }

    /// Races every shape of `found` that wants it, each with an equal part of the time that compiling seeds leaves.
    /// Winners replace what was found. `done` are trials of an interrupted search.
    pub(crate) fn race_all(
        &self,
        found: &mut [Found],
        known: &MachineProfile,
        bench: &mut dyn Bench,
        news: &mut MachineProfile,
        done: &[Trial],
    ) -> Outcome {
        let racing: Vec<usize> = (0..found.len()).filter(|at| self.wants_race(&found[*at], known)).collect();
        let lists: Vec<(Problem, Shortlist)> =
            racing.iter().map(|at| (found[*at].problem, self.seeds(&found[*at], known))).collect();
        let mut outcome = Outcome::default();
        let end = self.request.budget.time;
        outcome.phases.preparing = self.stopwatch.elapsed();
        let compiling = |done, total| self.report(Phase::Compiling { done, total });
        let errors = compile(&lists, bench, self.stopwatch, end, self.batch, &compiling);
        self.refuse(errors, news, &mut outcome);
        outcome.phases.compiling = self.stopwatch.elapsed().saturating_sub(outcome.phases.preparing);

        let mut model = CostModel::default();
        let shapes = lists.len();
        for (shape, (at, (problem, list))) in racing.into_iter().zip(&lists).enumerate() {
            let now = self.stopwatch.elapsed();
            let deadline = now + end.saturating_sub(now) / (shapes - shape) as u32;
            let mut round = ShapeSearch {
                search: self,
                problem,
                place: (shape, shapes),
                known,
                guess: self.shortlist(*problem, known).guess(),
                tried: BTreeMap::new(),
                outcome: &mut outcome,
            };
            for trial in done.iter().filter(|trial| (trial.m, trial.k) == (problem.m, problem.k)) {
                round.tried.insert(Entrant { class: trial.class, schedule: trial.schedule }, trial.us * 1e-6);
            }
            let raced = round.run(list, bench, news, &mut model, deadline);
            if let Some(raced) = raced {
                outcome.second.extend(raced.second.map(|(choice, saved)| (at, choice, saved)));
                found[at] = raced.found;
            }
        }
        outcome
    }

    fn report(&self, phase: Phase) {
        (self.progress)(Progress { phase, spent: self.stopwatch.elapsed() });
    }

    fn refuse(&self, errors: Vec<ternion_compiler::CompileError>, news: &mut MachineProfile, outcome: &mut Outcome) {
        for error in errors {
            news.refused.extend(Refusal::of(&error));
            outcome.warnings.push(Warning::Refused { reason: error.to_string() });
        }
    }
}

/// The winners of a shape, and what a second copy of its weights would change.
struct Raced {
    found: Found,
    second: Option<(Choice, f64)>,
}

/// The search for one shape.
struct ShapeSearch<'a, 'b> {
    search: &'a Search<'b>,
    problem: &'a Problem,
    /// Which shape of how many this is.
    place: (usize, usize),
    known: &'a MachineProfile,
    guess: Option<Choice>,
    /// Seconds of one product.
    tried: BTreeMap<Entrant, f64>,
    outcome: &'a mut Outcome,
}

impl ShapeSearch<'_, '_> {
    fn run(
        &mut self,
        list: &Shortlist,
        bench: &mut dyn Bench,
        news: &mut MachineProfile,
        model: &mut CostModel,
        deadline: Duration,
    ) -> Option<Raced> {
        let Request { budget, workload, second_copies, .. } = self.search.request;
        let problem = self.problem;
        let ready = |entrant: &Entrant| bench.is_ready((entrant.class.spec(problem.k), entrant.schedule));
        let mut entrants: Vec<Entrant> = list.entrants.iter().filter(|entrant| ready(entrant)).copied().collect();
        // A guess that ran alone has not won anything.
        if entrants.len() <= 2 && list.entrants.len() > 2 {
            return None;
        }
        let begin = self.search.stopwatch.elapsed();
        if budget.explores() {
            self.explore(
                &entrants,
                bench,
                news,
                model,
                begin + (deadline.saturating_sub(begin)).mul_f64(EXPLORING_SHARE),
            );
            entrants = self.finalists();
            let missing: Vec<_> = entrants
                .iter()
                .map(|entrant| (entrant.class.spec(problem.k), entrant.schedule))
                .filter(|job| !bench.is_ready(*job))
                .collect();
            self.search.refuse(bench.compile(&missing), news, self.outcome);
            entrants.retain(|entrant| bench.is_ready((entrant.class.spec(problem.k), entrant.schedule)));
        }
        let start = self.search.stopwatch.elapsed();
        self.outcome.phases.exploring += start.saturating_sub(begin);
        let deadline = match (budget.effort, self.search.meter) {
            (Effort::Exhaustive, _) => start + EXHAUSTIVE_FINAL,
            (_, Some(_)) => start + deadline.saturating_sub(start) / 2,
            _ => deadline,
        };
        let rules = Rules { weights: workload.weights(), two_copies: *second_copies > 0 };
        let (shape, shapes) = self.place;
        let verdict = contest(
            &entrants,
            rules,
            self.search.stopwatch,
            deadline,
            &mut |at| bench.sample(problem, entrants[at].class, entrants[at].schedule),
            &mut |left| self.search.report(Phase::Racing { problem: *problem, shape, shapes, left }),
        );
        self.outcome.phases.racing += self.search.stopwatch.elapsed().saturating_sub(start);
        let mut verdict = verdict?;
        let joules = self.save_energy(&entrants, &mut verdict, bench);
        Some(self.raced(&entrants, &verdict, joules))
    }

    /// Tries schedules until `deadline`, or until nothing promising is left.
    fn explore(
        &mut self,
        seeds: &[Entrant],
        bench: &mut dyn Bench,
        news: &mut MachineProfile,
        model: &mut CostModel,
        deadline: Duration,
    ) {
        let problem = self.problem;
        let mut open: BTreeSet<Entrant> = BTreeSet::new();
        for class in Class::ALL {
            let spec = class.spec(problem.k);
            let schedules = legal(&spec, self.search.cpu, &self.search.request.budget).into_iter();
            let allowed = schedules.filter(|schedule| !self.known.is_refused(&spec, schedule));
            open.extend(allowed.map(|schedule| Entrant { class, schedule }));
        }
        let total = open.len();
        open.retain(|entrant| !self.tried.contains_key(entrant));
        for (entrant, seconds) in &self.tried {
            model.learn(problem, entrant.class, &entrant.schedule, self.search.threads, *seconds);
        }
        let exhaustive = self.search.request.budget.effort == Effort::Exhaustive;
        let mut drift = Drift::default();
        let mut batch: Vec<Schedule> = seeds.iter().map(|seed| seed.schedule).collect();
        let mut idle = 0;
        while !batch.is_empty() && self.search.stopwatch.elapsed() < deadline && (exhaustive || idle < IDLE_BATCHES) {
            let (shape, shapes) = self.place;
            let tried = total - open.len();
            self.search.report(Phase::Exploring { problem: *problem, shape, shapes, tried, legal: total });
            let entrants: Vec<Entrant> = open.iter().filter(|open| batch.contains(&open.schedule)).copied().collect();
            open.retain(|entrant| !batch.contains(&entrant.schedule));
            idle = if self.try_out(&entrants, bench, news, model, &mut drift, deadline) { 0 } else { idle + 1 };
            batch = self.promising(&open, model);
        }
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
        let mut jobs: Vec<_> = entrants.iter().map(|e| (e.class.spec(problem.k), e.schedule)).collect();
        jobs.sort_unstable();
        jobs.dedup();
        jobs.retain(|job| !bench.is_ready(*job));
        if !jobs.is_empty() {
            self.search.refuse(bench.compile(&jobs), news, self.outcome);
        }
        let scale = drift.scale(problem, bench);
        let (mut better, mut trials) = (false, Vec::new());
        for entrant in entrants {
            if self.search.stopwatch.elapsed() >= deadline {
                break;
            }
            let Some(seconds) = trial(problem, *entrant, bench, self.best(entrant.class)) else { continue };
            let seconds = seconds * scale;
            drift.begin(*entrant, seconds);
            better |= self.best(entrant.class).is_none_or(|best| seconds < 0.99 * best);
            model.learn(problem, entrant.class, &entrant.schedule, self.search.threads, seconds);
            self.tried.insert(*entrant, seconds);
            let (Problem { m, k, .. }, Entrant { class, schedule }) = (*problem, *entrant);
            trials.push(Trial { m, k, class, schedule, us: seconds * 1e6 });
        }
        (self.search.note)(&trials);
        better
    }

    fn best(&self, class: Class) -> Option<f64> {
        let times = self.tried.iter().filter(|(entrant, _)| entrant.class == class).map(|(_, seconds)| *seconds);
        times.min_by(f64::total_cmp)
    }

    /// What to try next: half of the batch by what may be the fastest of its class, half by what may be the fastest of
    /// its class in the layout that leads over all classes.
    fn promising(&self, open: &BTreeSet<Entrant>, model: &CostModel) -> Vec<Schedule> {
        let leader = self.layouts().first().map(|(_, layout)| *layout);
        let best = Class::ALL.map(|class| self.best(class));
        let mut ranked: Vec<(f64, Entrant)> = open
            .iter()
            .map(|entrant| {
                let expected = model.predict(self.problem, entrant.class, &entrant.schedule, self.search.threads);
                let ratio = expected / best[entrant.class.index()].unwrap_or(expected);
                let known = model.samples(entrant.class, &entrant.schedule) >= LEAST_SAMPLES;
                (if known { ratio } else { ratio.min(0.9) }, *entrant)
            })
            .collect();
        ranked.sort_by(|(a, _), (b, _)| a.total_cmp(b));
        let mut batch: Vec<Schedule> = Vec::new();
        let of_leader = ranked.iter().filter(|(_, entrant)| Some(entrant.schedule.layout) == leader);
        for (limit, candidates) in [
            (BATCH / 2, of_leader.map(|(_, e)| e.schedule).collect::<Vec<_>>()),
            (BATCH, ranked.iter().map(|(_, e)| e.schedule).collect()),
        ] {
            for schedule in candidates {
                if batch.len() >= limit {
                    break;
                }
                if !batch.contains(&schedule) {
                    batch.push(schedule);
                }
            }
        }
        batch
    }

    /// The layouts that serve every class, by their weighted totals of what has been tried.
    fn layouts(&self) -> Vec<(f64, Layout)> {
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

    /// Who races in the end: the fastest of each class in the best layouts, the guess, and with two copies the fastest of
    /// each class whatever its layout.
    fn finalists(&self) -> Vec<Entrant> {
        let mut finalists = BTreeSet::new();
        let mut add = |class, layout: Option<Layout>| {
            let fits = |entrant: &Entrant| {
                entrant.class == class && layout.is_none_or(|layout| entrant.schedule.layout == layout)
            };
            let mut of_class: Vec<_> = self.tried.iter().filter(|(entrant, _)| fits(entrant)).collect();
            of_class.sort_by(|a, b| a.1.total_cmp(b.1));
            finalists.extend(of_class.into_iter().take(FINAL_SCHEDULES).map(|(entrant, _)| *entrant));
        };
        for class in Class::ALL {
            self.layouts().iter().take(FINAL_LAYOUTS).for_each(|(_, layout)| add(class, Some(*layout)));
            if self.search.request.second_copies > 0 {
                add(class, None);
            }
        }
        if let Some(guess) = self.guess {
            finalists.extend(Class::ALL.map(|class| Entrant { class, schedule: guess.of(class) }));
        }
        finalists.into_iter().collect()
    }

    /// Of each class, replaces the winner by the finalist of its layout that takes least energy, if there is a meter.
    /// Returns the joules of the winners.
    fn save_energy(&self, entrants: &[Entrant], verdict: &mut Verdict, bench: &mut dyn Bench) -> [Option<f64>; 6] {
        let Some(meter) = self.search.meter else { return [None; 6] };
        let mut joules = [None; 6];
        for class in Class::ALL {
            let Some(winner) = verdict.one_copy.set[class.index()] else { continue };
            let limit = NEARLY * verdict.figures[winner].median_us;
            let rivals = entrants.iter().enumerate().filter(|(at, entrant)| {
                let figures = &verdict.figures[*at];
                entrant.class == class
                    && entrant.schedule.layout == entrants[winner].schedule.layout
                    && figures.samples > 0
                    && figures.median_us <= limit
            });
            for (at, entrant) in rivals {
                let mut run = || {
                    bench.sample(self.problem, class, entrant.schedule);
                };
                let watts = meter.watts(ENERGY_TIME, self.search.stopwatch, &mut run);
                let used = watts.map(|watts| watts * verdict.figures[at].median_us * 1e-6);
                if used.is_some_and(|used| joules[class.index()].is_none_or(|least| used < least)) {
                    joules[class.index()] = used;
                    verdict.one_copy.set[class.index()] = Some(at);
                }
            }
        }
        joules
    }

    /// What the verdict means.
    fn raced(&mut self, entrants: &[Entrant], verdict: &Verdict, joules: [Option<f64>; 6]) -> Raced {
        for (entrant, figures) in entrants.iter().zip(&verdict.figures).filter(|(_, figures)| figures.samples > 0) {
            // The final knows better than a trial.
            self.tried.insert(*entrant, figures.median_us * 1e-6);
        }
        if self.search.request.budget.explores() {
            let Problem { m, k, .. } = *self.problem;
            let trial = |(entrant, seconds): (&Entrant, &f64)| Trial {
                m,
                k,
                class: entrant.class,
                schedule: entrant.schedule,
                us: seconds * 1e6,
            };
            self.outcome.trials.extend(self.tried.iter().map(trial));
        }
        let choice = complete(entrants, &verdict.one_copy);
        let results = Class::ALL.into_iter().filter_map(|class| {
            let winner = verdict.one_copy.set[class.index()]?;
            Some(ClassResult { joules: joules[class.index()], ..self.result(class, &verdict.figures[winner]) })
        });
        let results: Vec<ClassResult> = results.collect();
        let raced = if self.tried.is_empty() { entrants.len() } else { self.tried.len() };
        let found = Found { problem: *self.problem, choice, source: Source::Raced, results, raced };
        let second = verdict
            .two_copies
            .map(|two| (complete(entrants, &two), (verdict.one_copy.total - two.total) * self.problem.count as f64));
        Raced { found, second }
    }

    fn result(&self, class: Class, figures: &crate::contest::Figures) -> ClassResult {
        let mut times: Vec<f64> =
            self.tried.iter().filter(|(entrant, _)| entrant.class == class).map(|(_, seconds)| seconds * 1e6).collect();
        times.sort_by(f64::total_cmp);
        let guess = self.guess.and_then(|guess| self.tried.get(&Entrant { class, schedule: guess.of(class) }));
        ClassResult {
            class,
            figures: *figures,
            joules: None,
            tried: times.len(),
            median_us: times.get(times.len() / 2).copied().unwrap_or(figures.median_us),
            worst_us: times.last().copied().unwrap_or(figures.median_us),
            guess_us: guess.map(|seconds| seconds * 1e6),
        }
    }
}

/// A choice from winners; a class that did not race takes the schedule of the next smaller one that did, or of the next
/// larger one if its kernels are for one column only.
fn complete(entrants: &[Entrant], standing: &Standing) -> Choice {
    let schedule = |class: usize| standing.set[class].map(|at| entrants[at].schedule);
    let nearest = |class: usize| {
        let below = (1..=class).rev().find_map(schedule);
        below.or_else(|| (class..6).find_map(schedule)).or_else(|| schedule(0))
    };
    let of = |class: usize| if class == 0 { schedule(0).or_else(|| nearest(1)) } else { nearest(class) };
    Choice { schedules: std::array::from_fn(|class| of(class).unwrap_or(entrants[0].schedule)) }
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
#[derive(Default)]
struct Drift(Option<(Entrant, f64)>);

impl Drift {
    fn begin(&mut self, entrant: Entrant, seconds: f64) {
        self.0.get_or_insert((entrant, seconds));
    }

    /// What times are multiplied with to be those of the beginning.
    fn scale(&self, problem: &Problem, bench: &mut dyn Bench) -> f64 {
        let Some((entrant, first)) = self.0 else { return 1.0 };
        // A moment's noise is not drift: only as much as a clock may change is believed.
        trial(problem, entrant, bench, None).map_or(1.0, |now| (first / now).clamp(0.67, 1.5))
    }
}
