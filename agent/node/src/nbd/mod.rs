//! NBD for the network: a TCP port with forced TLS in front of the exports' Unix sockets.
//!
//! ```text
//!  nbdcopy nbds://HOST/TOKEN ──TCP, STARTTLS, mutual x509──▶ seriod ──RUN/exports/<id>.sock──▶ serio-volumed
//! ```
//!
//! Owns: the TLS session and the handshake until the client has named its export; then it copies bytes. What may be
//! said in the handshake is decided by [`serio_nbd::Front`]. Never: blocks, volumes, who made a token.
//!
//! **Tokens.** The name of an export is random and works for one user: the first certificate that asks for it has it for
//! itself, with any number of connections, now and after a restart of seriod, until the export ends. Whoever else asks is
//! told what one is told who guesses: there is no such export.
//!
//! Bounds: see [`clients`] for their number; [`HANDSHAKE_MAX`] until a known export is named; `relay.rs` for buffers and
//! for clients that take nothing. A peer that is gone is noticed by TCP within about [`GONE_AFTER`].
//! Threads: all handshakes share one, with a runtime of its own and less weight than others, so that a swarm of clients takes
//! neither the API's threads nor a guest's processor; when many come it works in turns ([`crowd`]); each client that has
//! an export has one (`relay.rs`). All end with [`serve`].

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use rustix::{net::sockopt, process::setpriority_process};

use serio_nbd::{Front, FrontStep};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream, UnixStream},
    runtime::Handle,
    sync::oneshot,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, rustls::ServerConfig};

mod clients;
mod crowd;
mod relay;
mod tls;

use clients::{Activity, Clients, Seat};
pub use clients::{CLIENTS_MAX, HANDSHAKES_MAX};
use crowd::Crowd;
pub use tls::{TlsError, tls_config};

#[cfg(test)]
mod nbd_test;

/// For TLS and the handshake.
const HANDSHAKE_MAX: Duration = Duration::from_secs(15);
/// A peer that answers nothing, neither data nor probes, is gone.
const GONE_AFTER: Duration = Duration::from_secs(60);
/// What is read at once in the handshake.
const OPTION_BYTES: usize = 4096;
/// After a failed accept (out of descriptors, say) others get time to free some.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What a token is good for, to somebody.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Admission {
    /// The export's Unix socket.
    Export(PathBuf),
    /// There is no such export, or it has expired.
    Unknown,
    /// It is another's.
    Taken,
}

/// Finds an export by its token (the export name that the client asks for), for the holder of the certificate with this
/// SHA-256 fingerprint.
pub type Lookup = Arc<dyn Fn(&str, &str) -> Admission + Send + Sync>;

/// What a handshake's thread yields to others: they get about five times its time when both want it.
const NICE: i32 = 7;

/// Serves until the future is dropped; the connections end with it.
pub async fn serve(listener: TcpListener, tls: Arc<ServerConfig>, lookup: Lookup) {
    serve_crowd(listener, tls, lookup, Arc::default()).await;
}

async fn serve_crowd(listener: TcpListener, tls: Arc<ServerConfig>, lookup: Lookup, crowd: Arc<Crowd>) {
    let (over, ends) = oneshot::channel::<()>();
    let listener = listener.into_std();
    let (told, tells) = oneshot::channel();
    let runtime_of_all = Handle::current();
    let spawned = std::thread::Builder::new().name("nbd-front".to_owned()).spawn(move || {
        let served = (|| {
            // This thread's, not the process's. It costs time only where it is refused.
            let _ = setpriority_process(None, NICE);
            let gathers = Arc::clone(&crowd);
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .on_thread_park(move || gathers.gather())
                .build()?;
            runtime.block_on(async {
                let listener = TcpListener::from_std(listener?)?;
                tokio::select! {
                    () = accept(listener, tls, lookup, (runtime_of_all, &crowd)) => {}
                    // Sent never: it is dropped with the future.
                    _ = ends => {}
                }
                Ok::<_, io::Error>(())
            })
        })();
        // Nobody listens when the future was dropped.
        let _ = told.send(served);
    });
    let ended = match spawned {
        Ok(_) => tells.await.unwrap_or(Ok(())),
        Err(error) => Err(error),
    };
    drop(over);
    if let Err(error) = ended {
        tracing::error!(%error, "NBD is not served on the network: restart seriod");
    }
}

