//! Architectures of GGUF files: how their metadata becomes a configuration, and what their tensors are called.
//!
//! An architecture is one row of [`ARCHITECTURES`]. The activation function is in no file: it follows from the
//! architecture, except for the community models of [`SILU_IN_DISGUISE`]. Norms and biases are known by their tensors.

use super::container::{Container, TensorInfo, Value};
use super::types::TensorType;
use crate::formats::config::{Biases, Pooling, RopeScaling, SlidingAttention};
use crate::formats::error::brief;
use crate::formats::{Activation, FloatType, FormatError, LayerNorm, ModelConfig, Projection};

/// What ternion has to know about an architecture.
pub(super) struct Architecture {
    /// `general.architecture`
    pub(super) name: &'static str,
    /// What the configuration calls it, as a Hugging Face directory of the same model does.
    class: &'static str,
    /// The same for embedding models.
    embedding_class: Option<&'static str>,
    activation: Activation,
    /// Whether the rows of q and k are permuted for interleaved rotary pairs.
    pub(super) permuted: bool,
    /// Whether float projections are master weights of a BitNet model.
    pub(super) bitnet: bool,
    /// Whether the head is the embedding even if the file has another.
    tied: bool,
    /// Whether it is Gemma: embeddings times √hidden, five layers in six with a sliding window.
    gemma: bool,
}

const BASE: Architecture = Architecture {
    name: "",
    class: "BitNetForCausalLM",
    embedding_class: None,
    activation: Activation::Relu2,
    permuted: false,
    bitnet: false,
    tied: false,
    gemma: false,
};

const ARCHITECTURES: [Architecture; 6] = [
    Architecture {
        name: "bitnet",
        class: "BitnetForCausalLM",
        activation: Activation::Silu,
        bitnet: true,
        tied: true,
        ..BASE
    },
    Architecture { name: "bitnet-b1.58", bitnet: true, ..BASE },
    Architecture { name: "bitnet-25", bitnet: true, ..BASE },
    Architecture { name: "llama", class: "LlamaForCausalLM", activation: Activation::Silu, permuted: true, ..BASE },
    Architecture {
        name: "qwen3",
        class: "Qwen3ForCausalLM",
        embedding_class: Some("Qwen3Model"),
        activation: Activation::Silu,
        ..BASE
    },
    Architecture {
        name: "gemma3",
        class: "Gemma3ForCausalLM",
        embedding_class: Some("Gemma3TextModel"),
        activation: Activation::GeluTanh,
        gemma: true,
        ..BASE
    },
];

/// Layers and heads of the community models (0.7B and 3B) that bitnet.cpp's converter labels `bitnet-b1.58` although
/// their activation function is SiLU.
const SILU_IN_DISGUISE: [(usize, usize); 2] = [(24, 16), (26, 32)];

/// Gemma's layers come in groups: all but the last of a group have a sliding window with a rotary base of its own.
const GEMMA_GROUP: usize = 6;
const GEMMA_LOCAL_THETA: f64 = 10_000.0;

/// The name of a layer's tensor without `.weight`.
pub(super) fn norm_name(layer: usize, norm: LayerNorm) -> String {
    let name = match norm {
        LayerNorm::Input => "attn_norm".to_owned(),
        LayerNorm::AttentionSub => "attn_sub_norm".to_owned(),
        LayerNorm::PostAttention => "ffn_norm".to_owned(),
        LayerNorm::FfnSub => "ffn_sub_norm".to_owned(),
        LayerNorm::QueryHead => "attn_q_norm".to_owned(),
        LayerNorm::KeyHead => "attn_k_norm".to_owned(),
        LayerNorm::AttentionResult => "post_attention_norm".to_owned(),
        LayerNorm::FfnResult => "post_ffw_norm".to_owned(),
        LayerNorm::Projection(projection) => format!("{}_norm_in", short_name(projection)),
    };
    format!("blk.{layer}.{name}")
}

/// The name of a projection's tensors without `.weight`, `.scale` or `.bias`.
pub(super) fn projection_name(layer: usize, projection: Projection) -> String {
    format!("blk.{layer}.{}", short_name(projection))
}

const fn short_name(projection: Projection) -> &'static str {
    match projection {
        Projection::Query => "attn_q",
        Projection::Key => "attn_k",
        Projection::Value => "attn_v",
        Projection::Output => "attn_output",
        Projection::Gate => "ffn_gate",
        Projection::Up => "ffn_up",
        Projection::Down => "ffn_down",
    }
}

/// The architecture that the file names.
pub(super) fn find(container: &Container) -> Result<&'static Architecture, FormatError> {
    let named = container.text("general.architecture")?.unwrap_or_default();
    ARCHITECTURES.iter().find(|architecture| architecture.name == named).ok_or_else(|| {
        FormatError::UnknownArchitecture {
            path: container.path.clone(),
            found: if named.is_empty() { "(none named)".to_owned() } else { brief(named) },
            known: ARCHITECTURES.iter().map(|architecture| architecture.name).collect(),
        }
    })
}

