//! One VM: memory slots, interrupt chip, doorbells, and where lines and vcpus come from.
//!
//! Owns the VM's descriptor and holds guest memory for as long as KVM may write to it. Never runs guest code (that
//! is [`Vcpu`]) and knows no device. `Sync`: devices move their doorbells from vcpu threads.

use std::sync::{Arc, Mutex};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion as _};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

use crate::cpuid::Topology;
use crate::irq::{IrqLine, MsiLine, Routes};
use crate::kvm::Kvm;
use crate::memory::GuestMemory;
use crate::vcpu::Vcpu;
use crate::writes::region_log;

/// Three pages that Intel's hardware needs for real mode; below the last page of 4 GiB, far from RAM and devices.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// Why KVM refused something about a VM.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// A call to KVM failed.
    #[error("KVM refused to {what}")]
    Kvm {
        /// What was asked of it.
        what: &'static str,
        /// What it answered.
        #[source]
        source: errno::Error,
    },
    /// An eventfd could not be made.
    #[error("cannot make an eventfd: raise the limit of open files")]
    EventFd(#[source] std::io::Error),
    /// KVM has no room for another interrupt.
    #[error("the VM has used up its {0} interrupt lines: give it fewer devices or queues")]
    Lines(u32),
    /// A vcpu's control page could not be mapped.
    #[error("cannot map the control page of vcpu {id}")]
    Map {
        /// Which vcpu.
        id: u32,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A saved state does not have KVM's layout.
    #[error(
        "the saved {what} has {bytes} bytes where {expected} are expected: it is damaged, or of another machine"
    )]
    State {
        /// Which part.
        what: &'static str,
        /// Its length.
        bytes: usize,
        /// KVM's.
        expected: usize,
    },
    /// The guest knows of features that it would not find.
    #[error(
        "the guest was saved on a processor with {}, which this host's processor or KVM lacks: restore it on a host that has all of it, \
         and give VMs that are to move a CPU baseline",
        missing.join(", ")
    )]
    Features {
        /// Their names.
        missing: Vec<String>,
    },
    /// A doorbell of a width that no bus has.
    #[error("a doorbell of {0} bytes: only 1, 2, 4, 8, or 0 for any width")]
    Width(u8),
}

impl VmError {
    pub(crate) fn kvm(what: &'static str) -> impl FnOnce(errno::Error) -> VmError {
        move |source| VmError::Kvm { what, source }
    }
}

/// Where a doorbell rings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoAddr {
    /// A guest physical address.
    Mmio(u64),
    /// An I/O port.
    Pio(u16),
}

/// One VM of KVM. Always behind an [`Arc`]: lines and devices hold it.
#[derive(Debug)]
pub struct Vm {
    pub(crate) fd: VmFd,
    pub(crate) routes: Mutex<Routes>,
    memory: GuestMemory,
}

impl Vm {
    /// Makes a VM over `memory`, with interrupt chip, without vcpus.
    pub fn new(kvm: &Kvm, memory: &GuestMemory) -> Result<Arc<Vm>, VmError> {
        Vm::with_flags(kvm, memory, 0)
    }

    /// The same, and logs all changes of its memory from the beginning: see [`Vm::changes`]. [`Vm::start_log`] afterwards would
    /// cost milliseconds, as later slots do.
    pub fn logged(kvm: &Kvm, memory: &GuestMemory) -> Result<Arc<Vm>, VmError> {
        memory.iter().for_each(|region| region_log(region).start());
        Vm::with_flags(kvm, memory, KVM_MEM_LOG_DIRTY_PAGES)
    }

