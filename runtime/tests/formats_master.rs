//! Real master weights: their absmean gives the trits of the embedded model.
//!
//! The fixtures are parts of the real file; `fixtures/ternary-tales/make_master_fixtures.py` made them.

mod support;

use std::collections::HashMap;

use safetensors::SafeTensors;
use ternion_kernels_ref::quantize::{absmean_scale, absmean_trit};
use ternion_runtime::formats::{FloatType, Projection};

/// Absmean scale of every projection of the master weights.
fn scales() -> HashMap<String, f32> {
    let json = std::fs::read(support::fixture("master-scales.json")).unwrap();
    let bits: HashMap<String, u32> = serde_json::from_slice(&json).unwrap();
    bits.into_iter().map(|(module, bits)| (module, f32::from_bits(bits))).collect()
}

#[test]
fn absmean_of_the_master_weights_gives_the_trits_of_the_embedded_model() {
    let scales = scales();
    let file = std::fs::read(support::fixture("master-slice.safetensors")).unwrap();
    let slices = SafeTensors::deserialize(&file).unwrap();
    let model = support::embedded();
    let mut compared = 0;
    for (name, layer, projection, first_row) in [
        ("model.layers.0.self_attn.k_proj.weight", 0, Projection::Key, 0),
        ("model.layers.5.self_attn.v_proj.weight", 5, Projection::Value, 0),
        ("model.layers.3.mlp.gate_proj.weight[256..512]", 3, Projection::Gate, 256),
    ] {
        let slice = slices.tensor(name).unwrap();
        let &[rows, columns] = slice.shape() else { panic!("a matrix") };
        let mut weights = vec![0.0; rows * columns];
        FloatType::Bf16.widen(slice.data(), &mut weights);

        let module = name.split(".weight").next().unwrap();
        let scale = scales[module];
        let packed = model.projection(layer, projection).unwrap();
        if rows == packed.m {
            assert_eq!(absmean_scale(weights.iter().copied()).to_bits(), scale.to_bits(), "{module}");
        }
        let (matrix, reciprocal) = (packed.to_matrix().unwrap(), 1.0 / scale);
        for (at, weight) in weights.iter().enumerate() {
            let (row, column) = (first_row + at / columns, at % columns);
            assert_eq!(absmean_trit(*weight, reciprocal), matrix.trit(row, column), "{module}, {row}, {column}");
            compared += 1;
        }
    }
    assert_eq!(compared, 2 * 128 * 256 + 256 * 256);
}

#[test]
fn the_embedded_models_scales_are_those_of_the_master_weights_in_bf16() {
    let (scales, model) = (scales(), support::embedded());
    assert_eq!(scales.len(), 42);
    for layer in 0..6 {
        for projection in Projection::ALL {
            let scale = scales[&format!("model.layers.{layer}.{projection}")];
            let packed = model.projection(layer, projection).unwrap().scale;
            assert_eq!(half::bf16::from_f32(scale).to_f32(), packed, "layer {layer}, {projection}");
        }
    }
}
