//! Does the state's effects: asks the supervisor, and sends what came of it back as inputs.
//!
//! Owns: the handles of running VMs and exports. Never: decisions.
//! Threads: a tokio task per effect; each ends in exactly one input (timers too).

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use serio_control::message::nic_pairs;
use serio_types::Name;
use tokio::{
    runtime,
    sync::{mpsc, watch},
};
use uuid::Uuid;

use super::{
    effect::{Adopted, Effect, Input, Launch, Restore, Started},
    vm_orders::Order,
};
use crate::{
    error::{Error, chain},
    net,
    seed::{self, SeedNic, SeedSpec},
    supervise::{
        BootPlan, DevicePlan, DiskPlan, DiskSource, ExportHandle, ExportPlan, LaunchPlan, NicPlan,
        Supervisor, VmHandle,
    },
};

/// What runs now; shared with the gRPC side, which talks to consoles and counts clients.
#[derive(Debug, Clone, Default)]
pub struct Handles(Arc<Mutex<Running>>);

#[derive(Debug, Default)]
pub(super) struct Running {
    vms: BTreeMap<Uuid, VmHandle>,
    exports: BTreeMap<Name, ExportHandle>,
    /// Operations that may be asked to end.
    pub(super) cancels: BTreeMap<Uuid, watch::Sender<bool>>,
}

impl Handles {
    pub(super) fn with<T>(&self, act: impl FnOnce(&mut Running) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A running VM.
    #[must_use]
    pub fn vm(&self, uid: Uuid) -> Option<VmHandle> {
        self.with(|r| r.vms.get(&uid).cloned())
    }

    /// A running export.
    #[must_use]
    pub fn export(&self, id: &Name) -> Option<ExportHandle> {
        self.with(|r| r.exports.get(id).cloned())
    }
}

/// Does effects. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Executor {
    pub(super) supervisor: Supervisor,
    pub(super) handles: Handles,
    state_dir: PathBuf,
    pub(super) inputs: mpsc::Sender<Input>,
    runtime: runtime::Handle,
}

/// A directory that is gone afterwards, durably. No error when it was not there.
pub(super) fn remove_dir(dir: &Path) -> Result<(), Error> {
    let failed =
        |e: io::Error| Error::Failed { doing: "removing files", why: format!("{}: {e}", dir.display()) };
    match std::fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed(e)),
        _ => {}
    }
    // The parent is synced so that a power cut does not bring back what the rows forgot.
    match dir.parent().map(std::fs::File::open) {
        Some(Ok(parent)) => parent.sync_all().map_err(failed),
        _ => Ok(()),
    }
}

pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work).await.unwrap_or(Err(Error::Ending))
}

impl Executor {
    /// One that reports to `inputs`. Call it inside the runtime that shall do the work.
    #[must_use]
    pub fn new(
        supervisor: Supervisor,
        handles: Handles,
        state_dir: PathBuf,
        inputs: mpsc::Sender<Input>,
    ) -> Self {
        Self { supervisor, handles, state_dir, inputs, runtime: runtime::Handle::current() }
    }

    /// Begins an effect; does not wait for it.
    pub fn begin(&self, effect: Effect) {
        // Now, not when the work comes to it: once the state says that an export has ended, no new client is let in.
        if let Effect::EndExport { id } = &effect
            && let Some(handle) = self.handles.with(|r| r.exports.remove(id))
        {
            // Its watcher reports the end.
            self.runtime.spawn(async move { handle.stop().await });
            return;
        }
        let this = self.clone();
        self.runtime.spawn(async move { this.perform(effect).await });
    }

    pub(super) async fn send(&self, input: Input) {
        // Only fails while the daemon ends: the next one reconciles.
        let _ = self.inputs.send(input).await;
    }

    pub(super) fn image_dir(&self, image: Uuid) -> PathBuf {
        self.state_dir.join("images").join(image.to_string())
    }

    pub(super) fn vm_dir(&self, vm: Uuid) -> PathBuf {
        self.state_dir.join("vms").join(vm.to_string())
    }

