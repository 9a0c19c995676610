use super::*;
use crate::request::Trial;
use crate::request::{Budget, Held, Phase};
use crate::shortlist::Shortlist;
use crate::sparse::SparseShape;
use crate::stopwatch::scripted::{Noise, ScriptedStopwatch};
use crate::workers::test_team::Scoped;
use crate::{Class, ProfileKey, Workload};
use std::cell::Cell;
use std::collections::BTreeSet;
use std::time::Duration;
use ternion_compiler::check::Mismatch;
use ternion_compiler::{Columns, CompileError, Family, KernelSpec, Layout, Schedule};

/// Kernels whose times are a function, on a clock that only they move.
struct ScriptedBench<'a> {
    clock: &'a ScriptedStopwatch,
    compiling: Duration,
    time: &'a dyn Fn(&Problem, Class, &Schedule) -> Duration,
    wrong: &'a dyn Fn(&Schedule) -> bool,
    noise: Noise,
    /// Whether the machine gets slower and faster by a quarter, all six seconds, and interrupts some samples.
    restless: bool,
    ready: BTreeSet<(KernelSpec, Schedule)>,
    compiled: usize,
}

impl Bench for ScriptedBench<'_> {
    fn sample_list(&mut self, _: &SparseShape, _: Columns, _: Schedule, _: f64) -> Option<Duration> {
        None
    }

    fn is_ready(&self, job: (KernelSpec, Schedule)) -> bool {
        self.ready.contains(&job)
    }

    fn compile(&mut self, jobs: &[(KernelSpec, Schedule)]) -> Vec<CompileError> {
        self.clock.advance(self.compiling);
        self.compiled += jobs.len();
        let (wrong, right): (Vec<_>, Vec<_>) = jobs.iter().partition(|(_, schedule)| (self.wrong)(schedule));
        self.ready.extend(right);
        let mismatch = Mismatch { seed: 1, row: 2, column: 3, expected: 4, found: 5 };
        let refuse = |(spec, schedule)| CompileError::Mismatch { spec, schedule, mismatch: mismatch.clone() };
        wrong.into_iter().map(refuse).collect()
    }

    fn forget(&mut self, job: (KernelSpec, Schedule)) {
        self.ready.remove(&job);
    }

    fn sample(&mut self, problem: &Problem, class: Class, schedule: Schedule) -> Option<Duration> {
        if !self.is_ready((class.spec(problem.k), schedule)) {
            return None;
        }
        let mut time = (self.time)(problem, class, &schedule).mul_f64(1.0 + 0.1 * self.noise.normal());
        if self.restless {
            time = time.mul_f64(1.0 + 0.25 * self.clock.elapsed().as_secs_f64().sin());
            if self.noise.uniform() < 0.02 {
                time *= 6;
            }
        }
        self.clock.advance(time);
        Some(time)
    }
}

fn search<'a>(
    cpu: &'a Cpu,
    request: &'a Request,
    stopwatch: &'a ScriptedStopwatch,
    progress: &'a dyn Fn(Progress),
) -> Search<'a> {
    let families = &Family::ALL;
    Search { cpu, request, families, stopwatch, progress, threads: 1, batch: 2, note: &|_| {}, meter: None }
}

pub(super) const SHAPES: [Problem; 4] = [
    Problem { m: 640, k: 2560, count: 60 },
    Problem { m: 6912, k: 2560, count: 60 },
    Problem { m: 2560, k: 2560, count: 60 },
    Problem { m: 2560, k: 6912, count: 30 },
];

/// One scripted race.
pub(super) struct Run<'a> {
    pub(super) budget: Budget,
    /// When the race begins.
    pub(super) begin: Duration,
    pub(super) shapes: &'a [Problem],
    /// What compiling a batch takes.
    pub(super) compiling: Duration,
    pub(super) seed: u64,
    pub(super) restless: bool,
    /// Layouts that a file holds all shapes in.
    pub(super) held: &'a [Layout],
}

