//! Does the effects of VMs' points: the executor's third part.

use std::path::PathBuf;

use uuid::Uuid;

use super::{
    Executor,
    effect::{CloneOne, Effect, Input, SaveOne, SavedSize},
    executor::{blocking, remove_dir},
};
use crate::{
    error::{Error, chain},
    supervise::{CloneSource, SavePlan},
};

/// What stays free beside the memory that is saved: room for the state, and for all that goes on meanwhile.
const SPARE_BYTES: u64 = 256 << 20;

impl Executor {
    pub(super) async fn save_work(&self, effect: Effect) {
        match effect {
            Effect::SaveVm(save) => {
                let (dir, group) = (self.saved_dir(save.vm, save.group), save.group);
                let plan = self.save_plan(save, dir.clone()).await;
                let saved = match plan {
                    Ok(plan) => {
                        self.supervisor.save_vm(plan).await.map_err(|e| Error::from_job("saving the VM", &e))
                    }
                    Err(error) => Err(error),
                };
                if saved.is_err() {
                    self.forget_saved(dir).await;
                }
                let size = |saved: serio_control::message::SavedVm| SavedSize {
                    memory_bytes: saved.memory_bytes,
                    paused_ns: saved.paused_ns,
                    base: Uuid::from_slice(&saved.base).ok(),
                };
                self.send(Input::VmSaved { group, result: saved.map(size) }).await;
            }
            Effect::RemoveSaved { vm, group } => self.forget_saved(self.saved_dir(vm, group)).await,
            Effect::CloneVolumes { root, clones } => {
                let result = self.clone_volumes(clones).await;
                self.send(Input::VolumeCreated { volume: root, result }).await;
            }
            _ => {}
        }
    }

    async fn save_plan(&self, save: SaveOne, dir: PathBuf) -> Result<SavePlan, Error> {
        let SaveOne { group, vm, pid, name, volumes, memory_bytes, bases } = save;
        let gone = || Error::precondition(format!("vms/{vm}"), "ended just now");
        let vm = self.handles.vm(vm).filter(|handle| handle.pid() == pid).ok_or_else(gone)?;
        let state_dir = self.saved_root();
        blocking(move || {
            let space = rustix::fs::statvfs(&state_dir);
            let free = space.map_or(u64::MAX, |space| space.f_bavail.saturating_mul(space.f_frsize));
            let wanted = memory_bytes.saturating_add(SPARE_BYTES);
            if free >= wanted {
                return Ok(());
            }
            let (free, wanted) =
                (serio_types::ByteSize::from_bytes(free), serio_types::ByteSize::from_bytes(wanted));
            let why = format!("{wanted} may be needed and {free} are free on the disk of state_dir");
            Err(Error::Full { doing: "saving the VM", why })
        })
        .await?;
        Ok(SavePlan { vm, id: group, bases, name: name.into(), volumes, dir })
    }

    async fn forget_saved(&self, dir: PathBuf) {
        if let Err(error) = blocking(move || remove_dir(&dir)).await {
            tracing::warn!("a snapshot's files stay until the next start: {}", chain(&error));
        }
    }

    /// All or none.
    async fn clone_volumes(&self, clones: Vec<CloneOne>) -> Result<(), Error> {
        let mut made = Vec::new();
        for one in clones {
            let source = CloneSource::Snapshot { volume: one.source, name: one.point.into() };
            made.push(one.volume);
            if let Err(error) = self.supervisor.clone_volume(one.volume, one.size_bytes, source).await {
                for volume in made {
                    if let Err(left) = self.delete_volume(volume).await {
                        tracing::warn!(%volume, "the files of a clone stay until the next start: {}", chain(&left));
                    }
                }
                return Err(Error::from_job("cloning the VM's volumes", &error));
            }
        }
        Ok(())
    }
}
