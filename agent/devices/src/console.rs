//! virtio-console, one port (virtio 1.2 §5.3): bytes between the guest and a pair of descriptors.
//!
//! One thread. Input is read only into buffers that the guest has posted, output waits until the descriptor takes
//! it: neither side is buffered here, so a slow reader slows the guest's port and nothing else. The descriptors
//! stay in whatever blocking mode they are in (they may be a shared terminal): each is used only when it is
//! ready, a piece at a time. A regular file, which cannot be waited for, is always ready.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use serio_hv::GuestRam;
use serio_sandbox::Kind;
use serio_virtio::{
    ActivateError, Activation, ActiveQueue, Chain, DeviceFailure, DeviceState, QueueError, RestoreError,
    SuspendError, VirtioDevice,
};
use vm_memory::Bytes;
use vmm_sys_util::epoll::EventSet;

use crate::worker::{Poller, STOP, Worker, finish_all, join_all};

const RX: u16 = 0;
const TX: u16 = 1;
const QUEUE_SIZES: &[u16] = &[64, 64];
/// What a pipe that is ready takes without blocking (PIPE_BUF).
const PIECE_BYTES: usize = 4096;
const RX_KICK: u64 = 0;
const TX_KICK: u64 = 1;
const INPUT: u64 = 2;
const OUTPUT: u64 = 3;

/// The two ends of the port, on the host.
#[derive(Debug)]
pub struct ConsoleEnds {
    /// What the guest reads. At its end the guest just gets no more.
    pub input: OwnedFd,
    /// What the guest writes goes here. Another descriptor than `input`, though it may be a duplicate.
    pub output: OwnedFd,
}

/// A console port.
pub struct Console {
    ends: Arc<ConsoleEnds>,
    /// Bytes of the next chain that are out already: it was half-way when the device was suspended.
    sent: usize,
    workers: Vec<Worker<Left>>,
}

/// What the thread leaves: both rings, and how far it was in the next chain to go out.
struct Left {
    rings: [ActiveQueue; 2],
    sent: usize,
}

/// The layout of the saved state: `sent`, eight bytes.
const STATE_VERSION: u32 = 1;

impl Console {
    /// A port over `ends`, which the console of the next boot may share.
    #[must_use]
    pub fn new(ends: Arc<ConsoleEnds>) -> Self {
        Self { ends, sent: 0, workers: Vec::new() }
    }
}

impl VirtioDevice for Console {
    fn device_id(&self) -> u16 {
        3
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    // Without SIZE and MULTIPORT no field of it means anything.
    fn read_config(&self, _offset: u64, out: &mut [u8]) {
        out.fill(0);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let rings = [activation.take_queue(RX)?, activation.take_queue(TX)?];
        let poller = Poller::new().map_err(ActivateError::io("make an epoll"))?;
        let port = Port::new(rings, self.ends.clone(), std::mem::take(&mut self.sent), &poller)?;
        let failure = activation.failure;
        self.workers.push(Worker::spawn(Kind::Ports, "console".to_owned(), poller, move |poller| {
            port.run(&poller, &failure)
        })?);
        Ok(())
    }

    fn reset(&mut self) {
        join_all(&mut self.workers);
        self.sent = 0;
    }

    fn suspend(&mut self) -> Result<Vec<ActiveQueue>, SuspendError> {
        let mut rings = Vec::new();
        for left in finish_all(&mut self.workers)? {
            self.sent = left.sent;
            rings.extend(left.rings);
        }
        Ok(rings)
    }

    fn save(&self) -> DeviceState {
        DeviceState::new(STATE_VERSION, (self.sent as u64).to_le_bytes())
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        // A number beyond the chain only means that nothing of it is left to send.
        let sent = state.fixed(STATE_VERSION)?.map_or(0, u64::from_le_bytes);
        self.sent = usize::try_from(sent).unwrap_or(usize::MAX);
        Ok(())
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.reset();
    }
}

/// What is known of a descriptor, and what it is watched for.
#[derive(Clone, Copy, Debug)]
struct End {
    token: u64,
    /// A file that epoll does not take.
    always: bool,
    ready: bool,
    armed: bool,
    closed: bool,
}

impl End {
    fn watch(poller: &Poller, fd: &OwnedFd, token: u64) -> Result<End, ActivateError> {
        let always = match poller.add_set(fd.as_fd(), EventSet::ONE_SHOT, token) {
            Ok(()) => false,
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => true,
            Err(source) => return Err(ActivateError::Io { what: "watch the console's descriptor", source }),
        };
        Ok(End { token, always, ready: always, armed: false, closed: false })
    }

