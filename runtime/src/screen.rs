//! A head's rows as integers of 6, 7 or 8 bits with a scale each, the *screen*, which [`Head`](crate::model::Head) gets its
//! bounds from.
//!
//! It is a function of the rows: their length tells the number of bits, and every step has one order, so it has the same bytes
//! on every machine, whoever computes it, and a prepared file may hold it. As bytes it is the tiles, `[⌈rows / 8⌉, ⌈columns / 32⌉, 8, 32]`
//! elements in two's complement, least significant bit first, zero past the last row and column, followed by three `f32`
//! for each row: its scale, and the two norms of its bound. In memory a CPU that unpacks elements slowly has a byte for each.

use std::io;
use std::ops::Range;

use serde::{Deserialize, Serialize};
use ternion_kernels_ref::lanes::LANES;
use ternion_tuner::Workers;

use crate::formats::FloatMatrix;
use crate::memory::{PageBuffer, prefetch};
use crate::ops::{self, RowBounds, SCREEN_BLOCK, SCREEN_ROWS, SCREEN_STEP, SLACK, screen_step_bytes};
use crate::team::{SharedSlice, share};

/// Bytes of a row's [`Scale`].
const SCALE: usize = 12;

/// A matrix's shape, and the bits of an element of its screen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Shape {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    /// Older files do not say it.
    #[serde(default = "eight")]
    pub(crate) bits: usize,
}

const fn eight() -> usize {
    8
}

impl Shape {
    /// With as many bits as pay for rows of this length. The bound of a row's rounding, in standard deviations of the
    /// logits, grows with the square root of its length (the book's page on exactness has how many rows it leaves), and what
    /// it leaves costs more than bits save.
    pub(crate) const fn new(rows: usize, columns: usize) -> Self {
        let bits = match columns {
            ..=1024 => 6,
            1025..=3072 => 7,
            _ => 8,
        };
        Self { rows, columns, bits }
    }

    /// As it is in memory, elements `packed` or a byte each.
    const fn in_memory(self, packed: bool) -> Self {
        Self { bits: if packed { self.bits } else { 8 }, ..self }
    }

    /// Bytes of a tile.
    const fn tile_bytes(self) -> usize {
        self.columns.div_ceil(SCREEN_STEP) * screen_step_bytes(self.bits)
    }

    /// Where the scales begin in the screen, and where it ends; `None` if that overflows, or nothing has so many bits.
    pub(crate) fn extent(self) -> Option<(usize, usize)> {
        let Self { rows, columns, bits } = self;
        let bits = Some(bits).filter(|bits| (6..=8).contains(bits))?;
        let tile = columns.div_ceil(SCREEN_STEP).checked_mul(screen_step_bytes(bits))?;
        let tiles = rows.div_ceil(SCREEN_ROWS).checked_mul(tile)?;
        Some((tiles, tiles.checked_add(rows.checked_mul(SCALE)?)?))
    }

    /// Where in the screen the tiles of some rows lie, the first of which begins one.
    pub(crate) const fn tiles_of(self, rows: &Range<usize>) -> Range<usize> {
        rows.start / SCREEN_ROWS * self.tile_bytes()..rows.end.div_ceil(SCREEN_ROWS) * self.tile_bytes()
    }
}

/// One row's part of [`RowBounds`].
#[derive(Clone, Copy, Debug)]
struct Scale {
    scale: f32,
    error: f32,
    form: f32,
}

impl Scale {
    /// Brings a row into its form, a byte an element. A row that is not all numbers gets a bound that excludes nothing.
    fn quantize(bits: usize, row: &[f32], target: &mut [u8]) -> Self {
        let form = ops::screen_form(bits, row, target);
        let whole = form.whole.sqrt() * SLACK;
        // A row with an infinity or a NaN anywhere has such a norm.
        if !whole.is_finite() {
            return Self { scale: 0.0, error: f32::INFINITY, form: 0.0 };
        }
        let error = form.error.sqrt() * SLACK + gamma(row.len()) * whole;
        Self { scale: form.scale, error: rounded_up(error), form: rounded_up(form.form.sqrt() * SLACK) }
    }

