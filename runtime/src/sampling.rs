//! From logits to a token: one documented chain, the same in every program that uses this crate.
//!
//! 1. **Repetition penalty**: the logit of every token that occurs in the sequence is divided by the penalty if it is
//!    positive and multiplied by it if not.
//! 2. **Top-k**: the k most likely tokens stay.
//! 3. **Top-p**: of those, the most likely ones whose probabilities first add up to p stay.
//! 4. **Min-p**: of those, the ones with at least this fraction of the largest probability stay.
//! 5. **Temperature**: logits are divided by it and a token is drawn. Temperature 0 takes the most likely token.
//!
//! Ties go to the lowest id. The random number of a token is a function of (seed, sequence, position) alone, and every
//! sum runs in order of falling likelihood, so a text can be generated again on any machine, in any batch.

use ternion_kernels_ref::{head, math};

use crate::formats::GenerationDefaults;

/// What a caller asks for; `None` leaves it to the model's defaults.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SamplingOptions {
    /// Temperature, from 0.
    pub temperature: Option<f32>,
    /// Number of most likely tokens to keep; 0 keeps all.
    pub top_k: Option<usize>,
    /// Probability mass to keep, above 0 and at most 1.
    pub top_p: Option<f32>,
    /// Smallest probability to keep, as a part of the largest, 0 to 1.
    pub min_p: Option<f32>,
    /// Penalty of repeated tokens, above 0; 1 is none.
    pub repetition_penalty: Option<f32>,
    /// Seed of the random numbers.
    pub seed: u64,
}

/// A setting that cannot be.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{name} {value}: expected {expected}")]
pub struct SamplingError {
    /// Name of the setting.
    pub name: &'static str,
    /// Its value.
    pub value: f32,
    /// What it may be.
    pub expected: &'static str,
}

/// Complete, checked settings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    temperature: f32,
    top_k: usize,
    top_p: f32,
    min_p: f32,
    repetition_penalty: f32,
    seed: u64,
}

impl Sampling {
    /// Always the most likely token.
    pub const GREEDY: Self =
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 };

    /// The options, completed by the model's defaults: where neither says anything, a step of the chain is off. A model
    /// whose defaults do not sample (`do_sample` is not true) has temperature 0 unless the options give another.
    ///
    /// # Errors
    /// The first setting that is out of its range or not a number.
    pub fn new(options: &SamplingOptions, model: &GenerationDefaults) -> Result<Self, SamplingError> {
        let sampled = model.do_sample == Some(true);
        let model_temperature = if sampled { model.temperature.or(Some(1.0)) } else { None };
        let sampling = Self {
            temperature: options.temperature.or(model_temperature).unwrap_or(0.0),
            top_k: options.top_k.or(model.top_k).unwrap_or(0),
            top_p: options.top_p.or(model.top_p).unwrap_or(1.0),
            min_p: options.min_p.or(model.min_p).unwrap_or(0.0),
            repetition_penalty: options.repetition_penalty.or(model.repetition_penalty).unwrap_or(1.0),
            seed: options.seed,
        };
        let check = |name, value: f32, legal: bool, expected| {
            if legal { Ok(()) } else { Err(SamplingError { name, value, expected }) }
        };
        let Self { temperature, top_p, min_p, repetition_penalty, .. } = sampling;
        check("temperature", temperature, (0.0..=100.0).contains(&temperature), "0 to 100")?;
        check("top-p", top_p, top_p > 0.0 && top_p <= 1.0, "above 0 and at most 1")?;
        check("min-p", min_p, (0.0..=1.0).contains(&min_p), "0 to 1")?;
        let legal = repetition_penalty > 0.0 && repetition_penalty <= 100.0;
        check("repetition penalty", repetition_penalty, legal, "above 0 and at most 100")?;
        Ok(sampling)
    }

    /// Whether the most likely token is always taken.
    #[must_use]
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// The token that follows `history` in sequence number `sequence`. Logits are changed: penalties are applied to
    /// them, and what is not a number becomes −∞.
    ///
    /// `None` if there are no logits.
    #[must_use]
    pub fn sample(&self, logits: &mut [f32], history: &[u32], sequence: u64) -> Option<u32> {
        for logit in logits.iter_mut().filter(|logit| logit.is_nan()) {
            *logit = f32::NEG_INFINITY;
        }
        self.penalise(logits, history);
        if self.is_greedy() {
            return head::argmax(logits).and_then(|token| u32::try_from(token).ok());
        }
        let mut candidates = most_likely(logits, self.top_k);
        self.truncate(&mut candidates);
        let weights = weights(&candidates, self.temperature);
        let total: f64 = weights.iter().map(|weight| f64::from(*weight)).sum();
        let mut left = random(self.seed, sequence, history.len() as u64) * total;
        for ((_, token), weight) in candidates.iter().zip(&weights) {
            left -= f64::from(*weight);
            if left < 0.0 {
                return Some(*token);
            }
        }
        candidates.last().map(|(_, token)| *token)
    }

    fn penalise(&self, logits: &mut [f32], history: &[u32]) {
        if self.repetition_penalty == 1.0 {
            return;
        }
        let mut seen = history.to_vec();
        seen.sort_unstable();
        seen.dedup();
        for token in seen {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = if *logit > 0.0 { *logit / self.repetition_penalty } else { *logit * self.repetition_penalty };
            }
        }
    }

    /// Top-p and min-p on candidates in order of falling likelihood; at least one stays.
    fn truncate(&self, candidates: &mut Vec<(f32, u32)>) {
        if self.top_p < 1.0 {
            let weights = weights(candidates, 1.0);
            let total: f64 = weights.iter().map(|weight| f64::from(*weight)).sum();
            let mut mass = 0.0;
            let enough = weights.iter().position(|weight| {
                mass += f64::from(*weight);
                mass >= f64::from(self.top_p) * total
            });
            candidates.truncate(enough.map_or(candidates.len(), |last| last + 1));
        }
        if self.min_p > 0.0 {
            // The first weight is e^0 = 1, so the others are fractions of the largest probability.
            let kept = weights(candidates, 1.0).iter().take_while(|weight| **weight >= self.min_p).count();
            candidates.truncate(kept.max(1));
        }
    }
}