pub(super) struct Result {
    pub(super) found: Vec<Found>,
    news: MachineProfile,
    warnings: Vec<Warning>,
    /// By the clock, in the end.
    pub(super) spent: Duration,
    compiled: usize,
}

fn key() -> ProfileKey {
    ProfileKey { cpu: "a".into(), features: "b".into(), compiler: "c".into(), threads: 2 }
}

impl Run<'_> {
    const RACE: Self = Self {
        budget: Budget::RACE,
        begin: Duration::ZERO,
        shapes: &SHAPES,
        compiling: Duration::from_millis(4),
        seed: 1,
        restless: false,
        held: &[],
    };

    fn with(
        &self,
        known: &MachineProfile,
        time: &dyn Fn(&Problem, Class, &Schedule) -> Duration,
        wrong: &dyn Fn(&Schedule) -> bool,
    ) -> Result {
        let cpu: Cpu = "x86-64 +ssse3 +sse4.1 +avxvnni".parse().unwrap();
        self.on(&cpu, known, time, wrong)
    }

    pub(super) fn on(
        &self,
        cpu: &Cpu,
        known: &MachineProfile,
        time: &dyn Fn(&Problem, Class, &Schedule) -> Duration,
        wrong: &dyn Fn(&Schedule) -> bool,
    ) -> Result {
        let clock = ScriptedStopwatch::default();
        clock.advance(self.begin);
        let (noise, ready) = (Noise::new(self.seed), BTreeSet::new());
        let Run { compiling, restless, .. } = *self;
        let mut bench = ScriptedBench { clock: &clock, compiling, time, wrong, noise, restless, ready, compiled: 0 };
        let calls = Cell::new(0);
        let progress = |progress: Progress| {
            match progress.phase {
                Phase::Compiling { done, total } => assert!(done < total),
                Phase::Exploring { tried, legal, .. } => assert!(tried <= legal),
                Phase::Racing { shape, shapes, left, .. } => assert!(shape < shapes && left >= 2),
            }
            calls.set(calls.get() + 1);
        };
        let of_shape = |problem: &Problem| ((problem.m, problem.k), self.held.to_vec());
        let held = Held { matrices: self.shapes.iter().map(of_shape).collect(), ..Held::default() };
        let request = Request { held, ..Request::new(self.shapes.to_vec(), self.budget) };
        let search = search(cpu, &request, &clock, &progress);
        let mut found = look_up(&search, &probe(), known).unwrap();
        let mut news = MachineProfile::new(key());
        let Outcome { warnings, .. } = search.race_all(&mut found, known, &mut bench, &mut news, &[]);
        entries(&found, &BTreeMap::new(), &request, false).into_iter().for_each(|entry| news.insert(entry));
        assert!(calls.get() > 0 || news.shapes.is_empty());
        Result { found, news, warnings, spent: clock.elapsed(), compiled: bench.compiled }
    }
}

/// Times in proportion to the work; `tl1` is faster than everything else by a tenth.
fn tl1_wins(problem: &Problem, _: Class, schedule: &Schedule) -> Duration {
    let work = (problem.m * problem.k) as f64 / 60e9;
    let other = f64::from(schedule.unroll) * 0.02;
    Duration::from_secs_f64(work * if schedule.family == Family::Tl1 { 0.9 } else { 1.0 + other })
}

pub(super) fn unknown() -> MachineProfile {
    MachineProfile::new(key())
}

