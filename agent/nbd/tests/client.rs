//! The client against strangers' servers: nbdkit with its filters, qemu-nbd, killed and started again under it.

use std::{
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use serio_nbd::{
    client::{Answer, Client, ClientError, Op, Options, Uri},
    wire::{Mode, STATE_HOLE, STATE_ZERO},
};
use tempfile::TempDir;

const SIZE: u64 = 16 << 20;

/// A server, killed without mercy when this is dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn have(tool: &str) -> bool {
    let found = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(tool).is_file()));
    if !found {
        println!("skipped: {tool} is not installed");
    }
    found
}

fn start(socket: &Path, program: &str, args: &[&str]) -> Server {
    let _ = std::fs::remove_file(socket);
    let mut command = Command::new(program);
    command.args(args).stderr(Stdio::null());
    let mut server = Server(command.spawn().expect(program));
    let started = Instant::now();
    while UnixStream::connect(socket).is_err() {
        assert!(server.0.try_wait().expect("wait").is_none(), "{program} {args:?} ended");
        assert!(started.elapsed().as_secs() < 20, "{program} does not listen");
        std::thread::yield_now();
    }
    server
}

fn nbdkit(socket: &Path, args: &[&str]) -> Server {
    let path = socket.to_str().expect("text");
    start(socket, "nbdkit", &[&["-f", "-U", path], args].concat())
}

fn options(socket: &Path) -> Options {
    let uri: Uri = format!("nbd+unix:///?socket={}", socket.display()).parse().expect("uri");
    Options::new(&uri)
}

fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    })
    .take(len)
    .collect()
}

fn place() -> (TempDir, PathBuf) {
    let temp = TempDir::new().expect("tempdir");
    let socket = temp.path().join("s");
    (temp, socket)
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(reason) = source {
        text = format!("{text}: {reason}");
        source = reason.source();
    }
    text
}

/// All that a client does, against a plain array.
fn exercise(client: &Client) {
    let size = usize::try_from(client.size_bytes()).expect("small");
    let mut oracle = vec![0; size];
    let mut state = 7_u64;
    let mut dice = |max: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % max
    };
    for round in 0..60 {
        let offset = dice(size as u64 / 512) * 512;
        let len = ((dice(6000) + 1) * 512).min(size as u64 - offset);
        let range = offset as usize..(offset + len) as usize;
        match dice(5) {
            0 | 1 => {
                let data = noise(len as usize, round);
                client.write(offset, &data).expect("write");
                oracle[range].copy_from_slice(&data);
            }
            2 => {
                client.write_zeroes(offset, len, dice(2) == 0).expect("zeroes");
                oracle[range].fill(0);
            }
            3 => client.flush().expect("flush"),
            _ => {
                let mut got = vec![1; len as usize];
                client.read(offset, &mut got).expect("read");
                assert!(got == oracle[range], "round {round}");
            }
        }
    }
    let mut got = vec![1; size];
    client.read(0, &mut got).expect("read");
    assert!(got == oracle);
    if let Some(context) = client.context("base:allocation") {
        let mut at = 0;
        while at < size as u64 {
            for run in client.status(context, at, size as u64 - at).expect("status") {
                let zero = run.flags & u64::from(STATE_ZERO) != 0;
                let range = at as usize..(at + run.len) as usize;
                assert!(!zero || oracle[range].iter().all(|b| *b == 0), "a hole has data");
                at += run.len;
            }
        }
        assert_eq!(at, size as u64);
    }
    client.trim(0, size as u64).expect("trim");
    client.flush().expect("flush");
}

#[test]
fn nbdkit_in_each_mode() {
    if !have("nbdkit") {
        return;
    }
    let (_temp, socket) = place();
    let _server = nbdkit(&socket, &["memory", "16M"]);
    for mode_max in [Mode::Simple, Mode::Structured, Mode::Extended] {
        let client = Client::connect(Options { mode_max, ..options(&socket) }).expect("connect");
        assert!(mode_max == Mode::Extended || client.terms().mode == mode_max, "{:?}", client.terms());
        exercise(&client);
    }
    let error = Client::connect(Options { export: "x".repeat(5000), ..options(&socket) }).expect_err("long");
    assert!(chain(&error).contains("4096"), "{}", chain(&error));
}

