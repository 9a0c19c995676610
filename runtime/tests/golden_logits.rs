//! The forward pass against `transformers`: token ids, logits, greedy tokens and held-out loss of the golden files.
//!
//! The golden logits were computed in float32 (`float.N` in float64) with another order of operations. Rounding
//! activations to int8 amplifies such differences, so they are compared closely with that rounding switched off, and
//! within the spread that float64 against float32 shows of itself with it.

mod support;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use safetensors::SafeTensors;
use serde_json::Value;
use support::{Dress, HuggingFaceFixture};
use ternion_compiler::{Cpu, Family};
use ternion_kernels_ref::head::{argmax, log_probability};
use ternion_runtime::formats::{Checkpoint, Projection};
use ternion_runtime::model::reference::{Precision, Reference};
use ternion_runtime::model::{KernelChoice, KvType, Model, Session, SessionOptions};
use ternion_runtime::team::{Team, available_threads};

struct Prompt {
    text: String,
    ids: Vec<u32>,
    /// Greedy tokens with the margin of each, by weights (`master` or `packed`).
    greedy: HashMap<String, Vec<(u32, f32)>>,
    /// Logits of the last positions, by weights.
    logits: HashMap<String, Vec<Vec<f32>>>,
}

fn golden() -> Value {
    serde_json::from_slice(&std::fs::read(support::fixture("golden.json")).unwrap()).unwrap()
}

