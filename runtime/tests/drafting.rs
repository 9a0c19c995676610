//! Drafting changes how long a text takes and not one token of it.

mod support;

use std::ops::ControlFlow;
use std::sync::Arc;

use ternion_compiler::{Cpu, Family};
use ternion_runtime::formats::GenerationDefaults;
use ternion_runtime::generate::{GenerateOptions, Generated, generate};
use ternion_runtime::model::{KernelChoice, Model, Session, SessionOptions};
use ternion_runtime::sampling::{Sampling, SamplingOptions};
use ternion_runtime::team::Team;

const PROMPTS: usize = 1000;

/// A text, and the tokens that the session holds after it. What the session has read of the prompt already is not read
/// again, as between turns of a chat.
fn text(session: &mut Session, prompt: &[u32], options: &GenerateOptions) -> (Generated, Vec<u32>) {
    let kept = session.reuse(prompt);
    let generated = generate(session, &prompt[kept..], options, &mut |_| ControlFlow::Continue(())).unwrap();
    (generated, session.tokens().to_vec())
}

#[test]
fn a_thousand_texts_are_the_same_with_and_without_drafts() {
    let checkpoint = support::embedded();
    let cpu = Cpu::host().expect("a CPU that ternion compiles for");
    let held_out = std::fs::read_to_string(support::fixture("val.txt")).unwrap();
    let tokens = checkpoint.tokenizer().unwrap().encode(&held_out, false).unwrap();
    let team = Arc::new(Team::new(1).unwrap());
    let model = Model::load(&checkpoint, &KernelChoice::Family(Family::Mad), &cpu, &*team, &|_| {}).unwrap();
    let model = Arc::new(model);

    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let counts = std::thread::scope(|scope| {
        let work = |thread: usize| {
            let mut session = Session::new(model.clone(), team.clone(), &SessionOptions::default()).unwrap();
            let mut counts = [0; 2];
            for prompt in (thread..PROMPTS).step_by(threads) {
                // A passage and its beginning once more, as in a task that works on its prompt: something to draft from.
                let passage = &tokens[prompt * 7 % (tokens.len() - 40)..][..6 + prompt % 9];
                let tokens = [passage, &passage[..3]].concat();
                let sampled = SamplingOptions {
                    temperature: Some(0.7),
                    top_k: Some(prompt % 3 * 20),
                    min_p: Some(if prompt % 5 == 0 { 0.1 } else { 0.0 }),
                    repetition_penalty: Some(if prompt % 4 == 0 { 1.1 } else { 1.0 }),
                    seed: prompt as u64,
                    ..SamplingOptions::default()
                };
                let sampled = Sampling::new(&sampled, &GenerationDefaults::default()).unwrap();
                for sampling in [Sampling::GREEDY, sampled] {
                    let plain = GenerateOptions { sampling, sequence: 0, limit: Some(10), stop: vec![13], draft: 0 };
                    let drafting = GenerateOptions { draft: 1 + prompt % 8, ..plain.clone() };
                    let (expected, left) = text(&mut session, &tokens, &plain);
                    let (found, left_too) = text(&mut session, &tokens, &drafting);
                    assert_eq!((&found.tokens, found.reason), (&expected.tokens, expected.reason), "prompt {prompt}");
                    assert_eq!(left_too, left, "prompt {prompt}: what the session holds");
                    assert_eq!(expected.drafted, 0);
                    counts[0] += found.drafted;
                    counts[1] += found.accepted;
                }
            }
            counts
        };
        let workers: Vec<_> = (0..threads).map(|thread| scope.spawn(move || work(thread))).collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).fold([0; 2], |a, b| [a[0] + b[0], a[1] + b[1]])
    });
    let [drafted, accepted] = counts;
    assert!(drafted > PROMPTS && accepted > PROMPTS / 10, "{accepted} of {drafted} drafts accepted: hardly a test");
    assert!(accepted < drafted, "no draft was wrong: hardly a test");
}

#[test]
fn a_context_that_ends_within_a_draft_ends_the_text_at_the_same_token() {
    let checkpoint = support::embedded();
    let cpu = Cpu::host().expect("a CPU that ternion compiles for");
    let team = Arc::new(Team::new(1).unwrap());
    let model = Model::load(&checkpoint, &KernelChoice::Family(Family::Mad), &cpu, &*team, &|_| {}).unwrap();
    let model = Arc::new(model);
    let tokens = checkpoint.tokenizer().unwrap().encode("and so on, and so on, and so on, and", false).unwrap();
    for room in 1..12 {
        let options = SessionOptions { context: Some(tokens.len() + room), ..SessionOptions::default() };
        let mut session = Session::new(model.clone(), team.clone(), &options).unwrap();
        let plain =
            GenerateOptions { sampling: Sampling::GREEDY, sequence: 0, limit: None, stop: Vec::new(), draft: 0 };
        let expected = text(&mut session, &tokens, &plain);
        let found = text(&mut session, &tokens, &GenerateOptions { draft: 8, ..plain });
        assert_eq!(found.0.tokens.len(), room + 1);
        assert_eq!((found.0.tokens, found.1), (expected.0.tokens, expected.1));
    }
}
