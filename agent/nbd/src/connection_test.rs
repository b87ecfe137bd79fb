//! Connections over a socket pair, before an export whose operations are done when the test says so.

use std::{
    io::{Read, Write},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    thread::JoinHandle,
};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::*;
use crate::{
    backend::Backend,
    budget::Budget,
    handshake::{GREETING_BYTES, OptionHeader},
    places::Places,
    serve::{Host, serve},
    server::{Event, Limits, Server, Stop},
    wire::opt,
};

struct Memory(Vec<u8>);

impl Payload for Memory {
    fn bytes(&self) -> &[u8] {
        &self.0
    }
    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
    fn resize(&mut self, len: usize) {
        self.0.resize(len, 7);
    }
}

/// Operations are held until `held` is given back.
#[derive(Default)]
struct Shared {
    held: Mutex<Vec<(u64, Option<Memory>)>>,
    release: Mutex<bool>,
    /// Times that the connection waited.
    waits: AtomicUsize,
    event: Mutex<Option<Arc<EventFd>>>,
}

struct Slow(Arc<Shared>);

struct SlowQueue(Arc<Shared>, Arc<EventFd>);

impl Queue for SlowQueue {
    type Payload = Memory;
    fn payload(&mut self, len: usize) -> Memory {
        Memory(vec![7; len])
    }
    fn submit(&mut self, tag: u64, command: Command<Memory>) {
        let payload = match command {
            Command::Read { payload, .. } | Command::Write { payload, .. } => Some(payload),
            _ => None,
        };
        self.0.held.lock().expect("held").push((tag, payload));
    }
    fn kick(&mut self) {}
    fn reap(&mut self, mut each: impl FnMut(u64, Result<(), i32>, Option<Memory>)) {
        let _ = self.1.read();
        if *self.0.release.lock().expect("release") {
            for (tag, payload) in self.0.held.lock().expect("held").drain(..) {
                each(tag, Ok(()), payload);
            }
        }
    }
    fn event_fd(&self) -> BorrowedFd<'_> {
        self.0.waits.fetch_add(1, Ordering::SeqCst);
        self.1.as_fd()
    }
    fn status(&mut self, _: usize, _: u64, len: u64, mut each: impl FnMut(u64, u32) -> bool) {
        each(len, 0);
    }
}

impl Backend for Slow {
    type Queue = SlowQueue;
    fn info(&self) -> ExportInfo {
        ExportInfo {
            name: String::new(),
            description: String::new(),
            size_bytes: 1 << 30,
            read_only: false,
            releases: false,
            fast_zeroes: true,
            contexts: Vec::new(),
        }
    }
    fn open(&self, _: u16) -> std::io::Result<SlowQueue> {
        let event = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK)?);
        *self.0.event.lock().expect("event") = Some(Arc::clone(&event));
        Ok(SlowQueue(Arc::clone(&self.0), event))
    }
}

struct Client {
    stream: UnixStream,
    shared: Arc<Shared>,
    ended: mpsc::Receiver<Result<End, ConnectionError>>,
    thread: JoinHandle<()>,
}

/// A client that has its export.
fn client(limits: Limits, budget: &Arc<Budget>) -> Client {
    let (near, mut far) = UnixStream::pair().expect("pair");
    let shared: Arc<Shared> = Arc::default();
    let (tell, ended) = mpsc::channel();
    let (backend, budget) = (Slow(Arc::clone(&shared)), Arc::clone(budget));
    let thread = std::thread::spawn(move || {
        let stop = Stop::new().expect("stop");
        let places = Places::new(4);
        let near = Arc::new(near);
        let place = places.enter(Arc::clone(&near));
        let host = Host {
            backends: &[backend],
            limits,
            budget: &budget,
            places: &places,
            stop: stop.event_fd(),
            log: &|_| (),
        };
        let _ = tell.send(serve(&near, &host, &place));
    });
    greet(&mut far);
    Client { stream: far, shared, ended, thread }
}

