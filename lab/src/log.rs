//! The file of a sweep: rows that are only ever added, in CSV or JSON lines.
//!
//! Rows are added in one write each time, by one writer at a time. Whatever ends the writer, the file holds whole rows and
//! at most one that is not: a last line without an end. Readers leave it out, and the next writer cuts it off.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::Row;

/// The form of a file, which its name tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Csv,
    JsonLines,
}

/// Why a sweep's file cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The name does not tell the form.
    #[error("{0}: the name of a sweep's file ends in .csv or .jsonl")]
    Name(PathBuf),
    /// The system refuses.
    #[error("{path}: {error}")]
    System {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Another sweep is at it.
    #[error("{0}: another sweep is writing this file")]
    Busy(PathBuf),
    /// A whole line is no row.
    #[error("{path}, line {line}: no row of a sweep ({reason}); was the file written by another version?")]
    Line {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
}

/// An open file of rows.
pub struct Log {
    path: PathBuf,
    file: File,
    form: Form,
    empty: bool,
}

impl Log {
    /// Opens a file to add rows, creates it if there is none, and returns the rows that it has.
    ///
    /// # Errors
    /// If another process has it open, it is no sweep's file, or the system refuses.
    pub fn open(path: &Path) -> Result<(Self, Vec<Row>), LogError> {
        let form = Form::of(path)?;
        let system = |error| LogError::System { path: path.to_owned(), error };
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(path).map_err(system)?;
        file.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => LogError::Busy(path.to_owned()),
            TryLockError::Error(error) => system(error),
        })?;
        let mut text = String::new();
        file.seek(SeekFrom::Start(0)).and_then(|_| file.read_to_string(&mut text)).map_err(system)?;
        let whole = whole_lines(&text);
        let rows = form.rows(path, whole)?;
        file.set_len(whole.len() as u64).map_err(system)?;
        Ok((Self { path: path.to_owned(), file, form, empty: whole.is_empty() }, rows))
    }

    /// The rows of a file.
    ///
    /// # Errors
    /// If it is no sweep's file or the system refuses.
    pub fn read(path: &Path) -> Result<Vec<Row>, LogError> {
        let form = Form::of(path)?;
        let text = std::fs::read_to_string(path).map_err(|error| LogError::System { path: path.to_owned(), error })?;
        form.rows(path, whole_lines(&text))
    }

    /// Adds rows.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn add(&mut self, rows: &[Row]) -> Result<(), LogError> {
        let system = |error| LogError::System { path: self.path.clone(), error };
        let text = self.form.text(rows, self.empty).map_err(system)?;
        self.file.write_all(&text).and_then(|()| self.file.sync_data()).map_err(system)?;
        self.empty &= rows.is_empty();
        Ok(())
    }
}

/// All of `text` up to the end of its last whole line.
fn whole_lines(text: &str) -> &str {
    text.rfind('\n').map_or("", |end| &text[..=end])
}

impl Form {
    fn of(path: &Path) -> Result<Self, LogError> {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("csv") => Ok(Self::Csv),
            Some("jsonl") => Ok(Self::JsonLines),
            _ => Err(LogError::Name(path.to_owned())),
        }
    }

    /// The rows in whole lines.
    fn rows(self, path: &Path, text: &str) -> Result<Vec<Row>, LogError> {
        let wrong = |line, reason| LogError::Line { path: path.to_owned(), line, reason };
        match self {
            Self::Csv => {
                let rows = csv::Reader::from_reader(text.as_bytes()).into_deserialize();
                rows.enumerate().map(|(at, row)| row.map_err(|error| wrong(at + 2, error.to_string()))).collect()
            }
            Self::JsonLines => {
                let rows = text.lines().enumerate();
                rows.map(|(at, line)| serde_json::from_str(line).map_err(|error| wrong(at + 1, error.to_string())))
                    .collect()
            }
        }
    }

    /// Rows as whole lines, after the names of the columns if they are the `first`.
    fn text(self, rows: &[Row], first: bool) -> io::Result<Vec<u8>> {
        match self {
            Self::Csv => {
                let mut writer = csv::WriterBuilder::new().has_headers(first).from_writer(Vec::new());
                rows.iter().try_for_each(|row| writer.serialize(row)).map_err(io::Error::other)?;
                writer.into_inner().map_err(|error| io::Error::other(error.to_string()))
            }
            Self::JsonLines => {
                let mut text = Vec::new();
                for row in rows {
                    serde_json::to_writer(&mut text, row).map_err(io::Error::from)?;
                    text.push(b'\n');
                }
                Ok(text)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BenchError, Case, Shape, Weights};

    fn row(n: usize) -> Row {
        let schedule = "mad/clif128 layout=rows4x16 multiply=pairs unroll=1 ntile=1".parse().unwrap();
        let case = Case { shape: Shape { m: 4, k: 8 }, n, schedule, weights: Weights::Cold, zeros: 0 };
        Row::refused(&case, 1, "CPU", &BenchError::NoCpu)
    }

    #[test]
    fn rows_come_back_and_half_a_line_is_cut_off() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["rows.csv", "rows.jsonl"] {
            let path = directory.path().join(name);
            let (mut log, rows) = Log::open(&path).unwrap();
            assert!(rows.is_empty());
            log.add(&[row(1), row(2)]).unwrap();
            assert!(matches!(Log::open(&path), Err(LogError::Busy(_))));
            drop(log);
            let whole = std::fs::read_to_string(&path).unwrap();
            // What an interrupted write leaves: any part of a line.
            for cut in [1, 20, 60] {
                let half = format!("{whole}{}", &whole.lines().last().unwrap()[..cut]);
                std::fs::write(&path, half).unwrap();
                assert_eq!(Log::read(&path).unwrap(), [row(1), row(2)]);
            }
            let (mut log, rows) = Log::open(&path).unwrap();
            assert_eq!(rows, [row(1), row(2)]);
            log.add(&[row(3)]).unwrap();
            assert_eq!(Log::read(&path).unwrap(), [row(1), row(2), row(3)]);
        }
    }

    #[test]
    fn what_is_no_sweep_is_refused_by_line() {
        let directory = tempfile::tempdir().unwrap();
        for (name, text, line) in [("a.jsonl", "{}\n", 1), ("a.csv", "a,b\n1,2\n", 2)] {
            let path = directory.path().join(name);
            std::fs::write(&path, text).unwrap();
            let error = Log::open(&path).err().expect("no sweep");
            assert!(error.to_string().contains(&format!("line {line}: no row")), "{error}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text, "nothing was changed");
        }
        assert!(matches!(Log::read(Path::new("a.txt")), Err(LogError::Name(_))));
    }
}
