//! The prepared file, `.tern`: a model in one file that is mapped and used as it lies there.
//!
//! A preamble of 32 bytes, a JSON header, and sections that each start on a page: tokenizer, norms, embedding, head,
//! and every ternary matrix in a packed layout of its own. The book's chapter on the prepared file has every byte.

mod derived;
mod form;
mod read;
mod sections;
mod unfinished;
mod write;

pub use form::{ChooseLayout, Form, HeadType};
pub use write::{WriteSummary, has_form, planned_bytes, temporary_beside, write, write_with};

pub(super) use read::Prepared;

use std::fmt;

use serde::{Deserialize, Serialize};
use ternion_compiler::Layout;

use super::{GenerationDefaults, LayerNorm, ModelConfig, Projection, RowType};
use crate::screen;
use crate::text::TokenizerConfig;

/// First bytes of every prepared file. Like PNG's they expose a transfer that changed line ends or the eighth bit.
const MAGIC: [u8; 8] = *b"\x89TERN\r\n\x1a";
/// The newest version. Files without [`Part::derived`] sections are written as version 1, with the very bytes they always had.
const VERSION: u32 = 2;
/// Bytes before the JSON header: magic, version, four zeros, header length, header checksum.
const PREAMBLE: usize = 32;
/// Where in the preamble the checksum lies, which covers everything before it and the JSON header.
const CHECKSUM_AT: usize = 24;
/// What offsets of sections are multiples of.
const PAGE: u64 = 4096;

/// The JSON header.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    config: ModelConfig,
    generation: GenerationDefaults,
    tokenizer: TokenizerConfig,
    chat_template: Option<String>,
    sections: Vec<Section>,
}

/// One row of the section table.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Section {
    name: String,
    content: Content,
    /// Bytes from the first section's first byte.
    offset: u64,
    bytes: u64,
    #[serde(with = "hex")]
    xxh3: u64,
}

/// What a section's bytes are.
#[derive(PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
enum Content {
    Text {},
    Floats {
        rows: usize,
        columns: usize,
        dtype: RowType,
    },
    Ternary {
        m: usize,
        k: usize,
        layout: Layout,
        /// Its bits, so that no decimal can change it.
        #[serde(with = "hex")]
        scale: f32,
    },
    /// A ternary matrix that is there already, or its transpose, in another layout. Its scale is with the first.
    Packed {
        m: usize,
        k: usize,
        layout: Layout,
    },
    /// The screen of a head, as [`crate::screen`] makes it.
    Screen(screen::Shape),
}

impl Content {
    /// Bytes of a section that follows from others; `None` for other sections, and if that overflows.
    fn derived_bytes(&self) -> Option<usize> {
        match self {
            Self::Packed { m, k, layout } => layout.bytes(*m, *k),
            Self::Screen(shape) => Some(shape.extent()?.1),
            Self::Text {} | Self::Floats { .. } | Self::Ternary { .. } => None,
        }
    }
}

impl Section {
    /// The layout of a ternary matrix.
    fn layout(&self) -> Layout {
        match self.content {
            Content::Ternary { layout, .. } | Content::Packed { layout, .. } => layout,
            Content::Text {} | Content::Floats { .. } | Content::Screen(_) => Layout::Canonical,
        }
    }

    /// Whether two sections are the same but for what is in them.
    fn is_laid_out_as(&self, other: &Self) -> bool {
        let same = match (&self.content, &other.content) {
            (Content::Ternary { m, k, layout, .. }, Content::Ternary { m: m2, k: k2, layout: layout2, .. }) => {
                (m, k, layout) == (m2, k2, layout2)
            }
            (content, other) => content == other,
        };
        same && self.name == other.name && (self.offset, self.bytes) == (other.offset, other.bytes)
    }
}

/// The sections of a model, in the order of the file.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Tokenizer,
    Norms,
    Biases,
    Embedding,
    Head,
    Projection(usize, Projection),
    /// What follows from the sections above; it is there so that loading need not compute it.
    Screen,
    /// A second layout of a matrix.
    Copy(usize, Projection),
    /// A layer's up-projection, a record for each row.
    Rows(usize),
    /// A layer's down-projection, a record for each column.
    Columns(usize),
}