fn prompts() -> Vec<Prompt> {
    let file = std::fs::read(support::fixture("golden-logits.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let ids = |json: &Value| -> Vec<u32> { serde_json::from_value(json.clone()).unwrap() };
    let prompt = |(n, json): (usize, &Value)| {
        let greedy = ["master", "packed"].map(|weights| {
            let margins: Vec<f32> = serde_json::from_value(json[weights]["margin"].clone()).unwrap();
            (weights.to_owned(), ids(&json[weights]["greedy"]).into_iter().zip(margins).collect())
        });
        let logits = ["master", "packed", "float"].map(|weights| {
            let tensor = tensors.tensor(&format!("{weights}.{n}")).unwrap();
            let values = tensor.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
            let values: Vec<f32> = values.collect();
            (weights.to_owned(), values.chunks_exact(tensor.shape()[1]).map(<[f32]>::to_vec).collect())
        });
        Prompt {
            text: json["text"].as_str().unwrap().to_owned(),
            ids: ids(&json["ids"]),
            greedy: HashMap::from(greedy),
            logits: HashMap::from(logits),
        }
    };
    golden()["prompts"].as_array().unwrap().iter().enumerate().map(prompt).collect()
}

/// A session on compiled kernels with an f32 cache, as the golden files were made.
fn session(checkpoint: &Checkpoint) -> Session {
    let cpu = Cpu::host().expect("a CPU that ternion compiles for");
    let team = Arc::new(Team::new(available_threads()).unwrap());
    let model = Model::load(checkpoint, &KernelChoice::Family(Family::Mad), &cpu, &*team, &|_| {}).unwrap();
    let options = SessionOptions { kv: KvType::F32, ..SessionOptions::default() };
    Session::new(Arc::new(model), team, &options).unwrap()
}

/// Logits after every token.
fn all_logits(session: &mut Session, tokens: &[u32]) -> Vec<Vec<f32>> {
    session.truncate(0);
    let mut all = Vec::new();
    session.prefill_all(tokens, &mut |_, logits| all.push(logits.to_vec())).unwrap();
    all
}

fn largest(logits: &[f32]) -> f32 {
    logits.iter().fold(0.0, |largest, logit| largest.max(logit.abs()))
}

/// `|found − expected|` of every logit of the last positions, as a part of the largest logit of its position.
fn relative_errors(found: &[Vec<f32>], expected: &[Vec<f32>]) -> Vec<f32> {
    let last = &found[found.len() - expected.len()..];
    let rows = last.iter().zip(expected);
    rows.flat_map(|(found, expected)| {
        let largest = largest(expected);
        found.iter().zip(expected).map(move |(found, expected)| (found - expected).abs() / largest)
    })
    .collect()
}

/// `(median, maximum)`
fn spread(mut errors: Vec<f32>) -> (f32, f32) {
    errors.sort_unstable_by(f32::total_cmp);
    (errors[errors.len() / 2], errors[errors.len() - 1])
}

/// The embedded model's trits with other scales, as a packed directory.
fn write_with_scales(directory: &Path, scale: impl Fn(&str) -> f32) {
    HuggingFaceFixture::new(Dress::PackedDirect).write(&support::embedded(), directory);
    let path = directory.join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let (header_length, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let scales: Vec<(usize, f32)> = header
        .tensors()
        .into_iter()
        .filter_map(|(name, info)| Some((info.data_offsets.0, scale(name.strip_suffix(".weight_scale")?))))
        .collect();
    assert_eq!(scales.len(), 42);
    for (offset, scale) in scales {
        bytes[8 + header_length + offset..][..4].copy_from_slice(&scale.to_le_bytes());
    }
    std::fs::write(path, bytes).unwrap();
}

/// The master weights' model: the packed one's trits with the master's scales.
fn master() -> (tempfile::TempDir, Checkpoint) {
    let json = std::fs::read(support::fixture("master-scales.json")).unwrap();
    let scales: HashMap<String, u32> = serde_json::from_slice(&json).unwrap();
    let directory = tempfile::tempdir().unwrap();
    write_with_scales(directory.path(), |module| f32::from_bits(scales[module]));
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    (directory, checkpoint)
}

#[test]
fn prompts_become_the_very_same_token_ids() {
    let tokenizer = support::embedded().tokenizer().unwrap();
    for Prompt { text, ids, .. } in prompts() {
        assert_eq!(tokenizer.encode(&text, true).unwrap(), ids, "{text:?}");
    }
}

#[test]
fn without_activation_quantisation_logits_are_within_1e_4_of_the_largest() {
    let reference = Reference::load(&support::embedded()).unwrap();
    for Prompt { text, ids, logits, .. } in prompts() {
        let mut session = reference.session(KvType::F32, Precision::Float);
        let found: Vec<_> = ids.iter().map(|token| session.step(*token).unwrap()).collect();
        let (median, worst) = spread(relative_errors(&found, &logits["float"]));
        eprintln!("{text:?}: median {median:.1e}, largest {worst:.1e}");
        assert!(worst <= 1e-4, "{text:?}: off by {worst:e} of the largest logit");
    }
}

/// Compares teacher-forced logits and greedy tokens of one set of weights.
fn compare_quantised(checkpoint: &Checkpoint, weights: &str) {
    let mut session = session(checkpoint);
    let (mut errors, mut compared, mut identical) = (Vec::new(), 0, 0);
    for Prompt { text, ids, greedy, logits } in prompts() {
        let forced: Vec<u32> = ids.iter().copied().chain(greedy[weights].iter().map(|(token, _)| *token)).collect();
        let found = all_logits(&mut session, &forced[..forced.len() - 1]);
        let golden = &logits[weights];
        let prompt_errors = relative_errors(&found[..ids.len()], golden);
        let (median, worst) = spread(prompt_errors.clone());
        eprintln!("{weights} {text:?}: median {median:.1e}, largest {worst:.1e}");
        assert!(worst <= 5e-2, "{weights} {text:?}: off by {worst:e} of the largest logit");

        let error = worst * golden.iter().map(|logits| largest(logits)).fold(0.0, f32::max);
        for (i, (token, margin)) in greedy[weights].iter().enumerate() {
            let chosen = argmax(&found[ids.len() - 1 + i]).unwrap() as u32;
            identical += usize::from(chosen == *token);
            if *margin > 2.0 * error {
                compared += 1;
                assert_eq!(chosen, *token, "{weights} {text:?}: greedy token {i}, margin {margin}, error {error}");
            }
        }
        errors.extend(prompt_errors);
    }
    let (median, worst) = spread(errors);
    eprintln!("{weights}: median {median:.1e}, largest {worst:.1e}; {identical} of 384 greedy tokens identical");
    eprintln!("{weights}: {compared} of 384 have a margin above twice the error, all identical");
    assert!(median <= 1e-2, "{weights}: median error {median:e}");
    assert!(compared > 200, "{weights}: only {compared} greedy tokens have a margin worth comparing");
}

#[test]
fn quantised_logits_and_greedy_tokens_of_the_packed_weights_are_the_golden_ones() {
    compare_quantised(&support::embedded(), "packed");
}

#[test]
fn quantised_logits_and_greedy_tokens_of_the_master_weights_are_the_golden_ones() {
    let (_directory, checkpoint) = master();
    compare_quantised(&checkpoint, "master");
}

#[test]
fn held_out_loss_is_within_0_003_of_the_golden_one() {
    let checkpoint = support::embedded();
    let mut session = session(&checkpoint);
    let text = std::fs::read_to_string(support::fixture("val.txt")).unwrap();
    let tokens = checkpoint.tokenizer().unwrap().encode(&text, true).unwrap();
    let golden = &golden()["val"]["packed"];
    let (mut total, mut predicted) = (0.0, 0u32);
    for window in tokens.chunks(256) {
        session.truncate(0);
        let mut add = |position: usize, logits: &[f32]| {
            if let Some(next) = window.get(position + 1) {
                total -= log_probability(logits, *next as usize);
                predicted += 1;
            }
        };
        session.prefill_all(window, &mut add).unwrap();
    }
    let (loss, expected) = (total / f64::from(predicted), golden["mean_nll"].as_f64().unwrap());
    eprintln!("{predicted} tokens predicted: loss {loss:.6}, golden {expected:.6}");
    assert_eq!(u64::from(predicted), golden["tokens"].as_u64().unwrap());
    assert!((loss - expected).abs() < 0.003, "loss {loss}, golden {expected}");
}

#[test]
fn packed_and_master_weights_with_the_same_scales_give_the_same_bits() {
    let directories = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let [master, packed] = directories.each_ref().map(tempfile::TempDir::path);
    HuggingFaceFixture::new(Dress::Master(ternion_runtime::formats::FloatType::Bf16))
        .write(&support::embedded(), master);
    let master = Checkpoint::open(master).unwrap();
    let mut scales = HashMap::new();
    for layer in 0..master.config().layers {
        for projection in Projection::ALL {
            let module = format!("model.layers.{layer}.{projection}");
            scales.insert(module, master.projection(layer, projection).unwrap().scale);
        }
    }
    write_with_scales(packed, |module| scales[module]);
    let packed = Checkpoint::open(packed).unwrap();
    let tokens = &prompts()[0].ids;
    let [master, packed] = [master, packed].map(|checkpoint| {
        all_logits(&mut session(&checkpoint), tokens).into_iter().flatten().map(f32::to_bits).collect::<Vec<_>>()
    });
    assert!(master == packed, "logits differ");
}
