//! Taking samples: compiled kernels run on all threads over weights as cold as the model will meet them.

use std::collections::{BTreeMap, BTreeSet};
use std::hint::black_box;
use std::sync::Mutex;
use std::time::Duration;

use ternion_compiler::listed::GROUP;
use ternion_compiler::{
    ActivationFormat, Activations, Columns, CompileError, Cpu, Kernel, KernelSpec, RecordList, Schedule, compile_each,
};

use crate::buffer::Buffer;
use crate::sparse::SparseShape;
use crate::workers::share;
use crate::{Class, Problem, Product, Stopwatch, Workers};

/// What a race needs to know of the outside: kernels that compile and take time.
pub(crate) trait Bench {
    /// Whether a kernel has been compiled.
    fn is_ready(&self, job: Job) -> bool;

    /// Makes the kernels of `jobs` ready; returns the errors of those that cannot be.
    fn compile(&mut self, jobs: &[Job]) -> Vec<CompileError>;

    /// Frees a kernel.
    fn forget(&mut self, job: Job);

    /// Takes one sample of a kernel that is ready: the time of one product of `problem`'s matrix with the columns of
    /// `class`. `None` if it cannot be measured here.
    fn sample(&mut self, problem: &Problem, class: Class, schedule: Schedule) -> Option<Duration>;

    /// Takes one sample of a kernel for lists that is ready, with this share of the records listed: the time of making the
    /// list, of the products, and of adding up what threads have found. `None` if it cannot be measured here.
    fn sample_list(
        &mut self,
        shape: &SparseShape,
        columns: Columns,
        schedule: Schedule,
        share: f64,
    ) -> Option<Duration>;
}

/// A kernel to compile.
pub(crate) type Job = (KernelSpec, Schedule);

/// Who wants to know which kernels are about to run for the first time, in case they never return.
pub(crate) trait Observer {
    /// One of these may crash.
    fn trying(&self, jobs: &[Job]);

    /// They have not.
    fn tried(&self);

    /// Kernels to run one at a time before all others.
    fn suspects(&self) -> Vec<Job>;
}

/// A bench with an observer.
pub(crate) struct Observed<'a> {
    bench: &'a mut dyn Bench,
    observer: &'a dyn Observer,
    sampled: BTreeSet<(Class, KernelSpec, Schedule)>,
}

impl<'a> Observed<'a> {
    pub(crate) fn new(bench: &'a mut dyn Bench, observer: &'a dyn Observer) -> Self {
        let mut observed = Self { bench, observer, sampled: BTreeSet::new() };
        for job in observer.suspects() {
            observed.compile(&[job]);
        }
        observed
    }
}

impl Bench for Observed<'_> {
    fn is_ready(&self, job: Job) -> bool {
        self.bench.is_ready(job)
    }

    fn compile(&mut self, jobs: &[Job]) -> Vec<CompileError> {
        self.observer.trying(jobs);
        let errors = self.bench.compile(jobs);
        self.observer.tried();
        errors
    }

    fn forget(&mut self, job: Job) {
        self.bench.forget(job);
    }

    fn sample(&mut self, problem: &Problem, class: Class, schedule: Schedule) -> Option<Duration> {
        let spec = class.spec(problem.k);
        if !self.sampled.insert((class, spec, schedule)) {
            return self.bench.sample(problem, class, schedule);
        }
        self.observer.trying(&[(spec, schedule)]);
        let sample = self.bench.sample(problem, class, schedule);
        self.observer.tried();
        sample
    }

    fn sample_list(
        &mut self,
        shape: &SparseShape,
        columns: Columns,
        schedule: Schedule,
        share: f64,
    ) -> Option<Duration> {
        let spec = shape.spec(columns);
        let first = self.sampled.insert((Class::One, spec, schedule));
        if first {
            self.observer.trying(&[(spec, schedule)]);
        }
        let sample = self.bench.sample_list(shape, columns, schedule, share);
        if first {
            self.observer.tried();
        }
        sample
    }
}

/// A sample does at least this many multiply-adds, so that starting the threads and reading the clock hardly count.
const SAMPLE_MACS: usize = 1 << 21;

/// A sample of a prompt does no more than about this many: its weights are used again and again, so a part of the
/// matrix tells the speed of the whole.
const PROMPT_SAMPLE_MACS: usize = 1 << 24;

