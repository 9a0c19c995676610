//! Hugging Face model directories: `config.json` and its fellows, and the tensors by their places in the model.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::config_file::ConfigFile;
use super::dress::{self, Masters, ScaleConvention};
use super::error::brief;
use super::family::{self, Family};
use super::safetensors::{RawTensor, Tensors};
use super::{
    Biases, Bytes, FloatMatrix, FormatError, GenerationDefaults, LayerNorm, ModelConfig, Projection, TernaryTensor,
};
use crate::text::TokenizerConfig;
use crate::text::sentencepiece::{self, AddedToken};

/// An opened Hugging Face directory. Tensors are read when asked for.
pub(super) struct HuggingFace {
    directory: PathBuf,
    family: &'static Family,
    pub(super) config: ModelConfig,
    pub(super) generation: GenerationDefaults,
    pub(super) tokenizer: TokenizerConfig,
    pub(super) chat_template: Option<String>,
    tensors: Tensors,
    /// What precedes the modules' names: some embedding models leave `model.` away.
    prefix: &'static str,
    convention: ScaleConvention,
    masters: Masters,
    not_converted: Vec<String>,
}

impl HuggingFace {
    pub(super) fn open(directory: &Path) -> Result<Self, FormatError> {
        let path = directory.join("config.json");
        let Some(json) = read_json(&path)? else {
            return Err(FormatError::NotAModel { path: directory.to_owned(), missing: "config.json" });
        };
        let file = ConfigFile { path, json };
        let family = family::find(&file)?;
        file.refuse_what_is_not_implemented()?;
        let config = (family.config)(&file)?;
        config.check().map_err(|problem| file.error("the configuration", format!("is impossible: {problem}")))?;
        let convention = file.scale_convention()?;
        let not_converted = file.modules_to_not_convert()?;

        let path = directory.join("generation_config.json");
        let generation = read_json(&path)?.unwrap_or_default();
        let generation = GenerationDefaults::from_json(&generation, &file.json)
            .map_err(|(field, problem)| FormatError::Field { path, field: field.to_owned(), problem })?;
        let path = directory.join("tokenizer_config.json");
        let tokenizer_config = read_json(&path)?.unwrap_or_default();
        let in_config = chat_template(&tokenizer_config).map_err(|problem| FormatError::Field {
            path,
            field: "chat_template".to_owned(),
            problem,
        })?;
        let chat_template = read_text(&directory.join("chat_template.jinja"))?.or(in_config);

        let tensors = Tensors::open(directory)?;
        let prefix = if tensors.contains(&weight("embed_tokens")) { "" } else { "model." };
        let mut model = Self {
            directory: directory.to_owned(),
            family,
            config,
            generation,
            tokenizer: TokenizerConfig::from_json(&tokenizer_config),
            chat_template,
            tensors,
            prefix,
            convention,
            masters: Masters::Refused,
            not_converted,
        };
        model.look_for_optional_tensors(&file)?;
        let bitnet = family.bitnet || file.says_bitnet() || model.config.projection_norm_eps.is_some();
        model.masters = if bitnet { Masters::Quantised } else { Masters::Refused };
        model.refuse_extra_tensors()?;
        Ok(model)
    }

    /// A head, biases and norms in front of projections are there or not, whatever the configuration says.
    fn look_for_optional_tensors(&mut self, file: &ConfigFile) -> Result<(), FormatError> {
        self.config.tied_head |= !self.tensors.contains(&weight(HEAD));
        let has_bias = |projection| self.tensors.contains(&format!("{}.bias", self.projection_module(0, projection)));
        self.config.biases = Biases {
            qkv: has_bias(Projection::Query),
            output: has_bias(Projection::Output),
            ffn: has_bias(Projection::Gate),
        };
        if self.projection_norm(0, Projection::Query).is_some() {
            self.config.projection_norm_eps = Some(file.projection_norm_eps()?);
        } else if file.promises_projection_norms() {
            let tensor = format!("{}.rms_norm.weight", self.projection_module(0, Projection::Query));
            return Err(FormatError::MissingTensor { path: self.directory.clone(), tensor });
        }
        Ok(())
    }

    /// The tensor of the norm in front of a projection, by either name.
    fn projection_norm(&self, layer: usize, projection: Projection) -> Option<String> {
        let module = self.projection_module(layer, projection);
        let names = ["rms_norm", "norm"].map(|norm| format!("{module}.{norm}.weight"));
        names.into_iter().find(|name| self.tensors.contains(name))
    }

