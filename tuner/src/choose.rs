//! The choice for a whole model: what is known is used, what is not is raced, what cannot be raced is guessed.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use ternion_compiler::{Cpu, Schedule};

use crate::bench::{Bench, KernelBench};
use crate::buffer::Buffer;
use crate::contest::Figures;
use crate::profile::{CacheDir, MachineProfile, ProfileKey, Refusal, ShapeEntry, Warning};
use crate::race::{compile, race};
use crate::shortlist::Shortlist;
use crate::{CpuProfile, Stopwatch, SystemStopwatch, Workers, probe};

/// One shape of matrix and how many of them the model has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Problem {
    /// Rows.
    pub m: usize,
    /// Length of a row.
    pub k: usize,
    /// Matrices of this shape in the model.
    pub count: usize,
}

/// The schedules of one shape. Both read the same layout, so that one copy of the weights serves both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Choice {
    /// For one column: decoding.
    pub one: Schedule,
    /// For many columns: prompts and batches.
    pub many: Schedule,
}

/// How long choosing may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Wall time of everything, compiling included; kept within about a tenth.
    pub time: Duration,
    /// Schedules that may race per shape.
    pub candidates: usize,
}

impl Budget {
    /// No time at all: known choices and guesses.
    pub const NONE: Self = Self { time: Duration::ZERO, candidates: 2 };

    /// The short race of a first start: 300 ms, eight schedules per shape.
    pub const RACE: Self = Self { time: Duration::from_millis(300), candidates: 8 };

    /// A thorough search for as long as the user has patience.
    #[must_use]
    pub const fn search(time: Duration) -> Self {
        Self { time, candidates: 64 }
    }
}

/// How a choice was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Remembered from an earlier race.
    Known,
    /// Measured now.
    Raced,
    /// There was no time to measure.
    Guess,
}

/// The choice for one shape.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Found {
    /// The shape.
    pub problem: Problem,
    /// Its schedules.
    pub choice: Choice,
    /// Where they come from.
    pub source: Source,
    /// Times for one column and for [`PROMPT_COLUMNS`](crate::PROMPT_COLUMNS), unless it is a guess.
    pub figures: Option<[Figures; 2]>,
    /// Schedules that raced.
    pub raced: usize,
}

/// The choices for a model.
#[derive(Clone, Debug)]
pub struct Choices {
    /// One per different shape, the one with most work first.
    pub found: Vec<Found>,
    /// Wall time of it all.
    pub spent: Duration,
    /// What went wrong on the way without stopping it.
    pub warnings: Vec<Warning>,
}

impl Choices {
    /// The schedules of an `[m, k]` matrix.
    #[must_use]
    pub fn get(&self, m: usize, k: usize) -> Option<Choice> {
        self.found.iter().find(|found| (found.problem.m, found.problem.k) == (m, k)).map(|found| found.choice)
    }

    /// Whether all of them were known.
    #[must_use]
    pub fn all_known(&self) -> bool {
        self.found.iter().all(|found| found.source == Source::Known)
    }
}

/// What is going on, for a progress bar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What is being done.
    pub phase: Phase,
    /// Time spent so far, of everything.
    pub spent: Duration,
}

/// A step of the way to a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Kernels are compiled and checked.
    Compiling {
        /// How many are done.
        done: usize,
        /// How many there are if time allows.
        total: usize,
    },
    /// Kernels of one shape run.
    Racing {
        /// The shape.
        problem: Problem,
        /// Which one of `shapes` it is, from 0.
        shape: usize,
        /// Shapes to race in all.
        shapes: usize,
        /// How many schedules have not retired yet.
        left: usize,
    },
}

/// A shape for which nothing can be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no kernel for a {m}x{k} matrix on this CPU ({cpu}): rows of 1 to 1048576 weights can be compiled")]
pub struct NoSchedule {
    /// Rows.
    pub m: usize,
    /// Length of a row.
    pub k: usize,
    /// The CPU.
    pub cpu: Cpu,
}

