//! Writing a Hugging Face directory: packed safetensors, as `transformers` loads them.
//!
//! The trits and their multipliers are written exactly: norms and multipliers as bf16 where that holds them, as f32
//! where it does not. The linear class is `autobitlinear`, whose multipliers multiply, unless the model has biases: those
//! `transformers` would multiply as well, so the class is `bitlinear` then and the multipliers' reciprocals are written.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::ops::ControlFlow;
use std::path::Path;

use half::bf16;
use serde_json::{Map, Value, json};
use ternion_compiler::layout::transpose_codes;

use super::dress::ScaleConvention;
use super::family::{self, Family};
use super::{
    Activation, Bytes, Checkpoint, FloatMatrix, FloatType, FormatError, LayerNorm, ModelConfig, Projection,
    RopeScaling, RowType, TernaryTensor,
};

/// Writes `model` as a new directory at `path`; returns its size in bytes. `progress(done, total)` is told the bytes
/// of the weights file written and all of them, and cancels by returning [`ControlFlow::Break`].
///
/// # Errors
/// If the model cannot be read, is of no family that `transformers` knows, there is something at `path`, or writing
/// fails. Then nothing is left behind.
pub fn export(
    model: &Checkpoint,
    path: &Path,
    progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<u64, FormatError> {
    model.verify_checksums()?;
    let config = model.config();
    let unsupported = |what: String| FormatError::Unsupported { path: model.path().to_owned(), what };
    let family = family::in_transformers(&config.architecture)
        .ok_or_else(|| unsupported(format!("no Hugging Face family is called {}", config.architecture)))?;
    if matches!(config.rope_scaling, RopeScaling::Factors { .. }) {
        return Err(unsupported("a rotary divisor for each frequency has no place in a config.json".to_owned()));
    }
    let failed = |source| FormatError::Write { path: path.to_owned(), source };
    if path.exists() {
        return Err(failed(io::Error::other("there is something already")));
    }
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !parent.is_dir() {
        return Err(failed(io::Error::new(io::ErrorKind::NotFound, "there is no such directory")));
    }
    let directory = tempfile::Builder::new().prefix(".ternion-").tempdir_in(parent).map_err(failed)?;
    let put = |name: &str, content: &[u8]| std::fs::write(directory.path().join(name), content).map_err(failed);
    let pretty = |json: &Value| format!("{json:#}\n").into_bytes();
    put("config.json", &pretty(&config_json(model, family)))?;
    put("generation_config.json", &pretty(&generation_json(model)))?;
    put("tokenizer_config.json", &pretty(&tokenizer_config_json(model)))?;
    put("tokenizer.json", &model.tokenizer_json()?)?;
    let tensors = plan(model, family)?;
    let file = File::create(directory.path().join("model.safetensors")).map_err(failed)?;
    let bytes = write_safetensors(model, &tensors, file, path, progress)?;
    // A temporary directory is private; a model is an ordinary one.
    #[cfg(unix)]
    std::fs::set_permissions(directory.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).map_err(failed)?;
    std::fs::rename(directory.path(), path).map_err(failed)?;
    Ok(bytes)
}

/// What a `weight_scale` is to the model's multiplier.
fn convention(config: &ModelConfig) -> ScaleConvention {
    let biases = Projection::ALL.into_iter().any(|projection| projection.has_bias(config));
    if biases { ScaleConvention::Inverse } else { ScaleConvention::Direct }
}

fn config_json(model: &Checkpoint, family: &Family) -> Value {
    let config = model.config();
    let linear_class = match convention(config) {
        ScaleConvention::Direct => "autobitlinear",
        ScaleConvention::Inverse => "bitlinear",
    };
    let activation = match config.activation {
        Activation::Relu2 => "relu2",
        Activation::Silu => "silu",
        Activation::GeluTanh => "gelu_pytorch_tanh",
    };
    let scaling = match &config.rope_scaling {
        RopeScaling::None | RopeScaling::Factors { .. } => Value::Null,
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Llama3 { factor, low, high, original_context } => json!({
            "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
            "original_max_position_embeddings": original_context,
        }),
    };
    let mut json = json!({
        "architectures": [family.architecture], "model_type": family.model_type, "hidden_size": config.hidden,
        "intermediate_size": config.ffn, "num_hidden_layers": config.layers, "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim, "vocab_size": config.vocabulary,
        "max_position_embeddings": config.context, "rope_theta": config.rope_theta, "rope_scaling": scaling,
        "rms_norm_eps": shortest(config.norm_eps), "hidden_act": activation,
        "tie_word_embeddings": config.tied_head, "attention_bias": config.biases.qkv, "mlp_bias": config.biases.ffn,
        "bos_token_id": model.generation().bos, "eos_token_id": model.generation().eos, "torch_dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "bitnet", "linear_class": linear_class, "quantization_mode": "offline",
            "modules_to_not_convert": ["lm_head"],
        },
    });
    if config.post_norms {
        json["hidden_activation"] = activation.into();
        json["query_pre_attn_scalar"] = config.head_dim.into();
    }
    if let Some(eps) = config.projection_norm_eps {
        json["quantization_config"]["use_rms_norm"] = true.into();
        json["quantization_config"]["rms_norm_eps"] = shortest(eps);
    }
    if let Some(sliding) = &config.sliding {
        let kind = |layer: usize| match sliding.layers.binary_search(&layer) {
            Ok(_) => "sliding_attention",
            Err(_) => "full_attention",
        };
        json["sliding_window"] = sliding.window.into();
        json["rope_local_base_freq"] = sliding.rope_theta.into();
        json["use_sliding_window"] = true.into();
        json["layer_types"] = (0..config.layers).map(kind).collect();
    }
    json
}

