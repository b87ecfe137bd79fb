//! The first thing after a start: what the rows say meets what is on the host.

use std::collections::{BTreeSet, btree_map::Entry};

use serio_store::{
    Change, Key,
    record::{End, EndWord, Made, Run},
};
use serio_types::{Desired, Name, resource};
use uuid::Uuid;

use super::{
    State,
    effect::{Adopted, Effect, Timer},
    phase::{After, Op, Phase, VolumeOp},
    plan::{self, AtStart, Gone},
    run::word,
    vm_orders::Order,
};
use crate::{
    clock::Moment,
    supervise::{EndKind, EndRecord},
};

/// The time a guest gets whose power button an earlier seriod pressed.
const STOP_AGAIN: std::time::Duration = std::time::Duration::from_secs(60);
/// Until a VMM that did not answer is asked again: soon at first, for it may just be ending; it doubles to the limit.
const ADOPT_AGAIN_MS: u64 = 20;
const ADOPT_AGAIN_MS_MAX: u64 = 5000;

/// What is on the host.
#[derive(Debug, Clone, Default)]
pub struct Found {
    /// VMs with run files.
    pub vms: Vec<Uuid>,
    /// Exports with run files.
    pub exports: Vec<String>,
}

impl State {
    /// Compares rows with the host; returns what is to be done. Call it once, first.
    pub fn recover(&mut self, now: Moment, found: &Found) -> Vec<Effect> {
        self.set_clock(now);
        let with_files: BTreeSet<Uuid> = found.vms.iter().copied().collect();
        self.recover_vm_imports();
        let rows: Vec<(Uuid, Run)> = self.model.vms.values().map(|r| (r.uid, r.run)).collect();
        for (uid, run) in rows {
            self.recover_vm(uid, run, with_files.contains(&uid));
        }
        let strangers: Vec<Uuid> =
            with_files.into_iter().filter(|uid| !self.model.vms.contains_key(uid)).collect();
        for uid in strangers {
            let event = self.event(format!("vms/{uid}"), "orphan", "a VM that no row knows is ended");
            self.record(vec![event]);
            self.strangers += 1;
            self.out.push(Effect::Clean { vm: uid });
        }
        self.recover_volumes();
        self.recover_exports(&found.exports);
        let images: Vec<_> = self.model.images.values().filter(|r| r.state != Made::Ready).cloned().collect();
        for mut image in images {
            if image.state == Made::Creating {
                self.record(vec![Change::Delete(Key::RequestsOf(resource::image(&image.name)))]);
            }
            image.state = Made::Deleting;
            self.remove_image(image, Op::default());
        }
        self.recover_works();
        self.recover_vdc_snapshots();
        self.pump_works();
        std::mem::take(&mut self.out)
    }

    /// Whether everything that [`State::recover`] began is done: what was running before is known again.
    #[must_use]
    pub fn recovered(&self) -> bool {
        self.strangers == 0
            && !self.phases.values().any(|p| matches!(p, Phase::Adopting { .. }))
            && !self.volume_ops.values().any(|op| matches!(op, VolumeOp::Inspect { .. }))
    }

    fn recover_vm(&mut self, uid: Uuid, run: Run, has_files: bool) {
        match plan::at_start(run, has_files) {
            AtStart::Undo => self.finish_delete(uid, run, false, has_files),
            AtStart::Delete { keep_root } => self.finish_delete(uid, run, keep_root, has_files),
            AtStart::Clean => {
                self.phases.insert(uid, Phase::Cleaning { after: After::Rest(Op::default()) });
                self.out.push(Effect::Clean { vm: uid });
            }
            AtStart::Nothing => drop(self.phases.insert(uid, Phase::Off)),
            AtStart::Look => {
                self.phases.insert(uid, Phase::Adopting { silent: 0 });
                self.out.push(Effect::Adopt { vm: uid });
            }
        }
    }

    /// Goes on with a deletion, or undoes a creation: the same work.
    fn finish_delete(&mut self, uid: Uuid, run: Run, keep_root: bool, has_files: bool) {
        if run == Run::Creating {
            let resource = self.model.vm_resource(uid);
            tracing::info!(vm = resource, "its creation was broken off by the end of seriod and is undone");
            let mut changes: Vec<Change> = self.give_back(uid).into_iter().collect();
            changes.push(Change::Delete(Key::RequestsOf(resource)));
            self.record(changes);
        }
        let after = After::Delete { keep_root, op: Op::default() };
        if has_files {
            self.phases.insert(uid, Phase::Cleaning { after });
            self.out.push(Effect::Clean { vm: uid });
        } else {
            self.rest(uid, after);
        }
    }

    fn recover_volumes(&mut self) {
        let broken: Vec<Uuid> = self
            .model
            .volumes
            .values()
            // A VM's go with the VM.
            .filter(|v| v.state != Made::Ready && v.vm.is_none_or(|vm| !self.model.vms.contains_key(&vm)))
            .map(|v| v.uid)
            .collect();
        for uid in broken {
            if self.model.volumes.get(&uid).is_some_and(|v| v.state == Made::Creating) {
                self.record(vec![Change::Delete(Key::RequestsOf(self.model.volume_resource(uid)))]);
            }
            self.volume_ops.insert(uid, VolumeOp::Delete { op: Op::default(), undone: None });
            self.out.push(Effect::DeleteVolume { volume: uid });
        }
        let points = self.model.snapshots.values().filter(|s| s.state != Made::Ready).map(|s| s.volume);
        let volumes = self.model.volumes.values().filter(|v| self.to_be_looked_at(v)).map(|v| v.uid);
        let unsure: BTreeSet<Uuid> = points.chain(volumes).collect();
        for uid in unsure {
            if let Entry::Vacant(free) = self.volume_ops.entry(uid) {
                free.insert(VolumeOp::Inspect { failed: None });
                self.out.push(Effect::Inspect { volume: uid });
            }
        }
    }

