//! Extended headers, which few strangers' tools speak yet: by hand, against what `doc/proto.md` says.

mod common;

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    time::Duration,
};

use common::{Serving, noise, volumed};
use serio_nbd::{
    handshake::{GREETING_BYTES, OptionHeader, REPLY_HEADER_BYTES},
    wire::{EXTENDED_REPLY_MAGIC, Fields, Mode, Request, chunk, cmd, cmd_flag, errno, opt, rep},
};
use tempfile::TempDir;

struct Client {
    stream: UnixStream,
}

impl Client {
    fn connect(serving: &Serving, contexts: &[&str]) -> Client {
        let stream = UnixStream::connect(&serving.socket).expect("connect");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("timeout");
        let mut client = Client { stream };
        client.bytes(GREETING_BYTES);
        client.stream.write_all(&[0, 0, 0, 3]).expect("flags");
        assert_eq!(client.option(opt::EXTENDED_HEADERS, &[]), [rep::ACK]);
        let mut set = [0u32.to_be_bytes(), (contexts.len() as u32).to_be_bytes()].concat();
        for context in contexts {
            set.extend((context.len() as u32).to_be_bytes());
            set.extend(context.bytes());
        }
        let mut expected = vec![rep::META_CONTEXT; contexts.len()];
        expected.push(rep::ACK);
        assert_eq!(client.option(opt::SET_META_CONTEXT, &set), expected);
        assert_eq!(client.option(opt::GO, &[0; 6]), [rep::INFO, rep::ACK]);
        client
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes).expect("read");
        bytes
    }

    /// The kinds of the replies, up to ACK or an error.
    fn option(&mut self, option: u32, payload: &[u8]) -> Vec<u32> {
        self.stream.write_all(&OptionHeader::encode(option, payload)).expect("option");
        let mut kinds = Vec::new();
        loop {
            let head = self.bytes(REPLY_HEADER_BYTES);
            let mut fields = Fields(&head[12..]);
            let (kind, len) = (fields.u32().expect("kind"), fields.u32().expect("length"));
            self.bytes(len as usize);
            kinds.push(kind);
            if kind == rep::ACK || kind >> 31 == 1 {
                return kinds;
            }
        }
    }

    fn send(&mut self, command: u16, flags: u16, offset: u64, len: u64) {
        let request = Request { flags, command, cookie: 9, offset, len };
        self.stream.write_all(request.encode(Mode::Extended).bytes()).expect("request");
    }

    /// The chunks of one reply: type and payload.
    fn chunks(&mut self, offset: u64) -> Vec<(u16, Vec<u8>)> {
        let mut chunks = Vec::new();
        loop {
            let head = self.bytes(32);
            let mut fields = Fields(&head);
            assert_eq!(fields.u32(), Some(EXTENDED_REPLY_MAGIC));
            let (flags, kind) = (fields.u16().expect("flags"), fields.u16().expect("type"));
            assert_eq!((fields.u64(), fields.u64()), (Some(9), Some(offset)));
            let len = fields.u64().expect("length");
            chunks.push((kind, self.bytes(len as usize)));
            if flags & chunk::FLAG_DONE != 0 {
                return chunks;
            }
        }
    }

    fn ask(&mut self, command: u16, flags: u16, offset: u64, len: u64) -> Vec<(u16, Vec<u8>)> {
        self.send(command, flags, offset, len);
        self.chunks(offset)
    }
}

fn refused(error: u32) -> Vec<(u16, Vec<u8>)> {
    vec![(chunk::ERROR, [&error.to_be_bytes()[..], &[0, 0]].concat())]
}

/// (length, flags) of a BLOCK_STATUS_EXT chunk of the context with this id.
fn extents((kind, payload): &(u16, Vec<u8>), id: u32) -> Vec<(u64, u64)> {
    let mut fields = Fields(payload);
    assert_eq!((*kind, fields.u32()), (chunk::BLOCK_STATUS_EXT, Some(id)));
    let count = fields.u32().expect("count");
    let found = (0..count).map(|_| (fields.u64().expect("length"), fields.u64().expect("flags"))).collect();
    assert!(fields.0.is_empty());
    found
}

