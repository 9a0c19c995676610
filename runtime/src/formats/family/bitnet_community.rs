//! bitnet_b1_58-large and -3B, community models with code of their own: `BitnetForCausalLM`. SiLU, sub-norms, master
//! weights.

use super::{Family, common, usual_norm};
use crate::formats::config_file::ConfigFile;
use crate::formats::{FormatError, LayerNorm, ModelConfig};

const ARCHITECTURE: &str = "BitnetForCausalLM";

pub(super) const FAMILY: Family =
    Family { architecture: ARCHITECTURE, model_type: "llama", config, norm, bitnet: true, norms_add_one: false };

fn config(file: &ConfigFile) -> Result<ModelConfig, FormatError> {
    common(file, ARCHITECTURE, ModelConfig { sub_norms: true, ..ModelConfig::default() })
}

fn norm(norm: LayerNorm) -> &'static str {
    match norm {
        LayerNorm::AttentionSub => "self_attn.inner_attn_ln",
        LayerNorm::FfnSub => "mlp.ffn_layernorm",
        other => usual_norm(other),
    }
}
