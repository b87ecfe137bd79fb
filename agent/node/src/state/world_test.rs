//! A host made of sets, for tests of the state: effects change it, fail, are cut short. It panics at what must never be.
//! What drives it is in [`super::sim_test`].

use std::collections::{BTreeMap, BTreeSet};

use serio_store::record::PointClass;
use serio_types::{MacAddr, Name};
use uuid::Uuid;

use super::effect::{Adopted, Effect, Goal, Input, Launch, Merged, Part, SealedPart, Started};
use crate::{
    error::Error,
    supervise::{DevicePlan, EndKind, EndRecord, PointInfo, VolumeInfo},
};

/// A VMM.
#[derive(Debug, Clone)]
pub(super) struct Process {
    pub(super) pid: u32,
    pub(super) from_disk: bool,
    /// Its guest stands still.
    pub(super) paused: bool,
    /// What its guest was asked to give back.
    pub(super) balloon_bytes: u64,
    pub(super) limits: DevicePlan,
    pub(super) volumes: Vec<Uuid>,
    pub(super) nics: Vec<MacAddr>,
}

/// A merge that goes on.
#[derive(Debug, Clone)]
pub(super) struct Merging {
    operation: Uuid,
    goal: Goal,
    vm: Option<Uuid>,
}

/// The host.
#[derive(Debug, Default)]
pub(super) struct World {
    pub(super) processes: BTreeMap<Uuid, Process>,
    pub(super) run_files: BTreeSet<Uuid>,
    ends: BTreeMap<Uuid, EndRecord>,
    pub(super) volumes: BTreeSet<Uuid>,
    pub(super) points: BTreeMap<Uuid, Vec<Name>>,
    /// What a guest would see.
    pub(super) sizes: BTreeMap<Uuid, u64>,
    /// Merges that go on, by volume.
    pub(super) merges: BTreeMap<Uuid, Merging>,
    /// Inputs that an effect caused besides its own.
    pub(super) aside: Vec<Input>,
    /// With the volume whose head it has open.
    pub(super) exports: BTreeMap<Name, Option<Uuid>>,
    pub(super) images: BTreeSet<Uuid>,
    /// Points of VMs whose files are there.
    pub(super) saved: BTreeSet<Uuid>,
    pids: u32,
    /// The next effect that can fail does.
    pub(super) fail: bool,
}

impl World {
    pub(super) fn failure(&mut self) -> Result<(), Error> {
        if std::mem::take(&mut self.fail) {
            return Err(Error::Failed { doing: "the test", why: "a failure was asked for".to_owned() });
        }
        Ok(())
    }

    /// A merge gives way.
    pub(super) fn interrupt(&mut self, volume: Uuid) {
        if let Some(merge) = self.merges.remove(&volume) {
            let (operation, outcome) = (merge.operation, Merged::Interrupted);
            self.aside.push(Input::Merged { volume, operation, outcome });
        }
    }

    /// A merge comes to its end.
    pub(super) fn finish_merge(&mut self, volume: Uuid) -> Option<Input> {
        let merge = self.merges.remove(&volume)?;
        let outcome = match self.failure() {
            Err(error) => Merged::Failed(error),
            Ok(()) => {
                if let Goal::Snapshot(name) = &merge.goal {
                    self.points.entry(volume).or_default().retain(|point| point != name);
                }
                Merged::Done
            }
        };
        Some(Input::Merged { volume, operation: merge.operation, outcome })
    }

    fn begin_merge(&mut self, volume: Uuid, merge: Merging) -> Option<Input> {
        let operation = merge.operation;
        let answer = |outcome| Some(Input::Merged { volume, operation, outcome });
        assert!(!self.merges.contains_key(&volume), "a volume has two merges");
        match merge.vm {
            Some(vm) if !self.processes.contains_key(&vm) => return answer(Merged::Interrupted),
            // The lock says so: somebody was faster.
            None if self.is_open(volume) => return answer(Merged::Busy("in the test".to_owned())),
            _ => {}
        }
        self.merges.insert(volume, merge);
        None
    }

    fn is_open(&self, volume: Uuid) -> bool {
        self.processes.values().any(|p| p.volumes.contains(&volume))
            || self.exports.values().any(|head| *head == Some(volume))
    }

