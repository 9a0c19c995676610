//! Writing a prepared file: tensor by tensor, on all cores, under a temporary name until it is complete.
//!
//! Sizes and offsets follow from the configuration and the layouts, so every worker knows where its section goes
//! before any tensor is read. The same model and layouts give the same bytes on every machine.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use tempfile::NamedTempFile;
use ternion_compiler::Layout;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::{CHECKSUM_AT, Content, Header, MAGIC, PAGE, PREAMBLE, Part, Section, VERSION, biases_len, norms_len};
use crate::formats::{Bytes, Checkpoint, FloatType, FormatError, LayerNorm, Projection, TernaryTensor};

/// Bytes written between two calls of the progress callback.
const STEP: usize = 4 << 20;

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteSummary {
    /// Length of the file.
    pub bytes: u64,
    /// Number of ternary matrices.
    pub matrices: usize,
    /// The file's digest, as [`Checkpoint::digest`] gives it.
    pub digest: u64,
}

/// Writes `model` as a prepared file at `path`, replacing what is there.
///
/// `layout(layer, projection, m, k)` chooses how each ternary matrix is packed. `progress(done, total)` is told the
/// bytes written and all bytes, from 0 to the total, and cancels by returning [`ControlFlow::Break`].
///
/// # Errors
/// If the model cannot be read or the file not be written. Then nothing is left behind, and a file that was there
/// before is untouched.
pub fn write(
    model: &Checkpoint,
    path: &Path,
    layout: &dyn Fn(usize, Projection, usize, usize) -> Layout,
    progress: &mut (dyn FnMut(u64, u64) -> ControlFlow<()> + Send),
) -> Result<WriteSummary, FormatError> {
    // Damage must not be copied under new checksums, nor a tokenizer that cannot be used.
    model.verify_checksums()?;
    model.tokenizer()?;

    let parts = Part::all(model.config());
    let mut header = plan(model, &parts, layout)?;
    let data = (PREAMBLE + to_json(&header).len()).next_multiple_of(PAGE as usize) as u64;
    let total = data + header.sections.last().map_or(0, |section| section.offset + section.bytes);

    let failed = |source| FormatError::Write { path: path.to_owned(), source };
    let mut temporary = temporary_beside(path).map_err(failed)?;
    let mut output = Output { path, file: temporary.as_file_mut(), progress, done: 0, total };
    output.advance(0)?;
    let written = write_sections(model, &parts, &header.sections, data, &mut output)?;
    for (section, (xxh3, scale)) in header.sections.iter_mut().zip(written) {
        section.xxh3 = xxh3;
        if let (Content::Ternary { scale, .. }, Some(value)) = (&mut section.content, scale) {
            *scale = value;
        }
    }
    let (front, digest) = front(&header, data);
    output.write_at(0, &front)?;
    // The padding between sections was never written: it is a hole of zeros.
    output.advance(total - output.done)?;

    // Some file systems report a full disk only now.
    temporary.as_file().sync_all().map_err(failed)?;
    temporary.persist(path).map_err(|error| failed(error.error))?;
    let matrices = parts.iter().filter(|part| matches!(part, Part::Projection(..))).count();
    Ok(WriteSummary { bytes: total, matrices, digest })
}

/// Bytes that [`write`] would make of a model, without reading its weights.
///
/// # Errors
/// If the model's texts cannot be read.
pub fn planned_bytes(
    model: &Checkpoint,
    layout: &dyn Fn(usize, Projection, usize, usize) -> Layout,
) -> Result<u64, FormatError> {
    let header = plan(model, &Part::all(model.config()), layout)?;
    let data = ((PREAMBLE + to_json(&header).len()) as u64).next_multiple_of(PAGE);
    Ok(data + header.sections.last().map_or(0, |section| section.offset + section.bytes))
}

