//! Every family's forward pass against `transformers`, and every kernel against the reference on it.
//!
//! The models are small and random, written by `fixtures/families/make_family_fixtures.py`. Their logits (or last norms,
//! for embedding models) were computed in float32. As for the embedded model, they are compared closely with the
//! rounding of activations switched off, which amplifies every difference before it, and loosely with it.

mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::SafeTensors;
use ternion_compiler::{Cpu, Family};
use ternion_kernels_ref::lanes;
use ternion_runtime::embedding::embed;
use ternion_runtime::formats::synth::Recipe;
use ternion_runtime::formats::{Activation, Checkpoint, LayerNorm, ModelConfig, Pooling, RopeScaling};
use ternion_runtime::model::reference::{Precision, Reference, ReferenceSession};
use ternion_runtime::model::{KernelChoice, KvType, Model, ModelError, Session, SessionOptions};
use ternion_runtime::team::Team;

const MODELS: [&str; 10] = [
    "bitnet-2b4t",
    "bitnet-community",
    "llama3-158",
    "falcon3-158",
    "falcon-e",
    "falcon-e-bfloat16",
    "falcon-e-prequantized",
    "llama-biases",
    "bitnet-embedding-qwen3",
    "bitnet-embedding-gemma3",
];

fn directory(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families").join(name)
}

fn open(name: &str) -> Checkpoint {
    Checkpoint::open(&directory(name)).unwrap()
}

struct Golden {
    ids: Vec<u32>,
    float: Vec<Vec<f32>>,
    int8: Vec<Vec<f32>>,
}

