//! What a VM's machine has beyond disks' files and taps, as its VMM is told.

use std::{io, os::fd::OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use serio_control::message::{Launch, Limits, OnWatchdog, Vsock};
use serio_types::{CpuBaseline, IoLimits, MachineSpec, PageSize, Watchdog};

use super::{
    FileError, LaunchError,
    files::Descriptors,
    rundir::{self, RunDir},
    vsock,
};

/// A guest's vsock address: the first that there is. Each has a socket of its own, so all may have the same.
const GUEST_CID: u32 = 3;

/// The bounds of a device; none if nothing is bounded.
pub(super) fn limits(limits: &IoLimits) -> Option<Limits> {
    (!limits.is_none()).then_some(Limits {
        bytes_per_second: limits.bytes_per_second,
        bytes_burst: limits.bytes_burst,
        operations_per_second: limits.operations_per_second,
        operations_burst: limits.operations_burst,
    })
}

/// Adds to a launch what the machine has.
pub(super) fn equip(
    machine: &MachineSpec,
    run: &RunDir,
    (launch, descriptors): (&mut Launch, &mut Descriptors),
) -> Result<(), LaunchError> {
    launch.on_watchdog = match machine.watchdog {
        Watchdog::Reset => OnWatchdog::Reset,
        Watchdog::End => OnWatchdog::End,
    }
    .into();
    launch.page_bytes = if machine.pages == PageSize::Small { 0 } else { machine.pages.bytes() };
    launch.cpu_baseline = if machine.cpu == CpuBaseline::Host { "" } else { machine.cpu.as_str() }.to_owned();
    if machine.vsock {
        let listener_fd = descriptors.push(rundir::listen(&run.vsock())?);
        let (ours, theirs) =
            broker_pair().map_err(FileError::at("make the broker's socket for", run.vsock()))?;
        let broker_fd = Some(descriptors.push(theirs));
        launch.vsock = Some(Vsock { guest_cid: GUEST_CID, listener_fd, broker_fd });
        vsock::serve(ours, run.clone());
    }
    Ok(())
}

/// The broker's end and the VMM's.
pub(super) fn broker_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}
