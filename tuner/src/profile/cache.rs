//! The directory of profiles: which file belongs to which machine, and what is in it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use ternion_compiler::Cpu;

use super::file::{digest, fnv, lock, read, remove_leftovers, write};
use super::{MachineProfile, ProfileKey, Warning};

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

    pub(super) fn from_environment(variable: &dyn Fn(&str) -> Option<PathBuf>) -> Self {
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
                let untouched = profile.digest == digest(&profile);
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