#[test]
fn the_best_of_other_layouts_are_remembered_and_taken_only_if_they_are_nearly_as_fast() {
    let cpu: Cpu = "x86-64 +ssse3 +sse4.1 +avxvnni".parse().unwrap();
    let guess = Shortlist::new(2560, &cpu, 8, &|_, _| false).guess().unwrap();
    let time = |_: &Problem, class, schedule: &Schedule| {
        let us = if class == Class::One { 50 } else { 400 };
        Duration::from_micros(if schedule.layout == guess.layout() { us } else { us * 3 / 2 })
    };
    let result = Run::RACE.with(&MachineProfile::new(key()), &time, &|_| false);
    let mut found = result.found[0].clone();
    assert_eq!(found.choice.layout(), guess.layout());
    let entry = result.news.shape(found.problem.m, found.problem.k).unwrap();
    assert_eq!(entry.alternatives, found.alternatives);
    assert!(found.alternatives.iter().all(|other| other.choice.layout() != guess.layout()));
    assert!(found.alternatives.iter().all(|other| (1.3..1.7).contains(&other.slower)), "{:?}", found.alternatives);

    let held = [found.alternatives[0].choice.layout()];
    found.prefer(&held);
    assert_eq!(found.choice.layout(), guess.layout(), "half as slow again");
    found.alternatives[0].slower = 1.04;
    found.prefer(&[guess.layout(), held[0]]);
    assert_eq!(found.choice.layout(), guess.layout(), "it is held itself");
    found.prefer(&held);
    assert_eq!(found.choice, found.alternatives[0].choice);
}

#[test]
fn a_short_race_tries_the_layouts_that_a_file_holds() {
    let cpu: Cpu = "x86-64 +ssse3 +sse4.1 +avxvnni".parse().unwrap();
    let raced: BTreeSet<Layout> = {
        let list = Shortlist::new(2560, &cpu, Budget::RACE.seeds(), &|_, _| false);
        list.entrants.iter().map(|entrant| entrant.schedule.layout).collect()
    };
    let [ones, many] = [Class::One, Class::Chunk].map(|class| Schedule::candidates(&class.spec(2560), &cpu));
    let served = |layout: &Layout| many.iter().any(|schedule| schedule.layout == *layout);
    let mut others = ones.iter().map(|schedule| schedule.layout).filter(|layout| !raced.contains(layout));
    let layout = others.find(served).expect("more layouts than fit into a short race");
    let time = |_: &Problem, class, schedule: &Schedule| {
        let us = if class == Class::One { 50 } else { 400 };
        Duration::from_micros(if schedule.layout == layout { us } else { 2 * us })
    };
    let best = |held| {
        let run = Run { held, shapes: &SHAPES[..1], ..Run::RACE };
        run.with(&MachineProfile::new(key()), &time, &|_| false).found[0].choice.layout()
    };
    assert_ne!(best(&[]), layout);
    assert_eq!(best(&[layout]), layout);
}

#[test]
fn a_short_race_finds_the_faster_family_for_every_shape_within_its_budget() {
    let run = Run::RACE.with(&unknown(), &tl1_wins, &|_| false);
    assert_eq!(run.found.len(), 4);
    for found in &run.found {
        assert_eq!(found.source, Source::Raced);
        assert_eq!(
            (found.choice.of(Class::One).family, found.choice.of(Class::Chunk).family),
            (Family::Tl1, Family::Tl1),
            "{found:?}"
        );
        assert_eq!(found.choice.layouts().len(), 1);
        assert!(found.raced <= 8);
    }
    assert_eq!(run.news.shapes.len(), 4);
    assert!(run.spent <= Duration::from_millis(330), "{:?}", run.spent);
    // The three shapes with equal rows share their kernels.
    assert_eq!(run.compiled, 16);
}

#[test]
fn slow_compiling_and_slow_kernels_do_not_break_the_budget() {
    for (compiling, slowness) in [(40, 1), (4, 30), (70, 30), (140, 1)] {
        let run = Run { compiling: Duration::from_millis(compiling), ..Run::RACE };
        let run = run.with(&unknown(), &|p, c, s| tl1_wins(p, c, s) * slowness, &|_| false);
        assert!(run.spent <= Duration::from_millis(330), "{compiling} ms, {slowness}: {:?}", run.spent);
        assert!(run.found.iter().all(|found| found.choice.layouts().len() == 1));
    }
}

