//! The choice for a whole model: what is known is used, what is not is raced, what cannot be raced is guessed.

use std::collections::BTreeMap;

use ternion_compiler::{Cpu, Family};

use crate::bench::{Bench, KernelBench, Observed, Observer};
use crate::buffer::Buffer;
use crate::energy::EnergyMeter;
use crate::journal::Journal;
use crate::load::Load;
use crate::profile::{CacheDir, MachineProfile, ProfileKey, ShapeEntry, SparseEntry, Warning};
use crate::request::{Choices, Effort, Found, NoSchedule, Problem, Progress, Request, Source};
use crate::search::{Outcome, Search};
use crate::{Choice, CpuProfile, Stopwatch, SystemStopwatch, Workers, probe, shipped};

/// A second copy of a matrix has to save at least this part of its time.
const WORTH_A_COPY: f64 = 0.02;

/// Chooses the schedules of every shape of `request` for `cpu` and these `workers`: remembered ones where `cache` has
/// them, found with at least as much time as the budget; the others race, and are remembered. The budget binds wall time
/// whatever happens; a shape that it leaves no time for gets what is shipped for this CPU, or the best guess. `progress`
/// is called a few times per shape.
///
/// # Errors
/// A shape that no legal schedule exists for.
pub fn choose(
    request: &Request,
    cpu: &Cpu,
    workers: &dyn Workers,
    cache: &CacheDir,
    progress: &dyn Fn(Progress),
) -> Result<Choices, NoSchedule> {
    choose_observed(request, cpu, workers, cache, progress, None)
}

/// As [`choose`], with somebody who is told which kernels run for the first time.
pub(crate) fn choose_observed(
    request: &Request,
    cpu: &Cpu,
    workers: &dyn Workers,
    cache: &CacheDir,
    progress: &dyn Fn(Progress),
    observer: Option<&dyn Observer>,
) -> Result<Choices, NoSchedule> {
    let stopwatch = SystemStopwatch::start();
    let machine = probe();
    let key = ProfileKey::new(&machine, cpu, workers.threads());
    let (known, mut warnings) = cache.load(&key, cpu);
    let journal = Journal::of(cache, &key);
    let exhaustive = request.budget.effort == Effort::Exhaustive;
    let meter = match request.energy.then(EnergyMeter::find) {
        Some(Err(reason)) => {
            warnings.push(Warning::NoEnergyMeter { reason });
            None
        }
        found => found.and_then(Result::ok),
    };
    let load = Load::begin();
    let search = Search {
        cpu,
        families: &Family::ALL,
        meter: meter.as_ref(),
        request,
        stopwatch: &stopwatch,
        progress,
        threads: workers.threads(),
        batch: machine.cores.available,
        note: &|trials| {
            if exhaustive {
                journal.note(trials)
            }
        },
    };
    let mut found = look_up(&search, &machine, &known)?;

    let mut outcome = Outcome::default();
    let mut sparse = request.sparse.and_then(|shape| Some(known.sparse(&shape)?.choice.clone()));
    if found.iter().any(|found| search.wants_race(found, &known)) || known.wants_sparse(request) {
        let (bytes, tile) = measuring_bytes(request, &machine);
        // A smaller buffer is less cold than it might be, but a race needs its time.
        let enough = || stopwatch.elapsed() > request.budget.time / 10;
        match Buffer::of_codes(bytes, tile, workers, enough) {
            Some(buffer) => {
                let mut kernels = KernelBench::new(*cpu, workers, &stopwatch, buffer);
                let mut observed = observer.map(|observer| Observed::new(&mut kernels, observer));
                let bench: &mut dyn Bench = match &mut observed {
                    Some(observed) => observed,
                    None => &mut kernels,
                };
                let done = if exhaustive { journal.trials() } else { Vec::new() };
                let mut news = MachineProfile::new(key);
                outcome = search.race_all(&mut found, &known, bench, &mut news, &done);
                let one_copy = spend_copies(&mut found, &outcome, request);
                let disturbance = load.disturbance(workers.threads(), &outcome.reference);
                // A short race is replaced by the first search whatever it was disturbed by.
                let disturbance = disturbance.filter(|_| request.budget.explores());
                let provisional = disturbance.is_some();
                warnings.extend(disturbance.map(|reason| Warning::Busy { reason }));
                let entries = entries(&found, &one_copy, request, provisional);
                entries.into_iter().for_each(|entry| news.insert(entry));
                if let Some((shape, choice)) = request.sparse.zip(outcome.sparse.take()) {
                    let budget_ms = request.budget.milliseconds();
                    news.insert_sparse(SparseEntry { shape, choice: choice.clone(), budget_ms, provisional });
                    sparse = Some(choice);
                }
                remember(&news, cache, &mut warnings);
                if exhaustive {
                    journal.finish();
                }
            }
            None => warnings.push(Warning::NoMemory { bytes }),
        }
    }
    let Outcome { trials, warnings: refused, phases, .. } = outcome;
    warnings.extend(refused);
    // What is remembered is what is fastest; what is used may be what need not be converted.
    for found in &mut found {
        found.prefer(request.held.layouts(found.problem.m, found.problem.k));
    }
    let sparse = sparse.map(|choice| choice.prefer(&request.held));
    let spent = stopwatch.elapsed();
    Ok(Choices { found, sparse, spent, phases, trials, warnings })
}

