//! Element types of GGUF tensors: what each takes, which can be read, and what to do about those that cannot.

use std::fmt;
use std::path::Path;

use crate::formats::{FloatType, FormatError, RowType};

/// An element type that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum TensorType {
    Float(FloatType),
    Q4_0,
    Q8_0,
    Q4K,
    Q6K,
    Tq1_0,
    Tq2_0,
    I2S,
}

/// Types by the number they have in a file.
const READABLE: [(u32, TensorType); 10] = [
    (0, TensorType::Float(FloatType::F32)),
    (1, TensorType::Float(FloatType::F16)),
    (2, TensorType::Q4_0),
    (8, TensorType::Q8_0),
    (12, TensorType::Q4K),
    (14, TensorType::Q6K),
    (30, TensorType::Float(FloatType::Bf16)),
    (34, TensorType::Tq1_0),
    (35, TensorType::Tq2_0),
    (36, TensorType::I2S),
];

const FROM_IT: &str = "convert from the model's Hugging Face directory, or take a GGUF of type I2_S, TQ1_0 or TQ2_0";
const GENERIC: &str = "only F32, F16, BF16, Q4_0, Q8_0, Q4_K, Q6_K, TQ1_0, TQ2_0 and I2_S are read";

/// Types that cannot be read, by number: name and advice.
const UNREADABLE: [(u32, &str, &str); 28] = [
    (3, "Q4_1", GENERIC),
    (6, "Q5_0", GENERIC),
    (7, "Q5_1", GENERIC),
    (9, "Q8_1", GENERIC),
    (10, "Q2_K", GENERIC),
    (11, "Q3_K", GENERIC),
    (13, "Q5_K", GENERIC),
    (15, "Q8_K", GENERIC),
    (16, "IQ2_XXS", GENERIC),
    (17, "IQ2_XS", GENERIC),
    (18, "IQ3_XXS", GENERIC),
    (19, "IQ1_S", GENERIC),
    (20, "IQ4_NL", GENERIC),
    (21, "IQ3_S", GENERIC),
    (22, "IQ2_S", GENERIC),
    (23, "IQ4_XS", GENERIC),
    (24, "I8", GENERIC),
    (25, "I16", GENERIC),
    (26, "I32", GENERIC),
    (27, "I64", GENERIC),
    (28, "F64", GENERIC),
    (29, "IQ1_M", GENERIC),
    (37, "37, removed from llama.cpp", GENERIC),
    (38, "TL1 (bitnet.cpp), laid out for one kernel configuration that is not in the file", FROM_IT),
    (
        39,
        "TL2 (bitnet.cpp, laid out for one kernel configuration that is not in the file) or MXFP4 (llama.cpp)",
        FROM_IT,
    ),
    (134, "IQ1_BN (ik_llama.cpp)", FROM_IT),
    (135, "IQ2_BN (ik_llama.cpp)", FROM_IT),
    (335, "IQ2_BN_R4 (ik_llama.cpp)", FROM_IT),
];

impl TensorType {
    /// The type of this number.
    ///
    /// # Errors
    /// One that cannot be read, by name, with advice.
    pub(super) fn from_id(id: u32, path: &Path, tensor: &str) -> Result<Self, FormatError> {
        if let Some((_, kind)) = READABLE.iter().find(|(known, _)| *known == id) {
            return Ok(*kind);
        }
        let known = UNREADABLE.iter().find(|(known, ..)| *known == id);
        let (found, advice) = known.map_or_else(|| (id.to_string(), GENERIC), |(_, name, a)| ((*name).to_owned(), *a));
        Err(FormatError::UnreadableType { path: path.to_owned(), tensor: tensor.to_owned(), found, advice })
    }

    /// The number of this type in a file.
    pub(super) fn id(self) -> u32 {
        READABLE.iter().find(|(_, kind)| *kind == self).map_or(0, |(id, _)| *id)
    }

    /// How it stores rows of embeddings and heads; `None` if it holds ternary weights only.
    pub(super) fn rows(self) -> Option<RowType> {
        match self {
            Self::Float(dtype) => Some(dtype.into()),
            Self::Q4_0 => Some(RowType::Q4_0),
            Self::Q8_0 => Some(RowType::Q8_0),
            Self::Q4K => Some(RowType::Q4K),
            Self::Q6K => Some(RowType::Q6K),
            Self::Tq1_0 | Self::Tq2_0 | Self::I2S => None,
        }
    }

    /// The type that stores rows like this; `None` if there is none.
    pub(super) fn of_rows(rows: RowType) -> Option<Self> {
        READABLE.iter().map(|(_, kind)| *kind).find(|kind| kind.rows() == Some(rows))
    }

    /// Elements and bytes of a block.
    pub(super) const fn block(self) -> (usize, usize) {
        match self {
            Self::Float(dtype) => (1, dtype.bytes()),
            Self::Q4_0 => RowType::Q4_0.block(),
            Self::Q8_0 => RowType::Q8_0.block(),
            Self::Q4K => RowType::Q4K.block(),
            Self::Q6K => RowType::Q6K.block(),
            Self::Tq1_0 => (256, 48 + 4 + 2),
            Self::Tq2_0 => (256, 64 + 2),
            Self::I2S => (4, 1),
        }
    }

    /// Bytes of a tensor of `elements` in rows of `row`, or `None` if it cannot have this shape.
    pub(super) fn bytes(self, row: usize, elements: usize) -> Option<usize> {
        let (block, bytes) = self.block();
        // I2_S runs over the flattened tensor, everything else row by row.
        let whole = if self == Self::I2S { elements } else { row };
        if !whole.is_multiple_of(block) {
            return None;
        }
        let tail = if self == Self::I2S { super::ternary::I2S_TAIL } else { 0 };
        (elements / block).checked_mul(bytes)?.checked_add(tail)
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Float(FloatType::F32) => "F32",
            Self::Float(FloatType::F16) => "F16",
            Self::Float(FloatType::Bf16) => "BF16",
            Self::Q4_0 => "Q4_0",
            Self::Q8_0 => "Q8_0",
            Self::Q4K => "Q4_K",
            Self::Q6K => "Q6_K",
            Self::Tq1_0 => "TQ1_0",
            Self::Tq2_0 => "TQ2_0",
            Self::I2S => "I2_S",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_readable_type_has_its_own_number_and_prints_its_name() {
        for (id, kind) in READABLE {
            assert_eq!(TensorType::from_id(id, Path::new("m.gguf"), "t").unwrap(), kind);
            assert_eq!(kind.id(), id);
        }
    }

    #[test]
    fn types_that_cannot_be_read_are_refused_by_name_with_advice() {
        for (id, name, advice) in
            [(38, "TL1", "I2_S"), (39, "MXFP4", "Hugging Face"), (135, "IQ2_BN", "convert"), (99, "99", "only F32")]
        {
            let error = TensorType::from_id(id, Path::new("m.gguf"), "blk.0.attn_q.weight").unwrap_err().to_string();
            assert!(error.contains(name) && error.contains(advice) && error.contains("blk.0.attn_q"), "{error}");
        }
    }

    #[test]
    fn shapes_that_blocks_do_not_divide_are_refused() {
        assert_eq!(TensorType::Tq2_0.bytes(512, 1024), Some(4 * 66));
        assert_eq!(TensorType::Tq2_0.bytes(128, 1024), None);
        assert_eq!(TensorType::I2S.bytes(30, 120), Some(30 + 32));
        assert_eq!(TensorType::Float(FloatType::F32).bytes(1, usize::MAX), None);
    }
}
