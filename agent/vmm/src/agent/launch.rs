//! From a `Launch` message and its descriptors to a running VM.
//!
//! The message is checked here and nowhere later: counts, sizes, and that each index names a descriptor once. What fails
//! before the VM runs is answered with the field to blame; the process then ends.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use nix::sys::eventfd::EventFd;
use prost::Message;
use serio_control::message::{
    Code, EndKind, EndRecord, Failed, Launch, NIC_PAIRS_MAX, OnReset, OnWatchdog, RestoreFrom, VdcKey,
};
use serio_devices::vsock::{Outgoing, VsockHost};
use serio_hv::{Baseline, GuestMemory, Kvm, OpenError, PageKind, Tap, VhostNet};
use serio_sandbox::{Kind, threads};
use serio_volume::{Access, LayerFiles, VdcSecret, Volume, VolumeFiles};

use super::limits::limits;
use crate::boot::BootSource;
use crate::console::Output;
use crate::devices::{DeviceError, Devices, Disk, Nic};
use crate::end::{End, EndSlot, chain as chain_of};
use crate::machine::{self, Handle, MachineConfig, MachineError, MachineState, Running, WatchdogAction};
use crate::snapshot::{self, Link, PageSet, ReadError, Sums, chain};

/// It reads into a buffer on the heap.
const CHECK_STACK_BYTES: usize = 64 << 10;

/// A VM that was launched, and what it needs to boot again.
pub(super) struct Launched {
    pub(super) devices: Arc<Devices>,
    pub(super) output: Arc<Output>,
    pub(super) end: Arc<EndSlot>,
    /// Readable when a device has got into trouble, or out of it.
    pub(super) troubles: Arc<EventFd>,
    pub(super) on_reset: OnReset,
    pub(super) exit: File,
    /// The console's listener and the log, until the main thread takes them.
    pub(super) console: Option<UnixListener>,
    pub(super) log: Option<File>,
    kvm: Kvm,
    config: MachineConfig,
    handle: Handle,
    running: Option<Running>,
}

