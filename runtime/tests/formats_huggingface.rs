//! Hugging Face directories in every dress give the same model; damaged ones give one clear line.

mod support;

use std::ops::ControlFlow;
use std::path::Path;

use proptest::prelude::*;
use support::{DAMAGED, DRESSES, Damage, Dress, HuggingFaceFixture, embedded, embedded_path};
use ternion_compiler::Layout;
use ternion_runtime::formats::{Checkpoint, FormatError, LayerNorm, Projection, tern};
use ternion_runtime::text::Message;

fn directory_of(fixture: HuggingFaceFixture) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    fixture.write(&embedded(), directory.path());
    directory
}

/// Opens a model and reads everything that running it would read.
fn read_all(path: &Path) -> Result<Checkpoint, FormatError> {
    let model = Checkpoint::open(path)?;
    model.tokenizer()?;
    model.embedding()?;
    model.head()?;
    model.final_norm()?;
    for layer in 0..model.config().layers {
        LayerNorm::ALL.into_iter().try_for_each(|norm| model.norm(layer, norm).map(drop))?;
        Projection::ALL.into_iter().try_for_each(|projection| model.projection(layer, projection).map(drop))?;
    }
    Ok(model)
}

fn assert_same_but_scales(model: &Checkpoint, expected: &Checkpoint) {
    assert_eq!(model.config(), expected.config());
    assert_eq!(model.generation(), expected.generation());
    assert_eq!(model.tokenizer_config(), expected.tokenizer_config());
    assert_eq!(*model.embedding().unwrap().bytes, *expected.embedding().unwrap().bytes);
    assert!(model.head().unwrap().is_none());
    assert_eq!(model.final_norm().unwrap(), expected.final_norm().unwrap());
    for layer in 0..expected.config().layers {
        for norm in LayerNorm::ALL {
            assert_eq!(model.norm(layer, norm).unwrap(), expected.norm(layer, norm).unwrap());
        }
        for projection in Projection::ALL {
            let (tensor, expected) =
                (model.projection(layer, projection).unwrap(), expected.projection(layer, projection).unwrap());
            assert_eq!((tensor.m, tensor.k, tensor.layout), (expected.m, expected.k, Layout::Canonical));
            assert!(*tensor.bytes == *expected.bytes, "layer {layer}, {projection}: trits differ");
        }
    }
}

#[test]
fn every_dress_gives_the_same_trits_and_one_multiplier() {
    let expected = embedded();
    for dress in DRESSES {
        let directory = directory_of(HuggingFaceFixture::new(dress));
        let model = Checkpoint::open(directory.path()).unwrap_or_else(|error| panic!("{dress:?}: {error}"));
        assert_same_but_scales(&model, &expected);
        for layer in 0..expected.config().layers {
            for projection in Projection::ALL {
                let scale = model.projection(layer, projection).unwrap().scale;
                let original = expected.projection(layer, projection).unwrap().scale;
                match dress {
                    Dress::PackedInverse => assert_eq!(scale, 1.0 / (1.0 / original)),
                    // Magnitudes are 1/16 to 3/32 where the trit is not 0, which is a third of the places or more.
                    Dress::Master(_) => assert!((0.02..0.09).contains(&scale), "{scale}"),
                    _ => assert_eq!(scale, original, "{dress:?}"),
                }
            }
        }
    }
}

#[test]
fn shards_give_the_same_model_as_one_file() {
    for shards in [2, 5] {
        let directory = directory_of(HuggingFaceFixture { shards, ..HuggingFaceFixture::new(Dress::PackedDirect) });
        assert_same_but_scales(&Checkpoint::open(directory.path()).unwrap(), &embedded());
    }
}

#[test]
fn the_packed_dress_prepared_is_the_embedded_file_byte_for_byte() {
    for shards in [1, 3] {
        let directory = directory_of(HuggingFaceFixture { shards, ..HuggingFaceFixture::new(Dress::PackedDirect) });
        let model = Checkpoint::open(directory.path()).unwrap();
        let output = directory.path().join("again.tern");
        tern::write(&model, &output, &|_, _, _, _| Layout::Canonical, &mut |_, _| ControlFlow::Continue(())).unwrap();
        assert!(std::fs::read(output).unwrap() == std::fs::read(embedded_path()).unwrap());
    }
}

