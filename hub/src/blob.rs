//! One file: fetched, continued where it was cut off, checked, and linked into its snapshot.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use sha1::Sha1;
use sha2::{Digest, Sha256};

use crate::repository::{Checksum, Entry, Repository};
use crate::{Client, HubError, Progress, cache_error};

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
        // A blob gets its name when its checksum has been compared.
        let complete = fs::metadata(&blob).is_ok_and(|metadata| metadata.len() == entry.size);
        if !complete {
            let partial = blobs.join(format!("{}.incomplete", entry.checksum.as_str()));
            self.complete(repository, commit, entry, &partial, progress)?;
            check(entry, &partial)?;
            fs::rename(&partial, &blob).map_err(cache_error(&blob))?;
        } else if progress(&entry.name, entry.size, entry.size).is_break() {
            return Err(HubError::Cancelled { file: entry.name.clone() });
        }
        link(&blob, &repository.snapshot(commit).join(&entry.name), entry)
    }

    /// Fetches what is missing of a file, again and again if need be.
    fn complete(
        &self,
        repository: &Repository,
        commit: &str,
        entry: &Entry,
        partial: &Path,
        progress: &mut Progress<'_>,
    ) -> Result<(), HubError> {
        let endpoint = self.hub.endpoint.trim_end_matches('/');
        let url = format!("{endpoint}/{}/resolve/{commit}/{}", repository.name, entry.name.replace(' ', "%20"));
        let mut retries = self.hub.retries;
        loop {
            let error = match self.continue_once(&url, entry, partial, progress) {
                Ok(()) => return Ok(()),
                Err(error @ HubError::Transfer { .. }) => error,
                Err(error) => return Err(error),
            };
            if retries == 0 {
                return Err(error);
            }
            retries -= 1;
        }
    }

    fn continue_once(
        &self,
        url: &str,
        entry: &Entry,
        partial: &Path,
        progress: &mut Progress<'_>,
    ) -> Result<(), HubError> {
        let mut file = OpenOptions::new().create(true).append(true).open(partial).map_err(cache_error(partial))?;
        let mut done = file.metadata().map_err(cache_error(partial))?.len();
        if done > entry.size {
            file.set_len(0).map_err(cache_error(partial))?;
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
            file.set_len(0).map_err(cache_error(partial))?;
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
            file.write_all(&buffer[..count]).map_err(cache_error(partial))?;
            done += count as u64;
            if progress(&entry.name, done.min(entry.size), entry.size).is_break() {
                return Err(HubError::Cancelled { file: entry.name.clone() });
            }
        }
        match done.cmp(&entry.size) {
            std::cmp::Ordering::Equal => file.sync_all().map_err(cache_error(partial)),
            std::cmp::Ordering::Less => Err(transfer(url, format!("cut off after {done} of {} bytes", entry.size))),
            std::cmp::Ordering::Greater => {
                file.set_len(0).map_err(cache_error(partial))?;
                Err(transfer(url, format!("longer than the {} bytes it should have", entry.size)))
            }
        }
    }
}

fn transfer(url: &str, problem: String) -> HubError {
    HubError::Transfer { url: url.to_owned(), problem }
}

/// Compares a file with its checksum; a wrong one is deleted.
fn check(entry: &Entry, path: &Path) -> Result<(), HubError> {
    let found = match entry.checksum {
        Checksum::Sha256(_) => digest(Sha256::new(), path),
        Checksum::Git(_) => digest(Sha1::new().chain_update(format!("blob {}\0", entry.size)), path),
    };
    let found = found.map_err(cache_error(path))?;
    let expected = entry.checksum.as_str();
    if found == expected {
        return Ok(());
    }
    fs::remove_file(path).map_err(cache_error(path))?;
    Err(HubError::Checksum { file: entry.name.clone(), found, expected: expected.to_owned() })
}

fn digest<D: Digest>(mut digest: D, path: &Path) -> io::Result<String> {
    let (mut file, mut buffer) = (File::open(path)?, vec![0; STEP]);
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
