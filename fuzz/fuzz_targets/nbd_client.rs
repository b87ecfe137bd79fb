//! Our NBD client against a server that lies: an orderly handshake, or the fuzzer's, then the fuzzer's answers to a read
//! and a block status. The client must come back with an answer or an error.
#![no_main]

use std::{
    io::Write,
    os::unix::net::UnixListener,
    path::PathBuf,
    sync::{LazyLock, Mutex, mpsc},
    time::Duration,
};

use libfuzzer_sys::fuzz_target;
use serio_nbd::{
    client::{Address, Client, Options, Uri},
    handshake::reply,
    wire::{IHAVEOPT, Mode, NBDMAGIC, info, opt, rep},
};

struct Liar {
    socket: PathBuf,
    say: Mutex<mpsc::Sender<Vec<u8>>>,
}

static LIAR: LazyLock<Liar> = LazyLock::new(|| {
    let socket = tempfile::tempdir().expect("a temporary directory").keep().join("nbd");
    let listener = UnixListener::bind(&socket).expect("a socket");
    let (say, said) = mpsc::channel::<Vec<u8>>();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        for stream in listener.incoming() {
            // A client that connects again hears the same.
            while let Ok(next) = said.try_recv() {
                bytes = next;
            }
            let _ = stream.expect("a client").write_all(&bytes);
        }
    });
    Liar { socket, say: Mutex::new(say) }
});

fn orderly(mode: Mode) -> Vec<u8> {
    let mut out = NBDMAGIC.to_be_bytes().to_vec();
    out.extend(IHAVEOPT.to_be_bytes());
    out.extend(3_u16.to_be_bytes());
    let extended = if mode == Mode::Extended { rep::ACK } else { rep::ERR_UNSUP };
    reply(&mut out, opt::EXTENDED_HEADERS, extended, b"");
    if mode != Mode::Extended {
        let structured = if mode == Mode::Structured { rep::ACK } else { rep::ERR_UNSUP };
        reply(&mut out, opt::STRUCTURED_REPLY, structured, b"");
    }
    if mode != Mode::Simple {
        let context = [&7_u32.to_be_bytes()[..], b"base:allocation"].concat();
        reply(&mut out, opt::SET_META_CONTEXT, rep::META_CONTEXT, &context);
        reply(&mut out, opt::SET_META_CONTEXT, rep::ACK, b"");
    }
    let mut export = info::EXPORT.to_be_bytes().to_vec();
    export.extend((1_u64 << 30).to_be_bytes());
    export.extend(0x0d_u16.to_be_bytes());
    reply(&mut out, opt::GO, rep::INFO, &export);
    reply(&mut out, opt::GO, rep::ACK, b"");
    out
}

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else { return };
    let mode = [Mode::Simple, Mode::Structured, Mode::Extended][usize::from(kind % 4).min(2)];
    let mut bytes = if kind & 8 == 0 { orderly(mode) } else { Vec::new() };
    bytes.extend_from_slice(data);
    let liar = &*LIAR;
    liar.say.lock().expect("one fuzzer").send(bytes).expect("the liar lives");
    let uri = Uri {
        address: Address::Unix(liar.socket.clone()),
        export: String::new(),
        tls: false,
        parameters: Vec::new(),
    };
    let options = Options {
        stall: Duration::from_millis(20),
        give_up: Duration::from_millis(20),
        ..Options::new(&uri)
    };
    let Ok(client) = Client::connect(options) else { return };
    let mut buffer = [0; 4096];
    let _ = client.read(512, &mut buffer);
    let _ = client.status(0, 0, 1 << 20);
    let _ = client.flush();
});