#[test]
fn shapes_that_get_no_time_keep_the_guess_and_are_not_remembered() {
    let run = Run { compiling: Duration::from_millis(320), ..Run::RACE };
    let run = run.with(&unknown(), &tl1_wins, &|_| false);
    assert!(run.found.iter().all(|found| found.source == Source::Guess && found.results.is_empty()));
    assert!(run.news.shapes.is_empty());
}

#[test]
fn a_larger_budget_races_more_schedules_and_holds_as_well() {
    let budget = Budget::search(Duration::from_secs(20));
    let run = Run { budget, ..Run::RACE }.with(&unknown(), &tl1_wins, &|_| false);
    assert!(run.found.iter().all(|found| found.raced > 30 && found.choice.of(Class::One).family == Family::Tl1));
    assert!(run.spent <= Duration::from_secs(22), "{:?}", run.spent);
}

#[test]
fn a_search_is_over_in_time_however_slow_compiling_and_kernels_are() {
    for (compiling, slowness) in [(4, 40), (300, 1), (900, 8)] {
        let budget = Budget::search(Duration::from_secs(20));
        let run = Run { budget, compiling: Duration::from_millis(compiling), ..Run::RACE };
        let run = run.with(&unknown(), &|p, c, s| tl1_wins(p, c, s) * slowness, &|_| false);
        assert!(run.spent <= Duration::from_secs(22), "{compiling} ms, {slowness}: {:?}", run.spent);
    }
}

#[test]
fn a_machine_that_leaves_no_time_for_the_final_leaves_what_exploring_found() {
    // After a few hundred samples every one takes as long as a final.
    let spent = Cell::new(Duration::ZERO);
    let time = |p: &Problem, c: Class, s: &Schedule| {
        let time = tl1_wins(p, c, s);
        spent.set(spent.get() + time);
        if spent.get() < Duration::from_millis(20) { time } else { time + Duration::from_secs(3) }
    };
    let budget = Budget::search(Duration::from_secs(5));
    let run = Run { budget, shapes: &SHAPES[..1], ..Run::RACE }.with(&unknown(), &time, &|_| false);
    let found = &run.found[0];
    assert_eq!((found.source, run.news.shapes.len()), (Source::Raced, 1));
    assert!(Class::ALL.iter().all(|class| found.choice.of(*class).family == Family::Tl1), "{:?}", found.choice);
    // What trials have measured, as little as that is.
    let samples: Vec<usize> = found.results.iter().map(|result| result.figures.samples).collect();
    assert!(samples.len() == 6 && samples.iter().all(|samples| (1..20).contains(samples)), "{samples:?}");
}

#[test]
fn a_winner_that_does_not_beat_the_guess_in_held_out_rounds_gives_way_to_it() {
    let cpu: Cpu = "x86-64 +ssse3 +sse4.1".parse().unwrap();
    let budget = Budget::search(Duration::from_secs(5));
    let guess = Shortlist::new(2560, &cpu, 8, &|_, _| false).guess().unwrap();
    let equal =
        |problem: &Problem, _: Class, _: &Schedule| Duration::from_secs_f64((problem.m * problem.k) as f64 / 60e9);
    let run = Run { budget, ..Run::RACE }.on(&cpu, &unknown(), &equal, &|_| false);
    // Of what is equally fast one in four seems faster.
    let kept = run.found.iter().filter(|found| found.problem.k == 2560);
    let kept: usize =
        kept.map(|f| Class::ALL.iter().filter(|class| f.choice.of(**class) == guess.of(**class)).count()).sum();
    assert!(kept >= 10, "{kept} of 18 classes keep the guess");
    // And every result is that of the schedule that was chosen.
    let far = |p: &Problem, c: Class, s: &Schedule| equal(p, c, s).mul_f64(if *s == guess.of(c) { 1.0 } else { 1.5 });
    let run = Run { budget, ..Run::RACE }.on(&cpu, &unknown(), &far, &|_| false);
    for found in run.found.iter().filter(|found| found.problem.k == 2560) {
        assert_eq!(found.choice, guess);
        for result in &found.results {
            let truth = (found.problem.m * found.problem.k) as f64 / 60e3;
            assert!((result.figures.median_us / truth - 1.0).abs() < 0.2, "{result:?}");
        }
    }
}