    fn to_bytes(self) -> [u8; SCALE] {
        let mut bytes = [0; SCALE];
        for (place, value) in bytes.as_chunks_mut::<4>().0.iter_mut().zip([self.scale, self.error, self.form]) {
            *place = value.to_le_bytes();
        }
        bytes
    }

    fn from_bytes(bytes: &[u8; SCALE]) -> Self {
        let value = |at: usize| f32::from_le_bytes(std::array::from_fn(|i| bytes[4 * at + i]));
        Self { scale: value(0), error: value(1), form: value(2) }
    }

    /// Puts it where row `at` of some blocks has it.
    fn put(self, blocks: &mut [RowBounds], at: usize) {
        let (block, row) = (&mut blocks[at / SCREEN_BLOCK], at % SCREEN_BLOCK);
        (block.scale[row], block.error[row], block.form[row]) = (self.scale, self.error, self.form);
    }
}

/// An `f32` that is not smaller.
fn rounded_up(x: f64) -> f32 {
    (x as f32).next_up()
}

/// Roundings on the way of a product of a row of `k` elements into its logit.
pub(crate) fn roundings(k: usize) -> f64 {
    (k.div_ceil(LANES) + LANES.ilog2() as usize) as f64
}

/// `γₙ` for rows of `k` elements.
fn gamma(k: usize) -> f64 {
    let nu = roundings(k) * f64::from(f32::EPSILON) / 2.0;
    nu / (1.0 - nu)
}

/// Where among the scales those of some rows lie.
pub(crate) const fn scales_of(rows: &Range<usize>) -> Range<usize> {
    rows.start * SCALE..rows.end * SCALE
}

/// Computes the forms of some rows, of `bits` bits, the first of which begins a tile: writes their tiles, which were zero and
/// are as `shape` says, and gives each row's place among `rows` and its scale to `scale`.
fn form(
    matrix: &FloatMatrix,
    bits: usize,
    shape: Shape,
    rows: Range<usize>,
    tiles: &mut [u8],
    mut scale: impl FnMut(usize, Scale),
) {
    let (mut row, mut form) = (vec![0.0; matrix.columns], vec![0; matrix.columns]);
    let step_bytes = screen_step_bytes(shape.bits) / SCREEN_ROWS;
    let tiles = tiles.chunks_exact_mut(shape.tile_bytes().max(1));
    for (first, tile) in rows.clone().step_by(SCREEN_ROWS).zip(tiles) {
        for (r, at) in (first..rows.end.min(first + SCREEN_ROWS)).enumerate() {
            matrix.widen_row(at, &mut row);
            scale(at - rows.start, Scale::quantize(bits, &row, &mut form));
            let places = tile.chunks_exact_mut(step_bytes).skip(r).step_by(SCREEN_ROWS);
            for (place, form) in places.zip(form.chunks(SCREEN_STEP)) {
                ops::pack_screen(shape.bits, form, place);
            }
        }
    }
}

/// The tiles and the scales of some rows, the first of which begins a tile, as a screen of so many bits has them.
pub(crate) fn form_bytes(matrix: &FloatMatrix, bits: usize, rows: Range<usize>) -> (Vec<u8>, Vec<u8>) {
    let shape = Shape { rows: rows.len(), columns: matrix.columns, bits };
    let mut tiles = vec![0; shape.tiles_of(&(0..rows.len())).end];
    let mut scales = vec![0; rows.len() * SCALE];
    form(matrix, bits, shape, rows, &mut tiles, |at, scale| scales.as_chunks_mut().0[at] = scale.to_bytes());
    (tiles, scales)
}

