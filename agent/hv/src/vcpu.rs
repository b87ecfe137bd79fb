//! One vcpu: its state at start, its run step, and the kick that takes it out of guest code.
//!
//! ```text
//!   run() ──► KVM_RUN ──► port or memory access ──► IoHandler ──► Handled
//!                    ├──► kicked (immediate_exit + signal)    ──► Kicked
//!                    ├──► triple fault                        ──► TripleFault
//!                    ├──► paravirtual system event            ──► Reset | PowerOff | Crash
//!                    └──► anything else                       ──► Err: this VM is over
//! ```
//!
//! A [`Vcpu`] belongs to one thread. [`VcpuKick`] may be used by any other: it sets KVM's `immediate_exit`, then
//! signals the thread. Either the thread is in KVM_RUN and the signal ends it, or it is not and the next KVM_RUN
//! returns at once: no kick is lost, whatever the moment.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicI32, AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_run};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::errno;
use vmm_sys_util::signal::register_signal_handler;

use crate::cpuid::{self, Topology};
use crate::kvm::Kvm;
use crate::registers::{BootRegisters, set_boot_msrs, set_boot_registers};
use crate::state::{self, VcpuState};
use crate::vm::{Vm, VmError};

/// Who answers the guest's accesses to ports and to memory that is no RAM. Data is little-endian, 1 to 8 bytes.
pub trait IoHandler {
    /// The guest reads `port`.
    fn port_read(&mut self, port: u16, data: &mut [u8]);
    /// The guest writes `port`.
    fn port_write(&mut self, port: u16, data: &[u8]);
    /// The guest reads `address`.
    fn memory_read(&mut self, address: u64, data: &mut [u8]);
    /// The guest writes `address`.
    fn memory_write(&mut self, address: u64, data: &[u8]);
}

/// Why a vcpu came back from guest code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitReason {
    /// An access was answered; run again.
    Handled,
    /// Somebody kicked; look at what they want, then run again.
    Kicked,
    /// The guest faulted while handling a double fault.
    TripleFault,
    /// The guest asked the hypervisor for a reset.
    Reset,
    /// The guest asked the hypervisor to power off.
    PowerOff,
    /// The guest told the hypervisor that it crashed.
    Crash,
}

/// Why a vcpu cannot go on. `state` says where the guest was.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The run call itself failed.
    #[error("KVM_RUN failed ({state})")]
    Run {
        /// Where the guest was.
        state: String,
        /// What KVM answered.
        #[source]
        source: errno::Error,
    },
    /// KVM could not carry out what the guest did.
    #[error("KVM internal error {suberror} ({name}), data {data:x?} ({state})")]
    Internal {
        /// KVM_INTERNAL_ERROR_*.
        suberror: u32,
        /// Its meaning.
        name: &'static str,
        /// What KVM adds, often the instruction's bytes.
        data: Vec<u64>,
        /// Where the guest was.
        state: String,
    },
    /// The hardware refused the guest's state.
    #[error("the processor refused to enter the guest, hardware reason {reason:#x} ({state})")]
    Entry {
        /// The hardware's code.
        reason: u64,
        /// Where the guest was.
        state: String,
    },
    /// Memory could not be given to the guest.
    #[error("no memory behind guest address {address:#x} ({state})")]
    MemoryFault {
        /// Guest physical address.
        address: u64,
        /// Where the guest was.
        state: String,
    },
    /// An exit that nothing here asked for.
    #[error("unknown KVM exit {reason} ({state})")]
    Unknown {
        /// Which, as KVM or its wrapper names it.
        reason: String,
        /// Where the guest was.
        state: String,
    },
}

/// The first page of `kvm_run`, mapped a second time so that a kick can outlive or overlap any use of the first.
#[derive(Debug)]
struct ControlPage(std::ptr::NonNull<libc::c_void>);

/// The mapping's length; `immediate_exit` lies at its very start.
const CONTROL_BYTES: usize = 4096;

// SAFETY: the pointer is only used through `immediate_exit`, an atomic; the mapping lives until drop.
unsafe impl Send for ControlPage {}
// SAFETY: as above.
unsafe impl Sync for ControlPage {}

impl ControlPage {
    fn map(fd: &VcpuFd) -> std::io::Result<ControlPage> {
        // SAFETY: a new mapping at an address of the kernel's choice, of a descriptor that is open; checked below.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                CONTROL_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if page == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        std::ptr::NonNull::new(page).map(ControlPage).ok_or_else(|| std::io::Error::other("mapped at zero"))
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        let offset = std::mem::offset_of!(kvm_run, immediate_exit);
        // SAFETY: the byte lies in the mapping, which lives as long as `self`; the kernel only reads it, and all
        // accesses of ours go through this atomic.
        unsafe { AtomicU8::from_ptr(self.0.as_ptr().cast::<u8>().add(offset)) }
    }
}

