//! A `tokenizer.json` from a bare vocabulary, as GGUF files and SentencePiece models have it.
//!
//! Byte-level vocabularies come with merges and the name of a pattern that splits a text first. SentencePiece's come
//! with a score for each piece: the pair whose piece scores highest is merged first.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

/// What a token of a bare vocabulary is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TokenKind {
    /// Text, or part of it.
    Normal,
    /// Stands for what the vocabulary cannot say.
    Unknown,
    /// Controls the model, is no text.
    Control,
    /// Text that is one token wherever it occurs.
    UserDefined,
    /// Nothing.
    Unused,
    /// One byte, `<0x0A>`.
    Byte,
}

impl TokenKind {
    /// The kind that SentencePiece models and GGUF files number so; any other number is a normal token.
    pub(crate) const fn from_number(number: u32) -> Self {
        match number {
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => Self::Normal,
        }
    }
}

/// Patterns that split a text into words before merging, by the names that GGUF files give them.
pub(crate) struct SplitPattern {
    pub(crate) names: &'static [&'static str],
    /// `None`: GPT-2's, which the `tokenizers` crate has built in.
    pub(crate) regex: Option<&'static str>,
    /// Whether a word that is in the vocabulary is one token, whatever the merges say.
    pub(crate) ignore_merges: bool,
    /// Whether texts are brought to Unicode's NFC first.
    nfc: bool,
    /// Whether texts begin with BOS if the file does not say.
    pub(crate) add_bos: bool,
}

/// All known patterns. The first name of each is what export writes.
pub(crate) const SPLIT_PATTERNS: [SplitPattern; 3] = [
    SplitPattern {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon_e", "falcon-e"],
        regex: Some(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        ignore_merges: true,
        nfc: false,
        add_bos: true,
    },
    SplitPattern {
        names: &["qwen2", "qwen2.5", "qwen3"],
        regex: Some(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        ignore_merges: false,
        nfc: true,
        add_bos: false,
    },
    SplitPattern { names: &["gpt-2", "gpt2"], regex: None, ignore_merges: false, nfc: false, add_bos: false },
];

/// The `tokenizer.json` of a byte-level vocabulary; merges are two tokens with a space between them.
pub(crate) fn byte_level_json(tokens: &[(String, TokenKind)], merges: Vec<String>, pattern: &SplitPattern) -> Vec<u8> {
    let byte_level = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let pre_tokenizer = match pattern.regex {
        None => byte_level(true),
        Some(regex) => json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false},
            byte_level(false),
        ]}),
    };
    let model = json!({
        "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
        "ignore_merges": pattern.ignore_merges, "vocab": vocab(tokens), "merges": merges,
    });
    let normalizer = if pattern.nfc { json!({"type": "NFC"}) } else { Value::Null };
    to_json(tokens, normalizer, pre_tokenizer, byte_level(true), model)
}

/// The `tokenizer.json` of a SentencePiece vocabulary of kind BPE with byte fallback. With `add_space_prefix`, a text
/// is taken to begin with a space.
pub(crate) fn sentencepiece_json(tokens: &[(String, TokenKind)], scores: &[f32], add_space_prefix: bool) -> Vec<u8> {
    let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if add_space_prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let unknown = tokens.iter().find(|(_, kind)| *kind == TokenKind::Unknown).map(|(token, _)| token);
    let model = json!({
        "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
        "vocab": vocab(tokens), "merges": merges_by_score(tokens, scores),
    });
    let normalizer = json!({"type": "Sequence", "normalizers": normalizers});
    to_json(tokens, normalizer, Value::Null, json!({"type": "Sequence", "decoders": decoders}), model)
}

/// Every way to make a piece of two others, best score first; among equals, as `transformers` orders them.
fn merges_by_score(tokens: &[(String, TokenKind)], scores: &[f32]) -> Vec<String> {
    let ids: HashMap<&str, usize> = tokens.iter().enumerate().map(|(id, (token, _))| (token.as_str(), id)).collect();
    let mut merges: Vec<(f32, usize, usize, &str, &str)> = Vec::new();
    for ((piece, kind), score) in tokens.iter().zip(scores) {
        // A space would be taken for the one between the two halves.
        if !matches!(kind, TokenKind::Normal | TokenKind::UserDefined) || piece.contains(' ') || piece.len() > MAX_PIECE
        {
            continue;
        }
        let start = merges.len();
        for (at, _) in piece.char_indices().skip(1) {
            let (left, right) = piece.split_at(at);
            if ids.contains_key(left) && ids.contains_key(right) {
                merges.push((*score, left.chars().count(), right.chars().count(), left, right));
            }
        }
        merges[start..].sort_by_key(|(.., left, right)| (ids[left], ids[right]));
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)).then(b.2.cmp(&a.2)));
    merges.into_iter().map(|(.., left, right)| format!("{left} {right}")).collect()
}

/// Longest piece, in bytes, that is made by merging: real ones have some dozens.
const MAX_PIECE: usize = 1024;

/// Tokens by text. Of two with the same text the first counts.
fn vocab(tokens: &[(String, TokenKind)]) -> Map<String, Value> {
    let mut vocab = Map::new();
    for (id, (token, _)) in tokens.iter().enumerate() {
        vocab.entry(token.as_str()).or_insert_with(|| id.into());
    }
    vocab
}

fn to_json(
    tokens: &[(String, TokenKind)],
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    model: Value,
) -> Vec<u8> {
    let whole = |(id, (token, kind)): (usize, &(String, TokenKind))| {
        let whole = matches!(kind, TokenKind::Control | TokenKind::Unknown | TokenKind::UserDefined);
        (whole && !token.is_empty()).then(|| {
            json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": *kind != TokenKind::UserDefined,
            })
        })
    };
    let added: Vec<Value> = tokens.iter().enumerate().filter_map(whole).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer, "post_processor": null, "decoder": decoder, "model": model,
    })
    .to_string()
    .into_bytes()
}
