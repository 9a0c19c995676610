//! One opened model, whatever its source. Tensors are read one at a time when asked for, so that preparing a model
//! streams and running a prepared one copies nothing.

use std::fs::{self, Metadata};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use ternion_compiler::Layout;
use xxhash_rust::xxh3::xxh3_64;

use super::gguf::container::MAGIC as GGUF_MAGIC;
use super::gguf::{Gguf, I2sLayout};
use super::hf::HuggingFace;
use super::synth::{Recipe, RecipeError, Synthetic};
use super::tern::{Prepared, Section};
use super::{
    Activation, Bytes, FloatMatrix, FormatError, GenerationDefaults, LayerNorm, ModelConfig, Projection, RowType,
    TernaryTensor,
};
use crate::screen::Shape;
use crate::text::{ChatError, ChatTemplate, Tokenizer, TokenizerConfig};

/// An opened model.
pub struct Checkpoint {
    path: PathBuf,
    source: Source,
    /// The source's configuration with another activation function, if there shall be another.
    overruled: Option<Box<ModelConfig>>,
}

/// What a model's files leave open, and what it is opened for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// How I2_S matrices of a GGUF file are ordered; a wrong choice gives a model that talks nonsense.
    pub i2s_layout: I2sLayout,
    /// Whether the scales of a GGUF file's ternary matrices are reciprocals.
    pub invert_scale: bool,
    /// The activation function, instead of the one that the model's files stand for.
    pub activation: Option<Activation>,
}

enum Source {
    HuggingFace(Box<HuggingFace>),
    Gguf(Box<Gguf>),
    Synthetic(Box<Synthetic>),
    Prepared(Box<Prepared>),
}

