//! Connections between the guest and Unix sockets.

use crate::run::{Entry, kvm_usable, start};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};

#[test]
fn bytes_go_both_ways() {
    if !kvm_usable() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("vsock");
    let listener = UnixListener::bind(folder.path().join("vsock_5000")).expect("our own folder");
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a connection of the guest");
        let mut bytes = [0; 1000];
        let mut sum = 0;
        loop {
            match stream.read(&mut bytes).expect("an orderly end") {
                0 => return sum,
                n => {
                    stream.write_all(&bytes[..n]).expect("taken");
                    sum += n;
                }
            }
        }
    });
    let argument = format!("7,{}", path.display());
    let mut guest =
        start(Entry::Pvh, "mini.test=vsock mini.vsock=echo", &["--memory=64MiB", "--vsock", &argument]);
    guest.wait_for("mini: listening on 52");
    let mut client = UnixStream::connect(&path).expect("listens");
    client.write_all(b"CONNECT 52\n").expect("taken");
    let mut reader = BufReader::new(client.try_clone().expect("shared"));
    let mut line = String::new();
    reader.read_line(&mut line).expect("a line");
    assert!(line.starts_with("OK "), "{line:?}");
    let sent: Vec<u8> = (0..200_000u32).map(|at| (at % 251) as u8).collect();
    let writer = std::thread::spawn({
        let (mut client, sent) = (client.try_clone().expect("shared"), sent.clone());
        move || {
            client.write_all(&sent).expect("taken");
            client.shutdown(Shutdown::Write).expect("ours");
        }
    });
    let mut got = Vec::new();
    reader.read_to_end(&mut got).expect("an orderly end");
    assert!(got == sent, "{} of {} bytes came back, or others", got.len(), sent.len());
    writer.join().expect("wrote");
    let done = guest.finish();
    done.assert_passed();
    done.assert_ok(&["vsock.unknown", "vsock.refused", "vsock.nonsense", "vsock.echo-out", "vsock.echo-in"]);
    assert_eq!(server.join().expect("served"), 200 * 3000);
}
