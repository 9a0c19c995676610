//! Opening a prepared file: everything the header says is checked against the file before it is believed.

use std::path::{Path, PathBuf};

use ternion_compiler::Layout;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::{
    CHECKSUM_AT, Content, Header, MAGIC, PAGE, PREAMBLE, Part, Section, VERSION, bias_len, bias_start, biases_len,
};
use super::{norm_start, norms_len};
use crate::formats::{
    Bytes, Checkpoint, FloatMatrix, FloatType, FormatError, GenerationDefaults, LayerNorm, ModelConfig, Projection,
    RowType, TernaryTensor,
};
use crate::screen::Shape;
use crate::text::TokenizerConfig;

/// An opened prepared file.
pub(in crate::formats) struct Prepared {
    path: PathBuf,
    bytes: Bytes,
    header: Header,
    /// The sections after those that every file has.
    derived: Vec<Part>,
    /// Where the first section starts.
    data: usize,
    digest: u64,
}

impl Prepared {
    /// Checks preamble, header checksum, and that the sections are the ones the configuration asks for, each of
    /// the right size, one after the other up to the end of the file. The sections' own bytes are not read.
    pub(in crate::formats) fn open(path: &Path, bytes: Bytes) -> Result<Self, FormatError> {
        let path = path.to_owned();
        let has = bytes.len() as u64;
        if bytes.starts_with(&super::unfinished::MAGIC) {
            return Err(FormatError::Unfinished { path });
        }
        if !bytes.starts_with(&MAGIC) {
            return Err(FormatError::Foreign { path });
        }
        let Some(preamble) = bytes.first_chunk::<PREAMBLE>() else {
            return Err(FormatError::Truncated { path, needs: PREAMBLE as u64, has });
        };
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| preamble[at + i]));
        let (version, length, checksum) = (word(8), word(16), word(CHECKSUM_AT));
        // The upper half of the word is reserved: a version that uses it is a newer one.
        let corrupted = |problem: String| FormatError::Corrupted { path: path.clone(), problem };
        match version {
            0 => return Err(corrupted("format version 0".to_owned())),
            version if version > VERSION.into() => {
                return Err(FormatError::Newer { path, found: version as u32, newest: VERSION });
            }
            _ => {}
        }
        let Some(json) = usize::try_from(length).ok().and_then(|length| bytes[PREAMBLE..].get(..length)) else {
            return Err(FormatError::Truncated { path, needs: length.saturating_add(PREAMBLE as u64), has });
        };
        let mut hash = Xxh3::new();
        hash.update(&preamble[..CHECKSUM_AT]);
        hash.update(json);
        if hash.digest() != checksum {
            return Err(corrupted("its header does not have its checksum".to_owned()));
        }
        let header: Header = serde_json::from_slice(json).map_err(|error| corrupted(format!("its header: {error}")))?;
        let data = (PREAMBLE as u64 + length).next_multiple_of(PAGE);
        let (derived, sections) = check(&header, version).map_err(corrupted)?;
        let needs = data.checked_add(sections).ok_or_else(|| corrupted("its sections are too long".to_owned()))?;
        if needs > has {
            return Err(FormatError::Truncated { path, needs, has });
        }
        if needs < has {
            return Err(corrupted(format!("it should end after {needs} bytes and has {has}")));
        }
        // `data` is at most the length of the file.
        Ok(Self { path, bytes, header, derived, data: data as usize, digest: checksum })
    }

    pub(in crate::formats) fn config(&self) -> &ModelConfig {
        &self.header.config
    }

    pub(in crate::formats) fn generation(&self) -> &GenerationDefaults {
        &self.header.generation
    }

    pub(in crate::formats) fn tokenizer(&self) -> &TokenizerConfig {
        &self.header.tokenizer
    }

    pub(in crate::formats) fn chat_template(&self) -> Option<&str> {
        self.header.chat_template.as_deref()
    }

    /// The header's checksum. The header has the checksums of all sections, so it stands for the whole file.
    pub(in crate::formats) fn digest(&self) -> u64 {
        self.digest
    }

    pub(in crate::formats) fn tokenizer_json(&self) -> Bytes {
        self.section(Part::Tokenizer).1
    }

    pub(in crate::formats) fn projection(&self, layer: usize, projection: Projection) -> TernaryTensor {
        let (section, bytes) = self.section(Part::Projection(layer, projection));
        let Content::Ternary { m, k, layout, scale } = section.content else {
            unreachable!("open checked what each section is")
        };
        TernaryTensor { m, k, layout, bytes, scale }
    }

    pub(in crate::formats) fn norm(&self, layer: usize, norm: LayerNorm) -> Vec<f32> {
        self.norms(norm_start(self.config(), layer, norm), norm.width(self.config()))
    }

    pub(in crate::formats) fn final_norm(&self) -> Vec<f32> {
        self.norms(norm_start(self.config(), self.config().layers, LayerNorm::Input), self.config().hidden)
    }

    pub(in crate::formats) fn bias(&self, layer: usize, projection: Projection) -> Vec<f32> {
        let config = self.config();
        self.floats_of(Part::Biases, bias_start(config, layer, projection), bias_len(config, projection))
    }

    fn norms(&self, start: usize, width: usize) -> Vec<f32> {
        self.floats_of(Part::Norms, start, width)
    }

    fn floats_of(&self, part: Part, start: usize, width: usize) -> Vec<f32> {
        let bytes = self.section(part).1;
        let mut values = vec![0.0; width];
        FloatType::F32.widen(&bytes[start * 4..][..width * 4], &mut values);
        values
    }

    pub(in crate::formats) fn embedding(&self) -> FloatMatrix {
        self.floats(Part::Embedding)
    }

    pub(in crate::formats) fn head(&self) -> Option<FloatMatrix> {
        (!self.config().tied_head).then(|| self.floats(Part::Head))
    }

    fn floats(&self, part: Part) -> FloatMatrix {
        let (section, bytes) = self.section(part);
        let Content::Floats { rows, columns, dtype } = section.content else {
            unreachable!("open checked what each section is")
        };
        FloatMatrix { rows, columns, dtype, bytes }
    }

    /// The layouts that the file has a ternary matrix in.
    pub(in crate::formats) fn layouts(&self, layer: usize, projection: Projection) -> Vec<Layout> {
        let copy = self.derived_layout(Part::Copy(layer, projection));
        [self.projection(layer, projection).layout].into_iter().chain(copy).collect()
    }

    /// The layout of the records that [`records`](Self::records) returns, if the file has any.
    pub(in crate::formats) fn record_layout(&self, layer: usize, projection: Projection) -> Option<Layout> {
        self.derived_layout(records_of(layer, projection)?)
    }

    fn derived_layout(&self, part: Part) -> Option<Layout> {
        let (section, _) = self.derived.contains(&part).then(|| self.section(part))?;
        match section.content {
            Content::Packed { layout, .. } => Some(layout),
            _ => None,
        }
    }

    /// A ternary matrix in this layout, if the file has it.
    pub(in crate::formats) fn packed(&self, layer: usize, projection: Projection, layout: Layout) -> Option<Bytes> {
        let first = self.projection(layer, projection);
        if first.layout == layout {
            return Some(first.bytes);
        }
        self.derived(Part::Copy(layer, projection), layout)
    }

    /// The records of a layer's up-projection, row by row, or of its down-projection, column by column, if the file has
    /// them in this layout.
    pub(in crate::formats) fn records(&self, layer: usize, projection: Projection, layout: Layout) -> Option<Bytes> {
        self.derived(records_of(layer, projection)?, layout)
    }

    fn derived(&self, part: Part, layout: Layout) -> Option<Bytes> {
        (self.derived_layout(part) == Some(layout)).then(|| self.section(part).1)
    }

    /// The head's screen, if the file has it, after a look at its checksum: a screen with a damaged byte might hide the
    /// token that should come next.
    pub(in crate::formats) fn screen(&self) -> Result<Option<(Shape, Bytes)>, FormatError> {
        if !self.derived.contains(&Part::Screen) {
            return Ok(None);
        }
        let (section, bytes) = self.section(Part::Screen);
        let Content::Screen(shape) = section.content else { return Ok(None) };
        if xxh3_64(&bytes) == section.xxh3 {
            return Ok(Some((shape, bytes)));
        }
        let problem = format!("section {} does not have its checksum", section.name);
        Err(FormatError::Corrupted { path: self.path.clone(), problem })
    }

    /// Computes the sections that follow from others again and compares them; returns their number. `model` is this file.
    pub(in crate::formats) fn verify_derived(&self, model: &Checkpoint) -> Result<usize, FormatError> {
        let derived = self.derived.iter().map(|part| (*part, self.section(*part)));
        super::derived::verify(model, derived.map(|(part, (section, bytes))| (part, section, bytes)))
    }

    pub(in crate::formats) fn sections(&self) -> &[Section] {
        &self.header.sections
    }

    /// All sections, in their order.
    fn parts(&self) -> impl Iterator<Item = Part> {
        Part::all(self.config()).into_iter().chain(self.derived.iter().copied())
    }

    fn section(&self, part: Part) -> (&Section, Bytes) {
        let biases = usize::from(biases_len(self.config()) > 0);
        let fixed = if self.config().tied_head { 3 } else { 4 } + biases;
        let section = &self.header.sections[match part {
            Part::Tokenizer => 0,
            Part::Norms => 1,
            Part::Biases => 2,
            Part::Embedding => 2 + biases,
            Part::Head => 3 + biases,
            Part::Projection(layer, projection) => fixed + layer * Projection::ALL.len() + projection as usize,
            Part::Screen | Part::Copy(..) | Part::Rows(_) | Part::Columns(_) => {
                let at = self.derived.iter().position(|derived| *derived == part);
                self.header.sections.len() - self.derived.len() + at.expect("only parts that are there are asked for")
            }
        }];
        let start = self.data + section.offset as usize;
        let bytes = self.bytes.slice(start..start + section.bytes as usize);
        (section, bytes.expect("open checked where each section ends"))
    }

    /// Reads the whole file and compares every section with its checksum, and the padding with zero.
    ///
    /// Returns the number of sections.
    pub(in crate::formats) fn verify_checksums(&self) -> Result<usize, FormatError> {
        let corrupted = |problem: String| FormatError::Corrupted { path: self.path.clone(), problem };
        // The header ends where the padding before the first section begins; its length was checked when opening.
        let length = u64::from_le_bytes(std::array::from_fn(|i| self.bytes[16 + i])) as usize;
        let mut end = PREAMBLE + length;
        for (part, section) in self.parts().zip(&self.header.sections) {
            let start = self.data + section.offset as usize;
            if self.bytes[end..start].iter().any(|byte| *byte != 0) {
                return Err(corrupted(format!("the padding before section {} is not empty", section.name)));
            }
            if xxh3_64(&self.section(part).1) != section.xxh3 {
                return Err(corrupted(format!("section {} does not have its checksum", section.name)));
            }
            end = start + section.bytes as usize;
        }
        Ok(self.header.sections.len())
    }
}