/// Why a VM was not launched.
#[derive(Debug, thiserror::Error)]
pub(super) enum LaunchError {
    #[error("{field}: {what}")]
    Invalid { field: &'static str, what: String },
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Kvm(#[from] OpenError),
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error("an eventfd could not be made: raise the limit of open files")]
    Host(#[from] io::Error),
}

impl LaunchError {
    fn invalid(field: &'static str, what: impl Into<String>) -> LaunchError {
        LaunchError::Invalid { field, what: what.into() }
    }

    /// The answer to the one who asked.
    pub(super) fn answer(&self) -> Failed {
        let (code, field) = match self {
            LaunchError::Invalid { field, .. } => (Code::Invalid, *field),
            LaunchError::Device(error) if error.is_in_use() => (Code::InUse, error.field()),
            LaunchError::Device(error @ DeviceError::Port(_)) => (Code::Exhausted, error.field()),
            LaunchError::Device(error) => (Code::Io, error.field()),
            LaunchError::Machine(error) => (error_code(error), error.field()),
            LaunchError::Kvm(_) | LaunchError::Host(_) => (Code::Io, ""),
        };
        Failed { code: code.into(), message: chain_of(self), field: field.to_owned() }
    }

    pub(super) fn record(&self) -> EndRecord {
        EndRecord { kind: EndKind::LaunchFailed.into(), reason: chain_of(self) }
    }
}

fn error_code(error: &MachineError) -> Code {
    match error {
        MachineError::Backing(_) | MachineError::Host { .. } => Code::Exhausted,
        MachineError::Vm(_) => Code::Io,
        _ => Code::Invalid,
    }
}

/// The descriptors of a frame; each is taken once.
pub(super) struct Passed(Vec<Option<OwnedFd>>);

impl Passed {
    pub(super) fn new(descriptors: Vec<OwnedFd>) -> Passed {
        Passed(descriptors.into_iter().map(Some).collect())
    }

    pub(super) fn take(&mut self, field: &'static str, index: u32) -> Result<OwnedFd, LaunchError> {
        let count = self.0.len();
        let slot = usize::try_from(index).ok().and_then(|index| self.0.get_mut(index));
        slot.and_then(Option::take).ok_or_else(|| {
            LaunchError::invalid(
                field,
                format!("descriptor {index} of {count} is missing or was named twice"),
            )
        })
    }
}

/// Takes the exit descriptor out first, so that even a failed launch leaves its reason there.
pub(super) fn take_exit(launch: &Launch, passed: &mut Passed) -> Result<File, LaunchError> {
    Ok(File::from(passed.take("exit_fd", launch.exit_fd)?))
}

/// Starts the VM. Consumes the rest of the descriptors.
pub(super) fn launch(launch: &Launch, mut passed: Passed, exit: File) -> Result<Launched, LaunchError> {
    check(launch)?;
    let on_reset = OnReset::try_from(launch.on_reset)
        .map_err(|_| LaunchError::invalid("on_reset", format!("{} is unknown", launch.on_reset)))?;
    let mut kvm = Kvm::from_fd(passed.take("kvm_fd", launch.kvm_fd)?)?;
    if !launch.cpu_baseline.is_empty() {
        let baseline = launch.cpu_baseline.parse::<Baseline>();
        let baseline = baseline.map_err(|error| LaunchError::invalid("cpu_baseline", error.to_string()))?;
        kvm.set_baseline(baseline)
            .map_err(|error| LaunchError::invalid("cpu_baseline", error.to_string()))?;
    }
    let kernel = File::from(passed.take("kernel", launch.kernel_fd)?);
    let initrd = launch.initrd_fd.map(|index| passed.take("initrd", index)).transpose()?.map(File::from);
    let log = File::from(passed.take("log_fd", launch.log_fd)?);
    let console = UnixListener::from(passed.take("console_fd", launch.console_fd)?);
    console.set_nonblocking(true)?;
    let mut devices = open_devices(launch, &mut passed)?;
    let troubles = Arc::new(super::state::bell()?);
    devices.watch_troubles(&troubles);
    let mut saved = launch.restore.as_ref().map(|from| open_saved(launch, from, &mut passed)).transpose()?;
    if let Some(saved) = &saved {
        devices.fit(&saved.state).map_err(|what| LaunchError::invalid("nics", what))?;
    }
    let devices = Arc::new(devices);
    // What was passed and not named is closed before the guest runs.
    drop(passed);

    let config = MachineConfig {
        vcpus: launch.vcpus,
        memory_bytes: launch.memory_bytes,
        boot: BootSource { kernel, initrd, cmdline: launch.cmdline.clone() },
        watchdog: watchdog(launch)?,
        pages: pages(launch)?,
    };
    let output = Arc::new(Output::new()?);
    let end = Arc::new(EndSlot::new()?);
    let unchecked = saved.as_mut().map(|saved| std::mem::take(&mut saved.unchecked));
    let running = match saved {
        None => machine::boot(&kvm, &config, &devices, output.clone(), end.clone())?,
        Some(saved) => {
            let slots = (output.clone(), end.clone());
            machine::restore(&kvm, &config, &devices, slots, (saved.memory, &saved.state, saved.link))?
        }
    };
    if let Some(unchecked) = unchecked.filter(|files| !files.is_empty()) {
        check_beside(unchecked, running.handle())?;
    }
    if launch.restore.as_ref().is_some_and(|from| !from.stay_paused) {
        running.handle().resume();
    }
    Ok(Launched {
        handle: running.handle().clone(),
        running: Some(running),
        devices,
        output,
        end,
        troubles,
        on_reset,
        exit,
        console: Some(console),
        log: Some(log),
        kvm,
        config,
    })
}

fn check(launch: &Launch) -> Result<(), LaunchError> {
    if let Some(total) = crate::run::host_memory_bytes().filter(|total| launch.memory_bytes > *total) {
        let what = crate::run::too_much_memory(launch.memory_bytes, total);
        return Err(LaunchError::invalid("memory", what));
    }
    Ok(())
}

/// What the VM goes on from.
struct Saved {
    memory: GuestMemory,
    state: MachineState,
    /// How the next snapshot of it names this one.
    link: Option<Link>,
    /// What is still to be checked, beside the guest.
    unchecked: Vec<Unchecked>,
}

/// A memory's file, and what it should be.
struct Unchecked {
    file: File,
    sums: Sums,
    /// Of a diff: which of it.
    pages: Option<PageSet>,
}

/// Ends the VM if its memory is damaged. The thread ends with the VM.
fn check_beside(files: Vec<Unchecked>, vm: &Handle) -> io::Result<()> {
    let vm = vm.clone();
    threads::spawn(Kind::Check, "check", CHECK_STACK_BYTES, move || {
        for one in files {
            if let Err(error) = one.sums.check(&one.file, one.pages.as_ref(), || !vm.is_over()) {
                vm.stop(End::HostError(chain_of(&error)));
            }
        }
    })
    .map(drop)
}

/// Opens the memory and the state, with all that they go on from, and checks them; the memory not yet, if that is wished.
fn open_saved(launch: &Launch, from: &RestoreFrom, passed: &mut Passed) -> Result<Saved, LaunchError> {
    let invalid = |error: ReadError| LaunchError::invalid("restore", chain_of(&error));
    let mut layers = vec![open_layer((from.state_fd, from.memory_fd), passed)?];
    for base in &from.bases {
        layers.push(open_layer((base.state_fd, base.memory_fd), passed)?);
    }
    let memory_bytes = layers.first().map_or(0, |(saved, _)| saved.memory_bytes);
    if memory_bytes != launch.memory_bytes {
        let what = format!(
            "the VM was saved with {memory_bytes} bytes of memory, not {}: give it as many",
            launch.memory_bytes
        );
        return Err(LaunchError::invalid("restore", what));
    }
    let memory = chain::open(&layers).map_err(invalid)?;
    let mut unchecked = Vec::new();
    let (mut state, mut link) = (None, None);
    for (saved, file) in layers {
        let pages = saved.base.map(|(_, pages)| pages);
        match saved.sums {
            None => {}
            Some(sums) if from.check_beside => unchecked.push(Unchecked { file, sums, pages }),
            Some(sums) => {
                sums.check(&file, pages.as_ref(), || true).map_err(|error| invalid(error.into()))?;
            }
        }
        if state.is_none() {
            (state, link) = (Some(saved.machine), saved.link);
        }
    }
    let state = state.ok_or_else(|| LaunchError::invalid("restore", "no state"))?;
    Ok(Saved { memory, state, link, unchecked })
}

fn open_layer((state, memory): (u32, u32), passed: &mut Passed) -> Result<chain::Layer, LaunchError> {
    let state = File::from(passed.take("restore", state)?);
    let memory = File::from(passed.take("restore", memory)?);
    let saved = snapshot::read(&state).map_err(|error| LaunchError::invalid("restore", chain_of(&error)))?;
    Ok((saved, memory))
}

fn open_devices(launch: &Launch, passed: &mut Passed) -> Result<Devices, LaunchError> {
    let mut devices = Devices::new(launch.vcpus)?;
    for disk in &launch.disks {
        devices.add_disk(open_disk(disk, passed)?);
    }
    for nic in &launch.nics {
        devices.add_nic(open_nic(nic, passed)?);
    }
    devices.vsock = launch.vsock.as_ref().map(|vsock| open_vsock(vsock, passed)).transpose()?;
    Ok(devices)
}

/// A disk of these files.
pub(super) fn open_disk(
    disk: &serio_control::message::Disk,
    passed: &mut Passed,
) -> Result<Disk, LaunchError> {
    let volume = open_volume(disk, passed)?;
    if disk.direct
        && let Err(why) = volume.go_direct()
    {
        super::say(format_args!("the disk {} goes through the page cache: {why}", disk.volume_id));
    }
    Ok(Disk::new(disk.volume_id.clone(), volume).with_limits(limits(disk.limits)))
}

/// A card on these queues of a tap.
pub(super) fn open_nic(nic: &serio_control::message::Nic, passed: &mut Passed) -> Result<Nic, LaunchError> {
    let mac = <[u8; 6]>::try_from(nic.mac.as_slice())
        .map_err(|_| LaunchError::invalid("nics", "a MAC address has six bytes"))?;
    let mtu = u16::try_from(nic.mtu)
        .map_err(|_| LaunchError::invalid("nics", format!("an MTU of {} is too large", nic.mtu)))?;
    let mut taps = Vec::with_capacity(NIC_PAIRS_MAX as usize);
    for index in std::iter::once(&nic.tap_fd).chain(&nic.more_tap_fds) {
        if taps.len() >= NIC_PAIRS_MAX as usize {
            let what = format!("a card has at most {NIC_PAIRS_MAX} queue pairs");
            return Err(LaunchError::invalid("nics", what));
        }
        let tap = Tap::from_fd(passed.take("nics", *index)?)
            .map_err(|source| DeviceError::Tap { name: "passed by descriptor".to_owned(), source })?;
        taps.push(tap);
    }
    if !nic.vhost_fds.is_empty() && nic.vhost_fds.len() != taps.len() {
        let what = format!("{} of vhost-net for {} queue pairs", nic.vhost_fds.len(), taps.len());
        return Err(LaunchError::invalid("nics", what));
    }
    for (tap, index) in taps.iter_mut().zip(&nic.vhost_fds) {
        let vhost = VhostNet::from_fd(passed.take("nics", *index)?)
            .map_err(|error| LaunchError::invalid("nics", format!("no vhost-net was passed: {error}")))?;
        tap.set_vhost(vhost)
            .map_err(|source| DeviceError::Tap { name: "passed by descriptor".to_owned(), source })?;
    }
    Ok(Nic::new(taps, mac, (mtu != 0).then_some(mtu), limits(nic.limits)))
}

fn pages(launch: &Launch) -> Result<PageKind, LaunchError> {
    match launch.page_bytes {
        0 => Ok(PageKind::Small),
        bytes => PageKind::of_bytes(bytes).ok_or_else(|| {
            LaunchError::invalid("page_bytes", format!("{bytes} is no size of a page: 4 KiB, 2 MiB or 1 GiB"))
        }),
    }
}

fn watchdog(launch: &Launch) -> Result<WatchdogAction, LaunchError> {
    match OnWatchdog::try_from(launch.on_watchdog) {
        Ok(OnWatchdog::Reset) => Ok(WatchdogAction::Reset),
        Ok(OnWatchdog::End) => Ok(WatchdogAction::End),
        Err(_) => Err(LaunchError::invalid("on_watchdog", format!("{} is unknown", launch.on_watchdog))),
    }
}

fn open_vsock(vsock: &serio_control::message::Vsock, passed: &mut Passed) -> Result<VsockHost, LaunchError> {
    if !(3..u32::MAX).contains(&vsock.guest_cid) {
        return Err(LaunchError::invalid(
            "vsock",
            format!("a guest cannot have the address {}", vsock.guest_cid),
        ));
    }
    let listener = UnixListener::from(passed.take("vsock", vsock.listener_fd)?);
    let broker = vsock.broker_fd.map(|index| passed.take("vsock", index)).transpose()?;
    let outgoing = broker.map_or(Outgoing::Refuse, Outgoing::Broker);
    Ok(VsockHost::new(vsock.guest_cid, listener, outgoing)?)
}

fn open_volume(disk: &serio_control::message::Disk, passed: &mut Passed) -> Result<Volume, LaunchError> {
    let access = if disk.read_only { Access::ReadOnly } else { Access::ReadWrite };
    let mut layers = Vec::with_capacity(disk.layers.len());
    for layer in &disk.layers {
        let data = File::from(passed.take("disks", layer.data_fd)?);
        let map = layer.map_fd.map(|index| passed.take("disks", index)).transpose()?.map(File::from);
        layers.push((data, map));
    }
    let failed = |source| DeviceError::Volume { name: disk.volume_id.clone(), source };
    let key = disk.key.as_ref().map(secret).transpose()?;
    let raw = matches!(layers.as_slice(), [(_, None)]);
    if raw {
        let Some((data, _)) = layers.pop() else { return Err(LaunchError::invalid("disks", "no layer")) };
        return Ok(Volume::open_raw(data, access).map_err(failed)?);
    }
    let layers = layers
        .into_iter()
        .map(|(data, map)| Some(LayerFiles { data, map: map? }))
        .collect::<Option<Vec<_>>>()
        .ok_or_else(|| LaunchError::invalid("disks", "only a disk of one layer may be without a map"))?;
    Ok(Volume::open_with_key(VolumeFiles { layers }, access, key.as_ref()).map_err(failed)?)
}

fn secret(key: &VdcKey) -> Result<VdcSecret, LaunchError> {
    match (<[u8; 16]>::try_from(&*key.id), <[u8; 32]>::try_from(&*key.secret)) {
        (Ok(id), Ok(secret)) => Ok(VdcSecret::new(id, secret)),
        _ => Err(LaunchError::invalid("disks", "a vdc's key has an id of 16 bytes and a secret of 32")),
    }
}

/// Writes why the VM ended, durably: `seriod` may be away. If that fails there is only the log left to say so.
pub(super) fn write_exit_record(exit: &File, record: &EndRecord) {
    let bytes = record.encode_to_vec();
    let written = exit.set_len(0).and_then(|()| exit.write_all_at(&bytes, 0)).and_then(|()| exit.sync_data());
    if let Err(error) = written {
        super::say(format_args!("cannot write the exit record: {error}"));
    }
}

impl Launched {
    pub(super) fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Waits for the machine's end, which has been announced, and takes it apart.
    pub(super) fn join(&mut self) -> End {
        match self.running.take() {
            Some(running) => running.join(),
            None => self.end.get().unwrap_or(End::Stopped),
        }
    }

    /// A new machine from the same parts.
    pub(super) fn boot_again(&mut self) -> Result<Handle, LaunchError> {
        self.output = Arc::new(Output::new()?);
        self.end = Arc::new(EndSlot::new()?);
        let running =
            machine::boot(&self.kvm, &self.config, &self.devices, self.output.clone(), self.end.clone())?;
        self.handle = running.handle().clone();
        self.running = Some(running);
        Ok(self.handle())
    }
}