/// The shortest decimal that gives this number back.
fn shortest(value: f32) -> Value {
    value.to_string().parse::<f64>().map_or(Value::Null, Value::from)
}

fn generation_json(model: &Checkpoint) -> Value {
    let generation = model.generation();
    let mut json = Map::new();
    for (key, value) in [
        ("do_sample", generation.do_sample.map(Value::from)),
        ("temperature", generation.temperature.map(shortest)),
        ("top_k", generation.top_k.map(Value::from)),
        ("top_p", generation.top_p.map(shortest)),
        ("min_p", generation.min_p.map(shortest)),
        ("repetition_penalty", generation.repetition_penalty.map(shortest)),
        ("max_length", generation.max_length.map(Value::from)),
        ("bos_token_id", generation.bos.map(Value::from)),
        ("eos_token_id", (!generation.eos.is_empty()).then(|| generation.eos.clone().into())),
    ] {
        json.extend(value.map(|value| (key.to_owned(), value)));
    }
    json.into()
}

fn tokenizer_config_json(model: &Checkpoint) -> Value {
    let tokenizer = model.tokenizer_config();
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": false,
        "add_bos_token": tokenizer.add_bos, "add_eos_token": tokenizer.add_eos.unwrap_or(false),
        "bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token, "chat_template": model.chat_template(),
        "model_max_length": model.config().context,
    })
}

struct Tensor {
    name: String,
    content: Content,
    dtype: &'static str,
    shape: Vec<usize>,
    bytes: usize,
}

enum Content {
    Embedding,
    Head,
    /// Small ones are kept: reading them told their type.
    Floats(Vec<f32>, FloatType),
    Packed(usize, Projection),
}

fn plan(model: &Checkpoint, family: &Family) -> Result<Vec<Tensor>, FormatError> {
    let config = model.config();
    let mut tensors = Vec::new();
    let (embedding, head) = model.token_row_types()?;
    let shape = [config.vocabulary, config.hidden];
    let mut rows = |name: &str, content, dtype: FloatType| {
        let bytes = shape[0] * shape[1] * dtype.bytes();
        tensors.push(Tensor { name: name.to_owned(), content, dtype: type_name(dtype), shape: shape.into(), bytes });
    };
    // What safetensors has no type for, f32 holds exactly.
    let plain = |kind: RowType| kind.plain().unwrap_or(FloatType::F32);
    rows("model.embed_tokens.weight", Content::Embedding, plain(embedding));
    if let Some(head) = head {
        rows("lm_head.weight", Content::Head, plain(head));
    }
    let mut floats = |name: String, values: Vec<f32>| {
        let exact = values.iter().all(|value| bf16::from_f32(*value).to_f32() == *value);
        let dtype = if exact { FloatType::Bf16 } else { FloatType::F32 };
        let (shape, bytes) = (vec![values.len()], values.len() * dtype.bytes());
        tensors.push(Tensor { name, content: Content::Floats(values, dtype), dtype: type_name(dtype), shape, bytes });
    };
    floats("model.norm.weight".to_owned(), own_norm(model, family, "model.norm.weight", model.final_norm()?)?);
    let mut packed = Vec::new();
    for layer in 0..config.layers {
        for norm in LayerNorm::ALL.into_iter().filter(|norm| norm.width(config) > 0) {
            let weights = model.norm(layer, norm)?;
            if let LayerNorm::Projection(projection) = norm {
                floats(format!("model.layers.{layer}.{projection}.rms_norm.weight"), weights);
            } else {
                let name = format!("model.layers.{layer}.{}.weight", (family.norm)(norm));
                let weights = own_norm(model, family, &name, weights)?;
                floats(name, weights);
            }
        }
        for projection in Projection::ALL {
            let module = format!("model.layers.{layer}.{projection}");
            let (m, k) = projection.shape(config);
            let name = format!("{module}.weight_scale");
            let scale = weight_scale(model, &name, model.projection(layer, projection)?.scale)?;
            floats(name, vec![scale]);
            if projection.has_bias(config) {
                floats(format!("{module}.bias"), model.bias(layer, projection)?);
            }
            packed.push(Tensor {
                name: format!("{module}.weight"),
                content: Content::Packed(layer, projection),
                dtype: "U8",
                shape: vec![m.div_ceil(4), k],
                bytes: m.div_ceil(4) * k,
            });
        }
    }
    tensors.extend(packed);
    Ok(tensors)
}