#[test]
fn lengths_beyond_32_bits_and_nothing_but_chunks() {
    let temp = TempDir::new().expect("tempdir");
    let volume = temp.path().join("vol");
    volumed(&["create", volume.to_str().expect("text"), "--size", "10GiB"]);
    let serving = Serving::start(&volume, &temp.path().join("s"), &[]);
    let mut client = Client::connect(&serving, &["base:allocation"]);
    let done = vec![(chunk::NONE, Vec::new())];
    let at = 6 << 30;

    let data = noise(8192, 5);
    client.send(cmd::WRITE, cmd_flag::PAYLOAD_LEN | cmd_flag::FUA, at, 8192);
    client.stream.write_all(&data).expect("payload");
    assert_eq!(client.chunks(at), done);
    let read = client.ask(cmd::READ, 0, at, 8192);
    assert_eq!(read, [(chunk::OFFSET_DATA, [&at.to_be_bytes()[..], &data].concat())]);

    let whole = client.ask(cmd::BLOCK_STATUS, 0, 0, 10 << 30);
    assert_eq!(extents(&whole[0], 1), [(at, 3), (8192, 0), ((4 << 30) - 8192, 3)]);
    let one = client.ask(cmd::BLOCK_STATUS, cmd_flag::REQ_ONE, 0, 10 << 30);
    assert_eq!(extents(&one[0], 1), [(at, 3)]);

    let fast = cmd_flag::FAST_ZERO;
    assert_eq!(client.ask(cmd::WRITE_ZEROES, fast, 0, 10 << 30), done);
    assert_eq!(client.ask(cmd::TRIM, cmd_flag::FUA, 0, 10 << 30), done);
    let read = client.ask(cmd::READ, 0, at, 8192);
    assert!(read[0].1[8..].iter().all(|b| *b == 0));
    assert_eq!(client.ask(cmd::FLUSH, 0, 0, 0), done);
    assert_eq!(client.ask(cmd::CACHE, 0, 0, 10 << 30), done);

    // A payload that has no business there is passed over.
    client.send(cmd::TRIM, cmd_flag::PAYLOAD_LEN, 0, 5000);
    client.stream.write_all(&noise(5000, 1)).expect("payload");
    assert_eq!(client.chunks(0), refused(errno::EINVAL));
    assert_eq!(client.ask(cmd::READ, 0, 0, 1 << 33), refused(errno::EOVERFLOW));
    assert_eq!(client.ask(cmd::TRIM, 0, 1, 10 << 30), refused(errno::EINVAL));
    assert_eq!(client.ask(cmd::WRITE_ZEROES, 0, 1, 10 << 30), refused(errno::ENOSPC));
    assert_eq!(client.ask(cmd::FLUSH, 0, 0, 0), done);
}

#[test]
fn block_status_of_chosen_contexts() {
    let temp = TempDir::new().expect("tempdir");
    let volume = temp.path().join("vol");
    let name = volume.to_str().expect("text");
    volumed(&["create", name, "--size", "1MiB"]);
    for snapshot in ["a", "b"] {
        volumed(&["snapshot", name, snapshot]);
    }
    let serving = Serving::start(&volume, &temp.path().join("s"), &[]);
    let mut client =
        Client::connect(&serving, &["base:allocation", "qemu:dirty-bitmap:a", "qemu:dirty-bitmap:b"]);
    assert_eq!(client.ask(cmd::BLOCK_STATUS, 0, 0, 1 << 20).len(), 3);
    let mut filtered = |len: u64, ids: &[u32]| {
        let mut payload = len.to_be_bytes().to_vec();
        payload.extend(ids.iter().flat_map(|id| id.to_be_bytes()));
        client.send(cmd::BLOCK_STATUS, cmd_flag::PAYLOAD_LEN, 4096, payload.len() as u64);
        client.stream.write_all(&payload).expect("payload");
        client.chunks(4096)
    };
    let two = filtered(8192, &[3, 1]);
    assert_eq!((extents(&two[0], 3), extents(&two[1], 1)), (vec![(8192, 0)], vec![(8192, 3)]));
    assert_eq!(filtered(8192, &[4]), refused(errno::EINVAL), "unknown");
    assert_eq!(filtered(8192, &[1, 1]), refused(errno::EINVAL), "twice");
    assert_eq!(filtered(8192, &[]), refused(errno::EINVAL), "none");
    assert_eq!(filtered(8192, &[1; 50]), refused(errno::EINVAL), "more than there are");
    assert_eq!(filtered(1 << 20, &[1]), refused(errno::EINVAL), "past the end");
    assert_eq!(filtered(0, &[1]), refused(errno::EINVAL), "nothing");
    assert_eq!(extents(&filtered(4096, &[2])[0], 2), [(4096, 0)], "and the stream goes on");
    // A payload that no command may have is not even passed over.
    client.send(cmd::TRIM, cmd_flag::PAYLOAD_LEN, 0, 1 << 40);
    assert_eq!(client.stream.read(&mut [0; 1]).expect("the end"), 0);
}

