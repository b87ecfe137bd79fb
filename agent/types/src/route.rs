//! Which of several schedulers to talk to: one leads, the others name it. Pure.
//!
//! ```text
//!  urls, one after the other ──▶ one that leads: stay
//!    ▲   │ names the leader ──▶ that one, at once
//!    │   │ names nobody, or one that was just not there ──▶ the same again, soon: the next leader is being found
//!    └───┴ does not answer ──▶ the next, later and later
//! ```
//! Owns: the order of attempts. Never: clocks, chance, connections: how long a pause is, is its caller's.
//! Invariants: (1) what was configured is tried again and again, whatever anybody names; (2) two that name each other are
//! not asked in a tight loop.

/// Leaders that are followed without a pause in between.
const HOPS_MAX: u32 = 2;
/// A leader that was not there is not tried again for so many answers that name it.
const DEAD_ANSWERS: u32 = 8;

/// When to try again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Now.
    AtOnce,
    /// Within a second or so, spread: a region finds its next leader within a few seconds.
    Soon,
    /// After a pause that doubles with that number.
    Later(u32),
}

/// See the head of this file.
#[derive(Debug, Clone)]
pub struct Route {
    urls: Vec<String>,
    at: usize,
    /// The leader that somebody named.
    hint: Option<String>,
    hops: u32,
    failures: u32,
    /// It has taken us in, and nothing failed since.
    held: bool,
    /// One that was not there, and how often it was named since.
    dead: Option<(String, u32)>,
}

/// `https://` of `https://a:1`; nothing of `a:1`.
fn split(url: &str) -> (&str, &str) {
    let scheme = url.find("://").map_or(0, |at| at.saturating_add(3));
    url.split_at_checked(scheme).unwrap_or(("", url))
}

/// HOST:PORT of a URL.
#[must_use]
pub fn authority(url: &str) -> &str {
    split(url).1.trim_end_matches('/')
}

impl Route {
    /// Over those URLs, the first one first; none without any.
    #[must_use]
    pub fn new(urls: Vec<String>) -> Option<Self> {
        (!urls.is_empty()).then_some(Self {
            urls,
            at: 0,
            hint: None,
            hops: 0,
            failures: 0,
            held: false,
            dead: None,
        })
    }

    /// The one to talk to now.
    #[must_use]
    pub fn url(&self) -> &str {
        let listed = || self.urls.get(self.at).map(String::as_str);
        self.hint.as_deref().or_else(listed).unwrap_or_default()
    }

    /// It leads: it has taken us in.
    pub fn welcomed(&mut self) {
        self.hops = 0;
        self.held = true;
        self.dead = None;
    }

    /// It was a good connection: what failed before does not count any more.
    pub fn held_well(&mut self) {
        self.failures = 0;
    }

    /// It does not lead, and names who does (HOST:PORT; empty: nobody).
    pub fn named(&mut self, leader: &str) -> Next {
        self.failures = 0;
        let known_dead = match &mut self.dead {
            Some((dead, answers)) if dead == leader => {
                *answers = answers.saturating_add(1);
                *answers < DEAD_ANSWERS
            }
            _ => false,
        };
        let itself = authority(self.url()) == leader;
        if leader.is_empty() || itself || known_dead {
            return Next::Soon;
        }
        let scheme = split(self.url()).0.to_owned();
        self.hint = Some(format!("{scheme}{leader}"));
        self.hops = self.hops.saturating_add(1);
        if self.hops <= HOPS_MAX {
            return Next::AtOnce;
        }
        self.hops = 0;
        Next::Soon
    }

    /// It is not there, or broke off.
    pub fn failed(&mut self) -> Next {
        // A connection that broke off says little of the one at its other end: it is away when it cannot be had again.
        self.dead = if self.held { None } else { Some((authority(self.url()).to_owned(), 0)) };
        self.held = false;
        self.hops = 0;
        if self.hint.take().is_some() {
            // Back to who named it.
            return Next::Soon;
        }
        let count = self.urls.len();
        self.at = self.at.saturating_add(1).checked_rem(count).unwrap_or(0);
        let rounds = usize::try_from(self.failures).unwrap_or(usize::MAX).checked_div(count).unwrap_or(0);
        self.failures = self.failures.saturating_add(1);
        Next::Later(u32::try_from(rounds).unwrap_or(u32::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(urls: &[&str]) -> Route {
        Route::new(urls.iter().map(|url| (*url).to_owned()).collect()).unwrap()
    }

    #[test]
    fn one_that_is_away_is_tried_later_and_later() {
        let mut route = route(&["https://a:1"]);
        let pauses: Vec<Next> = (0..3).map(|_| route.failed()).collect();
        assert_eq!(pauses, [Next::Later(0), Next::Later(1), Next::Later(2)]);
        assert_eq!(route.url(), "https://a:1");
        route.held_well();
        assert_eq!(route.failed(), Next::Later(0));
        assert!(Route::new(Vec::new()).is_none());
    }

    #[test]
    fn several_are_asked_in_turn_and_the_pause_grows_with_each_round() {
        let mut route = route(&["a:1", "b:1"]);
        let seen: Vec<(String, Next)> = (0..4).map(|_| (route.url().to_owned(), route.failed())).collect();
        let wanted = [("a:1", 0), ("b:1", 0), ("a:1", 1), ("b:1", 1)];
        assert_eq!(seen, wanted.map(|(url, rounds)| (url.to_owned(), Next::Later(rounds))));
    }

    #[test]
    fn the_leader_that_is_named_is_asked_at_once() {
        let mut route = route(&["https://a:1", "https://b:1/"]);
        assert_eq!((route.named("c:2"), route.url()), (Next::AtOnce, "https://c:2"));
        route.welcomed();
        // The connection breaks: back to the one that named it, and once more to the leader.
        assert_eq!((route.failed(), route.url()), (Next::Soon, "https://a:1"));
        assert_eq!((route.named("c:2"), route.url()), (Next::AtOnce, "https://c:2"));
        // It is dead, and is named for a while yet.
        assert_eq!((route.failed(), route.url()), (Next::Soon, "https://a:1"));
        assert_eq!((route.named("c:2"), route.url()), (Next::Soon, "https://a:1"));
        assert_eq!((route.named(""), route.url()), (Next::Soon, "https://a:1"));
        assert_eq!((route.named("b:1"), route.url()), (Next::AtOnce, "https://b:1"));
    }

    #[test]
    fn a_leader_that_was_away_once_is_not_away_for_ever() {
        let mut route = route(&["a:1"]);
        assert_eq!(route.named("b:1"), Next::AtOnce);
        assert_eq!(route.failed(), Next::Soon);
        let answers: Vec<Next> = (0..DEAD_ANSWERS).map(|_| route.named("b:1")).collect();
        assert!(answers[..7].iter().all(|next| *next == Next::Soon));
        assert_eq!((answers[7], route.url()), (Next::AtOnce, "b:1"));
    }

    #[test]
    fn two_that_name_each_other_and_one_that_names_itself_are_no_tight_loop() {
        let mut route = route(&["a:1"]);
        let next: Vec<Next> =
            ["b:1", "a:1", "b:1", "a:1", "b:1", "a:1"].iter().map(|leader| route.named(leader)).collect();
        assert_eq!(next.iter().filter(|next| **next == Next::Soon).count(), 2, "{next:?}");
        assert_eq!(route.url(), "a:1");
        assert_eq!(route.named("a:1"), Next::Soon);
        // The hint goes, what was configured comes back.
        assert_eq!((route.failed(), route.url()), (Next::Soon, "a:1"));
    }
}