    fn recover_exports(&mut self, found: &[String]) {
        let rows: Vec<(Name, Made)> = self.model.exports.values().map(|r| (r.id.clone(), r.state)).collect();
        for id in found.iter().filter_map(|id| id.parse::<Name>().ok()) {
            if !self.model.exports.contains_key(&id) {
                self.strangers += 1;
                self.out.push(Effect::EndExport { id });
            }
        }
        for (id, state) in rows {
            self.export_ops.insert(id.clone(), Op::default());
            if state == Made::Creating {
                self.record(vec![Change::Delete(Key::RequestsOf(format!("exports/{id}")))]);
            }
            self.out.push(match state {
                Made::Ready => Effect::AdoptExport { id },
                Made::Creating | Made::Deleting => Effect::EndExport { id },
            });
        }
    }

    pub(super) fn adopted(&mut self, uid: Uuid, found: Adopted) {
        let Some(Phase::Adopting { silent }) = self.phases.get_mut(&uid) else { return };
        let Some(run) = self.model.vms.get(&uid).map(|r| r.run) else { return };
        match found {
            Adopted::Silent(why) => {
                let after_ms =
                    ADOPT_AGAIN_MS.checked_shl(*silent).unwrap_or(u64::MAX).min(ADOPT_AGAIN_MS_MAX);
                *silent = silent.saturating_add(1).min(16);
                tracing::warn!(
                    vm = self.model.vm_resource(uid),
                    "its VMM does not answer, it will be asked again: {why}"
                );
                let after = std::time::Duration::from_millis(after_ms);
                self.out.push(Effect::Timer { after, timer: Timer::AdoptAgain { vm: uid } });
            }
            Adopted::Runs { pid, paused, volumes, nics } => {
                self.found_running(uid, (pid, paused), run);
                if matches!(self.phases.get(&uid), Some(Phase::Running { .. })) {
                    self.complete_devices(uid, pid, (&volumes, &nics));
                }
            }
            Adopted::Gone(end) => self.found_gone(uid, end),
        }
    }

    pub(super) fn adopt_again(&mut self, uid: Uuid) {
        if matches!(self.phases.get(&uid), Some(Phase::Adopting { .. })) {
            self.out.push(Effect::Adopt { vm: uid });
        }
    }

    fn found_running(&mut self, uid: Uuid, (pid, paused): (u32, bool), run: Run) {
        self.restored(uid);
        let event =
            self.event(self.model.vm_resource(uid), "adopted", format!("it ran on, as process {pid}"));
        let Some(mut vm) = self.model.vms.get(&uid).cloned() else { return };
        let Some(wish) = self.wish(uid) else { return };
        let decided = plan::found(wish, paused);
        match decided {
            plan::Found::PowerButton => {
                self.record(vec![event]);
                self.stopping(uid, pid, Some(STOP_AGAIN), After::Rest(Op::default()));
            }
            plan::Found::Kill => {
                vm.desired = Desired::Stopped;
                vm.run = Run::Killing;
                self.record(vec![Change::Vm(Box::new(vm)), event]);
                self.stopping(uid, pid, None, After::Rest(Op::default()));
            }
            plan::Found::TakeOver | plan::Found::Pause | plan::Found::Resume => {
                vm.run = if run == Run::Paused { Run::Paused } else { Run::Running };
                vm.desired = Desired::Running;
                vm.start_time = vm.start_time.or(Some(self.now));
                self.record(vec![Change::Vm(Box::new(vm)), event]);
                self.phases.insert(uid, Phase::Running { pid });
                self.run_begins(uid);
                match decided {
                    plan::Found::Pause => self.give_order(uid, pid, Order::Pause, Op::default()),
                    plan::Found::Resume => self.give_order(uid, pid, Order::Resume, Op::default()),
                    _ => {}
                }
                self.set_balloon(uid, false);
                self.set_limits(uid, false);
            }
        }
    }

    fn found_gone(&mut self, uid: Uuid, end: Option<EndRecord>) {
        let Some(wish) = self.wish(uid) else { return };
        let decided = plan::not_found(wish, end.as_ref().map(|end| word(end.kind)));
        let without = match decided {
            Gone::Stopped => "it ended while seriod was away",
            _ => "its process was gone when seriod started: it was killed, or the host went down",
        };
        let spoke = end.filter(|end| end.kind != EndKind::Died);
        let (kind, reason) =
            spoke.map_or((EndWord::Died, without.to_owned()), |end| (word(end.kind), end.reason));
        let end = End { time: self.now, kind, reason };
        let after = self.record_gone(uid, decided, end);
        self.phases.insert(uid, Phase::Cleaning { after });
        self.out.push(Effect::Clean { vm: uid });
    }
}
