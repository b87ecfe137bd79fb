//! `serio-volumed agent --control-fd N`: one job or one export, at the request of `seriod`.
//!
//! ```text
//! Waiting ──job──► Busy ──► its connection closes ──► the process ends
//!    │──Export──► Exporting ──Stop──► the process ends
//!    └── nothing within LAUNCH_WAIT ──► the process ends
//! ```
//! Threads: one accepts control connections, one serves each, one watches the job's connection for a hang-up, and an
//! export has the NBD server's own. Everything is passed as descriptors; nothing is opened here.

use std::{
    io,
    os::{
        fd::{AsFd, OwnedFd, RawFd},
        unix::net::{UnixListener, UnixStream},
    },
    process,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::Context;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serio_control::{
    Channel, LAUNCH_WAIT,
    message::{Body, Code, Empty, Failed, JobStatus},
};
use serio_nbd::{Event, Limits, Server, Stop};
use serio_sandbox::{Kind, Start, threads};

use crate::{
    bootdisk,
    copy::Progress,
    jobs::{self, JobResult},
    layers,
};

/// Control connections at once: seriod has one, and one more after its restart.
const CONNECTIONS_MAX: usize = 8;
/// What a client of 128 operations, a few layers and the control sockets need.
const DESCRIPTORS_MAX: u64 = 1024;
/// A thread for each client, and a few of its own.
const THREADS_MAX: u64 = 1200;
/// Of a thread that waits.
const STACK_BYTES: usize = 64 << 10;
/// Of one that works: formats and maps have large buffers on the heap, but some on the stack.
const JOB_STACK_BYTES: usize = 2 << 20;
const WRITE_WAIT: Duration = Duration::from_secs(10);

enum State {
    Waiting,
    /// A job runs or has run.
    Busy,
    Exporting {
        stop: Stop,
        server: JoinHandle<()>,
    },
    Stopped,
}

struct Agent {
    state: Mutex<State>,
    progress: Progress,
    job_done: AtomicBool,
    clients: Arc<AtomicU32>,
    connections: AtomicUsize,
}

impl Agent {
    fn state(&self) -> MutexGuard<'_, State> {
        // States are replaced whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_waiting(&self) -> bool {
        matches!(*self.state(), State::Waiting)
    }
}

/// Takes the listening control socket over and serves it until the job or the export is done.
pub fn main(control_fd: RawFd, first_uid: u32) -> anyhow::Result<()> {
    let listener = UnixListener::from(serio_sandbox::take_descriptor(control_fd)?);
    let missing = serio_sandbox::seal_at_start(&Start {
        keep: Some(&[control_fd]),
        uid: serio_sandbox::own_uid(first_uid),
        descriptors_max: DESCRIPTORS_MAX,
        threads_max: THREADS_MAX,
        main: Kind::Jobs,
    })?;
    if !missing.is_empty() {
        eprintln!("sealed, but for what this host did not allow: {}", missing.join(", "));
    }
    listener.set_nonblocking(true).context("cannot use the control socket")?;
    let agent = Arc::new(Agent {
        state: Mutex::new(State::Waiting),
        progress: Progress::default(),
        job_done: AtomicBool::new(false),
        clients: Arc::new(AtomicU32::new(0)),
        connections: AtomicUsize::new(0),
    });
    let deadline = Instant::now() + LAUNCH_WAIT;
    loop {
        // An export lasts; before it, the deadline is looked at now and then.
        let exporting = matches!(*agent.state(), State::Exporting { .. });
        let wait = if exporting { PollTimeout::NONE } else { PollTimeout::from(500_u16) };
        match poll(&mut [PollFd::new(listener.as_fd(), PollFlags::POLLIN)], wait) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(io::Error::from(e)).context("cannot wait on the control socket"),
        }
        if agent.is_waiting() && Instant::now() > deadline {
            anyhow::bail!("nobody asked for anything within {} s of the start", LAUNCH_WAIT.as_secs());
        }
        let Ok((stream, _)) = listener.accept() else { continue };
        if agent.connections.fetch_add(1, Ordering::SeqCst) >= CONNECTIONS_MAX {
            agent.connections.fetch_sub(1, Ordering::SeqCst);
            continue;
        }
        let serving = Arc::clone(&agent);
        let spawned = threads::spawn(Kind::Job, "control", JOB_STACK_BYTES, move || {
            serve(&serving, stream);
            serving.connections.fetch_sub(1, Ordering::SeqCst);
        });
        if let Err(e) = spawned {
            agent.connections.fetch_sub(1, Ordering::SeqCst);
            eprintln!("no thread for a control connection: {e}");
        }
    }
}

