//! The manifest of an archive: made of what the state has, and checked whole before anything is made of one.

use serio_api::v1;
use serio_store::record::{ImageRecord, Millis, SavedVm};
use serio_types::{Name, VdcName, VmSpec, VolumeSize, resource};

use super::super::convert::{self, Fields};
use crate::{error::Error, state::command::VdcSnapshotView};

/// No node makes a longer chain of points, and no VMM opens one.
const POINTS_MAX: usize = 32;
/// The most disks and cards of a VM, with room to spare: the state counts them.
const VOLUMES_MAX: usize = 64;
const NICS_MAX: usize = 64;
/// The largest state: `serio_vmm::snapshot` reads no larger one.
const STATE_BYTES_MAX: u64 = 96 << 20;

/// What an archive says of itself, checked.
#[derive(Debug, Clone)]
pub(super) struct Manifest {
    /// The VM where it was made.
    pub(super) vm: VdcName,
    /// The point's name.
    pub(super) point: Name,
    pub(super) create_time: Millis,
    pub(super) spec: VmSpec,
    /// Of the image's disk.
    pub(super) image_blake3: String,
    pub(super) paused_ns: u64,
    /// Bytes of the state and of what is held of the memory, the point first.
    pub(super) points: Vec<(u64, u64)>,
    /// The root first, then as the spec has them.
    pub(super) volumes: Vec<(Name, VolumeSize)>,
}

impl Manifest {
    /// Reads one.
    ///
    /// # Errors
    /// All that is wrong with it.
    pub(super) fn parse(json: &[u8]) -> Result<Self, Error> {
        let archive: v1::VmArchive = serde_json::from_slice(json)
            .map_err(|e| Error::invalid("data", format!("the archive's manifest cannot be read: {e}")))?;
        let spec = archive.spec.unwrap_or_default();
        for (what, count, max) in [
            ("points", archive.points.len(), POINTS_MAX),
            ("volumes", archive.volumes.len().max(spec.volumes.len()), VOLUMES_MAX),
            ("spec.nics", spec.nics.len(), NICS_MAX),
        ] {
            if count > max {
                return Err(Error::invalid(what, format!("{count}: at most {max}")));
            }
        }
        let mut fields = Fields::default();
        let (vm, point) = convert::field("source", resource::parse_vm_snapshot(&archive.source))?;
        let spec = convert::vm_spec(&vm.vdc, Some(spec))?;
        let image = archive.image.unwrap_or_default();
        if fields
            .take("image.name", resource::parse_image(&image.name))
            .is_some_and(|name| name != spec.image)
        {
            fields.wrong("image.name", "is another image than the spec's");
        }
        if archive.points.is_empty() {
            fields.wrong("points", "there are none");
        }
        for (at, point) in archive.points.iter().enumerate() {
            if point.state_bytes == 0 || point.state_bytes > STATE_BYTES_MAX {
                fields.wrong(
                    format!("points[{at}].state_bytes"),
                    format!("{}: at most {STATE_BYTES_MAX}", point.state_bytes),
                );
            }
            if point.memory_bytes != spec.memory.bytes() || point.held_bytes > point.memory_bytes {
                let problem = format!(
                    "{} of {}: the VM has {}",
                    point.held_bytes,
                    point.memory_bytes,
                    spec.memory.bytes()
                );
                fields.wrong(format!("points[{at}].memory_bytes"), problem);
            }
        }
        let volumes = volumes(&mut fields, &archive.volumes, &spec);
        let paused =
            archive.pause.and_then(|pause| std::time::Duration::try_from(pause).ok()).unwrap_or_default();
        let points = archive.points.iter().map(|p| (p.state_bytes, p.held_bytes)).collect();
        fields.done(Some(Self {
            vm,
            point,
            create_time: Millis(archive.create_time.map_or(0, |t| t.seconds.saturating_mul(1000))),
            spec,
            image_blake3: image.blake3,
            paused_ns: u64::try_from(paused.as_nanos()).unwrap_or(u64::MAX),
            points,
            volumes,
        }))
    }

    /// All of memory that it holds.
    pub(super) fn held_bytes(&self) -> u64 {
        self.points.iter().fold(0, |sum, (_, held)| sum.saturating_add(*held))
    }
}

/// The root and those of the spec, each once.
fn volumes(fields: &mut Fields, archived: &[v1::ArchivedVolume], spec: &VmSpec) -> Vec<(Name, VolumeSize)> {
    let mut volumes: Vec<(Name, VolumeSize)> = Vec::new();
    if archived.len() != spec.volumes.len().saturating_add(1) {
        fields.wrong(
            "volumes",
            format!("{}: the VM has its root and {} more", archived.len(), spec.volumes.len()),
        );
        return volumes;
    }
    for (at, volume) in archived.iter().enumerate() {
        let name = fields.take(format!("volumes[{at}].name"), volume.name.parse::<Name>());
        let size = fields.take(format!("volumes[{at}].size_bytes"), VolumeSize::try_from(volume.size_bytes));
        let Some((name, size)) = name.zip(size) else { continue };
        let other =
            at.checked_sub(1).and_then(|at| spec.volumes.get(at)).is_some_and(|wanted| *wanted != name);
        if other || volumes.iter().any(|(known, _)| *known == name) {
            fields.wrong(
                format!("volumes[{at}].name"),
                format!("`{name}` is not in its place, or there twice"),
            );
        }
        volumes.push((name, size));
    }
    volumes
}

/// What is written of a point; what is measured of its files is given with it.
pub(super) fn of(
    view: &VdcSnapshotView,
    saved: &SavedVm,
    image: &ImageRecord,
    points: Vec<v1::ArchivedPoint>,
    volumes: Vec<v1::ArchivedVolume>,
) -> v1::VmArchive {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    v1::VmArchive {
        source: view.resource.clone(),
        create_time: Some(convert::timestamp(view.record.create_time)),
        spec: Some(convert::proto_spec(&view.name.vdc, &saved.spec)),
        pause: Some(std::time::Duration::from_nanos(saved.paused_ns).into()),
        image: Some(v1::ArchivedImage {
            name: resource::image(&image.name),
            blake3: image.blake3.clone(),
            has_kernel: image.has_kernel,
        }),
        points,
        volumes,
        kernel: kernel.trim().to_owned(),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
    }
}
