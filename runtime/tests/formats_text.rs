//! The embedded model's tokenizer against the reference implementation, and text that streams whole characters.

mod support;

use std::sync::LazyLock;

use proptest::prelude::*;
use serde_json::Value;
use support::{embedded, fixture};
use ternion_runtime::text::{Tokenizer, TokenizerConfig, TokenizerError};

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| embedded().tokenizer().unwrap());
static REFERENCE: LazyLock<tokenizers::Tokenizer> =
    LazyLock::new(|| tokenizers::Tokenizer::from_bytes(&embedded().tokenizer_json().unwrap()[..]).unwrap());

fn golden() -> Value {
    serde_json::from_slice(&std::fs::read(fixture("golden.json")).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

/// The text in pieces as they stream, the rest last.
fn stream(tokens: &[u32]) -> Vec<String> {
    let mut detokenizer = TOKENIZER.detokenizer();
    let mut pieces: Vec<String> = tokens.iter().map(|token| detokenizer.push(*token).to_owned()).collect();
    pieces.push(detokenizer.finish().to_owned());
    pieces
}

#[test]
fn prompts_and_continuations_are_those_of_the_reference_implementation() {
    let golden = golden();
    for prompt in golden["prompts"].as_array().unwrap() {
        let text = prompt["text"].as_str().unwrap();
        assert_eq!(TOKENIZER.encode(text, TOKENIZER.adds_bos()).unwrap(), ids(&prompt["ids"]), "{text}");
        for dress in ["master", "packed"] {
            let greedy = ids(&prompt[dress]["greedy"]);
            assert_eq!(stream(&greedy).concat(), prompt[dress]["text"].as_str().unwrap());
        }
    }
}

#[test]
fn held_out_text_survives_the_round_trip() {
    let text = std::fs::read_to_string(fixture("val.txt")).unwrap();
    let tokens = TOKENIZER.encode(&text, true).unwrap();
    assert_eq!(tokens[0], TOKENIZER.bos().unwrap());
    assert_eq!(&tokens[1..], TOKENIZER.encode(&text, false).unwrap());
    assert!(TOKENIZER.decode(&tokens) == text);
    assert!(stream(&tokens).concat() == text);
}

#[test]
fn special_tokens_are_recognised_and_are_no_text() {
    let end = TOKENIZER.token_id("<|eot_id|>").unwrap();
    assert!(TOKENIZER.is_special(end));
    let tokens = TOKENIZER.encode("one<|eot_id|>two", false).unwrap();
    assert!(tokens.contains(&end));
    assert_eq!(TOKENIZER.decode(&tokens), "onetwo");
    assert_eq!(TOKENIZER.token_bytes(end), b"<|eot_id|>");
    assert_eq!((TOKENIZER.bos(), TOKENIZER.eos(), TOKENIZER.len()), (Some(0), Some(1), 2048));
    assert_eq!(TOKENIZER.token_bytes(u32::MAX), b"");
}

#[test]
fn characters_of_several_tokens_come_out_whole() {
    for text in ["🦊", "狐狸和葡萄", "naïve café", "👩‍👩‍👧‍👦 family", "a\u{10ffff}b"] {
        let tokens = TOKENIZER.encode(text, false).unwrap();
        let pieces = stream(&tokens);
        assert!(!pieces.iter().any(|piece| piece.contains('\u{fffd}')), "{pieces:?}");
        assert_eq!(pieces.concat(), text);
        assert_eq!(pieces.last().unwrap(), "");
    }
    // A text that ends in the middle of a character.
    let fox = TOKENIZER.encode("🦊", false).unwrap();
    assert!(fox.len() > 1);
    let pieces = stream(&fox[..fox.len() - 1]);
    assert_eq!(pieces.concat(), "\u{fffd}");
    assert_eq!(pieces.last().unwrap(), "\u{fffd}");
}

#[test]
fn a_tokenizer_of_another_model_is_refused() {
    let json = embedded().tokenizer_json().unwrap();
    let new = |config: &TokenizerConfig, vocabulary| Tokenizer::new(&json, config, vocabulary).map(drop);
    let config = TokenizerConfig::default();
    assert!(matches!(new(&config, 2047), Err(TokenizerError::TooLarge { largest: 2047, vocabulary: 2047 })));
    new(&config, 2048).unwrap();
    let config = TokenizerConfig { bos_token: Some("<s>".to_owned()), ..config };
    assert!(new(&config, 2048).unwrap_err().to_string().contains("<s>"));
    let message = Tokenizer::new(b"{", &TokenizerConfig::default(), 2048).map(drop).unwrap_err().to_string();
    assert!(!message.contains('\n') && message.contains("tokenizer.json"), "{message}");
}

#[test]
fn without_configuration_the_post_processor_tells_whether_texts_begin_with_bos() {
    let json = embedded().tokenizer_json().unwrap();
    let tokenizer = Tokenizer::new(&json, &TokenizerConfig::default(), 2048).unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.adds_bos()), (Some(0), true));
    let never = TokenizerConfig { add_bos: Some(false), ..TokenizerConfig::default() };
    assert!(!Tokenizer::new(&json, &never, 2048).unwrap().adds_bos());
}

