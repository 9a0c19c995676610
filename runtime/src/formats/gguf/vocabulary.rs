//! The texts of a GGUF file: vocabulary, special tokens, chat template.

use super::container::{Array, Container, Value};
use crate::formats::error::brief;
use crate::formats::{FormatError, GenerationDefaults, ModelConfig};
use crate::text::TokenizerConfig;
use crate::text::vocabulary::{SPLIT_PATTERNS, SplitPattern, TokenKind, byte_level_json, sentencepiece_json};

/// Part of the template that bitnet.cpp's converter puts into its files, which no model was trained on.
const WRONG_TEMPLATE: &str = "BITNETAssistant";

/// The template of BitNet b1.58 2B4T.
const RIGHT_TEMPLATE: &str = "{% for message in messages %}{% if loop.index0 == 0 %}{{ bos_token }}{% endif %}{{ \
                              message['role'] | capitalize + ': ' + message['content'] | trim + '<|eot_id|>' }}{% \
                              endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}";

/// Tokens that end a turn or a text in the vocabularies of all families, beside the ones that the file names.
const ENDS: [&str; 5] = ["<|eot_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>", "<end_of_turn>"];

/// What a file says about texts, besides the vocabulary itself.
pub(super) struct Words {
    pub(super) tokenizer: TokenizerConfig,
    pub(super) chat_template: Option<String>,
    pub(super) generation: GenerationDefaults,
}

pub(super) fn words(
    container: &Container,
    config: &ModelConfig,
    notes: &mut Vec<String>,
) -> Result<Words, FormatError> {
    let tokens = array(container, "tokenizer.ggml.tokens")?;
    if tokens.is_some_and(|tokens| tokens.len() > config.vocabulary) {
        let problem = format!("holds more tokens than the {} of the model's embedding", config.vocabulary);
        return Err(container.field("tokenizer.ggml.tokens", problem));
    }
    let id = |key: &str| match container.metadata.get(key) {
        None => Ok(None),
        Some(value) => match container.size(key, value) {
            Ok(id) if id < config.vocabulary => Ok(Some(id as u32)),
            _ => Err(container.field(key, "is no token of the model".to_owned())),
        },
    };
    let bos = id("tokenizer.ggml.bos_token_id")?;
    let named = [id("tokenizer.ggml.eos_token_id")?, id("tokenizer.ggml.eot_token_id")?];
    let kinds = kinds(container)?;
    let (mut bos_token, mut eos_token, mut eos) = (None, None, Vec::new());
    eos.extend(named.into_iter().flatten());
    // Only control tokens end a text; `<|eot_id|>` written in a story does not.
    let control = |at: usize| kinds.as_ref().is_none_or(|kinds| kinds.get(at) == Some(&TokenKind::Control));
    for (at, token) in tokens.and_then(Array::strings).into_iter().flatten().enumerate() {
        if ENDS.contains(&token.as_str()) && control(at) {
            eos.push(at as u32);
        }
        if named[0] == Some(at as u32) {
            eos_token = Some(token.clone());
        }
        if bos == Some(at as u32) {
            bos_token = Some(token);
        }
    }
    eos.sort_unstable();
    eos.dedup();

    let pattern = pattern(container)?;
    let add_bos = container.flag("tokenizer.ggml.add_bos_token")?;
    let add_bos = add_bos.or_else(|| Some(pattern.map_or(bos.is_some(), |pattern| pattern.add_bos)));
    let add_eos = container.flag("tokenizer.ggml.add_eos_token")?;
    let chat_template = match container.text("tokenizer.chat_template")? {
        Some(template) if template.contains(WRONG_TEMPLATE) => {
            let right = "the file's chat template is bitnet.cpp's, which the model was not trained on: BitNet's own is \
                         used instead";
            notes.push(right.to_owned());
            Some(RIGHT_TEMPLATE.to_owned())
        }
        template => template.map(str::to_owned),
    };
    Ok(Words {
        tokenizer: TokenizerConfig { add_bos, add_eos, bos_token, eos_token },
        chat_template,
        generation: GenerationDefaults { eos, bos, ..GenerationDefaults::default() },
    })
}

