//! Layers that are merged away in the background: a snapshot's when it is deleted, shared ones when a volume is flattened.
//!
//! ```text
//!   DeleteSnapshot ──▶ Waiting ──volume free──▶ Running ──done──▶ the row goes, the operation ends
//!                         ▲                       │ │
//!                         │◀─────interrupted──────┘ └─busy──▶ Pausing (a second) ──▶ Waiting
//! ```
//! The work is done by whoever has the volume's head: the VMM while the VM runs, else a job. Nobody waits for it: who
//! wants the volume (a start, a snapshot) has it interrupted by the supervisor, and it goes on when the volume is free
//! again, with whoever has the head then. It is resumable by nature, so after a restart of seriod it is simply asked again.
//! Of one volume one layer is merged at a time; of a node at most [`MERGES_MAX`].

use std::{collections::VecDeque, time::Duration};

use serio_store::{
    Change, Key,
    record::{Made, OperationKind, OperationRecord, OperationState, SnapshotRecord},
};
use serio_types::{Name, SnapshotName, VdcName, resource};
use uuid::Uuid;

use super::{
    Refused, State, check,
    command::Answer,
    effect::{Effect, Goal, Merged, Timer},
    operations,
    phase::{Op, Phase, VolumeOp},
    refuse,
};
use crate::error::Error;

/// Merges at once: each may be a process, and all share the disk with the guests.
const MERGES_MAX: usize = 4;
/// Before a volume that somebody else has open is tried again.
const BUSY_PAUSE: Duration = Duration::from_secs(1);

/// A layer that shall go.
#[derive(Debug)]
pub(super) struct Work {
    operation: Uuid,
    goal: Goal,
    stage: Stage,
}

#[derive(Debug, PartialEq, Eq)]
enum Stage {
    /// For the volume to be free.
    Waiting,
    /// An effect is under way.
    Running,
    /// The volume was open elsewhere.
    Pausing,
}

impl Work {
    /// Whether it merges that snapshot away.
    pub(super) fn is_about(&self, point: &Name) -> bool {
        matches!(&self.goal, Goal::Snapshot(name) if name == point)
    }
}

impl State {
    pub(super) fn delete_snapshot(&mut self, name: &SnapshotName, op: Op) -> Result<(), Refused> {
        let point = check!(op, self.plan_delete(name));
        let target = resource::snapshot(&name.volume, &name.snapshot);
        let mut record = self.new_operation(OperationKind::DeleteSnapshot, target, Some(point.volume));
        record.point = Some(point.name.clone());
        let volume = point.volume;
        let goal = Goal::Snapshot(point.name.clone());
        let deleting = Change::Snapshot(SnapshotRecord { state: Made::Deleting, ..point });
        check!(op, self.begin_works(record.clone(), vec![deleting], &op));
        self.push_work(volume, record.uid, goal);
        op.finish(Ok(Answer::Operation(record)));
        Ok(())
    }

    fn plan_delete(&self, name: &SnapshotName) -> Result<SnapshotRecord, Error> {
        let volume = self.model.volume(&name.volume)?;
        let resource = resource::snapshot(&name.volume, &name.snapshot);
        let point = self.model.snapshot(volume.uid, &name.snapshot);
        let point = point.ok_or_else(|| Error::not_found(resource.clone()))?;
        match point.state {
            Made::Ready => {}
            Made::Creating => return Err(Error::Busy { resource, operation: "its creation" }),
            Made::Deleting => return Err(Error::Busy { resource, operation: "its deletion" }),
        }
        if let Some(busy) = self.volume_ops.get(&volume.uid) {
            return Err(Error::Busy {
                resource: resource::volume(&name.volume),
                operation: busy.operation(),
            });
        }
        if let Some(group) = point.group.and_then(|group| self.model.vdc_snapshots.get(&group)) {
            let whole = resource::vdc_snapshot(&self.model.vdc_snapshot_name(group));
            return Err(Error::precondition(resource, format!("is a part of {whole}: delete that")));
        }
        if let Some(export) = self.export_of(volume.uid, &name.snapshot) {
            let why = format!("is exported as exports/{export}: end that first");
            return Err(Error::precondition(resource, why));
        }
        Ok(point.clone())
    }