#[test]
fn old_servers_and_none() {
    if !have("nbdkit") {
        return;
    }
    let (_temp, socket) = place();
    let error = Client::connect(options(&socket)).expect_err("nobody");
    assert!(chain(&error).contains("cannot use the NBD server at"), "{}", chain(&error));
    let server = nbdkit(&socket, &["--mask-handshake=0", "memory", "16M"]);
    exercise(&Client::connect(options(&socket)).expect("connect"));
    drop(server);
    let server = nbdkit(&socket, &["--no-sr", "memory", "16M"]);
    exercise(&Client::connect(options(&socket)).expect("connect"));
    drop(server);
    let _server = nbdkit(&socket, &["-o", "memory", "16M"]);
    let error = Client::connect(options(&socket)).expect_err("oldstyle");
    assert!(chain(&error).contains("oldstyle"), "{}", chain(&error));
}

#[test]
fn qemu_nbd() {
    if !have("qemu-nbd") {
        return;
    }
    let (temp, socket) = place();
    let disk = temp.path().join("d.qcow2");
    let disk = disk.to_str().expect("text");
    let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", disk, "16M"]).status();
    assert!(made.expect("qemu-img").success());
    let path = socket.to_str().expect("text");
    let _server = start(&socket, "qemu-nbd", &["-t", "-e", "8", "-f", "qcow2", "-k", path, disk]);
    let client = Client::connect(options(&socket)).expect("connect");
    assert!(client.context("base:allocation").is_some());
    exercise(&client);
    let unknown =
        Client::connect(Options { export: "nope".into(), ..options(&socket) }).expect_err("no export");
    assert!(chain(&unknown).contains("no export named `nope`"), "{}", chain(&unknown));
}

#[test]
fn errors_of_the_server_are_told_and_survived() {
    if !have("nbdkit") {
        return;
    }
    let (_temp, socket) = place();
    let filters = ["--filter=error", "memory", "16M", "error-pread=EIO", "error-pread-rate=30%"];
    let server = nbdkit(&socket, &filters);
    let client = Client::connect(options(&socket)).expect("connect");
    let data = noise(1 << 20, 3);
    client.write(0, &data).expect("write");
    let (mut failed, mut got) = (0, vec![0; 4096]);
    for i in 0..100_u64 {
        match client.read(i * 4096, &mut got) {
            Ok(()) => assert!(got == data[i as usize * 4096..][..4096]),
            Err(ClientError::Server { what: "read", value: 5, range }) => {
                assert_eq!(range, Some((i * 4096, 4096)));
                failed += 1;
            }
            Err(e) => panic!("{e}"),
        }
    }
    assert!((5..80).contains(&failed), "{failed} failed");
    drop((client, server));
    // Behind delays, and behind retries of the server's own.
    let filters = ["--filter=delay", "memory", "16M", "rdelay=2ms", "wdelay=1ms"];
    let server = nbdkit(&socket, &filters);
    exercise(&Client::connect(options(&socket)).expect("connect"));
    drop(server);
    let filters = [
        "--filter=retry-request",
        "--filter=error",
        "memory",
        "16M",
        "error-rate=1%",
        "retry-request-delay=1",
    ];
    let _server = nbdkit(&socket, &filters);
    exercise(&Client::connect(options(&socket)).expect("connect"));
}

#[test]
fn ranges_are_refused_before_they_are_sent() {
    if !have("nbdkit") {
        return;
    }
    let (_temp, socket) = place();
    let _server =
        nbdkit(&socket, &["-r", "--filter=blocksize-policy", "memory", "16M", "blocksize-minimum=4096"]);
    let client = Client::connect(options(&socket)).expect("connect");
    assert_eq!(client.terms().block_min_bytes, 4096);
    let mut buffer = [0; 4096];
    assert!(matches!(client.read(512, &mut buffer), Err(ClientError::Range { offset: 512, .. })));
    assert!(matches!(client.read(SIZE, &mut buffer), Err(ClientError::Range { .. })));
    assert!(matches!(client.read(!4095, &mut buffer), Err(ClientError::Range { .. })));
    assert!(matches!(client.write(0, &buffer), Err(ClientError::Unsupported(_))));
    client.read(0, &mut buffer).expect("read");
    assert!(client.status(0, 0, SIZE).expect("status")[0].flags & u64::from(STATE_HOLE) != 0);
}