impl Part {
    /// The sections that every file has.
    fn all(config: &ModelConfig) -> Vec<Self> {
        let mut parts = vec![Self::Tokenizer, Self::Norms];
        if biases_len(config) > 0 {
            parts.push(Self::Biases);
        }
        parts.push(Self::Embedding);
        if !config.tied_head {
            parts.push(Self::Head);
        }
        parts.extend((0..config.layers).flat_map(|layer| Projection::ALL.map(|p| Self::Projection(layer, p))));
        parts
    }

    /// The sections that a file may have after those, in their order.
    fn derived(config: &ModelConfig) -> impl Iterator<Item = Self> {
        let of_layer = |layer| {
            let copies = Projection::ALL.map(|projection| Self::Copy(layer, projection));
            copies.into_iter().chain([Self::Rows(layer), Self::Columns(layer)])
        };
        std::iter::once(Self::Screen).chain((0..config.layers).flat_map(of_layer))
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tokenizer => f.write_str("tokenizer.json"),
            Self::Norms => f.write_str("norms"),
            Self::Biases => f.write_str("biases"),
            Self::Embedding => f.write_str("embedding"),
            Self::Head => f.write_str("head"),
            Self::Projection(layer, projection) => write!(f, "layers.{layer}.{projection}"),
            Self::Screen => f.write_str("head.screen"),
            Self::Copy(layer, projection) => write!(f, "layers.{layer}.{projection}.copy"),
            Self::Rows(layer) => write!(f, "layers.{layer}.{}.rows", Projection::Up),
            Self::Columns(layer) => write!(f, "layers.{layer}.{}.columns", Projection::Down),
        }
    }
}

/// Where in the norms' section a layer's norm starts, in elements; the final norm follows the last layer.
fn norm_start(config: &ModelConfig, layer: usize, norm: LayerNorm) -> usize {
    let widths = LayerNorm::ALL.map(|norm| norm.width(config));
    let before = LayerNorm::ALL.iter().position(|other| *other == norm).unwrap_or(0);
    layer * widths.iter().sum::<usize>() + widths[..before].iter().sum::<usize>()
}

/// Elements of the norms' section.
fn norms_len(config: &ModelConfig) -> usize {
    norm_start(config, config.layers, LayerNorm::Input) + config.hidden
}

/// Where in the biases' section a projection's bias starts, in elements.
fn bias_start(config: &ModelConfig, layer: usize, projection: Projection) -> usize {
    let widths = Projection::ALL.map(|projection| bias_len(config, projection));
    layer * widths.iter().sum::<usize>() + widths[..projection as usize].iter().sum::<usize>()
}

/// Elements of a projection's bias; 0 if there is none.
fn bias_len(config: &ModelConfig, projection: Projection) -> usize {
    if projection.has_bias(config) { projection.shape(config).0 } else { 0 }
}

/// Elements of the biases' section.
fn biases_len(config: &ModelConfig) -> usize {
    bias_start(config, config.layers, Projection::Query)
}

/// Numbers as fixed-width hexadecimal strings: exact, and the header's length does not depend on them.
mod hex {
    use serde::de::{Deserialize, Deserializer, Error};
    use serde::ser::Serializer;

    pub(super) trait Bits: Sized {
        fn to_hex(&self) -> String;
        fn from_hex(text: &str) -> Option<Self>;
    }

    impl Bits for u64 {
        fn to_hex(&self) -> String {
            format!("{self:016x}")
        }

        fn from_hex(text: &str) -> Option<Self> {
            Self::from_str_radix(text, 16).ok()
        }
    }

    impl Bits for f32 {
        fn to_hex(&self) -> String {
            format!("{:08x}", self.to_bits())
        }

        fn from_hex(text: &str) -> Option<Self> {
            u32::from_str_radix(text, 16).ok().map(Self::from_bits)
        }
    }

    pub(super) fn serialize<T: Bits, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&value.to_hex())
    }

    pub(super) fn deserialize<'de, T: Bits, D: Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
        let text = String::deserialize(deserializer)?;
        T::from_hex(&text)
            .filter(|value| value.to_hex() == text)
            .ok_or_else(|| D::Error::custom(format_args!("{text:?} is not a number in hexadecimal")))
    }
}
