//! Sparse kernels against the best dense one, at the shapes of 2B4T's up- and down-projection, weights cold.
//!
//! Criterion measures one thing after the other, which a noisy machine turns into noise in the ratios; here every round
//! runs everything once. Each line is a schedule; its ratios are time of the sparse kernel over time of the fastest dense
//! `mad`, at shares of zeros from 0 to 90 %, minimum over the rounds and median of the rounds. The last number is the
//! break-even: the share of zeros from which the sparse kernel is faster.

use std::ops::Range;
use std::time::Instant;

use ternion_benches::Matrix;
use ternion_compiler::listed::GROUP;
use ternion_compiler::{Activations, Columns, Cpu, Family, Kernel, KernelSpec, RecordList, Schedule, compile_each};
use ternion_kernels_ref::QuantizedRow;
use ternion_kernels_ref::matrix::ZERO_BYTE;
use ternion_runtime::memory::PageBuffer;
use ternion_runtime::team::{SharedSlice, Team, available_threads, share};
use ternion_tuner::Workers;

/// Bytes of weights to cycle through.
const COLD_BYTES: usize = 320 << 20;
const HIDDEN: usize = 2560;
const FFN: usize = 6912;
/// Shares of zeros, in percent.
const ZEROS: [usize; 6] = [0, 30, 50, 70, 80, 90];
const ROUNDS: usize = 15;
/// Dense kernels that compete, the tuner's first guesses.
const DENSE: usize = 6;

fn main() {
    let cpu = Cpu::host().expect("a CPU that ternion emits code for");
    let mut weights = PageBuffer::zeroed(COLD_BYTES).expect("memory for cold weights");
    weights.fill(ZERO_BYTE);
    for threads in (0..).map(|power| 1 << power).take_while(|threads| *threads <= available_threads()) {
        let team = Team::new(threads).expect("threads to measure on");
        for (name, m, k, listed) in [
            ("up-projection by rows", FFN, HIDDEN, Columns::ListedRows),
            ("down-projection by columns", HIDDEN, FFN, Columns::ListedColumns),
        ] {
            println!("{name}, {m}x{k}, {threads} threads");
            compare(&cpu, &team, &weights, (m, k), listed);
        }
    }
}

/// Compiles what `keep` leaves of the candidates for a spec.
fn kernels(spec: KernelSpec, cpu: &Cpu, keep: impl Fn(&Schedule) -> bool) -> Vec<Kernel> {
    let jobs: Vec<_> =
        Schedule::candidates(&spec, cpu).into_iter().filter(keep).map(|schedule| (spec, schedule)).collect();
    compile_each(&jobs, cpu).into_iter().filter_map(Result::ok).collect()
}

fn compare(cpu: &Cpu, team: &Team, weights: &[u8], (m, k): (usize, usize), listed: Columns) {
    let mut dense = kernels(KernelSpec { k, columns: Columns::One }, cpu, |s| s.family == Family::Mad);
    dense.truncate(DENSE);
    let mut dense: Vec<_> = dense.iter().map(|kernel| Matrix::new(kernel, m, 1, weights)).collect();
    // All of the best machine, the first guess of each other.
    let mut machines = Vec::new();
    let mut sparse = kernels(KernelSpec { k: HIDDEN, columns: listed }, cpu, |_| true);
    sparse.retain(|kernel| {
        let machine = kernel.schedule().machine;
        let known = machines.contains(&machine);
        if !known {
            machines.push(machine);
        }
        !known || machine == machines[0]
    });
    let mut sparse: Vec<_> = sparse.iter().map(|kernel| Records::new(kernel, team.threads(), weights)).collect();

    let seconds = |work: &mut dyn FnMut()| {
        let start = Instant::now();
        work();
        start.elapsed().as_secs_f64()
    };
    // `[kernel, share of zeros]`, times of all rounds.
    let mut dense_times = vec![Vec::new(); dense.len()];
    let mut sparse_times = vec![vec![Vec::new(); ZEROS.len()]; sparse.len()];
    // Whoever is next takes the next copy, so that nobody finds in the cache what another has just read.
    let mut copies = 0..;
    let mut copy = || copies.next().expect("a number");
    for _ in 0..ROUNDS {
        for (matrix, times) in dense.iter_mut().zip(&mut dense_times) {
            let copy = copy();
            times.push(seconds(&mut || matrix.run_copy(team, copy)));
        }
        for (records, times) in sparse.iter_mut().zip(&mut sparse_times) {
            for (zeros, times) in ZEROS.iter().zip(times) {
                records.choose(*zeros, copy());
                times.push(seconds(&mut || records.run(team)));
            }
        }
    }
    let (least, middle) = dense_times
        .iter_mut()
        .map(|times| least_and_median(times))
        .reduce(|a, b| (a.0.min(b.0), a.1.min(b.1)))
        .expect("a dense kernel");
    println!("    dense {:.0} µs, median {:.0} µs; zeros {ZEROS:?} %", least * 1e6, middle * 1e6);
    for (records, times) in sparse.iter().zip(&mut sparse_times) {
        let ratios: Vec<_> = times
            .iter_mut()
            .map(|times| least_and_median(times))
            .map(|(sparse_least, sparse_middle)| (sparse_least / least, sparse_middle / middle))
            .collect();
        let shown: Vec<_> = ratios.iter().map(|(least, median)| format!("{least:.2} ({median:.2})")).collect();
        let medians: Vec<_> = ratios.iter().map(|(_, median)| *median).collect();
        let from = break_even(&medians).map_or("never".to_owned(), |zeros| format!("{zeros:.0} %"));
        println!("    {}  even at {from}  {}", shown.join("  "), records.kernel.schedule());
    }
}

