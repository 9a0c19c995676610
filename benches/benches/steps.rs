//! What is done to the activations of a token before a product: every step on every machine that this CPU has for it, on
//! one thread, at 2B4T's lengths of a row. Preparing is also timed as the definition of its format does it.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ternion_compiler::{ActivationFormat, Cpu, MachineKind, Step, StepSpec, compile_steps_on};

fn benches(criterion: &mut Criterion) {
    let cpu = Cpu::host().expect("a CPU that ternion emits code for");
    for spec in [2560, 6912].into_iter().flat_map(|k| Step::all().map(move |step| StepSpec { step, k })) {
        let k = spec.k;
        let machines = MachineKind::ALL.into_iter().filter(|machine| spec.check(*machine, &cpu).is_ok());
        let jobs: Vec<_> = machines.map(|machine| (spec, machine)).collect();
        let kernels = compile_steps_on(&jobs, &cpu).expect("legal steps");
        let x: Vec<f32> = (0..k).map(|i| (i * 7919 % 1013) as f32 / 100.0 - 5.0).collect();
        let weights: Vec<f32> = (0..k).map(|i| (i * 31 % 17) as f32 / 10.0 + 0.1).collect();
        let mut values: Vec<i8> = (0..ActivationFormat::Plain.bytes(k)).map(|i| (i % 255) as i8).collect();
        let mut group = criterion.benchmark_group(spec.to_string());
        group.throughput(Throughput::Elements(k as u64));
        if let Step::Prepare(format) = spec.step {
            let mut column = vec![0; format.bytes(k)];
            group.bench_function("definition", |bencher| {
                bencher.iter(|| format.prepare(black_box(&values[..k]), &mut column));
            });
        }
        for kernel in &kernels {
            group.bench_function(BenchmarkId::from_parameter(kernel.machine()), |bencher| match spec.step {
                Step::Quantize => bencher.iter(|| kernel.quantize(black_box(&x), &mut values)),
                Step::NormQuantize => bencher.iter(|| kernel.norm_quantize(black_box(&x), &weights, 1e-5, &mut values)),
                Step::Prepare(format) => {
                    let mut column = vec![0; format.bytes(k)];
                    bencher.iter(|| kernel.prepare(black_box(&values), &mut column));
                }
            });
        }
        group.finish();
    }
}

criterion_group! {
    name = all;
    config = Criterion::default().sample_size(20).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(500));
    targets = benches
}
criterion_main!(all);