    /// Watches for readiness while it is wanted, and once: a hang-up, which is always reported, would else wake an
    /// idle device for ever.
    fn want(&mut self, poller: &Poller, fd: &OwnedFd, set: EventSet) {
        if !self.always && !self.closed && !self.armed && !set.is_empty() {
            // It was taken at the start, so the kernel has no reason to refuse; if it does, the port stays silent.
            let _ = poller.change(fd.as_raw_fd(), set | EventSet::ONE_SHOT, self.token);
            self.armed = true;
        }
    }

    /// Something was reported. Whether it was data, room or a hang-up, the next read or write tells.
    fn reported(&mut self) {
        self.ready = true;
        self.armed = false;
    }
}

struct Port {
    ends: Arc<ConsoleEnds>,
    input: End,
    output: End,
    rx: ActiveQueue,
    tx: ActiveQueue,
    chain: Chain,
    /// The chain on its way out: what is still to be written of it.
    outgoing: Option<Chain>,
    sent: usize,
}

/// The driver broke a ring, or gave buffers that are no memory.
enum Broken {
    Queue,
    Memory,
}

impl From<QueueError> for Broken {
    fn from(_: QueueError) -> Self {
        Broken::Queue
    }
}

impl Port {
    /// Watches all that it waits for.
    fn new(
        [rx, tx]: [ActiveQueue; 2],
        ends: Arc<ConsoleEnds>,
        sent: usize,
        poller: &Poller,
    ) -> Result<Port, ActivateError> {
        poller.add_event(&rx.kick, RX_KICK).map_err(ActivateError::io("watch a queue"))?;
        poller.add_event(&tx.kick, TX_KICK).map_err(ActivateError::io("watch a queue"))?;
        let input = End::watch(poller, &ends.input, INPUT)?;
        let output = End::watch(poller, &ends.output, OUTPUT)?;
        Ok(Port { ends, input, output, rx, tx, chain: Chain::default(), outgoing: None, sent })
    }

    fn run(mut self, poller: &Poller, failure: &DeviceFailure) -> Left {
        let mut stop = false;
        while !stop {
            if !failure.is_marked() && self.work(poller).is_err() {
                failure.mark();
            }
            let (input, output) = (&mut self.input, &mut self.output);
            let waited = poller.wait(|token, _| match token {
                STOP => stop = true,
                INPUT => input.reported(),
                OUTPUT => output.reported(),
                _ => {}
            });
            if waited.is_err() {
                failure.mark();
                break;
            }
        }
        if self.outgoing.take().is_some() {
            // It goes on with this chain, wherever that is.
            self.tx.queue.put_back(1);
        }
        Left { rings: [self.rx, self.tx], sent: self.sent }
    }

    fn work(&mut self, poller: &Poller) -> Result<(), Broken> {
        let wants_output = self.write_out()?;
        let wants_input = self.read_in()?;
        let set = |on, set| if on { set } else { EventSet::empty() };
        self.output.want(poller, &self.ends.output, set(wants_output, EventSet::OUT));
        self.input.want(poller, &self.ends.input, set(wants_input, EventSet::IN));
        Ok(())
    }

    /// Writes what the guest sent while the descriptor takes it. `true`: something waits for the descriptor.
    fn write_out(&mut self) -> Result<bool, Broken> {
        let mut used = false;
        let waits = loop {
            let mut chain = match self.outgoing.take() {
                Some(chain) => chain,
                None => {
                    let mut chain = std::mem::take(&mut self.chain);
                    if !self.tx.queue.pop(&mut chain)? {
                        self.chain = chain;
                        if self.tx.queue.enable_kicks()? {
                            continue;
                        }
                        break false;
                    }
                    chain
                }
            };
            if self.write_chain(&mut chain)? {
                self.tx.queue.push_used(chain.head(), 0)?;
                used = true;
                self.chain = chain;
            } else {
                self.outgoing = Some(chain);
                break true;
            }
        };
        if used && self.tx.queue.interrupt_wanted()? {
            self.tx.interrupt.trigger();
        }
        Ok(waits)
    }

