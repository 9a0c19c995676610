//! Bytes of a model: a part of a mapped file, of a buffer of our own, or of the binary itself.
//!
//! Cloning and slicing share the memory. Mapped parts of a prepared file start on a page; nothing else about
//! alignment is promised.

use std::fmt;
use std::fs::File;
use std::ops::{Deref, Range};
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;

use super::FormatError;

/// A cheaply cloned, read-only run of bytes.
#[derive(Clone)]
pub struct Bytes {
    memory: Memory,
    range: Range<usize>,
}

#[derive(Clone)]
enum Memory {
    Mapped(Arc<Mmap>),
    Owned(Arc<Vec<u8>>),
    Static(&'static [u8]),
}

impl Memory {
    fn all(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Owned(bytes) => bytes,
            Self::Static(bytes) => bytes,
        }
    }
}

impl Bytes {
    /// Bytes that are part of the program.
    #[must_use]
    pub const fn from_static(bytes: &'static [u8]) -> Self {
        Self { range: 0..bytes.len(), memory: Memory::Static(bytes) }
    }

    /// Maps a whole file.
    ///
    /// # Errors
    /// If the file cannot be opened or mapped.
    pub fn map(path: &Path) -> Result<Self, FormatError> {
        let open = || {
            let file = File::open(path)?;
            // SAFETY: the mapping is read-only and lives as long as its `Arc`. Model files are taken to be immutable
            // while they are open: the same assumption that every program that maps its inputs makes.
            unsafe { Mmap::map(&file) }
        };
        let map = open().map_err(|source| FormatError::Read { path: path.to_owned(), source })?;
        Ok(Self { range: 0..map.len(), memory: Memory::Mapped(Arc::new(map)) })
    }

    /// The part at `range`, or `None` if it does not lie inside.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Option<Self> {
        self.get(range.clone())?;
        let start = self.range.start + range.start;
        Some(Self { memory: self.memory.clone(), range: start..start + range.len() })
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory.all()[self.range.clone()]
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self { range: 0..bytes.len(), memory: Memory::Owned(Arc::new(bytes)) }
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bytes({})", self.len())
    }
}

#[cfg(test)]
mod tests {
    use super::Bytes;

    #[test]
    #[allow(clippy::reversed_empty_ranges)] // a range from a damaged file may be anything
    fn a_slice_lies_inside_or_is_none() {
        let bytes = Bytes::from(vec![0, 1, 2, 3, 4, 5]);
        let middle = bytes.slice(2..5).unwrap();
        assert_eq!(&*middle, [2, 3, 4]);
        assert_eq!(&*middle.slice(1..3).unwrap(), [3, 4]);
        assert!(middle.slice(1..4).is_none());
        assert!(bytes.slice(5..3).is_none());
        assert!(bytes.slice(0..usize::MAX).is_none());
        assert!(bytes.slice(6..6).unwrap().is_empty());
    }
}