impl Checkpoint {
    /// Opens a prepared file, a GGUF file, or a Hugging Face directory.
    ///
    /// # Errors
    /// If it is none of them, or if its headers and configuration are damaged or not supported. Tensors are not read
    /// yet.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        Self::open_with(path, &OpenOptions::default())
    }

    /// Opens a prepared file, a GGUF file, or a Hugging Face directory.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_with(path: &Path, options: &OpenOptions) -> Result<Self, FormatError> {
        let metadata = fs::metadata(path).map_err(|source| FormatError::Read { path: path.to_owned(), source })?;
        let source = if metadata.is_dir() {
            Source::HuggingFace(Box::new(HuggingFace::open(path)?))
        } else if metadata.is_file() {
            Self::source_of_file(path, Bytes::map(path)?, options)?
        } else {
            return Err(FormatError::Foreign { path: path.to_owned() });
        };
        Ok(Self::new(path.to_owned(), source, options.activation))
    }

    fn new(path: PathBuf, source: Source, activation: Option<Activation>) -> Self {
        let model = Self { path, source, overruled: None };
        let changed = activation.filter(|activation| *activation != model.config().activation);
        let overruled = changed.map(|activation| Box::new(ModelConfig { activation, ..model.config().clone() }));
        Self { overruled, ..model }
    }

    /// Opens a prepared file that is in memory; messages call it `name`.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn from_prepared(name: &str, bytes: Bytes) -> Result<Self, FormatError> {
        let path = PathBuf::from(name);
        let source = Source::Prepared(Box::new(Prepared::open(&path, bytes)?));
        Ok(Self::new(path, source, None))
    }

    /// Opens a prepared or GGUF file that is in memory; messages call it `name`.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn from_bytes(name: &str, bytes: Bytes, options: &OpenOptions) -> Result<Self, FormatError> {
        let path = PathBuf::from(name);
        let source = Self::source_of_file(&path, bytes, options)?;
        Ok(Self::new(path, source, options.activation))
    }

    /// A made-up model.
    ///
    /// # Errors
    /// If the recipe cannot be followed.
    pub fn synthetic(recipe: Recipe) -> Result<Self, RecipeError> {
        let path = PathBuf::from(format!("synthetic {}", recipe.config.architecture));
        Ok(Self::new(path, Source::Synthetic(Box::new(Synthetic::new(recipe)?)), None))
    }

    fn source_of_file(path: &Path, bytes: Bytes, options: &OpenOptions) -> Result<Source, FormatError> {
        if bytes.starts_with(&GGUF_MAGIC) {
            Ok(Source::Gguf(Box::new(Gguf::open(path, &bytes, options)?)))
        } else {
            Ok(Source::Prepared(Box::new(Prepared::open(path, bytes)?)))
        }
    }

    /// What had to be guessed or put right when opening, one line each, to be told once.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        match &self.source {
            Source::Gguf(model) => &model.notes,
            Source::HuggingFace(_) | Source::Prepared(_) | Source::Synthetic(_) => &[],
        }
    }

    /// Sizes and constants.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        if let Some(config) = &self.overruled {
            return config;
        }
        match &self.source {
            Source::HuggingFace(model) => &model.config,
            Source::Gguf(model) => &model.config,
            Source::Synthetic(model) => model.config(),
            Source::Prepared(model) => model.config(),
        }
    }

    /// How its authors want it to be sampled.
    #[must_use]
    pub fn generation(&self) -> &GenerationDefaults {
        match &self.source {
            Source::HuggingFace(model) => &model.generation,
            Source::Gguf(model) => &model.generation,
            Source::Synthetic(model) => &model.generation,
            Source::Prepared(model) => model.generation(),
        }
    }

    /// The chat template (Jinja), if the model has one.
    #[must_use]
    pub fn chat_template(&self) -> Option<&str> {
        match &self.source {
            Source::HuggingFace(model) => model.chat_template.as_deref(),
            Source::Gguf(model) => model.chat_template.as_deref(),
            Source::Synthetic(_) => None,
            Source::Prepared(model) => model.chat_template(),
        }
    }

    /// The model's chat template, or [`ChatTemplate::plain`] if it has none.
    ///
    /// # Errors
    /// If the model has one that cannot be compiled.
    pub fn chat(&self) -> Result<ChatTemplate, ChatError> {
        let TokenizerConfig { bos_token, eos_token, .. } = self.tokenizer_config();
        match self.chat_template() {
            Some(template) => ChatTemplate::new(template, bos_token.as_deref(), eos_token.as_deref()),
            None => Ok(ChatTemplate::plain(bos_token.as_deref())),
        }
    }

    /// What the model's files say about its tokenizer, besides the tokenizer itself.
    #[must_use]
    pub fn tokenizer_config(&self) -> &TokenizerConfig {
        match &self.source {
            Source::HuggingFace(model) => &model.tokenizer,
            Source::Gguf(model) => &model.tokenizer,
            Source::Synthetic(model) => &model.tokenizer,
            Source::Prepared(model) => model.tokenizer(),
        }
    }

    /// The text of the model's `tokenizer.json`.
    ///
    /// # Errors
    /// If the model has none.
    pub fn tokenizer_json(&self) -> Result<Bytes, FormatError> {
        match &self.source {
            Source::HuggingFace(model) => model.tokenizer_json(),
            Source::Gguf(model) => model.tokenizer_json(),
            Source::Synthetic(model) => Ok(model.tokenizer_json()),
            Source::Prepared(model) => Ok(model.tokenizer_json()),
        }
    }

    /// Builds the tokenizer.
    ///
    /// # Errors
    /// If there is none, or it is damaged, not supported, or has tokens that the model has not.
    pub fn tokenizer(&self) -> Result<Tokenizer, FormatError> {
        Tokenizer::new(&self.tokenizer_json()?, self.tokenizer_config(), self.config().vocabulary)
            .map_err(|source| FormatError::Tokenizer { path: self.path.clone(), source })
    }

    /// Reads a ternary matrix.
    ///
    /// # Errors
    /// If the layer or the tensor is not there, or the tensor is damaged or in no known dress.
    pub fn projection(&self, layer: usize, projection: Projection) -> Result<TernaryTensor, FormatError> {
        self.check_layer(layer)?;
        match &self.source {
            Source::HuggingFace(model) => model.projection(layer, projection),
            Source::Gguf(model) => model.projection(layer, projection),
            Source::Synthetic(model) => Ok(model.projection(layer, projection)),
            Source::Prepared(model) => Ok(model.projection(layer, projection)),
        }
    }

    /// Reads the weights of a layer's norm, [`LayerNorm::width`] of them; none if the model has no such norm.
    ///
    /// # Errors
    /// If the layer or the tensor is not there, or the tensor is damaged.
    pub fn norm(&self, layer: usize, norm: LayerNorm) -> Result<Vec<f32>, FormatError> {
        self.check_layer(layer)?;
        if norm.width(self.config()) == 0 {
            return Ok(Vec::new());
        }
        match &self.source {
            Source::HuggingFace(model) => model.norm(layer, norm),
            Source::Gguf(model) => model.norm(layer, norm),
            Source::Synthetic(model) => Ok(model.norm(norm)),
            Source::Prepared(model) => Ok(model.norm(layer, norm)),
        }
    }

    /// Reads the bias of a projection, `m` values; none if the model has no such bias.
    ///
    /// # Errors
    /// If the layer or the tensor is not there, or the tensor is damaged.
    pub fn bias(&self, layer: usize, projection: Projection) -> Result<Vec<f32>, FormatError> {
        self.check_layer(layer)?;
        if !projection.has_bias(self.config()) {
            return Ok(Vec::new());
        }
        match &self.source {
            Source::HuggingFace(model) => model.bias(layer, projection),
            Source::Gguf(model) => model.bias(layer, projection),
            Source::Synthetic(model) => Ok(model.bias(projection)),
            Source::Prepared(model) => Ok(model.bias(layer, projection)),
        }
    }

    /// Reads the weights of the norm before the head, `hidden` of them.
    ///
    /// # Errors
    /// If the tensor is not there or damaged.
    pub fn final_norm(&self) -> Result<Vec<f32>, FormatError> {
        match &self.source {
            Source::HuggingFace(model) => model.final_norm(),
            Source::Gguf(model) => model.final_norm(),
            Source::Synthetic(model) => Ok(model.final_norm()),
            Source::Prepared(model) => Ok(model.final_norm()),
        }
    }

    /// The embedding, `[vocabulary, hidden]`.
    ///
    /// # Errors
    /// If the tensor is not there or damaged.
    pub fn embedding(&self) -> Result<FloatMatrix, FormatError> {
        match &self.source {
            Source::HuggingFace(model) => model.embedding(),
            Source::Gguf(model) => model.embedding(),
            Source::Synthetic(model) => Ok(model.embedding()),
            Source::Prepared(model) => Ok(model.embedding()),
        }
    }

    /// Type of the embedding's rows, and of the head's if it is not tied, without making them where that takes time.
    pub(crate) fn token_row_types(&self) -> Result<(RowType, Option<RowType>), FormatError> {
        match &self.source {
            Source::Synthetic(model) => Ok((RowType::Bf16, (!model.config().tied_head).then_some(RowType::Bf16))),
            _ => Ok((self.embedding()?.dtype, self.head()?.map(|head| head.dtype))),
        }
    }

    /// The head, `[vocabulary, hidden]`; `None` if it is tied to the embedding.
    ///
    /// # Errors
    /// If the tensor is not there or damaged.
    pub fn head(&self) -> Result<Option<FloatMatrix>, FormatError> {
        match &self.source {
            Source::HuggingFace(model) => model.head(),
            Source::Gguf(model) => model.head(),
            Source::Synthetic(model) => Ok(model.head()),
            Source::Prepared(model) => Ok(model.head()),
        }
    }

    /// A ternary matrix as it lies in the file in this layout, if it is there; its sizes fit.
    pub(crate) fn stored(&self, layer: usize, projection: Projection, layout: Layout) -> Option<Bytes> {
        let Source::Prepared(model) = &self.source else { return None };
        self.check_layer(layer).is_ok().then(|| model.packed(layer, projection, layout))?
    }

    /// The rows of an up-projection or the columns of a down-projection as records, if the file has them in this layout.
    pub(crate) fn stored_records(&self, layer: usize, projection: Projection, layout: Layout) -> Option<Bytes> {
        let Source::Prepared(model) = &self.source else { return None };
        model.records(layer, projection, layout)
    }

    /// The layouts of [`stored`](Self::stored), and of [`stored_records`](Self::stored_records).
    pub(crate) fn stored_layouts(&self, layer: usize, projection: Projection) -> (Vec<Layout>, Option<Layout>) {
        match &self.source {
            Source::Prepared(model) if self.check_layer(layer).is_ok() => {
                (model.layouts(layer, projection), model.record_layout(layer, projection))
            }
            _ => (Vec::new(), None),
        }
    }

    /// The head's screen, if the file has it.
    ///
    /// # Errors
    /// If it does not have its checksum.
    pub(crate) fn stored_screen(&self) -> Result<Option<(Shape, Bytes)>, FormatError> {
        match &self.source {
            Source::Prepared(model) => model.screen(),
            Source::HuggingFace(_) | Source::Gguf(_) | Source::Synthetic(_) => Ok(None),
        }
    }

    /// The sections of a prepared file.
    pub(super) fn prepared_sections(&self) -> Option<&[Section]> {
        match &self.source {
            Source::Prepared(model) => Some(model.sections()),
            Source::HuggingFace(_) | Source::Gguf(_) | Source::Synthetic(_) => None,
        }
    }

    fn check_layer(&self, layer: usize) -> Result<(), FormatError> {
        let layers = self.config().layers;
        if layer < layers { Ok(()) } else { Err(FormatError::NoSuchLayer { path: self.path.clone(), layer, layers }) }
    }

    /// Where the model was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A short name for messages: that of the file or directory.
    #[must_use]
    pub fn name(&self) -> String {
        self.path.file_name().unwrap_or(self.path.as_os_str()).to_string_lossy().into_owned()
    }

    /// A digest of a prepared file's whole content; `None` for other models, which have no checksums.
    #[must_use]
    pub fn digest(&self) -> Option<u64> {
        match &self.source {
            Source::HuggingFace(_) | Source::Gguf(_) | Source::Synthetic(_) => None,
            Source::Prepared(model) => Some(model.digest()),
        }
    }

    /// Tells this model from others and from what its files were before they changed: by their names, sizes and times, as
    /// build tools do. A model in memory without a checksum is like no other.
    pub(super) fn identity(&self) -> u64 {
        let facts = match &self.source {
            Source::Prepared(model) if self.overruled.is_none() => return model.digest(),
            Source::Prepared(model) => Ok(format!("{:x}", model.digest())),
            Source::Synthetic(model) => Ok(format!("{:?}", model.recipe())),
            Source::HuggingFace(_) => facts_of_directory(&self.path),
            Source::Gguf(model) => {
                fs::metadata(&self.path).map(|metadata| format!("{:?} {:?}", facts_of(&metadata), model.options()))
            }
        };
        let facts = facts.unwrap_or_else(|_| format!("{:?}", SystemTime::now()));
        xxh3_64(format!("{facts} {:?}", self.config().activation).as_bytes())
    }

    /// Whether this is a prepared file.
    #[must_use]
    pub fn is_prepared(&self) -> bool {
        matches!(self.source, Source::Prepared(_))
    }

    /// Computes again what a prepared file holds ready for loading and compares it, byte by byte; returns the number of
    /// these sections. Their checksums only tell damage from what was written.
    ///
    /// # Errors
    /// The first section that does not follow from the model's own.
    pub fn verify_derived(&self) -> Result<usize, FormatError> {
        match &self.source {
            Source::HuggingFace(_) | Source::Gguf(_) | Source::Synthetic(_) => Ok(0),
            Source::Prepared(model) => model.verify_derived(self),
        }
    }

    /// Reads a prepared file completely and compares every section with its checksum; returns their number. Other
    /// models have none.
    ///
    /// # Errors
    /// The first section that is damaged.
    pub fn verify_checksums(&self) -> Result<usize, FormatError> {
        match &self.source {
            Source::HuggingFace(_) | Source::Gguf(_) | Source::Synthetic(_) => Ok(0),
            Source::Prepared(model) => model.verify_checksums(),
        }
    }
}

fn facts_of(metadata: &Metadata) -> (u64, Option<SystemTime>) {
    (metadata.len(), metadata.modified().ok())
}

fn facts_of_directory(path: &Path) -> io::Result<String> {
    let mut files = Vec::new();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        // Through links: the hub's cache has them.
        files.push((entry.file_name(), facts_of(&fs::metadata(entry.path())?)));
    }
    files.sort_unstable();
    Ok(format!("{files:?}"))
}
