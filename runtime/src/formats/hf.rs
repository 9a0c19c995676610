//! Hugging Face model directories: `config.json` and its fellows, and the tensors by their places in the model.

use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::dress::{self, ScaleConvention};
use super::family::{self, Family};
use super::safetensors::{RawTensor, Tensors};
use super::{
    Activation, Bytes, FloatMatrix, FormatError, GenerationDefaults, LayerNorm, ModelConfig, Projection, TernaryTensor,
};
use crate::text::TokenizerConfig;

/// An opened Hugging Face directory. Tensors are read when asked for.
pub(super) struct HuggingFace {
    directory: PathBuf,
    family: &'static Family,
    pub(super) config: ModelConfig,
    pub(super) generation: GenerationDefaults,
    pub(super) tokenizer: TokenizerConfig,
    pub(super) chat_template: Option<String>,
    tensors: Tensors,
    convention: ScaleConvention,
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
        let mut config = (family.config)(&file)?;
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
        // Without a head of its own a model uses its embedding, whatever the configuration says.
        config.tied_head |= !tensors.contains(&weight(family.names.head));
        let model = Self {
            directory: directory.to_owned(),
            family,
            config,
            generation,
            tokenizer: TokenizerConfig::from_json(&tokenizer_config),
            chat_template,
            tensors,
            convention,
            not_converted,
        };
        model.refuse_extra_tensors()?;
        Ok(model)
    }

    /// Biases and per-projection norms would change every result: a model that has them is not what it seems.
    fn refuse_extra_tensors(&self) -> Result<(), FormatError> {
        for layer in 0..self.config.layers {
            for projection in Projection::ALL {
                let module = self.module(layer, (self.family.names.projection)(projection));
                for part in ["bias", "rms_norm.weight", "norm.weight"] {
                    let name = format!("{module}.{part}");
                    if self.tensors.contains(&name) {
                        let what = format!("there is a tensor {name}");
                        return Err(FormatError::Unsupported { path: self.directory.clone(), what });
                    }
                }
            }
        }
        Ok(())
    }

    fn module(&self, layer: usize, name: &str) -> String {
        format!("{}.{layer}.{name}", self.family.names.layers)
    }

    pub(super) fn projection(&self, layer: usize, projection: Projection) -> Result<TernaryTensor, FormatError> {
        let module = self.module(layer, (self.family.names.projection)(projection));
        if let Some(listed) = self.not_converted.iter().find(|listed| lies_in(&module, listed)) {
            return Err(FormatError::Unsupported {
                path: self.directory.clone(),
                what: format!("{module} keeps full precision (modules_to_not_convert lists {listed})"),
            });
        }
        let (weight, scale) = (weight(&module), format!("{module}.weight_scale"));
        let scale = self.tensors.contains(&scale).then(|| self.tensors.get(&scale)).transpose()?;
        dress::ternary(&self.tensors.get(&weight)?, scale, projection.shape(&self.config), self.convention)
    }

    pub(super) fn norm(&self, layer: usize, norm: LayerNorm) -> Result<Vec<f32>, FormatError> {
        let name = weight(&self.module(layer, (self.family.names.norm)(norm)));
        self.tensors.get(&name)?.floats(&[norm.width(&self.config)])
    }

    pub(super) fn final_norm(&self) -> Result<Vec<f32>, FormatError> {
        self.tensors.get(&weight(self.family.names.final_norm))?.floats(&[self.config.hidden])
    }

    pub(super) fn embedding(&self) -> Result<FloatMatrix, FormatError> {
        self.token_rows(self.family.names.embedding)
    }

    pub(super) fn head(&self) -> Result<Option<FloatMatrix>, FormatError> {
        if self.config.tied_head { Ok(None) } else { self.token_rows(self.family.names.head).map(Some) }
    }

    fn token_rows(&self, module: &str) -> Result<FloatMatrix, FormatError> {
        let tensor: RawTensor = self.tensors.get(&weight(module))?;
        let dtype = tensor.float_type("BF16, F16 or F32")?;
        let (rows, columns) = (self.config.vocabulary, self.config.hidden);
        tensor.check_shape(&[rows, columns])?;
        Ok(FloatMatrix { rows, columns, dtype, bytes: tensor.bytes })
    }

    /// `tokenizer.json`, unparsed.
    pub(super) fn tokenizer_json(&self) -> Result<Bytes, FormatError> {
        let path = self.directory.join("tokenizer.json");
        if !path.is_file() {
            return Err(FormatError::NotAModel { path: self.directory.clone(), missing: "tokenizer.json" });
        }
        std::fs::read(&path).map(Bytes::from).map_err(|source| FormatError::Read { path, source })
    }
}

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

