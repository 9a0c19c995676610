//! How much slower or faster the machine has become: batches are minutes apart in a long search, and their trials must
//! compare.

use crate::contest::Entrant;

/// Of so many measurements the median counts: what one schedule takes in a moment is mostly noise, and it would go into
/// every trial of a batch.
const WINDOW: usize = 5;

/// One schedule, measured again with each batch.
#[derive(Default)]
pub(crate) struct Drift {
    reference: Option<(Entrant, f64)>,
    /// What the reference took each time, over what it took first.
    pub(crate) ratios: Vec<f64>,
}

impl Drift {
    /// The schedule to measure, if there is one.
    pub(crate) fn reference(&self) -> Option<Entrant> {
        self.reference.map(|(entrant, _)| entrant)
    }

    /// Takes the first schedule that it is told of for its reference.
    pub(crate) fn begin(&mut self, entrant: Entrant, seconds: f64) {
        self.reference.get_or_insert((entrant, seconds));
    }

    /// What the reference takes now.
    pub(crate) fn note(&mut self, seconds: f64) {
        self.ratios.extend(self.reference.map(|(_, first)| seconds / first));
    }

    /// What times are multiplied with to be those of the beginning.
    pub(crate) fn scale(&self) -> f64 {
        let mut last: Vec<f64> = self.ratios.iter().rev().take(WINDOW).copied().collect();
        last.sort_by(f64::total_cmp);
        // Only as much as a clock may change is believed.
        last.get(last.len() / 2).map_or(1.0, |ratio| (1.0 / ratio).clamp(0.67, 1.5))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Class;
    use crate::stopwatch::scripted::Noise;

    #[test]
    fn it_follows_the_machine_and_neither_noise_nor_a_moment() {
        let schedule = "mad/clif128 layout=rows4x16 multiply=pairs unroll=1 ntile=1".parse().unwrap();
        let mut drift = Drift::default();
        assert_eq!((drift.reference(), drift.scale()), (None, 1.0));
        drift.begin(Entrant { class: Class::One, schedule }, 2.0);
        drift.begin(Entrant { class: Class::Few, schedule }, 7.0);
        assert_eq!(drift.reference(), Some(Entrant { class: Class::One, schedule }));
        let mut noise = Noise::new(0xd21f_7000);
        let (mut alone, mut smooth) = (0.0, 0.0);
        for batch in 0..1000 {
            // A machine that gets slower by a third, with 10 % noise and a sample in fifty interrupted.
            let truth = 1.0 + f64::from(batch) / 3000.0;
            let spike = if noise.uniform() < 0.02 { 5.0 } else { 1.0 };
            let now = truth * spike * (1.0 + 0.1 * noise.normal());
            drift.note(2.0 * now);
            alone += (truth / now - 1.0).powi(2);
            smooth += (truth * drift.scale() - 1.0).powi(2);
        }
        assert!(smooth < 0.35 * alone, "{smooth} {alone}");
    }
}
