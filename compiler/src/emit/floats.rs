//! Rows of floats in blocks of 64: as many elements as a cache line has int8 values.

use crate::machine::{Int, Machine, Vector, advance, repeat};

/// Elements of a block.
pub(super) const BLOCK: usize = 64;

/// Bytes of a block of floats.
const BLOCK_BYTES: usize = 4 * BLOCK;

/// Bytes of scratch that a kernel on up to two rows needs: a block for each.
pub(crate) const SCRATCH: usize = 2 * BLOCK_BYTES;

/// A row of `k` floats.
pub(super) struct Floats {
    address: Int,
    /// Address of a copy of the last block, completed with zeros; only if that one is incomplete.
    last: Int,
}

/// A block of a row.
pub(super) struct Block {
    address: Int,
    is_copy: bool,
}

impl Floats {
    /// The row of `k` floats at `address`. Its last block, if incomplete, is copied to place `number` of the scratch.
    pub(super) fn new(m: &mut dyn Machine, k: usize, address: Int, scratch: Int, number: usize) -> Self {
        let (first, vector) = (k / BLOCK * BLOCK_BYTES, m.vector_bytes());
        let last = m.add_constant(scratch, (number * BLOCK_BYTES) as i32);
        let bytes = 4 * (k % BLOCK);
        if bytes > 0 {
            for at in (0..BLOCK_BYTES).step_by(vector) {
                let floats = if at + vector <= bytes { m.load(address, (first + at) as i32) } else { m.zero() };
                m.store(last, at as i32, floats);
            }
            for at in (bytes / vector * vector..bytes).step_by(4) {
                m.copy32(address, (first + at) as i32, last, at as i32);
            }
        }
        Self { address, last }
    }
}

impl Block {
    /// Vector `i` of the block.
    pub(super) fn load(&self, m: &mut dyn Machine, i: usize) -> Vector {
        let offset = (i * m.vector_bytes()) as i32;
        if self.is_copy { m.load_result(self.address, offset) } else { m.load(self.address, offset) }
    }
}

/// Vectors of a block.
pub(super) fn vectors(m: &dyn Machine) -> usize {
    BLOCK_BYTES / m.vector_bytes()
}

/// Emits `body` for every block of `rows`, all of `k` floats: once in a loop and, if the last block is incomplete, once
/// more for its copy.
pub(super) fn for_each_block<const N: usize>(
    m: &mut dyn Machine,
    k: usize,
    rows: [&Floats; N],
    mut body: impl FnMut(&mut dyn Machine, &[Block; N]),
) {
    let addresses = rows.map(|row| m.int_variable(row.address));
    repeat(m, k / BLOCK, |m| {
        let blocks = addresses.map(|address| Block { address: m.get_int(address), is_copy: false });
        body(m, &blocks);
        addresses.iter().for_each(|address| advance(m, *address, BLOCK_BYTES as i32));
    });
    if !k.is_multiple_of(BLOCK) {
        body(m, &rows.map(|row| Block { address: row.last, is_copy: true }));
    }
}
