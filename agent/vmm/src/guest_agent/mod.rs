//! Talking with the QEMU guest agent in the guest: freeze its file systems, thaw them.
//!
//! ```text
//!   freeze    sync ─► guest-fsfreeze-freeze ─► guest-fsfreeze-status says "frozen"?
//!   confirm   sync ─► guest-fsfreeze-status                            (after writes are held)
//!   settle    sync + guest-fsfreeze-thaw in one go, again until it is answered
//! ```
//!
//! - Each exchange begins with `guest-sync-delimited` and a fresh number, so a late answer to an earlier question is
//!   never taken for the one to this. A freeze is only asked of an agent that has just answered, so that none is left
//!   behind in the port to be done when nobody remembers it.
//! - Once a freeze was sent, a thaw is *owed*, whatever the guest said or did not say: [`GuestAgent::settle`] pays it, and only for
//!   its own freeze. A later freeze pays what is owed for the ones before it: whoever settles those finds nothing to do.
//! - The guest may lie, flood or stay silent: lines and the bytes of an exchange are bounded, each wait has a deadline,
//!   and what it says is only ever believed about itself.
//! - Everything here blocks its own thread and nobody else's.

mod lines;

#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod guest_agent_test;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use serio_devices::ports::{HostPort, PortError, Session};

use self::lines::{DELIMITER, Lines, Said};

/// Bytes of one exchange, answers to earlier questions among them.
const EXCHANGE_BYTES_MAX: usize = 1 << 20;
/// Bytes taken from the port at a time.
const PIECE_BYTES: usize = 4096;
/// How long a thaw may take before it is asked again.
const THAW_MS: u64 = 10_000;
/// After so many times it is asked again only when the guest's agent comes back, or once in a long while.
const THAW_TRIES: u32 = 10;
const THAW_PAUSE: Duration = Duration::from_secs(30);
const THAW_LONG_PAUSE: Duration = Duration::from_secs(3600);
/// What of a guest's own words is passed on.
const QUOTE_CHARS_MAX: usize = 200;

const FREEZE: &str = "guest-fsfreeze-freeze";
const STATUS: &str = "guest-fsfreeze-status";
const THAW: &str = "guest-fsfreeze-thaw";

