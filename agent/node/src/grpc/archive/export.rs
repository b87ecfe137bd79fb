//! A snapshot on its way out.

use std::{
    io::{self, Write},
    os::unix::fs::MetadataExt,
    time::Duration,
};

use serio_api::v1::{ArchivedPoint, ArchivedVolume, VmArchivePiece};
use serio_archive::Writer;
use serio_nbd::client::Client;
use serio_store::record::{ImageRecord, Made, SavedVm};
use serio_types::{Name, VdcName, resource};
use tokio::sync::mpsc;
use tonic::Status;

use super::{PIECE_BYTES_MAX, disks, manifest};
use crate::{
    error::{Error, chain},
    grpc::{Context, unexpected},
    state::command::{Answer, Command, Mutation, Query, SnapshotView, VdcSnapshotView},
    supervise::SavedFiles,
};

/// The longest that one may take. Its exports end with their client, so only one whose client never came lives so long.
const TTL: Duration = Duration::from_secs(7 * 24 * 60 * 60);
/// The archive beside what it holds: heads of records, states.
const BESIDE_BYTES: u64 = 1 << 20;

/// Everything that goes into an archive, open.
pub(super) struct Outgoing {
    resource: String,
    manifest: Vec<u8>,
    files: Vec<(SavedFiles, ArchivedPoint)>,
    disks: Vec<(Client, u64)>,
    exports: Vec<Name>,
    estimated_bytes: u64,
}

/// The rows of a point.
struct Point {
    view: VdcSnapshotView,
    saved: SavedVm,
    image: ImageRecord,
    /// Root first, then as the spec has them.
    parts: Vec<SnapshotView>,
}

async fn find(context: &Context, vm: VdcName, name: Name) -> Result<Point, Error> {
    let resource = resource::vm_snapshot(&vm, &name);
    let root = match context.query(Query::Vm(vm.clone())).await? {
        Answer::Vms(views) => views.first().map(|view| view.record.root_volume),
        other => return Err(unexpected(&other)),
    };
    let Answer::VdcSnapshots(views) = context.query(Query::VmSnapshots(vm)).await? else {
        return Err(Error::not_found(resource));
    };
    let view = views.into_iter().find(|view| view.record.name == name);
    let view = view.ok_or_else(|| Error::not_found(resource.as_str()))?;
    if view.record.state != Made::Ready {
        return Err(Error::precondition(resource, "is not whole: it is being deleted"));
    }
    let saved = view.record.saved.as_deref().cloned().ok_or_else(|| Error::not_found(resource.as_str()))?;
    let lacks = |volume: &str| {
        let why = format!("has no part of {volume} any more: that volume was deleted");
        Error::precondition(resource.as_str(), why)
    };
    let root = view.parts.iter().find(|part| Some(part.record.volume) == root);
    let mut parts = vec![root.ok_or_else(|| lacks("its root"))?.clone()];
    for name in &saved.spec.volumes {
        let part = view.parts.iter().find(|part| part.volume.name == *name);
        parts.push(part.ok_or_else(|| lacks(name.as_str()))?.clone());
    }
    let image = match context.query(Query::Images(Some(saved.spec.image.clone()))).await? {
        Answer::Images(mut images) => images.pop().ok_or(Error::Ending)?,
        other => return Err(unexpected(&other)),
    };
    Ok(Point { view, saved, image, parts })
}

/// Opens everything; on an error nothing stays open.
pub(super) async fn open(context: &Context, vm: VdcName, name: Name) -> Result<Outgoing, Error> {
    let point = find(context, vm, name).await?;
    let mut files = Vec::new();
    for uid in std::iter::once(&point.view.record.uid).chain(&point.saved.bases) {
        let failed = |e| Error::Failed { doing: "opening the snapshot", why: chain(&e) };
        let saved = context.supervisor.open_saved(point.saved.vm, *uid).map_err(failed)?;
        let described = describe(&saved).map_err(|e| super::host("opening the snapshot", &e))?;
        files.push((saved, described));
    }
    let volume = |part: &SnapshotView| ArchivedVolume {
        name: part.volume.name.to_string(),
        size_bytes: part.record.size_bytes,
    };
    let volumes = point.parts.iter().map(volume).collect();
    let points = files.iter().map(|(_, described)| *described).collect();
    let manifest = manifest::of(&point.view, &point.saved, &point.image, points, volumes);
    let manifest = serde_json::to_vec(&manifest)
        .map_err(|e| Error::Failed { doing: "describing the snapshot", why: e.to_string() })?;
    let held = files.iter().fold(BESIDE_BYTES, |sum, (_, point)| sum.saturating_add(point.held_bytes));
    let mut going = Outgoing {
        resource: point.view.resource.clone(),
        manifest,
        files,
        disks: Vec::new(),
        exports: Vec::new(),
        estimated_bytes: held,
    };
    for part in &point.parts {
        if let Err(error) = going.open_disk(context, part).await {
            going.close(context).await;
            return Err(error);
        }
    }
    Ok(going)
}

