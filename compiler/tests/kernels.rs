//! Every kernel returns the reference's integers, whatever the schedule and the features of the CPU. Random shapes, data and
//! guard pages are in `guarded.rs`, other machines in `aarch64.rs`.

use ternion_compiler::{
    Columns, CompileError, Cpu, Family, Feature, KernelSpec, Layout, Schedule, ScheduleError, compile, compile_each,
};

fn host() -> Cpu {
    Cpu::host().expect("tests run where ternion emits code")
}

#[test]
fn every_candidate_compiles_and_agrees_with_the_reference_on_awkward_shapes() {
    for k in [4, 64, 100, 260, 1028, 2560] {
        for columns in [Columns::One, Columns::Many] {
            let spec = KernelSpec { k, columns };
            let jobs: Vec<_> = Schedule::candidates(&spec, &host()).into_iter().map(|s| (spec, s)).collect();
            assert!(jobs.iter().any(|(_, s)| s.family == Family::Tl1), "the host runs all families");
            for kernel in compile_each(&jobs, &host()) {
                kernel.unwrap_or_else(|error| panic!("{error}"));
            }
        }
    }
}

#[test]
fn kernels_agree_whatever_features_the_cpu_lacks() {
    // Every step down still has a legal schedule, and what it emits runs: a lesser CPU's code is legal on a better one.
    let mut cpu = host();
    let spec = KernelSpec { k: 132, columns: Columns::Many };
    for feature in [None].into_iter().chain(Feature::ALL.iter().rev().copied().map(Some)) {
        if let Some(feature) = feature {
            cpu = cpu.without(feature);
        }
        let jobs: Vec<_> = Schedule::candidates(&spec, &cpu).into_iter().map(|s| (spec, s)).collect();
        assert!(!jobs.is_empty(), "{cpu}");
        compile(&jobs, &cpu).unwrap_or_else(|error| panic!("{cpu}: {error}"));
    }
}

#[test]
fn a_feature_that_is_missing_is_refused_by_name() {
    let spec = KernelSpec { k: 256, columns: Columns::One };
    let plain: Cpu = "x86-64".parse().unwrap();
    for (text, what) in [
        ("mad/clif128 layout=rows4x64 multiply=dot unroll=1 ntile=1", "multiply=dot"),
        ("tl1/clif128 layout=lanes32 unroll=8 ntile=1", "tl1"),
    ] {
        let schedule: Schedule = text.parse().unwrap();
        match schedule.check(&spec, &plain) {
            Err(ScheduleError::MissingFeature { what: found, .. }) => assert_eq!(found, what),
            other => panic!("{other:?}"),
        }
        assert!(matches!(compile(&[(spec, schedule)], &plain), Err(CompileError::Schedule { .. })));
    }
}

#[test]
fn sums_of_16_bits_are_legal_up_to_their_bound_and_not_beyond() {
    let spec = KernelSpec { k: 4096, columns: Columns::One };
    let schedule = |chunk, unroll| {
        let text = format!("mad/clif128 layout=rows4x{chunk} multiply=pairs unroll={unroll} ntile=1");
        text.parse::<Schedule>().unwrap()
    };
    // 16 vectors of four pairs of 2·2·127 are 32512: the largest that fits, and the check runs it at its worst case.
    compile(&[(spec, schedule(64, 4))], &host()).unwrap();
    let mut beyond = schedule(64, 4);
    beyond.unroll = 8;
    assert!(beyond.check(&spec, &host()).is_err());
}

#[test]
fn a_schedule_prints_and_parses_back() {
    for columns in [Columns::One, Columns::Many] {
        for schedule in Schedule::candidates(&KernelSpec { k: 2560, columns }, &host()) {
            assert_eq!(schedule.to_string().parse(), Ok(schedule));
        }
    }
    for text in [
        "",
        "mad",
        "mad/clif128",
        "mad/clif128 layout=rows4x64 unroll=1 ntile=1",
        "mad/clif128 layout=rows4x64 multiply=pairs unroll=1",
        "mad/clif128 layout=rows4x64 multiply=pairs unroll=1 unroll=1 ntile=1",
        "mad/clif128 layout=rows4x64 multiply=pairs unroll=x ntile=1",
        "tl1/clif128 layout=lanes32 multiply=dot unroll=8 ntile=1",
        "mad/avx9 layout=rows4x64 multiply=pairs unroll=1 ntile=1",
        "fft/clif128 layout=rows4x64 multiply=pairs unroll=1 ntile=1",
        "mad/clif128 layout=rows4x64 multiply=pairs unroll=1 ntile=1 speed=9",
    ] {
        assert!(text.parse::<Schedule>().is_err(), "{text}");
    }
}

#[test]
fn equal_jobs_share_a_kernel_and_one_bad_job_does_not_spoil_the_others() {
    let spec = KernelSpec { k: 256, columns: Columns::One };
    let good = Schedule::candidates(&spec, &host())[0];
    let bad = Schedule { layout: Layout::Canonical, ..good };
    let kernels = compile_each(&[(spec, good), (spec, bad), (spec, good)], &host());
    assert!(kernels[0].is_ok() && kernels[1].is_err() && kernels[2].is_ok());
    let error = kernels[1].as_ref().unwrap_err().to_string();
    assert!(error.contains("canonical") && !error.contains('\n'), "{error}");
}

#[test]
fn the_ir_of_the_smallest_kernels_is_what_was_reviewed() {
    let cpu: Cpu = "x86-64 +sse3 +ssse3 +sse4.1".parse().unwrap();
    let spec = KernelSpec { k: 64, columns: Columns::One };
    for (name, text) in [
        ("mad", "mad/clif128 layout=rows4x16 multiply=pairs unroll=1 ntile=1"),
        ("tl1", "tl1/clif128 layout=lanes16 unroll=2 ntile=1"),
    ] {
        insta::assert_snapshot!(name, ternion_compiler::clif_text(&spec, &text.parse().unwrap(), &cpu).unwrap());
    }
}