    fn with_flags(kvm: &Kvm, memory: &GuestMemory, flags: u32) -> Result<Arc<Vm>, VmError> {
        let fd = kvm.fd.create_vm().map_err(VmError::kvm("create a VM"))?;
        // Before the interrupt chip: see the head of the crate.
        for (slot, region) in memory.iter().enumerate() {
            let slot = kvm_userspace_memory_region {
                slot: slot as u32,
                flags,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the range is one live mapping of exactly this size, and `Vm` holds `memory` for as long as
            // the VM exists, so KVM never writes to memory that is someone else's by then.
            unsafe { fd.set_user_memory_region(slot) }.map_err(VmError::kvm("register guest memory"))?;
        }
        fd.set_tss_address(TSS_ADDRESS).map_err(VmError::kvm("place the task state segment"))?;
        fd.create_irq_chip().map_err(VmError::kvm("create the interrupt chip"))?;
        Ok(Arc::new(Vm { fd, routes: Mutex::new(Routes::new()), memory: memory.clone() }))
    }

    /// The memory that this VM runs in.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Makes vcpu `id` of `vcpus`; number 0 starts the others.
    pub fn vcpu(self: &Arc<Self>, kvm: &Kvm, id: u32, vcpus: u32) -> Result<Vcpu, VmError> {
        Vcpu::new(self.clone(), kvm, Topology { id, vcpus })
    }

    /// Makes guest writes to `addr` ring `event` without leaving the kernel.
    ///
    /// With a `datamatch` only writes of `len_bytes` that carry this value ring; without one, writes of any width.
    pub fn ioeventfd(
        &self,
        addr: IoAddr,
        len_bytes: u8,
        datamatch: Option<u64>,
        event: &EventFd,
    ) -> Result<(), VmError> {
        let at = event_address(addr);
        match (datamatch, len_bytes) {
            (None, 0 | 1 | 2 | 4 | 8) => self.fd.register_ioevent(event, &at, NoDatamatch),
            (Some(d), 1) => self.fd.register_ioevent(event, &at, d as u8),
            (Some(d), 2) => self.fd.register_ioevent(event, &at, d as u16),
            (Some(d), 4) => self.fd.register_ioevent(event, &at, d as u32),
            (Some(d), 8) => self.fd.register_ioevent(event, &at, d),
            _ => return Err(VmError::Width(len_bytes)),
        }
        .map_err(VmError::kvm("add a doorbell (ioeventfd)"))
    }

    /// Undoes [`Vm::ioeventfd`], with the same arguments.
    pub fn remove_ioeventfd(
        &self,
        addr: IoAddr,
        len_bytes: u8,
        datamatch: Option<u64>,
        event: &EventFd,
    ) -> Result<(), VmError> {
        let at = event_address(addr);
        match (datamatch, len_bytes) {
            (None, 0 | 1 | 2 | 4 | 8) => self.fd.unregister_ioevent(event, &at, NoDatamatch),
            (Some(d), 1) => self.fd.unregister_ioevent(event, &at, d as u8),
            (Some(d), 2) => self.fd.unregister_ioevent(event, &at, d as u16),
            (Some(d), 4) => self.fd.unregister_ioevent(event, &at, d as u32),
            (Some(d), 8) => self.fd.unregister_ioevent(event, &at, d),
            _ => return Err(VmError::Width(len_bytes)),
        }
        .map_err(VmError::kvm("remove a doorbell (ioeventfd)"))
    }

    /// A new interrupt for a PCI function: unrouted until the guest programs its message.
    pub fn msi_line(self: &Arc<Self>) -> Result<MsiLine, VmError> {
        MsiLine::new(self.clone())
    }

    /// Pin `gsi` of the IO-APIC, edge-triggered by its eventfd.
    pub fn irq_line(self: &Arc<Self>, gsi: u32) -> Result<IrqLine, VmError> {
        IrqLine::new(self, gsi)
    }
}

fn event_address(addr: IoAddr) -> IoEventAddress {
    match addr {
        IoAddr::Mmio(address) => IoEventAddress::Mmio(address),
        IoAddr::Pio(port) => IoEventAddress::Pio(u64::from(port)),
    }
}
