//! What happened at the door, as JSON lines: who, what, how it ended. Never what was said.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

/// One request.
#[derive(Debug, Serialize)]
pub struct Entry<'a> {
    /// Seconds since 1970, UTC.
    pub time: f64,
    /// What happened: the error's code, or `ok`.
    pub event: &'a str,
    /// Number of the request.
    pub request: &'a str,
    /// Digest of the client's key or address, salted for this run of the server.
    pub client: &'a str,
    /// Method and path.
    pub method: &'a str,
    /// Path, without what may follow a question mark.
    pub path: &'a str,
    /// HTTP status.
    pub status: u16,
    /// Milliseconds until the answer began.
    pub ms: u64,
}

/// Where entries go.
#[derive(Debug, Default)]
pub struct SecurityLog {
    file: Option<Mutex<File>>,
}

impl SecurityLog {
    /// Adds to the file at `path`.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        Ok(Self { file: Some(Mutex::new(file)) })
    }

    /// Writes an entry, if there is a file. A disk that is full costs the entry and not the request.
    ///
    /// # Errors
    /// If the file does not take it.
    pub fn write(&self, entry: &Entry<'_>) -> io::Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        let mut line = serde_json::to_vec(entry)?;
        line.push(b'\n');
        file.lock().unwrap_or_else(PoisonError::into_inner).write_all(&line)
    }
}

/// Seconds since 1970, UTC.
#[must_use]
pub fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}