/// The architecture to write a model as; `None` if no architecture's readers would run it right.
pub(super) fn for_export(config: &ModelConfig) -> Option<&'static Architecture> {
    let name = match (config.sub_norms, config.activation) {
        (true, Activation::Relu2) => "bitnet-b1.58",
        (true, Activation::Silu) if config.tied_head => "bitnet",
        (false, Activation::Silu) if config.qk_norm => "qwen3",
        (false, Activation::Silu) => "llama",
        (false, Activation::GeluTanh) if config.post_norms => "gemma3",
        _ => return None,
    };
    ARCHITECTURES.iter().find(|architecture| architecture.name == name)
}

/// Reads the configuration, and whether the activation function had to be guessed from the sizes.
pub(super) fn config(container: &Container, architecture: &Architecture) -> Result<(ModelConfig, bool), FormatError> {
    let keys = Keys { container, architecture: architecture.name };
    keys.refuse_what_is_not_implemented()?;
    let (layers, hidden) = (keys.size("block_count")?, keys.size("embedding_length")?);
    let heads = keys.size("attention.head_count")?;
    let kv_heads = keys.size_or("attention.head_count_kv", heads)?;
    let head_dim = match keys.size_or("attention.key_length", 0)? {
        0 if heads > 0 && hidden.is_multiple_of(heads) => hidden / heads,
        0 => return Err(keys.error("attention.head_count", format!("is {heads}, which does not divide {hidden}"))),
        length => length,
    };
    for key in ["attention.value_length", "rope.dimension_count"] {
        let size = keys.size_or(key, head_dim)?;
        if size != head_dim {
            return Err(keys.unsupported(format!("{key} is {size} and heads have {head_dim}")));
        }
    }
    let disguised = architecture.name == "bitnet-b1.58" && SILU_IN_DISGUISE.contains(&(layers, heads));
    let has = |name: &str| container.tensors.contains_key(name);
    let has_norm = |norm| has(&format!("{}.weight", norm_name(0, norm)));
    let has_bias = |projection| has(&format!("{}.bias", projection_name(0, projection)));
    let norm_eps = keys.number_or("attention.layer_norm_rms_epsilon", 1e-5)? as f32;
    let vocabulary = match container.tensors.get("token_embd.weight") {
        Some(TensorInfo { shape, .. }) => shape[0],
        None => {
            let tensor = "token_embd.weight".to_owned();
            return Err(FormatError::MissingTensor { path: container.path.clone(), tensor });
        }
    };
    let pooling = match keys.size_or("pooling_type", 0)? {
        0 => None,
        1 => Some(Pooling::Mean),
        3 => Some(Pooling::Last),
        other => return Err(keys.unsupported(format!("pooling_type is {other}"))),
    };
    let class = match pooling {
        Some(_) => architecture.embedding_class.unwrap_or(architecture.class),
        None if disguised => "BitnetForCausalLM",
        None => architecture.class,
    };
    let config = ModelConfig {
        architecture: class.to_owned(),
        layers,
        hidden,
        ffn: keys.size("feed_forward_length")?,
        heads,
        kv_heads,
        head_dim,
        vocabulary,
        context: keys.size("context_length")?,
        rope_theta: keys.number_or("rope.freq_base", 10_000.0)?,
        norm_eps,
        activation: if disguised { Activation::Silu } else { architecture.activation },
        sub_norms: has_norm(LayerNorm::AttentionSub),
        tied_head: architecture.tied || !has("output.weight"),
        biases: Biases {
            qkv: has_bias(Projection::Query),
            output: has_bias(Projection::Output),
            ffn: has_bias(Projection::Gate),
        },
        qk_norm: has_norm(LayerNorm::QueryHead),
        projection_norm_eps: has_norm(LayerNorm::Projection(Projection::Query)).then_some(norm_eps),
        post_norms: has_norm(LayerNorm::AttentionResult),
        embedding_scale: if architecture.gemma { (hidden as f32).sqrt() } else { 1.0 },
        rope_scaling: keys.rope_scaling(head_dim)?,
        sliding: if architecture.gemma { keys.sliding(layers)? } else { None },
        pooling,
    };
    config.check().map_err(|problem| keys.error("block_count and others", format!("are impossible: {problem}")))?;
    Ok((config, disguised))
}

/// Metadata of one architecture, by the part of the key after its name.
struct Keys<'a> {
    container: &'a Container,
    architecture: &'static str,
}

