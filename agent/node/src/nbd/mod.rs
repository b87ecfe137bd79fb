//! NBD for the network: a TCP port with forced TLS in front of the exports' Unix sockets.
//!
//! ```text
//!  nbdcopy nbds://HOST/TOKEN ──TCP, STARTTLS, mutual x509──▶ seriod ──RUN/exports/<id>.sock──▶ serio-volumed
//! ```
//!
//! Owns: the TLS session and the handshake until the client has named its export; then it copies bytes. What may be
//! said in the handshake is decided by [`serio_nbd::Front`]. Never: blocks, volumes, who made a token.
//!
//! Bounds: [`CLIENTS_MAX`] connections (more are closed at once), [`HANDSHAKE_MAX`] until a known export is named, two
//! buffers of [`BUFFER_BYTES`] a connection. A peer that is gone is noticed by TCP keep-alive.
//! Tasks: one a connection; they end with [`serve`].

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serio_nbd::{Front, FrontStep};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy_bidirectional_with_sizes},
    net::{TcpListener, TcpStream, UnixStream},
    sync::Semaphore,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        RootCertStore, ServerConfig,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
        server::WebPkiClientVerifier,
    },
};

#[cfg(test)]
mod nbd_test;

/// Connections at a time.
pub const CLIENTS_MAX: usize = 128;
/// For TLS and the handshake.
const HANDSHAKE_MAX: Duration = Duration::from_secs(15);
/// Each way. A read of 256 KiB passes in one piece.
const BUFFER_BYTES: usize = 256 * 1024;
/// What is read at once in the handshake.
const OPTION_BYTES: usize = 4096;
/// After a failed accept (out of descriptors, say) others get time to free some.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Finds an export's Unix socket by its token (the export name that the client asks for). `None` when there is no
/// such export, or it has expired: the client cannot tell which.
pub type Lookup = Arc<dyn Fn(&str) -> Option<PathBuf> + Send + Sync>;

/// Why the certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file.
    #[error("cannot use {path}: `serio pki` makes it")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// What is in them does not fit together.
    #[error("the certificates in {path} cannot be used together")]
    Content {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// `ca-cert.pem`, `server-cert.pem` and `server-key.pem` of a directory, demanding a client certificate of that CA.
///
/// # Errors
/// [`TlsError`].
pub fn tls_config(dir: &Path) -> Result<Arc<ServerConfig>, TlsError> {
    let content =
        |source: Box<dyn std::error::Error + Send + Sync>| TlsError::Content { path: dir.into(), source };
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&dir.join("ca-cert.pem"))? {
        roots.add(certificate).map_err(|e| content(e.into()))?;
    }
    let key_path = dir.join("server-key.pem");
    let key = fs::read(&key_path).map_err(|e| e.into()).and_then(|pem| {
        PrivateKeyDer::from_pem_slice(&pem).map_err(Box::<dyn std::error::Error + Send + Sync>::from)
    });
    let key = key.map_err(|source| TlsError::File { path: key_path, source })?;
    // Named, not the process's default: that depends on which crates are linked.
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .build()
        .map_err(|e| content(e.into()))?;
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| content(e.into()))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(certificates(&dir.join("server-cert.pem"))?, key)
        .map_err(|e| content(e.into()))?;
    Ok(Arc::new(config))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let file = |source| TlsError::File { path: path.to_owned(), source };
    let pem = fs::read(path).map_err(|e| file(e.into()))?;
    let parsed: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let certificates = parsed.map_err(|e| file(e.into()))?;
    if certificates.is_empty() { Err(file("there is no certificate in it".into())) } else { Ok(certificates) }
}

/// Serves until the future is dropped; the connections end with it.
pub async fn serve(listener: TcpListener, tls: Arc<ServerConfig>, lookup: Lookup) {
    let acceptor = TlsAcceptor::from(tls);
    let places = Arc::new(Semaphore::new(CLIENTS_MAX));
    let mut clients = JoinSet::new();
    loop {
        // Ended tasks are let go of as new ones come.
        while clients.try_join_next().is_some() {}
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "an NBD client could not be accepted");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            tracing::warn!(%peer, "an NBD client was turned away: {CLIENTS_MAX} are connected");
            continue;
        };
        let (acceptor, lookup) = (acceptor.clone(), Arc::clone(&lookup));
        clients.spawn(async move {
            let _place = place;
            if let Err(error) = client(stream, &acceptor, &lookup).await {
                tracing::info!(%peer, error = &error as &dyn std::error::Error, "an NBD client was disconnected");
            }
        });
    }
}

