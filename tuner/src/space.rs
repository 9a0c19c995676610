//! What there is to search: every schedule that is legal for a kernel, as [`Schedule::check`] says.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use ternion_compiler::{Columns, Cpu, Family, KernelSpec, Layout, MachineKind, Multiply, Schedule};

use crate::request::{Budget, Effort};

const UNROLLS: [u8; 8] = [1, 2, 4, 6, 8, 12, 16, 32];
const NTILES: [u8; 10] = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32];
const PREFETCHES: [u16; 4] = [0, 1024, 4096, 8192];

/// The schedules for `spec` on `cpu` that a search with this budget chooses from. Only an exhaustive one has time for the
/// whole space: each check assigns registers, and all of them together take longer than an ordinary budget.
pub(crate) fn legal(spec: &KernelSpec, cpu: &Cpu, budget: &Budget) -> Vec<Schedule> {
    if budget.effort != Effort::Exhaustive {
        return Schedule::candidates(spec, cpu);
    }
    // Five classes of columns share a spec, and shapes with equal rows do.
    static KNOWN: Mutex<BTreeMap<(KernelSpec, Cpu), Vec<Schedule>>> = Mutex::new(BTreeMap::new());
    let known = || KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(schedules) = known().get(&(*spec, *cpu)) {
        return schedules.clone();
    }
    let schedules = whole(spec, cpu);
    known().insert((*spec, *cpu), schedules.clone());
    schedules
}

fn whole(spec: &KernelSpec, cpu: &Cpu) -> Vec<Schedule> {
    let mut schedules = Schedule::candidates(spec, cpu);
    let combinations = combinations(spec);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let part = combinations.len().div_ceil(threads).max(1);
    let legal = |part: &[Schedule]| -> Vec<Schedule> {
        part.iter().filter(|schedule| schedule.check(spec, cpu).is_ok()).copied().collect()
    };
    std::thread::scope(|scope| {
        let parts: Vec<_> = combinations.chunks(part).map(|part| scope.spawn(move || legal(part))).collect();
        // A checker that panics has nothing legal to offer.
        schedules.extend(parts.into_iter().flat_map(|part| part.join().unwrap_or_default()));
    });
    schedules.sort_unstable();
    schedules.dedup();
    schedules
}

/// Every value of every parameter, legal or not.
fn combinations(spec: &KernelSpec) -> Vec<Schedule> {
    // One column is one column, and where weights are used again and again they need not be asked for.
    let (ntiles, prefetches): (&[u8], &[u16]) = match spec.columns {
        Columns::One => (&NTILES[..1], &PREFETCHES),
        Columns::Many => (&NTILES, &PREFETCHES[..1]),
        // Their candidates are all there is to vary.
        Columns::ListedRows | Columns::ListedColumns => return Vec::new(),
    };
    let mut all = Vec::new();
    for family in Family::dense() {
        for machine in MachineKind::ALL {
            for layout in layouts() {
                for multiply in [Multiply::Pairs, Multiply::Dot] {
                    for unroll in UNROLLS {
                        for ntile in ntiles.iter().copied() {
                            all.extend(prefetches.iter().map(|prefetch| Schedule {
                                family,
                                machine,
                                layout,
                                multiply,
                                unroll,
                                ntile,
                                prefetch: *prefetch,
                            }));
                        }
                    }
                }
            }
        }
    }
    all
}

fn layouts() -> impl Iterator<Item = Layout> {
    let rows = [4u8, 8].into_iter().flat_map(|rows| [16, 32, 64].map(|chunk| Layout::Rows { rows, chunk }));
    let lanes = [4u8, 8, 12, 16, 24, 32, 48, 64].into_iter().map(|rows| Layout::Lanes { rows, group: 4 });
    let bytes = [16u8, 32, 48, 64, 128].into_iter().map(|rows| Layout::Lanes { rows, group: 1 });
    let fives = [4u8, 8, 12, 16, 24, 32, 48, 64].into_iter().map(|rows| Layout::Fives { rows });
    rows.chain(lanes).chain(bytes).chain(fives)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Class;
    use std::time::Duration;

    #[test]
    fn the_whole_space_is_legal_has_no_doubles_and_holds_the_candidates() {
        let cpu: Cpu = "x86-64 +ssse3".parse().unwrap();
        for class in [Class::One, Class::Chunk] {
            let spec = class.spec(256);
            let space = legal(&spec, &cpu, &Budget::EXHAUSTIVE);
            assert!(space.iter().all(|schedule| schedule.check(&spec, &cpu).is_ok()));
            assert!(space.windows(2).all(|pair| pair[0] < pair[1]));
            let candidates = Schedule::candidates(&spec, &cpu);
            assert!(space.len() > 2 * candidates.len(), "{}", space.len());
            assert!(candidates.iter().all(|candidate| space.contains(candidate)));
            assert_eq!(legal(&spec, &cpu, &Budget::search(Duration::from_secs(20))), candidates);
        }
    }
}
