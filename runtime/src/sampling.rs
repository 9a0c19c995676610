//! From logits to a token: one documented chain, the same in every program that uses this crate.
//!
//! 1. **Penalties**: the logit of every token that occurs in the sequence is divided by the repetition penalty if it is
//!    positive and multiplied by it if not. From those that have been generated, the frequency penalty times the number of
//!    times is subtracted, and the presence penalty once.
//! 2. **Top-k**: the k most likely tokens stay.
//! 3. **Top-p**: of those, the most likely ones whose probabilities first add up to p stay.
//! 4. **Min-p**: of those, the ones with at least this fraction of the largest probability stay.
//! 5. **Temperature**: logits are divided by it and a token is drawn: the one with the largest sum of logit and noise
//!    ([`Draw`]). Temperature 0 takes the most likely token.
//!
//! Ties go to the lowest id. The noise of a token is a function of (seed, sequence, position, token) alone, and every
//! sum runs in order of falling likelihood, so a text can be generated again on any machine, in any batch.
//!
//! [`Sampling`] is the settings, a [`Sampler`] one text under them. All settings but top-p without top-k need a few logits
//! only, and [`Sampler::wanted`] says which, so that the others need not be computed.

use std::cmp::Ordering;

use ternion_kernels_ref::math;

use crate::formats::GenerationDefaults;
use crate::model::{Candidate, Draw, Wanted};

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
    /// Penalty of generated tokens per occurrence, −2 to 2.
    pub frequency_penalty: f32,
    /// Penalty of tokens that have been generated, −2 to 2.
    pub presence_penalty: f32,
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
    frequency_penalty: f32,
    presence_penalty: f32,
    seed: u64,
}

impl Sampling {
    /// Always the most likely token.
    pub const GREEDY: Self = Self {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        frequency_penalty: 0.0,
        presence_penalty: 0.0,
        seed: 0,
    };

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
            frequency_penalty: options.frequency_penalty,
            presence_penalty: options.presence_penalty,
            seed: options.seed,
        };
        let check = |name, value: f32, legal: bool, expected| {
            if legal { Ok(()) } else { Err(SamplingError { name, value, expected }) }
        };
        let Self { temperature, top_p, min_p, repetition_penalty, frequency_penalty, presence_penalty, .. } = sampling;
        check("temperature", temperature, (0.0..=100.0).contains(&temperature), "0 to 100")?;
        check("top-p", top_p, top_p > 0.0 && top_p <= 1.0, "above 0 and at most 1")?;
        check("min-p", min_p, (0.0..=1.0).contains(&min_p), "0 to 1")?;
        let legal = repetition_penalty > 0.0 && repetition_penalty <= 100.0;
        check("repetition penalty", repetition_penalty, legal, "above 0 and at most 100")?;
        for (name, value) in [("frequency penalty", frequency_penalty), ("presence penalty", presence_penalty)] {
            check(name, value, (-2.0..=2.0).contains(&value), "-2 to 2")?;
        }
        Ok(sampling)
    }

    /// Whether the most likely token is always taken.
    #[must_use]
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// Whether logits of tokens in the text are changed.
    fn penalises(&self) -> bool {
        self.repetition_penalty != 1.0 || self.frequency_penalty != 0.0 || self.presence_penalty != 0.0
    }

    /// Top-k, top-p and min-p: drops the candidates that they do not keep, and leaves at least one. The others are in some
    /// other order then.
    fn truncate(&self, candidates: &mut Vec<Candidate>, weights: &mut Vec<f32>) {
        if self.top_k > 0 && self.top_k < candidates.len() {
            candidates.select_nth_unstable_by(self.top_k, by_likelihood);
            candidates.truncate(self.top_k);
        }
        if self.top_p == 1.0 && self.min_p == 0.0 {
            return;
        }
        candidates.sort_unstable_by(by_likelihood);
        weigh(candidates, weights);
        if self.top_p < 1.0 {
            let total: f64 = weights.iter().map(|weight| f64::from(*weight)).sum();
            let mut mass = 0.0;
            let enough = weights.iter().position(|weight| {
                mass += f64::from(*weight);
                mass >= f64::from(self.top_p) * total
            });
            candidates.truncate(enough.map_or(candidates.len(), |last| last + 1));
        }
        // The first weight is e^0 = 1, so the others are fractions of the largest probability.
        let kept = weights.iter().take_while(|weight| **weight >= self.min_p).count();
        candidates.truncate(kept.max(1));
    }
}