/// The header, with checksums and scales still to come.
fn plan(
    model: &Checkpoint,
    parts: &[Part],
    layout: &dyn Fn(usize, Projection, usize, usize) -> Layout,
) -> Result<Header, FormatError> {
    let config = model.config();
    let (embedding, head) = model.token_row_types()?;
    let mut sections: Vec<Section> = Vec::with_capacity(parts.len());
    for part in parts {
        let (content, bytes) = match *part {
            Part::Tokenizer => (Content::Text {}, model.tokenizer_json()?.len()),
            Part::Norms | Part::Biases => {
                let columns = if *part == Part::Norms { norms_len(config) } else { biases_len(config) };
                (Content::Floats { rows: 1, columns, dtype: FloatType::F32 }, columns * FloatType::F32.bytes())
            }
            Part::Embedding | Part::Head => {
                let dtype = if *part == Part::Head { head.unwrap_or(embedding) } else { embedding };
                let (rows, columns) = (config.vocabulary, config.hidden);
                // Bounded by `ModelConfig::check`, far below any overflow.
                (Content::Floats { rows, columns, dtype }, rows * columns * dtype.bytes())
            }
            Part::Projection(layer, projection) => {
                let (m, k) = projection.shape(config);
                let layout = layout(layer, projection, m, k);
                // Shapes are bounded by `ModelConfig::check`, far below any overflow.
                (Content::Ternary { m, k, layout, scale: 1.0 }, layout.tiles(m) * layout.tile_bytes(k))
            }
        };
        let offset = sections.last().map_or(0, |last| (last.offset + last.bytes).next_multiple_of(PAGE));
        sections.push(Section { name: part.to_string(), content, offset, bytes: bytes as u64, xxh3: 0 });
    }
    Ok(Header {
        config: config.clone(),
        generation: model.generation().clone(),
        tokenizer: model.tokenizer_config().clone(),
        chat_template: model.chat_template().map(str::to_owned),
        sections,
    })
}

fn to_json(header: &Header) -> Vec<u8> {
    serde_json::to_vec(header).expect("a header has only strings as keys and finite numbers")
}

