//! Every legal schedule.

use crate::compile::in_parallel;
use crate::machine::wide;
use crate::{Columns, Cpu, Family, KernelSpec, MachineKind, Multiply, Schedule};

/// How far ahead in memory a schedule may ask for weights: none, or so many bytes.
const PREFETCH_BYTES: [u16; 7] = [0, 256, 512, 1024, 2048, 4096, 8192];

/// How many places of a list ahead.
const PREFETCH_PLACES: [u16; 5] = [0, 8, 16, 32, 64];

impl Schedule {
    /// Every legal schedule for `spec` on `cpu`: family × machine × layout × multiply × unroll × ntile × prefetch, in
    /// this order. Prefetch distances are powers of two, and everything else takes all of its values.
    ///
    /// Some thousand for one column, and more than ten thousand for many, which take about a second to find;
    /// [`candidates`](Self::candidates) are the few among them that are worth a race at every start.
    #[must_use]
    pub fn space(spec: &KernelSpec, cpu: &Cpu) -> Vec<Self> {
        Self::space_of(&Family::ALL, spec, cpu)
    }

    /// As [`space`](Self::space), but of `families` only, which need not be the compiler's own.
    #[must_use]
    pub fn space_of(families: &[Family], spec: &KernelSpec, cpu: &Cpu) -> Vec<Self> {
        let mut kernels = Vec::new();
        for (family, machine) in families.iter().flat_map(|family| MachineKind::ALL.map(|machine| (*family, machine))) {
            let rules = family.rules();
            let multiplies: &[_] =
                if family.multiplies() { &[Multiply::Pairs, Multiply::Dot] } else { &[Multiply::Pairs] };
            let ntiles = if spec.columns == Columns::Many { rules.ntiles(machine) } else { vec![1] };
            for layout in rules.layouts(machine) {
                for multiply in multiplies {
                    for unroll in rules.unrolls() {
                        kernels.extend(ntiles.iter().map(|ntile| {
                            let (multiply, ntile) = (*multiply, *ntile);
                            Self { family, machine, layout, multiply, unroll, ntile, prefetch: 0 }
                        }));
                    }
                }
            }
        }
        kernels.retain(|kernel| {
            kernel.check_rules(spec, cpu).is_ok()
                && wide::Target::new(kernel.machine, cpu)
                    .is_none_or(|target| kernel.family.rules().least_registers(kernel) <= target.vector_registers())
        });
        // Registers are assigned in a dry run, which takes far longer than everything else; the distance of a prefetch
        // has no part in it, only whether there is one.
        let distances = in_parallel(&kernels, |kernel| kernel.distances(spec, cpu));
        let each = kernels.into_iter().zip(distances);
        each.flat_map(|(kernel, distances)| distances.into_iter().map(move |prefetch| Self { prefetch, ..kernel }))
            .collect()
    }

    /// The prefetch distances with which this schedule, legal but perhaps for its registers, is legal.
    fn distances(&self, spec: &KernelSpec, cpu: &Cpu) -> Vec<u16> {
        let known: &[u16] = if self.family.list().is_some() { &PREFETCH_PLACES } else { &PREFETCH_BYTES };
        let legal = |prefetch| Self { prefetch, ..*self }.check(spec, cpu).is_ok();
        if !legal(0) {
            return Vec::new();
        }
        let (none, some) = known.split_at(1);
        if legal(some[0]) { known.to_vec() } else { none.to_vec() }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::ScheduleError;

    #[test]
    fn the_space_is_legal_has_no_doubles_and_holds_every_candidate() {
        let cpu = Cpu::host().expect("tests run where ternion emits code");
        for columns in [Columns::One, Columns::Many, Columns::ListedRows, Columns::ListedColumns] {
            let spec = KernelSpec { k: 132, columns };
            let space = Schedule::space(&spec, &cpu);
            let set: BTreeSet<_> = space.iter().copied().collect();
            assert_eq!(set.len(), space.len());
            // A few of them in full, since all would take long.
            for schedule in space.iter().step_by(17) {
                assert_eq!(schedule.check(&spec, &cpu), Ok(()), "{schedule}");
            }
            for candidate in Schedule::candidates(&spec, &cpu) {
                assert!(set.contains(&candidate), "{candidate}");
            }
        }
    }

    #[test]
    fn what_the_cheap_bound_leaves_out_has_too_few_registers() {
        let cpu: Cpu = "x86-64 +ssse3 +avx2 +avx512f +avx512dq +avx512bw +avx512vl +avx512vbmi +avx512vnni"
            .parse()
            .expect("a CPU");
        let spec = KernelSpec { k: 132, columns: Columns::Many };
        const LINES: [&str; 5] = [
            "mad/avx2 layout=lanes32x4",
            "mad/avx512 layout=lanes64x4",
            "mad/avx2 layout=rows4x32",
            "mad/avx512 layout=rows8x64",
            "t5/avx512 layout=fives32",
        ];
        let mut left_out = 0;
        for line in LINES {
            for (multiply, ntile) in ["pairs", "dot"].into_iter().flat_map(|m| (1..=32).map(move |n| (m, n))) {
                let text = format!("{line} multiply={multiply} unroll=1 ntile={ntile}");
                let schedule: Schedule = text.parse().expect("a schedule");
                let target = wide::Target::new(schedule.machine, &cpu).expect("a wide machine");
                if schedule.family.rules().least_registers(&schedule) > target.vector_registers() {
                    left_out += 1;
                    assert!(matches!(schedule.check(&spec, &cpu), Err(ScheduleError::Registers { .. })), "{text}");
                }
            }
        }
        assert!(left_out > 200, "{left_out}");
    }
}
