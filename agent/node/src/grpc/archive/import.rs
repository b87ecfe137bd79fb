//! A snapshot on its way in.

use serio_api::v1::ImportVmSnapshotTarget;
use serio_archive::Reader;
use serio_types::{Name, VdcName, resource};
use tokio::runtime::Handle;
use uuid::Uuid;

use super::{PieceReader, disks, manifest::Manifest, refused};
use crate::{
    error::{Error, chain},
    grpc::{Context, convert::Fields, unexpected},
    state::command::{Answer, Command, Mutation, Request, VdcSnapshotView, VmImport, VmImportPlan},
    supervise::{ExportHandle, ExportPlan},
};

/// What stays free on the host beside what is written.
const SPARE_BYTES: u64 = 256 << 20;
const DOING: &str = "importing the snapshot";

/// Where an archive shall go, checked.
#[derive(Debug, Clone)]
pub(super) struct Target {
    vdc: Option<Name>,
    vm: Option<Name>,
    image: Option<Name>,
    new_macs: bool,
}

impl Target {
    pub(super) fn parse(target: ImportVmSnapshotTarget) -> Result<Self, Error> {
        let mut fields = Fields::default();
        let given = |text: &String| !text.is_empty();
        let vm =
            Some(&target.vm_id).filter(|t| given(t)).and_then(|t| fields.take("target.vm_id", t.parse()));
        let image = Some(&target.image)
            .filter(|t| given(t))
            .and_then(|t| fields.take("target.image", resource::parse_image(t)));
        let vdc = Some(&target.parent)
            .filter(|t| given(t))
            .and_then(|t| fields.take("target.parent", resource::parse_vdc(t)));
        fields.done(Some(Self { vdc, vm, image, new_macs: target.new_macs }))
    }

    /// As the audit log names it, before the archive has said what it is.
    pub(super) fn resource(&self) -> String {
        match (&self.vdc, &self.vm) {
            (Some(vdc), Some(vm)) => resource::vm(&VdcName { vdc: vdc.clone(), name: vm.clone() }),
            (Some(vdc), None) => resource::vdc(vdc),
            (None, _) => "vdcs".to_owned(),
        }
    }

    /// What shall be of what is in an archive.
    fn of(self, manifest: &Manifest) -> VmImport {
        let mut spec = manifest.spec.clone();
        let same_image = self.image.is_none();
        if let Some(image) = self.image {
            spec.image = image;
        }
        let rename = self.vm.as_ref().is_some_and(|name| *name != manifest.vm.name);
        let name = VdcName {
            vdc: self.vdc.unwrap_or_else(|| manifest.vm.vdc.clone()),
            name: self.vm.unwrap_or_else(|| manifest.vm.name.clone()),
        };
        VmImport {
            name,
            point: manifest.point.clone(),
            create_time: manifest.create_time,
            spec,
            image_blake3: same_image.then(|| manifest.image_blake3.clone()),
            new_macs: self.new_macs,
            volumes: manifest.volumes.clone(),
            rename,
            bases: manifest.points.len().saturating_sub(1),
            held_bytes: manifest.points.first().map_or(0, |(_, held)| *held),
            paused_ns: manifest.paused_ns,
        }
    }
}

/// Reads an archive, and makes a VM of it, or nothing.
pub(super) async fn run(
    context: Context,
    target: Target,
    request: Option<Request>,
    input: PieceReader,
) -> Result<VdcSnapshotView, Error> {
    let runtime = Handle::current();
    let work = move || Import { context, runtime }.run(target, request, input);
    tokio::task::spawn_blocking(work).await.unwrap_or(Err(Error::Ending))
}

/// On a thread that may wait.
struct Import {
    context: Context,
    runtime: Handle,
}

