//! A feed-forward of which most is 0: which kernels read its records, and up to which share of them that pays.
//!
//! A relu² model may read only the rows of its up-projection and the columns of its down-projection that count. Scattered
//! records come slower than a stream, so from some share on the whole matrix is read faster. That share is measured here:
//! the fastest kernel for lists against the dense winner, in interleaved rounds, at several shares. It changes which way a
//! token's results are computed and not a bit of them.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use ternion_compiler::{Columns, Cpu, KernelSpec, Layout, Schedule};

use crate::bench::Bench;
use crate::contest::{Entrant, Rules, contest};
use crate::request::{Held, NEARLY, Problem};
use crate::{Class, Stopwatch};

/// Of the time of a search, what this takes at most.
pub(crate) const SHARE: f64 = 0.1;

/// The share of records that kernels race with: about what trained models read.
const TYPICAL: f64 = 0.2;

/// Shares of records at which the winner meets the dense kernel.
const SHARES: [f64; 7] = [0.05, 0.15, 0.25, 0.35, 0.45, 0.6, 0.8];

/// Rounds of that, and how few are enough.
const ROUNDS: usize = 15;
const LEAST_ROUNDS: usize = 5;

/// Kernels for other layouts that are remembered.
const ALTERNATIVES: usize = 4;

/// Kernels to compile at a time.
const BATCH: usize = 8;

/// The feed-forwards of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SparseShape {
    /// Neurons: rows of the up-projection, columns of the down-projection.
    pub ffn: usize,
    /// Weights of a record.
    pub hidden: usize,
}

impl SparseShape {
    /// The kernel that reads `columns`, which are a list.
    pub(crate) const fn spec(&self, columns: Columns) -> KernelSpec {
        KernelSpec { k: self.hidden, columns }
    }

    /// The matrix that is read as a whole instead.
    const fn dense(&self, columns: Columns) -> Problem {
        match columns {
            Columns::ListedRows => Problem { m: self.ffn, k: self.hidden, count: 1 },
            _ => Problem { m: self.hidden, k: self.ffn, count: 1 },
        }
    }
}

/// How records are read, and when.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ListChoice {
    /// The kernel.
    pub schedule: Schedule,
    /// The largest share of all records for which reading a list is faster than reading the whole matrix, from 0 to 1.
    pub worth: f64,
    /// What was measured: shares of records, and the time over that of the whole matrix.
    pub ratios: Vec<(f64, f64)>,
    /// The fastest kernels for other layouts and how many times slower they are, the fastest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub alternatives: Vec<(Schedule, f64)>,
}

impl ListChoice {
    /// An alternative for the layout that is `held`, if the kernel's is another and it is nearly as fast.
    fn prefer(self, held: Option<Layout>) -> Self {
        let is_held = |schedule: &Schedule| Some(schedule.layout) == held;
        let mut others = self.alternatives.iter().filter(|(schedule, slower)| is_held(schedule) && *slower <= NEARLY);
        match others.next() {
            Some(&(schedule, slower)) if !is_held(&self.schedule) => {
                let ratios = self.ratios.iter().map(|(share, ratio)| (*share, ratio * slower)).collect::<Vec<_>>();
                Self { schedule, worth: break_even(&ratios), ratios, ..self }
            }
            _ => self,
        }
    }
}

/// The choice for the feed-forwards of a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SparseChoice {
    /// For rows of the up-projection.
    pub rows: ListChoice,
    /// For columns of the down-projection.
    pub columns: ListChoice,
}

impl SparseChoice {
    /// With kernels for the records that are held already, where they are nearly as fast.
    pub(crate) fn prefer(self, held: &Held) -> Self {
        Self { rows: self.rows.prefer(held.rows), columns: self.columns.prefer(held.columns) }
    }

    /// Whether both kernels are legal for `shape` on `cpu` and the shares are shares; if not, why.
    pub(crate) fn check(&self, shape: &SparseShape, cpu: &Cpu) -> Result<(), String> {
        for (choice, columns) in [(&self.rows, Columns::ListedRows), (&self.columns, Columns::ListedColumns)] {
            for schedule in [choice.schedule].iter().chain(choice.alternatives.iter().map(|(other, _)| other)) {
                schedule.check(&shape.spec(columns), cpu).map_err(|error| error.to_string())?;
            }
            if !(0.0..=1.0).contains(&choice.worth) {
                return Err(format!("{} is no share", choice.worth));
            }
        }
        Ok(())
    }
}

/// What is measured, and until when.
pub(crate) struct SparseSearch<'a> {
    pub(crate) cpu: &'a Cpu,
    pub(crate) stopwatch: &'a dyn Stopwatch,
    pub(crate) deadline: Duration,
    /// Whether a kernel has been refused before.
    pub(crate) refused: &'a dyn Fn(&KernelSpec, &Schedule) -> bool,
}

