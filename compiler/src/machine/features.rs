//! No instruction needs a feature that the CPU lacks: what is legal for a CPU is compiled for it and read back.

use std::collections::BTreeSet;

use iced_x86::{CpuidFeature, Decoder, DecoderOptions, FlowControl, Instruction};

use super::Code;
use crate::compile::{in_parallel, machine_code};
use crate::step_kernel::step_code;
use crate::{Columns, Cpu, Family, Feature, KernelSpec, MachineKind, Schedule, Step, StepSpec};

/// What a CPU with `features` executes, in the decoder's terms.
fn allowed(cpu: &Cpu) -> BTreeSet<CpuidFeature> {
    let features = cpu.features().flat_map(|feature| match feature {
        Feature::Sse3 => vec![CpuidFeature::SSE3],
        Feature::Ssse3 => vec![CpuidFeature::SSSE3],
        Feature::Sse41 => vec![CpuidFeature::SSE4_1],
        Feature::Sse42 => vec![CpuidFeature::SSE4_2],
        Feature::Avx => vec![CpuidFeature::AVX],
        // Every CPU with AVX2 or AVX-512 has AVX.
        Feature::Avx2 => vec![CpuidFeature::AVX, CpuidFeature::AVX2],
        Feature::Fma => vec![CpuidFeature::FMA],
        Feature::Avx512f => vec![CpuidFeature::AVX, CpuidFeature::AVX512F],
        Feature::Avx512dq => vec![CpuidFeature::AVX512DQ],
        Feature::Avx512bw => vec![CpuidFeature::AVX512BW],
        Feature::Avx512vl => vec![CpuidFeature::AVX512VL],
        Feature::Avx512vbmi => vec![CpuidFeature::AVX512_VBMI],
        Feature::Avx512vnni => vec![CpuidFeature::AVX512_VNNI],
        Feature::AvxVnni => vec![CpuidFeature::AVX_VNNI],
        Feature::DotProd => Vec::new(),
    });
    let every_x64 = [
        CpuidFeature::INTEL8086,
        CpuidFeature::INTEL386,
        CpuidFeature::INTEL486,
        CpuidFeature::X64,
        CpuidFeature::CMOV,
        CpuidFeature::SSE,
        CpuidFeature::SSE2,
        CpuidFeature::MULTIBYTENOP,
    ];
    features.chain(every_x64).collect()
}

/// All instructions that can be reached: what lies between and behind them are constants.
fn instructions(code: &Code) -> Vec<Instruction> {
    let (mut seen, mut starts, mut found) = (BTreeSet::new(), vec![0], Vec::new());
    while let Some(start) = starts.pop() {
        let mut decoder = Decoder::with_ip(64, &code.bytes, 0, DecoderOptions::NONE);
        decoder.set_ip(start);
        decoder.set_position(start as usize).expect("within the code");
        while seen.insert(decoder.ip()) {
            let instruction = decoder.decode();
            assert!(!instruction.is_invalid(), "at {:#x}", instruction.ip());
            found.push(instruction);
            match instruction.flow_control() {
                FlowControl::Next => {}
                FlowControl::ConditionalBranch => starts.push(instruction.near_branch_target()),
                FlowControl::UnconditionalBranch => {
                    starts.push(instruction.near_branch_target());
                    break;
                }
                FlowControl::Return => break,
                other => panic!("{other:?} at {:#x}", instruction.ip()),
            }
        }
    }
    found
}

/// Everything that there is, and then less at each step: AVX-512 without its own dot product, without byte permutations,
/// AVX2 with the dot product of its own encoding and without any, SSSE3, and what every x86-64 has.
const CPUS: [&str; 8] = [
    "x86-64 +sse3 +ssse3 +sse4.1 +sse4.2 +avx +avx2 +fma +avx512f +avx512dq +avx512bw +avx512vl +avx512vbmi +avx512vnni +avxvnni",
    "x86-64 +sse3 +ssse3 +sse4.1 +sse4.2 +avx +avx2 +fma +avx512f +avx512dq +avx512bw +avx512vl +avx512vbmi +avx512vnni",
    "x86-64 +sse3 +ssse3 +sse4.1 +sse4.2 +avx +avx2 +fma +avx512f +avx512dq +avx512bw +avx512vl +avx512vbmi",
    "x86-64 +sse3 +ssse3 +sse4.1 +sse4.2 +avx +avx2 +fma +avx512f +avx512dq +avx512bw +avx512vl",
    "x86-64 +sse3 +ssse3 +sse4.1 +sse4.2 +avx +avx2 +avxvnni",
    "x86-64 +sse3 +ssse3 +sse4.1 +sse4.2 +avx +avx2",
    "x86-64 +sse3 +ssse3",
    "x86-64",
];