fn least_and_median(times: &mut [f64]) -> (f64, f64) {
    times.sort_by(f64::total_cmp);
    (times[0], times[times.len() / 2])
}

/// The share of zeros, in percent, at which a line through two neighbouring ratios crosses 1.
fn break_even(ratios: &[f64]) -> Option<f64> {
    if ratios[0] <= 1.0 {
        return Some(0.0);
    }
    let at = ratios.iter().position(|ratio| *ratio <= 1.0)?;
    let [before, after] = [ZEROS[at - 1] as f64, ZEROS[at] as f64];
    Some(before + (after - before) * (ratios[at - 1] - 1.0) / (ratios[at - 1] - ratios[at]))
}

/// A projection as records, in copies that follow each other through `weights`.
struct Records<'a> {
    kernel: &'a Kernel,
    weights: &'a [u8],
    record: usize,
    copy: usize,
    list: RecordList,
    prepared: Vec<u8>,
    sum: i32,
    /// Results of rows, or sums over each thread's columns.
    results: Vec<i32>,
    /// Results of one thread for columns.
    width: usize,
    random: u64,
}

impl<'a> Records<'a> {
    fn new(kernel: &'a Kernel, threads: usize, weights: &'a [u8]) -> Self {
        let (format, record) = (kernel.activation_format(), kernel.layout().row_bytes(HIDDEN));
        let column = QuantizedRow::new(&(0..HIDDEN).map(|i| (i % 251) as f32 - 125.0).collect::<Vec<_>>());
        let (mut prepared, sum) = (vec![0; format.bytes(HIDDEN)], column.sum());
        format.prepare(column.values(), &mut prepared);
        let by_rows = kernel.spec().columns == Columns::ListedRows;
        let width = if by_rows { 0 } else { 4 * record };
        let results = vec![0; if by_rows { FFN.next_multiple_of(GROUP) } else { threads * width }];
        let list = RecordList::with_capacity(FFN);
        Self { kernel, weights, record, copy: 0, list, prepared, sum, results, width, random: 1 }
    }

    /// Lists the neurons that are not 0, in copy `copy` of the weights or the one that follows after the last.
    fn choose(&mut self, zeros: usize, copy: usize) {
        self.copy = copy % (self.weights.len() / (FFN * self.record));
        let (record, mut state) = (self.record, self.random);
        let listed = (0..FFN).filter(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % 100 >= zeros
        });
        self.list.fill(listed.map(|neuron| ((neuron * record) as u32, (neuron % 127) as i8)));
        self.random = state;
    }

    /// One product, on all threads.
    fn run(&mut self, team: &Team) {
        let bytes = FFN * self.record;
        let weights = &self.weights[self.copy * bytes..][..bytes];
        let (kernel, list, width, threads) = (self.kernel, &self.list, self.width, team.threads());
        let sums = [self.sum];
        let activations = Activations { columns: &self.prepared, stride: self.prepared.len(), sums: &sums };
        let part = |thread: usize| -> Range<usize> { share(list.groups(), threads, thread) };
        let results = SharedSlice::new(&mut self.results);
        team.run(&|thread| {
            let groups = part(thread);
            if width == 0 {
                // SAFETY: every group belongs to one thread.
                let results = unsafe { results.part(groups.start * GROUP..groups.end * GROUP) };
                kernel.run_listed_rows(weights, list, groups, &activations, results);
            } else {
                // SAFETY: every thread has results of its own.
                let results = unsafe { results.part(thread * width..(thread + 1) * width) };
                kernel.run_listed_columns(weights, list, groups, results);
            }
        });
        if width > 0 {
            let (first, rest) = self.results.split_at_mut(width);
            for partial in rest.chunks_exact(width) {
                first.iter_mut().zip(partial).for_each(|(sum, partial)| *sum += partial);
            }
        }
    }
}
