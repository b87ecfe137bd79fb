//! A device's thread, and how it sleeps.
//!
//! A worker ends only when it is told to: after a failure it stays asleep until the reset, so that whoever
//! resets the device always finds it. It is told in one of two ways: to *stop* (a reset: what is under way ends without an
//! answer) or to *finish* (a suspension: what is under way is answered, and the thread hands back its queues and what
//! else is to outlive it). Which of the two, [`Poller::finishing`] says after [`STOP`].

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use serio_sandbox::{Kind, threads};
use serio_virtio::{ActivateError, SuspendError};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Enough for our loops, whose large buffers are on the heap; untouched pages cost nothing.
const STACK_BYTES: usize = 256 << 10;
/// More descriptors than any device watches.
const EVENTS_MAX: usize = 12;
/// Which descriptor is ready: the worker's own bell is this one, the others are numbered by the device.
pub(crate) const STOP: u64 = u64::MAX;

/// What a thread sleeps on.
pub(crate) struct Poller {
    epoll: Epoll,
    finishing: Arc<AtomicBool>,
}

impl Poller {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { epoll: Epoll::new()?, finishing: Arc::default() })
    }

    /// Whether the thread shall answer what is under way before it ends. Known once [`STOP`] was seen.
    pub(crate) fn finishing(&self) -> bool {
        self.finishing.load(Ordering::Acquire)
    }

    /// Reported as long as it is readable.
    pub(crate) fn add_readable(&self, fd: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        self.add_set(fd, EventSet::IN, token)
    }

    /// For a descriptor whose both directions matter, once for each event.
    pub(crate) fn add_both(&self, fd: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        self.add_set(fd, EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED, token)
    }

    /// Watches for exactly this, as long as it holds.
    pub(crate) fn add_set(&self, fd: BorrowedFd<'_>, set: EventSet, token: u64) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), EpollEvent::new(set, token))
    }

    /// Reported once each time that it becomes readable.
    pub(crate) fn add_edge(&self, fd: RawFd, token: u64) -> io::Result<()> {
        let set = EventSet::IN | EventSet::EDGE_TRIGGERED;
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(set, token))
    }

    /// Reported once for each event: the eventfd is then never read, which saves a system call.
    pub(crate) fn add_event(&self, event: &EventFd, token: u64) -> io::Result<()> {
        self.add_edge(event.as_raw_fd(), token)
    }

    /// Changes what a descriptor is watched for.
    pub(crate) fn change(&self, fd: RawFd, set: EventSet, token: u64) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Modify, fd, EpollEvent::new(set, token))
    }

    /// Sleeps until something is ready and calls `each` with its token and what is ready.
    pub(crate) fn wait(&self, mut each: impl FnMut(u64, EventSet)) -> io::Result<()> {
        let mut events = [EpollEvent::default(); EVENTS_MAX];
        let count = match self.epoll.wait(-1, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            result => result?,
        };
        for event in events.iter().take(count) {
            each(event.data(), event.event_set());
        }
        Ok(())
    }
}

/// A running thread that can be told to end, and what it leaves.
pub(crate) struct Worker<T = ()> {
    stop: EventFd,
    finishing: Arc<AtomicBool>,
    thread: JoinHandle<()>,
    left: Arc<Mutex<Option<T>>>,
}

impl<T: Send + 'static> Worker<T> {
    /// Starts `run` on a thread with this name (15 bytes are shown by the kernel) and the system-call filter of its kind.
    /// `run` ends when [`STOP`] is
    /// ready in its poller.
    pub(crate) fn spawn(
        kind: Kind,
        name: String,
        poller: Poller,
        run: impl FnOnce(Poller) -> T + Send + 'static,
    ) -> Result<Worker<T>, ActivateError> {
        let stop =
            EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(ActivateError::io("make a thread's eventfd"))?;
        poller.add_event(&stop, STOP).map_err(ActivateError::io("watch a thread's eventfd"))?;
        let finishing = poller.finishing.clone();
        let left = Arc::new(Mutex::new(None));
        let slot = left.clone();
        let work = move || {
            let what = run(poller);
            *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(what);
        };
        let thread = threads::spawn(kind, name, STACK_BYTES, work)
            .map_err(ActivateError::io("start a device's thread"))?;
        Ok(Worker { stop, finishing, thread, left })
    }

    /// Tells the thread to end. Several can be told before the first is waited for.
    pub(crate) fn tell(&self) {
        // Fails only when the counter is full, and then the thread has been told.
        let _ = self.stop.write(1);
    }

    /// Tells the thread to answer what is under way, and to end then.
    pub(crate) fn tell_to_finish(&self) {
        self.finishing.store(true, Ordering::Release);
        self.tell();
    }

    /// Waits for the thread and what it leaves; `None`: it panicked.
    pub(crate) fn join(self) -> Option<T> {
        self.tell();
        self.thread.join().ok()?;
        self.left.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Ends them all: tells everyone first, so that they end side by side.
pub(crate) fn join_all<T: Send + 'static>(workers: &mut Vec<Worker<T>>) {
    for worker in workers.iter() {
        worker.tell();
    }
    for worker in workers.drain(..) {
        // A thread that panicked is over too, which is all that matters here.
        let _ = worker.join();
    }
}

/// Lets them all finish what they have begun; what they leave, in their order.
pub(crate) fn finish_all<T: Send + 'static>(workers: &mut Vec<Worker<T>>) -> Result<Vec<T>, SuspendError> {
    for worker in workers.iter() {
        worker.tell_to_finish();
    }
    // All of them, also behind one that is lost: nobody may be at work afterwards.
    let left: Vec<Option<T>> = workers.drain(..).map(Worker::join).collect();
    left.into_iter().collect::<Option<Vec<T>>>().ok_or(SuspendError::ThreadLost)
}
