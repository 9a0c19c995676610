//! Llama layers with ternary projections: Llama3-8B-1.58, Falcon3-1.58bit, Falcon-E.

use super::{Family, common, usual_norm};
use crate::formats::config_file::ConfigFile;
use crate::formats::{FormatError, ModelConfig};

const ARCHITECTURE: &str = "LlamaForCausalLM";

pub(super) const FAMILY: Family = Family {
    architecture: ARCHITECTURE,
    model_type: "llama",
    config,
    norm: usual_norm,
    bitnet: false,
    norms_add_one: false,
};

/// Defaults are those of the `transformers` class of this name.
fn config(file: &ConfigFile) -> Result<ModelConfig, FormatError> {
    common(file, ARCHITECTURE, ModelConfig { norm_eps: 1e-6, ..ModelConfig::default() })
}
