//! What has been measured on this machine, remembered: one small JSON file per machine key in the user's cache directory.
//!
//! A cache may be missing, stale, broken or read-only, and no command may fail for that: everything wrong with it is a
//! [`Warning`] for the caller to show. Files are replaced whole, never changed, so a reader needs no lock and a killed
//! writer leaves no trace under the file's name.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use ternion_compiler::{CompileError, Cpu, KernelSpec, Schedule};

use crate::request::ClassResult;
use crate::{Choice, Class, CpuProfile, Workload};

/// The first fields of every profile.
const FORMAT: &str = "ternion machine profile";
const VERSION: u32 = 2;

/// No profile is nearly as large; a file that is was not written by us.
const MAX_BYTES: u64 = 4 << 20;

/// How often and how long a writer waits for another before it goes ahead without the lock.
const LOCK_TRIES: usize = 20;
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// No write takes nearly as long: a temporary file of this age belongs to nobody.
const LEFTOVER_AGE: Duration = Duration::from_secs(600);

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

/// Where profiles are kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheDir {
    path: Option<PathBuf>,
}

impl Default for CacheDir {
    /// `$TERNION_CACHE`, or else `ternion` in the system's place for caches: `$XDG_CACHE_HOME` or `~/.cache`,
    /// `~/Library/Caches` on macOS, `%LOCALAPPDATA%` on Windows.
    fn default() -> Self {
        Self::from_environment(&|name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from))
    }
}

impl CacheDir {
    /// A directory, which need not exist yet.
    #[must_use]
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: Some(path.into()) }
    }

    fn from_environment(variable: &dyn Fn(&str) -> Option<PathBuf>) -> Self {
        let caches = || {
            if cfg!(windows) {
                return variable("LOCALAPPDATA");
            }
            let home = || variable("HOME");
            if cfg!(target_os = "macos") {
                return home().map(|home| home.join("Library/Caches"));
            }
            // The XDG specification: a relative path is to be ignored.
            let xdg = variable("XDG_CACHE_HOME").filter(|path| path.is_absolute());
            xdg.or_else(|| home().map(|home| home.join(".cache")))
        };
        Self { path: variable("TERNION_CACHE").or_else(|| caches().map(|caches| caches.join("ternion"))) }
    }

    /// The directory; `None` if the environment names none.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// The file that belongs to a key.
    #[must_use]
    pub fn profile_path(&self, key: &ProfileKey) -> Option<PathBuf> {
        self.keyed_path(key, "profile", "json")
    }

    pub(crate) fn keyed_path(&self, key: &ProfileKey, stem: &str, extension: &str) -> Option<PathBuf> {
        let text = format!("{}\n{}\n{}\n{}", key.cpu, key.features, key.compiler, key.threads);
        // A collision is harmless: the file holds the whole key.
        let hash = fnv(text.as_bytes());
        Some(self.path.as_ref()?.join(format!("{stem}-{hash:016x}.{extension}")))
    }

    /// Every profile in the directory, for a list of what is known, and what is wrong with the files that are none.
    #[must_use]
    pub fn profiles(&self) -> (Vec<(PathBuf, MachineProfile)>, Vec<Warning>) {
        let (mut profiles, mut warnings) = (Vec::new(), Vec::new());
        let entries = self.path.as_ref().and_then(|path| fs::read_dir(path).ok()).into_iter().flatten().flatten();
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
        paths.retain(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with("profile-") && name.ends_with(".json")
        });
        paths.sort();
        for path in paths {
            match read(&path) {
                Ok(Some(profile)) => profiles.push((path, MachineProfile { digest: 0, ..profile })),
                Ok(None) => {}
                Err(warning) => warnings.push(warning),
            }
        }
        (profiles, warnings)
    }

    /// What is known for `key`, with every schedule checked for `cpu`; empty if nothing is.
    #[must_use]
    pub fn load(&self, key: &ProfileKey, cpu: &Cpu) -> (MachineProfile, Vec<Warning>) {
        let empty = MachineProfile::new(key.clone());
        let Some(path) = self.profile_path(key) else { return (empty, Vec::new()) };
        match read(&path) {
            Ok(Some(mut profile)) if profile.key == *key => {
                // Checking a schedule assigns its registers: too long for every start.
                let untouched = profile.digest == digest(&profile.shapes);
                let warnings = if untouched { Vec::new() } else { profile.drop_illegal(cpu, &path) };
                profile.digest = 0;
                (profile, warnings)
            }
            Ok(_) => (empty, Vec::new()),
            Err(warning) => (empty, vec![warning]),
        }
    }

    /// Writes what has been found, merged with what others have written meanwhile.
    ///
    /// # Errors
    /// Why it could not be written; nothing is lost but the next start's time.
    pub fn remember(&self, found: &MachineProfile) -> Result<(), Warning> {
        let path = self.profile_path(&found.key).ok_or(Warning::NoCacheDirectory)?;
        self.update(&path, found, &|known| {
            let mut profile = known.unwrap_or_else(|| MachineProfile::new(found.key.clone()));
            profile.merge(found);
            profile
        })
    }

    /// Replaces the file at `path` by what `change` makes of it, with other writers kept out.
    fn update(
        &self,
        path: &Path,
        found: &MachineProfile,
        change: &dyn Fn(Option<MachineProfile>) -> MachineProfile,
    ) -> Result<(), Warning> {
        let directory = self.path.as_ref().ok_or(Warning::NoCacheDirectory)?;
        let unwritable = |error: io::Error| Warning::Unwritable { path: path.to_owned(), reason: error.to_string() };
        fs::create_dir_all(directory).map_err(unwritable)?;
        let _lock = lock(&path.with_extension("lock"));
        remove_leftovers(directory);
        let known = read(path).ok().flatten().filter(|known| known.key == found.key);
        write(&change(known), directory, path).map_err(unwritable)
    }
}

