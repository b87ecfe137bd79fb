//! A whole session with the NBD server over a real socket: the handshake is right, what follows is the fuzzer's. The
//! server must end it, and have no operation left.
#![no_main]

use std::{
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    sync::LazyLock,
    time::Duration,
};

use libfuzzer_sys::fuzz_target;
use serio_nbd::{Limits, Server, Stop};
use serio_volume::{Access, Volume};
use serio_volumed::export::VolumeExport;

static SOCKET: LazyLock<PathBuf> = LazyLock::new(|| {
    let dir = tempfile::tempdir().expect("a temporary directory").keep();
    let socket = dir.join("nbd");
    let listener = UnixListener::bind(&socket).expect("a socket");
    let file = tempfile::tempfile().expect("a file");
    file.set_len(1 << 20).expect("a size");
    let volume = Volume::open_raw(file, Access::ReadWrite).expect("a volume");
    let server = Server::new(vec![VolumeExport::new(volume, "", "fuzz")], Limits::default());
    std::thread::spawn(move || server.run(&listener, &Stop::new().expect("an event"), &|_| {}));
    socket
});

fn option(bytes: &mut Vec<u8>, option: u32, payload: &[u8]) {
    bytes.extend_from_slice(b"IHAVEOPT");
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    bytes.extend_from_slice(payload);
}

fuzz_target!(|data: &[u8]| {
    let Some((mode, data)) = data.split_first() else { return };
    let mut bytes = 3u32.to_be_bytes().to_vec();
    match mode % 3 {
        1 => option(&mut bytes, 8, &[]),
        2 => option(&mut bytes, 11, &[]),
        _ => {}
    }
    if mode & 4 != 0 {
        let mut query = vec![0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 15];
        query.extend_from_slice(b"base:allocation");
        option(&mut bytes, 10, &query);
    }
    option(&mut bytes, 7, &[0, 0, 0, 0, 0, 0]);
    bytes.extend_from_slice(data);
    let mut stream = UnixStream::connect(&*SOCKET).expect("the server takes clients");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a time");
    // The server may hang up before it has read all.
    let _ = stream.write_all(&bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = vec![0; 64 << 10];
    loop {
        match stream.read(&mut answer) {
            Ok(0) => break,
            Ok(_) => {}
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                panic!("the server neither answers nor hangs up")
            }
            Err(_) => break,
        }
    }
});
