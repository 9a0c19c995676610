//! `ternion lab run`: some kernels, checked and measured.

use std::num::NonZeroUsize;

use anyhow::{Result, anyhow};
use clap::{Args, ValueEnum};
use ternion_compiler::{Columns, KernelSpec, Schedule};
use ternion_lab::{Bench, Case, Row, Shape, cpu_name, table};
use ternion_tuner::{Budget, CacheDir, Class, Problem, ProfileKey, Request, SystemStopwatch, guess, probe};

use super::measure::{Matrices, Schedules};
use crate::terminal::{Bar, note};
use crate::{UsageError, interrupt, output};

#[derive(Debug, Args)]
pub(super) struct Run {
    #[command(flatten)]
    matrices: Matrices,
    /// This very schedule, for example "mad/avx2 layout=lanes16x4 multiply=pairs unroll=2 ntile=1"; may be given several times
    #[arg(long, conflicts_with_all = ["family", "machine", "conditions", "choose"])]
    schedule: Vec<Schedule>,
    #[command(flatten)]
    schedules: Schedules,
    /// Which schedules to run, before --family, --machine and --where leave some out
    #[arg(long, value_enum, default_value = "candidates")]
    choose: Choose,
    /// Rounds; every round runs every kernel once
    #[arg(long, default_value = "21")]
    rounds: NonZeroUsize,
    /// Print one JSON array instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Choose {
    /// All that are worth measuring
    Candidates,
    /// The one that an untuned start takes
    Guess,
    /// The one that `ternion tune` has found
    Tuned,
}

pub(super) fn run(options: &Run) -> Result<()> {
    let (team, stopwatch) = (options.matrices.team()?, SystemStopwatch::start());
    let mut bench = Bench::new(&team, &stopwatch)?;
    let mut cases = Vec::new();
    for (shape, n) in options.matrices.products() {
        let before = cases.len();
        let weights = options.matrices.weights(n);
        for schedule in schedules(options, &bench, shape, n)? {
            let zeros = options.matrices.zeros(schedule.family).into_iter();
            cases.extend(zeros.map(|zeros| Case { shape, n, schedule, weights, zeros }));
        }
        if cases.len() == before {
            return Err(anyhow!(
                "no schedule for {shape}, n={n} is left: `ternion lab list` says what this CPU allows"
            ));
        }
    }
    options.matrices.check_zeros(cases.iter().map(|case| case.schedule.family))?;

    let cpu = cpu_name();
    let (mut entrants, mut refused) = (Vec::new(), Vec::new());
    for (case, result) in cases.iter().zip(bench.prepare(&cases)) {
        match result {
            Ok(entrant) => entrants.push(entrant),
            // A schedule that was asked for by its line is worth an error; of many, a line in the table.
            Err(error) if !options.schedule.is_empty() => return Err(error.into()),
            Err(error) => refused.push(Row::refused(case, bench.threads(), &cpu, &error)),
        }
    }
    let rounds = options.rounds.get();
    let bar = Bar::count("round", rounds as u64);
    let samples = bench.measure(&mut entrants, rounds, &mut |round| {
        bar.set(round as u64);
        interrupt::requested()
    });
    drop(bar);
    if interrupt::requested() {
        note("interrupted: these are the rounds so far");
    }
    let mut rows = Row::of(&bench, &entrants, &samples, &cpu);
    let place = |row: &Row| (row.m, row.k, row.n);
    let time = |row: &Row| row.median_us.unwrap_or(f64::INFINITY);
    rows.sort_by(|a, b| place(a).cmp(&place(b)).then(time(a).total_cmp(&time(b))));
    rows.extend(refused);
    if options.json { output::json(&rows) } else { output::print(&table(&rows)) }
}

/// The schedules that were asked for, of one matrix.
fn schedules(options: &Run, bench: &Bench<'_>, shape: Shape, n: usize) -> Result<Vec<Schedule>> {
    if !options.schedule.is_empty() {
        if let Some(schedule) = options.schedule.iter().find(|schedule| n > 1 && schedule.family.list().is_some()) {
            return Err(UsageError(format!("-n {n}: {} reads a list and takes one column", schedule.family)).into());
        }
        return Ok(options.schedule.clone());
    }
    let filter = options.schedules.filter();
    let mut found = match options.choose {
        Choose::Candidates => candidates(bench, shape, n),
        Choose::Guess => {
            let request = Request::new(vec![Problem { m: shape.m, k: shape.k, count: 1 }], Budget::RACE);
            guess(&request, bench.cpu()).values().map(|choice| choice.of(Class::of(n))).collect()
        }
        Choose::Tuned => {
            let key = ProfileKey::new(&probe(), bench.cpu(), bench.threads());
            let (profile, warnings) = CacheDir::default().load(&key, bench.cpu());
            warnings.iter().for_each(|warning| note(&format!("warning: {warning}")));
            let entry = profile.shape(shape.m, shape.k).ok_or_else(|| {
                let threads = bench.threads();
                anyhow!(
                    "nothing is known of {shape} on {threads} threads: `ternion tune` finds out, or take --choose guess"
                )
            })?;
            vec![entry.choice.of(Class::of(n))]
        }
    };
    found.retain(|schedule| filter.admits(schedule));
    Ok(found)
}

/// What is worth measuring: dense families, and for one column those that read a list.
fn candidates(bench: &Bench<'_>, shape: Shape, n: usize) -> Vec<Schedule> {
    let kinds: &[Columns] =
        if n > 1 { &[Columns::Many] } else { &[Columns::One, Columns::ListedRows, Columns::ListedColumns] };
    let of = |columns: &Columns| {
        let k = if *columns == Columns::ListedColumns { shape.m } else { shape.k };
        Schedule::candidates(&KernelSpec { k, columns: *columns }, bench.cpu())
    };
    kinds.iter().flat_map(of).collect()
}
