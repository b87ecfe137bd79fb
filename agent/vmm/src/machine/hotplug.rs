//! Devices that come and go while the guest runs: the registers that the DSDT's methods use, and who waits for them.
//!
//! ```text
//!   0x610 up      read: bit n: a device has come at 00:n.0; reading clears it
//!   0x614 down    read: bit n: the device at 00:n.0 shall go; reading clears it
//!   0x618 eject   write: bit n: the guest has let go of 00:n.0 (_EJ0)
//! ```
//!
//! A change sets a bit and raises an edge of its interrupt pin; the event device's method reads both registers and notifies
//! the guest of each device. An edge that comes while nobody listens, early in a boot, is lost: so it is raised again for
//! a while as long as a bit is unread ([`Handle::remind`]).
//!
//! Invariants: only a device whose removal was asked for, and has not been given up since, leaves by an eject; whatever
//! else a guest writes changes nothing. It leaves the bus and the VM's devices in one, on the vcpu's thread: whoever stops
//! the vcpus sees it whole.
//!
//! Threads: vcpus read and write; those who plug and unplug wait here, without any other lock.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serio_hv::IrqLine;
use serio_virtio::{PciBus, VirtioDevice, VirtioPci};

use super::state::Parts;
use super::{Handle, MachineError};
use crate::devices::{Devices, Disk, Nic};
use crate::layout;

const UP_PORT: u16 = layout::HOTPLUG_PORT;
const DOWN_PORT: u16 = layout::HOTPLUG_PORT + 4;
const EJECT_PORT: u16 = layout::HOTPLUG_PORT + 8;

/// How often the guest is told again.
pub const REMIND: Duration = Duration::from_millis(500);
/// How many times: a guest that has not listened by then has no driver for it.
const REMINDERS: u32 = 240;

/// Why a device was not plugged or unplugged. It is as it was then.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// The machine is over, or about to be.
    #[error("the guest is being reset or ends: ask again")]
    Over,
    /// Nobody would notice.
    #[error("the VM is paused: resume it first")]
    Paused,
    /// No device number is free.
    #[error("the VM has as many devices as it can have: remove one first")]
    Full,
    /// Another request waits for it.
    #[error("it is being removed already")]
    Asked,
    /// The guest did nothing about it.
    #[error(
        "the guest did not let go of it within {} s: is it in use there (mounted, up), or has its kernel no ACPI hot plug? \
         The device stays", .0.as_secs()
    )]
    NotEjected(Duration),
    /// The device does not fit.
    #[error("the device cannot be put on the bus")]
    Device(#[from] MachineError),
}

/// The registers.
pub(super) struct Hotplug {
    registers: Mutex<Registers>,
    changed: Condvar,
    line: IrqLine,
}

#[derive(Debug, Default)]
struct Registers {
    up: u32,
    down: u32,
    /// Devices that may leave.
    leaving: u32,
    reminders: u32,
}

fn bit(slot: u8) -> u32 {
    1u32.checked_shl(slot.into()).unwrap_or(0)
}

