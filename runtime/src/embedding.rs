//! Vectors of texts: the last norm's output, pooled over the positions and divided by its length.
//!
//! Embedding models say how they pool; a model that generates is read as one that pools the last position, which has
//! seen the whole text. Everything has one fixed order, so a text's vector is a function of model and text alone.

use std::fmt;
use std::str::FromStr;

use ternion_kernels_ref::{QuantizedRow, lanes};

use crate::formats::Pooling;
use crate::model::{ModelError, Session};
use crate::text::{Tokenizer, TokenizerError};

/// The smallest length that a vector is divided by, as in PyTorch's `normalize`.
const MIN_LENGTH: f32 = 1e-12;

/// Token ids of a text to be embedded: with the tokens that the model wants before and after it.
///
/// # Errors
/// If the vocabulary has no tokens for some of the text.
pub fn encode(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, TokenizerError> {
    let mut tokens = tokenizer.encode(text, tokenizer.adds_bos())?;
    tokens.extend(tokenizer.ending());
    Ok(tokens)
}

/// The vector of a text, `[hidden]`, of length 1. The session starts anew.
///
/// # Errors
/// If there are no tokens, too many for the context, or one that the model does not have.
pub fn embed(session: &mut Session, tokens: &[u32]) -> Result<Vec<f32>, ModelError> {
    session.truncate(0);
    let pooling = session.model().config().pooling.unwrap_or(Pooling::Last);
    let mut pooled = Vec::new();
    match pooling {
        Pooling::Last => session.prefill_hidden(tokens, &mut |position, hidden| {
            if position + 1 == tokens.len() {
                pooled.extend_from_slice(hidden);
            }
        })?,
        Pooling::Mean => {
            let mut sums = vec![0.0f64; session.model().config().hidden];
            session.prefill_hidden(tokens, &mut |_, hidden| {
                sums.iter_mut().zip(hidden).for_each(|(sum, x)| *sum += f64::from(*x));
            })?;
            pooled.extend(sums.into_iter().map(|sum| (sum / tokens.len() as f64) as f32));
        }
    }
    normalise(&mut pooled);
    Ok(pooled)
}

/// Divides by `max(√Σx², 1e-12)`, the sum as [`lanes::dot`].
pub fn normalise(x: &mut [f32]) {
    let length = lanes::dot(x, x).sqrt().max(MIN_LENGTH);
    x.iter_mut().for_each(|x| *x /= length);
}

/// How the elements of a vector are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// As they are.
    #[default]
    F32,
    /// `round(x · 127 / max|x|)`, from −127 to 127, and the scale that undoes it. Cosines need no scale.
    Int8,
    /// One bit each, 1 for what is positive; eight in a byte, the first in its highest bit.
    Binary,
}

/// A vector in one of the precisions.
#[derive(Clone, Debug, PartialEq)]
pub enum Embedding {
    /// `[hidden]`
    F32(Vec<f32>),
    /// `[hidden]`, `x ≈ value · scale`.
    Int8 {
        /// The values.
        values: Vec<i8>,
        /// What they are multiplied with.
        scale: f32,
    },
    /// `[⌈hidden / 8⌉]`
    Binary(Vec<u8>),
}

impl Embedding {
    /// Brings a vector into `precision`.
    #[must_use]
    pub fn new(x: Vec<f32>, precision: Precision) -> Self {
        match precision {
            Precision::F32 => Self::F32(x),
            Precision::Int8 => {
                let row = QuantizedRow::new(&x);
                Self::Int8 { values: row.values().to_vec(), scale: 1.0 / row.q() }
            }
            Precision::Binary => {
                let byte =
                    |bits: &[f32]| bits.iter().enumerate().fold(0, |byte, (i, x)| byte | u8::from(*x > 0.0) << (7 - i));
                Self::Binary(x.chunks(8).map(byte).collect())
            }
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Int8 => "int8",
            Self::Binary => "binary",
        })
    }
}

/// A word that names no precision of embeddings.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no precision of embeddings: expected f32, int8 or binary")]
pub struct ParsePrecisionError(String);

impl FromStr for Precision {
    type Err = ParsePrecisionError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let known = [Self::F32, Self::Int8, Self::Binary].into_iter().find(|precision| precision.to_string() == text);
        known.ok_or_else(|| ParsePrecisionError(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vector_gets_length_one_and_zero_stays_zero() {
        let mut x = [3.0, 0.0, -4.0];
        normalise(&mut x);
        assert_eq!(x, [0.6, 0.0, -0.8]);
        let mut zero = [0.0; 3];
        normalise(&mut zero);
        assert_eq!(zero, [0.0; 3]);
    }

    #[test]
    fn integers_and_bits_keep_what_they_can() {
        let x = vec![0.5, -0.25, 0.0, 0.125, -0.5, 0.3, 0.1, 0.2, 0.4];
        let Embedding::Int8 { values, scale } = Embedding::new(x.clone(), Precision::Int8) else { panic!("int8") };
        assert_eq!(values[..5], [127, -64, 0, 32, -127]);
        assert!(values.iter().zip(&x).all(|(value, x)| (f32::from(*value) * scale - x).abs() <= scale / 2.0));
        assert_eq!(Embedding::new(x, Precision::Binary), Embedding::Binary(vec![0b1001_0111, 0b1000_0000]));
    }
}
