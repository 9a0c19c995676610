//! Which schedules may race: a bounded list, best guesses first, spread over families and layouts.

use std::collections::BTreeMap;

use ternion_compiler::{Columns, Cpu, Family, KernelSpec, Layout, Schedule};

use crate::contest::Entrant;
use crate::{Choice, Class};

/// The legal schedules of a shape that are worth a race.
#[derive(Debug)]
pub(crate) struct Shortlist {
    /// In the order in which they deserve to be compiled; whoever comes first has its partner right behind.
    pub(crate) entrants: Vec<Entrant>,
}

impl Shortlist {
    /// At most `limit` schedules (but at least a pair, if there is one) for matrices with rows of `k` weights, none of
    /// which is `excluded`.
    pub(crate) fn new(k: usize, cpu: &Cpu, limit: usize, excluded: &dyn Fn(&KernelSpec, &Schedule) -> bool) -> Self {
        let legal = |columns| {
            let spec = KernelSpec { k, columns };
            let mut schedules = Schedule::candidates(&spec, cpu);
            schedules.retain(|schedule| !excluded(&spec, schedule));
            schedules
        };
        Self::of(&legal(Columns::One), &legal(Columns::Many), limit)
    }

    fn of(ones: &[Schedule], manys: &[Schedule], limit: usize) -> Self {
        let has_layout = |schedules: &[Schedule], layout| schedules.iter().any(|other| other.layout == layout);
        let mut ones = spread(ones.iter().copied().filter(|one| has_layout(manys, one.layout)));
        let mut manys = spread(manys.iter().copied().filter(|many| has_layout(&ones, many.layout)));
        let mut entrants = Vec::new();
        let mut layouts: Vec<Layout> = Vec::new();

        // First the layouts, each with the best guess of both classes, up to three quarters of the list.
        while let Some(at) = ones.iter().position(|one| !layouts.contains(&one.layout)) {
            if !entrants.is_empty() && entrants.len() + 2 > (3 * limit).div_ceil(4) {
                break;
            }
            let one = ones.remove(at);
            layouts.push(one.layout);
            entrants.push(Entrant { class: Class::One, schedule: one });
            if let Some(at) = manys.iter().position(|many| many.layout == one.layout) {
                entrants.push(Entrant { class: Class::Batch, schedule: manys.remove(at) });
            }
        }
        // Then more schedules of these layouts; decoding, where a model spends its time, gets two of three places.
        ones.retain(|one| layouts.contains(&one.layout));
        manys.retain(|many| layouts.contains(&many.layout));
        let (mut ones, mut manys) = (ones.into_iter(), manys.into_iter());
        while entrants.len() < limit {
            let place = entrants.len() % 3;
            let (one, many) = (Class::One, Class::Batch);
            let next = match place {
                2 => manys.next().map(|schedule| (many, schedule)).or_else(|| ones.next().map(|s| (one, s))),
                _ => ones.next().map(|schedule| (one, schedule)).or_else(|| manys.next().map(|s| (many, s))),
            };
            let Some((class, schedule)) = next else { break };
            entrants.push(Entrant { class, schedule });
        }
        Self { entrants }
    }

    /// Puts a choice that has proved itself first.
    pub(crate) fn promote(&mut self, choice: Choice) {
        let pair = [Class::One, Class::Batch].map(|class| Entrant { class, schedule: choice.of(class) });
        self.entrants.retain(|entrant| !pair.contains(entrant));
        self.entrants.splice(0..0, pair);
    }

    /// The best guess of all; `None` if no layout serves both classes.
    pub(crate) fn guess(&self) -> Option<Choice> {
        match self.entrants.as_slice() {
            [one, many, ..] if one.schedule.layout == many.schedule.layout => {
                Some(Choice::pair(one.schedule, many.schedule))
            }
            _ => None,
        }
    }
}

