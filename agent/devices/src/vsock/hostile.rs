//! Packets of the guest from bytes, while clients of the host come, talk and go: all that is kept is bounded, and what the
//! guest is told fits its buffers.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use serio_virtio::Segment;
use serio_virtio::testing::memory;
use vm_memory::GuestAddress;
use vmm_sys_util::epoll::EventSet;

use super::host::{Brokered, Outgoing};
use super::muxer::{CONNECTIONS_MAX, Muxer, RESETS_MAX};
use super::packet::{HOST_CID, Header, TYPE_STREAM};
use crate::worker::Poller;

const CID: u32 = 3;
const MEMORY_BYTES: usize = 1 << 17;
/// Bytes that say what happens next.
const STEP_BYTES: usize = 12;
const STEPS_MAX: usize = 1024;
/// Clients of the host at a time; each has two descriptors.
const CLIENTS_MAX: usize = 16;
/// Where the ports of the host's clients begin.
const CLIENT_PORTS: u32 = 1 << 30;

/// Does what the bytes say, step by step.
pub fn packets(data: &[u8]) {
    let memory = memory(MEMORY_BYTES);
    let poller = Poller::new().expect("an epoll");
    // Whoever is dialled is answered by the step below, or never.
    let (broker, _other) = UnixStream::pair().expect("sockets");
    let outgoing = [Outgoing::Refuse, Outgoing::Broker(broker.into())];
    let mut muxer = Muxer::new(CID);
    let mut clients: Vec<UnixStream> = Vec::new();
    for step in data.chunks_exact(STEP_BYTES).take(STEPS_MAX) {
        let &[what, a, b, c, d, e, f, g, h, i, j, k] = step else { return };
        match what % 8 {
            0 if clients.len() < CLIENTS_MAX => clients.push(client(&mut muxer, &poller, &step[1..])),
            1 => talk(&mut clients, a, &step[2..]),
            2 => muxer.reported(
                usize::from(a % 20),
                EventSet::from_bits_truncate(u32::from(b) | u32::from(c) << 8),
            ),
            3 => {
                let stream = (b & 1 == 0 && clients.len() < CLIENTS_MAX).then(|| pair(&mut clients));
                muxer.brokered(&poller, Brokered { id: u32::from(a % 20), stream });
            }
            4 => {
                let buffer =
                    [segment(u16::from_le_bytes([a, b]), [c, d], g), segment(u16::from(h), [e, f], g)];
                if muxer.fill(&memory, &buffer).is_err() {
                    return;
                }
            }
            _ if muxer.may_take() => {
                let wide =
                    |low: u8, high: u8| u32::from(low % 4) + if high & 1 == 1 { CLIENT_PORTS } else { 0 };
                let len = u32::from(u16::from_le_bytes([d, e]));
                let header = Header {
                    src_cid: u64::from(CID),
                    dst_cid: if k == 0xff { 0 } else { HOST_CID },
                    src_port: wide(a, 0),
                    dst_port: wide(b, b >> 4),
                    len,
                    kind: if k == 0xfe { 2 } else { TYPE_STREAM },
                    op: u16::from(c % 9),
                    flags: u32::from(f),
                    buf_alloc: u32::from(g) << (h % 32),
                    fwd_cnt: u32::from(i) << (h % 32),
                };
                // The thread lets none pass whose payload is shorter than its header says.
                let segments = [Segment { len, ..segment(u16::from_le_bytes([i, j]), [0, 0], k) }];
                let taken =
                    muxer.take(&memory, (&header, &segments), &outgoing[usize::from(what >> 7)], &poller);
                if taken.is_err() {
                    return;
                }
            }
            _ => {}
        }
        let (connections, ready, resets) = muxer.sizes();
        assert!(connections <= CONNECTIONS_MAX, "{connections} connections");
        assert!(ready <= connections, "{ready} of {connections} connections are ready");
        assert!(resets <= RESETS_MAX, "{resets} resets");
    }
}

/// Mostly memory.
fn segment(address: u16, len: [u8; 2], wild: u8) -> Segment {
    let address = if wild == 0xff { u64::MAX - u64::from(address) } else { u64::from(address) };
    Segment { address: GuestAddress(address), len: u32::from(u16::from_le_bytes(len)) }
}

fn pair(clients: &mut Vec<UnixStream>) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    for stream in [&ours, &theirs] {
        stream.set_nonblocking(true).expect("a socket");
    }
    clients.push(theirs);
    ours
}

/// Comes with a greeting, mostly a right one.
fn client(muxer: &mut Muxer, poller: &Poller, said: &[u8]) -> UnixStream {
    let mut clients = Vec::with_capacity(1);
    let ours = pair(&mut clients);
    let mut client = clients.pop().expect("just made");
    let port = said.first().copied().unwrap_or(0);
    let _ = if port < 0xe0 { writeln!(client, "CONNECT {}", port % 4) } else { client.write_all(said) };
    muxer.accept(poller, ours);
    client
}

/// One of them writes, reads or hangs up.
fn talk(clients: &mut Vec<UnixStream>, which: u8, said: &[u8]) {
    if clients.is_empty() {
        return;
    }
    let at = usize::from(which) % clients.len();
    match said.first() {
        Some(0..=0x3f) => drop(clients.swap_remove(at)),
        Some(0x40..=0x7f) => {
            let mut bytes = [0; 4096];
            let _ = clients[at].read(&mut bytes);
        }
        _ => {
            let _ = clients[at].write(said);
        }
    }
}
