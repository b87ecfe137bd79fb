//! The driver: carries primitives to the kernel and back, and owns their memory meanwhile.
//!
//! ```text
//! load(slot, Buffers) ─► issue(slot, token, io)* ─► poll → (slot, token, result)* ─► unload(slot) → Buffers
//! ```
//!
//! This folder is the only place of the crate with unsafe code. Its safe surface holds one invariant:
//! **memory that the kernel may touch lies inside the driver until the kernel is done with it.** `unload`
//! refuses a slot with primitives in flight, and dropping the driver waits for all of them (or leaks).
//!
//! Two engines: io_uring with one ring a queue, registered files and a registered eventfd; and inline system
//! calls where io_uring is forbidden, and on the simulated disk of the crash tests.
//! Neighbouring writes of one submission go to either in one piece: see `join.rs`.

mod crypt;
mod inline;
mod join;
mod memory;
mod pool;
mod ring;

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
};

use libc::iovec;
use nix::sys::eventfd::EventFd;

pub use memory::{Buffers, GuestRangeError};
pub(crate) use pool::PIECE_MAX;

use crate::{
    crypto::{SectorCipher, UNIT_BYTES},
    header::BLOCK_BYTES,
    media::Media,
};
use crypt::Crypt;
use join::{Joins, OF_A_RUN};
use ring::Ring;

const BLOCK: usize = BLOCK_BYTES as usize;
/// The kernel's limit of segments in one call; what exceeds it comes back as a short count.
const SEGMENTS_MAX: usize = 1024;
/// Source of written zeros, bytes.
const ZEROS_BYTES: usize = 64 << 10;

/// A data file as the driver needs it.
pub(crate) struct Backing {
    pub(crate) media: Media,
    /// Of an encrypted layer: what is read and written goes through it.
    pub(crate) cipher: Option<Arc<SectorCipher>>,
    /// Only whole units are read and written, from memory at multiples of them.
    pub(crate) direct: bool,
}

/// A part of one of a slot's two bounce blocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct BouncePart {
    /// 0 or 1.
    pub(crate) which: u8,
    pub(crate) start: u32,
    pub(crate) len: u32,
}

/// The middle of a span.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Body {
    /// Bytes of the slot's buffers.
    Buffers { start: u64, len: u64 },
    /// Zeros to be written.
    Zeros { len: u64 },
}

/// Memory of one primitive: bounce, then body, then bounce.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) head: BouncePart,
    pub(crate) body: Body,
    pub(crate) tail: BouncePart,
}

impl Span {
    pub(crate) fn buffers(start: u64, len: u64) -> Span {
        Span { head: BouncePart::default(), body: Body::Buffers { start, len }, tail: BouncePart::default() }
    }

    pub(crate) fn bounce(which: u8, start: u32, len: u32) -> Span {
        Span { head: BouncePart { which, start, len }, ..Span::buffers(0, 0) }
    }

    pub(crate) fn len(&self) -> u64 {
        let body = match self.body {
            Body::Buffers { len, .. } | Body::Zeros { len } => len,
        };
        u64::from(self.head.len) + body + u64::from(self.tail.len)
    }

    /// Keeps the first `n` bytes at most.
    pub(crate) fn truncate(&mut self, n: u64) {
        self.head.len = n.min(u64::from(self.head.len)) as u32;
        let n = n - u64::from(self.head.len);
        let (Body::Buffers { len, .. } | Body::Zeros { len }) = &mut self.body;
        *len = n.min(*len);
        self.tail.len = (n - *len).min(u64::from(self.tail.len)) as u32;
    }

    /// Forgets the first `n` bytes, which were transferred.
    pub(crate) fn advance(&mut self, n: u64) {
        let head = n.min(u64::from(self.head.len));
        self.head.start += head as u32;
        self.head.len -= head as u32;
        let n = n - head;
        let body = match &mut self.body {
            Body::Buffers { start, len } => {
                let body = n.min(*len);
                *start += body;
                *len -= body;
                body
            }
            Body::Zeros { len } => {
                let body = n.min(*len);
                *len -= body;
                body
            }
        };
        let tail = (n - body).min(u64::from(self.tail.len));
        self.tail.start += tail as u32;
        self.tail.len -= tail as u32;
    }
}

