//! What the host keeps a device from doing, for as long as it does.
//!
//! A [`crate::Notices`] is said once; a trouble lasts. It is kept outside of the device, so that whoever asks about the VM
//! sees it, and each beginning and end rings a bell. Any thread of the device may raise it; it is over when all who raised
//! it have let go.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What is wrong, and how many say so.
#[derive(Debug, Default)]
struct Now {
    reason: String,
    raised: usize,
}

/// The trouble of one device. Clones are the same.
#[derive(Clone)]
pub struct Trouble {
    now: Arc<Mutex<Now>>,
    bell: Arc<dyn Fn() + Send + Sync>,
}

impl Trouble {
    /// None yet; `bell` is rung when it begins and when it is over, from any thread. It must not wait.
    #[must_use]
    pub fn new(bell: impl Fn() + Send + Sync + 'static) -> Trouble {
        Trouble { now: Arc::default(), bell: Arc::new(bell) }
    }

    fn lock(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It has begun; it lasts as long as what is given back. The first reason stays.
    pub(crate) fn raise(&self, reason: String) -> Raised {
        let began = {
            let mut now = self.lock();
            now.raised = now.raised.saturating_add(1);
            let began = now.raised == 1;
            if began {
                now.reason = reason;
            }
            began
        };
        if began {
            (self.bell)();
        }
        Raised(self.clone())
    }

    /// What is wrong, for the person; `None`: nothing.
    #[must_use]
    pub fn reason(&self) -> Option<String> {
        let now = self.lock();
        (now.raised > 0).then(|| now.reason.clone())
    }
}

impl Default for Trouble {
    /// Nobody wants to know.
    fn default() -> Trouble {
        Trouble::new(|| {})
    }
}

impl std::fmt::Debug for Trouble {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Trouble").field("now", &*self.lock()).finish_non_exhaustive()
    }
}

/// One who has a [`Trouble`]; over when dropped.
#[derive(Debug)]
pub(crate) struct Raised(Trouble);

impl Drop for Raised {
    fn drop(&mut self) {
        let over = {
            let mut now = self.0.lock();
            now.raised = now.raised.saturating_sub(1);
            now.raised == 0
        };
        if over {
            (self.0.bell)();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn the_bell_rings_at_the_first_and_the_last() {
        let rung = Arc::new(AtomicUsize::new(0));
        let bell = rung.clone();
        let trouble = Trouble::new(move || {
            bell.fetch_add(1, Ordering::SeqCst);
        });
        assert_eq!(trouble.reason(), None);
        let first = trouble.raise("full".to_owned());
        let second = trouble.raise("fuller".to_owned());
        assert_eq!((trouble.reason().as_deref(), rung.load(Ordering::SeqCst)), (Some("full"), 1));
        drop(first);
        assert_eq!((trouble.reason().as_deref(), rung.load(Ordering::SeqCst)), (Some("full"), 1));
        drop(second);
        assert_eq!((trouble.reason(), rung.load(Ordering::SeqCst)), (None, 2));
    }
}
