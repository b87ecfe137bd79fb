//! What the queues of a volume share: the current stack, the gate, the claims, the mailboxes.
//!
//! - **Gate**: an operation enters before it looks at the stack and leaves when it is answered. Who changes the stack
//!   (a snapshot, a resize, the end of a merge) closes the gate, waits until nobody is inside, changes it, opens it. Entering is two operations on
//!   atomics; the counter is the queue's own, so queues do not share a cache line.
//! - **Claims**: a write to blocks that the head does not hold yet has them for itself until its bits are set,
//!   else two partial writes would each copy the block up over the other's bytes. Blocks that are data already
//!   need no claim. In an encrypted head a write that covers a sector in part reads the rest of it first, so it claims its
//!   blocks as well, and the other writes to data *share* them: many at a time, and none beside a claim.
//! - An operation that finds the gate closed or its blocks claimed is *parked* in its queue; whoever opens or
//!   releases signals the queues that have parked something, and their `reap` tries again.

use std::sync::{
    Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak,
    atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
};
use std::time::{Duration, Instant};

use nix::sys::eventfd::EventFd;

use crate::{crypto::VdcSecret, error::IoError, keeper::KeeperState, stack::Stack, uring::signal};

/// Locks; the states here are replaced whole, so a panic elsewhere leaves them right.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A queue, as others see it.
pub(crate) struct QueueShared {
    pub(crate) event: Arc<EventFd>,
    /// Operations inside the gate.
    inside: AtomicU32,
    parked: AtomicBool,
    /// Slots whose map commit is done.
    pub(crate) mailbox: Mutex<Vec<(u32, Result<(), IoError>)>>,
}

impl QueueShared {
    pub(crate) fn new(event: Arc<EventFd>) -> QueueShared {
        QueueShared {
            event,
            inside: AtomicU32::new(0),
            parked: AtomicBool::new(false),
            mailbox: Mutex::new(Vec::new()),
        }
    }
}

/// A range of blocks that one operation has for itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Claim {
    pub(crate) first: u64,
    pub(crate) count: u64,
}

impl Claim {
    fn overlaps(&self, other: &Claim) -> bool {
        self.first < other.first + other.count && other.first < self.first + self.count
    }
}

#[derive(Default)]
struct Claims {
    held: Vec<Claim>,
    /// Of writes of whole units to encrypted data: they exclude what is in `held`, not each other.
    shared: Vec<Claim>,
    waited_for: bool,
}

/// See the head of this file.
pub(crate) struct Core {
    /// That of the head; changes with the stack.
    size_bytes: AtomicU64,
    pub(crate) read_only: bool,
    /// What the data keys of this volume's layers are wrapped with; given at the open.
    pub(crate) secret: Option<VdcSecret>,
    stack: Mutex<Arc<Stack>>,
    /// Counts changes of `stack`.
    pub(crate) stack_epoch: AtomicU64,
    pub(crate) poisoned: AtomicBool,
    closed: AtomicBool,
    /// Whether somebody has the gate closed, who is the only one that may change the stack.
    holder: Mutex<bool>,
    holder_gone: Condvar,
    claims: Mutex<Claims>,
    queues: Mutex<Vec<Weak<QueueShared>>>,
    /// Held while the map is committed or the stack changes.
    pub(crate) commit: Mutex<()>,
    pub(crate) keeper: Mutex<KeeperState>,
    pub(crate) keeper_wake: Condvar,
    /// Heads go past the page cache where they can.
    pub(crate) direct: AtomicBool,
    /// A merge exists.
    pub(crate) merging: AtomicBool,
    /// A merge could not sync the map of a sealed layer: none may end until the volume is reopened.
    pub(crate) merge_broken: AtomicBool,
}

impl Core {
    pub(crate) fn new(stack: Stack, read_only: bool) -> Core {
        Core {
            size_bytes: AtomicU64::new(stack.head().size_bytes),
            read_only,
            secret: None,
            stack: Mutex::new(Arc::new(stack)),
            stack_epoch: AtomicU64::new(0),
            poisoned: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            holder: Mutex::new(false),
            holder_gone: Condvar::new(),
            claims: Mutex::default(),
            queues: Mutex::default(),
            commit: Mutex::new(()),
            keeper: Mutex::default(),
            keeper_wake: Condvar::new(),
            direct: AtomicBool::new(false),
            merging: AtomicBool::new(false),
            merge_broken: AtomicBool::new(false),
        }
    }

    pub(crate) fn with_secret(mut self, secret: Option<VdcSecret>) -> Core {
        self.secret = secret;
        self
    }

