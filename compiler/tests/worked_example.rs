//! The worked example of the book's chapter "Add a kernel family": the chapter includes this file, and what it says of it
//! is tested here.

// ANCHOR: family
use ternion_compiler::emit::{Rules, for_each_tile};
use ternion_compiler::machine::{Machine, Vector, advance, repeat};
use ternion_compiler::{
    ActivationFormat, Columns, Cpu, Family, KernelSpec, Layout, MachineKind, Multiply, Schedule, ScheduleError, compile,
};

/// `late`: multiply-adds to 16 bits, as long as they hold the sums, and only then to 32.
struct Late;

impl Rules for Late {
    fn name(&self) -> &'static str {
        "late"
    }

    fn activation_format(&self) -> ActivationFormat {
        ActivationFormat::Planes
    }

    // ANCHOR: check
    fn check(&self, schedule: &Schedule, _: &Cpu) -> Result<(), ScheduleError> {
        let Layout::Lanes { rows: rows @ 1..=64, group: 4 } = schedule.layout else {
            return Err(schedule.layout_error("lanes<R>x4 of up to 64 rows"));
        };
        schedule.check_width(4 * usize::from(rows))?;
        // Four vectors of codes in a group; each adds two products of at most 2·127 to a 16-bit lane.
        let vectors = 4 * usize::from(schedule.unroll);
        let bound = vectors * 2 * 2 * 127;
        match schedule.unroll {
            0 => Err(ScheduleError::Parameter { name: "unroll", value: 0, expected: "1 group or more" }),
            _ if bound > i16::MAX as usize => Err(ScheduleError::Overflow { vectors, bound }),
            _ => Ok(()),
        }
    }
    // ANCHOR_END: check

    fn layouts(&self, machine: MachineKind) -> Vec<Layout> {
        let lanes = (machine.vector_bytes() / 4) as u8;
        [lanes, 2 * lanes].map(|rows| Layout::Lanes { rows, group: 4 }).to_vec()
    }

    fn unrolls(&self) -> Vec<u8> {
        (1..=16).collect()
    }

    fn ntiles(&self, _: MachineKind) -> Vec<u8> {
        vec![1, 2, 4]
    }

    // ANCHOR: emit
    fn emit(&self, m: &mut dyn Machine, spec: &KernelSpec, schedule: &Schedule) {
        let (width, late) = (m.vector_bytes(), usize::from(schedule.unroll));
        // A group is four bytes of every row of a tile: the 32-bit lanes of some vectors.
        let group_bytes = 4 * schedule.layout.tile_rows();
        let (vectors, groups) = (group_bytes / width, schedule.layout.row_bytes(spec.k) / 4);
        let (plane, column) = (spec.k.div_ceil(4).next_multiple_of(64), self.activation_format().bytes(spec.k));
        for_each_tile(m, spec, schedule, |m, tile| {
            let zero = m.zero();
            // 32-bit sums, `[columns, vectors]`.
            let totals: Vec<_> = (0..tile.columns * vectors).map(|_| m.vector_variable(zero)).collect();
            let (weights, activations) = (m.int_variable(tile.weights), m.int_variable(tile.activations));
            let turns = |m: &mut dyn Machine, times: usize, count: usize| {
                repeat(m, times, |m| {
                    let (bytes, values) = (m.get_int(weights), m.get_int(activations));
                    for (at, total) in totals.iter().enumerate() {
                        let (c, v) = (at / vectors, at % vectors);
                        let mut sum: Option<Vector> = None;
                        for (group, place) in (0..count).flat_map(|group| (0..4).map(move |place| (group, place))) {
                            let codes = m.load(bytes, (group * group_bytes + v * width) as i32);
                            let codes = m.shift_right16(codes, 2 * place as u8);
                            let mask = m.splat8(3);
                            let codes = m.and(codes, mask);
                            let values = m.load_splat32(values, (c * column + place * plane + 4 * group) as i32);
                            let pairs = m.multiply_add_pairs(codes, values);
                            sum = Some(sum.map_or(pairs, |sum| m.add16(sum, pairs)));
                        }
                        let Some(sum) = sum else { continue };
                        let (old, wide) = (m.get(*total), m.sum_pairs16(sum));
                        let new = m.add32(old, wide);
                        m.set(*total, new);
                    }
                    advance(m, weights, (count * group_bytes) as i32);
                    advance(m, activations, 4 * count as i32);
                });
            };
            turns(m, groups / late, late);
            turns(m, (groups % late).min(1), groups % late);
            // Codes are trits + 1, so the sum of the activations is in every total.
            tile.for_each_column(m, |m, c, out| {
                let sum = m.load_splat32(tile.sums, 4 * c as i32);
                for v in 0..vectors {
                    let total = m.get(totals[c * vectors + v]);
                    let result = m.sub32(total, sum);
                    m.store(out, (v * width) as i32, result);
                }
            });
        });
    }
    // ANCHOR_END: emit
}

