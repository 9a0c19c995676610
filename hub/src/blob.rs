//! One file: fetched, continued where it was cut off, checked, and linked into its snapshot.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::thread;

use sha1::Sha1;
use sha2::{Digest, Sha256};

use crate::repository::{Checksum, Entry, Repository};
use crate::{Client, HubError, PULSE, Progress, cache_error};

/// Bytes that are read, written and reported at a time.
const STEP: usize = 1 << 18;

impl Client<'_> {
    /// Makes sure that a file is in the snapshot of `commit`.
    pub(crate) fn fetch(
        &self,
        repository: &Repository,
        commit: &str,
        entry: &Entry,
        progress: &mut Progress<'_>,
    ) -> Result<(), HubError> {
        let blobs = repository.directory.join("blobs");
        fs::create_dir_all(&blobs).map_err(cache_error(&blobs))?;
        let blob = blobs.join(entry.checksum.as_str());
        let partial = blobs.join(format!("{}.incomplete", entry.checksum.as_str()));
        // A blob gets its name when its checksum has been compared.
        let is_complete = || fs::metadata(&blob).is_ok_and(|metadata| metadata.len() == entry.size);
        if is_complete() && progress(&entry.name, entry.size, entry.size).is_break() {
            return Err(HubError::Cancelled { file: entry.name.clone() });
        }
        while !is_complete() {
            let mut file = OpenOptions::new();
            let file = file.create(true).read(true).append(true).open(&partial).map_err(cache_error(&partial))?;
            match file.try_lock() {
                // Where there are no locks, two processes are on their own.
                Ok(()) | Err(TryLockError::Error(_)) => {}
                // Another process is fetching this very file: what it gets serves both.
                Err(TryLockError::WouldBlock) => {
                    if progress(&entry.name, 0, 0).is_break() {
                        return Err(HubError::Cancelled { file: entry.name.clone() });
                    }
                    thread::sleep(PULSE);
                    continue;
                }
            }
            // Another process may have finished and given the file its name between the two calls; if not, what is
            // open is what has the partial file's name.
            if is_complete() {
                let _ = fs::remove_file(&partial);
                break;
            }
            if !partial.exists() {
                continue;
            }
            self.complete(repository, commit, entry, &Partial { file: &file, path: &partial }, progress)?;
            check(entry, &file, &partial)?;
            fs::rename(&partial, &blob).map_err(cache_error(&blob))?;
        }
        link(&blob, &repository.snapshot(commit).join(&entry.name), entry)
    }

    /// Fetches what is missing of a file, again and again if need be.
    fn complete(
        &self,
        repository: &Repository,
        commit: &str,
        entry: &Entry,
        partial: &Partial<'_>,
        progress: &mut Progress<'_>,
    ) -> Result<(), HubError> {
        let endpoint = self.hub.endpoint.trim_end_matches('/');
        let url = format!("{endpoint}/{}/resolve/{commit}/{}", repository.name, entry.name.replace(' ', "%20"));
        let mut attempt = 0;
        loop {
            let before = partial.len()?;
            let Err(trouble) = self.continue_once(&url, entry, partial, progress) else { return Ok(()) };
            // A connection that brings something each time may be cut as often as it likes, unless nothing is to be
            // tried again at all.
            if partial.len()? > before && self.hub.retries > 0 {
                attempt = 0;
            }
            self.wait_after(trouble, attempt, &entry.name, progress)?;
            attempt += 1;
        }
    }

    fn continue_once(
        &self,
        url: &str,
        entry: &Entry,
        partial: &Partial<'_>,
        progress: &mut Progress<'_>,
    ) -> Result<(), HubError> {
        let Partial { mut file, path } = *partial;
        let mut done = partial.len()?;
        if done > entry.size {
            file.set_len(0).map_err(cache_error(path))?;
            done = 0;
        }
        if done == entry.size {
            return Ok(());
        }
        let mut response = self.get(url, done)?;
        let continues = response.status().as_u16() == 206
            && response
                .headers()
                .get("content-range")
                .and_then(|range| range.to_str().ok())
                .is_some_and(|range| range.starts_with(&format!("bytes {done}-")));
        if done > 0 && !continues {
            // The server sends everything, or nothing that fits: begin again.
            file.set_len(0).map_err(cache_error(path))?;
            done = 0;
            if response.status().as_u16() != 200 {
                return Err(transfer(url, "the hub does not continue the file".to_owned()));
            }
        }
        // Never more than was announced: one byte too many shows, and no more is written.
        let mut body = response.body_mut().as_reader().take(entry.size - done + 1);
        let mut buffer = vec![0; STEP];
        loop {
            let count = body.read(&mut buffer).map_err(|error| transfer(url, error.to_string()))?;
            if count == 0 {
                break;
            }
            file.write_all(&buffer[..count]).map_err(cache_error(path))?;
            done += count as u64;
            if progress(&entry.name, done.min(entry.size), entry.size).is_break() {
                return Err(HubError::Cancelled { file: entry.name.clone() });
            }
        }
        match done.cmp(&entry.size) {
            std::cmp::Ordering::Equal => file.sync_all().map_err(cache_error(path)),
            std::cmp::Ordering::Less => Err(transfer(url, format!("cut off after {done} of {} bytes", entry.size))),
            std::cmp::Ordering::Greater => {
                file.set_len(0).map_err(cache_error(path))?;
                Err(transfer(url, format!("longer than the {} bytes it should have", entry.size)))
            }
        }
    }
}