proptest! {
    #[test]
    fn any_text_streams_back_as_it_was(text in "(\\PC|[🦊🐻‍❄️👩‍🚀狐狸の話éü \\n]){0,40}") {
        let tokens = TOKENIZER.encode(&text, false).unwrap();
        prop_assert_eq!(stream(&tokens).concat(), &text[..]);
        prop_assert_eq!(TOKENIZER.decode(&tokens), text);
    }

    #[test]
    fn any_tokens_at_all_stream_to_what_decoding_them_at_once_gives(tokens in prop::collection::vec(0u32..2060, 0..60)) {
        let whole = TOKENIZER.decode(&tokens);
        prop_assert_eq!(stream(&tokens).concat(), &whole[..]);
        prop_assert_eq!(REFERENCE.decode(&tokens, true).unwrap(), whole);
    }

    #[test]
    fn a_mutated_tokenizer_never_panics(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut json = embedded().tokenizer_json().unwrap().to_vec();
        let length = json.len();
        for (i, (at, value)) in changes.into_iter().enumerate() {
            // The vocabulary is long and dull: aim at what surrounds it as often as at it.
            json[at.index(if i % 2 == 0 { 4000 } else { length })] = value;
        }
        use_if_possible(&json);
    }

    #[test]
    fn a_tokenizer_with_any_value_replaced_never_panics(
        part in prop::sample::select(vec![
            "/added_tokens", "/normalizer", "/pre_tokenizer", "/post_processor", "/decoder", "/model", "/truncation",
        ]),
        at in any::<prop::sample::Index>(),
        replacement in prop::sample::select(vec![
            "null", "0", "2047", "4294967295", "-1", "1e300", "\"\"", "\"Ġ\"", "[]", "{}", "[[]]", "true",
            "{\"type\":\"Precompiled\",\"precompiled_charsmap\":\"AAAA\"}", "{\"type\":\"Sequence\",\"normalizers\":[]}",
            "{\"type\":\"Lowercase\"}", "{\"type\":\"Strip\"}", "{\"type\":\"ByteFallback\"}", "{\"Regex\":\"(\"}",
            "{\"Regex\":\"\"}", "{\"String\":\"\"}", "{\"SpecialToken\":{\"id\":\"x\",\"type_id\":0}}", "\"Removed\"",
        ]),
    ) {
        let mut json: Value = serde_json::from_slice(&embedded().tokenizer_json().unwrap()).unwrap();
        let mut pointers = Vec::new();
        support::pointers(json.pointer(part).unwrap(), part.to_owned(), &mut pointers);
        *json.pointer_mut(&pointers[at.index(pointers.len())]).unwrap() = serde_json::from_str(replacement).unwrap();
        use_if_possible(json.to_string().as_bytes());
    }
}

fn use_if_possible(json: &[u8]) {
    match Tokenizer::new(json, &TokenizerConfig::default(), 4096) {
        Ok(tokenizer) => {
            if let Ok(tokens) = tokenizer.encode("Once upon a time<|eot_id|> 🦊 1234", true) {
                assert!(tokenizer.decode(&tokens).len() < 1000);
            }
        }
        Err(error) => assert!(!error.to_string().contains('\n'), "{error}"),
    }
}
