//! The handshake against what `doc/proto.md` says, and against any bytes.

use proptest::prelude::*;

use super::*;

fn exports() -> Vec<ExportInfo> {
    let info = |name: &str, read_only| ExportInfo {
        name: name.into(),
        description: String::new(),
        size_bytes: 1 << 20,
        read_only,
        releases: false,
        fast_zeroes: true,
        contexts: vec!["base:allocation".into()],
    };
    vec![info("disk", false), info("point", true)]
}

/// Replies as (kind, payload).
fn replies(mut out: &[u8]) -> Vec<(u32, Vec<u8>)> {
    let mut found = Vec::new();
    while !out.is_empty() {
        let mut fields = Fields(out);
        assert_eq!(fields.u64(), Some(OPTION_REPLY_MAGIC));
        let (_, kind, len) = (fields.u32(), fields.u32().expect("kind"), fields.u32().expect("len"));
        found.push((kind, fields.bytes(len as usize).expect("payload").to_vec()));
        out = fields.0;
    }
    found
}

fn named(name: &str, rest: &[u8]) -> Vec<u8> {
    let mut payload = (name.len() as u32).to_be_bytes().to_vec();
    payload.extend_from_slice(name.as_bytes());
    payload.extend_from_slice(rest);
    payload
}

fn queries(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut rest = (queries.len() as u32).to_be_bytes().to_vec();
    for query in queries {
        rest.extend(named(query, &[]));
    }
    named(name, &rest)
}

struct Client<'a> {
    machine: Handshake<'a>,
}

impl Client<'_> {
    fn send(&mut self, option: u32, payload: &[u8]) -> (Result<Option<Negotiated>, HandshakeError>, Vec<u8>) {
        let mut out = Vec::new();
        let result = self.machine.advance(&mut OptionHeader::encode(option, payload), &mut out);
        (result, out)
    }
}

fn client(exports: &[ExportInfo]) -> Client<'_> {
    let mut machine = Handshake::new(exports);
    assert_eq!(machine.advance(&mut vec![0, 0, 0, 3], &mut Vec::new()), Ok(None));
    Client { machine }
}

#[test]
fn a_client_goes_with_contexts() {
    let exports = exports();
    let mut client = client(&exports);
    let kinds = |out: &[u8]| replies(out).into_iter().map(|r| r.0).collect::<Vec<_>>();
    let set = queries("disk", &["base:allocation", "other:x"]);
    assert_eq!(kinds(&client.send(opt::SET_META_CONTEXT, &set).1), [rep::ERR_INVALID]);
    assert_eq!(kinds(&client.send(opt::STRUCTURED_REPLY, &[]).1), [rep::ACK]);
    assert_eq!(kinds(&client.send(opt::LIST, &[]).1), [rep::SERVER, rep::SERVER, rep::ACK]);
    let all = queries("disk", &["base:"]);
    assert_eq!(kinds(&client.send(opt::LIST_META_CONTEXT, &all).1), [rep::META_CONTEXT, rep::ACK]);
    assert_eq!(kinds(&client.send(opt::SET_META_CONTEXT, &set).1), [rep::META_CONTEXT, rep::ACK]);
    let (_, listed) = client.send(opt::LIST_META_CONTEXT, &queries("disk", &[]));
    assert_eq!(replies(&listed)[0].1[..4], [0; 4], "an id means nothing in a list");
    let (_, out) = client.send(opt::INFO, &named("disk", &[0, 1, 0, 3]));
    let infos = replies(&out);
    assert_eq!(infos.iter().map(|r| r.0).collect::<Vec<_>>(), [rep::INFO, rep::INFO, rep::ACK]);
    let flags = u16::from_be_bytes([infos[0].1[10], infos[0].1[11]]);
    assert_eq!(flags & flag::READ_ONLY, 0);
    assert_ne!(flags & flag::SEND_DF, 0);
    assert_eq!(kinds(&client.send(opt::GO, &named("nope", &[0, 0])).1), [rep::ERR_UNKNOWN]);
    let (result, _) = client.send(opt::GO, &named("disk", &[0, 0]));
    assert_eq!(result, Ok(Some(Negotiated { export: 0, mode: Mode::Structured, contexts: vec![0] })));
}

#[test]
fn extended_headers_include_structured_replies_and_stay() {
    let exports = exports();
    for first in [&[][..], &[opt::STRUCTURED_REPLY]] {
        let mut client = client(&exports);
        let mut kind = |option| replies(&client.send(option, &[]).1)[0].0;
        for option in first {
            assert_eq!(kind(*option), rep::ACK);
            assert_eq!(kind(*option), rep::ERR_INVALID, "twice");
        }
        assert_eq!(kind(opt::EXTENDED_HEADERS), rep::ACK);
        assert_eq!(kind(opt::EXTENDED_HEADERS), rep::ERR_INVALID, "twice");
        assert_eq!(kind(opt::STRUCTURED_REPLY), rep::ERR_EXT_HEADER_REQD);
        client.send(opt::SET_META_CONTEXT, &queries("disk", &["base:allocation"])).0.expect("ack");
        let (result, _) = client.send(opt::GO, &named("disk", &[0, 0]));
        assert_eq!(result, Ok(Some(Negotiated { export: 0, mode: Mode::Extended, contexts: vec![0] })));
    }
}