/// All rows in their forms.
#[derive(Debug)]
pub(crate) struct Screen {
    /// With the bits that an element has in memory.
    shape: Shape,
    tiles: PageBuffer,
    bounds: Vec<RowBounds>,
    /// Whether a file had it.
    stored: bool,
}

impl Screen {
    /// Computes the screen of some rows, with all threads.
    ///
    /// # Errors
    /// If memory runs out.
    pub(crate) fn new(rows: &FloatMatrix, workers: &dyn Workers) -> io::Result<Self> {
        Self::new_as(rows, ops::unpacks_fast(), workers)
    }

    /// As [`new`](Self::new), with elements `packed` in memory or a byte each.
    fn new_as(rows: &FloatMatrix, packed: bool, workers: &dyn Workers) -> io::Result<Self> {
        let stored = Shape::new(rows.rows, rows.columns);
        let shape = stored.in_memory(packed);
        let mut tiles = PageBuffer::zeroed(shape.tiles_of(&(0..rows.rows)).end)?;
        let mut bounds = vec![RowBounds::default(); rows.rows.div_ceil(SCREEN_BLOCK)];
        let (bytes, shared) = (SharedSlice::new(&mut tiles), SharedSlice::new(&mut bounds));
        workers.run(&|thread| {
            let blocks = share(rows.rows.div_ceil(SCREEN_BLOCK), workers.threads(), thread);
            let within = (blocks.start * SCREEN_BLOCK).min(rows.rows)..rows.rows.min(blocks.end * SCREEN_BLOCK);
            // SAFETY: every block is in one thread's share.
            let (bytes, bounds) = unsafe { (bytes.part(shape.tiles_of(&within)), shared.part(blocks)) };
            form(rows, stored.bits, shape, within, bytes, |at, scale| scale.put(bounds, at));
        });
        Ok(Self { shape, tiles, bounds, stored: false })
    }

    /// The screen of a matrix that a file holds; `None` if these are not as many bytes.
    ///
    /// It is copied to huge pages, with all threads: where it is mapped, its pages are small, and tokens took longer.
    ///
    /// # Errors
    /// If memory runs out.
    pub(crate) fn stored(bytes: &[u8], shape: Shape, workers: &dyn Workers) -> io::Result<Option<Self>> {
        Self::stored_as(bytes, shape, ops::unpacks_fast(), workers)
    }

    /// As [`stored`](Self::stored), with elements `packed` in memory or a byte each.
    fn stored_as(bytes: &[u8], shape: Shape, packed: bool, workers: &dyn Workers) -> io::Result<Option<Self>> {
        let Some((end, _)) = shape.extent().filter(|(_, end)| bytes.len() == *end) else { return Ok(None) };
        let (source, scales) = bytes.split_at(end);
        let (bits, shape) = (shape.bits, shape.in_memory(packed));
        let mut tiles = PageBuffer::zeroed(shape.tiles_of(&(0..shape.rows)).end)?;
        let shared = SharedSlice::new(&mut tiles);
        workers.run(&|thread| {
            // Eight elements are as many bytes as one has bits.
            let part = share(source.len() / bits, workers.threads(), thread);
            let from = &source[part.start * bits..part.end * bits];
            // SAFETY: every byte is in one thread's share.
            let to = unsafe { shared.part(part.start * shape.bits..part.end * shape.bits) };
            if bits == shape.bits { to.copy_from_slice(from) } else { ops::unpack_screen(bits, from, to) }
        });
        let mut bounds = vec![RowBounds::default(); shape.rows.div_ceil(SCREEN_BLOCK)];
        for (at, bytes) in scales.as_chunks().0.iter().enumerate() {
            Scale::from_bytes(bytes).put(&mut bounds, at);
        }
        Ok(Some(Self { shape, tiles, bounds, stored: true }))
    }

    /// Whether a file had it.
    pub(crate) const fn is_stored(&self) -> bool {
        self.stored
    }

    /// Bytes of its tiles and bounds.
    pub(crate) fn len(&self) -> usize {
        self.tiles.len() + size_of_val(&self.bounds[..])
    }