/// The same schedules, taken in turn from the families and within a family from its layouts; otherwise in their order.
fn spread(schedules: impl Iterator<Item = Schedule>) -> Vec<Schedule> {
    let mut families: Vec<Family> = Vec::new();
    let mut layouts: BTreeMap<Family, Vec<Layout>> = BTreeMap::new();
    let mut depths: BTreeMap<(Family, Layout), usize> = BTreeMap::new();
    let mut keyed: Vec<_> = schedules
        .map(|schedule| {
            let family_at = place(&mut families, schedule.family);
            let layout_at = place(layouts.entry(schedule.family).or_default(), schedule.layout);
            let depth = depths.entry((schedule.family, schedule.layout)).or_default();
            *depth += 1;
            // Two layouts of the first family, which is the one that most often wins, and one of each other.
            let turn = if family_at == 0 { layout_at.saturating_sub(1) } else { layout_at };
            ((*depth, turn, family_at, layout_at), schedule)
        })
        .collect();
    keyed.sort_by_key(|(key, _)| *key);
    keyed.into_iter().map(|(_, schedule)| schedule).collect()
}

/// Where `item` is in `list`, at the end if it was not there before.
fn place<T: PartialEq>(list: &mut Vec<T>, item: T) -> usize {
    list.iter().position(|other| *other == item).unwrap_or_else(|| {
        list.push(item);
        list.len() - 1
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn list(limit: usize) -> Shortlist {
        let cpu: Cpu = "x86-64 +ssse3 +sse4.1 +avx2 +avxvnni".parse().unwrap();
        Shortlist::new(2560, &cpu, limit, &|_, _| false)
    }

    #[test]
    fn a_short_list_has_several_families_and_layouts_and_partners_for_all() {
        let entrants = list(8).entrants;
        assert_eq!(entrants.len(), 8);
        let layouts: BTreeSet<_> = entrants.iter().map(|entrant| entrant.schedule.layout).collect();
        let families: BTreeSet<_> = entrants.iter().map(|entrant| entrant.schedule.family).collect();
        assert!(layouts.len() >= 3 && families.len() >= 2, "{layouts:?} {families:?}");
        for layout in layouts {
            for class in [Class::One, Class::Batch] {
                let has = |entrant: &Entrant| entrant.class == class && entrant.schedule.layout == layout;
                assert!(entrants.iter().any(has), "{layout} lacks {class}");
            }
        }
    }

    #[test]
    fn the_guess_is_the_compilers_first_candidate() {
        let cpu: Cpu = "x86-64 +ssse3".parse().unwrap();
        let list = Shortlist::new(256, &cpu, 8, &|_, _| false);
        let first = Schedule::candidates(&KernelSpec { k: 256, columns: Columns::One }, &cpu)[0];
        assert_eq!(list.guess().unwrap().of(Class::One), first);
    }

    #[test]
    fn a_long_list_holds_every_legal_schedule_that_has_a_partner_once() {
        let cpu: Cpu = "x86-64 +ssse3".parse().unwrap();
        let legal = |columns| Schedule::candidates(&KernelSpec { k: 256, columns }, &cpu);
        let with_partner = |columns, partners: Columns| {
            let partners = legal(partners);
            let has_one = |one: &Schedule| partners.iter().any(|partner| partner.layout == one.layout);
            legal(columns).into_iter().filter(has_one).count()
        };
        let expected = with_partner(Columns::One, Columns::Many) + with_partner(Columns::Many, Columns::One);
        let entrants = Shortlist::new(256, &cpu, 10_000, &|_, _| false).entrants;
        assert_eq!(entrants.len(), expected);
        let unique: BTreeSet<_> = entrants.iter().map(|entrant| (entrant.class, entrant.schedule)).collect();
        assert_eq!(unique.len(), entrants.len());
    }

    #[test]
    fn excluded_schedules_do_not_race_and_nothing_legal_means_no_guess() {
        let cpu: Cpu = "x86-64 +ssse3".parse().unwrap();
        let tl1 = Shortlist::new(256, &cpu, 8, &|_, schedule| schedule.family != Family::Tl1);
        assert!(tl1.entrants.iter().all(|entrant| entrant.schedule.family == Family::Tl1));
        assert_eq!(Shortlist::new(256, &cpu, 8, &|_, _| true).guess(), None);
        assert_eq!(Shortlist::new(256, &cpu, 8, &|spec, _| spec.columns == Columns::Many).guess(), None);
    }
}
