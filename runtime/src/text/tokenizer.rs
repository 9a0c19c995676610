//! Text to token ids and back, through the `tokenizers` crate.
//!
//! Decoding does not go through it: in a byte-level vocabulary every token stands for fixed bytes, so they are looked
//! up once and text is their concatenation, whole or token by token.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Detokenizer;
use crate::formats::error::{brief, brief_line};

/// Why a tokenizer cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// The JSON is damaged or describes something the `tokenizers` crate does not know.
    #[error("damaged or unknown tokenizer.json ({0}): get the file again")]
    Invalid(String),
    /// A vocabulary whose tokens are not known to stand for fixed bytes.
    #[error("the tokenizer's decoder is {0}, but only ByteLevel and ByteFallback are supported: convert the tokenizer")]
    UnknownDecoder(String),
    /// The tokenizer belongs to another model.
    #[error(
        "the tokenizer has token {largest}, but the model's vocabulary ends at {vocabulary}: they belong to different models"
    )]
    TooLarge {
        /// The largest token id.
        largest: u32,
        /// Rows of the model's embedding.
        vocabulary: usize,
    },
    /// A special token is named that the vocabulary has not.
    #[error(
        "the tokenizer's {role} token is {token:?}, which its vocabulary does not have: get the model's files again"
    )]
    NoSuchToken {
        /// Which token.
        role: &'static str,
        /// Its text.
        token: String,
    },
    /// A text that cannot be encoded.
    #[error("this text cannot be encoded: {0}")]
    Encode(String),
}

/// What a model's files say about its tokenizer, besides the tokenizer itself (`tokenizer_config.json`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizerConfig {
    /// Whether texts begin with the BOS token; if unknown, the tokenizer's own post-processor tells.
    pub add_bos: Option<bool>,
    /// Whether texts end with the EOS token; if unknown, the tokenizer's own post-processor tells which token they end
    /// with. Those of embedding models do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub add_eos: Option<bool>,
    /// Text of the token that begins a text.
    pub bos_token: Option<String>,
    /// Text of the token that ends a text.
    pub eos_token: Option<String>,
}

impl TokenizerConfig {
    /// Reads a `tokenizer_config.json`. A token is its text, or an object with its `content`.
    pub(crate) fn from_json(json: &Value) -> Self {
        let token = |field: &str| {
            let token = &json[field];
            token.as_str().or_else(|| token["content"].as_str()).map(str::to_owned)
        };
        Self {
            add_bos: json["add_bos_token"].as_bool(),
            // `false` is what most files say, and those of embedding models have a post-processor that appends a token.
            add_eos: json["add_eos_token"].as_bool().filter(|add| *add),
            bos_token: token("bos_token"),
            eos_token: token("eos_token"),
        }
    }
}

/// A tokenizer whose tokens stand for bytes: byte-level, or SentencePiece's with byte fallback.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The bytes that each token stands for, one after the other.
    bytes: Vec<u8>,
    /// Where each token's bytes end.
    ends: Vec<usize>,
    special: HashSet<u32>,
    /// Whether a text is encoded as if a space stood before it, which decoding takes away again.
    strip_space: bool,
    add_bos: bool,
    bos: Option<u32>,
    eos: Option<u32>,
    ending: Option<u32>,
}