/// An exhaustive search of two small families, stopped when `kernels` have been compiled.
fn exhaustive(journal: &Journal, kernels: usize, done: &[Trial]) -> (usize, Vec<Found>) {
    let cpu: Cpu = "x86-64 +ssse3 +sse4.1".parse().unwrap();
    let families = [Family::Tl1, Family::Vlut];
    let request = Request::new(vec![SHAPES[0]], Budget::EXHAUSTIVE);
    let clock = ScriptedStopwatch::default();
    let left = Cell::new(kernels);
    // Who is out of kernels is out of time: as if the process had ended.
    let wrong = |_: &Schedule| {
        left.set(left.get().saturating_sub(1));
        if left.get() == 0 {
            clock.advance(Budget::EXHAUSTIVE.time);
        }
        false
    };
    let (noise, ready, compiling) = (Noise::new(9), BTreeSet::new(), Duration::from_millis(1));
    let mut bench = ScriptedBench {
        clock: &clock,
        compiling,
        time: &tl1_wins,
        wrong: &wrong,
        noise,
        restless: false,
        ready,
        compiled: 0,
    };
    let note = |trials: &[Trial]| journal.note(trials);
    let search = Search { families: &families, note: &note, ..search(&cpu, &request, &clock, &|_| {}) };
    let mut found = look_up(&search, &probe(), &unknown()).unwrap();
    search.race_all(&mut found, &unknown(), &mut bench, &mut unknown(), done);
    (bench.compiled, found)
}

#[test]
fn an_exhaustive_search_tries_everything_and_goes_on_where_it_stopped() {
    let directory = tempfile::tempdir().unwrap();
    let journal = Journal::of(&CacheDir::at(directory.path()), &key());
    let cpu: Cpu = "x86-64 +ssse3 +sse4.1".parse().unwrap();
    let space = |class: Class| Schedule::space_of(&[Family::Tl1, Family::Vlut], &class.spec(2560), &cpu);
    let all: BTreeSet<(Class, Schedule)> = Class::ALL
        .into_iter()
        .flat_map(|class| space(class).into_iter().map(move |schedule| (class, schedule)))
        .collect();
    exhaustive(&journal, 60, &[]);
    let first = journal.trials();
    assert!(first.len() > 50 && first.len() < all.len(), "{} of {}", first.len(), all.len());
    let (_, found) = exhaustive(&journal, usize::MAX, &first);
    let trials = journal.trials();
    let tried: BTreeSet<_> = trials.iter().map(|trial| (trial.class, trial.schedule)).collect();
    assert!(all.iter().all(|entrant| tried.contains(entrant)), "{} of {}", tried.len(), all.len());
    assert_eq!(trials.len(), tried.len(), "nothing is tried twice");
    assert_eq!(found[0].choice.of(Class::One).family, Family::Tl1);
}