#[test]
fn damage_gives_one_line_that_says_what_and_where() {
    for (damage, words) in [
        (Damage::NoConfig, &["config.json", "Hugging Face"][..]),
        (Damage::BrokenConfig, &["config.json", "not the JSON"]),
        (Damage::UnknownArchitecture, &["MambaForCausalLM", "known are BitNetForCausalLM"]),
        (Damage::MissingField, &["config.json", "hidden_size is missing"]),
        (Damage::NoWeights, &["model.safetensors"]),
        (Damage::MissingTensor, &["model.safetensors", DAMAGED, "missing"]),
        (Damage::WrongShape, &["model.safetensors", DAMAGED, "[33, 256]", "[32, 256]"]),
        (Damage::WrongType, &["model.safetensors", DAMAGED, "I64", "U8"]),
        (Damage::Code3, &["model.safetensors", DAMAGED, "row 37, column 7", "code 3"]),
        (Damage::Truncated, &["model.safetensors", "cut off"]),
        (Damage::HeaderBeyondFile, &["model.safetensors", "beyond its end"]),
        (Damage::NotConverted, &["model.layers.2.self_attn.v_proj", "modules_to_not_convert"]),
        (Damage::Bias, &["v_proj.bias", "not supported"]),
        (Damage::NoTokenizer, &["tokenizer.json"]),
    ] {
        let directory = directory_of(HuggingFaceFixture::damaged(damage));
        let message = read_all(directory.path()).map(drop).expect_err(&format!("{damage:?}")).to_string();
        assert!(!message.contains('\n'), "{message}");
        assert!(message.contains(directory.path().to_str().unwrap()), "{message}");
        for word in words {
            assert!(message.contains(word), "{damage:?}: {message}");
        }
    }
}

#[test]
fn damaged_shards_are_named() {
    let last = "model-00003-of-00003.safetensors";
    for damage in [Damage::MissingFile, Damage::Truncated, Damage::HeaderBeyondFile] {
        let directory = directory_of(HuggingFaceFixture { shards: 3, ..HuggingFaceFixture::damaged(damage) });
        let message = Checkpoint::open(directory.path()).map(drop).unwrap_err().to_string();
        assert!(message.contains(last), "{damage:?}: {message}");
    }

    // An index that leads out of the directory, or names a tensor that its file does not have.
    let directory = directory_of(HuggingFaceFixture { shards: 3, ..HuggingFaceFixture::new(Dress::PackedDirect) });
    let index = directory.path().join("model.safetensors.index.json");
    let text = std::fs::read_to_string(&index).unwrap();
    for (replacement, words) in [("../elsewhere.safetensors", "no file of this directory"), ("", "no file of this")] {
        std::fs::write(&index, text.replace(last, replacement)).unwrap();
        let message = Checkpoint::open(directory.path()).map(drop).unwrap_err().to_string();
        assert!(message.contains(words), "{message}");
    }
    std::fs::write(&index, text.replace(last, "model-00001-of-00003.safetensors")).unwrap();
    let message = Checkpoint::open(directory.path()).map(drop).unwrap_err().to_string();
    assert!(message.contains("missing") && message.contains("00001-of-00003"), "{message}");
}

#[test]
fn a_path_that_is_no_model_is_said_to_be_none() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("nothing");
    assert!(Checkpoint::open(&missing).map(drop).unwrap_err().to_string().contains("cannot read"));
    assert!(Checkpoint::open(directory.path()).map(drop).unwrap_err().to_string().contains("has no config.json"));
    std::fs::write(&missing, "some text").unwrap();
    assert!(Checkpoint::open(&missing).map(drop).unwrap_err().to_string().contains("not a prepared model"));
}

#[test]
fn the_template_file_comes_before_the_one_in_the_tokenizers_configuration() {
    let directory = directory_of(HuggingFaceFixture::new(Dress::PackedDirect));
    let configuration = directory.path().join("tokenizer_config.json");
    std::fs::write(configuration, r#"{"chat_template": "from the configuration"}"#).unwrap();
    assert_eq!(Checkpoint::open(directory.path()).unwrap().chat_template(), Some("from the configuration"));
    std::fs::write(directory.path().join("chat_template.jinja"), "from the file").unwrap();
    let model = Checkpoint::open(directory.path()).unwrap();
    assert_eq!(model.chat_template(), Some("from the file"));

    let output = directory.path().join("chat.tern");
    tern::write(&model, &output, &|_, _, _, _| Layout::Canonical, &mut |_, _| ControlFlow::Continue(())).unwrap();
    let model = Checkpoint::open(&output).unwrap();
    assert_eq!(model.chat_template(), Some("from the file"));
    assert_eq!(model.chat().unwrap().render(&[], true).unwrap(), "from the file");
}

#[test]
fn a_model_without_a_template_chats_in_paragraphs_after_bos() {
    let text = embedded().chat().unwrap().render(&[Message::new("user", "Tell me a tale.")], true).unwrap();
    assert_eq!(text, "<|begin_of_text|>Tell me a tale.\n\n");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn a_mutated_safetensors_file_or_configuration_never_panics(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in prop::option::weighted(0.2, any::<prop::sample::Index>()),
        config in any::<bool>(),
    ) {
        use std::sync::LazyLock;
        static DIRECTORY: LazyLock<tempfile::TempDir> =
            LazyLock::new(|| directory_of(HuggingFaceFixture::new(Dress::PackedDirect)));
        let directory = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(DIRECTORY.path()).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), directory.path().join(entry.file_name())).unwrap();
        }
        let path = directory.path().join(if config { "config.json" } else { "model.safetensors" });
        let mut bytes = std::fs::read(&path).unwrap();
        let header = if config { bytes.len() } else { 12_000 };
        for (at, value) in changes {
            bytes[at.index(header)] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(header));
        }
        std::fs::write(&path, bytes).unwrap();
        if let Err(error) = read_all(directory.path()) {
            prop_assert!(!error.to_string().contains('\n'), "{}", error);
        }
    }
}
