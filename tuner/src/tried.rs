//! What has been measured of one shape so far, and who is fastest by it.

use std::collections::BTreeMap;
use std::time::Duration;

use ternion_compiler::{Layout, Schedule};

use crate::Class;
use crate::contest::{Entrant, Figures, Standing, Verdict};

/// A schedule of one class, measured.
#[derive(Clone, Debug)]
pub(crate) struct Timed {
    pub(crate) schedule: Schedule,
    /// Median of the samples: seconds of one product.
    pub(crate) seconds: f64,
    /// What taking a sample cost.
    pub(crate) cost: Duration,
    samples: Vec<f64>,
}

impl Timed {
    fn figures(&self) -> Figures {
        let minimum = self.samples.first().copied().unwrap_or(self.seconds);
        Figures { minimum_us: minimum * 1e6, median_us: self.seconds * 1e6, samples: self.samples() }
    }

    /// How many samples there are.
    pub(crate) fn samples(&self) -> usize {
        self.samples.len()
    }
}

/// By class and layout, the fastest first: what leads is asked for more often than anything else.
#[derive(Default)]
pub(crate) struct Tried(BTreeMap<(Class, Layout), Vec<Timed>>);

impl Tried {
    /// Adds samples, each of which cost so much.
    pub(crate) fn add(&mut self, entrant: Entrant, seconds: &[f64], cost: Duration) {
        let Entrant { class, schedule } = entrant;
        let place = self.0.entry((class, schedule.layout)).or_default();
        let at = place.iter().position(|timed| timed.schedule == schedule).unwrap_or_else(|| {
            place.push(Timed { schedule, seconds: 0.0, cost, samples: Vec::new() });
            place.len() - 1
        });
        let timed = &mut place[at];
        timed.cost = cost;
        timed.samples.extend(seconds);
        timed.samples.sort_by(f64::total_cmp);
        // Of an even number the faster: interruptions only ever slow down.
        timed.seconds = timed.samples[(timed.samples.len() - 1) / 2];
        place.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
    }

    /// Replaces all samples by a time that is known better.
    pub(crate) fn replace(&mut self, entrant: Entrant, seconds: f64) {
        if let Some(place) = self.0.get_mut(&(entrant.class, entrant.schedule.layout)) {
            place.retain(|timed| timed.schedule != entrant.schedule);
        }
        self.add(entrant, &[seconds], Duration::ZERO);
    }

    pub(crate) fn get(&self, entrant: Entrant) -> Option<&Timed> {
        let place = self.of(entrant.class, entrant.schedule.layout);
        place.iter().find(|timed| timed.schedule == entrant.schedule)
    }

    /// All of a class in a layout, the fastest first.
    pub(crate) fn of(&self, class: Class, layout: Layout) -> &[Timed] {
        self.0.get(&(class, layout)).map_or(&[], Vec::as_slice)
    }

    /// The fastest of a class.
    pub(crate) fn best(&self, class: Class) -> Option<&Timed> {
        let places = self.0.iter().filter(|((of, _), _)| *of == class);
        places.filter_map(|(_, place)| place.first()).min_by(|a, b| a.seconds.total_cmp(&b.seconds))
    }

    /// Layouts by their weighted totals, the best first. Where `hopeful` says that a class has too few trials in a layout to
    /// say, its best anywhere counts; a layout that serves not every class is none.
    pub(crate) fn layouts(&self, weights: &[f64; 6], hopeful: &dyn Fn(Class, Layout) -> bool) -> Vec<(f64, Layout)> {
        let mut layouts: Vec<Layout> = self.0.keys().map(|(_, layout)| *layout).collect();
        layouts.sort_unstable();
        layouts.dedup();
        let best = Class::ALL.map(|class| self.best(class));
        let time = |class: Class, layout| match self.of(class, layout).first() {
            _ if hopeful(class, layout) => best[class.index()],
            first => first,
        };
        let total = |layout| {
            let times = Class::ALL.map(|class| Some(weights[class.index()] * time(class, layout)?.seconds));
            Some((times.into_iter().sum::<Option<f64>>()?, layout))
        };
        let mut layouts: Vec<(f64, Layout)> = layouts.into_iter().filter_map(total).collect();
        layouts.sort_by(|a, b| a.0.total_cmp(&b.0));
        layouts
    }

