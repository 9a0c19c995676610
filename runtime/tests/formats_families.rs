//! Model families as their own files describe them: configuration, names, norms, biases, scales; and every family comes
//! back from a prepared file, a Hugging Face directory and a GGUF file.

mod support;

use std::ops::ControlFlow;
use std::path::Path;

use serde_json::{Value, json};
use support::{Tensor, safetensors};
use ternion_compiler::Layout;
use ternion_runtime::formats::gguf::{TernaryType, TokenRowType, export};
use ternion_runtime::formats::synth::Recipe;
use ternion_runtime::formats::{
    Activation, Biases, Checkpoint, LayerNorm, ModelConfig, Pooling, Projection, RopeScaling, SlidingAttention,
    export_hf, tern,
};

/// A family's directory: two layers, hidden 256, ffn 512.
struct Directory {
    config: Value,
    /// What precedes `embed_tokens`.
    prefix: &'static str,
    /// Whether there is an `lm_head`.
    head: bool,
    /// Names of a layer's norms and their widths.
    norms: Vec<(&'static str, usize)>,
    biases: Vec<&'static str>,
    packed: bool,
}

const PROJECTIONS: [(&str, [usize; 2]); 7] = [
    ("self_attn.q_proj", [256, 256]),
    ("self_attn.k_proj", [128, 256]),
    ("self_attn.v_proj", [128, 256]),
    ("self_attn.o_proj", [256, 256]),
    ("mlp.gate_proj", [512, 256]),
    ("mlp.up_proj", [512, 256]),
    ("mlp.down_proj", [256, 512]),
];

/// What a tensor of this name holds at a place: multiples of 1/64 between −1 and 1, exact in bf16.
fn value(name: &str, at: usize) -> f32 {
    let seed = name.bytes().fold(at as u64 + 1, |seed, byte| (seed ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    ((seed >> 20) % 129) as f32 / 64.0 - 1.0
}

fn trit(name: &str, at: usize) -> i8 {
    (value(name, at) * 1.4).round() as i8
}

fn bf16(values: impl Iterator<Item = f32>) -> Vec<u8> {
    values.flat_map(|value| ((value.to_bits() >> 16) as u16).to_le_bytes()).collect()
}

impl Directory {
    fn config(extra: &Value) -> Value {
        let mut config = json!({
            "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 300, "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
        });
        config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        config
    }

    fn write(&self, path: &Path) {
        let mut tensors = Vec::new();
        let mut floats = |name: String, shape: Vec<usize>| {
            let bytes = bf16((0..shape.iter().product()).map(|at| value(&name, at)));
            tensors.push(Tensor { name, dtype: "BF16", shape, bytes });
        };
        floats(format!("{}embed_tokens.weight", self.prefix), vec![300, 256]);
        floats(format!("{}norm.weight", self.prefix), vec![256]);
        if self.head {
            floats("lm_head.weight".to_owned(), vec![300, 256]);
        }
        for layer in 0..2 {
            for (norm, width) in &self.norms {
                floats(format!("{}layers.{layer}.{norm}.weight", self.prefix), vec![*width]);
            }
            for bias in &self.biases {
                let (_, [m, _]) = PROJECTIONS.iter().find(|(name, _)| name == bias).unwrap();
                floats(format!("{}layers.{layer}.{bias}.bias", self.prefix), vec![*m]);
            }
        }
        for layer in 0..2 {
            for (projection, [m, k]) in PROJECTIONS {
                let name = format!("{}layers.{layer}.{projection}.weight", self.prefix);
                if self.packed {
                    let mut bytes = vec![0u8; m / 4 * k];
                    for at in 0..m * k {
                        let (row, column) = (at / k, at % k);
                        bytes[row % (m / 4) * k + column] |= ((trit(&name, at) + 1) as u8) << (2 * (row / (m / 4)));
                    }
                    let scale = name.replace(".weight", ".weight_scale");
                    tensors.push(Tensor { name, dtype: "U8", shape: vec![m / 4, k], bytes });
                    let bytes = bf16([8.0].into_iter());
                    tensors.push(Tensor { name: scale, dtype: "BF16", shape: vec![1], bytes });
                } else {
                    let bytes = bf16((0..m * k).map(|at| f32::from(trit(&name, at)) * 0.125));
                    tensors.push(Tensor { name, dtype: "BF16", shape: vec![m, k], bytes });
                }
            }
        }
        std::fs::write(path.join("model.safetensors"), safetensors(&tensors)).unwrap();
        std::fs::write(path.join("config.json"), self.config.to_string()).unwrap();
        let json = support::small_tokenizer();
        std::fs::write(path.join("tokenizer.json"), json.to_string()).unwrap();
        std::fs::write(path.join("tokenizer_config.json"), r#"{"bos_token": "<s>", "eos_token": "</s>"}"#).unwrap();
    }

    fn open(&self) -> (tempfile::TempDir, Checkpoint) {
        let directory = tempfile::tempdir().unwrap();
        self.write(directory.path());
        let model = Checkpoint::open(directory.path()).unwrap();
        (directory, model)
    }
}

/// Every weight, norm and bias of `model` is the one that the file has under the name that is given.
fn assert_tensors(
    model: &Checkpoint,
    directory: &Directory,
    norm_name: impl Fn(LayerNorm) -> Option<String>,
    one: f32,
) {
    let config = model.config();
    let expected = |name: &str, len: usize| (0..len).map(|at| value(name, at)).collect::<Vec<f32>>();
    let plus = |values: Vec<f32>, one: f32| values.into_iter().map(|value| value + one).collect::<Vec<f32>>();
    let prefix = directory.prefix;
    assert_eq!(model.final_norm().unwrap(), plus(expected(&format!("{prefix}norm.weight"), 256), one));
    let mut row = vec![0.0; 256];
    model.embedding().unwrap().widen_row(0, &mut row);
    assert_eq!(row, expected(&format!("{prefix}embed_tokens.weight"), 256));
    assert_eq!(model.head().unwrap().is_some(), directory.head);
    for layer in 0..2 {
        let mut norms = 0;
        for norm in LayerNorm::ALL {
            let weights = model.norm(layer, norm).unwrap();
            assert_eq!(weights.len(), norm.width(config));
            if let Some(name) = norm_name(norm).filter(|_| !weights.is_empty()) {
                let one = if matches!(norm, LayerNorm::Projection(_)) { 0.0 } else { one };
                let name = format!("{prefix}layers.{layer}.{name}.weight");
                assert_eq!(weights, plus(expected(&name, weights.len()), one), "{name}");
                norms += 1;
            }
        }
        assert_eq!(norms, directory.norms.len());
        for (projection, (name, [m, k])) in Projection::ALL.into_iter().zip(PROJECTIONS) {
            let tensor = model.projection(layer, projection).unwrap();
            assert_eq!((tensor.m, tensor.k, tensor.scale), (m, k, 0.125));
            let name = format!("{prefix}layers.{layer}.{name}");
            let expected_trits = (0..m * k).map(|at| trit(&format!("{name}.weight"), at));
            assert!(support::trits(&tensor).into_iter().eq(expected_trits), "{name}");
            let bias = model.bias(layer, projection).unwrap();
            assert_eq!(bias, expected(&format!("{name}.bias"), bias.len()));
        }
    }
}

fn assert_same(model: &Checkpoint, expected: &Checkpoint) {
    assert_eq!(model.config(), expected.config());
    assert_same_tensors(model, expected);
}

fn assert_same_tensors(model: &Checkpoint, expected: &Checkpoint) {
    assert_eq!(model.final_norm().unwrap(), expected.final_norm().unwrap());
    assert_eq!(*model.embedding().unwrap().bytes, *expected.embedding().unwrap().bytes);
    let head = |model: &Checkpoint| model.head().unwrap().map(|head| head.bytes.to_vec());
    assert_eq!(head(model), head(expected));
    for layer in 0..2 {
        for norm in LayerNorm::ALL {
            assert_eq!(model.norm(layer, norm).unwrap(), expected.norm(layer, norm).unwrap(), "{norm}");
        }
        for projection in Projection::ALL {
            let (tensor, other) = (model.projection(layer, projection), expected.projection(layer, projection));
            let (tensor, other) = (tensor.unwrap(), other.unwrap());
            assert!(*tensor.bytes == *other.bytes && tensor.scale == other.scale, "{projection}");
            assert_eq!(model.bias(layer, projection).unwrap(), expected.bias(layer, projection).unwrap());
        }
    }
}

/// Through a prepared file, a Hugging Face directory and, `gguf` saying whether it can, a GGUF file.
fn assert_comes_back(model: &Checkpoint, gguf: bool) {
    let directory = tempfile::tempdir().unwrap();
    let mut keep_going = |_, _| ControlFlow::Continue(());
    let prepared = directory.path().join("model.tern");
    tern::write(model, &prepared, &|_, _, _, _| Layout::Canonical, &mut keep_going).unwrap();
    assert_same(&Checkpoint::open(&prepared).unwrap(), model);

    let exported = directory.path().join("exported");
    export_hf::export(model, &exported, &mut keep_going).unwrap();
    let again = Checkpoint::open(&exported).unwrap();
    // `transformers` has no class of the community's name, but one of another that computes the same.
    let architecture = model.config().architecture.replace("BitnetFor", "BitNetFor");
    assert_eq!(again.config(), &ModelConfig { architecture, ..model.config().clone() });
    assert_same_tensors(&again, model);
    assert_eq!(again.generation(), model.generation());
    assert_eq!(again.tokenizer_config(), model.tokenizer_config());
    assert!(export_hf::export(model, &exported, &mut keep_going).unwrap_err().to_string().contains("already"));
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 2);

    if gguf {
        let path = directory.path().join("model.gguf");
        export(model, &path, TernaryType::Tq2_0, TokenRowType::Own, &mut keep_going).unwrap();
        assert_same(&Checkpoint::open(&path).unwrap(), model);
    }
}

#[test]
fn bitnet_community_models() {
    let directory = Directory {
        config: Directory::config(&json!({
            "architectures": ["BitnetForCausalLM"], "model_type": "llama", "hidden_act": "silu", "weight_bits": 1,
            "input_bits": 8, "rope_theta": 10000.0, "tie_word_embeddings": true,
        })),
        prefix: "model.",
        head: false,
        norms: vec![
            ("input_layernorm", 256),
            ("self_attn.inner_attn_ln", 256),
            ("post_attention_layernorm", 256),
            ("mlp.ffn_layernorm", 512),
        ],
        biases: vec![],
        packed: false,
    };
    let (_directory, model) = directory.open();
    assert_eq!(model.config().activation, Activation::Silu);
    assert!(model.config().sub_norms && model.config().tied_head);
    let name = |norm| match norm {
        LayerNorm::Input => "input_layernorm",
        LayerNorm::AttentionSub => "self_attn.inner_attn_ln",
        LayerNorm::PostAttention => "post_attention_layernorm",
        _ => "mlp.ffn_layernorm",
    };
    assert_tensors(&model, &directory, |norm| Some(name(norm).to_owned()), 0.0);
    assert_comes_back(&model, true);
}

#[test]
fn a_sentencepiece_model_encodes_as_the_sentencepiece_package_does() {
    let directory = Directory { config: llama(&json!({"vocab_size": 502})).config, ..llama(&json!({})) };
    let path = tempfile::tempdir().unwrap();
    directory.write(path.path());
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/sentencepiece");
    std::fs::remove_file(path.path().join("tokenizer.json")).unwrap();
    std::fs::copy(fixtures.join("tokenizer.model"), path.path().join("tokenizer.model")).unwrap();
    std::fs::write(path.path().join("added_tokens.json"), r#"{"<pad>": 500, "<extra>": 501}"#).unwrap();
    let tokenizer = Checkpoint::open(path.path()).unwrap().tokenizer().unwrap();
    let golden: Value = serde_json::from_slice(&std::fs::read(fixtures.join("golden.json")).unwrap()).unwrap();
    for case in golden.as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let expected: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        assert_eq!(tokenizer.encode(text, false).unwrap(), expected, "{text:?}");
        assert_eq!(tokenizer.decode(&expected), text);
    }
    assert_eq!(tokenizer.encode("<extra>", true).unwrap(), [1, 501]);
    assert_eq!(tokenizer.token_id("<pad>"), Some(500));
}

fn llama(extra: &Value) -> Directory {
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rope_theta": 500_000.0,
        "tie_word_embeddings": false, "quantization_config": {"quant_method": "bitnet"},
    });
    config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    Directory {
        config: Directory::config(&config),
        prefix: "model.",
        head: true,
        norms: vec![("input_layernorm", 256), ("post_attention_layernorm", 256)],
        biases: vec![],
        packed: true,
    }
}

#[test]
fn llama_layers_with_packed_weights_and_a_dividing_scale() {
    let directory = llama(&json!({}));
    let (_directory, model) = directory.open();
    let config = model.config();
    assert_eq!((config.activation, config.sub_norms, config.tied_head), (Activation::Silu, false, false));
    // The file's scale is 8, and divides.
    assert_tensors(&model, &directory, |norm| Some(norm.to_string()), 0.0);
    assert_comes_back(&model, true);
}

#[test]
fn biases_and_rotary_scaling_are_read() {
    let scaling = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    });
    let biases = vec!["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"];
    let directory = Directory { biases, ..llama(&json!({"attention_bias": true, "rope_scaling": scaling})) };
    let (path, model) = directory.open();
    assert_eq!(model.config().biases, Biases { qkv: true, output: false, ffn: false });
    let expected = RopeScaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original_context: 32.0 };
    assert_eq!(model.config().rope_scaling, expected);
    assert_tensors(&model, &directory, |norm| Some(norm.to_string()), 0.0);
    assert_comes_back(&model, false);

    // GGUF has a divisor for each frequency instead of the formula.
    let file = path.path().join("model.gguf");
    export(&model, &file, TernaryType::I2S, TokenRowType::Own, &mut |_, _| ControlFlow::Continue(())).unwrap();
    let again = Checkpoint::open(&file).unwrap();
    let (frequencies, expected) = (again.config().inverse_frequencies(0), model.config().inverse_frequencies(0));
    assert!(frequencies.iter().zip(&expected).all(|(a, b)| (a / b - 1.0).abs() < 1e-6));
    assert_eq!(again.bias(1, Projection::Query).unwrap(), model.bias(1, Projection::Query).unwrap());
}

