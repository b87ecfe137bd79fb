//! What KVM keeps of a VM and its vcpus, taken out and put back: for snapshots, and for a VM that moves.
//!
//! ```text
//!   Vm::save   ──► VmState    interrupt controllers, the paravirtual clock
//!   Vcpu::save ──► VcpuState  CPUID, registers, FPU, local APIC, MSRs, pending events
//! ```
//!
//! - KVM's structures go in as their bytes: their layout is the kernel's interface and does not change. Each is taken back
//!   only with exactly its length; what it says is checked by the kernel, which trusts no caller either.
//! - Both are protobuf messages: fields are added and their numbers never used again. What a state does not have is left as
//!   a new vcpu has it.
//! - MSRs are those that KVM lists. One that it does not give or take here is passed over and counted: hosts differ, and a
//!   guest that never used it does not miss it.
//! - The guest's clocks go on as if it had run all the time by the host's wall clock: its time of day is right at once, and what
//!   was to happen meanwhile is due. KVM's note that it was stopped keeps its kernel from taking that for a hang. A host whose
//!   clock was behind when it was saved, or is now, costs the guest nothing: no clock goes back.
//! - A vcpu is saved and restored between two runs only, after [`crate::Vcpu::complete`].

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, Msrs, kvm_clock_data,
    kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::errno;

use crate::features;
use crate::kvm::Kvm;
use crate::vm::{Vm, VmError};

/// KVM's limit of CPUID entries, and of MSRs in one call.
const ENTRIES_MAX: usize = 256;
/// The time-stamp counter.
const MSR_TSC: u32 = 0x10;
/// The time-stamp counter's deadline for the local APIC's timer: set after everything that could disarm it.
const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// The VM apart from its vcpus and its memory.
#[derive(Clone, PartialEq, prost::Message)]
pub struct VmState {
    /// `kvm_irqchip` of both old interrupt controllers and of the IO-APIC.
    #[prost(bytes = "vec", repeated, tag = "1")]
    pub irqchips: Vec<Vec<u8>>,
    /// Nanoseconds of the paravirtual clock.
    #[prost(uint64, optional, tag = "2")]
    pub clock_ns: Option<u64>,
    /// Nanoseconds since 1970 by the host's clock then; absent in what older programs saved.
    #[prost(uint64, optional, tag = "3")]
    pub saved_at_ns: Option<u64>,
}

impl VmState {
    /// How long ago it was saved, by the clocks of both hosts.
    #[must_use]
    pub fn passed(&self) -> Duration {
        let saved_at = self.saved_at_ns.map(Duration::from_nanos);
        saved_at.map_or(Duration::ZERO, |saved_at| since_1970().saturating_sub(saved_at))
    }
}

fn since_1970() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// One vcpu.
#[derive(Clone, PartialEq, prost::Message)]
pub struct VcpuState {
    /// `kvm_cpuid_entry2`, one after the other.
    #[prost(bytes = "vec", tag = "1")]
    pub cpuid: Vec<u8>,
    /// `kvm_regs`.
    #[prost(bytes = "vec", tag = "2")]
    pub regs: Vec<u8>,
    /// `kvm_sregs`.
    #[prost(bytes = "vec", tag = "3")]
    pub sregs: Vec<u8>,
    /// `kvm_xsave`, the 4096 bytes that every processor has.
    #[prost(bytes = "vec", tag = "4")]
    pub xsave: Vec<u8>,
    /// `kvm_xcrs`; empty where the host has none.
    #[prost(bytes = "vec", tag = "5")]
    pub xcrs: Vec<u8>,
    /// `kvm_debugregs`.
    #[prost(bytes = "vec", tag = "6")]
    pub debug: Vec<u8>,
    /// `kvm_lapic_state`.
    #[prost(bytes = "vec", tag = "7")]
    pub lapic: Vec<u8>,
    /// `kvm_mp_state`.
    #[prost(uint32, tag = "8")]
    pub mp_state: u32,
    /// `kvm_vcpu_events`.
    #[prost(bytes = "vec", tag = "9")]
    pub events: Vec<u8>,
    /// `kvm_msr_entry`, one after the other.
    #[prost(bytes = "vec", tag = "10")]
    pub msrs: Vec<u8>,
    /// Frequency of the time-stamp counter; 0: not known.
    #[prost(uint32, tag = "11")]
    pub tsc_khz: u32,
}

