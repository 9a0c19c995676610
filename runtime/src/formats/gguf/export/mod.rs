//! Writing a GGUF file: the trits as they are, in a type of one's choice, for other engines to read.
//!
//! A type's own scale is an f16, except for I2_S. Where that would round a matrix's multiplier, BitNet architectures
//! get trits of magnitude 1 and the multiplier as a tensor `<projection>.scale`; other architectures have no place
//! for it, and [`ExportSummary::rounded_scales`] counts what was lost.

mod encode;
mod metadata;

use std::fmt;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::ControlFlow;
use std::path::Path;

use half::f16;
use ternion_compiler::Layout;
use ternion_kernels_ref::{PackedMatrix, TernaryMatrix};

use super::architecture::{self, Architecture, norm_name, projection_name};
use super::container::{ALIGNMENT, MAGIC};
use super::ternary::permuted_row;
use super::types::TensorType;
use crate::formats::rows::encode_row;
use crate::formats::tern::temporary_beside;
use crate::formats::{
    Checkpoint, FloatMatrix, FloatType, FormatError, LayerNorm, ModelConfig, Projection, RopeScaling, RowType,
    TernaryTensor,
};

/// How ternary matrices are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TernaryType {
    /// 2.06 bits per weight; read by llama.cpp. Rows are multiples of 256.
    Tq2_0,
    /// 1.69 bits per weight; read by llama.cpp. Rows are multiples of 256.
    Tq1_0,
    /// 2 bits per weight; read by bitnet.cpp. Matrices are multiples of 128 weights.
    I2S,
    /// 16 bits per weight; read by everything.
    F16,
}

impl TernaryType {
    const fn tensor_type(self) -> TensorType {
        match self {
            Self::Tq2_0 => TensorType::Tq2_0,
            Self::Tq1_0 => TensorType::Tq1_0,
            Self::I2S => TensorType::I2S,
            Self::F16 => TensorType::Float(FloatType::F16),
        }
    }

    /// `general.file_type`
    const fn file_type(self) -> usize {
        match self {
            Self::F16 => 1,
            Self::Tq1_0 => 36,
            Self::Tq2_0 => 37,
            Self::I2S => 40,
        }
    }

    /// Why a matrix cannot be of this type, and what to do.
    fn refusal(self, m: usize, k: usize) -> Option<String> {
        match self {
            Self::Tq2_0 | Self::Tq1_0 if !k.is_multiple_of(256) => {
                Some(format!("has rows of {k} weights and {self} needs multiples of 256: export as i2_s or f16"))
            }
            Self::I2S if !(m * k).is_multiple_of(128) || !k.is_multiple_of(4) => {
                Some(format!("has {m} rows of {k} weights and {self} needs multiples of 128: export as f16"))
            }
            _ => None,
        }
    }
}

impl fmt::Display for TernaryType {
    /// As the command line has it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tq2_0 => "tq2_0",
            Self::Tq1_0 => "tq1_0",
            Self::I2S => "i2_s",
            Self::F16 => "f16",
        })
    }
}

/// How the embedding and the head are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TokenRowType {
    /// In the type that the model has them in, exactly.
    #[default]
    Own,
    /// Rounded to f16.
    F16,
    /// Rounded to Q8_0, 8.5 bits per weight. Rows are multiples of 32.
    Q8_0,
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExportSummary {
    /// Length of the file.
    pub bytes: u64,
    /// Number of tensors.
    pub tensors: usize,
    /// Number of ternary matrices whose multiplier was rounded to f16.
    pub rounded_scales: usize,
}

