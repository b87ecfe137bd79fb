//! What happens to the processes of VMs: started, ended, cleaned up after, started again by policy, removed.

use serio_store::{
    Change, Key,
    record::{End, EndWord, Made, Millis, Run, VmRecord, VolumeRecord},
};
use serio_types::Desired;
use uuid::Uuid;

use super::{
    Refused, State, check,
    command::Answer,
    effect::{Effect, Launch, LaunchNic, Started, Timer},
    phase::{After, Cause, Op, Phase},
    plan::{self, Gone, Wish},
};
use crate::{
    error::Error,
    supervise::{EndKind, EndRecord},
};

/// How a VM has run of late.
#[derive(Debug, Default)]
pub(super) struct Streak {
    /// How often in a row it ended by failure soon after its start.
    failures: u32,
    /// When its guest began to run, by the steady clock.
    since: Option<Millis>,
}

pub(super) fn word(kind: EndKind) -> EndWord {
    match kind {
        EndKind::PowerOff => EndWord::PowerOff,
        EndKind::Reset => EndWord::Reset,
        EndKind::Stopped => EndWord::Stopped,
        EndKind::GuestError => EndWord::GuestError,
        EndKind::HostError => EndWord::HostError,
        EndKind::LaunchFailed => EndWord::LaunchFailed,
        EndKind::Died => EndWord::Died,
    }
}

impl State {
    /// Hands the VM to the supervisor. Its row says `starting` already.
    pub(super) fn launch(&mut self, uid: Uuid, cause: Cause) {
        let Some(vm) = self.model.vms.get(&uid) else { return };
        match self.launch_of(vm) {
            Ok(launch) => {
                self.phases.insert(uid, Phase::Launching { cause });
                self.out.push(Effect::Launch(Box::new(launch)));
            }
            Err(error) => {
                self.phases.insert(uid, Phase::Launching { cause });
                self.launched(uid, Err(error));
            }
        }
    }

    fn launch_of(&self, vm: &VmRecord) -> Result<Launch, Error> {
        self.volumes_startable(vm)?;
        self.not_fenced(vm.uid)?;
        let image = self.model.image(&vm.spec.image)?;
        let from_disk = self.model.boots_from_disk(vm);
        // A command line that came with a kernel is for that kernel.
        let default = if from_disk && image.has_kernel { "" } else { image.cmdline.as_str() };
        let cmdline = vm.spec.cmdline.as_ref().map_or(default, |c| c.as_str());
        let nic = |nic: &serio_types::NicSpec| {
            nic.mac.map(|mac| LaunchNic { mac, address: nic.address, gateway: nic.gateway })
        };
        Ok(Launch {
            vm: vm.uid,
            name: self.model.vm_name(vm),
            generation: vm.generation.0,
            vcpus: vm.spec.vcpus.get(),
            memory_bytes: vm.spec.memory.bytes(),
            image: image.uid,
            from_disk,
            has_initrd: image.has_initrd,
            cmdline: cmdline.to_owned(),
            volumes: self.model.volumes_of(vm).iter().map(|v| v.uid).collect(),
            vdc: vm.vdc,
            nics: vm.spec.nics.iter().filter_map(nic).collect(),
            seed: vm.spec.cloud_init.clone(),
            machine: vm.spec.machine.clone(),
            limits: self.model.limits_of(vm),
            restore: self.plan_restore(vm)?,
        })
    }

    pub(super) fn launched(&mut self, uid: Uuid, result: Result<Started, Error>) {
        let Some(Phase::Launching { .. }) = self.phases.get(&uid) else { return };
        let Some(Phase::Launching { cause }) = self.phases.remove(&uid) else { return };
        match result {
            Ok(started) => self.runs(uid, started, cause),
            Err(error) => self.launch_failed(uid, error, cause),
        }
    }

    fn runs(&mut self, uid: Uuid, started: Started, cause: Cause) {
        let Started { pid, kernel } = started;
        let Some(mut vm) = self.model.vms.get(&uid).cloned() else { return };
        vm.run = Run::Running;
        vm.start_time = Some(self.now);
        let what =
            kernel.as_ref().map_or_else(String::new, |kernel| format!(", with {} of its disk", kernel.path));
        vm.kernel = kernel;
        let restored = vm.restore.take().is_some();
        let (kind, message) = match cause {
            _ if restored => ("restored", format!("its guest goes on from its snapshot, in process {pid}")),
            Cause::Again => ("restarted", format!("it was started again, as process {pid}{what}")),
            _ => ("started", format!("its guest runs, in process {pid}{what}")),
        };
        let event = self.event(self.model.vm_resource(uid), kind, message);
        self.record(vec![Change::Vm(Box::new(vm)), event]);
        self.phases.insert(uid, Phase::Running { pid });
        self.run_begins(uid);
        self.end_fenced(uid);
        self.set_balloon(uid, false);
        self.look_at_volumes(uid);
        if let Cause::Create(op) | Cause::Start(op) = cause {
            op.finish(self.answer_vm(uid));
        }
    }

