//! `serio volume import` and `download` from another host, that is, over TLS; and copies that break off: the client is killed,
//! then seriod while the next one copies; ctrl-C; a pipe that nobody reads any more.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::{
    fs,
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use common::Seriod;

const SIZE: usize = 48 << 20;
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at what another process does.
const LOOK: Duration = Duration::from_millis(10);

struct Node {
    seriod: Seriod,
    serio: PathBuf,
    content: Vec<u8>,
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// A node with certificates as `serio pki` makes them; `None`, and why is said, where this cannot run.
fn node() -> Option<Node> {
    let beside = |name: &str| Path::new(env!("CARGO_BIN_EXE_seriod")).with_file_name(name);
    let (serio, volumed) = (beside("serio"), beside("serio-volumed"));
    if let Some(missing) = [&serio, &volumed].into_iter().find(|program| !program.is_file()) {
        println!("skipped: {} is not built", missing.display());
        return None;
    }
    // The same port after a restart: one that was free a moment ago.
    let [grpc, nbd] = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    let ports = [&grpc, &nbd].map(|listener| listener.local_addr().unwrap().port());
    drop((grpc, nbd));
    let mut seriod = Seriod::new("");
    let dir = seriod.dir.path().to_owned();
    let pki = dir.join("pki");
    for args in [
        &["pki", "init", text(&pki), "--name", "CA"][..],
        &["pki", "issue", text(&pki), "node", "--role", "node", "--host", "127.0.0.1"],
        &["pki", "issue", text(&pki), "op", "--role", "control-plane"],
    ] {
        let made = Command::new(&serio).args(args).output().unwrap();
        assert!(made.status.success(), "{}", said(&made));
    }
    let config = format!(
        "[grpc]\nlisten = \"127.0.0.1:{}\"\ntls_dir = \"{}\"\n[nbd]\nlisten = \"127.0.0.1:{}\"\n",
        ports[0],
        pki.join("node").display(),
        ports[1]
    );
    let path = dir.join("seriod.toml");
    fs::write(&path, fs::read_to_string(&path).unwrap() + &config).unwrap();
    fs::copy(&volumed, dir.join("serio-volumed")).unwrap();
    seriod.start();
    let word = |n: u32| n.wrapping_mul(2_654_435_761).rotate_left(7).to_le_bytes();
    let mut content: Vec<u8> = (0..SIZE as u32 / 4).flat_map(word).collect();
    content[SIZE / 2..SIZE / 2 + (8 << 20)].fill(0);
    let node = Node { seriod, serio, content };
    fs::write(node.at("disk.raw"), &node.content).unwrap();
    let vdc = ["vdc", "create", "ardesio", "--vcpus", "1", "--memory", "64MiB", "--storage", "1GiB"];
    let made = node.run(&vdc);
    assert!(made.status.success(), "{}", said(&made));
    Some(node)
}

impl Node {
    fn at(&self, name: &str) -> PathBuf {
        self.seriod.dir.path().join(name)
    }

    /// From another host.
    fn command(&self, args: &[&str]) -> Command {
        self.command_over(self.seriod.tcp.unwrap(), args)
    }

