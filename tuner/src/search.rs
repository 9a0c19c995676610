//! The search: from a few seeds over the whole legal space to the finalists of each shape, and their race.
//!
//! Seeds of all shapes are compiled first, in turn, so that a short budget is shared fairly. Then each shape has its part
//! of the time: to [explore](crate::explore) until what is left is what the finalists' contest will take, and in the end
//! held-out rounds of who won against the guess.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use ternion_compiler::{CompileError, Cpu, Family, Layout, Schedule};

use crate::bench::Bench;
use crate::contest::{Entrant, Figures, MAX_ROUNDS, Rules, Standing, Verdict, contest};
use crate::cost::CostModel;
use crate::energy::EnergyMeter;
use crate::explore::{ShapeSearch, Tools};
use crate::held_out::{ROUNDS, Rounds, rounds, total};
use crate::profile::{MachineProfile, Refusal, Warning};
use crate::request::{
    Alternative, ClassResult, Effort, Found, Phase, Phases, Problem, Progress, Request, Source, Trial,
};
use crate::seeds::compile;
use crate::shortlist::Shortlist;
use crate::sparse::{self, SparseSearch};
use crate::tried::{Timed, Tried};
use crate::{Choice, Class, SparseChoice, Stopwatch};

/// Of a shape's time, exploring takes at least this part, and more if the final will not need the rest.
const EXPLORING_SHARE: f64 = 0.55;

/// Of the time for the final, held-out rounds take at most this part.
const HELD_OUT_SHARE: f64 = 0.25;

/// Samples of a held-out round; the median counts.
const HELD_OUT_SAMPLES: usize = 5;

/// Layouts that reach the final, and schedules of each class in each of them.
pub(crate) const FINAL_LAYOUTS: usize = 4;
pub(crate) const FINAL_SCHEDULES: usize = 3;

/// With an energy meter: who is at most so many times slower than the fastest may be chosen for its energy, which is
/// measured for so long.
const NEARLY: f64 = 1.25;
const ENERGY_TIME: Duration = Duration::from_millis(60);

/// The final of an exhaustive search, which has no other end.
const EXHAUSTIVE_FINAL: Duration = Duration::from_secs(4);

/// And of its kernels for lists.
const EXHAUSTIVE_LISTS: Duration = Duration::from_secs(6);