fn norms_of_projections(name: &'static str) -> Vec<(&'static str, usize)> {
    PROJECTIONS.iter().map(|(projection, [_, k])| (format!("{projection}.{name}").leak() as &str, *k)).collect()
}

#[test]
fn qwen3_embedding_models_without_the_usual_prefix() {
    let mut norms = norms_of_projections("norm");
    norms.extend([
        ("input_layernorm", 256),
        ("post_attention_layernorm", 256),
        ("self_attn.q_norm", 64),
        ("self_attn.k_norm", 64),
    ]);
    let directory = Directory {
        config: Directory::config(&json!({
            "architectures": ["Qwen3Model"], "model_type": "qwen3", "hidden_act": "silu", "rope_theta": 1e6,
            "use_sliding_window": false, "tie_word_embeddings": true,
        })),
        prefix: "",
        head: false,
        norms,
        biases: vec![],
        packed: false,
    };
    let (_directory, model) = directory.open();
    let config = model.config();
    assert!(config.qk_norm && !config.post_norms);
    assert_eq!((config.pooling, config.projection_norm_eps), (Some(Pooling::Last), Some(1e-6)));
    assert_tensors(&model, &directory, |norm| Some(norm.to_string()), 0.0);
    assert_comes_back(&model, false);
}

#[test]
fn gemma3_models_add_one_to_their_own_norms_only() {
    let mut norms = norms_of_projections("rms_norm");
    norms.extend([
        ("input_layernorm", 256),
        ("post_attention_layernorm", 256),
        ("pre_feedforward_layernorm", 256),
        ("post_feedforward_layernorm", 256),
        ("self_attn.q_norm", 64),
        ("self_attn.k_norm", 64),
    ]);
    let directory = Directory {
        config: Directory::config(&json!({
            "architectures": ["Gemma3TextModel"], "model_type": "gemma3_text",
            "hidden_activation": "gelu_pytorch_tanh", "rope_theta": 1e6, "rope_local_base_freq": 10000.0,
            "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 64,
            "rms_norm_eps": 1e-6, "quantization_config": {"quant_method": "bitnet", "rms_norm_eps": 1e-6},
        })),
        prefix: "model.",
        head: false,
        norms,
        biases: vec![],
        packed: false,
    };
    let (_directory, model) = directory.open();
    let expected = ModelConfig {
        architecture: "Gemma3TextModel".to_owned(),
        layers: 2,
        hidden: 256,
        ffn: 512,
        heads: 4,
        kv_heads: 2,
        head_dim: 64,
        vocabulary: 300,
        context: 128,
        rope_theta: 1e6,
        norm_eps: 1e-6,
        activation: Activation::GeluTanh,
        tied_head: true,
        qk_norm: true,
        projection_norm_eps: Some(1e-6),
        post_norms: true,
        embedding_scale: 16.0,
        sliding: Some(SlidingAttention { window: 32, rope_theta: 10_000.0, layers: vec![0] }),
        pooling: Some(Pooling::Last),
        ..ModelConfig::default()
    };
    assert_eq!(model.config(), &expected);
    let name = |norm| {
        Some(match norm {
            LayerNorm::PostAttention => "pre_feedforward_layernorm".to_owned(),
            LayerNorm::AttentionResult => "post_attention_layernorm".to_owned(),
            LayerNorm::FfnResult => "post_feedforward_layernorm".to_owned(),
            LayerNorm::Projection(projection) => format!("{projection}.rms_norm"),
            other => other.to_string(),
        })
    };
    assert_tensors(&model, &directory, name, 1.0);
    assert_comes_back(&model, false);
}