/// Writes `model` as a GGUF file at `path`, replacing what is there. `progress(done, total)` is told the bytes written
/// and all bytes, and cancels by returning [`ControlFlow::Break`].
///
/// # Errors
/// If the model cannot be read, GGUF has no way to say what it is, or the file cannot be written. Then nothing is
/// left behind, and a file that was there before is untouched.
pub fn export(
    model: &Checkpoint,
    path: &Path,
    ternary: TernaryType,
    token_rows: TokenRowType,
    progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<ExportSummary, FormatError> {
    model.verify_checksums()?;
    let architecture = architecture_of(model)?;
    let tensors = plan(model, architecture, ternary, token_rows)?;
    let metadata = metadata::metadata(model, architecture, ternary)?;
    let head = front(&metadata, &tensors);
    let total = tensors.iter().fold(head.len() as u64, |end, tensor| padded(end) + tensor.bytes as u64);

    let failed = |source| FormatError::Write { path: path.to_owned(), source };
    let mut temporary = temporary_beside(path).map_err(failed)?;
    let mut file = BufWriter::with_capacity(1 << 20, temporary.as_file_mut());
    let mut done = 0u64;
    let mut rounded_scales = 0;
    let mut put = |file: &mut BufWriter<&mut File>, bytes: &[u8]| {
        // Every tensor starts at a multiple of the alignment, and so does the first.
        let padding = (padded(done) - done) as usize;
        file.write_all(&[0; ALIGNMENT as usize][..padding]).and_then(|()| file.write_all(bytes)).map_err(failed)?;
        done += (padding + bytes.len()) as u64;
        match progress(done, total) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(FormatError::Cancelled { path: path.to_owned() }),
        }
    };
    put(&mut file, &head)?;
    for tensor in &tensors {
        let (bytes, rounded) = tensor.encode(model, architecture, ternary)?;
        rounded_scales += usize::from(rounded);
        if bytes.len() != tensor.bytes {
            let problem = "changed while it was read".to_owned();
            return Err(FormatError::Tensor { path: model.path().to_owned(), tensor: tensor.name.clone(), problem });
        }
        put(&mut file, &bytes)?;
    }
    file.flush().map_err(failed)?;
    drop(file);
    temporary.as_file().sync_all().map_err(failed)?;
    temporary.persist(path).map_err(|error| failed(error.error))?;
    Ok(ExportSummary { bytes: total, tensors: tensors.len(), rounded_scales })
}

const fn padded(at: u64) -> u64 {
    at.next_multiple_of(ALIGNMENT)
}

/// The architecture that says what the model is.
fn architecture_of(model: &Checkpoint) -> Result<&'static Architecture, FormatError> {
    let config = model.config();
    let unsupported = |what: String| FormatError::Unsupported { path: model.path().to_owned(), what };
    let architecture = architecture::for_export(config)
        .ok_or_else(|| unsupported(format!("no GGUF architecture is like {}", config.architecture)))?;
    // Read back, the file must say what the model is.
    let gemma = architecture.name == "gemma3";
    let scale = if gemma { (config.hidden as f32).sqrt() } else { 1.0 };
    if config.embedding_scale != scale || config.sliding.is_some() && !gemma {
        return Err(unsupported(format!("GGUF's {} has no such embedding scale or sliding window", architecture.name)));
    }
    if config.projection_norm_eps.is_some_and(|eps| eps != config.norm_eps) {
        return Err(unsupported("norms in front of projections with an epsilon of their own".to_owned()));
    }
    Ok(architecture)
}

/// A tensor to be written.
struct Tensor {
    name: String,
    content: Content,
    kind: TensorType,
    /// Rows first.
    shape: Vec<usize>,
    bytes: usize,
}

#[derive(Clone, Copy)]
enum Content {
    Embedding,
    Head,
    FinalNorm,
    Norm(usize, LayerNorm),
    Bias(usize, Projection),
    Projection(usize, Projection),
    Scale(usize, Projection),
    RopeFactors,
}