/// What can be said without measuring, for every different shape, most work first.
pub(crate) fn look_up(
    search: &Search<'_>,
    machine: &CpuProfile,
    known: &MachineProfile,
) -> Result<Vec<Found>, NoSchedule> {
    let mut shapes: BTreeMap<(usize, usize), usize> = BTreeMap::new();
    for problem in &search.request.problems {
        let count = shapes.entry((problem.m, problem.k)).or_default();
        *count = count.saturating_add(problem.count);
    }
    let mut problems: Vec<Problem> = shapes.into_iter().map(|((m, k), count)| Problem { m, k, count }).collect();
    let work = |problem: &Problem| problem.m.saturating_mul(problem.k).saturating_mul(problem.count);
    problems.sort_by_key(|problem| std::cmp::Reverse(work(problem)));
    // What is known may need more memory than there is this time.
    let mut spare = search.request.second_copies.unwrap_or(u64::MAX);
    let look_up = |problem| {
        let found = look_up_one(search, machine, known, problem, spare)?;
        spare -= second_copy(&problem, &found.choice).unwrap_or(0);
        Ok(found)
    };
    problems.into_iter().map(look_up).collect()
}

fn look_up_one(
    search: &Search<'_>,
    machine: &CpuProfile,
    known: &MachineProfile,
    problem: Problem,
    spare: u64,
) -> Result<Found, NoSchedule> {
    let Problem { m, k, .. } = problem;
    let affordable = |choice: &Choice| second_copy(&problem, choice).is_none_or(|bytes| bytes <= spare);
    let entry = known.shape(m, k);
    let choice = entry.and_then(|entry| [Some(entry.choice), entry.one_copy].into_iter().flatten().find(affordable));
    if let (Some(choice), Some(ShapeEntry { results, raced, alternatives, .. })) = (choice, entry) {
        let (results, raced, alternatives) = (results.clone(), *raced, alternatives.clone());
        return Ok(Found { problem, choice, source: Source::Known, results, raced, alternatives });
    }
    let shipped = shipped::choice(machine, search.cpu, search.threads, problem);
    let guess = || search.shortlist(problem, known).guess().map(|guess| (guess, Vec::new(), Source::Guess));
    let found = shipped.map(|(choice, alternatives)| (choice, alternatives, Source::Shipped)).or_else(guess);
    let (choice, alternatives, source) = found.ok_or(NoSchedule { m, k, cpu: *search.cpu })?;
    Ok(Found { problem, choice, source, results: Vec::new(), raced: 0, alternatives })
}

