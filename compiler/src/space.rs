//! Every legal schedule.

use crate::{Columns, Cpu, Family, KernelSpec, MachineKind, Multiply, Schedule};

/// How far ahead in memory a schedule may ask for weights: none, or so many bytes.
const PREFETCH_BYTES: [u16; 7] = [0, 256, 512, 1024, 2048, 4096, 8192];

/// How many places of a list ahead.
const PREFETCH_PLACES: [u16; 5] = [0, 8, 16, 32, 64];

impl Schedule {
    /// Every legal schedule for `spec` on `cpu`: family × machine × layout × multiply × unroll × ntile × prefetch, in
    /// this order. Prefetch distances are powers of two, and everything else takes all of its values.
    ///
    /// Some thousand for one column, and more than ten thousand for many; [`candidates`](Self::candidates) are the few among
    /// them that are worth a race at every start.
    #[must_use]
    pub fn space(spec: &KernelSpec, cpu: &Cpu) -> Vec<Self> {
        Self::space_of(&Family::ALL, spec, cpu)
    }

    /// As [`space`](Self::space), but of `families` only, which need not be the compiler's own.
    #[must_use]
    pub fn space_of(families: &[Family], spec: &KernelSpec, cpu: &Cpu) -> Vec<Self> {
        let mut space = Vec::new();
        for (family, machine) in families.iter().flat_map(|family| MachineKind::ALL.map(|machine| (*family, machine))) {
            let rules = family.rules();
            let multiplies: &[_] =
                if family.multiplies() { &[Multiply::Pairs, Multiply::Dot] } else { &[Multiply::Pairs] };
            let ntiles = if spec.columns == Columns::Many { rules.ntiles(machine) } else { vec![1] };
            let distances: &[u16] = match (rules.prefetches(), family.list()) {
                (false, _) => &[0],
                (true, None) => &PREFETCH_BYTES,
                (true, Some(_)) => &PREFETCH_PLACES,
            };
            for layout in rules.layouts(machine) {
                for multiply in multiplies {
                    for unroll in rules.unrolls() {
                        for ntile in &ntiles {
                            let (multiply, ntile) = (*multiply, *ntile);
                            let legal = |prefetch| {
                                let schedule = Self { family, machine, layout, multiply, unroll, ntile, prefetch };
                                schedule.check(spec, cpu).is_ok().then_some(schedule)
                            };
                            // Without any prefetch, or else not at all.
                            let Some(first) = legal(0) else { continue };
                            space.push(first);
                            space.extend(distances[1..].iter().copied().filter_map(legal));
                        }
                    }
                }
            }
        }
        space
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::compile::in_parallel;
    use crate::machine::{Machine, wide};
    use crate::{Feature, ScheduleError};

    #[test]
    fn the_space_is_legal_has_no_doubles_and_holds_every_candidate() {
        let cpu = Cpu::host().expect("tests run where ternion emits code");
        for columns in [Columns::One, Columns::Many, Columns::ListedRows, Columns::ListedColumns] {
            let spec = KernelSpec { k: 132, columns };
            let space = Schedule::space(&spec, &cpu);
            let set: BTreeSet<_> = space.iter().copied().collect();
            assert_eq!(set.len(), space.len());
            for schedule in &space {
                assert_eq!(schedule.check(&spec, &cpu), Ok(()), "{schedule}");
            }
            for candidate in Schedule::candidates(&spec, &cpu) {
                assert!(set.contains(&candidate), "{candidate}");
            }
        }
    }

    /// Everything that its family could be asked for, legal or not.
    fn combinations(columns: Columns) -> Vec<Schedule> {
        let mut all = Vec::new();
        for (family, machine) in Family::ALL.into_iter().flat_map(|family| MachineKind::ALL.map(|m| (family, m))) {
            let rules = family.rules();
            let ntiles = if columns == Columns::Many { rules.ntiles(machine) } else { vec![1] };
            let pairs = family.multiplies().then_some(Multiply::Dot);
            for layout in rules.layouts(machine) {
                for multiply in [Multiply::Pairs].into_iter().chain(pairs) {
                    for (unroll, ntile) in rules.unrolls().into_iter().flat_map(|u| ntiles.iter().map(move |n| (u, *n)))
                    {
                        all.push(Schedule { family, machine, layout, multiply, unroll, ntile, prefetch: 0 });
                    }
                }
            }
        }
        all
    }

    #[test]
    fn families_know_how_many_registers_they_need() {
        let vbmi: Cpu = "x86-64 +ssse3 +avx2 +avx512f +avx512dq +avx512bw +avx512vl +avx512vbmi +avx512vnni"
            .parse()
            .expect("a CPU");
        let cpus = [vbmi, vbmi.without(Feature::Avx512vbmi)];
        let (mut exact, mut refused) = (0, 0);
        for columns in [Columns::One, Columns::Many, Columns::ListedRows, Columns::ListedColumns] {
            let all = combinations(columns);
            // In full for rows that fill all loops; for others a few of each.
            for (k, step, cpu) in [(1028, 1, &cpus[0]), (4, 7, &cpus[0]), (300, 11, &cpus[1]), (6912, 13, &cpus[0])] {
                let spec = KernelSpec { k, columns };
                let some: Vec<_> = all.iter().step_by(step).copied().collect();
                let outcomes = in_parallel(&some, |schedule| {
                    let target = wide::Target::new(schedule.machine, cpu)?;
                    let needed = match schedule.check(&spec, cpu) {
                        Err(ScheduleError::Registers { needed, .. }) => needed,
                        Ok(()) => schedule.family.rules().registers(schedule).expect("our families know"),
                        Err(_) => return None,
                    };
                    // Sums far beyond all registers say nothing new and take long to assign.
                    if needed > 48 {
                        return None;
                    }
                    let emit = |m: &mut dyn Machine| crate::emit::emit(m, &spec, schedule);
                    let found = wide::registers(target, emit);
                    let fits = needed <= target.vector_registers();
                    assert!(!fits || wide::fits(target, emit).is_ok(), "{schedule}, {spec}, {cpu}");
                    Some((*schedule, needed, found, fits))
                });
                for (schedule, needed, found, fits) in outcomes.into_iter().flatten() {
                    assert!(
                        if k < 1028 { found <= needed } else { found == needed },
                        "{schedule}, {spec}: {found}, not {needed}"
                    );
                    exact += usize::from(found == needed);
                    refused += usize::from(!fits);
                }
            }
        }
        assert!(exact > 1000 && refused > 100, "{exact} {refused}");
    }

    #[test]
    fn the_largest_space_is_listed_in_little_time() {
        let cpu: Cpu = "x86-64 +ssse3 +avx2 +avx512f +avx512dq +avx512bw +avx512vl +avx512vbmi +avx512vnni"
            .parse()
            .expect("a CPU");
        for columns in [Columns::One, Columns::Many] {
            let spec = KernelSpec { k: 2560, columns };
            let start = std::time::Instant::now();
            let space = Schedule::space(&spec, &cpu);
            println!("{spec}: {} schedules in {:?}", space.len(), start.elapsed());
            assert!(space.len() > 1000);
        }
    }
}
