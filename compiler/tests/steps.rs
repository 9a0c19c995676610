//! Steps on activations: bit for bit the reference's results on every machine, whatever the floats, and not one byte
//! beyond their buffers read or written.
//!
//! Beyond a guard a kernel faults, which ends the process: the last case that was announced is then the one.

use proptest::prelude::*;
use ternion_compiler::harness::{FloatData, FloatRow, Placement, check_step};
use ternion_compiler::{Cpu, Feature, MachineKind, Step, StepKernel, StepSpec, compile_steps, compile_steps_on};

fn host() -> Cpu {
    Cpu::host().expect("tests run where ternion emits code")
}

/// Every step for rows of `k` on every machine that `cpu` has for it.
fn jobs(k: usize, cpu: &Cpu) -> Vec<(StepSpec, MachineKind)> {
    let all = Step::all().flat_map(|step| MachineKind::ALL.map(|machine| (StepSpec { step, k }, machine)));
    all.filter(|(spec, machine)| spec.check(*machine, cpu).is_ok()).collect()
}

fn check(kernel: &StepKernel, row: &FloatRow, placement: Placement) {
    // Heard even if the next line ends the process.
    let case = format!("{kernel:?}; {row}; placement={placement}");
    if let Err(fault) = check_step(kernel, row, placement) {
        panic!("{case}: {fault}");
    }
}

#[test]
fn every_step_is_the_reference_on_floats_of_every_kind_between_guard_pages() {
    // Blocks of 64, whole and incomplete, whole vectors and parts of them; and the lengths of models.
    for k in [1, 2, 3, 4, 5, 15, 16, 17, 31, 36, 63, 64, 65, 80, 100, 127, 128, 260, 319, 320, 321, 1028, 2560, 6912] {
        let jobs = jobs(k, &host());
        let kernels = compile_steps_on(&jobs, &host()).unwrap();
        for (number, data) in FloatData::ALL.into_iter().enumerate() {
            for kernel in &kernels {
                for placement in [Placement::BeforeGuard, Placement::AfterGuard, Placement::Unaligned] {
                    check(kernel, &FloatRow::new(data, k, number as u64), placement);
                }
                // The other epsilon.
                check(kernel, &FloatRow::new(data, k, number as u64 + 1), Placement::Heap);
            }
        }
    }
}

#[test]
fn steps_are_the_reference_whatever_features_the_cpu_lacks() {
    // Without fused multiply-add the portable machine makes its own.
    let mut cpu = host();
    for feature in [None].into_iter().chain(Feature::ALL.iter().rev().copied().map(Some)) {
        cpu = feature.map_or(cpu, |feature| cpu.without(feature));
        let kernels = compile_steps_on(&jobs(132, &cpu), &cpu).unwrap_or_else(|error| panic!("{cpu}: {error}"));
        for kernel in &kernels {
            for (data, seed) in FloatData::ALL.into_iter().zip(0..) {
                check(kernel, &FloatRow::new(data, 132, seed), Placement::Heap);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn random_steps_are_the_reference(
        k in 1usize..900, data in prop::sample::select(&FloatData::ALL[..]), seeds in prop::collection::vec(any::<u64>(), 4)
    ) {
        for kernel in compile_steps_on(&jobs(k, &host()), &host()).unwrap() {
            for seed in &seeds {
                check(&kernel, &FloatRow::new(data, k, *seed), Placement::BeforeGuard);
            }
        }
    }
}

#[test]
fn kernels_are_called_through_slices_of_the_right_lengths() {
    let row = FloatRow::new(FloatData::Random, 100, 2);
    let specs = [Step::Quantize, Step::NormQuantize].map(|step| StepSpec { step, k: 100 });
    let kernels = compile_steps(&specs, &host()).unwrap();
    let (mut values, mut normalised) = ([1; 128], [1; 128]);
    let quantised = kernels[0].quantize(row.x(), &mut values);
    let (expected, result) = row.expected(Step::Quantize);
    assert_eq!((values.map(i8::cast_unsigned).as_slice(), Some(quantised)), (expected.as_slice(), result));
    let quantised = kernels[1].norm_quantize(row.x(), row.weights(), row.epsilon(), &mut normalised);
    let (expected, result) = row.expected(Step::NormQuantize);
    assert_eq!((normalised.map(i8::cast_unsigned).as_slice(), Some(quantised)), (expected.as_slice(), result));
}

#[test]
#[should_panic(expected = "a plain column of results")]
fn a_column_that_is_too_short_is_refused() {
    let kernels = compile_steps(&[StepSpec { step: Step::Quantize, k: 100 }], &host()).unwrap();
    kernels[0].quantize(&[1.0; 100], &mut [0; 100]);
}

#[test]
#[should_panic(expected = "a kernel that quantises")]
fn a_kernel_of_another_step_is_refused() {
    let kernels = compile_steps(&[StepSpec { step: Step::NormQuantize, k: 64 }], &host()).unwrap();
    kernels[0].quantize(&[1.0; 64], &mut [0; 64]);
}

#[test]
fn what_a_cpu_cannot_do_is_refused_in_one_line() {
    let spec = StepSpec { step: "prepare-five-planes".parse().unwrap(), k: 64 };
    let bare: Cpu = "x86-64".parse().unwrap();
    let error = compile_steps(&[spec], &bare).unwrap_err().to_string();
    assert!(error.contains("prepare-five-planes k=64") && !error.contains('\n'), "{error}");
    let wide = compile_steps_on(&[(spec, MachineKind::Avx2)], &"x86-64 +avx2 +ssse3".parse().unwrap()).unwrap_err();
    assert!(wide.to_string().contains("128") || wide.to_string().contains("16"), "{wide}");
}