fn plan(
    model: &Checkpoint,
    architecture: &Architecture,
    ternary: TernaryType,
    token_rows: TokenRowType,
) -> Result<Vec<Tensor>, FormatError> {
    let config = model.config();
    let mut tensors = Vec::new();
    let mut push = |name: String, content, kind: TensorType, shape: Vec<usize>| {
        let row = shape.last().copied().unwrap_or(1);
        let bytes = kind.bytes(row, shape.iter().product());
        let problem = format!("has rows of {row} weights, which {kind} cannot hold: choose another type for them");
        let path = model.path().to_owned();
        let bytes = bytes.ok_or_else(|| FormatError::Tensor { path, tensor: name.clone(), problem })?;
        tensors.push(Tensor { name, content, kind, shape, bytes });
        Ok::<_, FormatError>(())
    };
    let f32 = TensorType::Float(FloatType::F32);
    let token_type = |matrix: &FloatMatrix| match token_rows {
        // What GGUF has no type for, f32 holds exactly.
        TokenRowType::Own => TensorType::of_rows(matrix.dtype).unwrap_or(f32),
        TokenRowType::F16 => TensorType::Float(FloatType::F16),
        TokenRowType::Q8_0 => TensorType::Q8_0,
    };
    let embedding = model.embedding()?;
    let shape = vec![embedding.rows, embedding.columns];
    push("token_embd.weight".to_owned(), Content::Embedding, token_type(&embedding), shape.clone())?;
    push("output_norm.weight".to_owned(), Content::FinalNorm, f32, vec![config.hidden])?;
    if let Some(head) = model.head()? {
        push("output.weight".to_owned(), Content::Head, token_type(&head), shape)?;
    }
    if matches!(config.rope_scaling, RopeScaling::Llama3 { .. } | RopeScaling::Factors { .. }) {
        push("rope_freqs.weight".to_owned(), Content::RopeFactors, f32, vec![config.head_dim / 2])?;
    }
    for layer in 0..config.layers {
        for norm in LayerNorm::ALL {
            let width = norm.width(config);
            if width > 0 {
                push(format!("{}.weight", norm_name(layer, norm)), Content::Norm(layer, norm), f32, vec![width])?;
            }
        }
        for projection in Projection::ALL {
            let (m, k) = projection.shape(config);
            let name = format!("{}.weight", projection_name(layer, projection));
            if let Some(problem) = ternary.refusal(m, k) {
                return Err(FormatError::Tensor { path: model.path().to_owned(), tensor: name, problem });
            }
            push(name, Content::Projection(layer, projection), ternary.tensor_type(), vec![m, k])?;
            if has_scale_tensor(architecture, ternary, &model.projection(layer, projection)?) {
                let name = format!("{}.scale", projection_name(layer, projection));
                push(name, Content::Scale(layer, projection), f32, vec![1])?;
            }
            if projection.has_bias(config) {
                let name = format!("{}.bias", projection_name(layer, projection));
                push(name, Content::Bias(layer, projection), f32, vec![m])?;
            }
        }
    }
    Ok(tensors)
}

fn is_exact(scale: f32) -> bool {
    f16::from_f32(scale).to_f32() == scale
}

/// Whether a matrix's multiplier is a tensor of its own, because the type would round it.
fn has_scale_tensor(architecture: &Architecture, ternary: TernaryType, tensor: &TernaryTensor) -> bool {
    architecture.bitnet && ternary != TernaryType::I2S && !is_exact(tensor.scale)
}

/// Magic, version, counts, metadata, tensor table.
fn front(metadata: &metadata::Metadata, tensors: &[Tensor]) -> Vec<u8> {
    let mut front = MAGIC.to_vec();
    front.extend(3u32.to_le_bytes());
    front.extend((tensors.len() as u64).to_le_bytes());
    front.extend(metadata.count.to_le_bytes());
    front.extend(&metadata.bytes);
    let mut offset = 0u64;
    for tensor in tensors {
        metadata::push_string(&mut front, &tensor.name);
        front.extend((tensor.shape.len() as u32).to_le_bytes());
        front.extend(tensor.shape.iter().rev().flat_map(|size| (*size as u64).to_le_bytes()));
        front.extend(tensor.kind.id().to_le_bytes());
        offset = padded(offset);
        front.extend(offset.to_le_bytes());
        offset += tensor.bytes as u64;
    }
    front.resize(front.len().next_multiple_of(ALIGNMENT as usize), 0);
    front
}