fn serve(agent: &Arc<Agent>, stream: UnixStream) {
    if stream.set_nonblocking(false).and_then(|()| stream.set_write_timeout(Some(WRITE_WAIT))).is_err() {
        return;
    }
    let mut channel = Channel::new(stream);
    loop {
        // Closed, or it does not speak the protocol: either way this connection is over, and only this one.
        let Ok((frame, descriptors)) = channel.receive() else { return };
        let stopping = matches!(frame.body, Some(Body::Stop(_)));
        let reply = match frame.body {
            Some(body) => answer(agent, &channel, body, descriptors).unwrap_or_else(Body::Failed),
            None => Body::Failed(refusal(Code::Invalid, "an empty request")),
        };
        let sent = channel.send(frame.id, reply, &[]);
        if stopping {
            process::exit(0);
        }
        if sent.is_err() {
            return;
        }
    }
}

fn refusal(code: Code, message: &str) -> Failed {
    Failed { code: code.into(), message: message.to_owned(), field: String::new() }
}

fn answer(agent: &Arc<Agent>, channel: &Channel, body: Body, descriptors: Vec<OwnedFd>) -> JobResult {
    match &body {
        Body::Status(_) => {
            let clients = agent.clients.load(Ordering::SeqCst);
            return Ok(Body::JobStatus(JobStatus { clients, ..jobs::status(&agent.progress) }));
        }
        Body::Stop(_) => {
            stop(agent);
            return Ok(Body::Done(Empty {}));
        }
        Body::CreateVolume(_)
        | Body::ImportImage(_)
        | Body::SnapshotStopped(_)
        | Body::InspectVolume(_)
        | Body::CheckVolume(_)
        | Body::ResizeVolume(_)
        | Body::CloneVolume(_)
        | Body::RollbackVolume(_)
        | Body::ListChanges(_)
        | Body::MergeLayer(_)
        | Body::FindKernel(_)
        | Body::Export(_) => {}
        _ => return Err(refusal(Code::Invalid, "serio-volumed does not know this request")),
    }
    {
        let mut state = agent.state();
        if !matches!(*state, State::Waiting) {
            return Err(refusal(Code::Precondition, "this process has a job already: start another one"));
        }
        *state = State::Busy;
    }
    if let Body::Export(ask) = &body {
        return export(agent, ask, descriptors);
    }
    end_with(agent, channel)?;
    let result = match &body {
        Body::CreateVolume(ask) => jobs::create_volume(ask, descriptors, &agent.progress),
        Body::ImportImage(ask) => jobs::import_image(ask, descriptors, &agent.progress),
        Body::SnapshotStopped(ask) => jobs::snapshot_stopped(ask, descriptors),
        Body::CheckVolume(ask) => jobs::check_volume(ask, descriptors, &agent.progress),
        Body::ResizeVolume(ask) => layers::resize_volume(ask, descriptors),
        Body::CloneVolume(ask) => layers::clone_volume(ask, descriptors),
        Body::RollbackVolume(ask) => layers::rollback_volume(ask, descriptors),
        Body::MergeLayer(ask) => layers::merge_layer(ask, descriptors, &agent.progress),
        Body::ListChanges(ask) => layers::list_changes(ask, descriptors),
        Body::FindKernel(ask) => bootdisk::find_kernel(ask, descriptors, &agent.progress),
        _ => jobs::inspect_volume(descriptors),
    };
    agent.job_done.store(true, Ordering::SeqCst);
    result
}

