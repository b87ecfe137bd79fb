//! Servers that lie: nothing they send makes the client panic, hang, or take memory without bound.

use std::io::{self, Cursor, Read, Write};

use proptest::prelude::*;

use super::{
    greet::{Wanted, begin, negotiate, start_tls},
    link::feed,
    reply::{Answered, Expected, ProtocolError, Replies},
};
use crate::wire::{IHAVEOPT, Mode, NBDMAGIC, OPTION_REPLY_MAGIC, Request, chunk, cmd, info, opt, rep};

/// A server whose answers are written beforehand.
struct Canned(Cursor<Vec<u8>>);

impl Read for Canned {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Canned {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        Ok(buffer.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub(super) fn reply(option: u32, kind: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    crate::handshake::reply(&mut out, option, kind, payload);
    out
}

/// What an orderly server says to our client.
pub(super) fn orderly() -> Vec<Vec<u8>> {
    let mut greeting = NBDMAGIC.to_be_bytes().to_vec();
    greeting.extend(IHAVEOPT.to_be_bytes());
    greeting.extend(3_u16.to_be_bytes());
    let mut export = info::EXPORT.to_be_bytes().to_vec();
    export.extend((1_u64 << 30).to_be_bytes());
    export.extend(0x0d_u16.to_be_bytes());
    let sizes: Vec<u8> = [512_u32, 4096, 1 << 20].iter().flat_map(|n| n.to_be_bytes()).collect();
    let sizes = [&info::BLOCK_SIZE.to_be_bytes()[..], &sizes].concat();
    let context = [&7_u32.to_be_bytes()[..], b"base:allocation"].concat();
    vec![
        greeting,
        reply(opt::EXTENDED_HEADERS, rep::ERR_UNSUP, b"no"),
        reply(opt::STRUCTURED_REPLY, rep::ACK, b""),
        reply(opt::SET_META_CONTEXT, rep::META_CONTEXT, &context),
        reply(opt::SET_META_CONTEXT, rep::ACK, b""),
        reply(opt::GO, rep::INFO, &export),
        reply(opt::GO, rep::INFO, &sizes),
        reply(opt::GO, rep::ACK, b""),
    ]
}

fn talk(bytes: Vec<u8>) -> Result<super::Terms, super::GreetError> {
    let wanted =
        Wanted { export: "x".into(), contexts: vec!["base:allocation".into()], mode_max: Mode::Extended };
    let mut server = Canned(Cursor::new(bytes));
    let greeting = begin(&mut server)?;
    negotiate(&mut server, greeting, &wanted)
}

#[test]
fn terms_are_agreed_on() {
    let terms = talk(orderly().concat()).expect("terms");
    assert_eq!((terms.mode, terms.size_bytes, terms.block_min_bytes), (Mode::Structured, 1 << 30, 512));
    assert_eq!((terms.payload_max_bytes, terms.contexts), (1 << 20, vec![(7, "base:allocation".into())]));
}

#[test]
fn refusals_say_what_to_do() {
    let with = |position: usize, bytes: Vec<u8>| {
        let mut all = orderly();
        all.truncate(position);
        all.push(bytes);
        let error = talk(all.concat()).expect_err("refused");
        super::chain(&error)
    };
    assert!(with(0, vec![0; 18]).contains("NBDMAGIC"));
    assert!(with(1, reply(opt::EXTENDED_HEADERS, rep::ERR_TLS_REQD, b"")).contains("nbds://"));
    assert!(with(1, reply(opt::GO, rep::ACK, b"")).contains("does not belong"));
    assert!(with(5, reply(opt::GO, rep::ERR_UNKNOWN, b"gone\x1b[m")).contains("`x`: gone\\u{1b}[m"));
    assert!(with(5, reply(opt::GO, rep::ERR_POLICY, b"not you")).contains("refused: not you"));
    assert!(with(5, reply(opt::GO, rep::ACK, b"")).contains("how large"));
    assert!(with(6, reply(opt::GO, rep::INFO, &[0, 3, 0, 0, 0, 3])).contains("too short"));
    // Not as if it had no contexts: a client that connects again would find less than before, and give up.
    let leaving = reply(opt::SET_META_CONTEXT, rep::ERR_SHUTDOWN, b"");
    assert!(with(3, leaving).contains("shutting down"));
    let mut endless = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
    endless.extend([0, 0, 0, 7, 0, 0, 0, 3, 0xff, 0xff, 0xff, 0xff]);
    assert!(with(5, endless).contains("longer than any sensible"));
    assert!(with(7, Vec::new()).contains("does not finish"));
    let mut tls =
        Canned(Cursor::new([orderly().remove(0), reply(opt::STARTTLS, rep::ERR_POLICY, b"no")].concat()));
    let greeting = begin(&mut tls).expect("greeting");
    assert!(start_tls(&mut tls, greeting).expect_err("no TLS").to_string().contains("does not offer TLS"));
}

const READ: Request = Request { flags: 0, command: cmd::READ, cookie: 1, offset: 4096, len: 1000 };
const STATUS: Request = Request { command: cmd::BLOCK_STATUS, cookie: 2, len: 1 << 20, ..READ };
const WRITE: Request = Request { command: cmd::WRITE, cookie: 3, ..READ };

fn replies(mode: Mode) -> Replies {
    let mut replies = Replies::new(mode, vec![7]);
    for request in [READ, STATUS, WRITE] {
        let buffer = vec![0xee; if request.command == cmd::READ { 1000 } else { 0 }];
        replies.expect(request.cookie, Expected::new(&request, buffer));
    }
    replies
}

fn take(mode: Mode, bytes: &[u8]) -> Result<Vec<Answered>, ProtocolError> {
    let mut answers = Vec::new();
    feed(&mut replies(mode), &mut &bytes[..], &mut answers).map(|()| answers)
}

/// Good answers to the three requests, in `mode`.
fn good(mode: Mode) -> Vec<u8> {
    let mut out = mode.data(&READ).bytes().to_vec();
    out.extend((0..1000).map(|i| i as u8));
    if mode.is_structured() {
        out.extend(mode.status(&STATUS, 7, 2, true).bytes());
        for (len, flags) in [(4096_u64, 0_u64), (1 << 30, 3)] {
            match mode {
                Mode::Extended => out.extend([len.to_be_bytes(), flags.to_be_bytes()].concat()),
                _ => out.extend([(len as u32).to_be_bytes(), (flags as u32).to_be_bytes()].concat()),
            }
        }
    }
    out.extend(mode.error(&WRITE, 28).bytes());
    out
}

#[test]
fn answers_are_taken() {
    for mode in [Mode::Simple, Mode::Structured, Mode::Extended] {
        let answers = take(mode, &good(mode)).expect("good");
        assert!(answers[0].expected.buffer.iter().enumerate().all(|(i, b)| *b == i as u8));
        assert_eq!(answers.last().map(|a| (a.cookie, a.error)), Some((3, Some(28))));
        if mode.is_structured() {
            let runs: Vec<u64> = answers[1].expected.runs[0].1.iter().map(|run| run.len).collect();
            assert_eq!(runs, [4096, (1 << 20) - 4096]);
        }
    }
}

#[test]
fn lies_are_named() {
    let mode = Mode::Structured;
    let head = |kind: u16, flags: u16, cookie: u64, payload: &[u8]| {
        let mut out = 0x668e_33ef_u32.to_be_bytes().to_vec();
        out.extend([flags.to_be_bytes(), kind.to_be_bytes()].concat());
        out.extend(cookie.to_be_bytes());
        out.extend((payload.len() as u32).to_be_bytes());
        out.extend(payload);
        out
    };
    let data = |offset: u64, len: usize| [&offset.to_be_bytes()[..], &vec![1; len]].concat();
    let hole = |offset: u64, len: u32| [&offset.to_be_bytes()[..], &len.to_be_bytes()].concat();
    let why = |bytes: &[u8]| take(mode, bytes).expect_err("a lie").0;
    assert!(why(&head(chunk::NONE, 1, 99, b"")).contains("not under way"));
    assert!(why(&head(chunk::NONE, 1, 1, b"")).contains("in part"));
    assert!(why(&head(chunk::OFFSET_DATA, 0, 1, &data(4095, 2))).contains("outside"));
    assert!(why(&head(chunk::OFFSET_DATA, 0, 1, &data(4096, 1001))).contains("outside"));
    assert!(why(&head(chunk::OFFSET_HOLE, 0, 1, &hole(u64::MAX, 1000))).contains("outside"));
    assert!(why(&head(chunk::OFFSET_DATA, 0, 2, &data(4096, 2))).contains("does not fit"));
    assert!(
        why(&head(chunk::BLOCK_STATUS, 1, 2, &[0, 0, 0, 9, 0, 0, 1, 0, 0, 0, 0, 0])).contains("not asked")
    );
    assert!(
        why(&head(chunk::BLOCK_STATUS, 1, 2, &[0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0]))
            .contains("without length")
    );
    assert!(why(&head(chunk::NONE, 1, 2, b"")).contains("without all its contexts"));
    assert!(why(&head(chunk::ERROR, 1, 1, &[0; 6])).contains("without a value"));
    let twice = head(chunk::OFFSET_HOLE, 0, 1, &hole(4096, 600)).repeat(2);
    assert!(why(&twice).contains("before"));
    // A part as data, the rest as a hole: whole.
    let both =
        [head(chunk::OFFSET_HOLE, 0, 1, &hole(4096, 600)), head(chunk::OFFSET_DATA, 1, 1, &data(4696, 400))];
    let answers = take(mode, &both.concat()).expect("whole");
    assert_eq!(answers[0].expected.buffer, [vec![0; 600], vec![1; 400]].concat());
}

proptest! {
    #[test]
    fn any_bytes_are_answered(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        for mode in [Mode::Simple, Mode::Structured, Mode::Extended] {
            let _ = take(mode, &bytes);
        }
        let _ = talk(bytes.clone());
        let mut behind_greeting = orderly().remove(0);
        behind_greeting.extend(&bytes);
        let _ = talk(behind_greeting);
    }

    #[test]
    fn damaged_answers_are_answered(at in 0_usize..1200, to: u8, cut in 0_usize..1400) {
        for mode in [Mode::Simple, Mode::Structured, Mode::Extended] {
            let mut bytes = good(mode);
            if let Some(byte) = bytes.get_mut(at) {
                *byte = to;
            }
            bytes.truncate(cut.max(1));
            let _ = take(mode, &bytes);
        }
        let mut bytes = orderly().concat();
        if let Some(byte) = bytes.get_mut(at % 300) {
            *byte = to;
        }
        let _ = talk(bytes);
    }
}
