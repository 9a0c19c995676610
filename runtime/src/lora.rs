//! LoRA adapters as PEFT saves them: a directory with `adapter_config.json` and `adapter_model.safetensors`.
//!
//! An adapted projection gives `y + s · B·(A·x)`, `x` being what the projection reads before a norm of its own and
//! before quantisation, `s = alpha / r` (`alpha / √r` if rank-stabilised) times the scale it is applied with. The
//! addition is computed in `f32` in a fixed order, beside the ternary product: adapters are never merged into weights,
//! which would not stay ternary.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::formats::error::brief;
use crate::formats::safetensors::Tensors;
use crate::formats::{FloatMatrix, FormatError, ModelConfig, Projection};
use crate::model::Model;
use crate::model::low_rank::LowRank;
use crate::model::reference::Reference;

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

/// Why an adapter cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoraError {
    /// A file that cannot be read, or a damaged tensor.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// No directory of an adapter.
    #[error("{}: no {missing} there: give the directory of a PEFT adapter", path.display())]
    NotAnAdapter {
        /// The directory.
        path: PathBuf,
        /// The file that is missing.
        missing: &'static str,
    },
    /// A setting that makes no sense.
    #[error("{}: {field} {problem}", path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// The setting.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A kind of adapter that cannot be applied beside a ternary product.
    #[error("{}: {what}: only plain LoRA of q, k, v, o, gate, up and down is supported", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What it needs.
        what: String,
    },
    /// An adapter of another model.
    #[error(
        "{}: tensor {tensor} is {}x{}, but the model needs {}x{}: the adapter was made for another model",
        path.display(), found.0, found.1, expected.0, expected.1
    )]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Rows and columns found.
        found: (usize, usize),
        /// Rows and columns expected.
        expected: (usize, usize),
    },
}

/// An opened adapter, checked against the model that it is for.
#[derive(Debug)]
pub struct Adapter {
    additions: Vec<(usize, Projection, LowRank)>,
}

impl Adapter {
    /// Opens the adapter in `directory` for a model with this configuration, to be applied with `scale`.
    ///
    /// # Errors
    /// If it is no adapter, a damaged one, one of an unsupported kind, or one for another model.
    pub fn open(directory: &Path, config: &ModelConfig, scale: f32) -> Result<Self, LoraError> {
        for missing in [CONFIG, WEIGHTS] {
            if !directory.join(missing).is_file() {
                return Err(LoraError::NotAnAdapter { path: directory.to_owned(), missing });
            }
        }
        let settings = Settings::read(directory.join(CONFIG))?;
        let path = directory.join(WEIGHTS);
        let tensors = Tensors::open_file(path.clone())?;
        // Every A has its B, every tensor is one of them, and they are added in the order of the layers.
        let mut names: Vec<&str> = tensors.names().collect();
        names.sort_unstable();
        let mut additions = Vec::new();
        for name in names {
            let Some(place) = Place::of(name).filter(|place| place.layer < config.layers) else {
                return Err(LoraError::Unsupported { path, what: format!("it adapts {}", brief(name)) });
            };
            let Place { module, layer, projection, is_a } = place;
            if !is_a {
                tensors.get(&name.replace(".lora_B.", ".lora_A."))?;
                continue;
            }
            let (m, k) = projection.shape(config);
            let (rank, own_scale) = settings.of(module)?;
            let a = matrix(&tensors, name, (rank, k))?;
            let b = matrix(&tensors, &name.replace(".lora_A.", ".lora_B."), (m, rank))?;
            let scale = (own_scale * f64::from(scale)) as f32;
            additions.push((layer, projection, LowRank { a, b, scale }));
        }
        if additions.is_empty() {
            return Err(LoraError::Unsupported { path, what: "it adapts nothing".to_owned() });
        }
        Ok(Self { additions })
    }

    /// Adds it to a model, after the adapters that it has already.
    pub fn apply(&self, model: &mut Model) {
        for (layer, projection, addition) in &self.additions {
            model.add_low_rank(*layer, *projection, addition.clone());
        }
    }

    /// Adds it to the reference, which every model must equal.
    pub fn apply_to_reference(&self, reference: &mut Reference) {
        for (layer, projection, addition) in &self.additions {
            reference.add_low_rank(*layer, *projection, addition.clone());
        }
    }

