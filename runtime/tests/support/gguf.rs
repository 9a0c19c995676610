//! Writes models as GGUF files, weight by weight as the formats are described, in no hurry: nothing here is shared
//! with the reader.

use half::f16;
use serde_json::Value as Json;
use ternion_runtime::formats::{Checkpoint, LayerNorm, Projection};

use super::trits;

/// A value of the metadata.
pub(crate) enum Value {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
}

/// A file to be written.
pub(crate) struct GgufFile {
    pub(crate) version: u32,
    pub(crate) metadata: Vec<(String, Value)>,
    /// Name, dimensions in the file's order, number of the type, bytes.
    pub(crate) tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

impl GgufFile {
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(self.version.to_le_bytes());
        file.extend((self.tensors.len() as u64).to_le_bytes());
        file.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            push_text(&mut file, key);
            push_value(&mut file, value);
        }
        let mut offset = 0u64;
        for (name, dimensions, kind, bytes) in &self.tensors {
            push_text(&mut file, name);
            file.extend((dimensions.len() as u32).to_le_bytes());
            dimensions.iter().for_each(|size| file.extend(size.to_le_bytes()));
            file.extend(kind.to_le_bytes());
            file.extend(offset.to_le_bytes());
            offset = (offset + bytes.len() as u64).next_multiple_of(32);
        }
        for (.., bytes) in &self.tensors {
            file.resize(file.len().next_multiple_of(32), 0);
            file.extend(bytes);
        }
        file
    }

    /// Sets a value of the metadata, or takes it away.
    pub(crate) fn set(&mut self, key: &str, value: Option<Value>) {
        self.metadata.retain(|(other, _)| other != key);
        self.metadata.extend(value.map(|value| (key.to_owned(), value)));
    }

    /// The tensor of this name.
    pub(crate) fn tensor(&mut self, name: &str) -> &mut (String, Vec<u64>, u32, Vec<u8>) {
        self.tensors.iter_mut().find(|(other, ..)| other == name).expect("a tensor of the file")
    }
}

fn push_text(file: &mut Vec<u8>, text: &str) {
    file.extend((text.len() as u64).to_le_bytes());
    file.extend(text.bytes());
}

fn push_value(file: &mut Vec<u8>, value: &Value) {
    let array = |file: &mut Vec<u8>, kind: u32, count: usize| {
        file.extend(9u32.to_le_bytes());
        file.extend(kind.to_le_bytes());
        file.extend((count as u64).to_le_bytes());
    };
    match value {
        Value::U32(value) => {
            file.extend(4u32.to_le_bytes());
            file.extend(value.to_le_bytes());
        }
        Value::F32(value) => {
            file.extend(6u32.to_le_bytes());
            file.extend(value.to_le_bytes());
        }
        Value::Bool(value) => {
            file.extend(7u32.to_le_bytes());
            file.push(u8::from(*value));
        }
        Value::Text(value) => {
            file.extend(8u32.to_le_bytes());
            push_text(file, value);
        }
        Value::Texts(values) => {
            array(file, 8, values.len());
            values.iter().for_each(|value| push_text(file, value));
        }
        Value::I32s(values) => {
            array(file, 5, values.len());
            values.iter().for_each(|value| file.extend(value.to_le_bytes()));
        }
        Value::F32s(values) => {
            array(file, 6, values.len());
            values.iter().for_each(|value| file.extend(value.to_le_bytes()));
        }
    }
}

/// How ternary matrices are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Weights {
    F32,
    F16,
    Q4_0,
    Tq1_0,
    Tq2_0,
    /// 128 weights in 32 bytes.
    I2s128,
    /// 64 weights in 16 bytes.
    I2s64,
    /// Four rows in a byte.
    I2sRows,
}

impl Weights {
    pub(crate) const ALL: [Self; 8] =
        [Self::F32, Self::F16, Self::Q4_0, Self::Tq1_0, Self::Tq2_0, Self::I2s128, Self::I2s64, Self::I2sRows];

