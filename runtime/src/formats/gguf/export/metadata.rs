//! The metadata of a GGUF file that is written: sizes, and the vocabulary taken out of `tokenizer.json`.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::Value;

use super::TernaryType;
use crate::formats::gguf::architecture::Architecture;
use crate::formats::{Checkpoint, FormatError, ModelConfig, Pooling, RopeScaling};
use crate::text::vocabulary::{SPLIT_PATTERNS, TokenKind};

/// Metadata in the file's own encoding.
#[derive(Default)]
pub(super) struct Metadata {
    pub(super) count: u64,
    pub(super) bytes: Vec<u8>,
}

/// `string` as the file has it: its length and its bytes.
pub(super) fn push_string(bytes: &mut Vec<u8>, string: &str) {
    bytes.extend((string.len() as u64).to_le_bytes());
    bytes.extend(string.bytes());
}

impl Metadata {
    fn push(&mut self, key: &str, kind: u32, value: &[u8]) {
        self.count += 1;
        push_string(&mut self.bytes, key);
        self.bytes.extend(kind.to_le_bytes());
        self.bytes.extend(value);
    }

    fn text(&mut self, key: &str, value: &str) {
        let mut bytes = Vec::new();
        push_string(&mut bytes, value);
        self.push(key, 8, &bytes);
    }

    fn number(&mut self, key: &str, value: usize) {
        // Sizes are bounded by `ModelConfig::check`.
        self.push(key, 4, &(value as u32).to_le_bytes());
    }

    fn float(&mut self, key: &str, value: f32) {
        self.push(key, 6, &value.to_le_bytes());
    }

    fn flag(&mut self, key: &str, value: bool) {
        self.push(key, 7, &[u8::from(value)]);
    }

    fn texts<'a>(&mut self, key: &str, values: impl ExactSizeIterator<Item = &'a str>) {
        let mut bytes = 8u32.to_le_bytes().to_vec();
        bytes.extend((values.len() as u64).to_le_bytes());
        values.for_each(|value| push_string(&mut bytes, value));
        self.push(key, 9, &bytes);
    }

    fn words(&mut self, key: &str, kind: u32, values: impl ExactSizeIterator<Item = [u8; 4]>) {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend((values.len() as u64).to_le_bytes());
        bytes.extend(values.flatten());
        self.push(key, 9, &bytes);
    }
}

/// All metadata of `model`, written as `architecture`.
pub(super) fn metadata(
    model: &Checkpoint,
    architecture: &Architecture,
    kind: TernaryType,
) -> Result<Metadata, FormatError> {
    let mut metadata = Metadata::default();
    metadata.text("general.architecture", architecture.name);
    metadata.text("general.type", "model");
    let name = model.path().file_stem().unwrap_or_default();
    metadata.text("general.name", &name.to_string_lossy());
    metadata.number("general.file_type", kind.file_type());
    metadata.number("general.quantization_version", 2);
    sizes(model.config(), architecture.name, &mut metadata);
    tokenizer(model, &mut metadata)?;
    Ok(metadata)
}

fn sizes(config: &ModelConfig, architecture: &str, metadata: &mut Metadata) {
    for (key, size) in [
        ("vocab_size", config.vocabulary),
        ("context_length", config.context),
        ("embedding_length", config.hidden),
        ("block_count", config.layers),
        ("feed_forward_length", config.ffn),
        ("rope.dimension_count", config.head_dim),
        ("attention.head_count", config.heads),
        ("attention.head_count_kv", config.kv_heads),
        ("attention.key_length", config.head_dim),
        ("attention.value_length", config.head_dim),
    ] {
        metadata.number(&format!("{architecture}.{key}"), size);
    }
    metadata.float(&format!("{architecture}.attention.layer_norm_rms_epsilon"), config.norm_eps);
    metadata.float(&format!("{architecture}.rope.freq_base"), config.rope_theta as f32);
    if let RopeScaling::Linear { factor } = config.rope_scaling {
        metadata.text(&format!("{architecture}.rope.scaling.type"), "linear");
        metadata.float(&format!("{architecture}.rope.scaling.factor"), factor as f32);
    }
    if let Some(sliding) = &config.sliding {
        metadata.number(&format!("{architecture}.attention.sliding_window"), sliding.window);
        metadata.float(&format!("{architecture}.rope.freq_base_swa"), sliding.rope_theta as f32);
    }
    if let Some(pooling) = config.pooling {
        let kind = match pooling {
            Pooling::Mean => 1,
            Pooling::Last => 3,
        };
        metadata.number(&format!("{architecture}.pooling_type"), kind);
    }
}

/// The parts of a `tokenizer.json` that a GGUF file has.
#[derive(Deserialize)]
struct TokenizerJson {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    decoder: Value,
    model: Bpe,
}

#[derive(Deserialize)]
struct AddedToken {
    id: usize,
    content: String,
    special: bool,
}

#[derive(Deserialize)]
struct Bpe {
    #[serde(rename = "type")]
    kind: Option<String>,
    vocab: HashMap<String, usize>,
    merges: Vec<Merge>,
    #[serde(default)]
    unk_token: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Line(String),
}

impl Merge {
    fn into_line(self) -> String {
        match self {
            Self::Pair(left, right) => format!("{left} {right}"),
            Self::Line(line) => line,
        }
    }
}

