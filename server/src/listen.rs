//! Connections: accepted up to a limit, encrypted if asked for, given up when a client is too slow, and all of them
//! seen to their end when the server stops.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::http::{HeaderValue, header};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_io_timeout::TimeoutStream;
use tokio_rustls::TlsAcceptor;
use tower::ServiceExt;

use crate::metrics::Metrics;

/// The other end of a connection.
#[derive(Clone, Copy, Debug)]
pub struct Peer(pub SocketAddr);

/// Limits of a connection.
#[derive(Clone, Copy, Debug)]
pub struct ConnectionLimits {
    /// Connections at the same time; more wait to be accepted.
    pub connections: usize,
    /// Time for a request's head to arrive, for a handshake, and for a client to take what is sent.
    pub patience: Duration,
    /// Time that open requests have to end by themselves when the server stops; then they end with an error.
    pub drain: Duration,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        Self { connections: 512, patience: Duration::from_secs(20), drain: Duration::from_secs(30) }
    }
}

/// Reads a certificate chain and its key, both PEM.
///
/// # Errors
/// What is wrong with them.
pub fn tls(certificates: &Path, key: &Path) -> Result<TlsAcceptor, String> {
    let told = |path: &Path, error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let chain = CertificateDer::pem_file_iter(certificates).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let chain = chain.map_err(|error| told(certificates, &error))?;
    let private = PrivateKeyDer::from_pem_file(key).map_err(|error| told(key, &error))?;
    let config = ServerConfig::builder_with_provider(Arc::new(rustls_rustcrypto::provider()))
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, private))
        .map_err(|error| told(certificates, &error))?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Time for errors to reach their clients, after everything has been given up.
const LAST_WORDS: Duration = Duration::from_secs(3);

/// Serves until `stop` is ready, and then until all open requests are answered. When the time that is left to them is
/// over, `give_up` is to end what goes on. Returns whether all ended by themselves.
pub async fn serve(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    router: Router,
    limits: ConnectionLimits,
    metrics: Metrics,
    stop: impl Future<Output = ()>,
    give_up: impl FnOnce(),
) -> bool {
    let room = Arc::new(Semaphore::new(limits.connections));
    let graceful = GracefulShutdown::new();
    let mut stop = pin!(stop);
    loop {
        let accept = async {
            // The semaphore is never closed.
            let permit = Arc::clone(&room).acquire_owned().await.ok();
            (permit, listener.accept().await)
        };
        let (permit, accepted) = tokio::select! {
            accepted = accept => accepted,
            () = &mut stop => break,
        };
        let Ok((stream, peer)) = accepted else {
            // Out of file descriptors, most likely: others will close theirs.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        // Pieces of a stream are small and wanted at once. Where the option is refused they come a little later.
        let _ = stream.set_nodelay(true);
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(limits.patience));
        let connection =
            Connection { router: router.clone(), peer, patience: limits.patience, metrics: metrics.clone(), permit };
        let watcher = graceful.watcher();
        let tls = tls.clone();
        tokio::spawn(async move {
            let stream = Box::pin(stream);
            match tls {
                None => connection.serve(stream, watcher).await,
                Some(tls) => {
                    if let Ok(Ok(stream)) = tokio::time::timeout(connection.patience, tls.accept(stream)).await {
                        connection.serve(stream, watcher).await;
                    }
                }
            }
        });
    }
    drop(listener);
    let mut ended = pin!(graceful.shutdown());
    if tokio::time::timeout(limits.drain, &mut ended).await.is_ok() {
        return true;
    }
    give_up();
    // A client that does not take its error has had its chance.
    let _ = tokio::time::timeout(LAST_WORDS, ended).await;
    false
}

struct Connection {
    router: Router,
    peer: SocketAddr,
    patience: Duration,
    metrics: Metrics,
    permit: Option<OwnedSemaphorePermit>,
}

impl Connection {
    async fn serve<S>(self, stream: S, watcher: hyper_util::server::graceful::Watcher)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let Self { router, peer, patience, metrics, permit } = self;
        let service = service_fn(move |mut request: hyper::Request<hyper::body::Incoming>| {
            request.extensions_mut().insert(Peer(peer));
            let answer = router.clone().oneshot(request);
            async {
                let mut response = answer.await?;
                if let Some(date) = date(SystemTime::now()) {
                    response.headers_mut().insert(header::DATE, date);
                }
                Ok::<_, Infallible>(response)
            }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            // Hyper's own stays where it was when the clock is set back, until that has caught up.
            .auto_date_header(false)
            .header_read_timeout(patience)
            .serve_connection(TokioIo::new(stream), service);
        metrics.connections.inc();
        // However it ends, it is the client's affair.
        let _ = watcher.watch(connection).await;
        metrics.connections.dec();
        drop(permit);
    }
}

/// The value of a `Date` header, for times that it can tell: from 1970 to 9999.
fn date(time: SystemTime) -> Option<HeaderValue> {
    const END: Duration = Duration::from_secs(253_402_300_800);
    let since = time.duration_since(UNIX_EPOCH).ok().filter(|since| *since < END)?;
    HeaderValue::try_from(httpdate::fmt_http_date(UNIX_EPOCH + since)).ok()
}

/// Binds an address.
///
/// # Errors
/// As the system says.
pub async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(address).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_date_that_cannot_be_told_is_not_told() {
        let year = Duration::from_secs(31_557_600);
        assert_eq!(date(UNIX_EPOCH).unwrap(), "Thu, 01 Jan 1970 00:00:00 GMT");
        assert_eq!(date(UNIX_EPOCH + Duration::from_secs(253_402_300_799)).unwrap(), "Fri, 31 Dec 9999 23:59:59 GMT");
        assert!(date(UNIX_EPOCH - 12 * year).is_none() && date(UNIX_EPOCH + 8031 * year).is_none());
    }
}
