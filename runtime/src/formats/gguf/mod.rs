//! GGUF files of bitnet.cpp and llama.cpp, versions 2 and 3, read as they lie in one mapped file.
//!
//! [`container`] checks the file's structure, [`architecture`] makes a configuration of its metadata,
//! [`vocabulary`] a `tokenizer.json`, [`ternary`] decodes matrices. [`export()`] writes such files.

mod architecture;
pub(in crate::formats) mod container;
mod export;
mod ternary;
mod types;
mod vocabulary;

pub use export::{ExportSummary, TernaryType, TokenRowType, export};
pub use ternary::I2sLayout;

use std::path::Path;
use std::sync::OnceLock;

use architecture::{Architecture, norm_name, projection_name};
use container::{Container, TensorInfo, Value};
use safetensors::Dtype;
use types::TensorType;

use super::dress::{self, Masters, ScaleConvention};
use super::safetensors::RawTensor;
use super::{
    Bytes, FloatMatrix, FloatType, FormatError, GenerationDefaults, LayerNorm, ModelConfig, OpenOptions, Projection,
    TernaryTensor,
};
use crate::text::TokenizerConfig;

/// A scale above this many times the others, or below, is taken for the reciprocal of one.
const IMPLAUSIBLE: f32 = 16.0;

/// An opened GGUF file. Tensors are read when asked for.
pub(super) struct Gguf {
    container: Container,
    architecture: &'static Architecture,
    pub(super) config: ModelConfig,
    pub(super) generation: GenerationDefaults,
    pub(super) tokenizer: TokenizerConfig,
    pub(super) chat_template: Option<String>,
    pub(super) notes: Vec<String>,
    options: OpenOptions,
    tokenizer_json: OnceLock<Bytes>,
}

impl Gguf {
    pub(super) fn open(path: &Path, bytes: &Bytes, options: &OpenOptions) -> Result<Self, FormatError> {
        let container = Container::open(path, bytes)?;
        let architecture = architecture::find(&container)?;
        let (mut config, disguised) = architecture::config(&container, architecture)?;
        let mut notes = Vec::new();
        match options.activation {
            Some(activation) => config.activation = activation,
            None if disguised => notes.push(format!(
                "the file says {}, but its sizes are those of a bitnet_b1_58 community model: it runs with SiLU; choose \
                 another (--activation) if the text is nonsense",
                architecture.name
            )),
            None => {}
        }
        let vocabulary::Words { tokenizer, chat_template, generation } =
            vocabulary::words(&container, &config, &mut notes)?;
        let model = Self {
            container,
            architecture,
            config,
            generation,
            tokenizer,
            chat_template,
            notes,
            options: options.clone(),
            tokenizer_json: OnceLock::new(),
        };
        Ok(Self { notes: [model.notes.clone(), model.implausible_scales()].concat(), ..model })
    }

    /// A note if scales look like reciprocals: converters of bitnet.cpp and llama.cpp wrote such files.
    fn implausible_scales(&self) -> Vec<String> {
        let places = (0..self.config.layers).flat_map(|layer| Projection::ALL.map(|projection| (layer, projection)));
        let mut scales: Vec<f32> = places
            .filter_map(|(layer, projection)| {
                let module = projection_name(layer, projection);
                let info = self.container.tensors.get(&format!("{module}.weight"))?;
                let own = ternary::scale_at_a_glance(info.kind, &info.bytes)?;
                let scale = own * self.scale_beside(&module).unwrap_or(None).unwrap_or(1.0);
                Some(if self.options.invert_scale { 1.0 / scale } else { scale })
            })
            .collect();
        scales.sort_unstable_by(f32::total_cmp);
        let Some(median) = scales.get(scales.len() / 2).copied() else { return Vec::new() };
        let odd = scales.iter().filter(|s| (**s / median).max(median / **s) > IMPLAUSIBLE).count();
        if median > 1.0 {
            vec![format!(
                "its scales are around {median}, but those of a ternary model are means of weights and below 1: if the \
                 text is nonsense, open it with inverted scales (--invert-scale)"
            )]
        } else if odd > 0 {
            vec![format!("{odd} of its {} scales are far from the usual {median}: it may be damaged", scales.len())]
        } else {
            Vec::new()
        }
    }

    pub(super) fn options(&self) -> &OpenOptions {
        &self.options
    }

    fn tensor(&self, name: &str) -> Result<&TensorInfo, FormatError> {
        self.container
            .tensors
            .get(name)
            .ok_or_else(|| FormatError::MissingTensor { path: self.container.path.clone(), tensor: name.to_owned() })
    }

    fn problem(&self, tensor: &str, problem: String) -> FormatError {
        FormatError::Tensor { path: self.container.path.clone(), tensor: tensor.to_owned(), problem }
    }

    /// A tensor of plain floats, as the safetensors reader has them.
    fn raw(&self, name: &str, info: &TensorInfo) -> Result<RawTensor, FormatError> {
        let dtype = match info.kind {
            TensorType::Float(FloatType::F32) => Dtype::F32,
            TensorType::Float(FloatType::F16) => Dtype::F16,
            TensorType::Float(FloatType::Bf16) => Dtype::BF16,
            other => {
                return Err(FormatError::WrongType {
                    path: self.container.path.clone(),
                    tensor: name.to_owned(),
                    found: other.to_string(),
                    expected: "F32, F16 or BF16",
                });
            }
        };
        Ok(RawTensor {
            path: self.container.path.clone(),
            name: name.to_owned(),
            dtype,
            shape: info.shape.clone(),
            bytes: info.bytes.clone(),
        })
    }

