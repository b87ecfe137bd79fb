//! The API under hostile load, of a real seriod with a guest beside it: garbage, broken HTTP/2, messages without end, more
//! connections than there is room for, watchers that never read. Throughout it answers health, stays small, and the guest counts on.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::{
    io::{ErrorKind, Read, Write},
    net::TcpStream,
    os::unix::net::UnixStream,
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use common::{
    http2::{
        ACK, CONTINUATION, DATA, END_STREAM, GOAWAY, HEADERS, INITIAL_WINDOW, PING, RST_STREAM, SETTINGS,
        WINDOW_UPDATE, call, connect, frame, header, message_head, read_frame, whole_call,
    },
    rig::Rig,
    tls::{Authority, authority, connect_tls},
};
use prost::Message;
use serio_api::v1::{
    CreateVdcRequest, DeleteVdcRequest, GetNodeRequest, ListVdcsRequest, Quota, WatchEventsRequest,
    node_service_client::NodeServiceClient, vdc_service_client::VdcServiceClient,
};
use tonic::{Code, transport::Channel};

const GET_NODE: &str = "/serio.v1.NodeService/GetNode";
const WATCH: &str = "/serio.v1.NodeService/WatchEvents";
const CREATE_VDC: &str = "/serio.v1.VdcService/CreateVdc";

fn socket(rig: &Rig) -> PathBuf {
    rig.seriod.dir.path().join("run/seriod.sock")
}

/// A rig that listens on TCP too.
async fn rig_with_tls() -> Option<(Rig, Authority, tempfile::TempDir)> {
    let ours = authority();
    let tls = tempfile::tempdir().unwrap();
    ours.write_server(tls.path());
    let more = format!("[grpc]\nlisten = \"127.0.0.1:0\"\ntls_dir = \"{}\"\n", tls.path().display());
    Some((Rig::start(&more).await?, ours, tls))
}

/// Numbers that look like chance, the same in each run.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    (0..length).map(|_| next()).collect()
}

async fn create_vdc(channel: &Channel, name: &str) -> Result<(), tonic::Status> {
    let quota = Some(Quota { vcpus: 1, memory_bytes: 1 << 20, storage_bytes: 1 << 20, ..Quota::default() });
    let request = CreateVdcRequest { vdc_id: name.to_owned(), quota, ..Default::default() };
    VdcServiceClient::new(channel.clone()).create_vdc(request).await.map(drop)
}

/// Sends until it is closed or all is sent; what the peer does about it is its business.
fn shove(stream: &mut impl Write, bytes: &[u8]) -> bool {
    stream.write_all(bytes).is_ok()
}

/// Reads until a frame of that kind, or the end.
fn answered_with(stream: &mut UnixStream, wanted: u8) -> bool {
    let deadline = Instant::now() + Duration::from_secs(20);
    while Instant::now() < deadline {
        match read_frame(stream) {
            Ok((kind, ..)) if kind == wanted => return true,
            Ok(_) => {}
            Err(_) => return false,
        }
    }
    false
}

#[tokio::test]
async fn garbage_and_broken_http2() {
    let Some((mut rig, _, _tls)) = rig_with_tls().await else { return };
    let port = rig.seriod.tcp.unwrap();
    let mut kept: Vec<Box<dyn Write>> = Vec::new();
    for seed in 0..200 {
        let mut unix = UnixStream::connect(socket(&rig)).unwrap();
        shove(&mut unix, &noise(seed, 4096));
        let mut tcp = TcpStream::connect(port).unwrap();
        // Every other one begins as TLS does.
        let begin: &[u8] = if seed % 2 == 0 { &[] } else { &[22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3] };
        shove(&mut tcp, &[begin, &noise(seed, 1024)].concat());
        if seed % 10 == 0 {
            kept.push(Box::new(unix));
            kept.push(Box::new(tcp));
        }
    }
    rig.is_fine("garbage").await;
    let path = socket(&rig);
    let mut http1 = UnixStream::connect(&path).unwrap();
    http1.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    shove(&mut http1, b"GET / HTTP/1.1\r\nHost: seriod\r\n\r\n");
    let end = http1.read_to_end(&mut Vec::new()).map_err(|error| error.kind());
    assert!(!matches!(end, Err(ErrorKind::WouldBlock | ErrorKind::TimedOut)), "it is not closed");

    let mut rapid = connect(&path, &[]);
    let resets: Vec<u8> = (0..2000_u32)
        .flat_map(|n| {
            [call(2 * n + 1, GET_NODE), frame(RST_STREAM, 0, 2 * n + 1, &8_u32.to_be_bytes())].concat()
        })
        .collect();
    for _ in 0..10 {
        shove(&mut rapid, &resets);
    }
    rig.is_fine("rapid reset").await;
    assert!(!shove(&mut rapid, &resets) || answered_with(&mut rapid, GOAWAY), "it goes on with it");

    let mut headers = connect(&path, &[]);
    let huge = header("x-huge", &"h".repeat(16_000));
    shove(&mut headers, &frame(HEADERS, 0, 1, &huge));
    let more = frame(CONTINUATION, 0, 1, &huge);
    let sent = (0..2000).take_while(|_| shove(&mut headers, &more)).count();
    assert!(sent < 2000 || answered_with(&mut headers, GOAWAY), "32 MB of headers are taken");
    rig.is_fine("headers without end").await;

    let mut pings = connect(&path, &[]);
    pings.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
    let many: Vec<u8> = (0..20_000).flat_map(|_| frame(PING, 0, 0, &[7; 8])).collect();
    let mut settings = connect(&path, &[]);
    settings.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
    let changes: Vec<u8> = (0..20_000).flat_map(|_| frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 1])).collect();
    // Neither reads what it is answered.
    shove(&mut pings, &many);
    shove(&mut settings, &changes);
    rig.is_fine("pings and settings").await;

    let mut closed = connect(&path, &[(INITIAL_WINDOW, 0)]);
    for n in 0..200 {
        shove(&mut closed, &whole_call(2 * n + 1, GET_NODE, &[]));
    }
    rig.is_fine("windows of 0").await;
    drop(kept);
}

