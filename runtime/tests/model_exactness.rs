//! One sequence of logits, bit for bit, whatever computes it.

mod support;

use std::sync::Arc;

use ternion_compiler::{Cpu, Family};
use ternion_runtime::formats::Checkpoint;
use ternion_runtime::model::reference::{Precision, Reference};
use ternion_runtime::model::{Batch, KernelChoice, KvType, Model, ModelError, Part, Sequence, Session, SessionOptions};
use ternion_runtime::team::Team;

const FAMILIES: [Family; 2] = [Family::Mad, Family::Tl1];

fn model(checkpoint: &Checkpoint, family: Family) -> Arc<Model> {
    let cpu = Cpu::host().expect("a CPU that ternion compiles for");
    let team = Team::new(2).unwrap();
    Arc::new(Model::load(checkpoint, &KernelChoice::Family(family), &cpu, &team, &|_| {}).unwrap())
}

fn session(model: &Arc<Model>, threads: usize, options: SessionOptions) -> Session {
    Session::new(Arc::clone(model), Arc::new(Team::new(threads).unwrap()), &options).unwrap()
}

/// Some 80 tokens of held-out text: more than one block of attention, no whole number of chunks.
fn tokens(checkpoint: &Checkpoint) -> Vec<u32> {
    let text = std::fs::read_to_string(support::fixture("val.txt")).unwrap();
    let mut tokens = checkpoint.tokenizer().unwrap().encode(&text[..400], true).unwrap();
    tokens.truncate(83);
    assert!(tokens.len() > 70);
    tokens
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|logit| logit.to_bits()).collect()
}

#[test]
fn logits_are_those_of_the_reference_for_all_kernels_threads_chunks_and_caches() {
    let checkpoint = support::embedded();
    let reference = Reference::load(&checkpoint).unwrap();
    let tokens = tokens(&checkpoint);
    let models = FAMILIES.map(|family| model(&checkpoint, family));
    for kv in KvType::ALL {
        let mut scalar = reference.session(kv, Precision::Int8);
        let expected: Vec<Vec<u32>> = tokens.iter().map(|token| bits(&scalar.step(*token).unwrap())).collect();
        for (family, model) in FAMILIES.into_iter().zip(&models) {
            for threads in [1, 2, 3] {
                for chunk in [1, 7, 64] {
                    let mut session = session(model, threads, SessionOptions { kv, chunk, context: None });
                    let mut seen = 0;
                    let mut compare = |position: usize, logits: &[f32]| {
                        assert!(
                            bits(logits) == expected[position],
                            "kv {kv}, {family}, {threads} threads, chunks of {chunk}: position {position}"
                        );
                        seen += 1;
                    };
                    session.prefill_all(&tokens, &mut compare).unwrap();
                    assert_eq!(seen, tokens.len());
                }
            }
        }
    }
}

/// Attention is shared out in two ways, and a long text of few tokens at a time by blocks: every split must give what one
/// thread gives alone, for one sequence and for several of different lengths in one pass.
#[test]
fn long_texts_give_the_same_logits_however_threads_share_their_blocks() {
    let checkpoint = support::embedded();
    let model = model(&checkpoint, Family::Mad);
    let text: Vec<u32> = (0..250).map(|i| i * 37 % 2000 + 1).collect();
    for kv in KvType::ALL {
        let options = SessionOptions { kv, ..SessionOptions::default() };
        let mut alone = session(&model, 1, SessionOptions { chunk: 1, ..options });
        let mut expected = Vec::new();
        alone.prefill_all(&text, &mut |_, logits| expected.push(bits(logits))).unwrap();
        for threads in [2, 3, 5, 7] {
            let mut session = session(&model, threads, options);
            session.prefill(&text[..180]).unwrap();
            let mut position = 180;
            // Few tokens, many, and numbers that end inside and on a block.
            for count in [1, 2, 5, 4, 1, 8, 9, 31, 8] {
                let logits = bits(session.prefill(&text[position..position + count]).unwrap());
                position += count;
                assert!(logits == expected[position - 1], "kv {kv}, {threads} threads, {count} to {position}");
            }
        }
    }
}

#[test]
fn sequences_of_different_lengths_in_one_pass_do_not_show_however_threads_share_their_blocks() {
    let checkpoint = support::embedded();
    let model = model(&checkpoint, Family::Mad);
    let text: Vec<u32> = (0..250).map(|i| i * 53 % 2000 + 1).collect();
    for threads in [1, 2, 3, 5] {
        let team = Arc::new(Team::new(threads).unwrap());
        let mut batch = Batch::new(Arc::clone(&model), Arc::clone(&team), 64).unwrap();
        let mut sequences: Vec<Sequence> = [3, 64, 65, 200]
            .map(|length| {
                let mut sequence = Sequence::new(&model, KvType::default(), None).unwrap();
                for tokens in text[..length].chunks(64) {
                    batch.forward(&mut [Part { sequence: &mut sequence, tokens }]).unwrap();
                }
                sequence
            })
            .into();
        for counts in [[1, 1, 1, 1], [2, 1, 3, 2], [5, 4, 3, 7]] {
            let starts: Vec<usize> = sequences.iter().map(|sequence| sequence.tokens().len()).collect();
            let parts = sequences.iter_mut().zip(starts.iter().zip(counts));
            let mut parts: Vec<Part<'_>> = parts
                .map(|(sequence, (start, count))| Part { sequence, tokens: &text[*start..start + count] })
                .collect();
            batch.forward(&mut parts).unwrap();
        }
        for sequence in &sequences {
            let mut alone = session(&model, 1, SessionOptions { chunk: 1, ..SessionOptions::default() });
            alone.read(sequence.tokens()).unwrap();
            assert_eq!(bits(sequence.state()), bits(alone.sequence().state()), "{threads} threads");
        }
    }
}