impl Drop for ControlPage {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `map`, which nobody can use any more.
        unsafe { libc::munmap(self.0.as_ptr(), CONTROL_BYTES) };
    }
}

/// Takes a vcpu out of guest code, from any thread.
#[derive(Debug, Clone)]
pub struct VcpuKick {
    page: Arc<ControlPage>,
    /// The thread that runs the vcpu, 0 while none does.
    thread: Arc<AtomicI32>,
}

impl VcpuKick {
    /// Makes the vcpu's current or next `run` return [`ExitReason::Kicked`] (or what it was returning anyway).
    pub fn kick(&self) {
        self.page.immediate_exit().store(1, Ordering::SeqCst);
        let thread = self.thread.load(Ordering::SeqCst);
        if thread != 0 {
            // SAFETY: sends a signal whose handler does nothing, to a thread of this process. If that thread has
            // just ended, the call fails or an unrelated thread of ours sees one EINTR.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, kick_signal()) };
        }
    }
}

fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn ignore_signal(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// The handler that a kick needs: a signal without one would end the process, an ignored one would not end KVM_RUN.
fn install_kick_handler() -> Result<(), VmError> {
    static INSTALLED: OnceLock<Result<(), errno::Error>> = OnceLock::new();
    (*INSTALLED.get_or_init(|| register_signal_handler(kick_signal(), ignore_signal)))
        .map_err(VmError::kvm("have a signal handler for kicks"))
}

/// One processor of a VM.
#[derive(Debug)]
pub struct Vcpu {
    fd: VcpuFd,
    id: u32,
    kick: VcpuKick,
    /// What is saved of it; asked of KVM once a VM, not once a save.
    msr_indexes: Arc<[u32]>,
    /// Keeps the VM, and with it guest memory, alive under the running guest.
    _vm: Arc<Vm>,
}

impl Vcpu {
    pub(crate) fn new(vm: Arc<Vm>, kvm: &Kvm, topology: Topology) -> Result<Vcpu, VmError> {
        install_kick_handler()?;
        let id = topology.id;
        let fd = vm.fd.create_vcpu(u64::from(id)).map_err(VmError::kvm("create a vcpu"))?;
        let page = ControlPage::map(&fd).map_err(|source| VmError::Map { id, source })?;
        let cpuid = cpuid::for_vcpu(kvm, topology).map_err(VmError::kvm("hold a vcpu's CPUID"))?;
        fd.set_cpuid2(&cpuid).map_err(VmError::kvm("set a vcpu's CPUID"))?;
        set_boot_msrs(&fd)?;
        let kick = VcpuKick { page: Arc::new(page), thread: Arc::default() };
        let msr_indexes = kvm.msr_indexes().into();
        Ok(Vcpu { fd, id, kick, msr_indexes, _vm: vm })
    }

    /// The vcpu's number, which is also its APIC id.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// What takes this vcpu out of guest code.
    pub fn kick(&self) -> VcpuKick {
        self.kick.clone()
    }

    /// Sets where the first vcpu starts. The others wait for it to start them (INIT, SIPI).
    pub fn set_boot_registers(&self, boot: &BootRegisters) -> Result<(), VmError> {
        set_boot_registers(&self.fd, boot)
    }

    /// Completes the access that the last [`Vcpu::run`] answered: KVM takes its outcome into the registers only when the
    /// vcpu is run again. Executes no instruction of the guest. Anything but [`ExitReason::Kicked`] is what `run` says.
    pub fn complete(&mut self, io: &mut dyn IoHandler) -> Result<ExitReason, RunError> {
        loop {
            self.kick.page.immediate_exit().store(1, Ordering::SeqCst);
            // An access in several pieces comes back for each of them.
            match self.run(io)? {
                ExitReason::Handled => {}
                other => return Ok(other),
            }
        }
    }

    /// Takes out what KVM keeps of this vcpu. After [`Vcpu::complete`].
    pub fn save(&self) -> Result<VcpuState, VmError> {
        state::save(&self.fd, &self.msr_indexes)
    }

    /// Puts it back, before the first [`Vcpu::run`], with its clocks on by `passed`: [`crate::VmState::passed`].
    pub fn restore(&self, state: &VcpuState, passed: Duration) -> Result<(), VmError> {
        state::restore(&self.fd, state, passed)
    }

    /// Tells kicks which thread to signal. Once, on the thread that will call [`Vcpu::run`].
    pub fn bind_to_this_thread(&self) {
        // SAFETY: takes nothing, cannot fail.
        let thread = unsafe { libc::gettid() };
        self.kick.thread.store(thread, Ordering::SeqCst);
    }

    /// Runs guest code until something happens, and answers one access through `io` if that is it.
    pub fn run(&mut self, io: &mut dyn IoHandler) -> Result<ExitReason, RunError> {
        let failed = match self.fd.run() {
            Ok(VcpuExit::MmioRead(address, data)) => {
                io.memory_read(address, data);
                return Ok(ExitReason::Handled);
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                io.memory_write(address, data);
                return Ok(ExitReason::Handled);
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                let bytes = data.len();
                let (width, data) = port_access(&mut self.fd, port, bytes);
                data.chunks_mut(width).for_each(|item| io.port_read(port, item));
                return Ok(ExitReason::Handled);
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                let bytes = data.len();
                let (width, data) = port_access(&mut self.fd, port, bytes);
                data.chunks(width).for_each(|item| io.port_write(port, item));
                return Ok(ExitReason::Handled);
            }
            Ok(VcpuExit::Shutdown) => return Ok(ExitReason::TripleFault),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => return Ok(ExitReason::Reset),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => return Ok(ExitReason::PowerOff),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _)) => return Ok(ExitReason::Crash),
            Ok(VcpuExit::Intr) => Failed::Kicked,
            Ok(VcpuExit::InternalError) => Failed::Internal,
            Ok(VcpuExit::FailEntry(reason, _)) => Failed::Entry(reason),
            Ok(VcpuExit::MemoryFault { gpa, .. }) => Failed::Memory(gpa),
            Ok(other) => Failed::Unknown(format!("{other:?}")),
            Err(e) if e.errno() == libc::EINTR => Failed::Kicked,
            // A vcpu that was started and stopped again before it ran.
            Err(e) if e.errno() == libc::EAGAIN => return Ok(ExitReason::Handled),
            Err(e) => Failed::Run(e),
        };
        self.explain(failed)
    }

    /// Where the guest is, in words: for the reason of a VM's end.
    pub fn state(&self) -> String {
        match (self.fd.get_regs(), self.fd.get_sregs()) {
            (Ok(r), Ok(s)) => format!(
                "vcpu {}: rip {:#x} rsp {:#x} rax {:#x} cr0 {:#x} cr2 {:#x} cr3 {:#x} efer {:#x}",
                self.id, r.rip, r.rsp, r.rax, s.cr0, s.cr2, s.cr3, s.efer
            ),
            _ => format!("vcpu {}: registers unknown", self.id),
        }
    }

    fn explain(&mut self, failed: Failed) -> Result<ExitReason, RunError> {
        if let Failed::Kicked = failed {
            self.kick.page.immediate_exit().store(0, Ordering::SeqCst);
            return Ok(ExitReason::Kicked);
        }
        let state = self.state();
        Err(match failed {
            Failed::Kicked => return Ok(ExitReason::Kicked),
            Failed::Run(source) => RunError::Run { state, source },
            Failed::Entry(reason) => RunError::Entry { reason, state },
            Failed::Memory(address) => RunError::MemoryFault { address, state },
            Failed::Unknown(reason) => RunError::Unknown { reason, state },
            Failed::Internal => {
                let (suberror, data) = internal_error(&mut self.fd);
                RunError::Internal { suberror, name: internal_error_name(suberror), data, state }
            }
        })
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.kick.thread.store(0, Ordering::SeqCst);
    }
}

