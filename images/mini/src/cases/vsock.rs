//! virtio-vsock: its addresses, what it refuses, and, with `mini.vsock=echo`, bytes both ways with the host.

use crate::mem::Dma;
use crate::suite::{Case, Failure, Machine, Outcome};
use crate::virtio::{NO_VECTOR, Queue, Segment, Virtio};
use crate::{clock, ensure, skip};
use alloc::format;

pub const CASES: &[Case] = &[
    Case { group: "vsock", name: "config", run: config },
    Case { group: "vsock", name: "unknown", run: unknown },
    Case { group: "vsock", name: "refused", run: refused },
    Case { group: "vsock", name: "nonsense", run: nonsense },
    Case { group: "vsock", name: "echo-out", run: echo_out },
    Case { group: "vsock", name: "echo-in", run: echo_in },
];

const HEADER: u64 = 44;
const ROOM: u64 = 4096;
const HOST: u64 = 2;
/// Operations (§5.10.6).
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RST: u16 = 3;
const SHUTDOWN: u16 = 4;
const RW: u16 = 5;
const CREDIT_UPDATE: u16 = 6;

/// A driver with one connection at a time.
struct Socket {
    device: Virtio,
    rx: Queue,
    tx: Queue,
    buffers: [Dma; 4],
    heads: [u16; 4],
    out: Dma,
    cid: u64,
    ports: (u32, u32),
    /// Bytes taken so far: the forward counter.
    taken: u32,
}

/// A packet that came.
struct Packet {
    op: u16,
    ports: (u32, u32),
    data: Dma,
}

impl Socket {
    fn open(machine: &mut Machine) -> Result<Self, Failure> {
        let Some(&function) = machine.bus()?.virtio(19).first() else { skip!("no virtio-vsock") };
        let device = Virtio::open(function)?;
        device.negotiate(1)?;
        let (mut rx, tx) = (device.queue(0, 16, NO_VECTOR)?, device.queue(1, 16, NO_VECTOR)?);
        let _event = device.queue(2, 8, NO_VECTOR)?;
        device.driver_ok();
        let buffers = [0; 4].map(|_| Dma::new(ROOM));
        let mut heads = [0; 4];
        for (head, buffer) in heads.iter_mut().zip(&buffers) {
            *head = rx.add(&[Segment::into(*buffer)]).ok_or("the queue is full")?;
        }
        rx.kick();
        let cid = device.config64(0);
        Ok(Self { device, rx, tx, buffers, heads, out: Dma::new(ROOM), cid, ports: (0, 0), taken: 0 })
    }

    fn send(&mut self, op: u16, flags: u32, data: &[u8]) -> Outcome {
        let out = self.out;
        out.fill(0);
        out.set64(0, self.cid);
        out.set64(8, HOST);
        out.set32(16, self.ports.0);
        out.set32(20, self.ports.1);
        out.set32(24, data.len() as u32);
        out.set16(28, 1);
        out.set16(30, op);
        out.set32(32, flags);
        out.set32(36, 1 << 16);
        out.set32(40, self.taken);
        out.copy_in(HEADER, data);
        self.tx.request(&[Segment::out(out.part(0, HEADER + data.len() as u64))])?;
        Ok(())
    }

    /// The next packet; its buffer is given back, so it is to be read before the one after the next three.
    fn receive(&mut self, ms: u64) -> Result<Packet, Failure> {
        let (head, len) = self.rx.wait(ms)?;
        let Some(at) = self.heads.iter().position(|&known| known == head) else {
            return Err(format!("head {head} was never offered").into());
        };
        let buffer = self.buffers[at];
        ensure!(
            u64::from(len) == HEADER + u64::from(buffer.get32(24)),
            "{len} bytes for {}",
            buffer.get32(24)
        );
        let copy = Dma::new(u64::from(len));
        for byte in 0..u64::from(len) {
            copy.set8(byte, buffer.get8(byte));
        }
        self.heads[at] = self.rx.add(&[Segment::into(buffer)]).ok_or("the queue is full")?;
        self.rx.kick();
        let op = copy.get16(30);
        if op == RW {
            self.taken = self.taken.wrapping_add(copy.get32(24));
        }
        Ok(Packet {
            op,
            ports: (copy.get32(20), copy.get32(16)),
            data: copy.part(HEADER, u64::from(len) - HEADER),
        })
    }

    fn expect(&mut self, op: u16) -> Result<Packet, Failure> {
        loop {
            let packet = self.receive(5000)?;
            if packet.op == op {
                return Ok(packet);
            }
            ensure!(packet.op == CREDIT_UPDATE, "operation {} instead of {op}", packet.op);
        }
    }

