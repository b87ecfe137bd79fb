//! Snapshots of several volumes at one instant, in two steps: `PrepareSnapshot`, then `FinishSnapshot`; between them
//! `HoldSnapshot`, when the guests of several VMs shall all be frozen before the first of them is held.
//!
//! ```text
//!   PrepareSnapshot ──► thread "cut":  freeze (if asked) ─► [Prepared, HoldSnapshot ─►] flush all ─► hold all ─► still frozen? ─► Prepared
//!   FinishSnapshot  ──►                seal all | let go ─► answer ─► thaw
//!   hold_ms is over ──►                let go ─► thaw
//! ```
//!
//! **The instant.** Between the end of the last hold and the first seal no write of the guest to any of the volumes is
//! answered, nor was one to a volume after its own hold. So a write that the guest made because another one had been
//! answered is in the snapshot only together with that other one, on whichever volumes they are; and the same over all
//! VMs whose holds overlap. That is what a power cut leaves: the class is `Crash`. If the guest agent froze the file
//! systems before, and says after the hold that they still are, it is `App`.
//!
//! - One cut at a time. It belongs to this process, not to the connection that asked for it: `seriod` may come back on
//!   another one, or never; after `hold_ms` everything goes on as if nothing had been asked.
//! - Whatever the guest agent does or does not do, the cut goes on as `Crash`, with the reason. A thaw follows every
//!   freeze that was sent.
//! - The thread owns all of it. Others only give it orders; so nothing here is locked while a volume is held.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serio_control::message::{
    Body, Code, Failed, FinishSnapshot, HoldSnapshot, PointClass, PrepareSnapshot, Prepared, PreparedVolume,
};
use serio_sandbox::{Kind, threads};
use serio_volume::{Held, LayerFiles, SnapshotError, Volume};

use super::launch::Passed;
use super::requests::{done, failed, refusal};
use crate::devices::Devices;
use crate::end::chain;
use crate::guest_agent::Freeze;

/// What holds when the request does not say.
const FREEZE_MS: u32 = 10_000;
const HOLD_MS: u32 = 5_000;
/// Nobody may ask for more.
const WAIT_MS_MAX: u32 = 60_000;
/// How long the agent may take to say that nothing has changed. Its guest's disks are held meanwhile.
const CONFIRM: Duration = Duration::from_millis(500);
/// How long the end of the VM waits for a cut to let go.
const ABANDON: Duration = Duration::from_secs(2);
const STACK_BYTES: usize = 256 * 1024;

/// The cut that is under way, if there is one.
#[derive(Default)]
pub(super) struct Cuts {
    now: Mutex<Option<Now>>,
    idle: Condvar,
}

struct Now {
    id: String,
    orders: SyncSender<Order>,
}

/// What is asked of the cut that is under way.
enum What {
    /// `HoldSnapshot`.
    Hold,
    /// `FinishSnapshot`: seal.
    Commit,
    /// `FinishSnapshot`: let go.
    LetGo,
}

/// That, and where its answer goes.
struct Order {
    what: What,
    answer: SyncSender<Body>,
}

/// A volume and the head that it shall go on in.
pub(super) struct Part {
    pub(super) name: String,
    pub(super) volume: Volume,
    pub(super) head: LayerFiles,
}

/// The volumes that a request names, with their new heads, if all of them could be sealed as `snapshot`.
pub(super) fn parts(
    devices: &Devices,
    (snapshot, volumes): (&str, &[PreparedVolume]),
    passed: &mut Passed,
) -> Result<Vec<Part>, Failed> {
    let mut parts: Vec<Part> = Vec::with_capacity(volumes.len());
    for wanted in volumes {
        let name = &wanted.volume_id;
        let invalid = |what: &str| refusal(Code::Invalid, "volumes", format!("volume `{name}` {what}"));
        let Some(disk) = devices.disk(name) else { return Err(invalid("is not of this VM")) };
        if parts.iter().any(|part| part.name == *name) {
            return Err(invalid("is named twice"));
        }
        let Some(head) = &wanted.head else { return Err(invalid("has no new head")) };
        disk.volume.check_snapshot(snapshot).map_err(|error| failed_at(name, &error, &[]))?;
        let mut take = |field, index| passed.take(field, index).map_err(|e| e.answer());
        let head = LayerFiles {
            data: File::from(take("data_fd", head.data_fd)?),
            map: File::from(take("map_fd", head.map_fd)?),
        };
        parts.push(Part { name: name.clone(), volume: disk.volume.clone(), head });
    }
    Ok(parts)
}

