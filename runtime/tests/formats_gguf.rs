//! GGUF files: what other programs write is read exactly, what ternion writes comes back, what cannot be read is
//! refused with advice.

mod support;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use support::embedded;
use support::gguf::{GgufFile, Value, Weights, gguf};
use ternion_compiler::Layout;
use ternion_kernels_ref::Trit;
use ternion_runtime::formats::gguf::{I2sLayout, TernaryType, TokenRowType, export};
use ternion_runtime::formats::{
    Activation, Bytes, Checkpoint, FloatType, FormatError, LayerNorm, OpenOptions, Projection, RowType, tern,
};
use ternion_runtime::text::Message;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gguf").join(name)
}

fn open(file: &GgufFile) -> Result<Checkpoint, FormatError> {
    open_with(file, &OpenOptions::default())
}

fn open_with(file: &GgufFile, options: &OpenOptions) -> Result<Checkpoint, FormatError> {
    Checkpoint::from_bytes("model.gguf", Bytes::from(file.bytes()), options)
}

fn message<T>(result: Result<T, FormatError>) -> String {
    let message = result.map(drop).expect_err("refused").to_string();
    assert!(message.contains("model.gguf") && !message.contains('\n'), "{message}");
    message
}

fn export_to(model: &Checkpoint, path: &Path, kind: TernaryType) -> Result<usize, FormatError> {
    let summary = export(model, path, kind, TokenRowType::Own, &mut |_, _| ControlFlow::Continue(()))?;
    assert_eq!(std::fs::metadata(path).unwrap().len(), summary.bytes);
    Ok(summary.rounded_scales)
}

/// Whether all trits, and the scales as `round` leaves them, are those of the embedded model.
fn assert_weights(model: &Checkpoint, round: impl Fn(f32) -> f32) {
    let expected = embedded();
    for layer in 0..expected.config().layers {
        for projection in Projection::ALL {
            let (tensor, expected) =
                (model.projection(layer, projection).unwrap(), expected.projection(layer, projection).unwrap());
            assert!(*tensor.bytes == *expected.bytes, "layer {layer}, {projection}: trits differ");
            assert_eq!(tensor.scale, round(expected.scale), "layer {layer}, {projection}");
        }
    }
}

fn assert_all_but_weights(model: &Checkpoint) {
    let expected = embedded();
    assert_eq!(model.config(), expected.config());
    assert_eq!(model.tokenizer_config(), expected.tokenizer_config());
    assert_eq!((&model.generation().eos, model.generation().bos), (&vec![1, 2], Some(0)));
    assert_eq!(*model.embedding().unwrap().bytes, *expected.embedding().unwrap().bytes);
    assert_eq!(model.final_norm().unwrap(), expected.final_norm().unwrap());
    for layer in 0..expected.config().layers {
        for norm in LayerNorm::ALL {
            assert_eq!(model.norm(layer, norm).unwrap(), expected.norm(layer, norm).unwrap());
        }
    }
    let text = std::fs::read_to_string(support::fixture("val.txt")).unwrap();
    let (tokenizer, reference) = (model.tokenizer().unwrap(), expected.tokenizer().unwrap());
    let tokens = tokenizer.encode(&text, true).unwrap();
    assert!(tokens == reference.encode(&text, true).unwrap());
    assert!(tokenizer.decode(&tokens) == text);
    assert!(tokenizer.is_special(2) && tokenizer.adds_bos());
}

/// The projections' trits as the script that made the fixtures has them.
fn fixture_trit(t: usize, i: usize) -> Trit {
    let word = ((i as u64 * 2_654_435_761 + t as u64 * 40_503) % (1 << 32)) >> 16;
    Trit::ALL[(word % 3) as usize]
}