    fn close(self) -> Outcome {
        Ok(self.device.reset()?)
    }
}

fn config(machine: &mut Machine) -> Outcome {
    let socket = Socket::open(machine)?;
    ensure!((3..u64::from(u32::MAX)).contains(&socket.cid), "the guest's address is {}", socket.cid);
    ensure!(socket.device.num_queues() == 3, "{} queues", socket.device.num_queues());
    socket.close()
}

fn unknown(machine: &mut Machine) -> Outcome {
    let mut socket = Socket::open(machine)?;
    for port in 0..100 {
        socket.ports = (port, 1000 + port);
        socket.send(RW, 0, b"for nobody")?;
        let reset = socket.expect(RST)?;
        ensure!(reset.ports == socket.ports, "{:?} for {:?}", reset.ports, socket.ports);
    }
    socket.close()
}

fn refused(machine: &mut Machine) -> Outcome {
    let mut socket = Socket::open(machine)?;
    socket.ports = (1024, 4_000_000_000);
    socket.send(REQUEST, 0, &[])?;
    socket.expect(RST)?;
    socket.close()
}

/// Packets that break every rule get a reset or nothing; the device goes on.
fn nonsense(machine: &mut Machine) -> Outcome {
    let mut socket = Socket::open(machine)?;
    for op in [0u16, 2, 4, 6, 7, 8, 0xffff] {
        socket.ports = (7, u32::from(op));
        socket.send(op, u32::MAX, &[])?;
        socket.expect(RST)?;
    }
    // Foreign addresses, half a header, more bytes than there are.
    let mine = socket.cid;
    socket.cid = 99;
    socket.send(REQUEST, 0, &[])?;
    socket.cid = mine;
    socket.tx.request(&[Segment::out(socket.out.part(0, 20))])?;
    socket.out.set32(24, u32::MAX);
    socket.tx.request(&[Segment::out(socket.out.part(0, HEADER))])?;
    ensure!(socket.receive(50).is_err(), "an answer to a packet that has no sender");
    ensure!(socket.device.status() & 64 == 0, "the device needs a reset");
    socket.ports = (1, 2);
    socket.send(RW, 0, b"still there?")?;
    socket.expect(RST)?;
    socket.close()
}

fn wanted(machine: &Machine) -> bool {
    machine.boot.option("mini.vsock") == Some("echo")
}

/// Connects to port 5000 of the host, which sends back what it gets.
fn echo_out(machine: &mut Machine) -> Outcome {
    if !wanted(machine) {
        skip!("mini.vsock=echo was not asked for");
    }
    let mut socket = Socket::open(machine)?;
    socket.ports = (40_000, 5000);
    socket.send(REQUEST, 0, &[])?;
    socket.expect(RESPONSE)?;
    for round in 0..200u32 {
        let sent = [round as u8; 3000];
        socket.send(RW, 0, &sent)?;
        let mut got = 0;
        while got < sent.len() {
            let packet = socket.expect(RW)?;
            got += packet.data.len as usize;
            let same = (0..packet.data.len).all(|at| packet.data.get8(at) == round as u8);
            ensure!(same, "round {round}: other bytes came back");
        }
        ensure!(got == sent.len(), "round {round}: {got} bytes came back");
    }
    socket.send(SHUTDOWN, 3, &[])?;
    socket.expect(RST)?;
    socket.close()
}

/// Sends back what a client of the host writes to port 52, until it has said all.
fn echo_in(machine: &mut Machine) -> Outcome {
    if !wanted(machine) {
        skip!("mini.vsock=echo was not asked for");
    }
    let mut socket = Socket::open(machine)?;
    crate::println!("mini: listening on 52");
    let request = loop {
        match socket.receive(20_000)? {
            packet if packet.op == REQUEST => break packet,
            _ => {}
        }
    };
    ensure!(request.ports.0 == 52, "a client asked for port {}", request.ports.0);
    socket.ports = request.ports;
    socket.send(RESPONSE, 0, &[])?;
    let end = clock::now_ns() + 20_000_000_000;
    while clock::now_ns() < end {
        let packet = socket.receive(20_000)?;
        match packet.op {
            RW => {
                let data: alloc::vec::Vec<u8> = (0..packet.data.len).map(|at| packet.data.get8(at)).collect();
                socket.send(RW, 0, &data)?;
            }
            SHUTDOWN => {
                socket.send(SHUTDOWN, 3, &[])?;
                socket.expect(RST)?;
                return socket.close();
            }
            _ => {}
        }
    }
    Err("the client never ended".into())
}
