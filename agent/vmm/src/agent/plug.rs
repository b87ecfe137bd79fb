//! `Plug` and `Unplug`: disks and cards that come and go while the guest runs.
//!
//! One at a time, and none while the guest is being reset: what comes is in the machine that runs and in those that follow it.
//! What goes is closed before the answer, its volume's lock given back: whoever asked may open it elsewhere.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serio_control::message::{Body, Code, Failed, Plug, Unplug};

use super::launch::{self, Passed};
use super::requests::{done, refusal};
use super::state::State;
use crate::devices::Devices;
use crate::end::chain;
use crate::machine::Handle;
use crate::machine::hotplug::PlugError;

/// How long a guest may take when the request does not say, and at most.
const WAIT_MS: u32 = 10_000;
const WAIT_MS_MAX: u32 = 120_000;
/// How long others may still look at a device that is gone.
const CLOSE_WAIT: Duration = Duration::from_secs(5);

fn refused(error: &PlugError) -> Failed {
    let code = match error {
        PlugError::Full | PlugError::Device(_) => Code::Exhausted,
        _ => Code::Precondition,
    };
    refusal(code, "", chain(error))
}

fn running(state: &State) -> Result<(Handle, Arc<Devices>), Failed> {
    state.running().ok_or_else(|| refusal(Code::Precondition, "", "no VM is running here"))
}

/// Gives the guest one more.
pub(super) fn plug(state: &State, request: &Plug, descriptors: Vec<OwnedFd>) -> Body {
    // Until it is everywhere, no machine is made anew.
    let _alone = state.plugging();
    try_plug(state, request, descriptors).map_or_else(Body::Failed, |()| done())
}

fn try_plug(state: &State, request: &Plug, descriptors: Vec<OwnedFd>) -> Result<(), Failed> {
    let (vm, devices) = running(state)?;
    let mut passed = Passed::new(descriptors);
    let position = usize::try_from(request.position).unwrap_or(usize::MAX);
    let plugged = match (&request.disk, &request.nic) {
        (Some(disk), None) if devices.disk(&disk.volume_id).is_some() => return Ok(()),
        (None, Some(nic)) if devices.nic(&nic.mac).is_some() => return Ok(()),
        (Some(disk), None) => {
            let opened = launch::open_disk(disk, &mut passed);
            let mut disk = opened.map_err(|error| error.answer())?;
            disk.trouble = devices.trouble();
            vm.plug_disk(&devices, position, Arc::new(disk))
        }
        (None, Some(nic)) => {
            let opened = launch::open_nic(nic, &mut passed);
            let mut nic = opened.map_err(|error| error.answer())?;
            nic.trouble = devices.trouble();
            vm.plug_nic(&devices, position, Arc::new(nic))
        }
        _ => return Err(refusal(Code::Invalid, "", "give a disk or a card")),
    };
    plugged.map_err(|error| refused(&error))?;
    // The main thread tells the guest again if it does not listen yet.
    state.changed();
    Ok(())
}

/// Takes one away, if the guest lets go of it.
pub(super) fn unplug(state: &State, request: &Unplug) -> Body {
    try_unplug(state, request).map_or_else(Body::Failed, |()| done())
}

fn try_unplug(state: &State, request: &Unplug) -> Result<(), Failed> {
    let (vm, devices) = running(state)?;
    let wait_ms = if request.wait_ms == 0 { WAIT_MS } else { request.wait_ms.min(WAIT_MS_MAX) };
    let limit = Duration::from_millis(wait_ms.into());
    match (request.volume_id.as_str(), request.mac.as_slice()) {
        ("", []) => Err(refusal(Code::Invalid, "", "give a disk or a card")),
        ("", mac) => {
            let Some(nic) = devices.nic(mac) else { return Ok(()) };
            go(&vm, state, nic.slot(), limit)?;
            close(nic)
        }
        (name, _) => {
            let Some(disk) = devices.disk(name) else { return Ok(()) };
            if state.cuts().is_busy() || state.merges().is_busy(name) {
                let why = "a snapshot of it is being taken or its layers are being merged: ask again later";
                return Err(refusal(Code::Precondition, "volume_id", why));
            }
            go(&vm, state, disk.slot(), limit)?;
            close(disk)
        }
    }
}

fn go(vm: &Handle, state: &State, slot: Option<u8>, limit: Duration) -> Result<(), Failed> {
    let slot = slot.ok_or_else(|| refusal(Code::Internal, "", "it has no place on the bus"))?;
    vm.unplug(slot, limit, || state.changed()).map_err(|error| refused(&error))
}

/// Waits until nobody else has it, and closes it.
fn close<T>(last: Arc<T>) -> Result<(), Failed> {
    let (moment, never) = (Mutex::new(()), Condvar::new());
    let end = Instant::now() + CLOSE_WAIT;
    let mut last = last;
    loop {
        last = match Arc::try_unwrap(last) {
            Ok(device) => {
                drop(device);
                return Ok(());
            }
            Err(shared) if Instant::now() < end => shared,
            Err(_) => {
                return Err(refusal(Code::Internal, "", "it has gone, but is still looked at: ask again"));
            }
        };
        let guard = moment.lock().unwrap_or_else(PoisonError::into_inner);
        drop(never.wait_timeout(guard, Duration::from_millis(1)));
    }
}
