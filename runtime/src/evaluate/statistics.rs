//! How much of a model is zero: its weights, and what flows through it.
//!
//! Everything is a count of integers, so figures are exact and do not depend on who counted what.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering};

use ternion_kernels_ref::PackedMatrix;
use ternion_tuner::Workers;

use crate::formats::{Checkpoint, ModelConfig, Projection};
use crate::model::{ModelError, Observer};

/// Weights of one matrix.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WeightCounts {
    /// Zeros among them.
    pub zeros: u64,
    /// All.
    pub weights: u64,
}

/// Counts the zeros of every projection, `[layers][projections]` in the order of [`Projection::ALL`].
///
/// # Errors
/// If a matrix is damaged.
pub fn weights(
    checkpoint: &Checkpoint,
    workers: &dyn Workers,
) -> Result<Vec<[WeightCounts; Projection::ALL.len()]>, ModelError> {
    let matrices = checkpoint.config().layers * Projection::ALL.len();
    let counts: Mutex<Vec<_>> = Mutex::new(vec![Default::default(); checkpoint.config().layers]);
    let (next, failed) = (AtomicUsize::new(0), Mutex::new(None));
    workers.run(&|_| {
        while let Some(at) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|at| *at < matrices) {
            let (layer, index) = (at / Projection::ALL.len(), at % Projection::ALL.len());
            match count(checkpoint, layer, Projection::ALL[index]) {
                Ok(found) => {
                    let counts: &mut [[WeightCounts; Projection::ALL.len()]] =
                        &mut counts.lock().unwrap_or_else(PoisonError::into_inner);
                    counts[layer][index] = found;
                }
                Err(error) => {
                    next.store(matrices, Ordering::Relaxed);
                    failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                }
            }
        }
    });
    match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(counts.into_inner().unwrap_or_else(PoisonError::into_inner)),
    }
}

fn count(checkpoint: &Checkpoint, layer: usize, projection: Projection) -> Result<WeightCounts, ModelError> {
    let tensor = checkpoint.projection(layer, projection)?;
    let matrix = tensor.to_matrix().map_err(|source| ModelError::Code { layer, projection, source })?;
    let zeros = zeros(matrix.view());
    Ok(WeightCounts { zeros, weights: (tensor.m * tensor.k) as u64 })
}

/// Number of weights whose code is 1.
fn zeros(matrix: PackedMatrix<'_>) -> u64 {
    let whole = matrix.k() / 4;
    let row = |row: usize| {
        let bytes: u64 =
            matrix.row(row)[..whole].iter().map(|byte| u64::from((byte & !(byte >> 1) & 0x55).count_ones())).sum();
        let tail = (4 * whole..matrix.k()).filter(|column| matrix.code(row, *column) == 1).count() as u64;
        bytes + tail
    };
    (0..matrix.m()).map(row).sum()
}

/// What went through one layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerActivations {
    /// Results of the gate projection.
    pub gates: u64,
    /// Those that are not positive. Under relu² they make the up projection's row of no effect.
    pub gates_not_positive: u64,
    /// int8 activations that each projection read, in the order of [`Projection::ALL`].
    pub inputs: [u64; Projection::ALL.len()],
    /// Zeros among them.
    pub zero_inputs: [u64; Projection::ALL.len()],
}

/// Counts activations while a text is read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ActivationCounts {
    /// By layer.
    pub layers: Vec<LayerActivations>,
}

impl ActivationCounts {
    /// Nothing counted yet.
    #[must_use]
    pub fn new(config: &ModelConfig) -> Self {
        Self { layers: vec![LayerActivations::default(); config.layers] }
    }

    /// All layers together.
    #[must_use]
    pub fn total(&self) -> LayerActivations {
        self.layers.iter().fold(LayerActivations::default(), |mut total, layer| {
            total.gates += layer.gates;
            total.gates_not_positive += layer.gates_not_positive;
            for at in 0..Projection::ALL.len() {
                total.inputs[at] += layer.inputs[at];
                total.zero_inputs[at] += layer.zero_inputs[at];
            }
            total
        })
    }
}

impl Observer for ActivationCounts {
    fn gate(&mut self, layer: usize, gate: &[f32]) {
        let counts = &mut self.layers[layer];
        counts.gates += gate.len() as u64;
        counts.gates_not_positive += gate.iter().filter(|gate| **gate <= 0.0).count() as u64;
    }

    fn activations(&mut self, layer: usize, projection: Projection, values: &[i8]) {
        let counts = &mut self.layers[layer];
        counts.inputs[projection as usize] += values.len() as u64;
        counts.zero_inputs[projection as usize] += values.iter().filter(|value| **value == 0).count() as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ternion_kernels_ref::{TernaryMatrix, Trit};

    #[test]
    fn zeros_are_counted_in_rows_of_any_length() {
        for k in 1..20 {
            let matrix = TernaryMatrix::from_fn(5, k, |row, column| Trit::ALL[(row * 7 + column * column) % 3]);
            let view = matrix.view();
            let expected =
                (0..5).flat_map(|row| (0..k).map(move |column| view.code(row, column))).filter(|code| *code == 1);
            assert_eq!(zeros(view), expected.count() as u64, "k {k}");
        }
    }
}
