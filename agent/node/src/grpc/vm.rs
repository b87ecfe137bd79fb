//! VmService; its streams are in [`super::console`].

use std::{pin::Pin, time::Duration};

use serio_api::v1::{
    AttachNicRequest, AttachVolumeRequest, ConsoleInput, ConsoleOutput, CreateVmRequest, DeleteVmRequest,
    DeleteVmResponse, DeleteVmSnapshotRequest, DetachNicRequest, DetachVolumeRequest,
    ExportVmSnapshotRequest, GetVmRequest, ImportVmSnapshotRequest, ListVmSnapshotsRequest,
    ListVmSnapshotsResponse, ListVmsRequest, ListVmsResponse, Operation, PauseVmRequest, ReadLogRequest,
    RebootVmRequest, RestoreVmRequest, ResumeVmRequest, SnapshotVmRequest, StartVmRequest, StopVmRequest,
    UpdateVmRequest, Vm, VmSnapshot, vm_service_server::VmService,
};
use serio_types::resource;
use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};

use super::{
    Context, archive, console,
    convert::{self, Fields, field, request_of},
    machine, operation, page, unexpected,
};
use crate::{
    clock,
    error::Error,
    state::command::{Answer, Mutation, Query, VdcSnapshotView, VmView},
};

/// How long a guest may take after the power button, unless said.
const STOP: Duration = Duration::from_secs(60);
/// How long a guest may take to let go of a volume or card, unless said.
const DETACH: Duration = Duration::from_secs(15);
const DETACH_MAX: Duration = Duration::from_secs(120);
const STOP_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// The service.
#[derive(Debug, Clone)]
pub(super) struct VmApi(pub(super) Context);

fn one(answer: Answer) -> Result<Response<Vm>, Error> {
    match answer {
        Answer::Vm(view) => Ok(Response::new(convert::vm(&view, clock::wall()))),
        other => Err(unexpected(&other)),
    }
}

impl VmApi {
    /// The VM of that name.
    pub(super) async fn find(&self, name: &str) -> Result<VmView, Error> {
        let name = field("name", resource::parse_vm(name))?;
        match self.0.query(Query::Vm(name)).await? {
            Answer::Vms(mut views) => views.pop().ok_or_else(|| unexpected(&Answer::Vms(Vec::new()))),
            other => Err(unexpected(&other)),
        }
    }
}

#[tonic::async_trait]
impl VmService for VmApi {
    async fn create_vm(&self, request: Request<CreateVmRequest>) -> Result<Response<Vm>, Status> {
        let message = request.into_inner();
        let id = request_of!("CreateVm", &message)?;
        let name = convert::in_vdc(&message.parent, "vm_id", &message.vm_id)?;
        let spec = Box::new(convert::vm_spec(&name.vdc, message.spec)?);
        let start = message.start;
        let token = message.reservation;
        if message.root_volume.is_empty() {
            let create = Mutation::CreateVm { name, spec, start }.taking(token);
            return Ok(one(self.0.mutate(create, id).await?)?);
        }
        let root = field("root_volume", resource::parse_volume(&message.root_volume))?;
        if root.vdc != name.vdc {
            return Err(Error::invalid("root_volume", format!("is not of vdc {}", name.vdc)).into());
        }
        if spec.root_disk.is_some() {
            let problem = "is the size of a new root volume: resize the one that is given instead";
            return Err(Error::invalid("spec.root_disk_bytes", problem).into());
        }
        let create = Mutation::CreateVmOn { name, spec, root, start }.taking(token);
        Ok(one(self.0.mutate(create, id).await?)?)
    }

    async fn get_vm(&self, request: Request<GetVmRequest>) -> Result<Response<Vm>, Status> {
        let view = self.find(&request.get_ref().name).await?;
        let mut vm = convert::vm(&view, clock::wall());
        if let Some((handle, status)) = self.0.handles.vm(view.record.uid).zip(vm.status.as_mut()) {
            status.vsock_path =
                handle.vsock_path().map(|path| path.display().to_string()).unwrap_or_default();
            // One that is too busy to say shows nothing of it.
            status.memory = handle.balloon_stats().await.ok().map(|stats| machine::memory(&stats));
        }
        Ok(Response::new(vm))
    }

    async fn update_vm(&self, request: Request<UpdateVmRequest>) -> Result<Response<Vm>, Status> {
        let message = request.into_inner();
        let id = request_of!("UpdateVm", &message)?;
        let name = field("name", resource::parse_vm(&message.name))?;
        let changes = machine::changes(&name.vdc, &message.fields, message.spec)?;
        let update = Mutation::UpdateVm { name, changes };
        Ok(one(self.0.mutate(update.at(message.expected_generation), id).await?)?)
    }

    async fn attach_volume(&self, request: Request<AttachVolumeRequest>) -> Result<Response<Vm>, Status> {
        let message = request.into_inner();
        let id = request_of!("AttachVolume", &message)?;
        let name = field("name", resource::parse_vm(&message.name))?;
        let volume = field("volume", resource::parse_volume(&message.volume))?;
        let attach = Mutation::AttachVolume { name, volume };
        Ok(one(self.0.mutate(attach.at(message.expected_generation), id).await?)?)
    }

