//! The register state in which the first vcpu starts, as boot protocols demand it.
//!
//! Two states exist: 64-bit long mode (the "64-bit boot protocol" of Linux' Documentation/arch/x86/boot.rst) and
//! 32-bit protected mode without paging (the PVH boot ABI). Selectors are 0x10 for code and 0x18 for data in both,
//! as Linux' protocol says; PVH leaves them open. Never writes guest memory: the loader places [`GDT`] and the page
//! tables where it told us they lie.

use kvm_bindings::{Msrs, kvm_dtable, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

use crate::vm::VmError;

const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;

const CR0_PROTECTED: u64 = 1;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG_ENABLE: u64 = 1 << 8;
const EFER_LONG_ACTIVE: u64 = 1 << 10;
/// The bit of RFLAGS that always reads as one.
const RFLAGS_FIXED: u64 = 2;

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs enabled, everything write-back unless a range says otherwise.
const MTRR_WRITE_BACK: u64 = (1 << 11) | 6;

/// The mode that the first vcpu starts in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BootMode {
    /// 64-bit, paging on.
    Long {
        /// Guest address of the top page table, which maps all that the entry code touches to itself.
        page_table: u64,
    },
    /// 32-bit, flat, paging off.
    Protected,
}

/// Where and how the first vcpu starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BootRegisters {
    /// The processor mode.
    pub mode: BootMode,
    /// Guest address of the first instruction.
    pub entry: u64,
    /// RSP and RBP.
    pub stack: u64,
    /// RSI: the zero page for Linux' protocol.
    pub rsi: u64,
    /// RBX: the start info for PVH.
    pub rbx: u64,
    /// Guest address where the loader has written [`GDT`] of the same mode.
    pub gdt_base: u64,
}

/// Descriptor tables that fit the selectors set here.
pub struct GDT;

impl GDT {
    /// The table's length in bytes.
    pub const BYTES: usize = 6 * 8;

    /// The table for `mode`, as bytes for guest memory.
    pub fn bytes(mode: BootMode) -> [u8; GDT::BYTES] {
        // The task's descriptor takes two slots in long mode; its base is 0, so the upper half is zero.
        let table = [
            0,
            0,
            descriptor(&code_segment(mode)),
            descriptor(&data_segment()),
            descriptor(&task_segment()),
            0,
        ];
        let mut bytes = [0; GDT::BYTES];
        for (slot, entry) in bytes.chunks_exact_mut(8).zip(table) {
            slot.copy_from_slice(&u64::to_le_bytes(entry));
        }
        bytes
    }
}

/// Segment as KVM wants it → descriptor as the processor reads it (SDM volume 3, figure 3-8).
fn descriptor(segment: &kvm_segment) -> u64 {
    let base = segment.base;
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    let access = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7;
    let flags = u64::from(segment.avl)
        | u64::from(segment.l) << 1
        | u64::from(segment.db) << 2
        | u64::from(segment.g) << 3;
    (limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | access << 40
        | ((limit >> 16) & 0xf) << 48
        | flags << 52
        | ((base >> 24) & 0xff) << 56
}

fn flat(selector: u16, kind: u8) -> kvm_segment {
    kvm_segment { limit: u32::MAX, selector, type_: kind, present: 1, s: 1, g: 1, ..Default::default() }
}

fn code_segment(mode: BootMode) -> kvm_segment {
    const EXECUTE_READ_ACCESSED: u8 = 0b1011;
    let segment = flat(CODE_SELECTOR, EXECUTE_READ_ACCESSED);
    match mode {
        BootMode::Long { .. } => kvm_segment { l: 1, ..segment },
        BootMode::Protected => kvm_segment { db: 1, ..segment },
    }
}

fn data_segment() -> kvm_segment {
    const READ_WRITE_ACCESSED: u8 = 0b0011;
    kvm_segment { db: 1, ..flat(DATA_SELECTOR, READ_WRITE_ACCESSED) }
}

fn task_segment() -> kvm_segment {
    const BUSY_TASK: u8 = 0b1011;
    kvm_segment { limit: 0x67, selector: TASK_SELECTOR, type_: BUSY_TASK, present: 1, ..Default::default() }
}

fn system_registers(boot: &BootRegisters, sregs: &mut kvm_sregs) {
    let data = data_segment();
    sregs.cs = code_segment(boot.mode);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = task_segment();
    sregs.gdt = kvm_dtable { base: boot.gdt_base, limit: (GDT::BYTES - 1) as u16, ..Default::default() };
    sregs.idt = kvm_dtable::default();
    match boot.mode {
        BootMode::Long { page_table } => {
            sregs.cr0 = CR0_PROTECTED | CR0_EXTENSION_TYPE | CR0_PAGING;
            sregs.cr3 = page_table;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LONG_ENABLE | EFER_LONG_ACTIVE;
        }
        BootMode::Protected => {
            sregs.cr0 = CR0_PROTECTED | CR0_EXTENSION_TYPE;
            sregs.cr4 = 0;
            sregs.efer = 0;
        }
    }
}

/// Puts the vcpu behind `fd` into the state that `boot` describes.
pub(crate) fn set_boot_registers(fd: &VcpuFd, boot: &BootRegisters) -> Result<(), VmError> {
    let mut sregs = fd.get_sregs().map_err(VmError::kvm("read a vcpu's system registers"))?;
    system_registers(boot, &mut sregs);
    fd.set_sregs(&sregs).map_err(VmError::kvm("set a vcpu's system registers"))?;
    let regs = kvm_regs {
        rip: boot.entry,
        rsp: boot.stack,
        rbp: boot.stack,
        rsi: boot.rsi,
        rbx: boot.rbx,
        rflags: RFLAGS_FIXED,
        ..Default::default()
    };
    fd.set_regs(&regs).map_err(VmError::kvm("set a vcpu's registers"))
}

/// Sets the model-specific registers that firmware would have set.
pub(crate) fn set_boot_msrs(fd: &VcpuFd) -> Result<(), VmError> {
    const WHAT: &str = "set a vcpu's model-specific registers";
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let entries =
        [entry(MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING), entry(MSR_MTRR_DEF_TYPE, MTRR_WRITE_BACK)];
    let msrs = Msrs::from_entries(&entries).expect("two entries fit");
    // A host that takes only some of them (a processor without MTRRs) boots guests all the same.
    fd.set_msrs(&msrs).map_err(VmError::kvm(WHAT))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_the_well_known_ones() {
        let entry = |mode, index: usize| {
            let bytes = GDT::bytes(mode);
            u64::from_le_bytes(bytes[index * 8..index * 8 + 8].try_into().expect("eight"))
        };
        let long = BootMode::Long { page_table: 0 };
        assert_eq!(entry(long, 2), 0x00af_9b00_0000_ffff);
        assert_eq!(entry(BootMode::Protected, 2), 0x00cf_9b00_0000_ffff);
        assert_eq!(entry(long, 3), 0x00cf_9300_0000_ffff);
        assert_eq!(entry(long, 4), 0x0000_8b00_0000_0067);
    }
}
