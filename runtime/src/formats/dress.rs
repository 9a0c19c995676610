//! The dresses in which Hugging Face directories hold a ternary matrix, and how each becomes trits and one multiplier.
//!
//! The tensor decides, not the configuration alone: its element type, its row count, the presence of a
//! `weight_scale`, and, for floats, its values.
//!
//! | dress | known by | multiplier |
//! |---|---|---|
//! | packed | uint8 `[⌈m/4⌉, k]` with `weight_scale` | `weight_scale`, or its reciprocal |
//! | unpacked ternary | floats −1, 0, 1 with `weight_scale` | `weight_scale` |
//! | dequantised | floats −s, 0, s | `s` |
//! | master weights | any other floats | their absmean |

use safetensors::Dtype;
use ternion_compiler::Layout;
use ternion_compiler::layout::transpose_codes;
use ternion_kernels_ref::matrix::ZERO_BYTE;
use ternion_kernels_ref::quantize::{absmean_scale, absmean_trit};
use ternion_kernels_ref::widen::{bf16_to_f32, f16_to_f32};
use ternion_kernels_ref::{PackedMatrix, TernaryMatrix, Trit};

use super::safetensors::RawTensor;
use super::{Bytes, FloatType, FormatError, TernaryTensor};

/// What a packed tensor's `weight_scale` means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ScaleConvention {
    /// `linear_class: "autobitlinear"`: `y = Σ / q · weight_scale`.
    Direct,
    /// `linear_class: "bitlinear"`, or none: `y = Σ / (q · weight_scale)`.
    Inverse,
}

/// What floats that are not ternary are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Masters {
    /// Master weights of a BitNet model, whose absmean gives its trits.
    Quantised,
    /// Weights of some other model, which is no ternary one.
    Refused,
}

const FLOATS: &str = "BF16, F16 or F32";

impl RawTensor {
    /// The tensor's float type.
    ///
    /// # Errors
    /// If it is of another type; `expected` says which were acceptable.
    pub(crate) fn float_type(&self, expected: &'static str) -> Result<FloatType, FormatError> {
        match self.dtype {
            Dtype::BF16 => Ok(FloatType::Bf16),
            Dtype::F16 => Ok(FloatType::F16),
            Dtype::F32 => Ok(FloatType::F32),
            other => Err(FormatError::WrongType {
                path: self.path.clone(),
                tensor: self.name.clone(),
                found: other.to_string(),
                expected,
            }),
        }
    }

    /// All elements as `f32`, finite, of a tensor with `shape`.
    pub(crate) fn floats(&self, shape: &[usize]) -> Result<Vec<f32>, FormatError> {
        let dtype = self.float_type(FLOATS)?;
        self.check_shape(shape)?;
        let columns = shape.last().copied().unwrap_or(1).max(1);
        let mut values = vec![0.0; self.bytes.len() / dtype.bytes()];
        dtype.widen(&self.bytes, &mut values);
        match values.iter().position(|value| !value.is_finite()) {
            None => Ok(values),
            Some(at) => Err(self.invalid(at, columns, values[at], "a finite number")),
        }
    }

    pub(super) fn check_shape(&self, expected: &[usize]) -> Result<(), FormatError> {
        if self.shape == expected { Ok(()) } else { Err(self.wrong_shape(expected)) }
    }

    fn wrong_shape(&self, expected: &[usize]) -> FormatError {
        FormatError::WrongShape {
            path: self.path.clone(),
            tensor: self.name.clone(),
            found: self.shape.clone(),
            expected: expected.to_vec(),
        }
    }

    fn invalid(&self, at: usize, columns: usize, value: f32, expected: &'static str) -> FormatError {
        FormatError::InvalidValue {
            path: self.path.clone(),
            tensor: self.name.clone(),
            row: at / columns,
            column: at % columns,
            value,
            expected,
        }
    }
}

