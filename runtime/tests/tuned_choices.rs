//! What the tuner chooses changes how a model is computed, and not a token of what it says.

mod support;

use std::sync::Arc;

use ternion_compiler::{Columns, Cpu, KernelSpec, Schedule};
use ternion_runtime::formats::Checkpoint;
use ternion_runtime::formats::tern::{self, HeadType};
use ternion_runtime::model::{KernelChoice, Model, Session, SessionOptions, held, ready_form, request, sparse_shape};
use ternion_runtime::team::Team;
use ternion_tuner::{
    Alternative, Budget, CacheDir, Choice, Choices, Class, ListChoice, Problem, ProfileKey, Request, SparseChoice,
    choose, probe,
};

const THREADS: usize = 2;

fn cpu() -> Cpu {
    Cpu::host().expect("a CPU that ternion compiles for")
}

/// The untuned guess for every shape.
fn guess(checkpoint: &Checkpoint) -> Choices {
    let request = request(checkpoint.config(), Budget::NONE);
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
            alternatives: Vec::new(),
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

/// A choice that reads another layout than `choice`.
fn elsewhere(choice: Choice, k: usize) -> Choice {
    let schedules = |columns| Schedule::candidates(&KernelSpec { k, columns }, &cpu());
    let (ones, many) = (schedules(Columns::One), schedules(Columns::Many));
    let pairs = ones.iter().flat_map(|one| many.iter().map(move |many| (*one, *many)));
    let mut others = pairs.filter(|(one, many)| one.layout == many.layout && one.layout != choice.layout());
    let (one, many) = others.next().expect("two layouts");
    Choice::pair(one, many)
}

#[test]
fn what_a_file_holds_is_used_where_other_kernels_are_hardly_faster() {
    let directory = tempfile::tempdir().unwrap();
    let (path, cache) = (directory.path().join("m.tern"), CacheDir::at(directory.path().join("cache")));
    let team = Team::new(THREADS).unwrap();
    // The machine's fastest kernels, by what is remembered, and the file in another layout.
    let embedded = support::embedded();
    let request = request(embedded.config(), Budget::RACE);
    choose(&request, &cpu(), &team, &cache, &|_| {}).unwrap();
    let key = ProfileKey::new(&probe(), &cpu(), THREADS);
    let (mut profile, warnings) = cache.load(&key, &cpu());
    assert!(warnings.is_empty() && !profile.shapes.is_empty(), "{warnings:?}");
    for entry in &mut profile.shapes {
        entry.alternatives = vec![Alternative { choice: elsewhere(entry.choice, entry.k), slower: 1.04 }];
    }
    cache.import(&profile).unwrap();
    let other = |m, k| profile.shape(m, k).expect("every shape has raced").alternatives[0].choice;
    let mut choices = guess(&embedded);
    choices.found.iter_mut().for_each(|found| found.choice = other(found.problem.m, found.problem.k));
    let form = ready_form(&embedded, &KernelChoice::Tuned(choices), &cpu(), HeadType::Own).unwrap();
    let layout = |_, _, m, k| other(m, k).layout();
    tern::write_with(&embedded, &path, &layout, form, &mut |_, _| std::ops::ControlFlow::Continue(())).unwrap();

    let checkpoint = Checkpoint::open(&path).unwrap();
    let start = |held| {
        let request = Request { held, ..request.clone() };
        choose(&request, &cpu(), &team, &cache, &|_| {}).unwrap()
    };
    let load = |choices: Choices| {
        assert!(choices.all_known());
        Model::load(&checkpoint, &KernelChoice::Tuned(choices), &cpu(), &team, &|_| {}).unwrap().report()
    };
    let report = load(start(held(&checkpoint)));
    assert_eq!((report.packed_bytes, report.record_bytes), (0, report.mapped_record_bytes), "nothing is converted");
    assert!(load(start(Default::default())).packed_bytes > 0, "what is faster is not what the file holds");
    // Too slow to be used for the sake of a start.
    profile.shapes.iter_mut().for_each(|entry| entry.alternatives[0].slower = 1.2);
    cache.import(&profile).unwrap();
    assert!(load(start(held(&checkpoint))).packed_bytes > 0);
}
