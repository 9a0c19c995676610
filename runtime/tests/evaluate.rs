//! Losses, answers and counts: against the golden files, and the same for all kernels, threads and chunks.

mod support;

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;
use ternion_compiler::{Cpu, Family};
use ternion_kernels_ref::head::log_probability;
use ternion_runtime::evaluate::{
    ActivationCounts, EvaluateError, Loss, Scored, Windows, loss, read_questions, score, summarise, weights,
};
use ternion_runtime::formats::{Checkpoint, Projection};
use ternion_runtime::model::{KernelChoice, KvType, Model, Observer, Session, SessionOptions};
use ternion_runtime::team::Team;

fn session(checkpoint: &Checkpoint, family: Family, threads: usize, chunk: usize, kv: KvType) -> Session {
    let cpu = Cpu::host().expect("a CPU that ternion compiles for");
    let team = Arc::new(Team::new(threads).unwrap());
    let model = Model::load(checkpoint, &KernelChoice::Family(family), &cpu, &*team, &|_| {}).unwrap();
    Session::new(Arc::new(model), team, &SessionOptions { kv, chunk, context: None }).unwrap()
}

fn tokens(checkpoint: &Checkpoint, limit: usize) -> Vec<u32> {
    let text = std::fs::read_to_string(support::fixture("val.txt")).unwrap();
    let mut tokens = checkpoint.tokenizer().unwrap().encode(&text, true).unwrap();
    tokens.truncate(limit);
    tokens
}

/// All that `loss` says.
fn measured(
    session: &mut Session,
    tokens: &[u32],
    (context, stride): (usize, usize),
    observer: Option<&mut dyn Observer>,
) -> (Loss, Vec<Scored>) {
    let mut all = Vec::new();
    let mut visit = |scored: &Scored| all.push(*scored);
    let mut go_on = |_| ControlFlow::Continue(());
    let loss = loss(session, tokens, Windows { context, stride }, observer, &mut visit, &mut go_on).unwrap();
    (loss, all)
}

fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(support::fixture(name)).unwrap()).unwrap()
}

#[test]
fn windows_of_their_own_have_the_golden_losses() {
    let checkpoint = support::embedded();
    let golden = &json("golden.json")["val"]["packed"]["window_nll_sum"];
    let tokens = tokens(&checkpoint, 4 * 256);
    let mut session = session(&checkpoint, Family::Mad, 2, 64, KvType::F32);
    let (loss, scored) = measured(&mut session, &tokens, (256, 256), None);
    assert_eq!((loss.tokens, scored.len()), (4 * 255, 4 * 255));
    for (window, scored) in scored.chunks(255).enumerate() {
        assert_eq!(scored[0].index, window * 256 + 1);
        let mean = -scored.iter().map(|scored| scored.log_probability).sum::<f64>() / 255.0;
        let expected = golden[window].as_f64().unwrap() / 255.0;
        assert!((mean - expected).abs() < 0.02, "window {window}: {mean}, golden {expected}");
    }
}

#[test]
fn a_loss_has_the_same_bits_for_all_kernels_threads_and_chunks_observed_or_not() {
    let checkpoint = support::embedded();
    let tokens = tokens(&checkpoint, 300);
    let windows = (100, 64);
    let expected = measured(&mut session(&checkpoint, Family::Mad, 1, 64, KvType::F16), &tokens, windows, None);
    for (family, threads, chunk) in [(Family::Mad, 3, 7), (Family::Tl1, 2, 1), (Family::Tl1, 1, 64)] {
        let mut session = session(&checkpoint, family, threads, chunk, KvType::F16);
        assert!(
            measured(&mut session, &tokens, windows, None) == expected,
            "{family}, {threads} threads, chunks of {chunk}"
        );
        let mut counts = ActivationCounts::new(checkpoint.config());
        let observed = measured(&mut session, &tokens, windows, Some(&mut counts));
        assert!(observed == expected, "observed: {family}, {threads} threads, chunks of {chunk}");
    }
}

#[test]
fn a_smaller_stride_predicts_every_token_but_the_first_once_from_what_its_window_holds() {
    let checkpoint = support::embedded();
    let tokens = tokens(&checkpoint, 150);
    let mut session = session(&checkpoint, Family::Mad, 2, 64, KvType::F16);
    let (loss, scored) = measured(&mut session, &tokens, (64, 40), None);
    assert_eq!(loss.tokens, 149);
    assert!(scored.iter().map(|scored| scored.index).eq(1..150));
    // Windows begin at 0, 40, 80 and end at 64, 104, 144: token 110 is the third one's to predict.
    session.truncate(0);
    let logits = session.prefill(&tokens[80..110]).unwrap();
    assert_eq!(scored[109].log_probability, log_probability(logits, tokens[110] as usize));
    assert_eq!(loss.total, -scored.iter().map(|scored| scored.log_probability).sum::<f64>());
}

#[test]
fn windows_and_texts_that_make_no_sense_are_refused() {
    let checkpoint = support::embedded();
    let mut session = session(&checkpoint, Family::Mad, 1, 64, KvType::F16);
    let mut measure = |tokens: &[u32], context, stride| {
        let windows = Windows { context, stride };
        loss(&mut session, tokens, windows, None, &mut |_| {}, &mut |_| ControlFlow::Continue(())).map(drop)
    };
    for (context, stride) in [(1, 1), (10, 0), (10, 11)] {
        assert!(matches!(measure(&[1, 2, 3], context, stride), Err(EvaluateError::Windows { .. })));
    }
    assert!(matches!(measure(&[1], 10, 10), Err(EvaluateError::TooShort { tokens: 1 })));
    assert!(measure(&[1, 2, 9999], 10, 10).is_err());
    assert!(measure(&[1; 300], 257, 257).is_err(), "longer than the context");
}