/// Up to where it has its export.
fn greet(far: &mut UnixStream) {
    far.set_read_timeout(Some(Duration::from_secs(20))).expect("timeout");
    far.read_exact(&mut [0; GREETING_BYTES]).expect("greeting");
    far.write_all(&[0, 0, 0, 3]).expect("flags");
    far.write_all(&OptionHeader::encode(opt::EXPORT_NAME, b"")).expect("option");
    far.read_exact(&mut [0; 10]).expect("export");
}

impl Client {
    fn ask(&mut self, command: u16, len: u32) {
        let request = Request { flags: 0, command, cookie: 1, offset: 0, len: len.into() };
        self.stream.write_all(request.encode(Mode::Simple).bytes()).expect("request");
    }

    /// Waits until so many operations are under way.
    fn until_held(&self, count: usize) {
        while self.shared.held.lock().expect("held").len() < count {
            std::thread::yield_now();
        }
    }

    fn release(&self) {
        *self.shared.release.lock().expect("release") = true;
        // The answer to EXPORT_NAME comes a moment before the export is opened.
        let event = loop {
            if let Some(event) = self.shared.event.lock().expect("event").clone() {
                break event;
            }
            std::thread::yield_now();
        };
        event.write(1).expect("signal");
    }

    fn end(&self) -> Result<End, ConnectionError> {
        self.ended.recv_timeout(Duration::from_secs(20)).expect("the connection ends")
    }
}

fn budget() -> Arc<Budget> {
    Arc::new(Budget::new(64 << 20))
}

#[test]
fn a_client_that_vanishes_with_all_slots_in_use_is_let_go_at_once() {
    let mut client = client(Limits::default(), &budget());
    for _ in 0..=DEPTH {
        client.ask(cmd::FLUSH, 0);
    }
    client.until_held(usize::from(DEPTH));
    client.stream.shutdown(std::net::Shutdown::Both).expect("shutdown");
    assert!(matches!(client.end(), Ok(End::Vanished)), "though its operations are not done");
    client.thread.join().expect("thread");
}

#[test]
fn what_was_asked_before_a_goodbye_is_done_without_spinning() {
    let mut client = client(Limits::default(), &budget());
    client.ask(cmd::FLUSH, 0);
    client.ask(cmd::DISC, 0);
    client.until_held(1);
    let fd = client.stream.try_clone().expect("clone");
    fd.shutdown(std::net::Shutdown::Both).expect("shutdown");
    let before = client.shared.waits.load(Ordering::SeqCst);
    assert!(client.ended.recv_timeout(Duration::from_millis(300)).is_err(), "it waits for the operation");
    assert!(client.shared.waits.load(Ordering::SeqCst) - before < 10, "and does nothing else");
    client.release();
    assert!(matches!(client.end(), Ok(End::Goodbye)));
    client.thread.join().expect("thread");
}

#[test]
fn clients_that_stand_still_are_dropped() {
    let limits = Limits { stall: Duration::from_millis(200), ..Limits::default() };
    // A write whose payload never comes.
    let mut client = client_of(limits);
    client.ask(cmd::WRITE, 4096);
    client.stream.write_all(&[1; 100]).expect("a part");
    assert!(matches!(client.end(), Err(ConnectionError::Stalled(_))));
    // Replies that are not read.
    let mut client = client_of(limits);
    client.release();
    for _ in 0..8 {
        client.ask(cmd::READ, 4 << 20);
    }
    assert!(matches!(client.end(), Err(ConnectionError::Stalled(_))));
    // One that has nothing to say stays, and so does one whose operations take long.
    let mut client = client_of(limits);
    client.ask(cmd::FLUSH, 0);
    client.until_held(1);
    assert!(client.ended.recv_timeout(Duration::from_millis(600)).is_err());
    client.release();
    client.stream.read_exact(&mut [0; 16]).expect("the reply");
    assert!(client.ended.recv_timeout(Duration::from_millis(600)).is_err());
}

