//! What has been measured on this machine, remembered: one small JSON file per machine key in the user's cache directory.
//!
//! A cache may be missing, stale, broken or read-only, and no command may fail for that: everything wrong with it is a
//! [`Warning`] for the caller to show.

mod cache;
mod file;
mod warning;

use std::collections::BTreeSet;
use std::path::Path;

use serde::{Deserialize, Serialize};
use ternion_compiler::{CompileError, Cpu, KernelSpec, Schedule};

use crate::request::{Alternative, Budget, ClassResult, Problem, Request};
use crate::{Choice, CpuProfile, SparseChoice, SparseShape, Workload};

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
    /// How lists of records are read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sparse: Vec<SparseEntry>,
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
    /// Bytes that second copies of all shapes were allowed.
    #[serde(default, skip_serializing_if = "is_default")]
    pub second_copies: u64,
    /// If the choice takes a second copy, the one that does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub one_copy: Option<Choice>,
    /// The best of other layouts, the fastest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub alternatives: Vec<Alternative>,
    /// Whether energy was to be saved.
    #[serde(default, skip_serializing_if = "is_default")]
    pub energy: bool,
    /// Whether it was measured while other work disturbed: better than nothing, and replaced by what is not.
    #[serde(default, skip_serializing_if = "is_default")]
    pub provisional: bool,
}

/// The choice for the feed-forwards of one shape.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SparseEntry {
    /// The shape.
    pub shape: SparseShape,
    /// Kernels and break-evens.
    pub choice: SparseChoice,
    /// The whole budget of the search, in milliseconds.
    pub budget_ms: u64,
    /// Whether it was measured while other work disturbed.
    #[serde(default, skip_serializing_if = "is_default")]
    pub provisional: bool,
}

impl SparseEntry {
    fn rank(&self) -> (bool, u64) {
        (!self.provisional, self.budget_ms)
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
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
        Self {
            format: FORMAT.to_owned(),
            version: VERSION,
            key,
            shapes: Vec::new(),
            sparse: Vec::new(),
            refused: Vec::new(),
            digest: 0,
        }
    }

    /// The entry of an `[m, k]` matrix.
    #[must_use]
    pub fn shape(&self, m: usize, k: usize) -> Option<&ShapeEntry> {
        self.shapes.iter().find(|entry| (entry.m, entry.k) == (m, k))
    }

    /// Adds an entry. Of two for the same shape and purpose the one stays that was measured undisturbed, or else the one
    /// that was looked for longer, or else the new one. A search for another purpose replaces what is there, and a short
    /// race nothing that was searched for.
    pub fn insert(&mut self, entry: ShapeEntry) {
        match self.shapes.binary_search_by_key(&(entry.m, entry.k), |known| (known.m, known.k)) {
            Ok(at) if self.shapes[at].outranks(&entry) => {}
            Ok(at) => self.shapes[at] = entry,
            Err(at) => self.shapes.insert(at, entry),
        }
    }

    /// How the feed-forwards of a shape read lists of records.
    #[must_use]
    pub fn sparse(&self, shape: &SparseShape) -> Option<&SparseEntry> {
        self.sparse.iter().find(|entry| entry.shape == *shape)
    }

    /// Adds an entry, unless a better one is known.
    pub fn insert_sparse(&mut self, entry: SparseEntry) {
        match self.sparse.iter_mut().find(|known| known.shape == entry.shape) {
            Some(known) if known.rank() > entry.rank() => {}
            Some(known) => *known = entry,
            None => self.sparse.push(entry),
        }
    }

    /// Whether nothing has to be measured for `request`.
    pub(crate) fn suffices(&self, request: &Request) -> bool {
        let shape = |problem: &Problem| self.shape(problem.m, problem.k).is_some_and(|entry| entry.suffices(request));
        request.problems.iter().all(shape) && !self.wants_sparse(request)
    }

    /// Whether a search still has to measure lists of records. A start does not.
    pub(crate) fn wants_sparse(&self, request: &Request) -> bool {
        let Some(shape) = request.sparse.filter(|_| request.budget.explores()) else { return false };
        let enough =
            |entry: &SparseEntry| !entry.provisional && entry.budget_ms >= request.budget.milliseconds() / 10 * 9;
        request.again || !self.sparse(&shape).is_some_and(enough)
    }

    /// Whether the compiler has refused this schedule before.
    #[must_use]
    pub fn is_refused(&self, spec: &KernelSpec, schedule: &Schedule) -> bool {
        self.refused.iter().any(|refusal| refusal.schedule == schedule.to_string() && refusal.spec == spec.to_string())
    }

    /// The schedules, as text, that have been refused for a kernel.
    pub(crate) fn refused_for(&self, spec: &KernelSpec) -> BTreeSet<String> {
        let spec = spec.to_string();
        self.refused.iter().filter(|refusal| refusal.spec == spec).map(|refusal| refusal.schedule.clone()).collect()
    }

    fn merge(&mut self, other: &Self) {
        other.shapes.iter().for_each(|entry| self.insert(entry.clone()));
        other.sparse.iter().for_each(|entry| self.insert_sparse(entry.clone()));
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
            let mut choices = [entry.choice].into_iter().chain(entry.alternatives.iter().map(|other| other.choice));
            let result = choices.try_for_each(|choice| choice.check(entry.k, cpu));
            if let Err(reason) = &result {
                let (path, reason) = (path.to_owned(), reason.clone());
                warnings.push(Warning::Illegal { path, m: entry.m, k: entry.k, reason });
            }
            result.is_ok()
        });
        self.sparse.retain(|entry| {
            let result = entry.choice.check(&entry.shape, cpu);
            if let Err(reason) = &result {
                let (path, reason, SparseShape { ffn: m, hidden: k }) = (path.to_owned(), reason.clone(), entry.shape);
                warnings.push(Warning::Illegal { path, m, k, reason });
            }
            result.is_ok()
        });
        self.shapes.sort_by_key(|entry| (entry.m, entry.k));
        warnings
    }
}

impl ShapeEntry {
    /// Whether nothing has to be measured for `request`. A start takes what there is; a search wants as much time to have
    /// been spent on the same purpose, undisturbed.
    pub(crate) fn suffices(&self, request: &Request) -> bool {
        // What a budget leaves after the start of a child process is nearly all of it.
        let searched = self.budget_ms >= request.budget.milliseconds() / 10 * 9;
        let purpose = (self.workload.is_like(&request.workload), self.second_copies, self.energy)
            == (true, request.second_copies.unwrap_or(0), request.energy);
        searched && (!request.budget.explores() || purpose && !self.provisional)
    }

    fn outranks(&self, new: &Self) -> bool {
        let same_purpose = self.workload.is_like(&new.workload)
            && (self.second_copies, self.energy) == (new.second_copies, new.energy);
        let race = Budget::RACE.milliseconds();
        // A search beats a start's race even if it was disturbed.
        let rank = |entry: &Self| (entry.budget_ms > race, !entry.provisional, entry.budget_ms);
        if same_purpose { rank(self) > rank(new) } else { new.budget_ms <= race && self.budget_ms > race }
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
pub(crate) mod tests;