    /// From another host, over a line that ends at an address here.
    fn command_over(&self, line: SocketAddr, args: &[&str]) -> Command {
        let op = self.at("pki/op");
        let mut command = Command::new(&self.serio);
        command.args(["--host", &format!("https://{line}")]);
        for (option, file) in
            [("--ca", "ca-cert.pem"), ("--cert", "client-cert.pem"), ("--key", "client-key.pem")]
        {
            command.arg(option).arg(op.join(file));
        }
        command.args(args).stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    fn starts(&self, args: &[&str]) -> Child {
        self.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Waits until so much of the only volume is there, and no import has ended.
    fn until_written(&self, bytes: u64, importing: &mut Child) {
        let used = || -> u64 {
            let volumes = fs::read_dir(self.at("state/volumes")).into_iter().flatten().flatten();
            let files =
                volumes.flat_map(|volume| fs::read_dir(volume.path()).into_iter().flatten().flatten());
            files.filter_map(|file| file.metadata().ok()).map(|meta| meta.blocks() * 512).sum()
        };
        let since = Instant::now();
        while used() < bytes {
            assert!(importing.try_wait().unwrap().is_none(), "it is too fast for this test");
            assert!(since.elapsed() < PATIENCE, "it does not go on");
            std::thread::sleep(LOOK);
        }
    }

    /// The disk, from a server that is slow, so that an import is met in its middle.
    fn slow(&self) -> Option<(Child, String)> {
        let socket = self.at("slow.sock");
        let _ = fs::remove_file(&socket);
        let mut nbdkit = Command::new("nbdkit");
        nbdkit.args(["--foreground", "--filter=rate", "--unix"]).arg(&socket);
        nbdkit.arg("file").arg(self.at("disk.raw")).arg("rate=64M");
        let Ok(mut server) = nbdkit.stdin(Stdio::null()).spawn() else {
            println!("skipped: nbdkit is not installed");
            return None;
        };
        while !socket.exists() {
            assert!(server.try_wait().unwrap().is_none(), "nbdkit does not start");
            std::thread::sleep(LOOK);
        }
        Some((server, format!("nbd+unix:///?socket={}", socket.display())))
    }

    /// No export of the volume is left.
    fn is_let_go(&self, name: &str) {
        let exports = self.run(&["volume", "exports"]);
        assert!(exports.status.success() && !said(&exports).contains(name), "{}", said(&exports));
    }

    fn is_whole(&self, name: &str) {
        let back = self.at("back.raw");
        let done = self.run(&["volume", "download", name, text(&back)]);
        assert!(done.status.success(), "{}", said(&done));
        assert!(fs::read(&back).unwrap() == self.content);
        fs::remove_file(&back).unwrap();
    }
}

#[test]
fn disks_come_and_go_over_tls() {
    let Some(node) = node() else { return };
    let sum = blake3::hash(&node.content).to_hex().to_string();
    let done = node.run(&["volume", "import", "ardesio/data", text(&node.at("disk.raw"))]);
    assert!(done.status.success() && said(&done).contains(&sum), "{}", said(&done));
    node.is_whole("ardesio/data");
    let done = node.run(&["volume", "download", "ardesio/data", "-"]);
    assert!(done.stdout == node.content, "{}", said(&done));
    let copy = node.at("copy.qcow2");
    let done = node.run(&["volume", "download", "ardesio/data", text(&copy), "--format", "qcow2"]);
    assert!(done.status.success() && said(&done).contains(&sum), "{}", said(&done));
    let import = ["volume", "import", "ardesio/again", text(&copy), "--format", "qcow2"];
    let done = node.run(&import);
    assert!(done.status.success() && said(&done).contains(&sum), "{}", said(&done));
    node.is_whole("ardesio/again");
    // Without a certificate for NBD nothing goes, and it says so.
    let exported = node.run(&["volume", "export", "ardesio/data", "-o", "json"]);
    let uri: serde_json::Value = serde_json::from_slice(&exported.stdout).unwrap();
    let uri = uri["tls_uri"].as_str().or(uri["tlsUri"].as_str()).unwrap().to_owned();
    let bare = uri.split('?').next().unwrap();
    let mut stranger = Command::new(&node.serio);
    stranger.arg("--host").arg(format!("unix:{}", node.at("run/seriod.sock").display()));
    let refused = stranger.args(["volume", "import", "ardesio/third", bare]).output().unwrap();
    assert!(!refused.status.success() && said(&refused).contains("certificates"), "{}", said(&refused));
}

/// Starts the import; returns when it has its export.
fn writing(node: &Node, import: &[&str]) -> Child {
    let since = Instant::now();
    loop {
        let mut child = node.starts(import);
        while child.try_wait().unwrap().is_none() {
            if node.run(&["volume", "exports"]).stdout.windows(12).any(|part| part == b"ardesio/data") {
                return child;
            }
        }
        // For a moment the killed client counts as one.
        let output = child.wait_with_output().unwrap();
        assert!(
            said(&output).contains("is being written") && since.elapsed() < PATIENCE,
            "{}",
            said(&output)
        );
    }
}

#[test]
fn an_import_that_breaks_off_goes_on() {
    let Some(mut node) = node() else { return };
    let Some((mut server, slow)) = node.slow() else { return };
    let anew = |mut server: Child| {
        // A client that dies under its replies is more than some nbdkits take.
        server.kill().unwrap();
        server.wait().unwrap();
        node.slow().unwrap().0
    };
    let sum = blake3::hash(&node.content).to_hex().to_string();

    // The client is killed.
    let mut first = node.starts(&["volume", "import", "ardesio/data", &slow]);
    node.until_written(4 << 20, &mut first);
    first.kill().unwrap();
    first.wait().unwrap();
    server = anew(server);
    let again = node.run(&["volume", "import", "ardesio/data", &slow]);
    assert!(!again.status.success() && said(&again).contains("exists"), "{}", said(&again));
    let raw = node.at("disk.raw");
    let shorter = node.at("shorter.raw");
    fs::write(&shorter, &node.content[..SIZE / 2]).unwrap();
    let resume = |source: &str| ["volume", "import", "ardesio/data", source, "--resume"].map(str::to_owned);
    let other = node.run(&resume(text(&shorter)).each_ref().map(String::as_str));
    assert!(
        !other.status.success() && said(&other).contains("not of an import of this image"),
        "{}",
        said(&other)
    );

    // It goes on, and seriod is killed meanwhile: the copy does not notice, since the export lives on.
    let source = resume(&slow);
    let mut second = writing(&node, &source.each_ref().map(String::as_str));
    node.seriod.kill();
    node.seriod.start();
    let mut failed = None;
    if !second.wait().unwrap().success() {
        failed = Some(said(&second.wait_with_output().unwrap()));
    }
    // Or it did, and then it says how to go on.
    if let Some(said) = failed {
        assert!(said.contains("--resume goes on"), "{said}");
    }
    server.kill().unwrap();
    server.wait().unwrap();

    // Whatever happened, it can be gone on with until it is whole.
    let since = Instant::now();
    let done = loop {
        let done = node.run(&resume(text(&raw)).each_ref().map(String::as_str));
        if done.status.success() || since.elapsed() > PATIENCE {
            break done;
        }
        std::thread::sleep(LOOK);
    };
    assert!(done.status.success() && said(&done).contains(&sum), "{}", said(&done));
    node.is_whole("ardesio/data");
    node.is_let_go("ardesio/data");
}

/// Ctrl-C; what the process has said at its end, which was not a good one.
fn interrupt(child: Child) -> String {
    let pid = nix::unistd::Pid::from_raw(child.id().try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    let since = Instant::now();
    let output = child.wait_with_output().unwrap();
    assert!(!output.status.success() && since.elapsed() < PATIENCE, "{}", said(&output));
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn ctrl_c_ends_an_import_so_that_it_can_go_on() {
    let Some(node) = node() else { return };
    let Some((mut server, slow)) = node.slow() else { return };
    let mut import = node.starts(&["volume", "import", "ardesio/data", &slow]);
    node.until_written(4 << 20, &mut import);
    let said_last = interrupt(import);
    assert!(said_last.contains("interrupted") && said_last.contains("--resume goes on"), "{said_last}");
    node.is_let_go("ardesio/data");
    server.kill().unwrap();
    server.wait().unwrap();
    let raw = node.at("disk.raw");
    let done = node.run(&["volume", "import", "ardesio/data", text(&raw), "--resume"]);
    assert!(done.status.success(), "{}", said(&done));
    node.is_whole("ardesio/data");
}

#[test]
fn an_image_whose_import_is_interrupted_is_none() {
    let Some(node) = node() else { return };
    let Some((mut server, slow)) = node.slow() else { return };
    let used = || -> u64 {
        let images = fs::read_dir(node.at("state/images")).into_iter().flatten().flatten();
        let files = images.flat_map(|image| fs::read_dir(image.path()).into_iter().flatten().flatten());
        files.filter_map(|file| file.metadata().ok()).map(|meta| meta.blocks() * 512).sum()
    };
    let mut import = node.starts(&["image", "import", "base", &slow, "--format", "raw"]);
    let since = Instant::now();
    while used() < 2 << 20 {
        assert!(import.try_wait().unwrap().is_none(), "it is too fast for this test");
        assert!(since.elapsed() < PATIENCE, "it does not begin");
        std::thread::sleep(LOOK);
    }
    interrupt(import);
    server.kill().unwrap();
    server.wait().unwrap();
    // Nothing of it is left, and its name is free.
    let since = Instant::now();
    while used() > 0 {
        assert!(since.elapsed() < PATIENCE, "its bytes stay");
        std::thread::sleep(LOOK);
    }
    let listed = node.run(&["image", "list"]);
    assert!(listed.status.success() && !said(&listed).contains("base"), "{}", said(&listed));
    let done = node.run(&["image", "import", "base", text(&node.at("disk.raw")), "--format", "raw"]);
    assert!(done.status.success(), "{}", said(&done));
}

#[test]
fn ctrl_c_ends_a_download_whose_reader_stands_still() {
    let Some(node) = node() else { return };
    let done = node.run(&["volume", "import", "ardesio/data", text(&node.at("disk.raw"))]);
    assert!(done.status.success(), "{}", said(&done));
    let mut child = node.starts(&["volume", "download", "ardesio/data", "-"]);
    let mut part = vec![0; 1 << 20];
    let mut stdout = child.stdout.take().unwrap();
    std::io::Read::read_exact(&mut stdout, &mut part).unwrap();
    assert!(part == node.content[..1 << 20]);
    let said_last = interrupt(child);
    assert!(said_last.contains("interrupted"), "{said_last}");
    node.is_let_go("ardesio/data");
    drop(stdout);
}

#[test]
fn a_download_that_nobody_takes_ends() {
    let Some(node) = node() else { return };
    let done = node.run(&["volume", "import", "ardesio/data", text(&node.at("disk.raw"))]);
    assert!(done.status.success(), "{}", said(&done));
    // As `… | head -c 1M` does.
    let mut child = node.starts(&["volume", "download", "ardesio/data", "-"]);
    let mut part = vec![0; 1 << 20];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut part).unwrap();
    assert!(part == node.content[..1 << 20]);
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(!output.status.success() && said(&output).contains("Broken pipe"), "{}", said(&output));
    node.is_let_go("ardesio/data");
    // Into a file that cannot be: nothing is exported for it.
    let there = node.at("there");
    fs::write(&there, "mine").unwrap();
    let done = node.run(&["volume", "download", "ardesio/data", text(&there)]);
    assert!(!done.status.success() && fs::read(&there).unwrap() == b"mine", "{}", said(&done));
    node.is_let_go("ardesio/data");
}

/// A line to the node: what goes to it is counted, and of the first connection passes so much only. Then it is cut, or stands still.
struct Wire {
    addr: SocketAddr,
    passed: Arc<AtomicU64>,
}

impl Wire {
    fn new(to: SocketAddr, first: u64, cut: bool) -> Wire {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (addr, passed) = (listener.local_addr().unwrap(), Arc::new(AtomicU64::new(0)));
        let count = Arc::clone(&passed);
        // Ends with the test's process.
        std::thread::spawn(move || {
            for (index, near) in listener.incoming().map_while(Result::ok).enumerate() {
                let Ok(far) = TcpStream::connect(to) else { continue };
                let (back, forth) = (far.try_clone().unwrap(), near.try_clone().unwrap());
                let (count, limit) = (Arc::clone(&count), if index == 0 { first } else { u64::MAX });
                std::thread::spawn(move || pass(&near, &far, limit, cut, &count));
                std::thread::spawn(move || pass(&back, &forth, u64::MAX, true, &AtomicU64::new(0)));
            }
        });
        Wire { addr, passed }
    }
}

fn pass(mut from: &TcpStream, mut to: &TcpStream, limit: u64, cut: bool, count: &AtomicU64) {
    let (mut piece, mut passed) = (vec![0; 64 << 10], 0);
    while let Ok(got @ 1..) = from.read(&mut piece) {
        if to.write_all(&piece[..got]).is_err() {
            break;
        }
        passed += got as u64;
        count.fetch_add(got as u64, Ordering::SeqCst);
        if passed >= limit {
            if cut {
                break;
            }
            std::thread::park();
        }
    }
    // The other end may be gone already.
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

#[test]
fn an_image_goes_on_over_a_line_that_breaks() {
    let Some(node) = node() else { return };
    let sum = blake3::hash(&node.content).to_hex().to_string();
    let wire = Wire::new(node.seriod.tcp.unwrap(), 24 << 20, true);
    let disk = node.at("disk.raw");
    let import = ["image", "import", "base", text(&disk), "--format", "raw"];
    let done = node.command_over(wire.addr, &import).output().unwrap();
    assert!(done.status.success() && said(&done).contains(&sum), "{}", said(&done));
    assert!(said(&done).contains("the line broke: goes on at"), "{}", said(&done));
    // Begun anew it would have been 24 and 40 MiB.
    let passed = wire.passed.load(Ordering::SeqCst);
    assert!(passed < 60 << 20, "{passed} bytes for {SIZE}");
}

#[test]
fn an_image_goes_on_when_its_import_is_typed_again() {
    let Some(node) = node() else { return };
    let sum = blake3::hash(&node.content).to_hex().to_string();
    let wire = Wire::new(node.seriod.tcp.unwrap(), 24 << 20, false);
    let disk = node.at("disk.raw");
    let import = ["image", "import", "base", text(&disk), "--format", "raw"];
    let mut first =
        node.command_over(wire.addr, &import).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let since = Instant::now();
    while wire.passed.load(Ordering::SeqCst) < 24 << 20 {
        assert!(
            first.try_wait().unwrap().is_none() && since.elapsed() < PATIENCE,
            "it does not come that far"
        );
        std::thread::sleep(LOOK);
    }
    first.kill().unwrap();
    first.wait().unwrap();
    // The agent has not noticed that the line is dead: who comes anew goes before it.
    let done = node.run(&import);
    assert!(done.status.success() && said(&done).contains(&sum), "{}", said(&done));
    assert!(said(&done).contains("note: goes on at"), "{}", said(&done));
    let listed = node.run(&["image", "list"]);
    assert!(said(&listed).contains("base"), "{}", said(&listed));
}