/// Matrices of a layer per activation that they read: seven projections, four different inputs. Preparing an
/// activation counts that much less.
const MATRICES_PER_ACTIVATION: f64 = 7.0 / 4.0;

/// Times that an activation is prepared; the fastest counts.
const PREPARATIONS: usize = 3;

/// Kernels on this machine.
pub(crate) struct KernelBench<'a> {
    cpu: Cpu,
    workers: &'a dyn Workers,
    stopwatch: &'a dyn Stopwatch,
    /// Any bytes are weights of any layout, and their values do not change the time: one buffer serves all.
    weights: Buffer,
    /// Where in the weights the next matrix lies: in what was read longest ago.
    cursor: usize,
    kernels: BTreeMap<Job, Kernel>,
    inputs: BTreeMap<(usize, Class, ActivationFormat), Input>,
    out: Vec<i32>,
}

/// Activations of all columns, in one format.
struct Input {
    bytes: Vec<u8>,
    /// Where the first column starts: at a cache line.
    start: usize,
    stride: usize,
    sums: Vec<i32>,
    /// What preparing one column takes.
    preparing: Duration,
}

impl<'a> KernelBench<'a> {
    /// Measures over `weights`: as many bytes as the model reads between two uses of a matrix.
    pub(crate) fn new(cpu: Cpu, workers: &'a dyn Workers, stopwatch: &'a dyn Stopwatch, weights: Buffer) -> Self {
        let (kernels, inputs) = (BTreeMap::new(), BTreeMap::new());
        Self { cpu, workers, stopwatch, weights, cursor: 0, kernels, inputs, out: Vec::new() }
    }
}

