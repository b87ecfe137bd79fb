//! Interrupt lines: an eventfd that the kernel turns into an interrupt of the guest.
//!
//! Owns the table of routes (GSI → IO-APIC pin or MSI message) that KVM takes only as a whole. The pins of the two
//! old interrupt controllers are left out on purpose: the machine is ACPI hardware-reduced, a guest never programs
//! them, and a pin of theirs that rose during its boot would be a stray interrupt.
//!
//! Threads: the table is behind a lock, held for one ioctl; raising a line takes no lock.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::vm::{Vm, VmError};

/// Pins of KVM's IO-APIC; the GSIs of MSI lines start behind them.
const IOAPIC_PINS: u32 = 24;

/// KVM's own limit of routes (KVM_MAX_IRQ_ROUTES).
const LINES_MAX: u32 = 4096;

/// What an MSI writes, and where (PCI 3.0 §6.8.1): the guest chose both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsiMessage {
    /// The address written to; on x86 it names the processor.
    pub address: u64,
    /// The value written; on x86 it names the vector.
    pub data: u32,
}

/// The routes that KVM shall have. A route that is not here does not exist.
#[derive(Debug)]
pub(crate) struct Routes {
    messages: BTreeMap<u32, MsiMessage>,
    used: Vec<bool>,
}

impl Routes {
    pub(crate) fn new() -> Routes {
        Routes { messages: BTreeMap::new(), used: Vec::new() }
    }

    fn take(&mut self) -> Option<u32> {
        let index = match self.used.iter().position(|used| !used) {
            Some(free) => free,
            None => {
                self.used.push(false);
                self.used.len() - 1
            }
        };
        let gsi = u32::try_from(index).ok()?.checked_add(IOAPIC_PINS)?;
        if gsi >= LINES_MAX {
            return None;
        }
        *self.used.get_mut(index)? = true;
        Some(gsi)
    }

    fn give_back(&mut self, gsi: u32) {
        let index = gsi.saturating_sub(IOAPIC_PINS) as usize;
        if let Some(used) = self.used.get_mut(index) {
            *used = false;
        }
    }

    fn entries(&self) -> Vec<kvm_irq_routing_entry> {
        let pin = |gsi| {
            let mut entry =
                kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
            entry.u.irqchip = kvm_irq_routing_irqchip { irqchip: KVM_IRQCHIP_IOAPIC, pin: gsi };
            entry
        };
        let msi = |(&gsi, message): (&u32, &MsiMessage)| {
            let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
            entry.u.msi = kvm_irq_routing_msi {
                address_lo: message.address as u32,
                address_hi: (message.address >> 32) as u32,
                data: message.data,
                ..Default::default()
            };
            entry
        };
        (0..IOAPIC_PINS).map(pin).chain(self.messages.iter().map(msi)).collect()
    }
}

/// Poisoned only by a panic, which ends the process anyway; the table itself is whole at every step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn set_routes(vm: &Vm, routes: &Routes) -> Result<(), VmError> {
    const WHAT: &str = "set the interrupt routes";
    let table = KvmIrqRouting::from_entries(&routes.entries())
        .map_err(|_| VmError::Kvm { what: WHAT, source: errno::Error::new(libc::E2BIG) })?;
    vm.fd.set_gsi_routing(&table).map_err(VmError::kvm(WHAT))
}

fn event_fd() -> Result<EventFd, VmError> {
    EventFd::new(EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(VmError::EventFd)
}

/// One interrupt of a PCI function: its eventfd, wired to whatever message the guest last programmed.
#[derive(Debug)]
pub struct MsiLine {
    vm: Arc<Vm>,
    gsi: u32,
    event: EventFd,
    /// What is set in the kernel now, and whether the eventfd is wired to the GSI yet.
    state: Mutex<LineState>,
}

#[derive(Debug, Default)]
struct LineState {
    routed: Option<MsiMessage>,
    wired: bool,
}

impl MsiLine {
    pub(crate) fn new(vm: Arc<Vm>) -> Result<MsiLine, VmError> {
        let event = event_fd()?;
        let gsi = lock(&vm.routes).take().ok_or(VmError::Lines(LINES_MAX - IOAPIC_PINS))?;
        Ok(MsiLine { vm, gsi, event, state: Mutex::default() })
    }

    /// Sends the line's interrupts as `message` from now on.
    pub fn route(&self, message: MsiMessage) -> Result<(), VmError> {
        let mut state = lock(&self.state);
        if state.routed != Some(message) {
            let mut routes = lock(&self.vm.routes);
            routes.messages.insert(self.gsi, message);
            set_routes(&self.vm, &routes)?;
            state.routed = Some(message);
        }
        // Wired at its first use: a VM starts with many lines, and its guest uses few of them.
        if !state.wired {
            self.vm
                .fd
                .register_irqfd(&self.event, self.gsi)
                .map_err(VmError::kvm("wire an interrupt (irqfd)"))?;
            state.wired = true;
        }
        Ok(())
    }

    /// Delivers nothing until the next [`MsiLine::route`]: what is signalled until then stays in the eventfd, and is delivered
    /// by it.
    pub fn hold(&self) -> Result<(), VmError> {
        let mut state = lock(&self.state);
        if state.wired {
            self.vm
                .fd
                .unregister_irqfd(&self.event, self.gsi)
                .map_err(VmError::kvm("hold an interrupt (irqfd)"))?;
            state.wired = false;
        }
        Ok(())
    }

    /// Raises the interrupt.
    pub fn trigger(&self) -> std::io::Result<()> {
        self.event.write(1)
    }

    /// What raises the interrupt when written, for a device thread or a vhost backend.
    pub fn event_fd(&self) -> &EventFd {
        &self.event
    }
}

impl Drop for MsiLine {
    fn drop(&mut self) {
        let wired = lock(&self.state).wired;
        // The VM is going away too in most cases; an error here has nobody left to act on it.
        if wired {
            let _ = self.vm.fd.unregister_irqfd(&self.event, self.gsi);
        }
        let mut routes = lock(&self.vm.routes);
        routes.messages.remove(&self.gsi);
        routes.give_back(self.gsi);
    }
}

/// One pin of the IO-APIC, edge-triggered.
#[derive(Debug)]
pub struct IrqLine {
    event: EventFd,
}

impl IrqLine {
    pub(crate) fn new(vm: &Vm, gsi: u32) -> Result<IrqLine, VmError> {
        let event = event_fd()?;
        vm.fd.register_irqfd(&event, gsi).map_err(VmError::kvm("wire an interrupt pin (irqfd)"))?;
        Ok(IrqLine { event })
    }

    /// Raises the interrupt.
    pub fn trigger(&self) -> std::io::Result<()> {
        self.event.write(1)
    }

    /// What raises the interrupt when written.
    pub fn event_fd(&self) -> &EventFd {
        &self.event
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gsi_given_back_is_used_again() {
        let mut routes = Routes::new();
        let first = routes.take().expect("free");
        let second = routes.take().expect("free");
        assert_eq!((first, second), (IOAPIC_PINS, IOAPIC_PINS + 1));
        routes.give_back(first);
        assert_eq!(routes.take(), Some(first));
    }

    #[test]
    fn lines_end_where_kvm_ends() {
        let mut routes = Routes::new();
        let count = std::iter::from_fn(|| routes.take()).count();
        assert_eq!(count as u32, LINES_MAX - IOAPIC_PINS);
    }
}