#[test]
fn files_of_the_gguf_package_are_read_exactly() {
    for (name, token_types) in [
        ("tq1_0-bf16", &[RowType::Bf16][..]),
        ("tq2_0-q4_k-q6_k", &[RowType::Q4K, RowType::Q6K]),
        ("q4_0-q8_0", &[RowType::Q8_0]),
        ("f16-q4_0", &[RowType::Q4_0]),
    ] {
        let model = Checkpoint::open(&fixture(&format!("{name}.gguf"))).unwrap();
        assert_eq!(model.config().activation, Activation::Relu2);
        for (t, projection) in Projection::ALL.into_iter().enumerate() {
            let tensor = model.projection(0, projection).unwrap();
            let matrix = tensor.to_matrix().unwrap();
            assert_eq!(tensor.scale, (t + 1) as f32 / 64.0, "{name}, {projection}");
            for i in 0..tensor.m * tensor.k {
                let trit = matrix.trit(i / tensor.k, i % tensor.k);
                assert_eq!(trit, fixture_trit(t, i), "{name}, {projection}, weight {i}");
            }
        }
        let matrices = [Some(model.embedding().unwrap()), model.head().unwrap()];
        assert_eq!(matrices[1].is_some(), token_types.len() == 2);
        for ((matrix, dtype), tensor) in matrices.into_iter().flatten().zip(token_types).zip(["token_embd", "output"]) {
            assert_eq!(matrix.dtype, *dtype, "{name}, {tensor}");
            let golden = std::fs::read(fixture(&format!("{name}.{tensor}.f32"))).unwrap();
            let mut expected = vec![0.0; matrix.rows * matrix.columns];
            FloatType::F32.widen(&golden, &mut expected);
            let mut values = vec![0.0; expected.len()];
            for (at, values) in values.chunks_exact_mut(matrix.columns).enumerate() {
                matrix.widen_row(at, values);
            }
            assert_eq!(values, expected, "{name}, {tensor}");
        }
        let norm = model.norm(0, LayerNorm::FfnSub).unwrap();
        assert_eq!(norm[2], 3.0 / norm.len() as f32);
    }
}

#[test]
fn every_type_of_weights_gives_the_same_model() {
    for weights in Weights::ALL {
        let i2s_layout = match weights {
            Weights::I2s64 => I2sLayout::Blocks64,
            Weights::I2sRows => I2sLayout::Rows4,
            _ => I2sLayout::Blocks128,
        };
        let options = OpenOptions { i2s_layout, ..OpenOptions::default() };
        let model = open_with(&gguf(&embedded(), "bitnet-b1.58", weights), &options).unwrap();
        assert_all_but_weights(&model);
        assert_eq!(model.notes(), [""; 0]);
        // The embedded model's scales have eight bits of mantissa: an f16 holds them, and an eighth of them.
        assert_weights(&model, |scale| scale);
    }
}

#[test]
fn the_wrong_layout_of_i2s_only_permutes() {
    let file = gguf(&embedded(), "bitnet-b1.58", Weights::I2s128);
    let options = OpenOptions { i2s_layout: I2sLayout::Blocks64, ..OpenOptions::default() };
    let tensor = open_with(&file, &options).unwrap().projection(0, Projection::Up).unwrap();
    let expected = embedded().projection(0, Projection::Up).unwrap();
    assert!(*tensor.bytes != *expected.bytes);
    let count =
        |bytes: &[u8]| bytes.iter().map(|byte| (0..4).filter(|j| byte >> (2 * j) & 3 == 1).count()).sum::<usize>();
    assert_eq!(count(&tensor.bytes), count(&expected.bytes));
}

#[test]
fn rows_of_q_and_k_are_put_back_in_order_for_llama() {
    let model = open(&gguf(&embedded(), "llama", Weights::Tq2_0)).unwrap();
    assert_weights(&model, |scale| scale);
    let config = model.config();
    assert_eq!((config.activation, config.sub_norms), (Activation::Silu, false));
    assert_eq!(config.architecture, "LlamaForCausalLM");
}

