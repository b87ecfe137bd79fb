//! A running VM written into two files, its volumes sealed at that very point.
//!
//! The VMM does both while its guest stands still, so nothing is held here but the gates of the volumes. What can fail comes
//! first; after an answer that did not come the volumes are in doubt until the VMM is gone, as after any seal.

use std::{path::PathBuf, sync::Arc, time::Duration};

use serio_control::{
    ChannelError,
    message::{Body, NewHead, PreparedVolume, SaveVm, SavedVm},
};
use uuid::Uuid;

use super::{
    FileError, Inner, JobError, Supervisor, TalkError, VmHandle,
    files::{self, Descriptors},
    gate::{self, Entered},
    rundir,
    vdc_snapshot::{self, Ready, VdcPart},
};

/// For writing all of a VM's memory to a slow disk.
const SAVE_WAIT: Duration = Duration::from_secs(30 * 60);

/// A VM to be saved.
#[derive(Debug, Clone)]
pub struct SavePlan {
    /// The VM.
    pub vm: VmHandle,
    /// The snapshot's id, by which others go on from it.
    pub id: Uuid,
    /// Ids of snapshots that are kept: of one of them only the difference may be written.
    pub bases: Vec<Uuid>,
    /// The snapshot's name in each volume.
    pub name: String,
    /// All its volumes.
    pub volumes: Vec<Uuid>,
    /// The directory for `state` and `memory`; made here.
    pub dir: PathBuf,
}

impl Supervisor {
    /// Saves a VM; synced when it returns. On an error some volumes may be sealed nevertheless, and the directory is of no use.
    ///
    /// # Errors
    /// [`JobError`].
    pub async fn save_vm(&self, plan: SavePlan) -> Result<SavedVm, JobError> {
        let job = save(Arc::clone(&self.inner), plan);
        tokio::spawn(job).await.unwrap_or(Err(JobError::Ending))
    }
}

async fn save(inner: Arc<Inner>, plan: SavePlan) -> Result<SavedVm, JobError> {
    let mut entered = inner.enter_all(plan.volumes.iter().copied()).await;
    for (volume, gate) in &mut entered {
        gate::settle_doubt(gate, *volume)?;
    }
    let mut ready = Vec::new();
    let mut made = Ok(());
    for volume in &plan.volumes {
        let part = VdcPart { volume: *volume, label: volume.to_string(), vm: Some(plan.vm.clone()) };
        match vdc_snapshot::make_ready(&inner, part).await {
            Ok(one) => ready.push(one),
            Err(error) => {
                made = Err(error);
                break;
            }
        }
    }
    let saved = match made {
        Ok(()) => ask(&inner, &plan, &ready, &mut entered).await,
        Err(error) => Err(error),
    };
    if saved.is_err() {
        vdc_snapshot::drop_unused(&inner, &ready, &entered).await;
    }
    saved
}

async fn ask(
    inner: &Inner,
    plan: &SavePlan,
    ready: &[Ready],
    entered: &mut [(Uuid, Entered)],
) -> Result<SavedVm, JobError> {
    rundir::make_dir(&plan.dir)?;
    let mut descriptors = Descriptors::default();
    let state_fd = descriptors.push(rundir::create_new(&plan.dir.join("state"))?);
    let memory_fd = descriptors.push(rundir::create_new(&plan.dir.join("memory"))?);
    let mut volumes = Vec::new();
    for one in ready {
        let (data, map) = files::open_layer(&inner.volume_dir(one.part.volume), one.number)?;
        let head = NewHead { data_fd: descriptors.push(data), map_fd: descriptors.push(map) };
        volumes.push(PreparedVolume { volume_id: one.part.volume.to_string(), head: Some(head) });
    }
    let snapshot = plan.name.clone();
    let (id, bases) =
        (plan.id.as_bytes().to_vec(), plan.bases.iter().map(|id| id.as_bytes().to_vec()).collect());
    let body = Body::SaveVm(SaveVm { state_fd, memory_fd, stay_paused: false, snapshot, volumes, id, bases });
    match plan.vm.ask(body, descriptors.as_slice(), SAVE_WAIT).await {
        Ok(Body::SavedVm(saved)) => {
            let synced = || {
                rundir::sync_parent(&plan.dir.join("state"))?;
                rundir::sync_parent(&plan.dir)
            };
            synced().map_err(FileError::at("sync", &plan.dir))?;
            Ok(saved)
        }
        Err(error) if error.refusal().is_some() => Err(error.into()),
        // Not a word: until it is dead it may be sealing.
        other => {
            for (_, gate) in entered.iter_mut() {
                gate.in_doubt = Some(plan.vm.watched().clone());
            }
            match other {
                Err(error) => Err(error.into()),
                Ok(_) => Err(TalkError::from(ChannelError::Unexpected).into()),
            }
        }
    }
}
