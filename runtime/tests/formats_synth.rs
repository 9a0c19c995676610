//! Made-up models: the same bytes each time, of the size that was planned, and models like any other.

use std::ops::ControlFlow;

use ternion_compiler::Layout;
use ternion_runtime::formats::gguf::{TernaryType, TokenRowType, export};
use ternion_runtime::formats::synth::Recipe;
use ternion_runtime::formats::{Activation, Checkpoint, ModelConfig, Projection, tern};

fn canonical(_: usize, _: Projection, _: usize, _: usize) -> Layout {
    Layout::Canonical
}

fn small() -> Recipe {
    let config = ModelConfig { layers: 2, vocabulary: 700, ..Recipe::preset("125M").unwrap().config };
    Recipe { config, ..Recipe::preset("125M").unwrap() }
}

#[test]
fn the_same_recipe_gives_the_same_file_and_another_seed_another() {
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, recipe: Recipe| {
        let (model, path) = (Checkpoint::synthetic(recipe).unwrap(), directory.path().join(name));
        let summary = tern::write(&model, &path, &canonical, &mut |_, _| ControlFlow::Continue(())).unwrap();
        assert_eq!(summary.bytes, tern::planned_bytes(&model, &canonical, tern::HeadType::Own).unwrap());
        (std::fs::read(&path).unwrap(), Checkpoint::open(&path).unwrap())
    };
    let (first, model) = write("first.tern", small());
    assert!(first == write("again.tern", small()).0);
    assert!(first != write("other.tern", Recipe { seed: 1, ..small() }).0);
    model.verify_checksums().unwrap();

    let tokenizer = model.tokenizer().unwrap();
    let tokens = tokenizer.encode("Once upon a time, 🦊!", true).unwrap();
    assert_eq!(tokenizer.decode(&tokens), "Once upon a time, 🦊!");
    assert_eq!(tokenizer.decode(&[600]), " w600");

    let gguf = directory.path().join("model.gguf");
    export(&model, &gguf, TernaryType::Tq2_0, TokenRowType::Own, &mut |_, _| ControlFlow::Continue(())).unwrap();
    let again = Checkpoint::open(&gguf).unwrap();
    assert_eq!(again.config(), model.config());
    let down = |model: &Checkpoint| model.projection(1, Projection::Down).unwrap();
    assert!(*down(&again).bytes == *down(&model).bytes && down(&again).scale == down(&model).scale);
    assert_eq!(
        again.tokenizer().unwrap().encode("Once upon", true).unwrap(),
        tokenizer.encode("Once upon", true).unwrap()
    );
}

#[test]
fn a_model_too_large_to_make_is_planned_all_the_same() {
    let model = Checkpoint::synthetic(Recipe::preset("100B").unwrap()).unwrap();
    let bytes = tern::planned_bytes(&model, &canonical, tern::HeadType::Own).unwrap();
    // 72 layers of 4·8192² + 3·8192·45568 weights at a quarter byte, and a bf16 embedding.
    let expected = 72u64 * (4 * 8192 * 8192 + 3 * 8192 * 45_568) / 4 + 2 * 128_256 * 8192;
    assert!((expected..expected + expected / 100).contains(&bytes), "{bytes}");
}

#[test]
fn presets_are_the_published_shapes() {
    let config = |name: &str| Recipe::preset(name).unwrap().config;
    let sizes = |name: &str| {
        let config = config(name);
        (config.layers, config.hidden, config.ffn, config.heads, config.kv_heads, config.head_dim, config.vocabulary)
    };
    assert_eq!(sizes("2B-4T"), (30, 2560, 6912, 20, 5, 128, 128_256));
    assert_eq!(sizes("3B"), (26, 3200, 8640, 32, 32, 100, 32_002));
    assert_eq!(config("2B-4T").activation, Activation::Relu2);
    assert!(config("3B").sub_norms && !config("8B").sub_norms && !config("Falcon3-7B").tied_head);
}