#[test]
fn second_copies_go_where_memory_reaches_and_the_asked_workload_says_they_pay() {
    let cpu: Cpu = "x86-64 +ssse3 +sse4.1".parse().unwrap();
    let ones = Schedule::candidates(&Class::One.spec(2560), &cpu);
    let many = Schedule::candidates(&Class::Chunk.spec(2560), &cpu);
    let one = ones[0];
    let other = *many.iter().find(|many| many.layout != one.layout).unwrap();
    let same = *many.iter().find(|many| many.layout == one.layout).unwrap();
    let (single, double) = (Choice::pair(one, same), Choice::pair(one, other));
    let problem = Problem { m: 640, k: 2560, count: 10 };
    let figures = |us| crate::Figures { minimum_us: us, median_us: us, samples: 9 };
    let result = |class, us| crate::ClassResult {
        class,
        figures: figures(us),
        joules: None,
        tried: 1,
        median_us: us,
        worst_us: us,
        guess_us: None,
        pays: false,
    };
    let found = || {
        let results = vec![result(Class::One, 100.0), result(Class::Chunk, 3200.0)];
        let (source, alternatives) = (Source::Raced, Vec::new());
        vec![Found { problem, choice: single, source, results, raced: 2, alternatives }]
    };
    let bytes = second_copy(&problem, &double).unwrap();
    // Seconds per token and matrix, by 10 matrices: 4 % of what decoding alone takes.
    let outcome = || Outcome { second: vec![(0, double, 10.0 * 4e-6)], ..Outcome::default() };
    let spend = |prompt_share, copies| {
        let workload = Workload { prompt_share, batch: 1 };
        let request = Request { workload, second_copies: copies, ..Request::new(vec![problem], Budget::NONE) };
        let mut found = found();
        let kept = spend_copies(&mut found, &outcome(), &request);
        (found[0].choice, kept)
    };
    assert_eq!(spend(1.0, Some(bytes)), (double, BTreeMap::from([(0, single)])));
    assert_eq!(spend(1.0, Some(bytes - 1)), (single, BTreeMap::new()));
    assert_eq!(spend(1.0, None), (single, BTreeMap::new()));
    // Where a token takes 100 µs, the same saving is not worth a copy.
    let costly = Request { second_copies: Some(bytes), ..Request::new(vec![problem], Budget::NONE) };
    let mut slow = found();
    slow[0].results[0] = result(Class::One, 1000.0);
    assert!(spend_copies(&mut slow, &outcome(), &costly).is_empty());

    // What is known with two copies is taken where memory reaches, and with one where it does not.
    let mut known = unknown();
    let entry = crate::profile::tests::entry(problem.m, problem.k, 20_000);
    known.insert(ShapeEntry { choice: double, one_copy: Some(single), second_copies: bytes, ..entry });
    let clock = ScriptedStopwatch::default();
    for (copies, expected) in [(None, double), (Some(bytes), double), (Some(bytes - 1), single)] {
        let request = Request { second_copies: copies, ..Request::new(vec![problem], Budget::RACE) };
        let found = look_up(&search(&cpu, &request, &clock, &|_| {}), &probe(), &known).unwrap();
        assert_eq!((found[0].choice, found[0].source), (expected, Source::Known));
    }
}

#[test]
fn a_family_with_wrong_results_is_rejected_by_name_and_never_races_again() {
    let wrong = |schedule: &Schedule| schedule.family == Family::Tl1;
    let first = Run::RACE.with(&unknown(), &tl1_wins, &wrong);
    let families =
        first.found.iter().flat_map(|found| [found.choice.of(Class::One).family, found.choice.of(Class::Chunk).family]);
    assert!(families.into_iter().all(|family| family != Family::Tl1));
    assert!(!first.warnings.is_empty());
    for warning in &first.warnings {
        assert!(warning.to_string().contains("tl1/"), "{warning}");
    }
    assert!(first.news.refused.iter().all(|refusal| refusal.schedule.starts_with("tl1/")));

    let mut known = first.news;
    known.shapes.clear();
    let second = Run::RACE.with(&known, &tl1_wins, &wrong);
    assert!(second.warnings.iter().all(|again| !first.warnings.contains(again)));
}

#[test]
fn what_is_known_is_used_and_a_larger_budget_looks_again() {
    let first = Run::RACE.with(&unknown(), &tl1_wins, &|_| false);
    let again = Run::RACE.with(&first.news, &tl1_wins, &|_| false);
    assert!(again.found.iter().all(|found| found.source == Source::Known && !found.results.is_empty()));
    assert_eq!((again.compiled, again.spent), (0, Duration::ZERO));

    let budget = Budget::search(Duration::from_secs(2));
    let search = Run { budget, ..Run::RACE }.with(&first.news, &tl1_wins, &|_| false);
    assert!(search.found.iter().all(|found| found.source == Source::Raced));

    // And what a search has found is good enough for a start.
    let start = Run::RACE.with(&search.news, &tl1_wins, &|_| false);
    assert!(start.found.iter().all(|found| found.source == Source::Known));
}

