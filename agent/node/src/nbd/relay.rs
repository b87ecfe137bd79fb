//! Bytes between a client inside TLS and its export's Unix socket, both ways, on a thread of its own.
//!
//! ```text
//! TCP ──► coming ──TLS──► plain ──► export      while `plain` is not empty nothing more is read from the client
//! TCP ◄── records ◄─TLS── going ◄── export      while records wait nothing more is read from the export
//! ```
//! A thread that polls two sockets, not a task: it moves [`PIECE_BYTES`], which stay in the processor's cache, with one
//! read, records of full size and one vectored write, and is woken without passing through anybody else. Nothing here blocks
//! but the poll.
//!
//! Of the time of a long read, both processes together, a fifth is sealing; a sixth each are the copy out of the export's socket, which
//! is the first to touch what lies in the page cache, and the one into TCP; one more copy into the record is 4 %. Without the relay the
//! export's process would have the same two copies to make, so what is left to gain is its wake-ups and its `sendfile`.
//!
//! It ends when either side has closed. A client that owes, that is, takes nothing of what waits for it, is dropped after
//! [`STALL_MAX`]; one that says nothing and is owed nothing stays. After the export has closed, the client has
//! [`LINGER_MAX`] to take the rest. Dropping the future of [`relay`] shuts both sockets down, and the thread ends.

use std::{
    io::{self, BufRead, Read, Write},
    net::{Shutdown, TcpStream},
    os::unix::net::UnixStream,
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::{runtime::Handle, sync::oneshot};
use tokio_rustls::{rustls::ServerConnection, server::TlsStream};

use super::clients::Activity;

/// How long a client may take nothing of what it has asked for.
const STALL_MAX: Duration = Duration::from_secs(60);
/// How long it may take to close after its export has.
const LINGER_MAX: Duration = Duration::from_secs(5);
/// How often these are looked at.
const LOOK_EVERY: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };
/// What is read from either side at once: four records.
const PIECE_BYTES: usize = 64 * 1024;
/// Pieces that pass one after the other before the sockets are asked again.
const PIECES_MAX: usize = 8;
/// How often the processor is offered to others before answers are fetched. Measured beside one of each, over one connection: of 256 KiB reads
/// 1.0, 1.3, 1.4, 1.4 times as many with 0, 1, 3, 6; of 4 KiB reads 1.0, 1.1, 1.2, 1.2.
const YIELDS: u32 = 4;
/// An export's turn is shorter: somebody else has work.
const YIELDED_LONG: Duration = Duration::from_micros(500);
/// So long nothing is offered after that.
const REST: Duration = Duration::from_millis(10);
/// The thread keeps its buffers on the heap.
const STACK_BYTES: usize = 256 * 1024;

/// Copies until either side is done. `normal` has threads of the weight that the new one shall have, too.
pub(super) async fn relay(
    near: TlsStream<tokio::net::TcpStream>,
    far: tokio::net::UnixStream,
    active: Arc<Activity>,
    normal: &Handle,
) -> io::Result<()> {
    let (near, session) = near.into_inner();
    // They stay non-blocking.
    let ends = Arc::new(Ends { near: near.into_std()?, far: far.into_std()? });
    let _hang_up = HangUp(Arc::clone(&ends));
    let (tell, ended) = oneshot::channel();
    let work = move || {
        // Nobody listens when the future was dropped.
        let mut relay = Relay::new(&ends, session, &active);
        let ended = relay.run();
        // What the client has said whole, its goodbye perhaps, is passed on though its socket has failed.
        let _ = relay.pass();
        let _ = tell.send(ended);
    };
    let thread = std::thread::Builder::new().name("nbd-relay".to_owned()).stack_size(STACK_BYTES);
    // A thread begins with the weight of the one that makes it.
    normal.spawn(async move { thread.spawn(work).map(drop) }).await.map_err(io::Error::other)??;
    ended.await.unwrap_or_else(|_| Err(io::Error::other("the thread that relays it has failed")))
}

struct Ends {
    near: TcpStream,
    far: UnixStream,
}

/// Ends the thread when nobody waits for it any more.
struct HangUp(Arc<Ends>);

impl Drop for HangUp {
    fn drop(&mut self) {
        // It fails where the other end is gone already.
        let _ = self.0.near.shutdown(Shutdown::Both);
        let _ = self.0.far.shutdown(Shutdown::Both);
    }
}

