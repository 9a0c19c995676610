//! Whether the sections that follow from others are what follows from them.

use super::sections::section_bytes;
use super::{Content, Part, Section};
use crate::formats::{Checkpoint, FormatError};
use crate::ops::SCREEN_ROWS;
use crate::screen::{self, Shape};

/// Rows whose screen is computed at a time.
const BLOCK: usize = 128 * SCREEN_ROWS;

/// Computes every section of `derived` again from the rest of `model` and compares them byte by byte; returns their number.
pub(super) fn verify<'a>(
    model: &Checkpoint,
    derived: impl Iterator<Item = (Part, &'a Section, crate::formats::Bytes)>,
) -> Result<usize, FormatError> {
    let mut count = 0;
    for (part, section, found) in derived {
        let follows = match section.content {
            Content::Screen(shape) => screen_follows(model, &found, shape)?,
            _ => *section_bytes(model, part, section)?.0 == *found,
        };
        if !follows {
            let problem = format!("section {} is not what follows from the others", section.name);
            return Err(FormatError::Corrupted { path: model.path().to_owned(), problem });
        }
        count += 1;
    }
    Ok(count)
}

fn screen_follows(model: &Checkpoint, found: &[u8], shape: Shape) -> Result<bool, FormatError> {
    let matrix = model.head()?.map_or_else(|| model.embedding(), Ok)?;
    let Some((start, _)) = shape.extent() else { return Ok(false) };
    let (tiles, scales) = found.split_at(start);
    Ok((0..shape.rows).step_by(BLOCK).all(|first| {
        let block = first..shape.rows.min(first + BLOCK);
        let (of_tiles, of_scales) = (shape.tiles_of(&block), screen::scales_of(&block));
        screen::form_bytes(&matrix, shape.bits, block) == (tiles[of_tiles].to_vec(), scales[of_scales].to_vec())
    }))
}
