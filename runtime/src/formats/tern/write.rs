//! Writing a prepared file: in blocks, on all cores, under another name until it is complete.
//!
//! Sizes and offsets follow from the configuration, the layouts and the head's type, so every worker knows where its
//! block goes before anything is read. The same model and options give the same bytes on every machine, interrupted or
//! not.

use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use tempfile::NamedTempFile;
use xxhash_rust::xxh3::Xxh3;

use super::sections::{Job, Progress, units};
use super::unfinished::{Done, Unfinished};
use super::{
    CHECKSUM_AT, ChooseLayout, Content, Form, HeadType, Header, MAGIC, PAGE, PREAMBLE, Part, Section, VERSION,
};
use super::{biases_len, norms_len};
use crate::formats::{Checkpoint, FormatError, RowType};

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WriteSummary {
    /// Length of the file.
    pub bytes: u64,
    /// Bytes of it that an interrupted write had left.
    pub resumed: u64,
    /// Bytes of it that follow from the others, so that loading need not compute them.
    pub derived: u64,
    /// Number of ternary matrices.
    pub matrices: usize,
    /// How the head's rows are stored.
    pub head: RowType,
    /// What rounding the head's rows to another type took: `‖w − w'‖ / ‖w‖` over all of them, 0 if nothing was rounded.
    pub head_error: f64,
    /// The file's digest, as [`Checkpoint::digest`] gives it.
    pub digest: u64,
}

/// Writes `model` as a prepared file at `path`, its head as it is: [`write_with`].
///
/// # Errors
/// As [`write_with`].
pub fn write(
    model: &Checkpoint,
    path: &Path,
    layout: &ChooseLayout<'_>,
    progress: &mut (dyn FnMut(u64, u64) -> ControlFlow<()> + Send),
) -> Result<WriteSummary, FormatError> {
    write_with(model, path, layout, HeadType::Own, progress)
}

/// Writes `model` as a prepared file of this form at `path`, replacing what is there.
///
/// The file grows under the name `path` with `.part`. `progress(done, total)` is told the bytes written and all bytes,
/// up to the total, and cancels by returning [`ControlFlow::Break`]. Then, or if the process is killed, the unfinished
/// file stays, and writing the same model with the same options goes on with it: the result has the same bytes as
/// without the interruption.
///
/// # Errors
/// If the model cannot be read, its head not be stored as asked for, or the file not be written. Then nothing is left
/// behind, and a file that was there before is untouched.
pub fn write_with(
    model: &Checkpoint,
    path: &Path,
    layout: &ChooseLayout<'_>,
    form: impl Into<Form>,
    progress: &mut (dyn FnMut(u64, u64) -> ControlFlow<()> + Send),
) -> Result<WriteSummary, FormatError> {
    // Damage must not be copied under new checksums.
    model.verify_checksums()?;

    let (parts, mut header) = plan(model, layout, &form.into())?;
    let (data, total) = extent(&header);
    let units = units(&parts, &header.sections, data);
    let failed = |source| FormatError::Write { path: path.to_owned(), source };
    let plan = digest_of_plan(model, &header);
    let places = units.iter().map(|unit| &unit.places[..]);
    let (file, done) = Unfinished::open(path, plan, total, places).map_err(failed)?;
    let resumed = units.iter().zip(&done).filter(|(_, done)| done.is_some()).map(|(unit, _)| unit.bytes()).sum();

    let mut told = Progress { tell: progress, done: resumed, total };
    let made = told.advance(0, path).and_then(|()| {
        let (progress, done, sections) = (Mutex::new(told), Mutex::new(done), &header.sections);
        Job { model, path, parts: &parts, sections, units: &units, file: &file, progress, done }.run()
    });
    let made = match made {
        Ok(made) => made,
        Err(error) => {
            if !matches!(error, FormatError::Cancelled { .. }) {
                file.discard();
            }
            return Err(error);
        }
    };
    let mut summary =
        WriteSummary { bytes: total, resumed, derived: 0, matrices: 0, head: RowType::F32, head_error: 0.0, digest: 0 };
    for ((section, part), Done { xxh3, scale, error }) in header.sections.iter_mut().zip(&parts).zip(made) {
        section.xxh3 = xxh3;
        match &mut section.content {
            Content::Ternary { scale: written, .. } => {
                *written = scale;
                summary.matrices += 1;
            }
            Content::Packed { .. } | Content::Screen(_) => summary.derived += section.bytes,
            // The head comes after the embedding, if there is one of its own.
            Content::Floats { dtype, .. } if matches!(part, Part::Embedding | Part::Head) => {
                let (off, whole) = error;
                (summary.head, summary.head_error) = (*dtype, if whole > 0.0 { (off / whole).sqrt() } else { 0.0 });
            }
            _ => {}
        }
    }
    let (front, digest) = front(&header, data);
    summary.digest = digest;
    file.finish(&front, path).map_err(failed)?;
    // The padding between sections was never written: it is a hole of zeros.
    let _ = progress(total, total);
    Ok(summary)
}

/// Bytes that [`write_with`] would make of a model, without reading its weights.
///
/// # Errors
/// If the model's texts cannot be read, or its head cannot be stored as asked for.
pub fn planned_bytes(model: &Checkpoint, layout: &ChooseLayout<'_>, form: impl Into<Form>) -> Result<u64, FormatError> {
    Ok(extent(&plan(model, layout, &form.into())?.1).1)
}

/// Whether `model` is a prepared file that [`write_with`] would write again with the same sections.
///
/// # Errors
/// As [`planned_bytes`].
pub fn has_form(model: &Checkpoint, layout: &ChooseLayout<'_>, form: impl Into<Form>) -> Result<bool, FormatError> {
    let Some(found) = model.prepared_sections() else { return Ok(false) };
    let (_, planned) = plan(model, layout, &form.into())?;
    Ok(found.len() == planned.sections.len()
        && found.iter().zip(&planned.sections).all(|(found, planned)| found.is_laid_out_as(planned)))
}

