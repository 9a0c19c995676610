use super::*;
use crate::request::{Budget, Phase};
use crate::stopwatch::scripted::{Noise, ScriptedStopwatch};
use crate::workers::test_team::Scoped;
use crate::{Class, ProfileKey};
use std::cell::Cell;
use std::collections::BTreeSet;
use std::time::Duration;
use ternion_compiler::check::Mismatch;
use ternion_compiler::{CompileError, Family, KernelSpec, Schedule};

/// Kernels whose times are a function, on a clock that only they move.
struct ScriptedBench<'a> {
    clock: &'a ScriptedStopwatch,
    compiling: Duration,
    time: &'a dyn Fn(&Problem, &Schedule) -> Duration,
    wrong: &'a dyn Fn(&Schedule) -> bool,
    noise: Noise,
    ready: BTreeSet<(KernelSpec, Schedule)>,
    compiled: usize,
}

impl Bench for ScriptedBench<'_> {
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

    fn sample(&mut self, problem: &Problem, _: Class, schedule: Schedule) -> Option<Duration> {
        let time = (self.time)(problem, &schedule).mul_f64(1.0 + 0.1 * self.noise.normal());
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
    Search { cpu, request, stopwatch, progress, threads: 1, batch: 2, note: &|_| {}, meter: None }
}

const SHAPES: [Problem; 4] = [
    Problem { m: 640, k: 2560, count: 60 },
    Problem { m: 6912, k: 2560, count: 60 },
    Problem { m: 2560, k: 2560, count: 60 },
    Problem { m: 2560, k: 6912, count: 30 },
];

/// One scripted race of all shapes.
struct Run {
    budget: Budget,
    compiling: Duration,
    seed: u64,
}

struct Result {
    found: Vec<Found>,
    news: MachineProfile,
    warnings: Vec<Warning>,
    spent: Duration,
    compiled: usize,
}

fn key() -> ProfileKey {
    ProfileKey { cpu: "a".into(), features: "b".into(), compiler: "c".into(), threads: 2 }
}

impl Run {
    const RACE: Self = Self { budget: Budget::RACE, compiling: Duration::from_millis(4), seed: 1 };

    fn with(
        &self,
        known: &MachineProfile,
        time: &dyn Fn(&Problem, &Schedule) -> Duration,
        wrong: &dyn Fn(&Schedule) -> bool,
    ) -> Result {
        let clock = ScriptedStopwatch::default();
        let cpu: Cpu = "x86-64 +ssse3 +sse4.1 +avxvnni".parse().unwrap();
        let (noise, ready) = (Noise::new(self.seed), BTreeSet::new());
        let compiling = self.compiling;
        let mut bench = ScriptedBench { clock: &clock, compiling, time, wrong, noise, ready, compiled: 0 };
        let calls = Cell::new(0);
        let progress = |progress: Progress| {
            match progress.phase {
                Phase::Compiling { done, total } => assert!(done < total),
                Phase::Exploring { tried, legal, .. } => assert!(tried <= legal),
                Phase::Racing { shape, shapes, left, .. } => assert!(shape < shapes && left >= 2),
            }
            calls.set(calls.get() + 1);
        };
        let request = Request::new(SHAPES.to_vec(), self.budget);
        let search = search(&cpu, &request, &clock, &progress);
        let mut found = look_up(&search, &probe(), known).unwrap();
        let mut news = MachineProfile::new(key());
        let Outcome { warnings, .. } = search.race_all(&mut found, known, &mut bench, &mut news, &[]);
        remember(&found, &request, &mut news, &CacheDir::at(tempfile::tempdir().unwrap().path()), &mut Vec::new());
        assert!(calls.get() > 0 || news.shapes.is_empty());
        Result { found, news, warnings, spent: clock.elapsed(), compiled: bench.compiled }
    }
}

/// Times in proportion to the work; `tl1` is faster than everything else by a tenth.
fn tl1_wins(problem: &Problem, schedule: &Schedule) -> Duration {
    let work = (problem.m * problem.k) as f64 / 60e9;
    let other = f64::from(schedule.unroll) * 0.02;
    Duration::from_secs_f64(work * if schedule.family == Family::Tl1 { 0.9 } else { 1.0 + other })
}

fn unknown() -> MachineProfile {
    MachineProfile::new(key())
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
        let run = run.with(&unknown(), &|p, s| tl1_wins(p, s) * slowness, &|_| false);
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
    assert_eq!(measuring_bytes(&[small], &machine), (256 * 64 * 10, 16 * 512));
    let large = Problem { m: 6912, k: 2560, count: 60 };
    let bytes = |machine: &CpuProfile| measuring_bytes(&[large, small], machine).0;
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