/// How far one direction is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    /// More may come from here.
    Open,
    /// Nothing more comes; the other side has not been told.
    Done,
    /// It has.
    Told,
}

struct Relay<'a> {
    ends: &'a Ends,
    session: ServerConnection,
    active: &'a Activity,
    client: Side,
    export: Side,
    /// What is read into; empty while nothing passes.
    piece: Vec<u8>,
    /// Decrypted, for the export; `passed` bytes of it have gone.
    plain: Vec<u8>,
    passed: usize,
    /// Until then the processor is not offered to others.
    rests_until: Option<Instant>,
}

impl<'a> Relay<'a> {
    fn new(ends: &'a Ends, mut session: ServerConnection, active: &'a Activity) -> Self {
        // What is not sent is bounded by not reading more.
        session.set_buffer_limit(None);
        let (piece, plain) = (Vec::new(), Vec::new());
        Relay {
            ends,
            session,
            active,
            client: Side::Open,
            export: Side::Open,
            piece,
            plain,
            passed: 0,
            rests_until: None,
        }
    }

    fn run(&mut self) -> io::Result<()> {
        // What came together with the end of the handshake.
        self.take_plain()?;
        loop {
            self.pass()?;
            self.transmit()?;
            if self.client == Side::Told && self.export == Side::Told {
                return Ok(());
            }
            let (near, far) = self.wait()?;
            if near.is_empty() && far.is_empty() {
                if self.is_late()? {
                    return Ok(());
                }
                continue;
            }
            self.active.note();
            let over = PollFlags::HUP | PollFlags::ERR;
            if near.intersects(PollFlags::IN | over) && self.hears_client() {
                self.hear()?;
            }
            if far.intersects(PollFlags::IN | over) && self.hears_export() {
                self.gather();
                self.fetch()?;
            }
        }
    }

    fn hears_client(&self) -> bool {
        self.client == Side::Open && self.plain.is_empty()
    }

    fn hears_export(&self) -> bool {
        self.export == Side::Open && !self.session.wants_write()
    }