    /// Number of projections that it adapts.
    #[must_use]
    pub fn projections(&self) -> usize {
        self.additions.len()
    }
}

/// What a tensor's name says: `base_model.model.[model.]layers.0.self_attn.q_proj.lora_A.weight`.
struct Place<'a> {
    /// The module, without `base_model.model.`.
    module: &'a str,
    layer: usize,
    projection: Projection,
    /// `A`, not `B`.
    is_a: bool,
}

impl<'a> Place<'a> {
    fn of(name: &'a str) -> Option<Self> {
        let name = name.strip_prefix("base_model.model.")?.strip_suffix(".weight")?;
        let (module, is_a) = match name.strip_suffix(".lora_A") {
            Some(module) => (module, true),
            None => (name.strip_suffix(".lora_B")?, false),
        };
        let (layer, rest) = module.strip_prefix("model.").unwrap_or(module).strip_prefix("layers.")?.split_once('.')?;
        let projection = Projection::ALL.into_iter().find(|projection| projection.to_string() == rest)?;
        Some(Self { module, layer: layer.parse().ok()?, projection, is_a })
    }
}

/// A matrix of this shape, in its file's own type, all finite.
fn matrix(tensors: &Tensors, name: &str, (rows, columns): (usize, usize)) -> Result<FloatMatrix, LoraError> {
    let tensor = tensors.get(name)?;
    let dtype = tensor.float_type("BF16, F16 or F32")?;
    if let [found_rows, found_columns] = tensor.shape[..]
        && (found_rows, found_columns) != (rows, columns)
    {
        let (found, expected) = ((found_rows, found_columns), (rows, columns));
        return Err(LoraError::Shape { path: tensor.path, tensor: tensor.name, found, expected });
    }
    tensor.floats(&[rows, columns])?;
    Ok(FloatMatrix { rows, columns, dtype: dtype.into(), bytes: tensor.bytes })
}

/// An `adapter_config.json`.
struct Settings {
    path: PathBuf,
    rank: usize,
    alpha: f64,
    rank_stabilised: bool,
    /// Ranks and alphas of single modules, by the end of their names.
    ranks: Vec<(String, f64)>,
    alphas: Vec<(String, f64)>,
}

impl Settings {
    fn read(path: PathBuf) -> Result<Self, LoraError> {
        let text = std::fs::read_to_string(&path).map_err(|source| FormatError::Read { path: path.clone(), source })?;
        let json: Value = serde_json::from_str(&text)
            .map_err(|error| FormatError::Json { path: path.clone(), problem: brief(error) })?;
        if let Some(what) = unsupported(&json) {
            return Err(LoraError::Unsupported { path, what });
        }
        let wrong =
            |field: &str, problem: String| LoraError::Field { path: path.clone(), field: field.to_owned(), problem };
        let number = |field: &str| {
            let value = &json[field];
            value.as_f64().ok_or_else(|| wrong(field, format!("is {}, not a number", brief(value))))
        };
        let pattern = |field: &str| -> Result<Vec<(String, f64)>, LoraError> {
            let entries = json[field].as_object().into_iter().flatten();
            let entry = |(name, value): (&String, &Value)| {
                // PEFT takes names for regular expressions; plain names mean the same either way.
                let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_'));
                let value = value.as_f64().filter(|_| plain);
                let value = value.ok_or_else(|| {
                    wrong(field, format!("has {:?}: expected a module's name and a number", brief(name)))
                });
                Ok((name.clone(), value?))
            };
            entries.map(entry).collect()
        };
        let rank = json["r"].as_u64().and_then(|rank| usize::try_from(rank).ok()).filter(|rank| *rank > 0);
        Ok(Self {
            rank: rank.ok_or_else(|| wrong("r", format!("is {}, not a rank", brief(&json["r"]))))?,
            alpha: number("lora_alpha")?,
            rank_stabilised: json["use_rslora"].as_bool().unwrap_or(false),
            ranks: pattern("rank_pattern")?,
            alphas: pattern("alpha_pattern")?,
            path,
        })
    }

