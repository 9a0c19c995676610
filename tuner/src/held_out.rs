//! Rounds that nothing was chosen by: what was found, against something else.
//!
//! Who wins a search wins in part by luck, and its own samples cannot tell how much. New samples can. Both sides run in
//! interleaved rounds, every other round in the other order; a round's ratio is that of two neighbouring moments, so drift
//! does not touch it.

use std::time::Duration;

use crate::bench::Bench;
use crate::contest::Entrant;
use crate::{Class, Problem, Stopwatch};

/// Rounds of a comparison.
pub(crate) const ROUNDS: usize = 10;

/// Fewer rounds decide nothing.
const LEAST_ROUNDS: usize = 4;

/// Two-sided 95 % quantiles of Student's t with 1 to `ROUNDS − 1` degrees of freedom.
const T: [f64; ROUNDS - 1] = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262];

/// Times of two sides, round by round.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rounds(pub(crate) Vec<[f64; 2]>);

impl Rounds {
    /// The logarithm of the first side's time over the second's: its mean, and half the width of its 95 % confidence
    /// interval. `None` if there are too few rounds to say.
    pub(crate) fn ratio(&self) -> Option<(f64, f64)> {
        let ratios: Vec<f64> = self.0.iter().map(|[ours, theirs]| (ours / theirs).ln()).collect();
        (ratios.len() >= LEAST_ROUNDS && ratios.iter().all(|ratio| ratio.is_finite())).then(|| interval(&ratios))
    }

    /// Whether the first side is probably faster: three to one, as a third of the interval's half is for so few rounds. Who
    /// asks for certainty on a noisy machine never changes anything. `None` if there are too few rounds to say.
    pub(crate) fn first_is_faster(&self) -> Option<bool> {
        self.ratio().map(|(mean, half)| mean + half / 3.0 < 0.0)
    }
}

/// Mean, and half the width of its 95 % confidence interval.
pub(crate) fn interval(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (n - 1.0);
    let quantile = T.get(values.len().saturating_sub(2)).copied().unwrap_or(T[T.len() - 1]);
    (mean, quantile * (variance / n).sqrt())
}

/// Takes rounds of two schedules of each class until `deadline`, by `stopwatch`; a round's time is the median of
/// `samples`, in seconds. A round that does not end in time, or that cannot be measured, is none.
pub(crate) fn rounds(
    bench: &mut dyn Bench,
    problem: &Problem,
    pairs: &[[Entrant; 2]],
    samples: usize,
    stopwatch: &dyn Stopwatch,
    deadline: Duration,
) -> Vec<Rounds> {
    let mut all = vec![Rounds::default(); pairs.len()];
    let mut cost = Duration::ZERO;
    for round in 0..ROUNDS {
        let begin = stopwatch.elapsed();
        if begin + cost > deadline {
            break;
        }
        let times: Option<Vec<[f64; 2]>> =
            pairs.iter().map(|pair| one_round(bench, problem, pair, samples, round % 2 == 1)).collect();
        let Some(times) = times else { break };
        all.iter_mut().zip(times).for_each(|(rounds, times)| rounds.0.push(times));
        cost = stopwatch.elapsed().saturating_sub(begin);
    }
    all
}

fn one_round(
    bench: &mut dyn Bench,
    problem: &Problem,
    pair: &[Entrant; 2],
    samples: usize,
    backwards: bool,
) -> Option<[f64; 2]> {
    let mut taken = [const { Vec::new() }; 2];
    for sample in 0..samples {
        for which in if backwards == (sample % 2 == 0) { [1, 0] } else { [0, 1] } {
            let Entrant { class, schedule } = pair[which];
            taken[which].push(bench.sample(problem, class, schedule)?.as_secs_f64());
        }
    }
    Some(taken.map(|mut taken| {
        taken.sort_by(f64::total_cmp);
        taken[samples / 2]
    }))
}

/// Rounds of all classes together, each weighted.
pub(crate) fn total(rounds: &[(Class, Rounds)], weights: &[f64; 6]) -> Rounds {
    let count = rounds.iter().map(|(_, rounds)| rounds.0.len()).min().unwrap_or(0);
    let side =
        |which: usize, at: usize| rounds.iter().map(|(class, r)| weights[class.index()] * r.0[at][which]).sum::<f64>();
    Rounds((0..count).map(|at| [side(0, at), side(1, at)]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stopwatch::scripted::Noise;

    #[test]
    fn an_interval_holds_its_mean_and_grows_with_the_spread() {
        let (mean, narrow) = interval(&[1.0, 1.1, 0.9, 1.0, 1.0, 1.1, 0.9, 1.0, 1.0, 1.0]);
        let (_, wide) = interval(&[1.0, 2.0, 0.1, 1.0, 1.0, 1.9, 0.1, 1.0, 0.9, 1.0]);
        assert!((mean - 1.0).abs() < 1e-9 && narrow < wide);
        // Standard deviation √(0.04/9), over √10, by 2.262.
        assert!((narrow - 2.262 * (0.04f64 / 9.0 / 10.0).sqrt()).abs() < 1e-9);
        // Four values have three degrees of freedom.
        let (_, four) = interval(&[1.0, 2.0, 1.0, 2.0]);
        assert!((four - 3.182 * (1.0f64 / 3.0 / 4.0).sqrt()).abs() < 1e-9);
    }

    /// How often of a thousand times the first is called faster, when it takes `ratio` times as long as the second, while
    /// everything drifts by half.
    fn called_faster(ratio: f64) -> usize {
        let run = |seed| {
            let mut noise = Noise::new(seed);
            let round = |at: usize| {
                let drift = 1.0 + 0.05 * at as f64;
                [ratio, 1.0].map(|time| drift * time * (1.0 + 0.05 * noise.normal()))
            };
            Rounds((0..ROUNDS).map(round).collect()).first_is_faster() == Some(true)
        };
        (0..1000).filter(|seed| run(0xcafe_0000 + seed)).count()
    }

    #[test]
    fn what_is_faster_is_called_so_and_what_is_equal_or_slower_is_not() {
        assert!(called_faster(0.85) > 990);
        assert!(called_faster(0.95) > 900);
        assert!((150..300).contains(&called_faster(1.0)));
        assert!(called_faster(1.1) < 5);
    }

    #[test]
    fn few_rounds_say_nothing() {
        assert_eq!(Rounds(vec![[1.0, 2.0]; LEAST_ROUNDS - 1]).first_is_faster(), None);
        assert_eq!(Rounds(vec![[0.0, 0.0]; ROUNDS]).first_is_faster(), None);
    }
}