    /// Who of `entrants` is fastest in one layout by all that was measured so far. `None` if no layout serves every class.
    pub(crate) fn verdict(&self, entrants: &[Entrant], weights: &[f64; 6]) -> Option<Verdict> {
        let fastest = |class, layout| {
            let mut of_layout = self.of(class, layout).iter().map(|timed| Entrant { class, schedule: timed.schedule });
            of_layout.find_map(|fastest| entrants.iter().position(|entrant| *entrant == fastest))
        };
        let one_copy = self.layouts(weights, &|_, _| false).into_iter().find_map(|(total, layout)| {
            let set = Class::ALL.map(|class| fastest(class, layout));
            set.iter().all(Option::is_some).then_some(Standing { total, set })
        })?;
        let timed: Vec<Option<&Timed>> = entrants.iter().map(|entrant| self.get(*entrant)).collect();
        let seconds = |at: usize| timed[at].map_or(f64::INFINITY, |timed| timed.seconds);
        let pace = |at: usize| seconds(at) / one_copy.set[entrants[at].class.index()].map_or(f64::NAN, seconds);
        let paces = (0..entrants.len()).map(pace).collect();
        let figures = timed.iter().map(|timed| timed.map_or(Figures::default(), Timed::figures)).collect();
        Some(Verdict { one_copy, two_copies: None, figures, paces })
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (Entrant, &Timed)> {
        let entrant = |class: &Class, timed: &Timed| Entrant { class: *class, schedule: timed.schedule };
        self.0.iter().flat_map(move |((class, _), place)| place.iter().map(move |timed| (entrant(class, timed), timed)))
    }

    pub(crate) fn len(&self) -> usize {
        self.0.values().map(Vec::len).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entrant(unroll: u8, layout: &str) -> Entrant {
        let text = format!("mad/clif128 layout={layout} multiply=pairs unroll={unroll} ntile=1");
        Entrant { class: Class::One, schedule: text.parse().unwrap() }
    }

    #[test]
    fn whoever_led_by_luck_falls_back_when_it_is_measured_again() {
        let (lucky, steady) = (entrant(1, "rows4x16"), entrant(2, "rows4x16"));
        let mut tried = Tried::default();
        tried.add(lucky, &[0.7], Duration::ZERO);
        tried.add(steady, &[0.9, 0.95, 9.0], Duration::ZERO);
        assert_eq!(tried.best(Class::One).unwrap().schedule, lucky.schedule);
        tried.add(lucky, &[1.0, 1.1], Duration::ZERO);
        assert_eq!(tried.best(Class::One).unwrap().schedule, steady.schedule);
        assert_eq!((tried.get(lucky).unwrap().seconds, tried.get(lucky).unwrap().samples()), (1.0, 3));
        tried.replace(lucky, 0.5);
        assert_eq!((tried.len(), tried.best(Class::One).unwrap().schedule), (2, lucky.schedule));
    }

    #[test]
    fn a_layout_counts_with_what_it_has_or_with_what_is_hoped_for() {
        let mut tried = Tried::default();
        for class in Class::ALL {
            tried.add(Entrant { class, ..entrant(1, "rows4x16") }, &[2.0], Duration::ZERO);
        }
        tried.add(entrant(1, "rows8x16"), &[1.0], Duration::ZERO);
        let [whole, part] = ["rows4x16", "rows8x16"].map(|layout| layout.parse().unwrap());
        assert_eq!(tried.layouts(&[1.0; 6], &|_, _| false), [(12.0, whole)]);
        let hopeful = |class, layout| layout == part && class != Class::One;
        assert_eq!(tried.layouts(&[1.0; 6], &hopeful), [(11.0, part), (12.0, whole)]);
    }
}
