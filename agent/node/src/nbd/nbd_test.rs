//! The front before a stranger's NBD server, talked to by strangers' clients (nbdkit, nbdinfo, nbdcopy).

use std::{
    fs,
    process::{Output, Stdio},
};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tempfile::TempDir;
use tokio::{process::Command, task::JoinHandle};

use super::*;

/// A CA, a server and a client, named as `serio pki` names them.
fn certificates_in(dir: &Path) {
    let mut authority = CertificateParams::new(Vec::new()).unwrap();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate().unwrap()).unwrap();
    fs::write(dir.join("ca-cert.pem"), authority.pem()).unwrap();
    for name in ["server", "client", "other"] {
        let key = KeyPair::generate().unwrap();
        let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
        let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &authority).unwrap();
        fs::write(dir.join(format!("{name}-cert.pem")), certificate.pem()).unwrap();
        fs::write(dir.join(format!("{name}-key.pem")), key.serialize_pem()).unwrap();
    }
}

struct Bench {
    dir: TempDir,
    port: u16,
    front: JoinHandle<()>,
    _disk: tokio::process::Child,
    /// Names that were looked up.
    asked: Arc<Mutex<Vec<String>>>,
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.front.abort();
    }
}

/// A disk of 4 MiB behind the front under the name `token`.
async fn bench() -> Option<Bench> {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("disk.sock");
    let mut nbdkit = Command::new("nbdkit");
    nbdkit.args(["--foreground", "--unix"]).arg(&socket).args(["memory", "4M"]).kill_on_drop(true);
    let disk =
        match (nbdkit.stderr(Stdio::null()).spawn(), Command::new("nbdinfo").arg("--version").output().await)
        {
            (Ok(disk), Ok(_)) => disk,
            _ => {
                eprintln!("skipped: nbdkit or nbdinfo (libnbd-bin) is not installed");
                return None;
            }
        };
    while UnixStream::connect(&socket).await.is_err() {
        tokio::task::yield_now().await;
    }
    certificates_in(dir.path());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let asked: Arc<Mutex<Vec<String>>> = Arc::default();
    let names = Arc::clone(&asked);
    let user: Mutex<Option<String>> = Mutex::default();
    let lookup: Lookup = Arc::new(move |name, fingerprint| {
        names.lock().unwrap().push(name.to_owned());
        if name != "token" {
            return Admission::Unknown;
        }
        assert!(fingerprint.len() == 64 && fingerprint.bytes().all(|b| b.is_ascii_hexdigit()));
        let mut user = user.lock().unwrap();
        let first = user.get_or_insert_with(|| fingerprint.to_owned());
        if first == fingerprint { Admission::Export(socket.clone()) } else { Admission::Taken }
    });
    let front = tokio::spawn(serve(listener, tls_config(dir.path()).unwrap(), lookup));
    Some(Bench { dir, port, front, _disk: disk, asked })
}

impl Bench {
    fn uri(&self, name: &str, certificates: &Path) -> String {
        format!("nbds://localhost:{}/{name}?tls-certificates={}", self.port, certificates.display())
    }
}

