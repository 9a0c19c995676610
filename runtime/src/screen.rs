//! A head's rows as int8 with a scale each, the *screen*, which [`Head`](crate::model::Head) gets its bounds from.
//!
//! It is a function of the rows alone: every step has one order, so it has the same bytes on every machine, whoever
//! computes it, and a prepared file may hold it. As bytes it is the tiles, `[⌈rows / 8⌉, ⌈columns / 32⌉, 8, 32]`, zero past
//! the last row and column, followed by three `f32` for each row: its scale, and the two norms of its bound.

use std::io;
use std::ops::Range;

use ternion_kernels_ref::lanes::LANES;
use ternion_tuner::Workers;

use crate::formats::FloatMatrix;
use crate::memory::PageBuffer;
use crate::ops::{self, SCREEN_ROWS, SCREEN_STEP, ScreenTile};
use crate::team::{SharedSlice, share};

/// More than the rounding of a norm's sum of squares, of its square root and of the products with it.
pub(crate) const SLACK: f64 = 1.0 + 1e-9;
/// Bytes of a row's [`Scale`].
const SCALE: usize = 12;

/// One row's int8 form `s·q`.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Scale {
    /// `s`
    pub(crate) scale: f32,
    /// What `‖x‖` is multiplied with in the bound: `‖e‖ + γₙ·‖w‖`, rounded up.
    pub(crate) error: f32,
    /// And `‖d‖`: `s·‖q‖`, rounded up.
    pub(crate) form: f32,
}

