//! How threads are made, so that each can have fewer rights than the one that asked for it.
//!
//! ```text
//!   any thread ── spawn(kind, …) ──► maker ──clone──► the new thread: its kind's filter, then its work
//! ```
//!
//! A thread inherits the system-call filter of the one that clones it, and a filter is never taken off. So the threads of a
//! sealed process are all children of one that has the union of their filters, is made before any other, and sleeps
//! unless it is asked. Without it (tests, commands that seal nothing) threads are made by whoever asks, without a filter.

use std::io;
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{Builder, JoinHandle};

use crate::{Kind, SandboxError, filter, step};

type Work = Box<dyn FnOnce() + Send>;

/// One thread that shall be made.
struct Order {
    kind: Kind,
    name: String,
    stack_bytes: usize,
    work: Work,
    reply: SyncSender<io::Result<JoinHandle<()>>>,
}

/// Of this process; there is never a second one.
static MAKER: OnceLock<SyncSender<Order>> = OnceLock::new();

/// Orders that wait: more than threads that ask at the same time.
const ORDERS_MAX: usize = 64;
/// It allocates a little and clones.
const STACK_BYTES: usize = 128 * 1024;

/// Starts a thread of this kind with this name (15 bytes are shown by the kernel) and stack.
///
/// # Errors
/// The kernel's, when there are too many threads or there is no memory.
pub fn spawn(
    kind: Kind,
    name: impl Into<String>,
    stack_bytes: usize,
    work: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let name = name.into();
    let Some(maker) = MAKER.get() else {
        return Builder::new().name(name).stack_size(stack_bytes).spawn(work);
    };
    let gone = || io::Error::other("the thread that makes threads is gone");
    let (reply, made) = sync_channel(1);
    let order = Order { kind, name, stack_bytes, work: Box::new(work), reply };
    maker.send(order).map_err(|_| gone())?;
    made.recv().map_err(|_| gone())?
}

/// Starts the thread that makes all others from now on, with its filter. Does nothing when there is one.
pub(crate) fn start_maker() -> Result<(), SandboxError> {
    if MAKER.get().is_some() {
        return Ok(());
    }
    let (orders, wanted) = sync_channel(ORDERS_MAX);
    let (sealed, is_sealed) = sync_channel(1);
    let maker = Builder::new().name("maker".to_owned()).stack_size(STACK_BYTES);
    let run = move || {
        let enforced = filter::enforce(Kind::Maker);
        let go_on = enforced.is_ok();
        // Who waits for it is in the next lines.
        let _ = sealed.send(enforced);
        if go_on {
            make(&wanted);
        }
    };
    maker.spawn(run).map_err(step("start a thread"))?;
    is_sealed.recv().unwrap_or(Err(SandboxError::NoTable(Kind::Maker)))?;
    // Only the first thread of the process calls this.
    let _ = MAKER.set(orders);
    Ok(())
}

fn make(wanted: &Receiver<Order>) {
    for order in wanted {
        let Order { kind, name, stack_bytes, work, reply } = order;
        let run = move || {
            if let Err(error) = filter::enforce(kind) {
                // The maker's filter was taken, so this means a kernel without memory. Unfiltered it must not run.
                eprintln!("no filter for a thread: {error}");
                std::process::abort();
            }
            work();
        };
        // Whoever asked waits for it; a thread that ended meanwhile wants none.
        let _ = reply.send(Builder::new().name(name).stack_size(stack_bytes).spawn(run));
    }
}
