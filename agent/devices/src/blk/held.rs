//! Requests that found the host's disk full, until there is room.
//!
//! ```text
//!   answer "no space" ──► waiting ──timer──► the oldest is asked again ──"no space"──► waiting
//!                            ▲                        └── done ──► all the others are asked again
//!                            └──────────────"no space"──────────────────────┘
//! ```
//!
//! The request is held, not the machine: what needs no new room (reads, writes in place) goes on, and so do other disks. A
//! guest sees a slow request and no error, so its file system stays writable; virtio-blk knows no time limit. What is held
//! has its slot, so a queue is full of held requests at the most.
//!
//! Nobody rings when a disk has room again, hence the timer: one request a queue and [`PAUSE`], whatever the number.
//! A reset forgets what is held. A suspension takes the heads along: see [`super::QueueLeft`].

use std::collections::VecDeque;
use std::time::Duration;

use serio_virtio::ActivateError;
use serio_volume::{IoError, Op};
use vmm_sys_util::timerfd::TimerFd;

use crate::Notices;
use crate::trouble::{Raised, Trouble};
use crate::worker::Poller;

/// Between two tries.
const PAUSE: Duration = Duration::from_millis(250);

/// Whether that is a lack of room, which may pass; nothing is lost by asking again.
pub(super) fn is_full(error: &IoError) -> bool {
    matches!(error, IoError::Host { errno: libc::ENOSPC | libc::EDQUOT, .. })
}

/// What one queue holds.
pub(super) struct Held {
    /// By tag, the oldest first.
    waiting: VecDeque<(u16, Op)>,
    /// How many were asked again and have not answered.
    trying: usize,
    /// There is room again, it seems: all may be asked.
    room: bool,
    timer: TimerFd,
    trouble: Trouble,
    notices: Notices,
    raised: Option<Raised>,
}

impl Held {
    /// Nothing; the poller reports as `token` when it is time to try.
    pub(super) fn new(
        (trouble, notices): (Trouble, Notices),
        poller: &Poller,
        token: u64,
    ) -> Result<Held, ActivateError> {
        let (waiting, timer) = (VecDeque::new(), poller.timer(token)?);
        Ok(Held { waiting, trying: 0, room: false, timer, trouble, notices, raised: None })
    }

    /// Holds a request. `again`: it was one that was tried.
    pub(super) fn hold(&mut self, tag: u16, op: Op, again: bool, error: &IoError) {
        self.room = false;
        if again {
            self.trying = self.trying.saturating_sub(1);
            self.waiting.push_front((tag, op));
        } else {
            self.waiting.push_back((tag, op));
        }
        if self.raised.is_none() {
            let reason = format!(
                "held: the host's disk is full ({error}); the guest goes on when there is room again"
            );
            self.notices.tell(&reason);
            self.raised = Some(self.trouble.raise(reason));
        }
        if self.trying == 0 {
            // The kernel takes every time that we give it. If it did not, the next held request tries again.
            let _ = self.timer.reset(PAUSE, None);
        }
    }

    /// One that was tried has an answer.
    pub(super) fn answered(&mut self) {
        self.trying = self.trying.saturating_sub(1);
        self.room = true;
        if self.waiting.is_empty() && self.trying == 0 {
            self.raised = None;
        }
    }

    /// It is time: the one to be asked again, if none is already.
    pub(super) fn probe(&mut self) -> Option<(u16, Op)> {
        if self.trying > 0 { None } else { self.try_next() }
    }

    /// The next one to be asked again since another got through.
    pub(super) fn release(&mut self) -> Option<(u16, Op)> {
        let next = if self.room { self.try_next() } else { None };
        self.room &= next.is_some();
        next
    }

    fn try_next(&mut self) -> Option<(u16, Op)> {
        let next = self.waiting.pop_front()?;
        self.trying = self.trying.saturating_add(1);
        Some(next)
    }

    /// Those that wait, by tag.
    pub(super) fn tags(&self) -> impl Iterator<Item = u16> {
        self.waiting.iter().map(|(tag, _)| *tag)
    }
}
