//! What has not been tried of one shape, and whose turn it is.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use ternion_compiler::{Columns, Family, Layout, MachineKind, Multiply, Schedule};

use crate::Class;

/// What can be compiled and tried: a schedule for one column, or for many.
pub(crate) type Candidate = (Columns, Schedule);

/// Candidates that have not been tried.
#[derive(Default)]
pub(crate) struct Frontier {
    open: BTreeMap<(Columns, Layout), BTreeSet<Schedule>>,
    values: BTreeMap<Columns, Values>,
    /// What is next for a class, from one ranking of all that is open: ranking takes a while.
    pub(crate) queues: [VecDeque<Schedule>; 6],
    /// Turns that classes have had, and how many they are owed.
    turns: [usize; 6],
    owed: [f64; 6],
}

impl Frontier {
    pub(crate) fn new(candidates: impl Iterator<Item = Candidate>) -> Self {
        let mut frontier = Self::default();
        for (columns, schedule) in candidates {
            frontier.open.entry((columns, schedule.layout)).or_default().insert(schedule);
            frontier.values.entry(columns).or_default().add(&schedule);
        }
        frontier
    }

    pub(crate) fn len(&self) -> usize {
        self.open.values().map(BTreeSet::len).sum()
    }

    /// All for so many columns.
    pub(crate) fn of(&self, columns: Columns) -> impl Iterator<Item = &Schedule> {
        self.open.iter().filter(move |((of, _), _)| *of == columns).flat_map(|(_, open)| open)
    }

    pub(crate) fn has(&self, columns: Columns, schedule: &Schedule) -> bool {
        self.open.get(&(columns, schedule.layout)).is_some_and(|open| open.contains(schedule))
    }

    /// Whether there are any for a layout.
    pub(crate) fn has_layout(&self, columns: Columns, layout: Layout) -> bool {
        self.open.get(&(columns, layout)).is_some_and(|open| !open.is_empty())
    }

    /// Takes a candidate out, if it is there.
    pub(crate) fn take(&mut self, columns: Columns, schedule: &Schedule) -> bool {
        self.open.get_mut(&(columns, schedule.layout)).is_some_and(|open| open.remove(schedule))
    }

    /// Those that differ from a schedule in one parameter.
    pub(crate) fn neighbours(&self, columns: Columns, of: &Schedule) -> Vec<Schedule> {
        let mut near = self.values.get(&columns).map_or(Vec::new(), |values| values.neighbours(of));
        near.retain(|schedule| self.has(columns, schedule));
        near
    }

    /// The class that is owed most, if classes have turns in proportion to `shares`, and how many turns it has had;
    /// `None` if nothing is left.
    pub(crate) fn turn(&mut self, shares: &[f64; 6]) -> Option<(Class, usize)> {
        let left = |class: &Class| self.of(class.columns()).next().is_some();
        let left: Vec<Class> = Class::ALL.into_iter().filter(left).collect();
        left.iter().for_each(|class| self.owed[class.index()] += shares[class.index()]);
        let next = left.into_iter().max_by(|a, b| self.owed[a.index()].total_cmp(&self.owed[b.index()]))?;
        self.owed[next.index()] -= 1.0;
        self.turns[next.index()] += 1;
        Some((next, self.turns[next.index()]))
    }
}

/// The values that parameters take.
#[derive(Default)]
struct Values {
    kinds: BTreeSet<(Family, MachineKind)>,
    layouts: BTreeSet<Layout>,
    multiplies: BTreeSet<Multiply>,
    unrolls: BTreeSet<u8>,
    ntiles: BTreeSet<u8>,
    prefetches: BTreeSet<u16>,
}

impl Values {
    fn add(&mut self, schedule: &Schedule) {
        let Schedule { family, machine, layout, multiply, unroll, ntile, prefetch } = *schedule;
        self.kinds.insert((family, machine));
        self.layouts.insert(layout);
        self.multiplies.insert(multiply);
        self.unrolls.insert(unroll);
        self.ntiles.insert(ntile);
        self.prefetches.insert(prefetch);
    }

    /// All that differ from `of` in one parameter, legal or not.
    fn neighbours(&self, of: &Schedule) -> Vec<Schedule> {
        let of = *of;
        let kinds = self.kinds.iter().map(|(family, machine)| Schedule { family: *family, machine: *machine, ..of });
        let layouts = self.layouts.iter().map(|layout| Schedule { layout: *layout, ..of });
        let multiplies = self.multiplies.iter().map(|multiply| Schedule { multiply: *multiply, ..of });
        let unrolls = self.unrolls.iter().map(|unroll| Schedule { unroll: *unroll, ..of });
        let ntiles = self.ntiles.iter().map(|ntile| Schedule { ntile: *ntile, ..of });
        let prefetches = self.prefetches.iter().map(|prefetch| Schedule { prefetch: *prefetch, ..of });
        let all = kinds.chain(layouts).chain(multiplies).chain(unrolls).chain(ntiles).chain(prefetches);
        all.filter(|schedule| *schedule != of).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ternion_compiler::Cpu;

    fn frontier() -> Frontier {
        let cpu: Cpu = "x86-64 +ssse3".parse().unwrap();
        let of = |class: Class| {
            let schedules = Schedule::candidates(&class.spec(256), &cpu);
            schedules.into_iter().map(move |schedule| (class.columns(), schedule))
        };
        Frontier::new(of(Class::One).chain(of(Class::Chunk)))
    }

    #[test]
    fn neighbours_are_open_and_differ_in_one_parameter() {
        let mut frontier = frontier();
        let all: Vec<Schedule> = frontier.of(Columns::Many).copied().collect();
        let near = frontier.neighbours(Columns::Many, &all[0]);
        assert!(!near.is_empty());
        for schedule in &near {
            let Schedule { layout, unroll, ntile, .. } = *schedule;
            let changed = [layout != all[0].layout, unroll != all[0].unroll, ntile != all[0].ntile];
            assert!(changed.into_iter().filter(|changed| *changed).count() <= 1 && *schedule != all[0]);
        }
        assert!(frontier.take(Columns::Many, &near[0]) && !frontier.take(Columns::Many, &near[0]));
        assert!(!frontier.neighbours(Columns::Many, &all[0]).contains(&near[0]));
    }

    #[test]
    fn every_class_has_its_share_of_the_turns_and_the_end_is_an_end() {
        let mut frontier = frontier();
        let shares = [0.5, 0.1, 0.1, 0.1, 0.15, 0.05];
        let mut turns = [0; 6];
        for _ in 0..100 {
            let (class, turn) = frontier.turn(&shares).unwrap();
            turns[class.index()] += 1;
            assert_eq!(turn, turns[class.index()]);
        }
        for (turns, share) in turns.into_iter().zip(shares) {
            assert!((turns as f64 - 100.0 * share).abs() <= 1.0, "{turns} {share}");
        }
        for schedule in frontier.of(Columns::One).copied().collect::<Vec<_>>() {
            frontier.take(Columns::One, &schedule);
        }
        assert_ne!(frontier.turn(&shares).unwrap().0, Class::One);
        assert_eq!(Frontier::default().turn(&shares), None);
    }
}