impl SparseSearch<'_> {
    /// The choice for `shape`, whose whole matrices `dense` reads. `None` if time ends before there is one. Errors of the
    /// compiler go to `refuse`.
    pub(crate) fn run(
        &self,
        shape: &SparseShape,
        dense: &dyn Fn(&Problem) -> Option<Schedule>,
        bench: &mut dyn Bench,
        refuse: &mut dyn FnMut(Vec<ternion_compiler::CompileError>),
    ) -> Option<SparseChoice> {
        let begin = self.stopwatch.elapsed();
        let half = begin + self.deadline.saturating_sub(begin) / 2;
        let rows = self.list(shape, Columns::ListedRows, dense, bench, refuse, half)?;
        let columns = self.list(shape, Columns::ListedColumns, dense, bench, refuse, self.deadline)?;
        Some(SparseChoice { rows, columns })
    }

    fn list(
        &self,
        shape: &SparseShape,
        columns: Columns,
        dense: &dyn Fn(&Problem) -> Option<Schedule>,
        bench: &mut dyn Bench,
        refuse: &mut dyn FnMut(Vec<ternion_compiler::CompileError>),
        deadline: Duration,
    ) -> Option<ListChoice> {
        let (spec, whole) = (shape.spec(columns), shape.dense(columns));
        let dense = dense(&whole)?;
        let begin = self.stopwatch.elapsed();
        let part = |share: f64| begin + deadline.saturating_sub(begin).mul_f64(share);
        // The compiler's candidates first, in case there is no time for all.
        let mut schedules = Schedule::candidates(&spec, self.cpu);
        let others = Schedule::space(&spec, self.cpu);
        schedules.extend(others.into_iter().filter(|other| !schedules.contains(other)).collect::<Vec<_>>());
        schedules.retain(|schedule| !(self.refused)(&spec, schedule));
        for batch in schedules.chunks(BATCH) {
            if self.stopwatch.elapsed() >= part(0.4) {
                break;
            }
            let jobs: Vec<_> = batch.iter().map(|schedule| (spec, *schedule)).collect();
            refuse(bench.compile(&jobs));
        }
        refuse(bench.compile(&[(Class::One.spec(whole.k), dense)]));
        let ready = schedules.iter().filter(|schedule| bench.is_ready((spec, **schedule)));
        // A list is a single column, and nothing is shared with other classes.
        let entrants: Vec<Entrant> = ready.map(|schedule| Entrant { class: Class::One, schedule: *schedule }).collect();
        let rules = Rules { weights: [1.0, 0.0, 0.0, 0.0, 0.0, 0.0], two_copies: false };
        let mut sample = |at: usize| bench.sample_list(shape, columns, entrants[at].schedule, TYPICAL);
        let verdict = contest(&entrants, rules, self.stopwatch, part(0.75), &mut sample, &mut |_| {})?;
        let schedule = entrants[verdict.one_copy.set[0]?].schedule;
        let raced = entrants.iter().zip(&verdict.paces).filter(|(_, pace)| pace.is_finite());
        let mut alternatives: Vec<(Schedule, f64)> = raced
            .filter(|(other, _)| other.schedule.layout != schedule.layout)
            .map(|(other, pace)| (other.schedule, *pace))
            .collect();
        alternatives.sort_by(|a, b| a.1.total_cmp(&b.1));
        alternatives.truncate(ALTERNATIVES);

        let mut times = [const { Vec::new() }; 1 + SHARES.len()];
        for round in 0..ROUNDS {
            if round >= LEAST_ROUNDS && self.stopwatch.elapsed() >= deadline {
                break;
            }
            times[0].push(bench.sample(&whole, Class::One, dense)?.as_secs_f64());
            for (share, times) in SHARES.into_iter().zip(&mut times[1..]) {
                times.push(bench.sample_list(shape, columns, schedule, share)?.as_secs_f64());
            }
        }
        let [dense, lists @ ..] = times.map(|mut times| {
            times.sort_by(f64::total_cmp);
            times[times.len() / 2]
        });
        let ratios: Vec<(f64, f64)> = SHARES.into_iter().zip(lists.map(|list| list / dense)).collect();
        Some(ListChoice { schedule, worth: break_even(&ratios), ratios, alternatives })
    }
}

