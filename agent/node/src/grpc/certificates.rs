//! The certificates of the gRPC listener, read again when their files change: the next handshake uses the new ones. Bad new
//! files are reported, once, and the old ones serve on; half of a change (a new certificate, still with the old key) is such
//! a moment, and the other half ends it.
//!
//! Owns: what is served now. Never: connections that are there, which keep what they began with. Threads: any; a change is
//! read under a lock, by the one who finds it.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::mpsc,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, rustls::ServerConfig, server::TlsStream};
use tokio_stream::{Stream, StreamExt};

use crate::{
    error::chain,
    nbd::{self, Rationed, TlsError},
};

/// A handshake takes at most so long.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Connections that wait to be served.
const READY_MAX: usize = 16;
/// What is read.
const FILES: [&str; 3] = ["ca-cert.pem", "server-cert.pem", "server-key.pem"];

/// What tells a file from the one that was there before: device, inode, size, and when it changed, with its nanoseconds.
type Stamp = [Option<(u64, u64, u64, i64, i64)>; 3];

#[derive(Debug)]
struct Now {
    stamp: Stamp,
    config: Arc<ServerConfig>,
}

/// See the head of this file.
#[derive(Debug)]
pub struct Certificates {
    dir: PathBuf,
    now: Mutex<Now>,
}

fn stamp(dir: &Path) -> Stamp {
    FILES.map(|name| {
        let found = fs::metadata(dir.join(name)).ok()?;
        Some((found.dev(), found.ino(), found.len(), found.ctime(), found.ctime_nsec()))
    })
}

fn load(dir: &Path) -> Result<Arc<ServerConfig>, TlsError> {
    let mut config = ServerConfig::clone(&*nbd::tls_config(dir)?);
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

impl Certificates {
    /// Those of a directory: `ca-cert.pem`, `server-cert.pem`, `server-key.pem`.
    ///
    /// # Errors
    /// They are not there, or do not fit together.
    pub fn load(dir: &Path) -> Result<Self, TlsError> {
        // First the stamp: what changes meanwhile is read again.
        let stamp = stamp(dir);
        let now = Mutex::new(Now { stamp, config: load(dir)? });
        Ok(Self { dir: dir.to_owned(), now })
    }

    /// What the next handshake uses.
    #[must_use]
    pub fn current(&self) -> Arc<ServerConfig> {
        let mut now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        let found = stamp(&self.dir);
        if found != now.stamp {
            now.stamp = found;
            match load(&self.dir) {
                Ok(config) => {
                    now.config = config;
                    tracing::info!(dir = %self.dir.display(), "new certificates are in use");
                }
                Err(error) => tracing::error!(
                    dir = %self.dir.display(),
                    "the certificates were changed and cannot be used, so the old ones serve on: {}",
                    chain(&error)
                ),
            }
        }
        Arc::clone(&now.config)
    }
}

/// Connections after their handshake. They do it side by side, so that a slow one keeps nobody waiting; how many there are at
/// a time is bounded by who accepts them.
pub(super) fn secured<S>(
    incoming: impl Stream<Item = std::io::Result<S>> + Send + 'static,
    certificates: Arc<Certificates>,
) -> Secured<S>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (sender, receiver) = mpsc::channel(READY_MAX);
    tokio::spawn(async move {
        let log = Arc::new(Rationed::default());
        tokio::pin!(incoming);
        loop {
            let accepted = tokio::select! {
                accepted = incoming.next() => accepted,
                () = sender.closed() => return,
            };
            let stream = match accepted {
                Some(Ok(stream)) => stream,
                Some(Err(error)) => {
                    if sender.send(Err(error)).await.is_err() {
                        return;
                    }
                    continue;
                }
                None => return,
            };
            let acceptor = TlsAcceptor::from(certificates.current());
            let (sender, log) = (sender.clone(), Arc::clone(&log));
            tokio::spawn(async move {
                let why = match timeout(HANDSHAKE, acceptor.accept(stream)).await {
                    Ok(Ok(stream)) => return drop(sender.send(Ok(stream)).await),
                    Ok(Err(error)) => error.to_string(),
                    Err(_) => "it took too long".to_owned(),
                };
                if let Some(more) = log.may() {
                    tracing::info!(more, "a TLS handshake came to nothing: {why}");
                }
            });
        }
    });
    Secured(receiver)
}

/// Connections after their handshake.
pub(super) struct Secured<S>(mpsc::Receiver<std::io::Result<TlsStream<S>>>);

impl<S> Stream for Secured<S> {
    type Item = std::io::Result<TlsStream<S>>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(cx)
    }
}
