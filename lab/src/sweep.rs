//! Measuring many schedules, a few at a time, in an order that no later one depends on.

use std::collections::BTreeSet;
use std::time::Duration;

use ternion_kernels_ref::SplitMix64;

use crate::row::Key;
use crate::{Bench, Case, Log, LogError, Row, cpu_name};

/// Cases that are measured together, in the same rounds.
const BATCH: usize = 8;

/// A sweep: what to measure and how long.
#[derive(Clone, Debug)]
pub struct Sweep {
    /// The cases.
    pub cases: Vec<Case>,
    /// Rounds of each.
    pub rounds: usize,
    /// Seed of the order.
    pub seed: u64,
    /// No further batch begins after this time.
    pub budget: Option<Duration>,
}

/// How far a sweep has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// Cases of the sweep that the file had before.
    pub before: usize,
    /// Cases that were added, refused ones among them.
    pub added: usize,
    /// Cases that were refused.
    pub refused: usize,
    /// Cases that are left.
    pub left: usize,
}

impl Sweep {
    /// Measures what the file does not have yet and adds it, batch by batch, until nothing is left, the time is over or
    /// `stop` says so, which is told how far it is before each batch.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn run(
        &self,
        bench: &mut Bench<'_>,
        log: &mut Log,
        known: &[Row],
        stop: &mut dyn FnMut(&Done) -> bool,
    ) -> Result<Done, LogError> {
        let (threads, cpu) = (bench.threads(), cpu_name());
        let known: BTreeSet<_> = known.iter().map(Row::key).collect();
        let mut cases = self.cases.clone();
        cases.sort_unstable();
        cases.dedup();
        let all = cases.len();
        // Shuffled before what is known is left out: a sweep that goes on keeps the order that it had.
        SplitMix64::new(self.seed).shuffle(&mut cases);
        cases.retain(|case| !known.contains(&Key::here(*case, threads, &cpu)));
        let mut done = Done { before: all - cases.len(), left: cases.len(), ..Done::default() };
        let begin = bench.stopwatch().elapsed();
        for batch in cases.chunks(BATCH) {
            let spent = bench.stopwatch().elapsed().saturating_sub(begin);
            if stop(&done) || self.budget.is_some_and(|budget| spent >= budget) {
                break;
            }
            let (mut entrants, mut rows) = (Vec::new(), Vec::new());
            for (case, result) in batch.iter().zip(bench.prepare(batch)) {
                match result {
                    Ok(entrant) => entrants.push(entrant),
                    Err(error) => rows.push(Row::refused(case, threads, &cpu, &error)),
                }
            }
            done.refused += rows.len();
            let samples = bench.measure(&mut entrants, self.rounds, &mut |_| false);
            rows.extend(Row::of(bench, &entrants, &samples, &cpu));
            log.add(&rows)?;
            done.added += batch.len();
            done.left -= batch.len();
        }
        Ok(done)
    }
}