/// Chooses the schedules of every shape in `problems` for `cpu` and these `workers`: remembered ones where `cache` has
/// them, found with at least as much time as `budget`; the others race, and are remembered. The budget binds wall time
/// whatever happens; a shape that it leaves no time for gets the best guess. `progress` is called a few times per shape.
///
/// # Errors
/// A shape that no legal schedule exists for.
pub fn choose(
    problems: &[Problem],
    cpu: &Cpu,
    workers: &dyn Workers,
    budget: Budget,
    cache: &CacheDir,
    progress: &dyn Fn(Progress),
) -> Result<Choices, NoSchedule> {
    let stopwatch = SystemStopwatch::start();
    let machine = probe();
    let key = ProfileKey::new(&machine, cpu, workers.threads());
    let (known, mut warnings) = cache.load(&key, cpu);
    let search = Search { cpu, budget, stopwatch: &stopwatch, progress, batch: machine.cores.available };
    let mut found = search.look_up(problems, &known)?;

    if found.iter().any(|found| search.wants_race(found.problem, &known)) {
        let (bytes, tile) = measuring_bytes(problems, &machine);
        // A smaller buffer is less cold than it might be, but a race needs its time.
        let enough = || stopwatch.elapsed() > budget.time / 10;
        match Buffer::of_codes(bytes, tile, workers, enough) {
            Some(buffer) => {
                let mut bench = KernelBench::new(*cpu, workers, &stopwatch, buffer);
                let mut news = MachineProfile::new(key);
                warnings.extend(search.race_all(&mut found, &known, &mut bench, &mut news));
                if !news.shapes.is_empty() || !news.refused.is_empty() {
                    warnings.extend(cache.remember(&news).err());
                }
            }
            None => warnings.push(Warning::NoMemory { bytes }),
        }
    }
    Ok(Choices { found, spent: stopwatch.elapsed(), warnings })
}

/// Bytes to measure over, and how many of them it takes at least. Decoding reads all matrices between two uses of one:
/// if that is more than the caches hold, four times what they hold is as cold as all of it (twice would do, were it not
/// for virtual machines that hide a second last-level cache).
fn measuring_bytes(problems: &[Problem], machine: &CpuProfile) -> (usize, usize) {
    let matrix = |problem: &Problem| problem.m.saturating_mul(problem.k.div_ceil(4));
    let model = problems.iter().map(|problem| matrix(problem).saturating_mul(problem.count.max(1)));
    let model = model.fold(0, usize::saturating_add);
    let cold = usize::try_from(machine.last_level_bytes().saturating_mul(4)).unwrap_or(usize::MAX);
    let spare = machine.memory.available.map_or(usize::MAX, |bytes| usize::try_from(bytes / 4).unwrap_or(usize::MAX));
    // A tile of 64 rows, a little padded: it can be larger than its matrix.
    let tile = problems.iter().map(|problem| problem.k.saturating_add(256).saturating_mul(16)).max().unwrap_or(0);
    (model.min(cold).min(spare).max(tile), tile)
}

/// Everything about a choice but the kernels.
struct Search<'a> {
    cpu: &'a Cpu,
    budget: Budget,
    stopwatch: &'a dyn Stopwatch,
    progress: &'a dyn Fn(Progress),
    /// Kernels to compile at a time.
    batch: usize,
}