#[test]
fn prompts_and_single_steps_end_at_the_same_logits() {
    let checkpoint = support::embedded();
    let model = model(&checkpoint, Family::Mad);
    let tokens = tokens(&checkpoint);
    let mut whole = session(&model, 2, SessionOptions::default());
    let expected = bits(whole.prefill(&tokens).unwrap());
    let mut steps = session(&model, 1, SessionOptions::default());
    steps.prefill(&tokens[..40]).unwrap();
    for token in &tokens[40..] {
        steps.step(*token).unwrap();
    }
    assert_eq!(bits(steps.logits()), expected);
}

#[test]
fn a_session_that_goes_back_gives_the_same_logits_again() {
    let checkpoint = support::embedded();
    let model = model(&checkpoint, Family::Tl1);
    let tokens = tokens(&checkpoint);
    let mut session = session(&model, 2, SessionOptions::default());
    let expected = bits(session.prefill(&tokens).unwrap());

    session.truncate(20);
    session.prefill(&[7; 60]).unwrap();
    let kept = session.reuse(&tokens);
    assert_eq!(kept, 20);
    assert_eq!(bits(session.prefill(&tokens[kept..]).unwrap()), expected);
    // The same prompt once more: all but its last token are there.
    let kept = session.reuse(&tokens);
    assert_eq!(kept, tokens.len() - 1);
    assert_eq!(bits(session.prefill(&tokens[kept..]).unwrap()), expected);
}

#[test]
fn texts_that_share_their_beginning_do_not_show_in_each_other() {
    let checkpoint = support::embedded();
    let model = model(&checkpoint, Family::Mad);
    let team = Arc::new(Team::new(2).unwrap());
    let tokens = tokens(&checkpoint);
    for kv in KvType::ALL {
        let mut batch = Batch::new(Arc::clone(&model), Arc::clone(&team), 128).unwrap();
        let mut origin = Sequence::new(&model, kv, None).unwrap();
        batch.forward(&mut [Part { sequence: &mut origin, tokens: &tokens[..70] }]).unwrap();
        // One goes on from the middle of the first block, one from the second, the origin from its end: in turns.
        let mut texts = [origin.fork(40), origin.fork(66), origin];
        for turn in 0..5 {
            let next: Vec<[u32; 2]> = (0..3).map(|at| [turn * 3 + at + 1, 500 - turn]).collect();
            let parts = texts.iter_mut().zip(&next);
            let mut parts: Vec<Part<'_>> = parts.map(|(sequence, tokens)| Part { sequence, tokens }).collect();
            batch.forward(&mut parts).unwrap();
        }
        for text in &texts {
            let mut alone = session(&model, 1, SessionOptions { kv, ..SessionOptions::default() });
            alone.read(text.tokens()).unwrap();
            assert_eq!(bits(text.state()), bits(alone.sequence().state()), "{kv}, {} tokens", text.tokens().len());
        }
    }
}

#[test]
fn what_a_session_cannot_read_is_refused_and_changes_nothing() {
    let checkpoint = support::embedded();
    let model = model(&checkpoint, Family::Mad);
    let mut session = session(&model, 1, SessionOptions { context: Some(10), ..SessionOptions::default() });
    session.prefill(&[0, 5]).unwrap();
    let logits = bits(session.logits());
    assert!(matches!(session.prefill(&[]), Err(ModelError::EmptyPrompt)));
    assert!(matches!(session.prefill(&[1; 9]), Err(ModelError::PromptTooLong { tokens: 9, used: 2, context: 10 })));
    assert!(matches!(session.step(2048), Err(ModelError::NoSuchToken { token: 2048, vocabulary: 2048 })));
    assert_eq!((bits(session.logits()), session.tokens()), (logits, &[0, 5][..]));
    session.prefill(&[1; 8]).unwrap();
    assert_eq!(session.room(), 0);
    assert!(matches!(session.step(1), Err(ModelError::PromptTooLong { tokens: 1, used: 10, context: 10 })));
    for context in [0, 257] {
        let options = SessionOptions { context: Some(context), ..SessionOptions::default() };
        let error = Session::new(Arc::clone(&model), Arc::new(Team::new(1).unwrap()), &options).unwrap_err();
        assert!(matches!(error, ModelError::Context { limit: 256, .. }));
    }
}

#[test]
fn memory_of_the_cache_follows_the_text() {
    let checkpoint = support::embedded();
    let model = model(&checkpoint, Family::Mad);
    let mut session = session(&model, 1, SessionOptions::default());
    assert_eq!(session.kv_bytes(), 0);
    session.step(0).unwrap();
    // 128 positions in 6 layers of 2 heads of 64: keys and values of two bytes.
    let block = 128 * 6 * 2 * 64 * 2 * 2;
    assert_eq!(session.kv_bytes(), block);
    session.prefill(&[3; 127]).unwrap();
    assert_eq!(session.kv_bytes(), block);
    session.step(3).unwrap();
    assert_eq!(session.kv_bytes(), 2 * block);
}