/// The vocabulary as a `tokenizer.json`.
pub(super) fn tokenizer_json(container: &Container) -> Result<Vec<u8>, FormatError> {
    let missing = |key: &str| container.field(key, "is missing: the file has no tokenizer".to_owned());
    let tokens = array(container, "tokenizer.ggml.tokens")?.ok_or_else(|| missing("tokenizer.ggml.tokens"))?;
    let texts = tokens.strings().ok_or_else(|| container.field("tokenizer.ggml.tokens", "are no texts".to_owned()))?;
    let kinds = kinds(container)?;
    let kind = |at: usize| kinds.as_ref().and_then(|kinds| kinds.get(at)).copied().unwrap_or(TokenKind::Normal);
    let tokens: Vec<(String, TokenKind)> = texts.enumerate().map(|(at, text)| (text, kind(at))).collect();
    match pattern(container)? {
        Some(pattern) => {
            let merges = array(container, "tokenizer.ggml.merges")?.ok_or_else(|| missing("tokenizer.ggml.merges"))?;
            let merges = merges.strings();
            let merges = merges.ok_or_else(|| container.field("tokenizer.ggml.merges", "are no texts".to_owned()))?;
            Ok(byte_level_json(&tokens, merges.collect(), pattern))
        }
        None => {
            let scores = array(container, "tokenizer.ggml.scores")?.ok_or_else(|| missing("tokenizer.ggml.scores"))?;
            let scores = scores.numbers().map(|scores| scores.map(|score| score as f32).collect::<Vec<_>>());
            let scores = scores.filter(|scores| scores.len() == tokens.len());
            let problem = || container.field("tokenizer.ggml.scores", "are not one number for each token".to_owned());
            let prefix = container.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
            Ok(sentencepiece_json(&tokens, &scores.ok_or_else(problem)?, prefix))
        }
    }
}

/// How words are split in a byte-level vocabulary; `None` for a SentencePiece one.
fn pattern(container: &Container) -> Result<Option<&'static SplitPattern>, FormatError> {
    let model = container.text("tokenizer.ggml.model")?.unwrap_or("gpt2");
    match model {
        "gpt2" => {}
        "llama" => return Ok(None),
        other => {
            let what = format!("its tokenizer is of kind {}", brief(other));
            return Err(FormatError::Unsupported { path: container.path.clone(), what });
        }
    }
    // The released file of 2B4T names none, or `default`, and means Llama 3's.
    let bitnet = container.text("general.architecture")?.is_some_and(|name| name.starts_with("bitnet"));
    let name = match container.text("tokenizer.ggml.pre")? {
        None | Some("default" | "") if bitnet => "llama-bpe",
        None | Some("default" | "") => "gpt-2",
        Some(name) => name,
    };
    match SPLIT_PATTERNS.iter().find(|pattern| pattern.names.contains(&name)) {
        Some(pattern) => Ok(Some(pattern)),
        None => {
            let what = format!("its tokenizer splits words in the way called {} (tokenizer.ggml.pre)", brief(name));
            Err(FormatError::Unsupported { path: container.path.clone(), what })
        }
    }
}

fn kinds(container: &Container) -> Result<Option<Vec<TokenKind>>, FormatError> {
    let Some(array) = array(container, "tokenizer.ggml.token_type")? else { return Ok(None) };
    let problem = || container.field("tokenizer.ggml.token_type", "are no kinds of tokens".to_owned());
    let numbers = array.numbers().ok_or_else(problem)?;
    let kinds = numbers.map(|number| TokenKind::from_number(number as u32));
    Ok(Some(kinds.collect()))
}

fn array<'a>(container: &'a Container, key: &str) -> Result<Option<&'a Array>, FormatError> {
    match container.metadata.get(key) {
        None => Ok(None),
        Some(Value::Array(array)) => Ok(Some(array)),
        Some(_) => Err(container.field(key, "is no list".to_owned())),
    }
}