impl Search<'_> {
    fn budget_ms(&self) -> u64 {
        u64::try_from(self.budget.time.as_millis()).unwrap_or(u64::MAX)
    }

    /// Whether a shape is unknown, or known from a race with less time than there is now.
    fn wants_race(&self, problem: Problem, known: &MachineProfile) -> bool {
        let known = known.shape(problem.m, problem.k);
        !self.budget.time.is_zero() && known.is_none_or(|entry| entry.budget_ms < self.budget_ms())
    }

    fn shortlist(&self, problem: Problem, known: &MachineProfile) -> Shortlist {
        let refused = |spec: &_, schedule: &_| known.is_refused(spec, schedule);
        let mut list = Shortlist::new(problem.k, self.cpu, self.budget.candidates, &refused);
        if let Some(entry) = known.shape(problem.m, problem.k) {
            list.promote(entry.choice);
        }
        list
    }

    /// What can be said without measuring, for every different shape, most work first.
    fn look_up(&self, problems: &[Problem], known: &MachineProfile) -> Result<Vec<Found>, NoSchedule> {
        let mut shapes: BTreeMap<(usize, usize), usize> = BTreeMap::new();
        for problem in problems {
            let count = shapes.entry((problem.m, problem.k)).or_default();
            *count = count.saturating_add(problem.count);
        }
        let mut problems: Vec<Problem> = shapes.into_iter().map(|((m, k), count)| Problem { m, k, count }).collect();
        let work = |problem: &Problem| problem.m.saturating_mul(problem.k).saturating_mul(problem.count);
        problems.sort_by_key(|problem| std::cmp::Reverse(work(problem)));
        let found = problems.into_iter().map(|problem| match known.shape(problem.m, problem.k) {
            Some(entry) => Ok(Found {
                problem,
                choice: entry.choice,
                source: Source::Known,
                figures: Some([entry.decode, entry.prompt]),
                raced: entry.raced,
            }),
            None => {
                let Problem { m, k, .. } = problem;
                let guess = self.shortlist(problem, known).guess();
                let choice = guess.ok_or(NoSchedule { m, k, cpu: *self.cpu })?;
                Ok(Found { problem, choice, source: Source::Guess, figures: None, raced: 0 })
            }
        });
        found.collect()
    }

    /// Races every shape that wants it, each with an equal part of the time that compiling leaves. Winners replace what
    /// was `found` and are `news`.
    fn race_all(
        &self,
        found: &mut [Found],
        known: &MachineProfile,
        bench: &mut dyn Bench,
        news: &mut MachineProfile,
    ) -> Vec<Warning> {
        let mut racing: Vec<&mut Found> =
            found.iter_mut().filter(|found| self.wants_race(found.problem, known)).collect();
        let lists: Vec<(Problem, Shortlist)> =
            racing.iter().map(|found| (found.problem, self.shortlist(found.problem, known))).collect();
        let report = |phase| (self.progress)(Progress { phase, spent: self.stopwatch.elapsed() });

        let compiling = |done, total| report(Phase::Compiling { done, total });
        let end = self.budget.time;
        let mut warnings = Vec::new();
        for error in compile(&lists, bench, self.stopwatch, end, self.batch, &compiling) {
            news.refused.extend(Refusal::of(&error));
            warnings.push(Warning::Refused { reason: error.to_string() });
        }
        let shapes = lists.len();
        for (shape, (found, (problem, list))) in racing.iter_mut().zip(&lists).enumerate() {
            let now = self.stopwatch.elapsed();
            let deadline = now + end.saturating_sub(now) / (shapes - shape) as u32;
            let left = |left| report(Phase::Racing { problem: *problem, shape, shapes, left });
            if let Some((choice, figures, raced)) = race(problem, list, bench, self.stopwatch, deadline, &left) {
                let (problem, source) = (*problem, Source::Raced);
                **found = Found { problem, choice, source, figures: Some(figures), raced };
                let (Problem { m, k, .. }, [decode, prompt], budget_ms) = (problem, figures, self.budget_ms());
                news.insert(ShapeEntry { m, k, choice, decode, prompt, raced, budget_ms });
            }
        }
        warnings
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stopwatch::scripted::{Noise, ScriptedStopwatch};
    use crate::workers::test_team::Scoped;
    use std::cell::Cell;
    use std::collections::BTreeSet;
    use ternion_compiler::check::Mismatch;
    use ternion_compiler::{Columns, CompileError, Family, KernelSpec};

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

        fn sample(&mut self, problem: &Problem, (_, schedule): (KernelSpec, Schedule)) -> Option<Duration> {
            let time = (self.time)(problem, &schedule).mul_f64(1.0 + 0.1 * self.noise.normal());
            self.clock.advance(time);
            Some(time)
        }
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
                    Phase::Racing { shape, shapes, left, .. } => assert!(shape < shapes && left >= 2),
                }
                calls.set(calls.get() + 1);
            };
            let search = Search { cpu: &cpu, budget: self.budget, stopwatch: &clock, progress: &progress, batch: 2 };
            let mut found = search.look_up(&SHAPES, known).unwrap();
            let mut news = MachineProfile::new(key());
            let warnings = search.race_all(&mut found, known, &mut bench, &mut news);
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
            assert_eq!((found.choice.one.family, found.choice.many.family), (Family::Tl1, Family::Tl1), "{found:?}");
            assert_eq!(found.choice.one.layout, found.choice.many.layout);
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
            assert!(run.found.iter().all(|found| found.choice.one.layout == found.choice.many.layout));
        }
    }

    #[test]
    fn shapes_that_get_no_time_keep_the_guess_and_are_not_remembered() {
        let run = Run { compiling: Duration::from_millis(320), ..Run::RACE };
        let run = run.with(&unknown(), &tl1_wins, &|_| false);
        assert!(run.found.iter().all(|found| found.source == Source::Guess && found.figures.is_none()));
        assert!(run.news.shapes.is_empty());
    }

    #[test]
    fn a_larger_budget_races_more_schedules_and_holds_as_well() {
        let budget = Budget::search(Duration::from_secs(20));
        let run = Run { budget, ..Run::RACE }.with(&unknown(), &tl1_wins, &|_| false);
        assert!(run.found.iter().all(|found| found.raced > 30 && found.choice.one.family == Family::Tl1));
        assert!(run.spent <= Duration::from_secs(22), "{:?}", run.spent);
    }

    #[test]
    fn a_family_with_wrong_results_is_rejected_by_name_and_never_races_again() {
        let wrong = |schedule: &Schedule| schedule.family == Family::Tl1;
        let first = Run::RACE.with(&unknown(), &tl1_wins, &wrong);
        let families = first.found.iter().flat_map(|found| [found.choice.one.family, found.choice.many.family]);
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
        assert!(again.found.iter().all(|found| found.source == Source::Known && found.figures.is_some()));
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
        let search = Search { cpu: &cpu, budget: Budget::NONE, stopwatch: &clock, progress: &|_| {}, batch: 2 };
        let part = Problem { m: 256, k: 256, count: 6 };
        let found = search.look_up(&[part, Problem { m: 768, k: 256, count: 1 }, part], &unknown()).unwrap();
        let problems: Vec<Problem> = found.iter().map(|found| found.problem).collect();
        assert_eq!(problems, [Problem { count: 12, ..part }, Problem { m: 768, k: 256, count: 1 }]);
    }

    #[test]
    fn a_shape_that_no_kernel_exists_for_is_an_error_that_names_it() {
        let cpu: Cpu = "x86-64 +ssse3".parse().unwrap();
        let cache = CacheDir::at("unused");
        let problem = Problem { m: 4, k: 0, count: 1 };
        let error = choose(&[problem], &cpu, &Scoped(1), Budget::NONE, &cache, &|_| {}).unwrap_err();
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
        let budget = Budget { time: Duration::from_secs(60), candidates: 8 };
        let first = choose(&problems, &cpu, &Scoped(2), budget, &cache, &|_| {}).unwrap();
        assert_eq!((first.found[0].source, first.warnings.as_slice()), (Source::Raced, &[][..]));
        let choice = first.get(48, 96).unwrap();
        assert_eq!(choice.one.layout, choice.many.layout);
        for (columns, schedule) in [(Columns::One, choice.one), (Columns::Many, choice.many)] {
            assert_eq!(schedule.check(&KernelSpec { k: 96, columns }, &cpu), Ok(()));
        }

        let second = choose(&problems, &cpu, &Scoped(2), budget, &cache, &|_| {}).unwrap();
        assert!(second.all_known());
        assert_eq!(second.get(48, 96), Some(choice));
        let other_team = choose(&problems, &cpu, &Scoped(1), Budget::NONE, &cache, &|_| {}).unwrap();
        assert_eq!(other_team.found[0].source, Source::Guess, "another number of threads is another machine");
    }
}
