//! The device between a driver written here and real sockets.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};

use proptest::prelude::*;
use serio_virtio::VirtioDevice;
use serio_virtio::testing::{Buffer, Rig};
use vm_memory::{Bytes, GuestAddress};

use super::connection::BUFFER_BYTES;
use super::guest::*;
use super::packet::{HEADER_BYTES, Header, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, op};
use super::worker::lock;
use super::*;

#[test]
fn a_client_of_the_host_talks_with_the_guest_and_ends_in_order() {
    let mut guest = guest();
    guest.post(8);
    let (mut client, key) = guest.client(52);
    client.write_all(b"to the guest").unwrap();
    assert_eq!(guest.expect(op::RW).1, b"to the guest");
    guest.write(key, b"to the host");
    let mut text = [0; 11];
    client.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"to the host");
    // Half close: the host has said all, the guest has not.
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.expect(op::SHUTDOWN).0.flags, SHUTDOWN_SEND);
    guest.write(key, b"more");
    guest.send(Header { flags: SHUTDOWN_SEND, ..guest.packet(op::SHUTDOWN, key) }, &[]);
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"more");
    guest.expect(op::RST);
    assert_eq!(guest.connections(), 0);
    assert!(!guest.rig.needs_reset());
}

#[test]
fn bytes_that_follow_the_greeting_at_once_belong_to_the_guest() {
    let mut guest = guest();
    guest.post(8);
    let mut client = UnixStream::connect(guest.dir.path().join("vsock")).unwrap();
    client.write_all(b"CONNECT 7\nand more").unwrap();
    let (request, _) = guest.expect(op::REQUEST);
    guest.send(guest.packet(op::RESPONSE, (7, request.src_port)), &[]);
    assert_eq!(guest.expect(op::RW).1, b"and more");
}

#[test]
fn a_wrong_greeting_or_a_refusal_closes_the_client() {
    let mut guest = guest();
    guest.post(8);
    let mut text = Vec::new();
    let mut client = UnixStream::connect(guest.dir.path().join("vsock")).unwrap();
    client.write_all(b"GET / HTTP/1.1\r\n").unwrap();
    client.read_to_end(&mut text).unwrap();
    let mut client = UnixStream::connect(guest.dir.path().join("vsock")).unwrap();
    client.write_all(b"CONNECT 9\n").unwrap();
    let (request, _) = guest.expect(op::REQUEST);
    guest.send(guest.packet(op::RST, (9, request.src_port)), &[]);
    client.read_to_end(&mut text).unwrap();
    assert!(text.is_empty());
    // A client that goes away before the guest has answered.
    let mut client = UnixStream::connect(guest.dir.path().join("vsock")).unwrap();
    client.write_all(b"CONNECT 9\n").unwrap();
    guest.expect(op::REQUEST);
    drop(client);
    guest.expect(op::RST);
    assert_eq!(guest.connections(), 0);
}

#[test]
fn the_guest_reaches_a_listener_and_its_end_arrives_after_its_bytes() {
    let mut guest = guest();
    guest.post(8);
    let (mut server, key) = guest.outgoing(80);
    for piece in [&b"first "[..], b"second"] {
        guest.write(key, piece);
    }
    guest.send(Header { flags: SHUTDOWN_BOTH, ..guest.packet(op::SHUTDOWN, key) }, &[]);
    guest.expect(op::RST);
    let mut text = String::new();
    server.read_to_string(&mut text).unwrap();
    assert_eq!(text, "first second");
    // Nobody listens at another port.
    guest.send(guest.packet(op::REQUEST, (1, 81)), &[]);
    assert_eq!(guest.expect(op::RST).0.src_port, 81);
    assert_eq!(guest.connections(), 0);
}

