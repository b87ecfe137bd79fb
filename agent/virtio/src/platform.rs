//! The seam to the kernel: what the transport needs of a hypervisor, and nothing else.
//!
//! Two implementations exist: [`serio_hv::Vm`] (irqfd, ioeventfd) and `testing::FakePlatform`.

use std::io;
use std::sync::Arc;

pub use serio_hv::MsiMessage;
use serio_hv::{IoAddr, MsiLine, Vm};
use vmm_sys_util::eventfd::EventFd;

/// One interrupt line that delivers a message of the guest's choice.
pub trait MsiRoute: Send + Sync {
    /// Sets the message delivered from now on. Not for the hot path: it changes the kernel's routing table.
    fn route(&self, message: MsiMessage) -> io::Result<()>;
    /// Delivers the message. One system call.
    fn trigger(&self) -> io::Result<()>;
    /// What delivers the message when it is signalled, for a device inside the kernel.
    fn event(&self) -> &EventFd;
    /// Delivers nothing until the next [`MsiRoute::route`]: what is signalled until then waits in [`MsiRoute::event`], and is
    /// delivered by it.
    fn hold(&self) -> io::Result<()>;
}

/// What a transport asks of the hypervisor.
pub trait Platform: Send + Sync {
    /// A new line, not yet routed.
    fn msi_route(&self) -> io::Result<Box<dyn MsiRoute>>;
    /// From now on a guest write of any width at `address` signals `event`, without leaving the kernel.
    fn watch(&self, address: u64, event: &EventFd) -> io::Result<()>;
    /// Ends a [`Platform::watch`].
    fn unwatch(&self, address: u64, event: &EventFd) -> io::Result<()>;
}

/// KVM: an irqfd for each line, an ioeventfd for each watched address.
impl Platform for Arc<Vm> {
    fn msi_route(&self) -> io::Result<Box<dyn MsiRoute>> {
        Ok(Box::new(self.msi_line().map_err(io::Error::other)?))
    }

    fn watch(&self, address: u64, event: &EventFd) -> io::Result<()> {
        // Width 0: any. A driver may write two or four bytes, and KVM finds such an address sooner.
        self.ioeventfd(IoAddr::Mmio(address), 0, None, event).map_err(io::Error::other)
    }

    fn unwatch(&self, address: u64, event: &EventFd) -> io::Result<()> {
        self.remove_ioeventfd(IoAddr::Mmio(address), 0, None, event).map_err(io::Error::other)
    }
}

impl MsiRoute for MsiLine {
    fn route(&self, message: MsiMessage) -> io::Result<()> {
        MsiLine::route(self, message).map_err(io::Error::other)
    }

    fn trigger(&self) -> io::Result<()> {
        MsiLine::trigger(self)
    }

    fn event(&self) -> &EventFd {
        self.event_fd()
    }

    fn hold(&self) -> io::Result<()> {
        MsiLine::hold(self).map_err(io::Error::other)
    }
}