impl Tokenizer {
    /// Builds a tokenizer from the text of its `tokenizer.json`, for a model with `vocabulary` tokens.
    ///
    /// # Errors
    /// If it is damaged, of another kind, or has tokens that the model has not.
    pub fn new(json: &[u8], config: &TokenizerConfig, vocabulary: usize) -> Result<Self, TokenizerError> {
        let invalid = |error: &dyn std::fmt::Display| TokenizerError::Invalid(brief_line(error));
        let json = std::str::from_utf8(json).map_err(|error| invalid(&error))?;
        let outline: Outline = serde_json::from_str(json).map_err(|error| invalid(&error))?;
        let alphabet = Alphabet::of(&outline.decoder)?;
        check_normalizer(&outline.normalizer).map_err(|problem| TokenizerError::Invalid(problem.to_owned()))?;
        outline.model.check().map_err(|problem| TokenizerError::Invalid(problem.to_owned()))?;
        let mut inner = tokenizers::Tokenizer::from_bytes(json).map_err(|error| invalid(&error))?;
        // A prompt is never cut or padded to suit a batch.
        inner.with_truncation(None).map_err(|error| invalid(&error))?;
        inner.with_padding(None);
        // What stands around a text is added here, where the model wants it.
        inner.with_post_processor(None::<tokenizers::PostProcessorWrapper>);

        let vocab = inner.get_vocab(true);
        let largest = vocab.values().copied().max().unwrap_or(0);
        if largest as usize >= vocabulary {
            return Err(TokenizerError::TooLarge { largest, vocabulary });
        }
        let mut tokens = vec![""; largest as usize + 1];
        for (token, id) in &vocab {
            tokens[*id as usize] = token;
        }
        let (mut bytes, mut ends) = (Vec::new(), Vec::with_capacity(tokens.len()));
        for token in tokens {
            match alphabet {
                Alphabet::ByteLevel => push_bytes(token, &mut bytes),
                Alphabet::SentencePiece { .. } => push_piece(token, &mut bytes),
            }
            ends.push(bytes.len());
        }

        let added = inner.get_added_tokens_decoder().into_iter();
        let special = added.filter_map(|(id, token)| token.special.then_some(id)).collect();
        let find = |role, token: &Option<String>| match token {
            None => Ok(None),
            Some(token) => match inner.token_to_id(token) {
                Some(id) => Ok(Some(id)),
                None => Err(TokenizerError::NoSuchToken { role, token: brief(token) }),
            },
        };
        let (named, eos) = (find("BOS", &config.bos_token)?, find("EOS", &config.eos_token)?);
        let processed = first_special(&outline.post_processor)
            .and_then(|token| inner.token_to_id(token))
            .filter(|first| named.is_none_or(|bos| bos == *first));
        let add_bos = config.add_bos.unwrap_or(processed.is_some());
        let appended = last_special(&outline.post_processor).and_then(|token| inner.token_to_id(token));
        let ending = match config.add_eos {
            Some(false) => None,
            Some(true) => appended.or(eos),
            None => appended,
        };
        let strip_space = alphabet == Alphabet::SentencePiece { strip_space: true };
        Ok(Self { special, bytes, ends, strip_space, add_bos, bos: named.or(processed), eos, ending, inner })
    }

    /// Token ids of `text`, preceded by the BOS token if `add_bos` is set and the model has one. Special tokens
    /// written out in the text become those tokens.
    ///
    /// # Errors
    /// If the vocabulary has no tokens for some of the text.
    pub fn encode(&self, text: &str, add_bos: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding =
            self.inner.encode_fast(text, false).map_err(|error| TokenizerError::Encode(brief_line(error)))?;
        let bos = self.bos.filter(|_| add_bos);
        Ok(bos.into_iter().chain(encoding.get_ids().iter().copied()).collect())
    }

    /// The text of `tokens`, without special ones. Bytes that are no UTF-8 become U+FFFD. It is taken for a whole text:
    /// the space that SentencePiece puts before one is taken away again, which [`detokenizer`](Self::detokenizer),
    /// whose text continues another, does not do.
    #[must_use]
    pub fn decode(&self, tokens: &[u32]) -> String {
        let bytes: Vec<u8> = tokens
            .iter()
            .filter(|token| !self.is_special(**token))
            .flat_map(|token| self.token_bytes(*token))
            .copied()
            .collect();
        let space = usize::from(self.strip_space && bytes.first() == Some(&b' '));
        String::from_utf8_lossy(&bytes[space..]).into_owned()
    }