    /// Seals all, some, or none.
    pub(super) fn seal_parts(
        &mut self,
        name: &Name,
        parts: &[Part],
        whole: bool,
    ) -> Result<Vec<SealedPart>, Error> {
        let mut sealed = Vec::new();
        for (index, part) in parts.iter().enumerate() {
            self.interrupt(part.volume);
            if !whole && index * 2 >= parts.len() {
                return Err(Error::Ending);
            }
            match part.vm {
                Some(vm) if !self.processes.contains_key(&vm) => return Err(Error::Ending),
                Some(_) => {}
                None => self.assert_closed(part.volume),
            }
            self.points.entry(part.volume).or_default().push(name.clone());
            sealed.push(SealedPart { volume: part.volume, class: PointClass::Crash, reason: String::new() });
        }
        Ok(sealed)
    }

    /// Panics if somebody has the volume open.
    pub(super) fn assert_closed(&self, volume: Uuid) {
        assert!(
            !self.processes.values().any(|p| p.volumes.contains(&volume)),
            "a volume of a running VM is opened again"
        );
        assert!(
            !self.exports.values().any(|head| *head == Some(volume)),
            "a volume with an exported head is opened again"
        );
    }

    pub(super) fn launch(&mut self, launch: &Launch) -> u32 {
        assert!(!self.processes.contains_key(&launch.vm), "a VM is started twice");
        for volume in &launch.volumes {
            self.interrupt(*volume);
            assert!(self.volumes.contains(volume), "a VM is started without its volume");
            self.assert_closed(*volume);
        }
        self.go_back(launch);
        self.pids += 1;
        self.run_files.insert(launch.vm);
        self.ends.remove(&launch.vm);
        let (pid, from_disk, volumes) = (self.pids, launch.from_disk, launch.volumes.clone());
        self.processes.insert(
            launch.vm,
            Process {
                pid,
                from_disk,
                paused: false,
                balloon_bytes: 0,
                limits: launch.limits.clone(),
                volumes,
                nics: launch.nics.iter().map(|nic| nic.mac).collect(),
            },
        );
        self.pids
    }

    /// A process ends, with its word. Its run files stay.
    pub(super) fn end(&mut self, vm: Uuid, kind: EndKind) -> Option<Input> {
        let process = self.processes.remove(&vm)?;
        for volume in &process.volumes {
            self.interrupt(*volume);
        }
        let end = EndRecord { kind, reason: "in the test".to_owned() };
        self.ends.insert(vm, end.clone());
        Some(Input::Ended { vm, pid: process.pid, end })
    }

    /// Does an effect; `None` when its answer is another input's, or none.
    pub(super) fn perform(&mut self, effect: Effect) -> Option<Input> {
        Some(match effect {
            Effect::CreateVolume { volume, size_bytes, .. } => {
                let result = self.failure().map(|()| self.make(volume, size_bytes));
                Input::VolumeCreated { volume, result }
            }
            Effect::CloneVolume { volume, size_bytes, source, point } => {
                let known = self.points.get(&source).is_some_and(|points| points.contains(&point));
                assert!(known, "a clone of a point that is not there");
                self.interrupt(source);
                let result = self.failure().map(|()| self.make(volume, size_bytes));
                Input::VolumeCreated { volume, result }
            }
            Effect::Resize { volume, size_bytes, vm } => {
                Input::Resized { volume, result: self.resize(volume, size_bytes, vm) }
            }
            Effect::Rollback { volume, point, .. } => {
                Input::RolledBack { volume, result: self.rollback(volume, &point) }
            }
            Effect::Merge { volume, operation, goal, vm } => {
                return self.begin_merge(volume, Merging { operation, goal, vm });
            }
            Effect::CancelOperation { operation } => {
                let volumes: Vec<Uuid> =
                    self.merges.iter().filter(|(_, m)| m.operation == operation).map(|(v, _)| *v).collect();
                volumes.into_iter().for_each(|volume| self.interrupt(volume));
                return None;
            }
            Effect::VdcSnapshot { group, name, parts, .. } => {
                let whole = self.failure().is_ok();
                Input::VdcSnapshotted { group, result: self.seal_parts(&name, &parts, whole) }
            }
            Effect::DeleteVolume { volume } => Input::VolumeDeleted { volume, result: self.delete(volume) },
            Effect::Launch(launch) => {
                let result = self.failure().map(|()| Started { pid: self.launch(&launch), kernel: None });
                Input::Launched { vm: launch.vm, result }
            }
            Effect::PowerButton { .. } | Effect::Timer { .. } => return None,
            Effect::Stop { vm } => return self.end(vm, EndKind::Stopped),
            Effect::RemoveVm { vm, volumes } => {
                let result = volumes.into_iter().try_for_each(|volume| self.delete(volume));
                Input::VmRemoved { vm, result }
            }
            Effect::Snapshot { volume, name, vm } => {
                Input::Snapshotted { volume, result: self.snapshot(volume, name, vm) }
            }
            Effect::Inspect { volume } => Input::Inspected { volume, result: Ok(self.inspect(volume)) },
            Effect::StartExport { id, volume, snapshot, .. } => {
                let result = self.failure().map(|()| self.start_export(&id, volume, snapshot.is_none()));
                Input::ExportStarted { id, result }
            }
            Effect::AdoptExport { id } => Input::ExportAdopted { runs: self.exports.contains_key(&id), id },
            Effect::EndExport { id } => {
                self.exports.remove(&id);
                Input::ExportEnded { id }
            }
            Effect::RemoveImage { image } => {
                self.images.remove(&image);
                Input::ImageRemoved { image, result: Ok(()) }
            }
            on_vm => return self.perform_on_vm(on_vm),
        })
    }

