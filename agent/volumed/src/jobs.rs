//! What each request of `seriod` does, on the descriptors that came with it. One match per request; errors carry the
//! code and the field that the API shows.

use std::{
    fs::File,
    os::{fd::OwnedFd, unix::net::UnixListener},
    sync::{PoisonError, atomic::Ordering},
};

use serio_control::message::{
    self, Body, CheckVolume, Code, CreateVolume, Empty, Export, Failed, ImportImage, JobStatus, SnapshotInfo,
    SnapshotStopped, VolumeInfo,
};
use serio_formats::{self as formats, Format, FormatError, source::Source};
use serio_volume::{
    Access, CreateError, LayerFiles, NewVolume, OpenError, SnapshotError, Volume, VolumeFiles, clone_image,
    create_encrypted, create_layer,
};

use crate::{
    copy::{self, CopyError, Progress},
    export::VolumeExport,
    import::convert::{ConvertError, Start, Sum, Unwatched, convert},
    integrity,
    layers::{clone_failed, secret},
};

/// A refusal or failure, as the control protocol tells it.
pub type JobResult = Result<Body, Failed>;

/// Makes a failure with its chain of reasons in one line.
pub fn failed(code: Code, field: &str, error: &dyn std::error::Error) -> Failed {
    let mut message = error.to_string();
    let mut source = error.source();
    while let Some(reason) = source {
        message = format!("{message}: {reason}");
        source = reason.source();
    }
    Failed { code: code.into(), message, field: field.to_owned() }
}

pub(crate) fn invalid(field: &str, message: &str) -> Failed {
    Failed { code: Code::Invalid.into(), message: message.to_owned(), field: field.to_owned() }
}

pub(crate) fn io_code(source: &std::io::Error) -> Code {
    match source.raw_os_error() {
        Some(nix::libc::ENOSPC | nix::libc::EDQUOT | nix::libc::ENOMEM | nix::libc::EFBIG) => Code::Exhausted,
        _ => Code::Io,
    }
}

pub(crate) fn open_failed(error: OpenError) -> Failed {
    let code = match &error {
        OpenError::InUse { .. } => Code::InUse,
        OpenError::NoSuchSnapshot(_) => return failed(Code::Precondition, "snapshot", &error),
        OpenError::Io { source, .. } => io_code(source),
        OpenError::TooManyLayers(_) => Code::Exhausted,
        OpenError::Empty | OpenError::NotADisk(_) => Code::Invalid,
        OpenError::Key { .. } => Code::Precondition,
        OpenError::Header { .. } | OpenError::Chain(_) | OpenError::DamagedMap { .. } => Code::Io,
    };
    failed(code, "", &error)
}

pub(crate) fn create_failed(error: CreateError) -> Failed {
    match &error {
        CreateError::Size(_) | CreateError::Unaligned(_) => failed(Code::Invalid, "size_bytes", &error),
        CreateError::Key(_) => failed(Code::Internal, "", &error),
        CreateError::InUse => failed(Code::InUse, "", &error),
        CreateError::Shared(_) => failed(Code::Precondition, "", &error),
        CreateError::Io { source, .. } => failed(io_code(source), "", &error),
    }
}

fn copy_failed(error: CopyError) -> Failed {
    match &error {
        CopyError::Length { .. } | CopyError::Empty => failed(Code::Invalid, "data", &error),
        CopyError::TooLarge(_) => failed(Code::Invalid, "size_bytes", &error),
        CopyError::Io { source, .. } => failed(io_code(source), "", &error),
    }
}

fn snapshot_failed(error: SnapshotError) -> Failed {
    match &error {
        SnapshotError::Name { .. } => failed(Code::Invalid, "snapshot", &error),
        SnapshotError::Raw | SnapshotError::ReadOnly | SnapshotError::Poisoned => {
            failed(Code::Precondition, "", &error)
        }
        SnapshotError::TooManyLayers(_) => failed(Code::Exhausted, "", &error),
        SnapshotError::NotDrained(_) => failed(Code::Internal, "", &error),
        SnapshotError::Io { source, .. } => failed(io_code(source), "", &error),
        SnapshotError::Create(CreateError::Io { source, .. }) => failed(io_code(source), "", &error),
        SnapshotError::Create(_) => failed(Code::Precondition, "", &error),
    }
}

/// Takes exactly `N` descriptors.
fn exactly<const N: usize>(descriptors: Vec<OwnedFd>) -> Result<[File; N], Failed> {
    let files: Vec<File> = descriptors.into_iter().map(File::from).collect();
    let got = files.len();
    files.try_into().map_err(|_| invalid("descriptors", &format!("{N} descriptors are needed, {got} came")))
}