/// The section of a layer's records that belong to a projection.
const fn records_of(layer: usize, projection: Projection) -> Option<Part> {
    match projection {
        Projection::Up => Some(Part::Rows(layer)),
        Projection::Down => Some(Part::Columns(layer)),
        _ => None,
    }
}

/// Checks that the header describes exactly the sections that its configuration asks for, then, from version 2 on, some of
/// those that follow from them, without gaps larger than a page. Returns the latter and the length of all sections in bytes.
fn check(header: &Header, version: u64) -> Result<(Vec<Part>, u64), String> {
    header.config.check()?;
    let mut parts = Part::all(&header.config);
    let fixed = parts.len();
    if header.sections.len() < fixed || version < 2 && header.sections.len() > fixed {
        return Err(format!("it has {} sections, its model needs {fixed}", header.sections.len()));
    }
    let mut possible = Part::derived(&header.config);
    for section in &header.sections[fixed..] {
        let known = possible.find(|part| section.name == part.to_string());
        parts.push(known.ok_or_else(|| format!("section {} is not what its model needs", section.name))?);
    }
    let mut end = 0u64;
    for (part, section) in parts.iter().copied().zip(&header.sections) {
        let name = &section.name;
        if *name != part.to_string() {
            return Err(format!("section {name} is where {part} should be"));
        }
        if !fits(part, &section.content, section.bytes, &header.config) {
            return Err(format!("section {name} is not what its model needs"));
        }
        if section.offset.checked_sub(end).is_none_or(|gap| gap >= PAGE) || !section.offset.is_multiple_of(PAGE) {
            return Err(format!("section {name} is not on the page after the one before it"));
        }
        end = section.offset.checked_add(section.bytes).ok_or_else(|| format!("section {name} is too long"))?;
    }
    Ok((parts.split_off(fixed), end))
}

