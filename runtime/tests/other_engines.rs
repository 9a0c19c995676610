//! What `export` writes, read by the engines that it is written for: llama.cpp and `transformers`.
//!
//! Both need Python, which no other test does, so these say that they were skipped unless TERNION_LLAMA_PYTHON and
//! TERNION_TRANSFORMERS_PYTHON name interpreters that have llama-cpp-python, or torch, transformers and accelerate.

mod support;

use std::ffi::OsString;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use safetensors::SafeTensors;
use ternion_kernels_ref::head::argmax;
use ternion_runtime::formats::gguf::{TernaryType, TokenRowType, export};
use ternion_runtime::formats::synth::Recipe;
use ternion_runtime::formats::{
    Activation, Checkpoint, ModelConfig, OpenOptions, RopeScaling, SlidingAttention, export_hf,
};
use ternion_runtime::model::KvType;
use ternion_runtime::model::reference::{Precision, Reference};

const LLAMA: (&str, &str) = ("TERNION_LLAMA_PYTHON", "run_llama_cpp.py");
const TRANSFORMERS: (&str, &str) = ("TERNION_TRANSFORMERS_PYTHON", "run_transformers.py");

/// The interpreter, or a line that says what is missing.
fn interpreter((variable, _): (&str, &str)) -> Option<OsString> {
    let python = std::env::var_os(variable);
    if python.is_none() {
        println!("skipped: {variable} names no Python");
    }
    python
}

/// What an engine computes for a model: a row for each token.
fn rows_of(engine: (&str, &str), python: &OsString, model: &Path, ids: &[u32]) -> Vec<Vec<f32>> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/other_engines").join(engine.1);
    let mut command = Command::new(python);
    command.arg(script).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("that Python");
    let ids_text: Vec<String> = ids.iter().map(u32::to_string).collect();
    writeln!(child.stdin.take().unwrap(), "{} {}", model.display(), ids_text.join(" ")).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}: {}", model.display(), String::from_utf8_lossy(&output.stderr));
    let (columns, values) = output.stdout.split_first_chunk().expect("an answer");
    let values: Vec<f32> = values.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    let rows: Vec<Vec<f32>> = values.chunks_exact(u32::from_le_bytes(*columns) as usize).map(<[f32]>::to_vec).collect();
    assert_eq!(rows.len(), ids.len());
    rows
}

fn go_on(_: u64, _: u64) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn largest(row: &[f32]) -> f32 {
    row.iter().fold(0.0, |largest, x| largest.max(x.abs()))
}

/// `(median, maximum)` of `|found − expected|` at the last positions, as parts of the largest value of their position.
fn spread(found: &[Vec<f32>], expected: &[Vec<f32>]) -> (f32, f32) {
    let mut errors = Vec::new();
    for (found, expected) in found[found.len() - expected.len()..].iter().zip(expected) {
        assert_eq!(found.len(), expected.len());
        errors.extend(found.iter().zip(expected).map(|(found, x)| (found - x).abs() / largest(expected)));
    }
    errors.sort_unstable_by(f32::total_cmp);
    (errors[errors.len() / 2], errors[errors.len() - 1])
}

