//! Kernels drawn at random, on data drawn at random, between guard pages: every result is the reference's, and not one
//! byte beyond its buffers is read or written.
//!
//! Beyond a guard a kernel faults, which ends the process. So the cases run in a child of the test, which says what it is
//! about to run; if it dies, its last words name the case. `TERNION_TEST_SEED=<number>` draws other cases.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use ternion_compiler::harness::{self, Data, Placement, Problem};
use ternion_compiler::{Columns, Cpu, Family, Feature, KernelSpec, Layout, Schedule, compile_each};
use ternion_kernels_ref::SplitMix64;

/// Set in the child.
const CHILD: &str = "TERNION_TEST_GUARDED_CHILD";
const SEED: &str = "TERNION_TEST_SEED";

/// Kernels are drawn and compiled in batches, each for one set of CPU features.
const BATCHES: usize = 12;
const KERNELS_PER_BATCH: usize = 60;
/// Shapes and data that each kernel is run on.
const CASES_PER_KERNEL: usize = 3;

#[test]
fn random_kernels_agree_with_the_reference_and_stay_within_their_buffers() {
    if std::env::var_os(CHILD).is_some() {
        return run_cases();
    }
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "random_kernels_agree_with_the_reference_and_stay_within_their_buffers", "--nocapture"])
        .env(CHILD, "1")
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut case, mut other) = (String::new(), Vec::new());
    for line in BufReader::new(child.stderr.take().unwrap()).lines() {
        let line = line.unwrap();
        match line.strip_prefix("case ") {
            Some(text) => case = text.to_owned(),
            None => other.push(line),
        }
    }
    let status = child.wait().unwrap();
    assert!(status.success(), "{status} in case: {case}\n{}", other.join("\n"));
    println!("{}", other.join("\n"));
}

/// Says something that is heard even if the next step ends the process.
fn say(line: &str) {
    std::io::stderr().write_all(format!("{line}\n").as_bytes()).unwrap();
}

fn run_cases() {
    let seed = std::env::var(SEED).map_or(1, |text| text.parse().expect("TERNION_TEST_SEED is a number"));
    let mut random = SplitMix64::new(seed);
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    let mut total = 0;
    for batch in 0..BATCHES {
        let cpu = lowered(&mut random, batch);
        let jobs: Vec<_> = (0..KERNELS_PER_BATCH).map(|_| job(&mut random, &cpu)).collect();
        say(&format!("case checks before first use, batch {batch}, seed {seed}, {cpu}"));
        for (kernel, (spec, schedule)) in compile_each(&jobs, &cpu).into_iter().zip(jobs) {
            let kernel = kernel.unwrap_or_else(|error| panic!("{cpu}: {error}"));
            for _ in 0..CASES_PER_KERNEL {
                let n = if random.below(4) == 0 { 1 + random.below(40) } else { 1 + random.below(9) };
                let m = rows(&mut random);
                let data = random.of(&Data::ALL);
                let placement = random.of(&[Placement::BeforeGuard, Placement::AfterGuard, Placement::Unaligned]);
                let problem = match spec.columns {
                    Columns::One | Columns::Many => Problem::new(data, m, spec.k, n, random.next_u64()),
                    Columns::ListedRows => Problem::new(data, m, spec.k, 1, random.next_u64()),
                    // A record is a column.
                    Columns::ListedColumns => Problem::new(data, spec.k, m, 1, random.next_u64()),
                };
                let case = format!("{schedule}; {spec}; {cpu}; {problem}; placement={placement}");
                say(&format!("case {case}"));
                harness::check(&kernel, &problem, placement).unwrap_or_else(|fault| panic!("{case}: {fault}"));
                total += 1;
                let family = format!("{}/{}", schedule.family, schedule.machine);
                for what in [family, format!("data={data}"), format!("placement={placement}")] {
                    *counts.entry(what).or_default() += 1;
                }
            }
        }
    }
    let counts: Vec<_> = counts.into_iter().map(|(what, count)| format!("{what}: {count}")).collect();
    say(&format!("{total} cases with seed {seed}: {}", counts.join(", ")));
    assert!(total >= 2000);
    for family in Family::ALL {
        assert!(counts.iter().any(|count| count.starts_with(&format!("{family}/"))), "no case of {family}");
    }
}

/// The host, in every other batch without some of its features: the stronger ones go first, so that the set is one that a
/// CPU could have.
fn lowered(random: &mut SplitMix64, batch: usize) -> Cpu {
    let mut cpu = Cpu::host().expect("tests run where ternion emits code");
    if batch % 2 == 1 {
        let gone = random.below(Feature::ALL.len());
        for feature in Feature::ALL.iter().rev().take(gone) {
            cpu = cpu.without(*feature);
        }
    }
    cpu
}

/// A kernel: a candidate, half of the time changed at random into another legal schedule.
fn job(random: &mut SplitMix64, cpu: &Cpu) -> (KernelSpec, Schedule) {
    let columns = random.of(&[
        Columns::One,
        Columns::One,
        Columns::Many,
        Columns::Many,
        Columns::ListedRows,
        Columns::ListedColumns,
    ]);
    let spec = KernelSpec { k: row_length(random), columns };
    let candidate = random.of(&Schedule::candidates(&spec, cpu));
    let rows = random.of(&[4, 8]);
    let changed = Schedule {
        layout: match candidate.layout {
            Layout::Rows { rows: 4.., .. } => Layout::Rows { rows, chunk: random.of(&[16, 32, 64]) },
            Layout::Lanes { group: 1, .. } => Layout::Lanes { rows: 16 * (1 + random.below(4)) as u8, group: 1 },
            Layout::Lanes { group, .. } => Layout::Lanes { rows: 4 * (1 + random.below(8)) as u8, group },
            Layout::Threes { .. } => Layout::Threes { rows: 16 * (1 + random.below(8)) as u8 },
            Layout::Fives { .. } => Layout::Fives { rows: 4 * (1 + random.below(8)) as u8 },
            other => other,
        },
        unroll: random.of(&[1, 2, 4, 6, 8, 10, 12, 14, 16, 18]),
        ntile: if candidate.family == Family::Vlut { candidate.ntile } else { 1 + random.below(12) as u8 },
        ..candidate
    };
    let change = random.below(2) == 0 && changed.check(&spec, cpu).is_ok();
    (spec, if change { changed } else { candidate })
}

/// Row lengths: short ones, ones next to a whole number of chunks, long ones; multiples of 4 as models have them, and
/// now and then not.
fn row_length(random: &mut SplitMix64) -> usize {
    let k = match random.below(4) {
        0 => 4 * (1 + random.below(32)),
        1 => 256 * (1 + random.below(6)) + random.of(&[0, 4]),
        2 => (256 * (1 + random.below(6))) - 4 * random.below(3),
        _ => 4 * (1 + random.below(700)),
    };
    if random.below(8) == 0 { k - random.below(4) } else { k }
}

fn rows(random: &mut SplitMix64) -> usize {
    1 + if random.below(4) == 0 { random.below(140) } else { random.below(30) }
}