async fn accept(
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    lookup: Lookup,
    (normal, crowd): (Handle, &Crowd),
) {
    let acceptor = TlsAcceptor::from(tls);
    let clients = Clients::new();
    let log = Arc::new(Rationed::default());
    let mut tasks = JoinSet::new();
    loop {
        // Ended tasks are let go of as new ones come.
        while tasks.try_join_next().is_some() {}
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "an NBD client could not be accepted");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        crowd.came(Instant::now());
        let (seat, crowded) = clients.enter();
        if crowded && let Some(more) = log.may() {
            tracing::warn!(%peer, more, "{HANDSHAKES_MAX} NBD clients have not named an export: the oldest is dropped");
        }
        let id = seat.id();
        let (acceptor, lookup, log) = (acceptor.clone(), Arc::clone(&lookup), Arc::clone(&log));
        let normal = normal.clone();
        let task = tasks.spawn(async move {
            if let Err(error) = client(stream, &acceptor, &lookup, &seat, &normal).await
                && let Some(more) = log.may()
            {
                let error = &error as &dyn std::error::Error;
                tracing::info!(%peer, more, error, "an NBD client was disconnected");
            }
        });
        clients.task(id, task);
    }
}

/// Lets one line a second through: clients must not fill a log.
#[derive(Debug, Default)]
pub(crate) struct Rationed {
    state: Mutex<(Option<Instant>, u64)>,
}

impl Rationed {
    /// How many lines were left out since the last one, if this one may be written.
    pub(crate) fn may(&self) -> Option<u64> {
        // Two numbers, replaced together.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if state.0.is_some_and(|last| now.duration_since(last) < Duration::from_secs(1)) {
            state.1 += 1;
            return None;
        }
        let left_out = state.1;
        *state = (Some(now), 0);
        Some(left_out)
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

async fn client(
    stream: TcpStream,
    acceptor: &TlsAcceptor,
    lookup: &Lookup,
    seat: &Seat,
    normal: &Handle,
) -> Result<(), ClientError> {
    tune(&stream).map_err(ClientError::Talk)?;
    let Some((near, far, active)) = timeout(HANDSHAKE_MAX, handshake(stream, acceptor, lookup, seat))
        .await
        .map_err(|_| ClientError::Slow)??
    else {
        return Ok(());
    };
    relay::relay(near, far, active, normal).await.map_err(ClientError::Relay)
}

/// Replies are small and waited for; a host that is gone must not hold a place for ever.
fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, GONE_AFTER / 2)?;
    sockopt::set_tcp_keepintvl(stream, GONE_AFTER / 6)?;
    sockopt::set_tcp_keepcnt(stream, 3)?;
    sockopt::set_tcp_user_timeout(stream, u32::try_from(GONE_AFTER.as_millis()).unwrap_or(u32::MAX))?;
    Ok(())
}

/// The client's side inside TLS, and the export's.
type Joined = (tokio_rustls::server::TlsStream<TcpStream>, UnixStream, Arc<Activity>);

/// Up to the point where bytes are copied; `None` when the client has ended it properly before.
async fn handshake(
    mut clear: TcpStream,
    acceptor: &TlsAcceptor,
    lookup: &Lookup,
    seat: &Seat,
) -> Result<Option<Joined>, ClientError> {
    let mut front = Front::new();
    if !until_tls(&mut clear, &mut front).await? {
        return Ok(None);
    }
    let mut secure = acceptor.accept(clear).await.map_err(ClientError::Talk)?;
    let fingerprint = tls::fingerprint(secure.get_ref().1).unwrap_or_default();
    front.tls_done();
    let mut step = front.feed(&[])?;
    loop {
        send(&mut secure, &mut front).await?;
        step = match step {
            FrontStep::Read => match read(&mut secure).await? {
                Some(bytes) => front.feed(&bytes)?,
                None => return Ok(None),
            },
            FrontStep::Relay { name, send, discard } => {
                let refused = match lookup(&name, &fingerprint) {
                    Admission::Export(socket) => match seat.admit() {
                        Some(active) => {
                            return Ok(Some((secure, join(&socket, &send, discard).await?, active)));
                        }
                        None => front.refuse_full(),
                    },
                    Admission::Taken => {
                        tracing::warn!(
                            export = name,
                            fingerprint,
                            "a certificate was refused: the export is another's"
                        );
                        front.refuse()
                    }
                    Admission::Unknown => front.refuse(),
                };
                match refused {
                    FrontStep::Read => {
                        // The refusal goes out before what follows it is looked at.
                        self::send(&mut secure, &mut front).await?;
                        front.feed(&[])?
                    }
                    other => other,
                }
            }
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