/// `config.json`, with access by field that says what is wrong and where.
pub(super) struct ConfigFile {
    path: PathBuf,
    json: Value,
}

impl ConfigFile {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    fn error(&self, field: &str, problem: String) -> FormatError {
        FormatError::Field { path: self.path.clone(), field: field.to_owned(), problem }
    }

    /// The names in `architectures`.
    pub(super) fn architectures(&self) -> Result<Vec<&str>, FormatError> {
        match &self.json["architectures"] {
            Value::Null => Ok(Vec::new()),
            Value::Array(names) => Ok(names.iter().filter_map(Value::as_str).collect()),
            other => Err(self.error("architectures", format!("is {other}, not a list"))),
        }
    }

    pub(super) fn size(&self, field: &str) -> Result<usize, FormatError> {
        match &self.json[field] {
            Value::Null => Err(self.error(field, "is missing".to_owned())),
            value => match value.as_u64().and_then(|size| usize::try_from(size).ok()) {
                Some(size) => Ok(size),
                None => Err(self.error(field, format!("is {value}, not a size"))),
            },
        }
    }

    pub(super) fn size_or(&self, field: &str, default: usize) -> Result<usize, FormatError> {
        if self.json[field].is_null() { Ok(default) } else { self.size(field) }
    }

    pub(super) fn number_or(&self, field: &str, default: f64) -> Result<f64, FormatError> {
        self.number_at(&self.json[field], field, default)
    }

    fn number_at(&self, value: &Value, field: &str, default: f64) -> Result<f64, FormatError> {
        match value {
            Value::Null => Ok(default),
            value => value.as_f64().ok_or_else(|| self.error(field, format!("is {value}, not a number"))),
        }
    }

    pub(super) fn flag_or(&self, field: &str, default: bool) -> Result<bool, FormatError> {
        match &self.json[field] {
            Value::Null => Ok(default),
            value => value.as_bool().ok_or_else(|| self.error(field, format!("is {value}, not true or false"))),
        }
    }

    /// `head_dim`, or the hidden size shared out among the heads.
    pub(super) fn head_dim(&self, hidden: usize, heads: usize) -> Result<usize, FormatError> {
        if !self.json["head_dim"].is_null() {
            return self.size("head_dim");
        }
        if heads == 0 || !hidden.is_multiple_of(heads) {
            return Err(self.error("num_attention_heads", format!("is {heads}, which does not divide {hidden}")));
        }
        Ok(hidden / heads)
    }

    /// `rope_theta`, or `rope_parameters.rope_theta` in files of newer versions.
    pub(super) fn rope_theta(&self, default: f64) -> Result<f64, FormatError> {
        let newer = self.number_at(&self.json["rope_parameters"]["rope_theta"], "rope_parameters", default)?;
        self.number_or("rope_theta", newer)
    }