fn golden(name: &str) -> Golden {
    let file = std::fs::read(directory(name).join("golden.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let rows = |of: &str| {
        let tensor = tensors.tensor(of).unwrap();
        let values: Vec<f32> = tensor.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        values.chunks_exact(tensor.shape()[1]).map(<[f32]>::to_vec).collect::<Vec<_>>()
    };
    let ids = tensors.tensor("ids").unwrap();
    Golden {
        ids: ids.data().as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect(),
        float: rows("float"),
        int8: rows("int8"),
    }
}

/// What a model's golden file has: logits, or the last norm's output of an embedding model.
fn step(checkpoint: &Checkpoint, session: &mut ReferenceSession<'_>, token: u32) -> Vec<f32> {
    let output = if checkpoint.config().pooling.is_some() { session.hidden(token) } else { session.step(token) };
    output.unwrap()
}

fn reference(checkpoint: &Checkpoint, ids: &[u32], kv: KvType, precision: Precision) -> Vec<Vec<f32>> {
    let reference = Reference::load(checkpoint).unwrap();
    let mut session = reference.session(kv, precision);
    ids.iter().map(|token| step(checkpoint, &mut session, *token)).collect()
}

/// `(median, maximum)` of `|found − expected|` at the last positions, as parts of the largest value of their position.
fn spread(found: &[Vec<f32>], expected: &[Vec<f32>]) -> (f32, f32) {
    let last = &found[found.len() - expected.len()..];
    let mut errors: Vec<f32> = Vec::new();
    for (found, expected) in last.iter().zip(expected) {
        assert_eq!(found.len(), expected.len());
        let largest = expected.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
        errors.extend(found.iter().zip(expected).map(|(found, expected)| (found - expected).abs() / largest));
    }
    errors.sort_unstable_by(f32::total_cmp);
    (errors[errors.len() / 2], errors[errors.len() - 1])
}

#[test]
fn every_family_is_what_transformers_computes() {
    for name in MODELS {
        let (checkpoint, golden) = (open(name), golden(name));
        let found = reference(&checkpoint, &golden.ids, KvType::F32, Precision::Float);
        let (median, worst) = spread(&found, &golden.float);
        eprintln!("{name}: float: median {median:.1e}, largest {worst:.1e}");
        assert!(worst <= 1e-4, "{name}: off by {worst:e} of the largest");
        let found = reference(&checkpoint, &golden.ids, KvType::F32, Precision::Int8);
        let (median, worst) = spread(&found, &golden.int8);
        eprintln!("{name}: int8: median {median:.1e}, largest {worst:.1e}");
        assert!(worst <= 5e-2 && median <= 1e-2, "{name}: off by {worst:e} of the largest, median {median:e}");
    }
}

/// The same as [`reference`], on compiled kernels.
fn compiled(model: &Arc<Model>, ids: &[u32], threads: usize, options: SessionOptions) -> Vec<Vec<f32>> {
    let team = Arc::new(Team::new(threads).unwrap());
    let mut session = Session::new(Arc::clone(model), team, &options).unwrap();
    let mut all = Vec::new();
    let mut keep = |position: usize, output: &[f32]| {
        assert_eq!(position, all.len());
        all.push(output.to_vec());
    };
    if model.config().pooling.is_some() {
        session.prefill_hidden(ids, &mut keep).unwrap();
    } else {
        session.prefill_all(ids, &mut keep).unwrap();
    }
    all
}

fn bits(rows: &[Vec<f32>]) -> Vec<u32> {
    rows.iter().flatten().map(|x| x.to_bits()).collect()
}

#[test]
fn every_family_has_the_references_bits_for_all_kernels_threads_chunks_and_caches() {
    let cpu = Cpu::host().expect("a CPU that ternion compiles for");
    let team = Team::new(2).unwrap();
    for name in MODELS {
        let checkpoint = open(name);
        // More than one block of attention, and more than the sliding window.
        let ids: Vec<u32> = golden(name).ids.into_iter().cycle().take(110).collect();
        let models = [Family::Mad, Family::Tl1].map(|family| {
            Arc::new(Model::load(&checkpoint, &KernelChoice::Family(family), &cpu, &team, &|_| {}).unwrap())
        });
        for kv in KvType::ALL {
            let expected = bits(&reference(&checkpoint, &ids, kv, Precision::Int8));
            for (model, threads, chunk) in [(0, 1, 1), (0, 2, 7), (0, 3, 64), (1, 2, 1), (1, 1, 64)] {
                let options = SessionOptions { kv, chunk, context: None };
                let found = bits(&compiled(&models[model], &ids, threads, options));
                assert!(found == expected, "{name}: kv {kv}, model {model}, {threads} threads, chunks of {chunk}");
            }
        }
    }
}

#[test]
fn embeddings_are_the_last_positions_norm_of_length_one_for_all_kernels_threads_and_chunks() {
    let cpu = Cpu::host().expect("a CPU that ternion compiles for");
    for name in ["bitnet-embedding-qwen3", "bitnet-embedding-gemma3", "bitnet-2b4t"] {
        let checkpoint = open(name);
        let Golden { ids, int8, .. } = golden(name);
        let mut vectors: Vec<Vec<f32>> = Vec::new();
        for (family, threads, chunk) in [(Family::Mad, 1, 64), (Family::Tl1, 2, 7), (Family::Mad, 3, 1)] {
            let team = Arc::new(Team::new(threads).unwrap());
            let model = Model::load(&checkpoint, &KernelChoice::Family(family), &cpu, &*team, &|_| {}).unwrap();
            let options = SessionOptions { kv: KvType::F32, chunk, context: None };
            let mut session = Session::new(Arc::new(model), team, &options).unwrap();
            // What was read before does not matter.
            embed(&mut session, &ids[..5]).unwrap();
            vectors.push(embed(&mut session, &ids).unwrap());
        }
        assert!(vectors.iter().all(|vector| bits(&vectors[..1]) == bits(std::slice::from_ref(vector))), "{name}");
        let vector = &vectors[0];
        let length = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>().sqrt();
        assert!((length(vector) - 1.0).abs() < 1e-6 && vector.len() == 64, "{name}");
        if checkpoint.config().pooling.is_some() {
            let last = int8.last().unwrap();
            let expected: Vec<f32> = last.iter().map(|x| x / length(last)).collect();
            let cosine: f32 = vector.iter().zip(&expected).map(|(a, b)| a * b).sum();
            assert!(cosine > 0.9999, "{name}: cosine {cosine} with what transformers computes");
        }
    }
}

#[test]
fn a_model_that_pools_the_mean_averages_all_positions() {
    let config = open("llama3-158").config().clone();
    let config = ModelConfig { pooling: Some(Pooling::Mean), vocabulary: 300, ..config };
    let recipe = Recipe { config, seed: 3, zero_fraction: 0.4, gate_sparsity: None };
    let checkpoint = Checkpoint::synthetic(recipe).unwrap();
    let ids: Vec<u32> = (0..20).map(|i| i * 13 % 300).collect();
    let states = reference(&checkpoint, &ids, KvType::F16, Precision::Int8);
    let mean = |d: usize| (states.iter().map(|state| f64::from(state[d])).sum::<f64>() / 20.0) as f32;
    let mean: Vec<f32> = (0..64).map(mean).collect();
    let length = lanes::dot(&mean, &mean).sqrt();
    let expected: Vec<f32> = mean.iter().map(|x| x / length).collect();
    let cpu = Cpu::host().expect("a CPU that ternion compiles for");
    let team = Arc::new(Team::new(2).unwrap());
    let model = Model::load(&checkpoint, &KernelChoice::Family(Family::Mad), &cpu, &*team, &|_| {}).unwrap();
    let options = SessionOptions { chunk: 7, ..SessionOptions::default() };
    let mut session = Session::new(Arc::new(model), team, &options).unwrap();
    assert_eq!(embed(&mut session, &ids).unwrap(), expected);
}

#[test]
fn the_families_differ_in_what_they_are_known_for() {
    let config = |name| open(name).config().clone();
    let bitnet = config("bitnet-2b4t");
    assert!(bitnet.sub_norms && bitnet.tied_head && bitnet.activation == Activation::Relu2);
    let community = config("bitnet-community");
    assert!(community.sub_norms && community.activation == Activation::Silu && community.vocabulary == 502);
    let llama = config("llama3-158");
    assert!(!llama.sub_norms && !llama.tied_head && llama.vocabulary == 257);
    assert!(matches!(llama.rope_scaling, RopeScaling::Llama3 { factor: 8.0, .. }));
    let falcon = config("falcon3-158");
    assert_eq!((falcon.head_dim, falcon.hidden / falcon.heads), (256, 32));
    let biases = config("llama-biases");
    assert!(biases.biases.qkv && biases.biases.output && biases.biases.ffn);
    assert_eq!(biases.rope_scaling, RopeScaling::Linear { factor: 4.0 });
    for name in ["bitnet-embedding-qwen3", "bitnet-embedding-gemma3"] {
        let config = config(name);
        assert!(config.qk_norm && config.projection_norm_eps == Some(1e-6));
        assert_eq!(config.pooling, Some(Pooling::Last));
    }
    let gemma = config("bitnet-embedding-gemma3");
    assert!(gemma.post_norms && gemma.embedding_scale == 8.0 && gemma.activation == Activation::GeluTanh);
    assert_eq!((gemma.window(0), gemma.window(1)), (Some(12), None));
    // Weights of Gemma's own norms are centred around 0 in its files.
    let norm = open("bitnet-embedding-gemma3").norm(0, LayerNorm::Input).unwrap();
    assert!((norm.iter().sum::<f32>() / norm.len() as f32 - 1.0).abs() < 0.2);
}

#[test]
fn the_community_models_read_their_sentencepiece_tokenizer() {
    let place = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(directory("bitnet-community").join(file), place.path().join(file)).unwrap();
    }
    let tokenizer = directory("../sentencepiece").join("tokenizer.model");
    std::fs::copy(tokenizer, place.path().join("tokenizer.model")).unwrap();
    let checkpoint = Checkpoint::open(place.path()).unwrap();
    let ids = checkpoint.tokenizer().unwrap().encode("Once upon a time", true).unwrap();
    let team = Team::new(1).unwrap();
    let cpu = Cpu::host().expect("a CPU that ternion compiles for");
    let model = Model::load(&checkpoint, &KernelChoice::Family(Family::Mad), &cpu, &team, &|_| {}).unwrap();
    let mut session = Session::new(Arc::new(model), Arc::new(team), &SessionOptions::default()).unwrap();
    session.prefill(&ids).unwrap();
    assert!(matches!(session.step(502), Err(ModelError::NoSuchToken { .. })));
}
