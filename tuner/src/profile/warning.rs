//! What can be wrong without stopping anything.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Something that does not stop any work but that the user may want to know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Warning {
    /// Neither the environment nor the system says where caches go.
    #[error("no cache directory: set TERNION_CACHE to a directory, or schedules are chosen anew on every start")]
    NoCacheDirectory,
    /// A profile exists but cannot be read.
    #[error("{}: cannot be read ({reason}), so it is ignored: check its permissions or delete it", path.display())]
    Unreadable {
        /// The profile.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// A profile is not what this version writes.
    #[error("{}: not a usable machine profile ({reason}), so it is ignored and will be replaced", path.display())]
    Corrupt {
        /// The profile.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A profile cannot be written.
    #[error("{}: cannot be written ({reason}), so the next start tunes again: make it writable or set TERNION_CACHE",
        path.display())]
    Unwritable {
        /// The profile.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// A remembered schedule is not legal here.
    #[error("{}: the choice for {m}x{k} is not legal here ({reason}), so it is chosen anew", path.display())]
    Illegal {
        /// The profile.
        path: PathBuf,
        /// Rows.
        m: usize,
        /// Length of a row.
        k: usize,
        /// What is wrong.
        reason: String,
    },
    /// A schedule was refused by the compiler.
    #[error("dropped a schedule: {reason}")]
    Refused {
        /// The compiler's error, which names the schedule.
        reason: String,
    },
    /// Other work disturbed what was measured.
    #[error("measured on a busy machine ({reason}): what was found is provisional, tune again when it is quiet")]
    Busy {
        /// What disturbed it.
        reason: String,
    },
    /// Energy was to be saved and cannot be measured.
    #[error("no energy meter ({reason}): schedules are chosen by time")]
    NoEnergyMeter {
        /// Why not.
        reason: String,
    },
    /// There is no memory to measure on.
    #[error("no memory to measure schedules with ({bytes} bytes): the best guess is used")]
    NoMemory {
        /// What was asked for.
        bytes: usize,
    },
}