    /// Rank and scale of a module.
    fn of(&self, module: &str) -> Result<(usize, f64), LoraError> {
        let of = |field: &str, pattern: &[(String, f64)], default: f64| {
            let mut values = pattern.iter().filter(|(name, _)| ends_with(module, name)).map(|(_, value)| *value);
            match (values.next(), values.next()) {
                (None, _) => Ok(default),
                (Some(value), None) => Ok(value),
                (Some(_), Some(_)) => Err(LoraError::Field {
                    path: self.path.clone(),
                    field: field.to_owned(),
                    problem: format!("has more than one value for {module}"),
                }),
            }
        };
        let rank = of("rank_pattern", &self.ranks, self.rank as f64)?;
        let alpha = of("alpha_pattern", &self.alphas, self.alpha)?;
        let scale = alpha / if self.rank_stabilised { rank.sqrt() } else { rank };
        if rank < 1.0 || !scale.is_finite() {
            let problem = format!("of {module} is {rank}, with alpha {alpha}");
            return Err(LoraError::Field { path: self.path.clone(), field: "the rank".to_owned(), problem });
        }
        Ok((rank as usize, scale))
    }
}

/// Whether `module` is `name` or ends with it, at a dot.
fn ends_with(module: &str, name: &str) -> bool {
    module.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// What of the settings asks for more than plain LoRA.
fn unsupported(json: &Value) -> Option<String> {
    let kind = &json["peft_type"];
    if kind != "LORA" {
        return Some(format!("peft_type is {}", brief(kind)));
    }
    if !matches!(json["bias"].as_str(), None | Some("none")) {
        return Some(format!("bias is {}", brief(&json["bias"])));
    }
    // Weights that start from the base's singular values leave a base that is not the model's own.
    if let Some(start) =
        json["init_lora_weights"].as_str().filter(|start| !["gaussian", "eva", "orthogonal"].contains(start))
    {
        return Some(format!("init_lora_weights is {}, which changes the base model", brief(start)));
    }
    let flags = ["use_dora", "lora_bias", "fan_in_fan_out", "use_qalora"];
    if let Some(flag) = flags.into_iter().find(|flag| json[*flag] == true) {
        return Some(format!("{flag} is set"));
    }
    let empty = |value: &Value| match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    };
    let lists = [
        "modules_to_save",
        "trainable_token_indices",
        "target_parameters",
        "layer_replication",
        "alora_invocation_tokens",
        "arrow_config",
        "kasa_config",
        "velora_config",
        "use_bdlora",
    ];
    lists.into_iter().find(|list| !empty(&json[*list])).map(|list| format!("{list} is {}", brief(&json[list])))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn names_say_where_a_tensor_belongs() {
        let place = Place::of("base_model.model.model.layers.12.mlp.down_proj.lora_B.weight").unwrap();
        assert_eq!((place.module, place.layer), ("model.layers.12.mlp.down_proj", 12));
        assert_eq!((place.projection, place.is_a), (Projection::Down, false));
        assert!(Place::of("base_model.model.layers.0.self_attn.q_proj.lora_A.weight").unwrap().is_a);
        for name in [
            "base_model.model.lm_head.lora_A.weight",
            "base_model.model.model.layers.x.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.0.self_attn.q_proj.lora_embedding_A.weight",
            "base_model.model.model.layers.0.self_attn.rotary.lora_A.weight",
            "model.layers.0.self_attn.q_proj.weight",
        ] {
            assert!(Place::of(name).is_none(), "{name}");
        }
    }

    #[test]
    fn patterns_belong_to_the_end_of_a_name() {
        let module = "model.layers.1.self_attn.q_proj";
        for name in ["q_proj", "self_attn.q_proj", "layers.1.self_attn.q_proj", module] {
            assert!(ends_with(module, name), "{name}");
        }
        for name in ["proj", "layers.1", "1.self_attn.k_proj", "11.self_attn.q_proj"] {
            assert!(!ends_with(module, name), "{name}");
        }
    }

    #[test]
    fn what_is_more_than_plain_lora_is_named() {
        let plain = json!({"peft_type": "LORA", "bias": "none", "modules_to_save": null, "init_lora_weights": true});
        assert_eq!(unsupported(&plain), None);
        for (field, value) in [
            ("peft_type", json!("IA3")),
            ("bias", json!("all")),
            ("use_dora", json!(true)),
            ("modules_to_save", json!(["lm_head"])),
            ("init_lora_weights", json!("pissa")),
            ("fan_in_fan_out", json!(true)),
        ] {
            let mut json = plain.clone();
            json[field] = value;
            assert!(unsupported(&json).is_some_and(|what| what.contains(field)), "{field}");
        }
    }
}