#[test]
fn a_scale_beside_the_weights_multiplies_them() {
    for weights in [Weights::F16, Weights::Tq1_0, Weights::I2s128] {
        let mut file = gguf(&embedded(), "bitnet-b1.58", weights);
        let one = gguf_of_ones(weights);
        for (layer, one) in one.iter().enumerate() {
            let name = format!("blk.{layer}.attn_q");
            let scale = embedded().projection(layer, Projection::Query).unwrap().scale;
            let place = file.tensor(&format!("{name}.weight"));
            place.3 = one.clone();
            file.tensors.push((format!("{name}.scale"), vec![1], 0, scale.to_le_bytes().to_vec()));
        }
        assert_weights(&open(&file).unwrap(), |scale| scale);
    }
}

/// Each layer's query projection with a scale of 1.
fn gguf_of_ones(weights: Weights) -> Vec<Vec<u8>> {
    (0..6)
        .map(|layer| {
            let tensor = embedded().projection(layer, Projection::Query).unwrap();
            weights.encode(&support::trits(&tensor), tensor.k, 1.0)
        })
        .collect()
}

#[test]
fn version_2_is_read_and_others_are_refused() {
    let mut file = gguf(&embedded(), "bitnet-b1.58", Weights::Tq2_0);
    file.version = 2;
    open(&file).unwrap();
    for (version, words) in [(1, "version is 1"), (4, "version is 4"), (3u32.swap_bytes(), "big-endian")] {
        file.version = version;
        assert!(message(open(&file)).contains(words));
    }
}

#[test]
fn architectures_tell_the_activation_and_the_user_may_know_better() {
    let activation =
        |architecture: &str| open(&gguf(&embedded(), architecture, Weights::Tq2_0)).unwrap().config().activation;
    assert_eq!(activation("bitnet"), Activation::Silu);
    assert_eq!(activation("bitnet-b1.58"), Activation::Relu2);
    assert_eq!(activation("bitnet-25"), Activation::Relu2);
    let options = OpenOptions { activation: Some(Activation::Silu), ..OpenOptions::default() };
    let model = open_with(&gguf(&embedded(), "bitnet-25", Weights::Tq2_0), &options).unwrap();
    assert_eq!(model.config().activation, Activation::Silu);
    // So with what tells its activation itself; the file that is written says the new one.
    let tales = Checkpoint::open_with(&support::embedded_path(), &options).unwrap();
    assert_eq!(tales.config().activation, Activation::Silu);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    export_to(&tales, &path, TernaryType::Tq2_0).unwrap();
    assert_eq!(Checkpoint::open(&path).unwrap().config().architecture, "BitnetForCausalLM");
    let error = message(open(&gguf(&embedded(), "mamba", Weights::Tq2_0)));
    assert!(error.contains("mamba") && error.contains("bitnet-b1.58"), "{error}");
}

#[test]
fn community_models_under_the_wrong_name_are_recognised() {
    let mut file = gguf(&embedded(), "bitnet-b1.58", Weights::Tq2_0);
    file.set("bitnet-b1.58.block_count", Some(Value::U32(24)));
    file.set("bitnet-b1.58.attention.head_count", Some(Value::U32(16)));
    file.set("bitnet-b1.58.rope.dimension_count", Some(Value::U32(16)));
    let model = open(&file).unwrap();
    assert_eq!(model.config().activation, Activation::Silu);
    assert!(model.notes()[0].contains("SiLU"));
}

