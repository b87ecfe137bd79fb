//! The machine stands still, is saved, and goes on: here or as another machine.
//!
//! ```text
//!   running ── pause ──► paused: vcpus at the gate, devices suspended ── resume ──► running
//!                          │ save (memory does not change any more)
//!                          ▼
//!                     MachineState + memory ── restore ──► another machine, paused
//! ```
//!
//! - Paused means that nothing touches guest memory: the vcpus are out of the guest, all that was asked of devices is done and
//!   answered, and no thread of theirs is left. What comes from outside waits in sockets and taps.
//! - A lock keeps pause, resume and save apart; each takes the time that I/O under way takes.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serio_devices::serial::{SavedSerial, SerialPort};
use serio_hv::{GuestMemory, Kvm, VcpuState, Vm, VmError, VmState};
use serio_virtio::{BusSuspendError, FunctionState};

use super::bus::Bus;
use super::track::Track;
use super::vcpu::GateState;
use super::watchdog::WatchdogState;
use super::{Created, Equipped, Handle, Loaded, MachineConfig, MachineError, Running, generation};
use crate::console::Output;
use crate::devices::Devices;
use crate::end::EndSlot;
use crate::layout;
use crate::snapshot::{Link, PageSet};

/// What a machine is made of, for those who stop and save it.
pub(super) struct Parts {
    pub(super) bus: Arc<Bus>,
    pub(super) vm: Arc<Vm>,
    pub(super) memory: GuestMemory,
    /// One at a time changes between paused and running, or saves.
    pub(super) life: Mutex<Track>,
}

impl Parts {
    pub(super) fn lock(&self) -> MutexGuard<'_, Track> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A VM cannot be paused.
#[derive(Debug, thiserror::Error)]
pub enum PauseError {
    /// It is over.
    #[error("the VM is over")]
    Over,
    /// One of its devices did not come to rest; the VM runs on.
    #[error("the VM cannot be paused")]
    Device(#[from] BusSuspendError),
}

/// A VM cannot be saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// It runs, or is over.
    #[error("the VM is not paused")]
    NotPaused,
    /// KVM refused.
    #[error("cannot take the state of the VM")]
    Kvm(#[from] VmError),
}

/// All of a machine but its memory.
#[derive(Debug, Clone, PartialEq)]
pub struct MachineState {
    /// The vcpus by their numbers.
    pub vcpus: Vec<VcpuState>,
    /// KVM's interrupt controllers and clock.
    pub vm: VmState,
    /// The PCI functions by their numbers.
    pub functions: Vec<FunctionState>,
    /// The rest.
    pub platform: PlatformState,
}

/// A paused machine, to be saved.
pub struct Saved<'a> {
    /// Its memory.
    pub memory: &'a GuestMemory,
    /// All but that.
    pub state: MachineState,
    /// The last snapshot that others may go on from, and the pages that have changed since.
    pub since: Option<(Link, &'a PageSet)>,
}

/// What is neither vcpu nor PCI.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct PlatformState {
    /// Registers of COM1, as in [`SavedSerial`].
    #[prost(bytes = "vec", tag = "1")]
    pub serial_registers: Vec<u8>,
    /// What the guest has not read of its FIFO.
    #[prost(bytes = "vec", tag = "2")]
    pub serial_fifo: Vec<u8>,
    /// What was typed and waits behind it.
    #[prost(bytes = "vec", tag = "3")]
    pub serial_input: Vec<u8>,
    /// PCI configuration mechanism #1: the address register.
    #[prost(uint32, tag = "4")]
    pub pci_address: u32,
    /// The clock's chosen register and its memory. The time itself is the host's at any moment.
    #[prost(uint32, tag = "5")]
    pub clock_index: u32,
    /// See `clock_index`.
    #[prost(bytes = "vec", tag = "6")]
    pub clock_memory: Vec<u8>,
    /// The watchdog; absent in what older programs saved.
    #[prost(message, optional, tag = "7")]
    pub watchdog: Option<WatchdogState>,
    /// The device numbers of disks, cards and the rest, in the order of their making; empty in what older programs saved: one
    /// after the other.
    #[prost(bytes = "vec", tag = "8")]
    pub slots: Vec<u8>,
    /// Devices that have come and the guest has not looked at, a bit each.
    #[prost(uint32, tag = "9")]
    pub plugged: u32,
}

impl Handle {
    /// Stops the VM until [`Handle::resume`]: when this returns, all that it has asked for is done and nothing in its memory
    /// changes. Does nothing on a paused VM.
    pub fn pause(&self) -> Result<(), PauseError> {
        let parts = self.parts.upgrade().ok_or(PauseError::Over)?;
        let _life = parts.lock();
        let paused = self.is_paused();
        self.vcpus.set(GateState::Paused);
        if !self.vcpus.wait_parked() {
            return Err(PauseError::Over);
        }
        parts.bus.pci.suspend().inspect_err(|_| {
            if !paused {
                parts.bus.pci.resume();
                self.vcpus.set(GateState::Running);
            }
        })?;
        Ok(())
    }