impl Keys<'_> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn error(&self, key: &str, problem: String) -> FormatError {
        FormatError::Field { path: self.container.path.clone(), field: self.key(key), problem }
    }

    fn unsupported(&self, what: String) -> FormatError {
        FormatError::Unsupported { path: self.container.path.clone(), what }
    }

    fn size(&self, key: &str) -> Result<usize, FormatError> {
        match self.container.metadata.get(&self.key(key)) {
            None => Err(self.error(key, "is missing".to_owned())),
            Some(value) => self.container.size(&self.key(key), value),
        }
    }

    fn size_or(&self, key: &str, default: usize) -> Result<usize, FormatError> {
        if self.container.metadata.contains_key(&self.key(key)) { self.size(key) } else { Ok(default) }
    }

    fn number_or(&self, key: &str, default: f64) -> Result<f64, FormatError> {
        match self.container.metadata.get(&self.key(key)) {
            None => Ok(default),
            Some(Value::Float(value)) => Ok(*value),
            Some(Value::Unsigned(value)) => Ok(*value as f64),
            Some(_) => Err(self.error(key, "is no number".to_owned())),
        }
    }

    fn refuse_what_is_not_implemented(&self) -> Result<(), FormatError> {
        if self.size_or("expert_count", 0)? != 0 {
            return Err(self.unsupported("it is a mixture of experts".to_owned()));
        }
        for key in ["attn_logit_softcapping", "final_logit_softcapping", "attention.scale", "logit_scale"] {
            if self.number_or(key, 0.0)? != 0.0 {
                return Err(self.unsupported(format!("{} is set", self.key(key))));
            }
        }
        match self.container.metadata.get(&self.key("attention.causal")) {
            Some(Value::Bool(false)) => Err(self.unsupported("its attention is not causal".to_owned())),
            _ => Ok(()),
        }
    }

    /// `rope.scaling`, or the divisors of the tensor `rope_freqs.weight`.
    fn rope_scaling(&self, head_dim: usize) -> Result<RopeScaling, FormatError> {
        if let Some(info) = self.container.tensors.get("rope_freqs.weight") {
            let tensor = "rope_freqs.weight".to_owned();
            if info.kind != TensorType::Float(FloatType::F32) || info.shape != [head_dim / 2] {
                let problem = format!("is not {} numbers of type F32: download it again", head_dim / 2);
                return Err(FormatError::Tensor { path: self.container.path.clone(), tensor, problem });
            }
            let mut factors = vec![0.0; head_dim / 2];
            FloatType::F32.widen(&info.bytes, &mut factors);
            let plain = factors.iter().all(|factor| *factor == 1.0);
            return Ok(if plain { RopeScaling::None } else { RopeScaling::Factors { factors } });
        }
        let kind = self.container.text(&self.key("rope.scaling.type"))?;
        let factor = self.number_or("rope.scaling.factor", 1.0)?;
        match kind.unwrap_or("none") {
            "none" | "" => Ok(RopeScaling::None),
            "linear" if factor == 1.0 || factor == 0.0 => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear { factor }),
            other => Err(self.unsupported(format!("rotary scaling of type {}", brief(other)))),
        }
    }

    fn sliding(&self, layers: usize) -> Result<Option<SlidingAttention>, FormatError> {
        let window = self.size_or("attention.sliding_window", 0)?;
        let rope_theta = self.number_or("rope.freq_base_swa", GEMMA_LOCAL_THETA)?;
        let group = self.size_or("attention.sliding_window_pattern", GEMMA_GROUP)?.max(1);
        // `check` has not bounded the layers yet; more than it allows are refused there.
        let slides = (0..layers.min(1 << 13)).filter(|layer| layer % group != group - 1);
        Ok((window > 0).then(|| SlidingAttention { window, rope_theta, layers: slides.collect() }))
    }
}

impl Container {
    /// A text of the metadata, `None` if it is not there.
    pub(super) fn text(&self, key: &str) -> Result<Option<&str>, FormatError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.field(key, "is no text".to_owned())),
        }
    }

    pub(super) fn size(&self, key: &str, value: &Value) -> Result<usize, FormatError> {
        let size = match value {
            Value::Unsigned(size) => usize::try_from(*size).ok(),
            Value::Signed(size) => usize::try_from(*size).ok(),
            // One number for each layer: sizes of ternary models are the same in all.
            Value::Array(array) => array.numbers().and_then(|mut numbers| {
                let first = numbers.next().filter(|first| first.fract() == 0.0 && (0.0..1e9).contains(first))?;
                numbers.all(|number| number == first).then_some(first as usize)
            }),
            _ => None,
        };
        size.ok_or_else(|| self.field(key, "is not one size".to_owned()))
    }

    pub(super) fn field(&self, field: &str, problem: String) -> FormatError {
        FormatError::Field { path: self.path.clone(), field: field.to_owned(), problem }
    }
}
