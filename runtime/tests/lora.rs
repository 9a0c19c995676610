//! Adapters against `peft`, and every kernel against the reference with them.

mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::SafeTensors;
use serde_json::{Value, json};
use ternion_compiler::{Cpu, Family};
use ternion_runtime::formats::Checkpoint;
use ternion_runtime::lora::Adapter;
use ternion_runtime::model::reference::{Precision, Reference};
use ternion_runtime::model::{KernelChoice, KvType, Model, Session, SessionOptions};
use ternion_runtime::team::Team;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn base() -> Checkpoint {
    Checkpoint::open(&fixture("families/bitnet-2b4t")).unwrap()
}

/// The adapters of a test: `first` as it is, `second` at half its scale.
fn adapters(checkpoint: &Checkpoint) -> [Adapter; 2] {
    [("first", 1.0), ("second", 0.5)]
        .map(|(name, scale)| Adapter::open(&fixture("lora").join(name), checkpoint.config(), scale).unwrap())
}

/// Token ids, and logits by name.
fn golden() -> (Vec<u32>, impl Fn(&str) -> Vec<Vec<f32>>) {
    let file = std::fs::read(fixture("lora/golden.safetensors")).unwrap();
    let ids = SafeTensors::deserialize(&file).unwrap().tensor("ids").unwrap().data().to_vec();
    let rows = move |name: &str| {
        let tensors = SafeTensors::deserialize(&file).unwrap();
        let tensor = tensors.tensor(name).unwrap();
        let values: Vec<f32> = tensor.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        values.chunks_exact(tensor.shape()[1]).map(<[f32]>::to_vec).collect()
    };
    (ids.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect(), rows)
}

#[test]
fn adapters_give_what_peft_computes() {
    let checkpoint = base();
    let (ids, golden) = golden();
    let mut reference = Reference::load(&checkpoint).unwrap();
    let [first, second] = adapters(&checkpoint);
    for (name, adapter) in [("none", None), ("first", Some(first)), ("both", Some(second))] {
        if let Some(adapter) = adapter {
            adapter.apply_to_reference(&mut reference);
        }
        let mut session = reference.session(KvType::F32, Precision::Float);
        let found: Vec<Vec<f32>> = ids.iter().map(|token| session.step(*token).unwrap()).collect();
        let expected = golden(name);
        for (found, expected) in found[ids.len() - expected.len()..].iter().zip(&expected) {
            let largest = expected.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
            let worst = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst <= 1e-4 * largest, "{name}: off by {:e} of the largest logit", worst / largest);
        }
    }
}

#[test]
fn adapted_models_have_the_references_bits_for_all_kernels_threads_and_chunks() {
    let checkpoint = base();
    let ids: Vec<u32> = golden().0.into_iter().cycle().take(70).collect();
    let mut reference = Reference::load(&checkpoint).unwrap();
    adapters(&checkpoint).iter().for_each(|adapter| adapter.apply_to_reference(&mut reference));
    let mut session = reference.session(KvType::F16, Precision::Int8);
    let bits = |logits: &[f32]| logits.iter().map(|logit| logit.to_bits()).collect::<Vec<_>>();
    let expected: Vec<_> = ids.iter().map(|token| bits(&session.step(*token).unwrap())).collect();
    let cpu = Cpu::host().expect("a CPU that ternion compiles for");
    for family in [Family::Mad, Family::Tl1] {
        let team = Team::new(2).unwrap();
        let mut model = Model::load(&checkpoint, &KernelChoice::Family(family), &cpu, &team, &|_| {}).unwrap();
        adapters(&checkpoint).iter().for_each(|adapter| adapter.apply(&mut model));
        let model = Arc::new(model);
        for (threads, chunk) in [(1, 1), (1, 64), (2, 7), (2, 1), (3, 64)] {
            let options = SessionOptions { chunk, ..SessionOptions::default() };
            let mut session =
                Session::new(Arc::clone(&model), Arc::new(Team::new(threads).unwrap()), &options).unwrap();
            let mut compare = |position: usize, logits: &[f32]| {
                assert!(
                    bits(logits) == expected[position],
                    "{family}, {threads} threads, chunks of {chunk}: {position}"
                );
            };
            session.prefill_all(&ids, &mut compare).unwrap();
        }
    }
}

