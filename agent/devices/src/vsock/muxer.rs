//! All connections of a device, and whose turn it is.
//!
//! Owns the table of connections and the queue of those that have something to say to the guest: each gets one packet
//! a turn, so that none waits behind another. Knows no virtqueue: packets come in as headers with segments, and go
//! out through [`Muxer::fill`].
//!
//! Bounds: [`CONNECTIONS_MAX`] connections, each with at most `BUFFER_BYTES` buffered; [`RESETS_MAX`] answers to
//! packets for connections that nobody knows. When those are full no packet of the guest is taken until it takes one.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use serio_hv::GuestRam;
use serio_virtio::Segment;
use vm_memory::Bytes;
use vmm_sys_util::epoll::EventSet;

use super::connection::{Connection, Filled, Key, NoMemory, Say, State};
use super::host::{Brokered, Dialled, Outgoing};
use super::packet::{HEADER_BYTES, HOST_CID, Header, TYPE_STREAM, op};
use crate::worker::Poller;

/// Connections of one guest, greetings included.
pub(super) const CONNECTIONS_MAX: usize = 256;
/// Resets on their way to the guest that belong to no connection.
pub(super) const RESETS_MAX: usize = 64;
/// Ports that the host's clients get come from here up: those below are for services.
const CLIENT_PORTS: u32 = 1 << 30;
/// What the slots of connections are watched with, plus the slot's number.
pub(super) const TOKEN_BASE: u64 = 16;

/// What came of a turn to fill a buffer of the guest.
pub(super) enum Turn {
    /// So many bytes are written, header included.
    Sent(u32),
    /// The one whose turn it was had nothing after all.
    Nothing,
    /// The buffer has no room for a header: it goes back empty.
    TooSmall,
}

pub(super) struct Muxer {
    guest_cid: u64,
    slots: Vec<Option<Connection>>,
    free: Vec<usize>,
    by_key: BTreeMap<Key, usize>,
    /// Slots with something to say, each at most once.
    ready: VecDeque<usize>,
    resets: VecDeque<Header>,
    next_port: u32,
    born: u64,
}

impl Muxer {
    pub(super) fn new(guest_cid: u32) -> Muxer {
        Muxer {
            guest_cid: u64::from(guest_cid),
            slots: Vec::new(),
            free: Vec::new(),
            by_key: BTreeMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            next_port: CLIENT_PORTS,
            born: 0,
        }
    }

    /// Watches all sockets with a new poller, after a suspension.
    pub(super) fn watch_all(&mut self, poller: &Poller) {
        for slot in 0..self.slots.len() {
            if !self.watch(poller, slot) {
                self.close(slot);
            }
        }
    }

    fn watch(&self, poller: &Poller, slot: usize) -> bool {
        let stream =
            self.slots.get(slot).and_then(Option::as_ref).and_then(|connection| connection.stream.as_ref());
        let set = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        stream.is_none_or(|stream| {
            poller.add_set(stream.as_fd(), set, TOKEN_BASE.saturating_add(slot as u64)).is_ok()
        })
    }

    fn get(&mut self, slot: usize) -> Option<&mut Connection> {
        self.slots.get_mut(slot)?.as_mut()
    }

    fn insert(&mut self, state: State, key: Key, stream: Option<UnixStream>) -> Option<usize> {
        self.born = self.born.wrapping_add(1);
        let connection = Connection::new(state, key, stream, self.born);
        match self.free.pop() {
            Some(slot) => {
                *self.slots.get_mut(slot)? = Some(connection);
                Some(slot)
            }
            None if self.slots.len() < CONNECTIONS_MAX => {
                self.slots.push(Some(connection));
                Some(self.slots.len().saturating_sub(1))
            }
            None => None,
        }
    }

    fn remove(&mut self, slot: usize) {
        let Some(connection) = self.slots.get_mut(slot).and_then(Option::take) else { return };
        self.unlink(&connection, slot);
        if connection.queued {
            // Else a guest that opens and resets for ever, and takes no packet, would make the queue as long as it likes.
            self.ready.retain(|other| *other != slot);
        }
        self.free.push(slot);
    }

    fn unlink(&mut self, connection: &Connection, slot: usize) {
        if self.by_key.get(&connection.key) == Some(&slot) {
            self.by_key.remove(&connection.key);
        }
    }

    fn close(&mut self, slot: usize) {
        if let Some(connection) = self.get(slot) {
            connection.close();
        }
        self.schedule(slot);
    }

