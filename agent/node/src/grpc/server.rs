//! The listeners: the Unix socket, and TCP with mutual TLS.

use std::{
    fs, io,
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::net::{TcpListener, UnixListener};
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tonic::{
    service::Routes,
    transport::{Certificate, Identity, Server, ServerTlsConfig},
};
use tower::layer::util::{Identity as NoLayer, Stack};

use super::{
    auth::{GateLayer, group_id},
    bounded::bounded,
};

/// Streams that one connection may have open.
const STREAMS_MAX: u32 = 128;
/// Bytes of a request's headers.
const HEADERS_BYTES_MAX: u32 = 16 << 10;
/// A silent peer is asked so often, and has so long to answer.
const KEEPALIVE: Duration = Duration::from_secs(30);
const KEEPALIVE_ANSWER: Duration = Duration::from_secs(20);
/// A TLS handshake takes at most so long.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// Why a listener cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A socket.
    #[error("cannot listen on {at}")]
    Listen {
        /// Path or address.
        at: String,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// A file with keys.
    #[error("cannot read {path}: `serio pki` makes it")]
    TlsFile {
        /// The file.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// What is in the files.
    #[error("the certificates in {dir} cannot be used")]
    Tls {
        /// The directory.
        dir: PathBuf,
        /// Why.
        #[source]
        source: tonic::transport::Error,
    },
    /// While serving.
    #[error("serving gRPC failed")]
    Serve(#[from] tonic::transport::Error),
}

fn builder() -> Server<Stack<GateLayer, NoLayer>> {
    Server::builder()
        .max_concurrent_streams(STREAMS_MAX)
        .http2_max_header_list_size(HEADERS_BYTES_MAX)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE_ANSWER))
        .layer(GateLayer)
}

/// The Unix socket, for root, seriod's user and the group `serio`.
///
/// # Errors
/// [`ServeError::Listen`].
pub fn bind_unix(path: &Path) -> Result<UnixListener, ServeError> {
    let at = |source| ServeError::Listen { at: path.display().to_string(), source };
    // What lies there is of an earlier seriod: the state's lock, which we hold, says that none other runs.
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(at(e)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(at)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o660)).map_err(at)?;
    if let Some(group) = group_id() {
        chown(path, None, Some(group)).map_err(at)?;
    }
    Ok(listener)
}

/// Serves the Unix socket until `shutdown` resolves.
///
/// # Errors
/// [`ServeError::Serve`].
pub async fn serve_unix(
    listener: UnixListener,
    routes: Routes,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let incoming = bounded(UnixListenerStream::new(listener), "the Unix socket");
    builder().add_routes(routes).serve_with_incoming_shutdown(incoming, shutdown).await?;
    Ok(())
}

/// Mutual TLS from `ca-cert.pem`, `server-cert.pem` and `server-key.pem` of a directory.
///
/// # Errors
/// [`ServeError::TlsFile`].
pub fn tls(dir: &Path) -> Result<ServerTlsConfig, ServeError> {
    let read = |name: &str| {
        let path = dir.join(name);
        fs::read(&path).map_err(|source| ServeError::TlsFile { path, source })
    };
    let identity = Identity::from_pem(read("server-cert.pem")?, read("server-key.pem")?);
    let authority = Certificate::from_pem(read("ca-cert.pem")?);
    Ok(ServerTlsConfig::new().identity(identity).client_ca_root(authority).timeout(HANDSHAKE))
}

/// Serves TCP with mutual TLS until `shutdown` resolves.
///
/// # Errors
/// [`ServeError::Tls`], [`ServeError::Serve`].
pub async fn serve_tcp(
    listener: TcpListener,
    tls: ServerTlsConfig,
    tls_dir: &Path,
    routes: Routes,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let in_dir = |source| ServeError::Tls { dir: tls_dir.to_owned(), source };
    let mut server = builder().tls_config(tls).map_err(in_dir)?;
    let incoming = bounded(TcpListenerStream::new(listener), "TCP");
    server.add_routes(routes).serve_with_incoming_shutdown(incoming, shutdown).await?;
    Ok(())
}
