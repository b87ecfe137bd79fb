//! `SaveVm`: the whole VM into two files, and its volumes sealed at the same point.
//!
//! ```text
//!   pause ─► state and memory are written ─► volumes are sealed ─► resume ─► both files are synced ─► SavedVm
//! ```
//!
//! While it is paused nothing writes to memory or to a volume: so what is sealed is what the memory knows of its disks. If the
//! one who asks still has the snapshot that this VM was last saved in, or went on from, only the pages that changed since are
//! written. What can fail comes first: a volume is sealed only when both files are written. They are synced when the VM runs again, since
//! that takes longest; until the answer they are not to be relied upon.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::time::Instant;

use serio_control::message::{Body, Code, Failed, SaveVm, SavedVm};

use super::cut::{self, Part};
use super::launch::Passed;
use super::requests::refusal;
use crate::devices::Devices;
use crate::end::chain;
use crate::machine::{Handle, PauseError};
use crate::snapshot::{self, Point, WriteError};

/// Does it; the answer.
pub(super) fn save(vm: &Handle, devices: &Devices, request: &SaveVm, descriptors: Vec<OwnedFd>) -> Body {
    match try_save(vm, devices, request, descriptors) {
        Ok(saved) => Body::SavedVm(saved),
        Err(refused) => Body::Failed(refused),
    }
}

fn try_save(
    vm: &Handle,
    devices: &Devices,
    request: &SaveVm,
    descriptors: Vec<OwnedFd>,
) -> Result<SavedVm, Failed> {
    let mut passed = Passed::new(descriptors);
    let mut take = |field, index| passed.take(field, index).map(File::from).map_err(|error| error.answer());
    let state = take("state_fd", request.state_fd)?;
    let memory = take("memory_fd", request.memory_fd)?;
    let id = match request.id.as_slice() {
        [] => None,
        id => Some(
            <[u8; 16]>::try_from(id).map_err(|_| refusal(Code::Invalid, "id", "an id has sixteen bytes"))?,
        ),
    };
    let parts = cut::parts(devices, (&request.snapshot, &request.volumes), &mut passed)?;
    let began = Instant::now();
    let was_paused = vm.is_paused();
    vm.pause().map_err(|error| {
        let code = if matches!(error, PauseError::Over) { Code::Precondition } else { Code::Internal };
        refusal(code, "", chain(&error))
    })?;
    let written = vm
        .save(|saved| {
            let known = |base: &[u8; 16]| request.bases.iter().any(|known| known == base);
            let since = saved.since.filter(|(base, _)| id.is_some() && known(&base.id));
            let point = Point { id, since };
            let written = snapshot::write(saved.memory, saved.state, point, (&state, &memory))
                .map_err(|error| io(&error))?;
            seal(parts, &request.snapshot)?;
            let base = since.map_or_else(Vec::new, |(base, _)| base.id.to_vec());
            Ok(((written.memory_bytes, base), written.link))
        })
        .map_err(|error| refusal(Code::Io, "", chain(&error)))
        .and_then(|written| written);
    let stays = was_paused || (request.stay_paused && written.is_ok());
    if !stays {
        vm.resume();
    }
    let paused_ns = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
    let (memory_bytes, base) = written?;
    if let Err(error) = snapshot::sync((&state, &memory)) {
        vm.forget_snapshot();
        return Err(io(&error));
    }
    Ok(SavedVm { memory_bytes, paused_ns, base })
}

fn io(error: &WriteError) -> Failed {
    let field = match error {
        WriteError::Memory(_) => "memory_fd",
        WriteError::State(_) => "state_fd",
    };
    refusal(Code::Io, field, chain(error))
}

fn seal(parts: Vec<Part>, snapshot: &str) -> Result<(), Failed> {
    let mut sealed: Vec<String> = Vec::with_capacity(parts.len());
    for part in parts {
        let done: Vec<&str> = sealed.iter().map(String::as_str).collect();
        part.volume
            .snapshot(part.head, snapshot)
            .map_err(|error| cut::failed_at(&part.name, &error, &done))?;
        sealed.push(part.name);
    }
    Ok(())
}
