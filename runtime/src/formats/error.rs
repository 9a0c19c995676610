//! Everything that can be wrong with a model's files. Each message is one line: what, where, and what to do.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use ternion_kernels_ref::InvalidCode;

use crate::text::TokenizerError;

/// Why a model could not be opened, read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The operating system could not open or read a file.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The operating system could not create or write a file. Nothing is left under its name.
    #[error("cannot write {}: {source}; nothing was left behind, free some space or choose another place", path.display())]
    Write {
        /// The file that was to be written.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Writing was stopped by its progress callback. Nothing is left under the file's name.
    #[error("writing {} was cancelled", path.display())]
    Cancelled {
        /// The file that was to be written.
        path: PathBuf,
    },
    /// A directory that holds no model.
    #[error("{} has no {missing}: give a Hugging Face model directory with safetensors, or a prepared .tern file", path.display())]
    NotAModel {
        /// The directory.
        path: PathBuf,
        /// What every model directory has.
        missing: &'static str,
    },
    /// A file that should be JSON and is not, or has another structure.
    #[error("{}: not the JSON expected here ({problem}): get the file again", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        problem: String,
    },
    /// No family of models that ternion knows.
    #[error("{}: unknown architecture {found}; known are {}", path.display(), known.join(", "))]
    UnknownArchitecture {
        /// The `config.json`.
        path: PathBuf,
        /// What it calls itself.
        found: String,
        /// What could be read.
        known: Vec<&'static str>,
    },
    /// A field of a configuration is missing, or holds something that cannot be.
    #[error("{}: {field} {problem}: get the file again or correct it", path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// The field.
        field: String,
        /// What is wrong, as the end of a sentence.
        problem: String,
    },
    /// The model needs something that ternion does not do.
    #[error("{}: {what}, which is not supported", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What it needs.
        what: String,
    },
    /// A safetensors file whose header or length is wrong.
    #[error("{}: damaged safetensors file ({problem}): download it again", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A GGUF file whose container contradicts itself.
    #[error("{}: damaged GGUF file ({problem}): download it again", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A GGUF file with a tensor of a type that cannot be read.
    #[error("{}: tensor {tensor} has type {found}, which cannot be read: {advice}", path.display())]
    UnreadableType {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its type.
        found: String,
        /// What to do instead.
        advice: &'static str,
    },
    /// A tensor that cannot be what the model needs there.
    #[error("{}: tensor {tensor} {problem}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is wrong and what to do, as the end of a sentence.
        problem: String,
    },
    /// A tensor that the architecture needs is not there.
    #[error("{}: tensor {tensor} is missing: the download is incomplete, or this is another architecture", path.display())]
    MissingTensor {
        /// The model.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A tensor's shape does not follow from `config.json`.
    #[error("{}: tensor {tensor} has shape {found:?}, but the configuration asks for {expected:?}: they belong to different models", path.display())]
    WrongShape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape it should have.
        expected: Vec<usize>,
    },
    /// A tensor's element type cannot be read.
    #[error("{}: tensor {tensor} has element type {found}, expected {expected}: convert the model again", path.display())]
    WrongType {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its element type.
        found: String,
        /// The types that can be read.
        expected: &'static str,
    },
    /// A packed weight has code 3.
    #[error(
        "{}: tensor {tensor}, row {row}, column {column}: two-bit code 3 is no ternary weight: the file is damaged or not ternary",
        path.display()
    )]
    InvalidCode {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Row of the unpacked matrix.
        row: usize,
        /// Column of the matrix.
        column: usize,
    },
    /// A weight, scale or norm that no such tensor can hold.
    #[error("{}: tensor {tensor}, row {row}, column {column}: {value} is not {expected}: the file is damaged or of another kind", path.display())]
    InvalidValue {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Row of the value.
        row: usize,
        /// Column of the value.
        column: usize,
        /// The value.
        value: f32,
        /// What was expected there.
        expected: &'static str,
    },
    /// A file that is not a prepared one.
    #[error("{} is not a prepared model: give a .tern file made by `ternion prepare`, or a Hugging Face model directory", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// A prepared file whose writing was interrupted.
    #[error("{} is unfinished: run the command that was interrupted again, it continues where it was", path.display())]
    Unfinished {
        /// The file.
        path: PathBuf,
    },
    /// A prepared file from a newer ternion.
    #[error("{} has format version {found}, this ternion reads up to {newest}: update ternion or prepare the model again", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The newest version that can be read.
        newest: u32,
    },
    /// A prepared file that ends too early.
    #[error("{} is cut off: it needs {needs} bytes and has {has}: copy or prepare it again", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Bytes it should have, as far as can be told.
        needs: u64,
        /// Bytes it has.
        has: u64,
    },
    /// A prepared file whose content contradicts itself.
    #[error("{} is damaged ({problem}): copy or prepare it again", path.display())]
    Corrupted {
        /// The file.
        path: PathBuf,
        /// The contradiction.
        problem: String,
    },
    /// The model's tokenizer.
    #[error("{}: {source}", path.display())]
    Tokenizer {
        /// The file it comes from.
        path: PathBuf,
        /// What is wrong.
        source: TokenizerError,
    },
    /// A layer that the model does not have.
    #[error("{}: layer {layer} of a model with {layers} layers, counted from 0", path.display())]
    NoSuchLayer {
        /// The model.
        path: PathBuf,
        /// The layer that was asked for.
        layer: usize,
        /// Number of layers.
        layers: usize,
    },
}

impl FormatError {
    /// That a weight of a tensor is none, and where.
    pub(crate) fn invalid_code(path: &Path, tensor: &str, InvalidCode { row, column }: InvalidCode) -> Self {
        Self::InvalidCode { path: path.to_owned(), tensor: tensor.to_owned(), row, column }
    }
}

/// What a file says, for a message that repeats it: one line, and of what is long the beginning.
pub(crate) fn brief(said: impl fmt::Display) -> String {
    const LONGEST: usize = 200;
    let said = said.to_string();
    let mut line: String = said.chars().map(|char| if char.is_control() { ' ' } else { char }).take(LONGEST).collect();
    if said.chars().nth(LONGEST).is_some() {
        line.push('…');
    }
    line
}

/// [`brief`], with every run of spaces as one.
pub(crate) fn brief_line(said: impl fmt::Display) -> String {
    brief(said.to_string().split_whitespace().collect::<Vec<_>>().join(" "))
}

#[cfg(test)]
mod tests {
    use super::brief;

    #[test]
    fn what_is_repeated_is_one_short_line() {
        assert_eq!(brief("two\nlines"), "two lines");
        assert_eq!(brief("ö".repeat(200)), "ö".repeat(200));
        assert_eq!(brief("ö".repeat(5000)), format!("{}…", "ö".repeat(200)));
    }
}
