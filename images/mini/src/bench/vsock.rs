//! A stream over vsock for `scripts/bench machine`: to port 5000 of the host, which takes all, then from port 5001, which
//! sends all the time.

use crate::mem::Dma;
use crate::suite::Machine;
use crate::virtio::{NO_VECTOR, Queue, Result, Segment, Virtio};
use crate::{clock, println};
use alloc::vec::Vec;

const HEADER: u64 = 44;
/// Data of one packet to the host.
const PIECE: u64 = 64 << 10;
/// Room of one buffer for packets to us.
const ROOM: u64 = 64 << 10;
const BUFFERS: usize = 32;
const PIECES: usize = 16;
/// What the host may send before we say that we have taken it.
const WINDOW: u32 = 1 << 20;
const HOST: u64 = 2;
/// Operations (§5.10.6).
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RST: u16 = 3;
const RW: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

/// One connection.
struct Stream {
    device: Virtio,
    rx: Queue,
    tx: Queue,
    /// By the head of their chain.
    buffers: Vec<Option<Dma>>,
    /// Packets to be sent, and those in the ring by the head of their chain.
    free: Vec<Dma>,
    flying: Vec<Option<Dma>>,
    cid: u64,
    ports: (u32, u32),
    taken: u32,
    announced: u32,
    /// The host wants to know what we have taken.
    asked: bool,
    sent: u32,
    /// What the host has room for and what it has taken.
    host: (u32, u32),
}

/// Both directions; each takes `ms`.
pub fn run(machine: &Machine, ms: u64) -> Result<()> {
    let mut stream = Stream::open(machine)?;
    stream.connect((40_000, 5000))?;
    let (bytes, ns) = stream.pour(ms)?;
    println!(
        "bench vsock-send {} bytes/s",
        (u128::from(bytes) * 1_000_000_000 / u128::from(ns.max(1))) as u64
    );
    stream.device.reset()?;
    let mut stream = Stream::open(machine)?;
    stream.connect((40_001, 5001))?;
    let (bytes, ns) = stream.drink(ms)?;
    println!(
        "bench vsock-receive {} bytes/s",
        (u128::from(bytes) * 1_000_000_000 / u128::from(ns.max(1))) as u64
    );
    stream.device.reset()
}

impl Stream {
    fn open(machine: &Machine) -> Result<Self> {
        let function = machine.bus.as_ref().and_then(|bus| bus.virtio(19).first().copied());
        let device = Virtio::open(function.ok_or("there is no vsock")?)?;
        device.negotiate(1)?;
        let (rx, tx) = (device.queue(0, 64, NO_VECTOR)?, device.queue(1, 64, NO_VECTOR)?);
        let _event = device.queue(2, 8, NO_VECTOR)?;
        device.driver_ok();
        let cid = device.config64(0);
        let (ring, flying) = (usize::from(rx.size), alloc::vec![None; usize::from(tx.size)]);
        let free = (0..PIECES).map(|_| Dma::new(HEADER + PIECE)).collect();
        let (buffers, ports) = (alloc::vec![None; ring], (0, 0));
        let (taken, announced, asked, sent, host) = (0, 0, false, 0, (0, 0));
        let mut stream =
            Self { device, rx, tx, buffers, free, flying, cid, ports, taken, announced, asked, sent, host };
        (0..BUFFERS).for_each(|_| stream.post(Dma::new(HEADER + ROOM)));
        stream.rx.kick();
        Ok(stream)
    }

    fn post(&mut self, buffer: Dma) {
        if let Some(head) = self.rx.add(&[Segment::into(buffer)]) {
            self.buffers[usize::from(head)] = Some(buffer);
        }
    }

    /// Offers a packet; `false`: all are in the ring.
    fn send(&mut self, op: u16, len: u64) -> bool {
        while let Some((head, _)) = self.tx.take() {
            self.free.extend(self.flying[usize::from(head)].take());
        }
        let Some(out) = self.free.pop() else { return false };
        out.set64(0, self.cid);
        out.set64(8, HOST);
        out.set32(16, self.ports.0);
        out.set32(20, self.ports.1);
        out.set32(24, len as u32);
        out.set16(28, 1);
        out.set16(30, op);
        out.set32(32, 0);
        out.set32(36, WINDOW);
        out.set32(40, self.taken);
        let Some(head) = self.tx.add(&[Segment::out(out.part(0, HEADER + len))]) else {
            self.free.push(out);
            return false;
        };
        self.flying[usize::from(head)] = Some(out);
        self.announced = self.taken;
        self.tx.kick_if_wanted();
        true
    }

    /// Takes what has come: the last operation but data, and bytes of data.
    fn take(&mut self) -> (Option<u16>, u64) {
        let (mut other, mut bytes) = (None, 0);
        while let Some((head, _)) = self.rx.take() {
            let Some(buffer) = self.buffers[usize::from(head)].take() else { continue };
            self.host = (buffer.get32(36), buffer.get32(40));
            match buffer.get16(30) {
                RW => bytes += u64::from(buffer.get32(24)),
                CREDIT_UPDATE => {}
                CREDIT_REQUEST => self.asked = true,
                op => other = Some(op),
            }
            self.post(buffer);
        }
        if bytes > 0 {
            self.taken = self.taken.wrapping_add(bytes as u32);
            self.rx.kick_if_wanted();
        }
        (other, bytes)
    }

    fn connect(&mut self, ports: (u32, u32)) -> Result<()> {
        self.ports = ports;
        self.send(REQUEST, 0);
        let mut answer = None;
        clock::poll(5000, || {
            answer = self.take().0;
            answer.is_some()
        });
        if answer == Some(RESPONSE) { Ok(()) } else { Err(alloc::format!("port {}: {answer:?}", ports.1)) }
    }

    /// Sends as much as goes; (bytes, nanoseconds).
    fn pour(&mut self, ms: u64) -> Result<(u64, u64)> {
        let (begun, mut bytes) = (clock::now_ns(), 0u64);
        while clock::now_ns() - begun < ms * 1_000_000 {
            if self.take().0 == Some(RST) {
                return Err("the host has hung up".into());
            }
            let (room, taken) = self.host;
            let left = u64::from(room.saturating_sub(self.sent.wrapping_sub(taken)));
            if left >= PIECE && self.send(RW, PIECE) {
                self.sent = self.sent.wrapping_add(PIECE as u32);
                bytes += PIECE;
            }
        }
        Ok((bytes, clock::now_ns() - begun))
    }

    /// Takes as much as comes; (bytes, nanoseconds).
    fn drink(&mut self, ms: u64) -> Result<(u64, u64)> {
        let (begun, mut bytes) = (clock::now_ns(), 0u64);
        while clock::now_ns() - begun < ms * 1_000_000 {
            let (other, more) = self.take();
            if other == Some(RST) {
                return Err("the host has hung up".into());
            }
            bytes += more;
            let due = self.asked || self.taken.wrapping_sub(self.announced) >= WINDOW / 4;
            if due && self.send(CREDIT_UPDATE, 0) {
                self.asked = false;
            }
        }
        Ok((bytes, clock::now_ns() - begun))
    }
}