/// Pairs of data and map, oldest first.
pub(crate) fn layers(descriptors: Vec<OwnedFd>) -> Result<VolumeFiles, Failed> {
    if descriptors.is_empty() || !descriptors.len().is_multiple_of(2) {
        return Err(invalid("descriptors", "a data and a map descriptor are needed for each layer"));
    }
    let mut files = descriptors.into_iter().map(File::from);
    let mut layers = Vec::new();
    while let (Some(data), Some(map)) = (files.next(), files.next()) {
        layers.push(LayerFiles { data, map });
    }
    Ok(VolumeFiles { layers })
}

/// The 16 bytes of a UUID in its text form.
pub(crate) fn volume_id(text: &str) -> Result<[u8; 16], Failed> {
    let digits: Vec<u8> = text.bytes().filter(|b| *b != b'-').collect();
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    let bytes: Option<Vec<u8>> = digits.chunks(2).map(byte).collect();
    bytes
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(|| invalid("volume_id", &format!("`{text}` is not a UUID")))
}

/// The first layer's files of a new volume, those of the encrypted head above it if it shall have one, and the image.
fn new_files(
    ask: &CreateVolume,
    mut descriptors: Vec<OwnedFd>,
) -> Result<(LayerFiles, Option<LayerFiles>, Option<File>), Failed> {
    let image = if ask.from_image { descriptors.pop().map(File::from) } else { None };
    if ask.from_image && image.is_none() {
        return Err(invalid("descriptors", "the image's descriptor is missing"));
    }
    if ask.key.is_none() {
        let [data, map] = exactly(descriptors)?;
        return Ok((LayerFiles { data, map }, None, image));
    }
    let [data, map, head_data, head_map] = exactly(descriptors)?;
    Ok((LayerFiles { data, map }, Some(LayerFiles { data: head_data, map: head_map }), image))
}

/// An empty volume, or one with an image's content.
pub fn create_volume(ask: &CreateVolume, descriptors: Vec<OwnedFd>, progress: &Progress) -> JobResult {
    let (id, key) = (volume_id(&ask.volume_id)?, secret(ask.key.as_ref())?);
    let (files, head, image) = new_files(ask, descriptors)?;
    if let Some(image) = &image {
        let image_bytes = image.metadata().map_err(|e| failed(Code::Io, "image", &e))?.len();
        if image_bytes > ask.size_bytes {
            let why = format!(
                "the image has {image_bytes} bytes, the volume would have {}: ask for a larger size",
                ask.size_bytes
            );
            return Err(invalid("size_bytes", &why));
        }
        copy::clone_file(image, &files.data, progress).map_err(copy_failed)?;
    }
    match (head, key, image) {
        // The image's bytes are no secret of the vdc: they are the plain bottom, and what is written is encrypted above.
        (Some(head), Some(key), Some(_)) => {
            let new = NewVolume {
                volume: id,
                size_bytes: ask.size_bytes,
                maps: vec![files.map],
                head,
                key: Some(key),
            };
            files.data.sync_all().map_err(|e| failed(io_code(&e), "", &e))?;
            clone_image(&files.data, new).map_err(clone_failed)?;
        }
        (Some(head), Some(key), None) => {
            create_encrypted(&files, &head, ask.size_bytes, id, &key).map_err(create_failed)?;
        }
        _ => create_layer(&files, ask.size_bytes, id, true).map_err(create_failed)?,
    }
    Ok(Body::Done(Empty {}))
}

/// A stream (raw) or a file (any format) into an image's data.
pub fn import_image(ask: &ImportImage, descriptors: Vec<OwnedFd>, progress: &Progress) -> JobResult {
    let format: Format = ask.format.parse().map_err(|e| failed(Code::Invalid, "format", &e))?;
    let [from, to] = exactly(descriptors)?;
    let max = if ask.size_bytes_max == 0 { serio_volume::SIZE_BYTES_MAX } else { ask.size_bytes_max };
    let imported = match format {
        Format::Raw => copy::import_raw(from, &to, ask.expected_bytes, max, progress).map_err(copy_failed)?,
        Format::Qcow2 | Format::Vmdk => {
            let source = Source::new(from).map_err(|e| failed(Code::Io, "", &e))?;
            let (expected, arrived) = (ask.expected_bytes, source.len());
            if expected > 0 && expected != arrived {
                return Err(copy_failed(CopyError::Length { expected, arrived }));
            }
            // Everything is looked at before the first byte is written.
            let mut image =
                formats::open(source, format, max, &mut formats::NoBackings).map_err(format_failed)?;
            let start = Start { offset: 0, sum: Sum::new(true) };
            convert(image.as_mut(), &to, start, progress, &mut Unwatched).map_err(convert_failed)?
        }
    };
    Ok(Body::JobStatus(JobStatus {
        size_bytes: imported.size_bytes,
        blake3: imported.blake3.to_vec(),
        ..status(progress)
    }))
}

