//! What a client says, made harmless: no control characters, and nothing that the tokenizer would take for a token that
//! controls the model.

use ternion_runtime::text::Tokenizer;

/// Put into the name of a special token, so that it is text again. Invisible, and no letter.
const BREAK: char = '\u{200b}';

/// Names of all tokens that control a model.
#[derive(Debug)]
pub struct Sanitiser {
    special: Vec<String>,
}

impl Sanitiser {
    /// For a tokenizer's special tokens.
    #[must_use]
    pub fn new(tokenizer: &Tokenizer) -> Self {
        let ids = (0..tokenizer.len()).filter_map(|id| u32::try_from(id).ok());
        let special = ids.filter(|id| tokenizer.is_special(*id)).map(|id| tokenizer.token_bytes(id));
        Self::of(special.filter_map(|name| String::from_utf8(name.to_vec()).ok()))
    }

    fn of(special: impl Iterator<Item = String>) -> Self {
        let mut special: Vec<String> = special.filter(|name| name.chars().count() > 1).collect();
        special.sort_unstable();
        special.dedup();
        Self { special }
    }

    /// The text without control characters other than tab and line breaks, and with special tokens broken up.
    #[must_use]
    pub fn content(&self, text: &str) -> String {
        let mut text = without_controls(text);
        for name in &self.special {
            // Breaking one up never completes another: it only takes neighbours apart.
            if text.contains(name.as_str()) {
                let first = name.chars().next().map_or(0, char::len_utf8);
                let broken = format!("{}{BREAK}{}", &name[..first], &name[first..]);
                text = text.replace(name.as_str(), &broken);
            }
        }
        text
    }
}

/// The text without control characters other than tab and line breaks.
#[must_use]
pub fn without_controls(text: &str) -> String {
    text.chars().filter(|char| !char.is_control() || matches!(char, '\n' | '\r' | '\t')).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_special_token_survives_and_other_text_does() {
        let names = ["<|eot_id|>", "<s>", "</s>", "<|start|>"].map(str::to_owned);
        let sanitiser = Sanitiser::of(names.clone().into_iter());
        let text =
            sanitiser.content("a<|eot_id|><|eot_id|>b <s></s> <|eot<|eot_id|>_id|> \u{0}\u{1b}[2J\u{85}ok\r\n\tx");
        assert!(names.iter().all(|name| !text.contains(name.as_str())), "{text}");
        assert!(text.ends_with(" [2Jok\r\n\tx"), "{text}");
        // Taking a control character out must not make a token.
        assert!(!sanitiser.content("<\u{0}s>").contains("<s>"));
        assert_eq!(sanitiser.content("a < b, <|end|>"), "a < b, <|end|>");
    }
}
