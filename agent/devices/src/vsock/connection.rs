//! One connection: a stream socket of the host on one side, a port of the guest on the other.
//!
//! ```text
//!   Greeting ──"CONNECT p"──► Requested ──RESPONSE──► Open ──► Closing ──RST sent──► gone
//!   Brokered ──socket came──────────────────────────►   │
//!                                                       └─ guest hung up, bytes left ──► Draining ──► gone
//! ```
//!
//! - **Credit** (virtio 1.2 §5.10.6.3): the guest may have at most [`BUFFER_BYTES`] with us that the socket has not
//!   taken; more is a breach and resets the connection. So a slow reader on the host costs its own connection that
//!   much memory and stops nobody else. We send no more than the guest has told us room for.
//! - Counters wrap, as the standard has them.
//! - Half close: each direction ends by itself, after what was sent before it.

use std::collections::VecDeque;
use std::io::{ErrorKind, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use serio_hv::GuestRam;
use serio_virtio::Segment;
use vm_memory::{Bytes, GuestMemoryError};

use super::greeting;
use super::packet::{HOST_CID, Header, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op};

/// What the guest may send before the host's reader has taken it.
pub(super) const BUFFER_BYTES: u32 = 128 << 10;
/// The largest payload that we send in one packet, as Linux does.
const PAYLOAD_BYTES_MAX: u32 = 64 << 10;

/// Which connection: the guest knows it by both ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
}

/// Where a connection is in its life.
#[derive(Debug)]
pub(super) enum State {
    /// A client of the host has connected and not yet said where to.
    Greeting(Vec<u8>),
    /// The guest was asked, or will be as soon as it has a buffer.
    Requested,
    /// The guest has asked; the socket is on its way from the broker.
    Brokered,
    /// Both sides agree.
    Open,
    /// A reset is on its way to the guest; nothing else matters any more.
    Closing,
    /// The guest is gone; what it sent is still being written.
    Draining,
}

/// What a connection wants to say to the guest next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Say {
    /// A packet without payload.
    Op(u16),
    /// `SHUTDOWN` with these flags.
    Shutdown(u32),
    /// Data, if the socket has some.
    Data,
}

/// What came of looking for data.
#[derive(Debug)]
pub(super) enum Filled {
    /// So many bytes are in the guest's buffer.
    Bytes(u32),
    /// There is none now, or none any more.
    Nothing,
}

/// The guest's buffer is no memory.
#[derive(Debug)]
pub(super) struct NoMemory;

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) key: Key,
    pub(super) state: State,
    pub(super) stream: Option<UnixStream>,
    /// In the queue of those who have something to say.
    pub(super) queued: bool,
    /// The older of two greetings has to go first.
    pub(super) born: u64,
    readable: bool,
    writable: bool,
    /// From the guest, not yet taken by the socket.
    buffer: VecDeque<u8>,
    /// Bytes from the guest: received, taken by the socket, and what it was last told of that.
    received: u32,
    forwarded: u32,
    forwarded_told: u32,
    /// Bytes to the guest: sent, and its room.
    sent: u32,
    peer_alloc: u32,
    peer_forwarded: u32,
    asked_for_credit: bool,
    /// To be said: REQUEST or RESPONSE, and a credit update.
    opening: Option<u16>,
    update: bool,
    /// `SHUTDOWN_*` flags: what is true of our side, and what the guest was told.
    ended: u32,
    ended_told: u32,
    /// What the guest told of its own side.
    guest_ended: u32,
    write_closed: bool,
}

impl Connection {
    pub(super) fn new(state: State, key: Key, stream: Option<UnixStream>, born: u64) -> Connection {
        Connection {
            key,
            opening: match state {
                State::Requested => Some(op::REQUEST),
                State::Open => Some(op::RESPONSE),
                _ => None,
            },
            state,
            stream,
            queued: false,
            born,
            readable: false,
            writable: false,
            buffer: VecDeque::new(),
            received: 0,
            forwarded: 0,
            forwarded_told: 0,
            sent: 0,
            peer_alloc: 0,
            peer_forwarded: 0,
            asked_for_credit: false,
            update: false,
            ended: 0,
            ended_told: 0,
            guest_ended: 0,
            write_closed: false,
        }
    }

