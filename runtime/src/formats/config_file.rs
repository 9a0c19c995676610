//! `config.json` of a Hugging Face directory, with access by field that says what is wrong and where.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::dress::ScaleConvention;
use super::error::brief;
use super::{Activation, FormatError, RopeScaling, SlidingAttention};

/// A `config.json`.
pub(super) struct ConfigFile {
    pub(super) path: PathBuf,
    pub(super) json: Value,
}

impl ConfigFile {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn error(&self, field: &str, problem: String) -> FormatError {
        FormatError::Field { path: self.path.clone(), field: field.to_owned(), problem }
    }

    /// The names in `architectures`.
    pub(super) fn architectures(&self) -> Result<Vec<&str>, FormatError> {
        match &self.json["architectures"] {
            Value::Null => Ok(Vec::new()),
            Value::Array(names) => Ok(names.iter().filter_map(Value::as_str).collect()),
            other => Err(self.error("architectures", format!("is {}, not a list", brief(other)))),
        }
    }

    pub(super) fn size(&self, field: &str) -> Result<usize, FormatError> {
        match &self.json[field] {
            Value::Null => Err(self.error(field, "is missing".to_owned())),
            value => match value.as_u64().and_then(|size| usize::try_from(size).ok()) {
                Some(size) => Ok(size),
                None => Err(self.error(field, format!("is {}, not a size", brief(value)))),
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
            value => value.as_f64().ok_or_else(|| self.error(field, format!("is {}, not a number", brief(value)))),
        }
    }

    pub(super) fn flag_or(&self, field: &str, default: bool) -> Result<bool, FormatError> {
        match &self.json[field] {
            Value::Null => Ok(default),
            value => {
                value.as_bool().ok_or_else(|| self.error(field, format!("is {}, not true or false", brief(value))))
            }
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
        let parameters = &self.json["rope_parameters"];
        let newer = self.number_at(&parameters["full_attention"]["rope_theta"], "rope_parameters", default)?;
        let newer = self.number_at(&parameters["rope_theta"], "rope_parameters", newer)?;
        self.number_or("rope_theta", newer)
    }

    pub(super) fn activation_or(&self, default: Activation) -> Result<Activation, FormatError> {
        self.activation_at("hidden_act", default)
    }

    pub(super) fn activation_at(&self, field: &str, default: Activation) -> Result<Activation, FormatError> {
        match &self.json[field] {
            Value::Null => Ok(default),
            value => match value.as_str() {
                Some("relu2") => Ok(Activation::Relu2),
                Some("silu" | "swish") => Ok(Activation::Silu),
                Some("gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
                _ => Err(self.error(field, format!("is {}, not relu2, silu or gelu_pytorch_tanh", brief(value)))),
            },
        }
    }

    /// Rotary scaling: `rope_scaling`, or `rope_parameters` in files of newer versions.
    pub(super) fn rope_scaling(&self) -> Result<RopeScaling, FormatError> {
        let parts = [
            &self.json["rope_scaling"],
            &self.json["rope_parameters"]["full_attention"],
            &self.json["rope_parameters"],
        ];
        for rope in parts {
            let number = |field: &str| match rope[field].as_f64() {
                Some(number) => Ok(number),
                None => Err(self.error(field, format!("is {}, not a number", brief(&rope[field])))),
            };
            // An object without a type scales nothing; `rope_scaling: null` is usual.
            match (&rope["rope_type"], &rope["type"]) {
                (Value::Null, Value::Null) => {}
                (Value::String(kind), _) | (Value::Null, Value::String(kind)) => match kind.as_str() {
                    "default" => {}
                    "linear" if number("factor")? == 1.0 => {}
                    "linear" => return Ok(RopeScaling::Linear { factor: number("factor")? }),
                    "llama3" => {
                        return Ok(RopeScaling::Llama3 {
                            factor: number("factor")?,
                            low: number("low_freq_factor")?,
                            high: number("high_freq_factor")?,
                            original_context: number("original_max_position_embeddings")?,
                        });
                    }
                    other => {
                        let what = format!("rotary scaling of type {}", brief(other));
                        return Err(FormatError::Unsupported { path: self.path.clone(), what });
                    }
                },
                (kind, _) => return Err(self.error("rope_type", format!("is {}, not a name", brief(kind)))),
            }
        }
        Ok(RopeScaling::None)
    }

    /// Layers with a sliding window: the ones that `layer_types` names, or, without it, those that `slides` picks. A window
    /// that is not given is one of 4096 positions, as `transformers` has it; `null` is none.
    pub(super) fn sliding(
        &self,
        layers: usize,
        local_theta: f64,
        slides: impl Fn(usize) -> bool,
    ) -> Result<Option<SlidingAttention>, FormatError> {
        let window = match self.json.get("sliding_window") {
            None => 4096,
            Some(_) => self.size_or("sliding_window", 0)?,
        };
        let newer = &self.json["rope_parameters"]["sliding_attention"]["rope_theta"];
        let newer = self.number_at(newer, "rope_parameters", local_theta)?;
        let rope_theta = self.number_or("rope_local_base_freq", newer)?;
        let layers: Vec<usize> = match &self.json["layer_types"] {
            // More layers than the configuration's check lets through are refused there.
            Value::Null => (0..layers.min(1 << 13)).filter(|layer| slides(*layer)).collect(),
            Value::Array(kinds) => {
                let slides = kinds.iter().enumerate().filter(|(_, kind)| *kind == "sliding_attention");
                slides.map(|(layer, _)| layer).collect()
            }
            other => return Err(self.error("layer_types", format!("is {}, not a list", brief(other)))),
        };
        let slides = window > 0 && !layers.is_empty();
        Ok(slides.then_some(SlidingAttention { window, rope_theta, layers }))
    }

    /// Whether the configuration itself says that float weights are a BitNet model's.
    pub(super) fn says_bitnet(&self) -> bool {
        self.quantization("quant_method") == "bitnet"
            || self.quantization("quantization_mode") == "online"
            || self.json["weight_bits"] == 1
    }

    /// Epsilon of norms in front of projections.
    pub(super) fn projection_norm_eps(&self) -> Result<f32, FormatError> {
        let field = "quantization_config.rms_norm_eps";
        self.number_at(self.quantization("rms_norm_eps"), field, 1e-6).map(|eps| eps as f32)
    }

    /// Whether there have to be norms in front of projections.
    pub(super) fn promises_projection_norms(&self) -> bool {
        self.quantization("use_rms_norm") == true
    }

    fn quantization(&self, field: &str) -> &Value {
        &self.json["quantization_config"][field]
    }

    pub(super) fn refuse_what_is_not_implemented(&self) -> Result<(), FormatError> {
        let refuse = |what: String| Err(FormatError::Unsupported { path: self.path.clone(), what });
        for field in ["attn_logit_softcapping", "final_logit_softcapping"] {
            if self.number_or(field, 0.0)? != 0.0 {
                return refuse(format!("{field} is set"));
            }
        }
        if self.flag_or("use_bidirectional_attention", false)? {
            return refuse("its attention is not causal".to_owned());
        }
        match self.quantization("quant_method") {
            Value::Null => Ok(()),
            method if method == "bitnet" => Ok(()),
            method => refuse(format!("quant_method {}", brief(method))),
        }
    }

    pub(super) fn scale_convention(&self) -> Result<ScaleConvention, FormatError> {
        match self.quantization("linear_class") {
            Value::Null => Ok(ScaleConvention::Inverse),
            class if class == "bitlinear" => Ok(ScaleConvention::Inverse),
            class if class == "autobitlinear" => Ok(ScaleConvention::Direct),
            class => Err(self.error(
                "quantization_config.linear_class",
                format!("is {}, not autobitlinear or bitlinear", brief(class)),
            )),
        }
    }

    pub(super) fn modules_to_not_convert(&self) -> Result<Vec<String>, FormatError> {
        let error = |value| {
            self.error(
                "quantization_config.modules_to_not_convert",
                format!("is {}, not a list of modules", brief(value)),
            )
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
    fn the_rotary_base_is_found_in_either_place() {
        assert_eq!(file(json!({"rope_theta": 1e4})).rope_theta(5.0).unwrap(), 1e4);
        assert_eq!(file(json!({"rope_parameters": {"rope_theta": 2e4}})).rope_theta(5.0).unwrap(), 2e4);
        assert_eq!(file(json!({})).rope_theta(5.0).unwrap(), 5.0);
    }

    #[test]
    fn what_would_silently_change_results_is_refused() {
        for (json, what) in [
            (json!({"final_logit_softcapping": 30.0}), "final_logit_softcapping"),
            (json!({"use_bidirectional_attention": true}), "not causal"),
            (json!({"quantization_config": {"quant_method": "gptq"}}), "gptq"),
        ] {
            let error = file(json).refuse_what_is_not_implemented().unwrap_err().to_string();
            assert!(error.contains(what) && error.contains("not supported"), "{error}");
        }
        let yarn = file(json!({"rope_scaling": {"type": "yarn", "factor": 4.0}}));
        assert!(yarn.rope_scaling().unwrap_err().to_string().contains("yarn"));
        let plain = json!({"rope_scaling": null, "rope_parameters": {"rope_type": "default"}, "attention_bias": false});
        file(plain).refuse_what_is_not_implemented().unwrap();
    }

    #[test]
    fn layers_slide_as_transformers_lets_them() {
        let sliding = |json: Value| file(json).sliding(5, 1e4, |layer| layer >= 3).unwrap();
        let expected =
            |window, layers: &[usize]| Some(SlidingAttention { window, rope_theta: 1e4, layers: layers.to_vec() });
        assert_eq!(sliding(json!({})), expected(4096, &[3, 4]));
        assert_eq!(sliding(json!({"sliding_window": null})), None);
        assert_eq!(sliding(json!({"sliding_window": 8})), expected(8, &[3, 4]));
        let named = json!({"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]});
        assert_eq!(sliding(named), expected(8, &[1]));
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
    fn rotary_scaling_is_found_in_either_place() {
        let llama3 = json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        });
        let expected = RopeScaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original_context: 8192.0 };
        assert_eq!(file(json!({"rope_scaling": llama3})).rope_scaling().unwrap(), expected);
        assert_eq!(file(json!({"rope_parameters": llama3})).rope_scaling().unwrap(), expected);
        let linear = |factor: f64| file(json!({"rope_scaling": {"type": "linear", "factor": factor}})).rope_scaling();
        assert_eq!(linear(4.0).unwrap(), RopeScaling::Linear { factor: 4.0 });
        assert_eq!(linear(1.0).unwrap(), RopeScaling::None);
        assert!(file(json!({"rope_scaling": {"type": "linear"}})).rope_scaling().is_err());
    }
}
