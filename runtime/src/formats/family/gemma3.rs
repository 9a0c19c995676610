//! Gemma 3 text layers: norms before and after, `1 + w` in Gemma's own norms, scaled embeddings, a sliding window in
//! five layers of six. As an embedding model with a norm in front of each projection.

use super::{Family, common, usual_norm};
use crate::formats::config_file::ConfigFile;
use crate::formats::{Activation, FormatError, LayerNorm, ModelConfig, Pooling};

pub(super) const FAMILY: Family = Family {
    architecture: "Gemma3ForCausalLM",
    model_type: "gemma3_text",
    config: |file| config(file, "Gemma3ForCausalLM", None),
    norm,
    bitnet: false,
    norms_add_one: true,
};

/// Without a head, a model is an embedding model.
pub(super) const EMBEDDING: Family = Family {
    architecture: "Gemma3TextModel",
    config: |file| config(file, "Gemma3TextModel", Some(Pooling::Last)),
    ..FAMILY
};

/// Defaults are those of the `transformers` class of this name.
fn config(file: &ConfigFile, architecture: &str, pooling: Option<Pooling>) -> Result<ModelConfig, FormatError> {
    let default = ModelConfig {
        head_dim: 256,
        rope_theta: 1e6,
        norm_eps: 1e-6,
        activation: Activation::GeluTanh,
        tied_head: true,
        qk_norm: true,
        post_norms: true,
        pooling,
        ..ModelConfig::default()
    };
    let mut config = common(file, architecture, default)?;
    config.activation = file.activation_at("hidden_activation", config.activation)?;
    config.embedding_scale = (config.hidden as f32).sqrt();
    let group = file.size_or("sliding_window_pattern", 6)?.max(1);
    config.sliding = file.sliding(config.layers, 10_000.0, |layer| layer % group != group - 1)?;
    // Attention is scaled by this number's root, not by the head size's, in the larger models.
    let scaled_by = file.size_or("query_pre_attn_scalar", 256)?;
    if scaled_by != config.head_dim {
        let what = format!("query_pre_attn_scalar is {scaled_by}");
        return Err(FormatError::Unsupported { path: file.path().to_owned(), what });
    }
    Ok(config)
}

fn norm(norm: LayerNorm) -> &'static str {
    match norm {
        LayerNorm::PostAttention => "pre_feedforward_layernorm",
        other => usual_norm(other),
    }
}