/// A multiplier as the file has it, such that reading gives it back.
fn weight_scale(model: &Checkpoint, name: &str, scale: f32) -> Result<f32, FormatError> {
    if convention(model.config()) == ScaleConvention::Direct {
        return Ok(scale);
    }
    let near = 1.0 / scale;
    [near, near.next_down(), near.next_up()].into_iter().find(|near| 1.0 / near == scale).ok_or_else(|| {
        let problem = format!("would have to be the reciprocal of {scale}, which no number is: export as GGUF");
        FormatError::Tensor { path: model.path().to_owned(), tensor: name.to_owned(), problem }
    })
}

/// A norm of the family's own as its files hold it.
fn own_norm(model: &Checkpoint, family: &Family, name: &str, weights: Vec<f32>) -> Result<Vec<f32>, FormatError> {
    if !family.norms_add_one {
        return Ok(weights);
    }
    let without_one: Vec<f32> = weights.iter().map(|weight| weight - 1.0).collect();
    if without_one.iter().zip(&weights).all(|(without, weight)| without + 1.0 == *weight) {
        return Ok(without_one);
    }
    let problem = "cannot be written without its 1 exactly: export as GGUF".to_owned();
    Err(FormatError::Tensor { path: model.path().to_owned(), tensor: name.to_owned(), problem })
}

const fn type_name(dtype: FloatType) -> &'static str {
    match dtype {
        FloatType::Bf16 => "BF16",
        FloatType::F16 => "F16",
        FloatType::F32 => "F32",
    }
}

fn write_safetensors(
    model: &Checkpoint,
    tensors: &[Tensor],
    file: File,
    path: &Path,
    progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<u64, FormatError> {
    let failed = |source| FormatError::Write { path: path.to_owned(), source };
    let (mut header, mut end) = (Map::new(), 0);
    header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    for tensor in tensors {
        let offsets = [end, end + tensor.bytes];
        end = offsets[1];
        let info = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets});
        header.insert(tensor.name.clone(), info);
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    // Data starts at a multiple of 8, as the format's own writer has it.
    header.resize(header.len().next_multiple_of(8), b' ');
    let total = (8 + header.len() + end) as u64;
    let mut file = BufWriter::with_capacity(1 << 20, file);
    let mut done = (8 + header.len()) as u64;
    file.write_all(&(header.len() as u64).to_le_bytes()).and_then(|()| file.write_all(&header)).map_err(failed)?;
    for tensor in tensors {
        let bytes = match &tensor.content {
            Content::Embedding => plain_bytes(&model.embedding()?),
            Content::Head => model.head()?.map_or_else(|| Vec::new().into(), |head| plain_bytes(&head)),
            Content::Floats(values, dtype) => floats(values, *dtype).into(),
            Content::Packed(layer, projection) => {
                pack(model, &tensor.name, &model.projection(*layer, *projection)?)?.into()
            }
        };
        if bytes.len() != tensor.bytes {
            let problem = "changed while it was read".to_owned();
            return Err(FormatError::Tensor { path: model.path().to_owned(), tensor: tensor.name.clone(), problem });
        }
        file.write_all(&bytes).map_err(failed)?;
        done += bytes.len() as u64;
        if progress(done, total).is_break() {
            return Err(FormatError::Cancelled { path: path.to_owned() });
        }
    }
    file.into_inner().map_err(|error| failed(error.into_error()))?.sync_all().map_err(failed)?;
    Ok(total)
}

/// All rows as plain numbers.
fn plain_bytes(matrix: &FloatMatrix) -> Bytes {
    if matrix.dtype.plain().is_some() {
        return matrix.bytes.clone();
    }
    let mut bytes = Vec::new();
    matrix.plain_rows(0..matrix.rows, &mut bytes);
    Bytes::from(bytes)
}

fn floats(values: &[f32], dtype: FloatType) -> Vec<u8> {
    match dtype {
        FloatType::Bf16 => values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
    }
}

/// Hugging Face's packing: rows `r`, `r + R`, `r + 2R`, `r + 3R` share a byte, `R = ⌈m/4⌉`. Where `m` is no multiple of
/// 4, rows that are not there hold code 0, as `transformers` leaves them.
fn pack(model: &Checkpoint, name: &str, tensor: &TernaryTensor) -> Result<Vec<u8>, FormatError> {
    let matrix = tensor.to_matrix().map_err(|invalid| FormatError::invalid_code(model.path(), name, invalid))?;
    let (matrix, quarter) = (matrix.view(), tensor.m.div_ceil(4));
    let mut bytes = Vec::with_capacity(quarter * tensor.k);
    for r in 0..quarter {
        let rows = [0, 1, 2, 3].map(|part| Some(r + part * quarter).filter(|row| *row < tensor.m));
        for (j, width) in (0..tensor.k).step_by(4).map(|at| (at / 4, (tensor.k - at).min(4))) {
            let columns = transpose_codes(rows.map(|row| row.map_or(0, |row| matrix.row(row)[j])));
            bytes.extend_from_slice(&columns[..width]);
        }
    }
    Ok(bytes)
}
