//! Model families as Hugging Face directories describe them. A family is one file here and one row of [`FAMILIES`]:
//! how its `config.json` is read, and what its norms are called. Everything else is called the same in all.

mod bitnet;
mod bitnet_community;
mod gemma3;
mod llama;
mod qwen3;

use super::config_file::ConfigFile;
use super::error::brief;
use super::{FormatError, LayerNorm, ModelConfig};

/// What ternion has to know about a family.
pub(super) struct Family {
    /// The name in `architectures`.
    pub(super) architecture: &'static str,
    /// `model_type`, for files that are written.
    pub(super) model_type: &'static str,
    /// Reads the configuration; sizes are checked afterwards.
    pub(super) config: fn(&ConfigFile) -> Result<ModelConfig, FormatError>,
    /// Names of norms within a layer, without `.weight`.
    pub(super) norm: fn(LayerNorm) -> &'static str,
    /// Whether float projections are always master weights of a BitNet model.
    pub(super) bitnet: bool,
    /// Whether the family's own norms multiply with `1 + w`.
    pub(super) norms_add_one: bool,
}

/// All known families.
const FAMILIES: &[Family] = &[
    bitnet::FAMILY,
    bitnet_community::FAMILY,
    llama::FAMILY,
    qwen3::FAMILY,
    qwen3::EMBEDDING,
    gemma3::FAMILY,
    gemma3::EMBEDDING,
];

/// The family that `config.json` names.
///
/// # Errors
/// If it names none, or none that is known.
pub(super) fn find(config: &ConfigFile) -> Result<&'static Family, FormatError> {
    let named = config.architectures()?;
    FAMILIES.iter().find(|family| named.contains(&family.architecture)).ok_or_else(|| {
        FormatError::UnknownArchitecture {
            path: config.path().to_owned(),
            found: if named.is_empty() { "(none named)".to_owned() } else { brief(named.join(", ")) },
            known: FAMILIES.iter().map(|family| family.architecture).collect(),
        }
    })
}

/// The family as which `transformers` reads a model of this architecture. The community models' own code is not part of
/// it; their layers are those of its BitNet class with another activation function.
pub(super) fn in_transformers(architecture: &str) -> Option<&'static Family> {
    if architecture == bitnet_community::FAMILY.architecture {
        return Some(&bitnet::FAMILY);
    }
    FAMILIES.iter().find(|family| family.architecture == architecture)
}

/// What all families have in common; `default` has what a file may leave out.
fn common(file: &ConfigFile, architecture: &str, default: ModelConfig) -> Result<ModelConfig, FormatError> {
    let (hidden, heads) = (file.size("hidden_size")?, file.size("num_attention_heads")?);
    Ok(ModelConfig {
        architecture: architecture.to_owned(),
        layers: file.size("num_hidden_layers")?,
        hidden,
        ffn: file.size("intermediate_size")?,
        heads,
        kv_heads: file.size_or("num_key_value_heads", heads)?,
        head_dim: match default.head_dim {
            0 => file.head_dim(hidden, heads)?,
            default => file.size_or("head_dim", default)?,
        },
        vocabulary: file.size("vocab_size")?,
        context: file.size("max_position_embeddings")?,
        rope_theta: file.rope_theta(default.rope_theta)?,
        norm_eps: file.number_or("rms_norm_eps", default.norm_eps.into())? as f32,
        activation: file.activation_or(default.activation)?,
        tied_head: file.flag_or("tie_word_embeddings", default.tied_head)?,
        rope_scaling: file.rope_scaling()?,
        ..default
    })
}

/// Norms as most families call them.
fn usual_norm(norm: LayerNorm) -> &'static str {
    match norm {
        LayerNorm::Input => "input_layernorm",
        LayerNorm::AttentionSub => "self_attn.attn_sub_norm",
        LayerNorm::PostAttention => "post_attention_layernorm",
        LayerNorm::FfnSub => "mlp.ffn_sub_norm",
        LayerNorm::QueryHead => "self_attn.q_norm",
        LayerNorm::KeyHead => "self_attn.k_norm",
        LayerNorm::AttentionResult => "post_attention_layernorm",
        LayerNorm::FfnResult => "post_feedforward_layernorm",
        // Found by their presence, under either of two names.
        LayerNorm::Projection(_) => "norm",
    }
}
