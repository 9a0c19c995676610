//! BitNet b1.58 2B4T and models of its architecture: `BitNetForCausalLM`.

use super::{Family, TensorNames};
use crate::formats::hf::ConfigFile;
use crate::formats::{Activation, FormatError, LayerNorm, ModelConfig, Projection};

const ARCHITECTURE: &str = "BitNetForCausalLM";

pub(super) const FAMILY: Family = Family {
    architecture: ARCHITECTURE,
    config,
    names: TensorNames {
        embedding: "model.embed_tokens",
        final_norm: "model.norm",
        head: "lm_head",
        layers: "model.layers",
        projection: |projection| match projection {
            Projection::Query => "self_attn.q_proj",
            Projection::Key => "self_attn.k_proj",
            Projection::Value => "self_attn.v_proj",
            Projection::Output => "self_attn.o_proj",
            Projection::Gate => "mlp.gate_proj",
            Projection::Up => "mlp.up_proj",
            Projection::Down => "mlp.down_proj",
        },
        norm: |norm| match norm {
            LayerNorm::Input => "input_layernorm",
            LayerNorm::AttentionSub => "self_attn.attn_sub_norm",
            LayerNorm::PostAttention => "post_attention_layernorm",
            LayerNorm::FfnSub => "mlp.ffn_sub_norm",
        },
    },
};

/// Defaults are those of the `transformers` class of this name.
fn config(file: &ConfigFile) -> Result<ModelConfig, FormatError> {
    let (hidden, heads) = (file.size("hidden_size")?, file.size("num_attention_heads")?);
    let config = ModelConfig {
        architecture: ARCHITECTURE.to_owned(),
        layers: file.size("num_hidden_layers")?,
        hidden,
        ffn: file.size("intermediate_size")?,
        heads,
        kv_heads: file.size_or("num_key_value_heads", heads)?,
        head_dim: file.head_dim(hidden, heads)?,
        vocabulary: file.size("vocab_size")?,
        context: file.size("max_position_embeddings")?,
        rope_theta: file.rope_theta(500_000.0)?,
        norm_eps: file.number_or("rms_norm_eps", 1e-5)? as f32,
        activation: file.activation_or(Activation::Relu2)?,
        sub_norms: true,
        tied_head: file.flag_or("tie_word_embeddings", false)?,
    };
    Ok(config)
}