/// A fixture of a family, with a tokenizer, which these have not.
fn family(name: &str, place: &Path) -> Checkpoint {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families").join(name);
    let directory = place.join(name);
    std::fs::create_dir(&directory).unwrap();
    for file in ["config.json", "model.safetensors", "golden.safetensors"] {
        std::fs::copy(fixture.join(file), directory.join(file)).unwrap();
    }
    let vocabulary = Checkpoint::open(&directory).unwrap().config().vocabulary as u64;
    let mut tokenizer = support::small_tokenizer();
    tokenizer["model"]["vocab"].as_object_mut().unwrap().retain(|_, id| id.as_u64().unwrap() < vocabulary);
    std::fs::write(directory.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    Checkpoint::open(&directory).unwrap()
}

/// The tokens of a file of golden values, and its rows of one kind.
fn golden(path: &Path, ids: &str, rows: &str) -> (Vec<u32>, Vec<Vec<f32>>) {
    let file = std::fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let tensor = tensors.tensor(rows).unwrap();
    let values: Vec<f32> = tensor.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    let rows = values.chunks_exact(tensor.shape()[1]).map(<[f32]>::to_vec).collect();
    let ids = tensors.tensor(ids).unwrap();
    (ids.data().as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect(), rows)
}

/// The published families in f16, from `transformers`' tensors through ternion to llama.cpp, whose products have
/// activations in f16: the golden values are those of activations that are not quantised.
#[test]
fn llama_cpp_computes_from_an_exported_f16_what_transformers_computes_from_the_original() {
    let Some(python) = interpreter(LLAMA) else { return };
    let place = tempfile::tempdir().unwrap();
    let names = ["bitnet-community", "llama3-158", "falcon3-158", "falcon-e", "falcon-e-prequantized", "llama-biases"];
    for name in names {
        let model = family(name, place.path());
        let path = place.path().join(format!("{name}.gguf"));
        export(&model, &path, TernaryType::F16, TokenRowType::Own, &mut go_on).unwrap();
        let (ids, expected) = golden(&place.path().join(name).join("golden.safetensors"), "ids", "float");
        let (median, worst) = spread(&rows_of(LLAMA, &python, &path, &ids), &expected);
        println!("{name}: median {median:.1e}, largest {worst:.1e}");
        assert!(worst <= 1e-2, "{name}: off by {worst:e} of the largest logit");
    }
}

/// A model of two layers, or more where it says so, whose rows llama.cpp's ternary blocks divide.
fn made_up(config: ModelConfig) -> Checkpoint {
    let small = ModelConfig {
        layers: config.layers.max(2),
        hidden: 256,
        ffn: 512,
        heads: 4,
        kv_heads: 2,
        head_dim: 64,
        vocabulary: 300,
        context: 128,
        ..config
    };
    Checkpoint::synthetic(Recipe { config: small, seed: 11, zero_fraction: 0.4, gate_sparsity: None }).unwrap()
}

/// One model of each architecture that llama.cpp implements. The first is the embedded model with another activation
/// function: its norms and its head are those of a trained model.
fn models() -> Vec<(&'static str, Checkpoint)> {
    let silu = OpenOptions { activation: Some(Activation::Silu), ..OpenOptions::default() };
    let llama = ModelConfig { architecture: "LlamaForCausalLM".to_owned(), ..ModelConfig::default() };
    let qwen3 = ModelConfig { architecture: "Qwen3ForCausalLM".to_owned(), qk_norm: true, ..llama.clone() };
    let gemma3 = ModelConfig {
        architecture: "Gemma3ForCausalLM".to_owned(),
        layers: 7,
        activation: Activation::GeluTanh,
        tied_head: true,
        qk_norm: true,
        post_norms: true,
        embedding_scale: 16.0,
        rope_theta: 1e6,
        sliding: Some(SlidingAttention { window: 8, rope_theta: 1e4, layers: vec![0, 1, 2, 3, 4, 6] }),
        ..llama.clone()
    };
    let scaled = RopeScaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original_context: 32.0 };
    vec![
        ("bitnet", Checkpoint::open_with(&support::embedded_path(), &silu).unwrap()),
        ("llama", made_up(ModelConfig { rope_scaling: scaled, ..llama })),
        ("qwen3", made_up(qwen3)),
        ("gemma3", made_up(gemma3)),
    ]
}