    /// An export of that point.
    pub(super) fn export_of(&self, volume: Uuid, point: &Name) -> Option<&Name> {
        let mut exports = self.model.exports.values();
        exports.find(|e| e.volume == volume && e.snapshot.as_ref() == Some(point)).map(|e| &e.id)
    }

    pub(super) fn flatten_volume(&mut self, name: &VdcName, op: Op) -> Result<(), Refused> {
        let volume = check!(op, self.model.volume(name)).clone();
        let resource = resource::volume(name);
        if volume.state != Made::Ready {
            return refuse(op, Error::precondition(resource, "is not whole: it is being made or deleted"));
        }
        if let Some(busy) = self.volume_ops.get(&volume.uid) {
            return refuse(op, Error::Busy { resource, operation: busy.operation() });
        }
        let flattened = |r: &OperationRecord| {
            r.kind == OperationKind::FlattenVolume
                && r.subject == Some(volume.uid)
                && r.state == OperationState::Running
        };
        if let Some(running) = self.model.operations.values().find(|r| flattened(r)) {
            let record = running.clone();
            op.finish(Ok(Answer::Operation(record)));
            return Ok(());
        }
        let record = self.new_operation(OperationKind::FlattenVolume, resource, Some(volume.uid));
        check!(op, self.begin_works(record.clone(), Vec::new(), &op));
        self.push_work(volume.uid, record.uid, Goal::Shared);
        op.finish(Ok(Answer::Operation(record)));
        Ok(())
    }

    /// Commits an operation's row with what else its begin changes.
    pub(super) fn begin_works(
        &mut self,
        record: OperationRecord,
        more: Vec<Change>,
        op: &Op,
    ) -> Result<(), Error> {
        let mut changes = self.prune_operations();
        changes.extend(more);
        changes.extend(self.remember(op, operations::resource(record.uid)));
        changes.push(Change::Operation(record));
        self.commit(changes)?;
        self.operations_changed();
        Ok(())
    }

    pub(super) fn push_work(&mut self, volume: Uuid, operation: Uuid, goal: Goal) {
        let work = Work { operation, goal, stage: Stage::Waiting };
        self.works.entry(volume).or_default().push_back(work);
    }

    /// Whether layers of a volume are to be merged away.
    pub(super) fn has_works(&self, volume: Uuid) -> bool {
        self.works.contains_key(&volume)
    }

    /// Begins what can be begun now. Called after each input.
    pub(super) fn pump_works(&mut self) {
        let free = |volume: &Uuid| !self.volume_ops.contains_key(volume);
        let look: Vec<Uuid> = self.look.iter().copied().filter(free).collect();
        for volume in look {
            self.look.remove(&volume);
            if self.model.volumes.get(&volume).is_some_and(|v| v.state == Made::Ready) {
                self.volume_ops.insert(volume, VolumeOp::Inspect { failed: None });
                self.out.push(Effect::Inspect { volume });
            }
        }
        let running = |queue: &VecDeque<Work>| queue.front().is_some_and(|w| w.stage == Stage::Running);
        let mut slots = MERGES_MAX.saturating_sub(self.works.values().filter(|q| running(q)).count());
        let waiting: Vec<Uuid> = self
            .works
            .iter()
            .filter(|(_, queue)| queue.front().is_some_and(|w| w.stage == Stage::Waiting))
            .map(|(volume, _)| *volume)
            .collect();
        for volume in waiting {
            if slots == 0 {
                return;
            }
            let Some(vm) = self.head_holder(volume) else { continue };
            let Some(work) = self.works.get_mut(&volume).and_then(VecDeque::front_mut) else { continue };
            work.stage = Stage::Running;
            slots -= 1;
            let (operation, goal) = (work.operation, work.goal.clone());
            self.out.push(Effect::Merge { volume, operation, goal, vm });
        }
    }