    /// The client said where to: ask the guest.
    pub(super) fn request(&mut self, key: Key) {
        self.key = key;
        self.state = State::Requested;
        self.opening = Some(op::REQUEST);
    }

    /// The socket came: tell the guest.
    pub(super) fn opened(&mut self, stream: UnixStream) {
        self.stream = Some(stream);
        self.state = State::Open;
        self.opening = Some(op::RESPONSE);
    }

    /// Ends it with a reset.
    pub(super) fn close(&mut self) {
        self.state = State::Closing;
        self.stream = None;
        self.buffer = VecDeque::new();
    }

    /// Takes the guest's room from the header of any of its packets.
    pub(super) fn learn_credit(&mut self, header: &Header) {
        self.peer_alloc = header.buf_alloc;
        self.peer_forwarded = header.fwd_cnt;
        self.asked_for_credit = self.asked_for_credit && self.credit() == 0;
    }

    /// Bytes that the guest has room for.
    fn credit(&self) -> u32 {
        self.peer_alloc.saturating_sub(self.sent.wrapping_sub(self.peer_forwarded))
    }

    /// The socket reported something.
    pub(super) fn reported(&mut self, readable: bool, writable: bool, hung_up: bool) {
        self.readable |= readable || hung_up;
        self.writable |= writable || hung_up;
        if hung_up {
            match self.state {
                // Its client is gone before the guest has answered.
                State::Requested => self.close(),
                State::Open => self.ended |= SHUTDOWN_RECEIVE,
                _ => {}
            }
        }
        if self.writable {
            self.flush();
        }
    }

    /// Reads the greeting. `Some(port)`: complete. `Err`: this is no greeting, or its client is gone.
    pub(super) fn greeting(&mut self) -> Result<Option<u32>, ()> {
        let (State::Greeting(text), Some(stream)) = (&mut self.state, &mut self.stream) else {
            return Ok(None);
        };
        match greeting::read(stream, text)? {
            None => {
                self.readable = false;
                Ok(None)
            }
            port => Ok(port),
        }
    }

    /// The guest accepted: says so to the client. `false`: that is impossible, or unasked for.
    pub(super) fn accepted(&mut self) -> bool {
        let (State::Requested, Some(stream)) = (&self.state, &mut self.stream) else { return false };
        // A fresh socket takes these few bytes, or it is broken.
        let line = format!("OK {}\n", self.key.host_port);
        self.opening = None;
        self.state = State::Open;
        stream.write(line.as_bytes()).is_ok_and(|written| written == line.len())
    }

    /// What to say next, most urgent first.
    pub(super) fn next(&self) -> Option<Say> {
        match self.state {
            State::Closing => return Some(Say::Op(op::RST)),
            State::Greeting(_) | State::Brokered | State::Draining => return None,
            State::Requested => return self.opening.map(Say::Op),
            State::Open => {}
        }
        if let Some(op) = self.opening {
            return Some(Say::Op(op));
        }
        if self.has_data() && self.credit() > 0 {
            return Some(Say::Data);
        }
        if self.ended & !self.ended_told != 0 {
            return Some(Say::Shutdown(self.ended));
        }
        if self.update {
            return Some(Say::Op(op::CREDIT_UPDATE));
        }
        if self.has_data() && !self.asked_for_credit {
            return Some(Say::Op(op::CREDIT_REQUEST));
        }
        None
    }

    fn has_data(&self) -> bool {
        self.readable && self.ended & SHUTDOWN_SEND == 0 && self.guest_ended & SHUTDOWN_RECEIVE == 0
    }

