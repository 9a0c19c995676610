//! Constrained decoding: which tokens may come next so that a text conforms to a JSON schema (`llguidance`).

use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use llguidance::{JsonCompileOptions, Matcher, ParserFactory};
use serde_json::{Value, json};
use ternion_runtime::model::Candidate;
use ternion_runtime::text::Tokenizer;
use toktrie::{ApproximateTokEnv, TokRxInfo, TokTrie};

/// Why there is no grammar.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct GrammarError(String);

impl GrammarError {
    fn new(error: &dyn std::fmt::Display) -> Self {
        // What follows the first line is for the library's authors.
        Self(error.to_string().lines().next().unwrap_or_default().to_owned())
    }
}

/// Makes the grammars of one tokenizer.
pub struct Grammars {
    factory: ParserFactory,
}

impl Grammars {
    /// For a tokenizer of a model with `vocabulary` tokens; `eos` ends a text.
    ///
    /// # Errors
    /// If there is no token that ends a text, or the vocabulary cannot be used.
    pub fn new(tokenizer: &Tokenizer, vocabulary: usize, eos: Option<u32>) -> Result<Self, GrammarError> {
        let eos = eos.ok_or_else(|| GrammarError("the model has no token that ends a text".to_owned()))?;
        let word = |token: u32| {
            let bytes = tokenizer.token_bytes(token);
            if tokenizer.is_special(token) {
                [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat()
            } else {
                bytes.to_vec()
            }
        };
        let size = u32::try_from(vocabulary).map_err(|error| GrammarError::new(&error))?;
        let words: Vec<Vec<u8>> = (0..size).map(word).collect();
        let trie = TokTrie::from(&TokRxInfo::new(size, eos), &words);
        let env: toktrie::TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&env).map_err(|error| GrammarError::new(&error))?;
        factory.quiet();
        factory.limits_mut().verbose_errors = false;
        Ok(Self { factory })
    }

    /// The grammar of the texts that are JSON and conform to `schema`, spaced as Python's `json.dumps` does: where any
    /// white space may follow, small models do not find out of it.
    ///
    /// # Errors
    /// If the schema is none, is too large, or asks for something that is not supported.
    pub fn json(&self, schema: &Value) -> Result<Grammar, GrammarError> {
        let mut schema = if *schema == Value::Bool(true) { json!({}) } else { schema.clone() };
        if schema.is_object() {
            let spaced = JsonCompileOptions {
                item_separator: ", ".to_owned(),
                key_separator: ": ".to_owned(),
                whitespace_flexible: false,
                ..JsonCompileOptions::default()
            };
            spaced.apply_to(&mut schema);
        }
        let parser = self.factory.create_parser(TopLevelGrammar::from_json_schema(schema));
        let matcher = Matcher::new(parser);
        match matcher.get_error() {
            Some(error) => Err(GrammarError::new(&error)),
            None => Ok(Grammar(matcher)),
        }
    }
}

/// A text under a grammar.
#[derive(Clone)]
pub struct Grammar(Matcher);

impl std::fmt::Debug for Grammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Grammar")
    }
}

impl Grammar {
    /// Leaves only candidates that may come next.
    ///
    /// # Errors
    /// If the grammar takes too much time or memory.
    pub(super) fn constrain(&mut self, candidates: &mut Vec<Candidate>) -> Result<(), GrammarError> {
        let mask = self.0.compute_mask_or_eos().map_err(|error| GrammarError::new(&error))?;
        candidates.retain(|(_, token)| mask.is_allowed(*token));
        Ok(())
    }

    /// Takes the next token; returns whether the text is complete.
    ///
    /// # Errors
    /// If the token may not come next.
    pub(super) fn accept(&mut self, token: u32) -> Result<bool, GrammarError> {
        self.0.consume_token(token).map_err(|error| GrammarError::new(&error))?;
        Ok(self.0.is_stopped())
    }
}
