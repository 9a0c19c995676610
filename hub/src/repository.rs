//! A repository: its place in the cache, its files as the hub lists them, and which of them make a model.

use std::collections::HashMap;
use std::fs;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use crate::{Client, HubError, Progress, cache_error};

/// Longest accepted answer about a repository.
const LONGEST_ANSWER: u64 = 32 << 20;

pub(crate) struct Repository {
    pub(crate) name: String,
    revision: String,
    /// Its directory in the cache.
    pub(crate) directory: PathBuf,
}

/// A file as the hub lists it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) size: u64,
    pub(crate) checksum: Checksum,
}

/// How the hub names a file's content; lower-case hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Checksum {
    /// SHA-256 of a large file.
    Sha256(String),
    /// SHA-1 of a small one, as git has it.
    Git(String),
}

impl Checksum {
    pub(crate) fn as_str(&self) -> &str {
        match self {
            Self::Sha256(hex) | Self::Git(hex) => hex,
        }
    }
}

pub(crate) struct Revision {
    pub(crate) commit: String,
    pub(crate) files: Vec<Entry>,
}

/// The hub's description of a revision.
#[derive(Deserialize)]
struct Answer {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: String,
    size: u64,
}

fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Whether a path of a repository stays within it.
fn stays_within(name: &str) -> bool {
    !name.is_empty()
        && !name.contains(['\\', '\0', '?', '#', '%'])
        && Path::new(name).components().all(|component| matches!(component, Component::Normal(_)))
}

impl Repository {
    pub(crate) fn new(name: &str, revision: &str, cache: &Path) -> Result<Self, HubError> {
        let plain = |text: &str| {
            let known = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
            !text.is_empty() && !text.starts_with('.') && text.bytes().all(known)
        };
        let parts: Vec<&str> = name.split('/').collect();
        if parts.len() != 2 || !parts.iter().all(|part| plain(part)) {
            return Err(HubError::Name(name.to_owned()));
        }
        if !stays_within(revision) {
            return Err(HubError::Name(format!("{name}@{revision}")));
        }
        let directory = cache.join(format!("models--{}--{}", parts[0], parts[1]));
        Ok(Self { name: name.to_owned(), revision: revision.to_owned(), directory })
    }

    pub(crate) fn snapshot(&self, commit: &str) -> PathBuf {
        self.directory.join("snapshots").join(commit)
    }

    fn reference(&self) -> PathBuf {
        self.directory.join("refs").join(&self.revision)
    }

    /// Writes down which commit the revision is.
    pub(crate) fn remember(&self, commit: &str) -> Result<(), HubError> {
        let path = self.reference();
        let parent = path.parent().unwrap_or(&self.directory);
        fs::create_dir_all(parent).and_then(|()| fs::write(&path, commit)).map_err(cache_error(&path))
    }

    /// The model as an earlier pull left it. A revision, a commit too, is written down when all of its files are there; other
    /// programs write it down earlier, so weights, configuration and tokenizer have to be there as well.
    pub(crate) fn cached(&self, file: Option<&str>) -> Result<PathBuf, HubError> {
        let offline = || HubError::Offline {
            repository: self.name.clone(),
            revision: self.revision.clone(),
            cache: self.directory.clone(),
        };
        let known = fs::read_to_string(self.reference()).ok().map(|commit| commit.trim().to_owned());
        // One file is whole if it is there: it gets its place when its checksum has been compared.
        let commit = known.or_else(|| file.map(|_| self.revision.clone())).filter(|commit| is_hex(commit, 40));
        let snapshot = self.snapshot(&commit.ok_or_else(offline)?);
        let path = match file {
            Some(file) if stays_within(file) => Some(snapshot.join(file)).filter(|path| path.is_file()),
            Some(_) => None,
            None => only_gguf(&snapshot).or_else(|| Some(snapshot).filter(|snapshot| has_a_model(snapshot))),
        };
        path.ok_or_else(offline)
    }

    /// The files that make a model, or the one that is named.
    pub(crate) fn choose<'a>(&self, files: &'a [Entry], file: Option<&str>) -> Result<Vec<&'a Entry>, HubError> {
        if let Some(file) = file {
            let entry = files.iter().find(|entry| entry.name == file);
            return entry
                .map(|entry| vec![entry])
                .ok_or_else(|| HubError::NotFound { url: format!("{}/{file}", self.name) });
        }
        // Files in directories are other versions: of other programs, or of training.
        let top = || files.iter().filter(|entry| !entry.name.contains('/'));
        let is = |entry: &Entry, ending: &str| entry.name.ends_with(ending);
        if top().any(|entry| is(entry, ".safetensors")) {
            let needed = |entry: &&Entry| {
                [".safetensors", ".json", ".jinja"].iter().any(|ending| is(entry, ending))
                    || entry.name == "tokenizer.model"
            };
            return Ok(top().filter(needed).collect());
        }
        let ggufs: Vec<&Entry> = files.iter().filter(|entry| is(entry, ".gguf")).collect();
        match ggufs[..] {
            [only] => Ok(vec![only]),
            _ => Err(HubError::NoModel {
                repository: self.name.clone(),
                files: ggufs.iter().map(|entry| entry.name.clone()).collect(),
            }),
        }
    }
}