impl Scale {
    /// Brings a row into its int8 form. A row that is not all numbers gets a bound that excludes nothing.
    fn quantize(row: &[f32], target: &mut [u8]) -> Self {
        let form = ops::screen_form(row, target);
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

/// Bytes of a tile's rows of `columns` elements.
const fn tile_bytes(columns: usize) -> usize {
    columns.div_ceil(SCREEN_STEP) * size_of::<ScreenTile>()
}

/// Where the scales begin in the screen of a `[rows, columns]` matrix, and where it ends; `None` if that overflows.
pub(crate) fn extent(rows: usize, columns: usize) -> Option<(usize, usize)> {
    let tile = columns.div_ceil(SCREEN_STEP).checked_mul(size_of::<ScreenTile>())?;
    let tiles = rows.div_ceil(SCREEN_ROWS).checked_mul(tile)?;
    Some((tiles, tiles.checked_add(rows.checked_mul(SCALE)?)?))
}

/// Where in a screen of rows of `columns` elements the tiles of some rows lie, the first of which begins one.
pub(crate) fn tiles_of(rows: &Range<usize>, columns: usize) -> Range<usize> {
    rows.start / SCREEN_ROWS * tile_bytes(columns)..rows.end.div_ceil(SCREEN_ROWS) * tile_bytes(columns)
}

/// Where among the scales those of some rows lie.
pub(crate) const fn scales_of(rows: &Range<usize>) -> Range<usize> {
    rows.start * SCALE..rows.end * SCALE
}

/// Computes the forms of some rows, the first of which begins a tile: writes their tiles, which were zero, and gives each
/// row's place among `rows` and its scale to `scale`.
fn form(matrix: &FloatMatrix, rows: Range<usize>, tiles: &mut [u8], mut scale: impl FnMut(usize, Scale)) {
    let (mut row, mut form) = (vec![0.0; matrix.columns], vec![0; matrix.columns]);
    let tiles = tiles.chunks_exact_mut(tile_bytes(matrix.columns).max(1));
    for (first, tile) in rows.clone().step_by(SCREEN_ROWS).zip(tiles) {
        for (r, at) in (first..rows.end.min(first + SCREEN_ROWS)).enumerate() {
            matrix.widen_row(at, &mut row);
            scale(at - rows.start, Scale::quantize(&row, &mut form));
            let places = tile.as_chunks_mut::<SCREEN_STEP>().0[r..].iter_mut().step_by(SCREEN_ROWS);
            for (place, form) in places.zip(form.chunks(SCREEN_STEP)) {
                place[..form.len()].copy_from_slice(form);
            }
        }
    }
}

/// The tiles and the scales of some rows, the first of which begins a tile, as a screen has them.
pub(crate) fn form_bytes(matrix: &FloatMatrix, rows: Range<usize>) -> (Vec<u8>, Vec<u8>) {
    let mut tiles = vec![0; tiles_of(&(0..rows.len()), matrix.columns).end];
    let mut scales = vec![0; rows.len() * SCALE];
    form(matrix, rows, &mut tiles, |at, scale| scales.as_chunks_mut().0[at] = scale.to_bytes());
    (tiles, scales)
}

/// All rows as int8.
#[derive(Debug)]
pub(crate) struct Screen {
    tiles: PageBuffer,
    pub(crate) scales: Vec<Scale>,
    /// Whether a file had it.
    stored: bool,
}

impl Screen {
    /// Computes the screen of some rows, with all threads.
    ///
    /// # Errors
    /// If memory runs out.
    pub(crate) fn new(rows: &FloatMatrix, workers: &dyn Workers) -> io::Result<Self> {
        let k = rows.columns;
        let mut tiles = PageBuffer::zeroed(tiles_of(&(0..rows.rows), k).end)?;
        let mut scales = vec![Scale::default(); rows.rows];
        let (bytes, shared) = (SharedSlice::new(&mut tiles), SharedSlice::new(&mut scales));
        workers.run(&|thread| {
            let tiles = share(rows.rows.div_ceil(SCREEN_ROWS), workers.threads(), thread);
            let within = tiles.start * SCREEN_ROWS..rows.rows.min(tiles.end * SCREEN_ROWS);
            // SAFETY: every tile is in one thread's share.
            let (bytes, scales) = unsafe { (bytes.part(tiles_of(&within, k)), shared.part(within.clone())) };
            form(rows, within, bytes, |at, scale| scales[at] = scale);
        });
        Ok(Self { tiles, scales, stored: false })
    }

    /// The screen of a `[rows, columns]` matrix that a file holds; `None` if these are not as many bytes.
    ///
    /// It is copied to huge pages, with all threads: where it is mapped, its pages are small, and tokens took longer.
    ///
    /// # Errors
    /// If memory runs out.
    pub(crate) fn stored(bytes: &[u8], rows: usize, columns: usize, workers: &dyn Workers) -> io::Result<Option<Self>> {
        let Some((end, _)) = extent(rows, columns).filter(|(_, end)| bytes.len() == *end) else { return Ok(None) };
        let (source, scales) = bytes.split_at(end);
        let mut tiles = PageBuffer::zeroed(source.len())?;
        let shared = SharedSlice::new(&mut tiles);
        workers.run(&|thread| {
            let part = share(source.len(), workers.threads(), thread);
            // SAFETY: every byte is in one thread's share.
            unsafe { shared.part(part.clone()) }.copy_from_slice(&source[part]);
        });
        let scales = scales.as_chunks().0.iter().map(Scale::from_bytes).collect();
        Ok(Some(Self { tiles, scales, stored: true }))
    }

    /// Whether a file had it.
    pub(crate) const fn is_stored(&self) -> bool {
        self.stored
    }

    /// Bytes of its tiles and scales.
    pub(crate) fn len(&self) -> usize {
        self.tiles.len() + size_of_val(&self.scales[..])
    }

    /// The tiles of some rows, which begin with one, of `steps` steps each.
    pub(crate) fn tiles(&self, rows: &Range<usize>, steps: usize) -> &[ScreenTile] {
        let tiles = self.tiles.as_chunks::<SCREEN_STEP>().0.as_chunks::<SCREEN_ROWS>().0;
        &tiles[rows.start / SCREEN_ROWS * steps..rows.end.div_ceil(SCREEN_ROWS) * steps]
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
        for (rows, columns) in [(1, 1), (8, 32), (21, 40), (64, 100)] {
            let matrix = matrix(rows, columns);
            let (tiles, end) = extent(rows, columns).unwrap();
            let mut bytes = vec![0; end];
            for start in (0..rows).step_by(16) {
                let block = start..rows.min(start + 16);
                let (block_tiles, block_scales) = form_bytes(&matrix, block.clone());
                bytes[tiles_of(&block, columns)].copy_from_slice(&block_tiles);
                bytes[tiles..][scales_of(&block)].copy_from_slice(&block_scales);
            }
            for threads in [1, 3] {
                let team = Team::new(threads).unwrap();
                let stored = Screen::stored(&bytes, rows, columns, &team).unwrap().unwrap();
                assert!(Screen::stored(&bytes, rows + 8, columns, &team).unwrap().is_none());
                assert!(stored.is_stored() && stored.len() == end);
                let made = Screen::new(&matrix, &team).unwrap();
                assert!(!made.is_stored() && *made.tiles == *stored.tiles);
                let scales = |screen: &Screen| screen.scales.iter().flat_map(|s| s.to_bytes()).collect::<Vec<u8>>();
                assert_eq!(scales(&made), scales(&stored));
            }
        }
    }

    #[test]
    fn a_shape_that_overflows_has_no_screen() {
        assert!(extent(usize::MAX, 1).is_none() && extent(8, usize::MAX).is_none());
    }
}
