//! Requests that the server makes of others.

use std::sync::Arc;
use std::time::Duration;

use ureq::Agent;
use ureq::tls::{TlsConfig, TlsProvider};

/// A client that gives up after `patience`. Every status is an answer to it.
pub(crate) fn agent(patience: Duration) -> Agent {
    let crypto = Arc::new(rustls_rustcrypto::provider());
    let tls = TlsConfig::builder().provider(TlsProvider::Rustls).unversioned_rustls_crypto_provider(crypto).build();
    let config = Agent::config_builder().tls_config(tls).timeout_global(Some(patience)).http_status_as_error(false);
    config.build().into()
}
