//! What the tuner chooses changes how a model is computed, and not a token of what it says.

mod support;

use std::sync::Arc;
use std::time::Duration;

use ternion_compiler::{Columns, Cpu, KernelSpec, Schedule};
use ternion_runtime::formats::Checkpoint;
use ternion_runtime::model::{KernelChoice, Model, Session, SessionOptions, problems, sparse_shape};
use ternion_runtime::team::Team;
use ternion_tuner::{Budget, CacheDir, Choice, Choices, Class, ListChoice, Problem, Request, SparseChoice, choose};

const THREADS: usize = 2;

fn cpu() -> Cpu {
    Cpu::host().expect("a CPU that ternion compiles for")
}

/// The untuned guess for every shape.
fn guess(checkpoint: &Checkpoint) -> Choices {
    let request = Request {
        sparse: sparse_shape(checkpoint.config()),
        ..Request::new(problems(checkpoint.config()), Budget { time: Duration::ZERO, ..Budget::NONE })
    };
    let directory = tempfile::tempdir().unwrap();
    let team = Team::new(THREADS).unwrap();
    choose(&request, &cpu(), &team, &CacheDir::at(directory.path()), &|_| {}).unwrap()
}

/// Bits of the logits of a prompt's tokens and of some that follow one by one, and the bytes of packed weights.
fn logits(checkpoint: &Checkpoint, choices: Choices) -> (Vec<Vec<u32>>, usize) {
    let team = Arc::new(Team::new(THREADS).unwrap());
    let model = Model::load(checkpoint, &KernelChoice::Tuned(choices), &cpu(), &*team, &|_| {}).unwrap();
    let bytes = model.report().packed_bytes + model.report().mapped_bytes;
    let mut session = Session::new(Arc::new(model), team, &SessionOptions::default()).unwrap();
    let tokens = checkpoint.tokenizer().unwrap().encode("Once upon a time there was a king who had three sons", true);
    let tokens = tokens.unwrap();
    let mut all = Vec::new();
    let bits = |logits: &[f32]| logits.iter().map(|logit| logit.to_bits()).collect::<Vec<u32>>();
    session.prefill_all(&tokens, &mut |_, logits| all.push(bits(logits))).unwrap();
    for token in tokens {
        all.push(bits(session.step(token).unwrap()));
    }
    (all, bytes)
}

#[test]
fn two_copies_of_the_weights_say_what_one_says() {
    let checkpoint = support::embedded();
    let one_copy = guess(&checkpoint);
    let mut two_copies = one_copy.clone();
    for found in &mut two_copies.found {
        let Problem { k, .. } = found.problem;
        let one = found.choice.of(Class::One);
        let many = Schedule::candidates(&Class::Chunk.spec(k), &cpu());
        let many = many.into_iter().find(|many| many.layout != one.layout).expect("another layout for many columns");
        found.choice = Choice::pair(one, many);
    }
    let (expected, bytes) = logits(&checkpoint, one_copy);
    let (found, more) = logits(&checkpoint, two_copies);
    assert!(found == expected, "another layout for prompts changes a logit");
    assert!(more > bytes + bytes / 2, "{more} bytes are no second copy of {bytes}");
}

#[test]
fn every_kernel_for_lists_and_every_break_even_says_the_same() {
    let checkpoint = support::embedded();
    let shape = sparse_shape(checkpoint.config()).expect("the embedded model makes zeros");
    let schedules = |columns| Schedule::candidates(&KernelSpec { k: shape.hidden, columns }, &cpu());
    let (rows, columns) = (schedules(Columns::ListedRows), schedules(Columns::ListedColumns));
    let choice = |nth: usize, worth: f64| {
        let list = |schedules: &[Schedule]| ListChoice {
            schedule: schedules[nth % schedules.len()],
            worth,
            ratios: Vec::new(),
        };
        Some(SparseChoice { rows: list(&rows), columns: list(&columns) })
    };
    let guess = guess(&checkpoint);
    let with = |sparse| logits(&checkpoint, Choices { sparse, ..guess.clone() }).0;
    let expected = with(None);
    assert!(with(choice(0, 0.0)) == expected, "never reading lists");
    for nth in [0, 1, rows.len() / 2, rows.len() - 1] {
        assert!(with(choice(nth, 1.0)) == expected, "always reading lists, kernel {nth}");
    }
}