/// A structure of KVM that is nothing but its bytes.
///
/// # Safety
/// `repr(C)`, integers only, no padding between or behind them, each bit pattern valid.
unsafe trait Plain: Default {}

// SAFETY: the kernel's headers spell out all padding of these as fields, and all fields are integers (or, in
// `kvm_irqchip`, a union of such with one size). They come from `Default`, which zeroes them, so each byte is initialised.
unsafe impl Plain for kvm_regs {}
// SAFETY: as above.
unsafe impl Plain for kvm_sregs {}
// SAFETY: as above.
unsafe impl Plain for kvm_xcrs {}
// SAFETY: as above; its flexible tail has no bytes in the type.
unsafe impl Plain for kvm_xsave {}
// SAFETY: as above.
unsafe impl Plain for kvm_debugregs {}
// SAFETY: as above.
unsafe impl Plain for kvm_lapic_state {}
// SAFETY: as above.
unsafe impl Plain for kvm_vcpu_events {}
// SAFETY: as above.
unsafe impl Plain for kvm_irqchip {}
// SAFETY: as above.
unsafe impl Plain for kvm_msr_entry {}
// SAFETY: as above.
unsafe impl Plain for kvm_cpuid_entry2 {}

fn to_bytes<T: Plain>(value: &T) -> Vec<u8> {
    let len = size_of::<T>();
    // SAFETY: `T: Plain` has no padding, so all its bytes are initialised; they live as long as the borrow.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast::<u8>(), len) }.to_vec()
}

fn from_bytes<T: Plain>(what: &'static str, bytes: &[u8]) -> Result<T, VmError> {
    if bytes.len() != size_of::<T>() {
        return Err(VmError::State { what, bytes: bytes.len(), expected: size_of::<T>() });
    }
    let mut value = T::default();
    // SAFETY: both ranges are exactly so long and do not overlap; `T: Plain` takes any bytes.
    unsafe {
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), std::ptr::from_mut(&mut value).cast(), bytes.len())
    };
    Ok(value)
}

fn list_from_bytes<T: Plain>(what: &'static str, bytes: &[u8]) -> Result<Vec<T>, VmError> {
    let each = size_of::<T>();
    if !bytes.len().is_multiple_of(each) || bytes.len() / each > 16 * ENTRIES_MAX {
        return Err(VmError::State { what, bytes: bytes.len(), expected: each });
    }
    bytes.chunks_exact(each).map(|bytes| from_bytes(what, bytes)).collect()
}

impl Vm {
    /// Takes out what KVM keeps of the VM. No vcpu may run.
    pub fn save(&self) -> Result<VmState, VmError> {
        let mut irqchips = Vec::with_capacity(3);
        for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC] {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            self.fd.get_irqchip(&mut chip).map_err(VmError::kvm("read an interrupt controller"))?;
            irqchips.push(to_bytes(&chip));
        }
        let clock = self.fd.get_clock().map_err(VmError::kvm("read the clock"))?;
        let saved_at_ns = u64::try_from(since_1970().as_nanos()).ok();
        Ok(VmState { irqchips, clock_ns: Some(clock.clock), saved_at_ns })
    }

    /// Puts it back, its clock on by `passed`, as those of the vcpus. After them: what waits in the IO-APIC goes to their local
    /// APICs.
    pub fn restore(&self, state: &VmState, passed: Duration) -> Result<(), VmError> {
        for bytes in &state.irqchips {
            let chip: kvm_irqchip = from_bytes("an interrupt controller", bytes)?;
            self.fd.set_irqchip(&chip).map_err(VmError::kvm("set an interrupt controller"))?;
        }
        if let Some(clock) = state.clock_ns {
            let passed = u64::try_from(passed.as_nanos()).unwrap_or(u64::MAX);
            let clock = kvm_clock_data { clock: clock.saturating_add(passed), ..Default::default() };
            self.fd.set_clock(&clock).map_err(VmError::kvm("set the clock"))?;
        }
        Ok(())
    }
}