#[tokio::test]
async fn huge_and_slow_messages() {
    let Some(mut rig) = Rig::start("").await else { return };
    let huge = create_vdc(&rig.channel, &"v".repeat(5 << 20)).await.unwrap_err();
    assert_eq!(huge.code(), Code::ResourceExhausted, "{huge:?}");
    assert!(huge.message().contains("4194304 are the most"), "{huge}");

    // Each says that it will send 4 MiB, and sends as much of it as one may before it is taken.
    let path = socket(&rig);
    let some = [message_head(4 << 20), vec![b'v'; 600]].concat();
    let sends = || {
        let mut stream = connect(&path, &[]);
        for n in 0..100 {
            let id = 2 * n + 1;
            shove(&mut stream, &[call(id, CREATE_VDC), frame(DATA, 0, id, &some)].concat());
        }
        stream
    };
    let waiting = Instant::now();
    let mut first = sends();
    let mut ended = Vec::new();
    let mut end = |calls: usize| {
        while ended.len() < calls && waiting.elapsed() < Duration::from_secs(50) {
            let (kind, flags, id, payload) = read_frame(&mut first).unwrap();
            assert_ne!(kind, GOAWAY, "{payload:?}");
            if kind == HEADERS && flags & END_STREAM != 0 {
                ended.push((waiting.elapsed(), id));
            }
        }
        assert_eq!(ended.len(), calls, "after {:?}", waiting.elapsed());
        ended.iter().filter(|(after, _)| *after > Duration::from_secs(10)).count()
    };
    // There is room for four, in no order: those have a deadline. The others are refused at once.
    assert_eq!(end(96), 0);
    // All that come after them, too.
    let slow: Vec<_> = (0..9).map(|_| sends()).collect();
    rig.is_fine("messages that do not end").await;
    create_vdc(&rig.channel, "small").await.unwrap();
    assert_eq!(end(100), 4);
    drop(slow);
    rig.is_fine("after their deadline").await;
}

/// Holds as many connections as it can, in a process of its own, until its input is closed.
const SWARM: &str = r#"
import resource, socket, sys
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 12000), hard))
held = []
for number in range(5000):
    for family, at in ((socket.AF_UNIX, sys.argv[1]), (socket.AF_INET, ("127.0.0.1", int(sys.argv[2])))):
        try:
            one = socket.socket(family)
            if family == socket.AF_INET:
                one.bind(("127.0.0.2", 0))
            one.connect(at)
            held.append(one)
        except OSError as error:
            problem = error
print(len(held), flush=True)
sys.stdin.read()
"#;