#[test]
fn an_ordinary_llama_is_no_ternary_model() {
    let directory = Directory { packed: false, ..llama(&json!({"quantization_config": null})) };
    let (path, model) = directory.open();
    // Ternary floats are ternary, whatever the configuration says; anything else is not.
    model.projection(0, Projection::Query).unwrap();
    let file = path.path().join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let last = bytes.len();
    bytes[last - 2..].copy_from_slice(&0x3f80u16.to_le_bytes());
    std::fs::write(&file, bytes).unwrap();
    let error =
        Checkpoint::open(path.path()).unwrap().projection(1, Projection::Down).map(drop).unwrap_err().to_string();
    assert!(error.contains("ternary models only") && error.contains("layers.1.mlp.down_proj"), "{error}");
}

#[test]
fn a_norm_in_one_layer_only_is_refused() {
    let mut directory = llama(&json!({}));
    directory.norms.push(("mlp.up_proj.norm", 256));
    let path = tempfile::tempdir().unwrap();
    directory.write(path.path());
    let error = Checkpoint::open(path.path()).map(drop).unwrap_err().to_string();
    assert!(error.contains("mlp.up_proj.norm"), "{error}");
}

#[test]
fn norms_that_are_promised_and_missing_are_named() {
    let promised = json!({"quantization_config": {"quant_method": "bitnet", "use_rms_norm": true}});
    let path = tempfile::tempdir().unwrap();
    llama(&promised).write(path.path());
    let error = Checkpoint::open(path.path()).map(drop).unwrap_err().to_string();
    assert!(error.contains("model.layers.0.self_attn.q_proj.rms_norm.weight"), "{error}");
}

