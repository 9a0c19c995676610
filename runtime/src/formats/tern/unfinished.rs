//! The file that a prepared file grows in: `MODEL.tern.part`, beside where the result will be.
//!
//! Where the result has its header, this file has bytes that no reader takes for a model, and a digest of what is being
//! written. Behind the last section it has a journal with one entry for each unit, which is a section or a block of one.
//! Whoever writes the same thing again, after an interruption, a killed process or a power failure, believes an entry
//! if the unit has its checksum, and goes on with the rest.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::Xxh3;

/// First bytes of an unfinished file.
pub(super) const MAGIC: [u8; 8] = *b"\x89TERNPRT";
/// Bytes of a journal's entry.
const ENTRY: usize = 32;
/// Bytes read at a time.
const STEP: usize = 1 << 20;

/// What is known of a unit that is complete.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Done {
    pub(super) xxh3: u64,
    /// A ternary section's multiplier.
    pub(super) scale: f32,
    /// `‖w − w'‖²` and `‖w‖²` of rows `w` that became `w'` because another type was asked for.
    pub(super) error: (f64, f64),
}

impl Done {
    fn to_bytes(self) -> [u8; ENTRY] {
        let mut bytes = [0; ENTRY];
        bytes[..8].copy_from_slice(&self.xxh3.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.error.0.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.error.1.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.scale.to_le_bytes());
        bytes[28] = 1;
        bytes
    }

    fn from_bytes(bytes: &[u8; ENTRY]) -> Option<Self> {
        let (xxh3, rest) = bytes.split_first_chunk()?;
        let (error, rest) = rest.split_first_chunk()?;
        let (whole, rest) = rest.split_first_chunk()?;
        let (scale, rest) = rest.split_first_chunk()?;
        let done = Self {
            xxh3: u64::from_le_bytes(*xxh3),
            scale: f32::from_le_bytes(*scale),
            error: (f64::from_le_bytes(*error), f64::from_le_bytes(*whole)),
        };
        (rest[0] == 1).then_some(done)
    }
}

/// An open unfinished file, locked so that no other process writes it.
#[derive(Debug)]
pub(super) struct Unfinished {
    file: File,
    path: PathBuf,
    /// Length of the result; the journal follows.
    total: u64,
}

impl Unfinished {
    /// Where the file at `target` grows.
    pub(super) fn path_for(target: &Path) -> PathBuf {
        let mut name = target.as_os_str().to_owned();
        name.push(".part");
        name.into()
    }

    /// Opens the unfinished file for `target`, which will be `total` bytes long, with what is known of the units that lie
    /// at `places` and are complete already: none if there was no such file, or one that was to become something else
    /// than `plan`.
    pub(super) fn open<'a>(
        target: &Path,
        plan: u64,
        total: u64,
        places: impl ExactSizeIterator<Item = &'a [Range<u64>]>,
    ) -> io::Result<(Self, Vec<Option<Done>>)> {
        // Renaming would replace a device as readily as a file.
        if target.file_name().is_none() || target.exists() && !target.is_file() {
            return Err(io::Error::other("there is something that is no ordinary file"));
        }
        let path = Self::path_for(target);
        let file = open_locked(&path)?;
        let unfinished = Self { file, path, total };
        let (mut front, mut journal) = ([0; 16], vec![0; places.len() * ENTRY]);
        let head = [MAGIC, plan.to_le_bytes()].concat();
        let length = total + journal.len() as u64;
        let known = unfinished.file.metadata()?.len() == length
            && unfinished.read_at(&mut front, 0).is_ok()
            && unfinished.read_at(&mut journal, total).is_ok();
        if known && front[..] == head {
            let entries = journal.as_chunks().0.iter().map(Done::from_bytes).zip(places);
            let done = entries.map(|(done, places)| done.filter(|done| unfinished.has(places, done.xxh3)));
            let done = done.collect();
            return Ok((unfinished, done));
        }
        match unfinished.begin(length, &head) {
            Ok(()) => Ok((unfinished, vec![None; places.len()])),
            Err(error) => {
                unfinished.discard();
                Err(error)
            }
        }
    }

    fn begin(&self, length: u64, head: &[u8]) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.set_len(length)?;
        self.write_at(head, 0)
    }

    fn has(&self, places: &[Range<u64>], xxh3: u64) -> bool {
        let mut hash = Xxh3::new();
        places.iter().all(|place| self.hash(place.clone(), &mut hash).is_ok()) && hash.digest() == xxh3
    }

    /// Writes down that a unit is complete.
    pub(super) fn record(&self, unit: usize, done: Done) -> io::Result<()> {
        self.write_at(&done.to_bytes(), self.total + (unit * ENTRY) as u64)
    }

    /// Reads a part of the file back into a checksum.
    pub(super) fn hash(&self, range: Range<u64>, hash: &mut Xxh3) -> io::Result<()> {
        let mut buffer = vec![0; range.end.saturating_sub(range.start).min(STEP as u64) as usize];
        let mut at = range.start;
        while at < range.end {
            let part = &mut buffer[..(range.end - at).min(STEP as u64) as usize];
            self.read_at(part, at)?;
            hash.update(part);
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Waits until what was written so far is on the disk.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Takes the journal off, writes the header and gives the file its name.
    pub(super) fn finish(self, front: &[u8], target: &Path) -> io::Result<()> {
        let finished = self.file.set_len(self.total).and_then(|()| self.write_at(front, 0));
        // Some file systems report a full disk only when everything must be on it.
        let finished = finished.and_then(|()| self.file.sync_all());
        let finished = finished.and_then(|()| fs::rename(&self.path, target));
        if finished.is_err() {
            self.discard();
        }
        finished
    }

    /// Deletes the file.
    pub(super) fn discard(self) {
        // It is the reason for failing that the user is told, not this.
        let _ = fs::remove_file(&self.path);
    }

    #[cfg(unix)]
    pub(super) fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        std::os::unix::fs::FileExt::write_all_at(&self.file, bytes, offset)
    }

    #[cfg(unix)]
    fn read_at(&self, target: &mut [u8], offset: u64) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(&self.file, target, offset)
    }

    #[cfg(windows)]
    pub(super) fn write_at(&self, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
        while !bytes.is_empty() {
            let count = std::os::windows::fs::FileExt::seek_write(&self.file, bytes, offset)?;
            if count == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            bytes = &bytes[count..];
            offset += count as u64;
        }
        Ok(())
    }

    #[cfg(windows)]
    fn read_at(&self, mut target: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !target.is_empty() {
            let count = std::os::windows::fs::FileExt::seek_read(&self.file, target, offset)?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            target = &mut target[count..];
            offset += count as u64;
        }
        Ok(())
    }
}

/// Opens or creates the file at `path` for one writer at a time.
fn open_locked(path: &Path) -> io::Result<File> {
    loop {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        match file.try_lock() {
            Ok(()) if is_still_at(&file, path) => return Ok(file),
            // Another writer finished between the two calls, and the file has its final name: it is not ours to write.
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(io::Error::other("another process is writing it")),
            // A file system without locks.
            Err(TryLockError::Error(_)) => return Ok(file),
        }
    }
}

#[cfg(unix)]
fn is_still_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let place = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    match (file.metadata(), fs::metadata(path)) {
        (Ok(open), Ok(there)) => place(open) == place(there),
        _ => false,
    }
}

#[cfg(not(unix))]
fn is_still_at(_: &File, path: &Path) -> bool {
    path.exists()
}
