//! `t5`: five trits in a byte, 1.6 bits per weight, for when memory is the wall.
//!
//! A byte is `x = c₀ + 3c₁ + 9c₂ + 27c₃ + 81c₄`. As unsigned bytes that wrap, `min(x, x − 81)` takes 81 away if it can;
//! twice, and what is left is `r = x − 81c₄ ≤ 80`. Then 81c₄ is 0, 81 or 162, whose bits 6 and 7 are c₄, and a table of
//! 81 entries turns r into the other four codes of two bits each, which go the way of `mad`. A byte over 242 gives some
//! codes or other.

use super::{Rules, mad_lanes};
use crate::machine::{Machine, Vector};
use crate::{ActivationFormat, Cpu, Feature, KernelSpec, Layout, MachineKind, Schedule, ScheduleError};

/// The family.
pub(super) struct T5;

impl Rules for T5 {
    fn name(&self) -> &'static str {
        "t5"
    }

    fn multiplies(&self) -> bool {
        true
    }

    fn activation_format(&self) -> ActivationFormat {
        ActivationFormat::FivePlanes
    }

    fn check(&self, schedule: &Schedule, cpu: &Cpu) -> Result<(), ScheduleError> {
        let Layout::Fives { rows: rows @ 1..=64 } = schedule.layout else {
            return Err(schedule.layout_error("fives4 to fives64"));
        };
        schedule.check_width(4 * usize::from(rows))?;
        if schedule.machine != MachineKind::Avx512 {
            Schedule::check_lookup(cpu, "t5")?;
        } else if !cpu.has(Feature::Avx512vbmi) {
            let needs = Feature::Avx512vbmi.name();
            return Err(ScheduleError::MissingFeature { what: "t5", needs, cpu: *cpu });
        }
        schedule.check_multiply(5 * mad_lanes::max_pair_groups(5), cpu)
    }

    fn layouts(&self, machine: MachineKind) -> Vec<Layout> {
        mad_lanes::heights(machine).map(|rows| Layout::Fives { rows }).collect()
    }

    fn unrolls(&self) -> Vec<u8> {
        vec![1, 2, 4]
    }

    fn ntiles(&self, _: MachineKind) -> Vec<u8> {
        (1..=32).collect()
    }

    fn least_registers(&self, schedule: &Schedule) -> usize {
        mad_lanes::least_registers(schedule)
    }

    fn emit(&self, m: &mut dyn Machine, spec: &KernelSpec, schedule: &Schedule) {
        mad_lanes::emit(m, spec, schedule);
    }
}

/// 81 times the fifth code of every byte, and the other four codes as [`mad`](super::mad) packs them.
pub(super) fn split(m: &mut dyn Machine, bytes: Vector) -> [Vector; 2] {
    let power = m.splat8(81);
    let less = m.sub8(bytes, power);
    let once = m.min8(bytes, less);
    let less = m.sub8(once, power);
    let rest = m.min8(once, less);
    let fifth = m.sub8(bytes, rest);
    let four = m.lookup128(&FOUR_CODES, rest);
    [fifth, four]
}

/// The code of 81 times a code.
pub(super) fn unscale_code(m: &mut dyn Machine, fifth: Vector) -> Vector {
    let shifted = m.shift_right16(fifth, 6);
    let mask = m.splat8(3);
    m.and(shifted, mask)
}

/// The 32-bit sums of 81 times as much. Modulo 2³² a division without remainder is a multiplication.
pub(super) fn unscale_sum(m: &mut dyn Machine, sum: Vector) -> Vector {
    let inverse = m.splat32(INVERSE_OF_81);
    m.multiply32(sum, inverse)
}

/// What 81 must be multiplied with to give 1, modulo 2³²: each step of Newton's method doubles the bits that are right.
const INVERSE_OF_81: i32 = {
    let mut inverse = 81_i32;
    let mut step = 0;
    while step < 5 {
        inverse = inverse.wrapping_mul(2_i32.wrapping_sub(inverse.wrapping_mul(81)));
        step += 1;
    }
    assert!(inverse.wrapping_mul(81) == 1);
    inverse
};

/// The codes `c₀ + 4c₁ + 16c₂ + 64c₃` of `c₀ + 3c₁ + 9c₂ + 27c₃`.
const FOUR_CODES: [u8; 128] = {
    let mut table = [0; 128];
    let mut rest = 0;
    while rest < 81 {
        table[rest] = (rest % 3 + rest / 3 % 3 * 4 + rest / 9 % 3 * 16 + rest / 27 * 64) as u8;
        rest += 1;
    }
    table
};
