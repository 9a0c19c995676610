//! Published shapes, by name.

use crate::formats::{Activation, ModelConfig};

/// A family: everything but the sizes.
fn bitnet() -> ModelConfig {
    ModelConfig {
        architecture: "BitNetForCausalLM".to_owned(),
        vocabulary: 128_256,
        context: 4096,
        rope_theta: 500_000.0,
        norm_eps: 1e-5,
        activation: Activation::Relu2,
        sub_norms: true,
        tied_head: true,
        ..ModelConfig::default()
    }
}

fn community() -> ModelConfig {
    ModelConfig {
        architecture: "BitnetForCausalLM".to_owned(),
        vocabulary: 32_002,
        context: 2048,
        rope_theta: 10_000.0,
        activation: Activation::Silu,
        ..bitnet()
    }
}

fn llama() -> ModelConfig {
    ModelConfig {
        architecture: "LlamaForCausalLM".to_owned(),
        context: 8192,
        activation: Activation::Silu,
        sub_norms: false,
        tied_head: false,
        ..bitnet()
    }
}

fn falcon3() -> ModelConfig {
    ModelConfig { vocabulary: 131_072, rope_theta: 1_000_042.0, norm_eps: 1e-6, ..llama() }
}

/// A shape that a model was published with, or, for `125M` and `100B`, that speed is usually reported for.
pub(super) struct Preset {
    pub(super) name: &'static str,
    family: fn() -> ModelConfig,
    layers: usize,
    hidden: usize,
    ffn: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

const fn preset(
    name: &'static str,
    family: fn() -> ModelConfig,
    [layers, hidden, ffn]: [usize; 3],
    [heads, kv_heads, head_dim]: [usize; 3],
) -> Preset {
    Preset { name, family, layers, hidden, ffn, heads, kv_heads, head_dim }
}

/// All presets. Those of bitnet.cpp's dummy models (`125M`, `100B`) have its shapes and 2B4T's architecture.
pub(super) const PRESETS: [Preset; 10] = [
    preset("125M", bitnet, [11, 768, 3072], [12, 12, 64]),
    preset("0.7B", community, [24, 1536, 4096], [16, 16, 96]),
    preset("2B-4T", bitnet, [30, 2560, 6912], [20, 5, 128]),
    preset("3B", community, [26, 3200, 8640], [32, 32, 100]),
    preset("8B", llama, [32, 4096, 14_336], [32, 8, 128]),
    preset("Falcon3-1B", falcon3, [18, 2048, 8192], [8, 4, 256]),
    preset("Falcon3-3B", falcon3, [22, 3072, 9216], [12, 4, 256]),
    preset("Falcon3-7B", falcon3, [28, 3072, 23_040], [12, 4, 256]),
    preset("Falcon3-10B", falcon3, [40, 3072, 23_040], [12, 4, 256]),
    preset("100B", bitnet, [72, 8192, 45_568], [64, 64, 128]),
];

impl Preset {
    pub(super) fn config(&self) -> ModelConfig {
        let Self { layers, hidden, ffn, heads, kv_heads, head_dim, .. } = *self;
        ModelConfig { layers, hidden, ffn, heads, kv_heads, head_dim, ..(self.family)() }
    }
}
