//! Writes the embedded model as a Hugging Face directory, in every dress that ternary weights come in, in one file or
//! in shards, sound or damaged. Needs nothing but the runtime's public interface and `serde_json`.

#![allow(dead_code)] // each test crate uses its part of it

pub(crate) mod gguf;

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use ternion_runtime::formats::{Checkpoint, FloatType, LayerNorm, Projection, TernaryTensor};

/// The prepared file that is embedded in the binary.
pub(crate) fn embedded_path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/ternary-tales.tern")
}

/// The embedded model, opened.
pub(crate) fn embedded() -> Checkpoint {
    Checkpoint::open(&embedded_path()).expect("the embedded model")
}

/// A file of the fixtures of the embedded model.
pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../runtime/tests/fixtures/ternary-tales").join(name)
}

/// Pointers to all values of a JSON document.
pub(crate) fn pointers(value: &Value, at: String, all: &mut Vec<String>) {
    let children: Vec<(String, &Value)> = match value {
        Value::Object(fields) => fields.iter().map(|(key, value)| (key.clone(), value)).collect(),
        Value::Array(items) => items.iter().enumerate().map(|(at, value)| (at.to_string(), value)).collect(),
        _ => Vec::new(),
    };
    for (key, child) in children {
        pointers(child, format!("{at}/{key}"), all);
    }
    all.push(at);
}

/// How ternary matrices are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dress {
    /// uint8 with a multiplying `weight_scale`.
    PackedDirect,
    /// uint8 with a dividing `weight_scale`.
    PackedInverse,
    /// −1, 0, 1 with a multiplying `weight_scale`.
    Unpacked(FloatType),
    /// −s, 0, s.
    Dequantised(FloatType),
    /// Made-up weights with the same trits: magnitudes vary around 1/16, and around 1/256 where the trit is 0.
    Master(FloatType),
}

pub(crate) const DRESSES: [Dress; 11] = [
    Dress::PackedDirect,
    Dress::PackedInverse,
    Dress::Unpacked(FloatType::Bf16),
    Dress::Unpacked(FloatType::F16),
    Dress::Unpacked(FloatType::F32),
    Dress::Dequantised(FloatType::Bf16),
    Dress::Dequantised(FloatType::F16),
    Dress::Dequantised(FloatType::F32),
    Dress::Master(FloatType::Bf16),
    Dress::Master(FloatType::F16),
    Dress::Master(FloatType::F32),
];

/// What is wrong with a directory. Tensors are damaged in the value projection of layer 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Damage {
    /// There is no `config.json`.
    NoConfig,
    /// `config.json` ends in the middle.
    BrokenConfig,
    /// `config.json` names an architecture that nobody knows.
    UnknownArchitecture,
    /// `hidden_size` is not there.
    MissingField,
    /// There are no weights at all.
    NoWeights,
    /// One tensor is not there.
    MissingTensor,
    /// One tensor has a row too many.
    WrongShape,
    /// One tensor is of int64.
    WrongType,
    /// One weight has code 3; only in a packed dress.
    Code3,
    /// The last weights file has lost its last byte.
    Truncated,
    /// The last weights file says its header is longer than the file.
    HeaderBeyondFile,
    /// The last weights file is not there.
    MissingFile,
    /// A projection is listed in `modules_to_not_convert`.
    NotConverted,
    /// A projection has a bias.
    Bias,
    /// `tokenizer.json` is not there.
    NoTokenizer,
}

/// The tensor that damage is done to.
pub(crate) const DAMAGED: &str = "model.layers.2.self_attn.v_proj.weight";

/// A Hugging Face directory to be written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HuggingFaceFixture {
    pub(crate) dress: Dress,
    /// Number of weights files; with one there is no index.
    pub(crate) shards: usize,
    /// Whether the head is a tensor of its own: the embedding's rows in reverse order.
    pub(crate) untied: bool,
    pub(crate) damage: Option<Damage>,
}

pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) dtype: &'static str,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

impl HuggingFaceFixture {
    /// A sound directory with one weights file.
    pub(crate) fn new(dress: Dress) -> Self {
        Self { dress, shards: 1, untied: false, damage: None }
    }

    /// The directory with `damage` done to it.
    pub(crate) fn damaged(damage: Damage) -> Self {
        Self { damage: Some(damage), ..Self::new(Dress::PackedDirect) }
    }

