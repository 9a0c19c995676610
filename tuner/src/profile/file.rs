//! One profile as a file. Files are replaced whole, never changed, so a reader needs no lock and a killed writer leaves
//! no trace under the file's name.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;
use std::thread;
use std::time::Duration;

use serde::Deserialize;

use super::{FORMAT, MachineProfile, VERSION, Warning};

/// No profile is nearly as large; a file that is was not written by us.
pub(super) const MAX_BYTES: u64 = 4 << 20;

/// How often and how long a writer waits for another before it goes ahead without the lock.
const LOCK_TRIES: usize = 20;
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// No write takes nearly as long: a temporary file of this age belongs to nobody.
const LEFTOVER_AGE: Duration = Duration::from_secs(600);

/// Reads one profile; `None` if there is no such file.
pub(super) fn read(path: &Path) -> Result<Option<MachineProfile>, Warning> {
    let corrupt = |reason: String| Warning::Corrupt { path: path.to_owned(), reason };
    let mut text = String::new();
    match File::open(path).and_then(|file| file.take(MAX_BYTES + 1).read_to_string(&mut text)) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => return Err(corrupt("no text".to_owned())),
        Err(error) => return Err(Warning::Unreadable { path: path.to_owned(), reason: error.to_string() }),
    }
    if text.len() as u64 > MAX_BYTES {
        return Err(corrupt(format!("larger than {MAX_BYTES} bytes")));
    }
    // Looks at the version first: the fields of another version may differ.
    #[derive(Deserialize)]
    struct Header {
        format: String,
        version: u32,
    }
    let header: Header = serde_json::from_str(&text).map_err(|error| corrupt(error.to_string()))?;
    if header.format != FORMAT || header.version != VERSION {
        return Err(corrupt(format!("format `{}` version {}", header.format, header.version)));
    }
    serde_json::from_str(&text).map(Some).map_err(|error| corrupt(error.to_string()))
}

/// Keeps other writers out while it lives. Without the lock (a system without locks, a writer that hangs) a merge may
/// lose what another writes at the same moment, but never damages the file.
pub(super) fn lock(path: &Path) -> Option<File> {
    let file = File::create(path).ok()?;
    for attempt in 0..LOCK_TRIES {
        if attempt > 0 {
            thread::sleep(LOCK_PAUSE);
        }
        if file.try_lock().is_ok() {
            break;
        }
    }
    Some(file)
}

/// FNV-1a.
pub(super) fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

pub(super) fn digest(profile: &MachineProfile) -> u64 {
    let shapes =
        profile.shapes.iter().map(|entry| (entry.m, entry.k, entry.choice, entry.one_copy, &entry.alternatives));
    let choices = (shapes.collect::<Vec<_>>(), &profile.sparse);
    fnv(&serde_json::to_vec(&choices).unwrap_or_default())
}

/// Writes a profile beside `path` and moves it there.
pub(super) fn write(profile: &MachineProfile, directory: &Path, path: &Path) -> io::Result<()> {
    let mut file = tempfile::Builder::new().prefix(".ternion-").tempfile_in(directory)?;
    let profile = MachineProfile { digest: digest(profile), ..profile.clone() };
    let mut text = serde_json::to_vec_pretty(&profile)?;
    text.push(b'\n');
    file.write_all(&text)?;
    // Not forced to the disk: that can take longer than the whole race, and what a power cut loses is found anew.
    file.persist(path)?;
    Ok(())
}

/// Removes what killed writers left behind.
pub(super) fn remove_leftovers(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let old = || entry.metadata().ok()?.modified().ok()?.elapsed().ok();
        if entry.file_name().to_string_lossy().starts_with(".ternion-") && old().is_some_and(|age| age > LEFTOVER_AGE) {
            // Another process may have been faster.
            let _ = fs::remove_file(entry.path());
        }
    }
}