    /// A detokenizer for the text that continues here.
    #[must_use]
    pub fn detokenizer(&self) -> Detokenizer<'_> {
        Detokenizer::new(self)
    }

    /// The bytes that a token stands for, possibly a part of a character; a special token's are its name. Empty for
    /// ids that the vocabulary does not have.
    #[must_use]
    pub fn token_bytes(&self, token: u32) -> &[u8] {
        let at = token as usize;
        let Some(end) = self.ends.get(at) else { return &[] };
        let start = if at == 0 { 0 } else { self.ends[at - 1] };
        &self.bytes[start..*end]
    }

    /// The id of the token with this very text, for example `<|eot_id|>`.
    #[must_use]
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Whether a token controls the model and is no text.
    #[must_use]
    pub fn is_special(&self, token: u32) -> bool {
        self.special.contains(&token)
    }

    /// Whether the model wants prompts to begin with the BOS token.
    #[must_use]
    pub fn adds_bos(&self) -> bool {
        self.add_bos && self.bos.is_some()
    }

    /// The token that the model wants whole texts to end with, as embedding models do: what the tokenizer's own
    /// post-processor appends, or the EOS token.
    #[must_use]
    pub fn ending(&self) -> Option<u32> {
        self.ending
    }

    /// The token that begins a text.
    #[must_use]
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a text, as the tokenizer's configuration names it.
    #[must_use]
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Number of token ids, gaps included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there are no tokens.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }
}

/// The parts of a `tokenizer.json` that are looked at before the `tokenizers` crate sees it: it panics on some of what
/// they may hold, and does not tell what its post-processor adds.
#[derive(Deserialize)]
struct Outline {
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
    #[serde(default)]
    model: ModelOutline,
}

#[derive(Default, Deserialize)]
struct ModelOutline {
    #[serde(default)]
    continuing_subword_prefix: Value,
    #[serde(default)]
    dropout: Value,
}

impl ModelOutline {
    fn check(&self) -> Result<(), &'static str> {
        if !(self.continuing_subword_prefix.is_null() || self.continuing_subword_prefix == "") {
            return Err("a continuing_subword_prefix, which a vocabulary of bytes has not");
        }
        if !(self.dropout.is_null() || self.dropout.as_f64() == Some(0.0)) {
            return Err("a dropout, which makes tokens a matter of chance");
        }
        Ok(())
    }
}

/// Whether this is a normalizer that vocabularies of bytes come with. Others change texts in ways that tokens do not
/// give back, and the crate panics on a `Precompiled` one that is damaged and on a replaced pattern that matches nothing.
fn check_normalizer(normalizer: &Value) -> Result<(), &'static str> {
    if normalizer.is_null() {
        return Ok(());
    }
    match normalizer["type"].as_str() {
        Some("NFC" | "NFD" | "NFKC" | "NFKD" | "Lowercase" | "Strip" | "Prepend") => Ok(()),
        Some("Replace") => match normalizer["pattern"]["String"].as_str() {
            Some(pattern) if !pattern.is_empty() => Ok(()),
            _ => Err("a normalizer that replaces something else than a fixed text"),
        },
        Some("Sequence") => match normalizer["normalizers"].as_array() {
            Some(parts) => parts.iter().try_for_each(check_normalizer),
            None => Err("a sequence of normalizers without any"),
        },
        _ => Err("a normalizer that vocabularies of bytes have not"),
    }
}

/// The special token that a post-processor puts before a text.
fn first_special(post_processor: &Value) -> Option<&str> {
    match post_processor["type"].as_str()? {
        "TemplateProcessing" => post_processor["single"][0]["SpecialToken"]["id"].as_str(),
        "Sequence" => post_processor["processors"].as_array()?.iter().find_map(first_special),
        _ => None,
    }
}

/// The special token that a post-processor puts after a text.
fn last_special(post_processor: &Value) -> Option<&str> {
    match post_processor["type"].as_str()? {
        "TemplateProcessing" => {
            let (last, before) = post_processor["single"].as_array()?.split_last()?;
            let follows = before.iter().any(|part| !part["Sequence"].is_null());
            last["SpecialToken"]["id"].as_str().filter(|_| follows)
        }
        "Sequence" => post_processor["processors"].as_array()?.iter().rev().find_map(last_special),
        _ => None,
    }
}

/// How a token's text tells the bytes it stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Alphabet {
    /// One character for each byte.
    ByteLevel,
    /// `▁` for a space, `<0x0A>` for a byte.
    SentencePiece { strip_space: bool },
}