fn client_of(limits: Limits) -> Client {
    client(limits, &budget())
}

#[test]
fn memory_is_waited_for_and_nothing_is_refused() {
    let budget = Arc::new(Budget::new(4 << 20));
    let mut clients: Vec<Client> = (0..3).map(|_| client(Limits::default(), &budget)).collect();
    for client in &mut clients {
        client.ask(cmd::READ, 4 << 20);
    }
    // One has all the memory there is; the others wait, and small requests are still served.
    while budget.waiting() < 2 || clients.iter().all(|c| c.shared.held.lock().expect("held").is_empty()) {
        std::thread::yield_now();
    }
    let busy = |c: &Client| !c.shared.held.lock().expect("held").is_empty();
    assert_eq!(clients.iter().filter(|c| busy(c)).count(), 1);
    for client in &mut clients {
        client.release();
    }
    // All at once: who does not read its data keeps the memory that another waits for.
    std::thread::scope(|scope| {
        for client in &clients {
            let mut stream = &client.stream;
            scope.spawn(move || {
                let mut data = vec![0; 4 << 20];
                stream.read_exact(&mut [0; 16]).expect("head");
                stream.read_exact(&mut data).expect("data");
                assert!(data.iter().all(|b| *b == 7));
            });
        }
    });
    // More than there is in all: it gets all there is.
    clients[0].ask(cmd::READ, 8 << 20);
    clients[0].stream.read_exact(&mut [0; 16]).expect("head");
    clients[0].stream.read_exact(&mut vec![0; 8 << 20]).expect("data");
}

/// One of two connections says goodbye, and the other breaks off just when the first has left its place.
#[test]
fn once_ends_whoever_leaves_last() {
    let dir = tempfile::tempdir().expect("tempdir");
    let socket = dir.path().join("s");
    let listener = std::os::unix::net::UnixListener::bind(&socket).expect("listen");
    let stop = Stop::new().expect("stop");
    let server = Server::new(vec![Slow(Arc::default())], Limits { once: true, ..Limits::default() });
    let (tell, clients) = mpsc::channel();
    let (go_on, waits) = mpsc::channel();
    let (waits, both) = (Mutex::new(waits), AtomicBool::new(false));
    let log = move |event: Event<'_>| {
        let Event::Clients(n) = event else { return };
        both.fetch_or(n == 2, Ordering::SeqCst);
        tell.send((n, nix::unistd::gettid())).expect("the test listens");
        if n == 1 && both.load(Ordering::SeqCst) {
            waits.lock().expect("only one").recv().expect("the test lets it go on");
        }
    };
    let (done, ended) = mpsc::channel();
    let thread = std::thread::spawn(move || done.send(server.run(&listener, &stop, &log).is_ok()));
    let expect = |n: usize| {
        let (clients, thread) = clients.recv_timeout(Duration::from_secs(60)).expect("a change");
        assert_eq!(clients, n);
        thread
    };
    let mut connected = [1, 2].map(|n| {
        let mut client = UnixStream::connect(&socket).expect("connect");
        greet(&mut client);
        expect(n);
        Some(client)
    });
    let goodbye = Request { flags: 0, command: cmd::DISC, cookie: 1, offset: 0, len: 0 };
    let mut first = connected[0].take().expect("connected");
    first.write_all(goodbye.encode(Mode::Simple).bytes()).expect("goodbye");
    expect(1);
    drop(connected);
    // The other one is gone with all that it had to do.
    let thread_of_other = format!("/proc/self/task/{}", expect(0));
    let since = std::time::Instant::now();
    while std::path::Path::new(&thread_of_other).exists() {
        assert!(since.elapsed() < Duration::from_secs(60), "its thread stays");
        std::thread::yield_now();
    }
    go_on.send(()).expect("the first is still on its way");
    assert_eq!(ended.recv_timeout(Duration::from_secs(60)), Ok(true), "it does not end");
    thread.join().expect("server").expect("told");
}
