//! `ternion pull`: a model from a hub into the cache that Hugging Face's own programs use.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use ternion_hub::Hub;

use crate::terminal::{Bar, note};
use crate::{interrupt, output};

/// What to fetch, and from where. Without options, the environment decides: HF_ENDPOINT, HF_HUB_CACHE or HF_HOME, HF_TOKEN
/// or the file that a login leaves, HF_HUB_OFFLINE.
#[derive(Debug, Args)]
pub(crate) struct Pull {
    /// The model's name on the hub, for example microsoft/bitnet-b1.58-2B-4T
    name: String,
    /// A branch, tag or commit
    #[arg(long, default_value = "main")]
    revision: String,
    /// The one file to fetch, where a model has several GGUF files
    #[arg(long, value_name = "FILE")]
    file: Option<String>,
    /// What opens models with restricted access [default: HF_TOKEN, or what a login left]
    #[arg(long)]
    token: Option<String>,
    /// The hub's address [default: HF_ENDPOINT, or Hugging Face's]
    #[arg(long, value_name = "URL")]
    endpoint: Option<String>,
    /// The cache's directory [default: HF_HUB_CACHE, or hub in HF_HOME]
    #[arg(long, value_name = "DIRECTORY")]
    cache: Option<PathBuf>,
    /// Use the cache alone, as with HF_HUB_OFFLINE=1
    #[arg(long)]
    offline: bool,
}

/// Prints the path of the model, for other commands to open.
pub(crate) fn pull(options: &Pull) -> Result<ExitCode> {
    let environment = Hub::from_env();
    let hub = Hub {
        endpoint: options.endpoint.clone().unwrap_or(environment.endpoint),
        cache: options.cache.clone().unwrap_or(environment.cache),
        token: options.token.clone().or(environment.token),
        offline: options.offline || environment.offline,
        ..environment
    };
    let mut bar: Option<(String, Bar)> = None;
    let path = hub.pull(&options.name, &options.revision, options.file.as_deref(), &mut |file, done, total| {
        // Nothing moves while the hub is waited for.
        if total > 0 && bar.as_ref().is_none_or(|(known, _)| known != file) {
            note(&format!("{file} ({})", crate::terminal::bytes(total)));
            bar = Some((file.to_owned(), Bar::bytes("fetching", total)));
        }
        if let Some((_, bar)) = bar.as_ref().filter(|_| total > 0) {
            bar.set(done);
        }
        if interrupt::requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    drop(bar);
    output::print(&format!("{}\n", path.display()))?;
    // Its name stands for the main revision in the usual cache.
    let name = if pulled(Path::new(&options.name)).is_some_and(|known| known == path) {
        options.name.clone()
    } else {
        path.display().to_string()
    };
    note(&format!("next: ternion setup {name}, or at once: ternion run {name} -p \"Once upon a time\""));
    Ok(ExitCode::SUCCESS)
}

/// The model that a name stands for where there is no such file: one that has been pulled.
pub(crate) fn pulled(name: &Path) -> Option<PathBuf> {
    let name = name.to_str()?;
    Hub { offline: true, ..Hub::from_env() }.pull(name, "main", None, &mut |_, _, _| ControlFlow::Continue(())).ok()
}

/// Whether a path that does not exist may be meant as a name on a hub.
pub(crate) fn may_be_a_name(path: &Path) -> bool {
    let parts: Vec<_> = path.components().collect();
    path.is_relative() && parts.len() == 2 && parts.iter().all(|part| matches!(part, std::path::Component::Normal(_)))
}