/// Bytes of all matrices of a shape in the second layout of a choice; `None` if it has only one.
fn second_copy(problem: &Problem, choice: &Choice) -> Option<u64> {
    let Problem { m, k, count } = *problem;
    let layout = choice.layouts().get(1).copied()?;
    let bytes = layout.bytes(m, k).and_then(|bytes| bytes.checked_mul(count));
    Some(bytes.map_or(u64::MAX, |bytes| bytes as u64))
}

/// Gives second copies of weights to the shapes where they save most time per byte, as far as memory reaches. Returns the
/// choices of these shapes without, by place.
fn spend_copies(found: &mut [Found], outcome: &Outcome, request: &Request) -> BTreeMap<usize, Choice> {
    let weights = request.workload.weights();
    let mut offers: Vec<(f64, usize, Choice, u64)> = Vec::new();
    for (at, choice, saved) in &outcome.second {
        let Found { problem, results, .. } = &found[*at];
        let Some(size) = second_copy(problem, choice) else { continue };
        let total: f64 = results.iter().map(|r| weights[r.class.index()] * r.figures.median_us * 1e-6).sum();
        if *saved > WORTH_A_COPY * total * problem.count as f64 {
            offers.push((saved / size as f64, *at, *choice, size));
        }
    }
    offers.sort_by(|a, b| b.0.total_cmp(&a.0));
    let (mut bytes, mut one_copy) = (request.second_copies.unwrap_or(0), BTreeMap::new());
    for (_, at, choice, size) in offers {
        if size <= bytes {
            bytes -= size;
            one_copy.insert(at, std::mem::replace(&mut found[at].choice, choice));
        }
    }
    one_copy
}

/// What has been measured, as it is remembered.
pub(crate) fn entries(
    found: &[Found],
    one_copy: &BTreeMap<usize, Choice>,
    request: &Request,
    provisional: bool,
) -> Vec<ShapeEntry> {
    let raced = found.iter().enumerate().filter(|(_, found)| found.source == Source::Raced);
    let entry = |(at, found): (usize, &Found)| ShapeEntry {
        m: found.problem.m,
        k: found.problem.k,
        choice: found.choice,
        results: found.results.clone(),
        raced: found.raced,
        budget_ms: request.budget.milliseconds(),
        workload: request.workload,
        second_copies: request.second_copies.unwrap_or(0),
        one_copy: one_copy.get(&at).copied(),
        alternatives: found.alternatives.clone(),
        energy: request.energy,
        provisional,
    };
    raced.map(entry).collect()
}

/// Writes down what is new, if anything is.
fn remember(news: &MachineProfile, cache: &CacheDir, warnings: &mut Vec<Warning>) {
    if !(news.shapes.is_empty() && news.sparse.is_empty() && news.refused.is_empty()) {
        warnings.extend(cache.remember(news).err());
    }
}

/// Bytes to measure over, and how many of them it takes at least. Decoding reads all matrices between two uses of one:
/// if that is more than the caches hold, four times what they hold is as cold as all of it (twice would do, were it not
/// for virtual machines that hide a second last-level cache).
pub(crate) fn measuring_bytes(request: &Request, machine: &CpuProfile) -> (usize, usize) {
    let Request { problems, beside, .. } = request;
    let model = problems.iter().map(Problem::bytes).fold(*beside, usize::saturating_add);
    let cold = usize::try_from(machine.last_level_bytes().saturating_mul(4)).unwrap_or(usize::MAX);
    let spare = machine.memory.available.map_or(usize::MAX, |bytes| usize::try_from(bytes / 4).unwrap_or(usize::MAX));
    // A tile of 64 rows, a little padded: it can be larger than its matrix.
    let tile = problems.iter().map(|problem| problem.k.saturating_add(256).saturating_mul(16)).max().unwrap_or(0);
    (model.min(cold).min(spare).max(tile), tile)
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod agreement;

#[cfg(test)]
mod outside;