    async fn detach_volume(&self, request: Request<DetachVolumeRequest>) -> Result<Response<Vm>, Status> {
        let message = request.into_inner();
        let id = request_of!("DetachVolume", &message)?;
        let name = field("name", resource::parse_vm(&message.name))?;
        let volume = field("volume", resource::parse_volume(&message.volume))?;
        let wait = convert::duration("timeout", message.timeout.as_ref(), DETACH, DETACH_MAX)?;
        let detach = Mutation::DetachVolume { name, volume, wait };
        Ok(one(self.0.mutate(detach.at(message.expected_generation), id).await?)?)
    }

    async fn attach_nic(&self, request: Request<AttachNicRequest>) -> Result<Response<Vm>, Status> {
        let message = request.into_inner();
        let id = request_of!("AttachNic", &message)?;
        let name = field("name", resource::parse_vm(&message.name))?;
        let mut fields = Fields::default();
        let nic = convert::nic(&mut fields, "nic", &message.nic.unwrap_or_default());
        let attach = Mutation::AttachNic { name, nic: fields.done(Some(nic))? };
        Ok(one(self.0.mutate(attach.at(message.expected_generation), id).await?)?)
    }

    async fn detach_nic(&self, request: Request<DetachNicRequest>) -> Result<Response<Vm>, Status> {
        let message = request.into_inner();
        let id = request_of!("DetachNic", &message)?;
        let name = field("name", resource::parse_vm(&message.name))?;
        let mac = field("mac", message.mac.parse())?;
        let wait = convert::duration("timeout", message.timeout.as_ref(), DETACH, DETACH_MAX)?;
        let detach = Mutation::DetachNic { name, mac, wait };
        Ok(one(self.0.mutate(detach.at(message.expected_generation), id).await?)?)
    }

    async fn list_vms(&self, request: Request<ListVmsRequest>) -> Result<Response<ListVmsResponse>, Status> {
        let ListVmsRequest { parent, page_size, page_token, states } = request.into_inner();
        let vdc = if parent.is_empty() { None } else { Some(field("parent", resource::parse_vdc(&parent))?) };
        match self.0.query(Query::Vms(vdc)).await? {
            Answer::Vms(mut views) => {
                views.retain(|v| states.is_empty() || states.contains(&convert::vm_state(v.state).into()));
                let key = |v: &VmView| v.name.to_string();
                let (views, next_page_token) = page::cut(views, page_size, &page_token, key)?;
                let now = clock::wall();
                let vms = views.iter().map(|v| convert::vm(v, now)).collect();
                Ok(Response::new(ListVmsResponse { vms, next_page_token }))
            }
            other => Err(unexpected(&other).into()),
        }
    }

    async fn start_vm(&self, request: Request<StartVmRequest>) -> Result<Response<Vm>, Status> {
        let message = request.into_inner();
        let id = request_of!("StartVm", &message)?;
        let name = field("name", resource::parse_vm(&message.name))?;
        Ok(one(self.0.mutate(Mutation::StartVm { name }.at(message.expected_generation), id).await?)?)
    }

    async fn stop_vm(&self, request: Request<StopVmRequest>) -> Result<Response<Vm>, Status> {
        let message = request.into_inner();
        let id = request_of!("StopVm", &message)?;
        let name = field("name", resource::parse_vm(&message.name))?;
        let timeout = convert::duration("timeout", message.timeout.as_ref(), STOP, STOP_MAX)?;
        let stop = Mutation::StopVm { name, force: message.force, timeout };
        Ok(one(self.0.mutate(stop.at(message.expected_generation), id).await?)?)
    }

    async fn reboot_vm(&self, request: Request<RebootVmRequest>) -> Result<Response<Vm>, Status> {
        let message = request.into_inner();
        let id = request_of!("RebootVm", &message)?;
        let name = field("name", resource::parse_vm(&message.name))?;
        Ok(one(self.0.mutate(Mutation::RebootVm { name }.at(message.expected_generation), id).await?)?)
    }

    async fn pause_vm(&self, request: Request<PauseVmRequest>) -> Result<Response<Vm>, Status> {
        let message = request.into_inner();
        let id = request_of!("PauseVm", &message)?;
        let name = field("name", resource::parse_vm(&message.name))?;
        Ok(one(self.0.mutate(Mutation::PauseVm { name }.at(message.expected_generation), id).await?)?)
    }

    async fn resume_vm(&self, request: Request<ResumeVmRequest>) -> Result<Response<Vm>, Status> {
        let message = request.into_inner();
        let id = request_of!("ResumeVm", &message)?;
        let name = field("name", resource::parse_vm(&message.name))?;
        Ok(one(self.0.mutate(Mutation::ResumeVm { name }.at(message.expected_generation), id).await?)?)
    }

