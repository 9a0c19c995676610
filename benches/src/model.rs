//! Whole models: loading one with tuned kernels, and timing its tokens.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use ternion_compiler::Cpu;
use ternion_runtime::formats::Checkpoint;
use ternion_runtime::model::{KernelChoice, Model, Session, Wanted, start_request};
use ternion_runtime::team::Team;
use ternion_tuner::{CacheDir, choose};

/// A model with the kernels that this machine's profile knows or, where it knows none, that win a short race.
///
/// # Errors
/// If the model cannot be read, or not run on this CPU.
pub fn load(path: &Path, threads: usize) -> Result<(Arc<Model>, Arc<Team>)> {
    let checkpoint = Checkpoint::open(path)?;
    let cpu = Cpu::host().context("ternion emits code for x86-64 and aarch64 only")?;
    let team = Arc::new(Team::new(threads)?);
    let choices = choose(&start_request(&checkpoint), &cpu, &*team, &CacheDir::default(), &|_| {})?;
    choices.warnings.iter().for_each(|warning| eprintln!("warning: {warning}"));
    let model = Model::load(&checkpoint, &KernelChoice::Tuned(choices), &cpu, &*team, &|_| {})?;
    Ok((Arc::new(model), team))
}

/// Reads tokens and chooses the next one greedily, which takes the time that is returned with it.
///
/// # Errors
/// If the context is full.
pub fn read(session: &mut Session, tokens: &[u32]) -> Result<(u32, Duration)> {
    let start = Instant::now();
    session.read(tokens)?;
    let candidates = session.candidates(Wanted::Top(1), &[]);
    let best = candidates.iter().max_by(|a, b| a.0.total_cmp(&b.0)).map_or(0, |(_, token)| *token);
    Ok((best, start.elapsed()))
}

/// The value in the middle; of an even number, the lower of the two.
///
/// # Panics
/// If there are no values.
pub fn median<T: PartialOrd + Copy>(values: &mut [T]) -> T {
    values.sort_by(|a, b| a.partial_cmp(b).expect("values that can be ordered"));
    values[(values.len() - 1) / 2]
}
