//! Every kernel returns the reference's integers, whatever the schedule and the features of the CPU. Random shapes, data and
//! guard pages are in `guarded.rs`, other machines in `aarch64.rs`.

use std::collections::BTreeSet;
use std::time::Instant;

use ternion_compiler::{
    Columns, CompileError, Cpu, Family, Feature, KernelSpec, Layout, Schedule, ScheduleError, code_bytes, compile,
    compile_each,
};

fn host() -> Cpu {
    Cpu::host().expect("tests run where ternion emits code")
}

#[test]
fn every_candidate_compiles_and_agrees_with_the_reference_on_awkward_shapes() {
    for k in [4, 64, 100, 260, 1028, 2560] {
        for columns in [Columns::One, Columns::Many, Columns::ListedRows, Columns::ListedColumns] {
            let spec = KernelSpec { k, columns };
            let jobs: Vec<_> = Schedule::candidates(&spec, &host()).into_iter().map(|s| (spec, s)).collect();
            let serves = |family: &Family| match family.list() {
                Some(list) => list == columns,
                None => !columns.are_listed() && (*family != Family::Vlut || columns == Columns::Many),
            };
            for family in Family::ALL.into_iter().filter(serves) {
                assert!(jobs.iter().any(|(_, s)| s.family == family), "the host runs {family}");
            }
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
    let specs =
        [Columns::Many, Columns::ListedRows, Columns::ListedColumns].map(|columns| KernelSpec { k: 132, columns });
    for feature in [None].into_iter().chain(Feature::ALL.iter().rev().copied().map(Some)) {
        if let Some(feature) = feature {
            cpu = cpu.without(feature);
        }
        for spec in specs {
            let jobs: Vec<_> = Schedule::candidates(&spec, &cpu).into_iter().map(|s| (spec, s)).collect();
            assert!(!jobs.is_empty(), "{cpu}");
            compile(&jobs, &cpu).unwrap_or_else(|error| panic!("{cpu}: {error}"));
        }
    }
}

#[test]
fn compiling_takes_little_time() {
    let specs = [(2560, Columns::One), (2560, Columns::Many), (6912, Columns::One), (6912, Columns::Many)];
    let jobs = specs.map(|(k, columns)| KernelSpec { k, columns }).map(|spec| {
        let schedules = Schedule::candidates(&spec, &host());
        (spec, schedules)
    });
    // What a model needs: the first candidate for each of its row lengths, for one column and for many.
    let model: Vec<_> = jobs.iter().map(|(spec, schedules)| (*spec, schedules[0])).collect();
    let start = Instant::now();
    let kernels = compile(&model, &host()).unwrap_or_else(|error| panic!("{error}"));
    let whole = start.elapsed();
    println!("{} kernels of 2B4T, compiled and checked: {whole:?}", kernels.len());
    // Every family on every machine by itself, without the check before first use; the best of a few times.
    let mut seen = BTreeSet::new();
    for (spec, schedule) in jobs.iter().flat_map(|(spec, all)| all.iter().map(move |schedule| (spec, schedule))) {
        if seen.insert((schedule.family, schedule.machine, spec.columns)) {
            let times = (0..3).map(|_| {
                let start = Instant::now();
                let bytes = code_bytes(spec, schedule, &host()).unwrap_or_else(|error| panic!("{error}"));
                assert!(!bytes.is_empty());
                start.elapsed()
            });
            println!("{:?} for {spec}, {schedule}", times.min().unwrap_or_default());
        }
    }
    assert!(seen.len() > 4);
}

#[test]
fn a_feature_that_is_missing_is_refused_by_name() {
    let spec = KernelSpec { k: 256, columns: Columns::One };
    for (cpu, text, what) in [
        ("x86-64", "mad/clif128 layout=rows4x64 multiply=dot unroll=1 ntile=1", "multiply=dot"),
        ("x86-64", "tl1/clif128 layout=lanes32 unroll=8 ntile=1", "tl1"),
        ("x86-64", "tl2/clif128 layout=threes32 unroll=1 ntile=1", "tl2"),
        ("x86-64", "t5/clif128 layout=fives16 multiply=pairs unroll=1 ntile=1", "t5"),
        (
            "x86-64 +ssse3 +avx2 +avx512f +avx512bw +avx512dq +avx512vl +avx512vnni",
            "t5/avx512 layout=fives16 multiply=dot unroll=1 ntile=1",
            "t5",
        ),
        ("x86-64 +avx", "mad/avx2 layout=rows4x64 multiply=pairs unroll=1 ntile=1", "avx2"),
        ("x86-64 +avx +avx2", "mad/avx2 layout=rows4x64 multiply=dot unroll=1 ntile=1", "multiply=dot"),
        ("x86-64 +avx2 +avx512f", "mad/avx512 layout=rows4x64 multiply=pairs unroll=1 ntile=1", "avx512"),
        (
            "x86-64 +avx2 +avx512f +avx512bw +avx512dq +avx512vl +avxvnni",
            "mad/avx512 layout=rows4x64 multiply=dot unroll=1 ntile=1",
            "multiply=dot",
        ),
        ("aarch64", "mad/avx2 layout=rows4x64 multiply=pairs unroll=1 ntile=1", "avx2"),
    ] {
        let (cpu, schedule): (Cpu, Schedule) = (cpu.parse().unwrap(), text.parse().unwrap());
        match schedule.check(&spec, &cpu) {
            Err(ScheduleError::MissingFeature { what: found, .. }) => assert_eq!(found, what),
            other => panic!("{text}: {other:?}"),
        }
        assert!(matches!(compile(&[(spec, schedule)], &cpu), Err(CompileError::Schedule { .. })));
    }
}

#[test]
fn a_schedule_that_a_machine_cannot_carry_out_is_refused_with_the_reason() {
    let cpu: Cpu = "x86-64 +ssse3 +avx2 +avx512f +avx512bw +avx512dq +avx512vl".parse().unwrap();
    let check = |text: &str| {
        let columns = if text.contains("ntile=1") { Columns::One } else { Columns::Many };
        let error = text.parse::<Schedule>().unwrap().check(&KernelSpec { k: 2560, columns }, &cpu).unwrap_err();
        assert!(!error.to_string().contains('\n'), "{error}");
        error
    };
    for text in [
        "mad/avx512 layout=rows4x32 multiply=pairs unroll=1 ntile=1",
        "mad/avx2 layout=rows4x16 multiply=pairs unroll=1 ntile=1",
        "tl1/avx2 layout=lanes48 unroll=8 ntile=1",
    ] {
        assert!(matches!(check(text), ScheduleError::VectorWidth { .. }), "{text}");
    }
    for (text, kind) in [
        ("mad/avx2 layout=rows8x64 multiply=pairs unroll=1 ntile=2", "vector"),
        ("mad/avx512 layout=rows4x64 multiply=pairs unroll=1 ntile=8", "vector"),
    ] {
        match check(text) {
            ScheduleError::Registers { kind: found, needed, available, .. } => {
                assert!(found == kind && needed > available, "{text}: {found} {needed} of {available}");
            }
            other => panic!("{text}: {other}"),
        }
    }
    for text in [
        "mad/clif128 layout=rows4x64 multiply=pairs unroll=1 ntile=1 prefetch=64",
        "mad/avx2 layout=rows4x64 multiply=pairs unroll=1 ntile=1 prefetch=100",
    ] {
        assert!(matches!(check(text), ScheduleError::Parameter { name: "prefetch", .. }), "{text}");
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
    // Lanes flush after 16 groups, 64 pairs, whatever is unrolled.
    for unroll in [1, 2, 4] {
        let text = format!("mad/clif128 layout=lanes8x4 multiply=pairs unroll={unroll} ntile=1");
        compile(&[(spec, text.parse().unwrap())], &host()).unwrap();
    }
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
        "vlut/clif128 layout=lanes16x4 multiply=pairs unroll=8 ntile=8",
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
        ("tl2", "tl2/clif128 layout=threes16 unroll=1 ntile=1"),
    ] {
        insta::assert_snapshot!(name, ternion_compiler::clif_text(&spec, &text.parse().unwrap(), &cpu).unwrap());
    }
}

#[test]
fn the_machine_code_of_the_smallest_wide_kernels_is_what_was_reviewed() {
    let avx2: Cpu = "x86-64 +ssse3 +avx2".parse().unwrap();
    let avx512: Cpu = "x86-64 +avx512f +avx512bw +avx512dq +avx512vl +avx512vnni".parse().unwrap();
    let vbmi = avx512.with(Feature::Avx512vbmi).with(Feature::Ssse3);
    let avx512 = avx512.with(Feature::Ssse3);
    let vnni = avx2.with(Feature::AvxVnni);
    let spec = KernelSpec { k: 1024, columns: Columns::One };
    for (name, cpu, text) in [
        ("mad_avx2", avx2, "mad/avx2 layout=rows4x32 multiply=pairs unroll=1 ntile=1"),
        ("mad_avx512", avx512, "mad/avx512 layout=rows4x64 multiply=dot unroll=1 ntile=1 prefetch=1024"),
        ("mad_lanes_avx2", avx2, "mad/avx2 layout=lanes8x4 multiply=pairs unroll=1 ntile=1"),
        ("mad_lanes_avx512", avx512, "mad/avx512 layout=lanes16x4 multiply=dot unroll=1 ntile=1"),
        ("t5_avx512", vbmi, "t5/avx512 layout=fives16 multiply=dot unroll=1 ntile=1"),
        ("tl1_avx2", avx2, "tl1/avx2 layout=lanes32 unroll=2 ntile=1"),
        ("tl2_avx2", avx2, "tl2/avx2 layout=threes32 unroll=1 ntile=1"),
        ("tl2_avx512", avx512, "tl2/avx512 layout=threes64 unroll=1 ntile=1"),
        ("tl2_avx512_vbmi", vbmi, "tl2/avx512 layout=threes64 unroll=1 ntile=1 prefetch=1024"),
        // Assembled only: few machines that test this have it.
        ("mad_avxvnni", vnni, "mad/avx2 layout=rows4x32 multiply=dot unroll=1 ntile=1"),
        ("mad_lanes_avxvnni", vnni, "mad/avx2 layout=lanes8x4 multiply=dot unroll=1 ntile=1"),
    ] {
        let text = ternion_compiler::asm_text(&spec, &text.parse().unwrap(), &cpu).unwrap();
        insta::assert_snapshot!(name, text.expect("the CPU is an x86-64"));
    }
}
