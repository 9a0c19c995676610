//! Making sections, on all cores: ternary matrices one by one, embedding and head in blocks of rows.

use std::io;
use std::ops::{ControlFlow, Range};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use ternion_compiler::Layout;
use xxhash_rust::xxh3::xxh3_64;

use super::unfinished::{Done, Unfinished};
use super::{Content, Part, Section, biases_len, norms_len};
use crate::formats::rows::encode_row;
use crate::formats::{Bytes, Checkpoint, FloatMatrix, FormatError, LayerNorm, Projection, RowType, TernaryTensor};
use crate::ops::SCREEN_ROWS;
use crate::screen;

/// Bytes of a block of rows, and of what is written between two calls of the progress callback.
const STEP: usize = 4 << 20;
/// What the matrices that are being made at a time may take; several times the largest one's packed size each.
const IN_FLIGHT: u64 = 192 << 20;

/// Who is told how far writing has come, and may cancel it.
pub(super) struct Progress<'a> {
    pub(super) tell: &'a mut (dyn FnMut(u64, u64) -> ControlFlow<()> + Send),
    pub(super) done: u64,
    pub(super) total: u64,
}

impl Progress<'_> {
    pub(super) fn advance(&mut self, bytes: u64, path: &Path) -> Result<(), FormatError> {
        self.done += bytes;
        match (self.tell)(self.done, self.total) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(FormatError::Cancelled { path: path.to_owned() }),
        }
    }
}

/// Everything that the workers share.
pub(super) struct Job<'a> {
    pub(super) model: &'a Checkpoint,
    /// Where the file will be, for messages.
    pub(super) path: &'a Path,
    pub(super) parts: &'a [Part],
    pub(super) sections: &'a [Section],
    /// Where the first section starts.
    pub(super) data: u64,
    pub(super) file: &'a Unfinished,
    pub(super) progress: Mutex<Progress<'a>>,
}

/// What a worker does in one go.
enum Work {
    Section(usize),
    /// A block of rows of `tables[n]`.
    Rows(usize, usize),
}

/// An embedding, a head or its screen on its way.
struct Table {
    section: usize,
    name: String,
    matrix: FloatMatrix,
    target: RowType,
    /// Whether it is the screen of such rows that is to be made.
    screen: bool,
    /// Rows of a block, a multiple of a screen's tiles.
    each: usize,
    /// Blocks that are not written yet.
    left: AtomicUsize,
    /// `‖w − w'‖²` and `‖w‖²` of each block, to be added in order.
    errors: Mutex<Vec<(f64, f64)>>,
}

