//! Every kernel family at 2B4T's shapes: decoding on cold weights, and prompts of 128 tokens.
//!
//! Criterion reports packed weights per second. The line after each decoding bench gives the share of the read bandwidth
//! that was measured when the bench began, on the same threads.

use std::collections::BTreeSet;
use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ternion_benches::{Matrix, SHAPES_2B4T};
use ternion_compiler::{Columns, Cpu, Kernel, KernelSpec, Schedule, compile, compile_each};
use ternion_kernels_ref::matrix::ZERO_BYTE;
use ternion_runtime::memory::PageBuffer;
use ternion_runtime::team::{Team, available_threads};
use ternion_tuner::{SystemStopwatch, Workers, probe};

/// Bytes of weights to cycle through: far more than any last-level cache here.
const COLD_BYTES: usize = 512 << 20;

/// Tokens of a prompt.
const PROMPT: usize = 128;

/// The best guess of every family on every machine.
fn kernels(k: usize, columns: Columns, cpu: &Cpu) -> Vec<Kernel> {
    let spec = KernelSpec { k, columns };
    let mut seen = BTreeSet::new();
    let mut jobs: Vec<_> = Schedule::candidates(&spec, cpu).into_iter().map(|schedule| (spec, schedule)).collect();
    jobs.retain(|(_, schedule)| seen.insert((schedule.family, schedule.machine)));
    compile_each(&jobs, cpu).into_iter().filter_map(Result::ok).collect()
}

fn benches(criterion: &mut Criterion) {
    let cpu = Cpu::host().expect("a CPU that ternion emits code for");
    let team = Team::new(available_threads()).expect("threads to measure on");
    let bandwidth = probe().memory_bandwidth(&team, &SystemStopwatch::start());
    let mut weights = PageBuffer::zeroed(COLD_BYTES).expect("memory for cold weights");
    weights.fill(ZERO_BYTE);
    let threads = team.threads();
    for (m, k) in SHAPES_2B4T {
        let mut group = criterion.benchmark_group(format!("decode {m}x{k}, {threads} threads"));
        for kernel in kernels(k, Columns::One, &cpu) {
            let mut matrix = Matrix::new(&kernel, m, 1, &weights);
            group.throughput(Throughput::Bytes(matrix.weight_bytes() as u64));
            let mut best = f64::INFINITY;
            group.bench_function(BenchmarkId::from_parameter(kernel.schedule()), |bencher| {
                bencher.iter_custom(|times| {
                    let start = Instant::now();
                    matrix.run(&team, times);
                    let elapsed = start.elapsed();
                    best = best.min(elapsed.as_secs_f64() / times as f64);
                    elapsed
                });
            });
            if let Some(bandwidth) = bandwidth.filter(|_| best.is_finite()) {
                let speed = matrix.weight_bytes() as f64 / best;
                println!(
                    "    {:.1} GB/s at best: {:.2} of the measured {:.1} GB/s",
                    speed / 1e9,
                    speed / bandwidth,
                    bandwidth / 1e9
                );
            }
        }
        group.finish();

        let mut group = criterion.benchmark_group(format!("prompt {m}x{k}, {PROMPT} tokens, {threads} threads"));
        group.throughput(Throughput::Elements((m * k * PROMPT) as u64));
        for kernel in kernels(k, Columns::Many, &cpu) {
            let mut matrix = Matrix::new(&kernel, m, PROMPT, &weights[..COLD_BYTES / 8]);
            group.bench_function(BenchmarkId::from_parameter(kernel.schedule()), |bencher| {
                bencher.iter_custom(|times| {
                    let start = Instant::now();
                    matrix.run(&team, black_box(times));
                    start.elapsed()
                });
            });
        }
        group.finish();
    }
}

/// Compiling and checking every kernel that a 2B4T-shaped model needs.
fn compiling(criterion: &mut Criterion) {
    let cpu = Cpu::host().expect("a CPU that ternion emits code for");
    let specs =
        [2560, 6912].into_iter().flat_map(|k| [Columns::One, Columns::Many].map(|columns| KernelSpec { k, columns }));
    let jobs: Vec<_> = specs.map(|spec| (spec, Schedule::candidates(&spec, &cpu)[0])).collect();
    criterion.bench_function("compile the kernels of 2B4T", |bencher| {
        bencher.iter(|| compile(black_box(&jobs), &cpu).expect("legal schedules"));
    });
}

criterion_group! {
    name = all;
    config = Criterion::default().sample_size(20).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    targets = compiling, benches
}
criterion_main!(all);