    async fn perform(&self, effect: Effect) {
        match effect {
            Effect::Launch(launch) => self.launch(*launch).await,
            Effect::Adopt { vm } => self.adopt(vm).await,
            Effect::PowerButton { vm } => self.power_button(vm).await,
            Effect::Stop { vm } => {
                // No handle: it ended just now, and the state will hear.
                if let Some(handle) = self.handles.vm(vm) {
                    handle.stop().await;
                }
            }
            Effect::Balloon { vm, target_bytes } => self.balloon(vm, target_bytes).await,
            Effect::Limits { vm, limits } => self.limits(vm, &limits).await,
            Effect::Order { vm, pid, order } => {
                let result = self.order(vm, pid, order).await;
                self.send(Input::Ordered { vm, order, result }).await;
            }
            Effect::Clean { vm } => {
                self.supervisor.clean(vm).await;
                self.send(Input::Cleaned { vm }).await;
            }
            Effect::RemoveVm { vm, volumes } => {
                let result = self.remove_vm(vm, volumes).await;
                self.send(Input::VmRemoved { vm, result }).await;
            }
            Effect::RemoveImage { image } => {
                let dir = self.image_dir(image);
                let result = blocking(move || remove_dir(&dir)).await;
                self.send(Input::ImageRemoved { image, result }).await;
            }
            Effect::Timer { after, timer } => {
                tokio::time::sleep(after).await;
                self.send(Input::Timer(timer)).await;
            }
            Effect::StartExport { .. } | Effect::AdoptExport { .. } | Effect::EndExport { .. } => {
                self.export(effect).await;
            }
            on_volumes => self.volume_work(on_volumes).await,
        }
    }

    async fn launch(&self, launch: Launch) {
        let vm = launch.vm;
        let rolled_back = self.roll_back(launch.restore.as_ref()).await;
        let planned = match rolled_back {
            Ok(()) => self.plan(launch).await,
            Err(error) => Err(error),
        };
        let result = match planned {
            Ok(plan) => self.supervisor.launch(plan).await.map_err(|e| Error::from_launch(&e)),
            Err(error) => Err(error),
        };
        match result {
            Ok(handle) => {
                self.handles.with(|r| r.vms.insert(vm, handle.clone()));
                let started = Started { pid: handle.pid(), kernel: handle.kernel().cloned() };
                self.send(Input::Launched { vm, result: Ok(started) }).await;
                self.watch(vm, handle).await;
            }
            Err(error) => self.send(Input::Launched { vm, result: Err(error) }).await,
        }
    }

    /// Waits for the end of a VM.
    async fn watch(&self, vm: Uuid, handle: VmHandle) {
        let (told, mut troubles) = mpsc::channel(1);
        let following = handle.follow_troubles(&told);
        let passing_on = async {
            while let Some(troubles) = troubles.recv().await {
                self.send(Input::Troubled { vm, pid: handle.pid(), troubles }).await;
            }
        };
        // Neither ends before it does.
        let end = tokio::select! {
            end = handle.ended() => end,
            ((), ()) = async { tokio::join!(following, passing_on) } => handle.ended().await,
        };
        self.handles.with(|r| r.vms.remove(&vm));
        self.send(Input::Ended { vm, pid: handle.pid(), end }).await;
    }

