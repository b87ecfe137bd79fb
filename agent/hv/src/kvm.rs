//! The system handle of KVM: opening it, checking what this project needs, and the processor's CPUID.
//!
//! Owns `/dev/kvm` (or a descriptor of it that somebody passed) and what is asked of it once per process: limits
//! and the supported CPUID. Never creates a VM itself. Shared freely between threads.

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};

use kvm_bindings::{CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::Cap;
use vmm_sys_util::errno;

use crate::baseline::{self, Baseline, MissingFeatures};

/// Why KVM cannot be used on this host.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The device file is missing, or may not be opened.
    #[error("cannot open /dev/kvm: load the kvm module, or add this user to the group `kvm`")]
    Device(#[source] errno::Error),
    /// The descriptor is not KVM's, or it is a KVM of another age.
    #[error(
        "KVM speaks interface version {0}, version 12 is needed: check what the descriptor or /dev/kvm is"
    )]
    Version(i32),
    /// The kernel lacks something that every VM here is built on.
    #[error("the host's KVM has no {0}: a newer host kernel is needed")]
    Missing(&'static str),
    /// CPUID could not be read.
    #[error("cannot read the CPUID that KVM supports")]
    Cpuid(#[source] errno::Error),
}

/// The host's KVM, checked to have all that a VM here is built on.
#[derive(Debug)]
pub struct Kvm {
    pub(crate) fd: kvm_ioctls::Kvm,
    pub(crate) cpuid: CpuId,
    pub(crate) tsc_deadline: bool,
    vcpus_max: u32,
}

impl Kvm {
    /// Opens `/dev/kvm`.
    pub fn open() -> Result<Kvm, OpenError> {
        Kvm::check(kvm_ioctls::Kvm::new().map_err(OpenError::Device)?)
    }

    /// Takes a descriptor of `/dev/kvm` that somebody with the right to open it has passed.
    pub fn from_fd(fd: OwnedFd) -> Result<Kvm, OpenError> {
        // SAFETY: `into_raw_fd` gives up the ownership that `kvm_ioctls::Kvm` takes over: one owner, no double
        // close. That it is KVM's descriptor is checked right after by its interface version.
        Kvm::check(unsafe { kvm_ioctls::Kvm::from_raw_fd(fd.into_raw_fd()) })
    }

    /// The most vcpus a VM may have here: KVM's own limit, and what one xAPIC MADT can name.
    pub fn vcpus_max(&self) -> u32 {
        self.vcpus_max
    }

    fn check(fd: kvm_ioctls::Kvm) -> Result<Kvm, OpenError> {
        let version = fd.get_api_version();
        if version != KVM_API_VERSION as i32 {
            return Err(OpenError::Version(version));
        }
        let needed = [
            (Cap::Irqchip, "in-kernel interrupt chip (KVM_CAP_IRQCHIP)"),
            (Cap::Irqfd, "irqfd (KVM_CAP_IRQFD)"),
            (Cap::Ioeventfd, "ioeventfd (KVM_CAP_IOEVENTFD)"),
            (Cap::IoeventfdNoLength, "ioeventfd of any width (KVM_CAP_IOEVENTFD_NO_LENGTH)"),
            (Cap::IrqRouting, "interrupt routing (KVM_CAP_IRQ_ROUTING)"),
            (Cap::ImmediateExit, "immediate exit (KVM_CAP_IMMEDIATE_EXIT)"),
            (Cap::UserMemory, "user memory (KVM_CAP_USER_MEMORY)"),
        ];
        for (cap, name) in needed {
            if !fd.check_extension(cap) {
                return Err(OpenError::Missing(name));
            }
        }
        let supported = fd.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(OpenError::Cpuid)?;
        let cpuid = CpuId::from_entries(&baseline::of_host(supported.as_slice()))
            .map_err(|_| OpenError::Cpuid(errno::Error::new(libc::E2BIG)))?;
        let tsc_deadline = fd.check_extension(Cap::TscDeadlineTimer);
        let vcpus_max = u32::try_from(fd.get_max_vcpus()).unwrap_or(u32::MAX).min(254);
        Ok(Kvm { fd, cpuid, tsc_deadline, vcpus_max })
    }

    /// From now on vcpus show a baseline's features only. Refused with what this host lacks.
    pub fn set_baseline(&mut self, baseline: Baseline) -> Result<(), MissingFeatures> {
        let leaves = baseline::apply(self.cpuid.as_slice(), baseline)?;
        // Never more leaves than there were.
        if let Ok(cpuid) = CpuId::from_entries(&leaves) {
            self.cpuid = cpuid;
        }
        Ok(())
    }
}