/// A memory server that is killed forgets all: what a flush then promises was sent again.
#[test]
fn what_a_killed_server_forgot_is_sent_again() {
    if !have("nbdkit") {
        return;
    }
    let (_temp, socket) = place();
    let args = ["memory", "16M"];
    let mut server = nbdkit(&socket, &args);
    let client = Client::connect(options(&socket)).expect("connect");
    let mut oracle = vec![0; SIZE as usize];
    for round in 0..4_u64 {
        // In order, and over one another: the last one wins.
        for i in 0..12_u64 {
            let offset = (i * 700 + round * 100) * 1024;
            let data = noise(1 << 20, round * 100 + i);
            client.write(offset, &data).expect("write");
            oracle[offset as usize..][..1 << 20].copy_from_slice(&data);
        }
        client.write_zeroes(300 << 10, 64 << 10, true).expect("zeroes");
        oracle[300 << 10..][..64 << 10].fill(0);
        drop(server);
        server = nbdkit(&socket, &args);
    }
    client.flush().expect("flush");
    let mut got = vec![1; SIZE as usize];
    client.read(0, &mut got).expect("read");
    assert!(got == oracle, "something was lost");
}

#[test]
fn a_server_is_killed_in_the_middle() {
    if !have("nbdkit") {
        return;
    }
    let (temp, socket) = place();
    let disk = temp.path().join("disk");
    let content = noise(SIZE as usize, 9);
    std::fs::write(&disk, &content).expect("write");
    let file = format!("file={}", disk.display());
    let args = ["--filter=delay", "file", &file, "rdelay=5ms", "wdelay=5ms"];
    let server = nbdkit(&socket, &args);
    let client = Client::connect(options(&socket)).expect("connect");
    let reader = client.clone();
    let done = std::thread::spawn(move || {
        let mut tickets = Vec::new();
        for i in 0..512_u64 {
            let read = Op::Read { offset: i * 32768, buffer: vec![0; 32768] };
            tickets.push(reader.submit(read).expect("submit"));
        }
        let answers = tickets.into_iter().map(|t| t.wait().expect("read"));
        answers
            .map(|a| if let Answer::Data(data) = a { data } else { Vec::new() })
            .collect::<Vec<_>>()
            .concat()
    });
    drop(server);
    let mut server = nbdkit(&socket, &args);
    for _ in 0..3 {
        let mut one = [0; 512];
        client.read(0, &mut one).expect("read");
        drop(server);
        server = nbdkit(&socket, &args);
    }
    assert!(done.join().expect("reader") == content);
    drop(server);
}

#[test]
fn patience_ends_and_a_changed_export_is_not_used() {
    if !have("nbdkit") {
        return;
    }
    let (_temp, socket) = place();
    let server = nbdkit(&socket, &["memory", "16M"]);
    let give_up = Duration::from_millis(300);
    let client = Client::connect(Options { give_up, ..options(&socket) }).expect("connect");
    let mut buffer = [0; 512];
    client.read(0, &mut buffer).expect("read");
    drop(server);
    let error = client.read(0, &mut buffer).expect_err("lost");
    assert!(matches!(error, ClientError::Lost { .. }), "{error}");
    assert!(matches!(client.read(0, &mut buffer), Err(ClientError::Lost { .. })));

    let server = nbdkit(&socket, &["memory", "16M"]);
    let client = Client::connect(options(&socket)).expect("connect");
    client.read(0, &mut buffer).expect("read");
    drop(server);
    let server = nbdkit(&socket, &["memory", "17M"]);
    let error = client.read(0, &mut buffer).expect_err("changed");
    assert!(error.to_string().contains("17825792 now"), "{error}");
    drop(server);

    // One that takes requests and says nothing.
    let _server = nbdkit(&socket, &["--filter=delay", "memory", "16M", "rdelay=60"]);
    let stall = Duration::from_millis(100);
    let client = Client::connect(Options { give_up, stall, ..options(&socket) }).expect("connect");
    let error = client.read(0, &mut buffer).expect_err("silent");
    assert!(chain(&error).contains("does not answer"), "{}", chain(&error));
}