#[test]
fn what_the_host_said_before_it_closed_reaches_the_guest() {
    let mut guest = guest();
    guest.post(4);
    let (mut server, key) = guest.outgoing(1);
    let long: Vec<u8> = (0..50_000u32).map(|at| (at % 251) as u8).collect();
    server.write_all(&long).unwrap();
    drop(server);
    // The guest is still talking: nobody hears it, which resets nothing.
    guest.write(key, b"lost");
    let mut got = Vec::new();
    let mut flags = 0;
    while flags != SHUTDOWN_BOTH {
        let (header, bytes) = guest.receive();
        got.extend(bytes);
        assert_ne!(header.op, op::RST);
        if header.op == op::SHUTDOWN {
            flags |= header.flags;
        }
    }
    assert!(got == long);
    assert_eq!(guest.connections(), 0);
}

#[test]
fn a_slow_reader_stops_nobody_else_and_costs_its_credit() {
    let mut guest = guest();
    guest.post(16);
    let (mut slow, slow_key) = guest.outgoing(1);
    let (mut quick, quick_key) = guest.outgoing(2);
    // Fill the socket's own buffer and then ours.
    let piece = vec![7u8; 16 << 10];
    let mut sent = 0u32;
    let mut forwarded = 0u32;
    while sent.wrapping_sub(forwarded) + piece.len() as u32 <= BUFFER_BYTES {
        guest.write(slow_key, &piece);
        sent += piece.len() as u32;
        guest.send(guest.packet(op::CREDIT_REQUEST, slow_key), &[]);
        forwarded = guest.expect(op::CREDIT_UPDATE).0.fwd_cnt;
    }
    guest.write(quick_key, b"past it");
    let mut text = [0; 7];
    quick.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"past it");
    // All of it arrives once it is read, and the guest learns of the room.
    let mut all = vec![0; sent as usize];
    slow.read_exact(&mut all).unwrap();
    assert!(all.iter().all(|byte| *byte == 7));
    while forwarded != sent {
        guest.send(guest.packet(op::CREDIT_REQUEST, slow_key), &[]);
        forwarded = guest.expect(op::CREDIT_UPDATE).0.fwd_cnt;
    }
    // Past its credit: this connection is reset, the other goes on.
    for _ in 0..64 {
        guest.write(slow_key, &piece);
    }
    guest.expect(op::RST);
    guest.write(quick_key, b"past it");
    quick.read_exact(&mut text).unwrap();
    assert!(!guest.rig.needs_reset());
}

#[test]
fn no_more_is_sent_than_the_guest_has_room_for() {
    let mut guest = guest();
    guest.buf_alloc = 1000;
    guest.post(8);
    let (mut client, key) = guest.client(5);
    client.write_all(&[1; 2500]).unwrap();
    let mut got = 0;
    while got < 2500 {
        let (header, bytes) = guest.receive();
        got += bytes.len() as u32;
        assert!(got - guest.taken <= 1000, "{got} with {} taken", guest.taken);
        if header.op == op::CREDIT_REQUEST {
            guest.taken = got;
            guest.send(guest.packet(op::CREDIT_UPDATE, key), &[]);
        }
    }
}

#[test]
fn packets_for_nobody_are_reset_and_nonsense_is_survived() {
    let mut guest = guest();
    guest.post(8);
    guest.write((5, 6), b"into the void");
    let (reset, _) = guest.expect(op::RST);
    assert_eq!((reset.dst_port, reset.src_port), (5, 6));
    // Answered by silence: a reset, foreign addresses, half a header, more payload than there is.
    guest.send(guest.packet(op::RST, (5, 6)), &[]);
    guest.send(Header { src_cid: 99, ..guest.packet(op::REQUEST, (1, 1)) }, &[]);
    guest.send(Header { dst_cid: 99, ..guest.packet(op::REQUEST, (1, 1)) }, &[]);
    guest.send(Header { len: 1 << 30, ..guest.packet(op::RW, (5, 6)) }, b"short");
    guest.tx.offer(&[Buffer::readable(TX_DATA, 20)]).unwrap();
    guest.rig.kicks[1].write(1).unwrap();
    while guest.tx.used().is_none() {
        guest.rig.wait();
    }
    // A socket type that was not offered, an operation that does not exist.
    guest.send(Header { kind: 2, ..guest.packet(op::REQUEST, (1, 1)) }, &[]);
    let (head, len) = loop {
        match guest.rx.used() {
            Some(used) => break used,
            None => guest.rig.wait(),
        }
    };
    let address = guest.addresses.remove(&head).unwrap();
    let mut bytes = vec![0; len as usize];
    guest.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
    let header = Header::parse(bytes[..HEADER_BYTES].try_into().unwrap());
    assert_eq!((header.op, header.kind), (op::RST, 2));
    let (_client, key) = guest.client(52);
    guest.send(guest.packet(77, key), &[]);
    guest.expect(op::RST);
    assert_eq!(guest.connections(), 0);
    assert!(!guest.rig.needs_reset());
}

