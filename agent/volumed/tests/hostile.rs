//! Clients that lie, vanish, dawdle or swarm harm only themselves.

mod common;

use std::{
    fs,
    io::{Read, Write},
    os::unix::net::UnixStream,
    time::Duration,
};

use common::{Serving, image, noise, volumed};
use serio_nbd::{
    handshake::{GREETING_BYTES, OptionHeader},
    wire::{Mode, PAYLOAD_BYTES_MAX, Request, cmd, opt},
};
use tempfile::TempDir;

fn connect(serving: &Serving) -> UnixStream {
    let stream = UnixStream::connect(&serving.socket).expect("connect");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("timeout");
    stream
}

/// A client that has its place: the server takes a moment to notice that others are gone.
fn greeted(serving: &Serving) -> UnixStream {
    let started = std::time::Instant::now();
    loop {
        let mut stream = connect(serving);
        if stream.read_exact(&mut [0; GREETING_BYTES]).is_ok() {
            return stream;
        }
        assert!(started.elapsed() < Duration::from_secs(20), "gone clients keep their places");
    }
}

/// A client in the transmission phase, with simple replies.
fn ready(serving: &Serving) -> UnixStream {
    let mut stream = greeted(serving);
    stream.write_all(&[0, 0, 0, 3]).expect("flags");
    stream.write_all(&OptionHeader::encode(opt::EXPORT_NAME, b"")).expect("option");
    let mut answer = [0; 10];
    stream.read_exact(&mut answer).expect("export");
    stream
}

fn request(command: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    Request { flags: 0, command, cookie, offset, len: len.into() }.encode(Mode::Simple).bytes().to_vec()
}

/// The error of the next simple reply, whose cookie must be `cookie`.
fn reply(stream: &mut UnixStream, cookie: u64) -> u32 {
    let mut bytes = [0; 16];
    stream.read_exact(&mut bytes).expect("reply");
    assert_eq!(bytes[8..], cookie.to_be_bytes());
    u32::from_be_bytes(bytes[4..8].try_into().expect("four"))
}

fn still_fine(serving: &Serving, expected: &[u8]) {
    let mut stream = ready(serving);
    stream.write_all(&request(cmd::READ, 7, 0, expected.len() as u32)).expect("read");
    assert_eq!(reply(&mut stream, 7), 0);
    let mut got = vec![0; expected.len()];
    stream.read_exact(&mut got).expect("data");
    assert!(got == expected);
}

fn resident_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).expect("VmRSS");
    line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("a number")
}

#[test]
fn garbage_and_vanishing_clients_harm_nobody() {
    let temp = TempDir::new().expect("tempdir");
    let disk = temp.path().join("raw");
    fs::write(&disk, image()).expect("write");
    let serving = Serving::start(&disk, &temp.path().join("s"), &["--max-clients", "8"]);
    let expected = noise(8192, 1);
    for seed in 0..60 {
        let mut stream = greeted(&serving);
        // The server may hang up half way: that is its right.
        let _ = stream.write_all(&noise(seed as usize * 13, seed));
        drop(stream);
        let mut stream = ready(&serving);
        let _ = match seed % 3 {
            0 => stream.write_all(&noise(100, seed)),
            // A write whose payload never comes, and a read that nobody waits for.
            1 => stream.write_all(&request(cmd::WRITE, 1, 0, 1 << 20)),
            _ => stream.write_all(&request(cmd::READ, 1, 0, PAYLOAD_BYTES_MAX)),
        };
    }
    still_fine(&serving, &expected);
}

#[test]
fn a_client_that_reads_no_replies_holds_bounded_memory() {
    let temp = TempDir::new().expect("tempdir");
    let disk = temp.path().join("raw");
    fs::write(&disk, image()).expect("write");
    let serving = Serving::start(&disk, &temp.path().join("s"), &[]);
    let mut greedy = ready(&serving);
    greedy.set_nonblocking(true).expect("nonblocking");
    let mut asked: u64 = 0;
    while greedy.write(&request(cmd::READ, asked, 0, 1 << 20)).is_ok_and(|n| n == 28) {
        asked += 1;
    }
    assert!(asked > 100, "{asked}");
    still_fine(&serving, &noise(8192, 1));
    let kib = resident_kib(serving.pid());
    assert!(kib < 120 << 10, "{kib} KiB");
    // It is not forgotten either: all it asked for comes when it reads at last.
    greedy.set_nonblocking(false).expect("blocking");
    let mut data = vec![0; 1 << 20];
    for _ in 0..asked {
        greedy.read_exact(&mut [0; 16]).expect("reply");
        greedy.read_exact(&mut data).expect("data");
    }
    drop(greedy);
}

