//! Qwen3 layers: norms of query and key heads. As an embedding model with a norm in front of each projection.

use super::{Family, common, usual_norm};
use crate::formats::config_file::ConfigFile;
use crate::formats::{FormatError, ModelConfig, Pooling};

pub(super) const FAMILY: Family = Family {
    architecture: "Qwen3ForCausalLM",
    model_type: "qwen3",
    config: |file| config(file, "Qwen3ForCausalLM", None),
    norm: usual_norm,
    bitnet: false,
    norms_add_one: false,
};

/// Without a head, a model is an embedding model.
pub(super) const EMBEDDING: Family =
    Family { architecture: "Qwen3Model", config: |file| config(file, "Qwen3Model", Some(Pooling::Last)), ..FAMILY };

/// Defaults are those of the `transformers` class of this name.
fn config(file: &ConfigFile, architecture: &str, pooling: Option<Pooling>) -> Result<ModelConfig, FormatError> {
    let default = ModelConfig { head_dim: 128, norm_eps: 1e-6, qk_norm: true, pooling, ..ModelConfig::default() };
    let config = common(file, architecture, default)?;
    if file.flag_or("use_sliding_window", false)? {
        let first = file.size_or("max_window_layers", 28)?;
        let sliding = file.sliding(config.layers, config.rope_theta, |layer| layer >= first)?;
        return Ok(ModelConfig { sliding, ..config });
    }
    Ok(config)
}
