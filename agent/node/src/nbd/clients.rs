//! Who is connected to the front: the table that bounds its clients.
//!
//! ```text
//!  accept ──► greeting ──names an export──► relayed ──► gone
//!               │ more than HANDSHAKES_MAX: the one that came first is dropped, so that silent ones keep nobody out
//!               └ with CLIENTS_MAX relayed the one is dropped that was silent longest, IDLE_MIN at least; is there none,
//!                 the newcomer is told so
//! ```
//! Dropping is ending the client's task. Owns: the table. Never: sockets.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::task::AbortHandle;

/// Clients that use exports, at a time.
pub const CLIENTS_MAX: usize = 128;
/// Clients that have not named an export yet, at a time.
pub const HANDSHAKES_MAX: usize = 64;
/// A client that was silent for less is never dropped for another.
const IDLE_MIN: Duration = Duration::from_secs(10);

struct Entry {
    id: u64,
    task: Option<AbortHandle>,
    /// `None` in the handshake.
    active: Option<Arc<Activity>>,
}

/// When something last passed, and what has not arrived yet.
#[derive(Debug)]
pub(super) struct Activity {
    start: Instant,
    /// Milliseconds after `start`.
    last_ms: AtomicU64,
}

impl Activity {
    fn new(start: Instant) -> Arc<Activity> {
        let activity = Activity { start, last_ms: AtomicU64::new(0) };
        activity.note();
        Arc::new(activity)
    }

    /// Something passed.
    pub(super) fn note(&self) {
        let now = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last_ms.store(now, Ordering::Relaxed);
    }

    /// For how long nothing has.
    pub(super) fn silent(&self) -> Duration {
        let last = Duration::from_millis(self.last_ms.load(Ordering::Relaxed));
        self.start.elapsed().saturating_sub(last)
    }
}

#[derive(Default)]
struct Table {
    next: u64,
    entries: Vec<Entry>,
}

/// See the head of this file.
pub(super) struct Clients {
    start: Instant,
    table: Mutex<Table>,
}

/// One client's entry; it goes when this is dropped.
pub(super) struct Seat {
    clients: Arc<Clients>,
    id: u64,
}

impl Clients {
    pub(super) fn new() -> Arc<Clients> {
        Arc::new(Clients { start: Instant::now(), table: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // Entries are pushed and removed whole.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Somebody came. True: another was dropped for it.
    pub(super) fn enter(self: &Arc<Self>) -> (Seat, bool) {
        let mut table = self.lock();
        let greeting = |entry: &Entry| entry.active.is_none();
        let full = table.entries.iter().filter(|entry| greeting(entry)).count() >= HANDSHAKES_MAX;
        if full && let Some(at) = table.entries.iter().position(greeting) {
            table.entries.remove(at).abort();
        }
        let id = table.next;
        table.next += 1;
        table.entries.push(Entry { id, task: None, active: None });
        (Seat { clients: Arc::clone(self), id }, full)
    }

    /// The task that serves it.
    pub(super) fn task(&self, id: u64, task: AbortHandle) {
        // It may have ended already.
        if let Some(entry) = self.lock().entries.iter_mut().find(|entry| entry.id == id) {
            entry.task = Some(task);
        }
    }
}

impl Entry {
    fn abort(self) {
        if let Some(task) = self.task {
            task.abort();
        }
    }
}

impl Seat {
    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// It has named an export: `None` when all places are taken by clients that are at work.
    pub(super) fn admit(&self) -> Option<Arc<Activity>> {
        let mut table = self.clients.lock();
        let relayed = table.entries.iter().filter(|entry| entry.active.is_some());
        if relayed.count() >= CLIENTS_MAX {
            let silent = |entry: &Entry| entry.active.as_ref().map(|active| active.silent());
            let longest = table.entries.iter().enumerate().max_by_key(|(_, entry)| silent(entry));
            let (at, _) = longest.filter(|(_, entry)| silent(entry) >= Some(IDLE_MIN))?;
            table.entries.remove(at).abort();
        }
        let active = Activity::new(self.clients.start);
        let entry = table.entries.iter_mut().find(|entry| entry.id == self.id)?;
        entry.active = Some(Arc::clone(&active));
        Some(active)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.clients.lock().entries.retain(|entry| entry.id != self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn silence(active: &Activity) {
        active.last_ms.store(0, Ordering::Relaxed);
    }

    #[test]
    fn the_longest_silent_makes_room_and_only_then() {
        let start = Instant::now().checked_sub(Duration::from_secs(60)).unwrap();
        let clients = Arc::new(Clients { start, table: Mutex::default() });
        let admitted = |_| {
            let seat = clients.enter().0;
            let active = seat.admit().unwrap();
            (seat, active)
        };
        let (seats, active): (Vec<Seat>, Vec<_>) = (0..CLIENTS_MAX).map(admitted).unzip();
        let newcomer = clients.enter().0;
        assert!(newcomer.admit().is_none(), "all are at work");
        silence(&active[7]);
        assert!(newcomer.admit().is_some());
        assert!(!clients.lock().entries.iter().any(|entry| entry.id == seats[7].id));
        assert!(clients.enter().0.admit().is_none());
        drop(seats);
        assert_eq!(clients.lock().entries.len(), 1);
    }

    #[test]
    fn silent_newcomers_drop_each_other() {
        let clients = Clients::new();
        let served = clients.enter().0;
        served.admit().unwrap();
        let seats: Vec<(Seat, bool)> = (0..HANDSHAKES_MAX + 5).map(|_| clients.enter()).collect();
        assert_eq!(seats.iter().filter(|(_, dropped)| *dropped).count(), 5);
        let left = clients.lock().entries.len();
        assert_eq!(left, HANDSHAKES_MAX + 1);
        assert!(clients.lock().entries.iter().any(|entry| entry.id == served.id));
    }
}