/// One thing that the kernel does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Io {
    Read { file: u32, offset: u64, span: Span },
    Write { file: u32, offset: u64, span: Span },
    SyncData { file: u32 },
    Allocate { file: u32, mode: i32, offset: u64, len: u64 },
}

/// An answer: result as the kernel gives it (a count, or a negative errno).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Answer {
    pub(crate) slot: u32,
    pub(crate) token: u32,
    pub(crate) result: i32,
}

/// Two blocks, made when a slot first needs them.
struct Bounce(Buffers);

/// What a slot holds while its primitives are under way.
struct Cargo {
    buffers: Buffers,
    bounce: Option<Bounce>,
    in_flight: u32,
    /// Its writes are not joined with others any more: one was, and did not get all.
    alone: bool,
}

enum Engine {
    Ring(Box<Ring>),
    Inline(Vec<Answer>),
}

/// See the head of this file.
pub(crate) struct Driver {
    engine: Engine,
    cargo: Vec<Cargo>,
    files: Vec<Media>,
    /// iovecs between two submissions; never grows, so the kernel's pointers into it hold.
    arena: Vec<iovec>,
    zeros: Buffers,
    joins: Joins,
    crypt: Crypt,
    /// Answers that were not looked at yet.
    answered: VecDeque<Answer>,
    event: Arc<EventFd>,
    in_flight: u32,
}

// SAFETY: the raw pointers (`arena`, and those inside `Buffers`) point to memory that the driver owns or keeps
// alive and that moves with it; the ring has no thread affinity with the flags that are used.
unsafe impl Send for Driver {}

impl Driver {
    /// A driver with `slots` slots. Falls back to inline calls when io_uring is not to be had or cannot be used.
    pub(crate) fn new(slots: u16, event: Arc<EventFd>, files: Vec<Backing>) -> Driver {
        // The kernel hands reads and writes of a tmpfs to threads of the ring, which costs more than the copy.
        let waits = !files.iter().all(|file| file.media.is_in_memory());
        let real = waits && files.iter().all(|file| matches!(file.media, Media::File(_)));
        let engine = match real.then(|| Ring::new(u32::from(slots), event.as_fd())) {
            Some(Ok(ring)) => Engine::Ring(Box::new(ring)),
            _ => Engine::Inline(Vec::with_capacity(usize::from(slots))),
        };
        let cargo =
            (0..slots).map(|_| Cargo { buffers: Buffers::empty(), bounce: None, in_flight: 0, alone: false });
        let mut driver = Driver {
            engine,
            cargo: cargo.collect(),
            files: Vec::new(),
            arena: Vec::with_capacity(4 * SEGMENTS_MAX),
            zeros: Buffers::owned(ZEROS_BYTES),
            joins: Joins::default(),
            crypt: Crypt::default(),
            answered: VecDeque::new(),
            event,
            in_flight: 0,
        };
        driver.set_files(files);
        driver
    }

    /// Whether io_uring carries this queue.
    pub(crate) fn is_ring(&self) -> bool {
        matches!(self.engine, Engine::Ring(_))
    }

    /// Replaces the files; nothing may be in flight.
    pub(crate) fn set_files(&mut self, files: Vec<Backing>) {
        assert_eq!(self.in_flight, 0, "files change only while nothing is under way");
        let (media, kinds) = files.into_iter().map(|file| (file.media, (file.cipher, file.direct))).unzip();
        self.files = media;
        self.crypt.set_files(kinds);
        if let Engine::Ring(ring) = &mut self.engine {
            ring.set_files(&self.files);
        }
    }

    /// Puts an operation's memory into its slot.
    pub(crate) fn load(&mut self, slot: u32, buffers: Buffers) {
        let cargo = &mut self.cargo[slot as usize];
        assert_eq!(cargo.in_flight, 0, "a slot is loaded while it is idle");
        cargo.buffers = buffers;
        cargo.alone = false;
    }

    /// Takes an operation's memory out of its slot.
    pub(crate) fn unload(&mut self, slot: u32) -> Buffers {
        let cargo = &mut self.cargo[slot as usize];
        assert_eq!(cargo.in_flight, 0, "memory leaves the driver only when the kernel is done with it");
        std::mem::take(&mut cargo.buffers)
    }

