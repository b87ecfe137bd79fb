//! For tests: a driver that says what the test wants, with real sockets on the other side.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use serio_hv::GuestMemory;
use serio_virtio::VirtioDevice;
use serio_virtio::testing::{Buffer, DriverQueue, Rig, memory};
use vm_memory::{Bytes, GuestAddress};

use super::packet::{HEADER_BYTES, HOST_CID, Header, TYPE_STREAM, op};
use super::worker::lock;
use super::*;

pub(super) const CID: u32 = 3;
pub(super) const RX_DATA: u64 = 0x20_0000;
pub(super) const TX_DATA: u64 = 0x60_0000;
pub(super) const RX_BUFFER: u32 = 4096;

pub(super) struct Guest {
    pub(super) device: Vsock,
    pub(super) rig: Rig,
    pub(super) rx: DriverQueue,
    pub(super) tx: DriverQueue,
    pub(super) event: DriverQueue,
    pub(super) memory: GuestMemory,
    pub(super) addresses: BTreeMap<u16, u64>,
    pub(super) dir: tempfile::TempDir,
    /// What the guest says of its own buffer, and how much it has taken.
    pub(super) buf_alloc: u32,
    pub(super) taken: u32,
}

pub(super) fn guest_with(outgoing: Outgoing, dir: tempfile::TempDir) -> Guest {
    let memory = memory(16 << 20);
    let (rx, tx, event) = (
        DriverQueue::new(&memory, 0x1_0000, 64),
        DriverQueue::new(&memory, 0x3_0000, 64),
        DriverQueue::new(&memory, 0x5_0000, 8),
    );
    let (rig, activation) =
        Rig::activation(&memory, vec![rx.queue(false), tx.queue(false), event.queue(false)], 0);
    let listener = UnixListener::bind(dir.path().join("vsock")).unwrap();
    let mut device = Vsock::new(VsockHost::new(CID, listener, outgoing).unwrap());
    device.activate(activation).unwrap();
    Guest {
        device,
        rig,
        rx,
        tx,
        event,
        memory,
        addresses: BTreeMap::new(),
        dir,
        buf_alloc: 1 << 20,
        taken: 0,
    }
}

pub(super) fn guest() -> Guest {
    let dir = tempfile::tempdir().unwrap();
    let outgoing = Outgoing::Path(dir.path().join("out"));
    guest_with(outgoing, dir)
}

impl Guest {
    pub(super) fn post(&mut self, count: u64) {
        for at in 0..count {
            let address = RX_DATA + at * u64::from(RX_BUFFER);
            let head = self.rx.offer(&[Buffer::writable(address, RX_BUFFER)]).unwrap();
            self.addresses.insert(head, address);
        }
        self.rig.kicks[0].write(1).unwrap();
    }

    /// The next packet; its buffer is posted again.
    pub(super) fn receive(&mut self) -> (Header, Vec<u8>) {
        loop {
            if let Some((head, len)) = self.rx.used() {
                let address = self.addresses.remove(&head).unwrap();
                let mut bytes = vec![0; len as usize];
                self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
                let header = Header::parse(bytes[..HEADER_BYTES].try_into().unwrap());
                assert_eq!(header.len as usize, bytes.len() - HEADER_BYTES);
                assert_eq!(
                    (header.src_cid, header.dst_cid, header.kind),
                    (HOST_CID, u64::from(CID), TYPE_STREAM)
                );
                let head = self.rx.offer(&[Buffer::writable(address, RX_BUFFER)]).unwrap();
                self.addresses.insert(head, address);
                self.rig.kicks[0].write(1).unwrap();
                return (header, bytes[HEADER_BYTES..].to_vec());
            }
            self.rig.wait();
        }
    }

    /// The next packet that is no credit update.
    pub(super) fn expect(&mut self, op: u16) -> (Header, Vec<u8>) {
        loop {
            let (header, bytes) = self.receive();
            if header.op == op {
                return (header, bytes);
            }
            assert!(
                matches!(header.op, op::CREDIT_UPDATE | op::CREDIT_REQUEST),
                "{header:?} instead of {op}"
            );
        }
    }

    pub(super) fn packet(&self, op: u16, key: (u32, u32)) -> Header {
        Header {
            src_cid: u64::from(CID),
            dst_cid: HOST_CID,
            src_port: key.0,
            dst_port: key.1,
            kind: TYPE_STREAM,
            op,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.taken,
            ..Header::default()
        }
    }

    pub(super) fn send(&mut self, header: Header, payload: &[u8]) {
        self.memory.write_slice(&header.to_bytes(), GuestAddress(TX_DATA)).unwrap();
        self.memory.write_slice(payload, GuestAddress(TX_DATA + 0x1000)).unwrap();
        let mut chain = vec![Buffer::readable(TX_DATA, HEADER_BYTES as u32)];
        if !payload.is_empty() {
            chain.push(Buffer::readable(TX_DATA + 0x1000, payload.len() as u32));
        }
        self.tx.offer(&chain).unwrap();
        self.rig.kicks[1].write(1).unwrap();
        while self.tx.used().is_none() {
            self.rig.wait();
        }
    }

    pub(super) fn write(&mut self, key: (u32, u32), payload: &[u8]) {
        let header = Header { len: payload.len() as u32, ..self.packet(op::RW, key) };
        self.send(header, payload);
    }

    /// A client of the host that is connected to `port`.
    pub(super) fn client(&mut self, port: u32) -> (UnixStream, (u32, u32)) {
        let mut client = UnixStream::connect(self.dir.path().join("vsock")).unwrap();
        client.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
        let (request, _) = self.expect(op::REQUEST);
        assert_eq!(request.dst_port, port);
        let key = (port, request.src_port);
        self.send(self.packet(op::RESPONSE, key), &[]);
        let mut line = vec![0; format!("OK {}\n", request.src_port).len()];
        client.read_exact(&mut line).unwrap();
        assert_eq!(line, format!("OK {}\n", request.src_port).as_bytes());
        (client, key)
    }

    /// A connection of the guest to a listener of the host.
    pub(super) fn outgoing(&mut self, port: u32) -> (UnixStream, (u32, u32)) {
        let listener = UnixListener::bind(self.dir.path().join(format!("out_{port}"))).unwrap();
        let key = (1024 + port, port);
        self.send(self.packet(op::REQUEST, key), &[]);
        self.expect(op::RESPONSE);
        (listener.accept().unwrap().0, key)
    }

    pub(super) fn connections(&self) -> usize {
        lock(&self.device.shared).muxer.len()
    }
}