#[test]
fn shapes_are_merged_and_the_one_with_most_work_comes_first() {
    let cpu: Cpu = "x86-64 +ssse3".parse().unwrap();
    let clock = ScriptedStopwatch::default();
    let part = Problem { m: 256, k: 256, count: 6 };
    let request = Request::new(vec![part, Problem { m: 768, k: 256, count: 1 }, part], Budget::NONE);
    let found = look_up(&search(&cpu, &request, &clock, &|_| {}), &probe(), &unknown()).unwrap();
    let problems: Vec<Problem> = found.iter().map(|found| found.problem).collect();
    assert_eq!(problems, [Problem { count: 12, ..part }, Problem { m: 768, k: 256, count: 1 }]);
}

#[test]
fn a_shape_that_no_kernel_exists_for_is_an_error_that_names_it() {
    let cpu: Cpu = "x86-64 +ssse3".parse().unwrap();
    let cache = CacheDir::at("unused");
    let problem = Problem { m: 4, k: 0, count: 1 };
    let error = choose(&Request::new(vec![problem], Budget::NONE), &cpu, &Scoped(1), &cache, &|_| {}).unwrap_err();
    assert!(error.to_string().starts_with("no kernel for a 4x0 matrix"), "{error}");
}

#[test]
fn the_buffer_is_as_cold_as_the_model_and_no_larger() {
    let mut machine = probe();
    machine.caches.retain(|cache| cache.level == 0);
    machine.memory.available = Some(8 << 30);
    let small = Problem { m: 256, k: 256, count: 10 };
    let request = |problems: &[Problem]| Request::new(problems.to_vec(), Budget::RACE);
    assert_eq!(measuring_bytes(&request(&[small]), &machine), (256 * 64 * 10, 16 * 512));
    let with_head = Request { beside: 1 << 20, ..request(&[small]) };
    assert_eq!(measuring_bytes(&with_head, &machine).0, 256 * 64 * 10 + (1 << 20));
    let large = Problem { m: 6912, k: 2560, count: 60 };
    let bytes = |machine: &CpuProfile| measuring_bytes(&request(&[large, small]), machine).0;
    assert_eq!(bytes(&machine), 128 << 20, "four times the cache that is assumed where none is known");
    machine.memory.available = Some(64 << 20);
    assert_eq!(bytes(&machine), 16 << 20);
}

#[test]
fn a_real_race_returns_a_legal_choice_and_the_second_call_knows_it() {
    let cpu = Cpu::host().expect("tests run where ternion emits code");
    let directory = tempfile::tempdir().unwrap();
    let cache = CacheDir::at(directory.path().join("new"));
    let problems = [Problem { m: 48, k: 96, count: 2 }];
    // Far more time than it takes, so that a busy machine does not turn it into a guess.
    let budget = Budget { time: Duration::from_secs(60), effort: Effort::Race };
    let first = choose(&Request::new(problems.to_vec(), budget), &cpu, &Scoped(2), &cache, &|_| {}).unwrap();
    assert_eq!((first.found[0].source, first.warnings.as_slice()), (Source::Raced, &[][..]));
    let choice = first.get(48, 96).unwrap();
    assert_eq!(choice.layouts().len(), 1);
    assert_eq!(choice.check(96, &cpu), Ok(()));

    let second = choose(&Request::new(problems.to_vec(), budget), &cpu, &Scoped(2), &cache, &|_| {}).unwrap();
    assert!(second.all_known());
    assert_eq!(second.get(48, 96), Some(choice));
    let other_team = choose(&Request::new(problems.to_vec(), Budget::NONE), &cpu, &Scoped(1), &cache, &|_| {}).unwrap();
    assert_eq!(other_team.found[0].source, Source::Guess, "another number of threads is another machine");
}
