//! Whatever runs a model, the digest of all its logits is one and the same.

mod support;

use std::collections::BTreeSet;
use std::path::Path;

use ternion_compiler::{Cpu, Family};
use ternion_runtime::formats::Checkpoint;
use ternion_runtime::model::KvType;
use ternion_runtime::verify::{Pass, VerifyOptions, verify};

/// Runs a model in every way with up to three threads; returns the digest.
fn one_digest(checkpoint: &Checkpoint, tokens: usize, kv: KvType) -> u64 {
    let cpu = Cpu::host().expect("a CPU that ternion compiles for");
    let options = VerifyOptions { tokens, threads: 3, kv };
    let verified = verify(checkpoint, &cpu, &options, &mut |_, _| {}).unwrap();
    assert_eq!(verified.logits, tokens * checkpoint.config().vocabulary);
    assert_eq!(verified.runs.len(), Family::dense().count() * Pass::ALL.len());
    assert!(verified.runs.len() >= 24);
    let digests: BTreeSet<u64> = verified.runs.iter().map(|run| run.digest).chain([verified.digest]).collect();
    assert_eq!(digests.len(), 1, "{:?}", verified.runs);
    verified.digest
}

/// Long enough for threads to share out the key-value cache by blocks of 128 positions.
#[test]
fn the_embedded_model_has_one_digest_for_each_type_of_the_cache() {
    let checkpoint = support::embedded();
    // Both are the same on every machine; another number here means that the model computes something else than before.
    assert_eq!(format!("{:016x}", one_digest(&checkpoint, 150, KvType::F16)), "beb4260ef6022f01");
    assert_eq!(format!("{:016x}", one_digest(&checkpoint, 150, KvType::Int8)), "c60b2258dab8d7fa");
}

/// One with biases, one with norms of heads, a sliding window and another activation function: no fused path for them.
#[test]
fn models_of_other_families_have_one_digest() {
    for name in ["llama-biases", "bitnet-embedding-gemma3"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families").join(name);
        let checkpoint = Checkpoint::open(&path).unwrap();
        one_digest(&checkpoint, 80.min(checkpoint.config().context), KvType::F16);
    }
}