/// `transformers` has to be given reciprocals then, which not every number has.
#[test]
fn scales_beside_biases_go_out_as_exact_reciprocals_or_are_refused() {
    let (mut whole, mut refused) = (0, 0);
    for zeros in 0..12 {
        let config = ModelConfig {
            architecture: "LlamaForCausalLM".to_owned(),
            layers: 1,
            hidden: 64,
            ffn: 64,
            heads: 1,
            kv_heads: 1,
            head_dim: 64,
            vocabulary: 270,
            context: 64,
            biases: Biases { qkv: true, ..Biases::default() },
            ..ModelConfig::default()
        };
        let zero_fraction = 0.4 + f64::from(zeros) / 100.0;
        let recipe = Recipe { config, seed: 1, zero_fraction, gate_sparsity: None };
        let model = Checkpoint::synthetic(recipe).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("exported");
        match export_hf::export(&model, &path, &mut |_, _| ControlFlow::Continue(())) {
            Ok(_) => {
                let again = Checkpoint::open(&path).unwrap();
                for projection in Projection::ALL {
                    let scale = |model: &Checkpoint| model.projection(0, projection).unwrap().scale;
                    assert_eq!(scale(&again), scale(&model), "{projection}");
                }
                whole += 1;
            }
            Err(error) => {
                let error = error.to_string();
                assert!(error.contains("reciprocal") && error.contains("export as GGUF"), "{error}");
                assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
                refused += 1;
            }
        }
    }
    assert!(whole > 0 && refused > 0, "{whole} {refused}");
}