#[test]
fn a_flood_of_small_requests_is_answered_whole() {
    let temp = TempDir::new().expect("tempdir");
    let disk = temp.path().join("raw");
    fs::write(&disk, image()).expect("write");
    let serving = Serving::start(&disk, &temp.path().join("s"), &[]);
    let mut stream = ready(&serving);
    // More than fit into the server's buffer at once, in one write, and answered without the disk.
    let count = 10_000;
    let flood: Vec<u8> = (0..count).flat_map(|cookie| request(cmd::CACHE, cookie, 0, 4096)).collect();
    let mut writer = stream.try_clone().expect("clone");
    let sender = std::thread::spawn(move || writer.write_all(&flood).expect("flood"));
    for cookie in 0..count {
        assert_eq!(reply(&mut stream, cookie), 0);
    }
    sender.join().expect("sender");
    // And large ones, which fill all the memory of the connection again and again.
    for cookie in 0..100 {
        stream.write_all(&request(cmd::READ, cookie, 0, 5 << 20)).expect("read");
    }
    let mut seen = [false; 100];
    let mut data = vec![0; 5 << 20];
    for _ in 0..100 {
        let mut head = [0; 16];
        stream.read_exact(&mut head).expect("reply");
        seen[usize::from(head[15])] = true;
        stream.read_exact(&mut data).expect("data");
    }
    assert!(seen.iter().all(|s| *s));
}

#[test]
fn bad_requests_are_answered_and_the_stream_goes_on() {
    let temp = TempDir::new().expect("tempdir");
    let volume = temp.path().join("vol");
    volumed(&["create", volume.to_str().expect("text"), "--size", "1MiB"]);
    let serving = Serving::start(&volume, &temp.path().join("s"), &[]);
    let mut stream = ready(&serving);
    let end = 1 << 20;
    for (i, (command, offset, len, error)) in [
        (cmd::READ, end, 1, 22),
        (cmd::READ, u64::MAX, 2, 22),
        (cmd::READ, 0, PAYLOAD_BYTES_MAX + 1, 22),
        (cmd::TRIM, end - 1, 2, 22),
        (cmd::WRITE_ZEROES, end, 1, 28),
        (cmd::BLOCK_STATUS, 0, 1, 22),
        (99, 0, 0, 22),
        (cmd::FLUSH, 0, 0, 0),
    ]
    .into_iter()
    .enumerate()
    {
        stream.write_all(&request(command, i as u64, offset, len)).expect("request");
        assert_eq!(reply(&mut stream, i as u64), error, "request {i}");
    }
    // A write that is refused still has its payload, which must be skipped.
    stream.write_all(&request(cmd::WRITE, 50, end, 3000)).expect("request");
    stream.write_all(&noise(3000, 3)).expect("payload");
    assert_eq!(reply(&mut stream, 50), 28);
    stream.write_all(&request(cmd::WRITE, 51, 100, 3000)).expect("request");
    for part in noise(3000, 4).chunks(7) {
        stream.write_all(part).expect("payload");
    }
    assert_eq!(reply(&mut stream, 51), 0);
    stream.write_all(&request(cmd::DISC, 52, 0, 0)).expect("goodbye");
    assert_eq!(stream.read(&mut [0; 1]).expect("end"), 0);
    let mut expected = vec![0; 4000];
    expected[100..3100].copy_from_slice(&noise(3000, 4));
    still_fine(&serving, &expected);
}

#[test]
fn the_longest_idle_client_makes_room() {
    let temp = TempDir::new().expect("tempdir");
    let disk = temp.path().join("raw");
    fs::write(&disk, image()).expect("write");
    let serving = Serving::start(&disk, &temp.path().join("s"), &["--max-clients", "2"]);
    let (mut first, mut second) = (ready(&serving), ready(&serving));
    for stream in [&mut second, &mut first] {
        stream.write_all(&request(cmd::FLUSH, 1, 0, 0)).expect("flush");
        assert_eq!(reply(stream, 1), 0);
    }
    // Which of the two has been idle longer is decided within microseconds; that one has, and the other stays.
    let mut third = ready(&serving);
    let mut stayed = 0;
    for stream in [&mut first, &mut second, &mut third] {
        let sent = stream.write_all(&request(cmd::FLUSH, 2, 0, 0));
        stayed += usize::from(sent.is_ok() && matches!(stream.read(&mut [0; 16]), Ok(16)));
    }
    assert_eq!(stayed, 2);
    still_fine(&serving, &noise(8192, 1));
}