/// Takes out what KVM keeps of a vcpu.
pub(crate) fn save(fd: &VcpuFd, msr_indexes: &[u32]) -> Result<VcpuState, VmError> {
    // Its guest shall not take the pause for a hang; a guest without that clock refuses, and does not need it.
    let _ = fd.kvmclock_ctrl();
    // First: reading it lets KVM settle what is on its way to the local APIC.
    let mp_state = fd.get_mp_state().map_err(VmError::kvm("read a vcpu's run state"))?.mp_state;
    let cpuid = fd.get_cpuid2(ENTRIES_MAX).map_err(VmError::kvm("read a vcpu's CPUID"))?;
    let xcrs = match fd.get_xcrs() {
        Ok(xcrs) => to_bytes(&xcrs),
        Err(error) if error.errno() == libc::EINVAL => Vec::new(),
        Err(error) => return Err(VmError::kvm("read a vcpu's extended control registers")(error)),
    };
    Ok(VcpuState {
        cpuid: cpuid.as_slice().iter().flat_map(to_bytes).collect(),
        regs: to_bytes(&fd.get_regs().map_err(VmError::kvm("read a vcpu's registers"))?),
        sregs: to_bytes(&fd.get_sregs().map_err(VmError::kvm("read a vcpu's system registers"))?),
        xsave: to_bytes(&fd.get_xsave().map_err(VmError::kvm("read a vcpu's FPU"))?),
        xcrs,
        debug: to_bytes(&fd.get_debug_regs().map_err(VmError::kvm("read a vcpu's debug registers"))?),
        lapic: to_bytes(&fd.get_lapic().map_err(VmError::kvm("read a vcpu's local APIC"))?),
        mp_state,
        msrs: get_msrs(fd, msr_indexes)?.iter().flat_map(to_bytes).collect(),
        events: to_bytes(&fd.get_vcpu_events().map_err(VmError::kvm("read a vcpu's events"))?),
        tsc_khz: fd.get_tsc_khz().unwrap_or(0),
    })
}