impl Tensor {
    /// The bytes, and whether a multiplier was rounded.
    fn encode(
        &self,
        model: &Checkpoint,
        architecture: &Architecture,
        ternary: TernaryType,
    ) -> Result<(Vec<u8>, bool), FormatError> {
        let config = model.config();
        let bytes = match self.content {
            Content::Embedding => self.encode_rows(&model.embedding()?, model)?,
            Content::Head => model.head()?.map_or_else(|| Ok(Vec::new()), |head| self.encode_rows(&head, model))?,
            Content::FinalNorm => floats(&model.final_norm()?),
            Content::Norm(layer, norm) => floats(&model.norm(layer, norm)?),
            Content::RopeFactors => floats(&rope_factors(config)),
            Content::Scale(layer, projection) => floats(&[model.projection(layer, projection)?.scale]),
            Content::Bias(layer, projection) => {
                let bias = model.bias(layer, projection)?;
                floats(
                    &file_rows(bias.len(), architecture, projection, config).map(|row| bias[row]).collect::<Vec<_>>(),
                )
            }
            Content::Projection(layer, projection) => {
                let tensor = model.projection(layer, projection)?;
                let invalid = |invalid| FormatError::invalid_code(model.path(), &self.name, invalid);
                let matrix = tensor.to_matrix().map_err(invalid)?;
                let matrix = permute(matrix, architecture, projection, config);
                let apart = has_scale_tensor(architecture, ternary, &tensor);
                let factor = if apart { 1.0 } else { tensor.scale };
                let rounded = ternary != TernaryType::I2S && !is_exact(factor);
                return Ok((encode::encode(ternary, matrix.view(), factor), rounded));
            }
        };
        Ok((bytes, false))
    }

    /// The rows of an embedding or head in this tensor's type.
    fn encode_rows(&self, matrix: &FloatMatrix, model: &Checkpoint) -> Result<Vec<u8>, FormatError> {
        let kind = self.kind.rows().unwrap_or(RowType::F32);
        if kind == matrix.dtype {
            return Ok(matrix.bytes.to_vec());
        }
        let mut bytes = Vec::with_capacity(matrix.rows * kind.row_bytes(matrix.columns));
        let mut row = vec![0.0; matrix.columns];
        for at in 0..matrix.rows {
            matrix.widen_row(at, &mut row);
            encode_row(kind, &row, &mut bytes).map_err(|column| FormatError::InvalidValue {
                path: model.path().to_owned(),
                tensor: self.name.clone(),
                row: at,
                column,
                value: row[column],
                expected: "a number that the chosen type can hold",
            })?;
        }
        Ok(bytes)
    }
}

/// Which of the model's rows each row of the file is.
fn file_rows(
    m: usize,
    architecture: &Architecture,
    projection: Projection,
    config: &ModelConfig,
) -> impl Iterator<Item = usize> {
    let permuted = architecture.permuted && matches!(projection, Projection::Query | Projection::Key);
    let mut rows: Vec<usize> = (0..m).collect();
    if permuted {
        for row in 0..m {
            rows[permuted_row(row, config.head_dim)] = row;
        }
    }
    rows.into_iter()
}

fn permute(
    matrix: TernaryMatrix,
    architecture: &Architecture,
    projection: Projection,
    config: &ModelConfig,
) -> TernaryMatrix {
    let (m, k) = (matrix.view().m(), matrix.view().k());
    let mut bytes = Vec::with_capacity(m * PackedMatrix::row_bytes(k));
    for row in file_rows(m, architecture, projection, config) {
        bytes.extend_from_slice(matrix.view().row(row));
    }
    Layout::Canonical.unpack(m, k, &bytes).expect("rows of a valid matrix")
}

/// What llama.cpp divides frequencies by.
fn rope_factors(config: &ModelConfig) -> Vec<f32> {
    let plain = ModelConfig { rope_scaling: RopeScaling::None, ..config.clone() };
    // Layers with a window are never scaled, and never the last.
    let last = config.layers - 1;
    plain.inverse_frequencies(last).iter().zip(config.inverse_frequencies(last)).map(|(f, scaled)| f / scaled).collect()
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}
