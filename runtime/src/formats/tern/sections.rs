//! Making sections, on all cores: ternary matrices one by one, embedding, head and screen in blocks of rows.

use std::collections::BTreeMap;
use std::io;
use std::ops::{ControlFlow, Range};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use ternion_compiler::Layout;
use xxhash_rust::xxh3::Xxh3;

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
/// Bytes that are written before they are sent to the disk: every time costs a commit of the file system.
const FLUSH: usize = 256 << 20;

/// What a worker makes in one go, and the journal has an entry for.
pub(super) struct Unit {
    /// Where in the list its section is.
    section: usize,
    /// Rows of an embedding, a head or a screen; `None` for the whole of any other section.
    rows: Option<Range<usize>>,
    /// Where in the file it lies: in one piece, or, of a screen, tiles and scales.
    pub(super) places: Vec<Range<u64>>,
}

impl Unit {
    pub(super) fn bytes(&self) -> u64 {
        self.places.iter().map(|place| place.end - place.start).sum()
    }
}

/// All units of a file whose first section starts at `data`, in the order of the sections.
pub(super) fn units(parts: &[Part], sections: &[Section], data: u64) -> Vec<Unit> {
    let mut units = Vec::with_capacity(sections.len());
    for (at, (part, section)) in parts.iter().zip(sections).enumerate() {
        let start = data + section.offset;
        let place = |within: Range<usize>| start + within.start as u64..start + within.end as u64;
        let mut blocks = |rows: usize, row_bytes: usize, places: &dyn Fn(&Range<usize>) -> Vec<Range<u64>>| {
            // A block of a screen begins with a tile of it.
            let each = (STEP / row_bytes.max(1)).max(1).next_multiple_of(SCREEN_ROWS);
            units.extend((0..rows).step_by(each).map(|first| {
                let rows = first..rows.min(first + each);
                Unit { section: at, places: places(&rows), rows: Some(rows) }
            }));
        };
        match section.content {
            Content::Floats { rows, columns, dtype } if matches!(part, Part::Embedding | Part::Head) => {
                let row_bytes = dtype.row_bytes(columns);
                blocks(rows, row_bytes, &|rows| vec![place(rows.start * row_bytes..rows.end * row_bytes)]);
            }
            Content::Screen(shape) => {
                let (scales, _) = shape.extent().expect("sizes were planned");
                blocks(shape.rows, shape.columns, &|rows| {
                    let of_scales = screen::scales_of(rows);
                    let of_scales = scales + of_scales.start..scales + of_scales.end;
                    vec![place(shape.tiles_of(rows)), place(of_scales)]
                });
            }
            _ => {
                units.push(Unit { section: at, rows: None, places: vec![place(0..section.bytes as usize)] });
            }
        }
    }
    units
}

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
    pub(super) units: &'a [Unit],
    pub(super) file: &'a Unfinished,
    pub(super) progress: Mutex<Progress<'a>>,
    /// What is known of each unit that is complete.
    pub(super) done: Mutex<Vec<Option<Done>>>,
}

/// An embedding, a head or its screen on its way.
struct Table {
    name: String,
    matrix: FloatMatrix,
    target: RowType,
    /// The bits of such rows' screen, if it is that which is to be made.
    screen: Option<usize>,
    /// Its blocks.
    units: Range<usize>,
    checksum: Mutex<Checksum>,
}

/// The checksum of a section that is made in blocks, as far as they are there from the first one on.
#[derive(Default)]
struct Checksum {
    hash: Xxh3,
    blocks: usize,
}