    pub(super) fn activation_or(&self, default: Activation) -> Result<Activation, FormatError> {
        match &self.json["hidden_act"] {
            Value::Null => Ok(default),
            value => match value.as_str() {
                Some("relu2") => Ok(Activation::Relu2),
                Some("silu" | "swish") => Ok(Activation::Silu),
                Some("gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
                _ => Err(self.error("hidden_act", format!("is {value}, not relu2, silu or gelu_pytorch_tanh"))),
            },
        }
    }

    fn quantization(&self, field: &str) -> &Value {
        &self.json["quantization_config"][field]
    }

    fn refuse_what_is_not_implemented(&self) -> Result<(), FormatError> {
        let refuse = |what: String| Err(FormatError::Unsupported { path: self.path.clone(), what });
        for field in ["attention_bias", "mlp_bias"] {
            if self.flag_or(field, false)? {
                return refuse(format!("{field} is true"));
            }
        }
        for rope in [&self.json["rope_scaling"], &self.json["rope_parameters"]] {
            let kind = if rope["rope_type"].is_null() { &rope["type"] } else { &rope["rope_type"] };
            // An object without a type scales nothing; `rope_scaling: null` is usual.
            if !kind.is_null() && kind != "default" {
                return refuse(format!("rotary scaling of type {kind}"));
            }
        }
        match self.quantization("quant_method") {
            Value::Null => Ok(()),
            method if method == "bitnet" => Ok(()),
            method => refuse(format!("quant_method {method}")),
        }
    }

    fn scale_convention(&self) -> Result<ScaleConvention, FormatError> {
        match self.quantization("linear_class") {
            Value::Null => Ok(ScaleConvention::Inverse),
            class if class == "bitlinear" => Ok(ScaleConvention::Inverse),
            class if class == "autobitlinear" => Ok(ScaleConvention::Direct),
            class => {
                Err(self
                    .error("quantization_config.linear_class", format!("is {class}, not autobitlinear or bitlinear")))
            }
        }
    }

    fn modules_to_not_convert(&self) -> Result<Vec<String>, FormatError> {
        let error = |value| {
            self.error("quantization_config.modules_to_not_convert", format!("is {value}, not a list of modules"))
        };
        match self.quantization("modules_to_not_convert") {
            Value::Null => Ok(Vec::new()),
            value @ Value::Array(names) => {
                names.iter().map(|name| name.as_str().map(str::to_owned).ok_or_else(|| error(value))).collect()
            }
            value => Err(error(value)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn file(json: Value) -> ConfigFile {
        ConfigFile { path: PathBuf::from("config.json"), json }
    }

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
    fn the_rotary_base_is_found_in_either_place() {
        assert_eq!(file(json!({"rope_theta": 1e4})).rope_theta(5.0).unwrap(), 1e4);
        assert_eq!(file(json!({"rope_parameters": {"rope_theta": 2e4}})).rope_theta(5.0).unwrap(), 2e4);
        assert_eq!(file(json!({})).rope_theta(5.0).unwrap(), 5.0);
    }

    #[test]
    fn what_would_silently_change_results_is_refused() {
        for (json, what) in [
            (json!({"attention_bias": true}), "attention_bias"),
            (json!({"rope_scaling": {"type": "yarn", "factor": 4.0}}), "yarn"),
            (json!({"rope_parameters": {"rope_type": "llama3"}}), "llama3"),
            (json!({"quantization_config": {"quant_method": "gptq"}}), "gptq"),
        ] {
            let error = file(json).refuse_what_is_not_implemented().unwrap_err().to_string();
            assert!(error.contains(what) && error.contains("not supported"), "{error}");
        }
        let plain = json!({"rope_scaling": null, "rope_parameters": {"rope_type": "default"}, "attention_bias": false});
        file(plain).refuse_what_is_not_implemented().unwrap();
    }

    #[test]
    fn the_scale_convention_follows_the_linear_class() {
        let convention =
            |class: Value| file(json!({"quantization_config": {"linear_class": class}})).scale_convention();
        assert_eq!(convention(json!("autobitlinear")).unwrap(), ScaleConvention::Direct);
        assert_eq!(convention(json!("bitlinear")).unwrap(), ScaleConvention::Inverse);
        assert_eq!(convention(json!(null)).unwrap(), ScaleConvention::Inverse);
        assert_eq!(file(json!({})).scale_convention().unwrap(), ScaleConvention::Inverse);
        assert!(convention(json!("linear")).is_err());
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