/// A cut as it was asked for.
struct Cut {
    id: String,
    snapshot: String,
    parts: Vec<Part>,
    /// How long the guest agent may take, if it is to be asked.
    freeze: Option<Duration>,
    /// What is settled at the end.
    ticket: Freeze,
    /// Freeze, then wait for `HoldSnapshot`, so long.
    wait: Option<Duration>,
    hold: Duration,
    paused: bool,
    devices: Arc<Devices>,
}

/// What a snapshot's failure means for the one who asked.
pub(super) fn refused(error: &SnapshotError) -> (Code, &'static str) {
    match error {
        SnapshotError::Raw | SnapshotError::ReadOnly => (Code::Precondition, "volume_id"),
        SnapshotError::Name { .. } => (Code::Invalid, "snapshot"),
        SnapshotError::TooManyLayers(_) => (Code::Exhausted, "volume_id"),
        SnapshotError::Poisoned | SnapshotError::NotDrained(_) => (Code::Precondition, ""),
        SnapshotError::Create(_) | SnapshotError::Io { .. } => (Code::Io, ""),
    }
}

pub(super) fn failed_at(volume: &str, error: &SnapshotError, sealed: &[&str]) -> Failed {
    let (code, field) = refused(error);
    let mut message = format!("volume {volume}: {}", chain(error));
    if !sealed.is_empty() {
        message.push_str(&format!("; sealed before it: {}", sealed.join(", ")));
    }
    refusal(code, field, message)
}