    fn floats(&self, name: &str, width: usize) -> Result<Vec<f32>, FormatError> {
        self.raw(name, self.tensor(name)?)?.floats(&[width])
    }

    pub(super) fn projection(&self, layer: usize, projection: Projection) -> Result<TernaryTensor, FormatError> {
        let module = projection_name(layer, projection);
        let name = format!("{module}.weight");
        let (m, k) = projection.shape(&self.config);
        let info = self.tensor(&name)?;
        let mut tensor = if matches!(info.kind, TensorType::Float(_)) {
            let masters = if self.architecture.bitnet { Masters::Quantised } else { Masters::Refused };
            let raw = self.raw(&name, info)?;
            dress::ternary(&raw, self.raw_scale_beside(&module)?, (m, k), ScaleConvention::Direct, masters)?
        } else {
            if info.shape != [m, k] {
                return Err(FormatError::WrongShape {
                    path: self.container.path.clone(),
                    tensor: name,
                    found: info.shape.clone(),
                    expected: vec![m, k],
                });
            }
            let (matrix, own) = ternary::decode(info.kind, (m, k), &info.bytes, self.options.i2s_layout)
                .map_err(|problem| self.problem(&name, problem))?;
            ternary::tensor(matrix, own * self.scale_beside(&module)?.unwrap_or(1.0))
        };
        if self.options.invert_scale {
            tensor.scale = 1.0 / tensor.scale;
        }
        if !(tensor.scale.is_normal() && tensor.scale > 0.0) {
            return Err(self.problem(&name, format!("has the scale {}, not a positive number", tensor.scale)));
        }
        if let Some(heads) = self.permuted_heads(projection) {
            let matrix = tensor.to_matrix().map_err(|_| self.problem(&name, "holds code 3".to_owned()))?;
            tensor = ternary::tensor(ternary::unpermute_rows(matrix, heads), tensor.scale);
        }
        Ok(tensor)
    }

    /// The tensor `<projection>.scale`, if there is one.
    fn raw_scale_beside(&self, module: &str) -> Result<Option<RawTensor>, FormatError> {
        let name = format!("{module}.scale");
        self.container.tensors.get(&name).map(|info| self.raw(&name, info)).transpose()
    }

    /// What a tensor `<projection>.scale` multiplies the weights by, if there is one.
    fn scale_beside(&self, module: &str) -> Result<Option<f32>, FormatError> {
        self.raw_scale_beside(module)?.map(|scale| dress::weight_scale(&scale)).transpose()
    }

    /// Number of heads of a projection whose rows are permuted.
    fn permuted_heads(&self, projection: Projection) -> Option<usize> {
        match projection {
            Projection::Query if self.architecture.permuted => Some(self.config.heads),
            Projection::Key if self.architecture.permuted => Some(self.config.kv_heads),
            _ => None,
        }
    }

    pub(super) fn bias(&self, layer: usize, projection: Projection) -> Result<Vec<f32>, FormatError> {
        let (m, _) = projection.shape(&self.config);
        let file = self.floats(&format!("{}.bias", projection_name(layer, projection)), m)?;
        if self.permuted_heads(projection).is_none() {
            return Ok(file);
        }
        Ok((0..m).map(|row| file[ternary::permuted_row(row, self.config.head_dim)]).collect())
    }

    pub(super) fn norm(&self, layer: usize, norm: LayerNorm) -> Result<Vec<f32>, FormatError> {
        self.floats(&format!("{}.weight", norm_name(layer, norm)), norm.width(&self.config))
    }

    pub(super) fn final_norm(&self) -> Result<Vec<f32>, FormatError> {
        self.floats("output_norm.weight", self.config.hidden)
    }

    pub(super) fn embedding(&self) -> Result<FloatMatrix, FormatError> {
        self.token_rows("token_embd.weight")
    }

    pub(super) fn head(&self) -> Result<Option<FloatMatrix>, FormatError> {
        if self.config.tied_head { Ok(None) } else { self.token_rows("output.weight").map(Some) }
    }

    fn token_rows(&self, name: &str) -> Result<FloatMatrix, FormatError> {
        let info = self.tensor(name)?;
        let (rows, columns) = (self.config.vocabulary, self.config.hidden);
        if info.shape != [rows, columns] {
            return Err(FormatError::WrongShape {
                path: self.container.path.clone(),
                tensor: name.to_owned(),
                found: info.shape.clone(),
                expected: vec![rows, columns],
            });
        }
        let dtype = info.kind.rows().ok_or_else(|| FormatError::WrongType {
            path: self.container.path.clone(),
            tensor: name.to_owned(),
            found: info.kind.to_string(),
            expected: "F32, F16, BF16, Q4_0, Q8_0, Q4_K or Q6_K",
        })?;
        Ok(FloatMatrix { rows, columns, dtype, bytes: info.bytes.clone() })
    }

    /// A `tokenizer.json` made of the file's vocabulary.
    pub(super) fn tokenizer_json(&self) -> Result<Bytes, FormatError> {
        if let Some(json) = self.tokenizer_json.get() {
            return Ok(json.clone());
        }
        let json = vocabulary::tokenizer_json(&self.container)?;
        Ok(self.tokenizer_json.get_or_init(|| Bytes::from(json)).clone())
    }
}

impl Container {
    /// A flag of the metadata.
    fn flag(&self, key: &str) -> Result<Option<bool>, FormatError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(_) => Err(self.field(key, "is neither true nor false".to_owned())),
        }
    }
}