    fn launch_failed(&mut self, uid: Uuid, error: Error, cause: Cause) {
        let Some(mut vm) = self.model.vms.get(&uid).cloned() else { return };
        let end = End { time: self.now, kind: EndWord::LaunchFailed, reason: crate::error::chain(&error) };
        match cause {
            Cause::Create(op) => self.undo_create(uid, error, op),
            Cause::Start(op) => {
                vm.desired = Desired::Stopped;
                vm.run = Run::Failed;
                vm.restore = None;
                let event = self.event(
                    self.model.vm_resource(uid),
                    "failed",
                    format!("it did not start: {}", end.reason),
                );
                vm.last_end = Some(end);
                let mut changes = vec![Change::Vm(Box::new(vm)), event];
                changes.extend(Self::forget(op.request.as_ref()));
                self.record(changes);
                self.phases.insert(uid, Phase::Off);
                self.look_at_volumes(uid);
                op.finish(Err(error));
            }
            Cause::Again => {
                self.phases.insert(uid, Phase::Off);
                let Some(wish) = self.wish(uid) else { return };
                let after = self.record_gone(uid, plan::ended(wish, end.kind, None), end);
                self.rest(uid, after);
            }
        }
    }

    /// A creation that failed leaves nothing: its row becomes one of a deletion.
    pub(super) fn undo_create(&mut self, uid: Uuid, error: Error, op: Op) {
        let Some(vm) = self.model.vms.get(&uid).cloned() else { return };
        let keep_root = self.root_was_given(&vm);
        let mut changes = self.deletion(&vm, keep_root);
        changes.extend(Self::forget(op.request.as_ref()));
        self.record(changes);
        self.out.push(Effect::RemoveVm { vm: uid, volumes: self.going_with(&vm, keep_root) });
        self.phases.insert(uid, Phase::Deleting { op, undone: Some(error) });
    }

    /// What is wished of a VM, for [`plan`]; none when it has no row.
    pub(super) fn wish(&self, uid: Uuid) -> Option<Wish> {
        let vm = self.model.vms.get(&uid)?;
        Some(Wish {
            run: vm.run,
            policy: vm.spec.restart_policy,
            boots_from_disk: self.model.boots_from_disk(vm),
            is_fenced: self.model.fenced.contains_key(&uid),
            failures: self.streaks.get(&uid).map_or(0, |streak| streak.failures),
        })
    }

    pub(super) fn ended(&mut self, uid: Uuid, gone: u32, end: EndRecord) {
        let end = End { time: self.now, kind: word(end.kind), reason: end.reason };
        if self.has_process(uid, gone) {
            self.troubles.remove(&uid);
        }
        match self.phases.remove(&uid) {
            Some(Phase::Running { pid }) if pid == gone => {
                let Some(wish) = self.wish(uid) else { return };
                let decided = plan::ended(wish, end.kind, self.ran_ms(uid));
                let after = self.record_gone(uid, decided, end);
                self.clean(uid, after);
            }
            Some(Phase::Stopping { pid, after, .. }) if pid == gone => {
                self.record_stop(uid, end);
                self.clean(uid, after);
            }
            // A stale word about an earlier process.
            Some(other) => drop(self.phases.insert(uid, other)),
            None => {}
        }
    }

    /// Its process is gone, and what follows is decided: that is written.
    pub(super) fn record_gone(&mut self, uid: Uuid, decided: Gone, end: End) -> After {
        match decided {
            Gone::Stopped => {
                self.record_stop(uid, end);
                After::Rest(Op::default())
            }
            Gone::Start => After::Launch,
            Gone::Reboot => {
                self.record_reboot(uid);
                After::Launch
            }
            Gone::StartAfter { pause_ms, failures } => {
                self.record_failure(uid, end, (pause_ms, failures));
                After::Again { pause_ms }
            }
            Gone::Rest { failed } => {
                self.record_rest(uid, end, failed);
                After::Rest(Op::default())
            }
        }
    }

    fn clean(&mut self, uid: Uuid, after: After) {
        self.phases.insert(uid, Phase::Cleaning { after });
        self.out.push(Effect::Clean { vm: uid });
    }

