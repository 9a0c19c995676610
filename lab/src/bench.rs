//! Kernels and the limits of the machine, measured in the same rounds.
//!
//! Every round runs every kernel once, every other round backwards, and beside them what the kernels are compared with:
//! reading memory, reading the cache, the arithmetic at the kernels' hearts, and the clock. Drift of the machine then
//! hits all of them alike, and their ratios are worth more than any of the figures alone.

use std::collections::BTreeMap;
use std::time::Duration;

use ternion_compiler::harness::{self, Data, Fault, Placement, Problem};
use ternion_compiler::{Columns, CompileError, Cpu, Heart, Kernel, Limit, MachineKind, compile_each};
use ternion_tuner::{Buffer, Stopwatch, Streams, Workers, probe, read};

use crate::{Case, Entrant, Weights};

/// A sample does at least so many multiply-adds, so that starting the threads and reading the clock hardly count.
const SAMPLE_MACS: f64 = 4e6;

/// A sample of weights in the cache does more: it is short.
const HOT_SAMPLE_MACS: f64 = 3e7;

/// Bytes that one reading of main memory reads.
const READ_BYTES: usize = 32 << 20;

/// Bytes that one reading of the cache reads at least, by passes over fewer bytes.
const HOT_READ_BYTES: usize = 16 << 20;

/// The columns of one kernel and their results take no more than this part of the weights: many kernels are measured
/// together.
const COLUMNS_PART: usize = 8;

/// Multiply-adds of the reference in checking one kernel.
const CHECK_MACS: usize = 1 << 23;

/// Seed of the matrices that kernels are checked on.
const CHECK_SEED: u64 = 0x6c61_6221;

/// Why a case is not measured.
#[derive(Clone, Debug, thiserror::Error)]
pub enum BenchError {
    /// The schedule is not legal, or its kernel is wrong.
    #[error(transparent)]
    Compile(#[from] CompileError),
    /// The kernel is wrong on this very shape.
    #[error("{schedule} on {shape}: {fault}; please report this as a bug", schedule = case.schedule, shape = case.shape)]
    Fault {
        /// What was to be measured.
        case: Box<Case>,
        /// What is wrong.
        fault: Fault,
    },
    /// The matrix does not fit.
    #[error("{shape} in layout {layout} is larger than the {bytes} bytes of weights to measure on: take a smaller matrix", shape = case.shape, layout = case.schedule.layout)]
    TooLarge {
        /// What was to be measured.
        case: Box<Case>,
        /// What there is.
        bytes: usize,
    },
    /// The columns and their results do not.
    #[error("{n} columns of {shape} and their results are more than {bytes} bytes: take fewer columns", n = case.n, shape = case.shape)]
    TooManyColumns {
        /// What was to be measured.
        case: Box<Case>,
        /// What there is for one kernel.
        bytes: usize,
    },
    /// The system gives no memory.
    #[error("no memory for {0} bytes of weights to measure on")]
    Memory(usize),
    /// Nothing runs here.
    #[error("ternion emits no code for this CPU, so there is nothing to measure")]
    NoCpu,
}

/// A machine to measure on.
pub struct Bench<'a> {
    cpu: Cpu,
    workers: &'a dyn Workers,
    stopwatch: &'a dyn Stopwatch,
    /// Any bytes are weights of any layout, and their values do not change the time: one buffer serves all.
    weights: Buffer,
    /// Where in the cold weights the next reader starts: in what was read longest ago.
    cursor: usize,
}

/// Speeds that a kernel's are compared with, one per round.
#[derive(Clone, Debug, Default)]
pub struct Limits {
    /// Bytes per second from main memory, for one and for two streams per thread.
    pub cold: [Vec<f64>; 2],
    /// Bytes per second from the cache that holds the first entrant's matrix.
    pub hot: [Vec<f64>; 2],
    /// Multiply-adds per second of all threads.
    pub hearts: BTreeMap<(MachineKind, Heart), Vec<f64>>,
    /// Cycles per second of one thread.
    pub clock: Vec<f64>,
}

/// What a measurement has found.
#[derive(Clone, Debug, Default)]
pub struct Samples {
    /// For every entrant the time of one product in every round, in seconds.
    pub products: Vec<Vec<f64>>,
    /// What they are compared with.
    pub limits: Limits,
}