    /// Puts a connection in the queue if it has something to say; takes it away if it is over.
    fn schedule(&mut self, slot: usize) {
        let Some(connection) = self.get(slot) else { return };
        if connection.is_over() {
            return self.remove(slot);
        }
        if !connection.queued && connection.next().is_some() {
            connection.queued = true;
            self.ready.push_back(slot);
        }
    }

    /// Whether the guest is to be told something.
    pub(super) fn has_something(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// Whether a packet of the guest may be taken: its answer has room.
    pub(super) fn may_take(&self) -> bool {
        self.resets.len() < RESETS_MAX
    }

    /// A client of the host came.
    pub(super) fn accept(&mut self, poller: &Poller, stream: UnixStream) {
        if stream.set_nonblocking(true).is_err() {
            return;
        }
        let key = Key { host_port: 0, guest_port: 0 };
        let full = self.free.is_empty() && self.slots.len() >= CONNECTIONS_MAX;
        if full {
            // Who connects and says nothing makes way; if all are in use this one is closed again.
            let silent = |connection: &Connection| {
                matches!(connection.state, State::Greeting(_)).then_some(connection.born)
            };
            let oldest = self.slots.iter().enumerate();
            let oldest = oldest.filter_map(|(slot, c)| Some((c.as_ref().and_then(silent)?, slot))).min();
            let Some((_, slot)) = oldest else { return };
            self.remove(slot);
        }
        let Some(slot) = self.insert(State::Greeting(Vec::new()), key, Some(stream)) else { return };
        if !self.watch(poller, slot) {
            self.remove(slot);
        }
    }

    /// A connection's socket reported something.
    pub(super) fn reported(&mut self, slot: usize, events: EventSet) {
        let Some(connection) = self.get(slot) else { return };
        let hung_up = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        let readable = events.intersects(EventSet::IN | EventSet::READ_HANG_UP);
        connection.reported(readable, events.contains(EventSet::OUT), hung_up);
        match connection.greeting() {
            Ok(None) => self.schedule(slot),
            Ok(Some(port)) => self.request(slot, port),
            Err(()) => self.remove(slot),
        }
    }

    fn request(&mut self, slot: usize, guest_port: u32) {
        let key = loop {
            let key = Key { host_port: self.next_port, guest_port };
            // Ends: there are far fewer connections than ports.
            self.next_port =
                self.next_port.checked_add(1).filter(|port| *port < u32::MAX).unwrap_or(CLIENT_PORTS);
            if !self.by_key.contains_key(&key) {
                break key;
            }
        };
        if let Some(connection) = self.get(slot) {
            connection.request(key);
            self.by_key.insert(key, slot);
            self.schedule(slot);
        }
    }

    /// The broker answered.
    pub(super) fn brokered(&mut self, poller: &Poller, answer: Brokered) {
        let slot = answer.id as usize;
        let Some(connection) =
            self.get(slot).filter(|connection| matches!(connection.state, State::Brokered))
        else {
            return;
        };
        match answer.stream {
            Some(stream) => connection.opened(stream),
            None => connection.close(),
        }
        if !self.watch(poller, slot) {
            self.close(slot);
        }
        self.schedule(slot);
    }

    /// The broker is gone: what it was asked for will not come.
    pub(super) fn broker_gone(&mut self) {
        for slot in 0..self.slots.len() {
            if self.get(slot).is_some_and(|connection| matches!(connection.state, State::Brokered)) {
                self.close(slot);
            }
        }
    }

    /// Takes a packet of the guest, whose payload lies in `segments`.
    pub(super) fn take(
        &mut self,
        memory: &GuestRam,
        (header, segments): (&Header, &[Segment]),
        outgoing: &Outgoing,
        poller: &Poller,
    ) -> Result<(), NoMemory> {
        // Nobody to answer to.
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            return Ok(());
        }
        let key = Key { host_port: header.dst_port, guest_port: header.src_port };
        let slot = self.by_key.get(&key).copied();
        match (slot, header.op) {
            _ if header.kind != TYPE_STREAM => self.refuse(header),
            (None, op::REQUEST) => self.dial(key, header, outgoing, poller),
            (None, _) => self.refuse(header),
            (Some(slot), _) => {
                let connection =
                    self.get(slot).filter(|connection| !matches!(connection.state, State::Closing));
                let Some(connection) = connection else { return Ok(()) };
                connection.learn_credit(header);
                match header.op {
                    op::RESPONSE if connection.accepted() => {}
                    op::RW if connection.take(memory, segments, header.len)? => {}
                    op::CREDIT_UPDATE => {}
                    op::CREDIT_REQUEST => connection.tell_credit(),
                    op::SHUTDOWN => connection.guest_ends(header.flags),
                    op::RST => {
                        if !connection.guest_reset() {
                            self.remove(slot);
                        } else if let Some(connection) = self.slots.get_mut(slot).and_then(Option::take) {
                            self.unlink(&connection, slot);
                            if let Some(empty) = self.slots.get_mut(slot) {
                                *empty = Some(connection);
                            }
                        }
                        return Ok(());
                    }
                    // A second request, data past the credit, an operation that does not exist.
                    _ => connection.close(),
                }
                self.schedule(slot);
            }
        }
        Ok(())
    }

