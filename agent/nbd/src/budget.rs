//! The memory that all connections of a server share for payloads: back-pressure, never a refusal.
//!
//! Each connection has [`OWN_BYTES`] that it asks nobody for; what it needs beyond is leased here. Who gets nothing at
//! once stands in line, stops reading its socket, and is woken when its turn comes. First come, first served, so that a
//! large request is not passed by for ever by small ones.
//!
//! Owns: numbers. Never: the memory itself, sockets. Threads: any; one short lock.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use nix::sys::eventfd::{EfdFlags, EventFd};

/// Payload bytes that a connection may hold without asking.
pub(crate) const OWN_BYTES: usize = 512 << 10;

struct State {
    free: usize,
    line: VecDeque<(usize, Arc<Ticket>)>,
}

/// See the head of this file.
pub(crate) struct Budget {
    max: usize,
    state: Mutex<State>,
    /// Somebody stands in line: memory that only lies ready should be given back.
    wanted: AtomicBool,
}

struct Ticket {
    event: EventFd,
    granted: AtomicBool,
}

impl Budget {
    /// A budget of `max` bytes.
    pub(crate) fn new(max: usize) -> Budget {
        let state = State { free: max, line: VecDeque::new() };
        Budget { max, state: Mutex::new(state), wanted: AtomicBool::new(false) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The numbers are right between any two statements, so a panic elsewhere leaves them so.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection's share: nothing leased yet.
    pub(crate) fn share(self: &Arc<Self>) -> io::Result<Share> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let ticket = Arc::new(Ticket { event, granted: AtomicBool::new(false) });
        Ok(Share { budget: Arc::clone(self), ticket, leased: 0, asked: 0 })
    }

    /// How many stand in line.
    #[cfg(test)]
    pub(crate) fn waiting(&self) -> usize {
        self.lock().line.len()
    }

    fn give(&self, bytes: usize) {
        let mut state = self.lock();
        state.free += bytes;
        self.serve(&mut state);
    }

    fn serve(&self, state: &mut State) {
        while let Some((need, _)) = state.line.front()
            && *need <= state.free
            && let Some((need, ticket)) = state.line.pop_front()
        {
            state.free -= need;
            ticket.granted.store(true, Ordering::SeqCst);
            // It fails only when the counter is full, and then it is readable already.
            let _ = ticket.event.write(1);
        }
        self.wanted.store(!state.line.is_empty(), Ordering::SeqCst);
    }
}

/// What one connection has leased.
pub(crate) struct Share {
    budget: Arc<Budget>,
    ticket: Arc<Ticket>,
    leased: usize,
    /// Bytes that it stands in line for.
    asked: usize,
}

impl Share {
    /// Whether the connection may hold `bytes` in all. If not, it stands in line, and [`Share::event_fd`] becomes
    /// readable when this is worth asking again.
    pub(crate) fn covers(&mut self, bytes: usize) -> bool {
        if bytes <= OWN_BYTES + self.leased {
            return true;
        }
        if self.asked > 0 {
            if !self.ticket.granted.swap(false, Ordering::SeqCst) {
                return false;
            }
            self.leased += std::mem::take(&mut self.asked);
            let _ = self.ticket.event.read();
            return self.covers(bytes);
        }
        // More than there is in all is never asked for: it would wait for ever.
        let need = (bytes - OWN_BYTES - self.leased).min(self.budget.max.saturating_sub(self.leased));
        let mut state = self.budget.lock();
        if need == 0 || (state.line.is_empty() && need <= state.free) {
            state.free -= need;
            self.leased += need;
            return true;
        }
        self.asked = need;
        state.line.push_back((need, Arc::clone(&self.ticket)));
        self.budget.wanted.store(true, Ordering::SeqCst);
        false
    }

    /// The connection holds `bytes` in all now: gives back what it has leased beyond.
    pub(crate) fn shrink(&mut self, bytes: usize) {
        if self.asked > 0 && self.ticket.granted.swap(false, Ordering::SeqCst) {
            self.leased += std::mem::take(&mut self.asked);
            let _ = self.ticket.event.read();
        }
        let spare = self.leased.saturating_sub(bytes.saturating_sub(OWN_BYTES));
        if spare > 0 {
            self.leased -= spare;
            self.budget.give(spare);
        }
    }

    /// Others wait for memory.
    pub(crate) fn is_wanted(&self) -> bool {
        self.budget.wanted.load(Ordering::Relaxed)
    }

    /// Readable when the turn of this connection has come.
    pub(crate) fn event_fd(&self) -> BorrowedFd<'_> {
        self.ticket.event.as_fd()
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut state = self.budget.lock();
        let before = state.line.len();
        state.line.retain(|(_, ticket)| !Arc::ptr_eq(ticket, &self.ticket));
        let granted = if self.asked > 0 && state.line.len() == before { self.asked } else { 0 };
        state.free += self.leased + granted;
        self.budget.serve(&mut state);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn first_come_first_served() {
        let budget = Arc::new(Budget::new(1000));
        let mut shares: Vec<Share> = (0..3).map(|_| budget.share().expect("eventfd")).collect();
        assert!(shares[0].covers(OWN_BYTES + 700));
        assert!(!shares[1].covers(OWN_BYTES + 900) && shares[1].asked == 900);
        assert!(!shares[2].covers(OWN_BYTES + 100), "it would fit, but another came before");
        assert!(shares[2].covers(OWN_BYTES), "what is its own is never waited for");
        shares[0].shrink(OWN_BYTES + 200);
        assert!(!shares[1].covers(OWN_BYTES + 900));
        shares[0].shrink(0);
        assert!(shares[1].covers(OWN_BYTES + 900) && shares[2].covers(OWN_BYTES + 100));
        assert!(!shares[0].covers(OWN_BYTES + 1) && shares[0].is_wanted());
        // Whoever leaves, in line or not, leaves nothing behind.
        shares.remove(0);
        assert!(!budget.wanted.load(Ordering::SeqCst));
        drop(shares);
        assert_eq!(budget.lock().free, 1000);
    }

    #[test]
    fn more_than_there_is_waits_for_all_there_is() {
        let budget = Arc::new(Budget::new(1000));
        let mut share = budget.share().expect("eventfd");
        assert!(share.covers(OWN_BYTES + 5000));
        assert_eq!(budget.lock().free, 0);
        let mut other = budget.share().expect("eventfd");
        assert!(!other.covers(OWN_BYTES + 5000));
        drop(share);
        assert!(other.covers(OWN_BYTES + 5000), "alone, a request passes whatever its size");
    }

    proptest! {
        #[test]
        fn nothing_is_lost(steps in proptest::collection::vec((0usize..4, 0usize..3000, 0u8..3), 1..200)) {
            let budget = Arc::new(Budget::new(1000));
            let mut shares: Vec<Share> = (0..4).map(|_| budget.share().expect("eventfd")).collect();
            for (who, bytes, what) in steps {
                match what {
                    0 => drop(shares[who].covers(OWN_BYTES + bytes)),
                    1 => shares[who].shrink(OWN_BYTES + bytes),
                    _ => shares[who] = budget.share().expect("eventfd"),
                }
                let leased: usize = shares.iter().map(|s| s.leased).sum();
                let granted: usize = shares.iter()
                    .filter(|s| s.ticket.granted.load(Ordering::SeqCst))
                    .map(|s| s.asked)
                    .sum();
                prop_assert_eq!(leased + granted + budget.lock().free, 1000);
            }
            shares.clear();
            prop_assert_eq!(budget.lock().free, 1000);
        }
    }
}