    async fn plan(&self, launch: Launch) -> Result<LaunchPlan, Error> {
        let image = self.image_dir(launch.image);
        let mut disks: Vec<DiskPlan> = launch
            .volumes
            .iter()
            .map(|volume| DiskPlan { source: DiskSource::Volume(*volume), read_only: false })
            .collect();
        if let Some(path) = self.seed(&launch).await? {
            disks.push(DiskPlan {
                source: DiskSource::File { name: "seed".to_owned(), path },
                read_only: true,
            });
        }
        let nic = |(index, nic): (usize, &super::effect::LaunchNic)| NicPlan {
            mac: nic.mac.bytes(),
            bridge: net::bridge_name(launch.vdc),
            tap: net::tap_name(launch.vm, index),
            pairs: nic_pairs(launch.vcpus),
            mtu: launch.machine.mtu(),
        };
        Ok(LaunchPlan {
            uid: launch.vm,
            generation: launch.generation,
            vcpus: launch.vcpus,
            memory_bytes: launch.memory_bytes,
            boot: match launch.volumes.first() {
                Some(root) if launch.from_disk => BootPlan::Disk { volume: *root },
                _ => BootPlan::Files {
                    kernel: image.join("kernel"),
                    initrd: launch.has_initrd.then(|| image.join("initrd")),
                },
            },
            disks,
            nics: launch.nics.iter().enumerate().map(nic).collect(),
            name: launch.name,
            cmdline: launch.cmdline,
            machine: launch.machine,
            limits: launch.limits,
            restore: launch.restore.map_or_else(Vec::new, |from| {
                let all = std::iter::once(from.group).chain(from.bases);
                all.map(|group| self.saved_dir(from.vm, group)).collect()
            }),
        })
    }

    /// Makes the seed disk of a VM that asks for one.
    async fn seed(&self, launch: &Launch) -> Result<Option<PathBuf>, Error> {
        let Some(init) = &launch.seed else { return Ok(None) };
        let nic = |nic: &super::effect::LaunchNic| SeedNic {
            mac: nic.mac.bytes(),
            address: nic.address.map(|a| a.to_string()),
            gateway: nic.gateway.map(|g| g.to_string()),
        };
        let spec = SeedSpec {
            instance_id: launch.vm.to_string(),
            hostname: init.hostname.clone().unwrap_or_else(|| launch.name.name.as_str().to_owned()),
            ssh_keys: init.ssh_keys.clone(),
            user_data: init.user_data.clone().unwrap_or_default(),
            nics: launch.nics.iter().map(nic).collect(),
        };
        let dir = self.vm_dir(launch.vm);
        blocking(move || {
            let bytes = seed::build(&spec).map_err(|e| Error::invalid("spec.cloud_init", chain(&e)))?;
            let path = dir.join("seed.img");
            std::fs::create_dir_all(&dir).and_then(|()| std::fs::write(&path, bytes)).map_err(|e| {
                Error::Failed { doing: "writing the seed", why: format!("{}: {e}", path.display()) }
            })?;
            Ok(Some(path))
        })
        .await
    }

    async fn adopt(&self, vm: Uuid) {
        let found = match self.supervisor.adopt(vm).await {
            Ok(Some((handle, paused))) => {
                self.handles.with(|r| r.vms.insert(vm, handle.clone()));
                let has = handle.status().await.map(|report| (report.volumes, report.nics));
                let (volumes, nics) = has.unwrap_or_default();
                let found = Adopted::Runs { pid: handle.pid(), paused, volumes, nics };
                self.send(Input::Adopted { vm, found }).await;
                return self.watch(vm, handle).await;
            }
            Ok(None) => Adopted::Gone(self.supervisor.end_record(vm)),
            Err(error) => Adopted::Silent(chain(&error)),
        };
        self.send(Input::Adopted { vm, found }).await;
    }

    async fn power_button(&self, vm: Uuid) {
        let Some(handle) = self.handles.vm(vm) else { return };
        if let Err(error) = handle.power_button().await {
            // The timer tells the client; a VM that ended meanwhile tells by its end.
            tracing::warn!(%vm, "the power button could not be pressed: {}", chain(&error));
        }
    }

    async fn balloon(&self, vm: Uuid, target_bytes: u64) {
        let Some(handle) = self.handles.vm(vm) else { return };
        if let Err(error) = handle.set_balloon(target_bytes).await {
            tracing::warn!(%vm, "its balloon stays as it is: {}", chain(&error));
        }
    }

    async fn limits(&self, vm: Uuid, limits: &DevicePlan) {
        let Some(handle) = self.handles.vm(vm) else { return };
        if let Err(error) = handle.set_limits(limits).await {
            tracing::warn!(%vm, "its new limits count at its next start only: {}", chain(&error));
        }
    }

