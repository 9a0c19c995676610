//! BitNet b1.58 2B4T and models of its architecture: `BitNetForCausalLM`.

use super::{Family, common, usual_norm};
use crate::formats::config_file::ConfigFile;
use crate::formats::{Activation, FormatError, ModelConfig};

const ARCHITECTURE: &str = "BitNetForCausalLM";

pub(super) const FAMILY: Family = Family {
    architecture: ARCHITECTURE,
    model_type: "bitnet",
    config,
    norm: usual_norm,
    bitnet: true,
    norms_add_one: false,
};

/// Defaults are those of the `transformers` class of this name.
fn config(file: &ConfigFile) -> Result<ModelConfig, FormatError> {
    let activation = Activation::Relu2;
    let default = ModelConfig { rope_theta: 500_000.0, activation, sub_norms: true, ..ModelConfig::default() };
    common(file, ARCHITECTURE, default)
}
