//! "Newstyle negotiation" of NBD, by the server's own handshake and by the front before and after TLS. The first byte
//! says how the bytes are cut: the answer must not depend on it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use serio_nbd::{ExportInfo, Front, FrontStep, Handshake};

fn exports() -> [ExportInfo; 2] {
    let export = |name: &str, read_only| ExportInfo {
        name: name.into(),
        description: String::new(),
        size_bytes: 1 << 30,
        read_only,
        releases: false,
        fast_zeroes: true,
        contexts: vec!["base:allocation".into(), "qemu:dirty-bitmap:a".into()],
    };
    [export("", true), export("disk", false)]
}

/// What the server has answered, and whether it goes on.
fn handshake(parts: &[&[u8]]) -> (Vec<u8>, String) {
    let exports = exports();
    let (mut input, mut out) = (Vec::new(), Vec::new());
    let mut handshake = Handshake::new(&exports);
    for part in parts {
        input.extend_from_slice(part);
        match handshake.advance(&mut input, &mut out) {
            Ok(None) => {}
            Ok(Some(_)) => return (out, "negotiated".into()),
            Err(e) => return (out, e.to_string()),
        }
    }
    (out, "more".into())
}

fn front(parts: &[&[u8]]) {
    let mut front = Front::new();
    for part in parts {
        let mut bytes = *part;
        loop {
            let step = front.feed(bytes);
            bytes = &[];
            drop(front.take_output());
            match step {
                Ok(FrontStep::Read) => break,
                Ok(FrontStep::StartTls) => front.tls_done(),
                Ok(_) => match front.refuse() {
                    FrontStep::Read => {}
                    _ => return,
                },
                Err(_) => return,
            }
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((cut, bytes)) = data.split_first() else { return };
    let (left, right) = bytes.split_at(usize::from(*cut).min(bytes.len()));
    let whole = handshake(&[bytes]);
    assert_eq!(handshake(&[left, right]), whole);
    front(&[left, right]);
});