    pub(crate) fn stack(&self) -> Arc<Stack> {
        Arc::clone(&lock(&self.stack))
    }

    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::SeqCst)
    }

    pub(crate) fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::SeqCst)
    }

    /// After a failed sync nobody knows what is on disk: the page cache may have dropped it.
    pub(crate) fn poison(&self) {
        self.poisoned.store(true, Ordering::SeqCst);
    }

    pub(crate) fn add_queue(&self, queue: &Arc<QueueShared>) {
        let mut queues = lock(&self.queues);
        queues.retain(|q| q.strong_count() > 0);
        queues.push(Arc::downgrade(queue));
    }

    /// Goes through the gate; false (and outside) when it is closed, and then the queue is woken when it opens.
    pub(crate) fn enter(&self, queue: &QueueShared) -> bool {
        // The store before the load, against `close`, which stores before it loads: one of the two sees the other.
        queue.inside.fetch_add(1, Ordering::SeqCst);
        if !self.closed.load(Ordering::SeqCst) {
            return true;
        }
        self.leave(queue);
        queue.parked.store(true, Ordering::SeqCst);
        if !self.closed.load(Ordering::SeqCst) {
            // It opened between the two looks, and its waking may have missed us.
            signal(&queue.event);
        }
        false
    }

    pub(crate) fn leave(&self, queue: &QueueShared) {
        queue.inside.fetch_sub(1, Ordering::SeqCst);
    }

    /// Closes the gate and waits until nobody is inside: then the stack is the caller's. One at a time; others wait
    /// for their turn. None, and nothing has happened, when that takes longer than `limit`.
    pub(crate) fn close(self: &Arc<Self>, limit: Duration) -> Option<Closed> {
        let start = Instant::now();
        let left = || limit.saturating_sub(start.elapsed());
        let holder = lock(&self.holder);
        let waited = self.holder_gone.wait_timeout_while(holder, limit, |held| *held);
        let (mut holder, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() && *holder {
            return None;
        }
        *holder = true;
        drop(holder);
        let closed = Closed { core: Arc::clone(self) };
        self.closed.store(true, Ordering::SeqCst);
        let mut pause = Duration::from_micros(20);
        while !self.is_drained() {
            if left().is_zero() {
                return None;
            }
            // This is rare: looking often for a short time beats a wake-up on every completion.
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(1));
        }
        Some(closed)
    }

    /// Whether no operation is inside the gate.
    fn is_drained(&self) -> bool {
        lock(&self.queues)
            .iter()
            .filter_map(Weak::upgrade)
            .all(|queue| queue.inside.load(Ordering::SeqCst) == 0)
    }

    fn wake_parked(&self) {
        for queue in lock(&self.queues).iter().filter_map(Weak::upgrade) {
            if queue.parked.swap(false, Ordering::SeqCst) {
                signal(&queue.event);
            }
        }
    }

    /// Takes blocks for one operation; false when some are taken, and then the queue is woken on a release.
    pub(crate) fn claim(&self, queue: &QueueShared, claim: Claim) -> bool {
        let mut claims = lock(&self.claims);
        if claims.held.iter().chain(&claims.shared).any(|held| held.overlaps(&claim)) {
            claims.waited_for = true;
            queue.parked.store(true, Ordering::SeqCst);
            return false;
        }
        claims.held.push(claim);
        true
    }

    /// Takes blocks together with others that share them; false when some are claimed, and then the queue is woken on a release.
    pub(crate) fn share(&self, queue: &QueueShared, claim: Claim) -> bool {
        let mut claims = lock(&self.claims);
        if claims.held.iter().any(|held| held.overlaps(&claim)) {
            claims.waited_for = true;
            queue.parked.store(true, Ordering::SeqCst);
            return false;
        }
        claims.shared.push(claim);
        true
    }

    pub(crate) fn release(&self, claim: Claim) {
        let mut claims = lock(&self.claims);
        let taken = |list: &[Claim]| list.iter().position(|held| *held == claim);
        if let Some(at) = taken(&claims.shared) {
            claims.shared.swap_remove(at);
        } else {
            let at = taken(&claims.held).expect("only what was claimed is released");
            claims.held.swap_remove(at);
        }
        if std::mem::take(&mut claims.waited_for) {
            drop(claims);
            self.wake_parked();
        }
    }
}

/// The gate, closed, with nobody inside. Opened when it is dropped.
pub(crate) struct Closed {
    core: Arc<Core>,
}

impl Closed {
    /// New I/O goes to `stack` from the opening on. Its head may be larger than before, never smaller.
    pub(crate) fn replace_stack(&self, stack: Stack) {
        let size_bytes = stack.head().size_bytes;
        *lock(&self.core.stack) = Arc::new(stack);
        self.core.stack_epoch.fetch_add(1, Ordering::SeqCst);
        // Last: who sees the size finds the stack that has it.
        self.core.size_bytes.store(size_bytes, Ordering::SeqCst);
    }
}

impl Drop for Closed {
    fn drop(&mut self) {
        self.core.closed.store(false, Ordering::SeqCst);
        self.core.wake_parked();
        *lock(&self.core.holder) = false;
        self.core.holder_gone.notify_one();
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        // The last queue and the keeper are gone, so nothing is written any more.
        for layer in &self.stack().layers {
            layer.data.unlock();
        }
    }
}