    const fn id(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Tq1_0 => 34,
            Self::Tq2_0 => 35,
            Self::I2s128 | Self::I2s64 | Self::I2sRows => 36,
        }
    }

    pub(crate) fn encode(self, trits: &[i8], k: usize, scale: f32) -> Vec<u8> {
        let half = |value: f32| f16::from_f32(value).to_le_bytes();
        let code = |at: usize| (trits[at] + 1) as u8;
        let mut bytes = Vec::new();
        match self {
            Self::F32 => trits.iter().for_each(|trit| bytes.extend((f32::from(*trit) * scale).to_le_bytes())),
            Self::F16 => trits.iter().for_each(|trit| bytes.extend(half(f32::from(*trit) * scale))),
            Self::Q4_0 => {
                for block in trits.chunks(32) {
                    // The first weight of the largest magnitude becomes −8.
                    let first = block.iter().copied().find(|trit| *trit != 0).unwrap_or(0);
                    bytes.extend(half(f32::from(first) * scale / -8.0));
                    let code = |trit: i8| {
                        if trit == 0 {
                            8
                        } else if trit == first {
                            0
                        } else {
                            15
                        }
                    };
                    (0..16).for_each(|i| bytes.push(code(block[i]) | code(block[i + 16]) << 4));
                }
            }
            Self::Tq1_0 => {
                for block in (0..trits.len()).step_by(256) {
                    for (start, width, count) in [(0, 32, 5), (160, 16, 5), (240, 4, 4)] {
                        for m in 0..width {
                            let mut value = 0u32;
                            for n in 0..5 {
                                value *= 3;
                                value += if n < count { u32::from(code(block + start + m + width * n)) } else { 0 };
                            }
                            bytes.push((value * 256).div_ceil(243) as u8);
                        }
                    }
                    bytes.extend(half(scale));
                }
            }
            Self::Tq2_0 => {
                for block in (0..trits.len()).step_by(256) {
                    for start in [block, block + 128] {
                        for m in 0..32 {
                            bytes.push((0..4).map(|n| code(start + m + 32 * n) << (2 * n)).sum());
                        }
                    }
                    bytes.extend(half(scale));
                }
            }
            Self::I2s128 | Self::I2s64 => {
                let width = if self == Self::I2s128 { 32 } else { 16 };
                bytes.resize(trits.len() / 4, 0);
                for at in 0..trits.len() {
                    let (block, j) = (at / (4 * width), at % (4 * width));
                    bytes[block * width + j % width] |= code(at) << (6 - 2 * (j / width));
                }
            }
            Self::I2sRows => {
                bytes.resize(trits.len() / 4, 0);
                for at in 0..trits.len() {
                    let (row, column) = (at / k, at % k);
                    bytes[row / 4 * k + column] |= code(at) << (6 - 2 * (row % 4));
                }
            }
        }
        if self.id() == 36 {
            bytes.extend(scale.to_le_bytes());
            bytes.extend([0xaa; 28]);
        }
        bytes
    }
}