/// Reads a projection `[m, k]` from its `weight` and, where there is one, its `weight_scale`.
///
/// # Errors
/// A wrong shape or type, code 3, or values that are in none of the dresses.
pub(super) fn ternary(
    weight: &RawTensor,
    scale: Option<RawTensor>,
    (m, k): (usize, usize),
    convention: ScaleConvention,
    masters: Masters,
) -> Result<TernaryTensor, FormatError> {
    let scale = scale.map(|tensor| weight_scale(&tensor)).transpose()?;
    if weight.dtype == Dtype::U8 {
        weight.check_shape(&[m.div_ceil(4), k])?;
        let scale = match (scale, convention) {
            (Some(scale), ScaleConvention::Direct) => scale,
            (Some(scale), ScaleConvention::Inverse) => 1.0 / scale,
            (None, _) => {
                return Err(FormatError::MissingTensor {
                    path: weight.path.clone(),
                    tensor: format!("{}_scale", weight.name),
                });
            }
        };
        return packed(weight, m, k).map(|matrix| tensor(matrix, scale));
    }

    let dtype = weight.float_type("U8, BF16, F16 or F32")?;
    weight.check_shape(&[m, k])?;
    let row_bytes = k * dtype.bytes();
    let rows = || weight.bytes.chunks_exact(row_bytes.max(1));
    let invalid = |is_valid: &dyn Fn(f32) -> bool, expected| {
        let mut values = vec![0.0; k];
        rows().enumerate().find_map(|(row, bytes)| {
            dtype.widen(bytes, &mut values);
            let column = values.iter().position(|value| !is_valid(*value))?;
            Some(weight.invalid(row * k + column, k, values[column], expected))
        })
    };
    let matrix = |trit: &dyn Fn(f32) -> Trit| pack_rows(m, k, dtype, rows(), trit);
    let Magnitudes { smallest, largest, sound } = Magnitudes::of(dtype, &weight.bytes);
    if !sound && let Some(error) = invalid(&f32::is_finite, "a finite number") {
        return Err(error);
    }
    if let Some(scale) = scale {
        if convention == ScaleConvention::Inverse {
            return Err(FormatError::Unsupported {
                path: weight.path.clone(),
                what: format!(
                    "tensor {} holds floats and has a weight_scale without linear_class autobitlinear",
                    weight.name
                ),
            });
        }
        let is_trit = |value| Trit::from_value(value).is_some();
        return match invalid(&is_trit, "−1, 0 or 1, as weights beside a weight_scale are") {
            None => Ok(tensor(matrix(&sign), scale)),
            Some(error) => Err(error),
        };
    }
    if largest > 0.0 && smallest == largest {
        return Ok(tensor(matrix(&sign), largest));
    }
    if masters == Masters::Refused {
        return Err(FormatError::Tensor {
            path: weight.path.clone(),
            tensor: weight.name.clone(),
            problem: "is neither ternary nor part of a BitNet model: ternion runs ternary models only".to_owned(),
        });
    }
    let scale = absmean(dtype, &weight.bytes);
    let reciprocal = 1.0 / scale;
    Ok(tensor(matrix(&|value| absmean_trit(value, reciprocal)), scale))
}

/// The least and the largest magnitude of the values that are not 0, and whether all values are finite.
struct Magnitudes {
    smallest: f32,
    largest: f32,
    sound: bool,
}

impl Magnitudes {
    fn of(dtype: FloatType, bytes: &[u8]) -> Self {
        let mut all = Self { smallest: f32::INFINITY, largest: 0.0, sound: true };
        let mut values = [0.0; 256];
        for bytes in bytes.chunks(values.len() * dtype.bytes()) {
            let values = &mut values[..bytes.len() / dtype.bytes()];
            dtype.widen(bytes, values);
            for magnitude in values.iter().map(|value| value.abs()) {
                all.sound &= magnitude < f32::INFINITY;
                all.largest = all.largest.max(magnitude);
                all.smallest = all.smallest.min(if magnitude == 0.0 { f32::INFINITY } else { magnitude });
            }
        }
        all
    }
}

/// The absmean scale of all values, widened one by one: the largest matrices would take gigabytes as `f32`.
fn absmean(dtype: FloatType, bytes: &[u8]) -> f32 {
    match dtype {
        FloatType::Bf16 => {
            absmean_scale(bytes.as_chunks().0.iter().map(|bytes| bf16_to_f32(u16::from_le_bytes(*bytes))))
        }
        FloatType::F16 => absmean_scale(bytes.as_chunks().0.iter().map(|bytes| f16_to_f32(u16::from_le_bytes(*bytes)))),
        FloatType::F32 => absmean_scale(bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes))),
    }
}

fn tensor(matrix: TernaryMatrix, scale: f32) -> TernaryTensor {
    let (m, k) = (matrix.view().m(), matrix.view().k());
    TernaryTensor { m, k, layout: Layout::Canonical, bytes: Bytes::from(matrix.into_bytes()), scale }
}

fn sign(value: f32) -> Trit {
    match value {
        value if value > 0.0 => Trit::Plus,
        value if value < 0.0 => Trit::Minus,
        _ => Trit::Zero,
    }
}