/// Everything about a choice but the kernels.
pub(crate) struct Search<'a> {
    pub(crate) cpu: &'a Cpu,
    pub(crate) request: &'a Request,
    /// Families that schedules are looked for in.
    pub(crate) families: &'a [Family],
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
    /// What one kernel took each time that it was measured again, over what it took first.
    pub(crate) reference: Vec<f64>,
    /// How lists of records are read, if that was measured.
    pub(crate) sparse: Option<SparseChoice>,
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
        *again || known.is_none_or(|entry| !entry.suffices(self.request))
    }

    pub(crate) fn shortlist(&self, problem: Problem, known: &MachineProfile) -> Shortlist {
        let refused = |spec: &_, schedule: &_| known.is_refused(spec, schedule);
        Shortlist::new(problem.k, self.cpu, self.request.budget.seeds(), &refused)
    }

    /// The shortlist, with what is known or shipped first, and then the best guess for each layout that is held.
    fn seeds(&self, found: &Found, known: &MachineProfile) -> Shortlist {
        let Problem { m, k, .. } = found.problem;
        let mut list = self.shortlist(found.problem, known);
        for layout in self.request.held.layouts(m, k) {
            let other = |spec: &_, schedule: &Schedule| schedule.layout != *layout || known.is_refused(spec, schedule);
            Shortlist::new(k, self.cpu, 2, &other).guess().into_iter().for_each(|guess| list.promote(guess));
        }
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
        let all = self.request.budget.time;
        let end = if known.wants_sparse(self.request) { all.mul_f64(1.0 - sparse::SHARE) } else { all };
        outcome.phases.preparing = self.stopwatch.elapsed();
        let compiling = |done, total| self.report(Phase::Compiling { done, total });
        let errors = compile(&lists, bench, self.stopwatch, end, self.batch, &compiling);
        self.refuse(errors, news, &mut outcome);
        outcome.phases.compiling = self.stopwatch.elapsed().saturating_sub(outcome.phases.preparing);

        let mut model = CostModel::default();
        // Who reached the final of one shape is worth a try in the next.
        let mut proven: Vec<Schedule> = Vec::new();
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
                tried: Tried::default(),
                outcome: &mut outcome,
            };
            for trial in done.iter().filter(|trial| (trial.m, trial.k) == (problem.m, problem.k)) {
                let entrant = Entrant { class: trial.class, schedule: trial.schedule };
                round.tried.add(entrant, &[trial.us * 1e-6], Duration::ZERO);
            }
            let mut tools = Tools { bench: &mut *bench, news: &mut *news, model: &mut model };
            let raced = round.run(list, &mut proven, &mut tools, deadline);
            if let Some(raced) = raced {
                outcome.second.extend(raced.second.map(|(choice, saved)| (at, choice, saved)));
                found[at] = raced.found;
            }
        }
        outcome.sparse = self.lists(found, known, bench, news, &mut outcome);
        outcome
    }

    /// The kernels for lists of records, if they are to be measured.
    fn lists(
        &self,
        found: &[Found],
        known: &MachineProfile,
        bench: &mut dyn Bench,
        news: &mut MachineProfile,
        outcome: &mut Outcome,
    ) -> Option<SparseChoice> {
        let shape = self.request.sparse.filter(|_| known.wants_sparse(self.request))?;
        let begin = self.stopwatch.elapsed();
        let deadline = match self.request.budget.effort {
            Effort::Exhaustive => begin + EXHAUSTIVE_LISTS,
            _ => self.request.budget.time,
        };
        let search = SparseSearch {
            cpu: self.cpu,
            stopwatch: self.stopwatch,
            deadline,
            refused: &|spec, schedule| known.is_refused(spec, schedule),
        };
        let dense = |problem: &Problem| {
            let same = |found: &&Found| (found.problem.m, found.problem.k) == (problem.m, problem.k);
            found.iter().find(same).map(|found| found.choice.of(Class::One))
        };
        let choice = search.run(&shape, &dense, bench, &mut |errors| self.refuse(errors, news, outcome));
        outcome.phases.racing += self.stopwatch.elapsed().saturating_sub(begin);
        choice
    }

    pub(crate) fn report(&self, phase: Phase) {
        (self.progress)(Progress { phase, spent: self.stopwatch.elapsed() });
    }

    pub(crate) fn refuse(&self, errors: Vec<CompileError>, news: &mut MachineProfile, outcome: &mut Outcome) {
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

impl ShapeSearch<'_, '_> {
    fn run(
        &mut self,
        list: &Shortlist,
        proven: &mut Vec<Schedule>,
        tools: &mut Tools<'_>,
        deadline: Duration,
    ) -> Option<Raced> {
        let Request { budget, workload, second_copies, .. } = self.search.request;
        let problem = self.problem;
        let mut entrants = list.entrants.clone();
        entrants.retain(|entrant| tools.bench.is_ready(self.job(entrant)));
        // A guess that ran alone has not won anything.
        if entrants.len() <= 2 && list.entrants.len() > 2 {
            return None;
        }
        let begin = self.search.stopwatch.elapsed();
        if budget.explores() {
            let mut first: Vec<Schedule> = entrants.iter().map(|entrant| entrant.schedule).collect();
            first.extend(proven.iter());
            let reserve = deadline.saturating_sub(begin).mul_f64(1.0 - EXPLORING_SHARE);
            self.explore(&first, tools, deadline, reserve);
            entrants = self.finalists();
            let jobs = entrants.iter().map(|entrant| self.job(entrant));
            let missing: BTreeSet<_> = jobs.filter(|job| !tools.bench.is_ready(*job)).collect();
            let missing: Vec<_> = missing.into_iter().collect();
            self.search.refuse(tools.bench.compile(&missing), tools.news, self.outcome);
            entrants.retain(|entrant| tools.bench.is_ready(self.job(entrant)));
            proven.extend(entrants.iter().map(|entrant| entrant.schedule));
            proven.sort_unstable();
            proven.dedup();
        }
        let bench = &mut *tools.bench;
        let start = self.search.stopwatch.elapsed();
        self.outcome.phases.exploring += start.saturating_sub(begin);
        let deadline = match (budget.effort, self.search.meter) {
            (Effort::Exhaustive, _) => start + EXHAUSTIVE_FINAL,
            (_, Some(_)) => start + deadline.saturating_sub(start) / 2,
            _ => deadline,
        };
        let racing = deadline.saturating_sub(start);
        let held_out = if budget.explores() { racing.mul_f64(HELD_OUT_SHARE) } else { Duration::ZERO };
        let rules = Rules { weights: workload.weights(), two_copies: second_copies.is_some_and(|bytes| bytes > 0) };
        let (shape, shapes) = self.place;
        let verdict = contest(
            &entrants,
            rules,
            self.search.stopwatch,
            deadline - held_out,
            &mut |at| bench.sample(problem, entrants[at].class, entrants[at].schedule),
            &mut |left| self.search.report(Phase::Racing { problem: *problem, shape, shapes, left }),
        );
        // A final that was interrupted before its first rounds were over says nothing; the trials do.
        let by_trials = || self.tried.verdict(&entrants, &workload.weights()).filter(|_| budget.explores());
        let mut verdict = verdict.or_else(by_trials)?;
        let mut against_guess = BTreeMap::new();
        if budget.explores() {
            against_guess = self.prefer_guess(&entrants, &mut verdict, bench, deadline);
        }
        self.outcome.phases.racing += self.search.stopwatch.elapsed().saturating_sub(start);
        let joules = self.save_energy(&entrants, &mut verdict, bench);
        Some(self.raced(&entrants, &verdict, joules, &against_guess))
    }

    /// Who races in the end: the fastest of each class in the best layouts, the guess, as it is and in these layouts, and
    /// with two copies the fastest of each class whatever its layout.
    fn finalists(&self) -> Vec<Entrant> {
        let mut finalists = BTreeSet::new();
        let layouts = self.layouts();
        for class in Class::ALL {
            let of_layouts =
                layouts.iter().flat_map(|layout| self.tried.of(class, *layout).iter().take(FINAL_SCHEDULES));
            finalists.extend(of_layouts.map(|timed| Entrant { class, schedule: timed.schedule }));
            if self.search.request.second_copies.is_some_and(|bytes| bytes > 0) {
                let mut of_class: Vec<_> = self.tried.iter().filter(|(entrant, _)| entrant.class == class).collect();
                of_class.sort_by(|a, b| a.1.seconds.total_cmp(&b.1.seconds));
                finalists.extend(of_class.into_iter().take(FINAL_SCHEDULES).map(|(entrant, _)| entrant));
            }
        }
        if let Some(guess) = self.guess {
            for class in Class::ALL {
                let (spec, guess) = (class.spec(self.problem.k), guess.of(class));
                let moved = layouts.iter().map(|layout| Schedule { layout: *layout, ..guess });
                let legal = |schedule: &Schedule| {
                    schedule.check(&spec, self.search.cpu).is_ok() && !self.known.is_refused(&spec, schedule)
                };
                let all = moved.filter(legal).chain([guess]);
                finalists.extend(all.map(|schedule| Entrant { class, schedule }));
            }
        }
        finalists.into_iter().collect()
    }

    /// What the final will take: all rounds of the contest, whose field halves again and again, and of the winners against
    /// the guess, with and without its layout.
    pub(crate) fn final_cost(&self) -> Duration {
        let cost = |entrant: Entrant| self.tried.get(entrant).map(|timed| timed.cost);
        let contest: Duration = self.finalists().into_iter().filter_map(cost).sum();
        let winners: Duration = Class::ALL.into_iter().filter_map(|class| Some(self.tried.best(class)?.cost)).sum();
        let all = 2 * MAX_ROUNDS as u32 * contest + (4 * ROUNDS * HELD_OUT_SAMPLES) as u32 * winners;
        // Energy has as much time again.
        if self.search.meter.is_some() { 2 * all } else { all }
    }

    /// Lets the guess have what the winners have probably not beaten in held-out rounds, until `deadline`: the layout,
    /// if all classes together are not faster in another one, and in its layout every class that is not faster. With too
    /// few rounds to say, the winners stay. Returns the rounds of those who do.
    fn prefer_guess(
        &self,
        entrants: &[Entrant],
        verdict: &mut Verdict,
        bench: &mut dyn Bench,
        deadline: Duration,
    ) -> BTreeMap<Class, Rounds> {
        let Some(guess) = self.guess else { return BTreeMap::new() };
        let at = |entrant| entrants.iter().position(|other| *other == entrant);
        let guess = Class::ALL.map(|class| at(Entrant { class, schedule: guess.of(class) }));
        let layout = |set: &[Option<usize>; 6]| set.iter().flatten().next().map(|at| entrants[*at].schedule.layout);
        let now = self.search.stopwatch.elapsed();
        if let Some(home) = layout(&guess).filter(|home| Some(*home) != layout(&verdict.one_copy.set)) {
            let half = now + deadline.saturating_sub(now) / 2;
            let rounds = self.against(&guess, entrants, &verdict.one_copy.set, bench, half);
            if total(&rounds, &self.search.request.workload.weights()).first_is_faster() != Some(false) {
                return rounds.into_iter().collect();
            }
            verdict.one_copy.set = Class::ALL.map(|class| {
                let rivals = entrants.iter().enumerate().filter(|(at, entrant)| {
                    let raced = verdict.figures[*at].samples > 0;
                    raced && entrant.class == class && entrant.schedule.layout == home
                });
                let time = |at: usize| verdict.figures[at].median_us;
                rivals.map(|(at, _)| at).min_by(|a, b| time(*a).total_cmp(&time(*b)))
            });
        }
        let mut rounds = self.against(&guess, entrants, &verdict.one_copy.set, bench, deadline);
        rounds.retain(|(class, rounds)| {
            let beaten = rounds.first_is_faster() != Some(false);
            if !beaten {
                verdict.one_copy.set[class.index()] = guess[class.index()];
            }
            beaten
        });
        rounds.into_iter().collect()
    }

    /// Held-out rounds of the `winners` against the guess, of every class where they are not the same.
    fn against(
        &self,
        guess: &[Option<usize>; 6],
        entrants: &[Entrant],
        winners: &[Option<usize>; 6],
        bench: &mut dyn Bench,
        deadline: Duration,
    ) -> Vec<(Class, Rounds)> {
        let pairs = winners.iter().zip(guess).filter(|(winner, guess)| winner != guess);
        let pairs: Vec<[Entrant; 2]> =
            pairs.filter_map(|(winner, guess)| Some([entrants[(*winner)?], entrants[(*guess)?]])).collect();
        let rounds = rounds(bench, self.problem, &pairs, HELD_OUT_SAMPLES, self.search.stopwatch, deadline);
        pairs.iter().map(|[winner, _]| winner.class).zip(rounds).collect()
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
    fn raced(
        &mut self,
        entrants: &[Entrant],
        verdict: &Verdict,
        joules: [Option<f64>; 6],
        against_guess: &BTreeMap<Class, Rounds>,
    ) -> Raced {
        for (entrant, figures) in entrants.iter().zip(&verdict.figures).filter(|(_, figures)| figures.samples > 0) {
            // The final knows better than a trial.
            self.tried.replace(*entrant, figures.median_us * 1e-6);
        }
        if self.search.request.budget.explores() {
            let Problem { m, k, .. } = *self.problem;
            let trial = |(Entrant { class, schedule }, timed): (Entrant, &Timed)| Trial {
                m,
                k,
                class,
                schedule,
                us: timed.seconds * 1e6,
            };
            self.outcome.trials.extend(self.tried.iter().map(trial));
        }
        let choice = complete(entrants, &verdict.one_copy);
        let results = Class::ALL.into_iter().filter_map(|class| {
            let winner = verdict.one_copy.set[class.index()]?;
            let result = self.result(class, &verdict.figures[winner], against_guess.get(&class));
            Some(ClassResult { joules: joules[class.index()], ..result })
        });
        let results: Vec<ClassResult> = results.collect();
        let raced = self.tried.len();
        let alternatives = self.alternatives(entrants, verdict);
        let found = Found { problem: *self.problem, choice, source: Source::Raced, results, raced, alternatives };
        let second = verdict
            .two_copies
            .map(|two| (complete(entrants, &two), (verdict.one_copy.total - two.total) * self.problem.count as f64));
        Raced { found, second }
    }

    /// The best sets of the layouts that did not win.
    fn alternatives(&self, entrants: &[Entrant], verdict: &Verdict) -> Vec<Alternative> {
        let (weights, winners) = (self.search.request.workload.weights(), &verdict.one_copy.set);
        // The winners' time, and at the others' pace.
        let total = |set: &[Option<usize>; 6]| {
            let times = set.iter().zip(winners).zip(weights).filter_map(|((at, winner), weight)| {
                let (at, winner) = ((*at)?, (*winner)?);
                let slower = verdict.paces[at] / verdict.paces[winner];
                Some(weight * slower * verdict.figures[winner].median_us)
            });
            times.sum::<f64>()
        };
        let won = winners.iter().flatten().next().map(|at| entrants[*at].schedule.layout);
        let others: BTreeSet<Layout> = entrants.iter().map(|entrant| entrant.schedule.layout).collect();
        let set = |layout: Layout| {
            let mut set = [None; 6];
            for class in Class::ALL.into_iter().filter(|class| winners[class.index()].is_some()) {
                let of = (0..entrants.len()).filter(|at| {
                    let Entrant { class: other, schedule } = entrants[*at];
                    (other, schedule.layout) == (class, layout) && verdict.paces[*at].is_finite()
                });
                set[class.index()] = Some(of.min_by(|a, b| verdict.paces[*a].total_cmp(&verdict.paces[*b]))?);
            }
            Some(set)
        };
        let sets = others.into_iter().filter(|layout| Some(*layout) != won).filter_map(set);
        let least = total(winners);
        let mut alternatives: Vec<Alternative> = sets
            .map(|set| {
                let total = total(&set);
                Alternative { choice: complete(entrants, &Standing { total, set }), slower: total / least }
            })
            .collect();
        alternatives.sort_by(|a, b| a.slower.total_cmp(&b.slower));
        alternatives
    }

    /// What has been measured of a class, whose winner has met the guess in these rounds.
    fn result(&self, class: Class, figures: &Figures, against_guess: Option<&Rounds>) -> ClassResult {
        let mut times: Vec<f64> =
            self.tried.iter().filter(|(entrant, _)| entrant.class == class).map(|(_, t)| t.seconds * 1e6).collect();
        times.sort_by(f64::total_cmp);
        let guess = self.guess.and_then(|guess| self.tried.get(Entrant { class, schedule: guess.of(class) }));
        // Rounds that nothing was chosen by know best.
        let ratio = against_guess.and_then(Rounds::ratio);
        let guess_us = ratio.map(|(mean, _)| figures.median_us * (-mean).exp());
        ClassResult {
            class,
            figures: *figures,
            joules: None,
            tried: times.len(),
            median_us: times.get(times.len() / 2).copied().unwrap_or(figures.median_us),
            worst_us: times.last().copied().unwrap_or(figures.median_us),
            guess_us: guess_us.or(guess.map(|timed| timed.seconds * 1e6)),
            pays: ratio.is_some_and(|(mean, half)| mean - half > 0.0),
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
