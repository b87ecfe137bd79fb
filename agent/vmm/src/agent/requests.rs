//! What each request does. One request, one answer. Only `PrepareSnapshot` and `Unplug` may wait for the guest, within its time,
//! and `Pause` and `SaveVm` for I/O under way; that costs nobody but their own connection's thread.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use serio_control::message::{BalloonStats, Body, Code, Empty, Failed, Launch, ResizeVolume, SnapshotVolume};
use serio_devices::balloon::BalloonStatus;
use serio_devices::vsock::Outgoing;
use serio_volume::{LayerFiles, ResizeError};

use super::counters;
use super::cut;
use super::launch::{self, Passed};
use super::limits;
use super::plug;
use super::save;
use super::state::State;
use crate::devices::Devices;
use crate::end::{End, chain};
use crate::machine::Handle;

pub(super) fn done() -> Body {
    Body::Done(Empty {})
}

pub(super) fn refusal(code: Code, field: &str, message: impl Into<String>) -> Failed {
    Failed { code: code.into(), message: message.into(), field: field.to_owned() }
}

pub(super) fn failed(code: Code, field: &str, message: impl Into<String>) -> Body {
    Body::Failed(refusal(code, field, message))
}

/// Does what `body` asks for.
pub(super) fn answer(state: &Arc<State>, body: Option<Body>, descriptors: Vec<OwnedFd>) -> Body {
    match body {
        Some(Body::Launch(launch)) => start(state, &launch, descriptors),
        Some(Body::Status(_)) => Body::VmStatus(state.status()),
        Some(Body::Stop(_)) if state.stop(End::Stopped) => done(),
        Some(Body::Stop(_)) => failed(Code::Precondition, "", "the VM is being launched: ask again"),
        Some(Body::PowerButton(_)) => with_vm(state, |vm, _| match vm.power_button() {
            Ok(()) => done(),
            Err(error) => failed(Code::Io, "", format!("the power button could not be pressed: {error}")),
        }),
        Some(Body::Reset(_)) => with_vm(state, |vm, _| {
            vm.stop(End::Reset);
            done()
        }),
        Some(Body::Pause(_)) => with_vm(state, |vm, _| match vm.pause() {
            Ok(()) => {
                state.changed();
                done()
            }
            Err(error) => failed(Code::Precondition, "", chain(&error)),
        }),
        Some(Body::Resume(_)) => with_vm(state, |vm, _| {
            vm.resume();
            state.changed();
            done()
        }),
        Some(Body::SaveVm(request)) => with_vm(state, |vm, devices| {
            let answer = save::save(vm, devices, &request, descriptors);
            state.changed();
            answer
        }),
        Some(Body::SnapshotVolume(request)) => {
            with_vm(state, |_, devices| snapshot(devices, &request, descriptors))
        }
        Some(Body::PrepareSnapshot(request)) => {
            with_vm(state, |vm, devices| state.cuts().prepare(devices, vm.is_paused(), &request, descriptors))
        }
        Some(Body::HoldSnapshot(request)) => state.cuts().hold(&request),
        Some(Body::FinishSnapshot(request)) => state.cuts().finish(&request),
        Some(Body::MergeLayer(request)) => {
            with_vm(state, |_, devices| state.merges().begin(devices, &request))
        }
        Some(Body::MergeQuery(request)) => {
            with_vm(state, |_, devices| state.merges().query(devices, &request))
        }
        Some(Body::ResizeVolume(request)) => with_vm(state, |_, devices| resize(devices, &request)),
        Some(Body::SetBalloon(request)) => with_vm(state, |vm, devices| {
            if request.target_bytes > vm.memory_bytes() {
                let what = format!("the VM has {} bytes of memory", vm.memory_bytes());
                return failed(Code::Invalid, "target_bytes", what);
            }
            devices.balloon.set_target(request.target_bytes);
            done()
        }),
        Some(Body::BalloonQuery(_)) => with_vm(state, |_, devices| {
            devices.balloon.refresh();
            Body::BalloonStats(balloon_stats(&devices.balloon.status()))
        }),
        Some(Body::CountersQuery(_)) => {
            with_vm(state, |vm, devices| Body::VmCounters(counters::counters(vm, devices)))
        }
        Some(Body::SetLimits(request)) => with_vm(state, |_, devices| limits::set(devices, &request)),
        Some(Body::Plug(request)) => plug::plug(state, &request, descriptors),
        Some(Body::Unplug(request)) => plug::unplug(state, &request),
        Some(Body::SetVsockBroker(_)) => with_vm(state, |_, devices| set_broker(devices, descriptors)),
        _ => failed(Code::Invalid, "", "a VMM does not know this request: is this the right socket?"),
    }
}

