//! Does the effects on volumes: the executor's other half.

use serio_control::message::nic_pairs;
use serio_store::record::PointClass;
use serio_types::{MacAddr, Name};
use tokio::sync::watch;
use uuid::Uuid;

use super::{
    Executor, Handles,
    effect::{Device, Effect, Goal, Input, Link, Merged, Part, PlugResult, SealedPart},
    vdc_snapshots::Consistency,
};
use crate::{
    error::{Error, chain},
    net,
    supervise::{
        CloneSource, JobError, MergeEnd, MergeGoal, MergePlan, NicPlan, VdcPart, VdcSnapshotPlan, VmHandle,
        is_unlinkable,
    },
};

impl Handles {
    fn token(&self, operation: Uuid) -> watch::Sender<bool> {
        self.with(|r| r.cancels.entry(operation).or_insert_with(|| watch::channel(false).0).clone())
    }

    /// Turns true when that operation shall end. Whoever does its work looks at it.
    #[must_use]
    pub fn cancelled(&self, operation: Uuid) -> watch::Receiver<bool> {
        self.token(operation).subscribe()
    }

    /// The work of that operation is over.
    pub fn forget_operation(&self, operation: Uuid) {
        self.with(|r| r.cancels.remove(&operation));
    }
}

impl Executor {
    /// Effects on volumes.
    pub(super) async fn volume_work(&self, effect: Effect) {
        match effect {
            Effect::CreateVolume { volume, size_bytes, image, vdc } => {
                let result = match self.supervisor.assign_key(volume, vdc).await {
                    Ok(()) => self.create_volume(volume, size_bytes, image).await,
                    Err(error) => Err(Error::from_job("creating the volume", &error)),
                };
                self.send(Input::VolumeCreated { volume, result }).await;
            }
            Effect::CloneVolume { volume, size_bytes, source, point } => {
                let source = CloneSource::Snapshot { volume: source, name: point.into() };
                let result = self.supervisor.clone_volume(volume, size_bytes, source).await;
                let result = result.map_err(|e| Error::from_job("cloning the volume", &e));
                self.send(Input::VolumeCreated { volume, result }).await;
            }
            Effect::DeleteVolume { volume } => {
                let result = self.delete_volume(volume).await;
                self.send(Input::VolumeDeleted { volume, result }).await;
            }
            Effect::Snapshot { volume, name, vm } => {
                let result = self.snapshot(volume, &name, vm).await;
                self.send(Input::Snapshotted { volume, result }).await;
            }
            Effect::Inspect { volume } => {
                let result = self.supervisor.volume_info(volume).await;
                let result = result.map_err(|e| Error::from_job("reading the volume's headers", &e));
                self.send(Input::Inspected { volume, result }).await;
            }
            Effect::Resize { volume, size_bytes, vm } => {
                let result = self.resize(volume, size_bytes, vm).await;
                self.send(Input::Resized { volume, result }).await;
            }
            Effect::Rollback { volume, point, discard_later } => {
                let result = self.supervisor.rollback_volume(volume, point.into(), discard_later).await;
                let result = result.map_err(|e| Error::from_job("going back to the snapshot", &e));
                self.send(Input::RolledBack { volume, result }).await;
            }
            Effect::Merge { volume, operation, goal, vm } => {
                let outcome = self.merge(volume, operation, goal, vm).await;
                if !matches!(outcome, Merged::Interrupted | Merged::Busy(_)) {
                    self.handles.forget_operation(operation);
                }
                self.send(Input::Merged { volume, operation, outcome }).await;
            }
            Effect::CancelOperation { operation } => {
                self.handles.token(operation).send_replace(true);
            }
            Effect::Plug { .. } | Effect::Unplug { .. } => self.plug_work(effect).await,
            Effect::SaveVm(_) | Effect::RemoveSaved { .. } | Effect::CloneVolumes { .. } => {
                self.save_work(effect).await;
            }
            Effect::VdcSnapshot { group, name, consistency, parts } => {
                let result = self.snapshot_vdc(&name, consistency, parts).await;
                self.send(Input::VdcSnapshotted { group, result }).await;
            }
            _ => {}
        }
    }

    /// The VM that has a volume open.
    fn holder(&self, vm: Option<Uuid>) -> Result<Option<VmHandle>, Error> {
        let gone = |vm: Uuid| Error::precondition(format!("vms/{vm}"), "ended just now: try again");
        vm.map(|vm| self.handles.vm(vm).ok_or_else(|| gone(vm))).transpose()
    }

    /// Devices that come to a VM or leave it.
    async fn plug_work(&self, effect: Effect) {
        match effect {
            Effect::Plug { vm, pid, device, position, link, limits } => {
                let result = match self.process(vm, pid) {
                    Err(error) => PlugResult::Refused(error),
                    Ok(handle) => {
                        let done = match device {
                            Device::Volume(volume) => handle.plug(volume, position, &limits).await,
                            Device::Nic(mac) => {
                                handle.plug_nic(&nic_plan(vm, mac, link), position, &limits).await
                            }
                        };
                        done.map_or_else(plug_failed, |()| PlugResult::Done)
                    }
                };
                self.send(Input::Plugged { vm, device, result }).await;
            }
            Effect::Unplug { vm, pid, device, link, wait } => {
                let result = match self.process(vm, pid) {
                    Err(error) => Err(error),
                    Ok(handle) => {
                        let result = match device {
                            Device::Volume(volume) => handle.unplug(volume, wait).await,
                            Device::Nic(mac) => {
                                handle.unplug_nic(mac, net::bridge_name(link.vdc), wait).await
                            }
                        };
                        result.map_err(|e| Error::from_job("taking the device away", &e))
                    }
                };
                self.send(Input::Unplugged { vm, device, result }).await;
            }
            _ => {}
        }
    }

