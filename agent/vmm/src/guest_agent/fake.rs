//! For tests: a guest with an agent, as it should be or as the test wants it.

use std::os::fd::AsRawFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use serio_devices::ports::DeviceEnd;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;

/// What a guest does with a request: the bytes of its answer.
type Behaviour = Box<dyn FnMut(&Value) -> Vec<u8> + Send>;

/// A guest with an agent, on a thread: reads lines, answers as it likes.
pub(crate) struct FakeGuest {
    pub(crate) port: HostPort,
    /// Each command that it got.
    asked: Receiver<String>,
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl FakeGuest {
    /// A guest whose agent has its port open.
    pub(crate) fn new(behaviour: impl FnMut(&Value) -> Vec<u8> + Send + 'static) -> FakeGuest {
        let port = HostPort::new().expect("an eventfd");
        let stop = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
        let (sender, asked) = channel();
        let device = port.device();
        device.set_open(true);
        let stopped = stop.try_clone().expect("an eventfd");
        let behaviour = Box::new(behaviour);
        let thread = std::thread::spawn(move || live(&device, &stopped, behaviour, &sender));
        FakeGuest { port, asked, stop, thread: Some(thread) }
    }

    /// A guest as it should be, with two file systems.
    pub(crate) fn good() -> FakeGuest {
        let mut frozen = false;
        FakeGuest::new(move |request| answer_well(request, &mut frozen))
    }

    /// What it was asked since the last call, syncs left out.
    pub(crate) fn asked(&self) -> Vec<String> {
        self.asked.try_iter().filter(|command| command != "guest-sync-delimited").collect()
    }
}

impl Drop for FakeGuest {
    fn drop(&mut self) {
        self.stop.write(1).expect("room");
        self.thread.take().expect("until now").join().expect("no panic");
    }
}

fn live(device: &DeviceEnd, stop: &EventFd, mut behaviour: Behaviour, asked: &Sender<String>) {
    let epoll = Epoll::new().expect("an epoll");
    for (event, set) in [(stop, EventSet::IN), (device.bell(), EventSet::IN | EventSet::EDGE_TRIGGERED)] {
        let add = EpollEvent::new(set, event.as_raw_fd() as u64);
        epoll.ctl(ControlOperation::Add, event.as_raw_fd(), add).expect("added");
    }
    let stopped = |wait_ms: i32| {
        let mut events = [EpollEvent::default(); 2];
        let count = epoll.wait(wait_ms, &mut events).expect("waited");
        events[..count].iter().any(|event| event.data() == stop.as_raw_fd() as u64)
    };
    let mut line = Vec::new();
    let mut piece = [0; 100];
    loop {
        let count = device.take(&mut piece);
        if count == 0 && stopped(-1) {
            return;
        }
        for byte in &piece[..count] {
            match byte {
                0xff => line.clear(),
                b'\n' => {
                    let request: Value = serde_json::from_slice(&line).expect("we send JSON");
                    line.clear();
                    let _ = asked.send(request["execute"].as_str().expect("a command").to_owned());
                    let mut answer = &*behaviour(&request);
                    while !answer.is_empty() {
                        let room = device.room().unwrap_or(answer.len()).min(answer.len());
                        device.offer(&answer[..room]);
                        answer = &answer[room..];
                        if room == 0 && stopped(-1) {
                            return;
                        }
                    }
                }
                byte => line.push(*byte),
            }
        }
    }
}

/// What a stock agent answers.
pub(crate) fn answer_well(request: &Value, frozen: &mut bool) -> Vec<u8> {
    let id = &request["arguments"]["id"];
    match request["execute"].as_str().expect("a command") {
        "guest-sync-delimited" => [b"\xff{\"return\": ".to_vec(), format!("{id}}}\n").into_bytes()].concat(),
        STATUS => format!("{{\"return\": \"{}\"}}\n", if *frozen { "frozen" } else { "thawed" }).into_bytes(),
        FREEZE if *frozen => b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"disabled\"}}\n".to_vec(),
        FREEZE => {
            *frozen = true;
            b"{\"return\": 2}\n".to_vec()
        }
        THAW => {
            let count = if std::mem::take(frozen) { 2 } else { 0 };
            format!("{{\"return\": {count}}}\n").into_bytes()
        }
        other => panic!("{other}"),
    }
}