impl Hotplug {
    pub(super) fn new(line: IrqLine, up: u32) -> Hotplug {
        let reminders = if up == 0 { 0 } else { REMINDERS };
        let registers = Mutex::new(Registers { up, reminders, ..Registers::default() });
        Hotplug { registers, changed: Condvar::new(), line }
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        // Whole after each statement.
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What has come and the guest does not know of.
    pub(super) fn unread(&self) -> u32 {
        self.lock().up
    }

    pub(super) fn read(&self, port: u16, len: usize) -> Option<u32> {
        let mut registers = self.lock();
        match port {
            UP_PORT if len == 4 => Some(std::mem::take(&mut registers.up)),
            DOWN_PORT if len == 4 => Some(std::mem::take(&mut registers.down)),
            EJECT_PORT if len == 4 => Some(0),
            _ => None,
        }
    }

    /// The devices that leave by this write.
    pub(super) fn leaving(&self, port: u16, value: u32) -> impl Iterator<Item = u8> {
        let leaving = if port == EJECT_PORT { value & self.lock().leaving } else { 0 };
        (0u8..32).filter(move |slot| leaving & bit(*slot) != 0)
    }

    /// It has left.
    pub(super) fn left(&self, slot: u8) {
        let mut registers = self.lock();
        registers.leaving &= !bit(slot);
        registers.down &= !bit(slot);
        registers.up &= !bit(slot);
        self.changed.notify_all();
    }

    fn tell(&self, change: impl FnOnce(&mut Registers)) {
        let mut registers = self.lock();
        change(&mut registers);
        registers.reminders = REMINDERS;
        // Fails only when the counter is full: then it is about to be delivered anyway.
        let _ = self.line.trigger();
    }

    /// Raises the interrupt again if something is unread; whether it will be worth another time.
    fn remind(&self) -> bool {
        let mut registers = self.lock();
        if registers.up | registers.down == 0 || registers.reminders == 0 {
            return false;
        }
        registers.reminders = registers.reminders.saturating_sub(1);
        let _ = self.line.trigger();
        true
    }

    fn is_pending(&self) -> bool {
        let registers = self.lock();
        registers.up | registers.down != 0 && registers.reminders > 0
    }

    /// Waits until it has left; gives up after `limit`, or when the machine is over.
    fn wait(&self, slot: u8, limit: Duration, is_over: impl Fn() -> bool) -> Result<(), PlugError> {
        let end = Instant::now() + limit;
        let mut registers = self.lock();
        while registers.leaving & bit(slot) != 0 {
            let left = end.saturating_duration_since(Instant::now());
            let over = is_over();
            if over || left.is_zero() {
                registers.leaving &= !bit(slot);
                registers.down &= !bit(slot);
                return Err(if over { PlugError::Over } else { PlugError::NotEjected(limit) });
            }
            let waited = self.changed.wait_timeout(registers, left.min(REMIND));
            registers = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }
}

impl Handle {
    fn plug(
        &self,
        devices: &Devices,
        device: Box<dyn VirtioDevice>,
        keep: impl FnOnce(u8),
    ) -> Result<(), PlugError> {
        let parts = self.parts.upgrade().filter(|_| !self.is_over()).ok_or(PlugError::Over)?;
        let _life = parts.lock();
        if self.is_paused() {
            return Err(PlugError::Paused);
        }
        let slot = devices.free_slot().ok_or(PlugError::Full)?;
        insert(&parts, slot, device)?;
        keep(slot);
        parts.bus.hotplug.tell(|registers| registers.up |= bit(slot));
        Ok(())
    }

    /// Gives the guest one more disk, at that place of the VM's configuration.
    pub fn plug_disk(&self, devices: &Devices, position: usize, disk: Arc<Disk>) -> Result<(), PlugError> {
        let device = devices.blk(&disk);
        self.plug(devices, device, |slot| devices.plug_disk(position, disk, slot))
    }

    /// Gives the guest one more card, at that place of the VM's configuration.
    pub fn plug_nic(&self, devices: &Devices, position: usize, nic: Arc<Nic>) -> Result<(), PlugError> {
        let device = Devices::net(&nic);
        self.plug(devices, device, |slot| devices.plug_nic(position, nic, slot))
    }

    /// Asks the guest to let go of the device at `slot`, and waits for it; `told` when it was asked.
    pub fn unplug(&self, slot: u8, limit: Duration, told: impl FnOnce()) -> Result<(), PlugError> {
        let parts = self.parts.upgrade().filter(|_| !self.is_over()).ok_or(PlugError::Over)?;
        {
            let _life = parts.lock();
            if self.is_paused() {
                return Err(PlugError::Paused);
            }
            let asked = parts.bus.hotplug.lock().leaving & bit(slot) != 0;
            if asked {
                return Err(PlugError::Asked);
            }
            parts.bus.hotplug.tell(|registers| {
                registers.down |= bit(slot);
                registers.leaving |= bit(slot);
            });
        }
        // The machine must be able to end meanwhile: nothing of it is kept but this.
        let hotplug = parts.bus.hotplug.clone();
        drop(parts);
        told();
        hotplug.wait(slot, limit, || self.is_over())
    }

    /// Tells the guest again of what it has not looked at.
    pub fn remind(&self) -> bool {
        self.parts.upgrade().is_some_and(|parts| parts.bus.hotplug.remind())
    }

    /// Whether there is something that it would be told again.
    pub fn is_reminding(&self) -> bool {
        self.parts.upgrade().is_some_and(|parts| parts.bus.hotplug.is_pending())
    }
}

fn insert(parts: &Parts, slot: u8, device: Box<dyn VirtioDevice>) -> Result<(), MachineError> {
    let pci: &PciBus = &parts.bus.pci;
    let function = VirtioPci::new(device, Arc::new(parts.vm.clone()), parts.memory.clone())?;
    Ok(pci.insert(slot, Box::new(function))?)
}