    /// Zeroes a part of the slot's buffers (a read of what no layer has).
    pub(crate) fn zero(&mut self, slot: u32, start: u64, len: u64) {
        self.cargo[slot as usize].buffers.zero(start, len);
    }

    /// Zeroes a part of a bounce block.
    pub(crate) fn zero_bounce(&mut self, slot: u32, part: BouncePart) {
        let at = usize::from(part.which) * BLOCK + part.start as usize;
        self.bounce(slot).0.zero(at as u64, u64::from(part.len));
    }

    fn bounce(&mut self, slot: u32) -> &mut Bounce {
        self.cargo[slot as usize].bounce.get_or_insert_with(|| Bounce(Buffers::owned(2 * BLOCK)))
    }

    /// Hands one primitive of a slot over. It starts at the next [`Driver::submit`] at the latest.
    pub(crate) fn issue(&mut self, slot: u32, token: u32, io: &Io) {
        self.in_flight += 1;
        self.cargo[slot as usize].in_flight += 1;
        let crooked = self.is_crooked(slot, io);
        if crooked || self.crypt.concerns(io) {
            return self.issue_by_piece((slot, token), io, crooked);
        }
        self.make_room();
        let (first, count) = match io {
            Io::Read { span, .. } | Io::Write { span, .. } => self.gather(slot, span),
            Io::SyncData { .. } | Io::Allocate { .. } => (0, 0),
        };
        self.push((slot, token), io, first, count);
    }

    /// Whether the primitive goes past the page cache, and its place or its memory is not made for that.
    fn is_crooked(&mut self, slot: u32, io: &Io) -> bool {
        let (Io::Read { file, offset, span } | Io::Write { file, offset, span }) = io else { return false };
        if !self.crypt.is_direct(*file) {
            return false;
        }
        if span.head.len + span.tail.len > 0 {
            self.bounce(slot);
        }
        let is_whole = |n: usize| n.is_multiple_of(UNIT_BYTES as usize);
        let mut parts = segments(&self.cargo[slot as usize], &self.zeros, span);
        !offset.is_multiple_of(UNIT_BYTES)
            || !parts.all(|part| is_whole(part.iov_base as usize) && is_whole(part.iov_len))
    }

    /// Gives a primitive to the engine.
    fn start(&mut self, (slot, token): (u32, u32), io: &Io, first: usize, count: usize) {
        let iovecs = &self.arena[first..first + count];
        match &mut self.engine {
            Engine::Ring(ring) => {
                if ring.is_full() {
                    ring.submit_all();
                }
                // SAFETY: the iovecs stay in the arena until they were submitted, and what they point to is kept alive by
                // the cargo of their slots, which does not leave while `in_flight` counts this primitive, or by their transits.
                unsafe { ring.push(slot, token, io, iovecs, &self.files) }
            }
            Engine::Inline(done) => {
                // SAFETY: the iovecs point into the cargo of their slots or their transits, not touched during the call.
                let result = unsafe { inline::run(io, iovecs, &self.files) };
                done.push(Answer { slot, token, result });
            }
        }
    }

    /// Room for the segments of one more primitive in the arena.
    fn make_room(&mut self) {
        if self.arena.capacity() - self.arena.len() < SEGMENTS_MAX {
            self.end_run();
            if let Engine::Ring(ring) = &mut self.engine {
                ring.submit_all();
            }
            self.arena.clear();
        }
    }

    /// Appends the iovecs of a span to the arena; at most [`SEGMENTS_MAX`], the rest comes back as a short count.
    fn gather(&mut self, slot: u32, span: &Span) -> (usize, usize) {
        let first = self.arena.len();
        if span.head.len + span.tail.len > 0 {
            self.bounce(slot);
        }
        let cargo = &self.cargo[slot as usize];
        self.arena.extend(segments(cargo, &self.zeros, span).take(SEGMENTS_MAX));
        (first, self.arena.len() - first)
    }