#[test]
fn reciprocal_scales_are_suspected_and_can_be_inverted() {
    // I2_S by bitnet.cpp's converter, the others by llama.cpp's. An f16 rounds a reciprocal.
    for (weights, kind, unit) in [(Weights::I2s128, 36, 0), (Weights::Tq1_0, 34, 54), (Weights::Tq2_0, 35, 66)] {
        let mut file = gguf(&embedded(), "bitnet-b1.58", weights);
        let places = file.tensors.iter_mut().filter(|(name, _, of, _)| *of == kind && name.starts_with("blk."));
        for (_, _, _, bytes) in places {
            if kind == 36 {
                let tail = bytes.len() - 32;
                let scale = f32::from_le_bytes(bytes[tail..tail + 4].try_into().unwrap());
                bytes[tail..tail + 4].copy_from_slice(&(1.0 / scale).to_le_bytes());
            } else {
                for d in bytes.chunks_exact_mut(unit).map(|block| &mut block[unit - 2..]) {
                    let scale = half::f16::from_le_bytes(d.try_into().unwrap());
                    d.copy_from_slice(&half::f16::from_f32(1.0 / scale.to_f32()).to_le_bytes());
                }
            }
        }
        let model = open(&file).unwrap();
        assert!(model.notes().iter().any(|note| note.contains("inverted scales")), "{:?}", model.notes());
        let options = OpenOptions { invert_scale: true, ..OpenOptions::default() };
        let model = open_with(&file, &options).unwrap();
        assert_eq!(model.notes(), [""; 0]);
        let rounded = |scale: f32| if kind == 36 { 1.0 / scale } else { half::f16::from_f32(1.0 / scale).to_f32() };
        assert_weights(&model, |scale| 1.0 / rounded(scale));
    }
}

#[test]
fn bitnet_cpps_chat_template_is_replaced_and_said_so() {
    let mut file = gguf(&embedded(), "bitnet-b1.58", Weights::Tq2_0);
    let wrong =
        "{% for message in messages %}{{ 'Human: ' + message['content'] + '\\n\\nBITNETAssistant: ' }}{% endfor %}";
    file.set("tokenizer.chat_template", Some(Value::Text(wrong.to_owned())));
    let model = open(&file).unwrap();
    assert!(model.notes()[0].contains("chat template"));
    let text = model.chat().unwrap().render(&[Message::new("user", " Hi ")], true).unwrap();
    assert_eq!(text, "<|begin_of_text|>User: Hi<|eot_id|>Assistant: ");

    file.set("tokenizer.chat_template", Some(Value::Text("as it is".to_owned())));
    let model = open(&file).unwrap();
    assert_eq!((model.chat_template(), model.notes().len()), (Some("as it is"), 0));
}

#[test]
fn what_cannot_be_read_is_refused_by_name() {
    let sound = || gguf(&embedded(), "bitnet-b1.58", Weights::Tq2_0);
    let mut file = sound();
    for (id, words) in [(38, "TL1"), (39, "TL2"), (37, "removed"), (135, "IQ2_BN"), (13, "Q5_K"), (999, "999")] {
        file.tensor("blk.2.attn_v.weight").2 = id;
        let message = message(open(&file));
        assert!(message.contains(words) && message.contains("blk.2.attn_v.weight"), "{message}");
    }

    let read = |file: &GgufFile| open(file).and_then(|model| model.projection(2, Projection::Value));
    // One block has another scale.
    let mut file = sound();
    file.tensor("blk.2.attn_v.weight").3[64..66].copy_from_slice(&[0, 0x3c]);
    assert!(message(read(&file)).contains("different scales"));
    // Code 3.
    let mut file = sound();
    file.tensor("blk.2.attn_v.weight").3[7] |= 3;
    assert!(message(read(&file)).contains("code 3 at row 0, column 7"));
    // Q4_0 weights of some other model.
    let mut file = gguf(&embedded(), "bitnet-b1.58", Weights::Q4_0);
    file.tensor("blk.2.attn_v.weight").3[9] = 0x85;
    assert!(message(read(&file)).contains("not ternary"));
    // Floats of some other model.
    let mut file = gguf(&embedded(), "llama", Weights::F32);
    file.tensor("blk.2.attn_v.weight").3[..4].copy_from_slice(&7.0f32.to_le_bytes());
    assert!(message(read(&file)).contains("ternary models only"));
    // A shape that is not the model's.
    let mut file = sound();
    file.tensor("blk.2.attn_v.weight").1 = vec![512, 64];
    assert!(message(read(&file)).contains("[64, 512]"));
    let mut file = sound();
    file.tensors.retain(|(name, ..)| name != "blk.2.attn_v.weight");
    assert!(message(read(&file)).contains("blk.2.attn_v.weight is missing"));
}

