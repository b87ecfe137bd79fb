//! Connections that break at every possible place: in the handshake, between answers, within a head, within data. What was
//! asked is answered in the end, whole and right.

use std::{
    io::{self, Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    time::Duration,
};

use super::{Address, Answer, Client, ClientError, Op, Options, Ticket, hostile_test::orderly};
use crate::wire::{Mode, Request, cmd, errno, opt};

const READ_BYTES: u64 = 20 << 10;
const READS: u64 = 8;
const DEPTH: usize = 2;
/// Flags, then for each option but the last one its head and what follows it.
const OPTION_HEAD_BYTES: usize = 16;

fn content(offset: u64, len: u64) -> Vec<u8> {
    (offset..offset + len).map(|at| (at ^ (at >> 8) ^ (at >> 16)) as u8).collect()
}

/// How one connection goes.
#[derive(Clone, Copy)]
enum Fate {
    /// Hung up after so many bytes of the server.
    CutAfter(usize),
    /// So many requests are answered, those after them with "shutting down".
    LeavesAfter(usize),
    Lasts,
}

/// One connection: what is left of it may be said.
struct Peer {
    stream: UnixStream,
    left: usize,
    /// Reads that were not answered in whole yet, on whichever connection.
    open: u64,
}

/// The server's part of the handshake. EXTENDED_HEADERS is not asked for.
fn handshake() -> Vec<Vec<u8>> {
    let mut all = orderly();
    all.remove(1);
    all
}

impl Peer {
    /// Says it as far as the fate goes, in one piece with the end, so that the client meets both at once.
    fn say(&mut self, bytes: &[u8]) -> io::Result<()> {
        let now = bytes.len().min(self.left);
        self.left -= now;
        self.stream.write_all(&bytes[..now])?;
        if now < bytes.len() { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(()) }
    }

    fn hear(&mut self, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn serve(&mut self, fate: Fate) -> io::Result<()> {
        let canned = handshake();
        self.say(&canned[0])?;
        self.hear(4)?;
        // Its answers to the options, by their heads.
        let mut said = 1;
        loop {
            let head = self.hear(OPTION_HEAD_BYTES)?;
            let number = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().expect("four"));
            self.hear(number(12) as usize)?;
            let answers = match number(8) {
                opt::SET_META_CONTEXT => 2,
                opt::GO => 3,
                _ => 1,
            };
            self.say(&canned[said..said + answers].concat())?;
            said += answers;
            if number(8) == opt::GO {
                break;
            }
        }
        let mut taken = 0;
        loop {
            // All that the client has under way, in one piece.
            let mut replies = Vec::new();
            let mut whole = 0;
            for _ in 0..self.open.clamp(1, DEPTH as u64) {
                let bytes = self.hear(Request::encoded_bytes(Mode::Structured))?;
                let request = Request::decode(&bytes, Mode::Structured).expect("magic").expect("whole");
                if request.command == cmd::DISC {
                    return Ok(());
                }
                assert_eq!((request.command, request.len), (cmd::READ, READ_BYTES), "{request:?}");
                if matches!(fate, Fate::LeavesAfter(n) if taken >= n) {
                    replies.extend(Mode::Structured.error(&request, errno::ESHUTDOWN).bytes());
                } else {
                    replies.extend(Mode::Structured.data(&request).bytes());
                    replies.extend(content(request.offset, request.len));
                    whole += u64::from(replies.len() <= self.left);
                }
                taken += 1;
            }
            self.open -= whole;
            self.say(&replies)?;
        }
    }
}

/// Reads all through connections of these fates, one after the other.
fn reads_through(fates: &[Fate]) {
    let temp = tempfile::tempdir().expect("tempdir");
    let path = temp.path().join("s");
    let listener = UnixListener::bind(&path).expect("bind");
    let fates = [&[Fate::CutAfter(first_bytes())], fates, &[Fate::Lasts]].concat();
    let server = std::thread::spawn(move || {
        let mut open = READS;
        for fate in fates {
            let (stream, _) = listener.accept().expect("accept");
            let left = if let Fate::CutAfter(n) = fate { n } else { usize::MAX };
            let mut peer = Peer { stream, left, open };
            let served = peer.serve(fate);
            open = peer.open;
            // The client may have hung up before.
            let _ = peer.stream.shutdown(Shutdown::Both);
            if matches!(fate, Fate::Lasts) {
                served.expect("the last connection goes on to the goodbye");
            }
        }
    });
    let options = Options {
        mode_max: Mode::Structured,
        depth: DEPTH,
        ..Options::new(&format!("nbd+unix:///?socket={}", path.display()).parse().expect("uri"))
    };
    assert_eq!(options.address, Address::Unix(path));
    let client = Client::connect(options).expect("connect");
    let offset = |i: u64| i * 2 * READ_BYTES;
    let asked: Result<Vec<Ticket>, ClientError> = (0..READS)
        .map(|i| client.submit(Op::Read { offset: offset(i), buffer: vec![0; READ_BYTES as usize] }))
        .collect();
    for (i, ticket) in (0..READS).zip(asked.expect("submit")) {
        let answer = ticket.wait().expect("read");
        assert!(answer == Answer::Data(content(offset(i), READ_BYTES)), "read {i} is not what was asked");
    }
    drop(client);
    server.join().expect("server");
}

/// The handshake, one answer, and a part of the next one: that one answer must not be lost with its connection.
fn first_bytes() -> usize {
    handshake_bytes() + 28 + READ_BYTES as usize + 100
}

fn handshake_bytes() -> usize {
    handshake().concat().len()
}

#[test]
fn a_connection_breaks_at_any_place() {
    let answer = 28 + READ_BYTES as usize;
    let within = |n: usize| Fate::CutAfter(handshake_bytes() + n);
    let of_answers = [1, 3, 15, 27, 28, 29, answer - 1, answer, answer + 1, answer + 20, 2 * answer - 1];
    for cut in of_answers {
        reads_through(&[within(cut), within(cut)]);
    }
    reads_through(&[0, 17, 18, 30, 60, handshake_bytes() - 1].map(Fate::CutAfter));
}

#[test]
fn a_server_says_that_it_leaves() {
    for answered in 0..3 {
        reads_through(&[Fate::LeavesAfter(answered), Fate::LeavesAfter(answered)]);
    }
}

#[test]
fn a_server_that_is_gone_is_given_up() {
    let temp = tempfile::tempdir().expect("tempdir");
    let path = temp.path().join("s");
    let listener = UnixListener::bind(&path).expect("bind");
    let server = std::thread::spawn(move || {
        let (stream, _) = listener.accept().expect("accept");
        let _ = Peer { stream, left: first_bytes(), open: 2 }.serve(Fate::CutAfter(first_bytes()));
    });
    let options = Options {
        mode_max: Mode::Structured,
        depth: DEPTH,
        give_up: Duration::from_millis(200),
        ..Options::new(&format!("nbd+unix:///?socket={}", path.display()).parse().expect("uri"))
    };
    let client = Client::connect(options).expect("connect");
    let read = |i: u64| Op::Read { offset: i * READ_BYTES, buffer: vec![0; READ_BYTES as usize] };
    let (first, second) = (client.submit(read(0)).expect("submit"), client.submit(read(1)).expect("submit"));
    assert_eq!(first.wait().expect("answered before the end"), Answer::Data(content(0, READ_BYTES)));
    assert!(matches!(second.wait(), Err(ClientError::Lost { .. })));
    server.join().expect("server");
}
