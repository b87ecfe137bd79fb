//! Every way in which a handshake or a request can be wrong, byte by byte, against what `doc/proto.md` says; and
//! nbdsh's own checks of an export.

mod common;

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    time::Duration,
};

use common::{Serving, have, noise, volumed};
use serio_nbd::{
    handshake::{GREETING_BYTES, OptionHeader, REPLY_HEADER_BYTES},
    wire::{Fields, Mode, REQUEST_MAGIC, Request, cmd, cmd_flag, flag, opt, rep},
};
use tempfile::TempDir;

struct Session {
    stream: UnixStream,
}

impl Session {
    fn start(serving: &Serving, flags: u32) -> Session {
        let stream = UnixStream::connect(&serving.socket).expect("connect");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("timeout");
        let mut session = Session { stream };
        session.bytes(GREETING_BYTES);
        session.write(&flags.to_be_bytes());
        session
    }

    fn write(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("write");
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes).expect("read");
        bytes
    }

    /// The kinds of the replies to an option, up to the last, and the last one's payload.
    fn option(&mut self, option: u32, payload: &[u8]) -> (Vec<u32>, Vec<u8>) {
        self.write(&OptionHeader::encode(option, payload));
        let mut kinds = Vec::new();
        loop {
            let head = self.bytes(REPLY_HEADER_BYTES);
            let mut fields = Fields(&head[8..]);
            assert_eq!(fields.u32(), Some(option));
            let (kind, len) = (fields.u32().expect("kind"), fields.u32().expect("length"));
            let payload = self.bytes(len as usize);
            kinds.push(kind);
            if kind == rep::ACK || kind >> 31 == 1 {
                return (kinds, payload);
            }
        }
    }

    fn is_closed(&mut self) -> bool {
        // A close with unread bytes is a reset.
        !matches!(self.stream.read(&mut [0; 1]), Ok(1))
    }

    /// The error of a simple reply.
    fn ask(&mut self, command: u16, flags: u16, offset: u64, len: u64) -> u32 {
        let request = Request { flags, command, cookie: 5, offset, len };
        self.write(request.encode(Mode::Simple).bytes());
        let reply = self.bytes(16);
        u32::from_be_bytes(reply[4..8].try_into().expect("four"))
    }
}

fn serving(temp: &TempDir, more: &[&str]) -> Serving {
    let volume = temp.path().join("vol");
    volumed(&["create", volume.to_str().expect("text"), "--size", "1MiB"]);
    let mut args = vec!["--export-name", "disk"];
    args.extend(more);
    Serving::start(&volume, &temp.path().join("s"), &args)
}

fn go(name: &str) -> Vec<u8> {
    [&(name.len() as u32).to_be_bytes()[..], name.as_bytes(), &[0, 0]].concat()
}

#[test]
fn handshakes_that_are_wrong() {
    let temp = TempDir::new().expect("tempdir");
    let serving = serving(&temp, &[]);
    let mut session = Session::start(&serving, 3);
    for (option, payload, kind) in [
        (opt::STARTTLS, vec![], rep::ERR_UNSUP),
        (4, vec![], rep::ERR_UNSUP),
        (0xdead_beef, noise(5000, 1), rep::ERR_UNSUP),
        (opt::LIST, vec![1], rep::ERR_INVALID),
        (opt::STRUCTURED_REPLY, vec![1], rep::ERR_INVALID),
        (opt::EXTENDED_HEADERS, vec![1], rep::ERR_INVALID),
        (opt::SET_META_CONTEXT, go("disk"), rep::ERR_INVALID),
        (opt::GO, vec![], rep::ERR_INVALID),
        (opt::GO, go("nope"), rep::ERR_UNKNOWN),
        (opt::GO, [&9000u32.to_be_bytes()[..], &noise(9000, 1), &[0, 0]].concat(), rep::ERR_INVALID),
        (opt::INFO, go("disk")[..8].to_vec(), rep::ERR_INVALID),
        (opt::INFO, b"\0\0\0\x04d\0sk\0\0".to_vec(), rep::ERR_INVALID),
    ] {
        let (kinds, _) = session.option(option, &payload);
        assert_eq!(kinds, [kind], "option {option}");
    }
    // And nothing of that is held against it.
    assert_eq!(session.option(opt::LIST, &[]).0, [rep::SERVER, rep::ACK]);
    assert_eq!(session.option(opt::INFO, &go("disk")).0, [rep::INFO, rep::ACK]);
    assert_eq!(session.option(opt::GO, &go("disk")).0, [rep::INFO, rep::ACK]);
    assert_eq!(session.ask(cmd::FLUSH, 0, 0, 0), 0);

    // These end it.
    assert!(Session::start(&serving, 4).is_closed(), "unknown flags");
    for bytes in [
        noise(16, 9),
        [&OptionHeader::encode(opt::GO, &[])[..12], &(1u32 << 20).to_be_bytes()].concat(),
        OptionHeader::encode(opt::EXPORT_NAME, b"nope"),
        OptionHeader::encode(opt::EXPORT_NAME, &[0xff, 0xfe]),
    ] {
        let mut session = Session::start(&serving, 3);
        session.write(&bytes);
        assert!(session.is_closed(), "{bytes:?}");
    }
    let mut session = Session::start(&serving, 3);
    assert_eq!(session.option(opt::ABORT, &[]).0, [rep::ACK]);
    assert!(session.is_closed());
}