/// Everything before the first section, and the digest.
fn front(header: &Header, data: u64) -> (Vec<u8>, u64) {
    let json = to_json(header);
    let mut front = Vec::with_capacity(data as usize);
    front.extend(MAGIC);
    front.extend(u64::from(VERSION).to_le_bytes());
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
pub(in crate::formats) fn temporary_beside(path: &Path) -> io::Result<NamedTempFile> {
    // Renaming would replace a device as readily as a file.
    if path.file_name().is_none() || path.exists() && !path.is_file() {
        return Err(io::Error::other("there is something that is no ordinary file"));
    }
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    let mut builder = tempfile::Builder::new();
    builder.prefix(".ternion-").suffix(".part");
    // Temporary files are private by default; a model is an ordinary file, as far as the umask lets it be.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(directory)
}

/// Writes all sections; returns the checksum of each, and its scale if it is ternary.
fn write_sections(
    model: &Checkpoint,
    parts: &[Part],
    sections: &[Section],
    data: u64,
    output: &mut Output<'_>,
) -> Result<Vec<(u64, Option<f32>)>, FormatError> {
    let output = Mutex::new(output);
    let next = AtomicUsize::new(0);
    let work = || {
        let mut written = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some((part, section)) = parts.get(at).zip(sections.get(at)) else { return Ok(written) };
            let result = section_bytes(model, *part, section).and_then(|(bytes, scale)| {
                let xxh3 = xxh3_64(&bytes);
                let mut output = output.lock().unwrap_or_else(PoisonError::into_inner);
                output.write_at(data + section.offset, &bytes)?;
                Ok((at, (xxh3, scale)))
            });
            match result {
                Ok(section) => written.push(section),
                Err(error) => {
                    // No worker needs to start another section.
                    next.store(parts.len(), Ordering::Relaxed);
                    return Err(error);
                }
            }
        }
    };
    let workers = thread::available_parallelism().map_or(1, usize::from).min(parts.len());
    let mut written = thread::scope(|scope| {
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        let mut written = Vec::with_capacity(parts.len());
        for worker in workers {
            written.extend(worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        Ok::<_, FormatError>(written)
    })?;
    written.sort_unstable_by_key(|(at, _)| *at);
    Ok(written.into_iter().map(|(_, section)| section).collect())
}

/// The bytes of one section, as long as it was planned, and its scale if it is ternary.
fn section_bytes(model: &Checkpoint, part: Part, section: &Section) -> Result<(Bytes, Option<f32>), FormatError> {
    let (bytes, scale) = match part {
        Part::Tokenizer => (model.tokenizer_json()?, None),
        Part::Norms => (norms(model)?, None),
        Part::Biases => (biases(model)?, None),
        Part::Embedding => (model.embedding()?.bytes, None),
        Part::Head => (model.head()?.map_or_else(|| Bytes::from(Vec::new()), |head| head.bytes), None),
        Part::Projection(layer, projection) => {
            let tensor = model.projection(layer, projection)?;
            let scale = tensor.scale;
            let Content::Ternary { layout, .. } = section.content else {
                unreachable!("projections are planned as ternary")
            };
            (repack(model, &section.name, tensor, layout)?, Some(scale))
        }
    };
    if bytes.len() as u64 == section.bytes {
        Ok((bytes, scale))
    } else {
        let problem = format!("{} changed while it was read", section.name);
        Err(FormatError::Corrupted { path: model.path().to_owned(), problem })
    }
}

fn repack(model: &Checkpoint, name: &str, tensor: TernaryTensor, layout: Layout) -> Result<Bytes, FormatError> {
    if tensor.layout == layout {
        return Ok(tensor.bytes);
    }
    let matrix = tensor.to_matrix().map_err(|invalid| FormatError::InvalidCode {
        path: model.path().to_owned(),
        tensor: name.to_owned(),
        row: invalid.row,
        column: invalid.column,
    })?;
    Ok(Bytes::from(layout.pack(matrix.view())))
}

/// All norms as little-endian `f32`: each layer's in the order of [`LayerNorm::ALL`], then the final one.
fn norms(model: &Checkpoint) -> Result<Bytes, FormatError> {
    let mut values = Vec::with_capacity(norms_len(model.config()));
    for layer in 0..model.config().layers {
        for norm in LayerNorm::ALL {
            values.extend(model.norm(layer, norm)?);
        }
    }
    values.extend(model.final_norm()?);
    Ok(Bytes::from(values.into_iter().flat_map(f32::to_le_bytes).collect::<Vec<u8>>()))
}

/// All biases as little-endian `f32`, each layer's in the order of [`Projection::ALL`].
fn biases(model: &Checkpoint) -> Result<Bytes, FormatError> {
    let mut values = Vec::with_capacity(biases_len(model.config()));
    for layer in 0..model.config().layers {
        for projection in Projection::ALL {
            values.extend(model.bias(layer, projection)?);
        }
    }
    Ok(Bytes::from(values.into_iter().flat_map(f32::to_le_bytes).collect::<Vec<u8>>()))
}

/// The temporary file, and who is told about it.
struct Output<'a> {
    /// Where the file will be, for messages.
    path: &'a Path,
    file: &'a mut File,
    progress: &'a mut (dyn FnMut(u64, u64) -> ControlFlow<()> + Send),
    done: u64,
    total: u64,
}

impl Output<'_> {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), FormatError> {
        let failed = |source| FormatError::Write { path: self.path.to_owned(), source };
        self.file.seek(SeekFrom::Start(offset)).map_err(failed)?;
        for part in bytes.chunks(STEP) {
            self.file.write_all(part).map_err(failed)?;
            self.advance(part.len() as u64)?;
        }
        Ok(())
    }

    fn advance(&mut self, bytes: u64) -> Result<(), FormatError> {
        self.done += bytes;
        match (self.progress)(self.done, self.total) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(FormatError::Cancelled { path: self.path.to_owned() }),
        }
    }
}