    /// That process of a VM.
    fn process(&self, vm: Uuid, pid: u32) -> Result<VmHandle, Error> {
        let gone = || Error::precondition(format!("vms/{vm}"), "ended just now");
        self.handles.vm(vm).filter(|handle| handle.pid() == pid).ok_or_else(gone)
    }

    async fn create_volume(&self, volume: Uuid, size_bytes: u64, image: Option<Uuid>) -> Result<(), Error> {
        let from = image.map(|image| self.image_dir(image).join("disk.raw"));
        let result = match from {
            None => self.supervisor.create_volume(volume, size_bytes, None).await,
            Some(image) => {
                let source = CloneSource::Image(image.clone());
                match self.supervisor.clone_volume(volume, size_bytes, source).await {
                    Err(error) if is_unlinkable(&error) => {
                        tracing::info!(%volume, "the image is copied: {}", chain(&error));
                        self.supervisor.create_volume(volume, size_bytes, Some(image)).await
                    }
                    other => other,
                }
            }
        };
        result.map_err(|e| Error::from_job("creating the volume", &e))
    }

    pub(super) async fn delete_volume(&self, volume: Uuid) -> Result<(), Error> {
        self.supervisor.delete_volume(volume).await.map_err(|e| Error::from_job("deleting the volume", &e))
    }

    async fn snapshot(&self, volume: Uuid, name: &Name, vm: Option<Uuid>) -> Result<(), Error> {
        let result = match self.holder(vm)? {
            None => self.supervisor.snapshot_stopped(volume, name.as_str()).await,
            Some(handle) => handle.snapshot_volume(volume, name.as_str()).await,
        };
        result.map_err(|e| Error::from_job("sealing the point", &e))
    }

    async fn resize(&self, volume: Uuid, size_bytes: u64, vm: Option<Uuid>) -> Result<(), Error> {
        let vm = self.holder(vm)?;
        let result = self.supervisor.resize_volume(volume, size_bytes, vm).await;
        result.map_err(|e| Error::from_job("resizing the volume", &e))
    }

    async fn merge(&self, volume: Uuid, operation: Uuid, goal: Goal, vm: Option<Uuid>) -> Merged {
        let Ok(vm) = self.holder(vm) else { return Merged::Interrupted };
        let goal = match goal {
            Goal::Snapshot(name) => MergeGoal::Snapshot(name.into()),
            Goal::Shared => MergeGoal::Inherited,
        };
        let plan = MergePlan { volume, goal, vm, cancelled: self.handles.cancelled(operation) };
        let progress = |done_bytes, total_bytes| {
            // Left out when the state is busy: the next one says it better.
            let _ = self.inputs.try_send(Input::MergeProgress { volume, operation, done_bytes, total_bytes });
        };
        match self.supervisor.merge(plan, progress).await {
            MergeEnd::Done => Merged::Done,
            MergeEnd::Interrupted => Merged::Interrupted,
            MergeEnd::Busy(why) => Merged::Busy(why),
            MergeEnd::Failed(error) => Merged::Failed(Error::from_job("merging the volume's layers", &error)),
        }
    }

    async fn snapshot_vdc(
        &self,
        name: &Name,
        consistency: Consistency,
        parts: Vec<Part>,
    ) -> Result<Vec<SealedPart>, Error> {
        let mut with_handles = Vec::with_capacity(parts.len());
        for part in parts {
            let vm = self.holder(part.vm)?;
            with_handles.push(VdcPart { volume: part.volume, label: part.name.to_string(), vm });
        }
        let plan = VdcSnapshotPlan {
            name: name.to_string(),
            app: consistency.app,
            app_required: consistency.required,
            parts: with_handles,
        };
        let sealed = self.supervisor.snapshot_vdc(plan).await;
        let sealed = sealed.map_err(|e| Error::from_job("sealing the vdc's volumes", &e))?;
        let part = |s: crate::supervise::SealedVolume| SealedPart {
            volume: s.volume,
            class: if s.app { PointClass::App } else { PointClass::Crash },
            reason: s.reason,
        };
        Ok(sealed.into_iter().map(part).collect())
    }
}

fn plug_failed(error: JobError) -> PlugResult {
    let unsure = matches!(&error, JobError::Talk(talk) if talk.refusal().is_none());
    let error = Error::from_job("giving the VM the device", &error);
    if unsure { PlugResult::InDoubt(error) } else { PlugResult::Refused(error) }
}

/// A card that comes takes the first tap's name that is free: those of cards that have gone are.
fn nic_plan(vm: Uuid, mac: MacAddr, link: Link) -> NicPlan {
    NicPlan {
        mac: mac.bytes(),
        bridge: net::bridge_name(link.vdc),
        tap: net::free_tap_name(vm),
        pairs: nic_pairs(link.vcpus),
        mtu: link.mtu,
    }
}