/// `model` as a file of `architecture`; q and k are permuted as `llama` wants them.
pub(crate) fn gguf(model: &Checkpoint, architecture: &str, weights: Weights) -> GgufFile {
    let config = model.config();
    let mut file = GgufFile { version: 3, metadata: Vec::new(), tensors: Vec::new() };
    file.set("general.architecture", Some(Value::Text(architecture.to_owned())));
    for (key, size) in [
        ("block_count", config.layers),
        ("context_length", config.context),
        ("embedding_length", config.hidden),
        ("feed_forward_length", config.ffn),
        ("attention.head_count", config.heads),
        ("attention.head_count_kv", config.kv_heads),
        ("rope.dimension_count", config.head_dim),
    ] {
        file.set(&format!("{architecture}.{key}"), Some(Value::U32(size as u32)));
    }
    for (key, number) in
        [("attention.layer_norm_rms_epsilon", config.norm_eps), ("rope.freq_base", config.rope_theta as f32)]
    {
        file.set(&format!("{architecture}.{key}"), Some(Value::F32(number)));
    }
    push_tokenizer(model, &mut file);

    let embedding = model.embedding().expect("embedding");
    let shape = vec![embedding.columns as u64, embedding.rows as u64];
    file.tensors.push(("token_embd.weight".to_owned(), shape, 30, embedding.bytes.to_vec()));
    let norm = |name: String, weights: Vec<f32>| {
        let bytes = weights.iter().flat_map(|weight| weight.to_le_bytes()).collect();
        (name, vec![weights.len() as u64], 0, bytes)
    };
    file.tensors.push(norm("output_norm.weight".to_owned(), model.final_norm().expect("norm")));
    for layer in 0..config.layers {
        for (kind, name) in [
            (LayerNorm::Input, "attn_norm"),
            (LayerNorm::AttentionSub, "attn_sub_norm"),
            (LayerNorm::PostAttention, "ffn_norm"),
            (LayerNorm::FfnSub, "ffn_sub_norm"),
        ] {
            // Llama's layers have no sub-norms.
            if architecture != "llama" || !name.contains("sub") {
                let weights = model.norm(layer, kind).expect("norm");
                file.tensors.push(norm(format!("blk.{layer}.{name}.weight"), weights));
            }
        }
        for (projection, name) in Projection::ALL.into_iter().zip([
            "attn_q",
            "attn_k",
            "attn_v",
            "attn_output",
            "ffn_gate",
            "ffn_up",
            "ffn_down",
        ]) {
            let tensor = model.projection(layer, projection).expect("projection");
            let mut trits = trits(&tensor);
            if architecture == "llama" && matches!(projection, Projection::Query | Projection::Key) {
                trits = permuted(&trits, tensor.k, config.head_dim);
            }
            let shape = vec![tensor.k as u64, tensor.m as u64];
            let bytes = weights.encode(&trits, tensor.k, tensor.scale);
            file.tensors.push((format!("blk.{layer}.{name}.weight"), shape, weights.id(), bytes));
        }
    }
    file
}

/// Rows of each head in the order (d/2, 2) instead of (2, d/2).
fn permuted(trits: &[i8], k: usize, d: usize) -> Vec<i8> {
    let mut rows = Vec::new();
    for head in trits.chunks(d * k) {
        for j in 0..d / 2 {
            for h in 0..2 {
                rows.extend(&head[(h * d / 2 + j) * k..][..k]);
            }
        }
    }
    rows
}

fn push_tokenizer(model: &Checkpoint, file: &mut GgufFile) {
    let json: Json = serde_json::from_slice(&model.tokenizer_json().expect("tokenizer")).expect("JSON");
    let mut tokens = vec![String::new(); model.config().vocabulary];
    let mut kinds = vec![1; tokens.len()];
    for (token, id) in json["model"]["vocab"].as_object().expect("vocabulary") {
        tokens[id.as_u64().expect("an id") as usize] = token.clone();
    }
    for token in json["added_tokens"].as_array().expect("tokens") {
        let id = token["id"].as_u64().expect("an id") as usize;
        tokens[id] = token["content"].as_str().expect("text").to_owned();
        kinds[id] = 3;
    }
    let merges = json["model"]["merges"].as_array().expect("merges").iter();
    let merges = merges.map(|pair| format!("{} {}", pair[0].as_str().expect("text"), pair[1].as_str().expect("text")));
    for (key, value) in [
        ("model", Value::Text("gpt2".to_owned())),
        ("pre", Value::Text("llama-bpe".to_owned())),
        ("tokens", Value::Texts(tokens)),
        ("token_type", Value::I32s(kinds)),
        ("merges", Value::Texts(merges.collect())),
        ("bos_token_id", Value::U32(0)),
        ("eos_token_id", Value::U32(1)),
        ("add_bos_token", Value::Bool(true)),
    ] {
        file.set(&format!("tokenizer.ggml.{key}"), Some(value));
    }
}