impl Job<'_> {
    /// Makes and writes the sections that are not `done`, and completes the list.
    pub(super) fn run(&self, mut done: Vec<Option<Done>>) -> Result<Vec<Done>, FormatError> {
        let (tables, works) = self.share_out(&done)?;
        let next = AtomicUsize::new(0);
        let work = || {
            let mut finished = Vec::new();
            while let Some(work) = works.get(next.fetch_add(1, Ordering::Relaxed)) {
                match self.carry_out(work, &tables) {
                    Ok(section) => finished.extend(section),
                    Err(error) => {
                        // No worker needs to start anything else.
                        next.store(works.len(), Ordering::Relaxed);
                        return Err(error);
                    }
                }
            }
            Ok(finished)
        };
        let largest = self.sections.iter().filter(|section| matches!(section.content, Content::Ternary { .. }));
        let largest = largest.map(|section| section.bytes).max().unwrap_or(0).max(1);
        let room = usize::try_from(IN_FLIGHT / (4 * largest)).unwrap_or(usize::MAX).max(1);
        let workers = thread::available_parallelism().map_or(1, usize::from).min(works.len()).min(room);
        thread::scope(|scope| {
            let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
            for worker in workers {
                for (section, made) in worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))? {
                    done[section] = Some(made);
                }
            }
            Ok::<_, FormatError>(())
        })?;
        // Without an error every section has been made.
        Ok(done.into_iter().flatten().collect())
    }

    /// The work that is left: many small sections first, so that an interruption loses little, then the tables, in which all
    /// workers have a part to the end.
    fn share_out(&self, done: &[Option<Done>]) -> Result<(Vec<Table>, Vec<Work>), FormatError> {
        let (mut tables, mut rows, mut sections) = (Vec::new(), Vec::new(), Vec::new());
        for (at, part) in self.parts.iter().enumerate().filter(|(at, _)| done[*at].is_none()) {
            let matrix = match part {
                Part::Embedding => Some(self.model.embedding()?),
                Part::Head => self.model.head()?,
                Part::Screen => Some(self.model.head()?.map_or_else(|| self.model.embedding(), Ok)?),
                _ => None,
            };
            match (matrix, self.stored_rows(*part)) {
                (Some(matrix), Some(dtype)) => {
                    let each = (STEP / dtype.row_bytes(matrix.columns).max(1)).max(1).next_multiple_of(SCREEN_ROWS);
                    let blocks = matrix.rows.div_ceil(each);
                    rows.extend((0..blocks).map(|block| Work::Rows(tables.len(), block)));
                    tables.push(Table {
                        section: at,
                        name: part.to_string(),
                        target: dtype,
                        screen: *part == Part::Screen,
                        each,
                        left: AtomicUsize::new(blocks),
                        errors: Mutex::new(vec![(0.0, 0.0); blocks]),
                        matrix,
                    });
                }
                _ => sections.push(Work::Section(at)),
            }
        }
        sections.extend(rows);
        Ok((tables, sections))
    }

    /// The type in which the file has the rows that a section holds or is made of.
    fn stored_rows(&self, part: Part) -> Option<RowType> {
        let rows = match part {
            Part::Screen if self.model.config().tied_head => Part::Embedding,
            Part::Screen => Part::Head,
            other => other,
        };
        let at = self.parts.iter().position(|part| *part == rows)?;
        match (rows, &self.sections[at].content) {
            (Part::Embedding | Part::Head, Content::Floats { dtype, .. }) => Some(*dtype),
            _ => None,
        }
    }

    /// Returns a section that is complete now.
    fn carry_out(&self, work: &Work, tables: &[Table]) -> Result<Option<(usize, Done)>, FormatError> {
        match work {
            Work::Section(at) => {
                let section = &self.sections[*at];
                let (bytes, scale) = section_bytes(self.model, self.parts[*at], section)?;
                self.put(&bytes, section.offset)?;
                let done = Done { xxh3: xxh3_64(&bytes), scale: scale.unwrap_or(0.0), error: 0.0 };
                self.record(*at, done).map(Some)
            }
            Work::Rows(table, block) => self.put_rows(&tables[*table], *block),
        }
    }

    fn put_rows(&self, table: &Table, block: usize) -> Result<Option<(usize, Done)>, FormatError> {
        let Table { section, matrix, target, each, .. } = table;
        let section = &self.sections[*section];
        let rows = block * each..matrix.rows.min((block + 1) * each);
        let offset = section.offset + (rows.start * target.row_bytes(matrix.columns)) as u64;
        if table.screen {
            let (tiles, scales) = table.screen_of(rows.clone(), self.model)?;
            let (start, _) = screen::extent(matrix.rows, matrix.columns).expect("sizes were planned");
            self.put(&tiles, section.offset + screen::tiles_of(&rows, matrix.columns).start as u64)?;
            self.put(&scales, section.offset + (start + screen::scales_of(&rows).start) as u64)?;
        } else if *target == matrix.dtype {
            let row_bytes = matrix.row_bytes();
            self.put(&matrix.bytes[rows.start * row_bytes..rows.end * row_bytes], offset)?;
        } else {
            let (bytes, error) = table.round(rows, self.model)?;
            self.put(&bytes, offset)?;
            table.errors.lock().unwrap_or_else(PoisonError::into_inner)[block] = error;
        }
        if table.left.fetch_sub(1, Ordering::AcqRel) > 1 {
            return Ok(None);
        }
        // The last block of the table; others may have been written by others, in any order.
        let start = self.data + section.offset;
        let xxh3 = self.file.hash(start..start + section.bytes).map_err(|source| self.failed(source))?;
        let errors = table.errors.lock().unwrap_or_else(PoisonError::into_inner);
        let (error, whole) = errors.iter().fold((0.0, 0.0), |sum, block| (sum.0 + block.0, sum.1 + block.1));
        let error = if whole > 0.0 { error / whole } else { 0.0 };
        self.record(table.section, Done { xxh3, scale: 0.0, error }).map(Some)
    }

    fn record(&self, section: usize, done: Done) -> Result<(usize, Done), FormatError> {
        self.file.record(section, done).map_err(|source| self.failed(source))?;
        Ok((section, done))
    }

    /// Writes bytes of sections, `offset` counting from the first section's first byte.
    fn put(&self, bytes: &[u8], offset: u64) -> Result<(), FormatError> {
        for (at, step) in bytes.chunks(STEP).enumerate() {
            let offset = self.data + offset + (at * STEP) as u64;
            self.file.write_at(step, offset).map_err(|source| self.failed(source))?;
            let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
            progress.advance(step.len() as u64, self.path)?;
        }
        Ok(())
    }

    fn failed(&self, source: io::Error) -> FormatError {
        FormatError::Write { path: self.path.to_owned(), source }
    }
}