    async fn snapshot_vm(&self, request: Request<SnapshotVmRequest>) -> Result<Response<VmSnapshot>, Status> {
        let message = request.into_inner();
        let id = request_of!("SnapshotVm", &message)?;
        let name = field("vm", resource::parse_vm(&message.vm))?;
        let point = field("snapshot_id", message.snapshot_id.parse())?;
        match self.0.mutate(Mutation::SnapshotVm { name, point }, id).await? {
            Answer::VdcSnapshot(view) => Ok(Response::new(convert::vm_snapshot(&view))),
            other => Err(unexpected(&other).into()),
        }
    }

    async fn list_vm_snapshots(
        &self,
        request: Request<ListVmSnapshotsRequest>,
    ) -> Result<Response<ListVmSnapshotsResponse>, Status> {
        let message = request.into_inner();
        let vm = field("vm", resource::parse_vm(&message.vm))?;
        let all = match self.0.query(Query::VmSnapshots(vm)).await? {
            Answer::VdcSnapshots(views) => views,
            other => return Err(unexpected(&other).into()),
        };
        let key = |v: &VdcSnapshotView| page::oldest_first(v.record.create_time.0, v.record.name.as_str());
        let (all, next_page_token) = page::cut(all, message.page_size, &message.page_token, key)?;
        let snapshots = all.iter().map(convert::vm_snapshot).collect();
        Ok(Response::new(ListVmSnapshotsResponse { snapshots, next_page_token }))
    }

    async fn delete_vm_snapshot(
        &self,
        request: Request<DeleteVmSnapshotRequest>,
    ) -> Result<Response<Operation>, Status> {
        let message = request.into_inner();
        let id = request_of!("DeleteVmSnapshot", &message)?;
        let (name, point) = field("name", resource::parse_vm_snapshot(&message.name))?;
        Ok(operation::one(self.0.mutate(Mutation::DeleteVmSnapshot { name, point }, id).await?)?)
    }

    async fn restore_vm(&self, request: Request<RestoreVmRequest>) -> Result<Response<Vm>, Status> {
        let message = request.into_inner();
        let id = request_of!("RestoreVm", &message)?;
        let (name, point) = field("name", resource::parse_vm_snapshot(&message.name))?;
        if message.as_new.is_empty() {
            let restore = Mutation::RestoreVm { name, point, discard_later: message.discard_later };
            return Ok(one(self.0.mutate(restore.at(message.expected_generation), id).await?)?);
        }
        let clone = field("as_new", message.as_new.parse())?;
        if message.discard_later || message.expected_generation != 0 {
            let problem = "leaves the VM and its volumes as they are: leave out what is about them";
            return Err(Error::invalid("as_new", problem).into());
        }
        Ok(one(self.0.mutate(Mutation::CloneVm { name, point, clone }, id).await?)?)
    }

    type ExportVmSnapshotStream = archive::Pieces;

    async fn export_vm_snapshot(
        &self,
        request: Request<ExportVmSnapshotRequest>,
    ) -> Result<Response<Self::ExportVmSnapshotStream>, Status> {
        Ok(Response::new(archive::export(&self.0, request.into_inner().name).await?))
    }

    async fn import_vm_snapshot(
        &self,
        request: Request<Streaming<ImportVmSnapshotRequest>>,
    ) -> Result<Response<VmSnapshot>, Status> {
        archive::import(&self.0, request.into_inner()).await.map(Response::new)
    }

    async fn delete_vm(
        &self,
        request: Request<DeleteVmRequest>,
    ) -> Result<Response<DeleteVmResponse>, Status> {
        let message = request.into_inner();
        let id = request_of!("DeleteVm", &message)?;
        let name = field("name", resource::parse_vm(&message.name))?;
        let mutation =
            Mutation::DeleteVm { name, keep_root_volume: message.keep_root_volume, force: message.force };
        self.0.mutate(mutation.at(message.expected_generation), id).await?;
        Ok(Response::new(DeleteVmResponse {}))
    }

    type AttachConsoleStream = Pin<Box<dyn Stream<Item = Result<ConsoleOutput, Status>> + Send>>;

    async fn attach_console(
        &self,
        request: Request<Streaming<ConsoleInput>>,
    ) -> Result<Response<Self::AttachConsoleStream>, Status> {
        let mut input = request.into_inner();
        let first = input.message().await?;
        let first = first.ok_or_else(|| Error::invalid("name", "the first message names the VM"))?;
        let view = self.find(&first.name).await?;
        let context = self.0.clone();
        let name = resource::vm(&view.name);
        let attach = async move { console::attach(&context, &view, first, input).await };
        let output = self.0.audited(name, None, attach).await?;
        Ok(Response::new(Box::pin(output)))
    }

    type ReadLogStream = Pin<Box<dyn Stream<Item = Result<ConsoleOutput, Status>> + Send>>;

    async fn read_log(
        &self,
        request: Request<ReadLogRequest>,
    ) -> Result<Response<Self::ReadLogStream>, Status> {
        let message = request.into_inner();
        let view = self.find(&message.name).await?;
        let path = self.0.supervisor.log_path(view.record.uid);
        Ok(Response::new(Box::pin(console::read_log(path, message.tail_bytes, message.follow))))
    }
}