/// What `run` found, without the borrow of the exit.
enum Failed {
    Kicked,
    Internal,
    Entry(u64),
    Memory(u64),
    Unknown(String),
    Run(errno::Error),
}

/// The data of a port access: a string instruction brings several items in one exit, which the wrapper hides.
fn port_access(fd: &mut VcpuFd, port: u16, bytes: usize) -> (usize, &mut [u8]) {
    let run = fd.get_kvm_run();
    // SAFETY: the caller has just seen exit reason KVM_EXIT_IO, so `io` is the union's live member.
    let access = unsafe { run.__bindgen_anon_1.io };
    debug_assert_eq!(access.port, port);
    let start = std::ptr::from_mut(run).cast::<u8>();
    // SAFETY: KVM places the data inside the vcpu's shared mapping, at this offset, `size * count` bytes long,
    // which is the length that the wrapper computed; the mapping lives as long as `fd` is borrowed, and the
    // kernel writes it only during KVM_RUN, which needs `fd` too.
    let data = unsafe { std::slice::from_raw_parts_mut(start.add(access.data_offset as usize), bytes) };
    (usize::from(access.size).max(1), data)
}

fn internal_error(fd: &mut VcpuFd) -> (u32, Vec<u64>) {
    let run = fd.get_kvm_run();
    // SAFETY: the caller has just seen exit reason KVM_EXIT_INTERNAL_ERROR, so `internal` is the live member.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    let count = (internal.ndata as usize).min(internal.data.len());
    (internal.suberror, internal.data.iter().take(count).copied().collect())
}

fn internal_error_name(suberror: u32) -> &'static str {
    match suberror {
        1 => "an instruction could not be emulated",
        2 => "simultaneous exceptions",
        3 => "an event could not be delivered",
        4 => "unexpected exit of the hardware",
        _ => "unknown to us",
    }
}