/// Why a client was disconnected.
#[derive(Debug, thiserror::Error)]
enum ClientError {
    #[error("it did not name an export within {} s", HANDSHAKE_MAX.as_secs())]
    Slow,
    #[error("it left, or did not speak TLS with a certificate of ours")]
    Talk(#[source] io::Error),
    #[error("it broke the protocol")]
    Protocol(#[from] serio_nbd::HandshakeError),
    #[error("the export {socket} cannot be reached")]
    Export { socket: PathBuf, source: io::Error },
    #[error("the connection broke")]
    Relay(#[source] io::Error),
}

async fn client(stream: TcpStream, acceptor: &TlsAcceptor, lookup: &Lookup) -> Result<(), ClientError> {
    // Replies are small and waited for; a host that is gone must not hold a place for ever.
    stream.set_nodelay(true).map_err(ClientError::Talk)?;
    rustix::net::sockopt::set_socket_keepalive(&stream, true).map_err(|e| ClientError::Talk(e.into()))?;
    let Some((mut near, mut far)) = timeout(HANDSHAKE_MAX, handshake(stream, acceptor, lookup))
        .await
        .map_err(|_| ClientError::Slow)??
    else {
        return Ok(());
    };
    let copied = copy_bidirectional_with_sizes(&mut near, &mut far, BUFFER_BYTES, BUFFER_BYTES).await;
    copied.map(drop).map_err(ClientError::Relay)
}

/// The client's side inside TLS, and the export's.
type Joined = (tokio_rustls::server::TlsStream<TcpStream>, UnixStream);

/// Up to the point where bytes are copied; `None` when the client has ended it properly before.
async fn handshake(
    mut clear: TcpStream,
    acceptor: &TlsAcceptor,
    lookup: &Lookup,
) -> Result<Option<Joined>, ClientError> {
    let mut front = Front::new();
    if !until_tls(&mut clear, &mut front).await? {
        return Ok(None);
    }
    let mut secure = acceptor.accept(clear).await.map_err(ClientError::Talk)?;
    front.tls_done();
    let mut step = front.feed(&[])?;
    loop {
        send(&mut secure, &mut front).await?;
        step = match step {
            FrontStep::Read => match read(&mut secure).await? {
                Some(bytes) => front.feed(&bytes)?,
                None => return Ok(None),
            },
            FrontStep::Relay { name, send, discard } => match lookup(&name) {
                Some(socket) => return Ok(Some((secure, join(&socket, &send, discard).await?))),
                None => match front.refuse() {
                    FrontStep::Read => {
                        // The refusal goes out before what follows it is looked at.
                        self::send(&mut secure, &mut front).await?;
                        front.feed(&[])?
                    }
                    other => other,
                },
            },
            FrontStep::Close | FrontStep::StartTls => {
                secure.shutdown().await.map_err(ClientError::Talk)?;
                return Ok(None);
            }
        };
    }
}

/// In the clear: true when TLS is to start.
async fn until_tls(stream: &mut TcpStream, front: &mut Front) -> Result<bool, ClientError> {
    loop {
        send(stream, front).await?;
        let Some(bytes) = read(stream).await? else { return Ok(false) };
        let step = front.feed(&bytes)?;
        send(stream, front).await?;
        match step {
            FrontStep::Read => {}
            FrontStep::StartTls => return Ok(true),
            FrontStep::Relay { .. } | FrontStep::Close => {
                stream.shutdown().await.map_err(ClientError::Talk)?;
                return Ok(false);
            }
        }
    }
}

async fn send(stream: &mut (impl AsyncWrite + Unpin), front: &mut Front) -> Result<(), ClientError> {
    let output = front.take_output();
    if output.is_empty() {
        return Ok(());
    }
    stream.write_all(&output).await.map_err(ClientError::Talk)?;
    // Out of the TLS session's buffer.
    stream.flush().await.map_err(ClientError::Talk)
}

async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Result<Option<Vec<u8>>, ClientError> {
    let mut bytes = vec![0; OPTION_BYTES];
    let got = stream.read(&mut bytes).await.map_err(ClientError::Talk)?;
    bytes.truncate(got);
    Ok((got > 0).then_some(bytes))
}

/// Connects to the export and brings it to where the client is.
async fn join(socket: &Path, send: &[u8], discard: usize) -> Result<UnixStream, ClientError> {
    let failed = |source| ClientError::Export { socket: socket.to_owned(), source };
    let mut export = UnixStream::connect(socket).await.map_err(failed)?;
    let mut known = vec![0; discard];
    let (mut reader, mut writer) = export.split();
    tokio::try_join!(writer.write_all(send), async { reader.read_exact(&mut known).await.map(drop) })
        .map_err(failed)?;
    Ok(export)
}