#[test]
fn sizes_that_lie_are_refused_before_anything_is_made_of_them() {
    let sound = || gguf(&embedded(), "bitnet-b1.58", Weights::Tq2_0);
    let name = "blk.5.ffn_down.weight";
    for (dimensions, words) in [
        (vec![768, 1 << 40], "cut off"),
        (vec![1 << 32, 1 << 32], "cannot have shape"),
        (vec![u64::MAX, 2], "cannot have shape"),
        (vec![0, 256], "shape"),
        (vec![768, 256, 1, 1, 1], "5 dimensions"),
        (vec![100, 256], "cannot have shape"),
        (vec![768, 257], "cut off"),
    ] {
        let mut file = sound();
        file.tensor(name).1 = dimensions.clone();
        let message = message(open(&file));
        assert!(message.contains(words) && message.contains(name), "{dimensions:?}: {message}");
    }
    let bytes = sound().bytes();
    // Counts of tensors and of values.
    for at in [8, 16] {
        for count in [u64::MAX, 1 << 40, 1_000_000] {
            let mut bytes = bytes.clone();
            bytes[at..at + 8].copy_from_slice(&count.to_le_bytes());
            let opened = Checkpoint::from_bytes("model.gguf", Bytes::from(bytes), &OpenOptions::default());
            assert!(message(opened).contains("do not fit"));
        }
    }
    for length in [0, 3, 4, 20, 100, 10_000, bytes.len() / 2, bytes.len() - 1] {
        let cut = Checkpoint::from_bytes("model.gguf", Bytes::from(bytes[..length].to_vec()), &OpenOptions::default());
        let message = message(cut);
        assert!(message.contains(if length < 4 { "not a prepared" } else { "cut off" }), "{length}: {message}");
    }
}

#[test]
fn tensors_that_overlap_are_refused() {
    let file = gguf(&embedded(), "bitnet-b1.58", Weights::Tq2_0);
    let mut bytes = file.bytes();
    // The second tensor's offset becomes the first's, 0.
    let name = b"output_norm.weight";
    let at = bytes.windows(name.len()).position(|window| window == name).unwrap() + name.len() + 4 + 8 + 4;
    bytes[at..at + 8].copy_from_slice(&0u64.to_le_bytes());
    let opened = Checkpoint::from_bytes("model.gguf", Bytes::from(bytes), &OpenOptions::default());
    assert!(message(opened).contains("overlap"));
}

#[test]
fn what_is_exported_comes_back() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    for kind in [TernaryType::Tq2_0, TernaryType::Tq1_0, TernaryType::I2S, TernaryType::F16] {
        assert_eq!(export_to(&embedded(), &path, kind).unwrap(), 0);
        let model = Checkpoint::open(&path).unwrap();
        assert_all_but_weights(&model);
        assert_weights(&model, |scale| scale);
        // Exporting what was read gives the same file again.
        let other = tempfile::tempdir().unwrap();
        let again = [other.path().join("1/model.gguf"), other.path().join("2/model.gguf")];
        let mut model = model;
        for path in &again {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            export_to(&model, path, kind).unwrap();
            model = Checkpoint::open(path).unwrap();
        }
        assert!(std::fs::read(&again[0]).unwrap() == std::fs::read(&again[1]).unwrap(), "{kind:?}");
    }
}