/// Whether a snapshot has what every model directory has, with all shards of its weights.
fn has_a_model(snapshot: &Path) -> bool {
    let has = |name: &str| snapshot.join(name).is_file();
    let shards = || {
        let index = fs::read(snapshot.join("model.safetensors.index.json")).ok()?;
        let Index { weight_map } = serde_json::from_slice(&index).ok()?;
        Some(weight_map.values().all(|shard| stays_within(shard) && has(shard)))
    };
    has("config.json")
        && (has("tokenizer.json") || has("tokenizer.model"))
        && (has("model.safetensors") || shards().unwrap_or(false))
}

/// Which shard a tensor lies in.
#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

/// The GGUF file of a snapshot that has nothing else.
fn only_gguf(snapshot: &Path) -> Option<PathBuf> {
    let mut files = fs::read_dir(snapshot).ok()?.filter_map(|entry| entry.ok().map(|entry| entry.path()));
    let is_gguf = |path: &PathBuf| path.is_file() && path.extension().is_some_and(|extension| extension == "gguf");
    let only = files.next().filter(is_gguf)?;
    files.next().is_none().then_some(only)
}

impl Client<'_> {
    /// Asks what a revision consists of, again if need be.
    pub(crate) fn revision(&self, repository: &Repository, progress: &mut Progress<'_>) -> Result<Revision, HubError> {
        let mut attempt = 0;
        loop {
            match self.revision_once(repository) {
                Err(trouble) => self.wait_after(trouble, attempt, &repository.name, progress)?,
                revision => return revision,
            }
            attempt += 1;
        }
    }

    fn revision_once(&self, repository: &Repository) -> Result<Revision, HubError> {
        let (endpoint, name) = (self.hub.endpoint.trim_end_matches('/'), &repository.name);
        // A revision is one segment of the path, whatever it contains.
        let revision = repository.revision.replace('/', "%2F");
        let url = format!("{endpoint}/api/models/{name}/revision/{revision}?blobs=true");
        let answer = |problem: String| HubError::Answer { url: url.clone(), problem };
        let mut response = self.get(&url, 0)?;
        let text = response.body_mut().with_config().limit(LONGEST_ANSWER).read_to_vec();
        let text = text.map_err(|error| HubError::Transfer { url: url.clone(), problem: error.to_string() })?;
        let Answer { sha, siblings } = serde_json::from_slice(&text).map_err(|error| answer(error.to_string()))?;
        if !is_hex(&sha, 40) {
            return Err(answer(format!("{sha:?} is no commit")));
        }
        let entry = |sibling: Sibling| {
            let Sibling { rfilename: name, size, blob_id, lfs } = sibling;
            let (checksum, size) = match lfs {
                Some(lfs) if is_hex(&lfs.sha256, 64) => (Checksum::Sha256(lfs.sha256), Some(lfs.size)),
                Some(lfs) => return Err(answer(format!("{name} has the checksum {:?}", lfs.sha256))),
                None => (Checksum::Git(blob_id.filter(|id| is_hex(id, 40)).unwrap_or_default()), size),
            };
            match size {
                _ if !stays_within(&name) => Err(answer(format!("it has a file called {name:?}"))),
                Some(size) if !checksum.as_str().is_empty() => Ok(Entry { name, size, checksum }),
                _ => Err(answer(format!("{name} has no size or no checksum"))),
            }
        };
        Ok(Revision { commit: sha, files: siblings.into_iter().map(entry).collect::<Result<_, _>>()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        let new = |name: &str, revision: &str| Repository::new(name, revision, Path::new("cache"));
        assert_eq!(new("a/b-1.58", "main").unwrap().directory, Path::new("cache/models--a--b-1.58"));
        assert!(new("a/b", "refs/pr/1").is_ok());
        for name in ["", "a", "a/b/c", "../b", "a/..", "a/b?c", "a b/c", "a/"] {
            assert!(new(name, "main").is_err(), "{name}");
        }
        for revision in ["", "..", "../x", "/etc", "a?b", "a\\b"] {
            assert!(new("a/b", revision).is_err(), "{revision}");
        }
    }

    #[test]
    fn a_safetensors_directory_comes_before_gguf_files() {
        let repository = Repository::new("a/b", "main", Path::new("cache")).unwrap();
        let checksum = Checksum::Git(String::new());
        let files = |names: &[&str]| -> Vec<Entry> {
            names.iter().map(|name| Entry { name: (*name).to_owned(), size: 1, checksum: checksum.clone() }).collect()
        };
        let choose = |names: &[&str], file| -> Result<Vec<String>, HubError> {
            Ok(repository.choose(&files(names), file)?.iter().map(|entry| entry.name.clone()).collect())
        };
        let all = ["README.md", "config.json", "model.safetensors", "tokenizer.model", "m.gguf", "onnx/config.json"];
        assert_eq!(choose(&all, None).unwrap(), ["config.json", "model.safetensors", "tokenizer.model"]);
        assert_eq!(choose(&all, Some("m.gguf")).unwrap(), ["m.gguf"]);
        assert_eq!(choose(&["README.md", "m.gguf"], None).unwrap(), ["m.gguf"]);
        assert!(choose(&["a.gguf", "b.gguf"], None).unwrap_err().to_string().contains("name one of a.gguf, b.gguf"));
        assert!(choose(&["README.md"], None).unwrap_err().to_string().contains("cannot run it"));
        assert!(choose(&all, Some("n.gguf")).is_err());
    }
}