    /// Its guest reset: it is started again at once, which is neither a failure nor a restart by its policy.
    fn record_reboot(&mut self, uid: Uuid) {
        let Some(mut vm) = self.model.vms.get(&uid).cloned() else { return };
        vm.run = Run::Starting;
        vm.start_time = None;
        let message = "its guest was reset: it boots again, with what is on its disk now";
        let event = self.event(self.model.vm_resource(uid), "reset", message);
        self.record(vec![Change::Vm(Box::new(vm)), event]);
    }

    /// From now on it counts how long it runs: what ran before the start of seriod counts from there.
    pub(super) fn run_begins(&mut self, uid: Uuid) {
        self.streaks.entry(uid).or_default().since = Some(self.steady);
    }

    /// How long it has run, as far as this seriod has seen.
    fn ran_ms(&self, uid: Uuid) -> Option<i64> {
        let since = self.streaks.get(&uid)?.since?;
        Some(self.steady.0.saturating_sub(since.0))
    }

    /// The end that was asked for.
    fn record_stop(&mut self, uid: Uuid, end: End) {
        let Some(mut vm) = self.model.vms.get(&uid).cloned() else { return };
        let message = format!("it ended as it should ({}: {})", end.kind, end.reason);
        let event = self.event(self.model.vm_resource(uid), "stopped", message);
        vm.desired = Desired::Stopped;
        vm.run = Run::Off;
        vm.start_time = None;
        vm.last_end = Some(end);
        self.record(vec![Change::Vm(Box::new(vm)), event]);
    }

    /// It ended by itself, and is started again after a pause.
    fn record_failure(&mut self, uid: Uuid, end: End, (pause_ms, failures): (u64, u32)) {
        let Some(mut vm) = self.model.vms.get(&uid).cloned() else { return };
        self.streaks.insert(uid, Streak { failures, since: None });
        let what = format!("{}: {}", end.kind, end.reason);
        let message = format!("it ended ({what}) and will be started again in {} s", pause_ms / 1000);
        let event = self.event(self.model.vm_resource(uid), "failed", message);
        vm.run = Run::Starting;
        vm.restarts = vm.restarts.saturating_add(1);
        vm.start_time = None;
        vm.last_end = Some(end);
        self.record(vec![Change::Vm(Box::new(vm)), event]);
        self.look_at_volumes(uid);
    }

    /// It ended by itself, and rests.
    fn record_rest(&mut self, uid: Uuid, end: End, failed: bool) {
        let Some(mut vm) = self.model.vms.get(&uid).cloned() else { return };
        let message = format!("it ended by itself ({}: {})", end.kind, end.reason);
        let kind = if failed { "failed" } else { "stopped" };
        let event = self.event(self.model.vm_resource(uid), kind, message);
        vm.desired = Desired::Stopped;
        vm.restore = None;
        vm.run = if failed { Run::Failed } else { Run::Off };
        vm.start_time = None;
        vm.last_end = Some(end);
        self.record(vec![Change::Vm(Box::new(vm)), event]);
        self.look_at_volumes(uid);
    }

    pub(super) fn cleaned(&mut self, uid: Uuid) {
        match self.phases.remove(&uid) {
            Some(Phase::Cleaning { after }) => self.rest(uid, after),
            Some(other) => drop(self.phases.insert(uid, other)),
            None => self.strangers = self.strangers.saturating_sub(1),
        }
    }

    /// No process and no run files: what follows.
    pub(super) fn rest(&mut self, uid: Uuid, after: After) {
        self.phases.insert(uid, Phase::Off);
        match after {
            After::Rest(op) => op.finish(self.answer_vm(uid)),
            After::Again { pause_ms } => {
                let ticket = self.next_ticket();
                self.phases.insert(uid, Phase::Pausing { ticket });
                let after = std::time::Duration::from_millis(pause_ms);
                self.out.push(Effect::Timer { after, timer: Timer::Restart { vm: uid, ticket } });
            }
            After::Launch => self.launch(uid, Cause::Again),
            After::Delete { keep_root, op } => {
                if let Err(refused) = self.begin_delete(uid, keep_root, None, op) {
                    refused.answer();
                }
            }
        }
    }

    pub(super) fn restart_due(&mut self, uid: Uuid, due: u64) {
        if matches!(self.phases.get(&uid), Some(Phase::Pausing { ticket }) if *ticket == due) {
            self.launch(uid, Cause::Again);
        }
    }