/// A `weight_scale` tensor's one value, such that it and its reciprocal are normal numbers.
pub(super) fn weight_scale(tensor: &RawTensor) -> Result<f32, FormatError> {
    let scale = match tensor.floats(if tensor.shape.is_empty() { &[] } else { &[1] })?[..] {
        [scale] => scale,
        _ => return Err(tensor.wrong_shape(&[1])),
    };
    if scale.is_normal() && scale > 0.0 && (1.0 / scale).is_normal() {
        Ok(scale)
    } else {
        Err(tensor.invalid(0, 1, scale, "a positive scale"))
    }
}

/// Packs `[m, k]` weights, row by row.
fn pack_rows<'a>(
    m: usize,
    k: usize,
    dtype: FloatType,
    rows: impl Iterator<Item = &'a [u8]>,
    trit: impl Fn(f32) -> Trit,
) -> TernaryMatrix {
    let mut bytes = vec![ZERO_BYTE; m * PackedMatrix::row_bytes(k)];
    let mut values = vec![0.0; k];
    for (row, bytes) in rows.zip(bytes.chunks_exact_mut(PackedMatrix::row_bytes(k).max(1))) {
        dtype.widen(row, &mut values);
        for (values, byte) in values.chunks(4).zip(bytes) {
            for (place, value) in values.iter().enumerate() {
                *byte ^= (Trit::Zero.code() ^ trit(*value).code()) << (2 * place);
            }
        }
    }
    TernaryMatrix::from_bytes(m, k, bytes).expect("made of trits")
}

