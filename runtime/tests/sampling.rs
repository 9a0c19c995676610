//! Whatever is screened away of a head, the sampler takes the token that it takes when it sees every logit.

use proptest::prelude::*;
use ternion_runtime::formats::{FloatMatrix, FloatType, GenerationDefaults};
use ternion_runtime::model::{Candidate, Draw, Head, HeadScratch, Query, Wanted};
use ternion_runtime::sampling::{Sampler, Sampling, SamplingOptions};
use ternion_runtime::team::Team;

const HIDDEN: usize = 32;

/// Rows whose logits with `state` are as near to these as `f32` allows.
fn rows(state: &[f32], logits: &[f32]) -> Vec<u8> {
    let squares: f32 = state.iter().map(|x| x * x).sum();
    let row = |logit: &f32| state.iter().map(|x| x * (logit / squares)).collect::<Vec<f32>>();
    logits.iter().flat_map(row).flat_map(f32::to_le_bytes).collect()
}

struct Screened {
    team: Team,
    head: Head,
    scratch: HeadScratch,
}

impl Screened {
    fn new(state: &[f32], logits: &[f32]) -> Self {
        let bytes = rows(state, logits).into();
        let matrix = FloatMatrix { rows: logits.len(), columns: HIDDEN, dtype: FloatType::F32.into(), bytes };
        let team = Team::new(1).unwrap();
        let head = Head::with_screen(matrix, true, &team).unwrap();
        Self { team, head, scratch: HeadScratch::default() }
    }

    fn candidates(&mut self, state: &[f32], wanted: Wanted, always: &[u32]) -> Vec<Candidate> {
        let mut found = [Vec::new()];
        let query = Query { state, wanted, always };
        self.head.candidates(&self.team, [query].into_iter(), &mut self.scratch, &mut found);
        let [found] = found;
        found
    }
}

fn state() -> impl Strategy<Value = Vec<f32>> {
    prop::collection::vec(prop_oneof![-1f32..-0.1, 0.1f32..1.0], HIDDEN)
}

proptest! {
    #[test]
    fn a_screened_head_gives_the_sampler_the_same_token(
        state in state(), logits in prop::collection::vec(-6f32..6.0, 1..60), k in prop_oneof![2 => Just(0usize), 1 => 1usize..8],
        (top_p, min_p) in prop::sample::select(vec![(1.0, 0.0), (1.0, 0.0), (1.0, 0.2), (0.8, 0.0), (0.9, 0.1)]),
        temperature in prop::sample::select(vec![0.0, 0.01, 0.5, 1.0, 3.0, 100.0]), seed in any::<u64>(),
        penalty in prop::sample::select(vec![1.0, 1.3, 0.8]), history in prop::collection::vec(0u32..60, 0..6),
    ) {
        let mut screened = Screened::new(&state, &logits);
        let options = SamplingOptions {
            temperature: Some(temperature),
            top_k: Some(k),
            top_p: Some(top_p),
            min_p: Some(min_p),
            repetition_penalty: Some(penalty),
            seed,
            ..SamplingOptions::default()
        };
        let mut sampler = Sampler::new(Sampling::new(&options, &GenerationDefaults::default()).unwrap(), 0, &history);
        for step in 0..3 {
            let always = sampler.penalised().to_vec();
            let mut all = screened.candidates(&state, Wanted::All, &always);
            let mut few = screened.candidates(&state, sampler.wanted(0), &always);
            prop_assert!(all.len() == logits.len() && few.len() <= all.len());
            let expected = sampler.sample(&mut all).unwrap();
            prop_assert_eq!(sampler.sample(&mut few), Some(expected), "step {}", step);
            sampler.accept(expected);
        }
    }

    #[test]
    fn tokens_that_chance_makes_all_but_equal_are_told_apart(
        state in state(), seed in any::<u64>(), temperature in prop::sample::select(vec![0.3f32, 1.0, 2.0]),
        nudges in prop::collection::vec(-4i32..5, 2..50),
    ) {
        // Logits that make up for the noise: the sums differ in the last bits, which the screen cannot see.
        let noise = |token: usize| {
            let key = ternion_kernels_ref::gumbel::key(seed, 0, 0);
            ternion_kernels_ref::gumbel::gumbel(ternion_kernels_ref::gumbel::mix(key, token as u64)) as f32
        };
        let logit = |(token, nudge): (usize, &i32)| {
            f32::from_bits((temperature * (9.0 - noise(token))).to_bits().wrapping_add_signed(*nudge))
        };
        let logits: Vec<f32> = nudges.iter().enumerate().map(logit).collect();
        let mut screened = Screened::new(&state, &logits);
        let draw = Draw::new(seed, 0, 0, temperature);
        let all = screened.candidates(&state, Wanted::All, &[]);
        let few = screened.candidates(&state, Wanted::Drawn(draw), &[]);
        prop_assert!(draw.choose(&all).is_some());
        prop_assert_eq!(draw.choose(&few), draw.choose(&all));
    }
}