impl Alphabet {
    fn of(decoder: &Value) -> Result<Self, TokenizerError> {
        let kind = |decoder: &Value, name: &str| decoder["type"] == name;
        if kind(decoder, "ByteLevel") {
            return Ok(Self::ByteLevel);
        }
        if let Some(decoders) = decoder["decoders"].as_array().filter(|_| kind(decoder, "Sequence")) {
            let replaces = |decoder: &Value| decoder["pattern"]["String"] == "▁" && decoder["content"] == " ";
            let known = |decoder: &Value| match decoder["type"].as_str() {
                Some("Replace") => replaces(decoder),
                Some("Strip") => decoder["content"] == " " && decoder["start"] == 1 && decoder["stop"] == 0,
                Some("ByteFallback" | "Fuse") => true,
                _ => false,
            };
            if decoders.iter().all(known) && decoders.iter().any(replaces) {
                return Ok(Self::SentencePiece { strip_space: decoders.iter().any(|d| kind(d, "Strip")) });
            }
        }
        Err(TokenizerError::UnknownDecoder(brief_line(decoder)))
    }
}

/// Appends the bytes of a SentencePiece token.
fn push_piece(token: &str, bytes: &mut Vec<u8>) {
    let hex = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>')).filter(|hex| hex.len() == 2);
    match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
        Some(byte) => bytes.push(byte),
        None => bytes.extend(token.replace('▁', " ").bytes()),
    }
}

/// Appends the bytes of a byte-level token. A token with a character outside the byte alphabet is plain text.
fn push_bytes(token: &str, bytes: &mut Vec<u8>) {
    let start = bytes.len();
    for char in token.chars() {
        match byte_of(char) {
            Some(byte) => bytes.push(byte),
            None => {
                bytes.truncate(start);
                bytes.extend(token.bytes());
                return;
            }
        }
    }
}

/// The byte that a character of GPT-2's byte alphabet stands for. Printable Latin-1 characters stand for themselves;
/// the other bytes are numbered in order from U+0100.
fn byte_of(char: char) -> Option<u8> {
    match u32::from(char) {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => Some(code as u8),
        code @ 0x100..=0x120 => Some((code - 0x100) as u8),
        code @ 0x121..=0x142 => Some((code - 0x121 + 0x7f) as u8),
        0x143 => Some(0xad),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;

    #[test]
    fn the_byte_alphabet_is_the_tokenizers_crates_own() {
        let alphabet = ByteLevel::alphabet();
        assert_eq!(alphabet.len(), 256);
        let mut bytes: Vec<u8> = alphabet.iter().filter_map(|char| byte_of(*char)).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        assert_eq!((0..=0x200).filter_map(char::from_u32).filter(|char| byte_of(*char).is_some()).count(), 256);
        assert_eq!(byte_of('Ġ'), Some(b' '));
        assert_eq!(byte_of('Ċ'), Some(b'\n'));
    }

    #[test]
    fn a_post_processor_tells_what_stands_around_a_text() {
        let special = |id: &str| serde_json::json!({"SpecialToken": {"id": id, "type_id": 0}});
        let text = || serde_json::json!({"Sequence": {"id": "A", "type_id": 0}});
        let template = |single: &[Value]| {
            let template = serde_json::json!({"type": "TemplateProcessing", "single": single});
            serde_json::json!({"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]})
        };
        for (single, first, last) in [
            (vec![special("<s>"), text()], Some("<s>"), None),
            (vec![text(), special("<end>")], None, Some("<end>")),
            (vec![special("<s>"), text(), special("</s>")], Some("<s>"), Some("</s>")),
            (vec![special("<s>")], Some("<s>"), None),
            (vec![text()], None, None),
        ] {
            let processor = template(&single);
            assert_eq!((first_special(&processor), last_special(&processor)), (first, last));
        }
    }

    #[test]
    fn a_special_token_is_a_string_or_an_object() {
        let json = serde_json::json!({"bos_token": {"content": "<s>", "lstrip": false}, "eos_token": "</s>"});
        let config = TokenizerConfig::from_json(&json);
        assert_eq!((config.bos_token.as_deref(), config.eos_token.as_deref()), (Some("<s>"), Some("</s>")));
        assert_eq!(config.add_bos, None);
    }
}
