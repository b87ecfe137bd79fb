//! Who is connected: the table that bounds a server's clients.
//!
//! ```text
//!  accept ──► Greeting ──GO──► Busy ◄──► Idle ──► gone
//!               │ more than HANDSHAKES_MAX: the oldest is dropped, so that silent ones keep nobody out
//!               └ at GO with all places taken: the longest idle is dropped; is none idle, the newcomer is told
//! ```
//! Dropping is a shutdown of the socket, which that client's thread notices. Whoever accepts waits while more than
//! [`LEAVING_MAX`] of the dropped have not left yet: connecting is faster than ending a thread, and threads are bounded too.
//! Owns: the table. Never: threads, bytes.

use std::{
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Clients that have not named an export yet, at once.
pub(crate) const HANDSHAKES_MAX: usize = 64;

/// Clients that were dropped and have not left yet, before the next one is accepted.
const LEAVING_MAX: usize = 16;
/// A server that is told to stop notices it after this time even if they do not leave.
const LEAVING_WAIT: Duration = Duration::from_millis(200);

/// What a client does, as its place knows it: [`GREETING`], [`BUSY`], or since when it is idle.
const GREETING: u64 = u64::MAX;
const BUSY: u64 = u64::MAX - 1;

/// One client's place; it is left when this is dropped.
pub(crate) struct Place {
    places: Arc<Places>,
    seat: Arc<Seat>,
}

struct Seat {
    stream: Arc<UnixStream>,
    /// Nanoseconds since the table was made, or one of the constants.
    idle_since: AtomicU64,
    dropped: AtomicBool,
}

impl Seat {
    fn drop_client(&self) {
        self.dropped.store(true, Ordering::SeqCst);
        // It fails only when the client is gone already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    fn doing(&self) -> u64 {
        self.idle_since.load(Ordering::SeqCst)
    }
}

/// See the head of this file.
pub(crate) struct Places {
    clients_max: usize,
    start: Instant,
    /// In the order in which they came.
    seats: Mutex<Vec<Arc<Seat>>>,
    /// Somebody left.
    left: Condvar,
}

impl Places {
    pub(crate) fn new(clients_max: usize) -> Arc<Places> {
        Arc::new(Places {
            clients_max: clients_max.max(1),
            start: Instant::now(),
            seats: Mutex::default(),
            left: Condvar::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Seat>>> {
        // Seats are pushed and removed whole.
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for somebody who came.
    pub(crate) fn enter(self: &Arc<Self>, stream: Arc<UnixStream>) -> Place {
        let seat =
            Arc::new(Seat { stream, idle_since: AtomicU64::new(GREETING), dropped: AtomicBool::new(false) });
        let mut seats = self.lock();
        let greeting = |seat: &&Arc<Seat>| seat.doing() == GREETING && !seat.dropped.load(Ordering::SeqCst);
        if seats.iter().filter(greeting).count() >= HANDSHAKES_MAX
            && let Some(oldest) = seats.iter().find(greeting)
        {
            oldest.drop_client();
        }
        seats.push(Arc::clone(&seat));
        Place { places: Arc::clone(self), seat }
    }

    /// Waits, for a while, until nearly all of the dropped have left: false when they have not.
    pub(crate) fn let_leave(&self) -> bool {
        let leaving = |seats: &mut Vec<Arc<Seat>>| {
            seats.iter().filter(|seat| seat.dropped.load(Ordering::SeqCst)).count() > LEAVING_MAX
        };
        let waited = self.left.wait_timeout_while(self.lock(), LEAVING_WAIT, leaving);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// Clients that have an export.
    pub(crate) fn clients(&self) -> usize {
        self.lock().iter().filter(|seat| seat.doing() != GREETING).count()
    }

    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(0)
    }
}

impl Place {
    /// The client has named an export: false when all places are taken by clients that are at work.
    pub(crate) fn admit(&self) -> bool {
        let seats = self.places.lock();
        let served = |seat: &&Arc<Seat>| seat.doing() != GREETING && !seat.dropped.load(Ordering::SeqCst);
        if seats.iter().filter(served).count() >= self.places.clients_max {
            let idle = seats.iter().filter(served).filter(|seat| seat.doing() < BUSY);
            let Some(longest) = idle.min_by_key(|seat| seat.doing()) else { return false };
            longest.drop_client();
        }
        self.seat.idle_since.store(BUSY, Ordering::SeqCst);
        true
    }

    /// It has requests under way.
    pub(crate) fn busy(&self) {
        if self.seat.doing() != BUSY {
            self.seat.idle_since.store(BUSY, Ordering::SeqCst);
        }
    }

    /// It has none.
    pub(crate) fn idle(&self) {
        self.seat.idle_since.store(self.places.now(), Ordering::SeqCst);
    }

    /// Whether it was dropped to make room.
    pub(crate) fn was_dropped(&self) -> bool {
        self.seat.dropped.load(Ordering::SeqCst)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.lock().retain(|seat| !Arc::ptr_eq(seat, &self.seat));
        self.places.left.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn come(places: &Arc<Places>) -> (Place, UnixStream) {
        let (near, far) = UnixStream::pair().expect("pair");
        (places.enter(Arc::new(near)), far)
    }

    fn is_closed(far: &mut UnixStream) -> bool {
        far.set_nonblocking(true).expect("nonblocking");
        matches!(far.read(&mut [0; 1]), Ok(0))
    }

    #[test]
    fn the_longest_idle_makes_room() {
        let places = Places::new(2);
        let (mut first, mut second, third, fourth) =
            (come(&places), come(&places), come(&places), come(&places));
        assert!(first.0.admit() && second.0.admit());
        assert!(!third.0.admit(), "both are at work");
        second.0.seat.idle_since.store(5, Ordering::SeqCst);
        first.0.seat.idle_since.store(7, Ordering::SeqCst);
        assert!(third.0.admit());
        assert!(is_closed(&mut second.1) && second.0.was_dropped() && !is_closed(&mut first.1));
        first.0.busy();
        assert!(!fourth.0.admit(), "who is dropped makes room once");
        drop((first, second));
        assert!(fourth.0.admit());
        assert_eq!(places.clients(), 2);
    }

    #[test]
    fn who_says_nothing_keeps_nobody_out() {
        let places = Places::new(1);
        let mut silent: Vec<_> = (0..HANDSHAKES_MAX + 3).map(|_| come(&places)).collect();
        let closed: Vec<bool> = silent.iter_mut().map(|(_, far)| is_closed(far)).collect();
        assert_eq!(closed.iter().filter(|closed| **closed).count(), 3);
        assert!(closed[..3].iter().all(|closed| *closed));
    }

    #[test]
    fn nobody_comes_while_many_have_not_left() {
        let places = Places::new(1);
        let mut silent: Vec<_> = (0..HANDSHAKES_MAX + LEAVING_MAX).map(|_| come(&places)).collect();
        assert!(places.let_leave(), "few enough are leaving");
        silent.push(come(&places));
        assert!(!places.let_leave(), "one too many");
        let first = silent.remove(0);
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| while !places.let_leave() {});
            drop(first);
            waiter.join().expect("it is let in");
        });
    }
}