#[test]
fn a_gguf_file_is_prepared_like_any_model() {
    let directory = tempfile::tempdir().unwrap();
    let (gguf, prepared) = (directory.path().join("model.gguf"), directory.path().join("model.tern"));
    export_to(&embedded(), &gguf, TernaryType::I2S).unwrap();
    let model = Checkpoint::open(&gguf).unwrap();
    tern::write(&model, &prepared, &|_, _, _, _| Layout::Canonical, &mut |_, _| ControlFlow::Continue(())).unwrap();
    let model = Checkpoint::open(&prepared).unwrap();
    assert_all_but_weights(&model);
    assert_weights(&model, |scale| scale);
}

#[test]
fn scales_that_f16_rounds_stand_beside_the_weights_or_are_counted() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    let mut file = gguf(&embedded(), "bitnet-b1.58", Weights::I2s128);
    for (_, _, kind, bytes) in &mut file.tensors {
        if *kind == 36 {
            let tail = bytes.len() - 32;
            bytes[tail..tail + 4].copy_from_slice(&0.123_456_79_f32.to_le_bytes());
        }
    }
    let model = open(&file).unwrap();
    for kind in [TernaryType::Tq2_0, TernaryType::F16, TernaryType::I2S] {
        assert_eq!(export_to(&model, &path, kind).unwrap(), 0);
        assert_weights(&Checkpoint::open(&path).unwrap(), |_| 0.123_456_79);
    }
    let mut llama = gguf(&embedded(), "llama", Weights::I2s128);
    for (from, to) in
        file.tensors.iter().filter(|tensor| tensor.2 == 36).zip(llama.tensors.iter_mut().filter(|t| t.2 == 36))
    {
        let (from, to) = (&from.3, &mut to.3);
        let tail = to.len() - 32;
        to[tail..].copy_from_slice(&from[tail..]);
    }
    let model = open(&llama).unwrap();
    assert_eq!(export_to(&model, &path, TernaryType::Tq1_0).unwrap(), 42);
    let model = Checkpoint::open(&path).unwrap();
    assert_weights(&model, |_| half::f16::from_f32(0.123_456_79).to_f32());
}

#[test]
fn quantised_token_rows_are_read_as_the_floats_they_stand_for() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    for (kind, error) in [(TokenRowType::F16, 1e-3), (TokenRowType::Q8_0, 1e-2)] {
        export(&embedded(), &path, TernaryType::Tq2_0, kind, &mut |_, _| ControlFlow::Continue(())).unwrap();
        let (embedding, expected) =
            (Checkpoint::open(&path).unwrap().embedding().unwrap(), embedded().embedding().unwrap());
        let (mut row, mut exact) = (vec![0.0; 256], vec![0.0; 256]);
        for at in 0..embedding.rows {
            embedding.widen_row(at, &mut row);
            expected.widen_row(at, &mut exact);
            let largest = exact.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
            assert!(row.iter().zip(&exact).all(|(a, b)| (a - b).abs() <= error * largest), "{kind:?}, row {at}");
        }
    }
}

#[test]
fn a_cancelled_export_leaves_what_was_there() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    std::fs::write(&path, "before").unwrap();
    let mut stop =
        |done: u64, total: u64| if done > total / 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
    let cancelled = export(&embedded(), &path, TernaryType::Tq2_0, TokenRowType::Own, &mut stop);
    assert!(matches!(cancelled, Err(FormatError::Cancelled { .. })));
    assert_eq!(std::fs::read(&path).unwrap(), b"before");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
}