    fn refuse(&mut self, header: &Header) {
        if header.op != op::RST {
            self.resets.push_back(header.reset());
        }
    }

    /// The guest wants to connect to a port of the host.
    fn dial(&mut self, key: Key, header: &Header, outgoing: &Outgoing, poller: &Poller) {
        let Some(slot) = self.insert(State::Brokered, key, None) else { return self.refuse(header) };
        let dialled = outgoing.dial(u32::try_from(slot).unwrap_or(u32::MAX), key.host_port);
        let Some(connection) = self.get(slot) else { return };
        connection.learn_credit(header);
        match dialled {
            Dialled::Connected(stream) => connection.opened(stream),
            Dialled::Later => {}
            Dialled::Refused => {
                self.remove(slot);
                return self.refuse(header);
            }
        }
        self.by_key.insert(key, slot);
        if !self.watch(poller, slot) {
            self.close(slot);
        }
        self.schedule(slot);
    }

    /// Writes the next packet into a buffer of the guest.
    pub(super) fn fill(&mut self, memory: &GuestRam, buffer: &[Segment]) -> Result<Turn, NoMemory> {
        let room = buffer.iter().map(|segment| u64::from(segment.len)).sum::<u64>();
        if room < HEADER_BYTES as u64 {
            return Ok(Turn::TooSmall);
        }
        if let Some(header) = self.resets.pop_front() {
            write_header(memory, buffer, &header)?;
            return Ok(Turn::Sent(HEADER_BYTES as u32));
        }
        let Some(slot) = self.ready.pop_front() else { return Ok(Turn::Nothing) };
        let guest_cid = self.guest_cid;
        let Some(connection) = self.get(slot) else { return Ok(Turn::Nothing) };
        connection.queued = false;
        let mut len = 0;
        let mut say = connection.next();
        if say == Some(Say::Data) {
            if room == HEADER_BYTES as u64 {
                self.schedule(slot);
                return Ok(Turn::TooSmall);
            }
            match connection.fill(memory, payload(buffer))? {
                Filled::Bytes(bytes) => len = bytes,
                // Perhaps its end, which is said with this very buffer.
                Filled::Nothing => say = connection.next().filter(|say| *say != Say::Data),
            }
        }
        let Some(say) = say else {
            self.schedule(slot);
            return Ok(Turn::Nothing);
        };
        let header = connection.header(guest_cid, say, len);
        connection.after_say();
        let last = say == Say::Op(op::RST);
        write_header(memory, buffer, &header)?;
        if last {
            self.remove(slot);
        } else {
            self.schedule(slot);
        }
        Ok(Turn::Sent(len.saturating_add(HEADER_BYTES as u32)))
    }

    /// For tests: connections, those in the queue of who has something to say, and resets that wait.
    #[cfg(any(test, feature = "testing"))]
    pub(super) fn sizes(&self) -> (usize, usize, usize) {
        (self.slots.iter().flatten().count(), self.ready.len(), self.resets.len())
    }

    /// How many connections there are, for tests.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.slots.iter().flatten().count()
    }
}

/// The segments behind the first 44 bytes.
fn payload(buffer: &[Segment]) -> impl Iterator<Item = Segment> {
    let mut skip = HEADER_BYTES as u32;
    buffer.iter().filter_map(move |segment| {
        let jump = skip.min(segment.len);
        skip = skip.saturating_sub(jump);
        let address = segment.address.0.checked_add(u64::from(jump))?;
        let len = segment.len.saturating_sub(jump);
        (len > 0).then_some(Segment { address: vm_memory::GuestAddress(address), len })
    })
}

fn write_header(memory: &GuestRam, buffer: &[Segment], header: &Header) -> Result<(), NoMemory> {
    let bytes = header.to_bytes();
    let mut rest: &[u8] = &bytes;
    for segment in buffer {
        let (part, left) = rest.split_at(rest.len().min(segment.len as usize));
        memory.write_slice(part, segment.address).map_err(|_| NoMemory)?;
        rest = left;
        if rest.is_empty() {
            break;
        }
    }
    Ok(())
}