    /// Who can merge: `Some(None)` a job, `Some(Some(vm))` that VM; `None` while nobody can.
    fn head_holder(&self, volume: Uuid) -> Option<Option<Uuid>> {
        let record = self.model.volumes.get(&volume)?;
        if self.volume_ops.contains_key(&volume) || self.model.head_export(volume).is_some() {
            return None;
        }
        match record.vm.map(|vm| (vm, self.phases.get(&vm))) {
            None | Some((_, None | Some(Phase::Off | Phase::Pausing { .. }))) => Some(None),
            Some((vm, Some(Phase::Running { .. }))) => Some(Some(vm)),
            Some((_, Some(_))) => None,
        }
    }

    pub(super) fn merge_progress(&mut self, volume: Uuid, operation: Uuid, done: u64, total: u64) {
        let front = self.works.get(&volume).and_then(VecDeque::front);
        if front.is_some_and(|w| w.operation == operation && w.stage == Stage::Running) {
            self.operation_progress(operation, done, total);
        }
    }

    pub(super) fn merged(&mut self, volume: Uuid, operation: Uuid, outcome: Merged) {
        let Some(queue) = self.works.get_mut(&volume) else { return };
        let Some(work) = queue.front_mut().filter(|w| w.operation == operation && w.stage == Stage::Running)
        else {
            return;
        };
        let cancelled = self.cancelled.contains(&operation);
        match outcome {
            Merged::Done => self.end_work(volume, Ok(())),
            Merged::Interrupted | Merged::Busy(_) if cancelled => {
                self.end_work(volume, Err(ended_by_order()))
            }
            Merged::Interrupted => work.stage = Stage::Waiting,
            Merged::Busy(why) => {
                work.stage = Stage::Pausing;
                tracing::info!(%volume, "its layers are merged later: {why}");
                self.out.push(Effect::Timer { after: BUSY_PAUSE, timer: Timer::MergeAgain { volume } });
            }
            Merged::Failed(error) => self.end_work(volume, Err(error)),
        }
    }

    pub(super) fn merge_again(&mut self, volume: Uuid) {
        if let Some(work) = self.works.get_mut(&volume).and_then(VecDeque::front_mut)
            && work.stage == Stage::Pausing
        {
            work.stage = Stage::Waiting;
        }
    }

    /// The first work of a volume has ended.
    fn end_work(&mut self, volume: Uuid, end: Result<(), Error>) {
        let Some(work) = self.works.get_mut(&volume).and_then(VecDeque::pop_front) else { return };
        self.works.retain(|_, queue| !queue.is_empty());
        let mut changes = Vec::new();
        if let Goal::Snapshot(name) = &work.goal
            && self.model.snapshot(volume, name).is_some()
        {
            let resource = format!("{}/snapshots/{name}", self.model.volume_resource(volume));
            if end.is_ok() {
                changes.push(Change::Delete(Key::RequestsOf(resource.clone())));
                changes.push(Change::Delete(Key::Snapshot(volume, name.clone())));
                changes.push(self.event(resource, "deleted", "the snapshot was merged into what follows it"));
            } else {
                // Interrupted half-way, it is still whole; but it may have been merged away in an earlier life of seriod,
                // or never have been sealed: the headers say.
                self.look.insert(volume);
            }
        } else if end.is_ok() {
            let resource = self.model.volume_resource(volume);
            changes.push(self.event(resource, "flattened", "the volume shares nothing any more"));
        }
        self.settle_operation(work.operation, end, changes);
    }