    /// The header of a packet that will be sent now. After it, `said` must be true.
    pub(super) fn header(&mut self, guest_cid: u64, say: Say, len: u32) -> Header {
        let (op, flags) = match say {
            Say::Op(op) => (op, 0),
            Say::Shutdown(flags) => (op::SHUTDOWN, flags),
            Say::Data => (op::RW, 0),
        };
        match say {
            Say::Op(op::REQUEST | op::RESPONSE) => self.opening = None,
            Say::Op(op::CREDIT_REQUEST) => self.asked_for_credit = true,
            Say::Shutdown(flags) => self.ended_told |= flags,
            Say::Op(_) | Say::Data => {}
        }
        // Every packet carries it.
        self.update = false;
        self.forwarded_told = self.forwarded;
        self.sent = self.sent.wrapping_add(len);
        Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: self.key.host_port,
            dst_port: self.key.guest_port,
            len,
            kind: TYPE_STREAM,
            op,
            flags,
            buf_alloc: BUFFER_BYTES,
            fwd_cnt: self.forwarded,
        }
    }

    /// Whether nothing more will ever be said by either side.
    pub(super) fn is_over(&self) -> bool {
        match self.state {
            State::Draining => self.buffer.is_empty() || self.stream.is_none(),
            State::Open => self.ended_told == SHUTDOWN_BOTH,
            _ => false,
        }
    }

    /// Reads from the socket into the guest's buffer.
    pub(super) fn fill(
        &mut self,
        memory: &GuestRam,
        segments: impl Iterator<Item = Segment>,
    ) -> Result<Filled, NoMemory> {
        let Some(stream) = &self.stream else { return Ok(Filled::Nothing) };
        let mut room = self.credit().min(PAYLOAD_BYTES_MAX);
        let mut filled = 0u32;
        for segment in segments {
            let want = segment.len.min(room);
            if want == 0 {
                continue;
            }
            let mut fd = stream.as_fd();
            match memory.read_volatile_from(segment.address, &mut fd, want as usize) {
                Ok(0) => {
                    self.ended |= SHUTDOWN_SEND;
                    self.readable = false;
                    break;
                }
                Ok(n) => {
                    let n = u32::try_from(n).unwrap_or(u32::MAX);
                    filled = filled.saturating_add(n);
                    room = room.saturating_sub(n);
                    if n < want {
                        break;
                    }
                }
                Err(error) => match kind_of(&error) {
                    Some(ErrorKind::Interrupted) => break,
                    Some(ErrorKind::WouldBlock) => {
                        self.readable = false;
                        break;
                    }
                    Some(_) => {
                        self.ended |= SHUTDOWN_SEND;
                        self.readable = false;
                        break;
                    }
                    None => return Err(NoMemory),
                },
            }
        }
        Ok(if filled == 0 { Filled::Nothing } else { Filled::Bytes(filled) })
    }

    /// Takes `len` bytes from the guest. `Ok(false)`: it has sent more than its credit, or after its own end.
    pub(super) fn take(
        &mut self,
        memory: &GuestRam,
        segments: &[Segment],
        len: u32,
    ) -> Result<bool, NoMemory> {
        let waiting = self.received.wrapping_sub(self.forwarded);
        let fits = waiting.checked_add(len).is_some_and(|sum| sum <= BUFFER_BYTES);
        if !fits || !matches!(self.state, State::Open) || self.guest_ended & SHUTDOWN_SEND != 0 {
            return Ok(false);
        }
        self.received = self.received.wrapping_add(len);
        let mut rest = len;
        for segment in segments {
            let part = Segment { address: segment.address, len: segment.len.min(rest) };
            rest = rest.saturating_sub(part.len);
            self.take_segment(memory, part)?;
        }
        self.flush();
        Ok(true)
    }

    /// Straight to the socket while that goes, then into the buffer.
    fn take_segment(&mut self, memory: &GuestRam, segment: Segment) -> Result<(), NoMemory> {
        let Segment { mut address, mut len } = segment;
        while len > 0 && self.buffer.is_empty() && self.writable && !self.is_deaf() {
            let Some(stream) = &self.stream else { break };
            let mut fd = stream.as_fd();
            match memory.write_volatile_to(address, &mut fd, len as usize) {
                Ok(n) => {
                    let n = u32::try_from(n).unwrap_or(u32::MAX).min(len);
                    self.pass_on(n);
                    len = len.saturating_sub(n);
                    address.0 = address.0.checked_add(u64::from(n)).ok_or(NoMemory)?;
                }
                Err(error) => match kind_of(&error) {
                    Some(ErrorKind::Interrupted) => {}
                    Some(ErrorKind::WouldBlock) => self.writable = false,
                    Some(_) => self.ended |= SHUTDOWN_RECEIVE,
                    None => return Err(NoMemory),
                },
            }
        }
        if self.is_deaf() {
            self.pass_on(len);
            return Ok(());
        }
        // At most the guest's credit, which the caller has checked.
        let mut bytes = vec![0; len as usize];
        memory.read_slice(&mut bytes, address).map_err(|_| NoMemory)?;
        self.buffer.extend(bytes);
        Ok(())
    }

    /// Nobody on the host takes the guest's bytes any more.
    fn is_deaf(&self) -> bool {
        self.ended & SHUTDOWN_RECEIVE != 0
    }

    /// The socket took so many bytes; the guest is told when it might be waiting for that.
    fn pass_on(&mut self, bytes: u32) {
        self.forwarded = self.forwarded.wrapping_add(bytes);
        let untold = self.forwarded.wrapping_sub(self.forwarded_told);
        self.update |= untold >= BUFFER_BYTES / 4;
    }

    /// Writes what is buffered, as far as the socket takes it; then ends the direction if the guest has.
    pub(super) fn flush(&mut self) {
        while self.writable && !self.buffer.is_empty() && !self.is_deaf() {
            let Some(stream) = &mut self.stream else { break };
            let (front, _) = self.buffer.as_slices();
            match stream.write(front) {
                Ok(n) => {
                    self.buffer.drain(..n.min(self.buffer.len()));
                    self.pass_on(u32::try_from(n).unwrap_or(u32::MAX));
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.writable = false,
                Err(_) => self.ended |= SHUTDOWN_RECEIVE,
            }
        }
        if self.is_deaf() {
            let lost = u32::try_from(self.buffer.len()).unwrap_or(u32::MAX);
            self.buffer.clear();
            self.pass_on(lost);
        }
        if self.buffer.is_empty() {
            self.buffer.shrink_to(0);
            self.finish_guest_end();
        }
    }

    /// The guest ended a direction, or both.
    pub(super) fn guest_ends(&mut self, flags: u32) {
        self.guest_ended |= flags & SHUTDOWN_BOTH;
        if self.guest_ended & SHUTDOWN_RECEIVE != 0
            && let Some(stream) = &self.stream
        {
            // Its writer learns by an error. A socket that is closed already needs no telling.
            let _ = stream.shutdown(Shutdown::Read);
        }
        self.flush();
    }

    /// All that the guest sent is out: passes its end on. When both directions are over, a reset says so (§5.10.6.5).
    fn finish_guest_end(&mut self) {
        if self.guest_ended & SHUTDOWN_SEND == 0 || !matches!(self.state, State::Open) {
            return;
        }
        if !self.write_closed {
            self.write_closed = true;
            if let Some(stream) = &self.stream {
                let _ = stream.shutdown(Shutdown::Write);
            }
        }
        let host_silent = self.ended_told & SHUTDOWN_SEND != 0;
        if self.guest_ended & SHUTDOWN_RECEIVE != 0 || host_silent {
            self.close();
        }
    }

    /// After a packet was sent: is there a reason to end by now?
    pub(super) fn after_say(&mut self) {
        if self.buffer.is_empty() {
            self.finish_guest_end();
        }
    }

    /// The guest reset it. `true`: bytes that it sent before its orderly end are still to be written.
    pub(super) fn guest_reset(&mut self) -> bool {
        let drains =
            self.guest_ended & SHUTDOWN_SEND != 0 && !self.buffer.is_empty() && self.stream.is_some();
        if drains {
            self.state = State::Draining;
        }
        drains
    }

    /// Asked for our room.
    pub(super) fn tell_credit(&mut self) {
        self.update = true;
    }
}

/// The host's error behind an access; `None`: the guest's address was wrong.
fn kind_of(error: &GuestMemoryError) -> Option<ErrorKind> {
    match error {
        GuestMemoryError::IOError(error) => Some(error.kind()),
        _ => None,
    }
}

#[cfg(test)]
#[path = "connection_test.rs"]
mod tests;
