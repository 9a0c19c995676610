//! A low-rank addition to one projection (LoRA): `y += s · B·(A·x)`, in `f32`, beside the ternary product.

use ternion_kernels_ref::lanes;

use crate::formats::FloatMatrix;

/// One adapter's addition to one projection. Weights stay in their file's own type.
#[derive(Clone, Debug)]
pub(crate) struct LowRank {
    /// `A`, `[rank, k]`.
    pub(crate) a: FloatMatrix,
    /// `B`, `[m, rank]`.
    pub(crate) b: FloatMatrix,
    /// `s`: the adapter's own scale times the one it is applied with.
    pub(crate) scale: f32,
}

impl LowRank {
    /// The definition: `t = A·x`, `y[i] = fma(B[i]·t, s, y[i])`, every dot product by [`lanes::dot`].
    pub(super) fn add(&self, x: &[f32], y: &mut [f32]) {
        let product = |matrix: &FloatMatrix, x: &[f32]| -> Vec<f32> {
            let mut row = vec![0.0; matrix.columns];
            let dot = |i| {
                matrix.widen_row(i, &mut row);
                lanes::dot(x, &row)
            };
            (0..matrix.rows).map(dot).collect()
        };
        let low = product(&self.a, x);
        for (y, u) in y.iter_mut().zip(product(&self.b, &low)) {
            *y = u.mul_add(self.scale, *y);
        }
    }
}
