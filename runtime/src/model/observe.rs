//! Looking at a forward pass from outside, for statistics.

use crate::formats::Projection;

/// Sees what goes on inside the layers, token by token in order of position, layer by layer for each chunk.
pub trait Observer {
    /// Results of the gate projection before the activation function, `[ffn]`.
    fn gate(&mut self, layer: usize, gate: &[f32]);

    /// The int8 activations that a projection reads, `[k]`.
    fn activations(&mut self, layer: usize, projection: Projection, values: &[i8]);
}
