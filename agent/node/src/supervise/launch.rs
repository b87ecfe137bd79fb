//! Starting a VM, and finding one again.
//!
//! ```text
//!  open kernel, initrd, kvm, disks      nothing made yet: a bad path costs nothing
//!  run dir, sockets, taps               found by its name, removed by `clean`
//!  spawn, cgroup                        ends by itself without a Launch
//!  meta (synced)                        from here on it can be adopted
//!  Launch                               from here on it goes on without us
//! ```

use std::{
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use prost::Message;
use serio_control::{
    ChannelError,
    message::{BaseFds, Body, Disk, Launch, LayerFds, OnReset, RestoreFrom, VmState},
};
use uuid::Uuid;

use super::{
    AdoptError, BootPlan, DiskSource, FileError, Inner, LaunchError, LaunchPlan, VmHandle, VolumeFilesError,
    bootdisk,
    files::{self, Descriptors},
    link, machine,
    process::Process,
    rundir::{self, Meta, RunDir},
    spawn::{self, Watched},
    vm,
};

/// For `Launch`: the VMM loads the kernel and runs the first vcpu, on a slow disk of a busy host.
const LAUNCH_WAIT: Duration = Duration::from_secs(90);
/// How long a VMM whose VM has ended may take to go.
const END_GRACE: Duration = Duration::from_secs(3);
const KVM: &str = "/dev/kvm";

/// Starts a VM. The caller cleans up when this fails.
pub(super) async fn launch(inner: &Arc<Inner>, plan: LaunchPlan) -> Result<VmHandle, LaunchError> {
    let uid = plan.uid;
    let run = inner.run_of(uid);
    let (kernel, booted) = match &plan.boot {
        BootPlan::Files { kernel, initrd } => (bootdisk::Kernel::open(kernel, initrd.as_deref())?, None),
        BootPlan::Disk { volume } => {
            let found = bootdisk::find(inner, *volume, &plan.cmdline).await;
            let (kernel, booted) = found.map_err(|e| LaunchError::NoKernel(Box::new(e)))?;
            (kernel, Some(booted))
        }
    };
    let cmdline = booted.as_ref().map_or(&plan.cmdline, |booted| &booted.cmdline).clone();
    let (mut launch, mut descriptors) = describe(inner, &plan, kernel, cmdline)?;
    let digest = blake3::hash(&launch.encode_to_vec()).to_hex().to_string();
    // After the digest, which is kept in a file.
    for (disk, planned) in launch.disks.iter_mut().zip(&plan.disks) {
        if let DiskSource::Volume(volume) = planned.source {
            disk.key = inner.key_of(volume).await?;
            disk.direct = !disk.read_only && inner.settings.direct_io.wants(disk.key.is_some());
        }
    }
    let control = make_run_dir(&run, &mut launch, &mut descriptors)?;
    launch.restore = restore_from(&plan.restore, &mut descriptors)?;
    machine::equip(&plan.machine, &run, (&mut launch, &mut descriptors))?;
    for nic in &plan.nics {
        let taps = inner.net.attach(&nic.bridge, &nic.tap, nic.mtu, nic.pairs).await?;
        launch.nics.push(descriptors.push_nic(nic, taps, &plan.limits));
    }
    // Last: what the VM cannot do without has its place by now.
    for nic in launch.nics.iter_mut().filter(|_| inner.settings.vhost_net) {
        descriptors.push_vhosts(nic);
    }
    let watched =
        spawn::spawn(&inner.settings.vmm_path, inner.settings.first_uid, control, &run.stderr()).await?;
    let pid = watched.process().pid();
    inner.cgroups.put(uid, &plan.name.vdc, pid, plan.vcpus);
    let meta = Meta {
        pid,
        start_ticks: watched.process().start_ticks(),
        boot_id: rundir::boot_id(),
        generation: plan.generation,
        plan: digest,
        bridges: plan.nics.iter().map(|nic| nic.bridge.clone()).collect(),
    };
    let sent = match rundir::write_meta(&run.meta(), &meta) {
        Ok(()) => send(&run, &watched, launch, descriptors.as_slice()).await,
        Err(error) => Err(error.into()),
    };
    if let Err(error) = sent {
        watched.kill().await;
        return Err(error);
    }
    Ok(VmHandle::new(Arc::clone(inner), uid, plan.generation, watched).booted(booted))
}

async fn send(run: &RunDir, watched: &Watched, launch: Launch, fds: &[OwnedFd]) -> Result<(), LaunchError> {
    let control = run.control();
    let asked =
        link::ask_with(&control, vm::peer(watched.process().pid()), Body::Launch(launch), fds, LAUNCH_WAIT);
    let answer = tokio::select! {
        biased;
        answer = asked => answer,
        exit = watched.exit() => return Err(LaunchError::Died { reason: vm::end_record(run, exit).reason }),
    };
    match answer {
        Ok(Body::Done(_) | Body::VmStatus(_)) => Ok(()),
        Ok(_) => Err(LaunchError::Talk(ChannelError::Unexpected.into())),
        // It hung up: its death says more than the closed socket does.
        Err(error) if error.refusal().is_none() => match watched.exit_within(Duration::from_secs(1)).await {
            Some(exit) => Err(LaunchError::Died { reason: vm::end_record(run, exit).reason }),
            None => Err(LaunchError::Talk(error)),
        },
        Err(error) => Err(LaunchError::Talk(error)),
    }
}

/// The files that a VM goes on from. Its guest runs before its memory has been read; damage that is found then ends it.
fn restore_from(dirs: &[PathBuf], descriptors: &mut Descriptors) -> Result<Option<RestoreFrom>, FileError> {
    let mut all = Vec::with_capacity(dirs.len());
    for dir in dirs {
        let state_fd = descriptors.push(files::open(&dir.join("state"), true)?);
        let memory_fd = descriptors.push(files::open(&dir.join("memory"), true)?);
        all.push(BaseFds { state_fd, memory_fd });
    }
    let mut all = all.into_iter();
    Ok(all.next().map(|BaseFds { state_fd, memory_fd }| RestoreFrom {
        state_fd,
        memory_fd,
        stay_paused: false,
        check_beside: true,
        bases: all.collect(),
    }))
}

/// Opens everything that is there already.
fn describe(
    inner: &Inner,
    plan: &LaunchPlan,
    kernel: bootdisk::Kernel,
    cmdline: String,
) -> Result<(Launch, Descriptors), LaunchError> {
    let mut descriptors = Descriptors::default();
    let kernel_fd = descriptors.push(kernel.kernel);
    let initrd_fd = kernel.initrd.map(|initrd| descriptors.push(initrd));
    let kvm_fd = descriptors.push(open_kvm().map_err(LaunchError::Kvm)?);
    let mut disks = Vec::new();
    for (index, disk) in plan.disks.iter().enumerate() {
        let opened = open_disk(inner, &disk.source, disk.read_only, &mut descriptors);
        let (volume_id, layers) = opened.map_err(|source| LaunchError::Disk { index, source })?;
        let limits = match disk.source {
            DiskSource::Volume(volume) => plan.limits.disk(volume).and_then(machine::limits),
            // A seed is read once, by us: nobody has limits for it.
            DiskSource::File { .. } => None,
        };
        disks.push(Disk { volume_id, layers, read_only: disk.read_only, limits, ..Disk::default() });
    }
    let log = inner.log_path(plan.uid);
    if let Some(dir) = log.parent() {
        rundir::make_dir(dir)?;
    }
    let log_fd = descriptors.push(rundir::open_log(&log)?);
    let launch = Launch {
        vm_id: plan.uid.to_string(),
        name: plan.name.to_string(),
        vcpus: plan.vcpus,
        memory_bytes: plan.memory_bytes,
        kvm_fd,
        kernel_fd,
        initrd_fd,
        cmdline,
        disks,
        nics: Vec::new(),
        log_fd,
        console_fd: 0,
        exit_fd: 0,
        uid: 0,
        // Another kernel may be there by then, and only seriod can look.
        on_reset: match plan.boot {
            BootPlan::Files { .. } => OnReset::Reboot,
            BootPlan::Disk { .. } => OnReset::End,
        }
        .into(),
        ..Launch::default()
    };
    Ok((launch, descriptors))
}

fn open_disk(
    inner: &Inner,
    source: &DiskSource,
    read_only: bool,
    descriptors: &mut Descriptors,
) -> Result<(String, Vec<LayerFds>), VolumeFilesError> {
    match source {
        DiskSource::Volume(volume) => {
            let layers = descriptors.push_volume(&inner.volume_dir(*volume), *volume, read_only)?;
            Ok((volume.to_string(), layers))
        }
        DiskSource::File { name, path } => {
            let data_fd = descriptors.push(files::open(path, read_only)?);
            Ok((name.clone(), vec![LayerFds { data_fd, map_fd: None }]))
        }
    }
}

fn open_kvm() -> Result<std::fs::File, FileError> {
    std::fs::OpenOptions::new().read(true).write(true).open(KVM).map_err(FileError::at("open", KVM))
}

/// Makes the run directory; gives the listening control socket.
fn make_run_dir(
    run: &RunDir,
    launch: &mut Launch,
    descriptors: &mut Descriptors,
) -> Result<std::os::unix::net::UnixListener, LaunchError> {
    rundir::make_dir(run.path())?;
    let control = rundir::listen(&run.control())?;
    launch.console_fd = descriptors.push(rundir::listen(&run.console())?);
    launch.exit_fd = descriptors.push(rundir::create_new(&run.exit())?);
    Ok(control)
}

/// The process that a run directory speaks of, if it lives.
pub(super) fn living(meta_path: &Path, program: &Path) -> Result<Option<(Meta, Process)>, FileError> {
    let Some(meta) = rundir::read_meta(meta_path) else { return Ok(None) };
    let found = Process::find(meta.pid, meta.start_ticks, program)
        .map_err(|e: io::Error| FileError::at("look for the process of", meta_path)(e))?;
    Ok(found.map(|process| (meta, process)))
}

/// Finds a VM again; and whether it is paused.
pub(super) async fn adopt(inner: &Arc<Inner>, uid: Uuid) -> Result<Option<(VmHandle, bool)>, AdoptError> {
    let run = inner.run_of(uid);
    let Some((meta, process)) = living(&run.meta(), &inner.settings.vmm_path)? else { return Ok(None) };
    // Watched only once it has answered: one that is silent is asked again and again.
    let answer = vm::ask_status(&run, process.pid()).await;
    match answer.map(|status| status.state()) {
        Ok(state @ (VmState::Running | VmState::Paused)) => {
            let watched = Watched::new(process, run.stderr());
            let handle = VmHandle::new(Arc::clone(inner), uid, meta.generation, watched);
            // The broker that it had ended with the daemon that it was of.
            handle.offer_broker().await;
            Ok(Some((handle, state == VmState::Paused)))
        }
        Ok(state) => {
            let watched = Watched::new(process, run.stderr());
            // One that has ended is about to go by itself. One that waits had no Launch: nothing runs in it, and
            // nobody is left who would send one.
            if state == VmState::Waiting || watched.exit_within(END_GRACE).await.is_none() {
                watched.kill().await;
            }
            Ok(None)
        }
        // One that was asked to end before we came hangs up, and is gone a moment later.
        Err(source) => match tokio::time::timeout(END_GRACE, process.wait()).await {
            Ok(_) => Ok(None),
            Err(_) => Err(AdoptError::Silent { pid: process.pid(), source }),
        },
    }
}