    pub(super) fn stop_deadline(&mut self, uid: Uuid, due: u64) {
        match self.phases.remove(&uid) {
            Some(Phase::Stopping { pid, force: false, ticket, after: After::Rest(op) }) if ticket == due => {
                if let Some(mut vm) = self.model.vms.get(&uid).cloned() {
                    vm.desired = Desired::Running;
                    vm.run = Run::Running;
                    let mut changes = vec![Change::Vm(Box::new(vm))];
                    changes.extend(Self::forget(op.request.as_ref()));
                    self.record(changes);
                }
                self.phases.insert(uid, Phase::Running { pid });
                let what = "did not power off in time and still runs: give it longer, or stop it with force"
                    .to_owned();
                op.finish(Err(Error::Deadline { resource: self.model.vm_resource(uid), what }));
            }
            Some(other) => drop(self.phases.insert(uid, other)),
            None => {}
        }
    }

    /// The rows that say that a VM is being deleted.
    fn deletion(&self, vm: &VmRecord, keep_root: bool) -> Vec<Change> {
        let mut vm = vm.clone();
        vm.desired = Desired::Stopped;
        vm.run = if keep_root { Run::DeletingKeepRoot } else { Run::Deleting };
        let root = self.model.volumes.get(&vm.root_volume).filter(|_| !keep_root).cloned();
        let mut changes = vec![Change::Vm(Box::new(vm))];
        changes.extend(root.map(|mut root| {
            root.state = Made::Deleting;
            Change::Volume(root)
        }));
        changes
    }

    /// The volumes whose files go with a VM: its root, and those that never became whole.
    fn going_with(&self, vm: &VmRecord, keep_root: bool) -> Vec<Uuid> {
        let goes = |v: &&VolumeRecord| match v.uid == vm.root_volume {
            true => !keep_root,
            false => v.vm == Some(vm.uid) && v.state == Made::Creating,
        };
        self.model.volumes.values().filter(goes).map(|v| v.uid).collect()
    }

    pub(super) fn begin_delete(
        &mut self,
        uid: Uuid,
        keep_root: bool,
        remember: Option<Change>,
        op: Op,
    ) -> Result<(), Refused> {
        let Some(vm) = self.model.vms.get(&uid).cloned() else {
            op.finish(Ok(Answer::Nothing));
            return Ok(());
        };
        let mut changes = self.deletion(&vm, keep_root);
        changes.extend(remember);
        check!(op, self.commit(changes));
        if !keep_root {
            self.drop_works(vm.root_volume);
        }
        self.out.push(Effect::RemoveVm { vm: uid, volumes: self.going_with(&vm, keep_root) });
        self.phases.insert(uid, Phase::Deleting { op, undone: None });
        Ok(())
    }

    pub(super) fn vm_removed(&mut self, uid: Uuid, result: Result<(), Error>) {
        let Some(Phase::Deleting { op, undone }) = self.phases.remove(&uid) else { return };
        let Some(vm) = self.model.vms.get(&uid).cloned() else { return };
        if let Err(error) = result {
            // The row still says `deleting`: a second delete, or the next start, tries again.
            self.record(Self::forget(op.request.as_ref()).into_iter().collect());
            self.phases.insert(uid, Phase::Off);
            return op.finish(Err(undone.unwrap_or(error)));
        }
        let resource = self.model.vm_resource(uid);
        let mut changes: Vec<Change> =
            undone.as_ref().and_then(|_| self.give_back(uid)).into_iter().collect();
        changes.push(Change::Delete(Key::Vm(uid)));
        let unborn = self.is_unborn_clone(&vm);
        let of_vm = self.model.volumes.values().filter(|v| v.vm == Some(uid));
        for mut volume in of_vm.cloned().collect::<Vec<_>>() {
            if volume.uid == vm.root_volume && vm.run != Run::DeletingKeepRoot {
                changes.push(Change::Delete(Key::Volume(volume.uid)));
            } else if volume.state == Made::Creating {
                // It was never whole, nor was this: its files went along.
                changes.push(Change::Delete(Key::Volume(volume.uid)));
            } else if unborn {
                // It never ran: its volumes were made for it, and go with it.
                changes.extend(self.drop_clone(volume));
            } else {
                volume.vm = None;
                volume.generation = volume.generation.next();
                changes.push(Change::Volume(volume));
            }
        }
        changes.push(match &undone {
            None => self.event(resource, "deleted", "the VM was deleted"),
            Some(error) => self.event(
                resource,
                "undone",
                format!("its creation failed and was undone: {}", crate::error::chain(error)),
            ),
        });
        self.record(changes);
        self.forget_empty_groups();
        self.drop_vm_snapshots(uid);
        self.streaks.remove(&uid);
        op.finish(undone.map_or(Ok(Answer::Nothing), Err));
    }
}