    /// A bias or norm in one place only would change every result: such a model is not what it seems.
    fn refuse_extra_tensors(&self) -> Result<(), FormatError> {
        for layer in 0..self.config.layers {
            for projection in Projection::ALL {
                let bias = Some(format!("{}.bias", self.projection_module(layer, projection)))
                    .filter(|bias| !projection.has_bias(&self.config) && self.tensors.contains(bias));
                let norm = self.projection_norm(layer, projection);
                let norm = norm.filter(|_| self.config.projection_norm_eps.is_none());
                if let Some(name) = bias.or(norm) {
                    let what = format!("there is a tensor {name}, which others of its kind lack");
                    return Err(FormatError::Unsupported { path: self.directory.clone(), what });
                }
            }
        }
        Ok(())
    }

    fn projection_module(&self, layer: usize, projection: Projection) -> String {
        // The names of all families are the ones that `Projection` prints.
        format!("{}layers.{layer}.{projection}", self.prefix)
    }

    pub(super) fn projection(&self, layer: usize, projection: Projection) -> Result<TernaryTensor, FormatError> {
        let module = self.projection_module(layer, projection);
        if let Some(listed) = self.not_converted.iter().find(|listed| lies_in(&module, listed)) {
            return Err(FormatError::Unsupported {
                path: self.directory.clone(),
                what: format!("{module} keeps full precision (modules_to_not_convert lists {})", brief(listed)),
            });
        }
        let (weight, scale) = (weight(&module), format!("{module}.weight_scale"));
        let scale = self.tensors.contains(&scale).then(|| self.tensors.get(&scale)).transpose()?;
        dress::ternary(
            &self.tensors.get(&weight)?,
            scale,
            projection.shape(&self.config),
            self.convention,
            self.masters,
        )
    }

    pub(super) fn bias(&self, layer: usize, projection: Projection) -> Result<Vec<f32>, FormatError> {
        let (m, _) = projection.shape(&self.config);
        self.tensors.get(&format!("{}.bias", self.projection_module(layer, projection)))?.floats(&[m])
    }

    pub(super) fn norm(&self, layer: usize, norm: LayerNorm) -> Result<Vec<f32>, FormatError> {
        let width = norm.width(&self.config);
        if let LayerNorm::Projection(projection) = norm {
            let missing = || format!("{}.norm.weight", self.projection_module(layer, projection));
            return self
                .tensors
                .get(&self.projection_norm(layer, projection).unwrap_or_else(missing))?
                .floats(&[width]);
        }
        let name = (self.family.norm)(norm);
        self.own_norm(&weight(&format!("{}layers.{layer}.{name}", self.prefix)), width)
    }

    pub(super) fn final_norm(&self) -> Result<Vec<f32>, FormatError> {
        self.own_norm(&weight(&format!("{}norm", self.prefix)), self.config.hidden)
    }

    /// A norm of the family's own, with what is multiplied.
    fn own_norm(&self, name: &str, width: usize) -> Result<Vec<f32>, FormatError> {
        let mut weights = self.tensors.get(name)?.floats(&[width])?;
        if self.family.norms_add_one {
            weights.iter_mut().for_each(|weight| *weight += 1.0);
        }
        Ok(weights)
    }

    pub(super) fn embedding(&self) -> Result<FloatMatrix, FormatError> {
        self.token_rows(&format!("{}embed_tokens", self.prefix))
    }

    pub(super) fn head(&self) -> Result<Option<FloatMatrix>, FormatError> {
        if self.config.tied_head { Ok(None) } else { self.token_rows(HEAD).map(Some) }
    }

    fn token_rows(&self, module: &str) -> Result<FloatMatrix, FormatError> {
        let tensor: RawTensor = self.tensors.get(&weight(module))?;
        let dtype = tensor.float_type("BF16, F16 or F32")?;
        let (rows, columns) = (self.config.vocabulary, self.config.hidden);
        tensor.check_shape(&[rows, columns])?;
        Ok(FloatMatrix { rows, columns, dtype: dtype.into(), bytes: tensor.bytes })
    }

    /// `tokenizer.json`, unparsed, or one made of SentencePiece's `tokenizer.model`.
    pub(super) fn tokenizer_json(&self) -> Result<Bytes, FormatError> {
        let path = self.directory.join("tokenizer.json");
        if !path.is_file() {
            return self.sentencepiece_json();
        }
        std::fs::read(&path).map(Bytes::from).map_err(|source| FormatError::Read { path, source })
    }
}