impl Job<'_> {
    /// Makes and writes the units that are not done. Returns what is known of each section.
    pub(super) fn run(&self) -> Result<Vec<Done>, FormatError> {
        let tables = self.tables()?;
        let left: Vec<usize> = (0..self.units.len()).filter(|unit| self.done()[*unit].is_none()).collect();
        let next = AtomicUsize::new(0);
        let work = |written: Sender<usize>| {
            while let Some(unit) = left.get(next.fetch_add(1, Ordering::Relaxed)) {
                if let Err(error) = self.make(*unit, &tables, &written) {
                    // No worker needs to start anything else.
                    next.store(left.len(), Ordering::Relaxed);
                    return Err(error);
                }
            }
            Ok(())
        };
        let largest = self.sections.iter().filter(|section| matches!(section.content, Content::Ternary { .. }));
        let largest = largest.map(|section| section.bytes).max().unwrap_or(0).max(1);
        let room = usize::try_from(IN_FLIGHT / (4 * largest)).unwrap_or(usize::MAX).max(1);
        let workers = thread::available_parallelism().map_or(1, usize::from).min(left.len()).min(room);
        thread::scope(|scope| {
            let (written, to_flush) = mpsc::channel();
            let flushed = scope.spawn(|| self.flush_along(to_flush));
            let workers: Vec<_> = (0..workers)
                .map(|_| {
                    scope.spawn({
                        let written = written.clone();
                        || work(written)
                    })
                })
                .collect();
            drop(written);
            for thread in workers.into_iter().chain([flushed]) {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            }
            Ok::<_, FormatError>(())
        })?;
        self.whole_sections(&tables)
    }

    fn done(&self) -> MutexGuard<'_, Vec<Option<Done>>> {
        self.done.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has what is written go to the disk while the rest is made: nothing is left to wait for at the end, and after a power
    /// failure what was there is.
    fn flush_along(&self, written: Receiver<usize>) -> Result<(), FormatError> {
        let mut waiting = 0;
        for bytes in written {
            waiting += bytes;
            if waiting >= FLUSH {
                self.file.flush().map_err(|source| self.failed(source))?;
                waiting = 0;
            }
        }
        Ok(())
    }

    /// The sections that are made in blocks.
    fn tables(&self) -> Result<BTreeMap<usize, Table>, FormatError> {
        let mut tables = BTreeMap::new();
        for (section, part) in self.parts.iter().enumerate() {
            let matrix = match part {
                Part::Embedding => Some(self.model.embedding()?),
                Part::Head => self.model.head()?,
                Part::Screen => Some(self.model.head()?.map_or_else(|| self.model.embedding(), Ok)?),
                _ => None,
            };
            let first = self.units.partition_point(|unit| unit.section < section);
            let units = first..self.units.partition_point(|unit| unit.section <= section);
            if let (Some(matrix), Some(target)) = (matrix, self.stored_rows(*part)) {
                let (name, content) = (part.to_string(), &self.sections[section].content);
                let screen = if let Content::Screen(shape) = content { Some(shape.bits) } else { None };
                tables.insert(section, Table { name, matrix, target, screen, units, checksum: Mutex::default() });
            }
        }
        Ok(tables)
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

    fn make(&self, unit: usize, tables: &BTreeMap<usize, Table>, written: &Sender<usize>) -> Result<(), FormatError> {
        let Unit { section, rows, places } = &self.units[unit];
        let (pieces, mut done) = match (tables.get(section), rows) {
            (Some(table), Some(rows)) => table.block(rows.clone(), self.model)?,
            _ => {
                let (bytes, scale) = section_bytes(self.model, self.parts[*section], &self.sections[*section])?;
                (vec![bytes], Done { scale: scale.unwrap_or(0.0), ..Done::default() })
            }
        };
        let mut hash = Xxh3::new();
        for (bytes, place) in pieces.iter().zip(places) {
            self.put(bytes, place.start, written)?;
            hash.update(bytes);
        }
        done.xxh3 = hash.digest();
        self.file.record(unit, done).map_err(|source| self.failed(source))?;
        self.done()[unit] = Some(done);
        // Whoever has it goes on with it; what nobody does is done at the end.
        if let Some(table) = tables.get(section)
            && let Ok(mut checksum) = table.checksum.try_lock()
        {
            self.go_on(table, &mut checksum)?;
        }
        Ok(())
    }

    /// Goes on with a section's checksum while its blocks, which come in any order, are still in the caches.
    fn go_on(&self, table: &Table, checksum: &mut Checksum) -> Result<(), FormatError> {
        for unit in table.units.clone().skip(checksum.blocks) {
            if self.done()[unit].is_none() {
                break;
            }
            let place = self.units[unit].places[0].clone();
            self.file.hash(place, &mut checksum.hash).map_err(|source| self.failed(source))?;
            checksum.blocks += 1;
        }
        Ok(())
    }

    /// What is known of each section, all units being there.
    fn whole_sections(&self, tables: &BTreeMap<usize, Table>) -> Result<Vec<Done>, FormatError> {
        let mut sections = vec![Done::default(); self.sections.len()];
        for (unit, done) in self.units.iter().zip(self.done().iter().flatten()) {
            let section = &mut sections[unit.section];
            let error = (section.error.0 + done.error.0, section.error.1 + done.error.1);
            *section = Done { error, ..*done };
        }
        for (section, table) in tables {
            let mut checksum = table.checksum.lock().unwrap_or_else(PoisonError::into_inner);
            self.go_on(table, &mut checksum)?;
            // A screen's scales are behind all of its tiles.
            for place in self.units[table.units.clone()].iter().flat_map(|unit| &unit.places[1..]) {
                self.file.hash(place.clone(), &mut checksum.hash).map_err(|source| self.failed(source))?;
            }
            sections[*section].xxh3 = checksum.hash.digest();
        }
        Ok(sections)
    }

    /// Writes bytes at a place in the file.
    fn put(&self, bytes: &[u8], start: u64, written: &Sender<usize>) -> Result<(), FormatError> {
        for (at, step) in bytes.chunks(STEP).enumerate() {
            self.file.write_at(step, start + (at * STEP) as u64).map_err(|source| self.failed(source))?;
            // If flushing has failed, that is what will be told.
            let _ = written.send(step.len());
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
    /// A block of rows as the file has them, or their screen's tiles and scales, and what rounding them took.
    fn block(&self, rows: Range<usize>, model: &Checkpoint) -> Result<(Vec<Bytes>, Done), FormatError> {
        let Self { matrix, target, .. } = self;
        let (rounded, error) = if *target == matrix.dtype {
            let row_bytes = matrix.row_bytes();
            let own = matrix.bytes.slice(rows.start * row_bytes..rows.end * row_bytes);
            (own.expect("a matrix has all of its rows"), (0.0, 0.0))
        } else {
            let (bytes, error) = self.round(rows.clone(), model)?;
            (bytes.into(), error)
        };
        let Some(bits) = self.screen else { return Ok((vec![rounded], Done { error, ..Done::default() })) };
        let stored = FloatMatrix { rows: rows.len(), columns: matrix.columns, dtype: *target, bytes: rounded };
        let (tiles, scales) = screen::form_bytes(&stored, bits, 0..rows.len());
        Ok((vec![tiles.into(), scales.into()], Done::default()))
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
        Part::Tokenizer => {
            // One that cannot be used must not be copied.
            model.tokenizer()?;
            (model.tokenizer_json()?, None)
        }
        Part::Norms => (norms(model)?, None),
        Part::Biases => (biases(model)?, None),
        // Made in blocks of rows.
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