/// A job belongs to its connection: nobody waits for the result once it is closed.
fn end_with(agent: &Arc<Agent>, channel: &Channel) -> Result<(), Failed> {
    let io = |e: io::Error| jobs::failed(Code::Internal, "", &e);
    let stream = channel.stream().try_clone().map_err(io)?;
    let agent = Arc::clone(agent);
    threads::spawn(Kind::Jobs, "hang-up", STACK_BYTES, move || {
        // POLLHUP, which is always reported, is the peer's close.
        let mut fds = [PollFd::new(stream.as_fd(), PollFlags::empty())];
        while poll(&mut fds, PollTimeout::NONE) == Err(nix::errno::Errno::EINTR) {}
        process::exit(i32::from(!agent.job_done.load(Ordering::SeqCst)));
    })
    .map_err(io)?;
    Ok(())
}

fn export(agent: &Arc<Agent>, ask: &serio_control::message::Export, descriptors: Vec<OwnedFd>) -> JobResult {
    let io = |e: io::Error| jobs::failed(Code::Internal, "", &e);
    let opened = jobs::open_export(ask, descriptors);
    if opened.is_err() {
        // It may be asked again, with what was wrong put right.
        *agent.state() = State::Waiting;
    }
    let (listener, export) = opened?;
    let stop = Stop::new().map_err(io)?;
    let limits = Limits { once: ask.once, ..Limits::default() };
    let clients = Arc::clone(&agent.clients);
    let stopping = stop.clone();
    let server = threads::spawn(Kind::Nbd, "nbd-server", JOB_STACK_BYTES, move || {
        let log = Log::default();
        let server = Server::new(vec![export], limits);
        let result = server.run(&listener, &stopping, &|event| {
            if let Event::Clients(n) = event {
                clients.store(u32::try_from(n).unwrap_or(u32::MAX), Ordering::SeqCst);
            }
            log.event(&event);
        });
        if let Err(e) = result {
            eprintln!("the export ends: {:#}", anyhow::Error::from(e));
            process::exit(1);
        }
        if limits.once {
            // Its first user has gone, or it was asked to end and is about to. The volume is closed with the server.
            drop(server);
            process::exit(0);
        }
    })
    .map_err(io)?;
    *agent.state() = State::Exporting { stop, server };
    Ok(Body::Done(Empty {}))
}

fn stop(agent: &Agent) {
    let state = std::mem::replace(&mut *agent.state(), State::Stopped);
    if let State::Exporting { stop, server } = state {
        stop.stop();
        // The volume is closed in order when the server ends. A panic of it was reported where it happened.
        let _ = server.join();
    }
}

/// Tells of NBD clients on standard error, once a second at most: clients must not fill a disk with words.
#[derive(Debug, Default)]
pub struct Log {
    last_s: AtomicU64,
    dropped: AtomicU64,
}

impl Log {
    /// Writes one line, or counts it.
    pub fn event(&self, event: &Event<'_>) {
        let text = match event {
            Event::Refused => "an NBD client was refused: no thread can be started for it".to_owned(),
            Event::Dropped(error) => {
                let mut text = format!("an NBD client was dropped: {error}");
                let mut source = std::error::Error::source(error);
                while let Some(reason) = source {
                    text = format!("{text}: {reason}");
                    source = reason.source();
                }
                text
            }
            Event::Clients(_) => return,
        };
        // Seconds since 1970 will do: only a change matters.
        let now_s =
            std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
        if self.last_s.swap(now_s, Ordering::Relaxed) == now_s {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        match self.dropped.swap(0, Ordering::Relaxed) {
            0 => eprintln!("{text}"),
            n => eprintln!("{text} ({n} more lines were left out)"),
        }
    }
}
