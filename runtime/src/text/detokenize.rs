//! Incremental detokenisation: complete characters only, as soon as they are complete.
//!
//! A token of a byte-level vocabulary may end in the middle of a character. Its bytes wait here until the rest comes;
//! all pieces together are exactly the text that decoding all tokens at once gives.

use super::Tokenizer;

/// Turns tokens into text, one at a time.
pub struct Detokenizer<'a> {
    tokenizer: &'a Tokenizer,
    /// Bytes of a character that is not complete: at most three between calls.
    pending: Vec<u8>,
    text: String,
}

impl<'a> Detokenizer<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, pending: Vec::new(), text: String::new() }
    }

    /// The text that `token` completes, possibly none. Special tokens are no text; bytes that cannot become a
    /// character are U+FFFD.
    pub fn push(&mut self, token: u32) -> &str {
        self.text.clear();
        if self.tokenizer.is_special(token) {
            return &self.text;
        }
        self.pending.extend(self.tokenizer.token_bytes(token));
        let mut rest = &self.pending[..];
        while let Err(error) = std::str::from_utf8(rest) {
            let (valid, after) = rest.split_at(error.valid_up_to());
            self.text.push_str(&String::from_utf8_lossy(valid));
            rest = after;
            // No length: the bytes are the beginning of a character.
            let Some(invalid) = error.error_len() else { break };
            self.text.push(char::REPLACEMENT_CHARACTER);
            rest = &rest[invalid..];
        }
        if let Ok(valid) = std::str::from_utf8(rest) {
            self.text.push_str(valid);
            rest = &[];
        }
        self.pending.drain(..self.pending.len() - rest.len());
        &self.text
    }

    /// The rest when no more tokens come: U+FFFD if a character was left incomplete.
    pub fn finish(&mut self) -> &str {
        self.text.clear();
        self.text.push_str(&String::from_utf8_lossy(&self.pending));
        self.pending.clear();
        &self.text
    }
}
