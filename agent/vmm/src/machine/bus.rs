//! Where a guest's access goes: ports and memory that is no RAM.
//!
//! One [`Bus`] for all vcpus; each device behind it has its own lock. What nobody answers reads as ones and swallows
//! writes, as an empty bus does.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use serio_hv::IoHandler;
use serio_virtio::PciBus;

use super::hotplug::Hotplug;
use super::power;
use super::watchdog::Watchdog;
use crate::devices::Devices;
use crate::end::EndSlot;
use crate::layout;
use serio_devices::count::Count;
use serio_devices::rtc::Rtc;
use serio_devices::serial::SerialPort;

/// PCI configuration mechanism #1: address register, data register (PCI 3.0 §3.2.2.3.2).
const PCI_ADDRESS_PORT: u16 = 0xcf8;
const PCI_DATA_PORT: u16 = 0xcfc;
const PCI_ADDRESS_ENABLE: u32 = 1 << 31;

const WATCHDOG_COUNT_PORT: u16 = layout::WATCHDOG_PORT + 4;

/// All that answers.
pub(super) struct Bus {
    pub(super) serial: Arc<SerialPort>,
    pub(super) clock: Rtc,
    pub(super) watchdog: Watchdog,
    pub(super) pci: PciBus,
    pub(super) hotplug: Arc<Hotplug>,
    /// For those that leave.
    pub(super) devices: Arc<Devices>,
    pub(super) end: Arc<EndSlot>,
    pub(super) pci_address: AtomicU32,
}

/// Why one vcpu has left the guest, how often; written by its thread only.
#[derive(Debug, Default)]
pub(super) struct Exits {
    pub(super) port_reads: Count,
    pub(super) port_writes: Count,
    pub(super) memory_reads: Count,
    pub(super) memory_writes: Count,
    pub(super) kicks: Count,
}

/// One vcpu's view of the bus.
pub(super) struct BusHandle {
    bus: Arc<Bus>,
    exits: Arc<[Exits]>,
    vcpu: usize,
}

impl BusHandle {
    pub(super) fn new(bus: Arc<Bus>, exits: Arc<[Exits]>, vcpu: u32) -> BusHandle {
        BusHandle { bus, exits, vcpu: usize::try_from(vcpu).unwrap_or(usize::MAX) }
    }

    /// One more of these.
    pub(super) fn count(&self, which: impl FnOnce(&Exits) -> &Count) {
        if let Some(exits) = self.exits.get(self.vcpu) {
            which(exits).add(1);
        }
    }

    /// Whether there is a reason to end.
    pub(super) fn is_over(&self) -> bool {
        self.bus.end.is_set()
    }
}

impl Bus {
    fn serial_register(port: u16) -> Option<u8> {
        let offset = port.checked_sub(layout::COM1_PORT).filter(|offset| *offset < 8)?;
        u8::try_from(offset).ok()
    }

    /// Where an access to the data port falls in ECAM, if the address register is set to something on bus 0.
    fn pci_offset(&self, port: u16, len: usize) -> Option<u64> {
        let lane = port.checked_sub(PCI_DATA_PORT).filter(|lane| *lane < 4)?;
        let address = self.pci_address.load(Ordering::SeqCst);
        let bus = (address >> 16) & 0xff;
        if address & PCI_ADDRESS_ENABLE == 0 || bus != 0 || usize::from(lane).saturating_add(len) > 4 {
            return None;
        }
        let function = u64::from((address >> 8) & 0xff);
        Some(function << 12 | u64::from(address & 0xfc) | u64::from(lane))
    }

    fn ecam_offset(address: u64, len: usize) -> Option<u64> {
        let offset = address.checked_sub(layout::ECAM_BASE)?;
        let end = offset.checked_add(len as u64)?;
        (end <= layout::ECAM_BYTES).then_some(offset)
    }

    fn watchdog_read(&self, port: u16, len: usize) -> Option<u32> {
        match port {
            layout::WATCHDOG_PORT if len == 4 => Some(self.watchdog.read_control()),
            WATCHDOG_COUNT_PORT if len == 4 => Some(self.watchdog.read_count()),
            _ => None,
        }
    }

    fn watchdog_write(&self, port: u16, value: u32) {
        match port {
            layout::WATCHDOG_PORT => self.watchdog.write_control(value),
            WATCHDOG_COUNT_PORT => self.watchdog.write_count(value),
            _ => {}
        }
    }

    /// The guest has let go of a device.
    fn eject(&self, slot: u8) {
        // Its threads end here. Its files stay open for as long as whoever asked for this holds them.
        drop(self.pci.remove(slot));
        self.devices.unplug(slot);
        self.hotplug.left(slot);
    }

    fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(offset) = self.pci_offset(port, data.len()) {
            self.pci.ecam_read(offset, data);
        } else if port == PCI_ADDRESS_PORT && data.len() == 4 {
            data.copy_from_slice(&self.pci_address.load(Ordering::SeqCst).to_le_bytes());
        } else if let Some(value) = self.watchdog_read(port, data.len()) {
            data.copy_from_slice(&value.to_le_bytes());
        } else if let Some(value) = self.hotplug.read(port, data.len()) {
            data.copy_from_slice(&value.to_le_bytes());
        } else if let [byte] = data {
            if let Some(offset) = Bus::serial_register(port) {
                *byte = self.serial.read(offset);
            } else if port == layout::CLOCK_PORT + 1 {
                *byte = self.clock.read();
            } else if let Some(value) = power::read(port) {
                *byte = value;
            }
        }
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        if let Some(offset) = self.pci_offset(port, data.len()) {
            self.pci.ecam_write(offset, data);
        } else if port == PCI_ADDRESS_PORT {
            if let Ok(bytes) = <[u8; 4]>::try_from(data) {
                self.pci_address.store(u32::from_le_bytes(bytes), Ordering::SeqCst);
            }
        } else if let Ok(bytes) = <[u8; 4]>::try_from(data) {
            let value = u32::from_le_bytes(bytes);
            self.watchdog_write(port, value);
            self.hotplug.leaving(port, value).for_each(|slot| self.eject(slot));
        } else if let [byte] = data {
            if let Some(offset) = Bus::serial_register(port) {
                self.serial.write(offset, *byte);
            } else if port == layout::CLOCK_PORT {
                self.clock.select(*byte);
            } else if port == layout::CLOCK_PORT + 1 {
                self.clock.write(*byte);
            } else if let Some(end) = power::write(port, *byte) {
                self.end.set(end);
            }
        }
    }
}

impl IoHandler for BusHandle {
    fn port_read(&mut self, port: u16, data: &mut [u8]) {
        self.count(|exits| &exits.port_reads);
        self.bus.port_read(port, data);
    }

    fn port_write(&mut self, port: u16, data: &[u8]) {
        self.count(|exits| &exits.port_writes);
        self.bus.port_write(port, data);
    }

    fn memory_read(&mut self, address: u64, data: &mut [u8]) {
        self.count(|exits| &exits.memory_reads);
        if let Some(offset) = Bus::ecam_offset(address, data.len()) {
            self.bus.pci.ecam_read(offset, data);
        } else if !self.bus.pci.mmio_read(address, data) {
            data.fill(0xff);
        }
    }

    fn memory_write(&mut self, address: u64, data: &[u8]) {
        self.count(|exits| &exits.memory_writes);
        if let Some(offset) = Bus::ecam_offset(address, data.len()) {
            self.bus.pci.ecam_write(offset, data);
        } else {
            self.bus.pci.mmio_write(address, data);
        }
    }
}