/// Chooses the tokens of one text.
#[derive(Clone, Debug)]
pub struct Sampler {
    sampling: Sampling,
    sequence: u64,
    /// Tokens of the text so far.
    position: usize,
    /// The different tokens of the text, in rising order; kept only for penalties.
    tokens: Vec<u32>,
    /// How often each has been generated: not at all if it is in the prompt alone.
    generated: Vec<u32>,
    weights: Vec<f32>,
}

impl Sampler {
    /// For sequence number `sequence`, which begins with `prompt`.
    #[must_use]
    pub fn new(sampling: Sampling, sequence: u64, prompt: &[u32]) -> Self {
        let tokens = if sampling.penalises() {
            let mut tokens = prompt.to_vec();
            tokens.sort_unstable();
            tokens.dedup();
            tokens
        } else {
            Vec::new()
        };
        let generated = vec![0; tokens.len()];
        Self { sampling, sequence, position: prompt.len(), tokens, generated, weights: Vec::new() }
    }

    /// The logits that [`sample`](Self::sample) needs when `ahead` more tokens have been accepted, besides those of
    /// [`penalised`](Self::penalised) tokens.
    #[must_use]
    pub fn wanted(&self, ahead: usize) -> Wanted {
        let Sampling { top_k, top_p, min_p, .. } = self.sampling;
        if self.sampling.is_greedy() {
            Wanted::Top(1)
        } else if top_k > 0 {
            Wanted::Top(top_k)
        } else if top_p < 1.0 {
            Wanted::All
        } else if min_p > 0.0 {
            // A little more than the logarithm, for the rounding of it and of exponentials.
            Wanted::Within(-libm::logf(min_p) + 1e-3)
        } else {
            Wanted::Drawn(self.draw(ahead))
        }
    }

    /// How the token is drawn when `ahead` more have been accepted.
    fn draw(&self, ahead: usize) -> Draw {
        let Sampling { seed, temperature, .. } = self.sampling;
        Draw::new(seed, self.sequence, self.position + ahead, temperature)
    }

    /// The tokens whose logits a penalty changes, in rising order.
    #[must_use]
    pub fn penalised(&self) -> &[u32] {
        &self.tokens
    }

    /// Whether penalties change logits.
    #[must_use]
    pub fn penalises(&self) -> bool {
        self.sampling.penalises()
    }

    /// The token that follows, if these are the logits: at least those of all tokens that are
    /// [`wanted`](Self::wanted) or [`penalised`](Self::penalised), in rising order of tokens. What is not a number
    /// counts as −∞.
    ///
    /// `None` if there are no candidates. They are in another order afterwards, and some are gone.
    #[must_use]
    pub fn sample(&mut self, candidates: &mut Vec<Candidate>) -> Option<u32> {
        for (logit, _) in candidates.iter_mut().filter(|(logit, _)| logit.is_nan()) {
            *logit = f32::NEG_INFINITY;
        }
        self.penalise(candidates);
        if self.sampling.is_greedy() {
            return candidates.iter().copied().min_by(by_likelihood).map(|(_, token)| token);
        }
        self.sampling.truncate(candidates, &mut self.weights);
        self.draw(0).choose(candidates)
    }

    /// Takes `token` for the next of the text.
    pub fn accept(&mut self, token: u32) {
        self.position += 1;
        if !self.sampling.penalises() {
            return;
        }
        match self.tokens.binary_search(&token) {
            Ok(at) => self.generated[at] += 1,
            Err(at) => {
                self.tokens.insert(at, token);
                self.generated.insert(at, 1);
            }
        }
    }