/// The `k` most likely tokens (all for 0), most likely first, lower ids first among equals.
fn most_likely(logits: &[f32], k: usize) -> Vec<(f32, u32)> {
    let mut candidates: Vec<(f32, u32)> = logits.iter().copied().zip(0..).collect();
    let order = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
    if k > 0 && k < candidates.len() {
        candidates.select_nth_unstable_by(k, order);
        candidates.truncate(k);
    }
    candidates.sort_unstable_by(order);
    candidates
}

/// `e^((logit − largest) / temperature)` of candidates in order of falling likelihood.
fn weights(candidates: &[(f32, u32)], temperature: f32) -> Vec<f32> {
    let largest = candidates.first().map_or(0.0, |(logit, _)| *logit);
    // Infinitely many logits may be −∞; if all are, they are equally likely.
    candidates
        .iter()
        .map(|(logit, _)| if *logit == largest { 1.0 } else { math::exp((logit - largest) / temperature) })
        .collect()
}

/// A number in [0, 1) that depends on its three arguments alone: SplitMix64's finaliser over each in turn.
fn random(seed: u64, sequence: u64, position: u64) -> f64 {
    let mix = |state: u64, input: u64| {
        let mut z = (state ^ input).wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    };
    let bits = mix(mix(mix(0, seed), sequence), position);
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sampling(change: impl FnOnce(&mut SamplingOptions)) -> Sampling {
        let mut options = SamplingOptions { temperature: Some(1.0), ..SamplingOptions::default() };
        change(&mut options);
        Sampling::new(&options, &GenerationDefaults::default()).unwrap()
    }

    /// The tokens that 2,000 draws from `logits` give.
    fn drawn(sampling: &Sampling, logits: &[f32]) -> Vec<usize> {
        let mut counts = vec![0; logits.len()];
        for sequence in 0..2000 {
            counts[sampling.sample(&mut logits.to_vec(), &[], sequence).unwrap() as usize] += 1;
        }
        counts
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let counts = drawn(&sampling(|_| {}), &[0.0, 2f32.ln(), 5f32.ln()]);
        for (count, expected) in counts.into_iter().zip([250.0, 500.0, 1250.0]) {
            assert!((f64::from(count as u32) - expected).abs() < 100.0, "{count} of {expected}");
        }
    }

    #[test]
    fn a_low_temperature_prefers_the_most_likely_and_zero_takes_it() {
        let logits = [0.0, 1.0, 0.5];
        let warm = drawn(&sampling(|_| {}), &logits)[1];
        let cold = drawn(&sampling(|options| options.temperature = Some(0.2)), &logits)[1];
        assert!(cold > warm);
        assert_eq!(drawn(&Sampling::GREEDY, &logits), [0, 2000, 0]);
        assert_eq!(drawn(&Sampling::GREEDY, &[1.0, 1.0, 0.0]), [2000, 0, 0]);
    }

    #[test]
    fn each_step_of_the_chain_keeps_what_it_says() {
        // Probabilities 0.5, 0.3, 0.2, in another order than the ids.
        let logits = [0.2f32.ln(), 0.5f32.ln(), 0.3f32.ln()];
        let kept =
            |sampling: Sampling| drawn(&sampling, &logits).into_iter().map(|count| count > 0).collect::<Vec<_>>();
        assert_eq!(kept(sampling(|options| options.top_k = Some(2))), [false, true, true]);
        assert_eq!(kept(sampling(|options| options.top_p = Some(0.5))), [false, true, false]);
        assert_eq!(kept(sampling(|options| options.top_p = Some(0.75))), [false, true, true]);
        assert_eq!(kept(sampling(|options| options.top_p = Some(1e-6))), [false, true, false]);
        assert_eq!(kept(sampling(|options| options.min_p = Some(0.55))), [false, true, true]);
        assert_eq!(kept(sampling(|options| options.min_p = Some(1.0))), [false, true, false]);
        assert_eq!(kept(sampling(|_| {})), [true, true, true]);
    }

    #[test]
    fn the_penalty_divides_positive_and_multiplies_negative_logits_once_per_token() {
        let sampling = Sampling { repetition_penalty: 2.0, ..Sampling::GREEDY };
        let mut logits = [3.0, 2.0, -1.0];
        assert_eq!(sampling.sample(&mut logits, &[0, 2, 0, 9], 0), Some(1));
        assert_eq!(logits, [1.5, 2.0, -2.0]);
    }

    #[test]
    fn a_token_depends_on_seed_sequence_and_position_alone() {
        let logits: Vec<f32> = (0..50).map(|i| (i % 7) as f32 * 0.1).collect();
        let draw = |seed, sequence, history: &[u32]| {
            sampling(|options| options.seed = seed).sample(&mut logits.clone(), history, sequence)
        };
        assert_eq!(draw(7, 0, &[1, 2]), draw(7, 0, &[3, 4]));
        let different = |other: &dyn Fn(u64) -> Option<u32>| (0..20).any(|i| other(i) != draw(i, 0, &[1]));
        assert!(different(&|i| draw(i + 100, 0, &[1])));
        assert!(different(&|i| draw(i, 1, &[1])));
        assert!(different(&|i| draw(i, 0, &[1, 1])));
    }

    #[test]
    fn the_models_defaults_count_where_nothing_is_asked_for() {
        let model = GenerationDefaults {
            do_sample: Some(true),
            temperature: Some(0.7),
            top_k: Some(40),
            ..GenerationDefaults::default()
        };
        let sampling = Sampling::new(&SamplingOptions::default(), &model).unwrap();
        assert_eq!((sampling.temperature, sampling.top_k, sampling.top_p), (0.7, 40, 1.0));
        let greedy = GenerationDefaults { do_sample: None, ..model };
        assert!(Sampling::new(&SamplingOptions::default(), &greedy).unwrap().is_greedy());
    }

    #[test]
    fn settings_that_cannot_be_are_named() {
        for (name, options) in [
            ("temperature", SamplingOptions { temperature: Some(-1.0), ..SamplingOptions::default() }),
            ("temperature", SamplingOptions { temperature: Some(f32::NAN), ..SamplingOptions::default() }),
            ("top-p", SamplingOptions { top_p: Some(0.0), ..SamplingOptions::default() }),
            ("min-p", SamplingOptions { min_p: Some(1.5), ..SamplingOptions::default() }),
            ("repetition penalty", SamplingOptions { repetition_penalty: Some(0.0), ..SamplingOptions::default() }),
        ] {
            assert_eq!(Sampling::new(&options, &GenerationDefaults::default()).unwrap_err().name, name);
        }
    }

    proptest! {
        #[test]
        fn any_logits_at_all_give_a_token_that_exists(
            mut logits in prop::collection::vec(any::<f32>(), 1..40), k in 0usize..50, p in 0.01f32..1.0, sequence in any::<u64>()
        ) {
            let sampling = sampling(|options| (options.top_k, options.top_p, options.repetition_penalty) = (Some(k), Some(p), Some(1.3)));
            let length = logits.len();
            let token = sampling.sample(&mut logits, &[0, 1, 2], sequence).unwrap();
            prop_assert!((token as usize) < length);
        }
    }
}