/// The family.
fn late() -> Family {
    // SAFETY: the code reads whole groups of its tiles' weights, whole planes of activations and a sum for each column,
    // and writes the rows of its tiles in every column; no byte of the weights is an address.
    unsafe { Family::of(&Late) }
}
// ANCHOR_END: family

// ANCHOR: test
use ternion_compiler::harness::{Data, Placement, Problem, check};

#[test]
fn every_schedule_of_the_space_computes_the_right_thing() {
    let cpu = Cpu::host().expect("tests run where ternion emits code");
    for (columns, n) in [(Columns::One, 1), (Columns::Many, 5)] {
        let spec = KernelSpec { k: 204, columns };
        let jobs: Vec<_> = Schedule::space_of(&[late()], &spec, &cpu).into_iter().map(|s| (spec, s)).collect();
        assert!(jobs.iter().any(|(_, schedule)| schedule.machine == MachineKind::Clif128));
        // Compiling checks every kernel once; this goes on to data that is chosen to break it.
        let kernels = compile(&jobs, &cpu).expect("right kernels");
        for data in Data::ALL {
            let problem = Problem::new(data, 70, spec.k, n, 7);
            for kernel in &kernels {
                assert_eq!(check(kernel, &problem, Placement::Unaligned), Ok(()), "{} on {problem}", kernel.schedule());
            }
        }
    }
}

#[test]
fn sums_that_16_bits_cannot_hold_are_refused() {
    let cpu = Cpu::host().expect("tests run where ternion emits code");
    let spec = KernelSpec { k: 204, columns: Columns::One };
    let schedule = |unroll| Schedule {
        family: late(),
        machine: MachineKind::Clif128,
        layout: Layout::Lanes { rows: 4, group: 4 },
        multiply: Multiply::Pairs,
        unroll,
        ntile: 1,
        prefetch: 0,
    };
    assert_eq!(schedule(16).check(&spec, &cpu), Ok(()));
    let refusal = schedule(17).check(&spec, &cpu).map_err(|error| error.to_string());
    assert!(refusal.as_ref().is_err_and(|error| error.contains("34544, more than 16 bits hold")), "{refusal:?}");
}
// ANCHOR_END: test

#[test]
fn the_chapter_includes_what_is_tested_here() {
    let chapter = include_str!("../../docs/src/add-a-kernel-family.md");
    let source = include_str!("worked_example.rs");
    let parts: Vec<_> = chapter.lines().filter_map(|line| line.strip_prefix("{{#include ")).collect();
    assert!(!parts.is_empty(), "the chapter includes nothing");
    for part in parts {
        let anchor = part.trim_end_matches("}}").strip_prefix("../../compiler/tests/worked_example.rs:");
        let anchor = anchor.unwrap_or_else(|| panic!("{part}: not this file"));
        for mark in ["ANCHOR", "ANCHOR_END"] {
            let line = format!("// {mark}: {anchor}");
            assert!(source.lines().any(|other| other.trim() == line), "no line `{line}`");
        }
    }
}
