//! The listeners: the Unix socket, and TCP with mutual TLS.

use std::{
    fs, io,
    os::unix::fs::{PermissionsExt, chown},
    path::Path,
    sync::Arc,
    time::Duration,
};

use tokio::net::{TcpListener, UnixListener};
use tokio_stream::{
    StreamExt,
    wrappers::{TcpListenerStream, UnixListenerStream},
};
use tonic::{service::Routes, transport::Server};
use tower::layer::util::{Identity as NoLayer, Stack};

use super::{
    auth::{AUDITORS, GROUP, GateLayer, group_id},
    bounded::{Held, bounded},
    certificates::{Certificates, secured},
};
use crate::{audit::Trail, nbd::TlsError};

/// Streams that one connection may have open.
const STREAMS_MAX: u32 = 128;
/// Bytes of a request's headers.
const HEADERS_BYTES_MAX: u32 = 16 << 10;
/// Bytes that a connection's client may send before somebody takes them.
const WINDOW_BYTES: u32 = 256 << 10;
/// A silent peer is asked so often, and has so long to answer.
const KEEPALIVE: Duration = Duration::from_secs(30);
const KEEPALIVE_ANSWER: Duration = Duration::from_secs(20);

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
    /// The certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// While serving.
    #[error("serving gRPC failed")]
    Serve(#[from] tonic::transport::Error),
}

fn builder(trail: &Trail) -> Server<Stack<GateLayer, NoLayer>> {
    Server::builder()
        .max_concurrent_streams(STREAMS_MAX)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .http2_max_header_list_size(HEADERS_BYTES_MAX)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE_ANSWER))
        .layer(GateLayer::new(trail.clone()))
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
    if let Some(group) = group_id(GROUP) {
        chown(path, None, Some(group)).map_err(at)?;
    }
    if let Some(group) = group_id(AUDITORS)
        && let Err(error) = admit_group(path, group)
    {
        tracing::warn!("members of the group {AUDITORS} cannot reach {}: {error}", path.display());
    }
    Ok(listener)
}

/// A second group that may connect: an access list, as `setfacl -m g:GROUP:rw` would make it.
fn admit_group(path: &Path, group: u32) -> io::Result<()> {
    const NO_ID: u32 = u32::MAX;
    // Version 2, then tag, permissions and id of each entry: owner, group, the named group, the mask, others.
    let mut list = 2_u32.to_le_bytes().to_vec();
    for (tag, may, id) in
        [(1_u16, 6_u16, NO_ID), (4, 6, NO_ID), (8, 6, group), (16, 6, NO_ID), (32, 0, NO_ID)]
    {
        list.extend_from_slice(&tag.to_le_bytes());
        list.extend_from_slice(&may.to_le_bytes());
        list.extend_from_slice(&id.to_le_bytes());
    }
    let flags = rustix::fs::XattrFlags::empty();
    Ok(rustix::fs::setxattr(path, "system.posix_acl_access", &list, flags)?)
}

/// Serves the Unix socket until `shutdown` resolves.
///
/// # Errors
/// [`ServeError::Serve`].
pub async fn serve_unix(
    listener: UnixListener,
    routes: Routes,
    trail: Trail,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let incoming = bounded(UnixListenerStream::new(listener), "the Unix socket");
    let all = Arc::default();
    let incoming = incoming.map(move |accepted| accepted.map(|stream| Held::greeted(stream, &all)));
    builder(&trail).add_routes(routes).serve_with_incoming_shutdown(incoming, shutdown).await?;
    Ok(())
}

/// Serves TCP with mutual TLS until `shutdown` resolves.
///
/// # Errors
/// [`ServeError::Serve`].
pub async fn serve_tcp(
    listener: TcpListener,
    certificates: Certificates,
    routes: Routes,
    trail: Trail,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let accepted = TcpListenerStream::new(listener).map(|accepted| {
        accepted.inspect(|stream| {
            // Only a little slower without it.
            let _ = stream.set_nodelay(true);
        })
    });
    let incoming = secured(bounded(accepted, "TCP"), Arc::new(certificates));
    let all = Arc::default();
    let incoming = incoming.map(move |accepted| accepted.map(|stream| Held::greeted(stream, &all)));
    builder(&trail).add_routes(routes).serve_with_incoming_shutdown(incoming, shutdown).await?;
    Ok(())
}