impl Table {
    /// The screen of some rows as they are stored: its tiles and scales.
    fn screen_of(&self, rows: Range<usize>, model: &Checkpoint) -> Result<(Vec<u8>, Vec<u8>), FormatError> {
        let Self { matrix, target, .. } = self;
        if *target == matrix.dtype {
            return Ok(screen::form_bytes(matrix, rows));
        }
        let (count, (bytes, _)) = (rows.len(), self.round(rows, model)?);
        let stored = FloatMatrix { rows: count, columns: matrix.columns, dtype: *target, bytes: bytes.into() };
        Ok(screen::form_bytes(&stored, 0..count))
    }

    /// Rows in the type that was asked for, and what rounding them took: `‖w − w'‖²` and `‖w‖²`.
    fn round(&self, rows: Range<usize>, model: &Checkpoint) -> Result<(Vec<u8>, (f64, f64)), FormatError> {
        let Self { matrix, target, .. } = self;
        let row_bytes = target.row_bytes(matrix.columns);
        let mut bytes = Vec::with_capacity(rows.len() * row_bytes);
        let (mut row, mut rounded) = (vec![0.0; matrix.columns], vec![0.0; matrix.columns]);
        let mut error = (0.0, 0.0);
        for at in rows {
            matrix.widen_row(at, &mut row);
            let unfit = row.iter().position(|value| !value.is_finite());
            let start = bytes.len();
            let fits = unfit.map_or_else(|| encode_row(*target, &row, &mut bytes), Err);
            if let Err(column) = fits {
                return Err(FormatError::InvalidValue {
                    path: model.path().to_owned(),
                    tensor: self.name.clone(),
                    row: at,
                    column,
                    value: row[column],
                    expected: "a number that the chosen type of the head can hold",
                });
            }
            target.widen_row(&bytes[start..], &mut rounded);
            for (w, rounded) in row.iter().zip(&rounded) {
                let off = f64::from(*w) - f64::from(*rounded);
                error.0 += off * off;
                error.1 += f64::from(*w) * f64::from(*w);
            }
        }
        Ok((bytes, error))
    }
}

/// The bytes of one section, as long as it was planned, and its scale if it is ternary.
pub(super) fn section_bytes(
    model: &Checkpoint,
    part: Part,
    section: &Section,
) -> Result<(Bytes, Option<f32>), FormatError> {
    let (bytes, scale) = match part {
        Part::Tokenizer => (model.tokenizer_json()?, None),
        Part::Norms => (norms(model)?, None),
        Part::Biases => (biases(model)?, None),
        // Made in blocks of rows, unless there are none.
        Part::Embedding | Part::Head | Part::Screen => (Bytes::from(Vec::new()), None),
        Part::Copy(layer, projection) => {
            (repack(model, &section.name, model.projection(layer, projection)?, section.layout())?, None)
        }
        Part::Rows(layer) => (records(&model.projection(layer, Projection::Up)?, false, section), None),
        Part::Columns(layer) => (records(&model.projection(layer, Projection::Down)?, true, section), None),
        Part::Projection(layer, projection) => {
            let tensor = model.projection(layer, projection)?;
            let scale = tensor.scale;
            (repack(model, &section.name, tensor, section.layout())?, Some(scale))
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
    let matrix = tensor.to_matrix().map_err(|invalid| FormatError::invalid_code(model.path(), name, invalid))?;
    Ok(Bytes::from(layout.pack(matrix.view())))
}

/// A matrix once more, row by row, or column by column if `transposed`.
fn records(tensor: &TernaryTensor, transposed: bool, section: &Section) -> Bytes {
    let mut room = vec![0; section.bytes as usize];
    tensor.pack_records(section.layout(), transposed, &mut room);
    room.into()
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