/// Puts it back, in the order in which one depends on the other, its counter on by `passed`.
pub(crate) fn restore(fd: &VcpuFd, state: &VcpuState, passed: Duration) -> Result<(), VmError> {
    let leaves: Vec<kvm_cpuid_entry2> = list_from_bytes("CPUID", &state.cpuid)?;
    let cpuid = CpuId::from_entries(&leaves)
        .map_err(|_| VmError::kvm("hold a vcpu's CPUID")(errno::Error::new(libc::E2BIG)))?;
    // What this one has been given says what the host has. KVM itself would take any.
    let here = fd.get_cpuid2(ENTRIES_MAX).map_err(VmError::kvm("read a vcpu's CPUID"))?;
    let missing = features::lacking(here.as_slice(), &leaves);
    if !missing.is_empty() {
        return Err(VmError::Features { missing });
    }
    fd.set_cpuid2(&cpuid).map_err(VmError::kvm("set a vcpu's CPUID"))?;
    if state.tsc_khz != 0 && fd.get_tsc_khz().unwrap_or(0) != state.tsc_khz {
        // Refused where the host cannot scale; the guest then sees this host's frequency, as its clock source says.
        let _ = fd.set_tsc_khz(state.tsc_khz);
    }
    let set = |what| VmError::kvm(what);
    fd.set_mp_state(kvm_mp_state { mp_state: state.mp_state }).map_err(set("set a vcpu's run state"))?;
    fd.set_regs(&from_bytes("registers", &state.regs)?).map_err(set("set a vcpu's registers"))?;
    // With the APIC base, on which the local APIC's mode depends.
    fd.set_sregs(&from_bytes("system registers", &state.sregs)?)
        .map_err(set("set a vcpu's system registers"))?;
    if !state.xcrs.is_empty() {
        fd.set_xcrs(&from_bytes("extended control registers", &state.xcrs)?)
            .map_err(set("set a vcpu's extended control registers"))?;
    }
    let xsave: kvm_xsave = from_bytes("FPU", &state.xsave)?;
    // SAFETY: the structure is as large as KVM reads, unless a feature was enabled by `arch_prctl` that needs a larger
    // one; nothing here enables any.
    unsafe { fd.set_xsave(&xsave) }.map_err(set("set a vcpu's FPU"))?;
    fd.set_debug_regs(&from_bytes("debug registers", &state.debug)?)
        .map_err(set("set a vcpu's debug registers"))?;
    fd.set_lapic(&from_bytes("local APIC", &state.lapic)?).map_err(set("set a vcpu's local APIC"))?;
    let mut msrs: Vec<kvm_msr_entry> = list_from_bytes("MSRs", &state.msrs)?;
    let ticks = passed.as_micros().saturating_mul(u128::from(state.tsc_khz)) / 1000;
    for counter in msrs.iter_mut().filter(|entry| entry.index == MSR_TSC) {
        // It wraps as the processor's does.
        counter.data = counter.data.wrapping_add(u64::try_from(ticks).unwrap_or(0));
    }
    msrs.sort_by_key(|entry| entry.index == MSR_TSC_DEADLINE);
    set_msrs(fd, &msrs)?;
    fd.set_vcpu_events(&from_bytes("events", &state.events)?).map_err(set("set a vcpu's events"))?;
    // Again: the note that it was stopped is KVM's own and is not in the state. After the MSR that enables the clock; a
    // guest without that clock refuses, and does not need it.
    let _ = fd.kvmclock_ctrl();
    Ok(())
}

/// All of `indexes` that this vcpu has.
fn get_msrs(fd: &VcpuFd, indexes: &[u32]) -> Result<Vec<kvm_msr_entry>, VmError> {
    let mut found = Vec::with_capacity(indexes.len());
    let mut rest = indexes;
    while !rest.is_empty() {
        let (now, _) = rest.split_at(rest.len().min(ENTRIES_MAX));
        let entries: Vec<_> =
            now.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
        let mut msrs = msrs_of(&entries)?;
        let count = fd.get_msrs(&mut msrs).map_err(VmError::kvm("read a vcpu's MSRs"))?;
        found.extend(msrs.as_slice().iter().take(count));
        // It stops at the first that it does not give.
        let skip = count.saturating_add(usize::from(count < now.len()));
        rest = rest.get(skip..).unwrap_or(&[]);
    }
    Ok(found)
}

fn set_msrs(fd: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), VmError> {
    let mut rest = entries;
    while !rest.is_empty() {
        let (now, _) = rest.split_at(rest.len().min(ENTRIES_MAX));
        let count = fd.set_msrs(&msrs_of(now)?).map_err(VmError::kvm("set a vcpu's MSRs"))?;
        let skip = count.saturating_add(usize::from(count < now.len()));
        rest = rest.get(skip..).unwrap_or(&[]);
    }
    Ok(())
}

fn msrs_of(entries: &[kvm_msr_entry]) -> Result<Msrs, VmError> {
    Msrs::from_entries(entries)
        .map_err(|_| VmError::kvm("hold a vcpu's MSRs")(errno::Error::new(libc::E2BIG)))
}

impl Kvm {
    /// The MSRs that KVM keeps for a guest.
    pub(crate) fn msr_indexes(&self) -> Vec<u32> {
        self.fd.get_msr_index_list().map(|list| list.as_slice().to_vec()).unwrap_or_default()
    }
}