fn tokenizer(model: &Checkpoint, metadata: &mut Metadata) -> Result<(), FormatError> {
    let unsupported = |what: &str| FormatError::Unsupported { path: model.path().to_owned(), what: what.to_owned() };
    let json: TokenizerJson = serde_json::from_slice(&model.tokenizer_json()?)
        .map_err(|error| unsupported(&format!("the tokenizer is of a kind that GGUF has not ({error})")))?;
    if json.model.kind.as_deref().is_some_and(|kind| kind != "BPE") {
        return Err(unsupported("the tokenizer is no BPE tokenizer"));
    }
    let tokens = tokens(&json, model.config().vocabulary);
    let merges: Vec<String> = json.model.merges.into_iter().map(Merge::into_line).collect();
    if json.decoder["type"] == "ByteLevel" {
        let regex = split_regex(&json.pre_tokenizer);
        let pattern = SPLIT_PATTERNS.iter().find(|pattern| pattern.regex == regex);
        let pattern =
            pattern.ok_or_else(|| unsupported("the tokenizer splits words in a way that GGUF has no name for"))?;
        metadata.text("tokenizer.ggml.model", "gpt2");
        metadata.text("tokenizer.ggml.pre", pattern.names[0]);
        metadata.texts("tokenizer.ggml.merges", merges.iter().map(String::as_str));
    } else {
        metadata.text("tokenizer.ggml.model", "llama");
        metadata.text("tokenizer.ggml.pre", "default");
        let prefix = json.normalizer.to_string().contains("Prepend");
        metadata.flag("tokenizer.ggml.add_space_prefix", prefix);
        metadata.words("tokenizer.ggml.scores", 6, scores(&tokens, &merges).into_iter().map(f32::to_le_bytes));
    }
    metadata.texts("tokenizer.ggml.tokens", tokens.iter().map(|(token, _)| token.as_str()));
    let kind = |kind: &TokenKind| match kind {
        TokenKind::Normal => 1,
        TokenKind::Unknown => 2,
        TokenKind::Control => 3,
        TokenKind::UserDefined => 4,
        TokenKind::Unused => 5,
        TokenKind::Byte => 6u32,
    };
    metadata.words("tokenizer.ggml.token_type", 5, tokens.iter().map(|(_, k)| kind(k).to_le_bytes()));
    special_tokens(model, metadata)
}

fn special_tokens(model: &Checkpoint, metadata: &mut Metadata) -> Result<(), FormatError> {
    let tokenizer = model.tokenizer()?;
    let id = |token: u32| usize::try_from(token).unwrap_or(usize::MAX);
    if let Some(bos) = model.generation().bos.or(tokenizer.bos()) {
        metadata.number("tokenizer.ggml.bos_token_id", id(bos));
    }
    let ends = &model.generation().eos;
    // What GGUF's readers append is the EOS token.
    let eos = tokenizer.ending().or(tokenizer.eos()).or(ends.first().copied());
    if let Some(eos) = eos {
        metadata.number("tokenizer.ggml.eos_token_id", id(eos));
    }
    if let Some(turn) = ends.iter().find(|end| Some(**end) != eos) {
        metadata.number("tokenizer.ggml.eot_token_id", id(*turn));
    }
    metadata.flag("tokenizer.ggml.add_bos_token", tokenizer.adds_bos());
    if tokenizer.ending().is_some() {
        metadata.flag("tokenizer.ggml.add_eos_token", true);
    }
    if let Some(template) = model.chat_template() {
        metadata.text("tokenizer.chat_template", template);
    }
    Ok(())
}

/// One token for each row of the embedding; rows without one get a name that says so, as llama.cpp's converter does.
fn tokens(json: &TokenizerJson, vocabulary: usize) -> Vec<(String, TokenKind)> {
    let mut tokens: Vec<(String, TokenKind)> =
        (0..vocabulary).map(|id| (format!("[PAD{id}]"), TokenKind::Unused)).collect();
    for (token, id) in &json.model.vocab {
        if let Some(place) = tokens.get_mut(*id) {
            let byte = token.len() == 6 && token.starts_with("<0x") && json.decoder["type"] != "ByteLevel";
            let unknown = json.model.unk_token.as_ref() == Some(token);
            let kind = if byte { TokenKind::Byte } else { TokenKind::Normal };
            *place = (token.clone(), if unknown { TokenKind::Unknown } else { kind });
        }
    }
    for token in &json.added_tokens {
        if let Some(place) = tokens.get_mut(token.id).filter(|(_, kind)| *kind != TokenKind::Unknown) {
            let kind = if token.special { TokenKind::Control } else { TokenKind::UserDefined };
            *place = (token.content.clone(), kind);
        }
    }
    tokens
}

/// A score for each token that makes pieces merge in the order of `merges`: minus the place of the first that makes it.
fn scores(tokens: &[(String, TokenKind)], merges: &[String]) -> Vec<f32> {
    let mut places = HashMap::new();
    for (place, merge) in merges.iter().enumerate() {
        places.entry(merge.replacen(' ', "", 1)).or_insert(place);
    }
    tokens.iter().map(|(token, _)| -(places.get(token).copied().unwrap_or(merges.len()) as f32)).collect()
}

/// The pattern that words are split by.
fn split_regex(pre_tokenizer: &Value) -> Option<&str> {
    let parts = pre_tokenizer["pretokenizers"].as_array()?;
    parts.iter().find_map(|part| part["pattern"]["Regex"].as_str())
}