/// A copy of the second adapter with something changed.
fn changed(config: impl Fn(&mut Value), weights: impl Fn(Vec<u8>) -> Vec<u8>) -> String {
    let place = tempfile::tempdir().unwrap();
    let source = fixture("lora/second");
    let mut json = serde_json::from_slice(&std::fs::read(source.join("adapter_config.json")).unwrap()).unwrap();
    config(&mut json);
    std::fs::write(place.path().join("adapter_config.json"), json.to_string()).unwrap();
    let bytes = weights(std::fs::read(source.join("adapter_model.safetensors")).unwrap());
    std::fs::write(place.path().join("adapter_model.safetensors"), bytes).unwrap();
    match Adapter::open(place.path(), base().config(), 1.0) {
        Ok(adapter) => format!("{} projections", adapter.projections()),
        Err(error) => error.to_string(),
    }
}

#[test]
fn damaged_adapters_are_errors_or_valid_adapters_and_nothing_else() {
    let checkpoint = base();
    let place = tempfile::tempdir().unwrap();
    let files = ["adapter_config.json", "adapter_model.safetensors"];
    let sources = files.map(|name| std::fs::read(fixture("lora/second").join(name)).unwrap());
    let mut random = 1u64;
    let mut next = |below: usize| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) as usize % below
    };
    let (mut refused, mut opened) = (0, 0);
    for round in 0..2000 {
        let mut damaged = sources.clone();
        let bytes = &mut damaged[round % 2];
        // Mostly in the header, where a change means something.
        let at = next(bytes.len().min(900));
        match next(4) {
            0 => bytes[at] ^= 1 << next(8),
            1 => bytes[at] = [0, 0xff, b'9', b'"', b'}'][next(5)],
            2 => bytes.truncate(at),
            _ => drop(bytes.splice(at..at, b"99999999999999999999".iter().copied())),
        }
        for (name, bytes) in files.iter().zip(&damaged) {
            std::fs::write(place.path().join(name), bytes).unwrap();
        }
        match Adapter::open(place.path(), checkpoint.config(), 1.0) {
            Ok(_) => opened += 1,
            Err(error) => {
                assert_eq!(error.to_string().lines().count(), 1, "{error}");
                refused += 1;
            }
        }
    }
    assert!(refused > 800 && opened > 20, "{refused} refused, {opened} opened");
}

#[test]
fn what_does_not_fit_or_is_more_than_plain_lora_is_refused_in_one_line() {
    let same = |bytes| bytes;
    assert_eq!(changed(|_| {}, same), "4 projections");
    let set = |field: &'static str, value: Value| changed(move |json| json[field] = value.clone(), same);
    for (message, words) in [
        (set("r", json!(5)), &["lora_A.weight is 3x64, but the model needs 5x64", "another model"][..]),
        (set("r", json!(0)), &["r is 0"]),
        (set("lora_alpha", json!("six")), &["lora_alpha"]),
        (set("use_dora", json!(true)), &["use_dora"]),
        (set("modules_to_save", json!(["lm_head"])), &["modules_to_save"]),
        (set("bias", json!("lora_only")), &["bias"]),
        (set("rank_pattern", json!({"(v|k)_proj": 3})), &["rank_pattern", "(v|k)_proj"]),
        (set("rank_pattern", json!({"v_proj": 3, "self_attn.v_proj": 3})), &["more than one value"]),
        (changed(|_| {}, |bytes| bytes[..bytes.len() - 1].to_vec()), &["adapter_model.safetensors", "cut off"]),
    ] {
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
        assert_eq!(message.lines().count(), 1);
    }
    let rename = |from: &'static str, to: &'static str| {
        changed(
            |_| {},
            move |mut bytes| {
                // Both are of equal length, so nothing moves.
                while let Some(at) = bytes.windows(from.len()).position(|window| window == from.as_bytes()) {
                    bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
                }
                bytes
            },
        )
    };
    for (from, to) in [("0.mlp.gate_proj", "0.mlp.wild_proj"), ("layers.1.mlp", "layers.7.mlp")] {
        let message = rename(from, to);
        assert!(message.contains("it adapts base_model.model.model.layers"), "{message}");
        assert!(message.contains(to), "{message}");
    }
    assert!(rename("0.mlp.gate_proj.lora_B", "0.mlp.gate_proj.lora_A").contains("occurs twice"));
    let config = base();
    let nowhere = Adapter::open(Path::new("/no/such/adapter"), config.config(), 1.0).unwrap_err().to_string();
    assert!(nowhere.contains("adapter_config.json"), "{nowhere}");
    // An adapter of 2B4T's layers does not fit the embedded model.
    let other = Adapter::open(&fixture("lora/second"), support::embedded().config(), 1.0).unwrap_err().to_string();
    assert!(other.contains("another model"), "{other}");
}
