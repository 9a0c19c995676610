//! Fetches models from a Hugging Face hub, into the cache that Hugging Face's own programs use.
//!
//! [`Hub::pull`] asks for the list of a repository's files, fetches those that a model needs, continues what was cut
//! off, and believes a file only when its checksum is the one that the hub has. A token goes to the hub and never to
//! the host that a file is redirected to.
//!
//! ```text
//! CACHE/models--OWNER--NAME/refs/REVISION            the commit that a revision is
//! CACHE/models--OWNER--NAME/blobs/CHECKSUM           files' contents; CHECKSUM.incomplete while they arrive
//! CACHE/models--OWNER--NAME/snapshots/COMMIT/FILE    a link to its blob: this directory is the model
//! ```

#![forbid(unsafe_code)]

mod blob;
mod error;
mod repository;

pub use error::HubError;

use std::env;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use repository::{Repository, Revision};
use ureq::Agent;
use ureq::config::RedirectAuthHeaders;
use ureq::tls::{TlsConfig, TlsProvider};

/// Where to fetch from and to.
#[derive(Clone, Debug)]
pub struct Hub {
    /// The hub's address.
    pub endpoint: String,
    /// The cache's directory.
    pub cache: PathBuf,
    /// What opens models with restricted access.
    pub token: Option<String>,
    /// Whether to use the cache alone.
    pub offline: bool,
    /// How often in a row a request that brought nothing new is made again, if the trouble may pass: connections that are
    /// cut or refused, timeouts, and statuses 408, 429 and from 500 on.
    pub retries: usize,
    /// The time before the first of them; it doubles with each, up to [`LONGEST_WAIT`].
    pub wait: Duration,
}

/// The longest time between two requests.
pub const LONGEST_WAIT: Duration = Duration::from_secs(16);

/// How often waiting looks whether it is still wanted.
const PULSE: Duration = Duration::from_millis(100);

/// Told the file, its bytes that have arrived, and all of them (0 and 0 while nothing moves); cancels by returning [`ControlFlow::Break`].
pub type Progress<'a> = dyn FnMut(&str, u64, u64) -> ControlFlow<()> + 'a;

