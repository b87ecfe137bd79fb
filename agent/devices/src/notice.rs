//! What a device has to say to the operator, at a bounded rate.
//!
//! The first notice is passed on at once, later ones at most once a minute, with the number of those that were kept
//! back. A guest that causes errors as fast as it can fills no log.

use std::fmt::Display;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

const PAUSE: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
struct Said {
    last: Option<Instant>,
    kept_back: u64,
}

/// Where the notices of one device go. Clones share the rate.
#[derive(Clone)]
pub struct Notices {
    sink: Arc<dyn Fn(&str) + Send + Sync>,
    said: Arc<Mutex<Said>>,
}

impl Notices {
    /// Notices go to `sink`, from any thread.
    #[must_use]
    pub fn new(sink: impl Fn(&str) + Send + Sync + 'static) -> Notices {
        Notices { sink: Arc::new(sink), said: Arc::default() }
    }

    /// Says it, unless something was said a moment ago.
    pub fn tell(&self, what: impl Display) {
        if let Some(text) = self.due(&what, Instant::now()) {
            (self.sink)(&text);
        }
    }

    fn due(&self, what: &dyn Display, now: Instant) -> Option<String> {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.last.is_some_and(|last| now.saturating_duration_since(last) < PAUSE) {
            said.kept_back = said.kept_back.saturating_add(1);
            return None;
        }
        said.last = Some(now);
        Some(match std::mem::take(&mut said.kept_back) {
            0 => what.to_string(),
            more => format!("{what} (and {more} more like it since the last line)"),
        })
    }
}

impl Default for Notices {
    /// Nobody wants to know.
    fn default() -> Notices {
        Notices::new(|_| {})
    }
}

impl std::fmt::Debug for Notices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Notices").field("said", &self.said).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_a_minute_that_counts_the_others() {
        let notices = Notices::default();
        let now = Instant::now();
        assert_eq!(notices.due(&"EIO", now).as_deref(), Some("EIO"));
        for second in 0..59 {
            assert_eq!(notices.due(&"EIO", now + Duration::from_secs(second)), None);
        }
        let later = now + PAUSE;
        assert_eq!(
            notices.due(&"ENOSPC", later).as_deref(),
            Some("ENOSPC (and 59 more like it since the last line)")
        );
        assert_eq!(notices.due(&"EIO", later), None);
    }
}
