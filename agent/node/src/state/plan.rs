//! What is to be done about a VM: from what is wished of it and what is seen of it. Pure: no clock, no rows, no host.
//!
//! ```text
//!   its row, its policy, a fence ──▶ Wish ┐
//!                                         ├─▶ at_start · found · not_found · ended · fenced ──▶ what is to be done
//!   its process, its files ───────────────┘       (one for each occasion)              carried out by run, recover, orders
//! ```
//! Owns: each decision about a VM that no client waits for. Never: what it takes to carry one out. What an occasion does not
//! allow cannot be said: each has its own answers. All decisions stand in `plan_golden.txt`, one line each.
//!
//! A drain is no part of it: it refuses what clients ask anew, and keeps running what runs.

use serio_store::record::{EndWord, Run};
use serio_types::RestartPolicy;

/// A run that lasted so long was a success: the next failure is the first in a row again.
const STEADY_MS: i64 = 10 * 60 * 1000;
/// The pause before the first restart; it doubles with each failure in a row.
const PAUSE_MS: u64 = 1000;
/// The longest pause.
const PAUSE_MS_MAX: u64 = 5 * 60 * 1000;

/// What is wished of a VM.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wish {
    /// What its row says: it was written before anything was begun.
    pub(super) run: Run,
    /// What follows an end that nobody asked for.
    pub(super) policy: RestartPolicy,
    /// A reset boots what is on its disk then, in another process.
    pub(super) boots_from_disk: bool,
    /// It was ended by a fence: it runs nowhere here again.
    pub(super) is_fenced: bool,
    /// Failures in a row until now.
    pub(super) failures: u32,
}

/// When seriod has started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AtStart {
    /// It rests.
    Nothing,
    /// Run files that are left over are removed.
    Clean,
    /// Its creation is undone: its client got no answer.
    Undo,
    /// Its deletion goes on.
    Delete {
        /// Its root volume stays.
        keep_root: bool,
    },
    /// Its process is looked for.
    Look,
}

/// When its process was found after a start of seriod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    /// It is taken over as it is.
    TakeOver,
    /// It is taken over, and its guest stands still from now on.
    Pause,
    /// It is taken over, and its guest goes on.
    Resume,
    /// Its power button is pressed, again.
    PowerButton,
    /// Its plug is pulled.
    Kill,
}

/// When its process is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Gone {
    /// It ended as somebody wished.
    Stopped,
    /// It never ran: its start still stands.
    Start,
    /// Its guest reset: it boots what is on its disk now, at once.
    Reboot,
    /// It is started after a pause.
    StartAfter {
        /// The pause.
        pause_ms: u64,
        /// Failures in a row, with this one.
        failures: u32,
    },
    /// It ended by itself and rests.
    Rest {
        /// That was a failure.
        failed: bool,
    },
}

/// When a fence ends it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fenced {
    /// Nothing runs, or what is under way ends it, or asks here again.
    Nothing,
    /// Its plug is pulled.
    Kill,
    /// It is not started again.
    Rest,
}

/// Where it is then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// Its guest runs.
    Runs,
    /// Its power button was pressed.
    Stops,
    /// In the pause before it is started again.
    Pauses,
    /// Anywhere else.
    Other,
}

/// What a row says when seriod starts, and whether there are run files.
pub(super) const fn at_start(run: Run, has_files: bool) -> AtStart {
    match run {
        Run::Creating => AtStart::Undo,
        Run::Deleting => AtStart::Delete { keep_root: false },
        Run::DeletingKeepRoot => AtStart::Delete { keep_root: true },
        Run::Off | Run::Failed if has_files => AtStart::Clean,
        Run::Off | Run::Failed => AtStart::Nothing,
        Run::Starting | Run::Running | Run::Paused | Run::Stopping | Run::Killing => AtStart::Look,
    }
}

/// Its process was looked for, and runs; its guest stands still or not.
pub(super) const fn found(wish: Wish, stands_still: bool) -> Found {
    match (wish.run, stands_still) {
        _ if wish.is_fenced => Found::Kill,
        (Run::Killing, _) => Found::Kill,
        (Run::Stopping, _) => Found::PowerButton,
        (Run::Paused, false) => Found::Pause,
        (Run::Paused, true) | (_, false) => Found::TakeOver,
        (_, true) => Found::Resume,
    }
}

/// Its process was looked for, and is gone; what it said last, if it did. Nobody knows how long it ran.
pub(super) fn not_found(wish: Wish, end: Option<EndWord>) -> Gone {
    match (wish.run, end) {
        (Run::Stopping | Run::Killing, _) => Gone::Stopped,
        // It never ran, or died on the way.
        (Run::Starting, None | Some(EndWord::Died | EndWord::LaunchFailed)) if !wish.is_fenced => Gone::Start,
        (_, end) => ended(wish, end.unwrap_or(EndWord::Died), None),
    }
}

/// Its process, which was there, has ended, or could not be started again, and nobody asked for that. How long it ran, if it did.
pub(super) fn ended(wish: Wish, end: EndWord, ran_ms: Option<i64>) -> Gone {
    let failed = !matches!(end, EndWord::PowerOff | EndWord::Reset | EndWord::Stopped);
    let again = match wish.policy {
        _ if wish.is_fenced => false,
        // Neither a failure nor a restart by its policy.
        _ if end == EndWord::Reset && wish.boots_from_disk => return Gone::Reboot,
        RestartPolicy::Never => false,
        RestartPolicy::OnFailure => failed,
        RestartPolicy::Always => true,
    };
    if !again {
        return Gone::Rest { failed };
    }
    let was_steady = ran_ms.is_some_and(|ran_ms| ran_ms >= STEADY_MS);
    let failures = if was_steady { 0 } else { wish.failures.saturating_add(1) };
    Gone::StartAfter { pause_ms: pause_ms(failures.saturating_sub(1)), failures }
}

/// It was fenced, and is there.
pub(super) const fn fenced(standing: Standing) -> Fenced {
    match standing {
        Standing::Runs | Standing::Stops => Fenced::Kill,
        Standing::Pauses => Fenced::Rest,
        Standing::Other => Fenced::Nothing,
    }
}

/// The pause after so many failures in a row, the last not counted.
fn pause_ms(failures: u32) -> u64 {
    PAUSE_MS.checked_shl(failures.min(16)).unwrap_or(PAUSE_MS_MAX).min(PAUSE_MS_MAX)
}

#[cfg(test)]
#[path = "plan_test.rs"]
mod tests;