    /// Writes `model` into `directory`, which exists.
    pub(crate) fn write(&self, model: &Checkpoint, directory: &Path) {
        let is = |damage| self.damage == Some(damage);
        let put = |name: &str, bytes: &[u8]| fs::write(directory.join(name), bytes).expect("fixture file");
        if !is(Damage::NoConfig) {
            let config = self.config(model).to_string();
            let end = if is(Damage::BrokenConfig) { config.len() / 2 } else { config.len() };
            put("config.json", &config.as_bytes()[..end]);
        }
        let generation = model.generation();
        put(
            "generation_config.json",
            json!({
                "do_sample": generation.do_sample, "temperature": generation.temperature, "top_k": generation.top_k,
                "top_p": generation.top_p, "min_p": generation.min_p, "max_length": generation.max_length,
                "repetition_penalty": generation.repetition_penalty, "eos_token_id": generation.eos,
                "bos_token_id": generation.bos,
            })
            .to_string()
            .as_bytes(),
        );
        let tokenizer = model.tokenizer_config();
        put(
            "tokenizer_config.json",
            json!({
                "add_bos_token": tokenizer.add_bos, "bos_token": tokenizer.bos_token,
                "eos_token": {"content": tokenizer.eos_token}, "chat_template": model.chat_template(),
            })
            .to_string()
            .as_bytes(),
        );
        if !is(Damage::NoTokenizer) {
            put("tokenizer.json", &model.tokenizer_json().expect("tokenizer"));
        }
        if !is(Damage::NoWeights) {
            self.write_weights(self.tensors(model), directory);
        }
    }

    fn config(&self, model: &Checkpoint) -> Value {
        let config = model.config();
        let architecture = match self.damage {
            Some(Damage::UnknownArchitecture) => "MambaForCausalLM",
            _ => &config.architecture,
        };
        let (class, mode) = match self.dress {
            Dress::PackedDirect | Dress::Unpacked(_) => (json!("autobitlinear"), json!("offline")),
            Dress::PackedInverse => (json!("bitlinear"), json!("offline")),
            Dress::Dequantised(_) => (Value::Null, Value::Null),
            Dress::Master(_) => (json!("autobitlinear"), json!("online")),
        };
        let not_converted = match self.damage {
            Some(Damage::NotConverted) => json!(["lm_head", DAMAGED.trim_end_matches(".weight")]),
            _ => json!(["lm_head"]),
        };
        let mut json = json!({
            "architectures": [architecture], "model_type": "bitnet", "hidden_size": config.hidden,
            "intermediate_size": config.ffn, "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads, "num_key_value_heads": config.kv_heads,
            "vocab_size": config.vocabulary, "max_position_embeddings": config.context,
            "rope_theta": config.rope_theta, "rms_norm_eps": config.norm_eps, "hidden_act": "relu2",
            "tie_word_embeddings": config.tied_head && !self.untied,
            "quantization_config": {
                "quant_method": "bitnet", "linear_class": class, "quantization_mode": mode,
                "modules_to_not_convert": not_converted,
            },
        });
        if self.damage == Some(Damage::MissingField) {
            json["hidden_size"] = Value::Null;
        }
        json
    }

    fn tensors(&self, model: &Checkpoint) -> Vec<Tensor> {
        let config = model.config();
        let norm = |name: String, weights: Vec<f32>| Tensor {
            name,
            dtype: "BF16",
            shape: vec![weights.len()],
            bytes: floats(FloatType::Bf16, weights),
        };
        let embedding = model.embedding().expect("embedding");
        let mut tensors = vec![
            Tensor {
                name: "model.embed_tokens.weight".to_owned(),
                dtype: safetensors_type(embedding.dtype.plain().expect("plain numbers")),
                shape: vec![embedding.rows, embedding.columns],
                bytes: embedding.bytes.to_vec(),
            },
            norm("model.norm.weight".to_owned(), model.final_norm().expect("norm")),
        ];
        if self.untied {
            let rows = embedding.bytes.chunks(embedding.row_bytes()).rev();
            tensors.push(Tensor {
                name: "lm_head.weight".to_owned(),
                dtype: safetensors_type(embedding.dtype.plain().expect("plain numbers")),
                shape: vec![embedding.rows, embedding.columns],
                bytes: rows.flatten().copied().collect(),
            });
        }
        for layer in 0..config.layers {
            for kind in LayerNorm::ALL {
                let weights = model.norm(layer, kind).expect("norm");
                if weights.is_empty() {
                    continue;
                }
                tensors.push(norm(format!("model.layers.{layer}.{kind}.weight"), weights));
            }
            for projection in Projection::ALL {
                let tensor = model.projection(layer, projection).expect("projection");
                self.push_projection(&format!("model.layers.{layer}.{projection}"), &tensor, &mut tensors);
            }
        }
        self.damage_tensors(&mut tensors);
        tensors
    }