impl Import {
    fn run(
        &self,
        target: Target,
        request: Option<Request>,
        input: PieceReader,
    ) -> Result<VdcSnapshotView, Error> {
        let (reader, manifest) = Reader::new(input).map_err(|e| refused(&e))?;
        let manifest = Manifest::parse(&manifest)?;
        self.has_room(&manifest)?;
        let begin = Mutation::BeginVmImport(Box::new(target.of(&manifest)));
        let plan = match self.runtime.block_on(self.context.apply(begin, request))? {
            Answer::VmImport(plan) => plan,
            // Done before, by the same request.
            Answer::VdcSnapshot(view) => return Ok(view),
            other => return Err(unexpected(&other)),
        };
        let vm = plan.vm;
        let finished = self
            .receive(reader, &manifest, &plan)
            .and_then(|()| self.runtime.block_on(self.context.state.ask(Command::FinishVmImport(vm))));
        match finished {
            Ok(Answer::VdcSnapshot(view)) => Ok(view),
            Ok(other) => Err(unexpected(&other)),
            Err(error) => {
                let undone = self.runtime.block_on(self.context.state.ask(Command::AbortVmImport(vm, error)));
                Err(undone.err().unwrap_or(Error::Ending))
            }
        }
    }

    /// Whether the host's disk takes what will surely be written. What the volumes hold shows only as it comes.
    fn has_room(&self, manifest: &Manifest) -> Result<(), Error> {
        let dir = &self.context.node.state_dir;
        let space = rustix::fs::statvfs(dir);
        let free = space.map_or(u64::MAX, |space| space.f_bavail.saturating_mul(space.f_frsize));
        let wanted = manifest.held_bytes().saturating_add(SPARE_BYTES);
        if free >= wanted {
            return Ok(());
        }
        let size = serio_types::ByteSize::from_bytes;
        let why =
            format!("its memory needs {} and {} are free on the disk of state_dir", size(wanted), size(free));
        Err(Error::Full { doing: DOING, why })
    }

    fn receive(
        &self,
        mut reader: Reader<PieceReader>,
        manifest: &Manifest,
        plan: &VmImportPlan,
    ) -> Result<(), Error> {
        let failed = |e| Error::Failed { doing: DOING, why: chain(&e) };
        for (uid, (state_bytes, _)) in plan.points.iter().zip(&manifest.points) {
            let files = self.context.supervisor.new_saved(plan.vm, *uid).map_err(failed)?;
            disks::read_file(&mut reader, &files.state, *state_bytes)?;
            disks::read_file(&mut reader, &files.memory, manifest.spec.memory.bytes())?;
            files.sync().map_err(failed)?;
        }
        for (volume, size_bytes) in &plan.volumes {
            let export = self.runtime.block_on(self.new_volume(*volume, *size_bytes, plan.key_owner))?;
            let name = export.id.clone();
            let filled = disks::connect(export.handle.socket(), &name)
                .and_then(|disk| disks::read_disk(&mut reader, &disk, *size_bytes));
            self.runtime.block_on(async {
                export.handle.stop().await;
                filled?;
                let sealed = self.context.supervisor.snapshot_stopped(*volume, manifest.point.as_str()).await;
                sealed.map_err(|e| Error::from_job(DOING, &e))
            })?;
        }
        reader.finish().map_err(|e| refused(&e))
    }

    /// An empty volume that can be written. Nobody but this thread knows of its export: the next start ends it.
    async fn new_volume(&self, volume: Uuid, size_bytes: u64, key: Option<Uuid>) -> Result<Writable, Error> {
        let supervisor = &self.context.supervisor;
        let failed = |e| Error::from_job(DOING, &e);
        supervisor.assign_key(volume, key).await.map_err(failed)?;
        supervisor.create_volume(volume, size_bytes, None).await.map_err(failed)?;
        let id = Uuid::new_v4().simple().to_string();
        let plan = ExportPlan {
            id: id.clone(),
            volume,
            export_name: id.clone(),
            snapshot: None,
            writable: true,
            once: true,
            release: false,
        };
        let handle = supervisor.start_export(plan).await.map_err(failed)?;
        Ok(Writable { id, handle })
    }
}

/// A volume that is being filled.
struct Writable {
    id: String,
    handle: ExportHandle,
}