    /// Writes one chain as far as it goes. `true`: all of it is out (or nobody wants it any more).
    fn write_chain(&mut self, chain: &mut Chain) -> Result<bool, Broken> {
        let memory: &GuestRam = self.tx.queue.memory();
        let mut skip = self.sent;
        for segment in chain.readable() {
            let mut len = usize::try_from(segment.len).unwrap_or(usize::MAX);
            let mut address = segment.address;
            let jump = skip.min(len);
            skip = skip.saturating_sub(jump);
            len = len.saturating_sub(jump);
            address.0 = address.0.checked_add(jump as u64).ok_or(Broken::Memory)?;
            while len > 0 && !self.output.closed {
                if !self.output.ready {
                    return Ok(false);
                }
                self.output.ready = self.output.always;
                let mut fd = self.ends.output.as_fd();
                match memory.write_volatile_to(address, &mut fd, len.min(PIECE_BYTES)) {
                    Ok(0) => self.output.closed = true,
                    Ok(n) => {
                        self.sent = self.sent.saturating_add(n);
                        len = len.saturating_sub(n);
                        address.0 = address.0.checked_add(n as u64).ok_or(Broken::Memory)?;
                    }
                    Err(error) => match io_kind(&error) {
                        Some(io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                        Some(_) => self.output.closed = true,
                        None => return Err(Broken::Memory),
                    },
                }
            }
        }
        self.sent = 0;
        Ok(true)
    }

    /// Reads into posted buffers while there is input. `true`: a buffer waits for input.
    fn read_in(&mut self) -> Result<bool, Broken> {
        let mut used = false;
        let waits = loop {
            if self.input.closed {
                break false;
            }
            if !self.input.ready {
                if self.rx.queue.waiting()? > 0 {
                    break true;
                }
                if self.rx.queue.enable_kicks()? {
                    continue;
                }
                break false;
            }
            if !self.rx.queue.pop(&mut self.chain)? {
                if self.rx.queue.enable_kicks()? {
                    continue;
                }
                break false;
            }
            self.input.ready = self.input.always;
            let written = self.read_chain()?;
            // An interrupted read gives the buffer back empty, which drivers take for no news.
            self.rx.queue.push_used(self.chain.head(), u32::try_from(written).unwrap_or(0))?;
            used = true;
        };
        if used && self.rx.queue.interrupt_wanted()? {
            self.rx.interrupt.trigger();
        }
        Ok(waits)
    }

    /// One read into the chain's first segment that has room.
    fn read_chain(&mut self) -> Result<usize, Broken> {
        let memory: &GuestRam = self.rx.queue.memory();
        let Some(segment) = self.chain.writable().iter().find(|segment| segment.len > 0) else {
            return Ok(0);
        };
        let len = usize::try_from(segment.len).unwrap_or(usize::MAX).min(PIECE_BYTES);
        let mut fd = self.ends.input.as_fd();
        match memory.read_volatile_from(segment.address, &mut fd, len) {
            Ok(0) => {
                self.input.closed = true;
                Ok(0)
            }
            Ok(n) => Ok(n),
            Err(error) => match io_kind(&error) {
                Some(io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(0),
                Some(_) => {
                    self.input.closed = true;
                    Ok(0)
                }
                None => Err(Broken::Memory),
            },
        }
    }
}

/// The host's error behind an access; `None`: the guest's address was wrong.
fn io_kind(error: &vm_memory::GuestMemoryError) -> Option<io::ErrorKind> {
    match error {
        vm_memory::GuestMemoryError::IOError(error) => Some(error.kind()),
        _ => None,
    }
}

/// For fuzzers: two rings made of these bytes, over a peer that says them too and takes what comes.
#[cfg(any(test, feature = "testing"))]
pub(crate) fn requests(data: &[u8]) {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    let (ours, mut theirs) = UnixStream::pair().expect("sockets");
    for stream in [&ours, &theirs] {
        stream.set_nonblocking(true).expect("a socket");
    }
    // The kernel bounds what it takes at once.
    let _ = theirs.write(data);
    let output = ours.try_clone().expect("a descriptor");
    let ends = Arc::new(ConsoleEnds { input: ours.into(), output: output.into() });
    let (_rig, activation) = serio_virtio::hostile::rings(data, 2, 0);
    let Ok(rings) = <[ActiveQueue; 2]>::try_from(activation.queues) else { return };
    let poller = Poller::new().expect("an epoll");
    let sent = data.first().copied().map_or(0, usize::from);
    let mut port = Port::new(rings, ends, sent, &poller).expect("an epoll takes sockets");
    for _ in 0..4 {
        port.input.reported();
        port.output.reported();
        if port.work(&poller).is_err() {
            return;
        }
        let _ = theirs.read(&mut vec![0; 1 << 16]);
    }
}