fn describe(saved: &SavedFiles) -> io::Result<ArchivedPoint> {
    let memory = saved.memory.metadata()?;
    Ok(ArchivedPoint {
        state_bytes: saved.state.metadata()?.len(),
        memory_bytes: memory.len(),
        held_bytes: memory.blocks().saturating_mul(512).min(memory.len()),
    })
}

impl Outgoing {
    async fn open_disk(&mut self, context: &Context, part: &SnapshotView) -> Result<(), Error> {
        let (volume, snapshot) = (part.volume.clone(), Some(part.record.name.clone()));
        let export = Mutation::CreateExport {
            volume,
            snapshot,
            writable: false,
            once: true,
            release: false,
            ttl: TTL,
        };
        let id = match context.apply(export, None).await? {
            Answer::Export(view) => view.record.id,
            other => return Err(unexpected(&other)),
        };
        self.exports.push(id.clone());
        let ended =
            || Error::Failed { doing: "opening the snapshot", why: format!("exports/{id} has ended") };
        let socket = context.handles.export(&id).ok_or_else(ended)?.socket().to_owned();
        let name = id.to_string();
        let disk = tokio::task::spawn_blocking(move || disks::connect(&socket, &name));
        let disk = disk.await.unwrap_or(Err(Error::Ending))?;
        let size = part.record.size_bytes;
        if disk.size_bytes() != size {
            let why = format!("{} has {} bytes, its row says {size}", part.volume, disk.size_bytes());
            return Err(Error::Failed { doing: "opening the snapshot", why });
        }
        self.disks.push((disk, size));
        let (supervisor, uid) = (context.supervisor.clone(), part.record.volume);
        let taken = tokio::task::spawn_blocking(move || supervisor.allocated_bytes(uid).unwrap_or_default());
        let taken = taken.await.unwrap_or_default();
        let about = taken.own_bytes.saturating_add(taken.shared_bytes).min(size);
        self.estimated_bytes = self.estimated_bytes.saturating_add(about);
        Ok(())
    }

    /// Sends all of it, and closes it.
    pub(super) async fn send(mut self, context: &Context, to: mpsc::Sender<Result<VmArchivePiece, Status>>) {
        let manifest = std::mem::take(&mut self.manifest);
        let (files, disks) = (std::mem::take(&mut self.files), std::mem::take(&mut self.disks));
        let sink =
            Pieces { to: to.clone(), piece: Vec::new(), estimated_bytes: self.estimated_bytes, bytes: 0 };
        let work = tokio::task::spawn_blocking(move || write(&manifest, &files, &disks, sink));
        let done = work.await.unwrap_or(Err(Error::Ending));
        self.close(context).await;
        let (kind, message) = match &done {
            Ok(bytes) => ("exported", format!("all of it was sent to another place, {bytes} bytes")),
            Err(error) => ("export-failed", format!("its export broke off: {}", chain(error))),
        };
        let note = Command::Note { resource: self.resource.clone(), kind, message };
        // It has happened, whether it is noted or not.
        let _ = context.state.ask(note).await;
        if let Err(error) = done {
            // Nobody may be there to hear it.
            let _ = to.send(Err(error.into())).await;
        }
    }

    async fn close(&mut self, context: &Context) {
        self.disks.clear();
        for id in self.exports.drain(..) {
            // It has mostly ended by itself.
            let _ = context.apply(Mutation::DeleteExport { id }, None).await;
        }
    }
}

fn write(
    manifest: &[u8],
    files: &[(SavedFiles, ArchivedPoint)],
    disks: &[(Client, u64)],
    sink: Pieces,
) -> Result<u64, Error> {
    let mut writer = Writer::new(sink, manifest).map_err(|_| Error::Ending)?;
    for (saved, point) in files {
        disks::write_file(&mut writer, &saved.state, point.state_bytes)?;
        disks::write_file(&mut writer, &saved.memory, point.memory_bytes)?;
    }
    for (disk, bytes) in disks {
        disks::write_disk(&mut writer, disk, *bytes)?;
    }
    writer.finish().map(|sink| sink.bytes).map_err(|_| Error::Ending)
}

/// Makes pieces of what is written, and waits for the network.
struct Pieces {
    to: mpsc::Sender<Result<VmArchivePiece, Status>>,
    piece: Vec<u8>,
    /// Said once.
    estimated_bytes: u64,
    /// Sent so far.
    bytes: u64,
}

impl Pieces {
    fn send(&mut self) -> io::Result<()> {
        if self.piece.is_empty() {
            return Ok(());
        }
        let data = std::mem::replace(&mut self.piece, Vec::with_capacity(PIECE_BYTES_MAX));
        self.bytes = self.bytes.saturating_add(data.len() as u64);
        let piece = VmArchivePiece { data, estimated_bytes: std::mem::take(&mut self.estimated_bytes) };
        self.to.blocking_send(Ok(piece)).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = PIECE_BYTES_MAX.saturating_sub(self.piece.len());
        let taken = bytes.len().min(room);
        self.piece.extend_from_slice(bytes.get(..taken).unwrap_or_default());
        if self.piece.len() >= PIECE_BYTES_MAX {
            self.send()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send()
    }
}