    /// Lets a paused VM run again.
    pub fn resume(&self) {
        let Some(parts) = self.parts.upgrade() else { return };
        let _life = parts.lock();
        if self.is_paused() {
            parts.bus.pci.resume();
            self.vcpus.set(GateState::Running);
        }
    }

    /// The state of a paused VM, and its memory, which nobody writes until it is resumed; then `also`, before anybody can
    /// resume it. If that says that it has made a snapshot to go on from, the next one is told what has changed since.
    pub fn save<R, E>(
        &self,
        also: impl FnOnce(Saved<'_>) -> Result<(R, Option<Link>), E>,
    ) -> Result<Result<R, E>, SaveError> {
        let parts = self.parts.upgrade().ok_or(SaveError::NotPaused)?;
        let mut track = parts.lock();
        // Parked and suspended: whoever paused it had the lock until then.
        let vcpus = self.vcpus.save().ok_or(SaveError::NotPaused)??;
        let serial = self.serial.save();
        let (clock_index, clock_memory) = parts.bus.clock.save();
        let state = MachineState {
            vcpus,
            vm: parts.vm.save()?,
            functions: parts.bus.pci.save(),
            platform: PlatformState {
                serial_registers: serial.registers,
                serial_fifo: serial.fifo,
                serial_input: serial.input,
                pci_address: parts.bus.pci_address.load(Ordering::SeqCst),
                clock_index: clock_index.into(),
                clock_memory,
                watchdog: Some(parts.bus.watchdog.save()),
                slots: parts.bus.devices.slots(),
                plugged: parts.bus.hotplug.unread(),
            },
        };
        let since = track.changes(&parts.vm);
        let done = also(Saved { memory: &parts.memory, state, since });
        Ok(done.map(|(result, link)| {
            if let Some(link) = link {
                track.begin(&parts.vm, link);
            }
            result
        }))
    }

    /// The last snapshot was made and then lost: the next one is not told what has changed since.
    pub fn forget_snapshot(&self) {
        if let Some(parts) = self.parts.upgrade() {
            parts.lock().forget();
        }
    }
}

/// Makes a machine over `memory` that goes on where `state` was saved, in the snapshot that `link` names.
/// It is paused: [`Handle::resume`] sets it in motion.
pub fn restore(
    kvm: &Kvm,
    config: &MachineConfig,
    devices: &Arc<Devices>,
    (output, end): (Arc<Output>, Arc<EndSlot>),
    (memory, state, link): (GuestMemory, &MachineState, Option<Link>),
) -> Result<Running, MachineError> {
    let vcpus = u32::try_from(state.vcpus.len()).unwrap_or(u32::MAX);
    if vcpus != config.vcpus {
        let what = format!("the VM was saved with {vcpus} vcpus, not {}: give it as many", config.vcpus);
        return Err(MachineError::Saved { what });
    }
    let max = kvm.vcpus_max();
    if vcpus == 0 || vcpus > max {
        return Err(MachineError::Vcpus { asked: vcpus, max });
    }
    // From here on all that is written is a change.
    let (vm, track) = match link {
        None => (Vm::new(kvm, &memory)?, Track::default()),
        Some(link) => {
            let vm = Vm::logged(kvm, &memory)?;
            let track = Track::restored(&vm, link);
            (vm, track)
        }
    };
    let platform = &state.platform;
    let saved = SavedSerial {
        registers: platform.serial_registers.clone(),
        fifo: platform.serial_fifo.clone(),
        input: platform.serial_input.clone(),
    };
    let serial = SerialPort::restored(vm.irq_line(layout::COM1_GSI)?, output, &saved).ok_or_else(|| {
        MachineError::Saved { what: "the saved serial port makes no sense: the state is damaged".to_owned() }
    })?;
    // It goes on from a moment that another VM may go on from too.
    generation::place(&memory)?;
    let created = Created { track, ..Created::of(vm, memory, Arc::new(serial), config.watchdog)? };
    let Equipped { created, pci, devices } = created.equip(devices, &platform.slots)?;
    pci.restore(&state.functions)?;
    let passed = state.vm.passed();
    let mut vcpus = Vec::with_capacity(state.vcpus.len());
    for (id, state) in (0..).zip(&state.vcpus) {
        let vcpu = created.vm.vcpu(kvm, id, config.vcpus)?;
        vcpu.restore(state, passed)?;
        vcpus.push(vcpu);
    }
    created.vm.restore(&state.vm, passed)?;
    let running = Loaded { created, pci, devices, vcpus }.start_as(end, GateState::Paused, platform)?;
    let told = running.handle().generation_changed();
    told.map_err(MachineError::host("tell the guest of its generation identifier"))?;
    Ok(running)
}
