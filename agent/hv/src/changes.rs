//! Which pages of guest memory have changed since they were last asked for: KVM's log of what the guest writes, and the memory's
//! own of what this process writes ([`crate::writes`]).
//!
//! ```text
//!   nothing is logged ── Vm::start_log ──► logged ⟲ Vm::changes: what has changed since the last time
//! ```
//!
//! - A VM that is never asked pays nothing. From `start_log` on the guest takes a fault at its first write to a page after each
//!   turn, and KVM maps its memory in small pages where it may be written.
//! - The log says too much rather than too little: a page that was written with what it held before is in it.
//! - `changes` hands the bits over and clears them in one step for each side, so it can be called in rounds while the VM runs. Who needs
//!   one instant (a snapshot) calls it while vcpus and devices stand still.

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion as _};

use crate::memory::{GuestMemory, PAGE_SIZE};
use crate::vm::{Vm, VmError};
use crate::writes::region_log;

impl Vm {
    /// Logs all changes from now on. What changed before is not told. Again: does nothing but forget what was logged.
    pub fn start_log(&self) -> Result<(), VmError> {
        let flags = KVM_MEM_LOG_DIRTY_PAGES;
        for (slot, region) in (0u32..).zip(self.memory().iter()) {
            region_log(region).start();
            let slot = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the very mapping that `Vm::new` has registered for this slot; only the flags are others.
            unsafe { self.fd.set_user_memory_region(slot) }
                .map_err(VmError::kvm("log the guest's writes to its memory"))?;
        }
        self.changes().map(drop)
    }

    /// One bit a page, the lowest first: the pages in the order of the memory's file ([`crate::memory`]), changed since the log
    /// was started or last asked.
    pub fn changes(&self) -> Result<Vec<u64>, VmError> {
        let mut all = Vec::with_capacity(words(self.memory()));
        for (slot, region) in (0u32..).zip(self.memory().iter()) {
            let mut changed = self
                .fd
                .get_dirty_log(slot, region.size())
                .map_err(VmError::kvm("tell what the guest has written"))?;
            region_log(region).take(&mut changed);
            // KVM fills up to whole words; all regions but the last are such.
            changed.truncate(words_of(region.len()));
            all.append(&mut changed);
        }
        Ok(all)
    }
}

fn words(memory: &GuestMemory) -> usize {
    memory.iter().map(|region| words_of(region.len())).sum()
}

fn words_of(bytes: u64) -> usize {
    usize::try_from(bytes.div_ceil(PAGE_SIZE).div_ceil(u64::from(u64::BITS))).unwrap_or(usize::MAX)
}
