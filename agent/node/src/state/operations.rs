//! Long operations as resources: begun, shown, ended, pruned. What the merging ones do is in [`super::merges`]; the work
//! of the others is done outside of the state (an import, a check), which is told how far it is and when it has ended.

use serio_store::{
    Change, Key,
    record::{OperationKind, OperationRecord, OperationState},
};
use uuid::Uuid;

use super::{
    State,
    command::{Answer, Request},
    effect::Effect,
};
use crate::error::Error;

/// Ended operations that are kept, and for how long.
const KEPT_MAX: usize = 1000;
const KEPT_MS: i64 = 7 * 24 * 60 * 60 * 1000;

/// Whether the next seriod can go on with it.
pub(super) const fn is_resumable(kind: OperationKind) -> bool {
    match kind {
        OperationKind::DeleteSnapshot
        | OperationKind::FlattenVolume
        | OperationKind::DeleteVdcSnapshot
        | OperationKind::DeleteVmSnapshot => true,
        OperationKind::ImportVolume | OperationKind::CheckVolume => false,
    }
}

/// `operations/ID`.
pub(super) fn resource(uid: Uuid) -> String {
    format!("operations/{uid}")
}

impl State {
    /// A new operation's row.
    pub(super) fn new_operation(
        &self,
        kind: OperationKind,
        target: String,
        subject: Option<Uuid>,
    ) -> OperationRecord {
        OperationRecord {
            uid: Uuid::now_v7(),
            kind,
            target,
            subject,
            point: None,
            state: OperationState::Running,
            done_bytes: 0,
            total_bytes: 0,
            error: String::new(),
            create_time: self.now,
            end_time: None,
        }
    }

    /// Says to those who watch that an operation has changed.
    pub(super) fn operations_changed(&mut self) {
        self.operations_version = self.operations_version.wrapping_add(1);
    }

    /// Counts up with each change of an operation.
    #[must_use]
    pub fn operations_version(&self) -> u64 {
        self.operations_version
    }

    /// The operation of that id.
    pub(super) fn operation(&self, uid: Uuid) -> Result<&OperationRecord, Error> {
        self.model.operations.get(&uid).ok_or_else(|| Error::NotFound {
            resource: resource(uid),
            hint: ": `serio operation list` shows those that are kept",
        })
    }

    /// An operation whose work is done outside.
    pub(super) fn begin_operation(
        &mut self,
        kind: OperationKind,
        (target, subject): (String, Option<Uuid>),
        request: Option<Request>,
    ) -> Result<Answer, Error> {
        if let Some(request) = &request
            && let Some(known) = self.store.request(request.id)?
        {
            request.same_as(&known)?;
            let begun = self.model.operations.values().find(|r| resource(r.uid) == known.resource);
            let begun = begun.cloned().ok_or_else(|| Error::not_found(known.resource))?;
            return Ok(Answer::BegunBefore(begun));
        }
        let record = self.new_operation(kind, target, subject);
        let mut changes = self.prune_operations();
        changes.extend(request.map(|r| Change::Request(r.record(resource(record.uid), self.steady))));
        changes.push(Change::Operation(record.clone()));
        self.commit(changes)?;
        self.operations_changed();
        Ok(Answer::Operation(record))
    }

    /// How far an operation is: kept in memory only, the work itself knows where it stood.
    pub(super) fn operation_progress(&mut self, uid: Uuid, done_bytes: u64, total_bytes: u64) {
        if let Some(record) = self.model.operations.get_mut(&uid)
            && record.state == OperationState::Running
        {
            record.done_bytes = done_bytes;
            record.total_bytes = total_bytes;
            self.operations_changed();
        }
    }

    /// Ends an operation, together with what its end changes.
    pub(super) fn end_operation(&mut self, uid: Uuid, end: Result<(), Error>, more: Vec<Change>) {
        let mut changes = more;
        let cancelled = self.cancelled.remove(&uid);
        if let Some(record) = self.model.operations.get(&uid).filter(|r| r.end_time.is_none()) {
            let mut record = record.clone();
            record.end_time = Some(self.now);
            record.state = match &end {
                Ok(()) => OperationState::Done,
                Err(_) if cancelled => {
                    record.error.clear();
                    OperationState::Cancelled
                }
                Err(error) => {
                    record.error = crate::error::chain(error);
                    OperationState::Failed
                }
            };
            if record.state == OperationState::Done && record.total_bytes > 0 {
                record.done_bytes = record.total_bytes;
            }
            if record.state == OperationState::Failed {
                let message = format!("{} failed: {}", resource(uid), record.error);
                changes.push(self.event(record.target.clone(), "failed", message));
            }
            changes.push(Change::Operation(record));
        }
        self.record(changes);
        self.operations_changed();
    }

    /// Asks an operation to end. Answered with how it is now.
    pub(super) fn cancel_operation(&mut self, uid: Uuid) -> Result<Answer, Error> {
        let record = self.operation(uid)?.clone();
        if record.state != OperationState::Running {
            return Ok(Answer::Operation(record));
        }
        if record.kind.is_whole() {
            let why =
                "deletes parts of a vdc's snapshot, and what is left of it would be of no use: let it go on";
            return Err(Error::precondition(resource(uid), why));
        }
        self.cancelled.insert(uid);
        self.cancel_waiting(uid);
        if self.model.operations.get(&uid).is_some_and(|r| r.state == OperationState::Running) {
            self.out.push(Effect::CancelOperation { operation: uid });
        }
        self.operation(uid).cloned().map(Answer::Operation)
    }

    /// Operations, newest first.
    pub(super) fn list_operations(&self, prefix: &str, running_only: bool) -> Vec<OperationRecord> {
        // Ids of version 7 grow with time.
        let wanted = self.model.operations.values().rev().filter(|r| {
            r.target.starts_with(prefix) && (!running_only || r.state == OperationState::Running)
        });
        wanted.cloned().collect()
    }

    /// The changes that forget operations which ended long ago, or beyond the number that is kept.
    pub(super) fn prune_operations(&self) -> Vec<Change> {
        let ended = |r: &&OperationRecord| r.end_time.is_some();
        let count = self.model.operations.values().filter(ended).count();
        let surplus = count.saturating_sub(KEPT_MAX - 1);
        let oldest = self.model.operations.values().filter(ended).enumerate();
        oldest
            .filter(|(index, r)| {
                *index < surplus || r.end_time.is_some_and(|end| self.now.0 - end.0 > KEPT_MS)
            })
            .map(|(_, r)| Change::Delete(Key::Operation(r.uid)))
            .collect()
    }

    /// After a start: what cannot be gone on with has failed.
    pub(super) fn fail_lost_operations(&mut self) {
        let lost: Vec<Uuid> = self
            .model
            .operations
            .values()
            .filter(|r| r.state == OperationState::Running && !is_resumable(r.kind))
            .map(|r| r.uid)
            .collect();
        for uid in lost {
            let why = Error::Failed {
                doing: "the operation",
                why: "seriod was restarted meanwhile: begin it again".to_owned(),
            };
            self.end_operation(uid, Err(why), Vec::new());
        }
    }
}
