//! A model that is served: its engine, and all that it takes to turn requests into tokens.

use std::sync::{Arc, OnceLock};

use serde_json::Value;
use ternion_runtime::formats::{Checkpoint, FormatError, GenerationDefaults};
use ternion_runtime::model::Model;
use ternion_runtime::team::Team;
use ternion_runtime::text::{ChatError, ChatTemplate, Tokenizer};

use crate::App;
use crate::api::ApiError;
use crate::engine::{Engine, GrammarError, Grammars};
use crate::sanitise::{Sanitiser, without_controls};

/// Most texts of one request.
const MOST_TEXTS: usize = 256;

/// A model to be served.
pub struct Offer {
    pub(crate) name: String,
    pub(crate) model: Arc<Model>,
    pub(crate) team: Arc<Team>,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) stop_tokens: Vec<u32>,
    template: ChatTemplate,
    generation: GenerationDefaults,
    fingerprint: String,
}

/// Why a model cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum OfferError {
    /// Its tokenizer.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// Its chat template.
    #[error(transparent)]
    Chat(#[from] ChatError),
}

impl Offer {
    /// A model under a name.
    ///
    /// # Errors
    /// If its tokenizer or its chat template cannot be used.
    pub fn new(name: String, checkpoint: &Checkpoint, model: Arc<Model>, team: Arc<Team>) -> Result<Self, OfferError> {
        let tokenizer = checkpoint.tokenizer()?;
        let generation = checkpoint.generation().clone();
        let mut stop_tokens = generation.eos.clone();
        if stop_tokens.is_empty() {
            stop_tokens.extend(tokenizer.eos());
        }
        let digest = checkpoint.digest().map_or("unprepared".to_owned(), |digest| format!("{digest:016x}"));
        Ok(Self {
            name,
            template: checkpoint.chat()?,
            tokenizer: Arc::new(tokenizer),
            fingerprint: format!("ternion-{}-{digest}", env!("CARGO_PKG_VERSION")),
            model,
            team,
            stop_tokens,
            generation,
        })
    }
}

/// A model that is served.
pub struct Served {
    pub(crate) name: String,
    pub(crate) engine: Engine,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) template: ChatTemplate,
    pub(crate) generation: GenerationDefaults,
    pub(crate) sanitiser: Sanitiser,
    pub(crate) vocabulary: usize,
    pub(crate) hidden: usize,
    pub(crate) fingerprint: String,
    embeds_only: bool,
    eos: Option<u32>,
    /// Made when the first request needs them: they take a moment with a large vocabulary.
    grammars: OnceLock<Result<Grammars, GrammarError>>,
}

impl Served {
    pub(crate) fn new(offer: Offer, engine: Engine) -> Self {
        let config = offer.model.config();
        Self {
            engine,
            sanitiser: Sanitiser::new(&offer.tokenizer),
            vocabulary: config.vocabulary,
            hidden: config.hidden,
            embeds_only: config.pooling.is_some(),
            eos: offer.stop_tokens.first().copied(),
            name: offer.name,
            tokenizer: offer.tokenizer,
            template: offer.template,
            generation: offer.generation,
            fingerprint: offer.fingerprint,
            grammars: OnceLock::new(),
        }
    }

    pub(crate) fn grammars(&self) -> Result<&Grammars, GrammarError> {
        let made = self.grammars.get_or_init(|| Grammars::new(&self.tokenizer, self.vocabulary, self.eos));
        made.as_ref().map_err(Clone::clone)
    }

    /// What it is good for, in a word.
    pub(crate) const fn kind(&self) -> &'static str {
        if self.embeds_only { "embedding" } else { "generation" }
    }

    /// # Errors
    /// If it is an embedding model.
    pub(crate) fn generates(&self) -> Result<(), ApiError> {
        if self.embeds_only {
            let message =
                format!("{} is an embedding model, which has no words of its own: use /v1/embeddings", self.name);
            return Err(ApiError::field("model", message));
        }
        Ok(())
    }

    pub(crate) fn encode(&self, text: &str, bos: bool) -> Result<Vec<u32>, ApiError> {
        self.tokenizer.encode(text, bos).map_err(|error| ApiError::invalid(error.to_string()))
    }

    /// A list of token ids.
    pub(crate) fn tokens(&self, value: &Value) -> Option<Vec<u32>> {
        let token = |value: &Value| {
            let token = u32::try_from(value.as_u64()?).ok()?;
            ((token as usize) < self.vocabulary).then_some(token)
        };
        value.as_array()?.iter().map(token).collect()
    }

    /// A text, a list of texts, a list of tokens or a list of those. Texts are filtered and then encoded.
    pub(crate) fn texts(
        &self,
        app: &App,
        field: &str,
        value: &Value,
        encode: impl Fn(&Self, &str) -> Result<Vec<u32>, ApiError>,
    ) -> Result<Vec<Vec<u32>>, ApiError> {
        let expected = || {
            let below = self.vocabulary;
            ApiError::field(field, format!("expected a string, a list of strings, or lists of token ids below {below}"))
        };
        let text = |text: &str| {
            let text = without_controls(text);
            if app.filter.find(&text).is_some() { Err(ApiError::filtered()) } else { encode(self, &text) }
        };
        match value {
            Value::String(one) => Ok(vec![text(one)?]),
            Value::Array(items) if items.is_empty() || items.len() > MOST_TEXTS && !items[0].is_u64() => {
                Err(ApiError::field(field, format!("expected 1 to {MOST_TEXTS} texts")))
            }
            Value::Array(items) if items[0].is_number() => Ok(vec![self.tokens(value).ok_or_else(expected)?]),
            Value::Array(items) => items
                .iter()
                .map(|item| match item {
                    Value::String(one) => text(one),
                    tokens => self.tokens(tokens).ok_or_else(expected),
                })
                .collect(),
            _ => Err(expected()),
        }
    }
}