#[test]
fn no_instruction_needs_a_feature_that_the_cpu_lacks() {
    // Of every family on every machine, with and without `dot` and prefetch, the first and some of the others.
    compile_and_read(256);
}

#[test]
#[ignore = "takes minutes: every schedule of every CPU, but for distances of prefetches"]
fn no_instruction_of_the_whole_space_needs_a_feature_that_the_cpu_lacks() {
    compile_and_read(1);
}

#[test]
fn no_instruction_of_a_step_needs_a_feature_that_the_cpu_lacks() {
    let mut seen = BTreeSet::new();
    for cpu in CPUS {
        let cpu: &Cpu = &cpu.parse().expect("a CPU");
        let allowed = allowed(cpu);
        for spec in Step::all().map(|step| StepSpec { step, k: 323 }) {
            for machine in MachineKind::ALL.into_iter().filter(|machine| spec.check(*machine, cpu).is_ok()) {
                let code = step_code(&spec, machine, cpu).unwrap_or_else(|error| panic!("{cpu}: {error}"));
                for instruction in instructions(&code) {
                    for feature in instruction.cpuid_features() {
                        assert!(
                            allowed.contains(feature),
                            "{spec}, {machine} on {cpu}: {feature:?} for {instruction:?}"
                        );
                        seen.insert(*feature);
                    }
                }
            }
        }
    }
    assert!(seen.contains(&CpuidFeature::FMA) && seen.contains(&CpuidFeature::AVX512BW), "{seen:?}");
}

/// Compiles one of `stride` schedules for each of the [`CPUS`] and holds every instruction against what the CPU has.
fn compile_and_read(stride: usize) {
    let (mut seen, mut kernels, mut families) = (BTreeSet::new(), 0, BTreeSet::new());
    for (step, cpu) in CPUS.iter().enumerate() {
        let cpu: &Cpu = &cpu.parse().expect("a CPU");
        let allowed = allowed(cpu);
        let mut jobs = Vec::new();
        for columns in [Columns::One, Columns::Many, Columns::ListedRows, Columns::ListedColumns] {
            let spec = KernelSpec { k: 260, columns };
            // Every distance of a prefetch is the same instruction.
            let space =
                Schedule::space(&spec, cpu).into_iter().filter(|schedule| matches!(schedule.prefetch, 0 | 8 | 256));
            let mut groups = BTreeSet::new();
            let some = space.enumerate().filter(|(at, s)| {
                let new = groups.insert((s.family, s.machine, s.multiply, s.prefetch > 0));
                new || at % stride == 31 * step % stride
            });
            jobs.extend(some.map(|(_, schedule)| (spec, schedule)));
        }
        let found = in_parallel(&jobs, |(spec, schedule)| {
            let code = machine_code(spec, schedule, cpu).unwrap_or_else(|error| panic!("{cpu}: {error}"));
            let mut used = BTreeSet::new();
            for instruction in instructions(&code) {
                for feature in instruction.cpuid_features() {
                    assert!(allowed.contains(feature), "{schedule} on {cpu}: {feature:?} for {instruction:?}");
                    used.insert(*feature);
                }
            }
            used
        });
        kernels += jobs.len();
        families.extend(jobs.iter().map(|(_, schedule)| (schedule.family, schedule.machine)));
        seen.extend(found.into_iter().flatten());
    }
    println!("{kernels} kernels for {} CPUs use {seen:?}", CPUS.len());
    assert_eq!(families.len(), Family::ALL.len() * MachineKind::ALL.len(), "{families:?}");
    for feature in [
        CpuidFeature::SSSE3,
        CpuidFeature::AVX2,
        CpuidFeature::AVX_VNNI,
        CpuidFeature::AVX512BW,
        CpuidFeature::AVX512_VBMI,
        CpuidFeature::AVX512_VNNI,
    ] {
        assert!(seen.contains(&feature), "{feature:?} of {seen:?}");
    }
}