    /// Starts what was issued: one system call.
    pub(crate) fn submit(&mut self) {
        self.crypt.unsent = 0;
        self.end_run();
        let sent = match &mut self.engine {
            Engine::Ring(ring) => ring.submit(),
            Engine::Inline(done) => {
                if !done.is_empty() {
                    signal(&self.event);
                }
                true
            }
        };
        if sent {
            self.arena.clear();
        }
    }

    /// Appends what has finished, up to a turn's worth of decrypting.
    pub(crate) fn poll(&mut self, answers: &mut Vec<Answer>) {
        self.crypt.decrypted = 0;
        loop {
            match &mut self.engine {
                Engine::Ring(ring) => ring.poll(&mut self.answered),
                Engine::Inline(done) => self.answered.extend(done.drain(..)),
            }
            while !self.crypt.has_had_its_turn()
                && let Some(answer) = self.answered.pop_front()
            {
                if answer.slot == OF_A_RUN {
                    self.deal(answer);
                    continue;
                }
                let Some(answer) = self.settle(answer) else { continue };
                self.cargo[answer.slot as usize].in_flight -= 1;
                self.in_flight -= 1;
                answers.push(answer);
            }
            if !std::mem::take(&mut self.crypt.restarted) {
                break;
            }
            // Nobody else knows that something was issued here.
            self.submit();
        }
    }

    /// Whether [`Driver::poll`] would find something. Costs no system call.
    pub(crate) fn has_answer(&mut self) -> bool {
        let waits = match &mut self.engine {
            Engine::Ring(ring) => ring.has_answer(),
            Engine::Inline(done) => !done.is_empty(),
        };
        waits || !self.answered.is_empty()
    }

    /// Whether [`Driver::poll`] has left answers for the next time.
    pub(crate) fn is_behind(&self) -> bool {
        !self.answered.is_empty()
    }

    /// Waits until nothing is in flight; what was answered meanwhile is forgotten. Only before the end.
    pub(crate) fn wait_idle(&mut self) {
        let mut answers = Vec::new();
        self.submit();
        while self.in_flight > 0 {
            self.poll(&mut answers);
            if self.in_flight == 0 {
                break;
            }
            if self.is_behind() {
                continue;
            }
            // Inline calls have ended when they return, so there is nothing to wait for.
            let Engine::Ring(ring) = &mut self.engine else { break };
            if ring.wait().is_err() {
                // The kernel may still write: better to lose the memory than to reuse it.
                std::mem::forget(std::mem::take(&mut self.cargo));
                std::mem::forget(std::mem::take(&mut self.zeros));
                std::mem::forget(std::mem::take(&mut self.crypt));
                return;
            }
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.wait_idle();
    }
}

/// The memory of a span, in order. Its bounce blocks must be there if it has some.
fn segments<'a>(cargo: &'a Cargo, zeros: &'a Buffers, span: &Span) -> impl Iterator<Item = iovec> + use<'a> {
    let bounce = move |part: BouncePart| {
        let at = (usize::from(part.which) * BLOCK + part.start as usize) as u64;
        let blocks = cargo.bounce.iter().take(usize::from(part.len > 0));
        blocks.flat_map(move |Bounce(blocks)| blocks.parts(at, u64::from(part.len)))
    };
    let (start, len, zero) = match span.body {
        Body::Buffers { start, len } => (start, len, 0),
        Body::Zeros { len } => (0, 0, len),
    };
    let step = ZEROS_BYTES as u64;
    let zeros = (0..zero.div_ceil(step)).flat_map(move |i| zeros.parts(0, (zero - i * step).min(step)));
    bounce(span.head).chain(cargo.buffers.parts(start, len)).chain(zeros).chain(bounce(span.tail))
}

/// Makes an eventfd readable.
pub(crate) fn signal(event: &EventFd) {
    // It fails only when the counter is full, and then it is readable already.
    let _ = event.write(1);
}

/// Makes an eventfd unreadable until the next signal.
pub(crate) fn clear(event: &EventFd) {
    // It fails only when there is nothing to clear.
    let _ = event.read();
}

fn errno_of(error: &io::Error) -> i32 {
    -error.raw_os_error().unwrap_or(libc::EIO)
}

/// The descriptor of an eventfd that completions make readable.
pub(crate) fn event_fd(event: &EventFd) -> BorrowedFd<'_> {
    event.as_fd()
}
