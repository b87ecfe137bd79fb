//! Bytes between a client inside TLS and its export's Unix socket, both ways.
//!
//! It ends when either side has closed. A client that owes, that is, takes nothing of what waits for it, is dropped after
//! [`STALL_MAX`]; one that says nothing and is owed nothing stays. After the export has closed, the client has
//! [`LINGER_MAX`] to take the rest.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf, copy_bidirectional_with_sizes},
    time::sleep,
};

use super::clients::Activity;

/// How long a client may take nothing of what it has asked for.
const STALL_MAX: Duration = Duration::from_secs(60);
/// How long it may take to close after its export has.
const LINGER_MAX: Duration = Duration::from_secs(5);
/// How often these are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Towards the client. A read of 256 KiB passes in one piece.
const TO_CLIENT_BYTES: usize = 256 * 1024;
/// Towards the export.
const TO_EXPORT_BYTES: usize = 64 * 1024;

/// What has passed.
#[derive(Default)]
struct Meter {
    from_export: AtomicU64,
    to_client: AtomicU64,
    export_closed: AtomicBool,
}

/// Copies until either side is done.
pub(super) async fn relay<N, F>(near: N, far: F, active: Arc<Activity>) -> io::Result<()>
where
    N: AsyncRead + AsyncWrite + Unpin,
    F: AsyncRead + AsyncWrite + Unpin,
{
    let meter = Arc::new(Meter::default());
    let mut near =
        Metered { inner: near, meter: Arc::clone(&meter), active: Arc::clone(&active), far: false };
    let mut far = Metered { inner: far, meter: Arc::clone(&meter), active: Arc::clone(&active), far: true };
    let copied = copy_bidirectional_with_sizes(&mut near, &mut far, TO_EXPORT_BYTES, TO_CLIENT_BYTES);
    tokio::select! {
        biased;
        result = copied => result.map(drop),
        error = watch(&meter, &active) => error,
    }
}

async fn watch(meter: &Meter, active: &Activity) -> io::Result<()> {
    loop {
        sleep(LOOK_EVERY).await;
        let silent = active.silent();
        if meter.export_closed.load(Ordering::Relaxed) && silent > LINGER_MAX {
            return Ok(());
        }
        let owed = meter.from_export.load(Ordering::Relaxed) > meter.to_client.load(Ordering::Relaxed);
        if owed && silent > STALL_MAX {
            let why = format!("it has taken nothing of what it asked for, for {} s", STALL_MAX.as_secs());
            return Err(io::Error::new(io::ErrorKind::TimedOut, why));
        }
    }
}

/// A side whose bytes are counted.
struct Metered<S> {
    inner: S,
    meter: Arc<Meter>,
    active: Arc<Activity>,
    /// The export's side.
    far: bool,
}

impl<S: AsyncRead + Unpin> AsyncRead for Metered<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let result = ready!(Pin::new(&mut self.inner).poll_read(cx, buf));
        let got = (buf.filled().len() - before) as u64;
        self.active.note();
        if self.far {
            self.meter.from_export.fetch_add(got, Ordering::Relaxed);
            if got == 0 {
                self.meter.export_closed.store(true, Ordering::Relaxed);
            }
        }
        Poll::Ready(result)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Metered<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = ready!(Pin::new(&mut self.inner).poll_write(cx, buf));
        self.active.note();
        if let (false, Ok(n)) = (self.far, &result) {
            self.meter.to_client.fetch_add(*n as u64, Ordering::Relaxed);
        }
        Poll::Ready(result)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