impl Bench for KernelBench<'_> {
    fn is_ready(&self, job: Job) -> bool {
        self.kernels.contains_key(&job)
    }

    fn compile(&mut self, jobs: &[Job]) -> Vec<CompileError> {
        let mut errors = Vec::new();
        for result in compile_each(jobs, &self.cpu) {
            match result {
                Ok(kernel) => drop(self.kernels.insert((kernel.spec(), kernel.schedule()), kernel)),
                Err(error) => errors.push(error),
            }
        }
        errors
    }

    fn forget(&mut self, job: Job) {
        self.kernels.remove(&job);
    }

    fn sample(&mut self, problem: &Problem, class: Class, schedule: Schedule) -> Option<Duration> {
        let kernel = self.kernels.get(&(class.spec(problem.k), schedule))?;
        let (k, layout) = (kernel.spec().k, kernel.layout());
        let columns = class.measured();
        let format = kernel.activation_format();
        let input =
            self.inputs.entry((k, class, format)).or_insert_with(|| Input::new(k, columns, format, self.stopwatch));

        let threads = self.workers.threads().max(1);
        let all_tiles = layout.tiles(problem.m).max(1);
        let tile_macs = layout.tile_rows().saturating_mul(k).saturating_mul(columns).max(1);
        let mut tiles = all_tiles;
        if columns > 1 {
            tiles = tiles.min((PROMPT_SAMPLE_MACS / tile_macs / threads).max(1).saturating_mul(threads));
        }
        let bytes = self.weights.bytes();
        tiles = tiles.min(bytes.len() / layout.tile_bytes(k).max(1));
        if tiles == 0 {
            return None;
        }
        let repeats = (SAMPLE_MACS / tiles.saturating_mul(tile_macs)).max(1);
        let matrix_bytes = tiles * layout.tile_bytes(k);
        let stride = matrix_bytes.next_multiple_of(64);
        let places = (bytes.len() / stride).max(1);
        let first = self.cursor / stride;

        let rows = tiles * layout.tile_rows();
        self.out.resize(self.out.len().max(rows * columns), 0);
        let activations = Activations { columns: &input.bytes[input.start..], stride: input.stride, sums: &input.sums };
        let product = Product { kernel, tiles, activations };
        let weights = |repeat: usize| &bytes[(first + repeat) % places * stride..][..matrix_bytes];
        self.workers.wake();
        let start = self.stopwatch.elapsed();
        product.compute(self.workers, repeats, &weights, &mut self.out);
        let time = self.stopwatch.elapsed().saturating_sub(start);
        black_box(&self.out);
        self.cursor = (first + repeats) % places * stride;

        // The thread with most tiles decides, in the sample as in the whole matrix.
        let whole = all_tiles.div_ceil(threads) as f64 / tiles.div_ceil(threads) as f64;
        let shared = if columns > 1 { threads } else { 1 };
        let preparing = input.preparing.as_secs_f64() * columns as f64 / shared as f64 / MATRICES_PER_ACTIVATION;
        Duration::try_from_secs_f64(time.as_secs_f64() / repeats as f64 * whole + preparing).ok()
    }

    fn sample_list(
        &mut self,
        shape: &SparseShape,
        columns: Columns,
        schedule: Schedule,
        density: f64,
    ) -> Option<Duration> {
        let SparseShape { ffn, hidden } = *shape;
        let kernel = self.kernels.get(&(shape.spec(columns), schedule))?;
        let record = kernel.layout().row_bytes(hidden);
        let matrix_bytes = ffn.checked_mul(record).filter(|bytes| u32::try_from(*bytes).is_ok())?;
        let bytes = self.weights.bytes();
        let stride = matrix_bytes.next_multiple_of(64);
        if stride == 0 || stride > bytes.len() {
            return None;
        }
        let place = self.cursor / stride % (bytes.len() / stride);
        let weights = &bytes[place * stride..][..matrix_bytes];
        self.cursor = (place + 1) * stride;
        // Which records count changes with every token.
        let mut random = self.cursor as u64;
        let mut listed = Vec::with_capacity(ffn);
        listed.extend((0..ffn).filter(|_| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) as f64 / (1u64 << 31) as f64 <= density
        }));

        let format = kernel.activation_format();
        let input = self
            .inputs
            .entry((hidden, Class::One, format))
            .or_insert_with(|| Input::new(hidden, 1, format, self.stopwatch));
        let activations = Activations { columns: &input.bytes[input.start..], stride: input.stride, sums: &input.sums };
        let threads = self.workers.threads().max(1);
        let by_rows = columns == Columns::ListedRows;
        let mut list = RecordList::with_capacity(ffn);
        // Every thread has its groups' results, or sums over its columns.
        let width = if by_rows { GROUP * listed.len().div_ceil(GROUP).div_ceil(threads) } else { 4 * record };
        self.out.resize(self.out.len().max(threads * width), 0);
        let results: Vec<Mutex<&mut [i32]>> =
            self.out[..threads * width].chunks_mut(width.max(1)).map(Mutex::new).collect();

        self.workers.wake();
        let start = self.stopwatch.elapsed();
        list.fill(listed.iter().map(|neuron| ((neuron * record) as u32, (neuron % 127) as i8)));
        self.workers.run(&|thread| {
            let groups = share(list.groups(), threads, thread);
            let Some(Ok(mut out)) = results.get(thread).map(Mutex::try_lock) else { return };
            if by_rows {
                let count = GROUP * groups.len();
                kernel.run_listed_rows(weights, &list, groups, &activations, &mut out[..count]);
            } else {
                kernel.run_listed_columns(weights, &list, groups, &mut out);
            }
        });
        drop(results);
        if !by_rows {
            let (first, rest) = self.out[..threads * width].split_at_mut(width);
            for partial in rest.chunks_exact(width) {
                first.iter_mut().zip(partial).for_each(|(sum, partial)| *sum += partial);
            }
        }
        let time = self.stopwatch.elapsed().saturating_sub(start);
        black_box(&self.out);
        Some(time)
    }
}

impl Input {
    fn new(k: usize, columns: usize, format: ActivationFormat, stopwatch: &dyn Stopwatch) -> Self {
        let stride = format.bytes(k);
        let mut bytes = vec![0; columns * stride + 64];
        let start = bytes.as_ptr().align_offset(64).min(64);
        let mut preparing = Duration::MAX;
        let mut sums = Vec::with_capacity(columns);
        for (column, target) in bytes[start..][..columns * stride].chunks_exact_mut(stride.max(1)).enumerate() {
            let values: Vec<i8> = (0..k).map(|at| (((at * 31 + column * 17) % 255) as i16 - 127) as i8).collect();
            sums.push(values.iter().map(|value| i32::from(*value)).sum());
            for _ in 0..PREPARATIONS {
                let begin = stopwatch.elapsed();
                format.prepare(&values, target);
                preparing = preparing.min(stopwatch.elapsed().saturating_sub(begin));
            }
        }
        Self { bytes, start, stride, sums, preparing }
    }
}
