//! What the disks and cards of a VM may do: as launched, and as changed while it runs.

use std::sync::Arc;

use serio_control::message::{self, Body, Code, SetLimits};
use serio_devices::limit::{Limiter, Limits, Rate};

use super::requests::{done, failed, no_volume};
use crate::devices::{Devices, mac_text};

/// The bounds of a device; absent: none.
pub(super) fn limits(limits: Option<message::Limits>) -> Limits {
    let limits = limits.unwrap_or_default();
    Limits {
        bytes: Rate { per_second: limits.bytes_per_second, burst: limits.bytes_burst },
        operations: Rate { per_second: limits.operations_per_second, burst: limits.operations_burst },
    }
}

/// Sets them; all or, if one of the devices is unknown, none.
pub(super) fn set(devices: &Devices, request: &SetLimits) -> Body {
    let mut changes: Vec<(Arc<Limiter>, Limits)> = Vec::new();
    for disk in &request.disks {
        let Some(known) = devices.disk(&disk.volume_id) else { return no_volume(&disk.volume_id) };
        changes.push((known.limiter.clone(), limits(disk.limits)));
    }
    for nic in &request.nics {
        let Some(known) = devices.nic(&nic.mac) else {
            let mac = <[u8; 6]>::try_from(nic.mac.as_slice()).map(mac_text);
            let mac = mac.unwrap_or_else(|_| format!("of {} bytes", nic.mac.len()));
            return failed(Code::Invalid, "nics", format!("this VM has no card with the address {mac}"));
        };
        changes.extend(known.limiters.iter().map(|limiter| (limiter.clone(), limits(nic.limits))));
    }
    for (limiter, limits) in changes {
        limiter.set(limits);
    }
    done()
}
