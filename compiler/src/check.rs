//! The check that every kernel passes before its first use.
//!
//! Two row tiles and a tail at full k, on seeded data, against `kernels-ref`. The first row is all +1 and the second
//! all −1, and the first column all 127, so that sums reach their bounds.

use std::fmt;

use ternion_kernels_ref::{QuantizedRow, TernaryMatrix, Trit, gemm};

use crate::kernel::{Activations, Kernel, OutRows};
use crate::{Columns, Layout};

/// Seed of the data that kernels are checked on.
pub const CHECK_SEED: u64 = 0x7465_726e_696f_6e21;

/// The first result in which a kernel differs from the reference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// Seed of the data.
    pub seed: u64,
    /// Row of the result.
    pub row: usize,
    /// Column of the result.
    pub column: usize,
    /// What the reference says.
    pub expected: i32,
    /// What the kernel says.
    pub found: i32,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, row, column, expected, found } = self;
        write!(f, "seed {seed:#x}, row {row}, column {column}: the reference gives {expected}, the kernel {found}")
    }
}

/// A stream of pseudo-random numbers (SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
}

/// Runs `kernel` on seeded data and compares every result.
pub(crate) fn check(kernel: &Kernel) -> Result<(), Mismatch> {
    let k = kernel.spec().k;
    let mut random = Random(CHECK_SEED);
    let m = 2 * kernel.layout().tile_rows() + 1;
    let row_bytes = k.div_ceil(4);
    let mut canonical = Vec::with_capacity(m * row_bytes);
    for row in 0..m {
        canonical.extend((0..row_bytes).map(|_| match row {
            0 => 0b10_10_10_10,
            1 => 0,
            _ => (0..4).fold(0, |byte, _| byte << 2 | (random.next() % 3) as u8),
        }));
    }
    let weights = TernaryMatrix::from_bytes(m, k, canonical).unwrap_or_else(|_| {
        // Only codes 0 to 2 were drawn.
        TernaryMatrix::from_fn(m, k, |_, _| Trit::Zero)
    });
    let packed = kernel.layout().pack(weights.view());
    match kernel.spec().columns {
        Columns::One => {
            let columns = [row_of(k, &mut random, true), row_of(k, &mut random, false)];
            columns.iter().try_for_each(|column| compare(kernel, &weights, &packed, std::slice::from_ref(column)))
        }
        Columns::Many => {
            // One pass of `ntile` columns and one column left over.
            let n = usize::from(kernel.schedule().ntile) + 1;
            let columns: Vec<_> = (0..n).map(|column| row_of(k, &mut random, column == 0)).collect();
            compare(kernel, &weights, &packed, &columns)
        }
    }
}

/// Random activations, or the largest ones.
fn row_of(k: usize, random: &mut Random, largest: bool) -> QuantizedRow {
    let values = (0..k).map(|_| if largest { 127 } else { (random.next() % 255) as i16 as i8 }.max(-127)).collect();
    QuantizedRow::from_values(values).expect("no value is -128")
}

/// Runs the kernel on all tiles and columns and compares with the reference.
fn compare(kernel: &Kernel, weights: &TernaryMatrix, packed: &[u8], columns: &[QuantizedRow]) -> Result<(), Mismatch> {
    let (m, k) = (weights.view().m(), kernel.spec().k);
    let layout: Layout = kernel.layout();
    let tiles = layout.tiles(m);
    let padded = tiles * layout.tile_rows();
    let format = kernel.activation_format();
    let stride = format.bytes(k);
    let mut prepared = vec![0; columns.len() * stride];
    for (column, target) in columns.iter().zip(prepared.chunks_exact_mut(stride)) {
        format.prepare(column.values(), target);
    }
    let sums: Vec<i32> = columns.iter().map(QuantizedRow::sum).collect();
    let mut results = vec![i32::MIN; columns.len() * padded];
    let activations = Activations { columns: &prepared, stride, sums: &sums };
    // SAFETY: `results` belongs to this call alone.
    unsafe { kernel.run(packed, 0..tiles, &activations, &OutRows::new(&mut results, padded)) }
    let expected = gemm::gemm(weights.view(), columns);
    for (column, (expected, found)) in expected.chunks_exact(m).zip(results.chunks_exact(padded)).enumerate() {
        for (row, (expected, found)) in expected.iter().zip(found).enumerate() {
            if expected != found {
                return Err(Mismatch { seed: CHECK_SEED, row, column, expected: *expected, found: *found });
            }
        }
    }
    Ok(())
}
