//! The transport stops and goes on, and its state as a saved one. A part of `transport`.
//!
//! ```text
//!   active ── suspend_device ──► suspended: the queues are here ── resume_device ──► active, each doorbell rung once
//!                                    │ save_function
//!                                    ▼
//!                              FunctionState ── restore_function ──► suspended, on another bus
//! ```
//!
//! - Doorbells stay watched while suspended: what the guest rings waits in its eventfd. They are rung once more on resume,
//!   since a kick that the device had seen without looking at the ring may be of use to the next one.
//! - After a restore each queue's interrupt is raised once: one that was on its way inside the kernel is in no saved state.
//!   A driver takes it for one without news.

use std::sync::atomic::Ordering;

use super::VirtioPci;
use crate::device::ActivateError;
use crate::interrupt::{STATUS_DRIVER_OK, STATUS_NEEDS_RESET};
use crate::pci::bus::Failure;
use crate::state::{DeviceState, FunctionState, Position, RestoreError, SuspendError};

impl VirtioPci {
    /// DEVICE_NEEDS_RESET, in words.
    pub(super) fn failure_now(&self) -> Option<Failure> {
        if self.shared.status.load(Ordering::Acquire) & STATUS_NEEDS_RESET == 0 {
            return None;
        }
        // A device that has run was broken by its driver, or has lost what is behind it; its own notices say more.
        let broken = || "its rings make no sense, or what is behind it is gone".to_owned();
        let reason = self.last_error().map_or_else(broken, |error| {
            let mut words = error.to_string();
            let mut source = std::error::Error::source(error);
            while let Some(error) = source {
                words.push_str(": ");
                words.push_str(&error.to_string());
                source = error.source();
            }
            words
        });
        Some(Failure { slot: 0, device_id: self.device.device_id(), reason })
    }

    pub(super) fn suspend_device(&mut self) -> Result<(), SuspendError> {
        if self.suspended.is_none() && !self.kicks.is_empty() {
            match self.device.suspend() {
                Ok(queues) => self.suspended = Some(queues),
                Err(error) => {
                    self.shared.fail();
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    pub(super) fn resume_device(&mut self) {
        let Some(queues) = self.suspended.take() else { return };
        let restored = std::mem::take(&mut self.restored);
        let bells: Vec<_> = queues.iter().map(|queue| queue.interrupt.clone()).collect();
        if let Err(error) = self.hand_over(queues) {
            self.last_error = Some(error);
            self.shared.fail();
            return;
        }
        for (_, kick) in &self.kicks {
            // Fails only when the counter is full: then it has been rung.
            let _ = kick.write(1);
        }
        if restored {
            bells.iter().for_each(crate::QueueInterrupt::trigger);
        }
    }

    /// The driver takes its interrupts elsewhere: a device that has lent their lines to the kernel looks for them again.
    pub(super) fn lend_again(&mut self) {
        if self.shared.msix.has_lent() && self.suspend_device().is_ok() {
            self.resume_device();
        }
    }

    pub(super) fn save_function(&self) -> FunctionState {
        let mut virtio = self.common.save(&self.shared);
        virtio.device_id = self.device.device_id().into();
        virtio.vectors = self.shared.msix.save();
        virtio.device = Some(self.device.save());
        for active in self.suspended.iter().flatten() {
            if let Some(queue) = virtio.queues.get_mut(usize::from(active.index)) {
                let (next_avail, next_used) = active.queue.positions();
                queue.position =
                    Some(Position { next_avail: next_avail.into(), next_used: next_used.into() });
            }
        }
        FunctionState { config: self.config.bytes().to_vec(), virtio: Some(virtio) }
    }

    pub(super) fn restore_function(&mut self, state: &FunctionState) -> Result<(), RestoreError> {
        let Some(virtio) = &state.virtio else {
            return Err(RestoreError::Malformed { what: "a virtio device without its registers".to_owned() });
        };
        let made = u32::from(self.device.device_id());
        if virtio.device_id != made {
            let (saved, made) = (virtio.device_id.to_string(), made.to_string());
            return Err(RestoreError::Differs { what: "device type", saved, made });
        }
        self.common.restore(&self.shared, virtio)?;
        self.device.restore(virtio.device.as_ref().unwrap_or(&DeviceState::default()))?;
        // Through the mask: only what the guest could have written.
        self.config.write(0, &state.config);
        let io = |what| move |source| RestoreError::Io { what, source };
        let routed = io("route an interrupt of it");
        let control = self.config.u16_at(self.msix_capability.saturating_add(2));
        self.shared.msix.restore(&virtio.vectors).map_err(routed)?;
        self.shared.msix.set_control(control).map_err(routed)?;
        if self.shared.status.load(Ordering::Acquire) & STATUS_DRIVER_OK == 0 {
            return Ok(());
        }
        let position = |index: u16| {
            let position = virtio.queues.get(usize::from(index))?.position?;
            Some((u16::try_from(position.next_avail).ok()?, u16::try_from(position.next_used).ok()?))
        };
        let queues = self.make_queues(position).map_err(|error| match error {
            ActivateError::QueueNotEnabled { index } => {
                RestoreError::Malformed { what: format!("queue {index} does not lie in memory") }
            }
            ActivateError::Io { what, source } => RestoreError::Io { what, source },
        })?;
        self.follow_bar().map_err(io("watch the device's doorbells"))?;
        self.suspended = Some(queues);
        self.restored = true;
        Ok(())
    }
}