fn format_failed(error: FormatError) -> Failed {
    match &error {
        FormatError::Malformed { .. } | FormatError::Unsupported { .. } | FormatError::NotAllowed(_) => {
            failed(Code::Invalid, "data", &error)
        }
        FormatError::TooLarge { .. } => failed(Code::Invalid, "size_bytes", &error),
        FormatError::Io(source) | FormatError::Named { source, .. } => failed(io_code(source), "", &error),
        FormatError::Nbd(_) => failed(Code::Io, "", &error),
    }
}

fn convert_failed(error: ConvertError) -> Failed {
    match error {
        ConvertError::Image(error) => format_failed(error),
        ConvertError::Io { ref source, .. } => failed(io_code(source), "", &error),
        ConvertError::Stopped => failed(Code::Precondition, "", &error),
    }
}

/// Seals the head of a stopped volume.
pub fn snapshot_stopped(ask: &SnapshotStopped, descriptors: Vec<OwnedFd>) -> JobResult {
    let mut files = layers(descriptors)?;
    let new_head = match files.layers.pop() {
        Some(layer) if !files.layers.is_empty() => layer,
        _ => return Err(invalid("descriptors", "the new head's descriptors are missing")),
    };
    let key = secret(ask.key.as_ref())?;
    let volume = Volume::open_with_key(files, Access::ReadWrite, key.as_ref()).map_err(open_failed)?;
    volume.snapshot(new_head, &ask.snapshot).map_err(snapshot_failed)?;
    Ok(Body::Done(Empty {}))
}

/// Checks a volume, and scrubs it; also one that is in use.
pub fn check_volume(ask: &CheckVolume, descriptors: Vec<OwnedFd>, progress: &Progress) -> JobResult {
    integrity::check_volume(ask, &layers(descriptors)?, progress)
}

/// What the headers say; also of a volume that is in use.
pub fn inspect_volume(descriptors: Vec<OwnedFd>) -> JobResult {
    let found = layers(descriptors)?.inspect().map_err(open_failed)?;
    let snapshots = found.snapshots.into_iter().map(|s| SnapshotInfo {
        name: s.name,
        // At most a few hundred layers exist.
        layer: u32::try_from(s.layer).unwrap_or(u32::MAX),
        create_time: s.time_s,
    });
    Ok(Body::VolumeInfo(VolumeInfo {
        size_bytes: found.size_bytes,
        snapshots: snapshots.collect(),
        layers: u32::try_from(found.layers).unwrap_or(u32::MAX),
        chain: found.chain,
    }))
}

/// Opens what an export asks for; the caller serves it.
pub fn open_export(
    ask: &Export,
    mut descriptors: Vec<OwnedFd>,
) -> Result<(UnixListener, VolumeExport), Failed> {
    if descriptors.is_empty() {
        return Err(invalid("descriptors", "the listening socket is missing"));
    }
    let listener = UnixListener::from(descriptors.remove(0));
    let key = secret(ask.key.as_ref())?;
    let files = layers(descriptors)?;
    let release = match ask.release {
        true => Some(files.release(&ask.snapshot).map_err(open_failed)?),
        false => None,
    };
    let volume = match (ask.snapshot.as_str(), ask.read_only) {
        ("", true) => Volume::open_with_key(files, Access::ReadOnly, key.as_ref()),
        ("", false) => Volume::open_with_key(files, Access::ReadWrite, key.as_ref()),
        (name, _) => Volume::open_snapshot_with_key(files, name, key.as_ref()),
    };
    let volume = volume.map_err(open_failed)?;
    let export = VolumeExport::new(volume, &ask.export_name, &ask.volume_id);
    Ok((
        listener,
        match release {
            Some(release) => export.releasing(release),
            None => export,
        },
    ))
}

/// How far a job is.
pub fn status(progress: &Progress) -> JobStatus {
    let place = *progress.scrubbed.lock().unwrap_or_else(PoisonError::into_inner);
    JobStatus {
        done_bytes: progress.done.load(Ordering::Relaxed),
        total_bytes: progress.total.load(Ordering::Relaxed),
        scrubbed: place.map(|place| message::ScrubPlace { layer: place.layer, page: place.page }),
        ..JobStatus::default()
    }
}