    /// Bits of an element in memory.
    pub(crate) const fn bits(&self) -> usize {
        self.shape.bits
    }

    /// The tiles of a block's rows, and what bounds need to know of them. The next block's bounds are asked for: they are
    /// too few to be fetched unasked.
    pub(crate) fn block(&self, rows: &Range<usize>) -> (&[u8], &RowBounds) {
        let at = rows.start / SCREEN_BLOCK;
        if let Some(next) = self.bounds.get(at + 1) {
            prefetch(std::slice::from_ref(next));
        }
        (&self.tiles[self.shape.tiles_of(rows)], &self.bounds[at])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::FloatType;
    use crate::team::Team;

    fn matrix(rows: usize, columns: usize) -> FloatMatrix {
        let values = (0..rows * columns).map(|at| ((at * 7919 % 1009) as f32 - 500.0) / 37.0);
        let bytes: Vec<u8> = values.flat_map(f32::to_le_bytes).collect();
        FloatMatrix { rows, columns, dtype: FloatType::F32.into(), bytes: bytes.into() }
    }

    #[test]
    fn a_screen_made_in_blocks_is_the_one_that_threads_make() {
        for (rows, columns, bits) in [(1, 1, 6), (8, 32, 6), (21, 40, 6), (64, 1100, 7), (9, 3100, 8)] {
            let matrix = matrix(rows, columns);
            let shape = Shape::new(rows, columns);
            assert_eq!(shape, Shape { rows, columns, bits });
            let (tiles, end) = shape.extent().unwrap();
            let mut bytes = vec![0; end];
            for start in (0..rows).step_by(16) {
                let block = start..rows.min(start + 16);
                let (block_tiles, block_scales) = form_bytes(&matrix, bits, block.clone());
                bytes[shape.tiles_of(&block)].copy_from_slice(&block_tiles);
                bytes[tiles..][scales_of(&block)].copy_from_slice(&block_scales);
            }
            for threads in [1, 3] {
                let team = Team::new(threads).unwrap();
                assert!(Screen::stored(&bytes, Shape { rows: rows + 8, ..shape }, &team).unwrap().is_none());
                for (packed, bits) in [(true, bits), (false, 8)] {
                    let stored = Screen::stored_as(&bytes, shape, packed, &team).unwrap().unwrap();
                    assert!(stored.is_stored() && stored.len() >= end && stored.bits() == bits);
                    let made = Screen::new_as(&matrix, packed, &team).unwrap();
                    assert!(!made.is_stored() && made.bits() == bits);
                    assert_eq!((&*made.tiles, &made.bounds), (&*stored.tiles, &stored.bounds));
                }
            }
        }
    }

    #[test]
    fn a_file_that_does_not_say_how_many_bits_has_eight() {
        let shape: Shape = serde_json::from_str(r#"{"rows":8,"columns":32}"#).unwrap();
        assert_eq!(shape, Shape { rows: 8, columns: 32, bits: 8 });
        // Of its bytes every one is an element, as it was then.
        let (tiles, _) = form_bytes(&matrix(8, 32), 8, 0..8);
        let mut first = [0; 32];
        ops::screen_form(
            8,
            &(0..32).map(|at| ((at * 7919 % 1009) as f32 - 500.0) / 37.0).collect::<Vec<_>>(),
            &mut first,
        );
        assert_eq!(tiles[..32], first);
    }

    #[test]
    fn a_shape_that_overflows_or_has_strange_bits_has_no_screen() {
        let shape = Shape::new(8, 32);
        assert!(shape.extent().is_some());
        let strange = [
            Shape { rows: usize::MAX, ..shape },
            Shape { columns: usize::MAX, ..shape },
            Shape { bits: 5, ..shape },
            Shape { bits: 9, ..shape },
        ];
        assert!(strange.iter().all(|shape| shape.extent().is_none()));
    }
}