impl Hub {
    /// As the environment has it, in the variables that Hugging Face's own programs read: `HF_ENDPOINT`,
    /// `HF_HUB_CACHE` or `HF_HOME`, `HF_TOKEN` or the file that a login leaves, `HF_HUB_OFFLINE`.
    #[must_use]
    pub fn from_env() -> Self {
        let variable = |name: &str| env::var_os(name).filter(|value| !value.is_empty());
        let text = |name: &str| variable(name).and_then(|value| value.into_string().ok());
        let cache_home = variable("XDG_CACHE_HOME").map(PathBuf::from);
        let user_home = || env::home_dir().unwrap_or_default().join(".cache");
        let home = variable("HF_HOME").map(PathBuf::from);
        let home = home.unwrap_or_else(|| cache_home.unwrap_or_else(user_home).join("huggingface"));
        let login = || fs::read_to_string(home.join("token")).ok();
        Self {
            endpoint: text("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned()),
            token: text("HF_TOKEN").or_else(login).map(|token| token.trim().to_owned()).filter(|t| !t.is_empty()),
            offline: text("HF_HUB_OFFLINE").is_some_and(|value| is_true(&value)),
            cache: variable("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from),
            retries: 5,
            wait: Duration::from_millis(500),
        }
    }

    /// Fetches the model `repository`, `OWNER/NAME`, at `revision` (a branch, tag or commit): its safetensors
    /// directory, or the one GGUF file that it has or that `file` names. Returns the path to open.
    ///
    /// # Errors
    /// If the hub does not have it, does not give it away, cannot be reached, or gives something else than it says.
    pub fn pull(
        &self,
        repository: &str,
        revision: &str,
        file: Option<&str>,
        progress: &mut Progress<'_>,
    ) -> Result<PathBuf, HubError> {
        let repository = Repository::new(repository, revision, &self.cache)?;
        if self.offline {
            return repository.cached(file);
        }
        if !["https://", "http://"].iter().any(|scheme| self.endpoint.starts_with(scheme)) {
            return Err(HubError::Endpoint(self.endpoint.clone()));
        }
        let client = Client { agent: agent(), hub: self };
        let Revision { commit, files } = client.revision(&repository, progress)?;
        let wanted = repository.choose(&files, file)?;
        for entry in &wanted {
            client.fetch(&repository, &commit, entry, progress)?;
        }
        repository.remember(&commit)?;
        let snapshot = repository.snapshot(&commit);
        match &wanted[..] {
            [only] if only.name.ends_with(".gguf") => Ok(snapshot.join(&only.name)),
            _ => Ok(snapshot),
        }
    }
}

/// Whether a variable of the environment says yes, as Hugging Face's own programs read it.
fn is_true(value: &str) -> bool {
    ["1", "ON", "YES", "TRUE"].iter().any(|yes| value.trim().eq_ignore_ascii_case(yes))
}

/// Everything that talks to the hub.
struct Client<'a> {
    agent: Agent,
    hub: &'a Hub,
}

fn agent() -> Agent {
    let crypto = Arc::new(rustls_rustcrypto::provider());
    let tls = TlsConfig::builder().provider(TlsProvider::Rustls).unversioned_rustls_crypto_provider(crypto).build();
    let config = Agent::config_builder()
        .tls_config(tls)
        .http_status_as_error(false)
        .redirect_auth_headers(RedirectAuthHeaders::SameHost)
        .timeout_connect(Some(Duration::from_secs(30)))
        .timeout_recv_response(Some(Duration::from_secs(60)))
        .user_agent(concat!("ternion/", env!("CARGO_PKG_VERSION")))
        .build();
    config.into()
}

impl Client<'_> {
    /// Asks for `url`, from byte `from` on; 200 and 206 are answers, 416 is one if something was asked to be left out.
    fn get(&self, url: &str, from: u64) -> Result<ureq::http::Response<ureq::Body>, HubError> {
        let mut request = self.agent.get(url);
        if let Some(token) = &self.hub.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        if from > 0 {
            request = request.header("Range", format!("bytes={from}-"));
        }
        let transfer = |problem: String| HubError::Transfer { url: url.to_owned(), problem };
        let response = request.call().map_err(|error| transfer(error.to_string()))?;
        match response.status().as_u16() {
            200 | 206 => Ok(response),
            416 if from > 0 => Ok(response),
            status @ (401 | 403) => Err(HubError::Access { url: url.to_owned(), status }),
            404 => Err(HubError::NotFound { url: url.to_owned() }),
            status @ (408 | 429 | 500..) => Err(transfer(format!("the hub answers with status {status}"))),
            status => Err(HubError::Refused { url: url.to_owned(), status }),
        }
    }

    /// Tries again, after a while, what failed with trouble that may pass. `attempt` says how often in a row it did.
    ///
    /// # Errors
    /// The trouble, if it has been tried often enough or lasts; [`HubError::Cancelled`] if `progress` says so.
    fn wait_after(
        &self,
        trouble: HubError,
        attempt: usize,
        file: &str,
        progress: &mut Progress<'_>,
    ) -> Result<(), HubError> {
        if attempt >= self.hub.retries || !matches!(trouble, HubError::Transfer { .. }) {
            return Err(trouble);
        }
        let doubled = self.hub.wait.saturating_mul(1 << attempt.min(16));
        let until = Instant::now() + doubled.min(LONGEST_WAIT);
        while let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            thread::sleep(left.min(PULSE));
            if progress(file, 0, 0).is_break() {
                return Err(HubError::Cancelled { file: file.to_owned() });
            }
        }
        Ok(())
    }
}

fn cache_error(path: &Path) -> impl FnOnce(std::io::Error) -> HubError + '_ {
    move |source| HubError::Cache { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::is_true;

    #[test]
    fn the_environment_says_yes_in_four_ways() {
        for yes in ["1", "ON", "on", "YES", "Yes", "TRUE", "true", " true "] {
            assert!(is_true(yes), "{yes}");
        }
        for no in ["", "0", "off", "no", "false", "2", "offline"] {
            assert!(!is_true(no), "{no}");
        }
    }
}