#[tokio::test]
async fn ten_thousand_connections() {
    let Some((mut rig, ours, _tls)) = rig_with_tls().await else { return };
    let before = rig.descriptors();
    let port = rig.seriod.tcp.unwrap().port().to_string();
    let swarm = Command::new("python3")
        .args(["-c", SWARM, socket(&rig).to_str().unwrap(), &port])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let Ok(mut swarm) = swarm else { return eprintln!("skipped: python3 is not installed") };
    let mut held = String::new();
    rig.is_healthy("while they come").await;
    let mut output = std::io::BufReader::new(swarm.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut output, &mut held).unwrap();
    let held: usize = held.trim().parse().unwrap();
    eprintln!("{held} were made");
    assert!(held > 9000, "{held}");
    rig.is_fine("ten thousand connections").await;
    let channel = connect_tls(&rig.seriod, &ours, Some(ours.issue("auditor"))).await.unwrap();
    NodeServiceClient::new(channel).get_node(GetNodeRequest {}).await.unwrap();
    // None of them has said anything, so those that had a place lose it.
    let deadline = Instant::now() + Duration::from_secs(40);
    while rig.descriptors() > before + 8 {
        assert!(Instant::now() < deadline, "{} descriptors, {before} before", rig.descriptors());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    drop(swarm.stdin.take());
    swarm.wait().unwrap();
    rig.is_fine("after them").await;
}

#[tokio::test]
async fn a_thousand_watchers_that_never_read() {
    let Some((mut rig, ours, _tls)) = rig_with_tls().await else { return };
    let path = socket(&rig);
    let watch = WatchEventsRequest { follow: true, ..Default::default() }.encode_to_vec();
    for number in 0..20 {
        create_vdc(&rig.channel, &format!("v{number}")).await.unwrap();
    }
    let mut deaf: Vec<UnixStream> = (0..10).map(|_| connect(&path, &[(INITIAL_WINDOW, 0)])).collect();
    let mut refused = 0;
    for stream in &mut deaf {
        for n in 0..100 {
            assert!(shove(stream, &whole_call(2 * n + 1, WATCH, &watch)));
        }
        // All are answered before the next one asks: it is the last for whom there are no places.
        refused = 0;
        let mut answered = 0;
        while answered < 100 {
            let (kind, flags, ..) = read_frame(stream).unwrap();
            answered += usize::from(kind == HEADERS);
            refused += usize::from(kind == HEADERS && flags & END_STREAM != 0);
        }
    }
    // So many are too many for one: it is told so, and others are not concerned.
    assert!(refused > 0, "all thousand have a place");
    rig.is_fine("a thousand watchers").await;
    let channel = connect_tls(&rig.seriod, &ours, Some(ours.issue("auditor"))).await.unwrap();
    let watch = WatchEventsRequest { from: 1, follow: true, ..Default::default() };
    let mut reads = NodeServiceClient::new(channel).watch_events(watch).await.unwrap().into_inner();
    let mut heard = 0;
    for number in 0..100 {
        let name = format!("w{number}");
        create_vdc(&rig.channel, &name).await.unwrap();
        let delete = DeleteVdcRequest { name: format!("vdcs/{name}"), ..Default::default() };
        VdcServiceClient::new(rig.channel.clone()).delete_vdc(delete).await.unwrap();
    }
    while heard < 220 {
        heard = reads.message().await.unwrap().unwrap().number;
    }
    rig.is_fine("two hundred events later").await;
    // The first one reads at last: what waited for it, and that there is more to ask for.
    tokio::time::sleep(Duration::from_secs(16)).await;
    let first = &mut deaf[0];
    let wide = (1_u32 << 20).to_be_bytes();
    let open: Vec<u8> = [0, 1].iter().flat_map(|id| frame(WINDOW_UPDATE, 0, *id, &wide)).collect();
    assert!(shove(first, &[frame(SETTINGS, ACK, 0, &[]), open].concat()));
    let (mut data, mut ended) = (0, false);
    while !ended {
        let (kind, flags, id, payload) = read_frame(first).unwrap();
        data += if (kind, id) == (DATA, 1) { payload.len() } else { 0 };
        ended = id == 1 && flags & END_STREAM != 0;
    }
    assert!(data > 0);
    rig.is_fine("in the end").await;
}

/// Answers that nobody reads, however wide the windows are.
#[tokio::test]
async fn answers_that_nobody_takes() {
    let Some(mut rig) = Rig::start("").await else { return };
    for number in 0..200 {
        create_vdc(&rig.channel, &format!("v{number}")).await.unwrap();
    }
    let path = socket(&rig);
    let list = ListVdcsRequest::default().encode_to_vec();
    let mut deaf = Vec::new();
    for _ in 0..40 {
        let mut stream = connect(&path, &[(INITIAL_WINDOW, (1 << 31) - 1)]);
        shove(&mut stream, &frame(WINDOW_UPDATE, 0, 0, &((1_u32 << 31) - 1 - 65_535).to_be_bytes()));
        stream.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
        for n in 0..500 {
            if !shove(&mut stream, &whole_call(2 * n + 1, "/serio.v1.VdcService/ListVdcs", &list)) {
                break;
            }
        }
        deaf.push(stream);
    }
    rig.is_fine("answers that nobody takes").await;
}