    fn push_projection(&self, name: &str, tensor: &TernaryTensor, tensors: &mut Vec<Tensor>) {
        let (m, k) = (tensor.m, tensor.k);
        let trits = trits(tensor);
        let values = |of: &dyn Fn(usize, i8) -> f32| -> Vec<f32> {
            trits.iter().enumerate().map(|(at, trit)| of(at, *trit)).collect()
        };
        let (dtype, shape, bytes, scale) = match self.dress {
            Dress::PackedDirect => ("U8", vec![m / 4, k], pack(&trits, m, k), Some(tensor.scale)),
            Dress::PackedInverse => ("U8", vec![m / 4, k], pack(&trits, m, k), Some(1.0 / tensor.scale)),
            Dress::Unpacked(float) => {
                let bytes = floats(float, values(&|_, trit| f32::from(trit)));
                (safetensors_type(float), vec![m, k], bytes, Some(tensor.scale))
            }
            Dress::Dequantised(float) => {
                let bytes = floats(float, values(&|_, trit| f32::from(trit) * tensor.scale));
                (safetensors_type(float), vec![m, k], bytes, None)
            }
            Dress::Master(float) => {
                let bytes = floats(
                    float,
                    values(&|at, trit| match trit {
                        0 => [0.0, 0.00390625, -0.00390625][at % 3],
                        trit => f32::from(trit) * [0.0625, 0.078125, 0.09375][at % 3],
                    }),
                );
                (safetensors_type(float), vec![m, k], bytes, None)
            }
        };
        tensors.push(Tensor { name: format!("{name}.weight"), dtype, shape, bytes });
        if let Some(scale) = scale {
            let name = format!("{name}.weight_scale");
            tensors.push(Tensor { name, dtype: "F32", shape: vec![1], bytes: scale.to_le_bytes().to_vec() });
        }
    }

    fn damage_tensors(&self, tensors: &mut Vec<Tensor>) {
        let at = tensors.iter().position(|tensor| tensor.name == DAMAGED).expect("the tensor to damage");
        let tensor = &mut tensors[at];
        match self.damage {
            Some(Damage::MissingTensor) => drop(tensors.remove(at)),
            Some(Damage::WrongShape) => {
                tensor.shape[0] += 1;
                let row = tensor.bytes.len() / (tensor.shape[0] - 1);
                tensor.bytes.extend_from_within(..row);
            }
            Some(Damage::WrongType) => {
                tensor.dtype = "I64";
                tensor.bytes = tensor.bytes.iter().flat_map(|byte| i64::from(*byte).to_le_bytes()).collect();
            }
            // Row 5 of the bytes, second code: row 5 + m/4 of the matrix.
            Some(Damage::Code3) => tensor.bytes[5 * tensor.shape[1] + 7] |= 0b1100,
            Some(Damage::Bias) => {
                let name = DAMAGED.replace(".weight", ".bias");
                tensors.push(Tensor { name, dtype: "BF16", shape: vec![128], bytes: vec![0; 256] });
            }
            _ => {}
        }
    }

