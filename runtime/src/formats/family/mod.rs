//! Model families as Hugging Face directories describe them. A family is one file here and one row of [`FAMILIES`]:
//! how its `config.json` is read, and what its tensors are called.

mod bitnet;

use super::hf::ConfigFile;
use super::{FormatError, LayerNorm, ModelConfig, Projection};

/// What ternion has to know about a family.
pub(super) struct Family {
    /// The name in `architectures`.
    pub(super) architecture: &'static str,
    /// Reads the configuration; sizes are checked afterwards.
    pub(super) config: fn(&ConfigFile) -> Result<ModelConfig, FormatError>,
    /// What tensors are called.
    pub(super) names: TensorNames,
}

/// Names of tensors, without `.weight`.
pub(super) struct TensorNames {
    pub(super) embedding: &'static str,
    pub(super) final_norm: &'static str,
    pub(super) head: &'static str,
    /// What precedes `.0`, `.1` and so on.
    pub(super) layers: &'static str,
    pub(super) projection: fn(Projection) -> &'static str,
    pub(super) norm: fn(LayerNorm) -> &'static str,
}

/// All known families.
const FAMILIES: &[Family] = &[bitnet::FAMILY];

/// The family that `config.json` names.
///
/// # Errors
/// If it names none, or none that is known.
pub(super) fn find(config: &ConfigFile) -> Result<&'static Family, FormatError> {
    let named = config.architectures()?;
    FAMILIES.iter().find(|family| named.contains(&family.architecture)).ok_or_else(|| {
        FormatError::UnknownArchitecture {
            path: config.path().to_owned(),
            found: if named.is_empty() { "(none named)".to_owned() } else { named.join(", ") },
            known: FAMILIES.iter().map(|family| family.architecture).collect(),
        }
    })
}