/// The share at which the ratio first reaches 1, on straight lines between those measured. Below the first nothing can be
/// said but that it does not pay if that one does not; above the last it always does.
fn break_even(ratios: &[(f64, f64)]) -> f64 {
    let Some(at) = ratios.iter().position(|(_, ratio)| *ratio >= 1.0) else { return 1.0 };
    let Some(before) = at.checked_sub(1) else { return 0.0 };
    let ((low, below), (high, above)) = (ratios[before], ratios[at]);
    low + (high - low) * (1.0 - below) / (above - below)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stopwatch::scripted::{Noise, ScriptedStopwatch};
    use ternion_compiler::CompileError;

    #[test]
    fn the_break_even_lies_where_the_ratio_crosses_one() {
        assert_eq!(break_even(&[(0.1, 0.3), (0.3, 0.8), (0.5, 1.2)]), 0.4);
        assert_eq!(break_even(&[(0.1, 1.3), (0.3, 0.8)]), 0.0);
        assert_eq!(break_even(&[(0.1, 0.3), (0.8, 0.9)]), 1.0);
        assert_eq!(break_even(&[]), 1.0);
    }

    #[test]
    fn records_that_are_held_are_read_where_another_layout_is_hardly_faster() {
        let schedule = |layout: &str| -> Schedule {
            format!("mad/clif128 layout={layout} multiply=pairs unroll=1 ntile=1").parse().unwrap()
        };
        let [best, near, far] = ["rows4x16", "rows8x16", "rows16x16"].map(schedule);
        let choice = ListChoice {
            schedule: best,
            worth: 0.4,
            ratios: vec![(0.1, 0.3), (0.3, 0.8), (0.5, 1.2)],
            alternatives: vec![(near, 1.04), (far, 1.5)],
        };
        for layout in [None, Some(best.layout), Some(far.layout)] {
            assert_eq!(choice.clone().prefer(layout), choice);
        }
        let found = choice.prefer(Some(near.layout));
        assert_eq!(found.schedule, near);
        assert!((0.35..0.4).contains(&found.worth), "slower lists are worth it for fewer records: {}", found.worth);
    }

    /// A whole matrix takes 100 µs; of a list every kernel takes 250 µs for all records, and the one that looks 32 places
    /// ahead 200 µs.
    struct Scripted<'a> {
        clock: &'a ScriptedStopwatch,
        noise: Noise,
    }

    impl Scripted<'_> {
        fn take(&mut self, us: f64) -> Option<Duration> {
            let time = Duration::from_secs_f64(us * 1e-6 * (1.0 + 0.05 * self.noise.normal()));
            self.clock.advance(time);
            Some(time)
        }
    }

    impl Bench for Scripted<'_> {
        fn is_ready(&self, _: (KernelSpec, Schedule)) -> bool {
            true
        }

        fn compile(&mut self, _: &[(KernelSpec, Schedule)]) -> Vec<CompileError> {
            Vec::new()
        }

        fn forget(&mut self, _: (KernelSpec, Schedule)) {}

        fn sample(&mut self, _: &Problem, _: Class, _: Schedule) -> Option<Duration> {
            self.take(100.0)
        }

        fn sample_list(&mut self, _: &SparseShape, _: Columns, schedule: Schedule, share: f64) -> Option<Duration> {
            self.take(share * if schedule.prefetch == 32 { 200.0 } else { 250.0 })
        }
    }

    #[test]
    fn the_fastest_kernel_is_found_and_pays_up_to_the_break_even() {
        let cpu: Cpu = "x86-64 +ssse3 +avx2".parse().unwrap();
        let shape = SparseShape { ffn: 6912, hidden: 2560 };
        let dense: Schedule = "mad/clif128 layout=rows4x16 multiply=pairs unroll=1 ntile=1".parse().unwrap();
        let clock = ScriptedStopwatch::default();
        let mut bench = Scripted { clock: &clock, noise: Noise::new(5) };
        let search =
            SparseSearch { cpu: &cpu, stopwatch: &clock, deadline: Duration::from_secs(2), refused: &|_, _| false };
        let choice = search.run(&shape, &|_| Some(dense), &mut bench, &mut |_| {}).unwrap();
        for list in [&choice.rows, &choice.columns] {
            assert_eq!(list.schedule.prefetch, 32, "{list:?}");
            assert!((list.worth - 0.5).abs() < 0.05, "{list:?}");
        }
        assert_eq!(choice.check(&shape, &cpu), Ok(()));
        assert!(clock.elapsed() < Duration::from_millis(2200), "{:?}", clock.elapsed());
        let mut wrong = choice.clone();
        wrong.rows.worth = f64::NAN;
        assert!(wrong.check(&shape, &cpu).is_err());
        std::mem::swap(&mut wrong.rows, &mut wrong.columns);
        assert!(wrong.check(&shape, &cpu).is_err());
    }
}
