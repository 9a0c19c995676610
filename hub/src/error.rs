//! Everything that can go wrong while fetching a model. Each message is one line: what, where, and what to do.

use std::io;
use std::path::PathBuf;

/// Why a model could not be fetched. What was fetched so far stays in the cache and is continued next time.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// A name that no repository or revision can have.
    #[error("{0:?} is no model of a hub: give OWNER/NAME, for example microsoft/bitnet-b1.58-2B-4T")]
    Name(String),
    /// An address that nothing can be fetched from.
    #[error("{0:?} is no address of a hub: give one that begins with https:// or http://")]
    Endpoint(String),
    /// The hub wants a token, or another one.
    #[error(
        "{url}: the hub refuses access (status {status}): check its name, or accept its licence on its page and set HF_TOKEN"
    )]
    Access {
        /// What was asked for.
        url: String,
        /// 401 or 403.
        status: u16,
    },
    /// There is no such repository, revision or file.
    #[error("{url}: the hub has no such model, revision or file: check its name")]
    NotFound {
        /// What was asked for.
        url: String,
    },
    /// The hub answered with a status that asking again does not change.
    #[error("{url}: the hub refuses this with status {status}: check the name and --endpoint")]
    Refused {
        /// What was asked for.
        url: String,
        /// The status.
        status: u16,
    },
    /// The hub cannot be reached, or answered something else.
    #[error("{url}: {problem}: try again later")]
    Transfer {
        /// What was asked for.
        url: String,
        /// What happened.
        problem: String,
    },
    /// The hub's own description of a repository makes no sense.
    #[error("{url}: the hub's answer makes no sense ({problem})")]
    Answer {
        /// What was asked for.
        url: String,
        /// What is wrong with it.
        problem: String,
    },
    /// What arrived is not what the hub says the file is.
    #[error("{file}: its checksum is {found}, the hub says {expected}: it was damaged on the way, try again")]
    Checksum {
        /// The file.
        file: String,
        /// Of what arrived.
        found: String,
        /// What it should be.
        expected: String,
    },
    /// The repository has no files of a model.
    #[error("{repository} has no safetensors and {}", match files.len() {
        0 => "no GGUF file: ternion cannot run it".to_owned(),
        _ => format!("several GGUF files: name one of {}", files.join(", ")),
    })]
    NoModel {
        /// The repository.
        repository: String,
        /// GGUF files to choose from.
        files: Vec<String>,
    },
    /// Offline, and the model is not in the cache.
    #[error("{repository} at {revision} is not in the cache {}: fetch it without --offline and HF_HUB_OFFLINE", cache.display())]
    Offline {
        /// The repository.
        repository: String,
        /// The revision.
        revision: String,
        /// Where it was looked for.
        cache: PathBuf,
    },
    /// The operating system could not read or write the cache.
    #[error("cannot use the cache at {}: {source}; free some space or set HF_HUB_CACHE", path.display())]
    Cache {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Stopped by the progress callback.
    #[error("fetching {file} was cancelled; what has arrived is kept and continued next time")]
    Cancelled {
        /// The file.
        file: String,
    },
}