    pub(super) fn make(&mut self, volume: Uuid, size_bytes: u64) {
        self.volumes.insert(volume);
        self.sizes.insert(volume, size_bytes);
    }

    fn resize(&mut self, volume: Uuid, size_bytes: u64, vm: Option<Uuid>) -> Result<(), Error> {
        self.interrupt(volume);
        match vm {
            Some(vm) if !self.processes.contains_key(&vm) => return Err(Error::Ending),
            Some(_) => {}
            None => self.assert_closed(volume),
        }
        self.failure()?;
        assert!(
            self.sizes.insert(volume, size_bytes).is_some_and(|before| before < size_bytes),
            "a volume shrinks"
        );
        Ok(())
    }

    fn rollback(&mut self, volume: Uuid, point: &Name) -> Result<VolumeInfo, Error> {
        self.interrupt(volume);
        self.assert_closed(volume);
        self.failure()?;
        let points = self.points.entry(volume).or_default();
        let at = points.iter().position(|p| p == point).expect("the point is there");
        points.truncate(at + 1);
        Ok(self.inspect(volume))
    }

    fn delete(&mut self, volume: Uuid) -> Result<(), Error> {
        self.interrupt(volume);
        self.assert_closed(volume);
        self.sizes.remove(&volume);
        self.points.remove(&volume);
        self.volumes.remove(&volume);
        Ok(())
    }

    pub(super) fn adopt(&mut self, vm: Uuid) -> Adopted {
        if let Err(error) = self.failure() {
            return Adopted::Silent(error.to_string());
        }
        match self.processes.get(&vm) {
            Some(process) => Adopted::Runs {
                pid: process.pid,
                paused: process.paused,
                volumes: process.volumes.clone(),
                nics: process.nics.clone(),
            },
            None => Adopted::Gone(self.ends.get(&vm).cloned().filter(|_| self.run_files.contains(&vm))),
        }
    }

    fn snapshot(&mut self, volume: Uuid, name: Name, vm: Option<Uuid>) -> Result<(), Error> {
        self.interrupt(volume);
        match vm {
            Some(vm) if !self.processes.contains_key(&vm) => return Err(Error::Ending),
            Some(_) => {}
            None => self.assert_closed(volume),
        }
        self.failure()?;
        self.points.entry(volume).or_default().push(name);
        Ok(())
    }

    fn inspect(&self, volume: Uuid) -> VolumeInfo {
        let points = self.points.get(&volume).into_iter().flatten();
        let point = |(layer, name): (u64, &Name)| PointInfo { name: name.to_string(), layer, create_time: 0 };
        let size_bytes = self.sizes.get(&volume).copied().unwrap_or_default();
        VolumeInfo { size_bytes, snapshots: (0..).zip(points).map(point).collect(), chain: vec![0] }
    }

    fn start_export(&mut self, id: &Name, volume: Uuid, head: bool) {
        self.interrupt(volume);
        if head {
            self.assert_closed(volume);
        }
        self.exports.insert(id.clone(), head.then_some(volume));
    }
}