    /// What can be done on each side; nothing when neither has moved for a while. A side from which nothing is wanted is
    /// left out: that it has hung up would be said again and again.
    fn wait(&self) -> io::Result<(PollFlags, PollFlags)> {
        let mut wishes = [PollFlags::empty(); 2];
        wishes[0].set(PollFlags::IN, self.hears_client());
        wishes[0].set(PollFlags::OUT, self.session.wants_write());
        wishes[1].set(PollFlags::IN, self.hears_export());
        wishes[1].set(PollFlags::OUT, !self.plain.is_empty());
        let all = [PollFd::new(&self.ends.near, wishes[0]), PollFd::new(&self.ends.far, wishes[1])];
        let (mut both, mut one);
        let fds: &mut [PollFd<'_>] = match (wishes[0].is_empty(), wishes[1].is_empty()) {
            (false, false) => {
                both = all;
                &mut both
            }
            (near_is_out, _) => {
                let [near, far] = all;
                one = [if near_is_out { far } else { near }];
                &mut one
            }
        };
        match poll(fds, Some(&LOOK_EVERY)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let found = |i: usize| fds.get(i).map_or(PollFlags::empty(), PollFd::revents);
        Ok(match (wishes[0].is_empty(), wishes[1].is_empty()) {
            (false, false) => (found(0), found(1)),
            (true, _) => (PollFlags::empty(), found(0)),
            (false, true) => (found(0), PollFlags::empty()),
        })
    }

    /// Nothing has moved for a while: true when that is the end.
    fn is_late(&mut self) -> io::Result<bool> {
        let silent = self.active.silent();
        if self.export != Side::Open && silent > LINGER_MAX {
            return Ok(true);
        }
        if self.session.wants_write() && silent > STALL_MAX {
            let why = format!("it has taken nothing of what it asked for, for {} s", STALL_MAX.as_secs());
            return Err(io::Error::new(io::ErrorKind::TimedOut, why));
        }
        if self.plain.is_empty() {
            // An idle client holds no memory.
            (self.piece, self.plain) = (Vec::new(), Vec::new());
        }
        Ok(false)
    }

    /// Reads from the client.
    fn hear(&mut self) -> io::Result<()> {
        self.piece.resize(PIECE_BYTES, 0);
        let Some(got) = now((&self.ends.near).read(&mut self.piece))? else { return Ok(()) };
        if got == 0 {
            // Whether it has taken leave inside TLS is of no matter: NBD has a goodbye of its own.
            self.client = Side::Done;
            return Ok(());
        }
        if self.export != Side::Open {
            // Nobody is left to whom it could go.
            return Ok(());
        }
        let piece = std::mem::take(&mut self.piece);
        let taken = self.decrypt(piece.get(..got).unwrap_or_default());
        self.piece = piece;
        taken
    }

    fn decrypt(&mut self, mut coming: &[u8]) -> io::Result<()> {
        while !coming.is_empty() && self.client == Side::Open {
            self.session.read_tls(&mut coming)?;
            if let Err(error) = self.session.process_new_packets() {
                // The alert that says why; whether it gets through is of no matter.
                let _ = self.session.write_tls(&mut &self.ends.near);
                return Err(io::Error::new(io::ErrorKind::InvalidData, error));
            }
            self.take_plain()?;
        }
        Ok(())
    }

    /// Takes what is decrypted. It cannot be more than was read, and a record.
    fn take_plain(&mut self) -> io::Result<()> {
        let mut reader = self.session.reader();
        loop {
            let Some(got) = now(reader.fill_buf())? else { return Ok(()) };
            if got.is_empty() {
                self.client = Side::Done;
                return Ok(());
            }
            self.plain.extend_from_slice(got);
            let len = got.len();
            reader.consume(len);
        }
    }

    /// Gives the export what the client has sent.
    fn pass(&mut self) -> io::Result<()> {
        while self.export == Side::Open
            && let Some(rest) = self.plain.get(self.passed..).filter(|rest| !rest.is_empty())
        {
            match (&self.ends.far).write(rest) {
                // It has closed, and may have said why.
                Err(e) if e.kind() == io::ErrorKind::BrokenPipe => break,
                result => match now(result)? {
                    Some(sent) => self.passed += sent,
                    None => return Ok(()),
                },
            }
        }
        self.plain.clear();
        self.passed = 0;
        if self.client == Side::Done {
            self.client = Side::Told;
            // It fails where the export has closed.
            let _ = self.ends.far.shutdown(Shutdown::Write);
        }
        Ok(())
    }

    /// Lets the export go on for a moment before its answers are fetched: what comes together goes out in full records, and the
    /// client is woken once. A processor that nobody else wants comes back at once. One that is wanted for long is left to whoever
    /// wants it, but not again and again.
    fn gather(&mut self) {
        let mut last = Instant::now();
        if self.rests_until.is_some_and(|until| last < until) {
            return;
        }
        self.rests_until = None;
        for _ in 0..YIELDS {
            std::thread::yield_now();
            let now = Instant::now();
            if now.saturating_duration_since(last) > YIELDED_LONG {
                self.rests_until = Some(now + REST);
                return;
            }
            last = now;
        }
    }

    /// Reads from the export while it has whole pieces and the client takes them.
    fn fetch(&mut self) -> io::Result<()> {
        for _ in 0..PIECES_MAX {
            let more = self.fetch_piece()?;
            self.transmit()?;
            if !more || self.session.wants_write() {
                break;
            }
        }
        Ok(())
    }

    /// Reads from the export, and encrypts; true when more may be there.
    fn fetch_piece(&mut self) -> io::Result<bool> {
        self.piece.resize(PIECE_BYTES, 0);
        let got = match (&self.ends.far).read(&mut self.piece) {
            // It has closed while something lay unread in its socket.
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => 0,
            result => match now(result)? {
                Some(got) => got,
                None => return Ok(false),
            },
        };
        if got == 0 {
            self.export = Side::Done;
            self.session.send_close_notify();
            return Ok(false);
        }
        self.session.writer().write_all(self.piece.get(..got).unwrap_or_default())?;
        Ok(got == PIECE_BYTES)
    }

    /// Sends records while the client takes them.
    fn transmit(&mut self) -> io::Result<()> {
        while self.session.wants_write() {
            if now(self.session.write_tls(&mut &self.ends.near))?.is_none() {
                return Ok(());
            }
        }
        if self.export == Side::Done {
            self.export = Side::Told;
            // It fails where the client has closed.
            let _ = self.ends.near.shutdown(Shutdown::Write);
        }
        Ok(())
    }
}

/// `None`: not now.
fn now<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(None),
        Err(error) => Err(error),
    }
}