/// llama.cpp rounds activations to int8 in blocks of 256, ternion rounds them token by token, so logits differ; a token
/// must be the same where ternion's choice is clear by more than that.
#[test]
fn llama_cpp_chooses_the_tokens_that_ternion_chooses_from_every_exported_type() {
    let Some(python) = interpreter(LLAMA) else { return };
    const STEPS: usize = 24;
    let place = tempfile::tempdir().unwrap();
    for (name, model) in models() {
        for (kind, precision, tolerance) in [
            (TernaryType::Tq2_0, Precision::Int8, 5e-2),
            (TernaryType::Tq1_0, Precision::Int8, 5e-2),
            (TernaryType::F16, Precision::Float, 1e-2),
        ] {
            let path: PathBuf = place.path().join(format!("{name}-{kind}.gguf"));
            export(&model, &path, kind, TokenRowType::Own, &mut go_on).unwrap();
            // Its scales, and its head, may be rounded, but they are the same for both.
            let reference = Reference::load(&Checkpoint::open(&path).unwrap()).unwrap();
            let mut session = reference.session(KvType::F32, precision);
            let mut ids = model.tokenizer().unwrap().encode("Once upon a time", true).unwrap();
            let prompt = ids.len();
            let mut expected: Vec<Vec<f32>> = ids.iter().map(|token| session.step(*token).unwrap()).collect();
            for _ in 1..STEPS {
                let token = argmax(expected.last().unwrap()).unwrap() as u32;
                ids.push(token);
                expected.push(session.step(token).unwrap());
            }
            let found = rows_of(LLAMA, &python, &path, &ids);
            let (median, worst) = spread(&found, &expected);
            assert!(worst <= tolerance, "{name} {kind}: off by {worst:e} of the largest logit");
            let (mut clear, mut same) = (0, 0);
            for (found, expected) in found.iter().zip(&expected).skip(prompt - 1) {
                let [chosen, other] = [expected, found].map(|row| argmax(row).unwrap());
                let margin =
                    expected.iter().enumerate().filter(|(at, _)| *at != chosen).map(|(_, x)| expected[chosen] - x);
                same += usize::from(chosen == other);
                if margin.fold(f32::INFINITY, f32::min) > 2.0 * worst * largest(expected) {
                    clear += 1;
                    assert_eq!(chosen, other, "{name} {kind}");
                }
            }
            println!(
                "{name} {kind}: median {median:.1e}, largest {worst:.1e}; {same} of {STEPS} the same, {clear} clear"
            );
            assert!(clear >= STEPS / 2, "{name} {kind}: only {clear} of {STEPS} tokens are clear enough to compare");
        }
    }
}

/// Every dress and family, written as packed safetensors, has the logits (or embedding models the last norm's output)
/// that the original has, as close as ternion itself has to be.
#[test]
fn transformers_computes_from_an_exported_directory_what_it_computes_from_the_original() {
    let Some(python) = interpreter(TRANSFORMERS) else { return };
    let place = tempfile::tempdir().unwrap();
    let check = |name: &str, model: &Checkpoint, (ids, expected): (Vec<u32>, Vec<Vec<f32>>)| {
        let path = place.path().join(format!("{name}-exported"));
        export_hf::export(model, &path, &mut go_on).unwrap();
        let (median, worst) = spread(&rows_of(TRANSFORMERS, &python, &path, &ids), &expected);
        println!("{name}: median {median:.1e}, largest {worst:.1e}");
        assert!(worst <= 5e-2 && median <= 1e-2, "{name}: off by {worst:e} of the largest, median {median:e}");
    };
    for name in [
        "bitnet-2b4t",
        "bitnet-community",
        "llama3-158",
        "falcon3-158",
        "falcon-e-bfloat16",
        "falcon-e-prequantized",
        "llama-biases",
        "bitnet-embedding-qwen3",
        "bitnet-embedding-gemma3",
    ] {
        let model = family(name, place.path());
        check(name, &model, golden(&place.path().join(name).join("golden.safetensors"), "ids", "int8"));
    }
    let json = std::fs::read(support::fixture("golden.json")).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    let ids = serde_json::from_value(json["prompts"][0]["ids"].clone()).unwrap();
    let file = std::fs::read(support::fixture("golden-logits.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let tensor = tensors.tensor("packed.0").unwrap();
    let values: Vec<f32> = tensor.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    let rows = values.chunks_exact(tensor.shape()[1]).map(<[f32]>::to_vec).collect();
    check("ternary-tales", &support::embedded(), (ids, rows));
}
