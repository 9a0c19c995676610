//! What has been measured on this machine, remembered: one small JSON file per machine key in the user's cache directory.
//!
//! A cache may be missing, stale, broken or read-only, and no command may fail for that: everything wrong with it is a
//! [`Warning`] for the caller to show.

mod cache;
mod file;
mod warning;

use std::path::Path;

use serde::{Deserialize, Serialize};
use ternion_compiler::{CompileError, Cpu, KernelSpec, Schedule};

use crate::request::ClassResult;
use crate::{Choice, CpuProfile, Workload};

pub use cache::CacheDir;
pub use warning::Warning;

/// The first fields of every profile.
const FORMAT: &str = "ternion machine profile";
const VERSION: u32 = 2;

/// What a choice depends on. A profile counts only if all of it is the same.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ProfileKey {
    /// [`CpuProfile::signature`].
    pub cpu: String,
    /// Features that kernels were compiled for.
    pub features: String,
    /// Fingerprint of the compiler.
    pub compiler: String,
    /// Threads that ran at once.
    pub threads: usize,
}

/// All that is known of one machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MachineProfile {
    format: String,
    version: u32,
    /// The machine, the compiler and the number of threads.
    pub key: ProfileKey,
    /// What was chosen, ordered by shape.
    pub shapes: Vec<ShapeEntry>,
    /// Schedules that the compiler refused, above all for a wrong result: they never race again.
    pub refused: Vec<Refusal>,
    /// Hash of the choices as they were written. Where it fits, they are legal still: the key holds CPU and compiler.
    #[serde(default)]
    digest: u64,
}

/// The choice for one shape.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShapeEntry {
    /// Rows.
    pub m: usize,
    /// Length of a row.
    pub k: usize,
    /// One schedule per class.
    pub choice: Choice,
    /// What was measured, by class.
    pub results: Vec<ClassResult>,
    /// Schedules that raced.
    pub raced: usize,
    /// The whole budget of the race, in milliseconds: a larger one replaces this entry.
    pub budget_ms: u64,
    /// What it was chosen for.
    pub workload: Workload,
}

/// A schedule that the compiler refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// The kernel, as text.
    pub spec: String,
    /// The schedule, as text.
    pub schedule: String,
    /// What was wrong with it.
    pub reason: String,
}

impl ProfileKey {
    /// The key of this machine with so many threads.
    #[must_use]
    pub fn new(profile: &CpuProfile, cpu: &Cpu, threads: usize) -> Self {
        Self {
            cpu: profile.signature(),
            features: cpu.to_string(),
            compiler: ternion_compiler::FINGERPRINT.to_owned(),
            threads,
        }
    }
}

impl MachineProfile {
    /// A profile of nothing.
    #[must_use]
    pub fn new(key: ProfileKey) -> Self {
        Self { format: FORMAT.to_owned(), version: VERSION, key, shapes: Vec::new(), refused: Vec::new(), digest: 0 }
    }

    /// The entry of an `[m, k]` matrix.
    #[must_use]
    pub fn shape(&self, m: usize, k: usize) -> Option<&ShapeEntry> {
        self.shapes.iter().find(|entry| (entry.m, entry.k) == (m, k))
    }

    /// Adds an entry; of two for the same shape the one that was looked for longer stays, or else the new one.
    pub fn insert(&mut self, entry: ShapeEntry) {
        match self.shapes.binary_search_by_key(&(entry.m, entry.k), |known| (known.m, known.k)) {
            Ok(at) if self.shapes[at].budget_ms > entry.budget_ms => {}
            Ok(at) => self.shapes[at] = entry,
            Err(at) => self.shapes.insert(at, entry),
        }
    }

    /// Whether the compiler has refused this schedule before.
    #[must_use]
    pub fn is_refused(&self, spec: &KernelSpec, schedule: &Schedule) -> bool {
        self.refused.iter().any(|refusal| refusal.schedule == schedule.to_string() && refusal.spec == spec.to_string())
    }

    fn merge(&mut self, other: &Self) {
        other.shapes.iter().for_each(|entry| self.insert(entry.clone()));
        for refusal in &other.refused {
            if !self.refused.contains(refusal) {
                self.refused.push(refusal.clone());
            }
        }
    }

    /// Removes what may not be used, however it came to be in the file.
    fn drop_illegal(&mut self, cpu: &Cpu, path: &Path) -> Vec<Warning> {
        let mut warnings = Vec::new();
        self.shapes.retain(|entry| {
            let result = entry.choice.check(entry.k, cpu);
            if let Err(reason) = &result {
                let (path, reason) = (path.to_owned(), reason.clone());
                warnings.push(Warning::Illegal { path, m: entry.m, k: entry.k, reason });
            }
            result.is_ok()
        });
        self.shapes.sort_by_key(|entry| (entry.m, entry.k));
        warnings
    }
}

impl Refusal {
    /// A schedule that computes something wrong will do so again; what the system refused may work another time and is
    /// not remembered.
    pub(crate) fn of(error: &CompileError) -> Option<Self> {
        match error {
            CompileError::Mismatch { spec, schedule, mismatch } => {
                Some(Self { spec: spec.to_string(), schedule: schedule.to_string(), reason: mismatch.to_string() })
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests;