impl Cuts {
    /// Whether one is under way.
    pub(super) fn is_busy(&self) -> bool {
        self.lock().is_some()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Now>> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds the volumes; answers when they are held, or when nothing was done.
    pub(super) fn prepare(
        self: &Arc<Cuts>,
        devices: &Arc<Devices>,
        paused: bool,
        request: &PrepareSnapshot,
        descriptors: Vec<OwnedFd>,
    ) -> Body {
        let cut = match Cut::new(devices, paused, request, descriptors) {
            Ok(cut) => cut,
            Err(refusal) => return Body::Failed(refusal),
        };
        let (orders, taken) = sync_channel(1);
        {
            let mut now = self.lock();
            if let Some(now) = &*now {
                let why = format!("snapshot {} is being taken: finish it first", now.id);
                return failed(Code::Precondition, "snapshot_id", why);
            }
            *now = Some(Now { id: cut.id.clone(), orders });
        }
        let (answer, answered) = sync_channel(1);
        let slot = Slot(self.clone());
        let run = move || cut.run(slot, &answer, &taken);
        if let Err(error) = threads::spawn(Kind::Cut, "cut", STACK_BYTES, run) {
            return failed(Code::Exhausted, "", format!("a thread could not be started: {error}"));
        }
        let lost = |_| failed(Code::Internal, "", "the snapshot's thread ended without an answer");
        answered.recv().unwrap_or_else(lost)
    }

    /// Holds what is frozen.
    pub(super) fn hold(&self, request: &HoldSnapshot) -> Body {
        self.order(&request.snapshot_id, What::Hold)
    }

    /// Seals what was prepared, or lets go.
    pub(super) fn finish(&self, request: &FinishSnapshot) -> Body {
        self.order(&request.snapshot_id, if request.commit { What::Commit } else { What::LetGo })
    }

    fn order(&self, id: &str, what: What) -> Body {
        let gone = || {
            let why =
                "it was let go: it was finished before, its time was over, or it was never prepared here";
            failed(Code::Precondition, "snapshot_id", format!("snapshot {id}: {why}"))
        };
        let orders = match &*self.lock() {
            Some(now) if now.id == id => now.orders.clone(),
            _ => return gone(),
        };
        let (answer, answered) = sync_channel(1);
        let order = Order { what, answer };
        if orders.try_send(order).is_err() {
            return gone();
        }
        // The thread answers, or it has just let go and drops the order.
        answered.recv().unwrap_or_else(|_| gone())
    }

    /// The VM is at its end: lets go, and waits a moment for it.
    pub(super) fn abandon(&self, devices: &Devices) {
        devices.guest_agent.port().end();
        let mut now = self.lock();
        if let Some(now) = &mut *now {
            // An order that nobody can answer any more: the channel is closed.
            now.orders = sync_channel(1).0;
        }
        let _ = self.idle.wait_timeout_while(now, ABANDON, |now| now.is_some());
    }
}

/// The right to be the one cut; given back when dropped.
struct Slot(Arc<Cuts>);

impl Drop for Slot {
    fn drop(&mut self) {
        *self.0.lock() = None;
        self.0.idle.notify_all();
    }
}

fn wait_of(asked_ms: u32, otherwise_ms: u32) -> Duration {
    let ms = if asked_ms == 0 { otherwise_ms } else { asked_ms };
    Duration::from_millis(ms.min(WAIT_MS_MAX).into())
}

impl Cut {
    fn new(
        devices: &Arc<Devices>,
        paused: bool,
        request: &PrepareSnapshot,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Cut, Failed> {
        let mut passed = Passed::new(descriptors);
        let parts = parts(devices, (&request.snapshot, &request.volumes), &mut passed)?;
        if parts.is_empty() {
            return Err(refusal(Code::Invalid, "volumes", "name at least one volume"));
        }
        Ok(Cut {
            id: request.snapshot_id.clone(),
            snapshot: request.snapshot.clone(),
            parts,
            ticket: devices.guest_agent.next_freeze(),
            freeze: request.freeze.then(|| wait_of(request.freeze_timeout_ms, FREEZE_MS)),
            // The others freeze meanwhile.
            wait: (request.freeze && request.freeze_first)
                .then(|| wait_of(request.freeze_timeout_ms, FREEZE_MS) + wait_of(request.hold_ms, HOLD_MS)),
            hold: wait_of(request.hold_ms, HOLD_MS),
            paused,
            devices: devices.clone(),
        })
    }

    /// The thread. Ends when everything is let go and the guest is thawed.
    fn run(self, slot: Slot, answer: &SyncSender<Body>, orders: &Receiver<Order>) {
        let (devices, ticket) = (self.devices.clone(), self.ticket);
        let id = self.id.clone();
        self.cut(slot, answer, orders);
        devices.guest_agent.settle(ticket, |error| {
            super::say(format_args!("snapshot {id}: the guest is not thawed yet: {}", chain(error)));
        });
    }

    fn cut(self, slot: Slot, answer: &SyncSender<Body>, orders: &Receiver<Order>) {
        let mut prepared = self.freeze();
        let asked;
        let answer = match self.wait {
            Some(limit) => {
                let _ = answer.send(Body::Prepared(Prepared { waits: true, ..prepared.clone() }));
                let Some(told) = self.told_to_hold(orders, limit) else { return };
                asked = told;
                &asked
            }
            None => answer,
        };
        let (held, deadline) = match self.hold_all() {
            Ok(held) => held,
            Err(refusal) => {
                drop(slot);
                return drop(answer.send(Body::Failed(refusal)));
            }
        };
        self.confirm(&mut prepared);
        let (id, snapshot) = (self.id.clone(), self.snapshot.clone());
        // Nobody may be there any more to hear it; then the time is over soon.
        let _ = answer.send(Body::Prepared(prepared));
        let left = deadline.saturating_duration_since(Instant::now());
        let (order, body) = match orders.recv_timeout(left) {
            Ok(order) if matches!(order.what, What::Commit) => {
                let body = seal_all(self.parts, held, &snapshot);
                (Some(order), body)
            }
            other => {
                drop(held);
                if let Err(RecvTimeoutError::Timeout) = other {
                    let ms = self.hold.as_millis();
                    super::say(format_args!("snapshot {id}: let go, since nobody finished it in {ms} ms"));
                }
                (other.ok(), done())
            }
        };
        drop(slot);
        if let Some(order) = order {
            let _ = order.answer.send(body);
        }
    }

    /// Waits, frozen, for the word to hold; where that is answered. `None`: it was let go.
    fn told_to_hold(&self, orders: &Receiver<Order>, limit: Duration) -> Option<SyncSender<Body>> {
        match orders.recv_timeout(limit) {
            Ok(Order { what: What::Hold, answer }) => return Some(answer),
            Ok(Order { what: What::LetGo, answer }) => drop(answer.send(done())),
            Ok(Order { what: What::Commit, answer }) => {
                let why = format!("snapshot {}: nothing is held yet: ask for that first", self.id);
                let _ = answer.send(failed(Code::Precondition, "snapshot_id", why));
            }
            Err(RecvTimeoutError::Timeout) => {
                let ms = limit.as_millis();
                super::say(format_args!("snapshot {}: let go, since nobody held it in {ms} ms", self.id));
            }
            Err(RecvTimeoutError::Disconnected) => {}
        }
        None
    }

    /// Asks the guest agent, if that is wanted. What the snapshot is good for so far.
    fn freeze(&self) -> Prepared {
        let crash = |reason| Prepared { class: PointClass::Crash.into(), reason, ..Prepared::default() };
        let Some(limit) = self.freeze else { return crash(String::new()) };
        if self.paused {
            return crash("the VM is paused, so its agent cannot freeze it".to_owned());
        }
        match self.devices.guest_agent.freeze(self.ticket, Instant::now() + limit) {
            Ok(frozen) => Prepared { class: PointClass::App.into(), frozen, ..Prepared::default() },
            Err(error) => crash(chain(&error)),
        }
    }

    /// What is held now was frozen only if it still is.
    fn confirm(&self, prepared: &mut Prepared) {
        if prepared.class != i32::from(PointClass::App) {
            return;
        }
        if let Err(error) = self.devices.guest_agent.confirm(Instant::now() + CONFIRM) {
            let reason = chain(&error);
            *prepared = Prepared { class: PointClass::Crash.into(), reason, ..Prepared::default() };
        }
    }

    /// Holds all, and says until when: the time runs from the first hold on, since from then on the guest waits.
    fn hold_all(&self) -> Result<(Vec<Held>, Instant), Failed> {
        for part in &self.parts {
            part.volume.flush().map_err(|error| failed_at(&part.name, &error, &[]))?;
        }
        let mut held = Vec::with_capacity(self.parts.len());
        let mut deadline = None;
        for part in &self.parts {
            let left =
                deadline.map_or(self.hold, |end: Instant| end.saturating_duration_since(Instant::now()));
            held.push(part.volume.hold(left).map_err(|error| failed_at(&part.name, &error, &[]))?);
            deadline = deadline.or_else(|| Instant::now().checked_add(self.hold));
        }
        Ok((held, deadline.unwrap_or_else(Instant::now)))
    }
}

/// Seals one after the other; each goes on at once, which harms nothing, since all are held from before the first.
fn seal_all(parts: Vec<Part>, held: Vec<Held>, snapshot: &str) -> Body {
    let mut sealed = Vec::with_capacity(parts.len());
    let names: Vec<String> = parts.iter().map(|part| part.name.clone()).collect();
    for ((part, held), name) in parts.into_iter().zip(held).zip(&names) {
        if let Err(error) = held.seal(part.head, snapshot) {
            return Body::Failed(failed_at(name, &error, &sealed));
        }
        sealed.push(name.as_str());
    }
    done()
}
