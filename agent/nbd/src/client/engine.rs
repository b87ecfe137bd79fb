//! The thread of a client: one at a time owns socket, requests under way, and what must be sent again.
//!
//! ```text
//! Window ──collect──► waiting ──► under way ──answer──► Slot of the caller
//!                        ▲            │  └── a change ──► Kept until a flush covers it
//!                        └─lost link──┘                     │
//!   link lost: Kept ──► replay (first, in order) ◄──────────┘
//! ```
//! Invariants
//! - Nothing that waits is sent before all of `replay` is answered, on a new link.
//! - All that a link decoded is taken before the link is dropped: a read's buffer is in the link until its answer, and in
//!   the answer from then on.
//! - An answer is given once; an operation is under way on one link at a time.
//! - A server that breaks the protocol ends the client: what it says cannot be believed. A lost link does not, until
//!   nothing was answered for [`super::Options::give_up`].

use std::{
    collections::{HashMap, VecDeque},
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    Answer, ClientError, Options, Terms,
    kept::Kept,
    link::{Link, LinkError},
    reply::Answered,
    window::{Entry, Op, Window},
};
use crate::wire::{errno, flag};

/// Memory of changes that are kept for a replay; then the engine flushes by itself.
const KEPT_BYTES_MAX: usize = 64 << 20;
/// Their number.
const KEPT_MAX: usize = 64 << 10;
/// The first pause before a new connection, and the longest.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(3));
/// How long one attempt to connect and greet may take.
const ATTEMPT_MAX: Duration = Duration::from_secs(15);

/// An operation on its way, with what a flush needs.
#[derive(Debug)]
struct Flying {
    entry: Entry,
    /// [`Kept::mark`] when it was sent.
    mark: u64,
}

/// See the head of this file.
pub(super) struct Engine {
    window: Arc<Window>,
    options: Options,
    terms: Terms,
    link: Option<Link>,
    waiting: VecDeque<Entry>,
    replay: VecDeque<Entry>,
    flying: HashMap<u64, Flying>,
    kept: Kept,
    /// A flush of the engine's own is waiting or under way.
    flushing: bool,
    cookie: u64,
    /// When something was answered last, or asked of an idle client.
    progress: Instant,
    pause: Duration,
    closed: bool,
}

impl Engine {
    pub(super) fn new(window: Arc<Window>, options: Options, terms: Terms, link: Link) -> Engine {
        Engine {
            window,
            options,
            terms,
            link: Some(link),
            waiting: VecDeque::new(),
            replay: VecDeque::new(),
            flying: HashMap::new(),
            kept: Kept::default(),
            flushing: false,
            cookie: 0,
            progress: Instant::now(),
            pause: PAUSE.0,
            closed: false,
        }
    }

    /// Runs until nobody asks any more, or nothing can be done.
    pub(super) fn run(mut self) {
        loop {
            let idle = self.is_idle();
            self.closed = self.window.collect(&mut self.waiting);
            if self.closed {
                // Whoever waits for an answer keeps the client open.
                if let Some(link) = self.link.take() {
                    link.leave();
                }
                return;
            }
            if idle && !self.is_idle() {
                self.progress = Instant::now();
            }
            let turn = match self.link {
                Some(_) => self.turn(),
                None => self.relink(),
            };
            if let Err(error) = turn {
                self.die(&error);
                return;
            }
        }
    }

    fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.replay.is_empty() && self.flying.is_empty()
    }

    fn die(&mut self, error: &ClientError) {
        let left = self.window.die(error);
        let flying = std::mem::take(&mut self.flying).into_values().map(|f| f.entry);
        let all = flying.chain(self.replay.drain(..)).chain(self.waiting.drain(..)).chain(left);
        for entry in all {
            entry.answer(Err(error.clone()));
        }
    }

    /// Sends what may be sent, waits for something to happen, takes answers.
    fn turn(&mut self) -> Result<(), ClientError> {
        match self.exchange() {
            Ok(()) => Ok(()),
            Err(LinkError::Protocol(e)) => Err(ClientError::Protocol(e)),
            Err(LinkError::Fatal(e)) => Err(e),
            Err(LinkError::Lost(e)) => {
                if self.is_idle() {
                    self.progress = Instant::now();
                }
                self.lost();
                self.check_patience(&Arc::new(e))
            }
        }
    }

    fn exchange(&mut self) -> Result<(), LinkError> {
        self.send_more();
        let Some(link) = &mut self.link else { return Ok(()) };
        link.flush_out()?;
        let stall = (!self.flying.is_empty()).then_some(self.options.stall);
        link.wait(self.window.event(), stall)?;
        let mut answers = Vec::new();
        let received = link.receive(&mut answers);
        // What came before the link broke counts: its buffers are out of the link's hands, and nobody else has them.
        let mut leaving = None;
        for answered in answers {
            match self.answered(answered) {
                Ok(()) => {}
                Err(LinkError::Lost(e)) => leaving = Some(e),
                Err(e) => return Err(e),
            }
        }
        received?;
        leaving.map_or(Ok(()), |e| Err(LinkError::Lost(e)))
    }

    /// Hands entries to the link: first what must be replayed, all of it, and only then what is new.
    fn send_more(&mut self) {
        while let Some(entry) = self.replay.front() {
            if self.overlaps(&entry.op) || self.flying.len() >= self.options.depth {
                return;
            }
            let Some(entry) = self.replay.pop_front() else { return };
            self.send(entry);
        }
        if self.flying.values().any(|f| f.entry.slot.is_none() && f.entry.op.changes()) {
            return;
        }
        let full = self.kept.bytes() > KEPT_BYTES_MAX || self.kept.len() > KEPT_MAX;
        if full && !self.flushing {
            self.flushing = true;
            self.waiting.push_front(Entry { sequence: 0, op: Op::Flush, slot: None });
        }
        while self.flying.len() < self.options.depth {
            // Past the bound no change is sent before the flush is answered.
            let holds = self.flushing && self.waiting.front().is_some_and(|e| e.op.changes());
            if holds {
                return;
            }
            let Some(entry) = self.waiting.pop_front() else { return };
            self.send(entry);
        }
    }

    fn overlaps(&self, op: &Op) -> bool {
        let Some((start, len)) = op.range() else { return false };
        self.flying.values().filter_map(|f| f.entry.op.range()).any(|(other, other_len)| {
            start < other.saturating_add(other_len) && other < start.saturating_add(len)
        })
    }

    fn send(&mut self, mut entry: Entry) {
        let Some(link) = &mut self.link else {
            self.waiting.push_front(entry);
            return;
        };
        self.cookie += 1;
        link.send(self.cookie, &mut entry.op);
        self.flying.insert(self.cookie, Flying { entry, mark: self.kept.mark() });
    }

    fn answered(&mut self, answered: Answered) -> Result<(), LinkError> {
        let Answered { cookie, expected, error } = answered;
        let Some(Flying { mut entry, mark }) = self.flying.remove(&cookie) else { return Ok(()) };
        if let Op::Read { buffer, .. } = &mut entry.op {
            *buffer = expected.buffer;
        }
        if error == Some(errno::ESHUTDOWN) {
            // It goes away and says so: as if it had hung up.
            self.flying.insert(cookie, Flying { entry, mark });
            return Err(LinkError::Lost(io::Error::other("the server is shutting down")));
        }
        self.progress = Instant::now();
        self.pause = PAUSE.0;
        let Entry { sequence, op, slot } = entry;
        if slot.is_some() {
            self.window.answered(op.memory());
        }
        if let (Op::Flush, None) = (&op, &slot) {
            self.flushing = false;
        }
        let outcome = match error {
            Some(value) => Err(ClientError::Server { what: what(&op), value, range: op.range() }),
            None => Ok(match &op {
                Op::Read { .. } => Answer::Data(Vec::new()),
                Op::Status { .. } => Answer::Runs(self.in_order(expected.runs)),
                _ => Answer::Done,
            }),
        };
        match (op, outcome) {
            (Op::Read { buffer, .. }, Ok(_)) => give(slot, Ok(Answer::Data(buffer))),
            (op, Ok(answer)) => {
                if matches!(op, Op::Flush) {
                    self.kept.flushed(mark);
                } else if op.changes() && self.terms.has(flag::SEND_FLUSH) {
                    self.kept.push(sequence, op);
                }
                give(slot, Ok(answer));
            }
            // What was answered before cannot be made good any more: nobody else would be told.
            (_, Err(error)) if slot.is_none() => return Err(LinkError::Fatal(error)),
            (_, Err(error)) => give(slot, Err(error)),
        }
        Ok(())
    }

    /// The runs in the order of the contexts, whatever order the server sent them in.
    fn in_order(&self, mut runs: Vec<(u32, Vec<super::Run>)>) -> Vec<Vec<super::Run>> {
        let position = |id: &u32| self.terms.contexts.iter().position(|(known, _)| known == id);
        runs.sort_by_key(|(id, _)| position(id));
        runs.into_iter().map(|(_, runs)| runs).collect()
    }

    /// The link is gone: all that was under way waits again, and what may be lost is sent first.
    fn lost(&mut self) {
        let Some(link) = self.link.take() else { return };
        let mut buffers = link.into_expected();
        let mut again: Vec<Entry> = Vec::new();
        for (cookie, Flying { mut entry, .. }) in self.flying.drain() {
            if let (Op::Read { buffer, .. }, Some(expected)) = (&mut entry.op, buffers.remove(&cookie)) {
                *buffer = expected.buffer;
            }
            again.push(entry);
        }
        again.sort_by_key(|entry| entry.sequence);
        let (replayed, asked): (Vec<Entry>, Vec<Entry>) =
            again.into_iter().partition(|entry| entry.slot.is_none() && entry.op.changes());
        for entry in asked.into_iter().rev() {
            self.waiting.push_front(entry);
        }
        let kept = self.kept.take().into_iter();
        let mut replay: Vec<Entry> =
            kept.map(|change| Entry { sequence: change.sequence, op: change.op, slot: None }).collect();
        replay.extend(replayed);
        replay.extend(self.replay.drain(..));
        replay.sort_by_key(|entry| entry.sequence);
        self.replay = replay.into();
    }

    fn check_patience(&self, source: &Arc<io::Error>) -> Result<(), ClientError> {
        let waited = self.progress.elapsed();
        if self.is_idle() || waited < self.options.give_up {
            return Ok(());
        }
        Err(ClientError::Lost {
            address: self.options.address.to_string(),
            waited_s: waited.as_secs(),
            source: Arc::clone(source),
        })
    }

    /// One attempt to connect again; before it, a pause, in which callers may close the client.
    fn relink(&mut self) -> Result<(), ClientError> {
        if self.is_idle() {
            // Nobody needs it now.
            return self.nap(None);
        }
        match Link::connect(&self.options, ATTEMPT_MAX) {
            Ok((link, terms)) => {
                if terms.size_bytes != self.terms.size_bytes {
                    return Err(ClientError::Changed(format!(
                        "it had {} bytes and has {} now",
                        self.terms.size_bytes, terms.size_bytes
                    )));
                }
                if self.terms.flags & !terms.flags != 0
                    || terms.is_read_only() != self.terms.is_read_only()
                    || terms.payload_max_bytes < self.terms.payload_max_bytes
                    || terms.block_min_bytes > self.terms.block_min_bytes
                    || terms.contexts.len() != self.terms.contexts.len()
                {
                    return Err(ClientError::Changed("it allows less than before".into()));
                }
                self.terms = terms;
                self.link = Some(link);
                Ok(())
            }
            Err(error) => {
                self.check_patience(&Arc::new(io::Error::other(super::chain(&error))))?;
                let pause = self.pause;
                self.pause = (pause * 2).min(PAUSE.1);
                self.nap(Some(pause))
            }
        }
    }

    /// Waits for the callers, at most so long.
    fn nap(&self, limit: Option<Duration>) -> Result<(), ClientError> {
        super::link::wait_event(self.window.event(), limit).map_err(|e| ClientError::Connect {
            address: self.options.address.to_string(),
            source: Arc::new(super::ConnectError::Socket(e)),
        })
    }
}

fn give(slot: Option<Arc<super::window::Slot>>, outcome: super::window::Outcome) {
    if let Some(slot) = slot {
        slot.put(outcome);
    }
}

fn what(op: &Op) -> &'static str {
    match op {
        Op::Read { .. } => "read",
        Op::Write { .. } => "write",
        Op::Flush => "flush",
        Op::Trim { .. } => "trim",
        Op::WriteZeroes { .. } => "write of zeroes",
        Op::Status { .. } => "block status",
    }
}