    fn penalise(&self, candidates: &mut [Candidate]) {
        let Sampling { repetition_penalty, frequency_penalty, presence_penalty, .. } = self.sampling;
        let mut rest = candidates;
        for (token, generated) in self.tokens.iter().zip(&self.generated) {
            let at = rest.partition_point(|candidate| candidate.1 < *token);
            rest = &mut rest[at..];
            let Some((logit, _)) = rest.first_mut().filter(|candidate| candidate.1 == *token) else { continue };
            *logit = if *logit > 0.0 { *logit / repetition_penalty } else { *logit * repetition_penalty };
            if *generated > 0 {
                *logit -= frequency_penalty * *generated as f32 + presence_penalty;
            }
        }
    }
}

/// Falling likelihood, lower ids first among equals.
fn by_likelihood(a: &Candidate, b: &Candidate) -> Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

/// `e^(logit − largest)` of candidates in order of falling likelihood.
fn weigh(candidates: &[Candidate], weights: &mut Vec<f32>) {
    let largest = candidates.first().map_or(0.0, |(logit, _)| *logit);
    weights.clear();
    // Infinitely many logits may be −∞; if all are, they are equally likely.
    weights
        .extend(candidates.iter().map(|(logit, _)| if *logit == largest { 1.0 } else { math::exp(logit - largest) }));
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

    /// All logits, as candidates.
    fn all(logits: &[f32]) -> Vec<Candidate> {
        logits.iter().copied().zip(0..).collect()
    }

    /// The token after `history` in a sequence.
    fn sample(sampling: Sampling, logits: &[f32], history: &[u32], sequence: u64) -> Option<u32> {
        Sampler::new(sampling, sequence, history).sample(&mut all(logits))
    }

    /// The tokens that 2,000 draws from `logits` give.
    fn drawn(sampling: Sampling, logits: &[f32]) -> Vec<usize> {
        let mut counts = vec![0; logits.len()];
        for sequence in 0..2000 {
            counts[sample(sampling, logits, &[], sequence).unwrap() as usize] += 1;
        }
        counts
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let counts = drawn(sampling(|_| {}), &[0.0, 2f32.ln(), 5f32.ln()]);
        for (count, expected) in counts.into_iter().zip([250.0, 500.0, 1250.0]) {
            assert!((f64::from(count as u32) - expected).abs() < 100.0, "{count} of {expected}");
        }
    }

    #[test]
    fn a_low_temperature_prefers_the_most_likely_and_zero_takes_it() {
        let logits = [0.0, 1.0, 0.5];
        let warm = drawn(sampling(|_| {}), &logits)[1];
        let cold = drawn(sampling(|options| options.temperature = Some(0.2)), &logits)[1];
        assert!(cold > warm);
        assert_eq!(drawn(Sampling::GREEDY, &logits), [0, 2000, 0]);
        assert_eq!(drawn(Sampling::GREEDY, &[1.0, 1.0, 0.0]), [2000, 0, 0]);
    }

    #[test]
    fn each_step_of_the_chain_keeps_what_it_says() {
        // Probabilities 0.5, 0.3, 0.2, in another order than the ids.
        let logits = [0.2f32.ln(), 0.5f32.ln(), 0.3f32.ln()];
        let kept = |sampling: Sampling| drawn(sampling, &logits).into_iter().map(|count| count > 0).collect::<Vec<_>>();
        assert_eq!(kept(sampling(|options| options.top_k = Some(2))), [false, true, true]);
        assert_eq!(kept(sampling(|options| options.top_p = Some(0.5))), [false, true, false]);
        assert_eq!(kept(sampling(|options| options.top_p = Some(0.75))), [false, true, true]);
        assert_eq!(kept(sampling(|options| options.top_p = Some(1e-6))), [false, true, false]);
        assert_eq!(kept(sampling(|options| options.min_p = Some(0.55))), [false, true, true]);
        assert_eq!(kept(sampling(|options| options.min_p = Some(1.0))), [false, true, false]);
        assert_eq!(kept(sampling(|_| {})), [true, true, true]);
    }

    #[test]
    fn penalties_change_the_tokens_of_the_text_alone() {
        let repetition = Sampling { repetition_penalty: 2.0, ..Sampling::GREEDY };
        let mut candidates = all(&[3.0, 2.0, -1.0]);
        Sampler::new(repetition, 0, &[0, 2, 0, 9]).penalise(&mut candidates);
        assert_eq!(candidates, all(&[1.5, 2.0, -2.0]));
        let others = Sampling { frequency_penalty: 0.5, presence_penalty: 0.25, ..Sampling::GREEDY };
        let mut sampler = Sampler::new(others, 0, &[0, 2]);
        for token in [1, 2, 1] {
            sampler.accept(token);
        }
        let mut candidates = all(&[3.0, 2.0, -1.0]);
        sampler.penalise(&mut candidates);
        // Prompt alone; generated twice; in the prompt and generated once.
        assert_eq!(candidates, all(&[3.0, 0.75, -1.75]));
        assert_eq!(sampler.penalised(), [0, 1, 2]);
        assert!(Sampler::new(Sampling::GREEDY, 0, &[0, 2]).penalised().is_empty());
    }

    #[test]
    fn a_token_depends_on_seed_sequence_and_position_alone() {
        let logits: Vec<f32> = (0..50).map(|i| (i % 7) as f32 * 0.1).collect();
        let draw = |seed, sequence, history: &[u32]| {
            sample(sampling(|options| options.seed = seed), &logits, history, sequence)
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
            ("presence penalty", SamplingOptions { presence_penalty: 2.5, ..SamplingOptions::default() }),
            ("frequency penalty", SamplingOptions { frequency_penalty: f32::NAN, ..SamplingOptions::default() }),
            ("repetition penalty", SamplingOptions { repetition_penalty: Some(0.0), ..SamplingOptions::default() }),
        ] {
            assert_eq!(Sampling::new(&options, &GenerationDefaults::default()).unwrap_err().name, name);
        }
    }

    proptest! {
        #[test]
        fn any_logits_at_all_give_a_token_that_exists(
            logits in prop::collection::vec(any::<f32>(), 1..40), k in 0usize..50, p in 0.01f32..1.0, sequence in any::<u64>()
        ) {
            let sampling = sampling(|options| (options.top_k, options.top_p, options.repetition_penalty) = (Some(k), Some(p), Some(1.3)));
            let token = sample(sampling, &logits, &[0, 1, 2], sequence).unwrap();
            prop_assert!((token as usize) < logits.len());
        }

        #[test]
        fn the_logits_that_are_wanted_suffice(
            logits in prop::collection::vec(-6f32..6.0, 1..60), k in 0usize..8, min_p in 0f32..1.0, greedy in any::<bool>(),
            penalty in prop::sample::select(vec![1.0, 1.3, 0.8]), history in prop::collection::vec(0u32..60, 0..6), sequence in any::<u64>()
        ) {
            let sampling = sampling(|options| {
                (options.top_k, options.min_p, options.repetition_penalty) = (Some(k), Some(min_p), Some(penalty));
                options.presence_penalty = penalty - 1.0;
                if greedy {
                    options.temperature = Some(0.0);
                }
            });
            let expected = sample(sampling, &logits, &history, sequence);
            let mut sampler = Sampler::new(sampling, sequence, &history);
            let mut others: Vec<f32> =
                all(&logits).iter().filter(|c| !sampler.penalised().contains(&c.1)).map(|c| c.0).collect();
            others.sort_unstable_by(|a, b| b.total_cmp(a));
            let threshold = match sampler.wanted(0) {
                // What is drawn is not a matter of the logit alone: see the head's tests.
                Wanted::All | Wanted::Drawn(_) => f32::NEG_INFINITY,
                Wanted::Top(k) => others.get(k - 1).copied().unwrap_or(f32::NEG_INFINITY),
                Wanted::Within(distance) => others.first().map_or(f32::NEG_INFINITY, |largest| largest - distance),
            };
            let mut candidates = all(&logits);
            candidates.retain(|c| c.0 >= threshold || sampler.penalised().contains(&c.1));
            prop_assert_eq!(sampler.sample(&mut candidates), expected);
        }
    }
}