/// Where the first section starts, and where the file ends.
fn extent(header: &Header) -> (u64, u64) {
    let data = ((PREAMBLE + to_json(header).len()) as u64).next_multiple_of(PAGE);
    (data, data + header.sections.last().map_or(0, |section| section.offset + section.bytes))
}

/// What an unfinished file must have been begun for to be continued: this model's very files, and this header.
fn digest_of_plan(model: &Checkpoint, header: &Header) -> u64 {
    let mut hash = Xxh3::new();
    hash.update(&version(header).to_le_bytes());
    hash.update(&model.identity().to_le_bytes());
    hash.update(&to_json(header));
    hash.digest()
}

/// The oldest version that has all sections of a file.
fn version(header: &Header) -> u32 {
    let derived = |section: &Section| matches!(section.content, Content::Packed { .. } | Content::Screen(_));
    if header.sections.iter().any(derived) { VERSION } else { 1 }
}

/// All sections, and the header, with checksums and scales still to come.
fn plan(model: &Checkpoint, layout: &ChooseLayout<'_>, form: &Form) -> Result<(Vec<Part>, Header), FormatError> {
    let config = model.config();
    let mut parts = Part::all(config);
    parts.extend(Part::derived(config).filter(|part| form.content(*part, config).is_some()));
    let (embedding, head) = model.token_row_types()?;
    let mut sections: Vec<Section> = Vec::with_capacity(parts.len());
    for part in &parts {
        let (content, bytes) = match *part {
            Part::Tokenizer => (Content::Text {}, model.tokenizer_json()?.len()),
            Part::Norms | Part::Biases => {
                let (columns, dtype) =
                    (if *part == Part::Norms { norms_len(config) } else { biases_len(config) }, RowType::F32);
                (Content::Floats { rows: 1, columns, dtype }, dtype.row_bytes(columns))
            }
            Part::Embedding | Part::Head => {
                let (rows, columns) = (config.vocabulary, config.hidden);
                let own = if *part == Part::Head { head.unwrap_or(embedding) } else { embedding };
                let is_head = *part == Part::Head || config.tied_head;
                let dtype = if is_head { form.head.of(own) } else { own };
                if !dtype.holds(columns) {
                    let (values, _) = dtype.block();
                    let problem = format!(
                        "has rows of {columns} weights and {dtype} needs multiples of {values}: choose int8 or f16"
                    );
                    return Err(FormatError::Tensor {
                        path: model.path().to_owned(),
                        tensor: part.to_string(),
                        problem,
                    });
                }
                // Bounded by `ModelConfig::check`, far below any overflow.
                (Content::Floats { rows, columns, dtype }, rows * dtype.row_bytes(columns))
            }
            Part::Projection(layer, projection) => {
                let (m, k) = projection.shape(config);
                let layout = layout(layer, projection, m, k);
                // Shapes are bounded by `ModelConfig::check`, far below any overflow.
                (Content::Ternary { m, k, layout, scale: 1.0 }, layout.tiles(m) * layout.tile_bytes(k))
            }
            Part::Screen | Part::Copy(..) | Part::Rows(_) | Part::Columns(_) => {
                let content = form.content(*part, config).expect("only parts that have one were added");
                let bytes = content.derived_bytes().expect("shapes are bounded");
                (content, bytes)
            }
        };
        let offset = sections.last().map_or(0, |last| (last.offset + last.bytes).next_multiple_of(PAGE));
        sections.push(Section { name: part.to_string(), content, offset, bytes: bytes as u64, xxh3: 0 });
    }
    let header = Header {
        config: config.clone(),
        generation: model.generation().clone(),
        tokenizer: model.tokenizer_config().clone(),
        chat_template: model.chat_template().map(str::to_owned),
        sections,
    };
    Ok((parts, header))
}

fn to_json(header: &Header) -> Vec<u8> {
    serde_json::to_vec(header).expect("a header has only strings as keys and finite numbers")
}

/// Everything before the first section, and the digest.
fn front(header: &Header, data: u64) -> (Vec<u8>, u64) {
    let json = to_json(header);
    let mut front = Vec::with_capacity(data as usize);
    front.extend(MAGIC);
    front.extend(u64::from(version(header)).to_le_bytes());
    front.extend((json.len() as u64).to_le_bytes());
    let mut hash = Xxh3::new();
    hash.update(&front[..CHECKSUM_AT]);
    hash.update(&json);
    let digest = hash.digest();
    front.extend(digest.to_le_bytes());
    front.extend(json);
    front.resize(data as usize, 0);
    (front, digest)
}

/// A new file in the directory of `path`, so that it can be renamed; it disappears unless it is.
///
/// # Errors
/// If there is something at `path` that is no ordinary file, or nothing can be written beside it.
pub fn temporary_beside(path: &Path) -> io::Result<NamedTempFile> {
    // Renaming would replace a device as readily as a file.
    if path.file_name().is_none() || path.exists() && !path.is_file() {
        return Err(io::Error::other("there is something that is no ordinary file"));
    }
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    if !directory.is_dir() {
        return Err(io::Error::new(io::ErrorKind::NotFound, "there is no such directory"));
    }
    let mut builder = tempfile::Builder::new();
    builder.prefix(".ternion-").suffix(".part");
    // Temporary files are private by default; a model is an ordinary file, as far as the umask lets it be.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    // Without the temporary file's name, which means nothing to whoever asked for `path`.
    builder.tempfile_in(directory).map_err(|error| error.kind().into())
}