/// Why the guest agent did not do it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AgentError {
    /// It is not there, or does not answer.
    #[error("the guest agent cannot be reached")]
    Port(#[from] PortError),
    /// It said no.
    #[error("the guest agent refused {command}: {said}")]
    Refused {
        /// What was asked.
        command: &'static str,
        /// Its words, shortened.
        said: String,
    },
    /// It said something that is no answer.
    #[error("the guest agent's answer to {0} makes no sense")]
    Nonsense(&'static str),
    /// It said too much.
    #[error("the guest agent sent more than an answer can be")]
    Flood,
    /// It froze nothing.
    #[error("the guest agent found no file system to freeze")]
    Nothing,
    /// It says that the file systems are not frozen.
    #[error("the guest's file systems did not stay frozen")]
    NotFrozen,
}

/// One freeze of the guest: what [`GuestAgent::settle`] undoes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Freeze(u64);

/// The agent in one VM's guest.
#[derive(Debug)]
pub struct GuestAgent {
    port: HostPort,
    /// The freeze that a thaw is owed for; 0: none. Changed only in a session, of which there is one at a time.
    owed: AtomicU64,
    /// The last freeze.
    freezes: AtomicU64,
    /// Held while a thaw is asked again and again: one thread does that.
    settling: Mutex<()>,
    /// The number of the last sync.
    number: AtomicU64,
}

impl GuestAgent {
    /// The agent behind `port`.
    #[must_use]
    pub fn new(port: HostPort) -> GuestAgent {
        // Numbers of an earlier process must not fit.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let number = AtomicU64::new(u64::try_from(now >> 10).unwrap_or(0) << 20);
        GuestAgent {
            port,
            owed: AtomicU64::new(0),
            freezes: AtomicU64::new(0),
            settling: Mutex::new(()),
            number,
        }
    }

    /// The port, for the device that the guest sees.
    #[must_use]
    pub fn port(&self) -> &HostPort {
        &self.port
    }

    /// Whether an agent has its port open.
    #[must_use]
    pub fn is_there(&self) -> bool {
        self.port.is_open()
    }

    /// A freeze that may be asked for, and is to be settled.
    #[must_use]
    pub fn next_freeze(&self) -> Freeze {
        Freeze(self.freezes.fetch_add(1, Ordering::Relaxed).wrapping_add(1))
    }

    /// Freezes the guest's file systems; how many. However it ends, call [`GuestAgent::settle`] afterwards.
    pub fn freeze(&self, freeze: Freeze, deadline: Instant) -> Result<u32, AgentError> {
        let mut talk = self.talk(deadline)?;
        if self.owed.load(Ordering::Acquire) != 0 {
            talk.ask(THAW, deadline)?;
        }
        self.owed.store(freeze.0, Ordering::Release);
        let count = count_of(&talk.ask(FREEZE, deadline)?).ok_or(AgentError::Nonsense(FREEZE))?;
        if count == 0 {
            return Err(AgentError::Nothing);
        }
        talk.confirm(deadline)?;
        Ok(count)
    }

    /// Asks whether the file systems are still frozen.
    pub fn confirm(&self, deadline: Instant) -> Result<(), AgentError> {
        self.talk(deadline)?.confirm(deadline)
    }

    /// Thaws what that freeze may have frozen: returns when the guest says so, when it was not sent, when a later one was, or when
    /// the VM ends. `say` is told when it takes more than one try.
    pub fn settle(&self, freeze: Freeze, say: impl Fn(&AgentError)) {
        let _one = self.settling.lock().unwrap_or_else(PoisonError::into_inner);
        for tried in 1u32.. {
            if self.owed.load(Ordering::Acquire) != freeze.0 {
                return;
            }
            let seen = self.port.times_opened();
            let error = match self.thaw(freeze, Instant::now() + Duration::from_millis(THAW_MS)) {
                Ok(()) => return,
                Err(error) => error,
            };
            if tried == 1 {
                say(&error);
            }
            let pause = if tried < THAW_TRIES { THAW_PAUSE } else { THAW_LONG_PAUSE };
            if self.port.wait_opened(seen, Instant::now() + pause) == Err(PortError::Ended) {
                return;
            }
        }
    }

    /// Sync and thaw go together: an agent that is still busy with a freeze finds both when it is done, even if nobody
    /// waits for its answer any more.
    fn thaw(&self, freeze: Freeze, deadline: Instant) -> Result<(), AgentError> {
        let mut talk = Talk::new(self.port.session(deadline)?);
        // While this one waited for its turn the next freeze may have had its own, and may be in force.
        if self.owed.load(Ordering::Acquire) != freeze.0 {
            return Ok(());
        }
        let number = self.next_number();
        let thaw = json!({ "execute": THAW });
        talk.send(&[sync(number), format!("{thaw}\n").into_bytes()].concat())?;
        talk.wait_sync(number, deadline)?;
        count_of(&talk.answer(THAW, deadline)?).ok_or(AgentError::Nonsense(THAW))?;
        // Before the session ends: the next one may be another freeze, which owes a thaw of its own.
        self.owed.store(0, Ordering::Release);
        Ok(())
    }

    /// A conversation with an agent that has just answered.
    fn talk(&self, deadline: Instant) -> Result<Talk, AgentError> {
        let mut talk = Talk::new(self.port.session(deadline)?);
        let number = self.next_number();
        talk.send(&sync(number))?;
        talk.wait_sync(number, deadline)?;
        Ok(talk)
    }

    fn next_number(&self) -> u64 {
        // It fits in the signed 64 bits that the agent has for it.
        self.number.fetch_add(1, Ordering::Relaxed) >> 1
    }
}

/// The delimiter first: it ends whatever half a line the agent may have of an earlier one.
fn sync(number: u64) -> Vec<u8> {
    let body = json!({ "execute": "guest-sync-delimited", "arguments": { "id": number } });
    let mut bytes = vec![DELIMITER];
    bytes.extend(format!("{body}\n").into_bytes());
    bytes
}

fn count_of(answer: &Value) -> Option<u32> {
    answer.as_u64().and_then(|count| u32::try_from(count).ok())
}

/// One exchange.
struct Talk {
    session: Session,
    lines: Lines,
    bytes: Vec<u8>,
    at: usize,
    taken: usize,
}

impl Talk {
    fn new(session: Session) -> Talk {
        Talk { session, lines: Lines::default(), bytes: Vec::new(), at: 0, taken: 0 }
    }

    fn send(&self, bytes: &[u8]) -> Result<(), AgentError> {
        Ok(self.session.send(bytes)?)
    }

    /// The next thing that the guest says.
    fn hear(&mut self, deadline: Instant) -> Result<Said, AgentError> {
        loop {
            let rest = self.bytes.get(self.at..).unwrap_or_default();
            let (used, said) = self.lines.feed(rest);
            self.at = self.at.saturating_add(used);
            if let Some(said) = said {
                return Ok(said);
            }
            if self.taken >= EXCHANGE_BYTES_MAX {
                return Err(AgentError::Flood);
            }
            self.bytes.clear();
            self.at = 0;
            self.session.receive(&mut self.bytes, PIECE_BYTES, deadline)?;
            self.taken = self.taken.saturating_add(self.bytes.len());
        }
    }

    /// Skips all that was said before the answer to this sync.
    fn wait_sync(&mut self, number: u64, deadline: Instant) -> Result<(), AgentError> {
        let mut delimited = false;
        loop {
            match self.hear(deadline)? {
                Said::Delimiter => delimited = true,
                Said::Line(line) if std::mem::take(&mut delimited) => {
                    let value = serde_json::from_slice::<Value>(&line).unwrap_or_default();
                    if value.get("return").and_then(Value::as_u64) == Some(number) {
                        return Ok(());
                    }
                }
                Said::Line(_) | Said::TooLong => delimited = false,
            }
        }
    }

    fn ask(&mut self, command: &'static str, deadline: Instant) -> Result<Value, AgentError> {
        let body = json!({ "execute": command });
        self.send(format!("{body}\n").as_bytes())?;
        self.answer(command, deadline)
    }

    fn answer(&mut self, command: &'static str, deadline: Instant) -> Result<Value, AgentError> {
        let Said::Line(line) = self.hear(deadline)? else { return Err(AgentError::Nonsense(command)) };
        let nonsense = || AgentError::Nonsense(command);
        let Ok(Value::Object(mut answer)) = serde_json::from_slice(&line) else { return Err(nonsense()) };
        if let Some(error) = answer.get("error") {
            let said = error.get("desc").and_then(Value::as_str).unwrap_or("without a reason");
            return Err(AgentError::Refused { command, said: quote(said) });
        }
        answer.remove("return").ok_or_else(nonsense)
    }

    fn confirm(&mut self, deadline: Instant) -> Result<(), AgentError> {
        match self.ask(STATUS, deadline)?.as_str() {
            Some("frozen") => Ok(()),
            Some("thawed") => Err(AgentError::NotFrozen),
            _ => Err(AgentError::Nonsense(STATUS)),
        }
    }
}

/// A guest's words, for logs and people: short, in one line, without control characters.
fn quote(said: &str) -> String {
    said.chars().take(QUOTE_CHARS_MAX).map(|c| if c.is_control() { ' ' } else { c }).collect()
}