#[test]
fn a_swarm_of_silent_clients_keeps_nobody_out() {
    let temp = TempDir::new().expect("tempdir");
    let disk = temp.path().join("raw");
    fs::write(&disk, image()).expect("write");
    let serving = Serving::start(&disk, &temp.path().join("s"), &[]);
    let expected = noise(8192, 1);
    still_fine(&serving, &expected);
    let mut swarm = Vec::new();
    for i in 0..2000 {
        swarm.push(connect(&serving));
        if i % 400 == 0 {
            still_fine(&serving, &expected);
        }
    }
    still_fine(&serving, &expected);
    let status = fs::read_to_string(format!("/proc/{}/status", serving.pid())).expect("status");
    let threads = status.lines().find_map(|l| l.strip_prefix("Threads:")).expect("Threads");
    assert!(threads.trim().parse::<u32>().expect("a number") < 120, "{threads}");
    let kib = resident_kib(serving.pid());
    assert!(kib < 40 << 10, "{kib} KiB");
    drop(swarm);
    still_fine(&serving, &expected);
}

#[test]
fn once_is_over_when_the_first_user_has_gone() {
    let temp = TempDir::new().expect("tempdir");
    let disk = temp.path().join("raw");
    fs::write(&disk, image()).expect("write");
    let mut serving = Serving::start(&disk, &temp.path().join("s"), &["--once"]);
    // One that looks and leaves, one that breaks off: neither was served.
    let mut look = greeted(&serving);
    look.write_all(&[0, 0, 0, 3]).expect("flags");
    look.write_all(&OptionHeader::encode(opt::ABORT, &[])).expect("abort");
    drop((look, ready(&serving)));
    let (mut first, mut second) = (ready(&serving), ready(&serving));
    first.write_all(&request(cmd::DISC, 0, 0, 0)).expect("goodbye");
    assert_eq!(first.read(&mut [0; 1]).expect("closed"), 0);
    second.write_all(&request(cmd::FLUSH, 2, 0, 0)).expect("flush");
    assert_eq!(reply(&mut second, 2), 0, "another connection of it is still there");
    second.write_all(&request(cmd::DISC, 0, 0, 0)).expect("goodbye");
    assert!(serving.ends().success());
}

#[test]
fn the_command_line_says_what_is_wrong() {
    let temp = TempDir::new().expect("tempdir");
    let volume = temp.path().join("vol");
    let path = volume.to_str().expect("text");
    let fails = |args: &[&str]| {
        let output = std::process::Command::new(common::BIN).args(args).output().expect("run");
        assert!(!output.status.success(), "{args:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    assert!(fails(&["info", path]).contains("is not a volume directory"));
    assert!(fails(&["import", path, "/nonexistent"]).contains("cannot open the image"));
    assert!(!volume.exists(), "nothing half-made");
    assert!(fails(&["import", path, "x", "--format", "vhdx"]).contains("raw, qcow2 and vmdk are"));
    volumed(&["create", path, "--size", "1MiB"]);
    assert!(fails(&["create", path, "--size", "1MiB"]).contains("holds a volume already"));
    let socket = temp.path().join("s");
    let serving = Serving::start(&volume, &socket, &[]);
    assert!(fails(&["snapshot", path, "x"]).contains("in use by another process"));
    assert!(fails(&["serve", path, "--socket", socket.to_str().expect("text")]).contains("in use"));
    drop(serving);
    assert!(!socket.exists());
    volumed(&["snapshot", path, "x"]);
    assert!(fails(&["snapshot", path, "x"]).contains("has it already"));
    let output = volumed(&["info", path, "--json"]);
    let info: serde_json::Value = serde_json::from_slice(&output.stdout).expect("json");
    assert_eq!((&info["size_bytes"], &info["layers"]), (&(1 << 20).into(), &2.into()));
    assert_eq!(info["snapshots"][0]["name"], "x");
}