#[test]
fn the_old_way_in() {
    let temp = TempDir::new().expect("tempdir");
    let serving = serving(&temp, &[]);
    // As old clients do: no flag for leaving out the zeros, and none at all.
    for (flags, zeros) in [(3, 0), (1, 124), (0, 124)] {
        let mut session = Session::start(&serving, flags);
        session.write(&OptionHeader::encode(opt::EXPORT_NAME, b"disk"));
        let answer = session.bytes(10 + zeros);
        assert_eq!(answer[..8], (1u64 << 20).to_be_bytes());
        let offered = u16::from_be_bytes([answer[8], answer[9]]);
        assert_eq!(
            offered & (flag::HAS_FLAGS | flag::SEND_DF | flag::SEND_FLUSH),
            flag::HAS_FLAGS | flag::SEND_FLUSH
        );
        assert!(answer[10..].iter().all(|b| *b == 0));
        assert_eq!(session.ask(cmd::TRIM, cmd_flag::FUA, 0, 4096), 0);
    }
}

#[test]
fn contexts_are_listed_by_name_and_by_kind() {
    let temp = TempDir::new().expect("tempdir");
    let volume = temp.path().join("vol");
    let name = volume.to_str().expect("text");
    volumed(&["create", name, "--size", "1MiB"]);
    for snapshot in ["a", "b"] {
        volumed(&["snapshot", name, snapshot]);
    }
    let serving = Serving::start(&volume, &temp.path().join("s"), &[]);
    let mut session = Session::start(&serving, 3);
    assert_eq!(session.option(opt::STRUCTURED_REPLY, &[]).0, [rep::ACK]);
    let ask = |queries: &[&str]| {
        let mut payload = [0u32.to_be_bytes(), (queries.len() as u32).to_be_bytes()].concat();
        for query in queries {
            payload.extend((query.len() as u32).to_be_bytes());
            payload.extend(query.bytes());
        }
        payload
    };
    for (option, queries, found) in [
        (opt::LIST_META_CONTEXT, &[][..], 3),
        (opt::LIST_META_CONTEXT, &["base:"], 1),
        (opt::LIST_META_CONTEXT, &["qemu:"], 2),
        (opt::LIST_META_CONTEXT, &["qemu:dirty-bitmap:"], 2),
        (opt::LIST_META_CONTEXT, &["qemu:dirty-bitmap:b", "x-other:"], 1),
        (opt::LIST_META_CONTEXT, &["qemu:allocation-depth"], 0),
        // Wildcards list, and select nothing.
        (opt::SET_META_CONTEXT, &["qemu:", "base:"], 0),
        (opt::SET_META_CONTEXT, &[], 0),
        (opt::SET_META_CONTEXT, &["base:allocation", "qemu:dirty-bitmap:a", "base:allocation"], 2),
    ] {
        let (kinds, _) = session.option(option, &ask(queries));
        assert_eq!(kinds.len() - 1, found, "{queries:?}");
        assert_eq!(kinds.last(), Some(&rep::ACK));
    }
    let mut endless = ask(&["base:"]);
    endless[4..8].copy_from_slice(&u32::MAX.to_be_bytes());
    assert_eq!(session.option(opt::LIST_META_CONTEXT, &endless).0, [rep::ERR_INVALID]);
}