/// A SentencePiece vocabulary in which "hello world" has one best segmentation.
fn sentencepiece(file: &mut GgufFile) {
    let mut tokens = vec![("<unk>".to_owned(), 2, 0.0), ("<s>".to_owned(), 3, 0.0), ("</s>".to_owned(), 3, 0.0)];
    tokens.extend((0..256).map(|byte| (format!("<0x{byte:02X}>"), 6, 0.0)));
    for (at, piece) in
        ["he", "ll", "lo", "▁he", "llo", "▁hello", "wo", "rl", "▁wo", "rld", "▁world"].into_iter().enumerate()
    {
        tokens.push((piece.to_owned(), 1, -(at as f32)));
    }
    for (at, letter) in ["▁", "h", "e", "l", "o", "w", "r", "d"].into_iter().enumerate() {
        tokens.push((letter.to_owned(), 1, -100.0 - at as f32));
    }
    for (key, value) in [
        ("model", Some(Value::Text("llama".to_owned()))),
        ("pre", None),
        ("merges", None),
        ("add_bos_token", None),
        ("tokens", Some(Value::Texts(tokens.iter().map(|token| token.0.clone()).collect()))),
        ("token_type", Some(Value::I32s(tokens.iter().map(|token| token.1).collect()))),
        ("scores", Some(Value::F32s(tokens.iter().map(|token| token.2).collect()))),
        ("bos_token_id", Some(Value::U32(1))),
        ("eos_token_id", Some(Value::U32(2))),
    ] {
        file.set(&format!("tokenizer.ggml.{key}"), value);
    }
}

#[test]
fn sentencepiece_vocabularies_merge_by_score_and_fall_back_to_bytes() {
    let mut file = gguf(&embedded(), "llama", Weights::Tq2_0);
    sentencepiece(&mut file);
    let tokenizer = open(&file).unwrap().tokenizer().unwrap();
    let text = |tokens: &[u32]| -> Vec<String> {
        tokens.iter().map(|token| String::from_utf8_lossy(tokenizer.token_bytes(*token)).into_owned()).collect()
    };
    let tokens = tokenizer.encode("hello world", true).unwrap();
    assert_eq!(text(&tokens), ["<s>", " hello", " world"]);
    assert_eq!(tokenizer.decode(&tokens), "hello world");
    for whole in ["ähello\nworld", " hello", "  ", "🦊"] {
        let tokens = tokenizer.encode(whole, true).unwrap();
        assert_eq!(tokenizer.decode(&tokens), whole, "{:?}", text(&tokens));
        let mut detokenizer = tokenizer.detokenizer();
        let pieces: String = tokens.iter().map(|token| detokenizer.push(*token).to_owned()).collect();
        assert_eq!(pieces, format!(" {whole}"));
    }
    assert!(tokenizer.adds_bos());

    // Written and read again, texts have the same tokens.
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    export_to(&open(&file).unwrap(), &path, TernaryType::Tq2_0).unwrap();
    let again = Checkpoint::open(&path).unwrap().tokenizer().unwrap();
    for text in ["hello world", "ähello\nworld"] {
        assert_eq!(again.encode(text, true).unwrap(), tokenizer.encode(text, true).unwrap());
    }

    file.set("tokenizer.ggml.add_space_prefix", Some(Value::Bool(false)));
    let tokenizer = open(&file).unwrap().tokenizer().unwrap();
    assert_eq!(tokenizer.decode(&tokenizer.encode(" hello", false).unwrap()), " hello");
}

#[test]
fn tokenizers_that_are_not_known_are_refused_by_name() {
    let mut file = gguf(&embedded(), "bitnet-b1.58", Weights::Tq2_0);
    file.set("tokenizer.ggml.pre", Some(Value::Text("tekken".to_owned())));
    assert!(message(open(&file)).contains("tekken"));
    file.set("tokenizer.ggml.model", Some(Value::Text("rwkv".to_owned())));
    assert!(message(open(&file)).contains("rwkv"));
    // The released file of 2B4T names no pattern.
    let mut file = gguf(&embedded(), "bitnet-b1.58", Weights::Tq2_0);
    file.set("tokenizer.ggml.pre", None);
    file.set("tokenizer.ggml.add_bos_token", None);
    assert_all_but_weights(&open(&file).unwrap());
}
