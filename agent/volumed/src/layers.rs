//! The jobs that change which layers a volume has, on descriptors: growing, cloning, rolling back; and what the layers
//! say about changes.

use std::{
    fs::File,
    os::fd::OwnedFd,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use serio_control::message::{
    Body, ChangedRange, ChangedRanges, CloneVolume, Code, Empty, Failed, ListChanges, MergeLayer, MergeState,
    ResizeVolume, RollbackVolume, VdcKey,
};
use serio_volume::{
    Access, CloneError, LayerFiles, Maps, MergeError, MergeProgress, NewVolume, ResizeError, RollbackError,
    VdcSecret, Volume, VolumeFiles, clone_image,
};

use crate::copy::Progress;
use crate::jobs::{JobResult, create_failed, failed, invalid, io_code, layers, open_failed, volume_id};

/// Bytes that a merge copies between two looks at the pace.
const STEP_BYTES: u64 = 16 << 20;
/// Ranges in one answer: what fits well into a frame.
const RANGES_MAX: u32 = 4096;
/// Extents of changes that are looked up at once.
const EXTENTS_MAX: usize = 256;

/// The key as the engine wants it.
pub fn secret(key: Option<&VdcKey>) -> Result<Option<VdcSecret>, Failed> {
    let Some(key) = key else { return Ok(None) };
    match (<[u8; 16]>::try_from(&*key.id), <[u8; 32]>::try_from(&*key.secret)) {
        (Ok(id), Ok(bytes)) => Ok(Some(VdcSecret::new(id, bytes))),
        _ => Err(invalid("key", "a vdc's key has an id of 16 bytes and a secret of 32")),
    }
}

/// Grows a stopped volume.
pub fn resize_volume(ask: &ResizeVolume, descriptors: Vec<OwnedFd>) -> JobResult {
    let key = secret(ask.key.as_ref())?;
    let volume = Volume::open_with_key(layers(descriptors)?, Access::ReadWrite, key.as_ref());
    volume.map_err(open_failed)?.resize(ask.size_bytes).map_err(resize_failed)?;
    Ok(Body::Done(Empty {}))
}

fn resize_failed(error: ResizeError) -> Failed {
    match &error {
        ResizeError::Shrink { .. } | ResizeError::TooLarge(_) => {
            failed(Code::Precondition, "size_bytes", &error)
        }
        ResizeError::Raw | ResizeError::ReadOnly | ResizeError::Poisoned => {
            failed(Code::Precondition, "", &error)
        }
        ResizeError::Io { source, .. } => failed(io_code(source), "", &error),
        _ => failed(Code::Internal, "", &error),
    }
}

/// Takes the last layer off.
fn pop(files: &mut VolumeFiles, what: &str) -> Result<LayerFiles, Failed> {
    let missing = || invalid("descriptors", &format!("the descriptors of {what} are missing"));
    let last = files.layers.pop().ok_or_else(missing)?;
    if files.layers.is_empty() { Err(missing()) } else { Ok(last) }
}

/// A volume that shares its lower layers with another one, or with an image.
pub fn clone_volume(ask: &CloneVolume, descriptors: Vec<OwnedFd>) -> JobResult {
    let (volume, key) = (volume_id(&ask.volume_id)?, secret(ask.key.as_ref())?);
    if ask.image {
        // The image's data, a map for it, the head's data and map.
        let mut files = layers(descriptors)?;
        let head = pop(&mut files, "the head")?;
        let [LayerFiles { data: image, map }] = <[LayerFiles; 1]>::try_from(files.layers)
            .map_err(|_| invalid("descriptors", "an image has one data file and gets one map"))?;
        let new = NewVolume { volume, size_bytes: ask.size_bytes, maps: vec![map], head, key };
        clone_image(&image, new).map_err(clone_failed)?;
        return Ok(Body::Done(Empty {}));
    }
    // Two for each layer of the source, one more for its new map, and two for the head.
    let layers_count = descriptors.len().saturating_sub(2) / 3;
    if layers_count == 0 || descriptors.len() != layers_count * 3 + 2 {
        let why = "for each layer a data, a map and a new map are needed, and a data and a map of the head";
        return Err(invalid("descriptors", why));
    }
    let mut source = descriptors;
    let mut rest = source.split_off(2 * layers_count).into_iter().map(File::from);
    let maps: Vec<File> = rest.by_ref().take(layers_count).collect();
    let (Some(data), Some(map)) = (rest.next(), rest.next()) else {
        return Err(invalid("descriptors", "the descriptors of the head are missing"));
    };
    let head = LayerFiles { data, map };
    let new = NewVolume { volume, size_bytes: ask.size_bytes, maps, head, key };
    layers(source)?.clone_point(&ask.snapshot, new).map_err(clone_failed)?;
    Ok(Body::Done(Empty {}))
}

pub(crate) fn clone_failed(error: CloneError) -> Failed {
    match error {
        CloneError::Open(source) => open_failed(source),
        CloneError::Create(source) => create_failed(source),
        CloneError::Size { .. } => failed(Code::Invalid, "size_bytes", &error),
        CloneError::Key(_) => failed(Code::Precondition, "key", &error),
        CloneError::TooManyLayers(_) => failed(Code::Exhausted, "", &error),
        CloneError::Maps => failed(Code::Invalid, "descriptors", &error),
        CloneError::Io { ref source, .. } => failed(io_code(source), "", &error),
        _ => failed(Code::Io, "", &error),
    }
}

/// Puts a stopped volume back to a snapshot.
pub fn rollback_volume(ask: &RollbackVolume, descriptors: Vec<OwnedFd>) -> JobResult {
    let key = secret(ask.key.as_ref())?;
    let mut files = layers(descriptors)?;
    let new_head = pop(&mut files, "the new head")?;
    files.rollback(&ask.snapshot, new_head, ask.discard_later, key.as_ref()).map_err(rollback_failed)?;
    Ok(Body::Done(Empty {}))
}

fn rollback_failed(error: RollbackError) -> Failed {
    match error {
        RollbackError::Open(source) => open_failed(source),
        RollbackError::Create(source) => create_failed(source),
        RollbackError::Later(_) => failed(Code::Precondition, "discard_later", &error),
        RollbackError::Key(_) => failed(Code::Precondition, "key", &error),
        RollbackError::Io { ref source, .. } => failed(io_code(source), "", &error),
        _ => failed(Code::Internal, "", &error),
    }
}

/// Merges a layer of a stopped volume into the one above. Killed at any time, it goes on when it is asked again.
pub fn merge_layer(ask: &MergeLayer, descriptors: Vec<OwnedFd>, progress: &Progress) -> JobResult {
    let key = secret(ask.key.as_ref())?;
    let volume = Volume::open_with_key(layers(descriptors)?, Access::ReadWrite, key.as_ref());
    let volume = volume.map_err(open_failed)?;
    let done = merge(&volume, ask.layer, ask.bytes_per_s, progress).map_err(merge_failed)?;
    if !done.stays {
        return Ok(Body::Done(Empty {}));
    }
    Ok(Body::MergeState(MergeState {
        layer: ask.layer,
        done: true,
        stays: true,
        done_bytes: done.done_bytes,
        total_bytes: done.total_bytes,
        ..MergeState::default()
    }))
}

/// Merges to the end, `bytes_per_s` at most (0: as fast as it goes).
pub fn merge(
    volume: &Volume,
    layer: u64,
    bytes_per_s: u64,
    progress: &Progress,
) -> Result<MergeProgress, MergeError> {
    let mut merge = volume.merge(layer)?;
    let start = Instant::now();
    // Ten steps a second, so that the pace is even and the progress moves.
    let step_bytes = if bytes_per_s == 0 { STEP_BYTES } else { (bytes_per_s / 10).clamp(1, STEP_BYTES) };
    loop {
        let at = merge.step(step_bytes)?;
        progress.done.store(at.done_bytes, Ordering::Relaxed);
        progress.total.store(at.total_bytes, Ordering::Relaxed);
        if at.done {
            return Ok(at);
        }
        if bytes_per_s > 0 {
            let due = Duration::from_secs_f64(at.copied_bytes as f64 / bytes_per_s as f64);
            std::thread::sleep(due.saturating_sub(start.elapsed()));
        }
    }
}

fn merge_failed(error: MergeError) -> Failed {
    match &error {
        MergeError::NotSealed(_) => failed(Code::Precondition, "layer", &error),
        MergeError::Raw | MergeError::ReadOnly | MergeError::Poisoned | MergeError::NoHoles => {
            failed(Code::Precondition, "", &error)
        }
        MergeError::Io { source, .. } => failed(io_code(source), "", &error),
        _ => failed(Code::Internal, "", &error),
    }
}

/// A page of what has changed between two points. Maps only: no key is needed, and a VM above the later point goes on.
pub fn list_changes(ask: &ListChanges, descriptors: Vec<OwnedFd>) -> JobResult {
    let files = layers(descriptors)?;
    let to = Some(ask.to.as_str()).filter(|name| !name.is_empty());
    let maps = files.maps(to).map_err(open_failed)?;
    let max = ask.ranges_max.clamp(1, RANGES_MAX) as usize;
    let (ranges, next_offset) = changed_ranges(&maps, &ask.from, ask.offset, max)?;
    Ok(Body::ChangedRanges(ChangedRanges { ranges, next_offset }))
}

/// At most `max` ranges from `offset` on, in order; and where the next ones begin, if there are more.
pub fn changed_ranges(
    maps: &Maps,
    from: &str,
    offset: u64,
    max: usize,
) -> Result<(Vec<ChangedRange>, Option<u64>), Failed> {
    let size = maps.size_bytes();
    let mut ranges: Vec<ChangedRange> = Vec::new();
    let mut at = offset;
    while at < size {
        let extents = maps
            .changed_extents(from, at, size - at, EXTENTS_MAX)
            .map_err(|e| failed(Code::Precondition, "from", &e))?;
        for extent in &extents {
            if extent.dirty && !append(maps, extent.offset, extent.len, max, &mut ranges) {
                // What is whole so far is the page.
                let next = ranges.last().map_or(offset, |last| last.offset + last.len);
                return Ok((ranges, Some(next)));
            }
            at = extent.offset.saturating_add(extent.len);
        }
        if extents.is_empty() {
            break;
        }
    }
    Ok((ranges, None))
}

/// Appends a changed range, cut where zeros begin and end; false when there is no more room.
fn append(maps: &Maps, offset: u64, len: u64, max: usize, ranges: &mut Vec<ChangedRange>) -> bool {
    let (mut at, mut fits) = (offset, true);
    maps.extents(offset, len, |extent| {
        let (zero, full) = (extent.hole, ranges.len() >= max);
        match ranges.last_mut() {
            Some(last) if last.offset + last.len == at && last.zero == zero => last.len += extent.len,
            _ if full => fits = false,
            _ => ranges.push(ChangedRange { offset: at, len: extent.len, zero }),
        }
        at += extent.len;
        fits
    });
    fits
}