impl HuggingFace {
    fn sentencepiece_json(&self) -> Result<Bytes, FormatError> {
        let path = self.directory.join("tokenizer.model");
        let model = match std::fs::read(&path) {
            Ok(model) => model,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(FormatError::NotAModel { path: self.directory.clone(), missing: "tokenizer.json" });
            }
            Err(source) => return Err(FormatError::Read { path, source }),
        };
        sentencepiece::tokenizer_json(&model, self.added_tokens()?)
            .map(Bytes::from)
            .map_err(|problem| FormatError::Field { path, field: "the tokenizer".to_owned(), problem })
    }

    /// Tokens of `added_tokens.json` and of `added_tokens_decoder` in `tokenizer_config.json`.
    fn added_tokens(&self) -> Result<Vec<AddedToken>, FormatError> {
        let mut tokens = BTreeMap::new();
        let added = read_json(&self.directory.join("added_tokens.json"))?.unwrap_or_default();
        for (text, id) in added.as_object().into_iter().flatten() {
            let id = id.as_u64().and_then(|id| usize::try_from(id).ok());
            tokens.extend(id.map(|id| (id, (text.clone(), true))));
        }
        let config = read_json(&self.directory.join("tokenizer_config.json"))?.unwrap_or_default();
        for (id, token) in config["added_tokens_decoder"].as_object().into_iter().flatten() {
            let text = token["content"].as_str().map(str::to_owned);
            let special = token["special"].as_bool().unwrap_or(false);
            tokens.extend(id.parse().ok().zip(text).map(|(id, text)| (id, (text, special))));
        }
        Ok(tokens.into_iter().map(|(id, (text, special))| AddedToken { id, text, special }).collect())
    }
}

/// The head's module, in every family.
const HEAD: &str = "lm_head";

fn weight(module: &str) -> String {
    format!("{module}.weight")
}

/// Whether `module` is `listed` or a part of it, or ends with it: `lm_head`, `self_attn.q_proj`, `model.layers.0`.
fn lies_in(module: &str, listed: &str) -> bool {
    format!(".{module}.").contains(&format!(".{listed}."))
}

/// A file's text, `None` if there is no such file.
fn read_text(path: &Path) -> Result<Option<String>, FormatError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(FormatError::Read { path: path.to_owned(), source }),
    }
}

/// A file's JSON object, `None` if there is no such file.
fn read_json(path: &Path) -> Result<Option<Value>, FormatError> {
    let Some(text) = read_text(path)? else { return Ok(None) };
    let json = |problem| FormatError::Json { path: path.to_owned(), problem };
    match serde_json::from_str(&text) {
        Ok(value @ Value::Object(_)) => Ok(Some(value)),
        Ok(_) => Err(json("not an object".to_owned())),
        Err(error) => Err(json(error.to_string())),
    }
}

/// The chat template of a `tokenizer_config.json`: one string, or a list of named ones with a `default`.
fn chat_template(tokenizer_config: &Value) -> Result<Option<String>, String> {
    match &tokenizer_config["chat_template"] {
        Value::Null => Ok(None),
        Value::String(template) => Ok(Some(template.clone())),
        Value::Array(named) => {
            let default = named.iter().find(|entry| entry["name"] == "default");
            match default.and_then(|entry| entry["template"].as_str()) {
                Some(template) => Ok(Some(template.to_owned())),
                None => Err("has no template named default".to_owned()),
            }
        }
        _ => Err("is neither a template nor a list of them".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_listed_module_covers_its_parts_and_nothing_with_a_longer_name() {
        let module = "model.layers.1.self_attn.q_proj";
        for listed in ["model.layers.1", "q_proj", "self_attn", "self_attn.q_proj", module] {
            assert!(lies_in(module, listed), "{listed}");
        }
        for listed in ["lm_head", "model.layers.11", "proj", "layers.1.mlp"] {
            assert!(!lies_in(module, listed), "{listed}");
        }
    }

    #[test]
    fn a_chat_template_is_a_string_or_the_default_of_a_list() {
        assert_eq!(chat_template(&json!({})), Ok(None));
        assert_eq!(chat_template(&json!({"chat_template": "a"})), Ok(Some("a".to_owned())));
        let list = json!({"chat_template": [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]});
        assert_eq!(chat_template(&list), Ok(Some("d".to_owned())));
        assert!(chat_template(&json!({"chat_template": [{"name": "tool", "template": "t"}]})).is_err());
    }
}