async fn run(program: &str, arguments: &[&str]) -> Output {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    timeout(Duration::from_secs(60), output).await.expect("it ended in time").unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_is_copied_through_tls() {
    let Some(bench) = bench().await else { return };
    let uri = bench.uri("token", bench.dir.path());
    let size = run("nbdinfo", &["--size", &uri]).await;
    assert_eq!(
        String::from_utf8_lossy(&size.stdout).trim(),
        "4194304",
        "{}",
        String::from_utf8_lossy(&size.stderr)
    );
    let (there, back) = (bench.dir.path().join("there"), bench.dir.path().join("back"));
    let bytes: Vec<u8> = (0..4_u32 << 18).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    fs::write(&there, &bytes).unwrap();
    for (from, to) in [(there.to_str().unwrap(), uri.as_str()), (&uri, back.to_str().unwrap())] {
        let copied = run("nbdcopy", &[from, to]).await;
        assert!(copied.status.success(), "{}", String::from_utf8_lossy(&copied.stderr));
    }
    assert_eq!(fs::read(&back).unwrap(), bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_are_refused() {
    let Some(bench) = bench().await else { return };
    // libnbd's words for NBD_REP_ERR_UNKNOWN.
    let wrong = run("nbdinfo", &[&bench.uri("wrong", bench.dir.path())]).await;
    let said = String::from_utf8_lossy(&wrong.stderr);
    assert!(!wrong.status.success() && said.contains("No such file or directory"), "{said}");

    // Without TLS nothing is even looked up.
    bench.asked.lock().unwrap().clear();
    let clear = run("nbdinfo", &[&format!("nbd://localhost:{}/token", bench.port)]).await;
    let said = String::from_utf8_lossy(&clear.stderr);
    assert!(!clear.status.success(), "{said}");
    // Nor with another authority's certificate, even of a client that trusts the server.
    let other = tempfile::tempdir().unwrap();
    certificates_in(other.path());
    fs::copy(bench.dir.path().join("ca-cert.pem"), other.path().join("ca-cert.pem")).unwrap();
    let stranger = run("nbdinfo", &["--size", &bench.uri("token", other.path())]).await;
    assert!(!stranger.status.success());
    assert_eq!(bench.asked.lock().unwrap().as_slice(), [""; 0]);

    // Garbage costs its own connection only.
    let mut garbage = TcpStream::connect(("127.0.0.1", bench.port)).await.unwrap();
    garbage.write_all(&[0xff; 64]).await.unwrap();
    let mut answer = Vec::new();
    // It ends, by a close or by a reset.
    let _ = timeout(Duration::from_secs(20), garbage.read_to_end(&mut answer)).await.unwrap();
    let size = run("nbdinfo", &["--size", &bench.uri("token", bench.dir.path())]).await;
    assert!(size.status.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_is_its_first_user_s() {
    let Some(bench) = bench().await else { return };
    let uri = bench.uri("token", bench.dir.path());
    // Four connections of one user.
    let copied = run("nbdcopy", &["--connections=4", &uri, "null:"]).await;
    assert!(copied.status.success(), "{}", String::from_utf8_lossy(&copied.stderr));
    // Another certificate of the same authority.
    let other = tempfile::tempdir().unwrap();
    for (from, to) in [("ca-cert", "ca-cert"), ("other-cert", "client-cert"), ("other-key", "client-key")] {
        fs::copy(bench.dir.path().join(format!("{from}.pem")), other.path().join(format!("{to}.pem")))
            .unwrap();
    }
    let taken = run("nbdinfo", &["--size", &bench.uri("token", other.path())]).await;
    let said = String::from_utf8_lossy(&taken.stderr);
    assert!(!taken.status.success() && said.contains("No such file or directory"), "{said}");
    assert!(run("nbdinfo", &["--size", &uri]).await.status.success(), "the first keeps it");
}

/// What is in the log is of no matter: that it is there, and that honest clients pass.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_swarm_keeps_nobody_out() {
    let Some(bench) = bench().await else { return };
    let uri = bench.uri("token", bench.dir.path());
    let mut swarm = Vec::new();
    for i in 0..1500 {
        let mut stream = TcpStream::connect(("127.0.0.1", bench.port)).await.unwrap();
        if i % 2 == 0 {
            // It may have been dropped for others already.
            let _ = stream.write_all(&[0, 0, 0, 3]).await;
        }
        swarm.push(stream);
        if i % 500 == 499 {
            assert!(run("nbdinfo", &["--size", &uri]).await.status.success(), "after {i}");
        }
    }
    // All but those that may wait were dropped, so memory and descriptors are bounded.
    let mut open = 0;
    for mut stream in swarm {
        let mut bytes = vec![0; 64];
        let gone = timeout(Duration::from_millis(20), async {
            while stream.read(&mut bytes).await.is_ok_and(|n| n > 0) {}
        });
        open += usize::from(gone.await.is_err());
    }
    assert!(open <= HANDSHAKES_MAX, "{open}");
}

/// Error replies, closes in the middle, and a server whose disk is our export.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_errors_and_proxies_pass_through_tls() {
    let Some(bench) = bench().await else { return };
    let uri = bench.uri("token", bench.dir.path());
    let shell = |code: &str| {
        let code = code.to_owned();
        // As nbdsh's own option would, which does not let a URI name the certificates' files.
        let connect = format!("h.set_uri_allow_local_file(True)\nh.connect_uri('{uri}')");
        // The system's python has libnbd's module, another one in PATH may not.
        async move { run("env", &["PATH=/usr/bin:/bin", "nbdsh", "-c", &connect, "-c", &code]).await }
    };
    let first = shell("assert h.get_tls_negotiated() and h.get_size() == 4 << 20").await;
    let said = String::from_utf8_lossy(&first.stderr);
    if said.contains("No module named nbd") || said.starts_with("env: ") {
        return println!("skipped: nbdsh (python3-libnbd) is not installed");
    }
    assert!(first.status.success(), "{said}");
    for code in [
        // Refused, and the connection goes on.
        "h.set_strict_mode(0)\nfor call in (lambda: h.pread(512, h.get_size()), lambda: h.pwrite(b'x' * 512, h.get_size())):\n\
         \x20 try:\n    call()\n    assert False\n  except nbd.Error as e:\n    assert e.errno in ('EINVAL', 'ENOSPC'), e\n\
         h.pwrite(b'y' * 70000, 4096)\nassert h.pread(70000, 4096) == b'y' * 70000",
        // Many under way, both ways, and none waited for before the goodbye.
        "bufs = [nbd.Buffer(65536) for _ in range(64)]\nfor i, b in enumerate(bufs):\n  h.aio_pread(b, i * 65536)\n\
         for i in range(200):\n  h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(b'z' * 16384)), i * 16384)\n\
         while h.aio_in_flight() > 0:\n  h.poll(-1)\nh.shutdown()",
        // (One that goes without a word ends nbdkit itself, by an assertion; volumed's tests have that case.)
        "assert h.pread(16, 0) == b'z' * 16",
    ] {
        let ran = shell(code).await;
        assert!(ran.status.success(), "{code}: {}", String::from_utf8_lossy(&ran.stderr));
    }
    let socket = bench.dir.path().join("proxy.sock");
    let mut proxy = Command::new("nbdkit");
    proxy.args(["--foreground", "--unix"]).arg(&socket).args(["nbd", "tls=require", "shared=true"]);
    // Not by a URI: the plugin does not let one name the certificates' files.
    let port = format!("port={}", bench.port);
    proxy.args(["hostname=localhost", &port, "export=token"]);
    proxy
        .arg(format!("tls-certificates={}", bench.dir.path().display()))
        .stderr(Stdio::null())
        .kill_on_drop(true);
    let _proxy = proxy.spawn().unwrap();
    let proxied = format!("nbd+unix:///?socket={}", socket.display());
    let back = bench.dir.path().join("back");
    timeout(Duration::from_secs(30), async {
        while !run("nbdcopy", &["--connections=4", &proxied, back.to_str().unwrap()]).await.status.success() {
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .expect("nbdkit's nbd plugin reads the export");
    assert!(fs::read(&back).unwrap()[..200 * 16384].iter().all(|byte| *byte == b'z'));
}

#[test]
fn bad_certificates_are_named() {
    let dir = tempfile::tempdir().unwrap();
    assert!(tls_config(dir.path()).unwrap_err().to_string().contains("ca-cert.pem"));
    certificates_in(dir.path());
    tls_config(dir.path()).unwrap();
    fs::write(dir.path().join("server-key.pem"), "nonsense").unwrap();
    assert!(tls_config(dir.path()).unwrap_err().to_string().contains("server-key.pem"));
    fs::write(dir.path().join("server-key.pem"), KeyPair::generate().unwrap().serialize_pem()).unwrap();
    assert!(matches!(tls_config(dir.path()), Err(TlsError::Content { .. })), "a key of another certificate");
    fs::write(dir.path().join("ca-cert.pem"), "").unwrap();
    assert!(tls_config(dir.path()).unwrap_err().to_string().contains("ca-cert.pem"));
}

/// Without the two places where `serve` tells the crowd, greetings would wake their thread for each packet.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crowd_is_greeted_in_turns() {
    let dir = tempfile::tempdir().unwrap();
    certificates_in(dir.path());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let crowd: Arc<Crowd> = Arc::default();
    let lookup: Lookup = Arc::new(|_, _| Admission::Unknown);
    let tls = tls_config(dir.path()).unwrap();
    let front = tokio::spawn(serve_crowd(listener, tls, lookup, Arc::clone(&crowd)));
    let greeted = async |stream: &mut TcpStream| {
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).await.is_ok_and(|_| greeting.starts_with(b"NBDMAGIC"))
    };
    let mut one = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    assert!(greeted(&mut one).await);
    assert_eq!(crowd.turns(), 0, "one client is no crowd");
    let started = Instant::now();
    while crowd.turns() == 0 {
        assert!(started.elapsed() < Duration::from_secs(60), "nothing was ever gathered");
        let mut burst = Vec::new();
        for _ in 0..60 {
            burst.push(TcpStream::connect(("127.0.0.1", port)).await.unwrap());
        }
        for stream in &mut burst {
            // Those in whose place others came are dropped.
            greeted(stream).await;
        }
    }
    front.abort();
}