#[test]
fn contexts_of_another_export_do_not_count() {
    let exports = exports();
    let mut client = client(&exports);
    client.send(opt::STRUCTURED_REPLY, &[]).0.expect("ack");
    client.send(opt::SET_META_CONTEXT, &queries("disk", &["base:allocation"])).0.expect("ack");
    let (result, _) = client.send(opt::GO, &named("point", &[0, 0]));
    assert_eq!(result, Ok(Some(Negotiated { export: 1, mode: Mode::Structured, contexts: vec![] })));
}

#[test]
fn old_options_and_errors() {
    let exports = exports();
    let (result, out) = client(&exports).send(opt::EXPORT_NAME, b"point");
    assert!(matches!(result, Ok(Some(Negotiated { export: 1, mode: Mode::Simple, .. }))));
    assert_eq!(out.len(), 10, "no zeroes, as the client asked");
    let (result, _) = client(&exports).send(opt::EXPORT_NAME, b"nope");
    assert_eq!(result, Err(HandshakeError::UnknownExport));
    let (result, out) = client(&exports).send(opt::ABORT, &[]);
    assert_eq!((result, replies(&out)[0].0), (Err(HandshakeError::Aborted), rep::ACK));
    for (option, payload, answer) in [
        (opt::STARTTLS, &b""[..], rep::ERR_UNSUP),
        (opt::EXTENDED_HEADERS, b"x", rep::ERR_INVALID),
        (77, b"whatever", rep::ERR_UNSUP),
        (opt::LIST, b"x", rep::ERR_INVALID),
        (opt::GO, b"", rep::ERR_INVALID),
        (opt::GO, b"\xff\xff\xff\xff", rep::ERR_INVALID),
        (opt::GO, b"\0\0\0\x04disk\0\x09\0\0", rep::ERR_INVALID),
        (opt::GO, b"\0\0\0\x04di\0k\0\0", rep::ERR_INVALID),
    ] {
        let (result, out) = client(&exports).send(option, payload);
        assert_eq!((result, replies(&out)[0].0), (Ok(None), answer), "option {option}");
    }
    let full = || Handshake::new(&exports).admitting(&|| false);
    let flags = vec![0, 0, 0, 3];
    let ask = |option, payload: &[u8]| [flags.clone(), OptionHeader::encode(option, payload)].concat();
    let mut out = Vec::new();
    assert_eq!(full().advance(&mut ask(opt::GO, &named("disk", &[0, 0])), &mut out), Ok(None));
    assert_eq!(replies(&out)[0].0, rep::ERR_POLICY, "no place is free");
    assert_eq!(full().advance(&mut ask(opt::EXPORT_NAME, b"disk"), &mut out), Err(HandshakeError::Full));
    let mut machine = Handshake::new(&exports);
    assert!(machine.advance(&mut vec![0, 0, 0, 4], &mut Vec::new()).is_err());
    let too_long = OptionHeader { option: opt::GO, len: OPTION_BYTES_MAX + 1 };
    let mut bytes = OptionHeader::encode(too_long.option, &[]);
    bytes[12..].copy_from_slice(&too_long.len.to_be_bytes());
    assert!(client(&exports).machine.advance(&mut bytes, &mut Vec::new()).is_err());
}

proptest! {
    #[test]
    fn any_options_are_answered(
        options in proptest::collection::vec((0u32..14, proptest::collection::vec(any::<u8>(), 0..64)), 0..20),
        cut in 1usize..30,
    ) {
        let exports = exports();
        let mut machine = Handshake::new(&exports);
        let mut bytes = vec![0, 0, 0, 3];
        for (option, payload) in &options {
            bytes.extend(OptionHeader::encode(*option, payload));
        }
        let (mut input, mut out) = (Vec::new(), Vec::new());
        for part in bytes.chunks(cut) {
            input.extend_from_slice(part);
            if !matches!(machine.advance(&mut input, &mut out), Ok(None)) {
                break;
            }
        }
    }

    #[test]
    fn names_come_back(name in "[a-zA-Z0-9ä]{0,40}", infos in proptest::collection::vec(any::<u16>(), 0..5)) {
        let mut rest = (infos.len() as u16).to_be_bytes().to_vec();
        rest.extend(infos.iter().flat_map(|i| i.to_be_bytes()));
        let payload = named(&name, &rest);
        prop_assert_eq!(ExportRequest::decode(&payload), Some(ExportRequest { name: &name, infos }));
        prop_assert_eq!(export_name_of(opt::GO, &payload), Some(Ok(name.as_str())));
    }
}
