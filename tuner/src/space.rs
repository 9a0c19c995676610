//! What there is to search.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use ternion_compiler::{Cpu, Family, KernelSpec, Schedule};

use crate::request::{Budget, Effort};

/// Budgets from which a search draws on the whole space: listing it assigns the registers of every schedule, which takes
/// about a second.
pub(crate) const WHOLE_SPACE: Duration = Duration::from_secs(10);

/// What a list depends on. Of the spec, a search looks at the columns only.
type Key = (Vec<Family>, KernelSpec, Cpu);

/// A list, once it is there.
type Listed = Arc<(Mutex<Option<Arc<[Schedule]>>>, Condvar)>;

/// The schedules for `spec` on `cpu` that a search with this budget chooses from: all legal ones of `families`, or with
/// little time, or if listing them takes longer than `patience`, only the compiler's candidates.
///
/// What is legal for one row length is nearly always legal for another, so a search lists the space of the first one
/// that it meets and checks again what it is about to compile. An exhaustive search lists that of each and waits for it.
pub(crate) fn legal(
    families: &[Family],
    spec: &KernelSpec,
    cpu: &Cpu,
    budget: &Budget,
    patience: Duration,
) -> Arc<[Schedule]> {
    let exhaustive = budget.effort == Effort::Exhaustive;
    if !exhaustive && budget.time < WHOLE_SPACE {
        return Schedule::candidates(spec, cpu).into();
    }
    let listed = listed((families.to_vec(), *spec, *cpu), exhaustive);
    let patience = if exhaustive { Duration::MAX } else { patience };
    wait(&listed, patience).unwrap_or_else(|| Schedule::candidates(spec, cpu).into())
}

/// The list if it is there in time.
fn wait(listed: &Listed, patience: Duration) -> Option<Arc<[Schedule]>> {
    let (schedules, ready) = &**listed;
    let schedules = schedules.lock().unwrap_or_else(PoisonError::into_inner);
    let waited = ready.wait_timeout_while(schedules, patience, |schedules| schedules.is_none());
    waited.unwrap_or_else(PoisonError::into_inner).0.clone()
}

/// The list for `key`, which a thread of its own begins to make if nobody has: five classes of columns share a spec, and
/// shapes with equal rows do.
fn listed(key: Key, exhaustive: bool) -> Listed {
    static KNOWN: Mutex<Vec<(Key, Listed)>> = Mutex::new(Vec::new());
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let like = |(families, spec, cpu): &Key| {
        let same_rows = !exhaustive || spec.k == key.1.k;
        *families == key.0 && spec.columns == key.1.columns && same_rows && *cpu == key.2
    };
    if let Some((_, listed)) = known.iter().find(|(known, _)| like(known)) {
        return Arc::clone(listed);
    }
    let listed = Listed::default();
    known.push((key.clone(), Arc::clone(&listed)));
    let target = Arc::clone(&listed);
    std::thread::spawn(move || {
        let (families, spec, cpu) = key;
        let schedules = Schedule::space_of(&families, &spec, &cpu);
        *target.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(schedules.into());
        target.1.notify_all();
    });
    listed
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
            let legal = |spec, budget, patience| legal(&Family::ALL, spec, &cpu, budget, patience);
            assert_eq!(*legal(&spec, &Budget::EXHAUSTIVE, Duration::ZERO), *whole);
            assert_eq!(*legal(&spec, &short, Duration::ZERO), *Schedule::candidates(&spec, &cpu));
            let searched = legal(&spec, &long, Duration::ZERO);
            assert_eq!(searched.len(), whole.len());
            assert!(Arc::ptr_eq(&searched, &legal(&class.spec(516), &long, Duration::ZERO)));
        }
    }

    #[test]
    fn a_search_does_not_wait_longer_than_it_has_patience_for() {
        let listed = Listed::default();
        assert_eq!(wait(&listed, Duration::ZERO), None);
        *listed.0.lock().unwrap() = Some(Vec::new().into());
        assert_eq!(wait(&listed, Duration::ZERO).as_deref(), Some(&[][..]));
    }
}