#[test]
fn resets_that_the_guest_does_not_take_are_bounded() {
    let mut guest = guest();
    for round in 0..300u32 {
        let header = Header { ..guest.packet(op::RW, (round, 6)) };
        let at = TX_DATA + u64::from(round % 32) * 64;
        guest.memory.write_slice(&header.to_bytes(), GuestAddress(at)).unwrap();
        if guest.tx.offer(&[Buffer::readable(at, HEADER_BYTES as u32)]).is_none() {
            break;
        }
        guest.rig.kicks[1].write(1).unwrap();
        while guest.tx.used().is_some() {}
    }
    // It goes on when the guest takes them: each gets its answer.
    guest.post(8);
    let mut last = 0;
    for _ in 0..64 {
        last = guest.expect(op::RST).0.dst_port;
    }
    assert!(last >= 63);
    assert!(!guest.rig.needs_reset());
}

#[test]
fn connections_are_bounded_and_silent_greetings_make_way() {
    let mut guest = guest();
    guest.post(8);
    let silent: Vec<UnixStream> =
        (0..300).map(|_| UnixStream::connect(guest.dir.path().join("vsock")).unwrap()).collect();
    let (_client, key) = guest.client(52);
    assert!(guest.connections() <= muxer::CONNECTIONS_MAX);
    guest.write(key, b"x");
    drop(silent);
}

#[test]
fn a_broker_hands_the_sockets_over() {
    use rustix::net::{
        AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags,
        SocketType,
    };
    let (ours, theirs): (OwnedFd, OwnedFd) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .unwrap();
    let mut guest = guest_with(Outgoing::Broker(ours), tempfile::tempdir().unwrap());
    guest.post(8);
    let ask = |guest: &mut Guest, key| {
        guest.send(guest.packet(op::REQUEST, key), &[]);
        let mut message = [0u8; 8];
        rustix::net::recv(&theirs, &mut message[..], RecvFlags::empty()).unwrap();
        assert_eq!(u32::from_le_bytes(message[4..].try_into().unwrap()), key.1);
        message
    };
    let message = ask(&mut guest, (1, 99));
    let (end, mut server) = UnixStream::pair().unwrap();
    let fds = [std::os::fd::AsFd::as_fd(&end)];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut rights = SendAncillaryBuffer::new(&mut space);
    assert!(rights.push(SendAncillaryMessage::ScmRights(&fds)));
    let mut answer = message;
    answer[4..].fill(0);
    rustix::net::sendmsg(&theirs, &[std::io::IoSlice::new(&answer)], &mut rights, SendFlags::empty())
        .unwrap();
    guest.expect(op::RESPONSE);
    guest.write((1, 99), b"hello");
    let mut text = [0; 5];
    server.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"hello");
    // Refused, and then gone in the middle of a question.
    let message = ask(&mut guest, (2, 98));
    rustix::net::send(&theirs, &message, SendFlags::empty()).unwrap();
    guest.expect(op::RST);
    ask(&mut guest, (3, 97));
    drop(theirs);
    guest.expect(op::RST);
    guest.send(guest.packet(op::REQUEST, (4, 96)), &[]);
    guest.expect(op::RST);
    assert_eq!(guest.connections(), 1);
}