#[test]
fn requests_that_are_wrong() {
    let temp = TempDir::new().expect("tempdir");
    let serving = serving(&temp, &[]);
    let mut session = Session::start(&serving, 3);
    assert_eq!(session.option(opt::GO, &go("disk")).0, [rep::INFO, rep::ACK]);
    let end = 1 << 20;
    for (command, flags, offset, len, error) in [
        (cmd::READ, cmd_flag::DF, 0, 512, 22),
        (cmd::READ, cmd_flag::REQ_ONE, 0, 512, 22),
        (cmd::READ, 1 << 15, 0, 512, 22),
        (cmd::READ, 0, 0, 0, 22),
        (cmd::READ, 0, 0, u64::from(u32::MAX), 22),
        (cmd::READ, 0, u64::MAX, 1, 22),
        (cmd::TRIM, cmd_flag::NO_HOLE, 0, 512, 22),
        (cmd::TRIM, 0, end, 512, 22),
        (cmd::WRITE_ZEROES, 0, end - 1, 2, 28),
        (cmd::WRITE_ZEROES, cmd_flag::DF, 0, 1, 22),
        (cmd::CACHE, 0, end, 1, 22),
        (cmd::BLOCK_STATUS, 0, 0, 512, 22),
        (8, 0, 0, 0, 22),
        (u16::MAX, 0, 0, 0, 22),
        // Right, if odd: unaligned, and empty changes.
        (cmd::WRITE_ZEROES, cmd_flag::NO_HOLE | cmd_flag::FUA, 4095, 3, 0),
        (cmd::TRIM, 0, 0, 0, 0),
        (cmd::CACHE, cmd_flag::FUA, 1, 7, 0),
    ] {
        assert_eq!(session.ask(command, flags, offset, len), error, "{command} {flags} {offset} {len}");
    }
    // In one piece: the server hangs up as soon as it has read the magic, and a second write might not get through.
    let mut request = [0; 28];
    request[..4].copy_from_slice(&(REQUEST_MAGIC + 1).to_be_bytes());
    session.write(&request);
    assert!(session.is_closed(), "wrong magic");
}

#[test]
fn nbdsh_goes_through_an_export() {
    if !have("nbdsh") {
        return;
    }
    let temp = TempDir::new().expect("tempdir");
    let serving = serving(&temp, &[]);
    let script = format!(
        r#"
import errno
path = "{}"
def refused(f, *wanted):
    try:
        f()
    except nbd.Error as e:
        assert e.errnum in wanted, (e.errnum, wanted)
        return
    raise AssertionError("not refused")
h.set_opt_mode(True)
h.connect_unix(path)
names = []
h.opt_list(lambda name, desc: names.append(name))
assert names == ["disk"], names
h.set_export_name("disk")
found = []
h.add_meta_context("base:")
h.opt_list_meta_context(lambda name: found.append(name))
assert found == ["base:allocation"], found
h.clear_meta_contexts()
h.opt_info()
assert h.get_size() == 1 << 20 and h.can_df() and h.can_multi_conn() and h.can_fast_zero()
assert (h.get_block_size(nbd.SIZE_MINIMUM), h.get_block_size(nbd.SIZE_MAXIMUM)) == (1, 32 << 20)
h.opt_go()
h.set_strict_mode(0)
data = bytes(range(251)) * 1000
h.pwrite(data, 1234, nbd.CMD_FLAG_FUA)
assert h.pread(len(data), 1234) == data
chunks = []
def chunk(buf, offset, status, err):
    chunks.append((offset, len(buf), status))
whole = h.pread_structured(1 << 20, 0, chunk)
assert whole[1234:1234 + len(data)] == data and not any(whole[:1234]) and len(whole) == 1 << 20
assert sum(size for _, size, _ in chunks) == 1 << 20 or any(s == nbd.READ_HOLE for _, _, s in chunks), chunks
refused(lambda: h.pwrite(b"x", 1 << 20), errno.ENOSPC)
refused(lambda: h.zero(2, (1 << 20) - 1), errno.ENOSPC)
refused(lambda: h.trim(2, (1 << 20) - 1), errno.EINVAL)
refused(lambda: h.pread(2, (1 << 20) - 1), errno.EINVAL)
h.zero(1 << 20, 0, nbd.CMD_FLAG_NO_HOLE)
assert not any(h.pread(1 << 20, 0))
for size, flags in ((3 << 20, 0), (64 << 10, nbd.CMD_FLAG_DF)):
    if size > 1 << 20:
        refused(lambda: h.pread(size, 0), errno.EINVAL)
    else:
        assert len(h.pread(size, 1, flags)) == size
h.flush()
h.shutdown()
"#,
        serving.socket.display()
    );
    let output =
        std::process::Command::new("nbdsh").args(["-c", &script]).env("PATH", "/usr/bin:/bin").output();
    let output = output.expect("nbdsh");
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("No module named nbd") {
        println!("skipped: python3-libnbd is not installed");
        return;
    }
    assert!(output.status.success(), "{said}");
    assert!(serving.stop().success());
}