#[test]
fn counts_are_those_of_the_models_own_statistics() {
    let checkpoint = support::embedded();
    let expected = json("stats.json");
    let counted = weights(&checkpoint, &Team::new(2).unwrap()).unwrap();
    for (layer, counts) in counted.iter().enumerate() {
        for (projection, count) in Projection::ALL.into_iter().zip(counts) {
            let (m, k) = projection.shape(checkpoint.config());
            assert_eq!(count.weights, (m * k) as u64);
            let name = format!("model.layers.{layer}.{projection}.weight");
            let fraction = expected["weights_zero_fraction"][&name].as_f64().unwrap();
            assert!((count.zeros as f64 / count.weights as f64 - fraction).abs() < 1e-4, "{name}");
        }
    }
    // The first 2048 tokens of held-out text; the published figures are of all 17603.
    let tokens = tokens(&checkpoint, 2048);
    let mut counts = ActivationCounts::new(checkpoint.config());
    let mut session = session(&checkpoint, Family::Mad, 2, 64, KvType::F32);
    measured(&mut session, &tokens, (256, 256), Some(&mut counts));
    for (layer, counts) in counts.layers.iter().enumerate() {
        assert_eq!((counts.gates, counts.inputs[6]), (2048 * 768, 2048 * 768));
        let gate = counts.gates_not_positive as f64 / counts.gates as f64;
        let down = counts.zero_inputs[6] as f64 / counts.inputs[6] as f64;
        let ffn = &expected["ffn"][layer];
        assert!((gate - ffn["gate_le_zero"].as_f64().unwrap()).abs() < 0.01, "layer {layer}: gate {gate}");
        assert!((down - ffn["down_input_int8_zero"].as_f64().unwrap()).abs() < 0.01, "layer {layer}: down {down}");
        assert!((0.72..0.89).contains(&gate) && (0.83..0.96).contains(&down), "layer {layer}: {gate}, {down}");
    }
}

const QUESTIONS: &str = r#"
{"context": "Once upon a time there was a", "choices": ["king", "computer", "zebra"], "gold": 0}
{"context": "Once upon a time there was a", "choices": ["computer", "beautiful princess"], "gold": 1}
{"context": ["The king slept because the king", "The king slept because the chair"], "choices": ["was tired.", "was tired."], "gold": 0}
{"context": "", "choices": ["There was once", "qqqqqq"], "gold": 0}
"#;

#[test]
fn choices_are_scored_by_their_own_tokens_whatever_was_read_before() {
    let checkpoint = support::embedded();
    let tokenizer = checkpoint.tokenizer().unwrap();
    let questions = read_questions(Path::new("questions.jsonl"), QUESTIONS).unwrap();
    let answer = |family, threads, chunk| {
        let mut session = session(&checkpoint, family, threads, chunk, KvType::F16);
        score(&mut session, &tokenizer, &questions, " ", &mut |_| ControlFlow::Continue(())).unwrap()
    };
    let scores = answer(Family::Mad, 1, 64);
    assert_eq!(scores, answer(Family::Tl1, 3, 5));
    let summary = summarise(&scores);
    assert_eq!((summary.questions, summary.acc, summary.acc_norm, summary.truncated), (4, 1.0, 1.0, 0));

    // The second question by hand, token by token on a session of its own.
    let mut session = session(&checkpoint, Family::Mad, 1, 64, KvType::F16);
    let context = tokenizer.encode("Once upon a time there was a", true).unwrap();
    let whole = tokenizer.encode("Once upon a time there was a beautiful princess", true).unwrap();
    assert!(whole.starts_with(&context) && whole.len() > context.len() + 1);
    let mut expected = 0.0;
    session.prefill(&context).unwrap();
    for token in &whole[context.len()..] {
        expected += log_probability(session.logits(), *token as usize);
        session.step(*token).unwrap();
    }
    let found = scores[1].choices[1];
    assert_eq!((found.log_probability, found.tokens), (expected, whole.len() - context.len()));
    assert_eq!(found.bytes, "beautiful princess".len());
}

#[test]
fn contexts_lose_their_beginning_when_they_are_too_long_and_choices_are_refused() {
    let checkpoint = support::embedded();
    let tokenizer = checkpoint.tokenizer().unwrap();
    let mut session = session(&checkpoint, Family::Mad, 2, 64, KvType::F16);
    let long = "the king and the queen ".repeat(80);
    let mut answer = |context: &str, choice: &str| {
        let line = serde_json::json!({"context": context, "choices": [choice, "b"], "gold": 0}).to_string();
        let questions = read_questions(Path::new("q.jsonl"), &line).unwrap();
        score(&mut session, &tokenizer, &questions, " ", &mut |_| ControlFlow::Continue(()))
    };
    assert!(answer(long.trim_end(), "lived").unwrap()[0].truncated);
    assert!(!answer("the king", "lived").unwrap()[0].truncated);
    let error = answer("the king", &long).unwrap_err().to_string();
    assert!(error.contains("question 1, choice 0") && error.contains("context of 256"), "{error}");
}