#[test]
fn a_suspension_keeps_the_connections() {
    let mut guest = guest();
    guest.post(8);
    let (mut server, key) = guest.outgoing(1);
    let mut queues = guest.device.suspend().unwrap();
    server.write_all(b"meanwhile").unwrap();
    assert_eq!(queues.iter().map(|queue| queue.index).collect::<Vec<_>>(), [0, 1, 2]);
    let queues = queues.drain(..).map(|queue| queue.queue).collect();
    let (rig, activation) = Rig::activation(&guest.memory, queues, 0);
    guest.rig = rig;
    guest.device.activate(activation).unwrap();
    guest.rig.kicks.iter().for_each(|kick| kick.write(1).unwrap());
    assert_eq!(guest.expect(op::RW).1, b"meanwhile");
    guest.write(key, b"and back");
    let mut text = [0; 8];
    server.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"and back");
    assert!(!guest.rig.needs_reset());
}

#[test]
fn a_restored_guest_is_told_that_its_connections_are_gone() {
    let mut guest = guest();
    guest.device.restore(&serio_virtio::DeviceState::default()).unwrap();
    guest.event.offer(&[Buffer::writable(TX_DATA, 4)]).unwrap();
    guest.rig.kicks[2].write(1).unwrap();
    while guest.event.used().is_none() {
        guest.rig.wait();
    }
    assert!(!lock(&guest.device.shared).announce_reset);
}

#[test]
fn a_reset_closes_all_and_the_device_starts_again() {
    let mut guest = guest();
    guest.post(8);
    let (mut server, _) = guest.outgoing(1);
    guest.device.reset();
    let mut rest = Vec::new();
    server.read_to_end(&mut rest).unwrap();
    let (_rig, activation) = Rig::activation(
        &guest.memory,
        vec![guest.rx.queue(false), guest.tx.queue(false), guest.event.queue(false)],
        0,
    );
    guest.device.activate(activation).unwrap();
    assert_eq!(guest.connections(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn no_packet_of_the_guest_harms_anyone(
        packets in proptest::collection::vec((0u16..10, 0u32..4, 0u32..4, any::<u32>(), any::<u32>(), 0usize..600), 1..60)
    ) {
        let mut guest = guest();
        guest.post(32);
        let _listener = UnixListener::bind(guest.dir.path().join("out_1")).unwrap();
        for (op, source, port, flags, credit, len) in packets {
            let flags = flags & (SHUTDOWN_RECEIVE | SHUTDOWN_SEND | 4);
            let header = Header { flags, buf_alloc: credit, fwd_cnt: credit >> 3, len: len as u32, ..guest.packet(op, (source, port)) };
            guest.send(header, &vec![1; len]);
            while let Some((head, _)) = guest.rx.used() {
                let address = guest.addresses.remove(&head).unwrap();
                let head = guest.rx.offer(&[Buffer::writable(address, RX_BUFFER)]).unwrap();
                guest.addresses.insert(head, address);
                guest.rig.kicks[0].write(1).unwrap();
            }
        }
        prop_assert!(!guest.rig.needs_reset());
        // And it still works.
        let before = guest.connections();
        prop_assert!(before <= muxer::CONNECTIONS_MAX);
    }
}

/// A guest that opens and resets connections and never takes what it is told of them costs the host no memory.
#[test]
fn connections_that_come_and_go_unheard_leave_nothing() {
    let mut guest = guest();
    let _listener = UnixListener::bind(guest.dir.path().join("out_7")).unwrap();
    for port in 2000..2100 {
        guest.send(guest.packet(op::REQUEST, (port, 7)), &[]);
        guest.send(guest.packet(op::RST, (port, 7)), &[]);
    }
    assert_eq!(lock(&guest.device.shared).muxer.sizes(), (0, 0, 0));
}