/// A file on its way, locked by this process.
#[derive(Clone, Copy)]
struct Partial<'a> {
    file: &'a File,
    path: &'a Path,
}

impl Partial<'_> {
    fn len(&self) -> Result<u64, HubError> {
        self.file.metadata().map(|metadata| metadata.len()).map_err(cache_error(self.path))
    }
}

fn transfer(url: &str, problem: String) -> HubError {
    HubError::Transfer { url: url.to_owned(), problem }
}

/// Compares a file with its checksum; a wrong one is deleted.
fn check(entry: &Entry, file: &File, path: &Path) -> Result<(), HubError> {
    let found = match entry.checksum {
        Checksum::Sha256(_) => digest(Sha256::new(), file),
        Checksum::Git(_) => digest(Sha1::new().chain_update(format!("blob {}\0", entry.size)), file),
    };
    let found = found.map_err(cache_error(path))?;
    let expected = entry.checksum.as_str();
    if found == expected {
        return Ok(());
    }
    fs::remove_file(path).map_err(cache_error(path))?;
    Err(HubError::Checksum { file: entry.name.clone(), found, expected: expected.to_owned() })
}

fn digest<D: Digest>(mut digest: D, mut file: &File) -> io::Result<String> {
    // Through the handle that holds the lock: elsewhere a locked file cannot be read on every system.
    file.seek(SeekFrom::Start(0))?;
    let mut buffer = vec![0; STEP];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            count => digest.update(&buffer[..count]),
        }
    }
    Ok(digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Puts a blob into a snapshot, as Hugging Face's programs do: by a relative link where there are links.
fn link(blob: &Path, place: &Path, entry: &Entry) -> Result<(), HubError> {
    if fs::metadata(place).is_ok_and(|metadata| metadata.len() == entry.size) {
        return Ok(());
    }
    let create = || {
        if let Some(parent) = place.parent() {
            fs::create_dir_all(parent)?;
        }
        match fs::remove_file(place) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // From snapshots/COMMIT/DIRECTORIES… up to the repository's directory.
        let depth = Path::new(&entry.name).components().count() + 1;
        let up: PathBuf = std::iter::repeat_n("..", depth).collect();
        let target = up.join("blobs").join(blob.file_name().unwrap_or_default());
        #[cfg(unix)]
        return std::os::unix::fs::symlink(target, place);
        #[cfg(not(unix))]
        return fs::hard_link(blob, place).or_else(|_| fs::copy(blob, place).map(|_| drop(target)));
    };
    create().map_err(cache_error(place))
}