#[test]
fn long_reads_come_in_pieces_and_holes() {
    let temp = TempDir::new().expect("tempdir");
    let volume = temp.path().join("vol");
    volumed(&["create", volume.to_str().expect("text"), "--size", "4MiB"]);
    volumed(&["snapshot", volume.to_str().expect("text"), "a"]);
    let serving = Serving::start(&volume, &temp.path().join("s"), &[]);
    let mut client = Client::connect(&serving, &["base:allocation"]);
    let data = noise(300_000, 6);
    client.send(cmd::WRITE, cmd_flag::PAYLOAD_LEN, 100_000, 300_000);
    client.stream.write_all(&data).expect("payload");
    client.chunks(100_000);
    let mut expected = vec![0; 2 << 20];
    expected[100_000..400_000].copy_from_slice(&data);
    // Of the layer below nothing was ever written, so all but the data is zeros; what is a hole there is the file's.
    assert_eq!(client.ask(cmd::WRITE_ZEROES, 0, 1 << 20, 1 << 20), [(chunk::NONE, Vec::new())]);
    let chunks = client.ask(cmd::READ, 0, 0, 2 << 20);
    assert!(chunks.iter().any(|(kind, _)| *kind == chunk::OFFSET_HOLE), "zeros are not sent");
    assert_eq!(chunks.last(), Some(&(chunk::NONE, Vec::new())));
    let mut found = vec![1; 2 << 20];
    for (kind, payload) in &chunks {
        let mut fields = Fields(payload);
        let at = fields.u64().unwrap_or(0) as usize;
        match *kind {
            chunk::OFFSET_DATA => found[at..at + fields.0.len()].copy_from_slice(fields.0),
            chunk::OFFSET_HOLE => found[at..at + fields.u32().expect("length") as usize].fill(0),
            _ => {}
        }
    }
    assert!(found == expected);
    // "The server MUST send at most one content chunk."
    let whole = client.ask(cmd::READ, cmd_flag::DF, 50_000, 1 << 20);
    assert_eq!(whole.len(), 2);
    assert!(whole[0].0 == chunk::OFFSET_DATA && whole[0].1[8..] == expected[50_000..50_000 + (1 << 20)]);
}

#[test]
fn a_raw_file_promises_no_fast_zeroes() {
    let temp = TempDir::new().expect("tempdir");
    let disk = temp.path().join("raw");
    std::fs::write(&disk, noise(1 << 20, 1)).expect("write");
    let serving = Serving::start(&disk, &temp.path().join("s"), &[]);
    let mut client = Client::connect(&serving, &["base:allocation"]);
    assert_eq!(client.ask(cmd::WRITE_ZEROES, cmd_flag::FAST_ZERO, 0, 4096), refused(errno::ENOTSUP));
    assert_eq!(client.ask(cmd::WRITE_ZEROES, cmd_flag::NO_HOLE, 0, 4096), [(chunk::NONE, Vec::new())]);
    let read = client.ask(cmd::READ, 0, 0, 4096);
    assert!(read[0].1[8..].iter().all(|b| *b == 0));
}