fn fits(part: Part, content: &Content, bytes: u64, config: &ModelConfig) -> bool {
    let needs = match (part, content) {
        (Part::Tokenizer, Content::Text {}) => return true,
        (Part::Norms, Content::Floats { rows: 1, columns, dtype: RowType::F32 }) if *columns == norms_len(config) => {
            columns.checked_mul(4)
        }
        (Part::Biases, Content::Floats { rows: 1, columns, dtype: RowType::F32 }) if *columns == biases_len(config) => {
            columns.checked_mul(4)
        }
        (Part::Embedding | Part::Head, Content::Floats { rows, columns, dtype })
            if (*rows, *columns) == (config.vocabulary, config.hidden) && dtype.holds(*columns) =>
        {
            rows.checked_mul(dtype.row_bytes(*columns))
        }
        (Part::Projection(_, projection), Content::Ternary { m, k, layout, scale })
            if (*m, *k) == projection.shape(config) && *scale > 0.0 && scale.is_normal() =>
        {
            layout.bytes(*m, *k)
        }
        (Part::Copy(_, projection), Content::Packed { m, k, .. }) if (*m, *k) == projection.shape(config) => {
            content.derived_bytes()
        }
        // A down-projection's records are its columns: the shape is that of its transpose.
        (Part::Rows(_) | Part::Columns(_), Content::Packed { m, k, layout })
            if (*m, *k) == (config.ffn, config.hidden) && layout.tile_rows() == 1 =>
        {
            content.derived_bytes()
        }
        (Part::Screen, Content::Screen(shape)) if (shape.rows, shape.columns) == (config.vocabulary, config.hidden) => {
            content.derived_bytes()
        }
        _ => None,
    };
    needs.is_some_and(|needs| needs as u64 == bytes)
}