/// Turns Hugging Face's packing into the canonical one.
///
/// There, byte `(r, c)` holds column `c` of rows `r`, `r + R`, `r + 2R`, `r + 3R` with `R = ⌈m/4⌉`. The four bytes of four
/// neighbouring columns are a 4×4 matrix of two-bit codes, whose transpose holds four bytes of the canonical
/// packing, one of each row.
fn packed(weight: &RawTensor, m: usize, k: usize) -> Result<TernaryMatrix, FormatError> {
    let (quarter, row_bytes) = (m.div_ceil(4), PackedMatrix::row_bytes(k));
    let mut bytes = vec![0; m * row_bytes];
    let mut rows = [0, 1, 2, 3].map(|_| vec![0u8; row_bytes]);
    for (r, source) in weight.bytes.chunks_exact(k).enumerate() {
        let [row0, row1, row2, row3] = &mut rows;
        let (columns, tail) = source.as_chunks::<4>();
        for (j, columns) in columns.iter().enumerate() {
            [row0[j], row1[j], row2[j], row3[j]] = transpose_codes(*columns);
        }
        if !tail.is_empty() {
            let mut columns = [ZERO_BYTE; 4];
            columns[..tail.len()].copy_from_slice(tail);
            let j = row_bytes - 1;
            [row0[j], row1[j], row2[j], row3[j]] = transpose_codes(columns);
        }
        // With m no multiple of 4, some bytes hold fewer than four rows.
        for (row, packed) in (r..m).step_by(quarter).zip(&rows) {
            bytes[row * row_bytes..][..row_bytes].copy_from_slice(packed);
        }
    }
    TernaryMatrix::from_bytes(m, k, bytes)
        .map_err(|invalid| FormatError::invalid_code(&weight.path, &weight.name, invalid))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use proptest::prelude::*;
    use ternion_kernels_ref::quantize::MIN_SCALE;

    use super::*;

    fn raw(dtype: Dtype, shape: &[usize], bytes: Vec<u8>) -> RawTensor {
        let path = PathBuf::from("model.safetensors");
        RawTensor { path, name: "p.weight".to_owned(), dtype, shape: shape.to_vec(), bytes: Bytes::from(bytes) }
    }

    fn floats(shape: &[usize], values: &[f32]) -> RawTensor {
        raw(Dtype::F32, shape, values.iter().flat_map(|value| value.to_le_bytes()).collect())
    }

    fn trits() -> impl Strategy<Value = (usize, usize, Vec<Trit>)> {
        (1usize..20, 1usize..40).prop_flat_map(|(m, k)| {
            (Just(m), Just(k), prop::collection::vec(prop::sample::select(&Trit::ALL[..]), m * k))
        })
    }

    proptest! {
        #[test]
        fn packed_rows_come_out_where_they_belong((m, k, trits) in trits()) {
            let quarter = m.div_ceil(4);
            let mut bytes = vec![0u8; quarter * k];
            for (at, trit) in trits.iter().enumerate() {
                let (row, column) = (at / k, at % k);
                bytes[row % quarter * k + column] |= trit.code() << (2 * (row / quarter));
            }
            let weight = raw(Dtype::U8, &[quarter, k], bytes);
            let tensor = ternary(&weight, Some(floats(&[1], &[0.5])), (m, k), ScaleConvention::Inverse, Masters::Quantised).unwrap();
            prop_assert_eq!(tensor.scale, 2.0);
            let expected = TernaryMatrix::from_fn(m, k, |row, column| trits[row * k + column]);
            prop_assert_eq!(tensor.to_matrix(), Ok(expected));
        }

        #[test]
        fn unpacked_and_dequantised_weights_keep_trits_and_scale((m, k, trits) in trits(), s in 1e-3f32..2.0) {
            prop_assume!(trits.iter().any(|trit| *trit != Trit::Zero));
            let expected = TernaryMatrix::from_fn(m, k, |row, column| trits[row * k + column]);
            let values = |scale: f32| trits.iter().map(|trit| trit.value() as f32 * scale).collect::<Vec<f32>>();

            let unpacked = floats(&[m, k], &values(1.0));
            let tensor = ternary(&unpacked, Some(floats(&[], &[s])), (m, k), ScaleConvention::Direct, Masters::Quantised).unwrap();
            prop_assert_eq!((tensor.to_matrix(), tensor.scale), (Ok(expected.clone()), s));

            let dequantised = floats(&[m, k], &values(s));
            let tensor = ternary(&dequantised, None, (m, k), ScaleConvention::Inverse, Masters::Quantised).unwrap();
            prop_assert_eq!((tensor.to_matrix(), tensor.scale), (Ok(expected), s));
        }

        #[test]
        fn master_weights_are_quantised_as_the_reference_does(values in prop::collection::vec(-1f32..1.0, 24)) {
            let reference = ternion_kernels_ref::quantize::absmean(3, 8, &values);
            let tensor = ternary(&floats(&[3, 8], &values), None, (3, 8), ScaleConvention::Inverse, Masters::Quantised).unwrap();
            prop_assert_eq!((tensor.to_matrix(), tensor.scale), (Ok(reference.trits), reference.scale));
        }
    }

    #[test]
    fn weights_that_are_all_zero_have_the_smallest_scale() {
        let tensor =
            ternary(&floats(&[2, 4], &[0.0; 8]), None, (2, 4), ScaleConvention::Direct, Masters::Quantised).unwrap();
        assert_eq!(tensor.scale, MIN_SCALE);
        assert!(tensor.bytes.iter().all(|byte| *byte == ZERO_BYTE));
    }

    #[test]
    fn what_is_in_no_dress_is_refused_with_its_place() {
        let scale = || Some(floats(&[1], &[0.5]));
        let error = |weight: RawTensor, scale, convention| {
            ternary(&weight, scale, (4, 4), convention, Masters::Quantised).expect_err("refused").to_string()
        };
        let direct = ScaleConvention::Direct;
        let code3 = raw(Dtype::U8, &[1, 4], vec![0x55, 0x55, 0x55 | 0x30, 0x55]);
        assert!(error(code3, scale(), direct).contains("row 2, column 2: two-bit code 3"));
        assert!(error(raw(Dtype::U8, &[1, 4], vec![0; 4]), None, direct).contains("p.weight_scale is missing"));
        assert!(error(raw(Dtype::U8, &[4, 4], vec![0; 16]), scale(), direct).contains("shape [4, 4]"));
        assert!(error(raw(Dtype::I8, &[4, 4], vec![0; 16]), scale(), direct).contains("element type I8"));
        let mut values = [1.0; 16];
        values[6] = 0.25;
        assert!(error(floats(&[4, 4], &values), scale(), direct).contains("row 1, column 2: 0.25 is not"));
        values[6] = f32::NAN;
        assert!(error(floats(&[4, 4], &values), None, direct).contains("NaN is not a finite number"));
        let ones = || floats(&[4, 4], &[1.0; 16]);
        assert!(error(ones(), scale(), ScaleConvention::Inverse).contains("autobitlinear"));
        for bad in [0.0, -1.0, f32::INFINITY, 1e-40] {
            assert!(ternary(&ones(), Some(floats(&[1], &[bad])), (4, 4), direct, Masters::Quantised).is_err(), "{bad}");
        }
        assert!(ternary(&ones(), Some(floats(&[2], &[1.0; 2])), (4, 4), direct, Masters::Quantised).is_err());
    }
}