/// Removes what killed writers left behind.
fn remove_leftovers(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let old = || entry.metadata().ok()?.modified().ok()?.elapsed().ok();
        if entry.file_name().to_string_lossy().starts_with(".ternion-") && old().is_some_and(|age| age > LEFTOVER_AGE) {
            // Another process may have been faster.
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Profiles as files that users hand on.
impl CacheDir {
    /// Reads an exported profile.
    ///
    /// # Errors
    /// If there is no such file, or it holds no profile of this version.
    pub fn read_exported(path: &Path) -> Result<MachineProfile, Warning> {
        let missing = || Warning::Unreadable { path: path.to_owned(), reason: "there is no such file".to_owned() };
        let profile = read(path)?.ok_or_else(missing)?;
        Ok(MachineProfile { digest: 0, ..profile })
    }

    /// Writes a profile to `path`, whole or not at all.
    ///
    /// # Errors
    /// Why it could not be written.
    pub fn export(profile: &MachineProfile, path: &Path) -> Result<(), Warning> {
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        write(profile, directory, path)
            .map_err(|error| Warning::Unwritable { path: path.to_owned(), reason: error.to_string() })
    }

    /// Replaces what is known under the profile's key.
    ///
    /// # Errors
    /// Why it could not be written.
    pub fn import(&self, profile: &MachineProfile) -> Result<PathBuf, Warning> {
        let path = self.profile_path(&profile.key).ok_or(Warning::NoCacheDirectory)?;
        self.update(&path, profile, &|_| profile.clone())?;
        Ok(path)
    }

    /// Forgets what is known for `key`; returns whether there was anything.
    ///
    /// # Errors
    /// Why the file could not be removed.
    pub fn forget(&self, key: &ProfileKey) -> Result<bool, Warning> {
        let path = self.profile_path(key).ok_or(Warning::NoCacheDirectory)?;
        match fs::remove_file(&path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(Warning::Unwritable { path, reason: error.to_string() }),
        }
    }
}

/// FNV-1a.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

fn digest(shapes: &[ShapeEntry]) -> u64 {
    let choices: Vec<_> = shapes.iter().map(|entry| (entry.m, entry.k, entry.choice)).collect();
    fnv(&serde_json::to_vec(&choices).unwrap_or_default())
}

/// Writes a profile beside `path` and moves it there.
fn write(profile: &MachineProfile, directory: &Path, path: &Path) -> io::Result<()> {
    let mut file = tempfile::Builder::new().prefix(".ternion-").tempfile_in(directory)?;
    let profile = MachineProfile { digest: digest(&profile.shapes), ..profile.clone() };
    let mut text = serde_json::to_vec_pretty(&profile)?;
    text.push(b'\n');
    file.write_all(&text)?;
    // Not forced to the disk: that can take longer than the whole race, and what a power cut loses is found anew.
    file.persist(path)?;
    Ok(())
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

impl Choice {
    /// Whether all schedules are legal for rows of `k` weights on `cpu` and read at most two layouts; if not, why.
    pub(crate) fn check(&self, k: usize, cpu: &Cpu) -> Result<(), String> {
        for class in Class::ALL {
            self.of(class).check(&class.spec(k), cpu).map_err(|error| error.to_string())?;
        }
        match self.layouts().len() {
            0..=2 => Ok(()),
            copies => Err(format!("its schedules read {copies} different layouts")),
        }
    }
}

/// Reads one profile; `None` if there is no such file.
fn read(path: &Path) -> Result<Option<MachineProfile>, Warning> {
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
fn lock(path: &Path) -> Option<File> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shortlist::Shortlist;

    fn cpu() -> Cpu {
        "x86-64 +ssse3".parse().unwrap()
    }

    fn key() -> ProfileKey {
        let (cpu, features) = ("x86_64 GenuineTest".into(), cpu().to_string());
        ProfileKey { cpu, features, compiler: "0.1.0-abc".into(), threads: 2 }
    }

    fn entry(m: usize, k: usize, budget_ms: u64) -> ShapeEntry {
        let choice = Shortlist::new(k, &cpu(), 8, &|_, _| false).guess().unwrap();
        ShapeEntry { m, k, choice, results: Vec::new(), raced: 8, budget_ms, workload: Workload::default() }
    }

    fn profile(entries: &[ShapeEntry]) -> MachineProfile {
        let mut profile = MachineProfile::new(key());
        entries.iter().for_each(|entry| profile.insert(entry.clone()));
        profile
    }

    fn in_directory() -> (tempfile::TempDir, CacheDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let cache = CacheDir::at(directory.path());
        let path = cache.profile_path(&key()).unwrap();
        (directory, cache, path)
    }

    #[test]
    fn what_is_remembered_is_loaded_again() {
        let (_keep, cache, path) = in_directory();
        let written = profile(&[entry(256, 256, 300), entry(64, 256, 300)]);
        cache.remember(&written).unwrap();
        assert_eq!(cache.load(&key(), &cpu()), (written.clone(), Vec::new()));
        assert_eq!(cache.profiles(), (vec![(path, written)], Vec::new()));
    }

    #[test]
    fn another_machine_compiler_or_team_knows_nothing() {
        let (_keep, cache, _) = in_directory();
        cache.remember(&profile(&[entry(256, 256, 300)])).unwrap();
        let others = [
            ProfileKey { cpu: "other".into(), ..key() },
            ProfileKey { features: "x86-64".into(), ..key() },
            ProfileKey { compiler: "0.1.0-abd".into(), ..key() },
            ProfileKey { threads: 3, ..key() },
        ];
        for other in others {
            assert_eq!(cache.load(&other, &cpu()), (MachineProfile::new(other.clone()), Vec::new()));
        }
    }

    #[test]
    fn a_file_that_holds_another_key_is_not_believed() {
        let (_keep, cache, path) = in_directory();
        let other = MachineProfile { key: ProfileKey { threads: 9, ..key() }, ..profile(&[entry(256, 256, 300)]) };
        fs::write(&path, serde_json::to_string(&other).unwrap()).unwrap();
        assert!(cache.load(&key(), &cpu()).0.shapes.is_empty());
    }

    #[test]
    fn two_writers_keep_each_others_shapes_and_the_longer_search_wins() {
        let (_keep, cache, _) = in_directory();
        cache.remember(&profile(&[entry(256, 256, 20_000), entry(64, 256, 300)])).unwrap();
        cache.remember(&profile(&[entry(256, 256, 300), entry(512, 256, 300)])).unwrap();
        let (merged, _) = cache.load(&key(), &cpu());
        let shapes: Vec<_> = merged.shapes.iter().map(|entry| (entry.m, entry.budget_ms)).collect();
        assert_eq!(shapes, [(64, 300), (256, 20_000), (512, 300)]);
    }

    #[test]
    fn writers_at_the_same_time_lose_nothing() {
        let (_keep, cache, _) = in_directory();
        std::thread::scope(|scope| {
            for m in 1..=4 {
                let cache = &cache;
                scope.spawn(move || cache.remember(&profile(&[entry(m, 256, 300)])).unwrap());
            }
        });
        assert_eq!(cache.load(&key(), &cpu()).0.shapes.len(), 4);
    }

    #[test]
    fn broken_foreign_and_newer_files_are_ignored_with_a_warning_and_replaced() {
        let good = serde_json::to_string(&profile(&[entry(256, 256, 300)])).unwrap();
        let broken = [
            String::new(),
            good[..good.len() / 2].to_owned(),
            "[]".to_owned(),
            "{}".to_owned(),
            good.replace("\"version\":2", "\"version\":3"),
            good.replace(FORMAT, "wisdom"),
            good.replace("layout=", "layout=x"),
            good.replace("\"choice\":", "\"chose\":"),
            "[".repeat(100_000),
            " ".repeat(MAX_BYTES as usize + 1),
        ];
        for text in broken {
            let (_keep, cache, path) = in_directory();
            fs::write(&path, &text).unwrap();
            let (loaded, warnings) = cache.load(&key(), &cpu());
            let start: String = text.chars().take(60).collect();
            assert!(loaded.shapes.is_empty(), "{start}");
            assert!(matches!(warnings[..], [Warning::Corrupt { .. }]), "{start}: {warnings:?}");
            assert!(!warnings[0].to_string().contains('\n'));
            cache.remember(&profile(&[entry(64, 256, 300)])).unwrap();
            assert_eq!(cache.load(&key(), &cpu()).0.shapes.len(), 1, "{start}");
        }
        let (_keep, cache, path) = in_directory();
        fs::write(&path, [0xff, 0xfe, 0x00]).unwrap();
        assert!(matches!(cache.load(&key(), &cpu()).1[..], [Warning::Corrupt { .. }]));
        assert_eq!(cache.profiles().1.len(), 1);
    }

    #[test]
    fn illegal_schedules_in_a_profile_are_dropped_with_a_warning() {
        let good = entry(256, 256, 300);
        let mut unlike = entry(64, 256, 300);
        let schedules = Schedule::candidates(&Class::Batch.spec(256), &cpu());
        let layouts = schedules.iter().fold(Vec::new(), |mut layouts: Vec<Schedule>, schedule| {
            if layouts.iter().all(|known| known.layout != schedule.layout) {
                layouts.push(*schedule);
            }
            layouts
        });
        unlike.choice.schedules[1..4].copy_from_slice(&layouts[..3]);
        let mut illegal = entry(64, 256, 300);
        illegal.choice.schedules[0].unroll = 3;
        for bad in [unlike, illegal] {
            let (_keep, cache, path) = in_directory();
            // As somebody's editor would leave it.
            fs::write(&path, serde_json::to_string(&profile(&[good.clone(), bad])).unwrap()).unwrap();
            let (loaded, warnings) = cache.load(&key(), &cpu());
            assert_eq!(loaded.shapes, std::slice::from_ref(&good));
            assert!(matches!(warnings[..], [Warning::Illegal { m: 64, k: 256, .. }]), "{warnings:?}");
        }
    }

    #[test]
    fn a_cache_that_cannot_be_written_is_a_warning() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        fs::write(&file, "").unwrap();
        let cache = CacheDir::at(file.join("below"));
        let warning = cache.remember(&profile(&[entry(64, 256, 300)])).unwrap_err();
        assert!(matches!(warning, Warning::Unwritable { .. }), "{warning}");
        assert!(cache.load(&key(), &cpu()).0.shapes.is_empty());

        let nowhere = CacheDir { path: None };
        assert_eq!(nowhere.remember(&profile(&[])), Err(Warning::NoCacheDirectory));
        assert_eq!(nowhere.load(&key(), &cpu()), (MachineProfile::new(key()), Vec::new()));
    }

    #[test]
    fn a_write_leaves_no_other_file_but_the_lock() {
        let (directory, cache, path) = in_directory();
        cache.remember(&profile(&[entry(64, 256, 300)])).unwrap();
        let mut names: Vec<PathBuf> =
            fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        names.sort();
        assert_eq!(names, [path.clone(), path.with_extension("lock")]);
    }

    const KILLED: &str = "TERNION_TEST_KILLED_WRITER";

    /// The writer of the test below: this test binary, told by the environment where to write until it is killed.
    #[test]
    fn writer() {
        let Some(directory) = std::env::var_os(KILLED) else { return };
        let cache = CacheDir::at(PathBuf::from(directory));
        for m in 1.. {
            cache.remember(&profile(&[entry(m % 50 + 1, 256, 300)])).unwrap();
        }
    }

    #[test]
    fn fifty_killed_writers_never_leave_a_corrupt_profile() {
        let (directory, cache, _) = in_directory();
        let mut noise = crate::stopwatch::scripted::Noise::new(3);
        let mut known = 0;
        for kill in 0..50 {
            let mut writer = std::process::Command::new(std::env::current_exe().unwrap())
                .args(["profile::tests::writer", "--exact"])
                .env(KILLED, directory.path())
                .stdout(std::process::Stdio::null())
                .spawn()
                .unwrap();
            thread::sleep(Duration::from_micros(20_000 + (noise.uniform() * 20_000.0) as u64));
            writer.kill().unwrap();
            writer.wait().unwrap();
            let (profile, warnings) = cache.load(&key(), &cpu());
            assert_eq!(warnings, [], "kill {kill}");
            assert!(profile.shapes.len() >= known, "kill {kill}: nothing that was known is lost");
            known = profile.shapes.len();
        }
        assert!(known > 0, "the writers have written");
        cache.remember(&profile(&[entry(99, 256, 300)])).unwrap();
    }

    #[test]
    fn profiles_are_exported_imported_and_forgotten() {
        let (directory, cache, path) = in_directory();
        let written = profile(&[entry(256, 256, 300)]);
        let file = directory.path().join("mine.json");
        CacheDir::export(&written, &file).unwrap();
        assert!(!path.exists());
        let read = CacheDir::read_exported(&file).unwrap();
        assert_eq!(read, written);
        assert_eq!(cache.import(&read), Ok(path.clone()));
        assert_eq!(cache.load(&key(), &cpu()).0, written);
        assert_eq!(cache.forget(&key()), Ok(true));
        assert_eq!(cache.forget(&key()), Ok(false));
        assert!(matches!(CacheDir::read_exported(&path), Err(Warning::Unreadable { .. })));
        fs::write(&file, "{}").unwrap();
        assert!(matches!(CacheDir::read_exported(&file), Err(Warning::Corrupt { .. })));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_environment_says_where_the_cache_is() {
        let at = |pairs: &[(&str, &str)]| {
            let variable = |name: &str| pairs.iter().find(|(key, _)| *key == name).map(|(_, path)| PathBuf::from(path));
            CacheDir::from_environment(&variable).path().map(Path::to_owned)
        };
        let home = ("HOME", "/home/a");
        assert_eq!(at(&[("TERNION_CACHE", "/c"), ("XDG_CACHE_HOME", "/x"), home]), Some("/c".into()));
        assert_eq!(at(&[("XDG_CACHE_HOME", "/x"), home]), Some("/x/ternion".into()));
        assert_eq!(at(&[("XDG_CACHE_HOME", "relative"), home]), Some("/home/a/.cache/ternion".into()));
        assert_eq!(at(&[]), None);
    }
}
