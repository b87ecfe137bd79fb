//! What a device is to the transport, and what it gets when the driver is ready.

use std::io;

use serio_hv::GuestMemory;
use vmm_sys_util::eventfd::EventFd;

use crate::interrupt::{ConfigInterrupt, DeviceFailure, QueueInterrupt};
use crate::queue::VirtQueue;
use crate::state::{DeviceState, RestoreError, SuspendError};

/// A virtio device without its transport.
///
/// All calls come from vcpu threads, one at a time. A device does its work on threads of its own, between
/// [`VirtioDevice::activate`] and [`VirtioDevice::reset`].
pub trait VirtioDevice: Send {
    /// The device type (virtio 1.2 §5): 1 net, 2 block, 3 console, 4 entropy.
    fn device_id(&self) -> u16;

    /// The feature bits of this device type. The transport adds its own (VERSION_1, EVENT_IDX, INDIRECT_DESC).
    fn features(&self) -> u64;

    /// The largest size of each queue; its length is the number of queues. Powers of two.
    fn queue_sizes(&self) -> &[u16];

    /// Reads the device-specific configuration. Bytes past its end read as zero.
    fn read_config(&self, offset: u64, out: &mut [u8]);

    /// Writes the device-specific configuration. What is not writable is ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// The driver said DRIVER_OK: start. The queues are those it enabled, checked against guest memory.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stop: returns when no thread touches the queues and no I/O into guest memory is under way any more.
    /// Also called on a device that is not active.
    fn reset(&mut self);

    /// Stop as [`VirtioDevice::reset`] does, but so that the driver notices nothing: all I/O under way is finished and
    /// answered, and the queues come back as they stand, with their interrupts delivered. A later
    /// [`VirtioDevice::activate`] with these queues goes on where it stopped; it may be on another device of the same
    /// kind, in another process. A chain that was taken and not begun is put back ([`VirtQueue::put_back`]); what was
    /// half done is part of [`VirtioDevice::save`]. A device that is not active has no queues to give.
    fn suspend(&mut self) -> Result<Vec<ActiveQueue>, SuspendError>;

    /// What this device remembers beyond its registers and queues. Asked while it is suspended or not active.
    fn save(&self) -> DeviceState {
        DeviceState::default()
    }

    /// Takes over what [`VirtioDevice::save`] gave, here or in an earlier version of this program. Before `activate`.
    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        state.refuse_unless_empty()
    }
}

/// What an active device owns.
pub struct Activation {
    /// Guest memory.
    pub memory: GuestMemory,
    /// The queues that the driver enabled, in the order of their index.
    pub queues: Vec<ActiveQueue>,
    /// Tells the driver that the configuration changed.
    pub config_interrupt: ConfigInterrupt,
    /// The feature bits both sides agreed on, the transport's included.
    pub features: u64,
    /// Sets DEVICE_NEEDS_RESET.
    pub failure: DeviceFailure,
}

impl Activation {
    /// Takes the queue with this index out.
    pub fn take_queue(&mut self, index: u16) -> Result<ActiveQueue, ActivateError> {
        let at = self
            .queues
            .iter()
            .position(|queue| queue.index == index)
            .ok_or(ActivateError::QueueNotEnabled { index })?;
        Ok(self.queues.remove(at))
    }

    /// Whether the feature bit with this number was negotiated.
    pub fn has_feature(&self, bit: u32) -> bool {
        self.features.checked_shr(bit).unwrap_or(0) & 1 == 1
    }
}

/// One enabled queue and its two bells.
#[derive(Debug)]
pub struct ActiveQueue {
    /// Its number in the device.
    pub index: u16,
    /// The ring.
    pub queue: VirtQueue,
    /// Signalled when the driver has made chains available.
    pub kick: EventFd,
    /// Tells the driver that chains were used.
    pub interrupt: QueueInterrupt,
}

/// A device could not start. The guest sees DEVICE_NEEDS_RESET.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver left out a queue that this device cannot work without.
    #[error("the driver did not enable queue {index}")]
    QueueNotEnabled {
        /// The missing queue.
        index: u16,
    },
    /// A thread, an epoll or the backend could not be set up.
    #[error("cannot {what}")]
    Io {
        /// What was attempted.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl ActivateError {
    /// For `map_err`: the attempt and the reason.
    pub fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }
}
