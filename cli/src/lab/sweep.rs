//! `ternion lab sweep`: all legal schedules, measured into a file.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, anyhow};
use clap::Args;
use ternion_compiler::Family;
use ternion_lab::{Bench, Case, Done, Log, Sweep as Plan, spec};
use ternion_tuner::SystemStopwatch;

use super::measure::{Matrices, Schedules};
use crate::arguments::parse_time;
use crate::interrupt;
use crate::terminal::{Bar, note};

#[derive(Debug, Args)]
pub(super) struct Sweep {
    #[command(flatten)]
    matrices: Matrices,
    #[command(flatten)]
    schedules: Schedules,
    /// Only schedules that are worth measuring, of all that are legal
    #[arg(long)]
    candidates: bool,
    /// The file that rows are added to, .csv or .jsonl; what it has already is not measured again
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Rounds of every schedule
    #[arg(long, default_value = "7")]
    rounds: NonZeroUsize,
    /// Seed of the order, which is random so that what is measured early says something about all
    #[arg(long, default_value = "0")]
    seed: u64,
    /// Begin nothing new after this time, for example 90s or 10m [default: until all are measured]
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    budget: Option<Duration>,
}

pub(super) fn sweep(options: &Sweep) -> Result<()> {
    let (team, stopwatch) = (options.matrices.team()?, SystemStopwatch::start());
    let mut bench = Bench::new(&team, &stopwatch)?;
    let filter = options.schedules.filter();
    let mut cases = Vec::new();
    for (shape, n) in options.matrices.products() {
        let weights = options.matrices.weights(n);
        let mut specs: Vec<_> = Family::ALL
            .iter()
            .filter(|family| n == 1 || family.list().is_none())
            .map(|f| spec(*f, shape, n > 1))
            .collect();
        specs.sort_unstable();
        specs.dedup();
        for schedule in specs.iter().flat_map(|spec| filter.schedules(spec, bench.cpu(), options.candidates)) {
            let zeros = options.matrices.zeros(schedule.family).into_iter();
            cases.extend(zeros.map(|zeros| Case { shape, n, schedule, weights, zeros }));
        }
    }
    if cases.is_empty() {
        return Err(anyhow!("no schedule is left to measure: `ternion lab list` says what this CPU allows"));
    }
    options.matrices.check_zeros(cases.iter().map(|case| case.schedule.family))?;
    let (mut log, known) = Log::open(&options.output)?;
    let plan = Plan { cases, rounds: options.rounds.get(), seed: options.seed, budget: options.budget };
    let bar = Bar::count("sweep", plan.cases.len() as u64);
    let done = plan.run(&mut bench, &mut log, &known, &mut |Done { before, added, .. }| {
        bar.set((before + added) as u64);
        interrupt::requested()
    })?;
    drop(bar);
    let Done { before, added, refused, left } = done;
    note(&format!("{added} measured ({refused} of them refused), {before} known before, {left} left"));
    if left > 0 {
        note("the same command goes on where this one stopped");
    }
    Ok(())
}
