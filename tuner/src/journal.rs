//! What an exhaustive search has tried so far, one line of JSON per trial, so that an interruption costs nothing.
//!
//! Lines are only ever appended. A line that was cut short when its writer was killed is no trial, and neither is
//! whatever else cannot be read.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;

use crate::profile::{CacheDir, ProfileKey};
use crate::request::Trial;

/// More than the trials of any search take; a larger file is not ours.
const MAX_BYTES: u64 = 1 << 30;

/// The trials of one machine.
pub(crate) struct Journal(Option<PathBuf>);

impl Journal {
    pub(crate) fn of(cache: &CacheDir, key: &ProfileKey) -> Self {
        Self(cache.keyed_path(key, "trials", "jsonl"))
    }

    /// Adds trials. A journal that cannot be written saves nothing and stops nothing.
    pub(crate) fn note(&self, trials: &[Trial]) {
        let Some(path) = self.0.as_ref().filter(|_| !trials.is_empty()) else { return };
        // Begins with a new line, in case the last one was cut short.
        let mut text = String::from("\n");
        for line in trials.iter().filter_map(|trial| serde_json::to_string(trial).ok()) {
            text.push_str(&line);
            text.push('\n');
        }
        let _ = path.parent().map(fs::create_dir_all);
        let file = OpenOptions::new().create(true).append(true).open(path);
        let _ = file.and_then(|mut file| file.write_all(text.as_bytes()));
    }

    /// All that can be read.
    pub(crate) fn trials(&self) -> Vec<Trial> {
        let path = self.0.as_ref().filter(|path| fs::metadata(path).is_ok_and(|file| file.len() <= MAX_BYTES));
        let Some(file) = path.and_then(|path| File::open(path).ok()) else { return Vec::new() };
        // Whatever cannot be read is no line of JSON either.
        let lines = BufReader::new(file).split(b'\n').map_while(Result::ok);
        lines.filter_map(|line| serde_json::from_slice(&line).ok()).filter(|trial: &Trial| trial.us > 0.0).collect()
    }

    /// The search is over.
    pub(crate) fn finish(&self) {
        if let Some(path) = &self.0 {
            // If it stays, the next search begins at the end of this one.
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Class;

    #[test]
    fn a_journal_that_was_cut_short_keeps_every_whole_line() {
        let directory = tempfile::tempdir().unwrap();
        let cache = CacheDir::at(directory.path().join("new"));
        let key = ProfileKey { cpu: "a".into(), features: "b".into(), compiler: "c".into(), threads: 1 };
        let journal = Journal::of(&cache, &key);
        assert!(journal.trials().is_empty());
        let schedule = "mad/clif128 layout=rows4x16 multiply=pairs unroll=1 ntile=1".parse().unwrap();
        let trial = |us| Trial { m: 1, k: 2, class: Class::One, schedule, us };
        journal.note(&[trial(1.0), trial(2.0)]);
        let path = journal.0.as_ref().unwrap();
        let whole = fs::read(path).unwrap();
        for length in 0..whole.len() {
            fs::write(path, &whole[..length]).unwrap();
            journal.note(&[trial(3.0)]);
            let trials = journal.trials();
            assert_eq!(trials.last(), Some(&trial(3.0)), "{length}");
            assert!(trials.len() <= 3);
        }
        journal.finish();
        assert!(!path.exists());
    }
}
