//! The host bridge at 00:00.0: what an operating system expects to find first. It does nothing.

use std::ops::Range;

use super::bus::PciFunction;
use super::config::{ConfigSpace, Identity};
use crate::state::{FunctionState, RestoreError, SuspendError};

/// A function without a BAR.
pub struct HostBridge {
    config: ConfigSpace,
}

impl HostBridge {
    /// The generic PCI Express host bridge that guests know from other hypervisors (vendor 1b36, device 8).
    #[must_use]
    pub fn new() -> Self {
        let identity = Identity {
            vendor: 0x1b36,
            device: 0x0008,
            class: [0x06, 0x00, 0x00],
            revision: 0,
            subsystem: 0x1100,
        };
        Self { config: ConfigSpace::new(identity) }
    }
}

impl Default for HostBridge {
    fn default() -> Self {
        Self::new()
    }
}

impl PciFunction for HostBridge {
    fn config_read(&mut self, offset: u16, out: &mut [u8]) {
        self.config.read(offset, out);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
    }

    fn bar_size(&self) -> u32 {
        0
    }

    fn place_bar(&mut self, _address: u32) {}

    fn decoded(&self) -> Option<Range<u64>> {
        None
    }

    fn bar_read(&mut self, _offset: u64, out: &mut [u8]) {
        out.fill(0xff);
    }

    fn bar_write(&mut self, _offset: u64, _data: &[u8]) {}

    fn reset(&mut self) {}

    fn suspend(&mut self) -> Result<(), SuspendError> {
        Ok(())
    }

    fn resume(&mut self) {}

    fn save(&self) -> FunctionState {
        FunctionState { config: self.config.bytes().to_vec(), virtio: None }
    }

    fn restore(&mut self, state: &FunctionState) -> Result<(), RestoreError> {
        match &state.virtio {
            None => Ok(()),
            Some(_) => {
                Err(RestoreError::Malformed { what: "a host bridge with virtio registers".to_owned() })
            }
        }
    }
}