    /// One work of an operation has ended: the operation too, if it was the last.
    pub(super) fn settle_operation(
        &mut self,
        operation: Uuid,
        end: Result<(), Error>,
        mut changes: Vec<Change>,
    ) {
        if let Err(error) = &end {
            // Of an operation with several works the first failure is told; the others go on.
            let kept = self.model.operations.get_mut(&operation).filter(|r| r.error.is_empty());
            if let Some(record) = kept {
                record.error = crate::error::chain(error);
            }
        }
        if self.works.values().flatten().any(|w| w.operation == operation) {
            return self.record(changes);
        }
        let record = self.model.operations.get(&operation);
        let end = match record.map(|r| r.error.clone()).filter(|error| !error.is_empty()) {
            Some(why) => Err(end.err().unwrap_or(Error::Failed { doing: "merging", why })),
            None => end,
        };
        if let Some(record) = record
            && record.kind.is_whole()
            && end.is_ok()
            && let Some(group) = record.subject
        {
            changes.push(self.event(record.target.clone(), "deleted", "all its parts were merged away"));
            changes.push(Change::Delete(Key::RequestsOf(record.target.clone())));
            changes.push(Change::Delete(Key::VdcSnapshot(group)));
        }
        self.end_operation(operation, end, changes);
    }

    /// Works that nobody is at end at once when their operation is cancelled.
    pub(super) fn cancel_waiting(&mut self, operation: Uuid) {
        let idle = |w: &Work| w.operation == operation && w.stage != Stage::Running;
        let volumes: Vec<Uuid> = self
            .works
            .iter()
            .filter(|(_, queue)| queue.iter().any(idle))
            .map(|(volume, _)| *volume)
            .collect();
        for volume in volumes {
            let Some(queue) = self.works.get_mut(&volume) else { continue };
            let Some(at) = queue.iter().position(idle) else { continue };
            // To the front, where works end; a running one is found there again afterwards.
            let Some(work) = queue.remove(at) else { continue };
            queue.push_front(work);
            self.end_work(volume, Err(ended_by_order()));
        }
    }

    /// A volume is deleted: what was to be merged in it goes with it.
    pub(super) fn drop_works(&mut self, volume: Uuid) {
        let Some(queue) = self.works.remove(&volume) else { return };
        for work in queue {
            self.cancelled.insert(work.operation);
            let gone = Error::precondition(self.model.volume_resource(volume), "was deleted meanwhile");
            let vdc_wide = self.model.operations.get(&work.operation).is_some_and(|r| r.kind.is_whole());
            // A part that went with its volume is as good as merged away.
            let end = if vdc_wide { Ok(()) } else { Err(gone) };
            self.settle_operation(work.operation, end, Vec::new());
            self.cancelled.remove(&work.operation);
        }
    }

    /// After a start: operations go on.
    pub(super) fn recover_works(&mut self) {
        self.fail_lost_operations();
        let running: Vec<OperationRecord> = self.list_operations("", true);
        for record in running.into_iter().rev() {
            let subject = record.subject.unwrap_or_default();
            let whole =
                |volume: &Uuid| self.model.volumes.get(volume).is_some_and(|v| v.state == Made::Ready);
            let works: Vec<(Uuid, Goal)> = match (record.kind, &record.point) {
                (OperationKind::FlattenVolume, _) => vec![(subject, Goal::Shared)],
                (OperationKind::DeleteSnapshot, Some(point)) => {
                    vec![(subject, Goal::Snapshot(point.clone()))]
                }
                _ => {
                    let parts = self.model.parts_of(subject);
                    parts.map(|p| (p.volume, Goal::Snapshot(p.name.clone()))).collect()
                }
            };
            let works: Vec<_> = works.into_iter().filter(|(volume, _)| whole(volume)).collect();
            if works.is_empty() {
                let end = if record.kind.is_whole() {
                    Ok(())
                } else {
                    Err(Error::precondition(record.target.clone(), "was deleted meanwhile"))
                };
                self.settle_operation(record.uid, end, Vec::new());
            }
            for (volume, goal) in works {
                self.push_work(volume, record.uid, goal);
            }
        }
    }
}

fn ended_by_order() -> Error {
    Error::Failed { doing: "merging", why: "it was cancelled".to_owned() }
}
