//! What the harness is there to find: kernels that are wrong on purpose.

use std::process::Command;

use super::*;
use crate::compile::{compile_anything, compile_unchecked};
use crate::emit::vlut;
use crate::{Cpu, KernelSpec, Schedule, compile};

fn host() -> Cpu {
    Cpu::host().expect("tests run where ternion emits code")
}

fn schedule(text: &str) -> Schedule {
    text.parse().unwrap()
}

const SPEC: KernelSpec = KernelSpec { k: 4096, columns: Columns::One };

/// Schedules of 16-bit (`mad`) and 8-bit (`tl1`) sums: the last whose bound fits, and those just beyond.
const BOUNDS: [(&str, bool); 7] = [
    ("mad/clif128 layout=rows4x16 multiply=pairs unroll=16 ntile=1", true),
    ("mad/clif128 layout=rows4x16 multiply=pairs unroll=17 ntile=1", false),
    ("mad/clif128 layout=rows4x64 multiply=pairs unroll=8 ntile=1", false),
    ("t5/clif128 layout=fives8 multiply=pairs unroll=4 ntile=1", true),
    ("tl1/clif128 layout=lanes16 unroll=18 ntile=1", true),
    ("tl1/clif128 layout=lanes16 unroll=19 ntile=1", false),
    ("tl1/clif128 layout=lanes16 unroll=20 ntile=1", false),
];

#[test]
fn sums_at_their_bound_are_right_and_beyond_it_the_harness_says_so() {
    for (text, fits) in BOUNDS {
        let kernel = compile_unchecked(SPEC, schedule(text), &host());
        let outcome = |data| check(&kernel, &Problem::new(data, 3, SPEC.k, 2, 1), Placement::Heap);
        for data in [Data::SameSign, Data::FullParts, Data::Alternating, Data::Random] {
            let outcome = outcome(data);
            match (fits, data) {
                (true, _) => assert_eq!(outcome, Ok(()), "{text}, {data}"),
                (false, Data::SameSign) => assert!(matches!(outcome, Err(Fault::Mismatch(_))), "{text}: {outcome:?}"),
                (false, _) => {}
            }
        }
        // Nothing but the size of the sums is wrong with it.
        assert_eq!(outcome(Data::OneHot), Ok(()), "{text}");
        let before_use = crate::check::check_each(&[kernel]);
        assert_eq!(before_use[0].is_ok(), fits, "the check before first use, {text}");
    }
}

#[test]
fn sums_of_more_lookups_than_vlut_adds_up_in_16_bits_overflow() {
    let spec = KernelSpec { k: 4096, columns: Columns::Many };
    let schedule = schedule("vlut/clif128 layout=lanes16x4 unroll=8 ntile=8");
    let outcome = |groups| {
        let kernel = compile_anything(spec, schedule, &host(), |m| vlut::emit_with(m, &spec, &schedule, groups));
        check(&kernel, &Problem::new(Data::SameSign, 3, spec.k, 9, 1), Placement::Heap)
    };
    assert_eq!(outcome(vlut::MAX_GROUPS), Ok(()));
    assert!(matches!(outcome(2 * vlut::MAX_GROUPS), Err(Fault::Mismatch(_))));
}

#[test]
fn sums_of_listed_rows_overflow_beyond_their_bound() {
    let spec = KernelSpec { k: 4096, columns: Columns::ListedRows };
    let schedule =
        |unroll| schedule(&format!("sparse-rows/clif128 layout=rows1x64 multiply=pairs unroll={unroll} ntile=1"));
    // Which rows are listed follows from the seed: for some all of them, for some none.
    let outcomes = |unroll, data| {
        let kernel = compile_unchecked(spec, schedule(unroll), &host());
        let outcome = move |seed| check(&kernel, &Problem::new(data, 9, spec.k, 1, seed), Placement::Heap);
        (1..=8).map(outcome).collect::<Vec<_>>()
    };
    assert!(outcomes(16, Data::SameSign).iter().all(Result::is_ok));
    assert!(outcomes(17, Data::SameSign).iter().any(|outcome| matches!(outcome, Err(Fault::Mismatch(_)))));
    // Nothing but the size of the sums is wrong with it.
    assert!(outcomes(17, Data::OneHot).iter().all(Result::is_ok));
    assert!(schedule(17).check(&spec, &host()).is_err());
}

#[test]
fn what_lies_beyond_a_bound_cannot_be_compiled() {
    for (text, fits) in BOUNDS {
        let refused = schedule(text).check(&SPEC, &host());
        assert!(fits || refused.is_err(), "{text}");
        assert_eq!(compile(&[(SPEC, schedule(text))], &host()).is_err(), refused.is_err(), "{text}");
    }
    let largest = schedule("mad/clif128 layout=rows4x64 multiply=pairs unroll=4 ntile=1");
    assert_eq!(largest.check(&SPEC, &host()), Ok(()), "the largest legal sums");
}

#[test]
fn a_kernel_that_writes_too_many_rows_is_found() {
    let spec = KernelSpec { k: 4, columns: Columns::One };
    let wide = compile_unchecked(spec, schedule("tl1/clif128 layout=lanes32 unroll=2 ntile=1"), &host());
    let narrow = wide.mislabelled(spec, schedule("tl1/clif128 layout=lanes16 unroll=2 ntile=1"));
    let problem = Problem::new(Data::Random, 16, 4, 1, 2);
    assert_eq!(check(&narrow, &problem, Placement::Heap), Err(Fault::StrayWrite { offset: 64 }));
    assert_eq!(check(&wide, &problem, Placement::Heap), Ok(()));
}

#[test]
fn a_kernel_that_reads_past_its_weights_ends_the_process() {
    const CHILD: &str = "TERNION_TEST_READS_TOO_FAR";
    const ABOUT_TO: &str = "about to read too far";
    let long = compile_unchecked(
        KernelSpec { k: 512, columns: Columns::One },
        schedule("mad/clif128 layout=rows4x16 multiply=pairs unroll=1 ntile=1"),
        &host(),
    );
    if std::env::var_os(CHILD).is_some() {
        let short = long.mislabelled(KernelSpec { k: 256, columns: Columns::One }, long.schedule());
        println!("{ABOUT_TO}");
        let outcome = check(&short, &Problem::new(Data::Random, 4, 256, 1, 3), Placement::BeforeGuard);
        // Not reached; a parent that sees this ending fails.
        println!("survived: {outcome:?}");
        return;
    }
    assert_eq!(check(&long, &Problem::new(Data::Random, 4, 512, 1, 3), Placement::BeforeGuard), Ok(()));
    let name = "harness::tests::a_kernel_that_reads_past_its_weights_ends_the_process";
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains(ABOUT_TO) && !said.contains("survived") && !output.status.success(), "{said}");
}

#[test]
fn times_are_taken_with_the_clock_that_is_given() {
    let spec = KernelSpec { k: 260, columns: Columns::Many };
    let jobs = [(spec, schedule("mad/clif128 layout=rows4x16 multiply=pairs unroll=1 ntile=2"))];
    let kernel = compile(&jobs, &host()).unwrap().remove(0);
    let problem = Problem::new(Data::Random, 9, 260, 3, 4);
    let mut ticks = 0;
    let mut clock = || {
        ticks += 1;
        Duration::from_micros(ticks * ticks)
    };
    let times = check_and_time(&kernel, &problem, Placement::AfterGuard, 3, &mut clock).unwrap();
    assert_eq!(times, [3, 7, 11].map(Duration::from_micros));
}