    async fn order(&self, vm: Uuid, pid: u32, order: Order) -> Result<(), Error> {
        let gone = || Error::precondition(format!("vms/{vm}"), "ended just now");
        let handle = self.handles.vm(vm).filter(|handle| handle.pid() == pid).ok_or_else(gone)?;
        let (doing, result) = match order {
            Order::Reset => ("resetting the VM", handle.reset().await),
            Order::Pause => ("pausing the VM", handle.pause().await),
            // The others are effects of their own.
            Order::Resume | Order::Save | Order::Plug => ("resuming the VM", handle.resume().await),
        };
        result.map_err(|e| Error::Failed { doing, why: chain(&e) })
    }

    /// Where all VMs' kept files are.
    pub(super) fn saved_root(&self) -> PathBuf {
        self.state_dir.join("vms")
    }

    /// Where a VM is saved.
    pub(super) fn saved_dir(&self, vm: Uuid, group: Uuid) -> PathBuf {
        self.supervisor.saved_dir(vm, group)
    }

    /// Takes the volumes of a VM back before it goes on from there. Done twice it is the same.
    async fn roll_back(&self, restore: Option<&Restore>) -> Result<(), Error> {
        for (volume, point) in restore.into_iter().flat_map(|from| &from.rollback) {
            let result = self.supervisor.rollback_volume(*volume, point.clone().into(), true).await;
            result.map_err(|e| Error::from_job("going back to the snapshot", &e))?;
        }
        Ok(())
    }

    async fn remove_vm(&self, vm: Uuid, volumes: Vec<Uuid>) -> Result<(), Error> {
        for volume in volumes {
            self.delete_volume(volume).await?;
        }
        let dir = self.vm_dir(vm);
        blocking(move || remove_dir(&dir)).await
    }

    async fn export(&self, effect: Effect) {
        match effect {
            Effect::StartExport { id, volume, snapshot, writable, once, release } => {
                let plan = ExportPlan {
                    id: id.to_string(),
                    volume,
                    export_name: id.to_string(),
                    snapshot: snapshot.map(String::from),
                    writable,
                    once,
                    release,
                };
                match self.supervisor.start_export(plan).await {
                    Ok(handle) => {
                        self.handles.with(|r| r.exports.insert(id.clone(), handle.clone()));
                        self.send(Input::ExportStarted { id: id.clone(), result: Ok(()) }).await;
                        self.watch_export(id, handle).await;
                    }
                    Err(error) => {
                        let result = Err(Error::from_job("starting the export", &error));
                        self.send(Input::ExportStarted { id, result }).await;
                    }
                }
            }
            Effect::AdoptExport { id } => match self.supervisor.adopt_export(id.as_str()).await {
                Ok(Some(handle)) => {
                    self.handles.with(|r| r.exports.insert(id.clone(), handle.clone()));
                    self.send(Input::ExportAdopted { id: id.clone(), runs: true }).await;
                    self.watch_export(id, handle).await;
                }
                Ok(None) => self.send(Input::ExportAdopted { id, runs: false }).await,
                Err(error) => {
                    tracing::warn!("exports/{id} of an earlier seriod is ended: {}", chain(&error));
                    self.supervisor.clean_export(id.as_str()).await;
                    self.send(Input::ExportAdopted { id, runs: false }).await;
                }
            },
            // One that runs was told to end in `begin`.
            Effect::EndExport { id } => {
                self.supervisor.clean_export(id.as_str()).await;
                self.send(Input::ExportEnded { id }).await;
            }
            _ => {}
        }
    }

    async fn watch_export(&self, id: Name, handle: ExportHandle) {
        let how = handle.ended().await;
        tracing::debug!("exports/{id} ended: {how}");
        self.handles.with(|r| r.exports.remove(&id));
        self.supervisor.clean_export(id.as_str()).await;
        self.send(Input::ExportEnded { id }).await;
    }
}