fn with_vm(state: &State, act: impl FnOnce(&Handle, &Arc<Devices>) -> Body) -> Body {
    match state.running() {
        Some((handle, devices)) => act(&handle, &devices),
        None => failed(Code::Precondition, "", "no VM is running here"),
    }
}

fn start(state: &Arc<State>, request: &Launch, descriptors: Vec<OwnedFd>) -> Body {
    if !state.begin_launch(&request.vm_id) {
        return failed(Code::Precondition, "", "this process was given its VM already");
    }
    let mut passed = Passed::new(descriptors);
    let exit = launch::take_exit(request, &mut passed);
    let kept = exit.as_ref().ok().and_then(|exit| exit.try_clone().ok());
    match exit.and_then(|exit| launch::launch(request, passed, exit)) {
        Ok(launched) => {
            state.launched(launched);
            done()
        }
        Err(error) => {
            let record = error.record();
            super::say(format_args!("the VM was not launched: {}", record.reason));
            if let Some(exit) = kept {
                launch::write_exit_record(&exit, &record);
            }
            state.ended(record);
            Body::Failed(error.answer())
        }
    }
}

fn balloon_stats(status: &BalloonStatus) -> BalloonStats {
    let guest = (0u32..).zip(status.guest.values).filter_map(|(tag, value)| Some((tag, value?))).collect();
    BalloonStats {
        target_bytes: status.target_bytes,
        actual_bytes: status.actual_bytes,
        released_bytes: status.released_bytes,
        guest,
        age_ms: status.age.map_or(0, |age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX)),
    }
}

/// Where the guest's connections go from now on: an older broker ended with its daemon.
fn set_broker(devices: &Devices, descriptors: Vec<OwnedFd>) -> Body {
    match (&devices.vsock, descriptors.into_iter().next()) {
        (Some(vsock), Some(broker)) => {
            vsock.set_outgoing(Outgoing::Broker(broker));
            done()
        }
        (None, _) => failed(Code::Precondition, "vsock", "this VM has no vsock device"),
        (_, None) => failed(Code::Invalid, "descriptors", "pass the broker's socket"),
    }
}

pub(super) fn no_volume(name: &str) -> Body {
    failed(Code::Invalid, "volume_id", format!("this VM has no volume `{name}`"))
}

/// Grows a volume, then tells the guest.
fn resize(devices: &Devices, request: &ResizeVolume) -> Body {
    let Some(disk) = devices.disk(&request.volume_id) else { return no_volume(&request.volume_id) };
    match disk.volume.resize(request.size_bytes) {
        Ok(()) => {
            disk.bell.ring();
            done()
        }
        Err(error) => {
            let (code, field) = match &error {
                ResizeError::Shrink { .. } | ResizeError::TooLarge(_) | ResizeError::Unaligned(_) => {
                    (Code::Invalid, "size_bytes")
                }
                ResizeError::Raw | ResizeError::ReadOnly => (Code::Precondition, "volume_id"),
                ResizeError::Poisoned | ResizeError::NotDrained => (Code::Precondition, ""),
                ResizeError::Io { .. } => (Code::Io, ""),
            };
            failed(code, field, chain(&error))
        }
    }
}

fn snapshot(devices: &Devices, request: &SnapshotVolume, descriptors: Vec<OwnedFd>) -> Body {
    let Some(disk) = devices.disk(&request.volume_id) else { return no_volume(&request.volume_id) };
    let mut passed = Passed::new(descriptors);
    let data = passed.take("data_fd", request.data_fd);
    let map = passed.take("map_fd", request.map_fd);
    let (data, map) = match (data, map) {
        (Ok(data), Ok(map)) => (File::from(data), File::from(map)),
        (Err(error), _) | (_, Err(error)) => return Body::Failed(error.answer()),
    };
    match disk.volume.snapshot(LayerFiles { data, map }, &request.snapshot) {
        Ok(_) => done(),
        Err(error) => {
            let (code, field) = cut::refused(&error);
            failed(code, field, chain(&error))
        }
    }
}