impl<'a> Bench<'a> {
    /// A bench on `workers`, with four times as many bytes of weights as the last-level cache has, or 256 MB if that is
    /// more, or what half of the memory allows.
    ///
    /// # Errors
    /// If this CPU runs none of ternion's code or there is no memory.
    pub fn new(workers: &'a dyn Workers, stopwatch: &'a dyn Stopwatch) -> Result<Self, BenchError> {
        let cpu = Cpu::host().ok_or(BenchError::NoCpu)?;
        let machine = probe();
        let spare = machine.memory.available.unwrap_or(1 << 30) / 2;
        let bytes = machine.last_level_bytes().saturating_mul(4).max(256 << 20).min(spare);
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        let weights = Buffer::of_codes(bytes, bytes, workers, || false).ok_or(BenchError::Memory(bytes))?;
        Ok(Self { cpu, workers, stopwatch, weights, cursor: 0 })
    }

    /// The CPU.
    #[must_use]
    pub fn cpu(&self) -> &Cpu {
        &self.cpu
    }

    /// Threads.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.workers.threads().max(1)
    }

    /// The clock.
    #[must_use]
    pub fn stopwatch(&self) -> &dyn Stopwatch {
        self.stopwatch
    }

    /// The weights that are cold, and a quarter of all that is kept hot: what is read again and again must not be met by
    /// who looks for cold weights.
    fn weights(&self, weights: Weights) -> &[u8] {
        let bytes = self.weights.bytes();
        let (cold, hot) = bytes.split_at(bytes.len() / 256 * 192);
        match weights {
            Weights::Cold => cold,
            Weights::Hot => hot,
        }
    }

    /// Compiles the kernels of `cases`, which checks them, and checks them again on their very shape (or as many of its
    /// rows as the reference computes in a moment).
    pub fn prepare(&self, cases: &[Case]) -> Vec<Result<Entrant, BenchError>> {
        let jobs: Vec<_> = cases.iter().map(|case| (case.spec(), case.schedule)).collect();
        let mut problems = BTreeMap::new();
        // As many columns as the largest pass takes and one left over: all kernels share the problems.
        let n = cases.iter().map(|case| case.n.min(usize::from(case.schedule.ntile) + 1)).max().unwrap_or(1);
        let kernels = compile_each(&jobs, &self.cpu);
        let prepare = |(case, kernel): (&Case, Result<Kernel, CompileError>)| {
            let kernel = kernel?;
            let room = self.weights(case.weights).len();
            let too_large = || BenchError::TooLarge { case: Box::new(*case), bytes: room };
            let bytes = case.matrix_bytes().filter(|bytes| *bytes <= room);
            let bytes = bytes.ok_or_else(too_large)?;
            let room = self.weights.bytes().len() / COLUMNS_PART;
            let column = kernel.activation_format().bytes(kernel.spec().k).saturating_add(4 * case.shape.m);
            if case.n.saturating_mul(column) > room {
                return Err(BenchError::TooManyColumns { case: Box::new(*case), bytes: room });
            }
            let [m, k] = check_shape(case, n);
            let problem = problems.entry([m, k, n]).or_insert_with(|| Problem::new(Data::Random, m, k, n, CHECK_SEED));
            harness::check(&kernel, problem, Placement::Heap)
                .map_err(|fault| BenchError::Fault { case: Box::new(*case), fault })?;
            Ok(Entrant::new(*case, kernel, bytes, self.threads()))
        };
        cases.iter().zip(kernels).map(prepare).collect()
    }

    /// Measures in `rounds` rounds, or fewer if `stop`, which is told how many are complete, says so after one.
    pub fn measure(&mut self, entrants: &mut [Entrant], rounds: usize, stop: &mut dyn FnMut(usize) -> bool) -> Samples {
        let mut samples = Samples { products: vec![Vec::new(); entrants.len()], limits: Limits::default() };
        let hearts: BTreeMap<_, _> = entrants
            .iter()
            .filter_map(|entrant| Some((entrant.case().schedule.machine, entrant.case().schedule.heart()?)))
            .filter_map(|(machine, heart)| Some(((machine, heart), Limit::of(heart, machine, &self.cpu).ok()?)))
            .collect();
        let clock = Limit::clock(&self.cpu).ok();
        let hot_bytes = entrants.first().map_or(0, Entrant::matrix_bytes);
        for round in 0..rounds {
            let streams = [Streams::One, Streams::Two][round % 2];
            samples.limits.cold[round % 2].extend(self.read_cold(streams));
            samples.limits.hot[round % 2].extend(self.read_hot(hot_bytes, streams));
            for (which, limit) in &hearts {
                let time = self.time(|bench| bench.workers.run(&|_| limit.run()));
                let macs = limit.count() as f64 * self.threads() as f64;
                samples.limits.hearts.entry(*which).or_default().push(macs / time);
            }
            if let Some(clock) = &clock {
                samples.limits.clock.push(clock.count() as f64 / self.time(|_| clock.run()));
            }
            for turn in 0..entrants.len() {
                let which = if round % 2 == 0 { turn } else { entrants.len() - 1 - turn };
                let time = self.sample(&mut entrants[which]);
                samples.products[which].push(time);
            }
            if stop(round + 1) {
                break;
            }
        }
        samples
    }

    /// Seconds that `work` takes; never 0.
    fn time(&mut self, work: impl FnOnce(&mut Self)) -> f64 {
        let start = self.stopwatch.elapsed();
        work(self);
        self.stopwatch.elapsed().saturating_sub(start).max(Duration::from_nanos(1)).as_secs_f64()
    }

    /// Bytes per second of reading what was read longest ago.
    fn read_cold(&mut self, streams: Streams) -> Option<f64> {
        let all = self.weights(Weights::Cold).len();
        let length = READ_BYTES.min(all);
        if self.cursor + length > all {
            self.cursor = 0;
        }
        let from = self.cursor;
        self.cursor += length;
        let time = self.time(|bench| read(&bench.weights(Weights::Cold)[from..][..length], streams, bench.workers));
        (length > 0).then(|| length as f64 / time)
    }

    /// Bytes per second of reading the same `bytes` bytes again and again.
    fn read_hot(&mut self, bytes: usize, streams: Streams) -> Option<f64> {
        let bytes = bytes.min(self.weights(Weights::Hot).len()) / 64 * 64;
        if bytes == 0 {
            return None;
        }
        let passes = HOT_READ_BYTES.div_ceil(bytes);
        let pass = |bench: &Self| read(&bench.weights(Weights::Hot)[..bytes], streams, bench.workers);
        pass(self);
        let time = self.time(|bench| (0..passes).for_each(|_| pass(bench)));
        Some((passes * bytes) as f64 / time)
    }

    /// Seconds of one product.
    fn sample(&mut self, entrant: &mut Entrant) -> f64 {
        entrant.choose();
        self.workers.wake();
        let (bytes, macs) = (entrant.matrix_bytes(), entrant.case().macs().max(1.0));
        let stride = bytes.next_multiple_of(64);
        let places = (self.weights(Weights::Cold).len() / stride.max(1)).max(1);
        match entrant.case().weights {
            Weights::Cold => {
                let repeats = if entrant.case().schedule.family.list().is_some() { 1.0 } else { SAMPLE_MACS / macs };
                let repeats = (repeats.ceil() as usize).clamp(1, places);
                let first = self.cursor.div_ceil(stride.max(1));
                let place = move |repeat: usize| (first + repeat) % places * stride;
                let time = self.time(|bench| {
                    let weights = bench.weights(Weights::Cold);
                    entrant.compute(bench.workers, repeats, &|repeat| &weights[place(repeat)..][..bytes]);
                });
                self.cursor = place(repeats - 1) + bytes;
                time / repeats as f64
            }
            Weights::Hot => {
                let repeats = (HOT_SAMPLE_MACS / macs).ceil() as usize;
                let workers = self.workers;
                let weights = self.weights(Weights::Hot);
                entrant.compute(workers, 1, &|_| &weights[..bytes]);
                let time = self.time(|bench| {
                    let weights = bench.weights(Weights::Hot);
                    entrant.compute(workers, repeats, &|_| &weights[..bytes]);
                });
                time / repeats as f64
            }
        }
    }
}

/// Rows and length of a row of the problem with `n` columns that a case is checked on.
fn check_shape(case: &Case, n: usize) -> [usize; 2] {
    let (m, k) = (case.shape.m, case.shape.k);
    let part = |other: usize| (CHECK_MACS / (other * n).max(1)).max(1);
    match case.spec().columns {
        Columns::ListedColumns => [m, k.min(part(m))],
        _ => [m.min(part(k)), k],
    }
}
