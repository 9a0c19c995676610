//! Data goes to standard output, all of it through here. A reader that went away ends the program quietly.

use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;
use tempfile::NamedTempFile;
use ternion_runtime::formats::tern;

/// Writes text as it is, at once.
pub(crate) fn print(text: &str) -> Result<()> {
    write(text.as_bytes())
}

/// Writes bytes as they are, at once.
pub(crate) fn write(bytes: &[u8]) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush()).context("standard output cannot be written")
}

/// Writes one JSON value on a line of its own.
pub(crate) fn json(value: &impl Serialize) -> Result<()> {
    let mut line = serde_json::to_string(value).context("a result that JSON cannot express")?;
    line.push('\n');
    print(&line)
}

/// Creates a file that appears under its name only when [`finish`] is called.
pub(crate) fn create(path: &Path) -> Result<NamedTempFile> {
    tern::temporary_beside(path).with_context(|| format!("{} cannot be written", path.display()))
}

/// Gives a created file its name.
pub(crate) fn finish(mut file: NamedTempFile, path: &Path) -> Result<()> {
    let written = file.flush().and_then(|()| file.persist(path).map(drop).map_err(|error| error.error));
    written.with_context(|| format!("{} cannot be written: nothing was left behind", path.display()))
}

/// Writes a file, whole or not at all.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = create(path)?;
    file.write_all(bytes).with_context(|| format!("{} cannot be written", path.display()))?;
    finish(file, path)
}

/// Whether an error is only that nobody reads standard output any more.
pub(crate) fn reader_went_away(error: &anyhow::Error) -> bool {
    let kinds = error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>()).map(io::Error::kind);
    kinds.into_iter().any(|kind| kind == io::ErrorKind::BrokenPipe)
}
