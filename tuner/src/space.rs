//! What there is to search.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ternion_compiler::{Cpu, Family, KernelSpec, Schedule};

use crate::request::{Budget, Effort};

/// Budgets from which a search draws on the whole space: listing it assigns the registers of every schedule, which takes
/// about a second.
pub(crate) const WHOLE_SPACE: Duration = Duration::from_secs(10);

/// The families and the spec's columns, and its row length where that matters.
type Key = (Vec<Family>, KernelSpec, Cpu);

/// The schedules for `spec` on `cpu` that a search with this budget chooses from: all legal ones of `families`, or with
/// little time only the compiler's candidates.
///
/// What is legal for one row length is nearly always legal for another, so a search lists the space of the first one
/// that it meets and checks again what it is about to compile. An exhaustive search lists that of each.
pub(crate) fn legal(families: &[Family], spec: &KernelSpec, cpu: &Cpu, budget: &Budget) -> Arc<[Schedule]> {
    let exhaustive = budget.effort == Effort::Exhaustive;
    if !exhaustive && budget.time < WHOLE_SPACE {
        return Schedule::candidates(spec, cpu).into();
    }
    // Five classes of columns share a spec, and shapes with equal rows do.
    static KNOWN: Mutex<Vec<(Key, Arc<[Schedule]>)>> = Mutex::new(Vec::new());
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let like = |(of, other, host): &Key| {
        let same_rows = if exhaustive { other.k == spec.k } else { true };
        of == families && other.columns == spec.columns && same_rows && host == cpu
    };
    if let Some((_, schedules)) = known.iter().find(|(key, _)| like(key)) {
        return Arc::clone(schedules);
    }
    let schedules: Arc<[Schedule]> = Schedule::space_of(families, spec, cpu).into();
    known.push(((families.to_vec(), *spec, *cpu), Arc::clone(&schedules)));
    schedules
}

/// In how many parameters two schedules differ.
pub(crate) fn distance(a: &Schedule, b: &Schedule) -> usize {
    [
        a.family != b.family,
        a.machine != b.machine,
        a.layout != b.layout,
        a.multiply != b.multiply,
        a.unroll != b.unroll,
        a.ntile != b.ntile,
        a.prefetch != b.prefetch,
    ]
    .into_iter()
    .filter(|differs| *differs)
    .count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Class;

    #[test]
    fn a_search_draws_on_the_whole_space_and_a_hasty_one_on_the_candidates() {
        let cpu: Cpu = "x86-64 +ssse3".parse().unwrap();
        let long = Budget::search(Duration::from_secs(20));
        let short = Budget::search(Duration::from_secs(2));
        for class in [Class::One, Class::Chunk] {
            let spec = class.spec(260);
            let whole = Schedule::space(&spec, &cpu);
            assert_eq!(*legal(&Family::ALL, &spec, &cpu, &Budget::EXHAUSTIVE), *whole);
            assert_eq!(*legal(&Family::ALL, &spec, &cpu, &short), *Schedule::candidates(&spec, &cpu));
            let searched = legal(&Family::ALL, &spec, &cpu, &long);
            assert_eq!(searched.len(), whole.len());
            assert!(Arc::ptr_eq(&searched, &legal(&Family::ALL, &class.spec(516), &cpu, &long)));
        }
    }
}