    fn write_weights(&self, tensors: Vec<Tensor>, directory: &Path) {
        let file_name = |shard: usize| match self.shards {
            1 => "model.safetensors".to_owned(),
            shards => format!("model-{:05}-of-{shards:05}.safetensors", shard + 1),
        };
        let mut shards: Vec<Vec<Tensor>> = (0..self.shards).map(|_| Vec::new()).collect();
        let mut weight_map = serde_json::Map::new();
        for (at, tensor) in tensors.into_iter().enumerate() {
            weight_map.insert(tensor.name.clone(), file_name(at % self.shards).into());
            shards[at % self.shards].push(tensor);
        }
        if self.shards > 1 {
            let index = json!({"metadata": {}, "weight_map": weight_map});
            fs::write(directory.join("model.safetensors.index.json"), index.to_string()).expect("fixture file");
        }
        for (shard, tensors) in shards.iter().enumerate() {
            let mut bytes = safetensors(tensors);
            if shard + 1 == self.shards {
                match self.damage {
                    Some(Damage::MissingFile) => continue,
                    Some(Damage::Truncated) => drop(bytes.pop()),
                    Some(Damage::HeaderBeyondFile) => {
                        let beyond = bytes.len() as u64;
                        bytes[..8].copy_from_slice(&beyond.to_le_bytes());
                    }
                    _ => {}
                }
            }
            fs::write(directory.join(file_name(shard)), bytes).expect("fixture file");
        }
    }
}

/// The trits of a canonical matrix, row-major.
pub(crate) fn trits(tensor: &TernaryTensor) -> Vec<i8> {
    let code = |at: usize| {
        let (row, column) = (at / tensor.k, at % tensor.k);
        tensor.bytes[row * tensor.k.div_ceil(4) + column / 4] >> (2 * (column % 4)) & 3
    };
    (0..tensor.m * tensor.k).map(|at| code(at) as i8 - 1).collect()
}

/// Hugging Face's packing: four rows, a quarter of the matrix apart, share a byte.
fn pack(trits: &[i8], m: usize, k: usize) -> Vec<u8> {
    let mut bytes = vec![0; m / 4 * k];
    for (at, trit) in trits.iter().enumerate() {
        let (row, column) = (at / k, at % k);
        bytes[row % (m / 4) * k + column] |= ((trit + 1) as u8) << (2 * (row / (m / 4)));
    }
    bytes
}

/// Little-endian floats, all of which the type holds exactly.
fn floats(dtype: FloatType, values: Vec<f32>) -> Vec<u8> {
    values
        .into_iter()
        .flat_map(|value| {
            let bits = value.to_bits();
            match dtype {
                FloatType::F32 => bits.to_le_bytes().to_vec(),
                FloatType::Bf16 => ((bits >> 16) as u16).to_le_bytes().to_vec(),
                FloatType::F16 if value == 0.0 => vec![0, 0],
                FloatType::F16 => {
                    let exponent = (bits >> 23 & 0xff) - (127 - 15);
                    let half = bits >> 16 & 0x8000 | exponent << 10 | bits >> 13 & 0x3ff;
                    (half as u16).to_le_bytes().to_vec()
                }
            }
        })
        .collect()
}

fn safetensors_type(dtype: FloatType) -> &'static str {
    match dtype {
        FloatType::Bf16 => "BF16",
        FloatType::F16 => "F16",
        FloatType::F32 => "F32",
    }
}

pub(crate) fn safetensors(tensors: &[Tensor]) -> Vec<u8> {
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for tensor in tensors {
        let offsets = [end, end + tensor.bytes.len()];
        end = offsets[1];
        header.insert(
            tensor.name.clone(),
            json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}),
        );
    }
    let header = Value::Object(header).to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.bytes());
    for tensor in tensors {
        bytes.extend(&tensor.bytes);
    }
    bytes
}

/// A byte-level tokenizer of the special tokens `<s>` and `</s>` and the 256 bytes.
pub(crate) fn small_tokenizer() -> Value {
    let byte = |byte: u8| match byte {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => u32::from(byte),
        0..=0x20 => 0x100 + u32::from(byte),
        0x7f..=0xa0 => 0x121 + u32::from(byte - 0x7f),
        0xad => 0x143,
    };
    let letters = (0..=255).map(|at| char::from_u32(byte(at)).expect("a character").to_string());
    let tokens = ["<s>", "</s>"].into_iter().map(str::to_owned).chain(letters);
    let vocab: serde_json::Map<String, Value> = tokens.zip(0..).map(|(token, id)| (token, Value::from(id))).collect();
    let special = |id: u32, content: &str| {
        json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": true,
        })
    };
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [special(0, "<s>"), special(1, "</s>")],
        "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": [],
        },
    })
}
