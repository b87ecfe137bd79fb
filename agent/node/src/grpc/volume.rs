//! VolumeService.

use std::time::Duration;

use serio_api::v1::{
    CheckVolumeRequest, CloneVolumeRequest, CreateExportRequest, CreateSnapshotRequest, CreateVolumeRequest,
    DeleteExportRequest, DeleteExportResponse, DeleteSnapshotRequest, DeleteVolumeRequest,
    DeleteVolumeResponse, Export, FlattenVolumeRequest, GetVolumeRequest, ListChangedRangesRequest,
    ListChangedRangesResponse, ListExportsRequest, ListExportsResponse, ListSnapshotsRequest,
    ListSnapshotsResponse, ListVolumesRequest, ListVolumesResponse, Operation, ResizeVolumeRequest,
    RollbackVolumeRequest, Snapshot, Volume, volume_service_server::VolumeService,
};
use serio_types::{Name, SnapshotName, VolumeSize, resource};
use tonic::{Request, Response, Status};

use super::{
    Context, changes, check,
    convert::{self, Fields, field, request_of},
    operation, page, unexpected,
};
use crate::{
    error::Error,
    state::command::{Answer, ExportView, Mutation, Query, SnapshotView, VolumeView},
};

/// How long an export lives, unless said.
const TTL: Duration = Duration::from_secs(60 * 60);
const TTL_MAX: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// The service.
#[derive(Debug, Clone)]
pub(super) struct VolumeApi(pub(super) Context);

impl VolumeApi {
    async fn show(&self, view: VolumeView) -> Volume {
        let (supervisor, uid) = (self.0.supervisor.clone(), view.record.uid);
        let found = move || (supervisor.allocated_bytes(uid), supervisor.scrub_record(uid));
        let (allocated, scrubs) = tokio::task::spawn_blocking(found).await.map_or_else(
            |_| (None, None),
            // Files that are just being made or removed: nothing to count.
            |(allocated, scrubs)| (allocated.ok(), Some(scrubs)),
        );
        let volume = convert::volume(&view, allocated.unwrap_or_default());
        check::shown(volume, scrubs.unwrap_or_default())
    }

    async fn one(&self, answer: Answer) -> Result<Response<Volume>, Status> {
        match answer {
            Answer::Volume(view) => Ok(Response::new(self.show(view).await)),
            other => Err(unexpected(&other).into()),
        }
    }

    async fn show_export(&self, view: &ExportView) -> Export {
        let id = &view.record.id;
        let handle = self.0.handles.export(id);
        let unix = handle.as_ref().map(|h| format!("nbd+unix:///{id}?socket={}", h.socket().display()));
        let tls = self.0.node.nbd.as_ref().map(|host| format!("nbds://{host}/{id}"));
        let clients = match handle {
            Some(handle) => handle.report().await.map_or(0, |report| report.clients),
            None => 0,
        };
        convert::export(view, unix.unwrap_or_default(), tls.unwrap_or_default(), clients)
    }
}

#[tonic::async_trait]
impl VolumeService for VolumeApi {
    async fn create_volume(&self, request: Request<CreateVolumeRequest>) -> Result<Response<Volume>, Status> {
        let message = request.into_inner();
        let id = request_of!("CreateVolume", &message)?;
        let name = convert::in_vdc(&message.parent, "volume_id", &message.volume_id)?;
        let mut fields = Fields::default();
        let size = convert::volume_size(&mut fields, "size_bytes", message.size_bytes);
        let image = if message.source_image.is_empty() {
            None
        } else {
            fields.take("source_image", resource::parse_image(&message.source_image))
        };
        fields.done(Some(()))?;
        self.one(self.0.mutate(Mutation::CreateVolume { name, size, image }, id).await?).await
    }

    async fn get_volume(&self, request: Request<GetVolumeRequest>) -> Result<Response<Volume>, Status> {
        let name = field("name", resource::parse_volume(&request.get_ref().name))?;
        match self.0.query(Query::Volume(name)).await? {
            Answer::Volumes(mut views) if views.len() == 1 => {
                let view = views.pop().ok_or(Error::Ending)?;
                Ok(Response::new(self.show(view).await))
            }
            other => Err(unexpected(&other).into()),
        }
    }

    async fn list_volumes(
        &self,
        request: Request<ListVolumesRequest>,
    ) -> Result<Response<ListVolumesResponse>, Status> {
        let ListVolumesRequest { parent, page_size, page_token, detached_only } = request.into_inner();
        let vdc = if parent.is_empty() { None } else { Some(field("parent", resource::parse_vdc(&parent))?) };
        match self.0.query(Query::Volumes(vdc)).await? {
            Answer::Volumes(mut views) => {
                views.retain(|v| !detached_only || v.attached_to.is_none());
                let key = |v: &VolumeView| v.name.to_string();
                let (views, next_page_token) = page::cut(views, page_size, &page_token, key)?;
                let mut volumes = Vec::with_capacity(views.len());
                for view in views {
                    volumes.push(self.show(view).await);
                }
                Ok(Response::new(ListVolumesResponse { volumes, next_page_token }))
            }
            other => Err(unexpected(&other).into()),
        }
    }

    async fn delete_volume(
        &self,
        request: Request<DeleteVolumeRequest>,
    ) -> Result<Response<DeleteVolumeResponse>, Status> {
        let message = request.into_inner();
        let id = request_of!("DeleteVolume", &message)?;
        let name = field("name", resource::parse_volume(&message.name))?;
        self.0.mutate(Mutation::DeleteVolume { name }.at(message.expected_generation), id).await?;
        Ok(Response::new(DeleteVolumeResponse {}))
    }

    async fn create_snapshot(
        &self,
        request: Request<CreateSnapshotRequest>,
    ) -> Result<Response<Snapshot>, Status> {
        let message = request.into_inner();
        let id = request_of!("CreateSnapshot", &message)?;
        let mut fields = Fields::default();
        let volume = fields.take("volume", resource::parse_volume(&message.volume));
        let snapshot = fields.take("snapshot_id", message.snapshot_id.parse::<Name>());
        let name = volume.zip(snapshot).map(|(volume, snapshot)| SnapshotName { volume, snapshot });
        let name = fields.done(name)?;
        match self.0.mutate(Mutation::CreateSnapshot { name }, id).await? {
            Answer::Snapshot(view) => Ok(Response::new(convert::snapshot(&view))),
            other => Err(unexpected(&other).into()),
        }
    }

    async fn list_snapshots(
        &self,
        request: Request<ListSnapshotsRequest>,
    ) -> Result<Response<ListSnapshotsResponse>, Status> {
        let ListSnapshotsRequest { volume, page_size, page_token } = request.into_inner();
        let volume = field("volume", resource::parse_volume(&volume))?;
        match self.0.query(Query::Snapshots(volume)).await? {
            Answer::Snapshots(views) => {
                let key = |v: &SnapshotView| format!("{:020}/{}", v.record.number, v.record.name);
                let (views, next_page_token) = page::cut(views, page_size, &page_token, key)?;
                let snapshots = views.iter().map(convert::snapshot).collect();
                Ok(Response::new(ListSnapshotsResponse { snapshots, next_page_token }))
            }
            other => Err(unexpected(&other).into()),
        }
    }

    async fn delete_snapshot(
        &self,
        request: Request<DeleteSnapshotRequest>,
    ) -> Result<Response<Operation>, Status> {
        let message = request.into_inner();
        let id = request_of!("DeleteSnapshot", &message)?;
        let name = field("name", resource::parse_snapshot(&message.name))?;
        Ok(operation::one(self.0.mutate(Mutation::DeleteSnapshot { name }, id).await?)?)
    }

    async fn resize_volume(&self, request: Request<ResizeVolumeRequest>) -> Result<Response<Volume>, Status> {
        let message = request.into_inner();
        let id = request_of!("ResizeVolume", &message)?;
        let mut fields = Fields::default();
        let name = fields.take("name", resource::parse_volume(&message.name));
        let size = fields.take("size_bytes", VolumeSize::try_from(message.size_bytes));
        let (name, size) = fields.done(name.zip(size))?;
        let resize = Mutation::ResizeVolume { name, size }.at(message.expected_generation);
        self.one(self.0.mutate(resize, id).await?).await
    }

    async fn clone_volume(&self, request: Request<CloneVolumeRequest>) -> Result<Response<Volume>, Status> {
        let message = request.into_inner();
        let id = request_of!("CloneVolume", &message)?;
        let mut fields = Fields::default();
        let source = fields.take("source", resource::parse_snapshot(&message.source));
        let name = fields.take("volume_id", message.volume_id.parse::<Name>());
        let size = convert::volume_size(&mut fields, "size_bytes", message.size_bytes);
        let (source, name) = fields.done(source.zip(name))?;
        self.one(self.0.mutate(Mutation::CloneVolume { source, name, size }, id).await?).await
    }

    async fn rollback_volume(
        &self,
        request: Request<RollbackVolumeRequest>,
    ) -> Result<Response<Volume>, Status> {
        let message = request.into_inner();
        let id = request_of!("RollbackVolume", &message)?;
        let name = field("snapshot", resource::parse_snapshot(&message.snapshot))?;
        let mutation = Mutation::RollbackVolume { name, discard_later: message.discard_later }
            .at(message.expected_generation);
        self.one(self.0.mutate(mutation, id).await?).await
    }

    async fn flatten_volume(
        &self,
        request: Request<FlattenVolumeRequest>,
    ) -> Result<Response<Operation>, Status> {
        let message = request.into_inner();
        let id = request_of!("FlattenVolume", &message)?;
        let name = field("name", resource::parse_volume(&message.name))?;
        let flatten = Mutation::FlattenVolume { name }.at(message.expected_generation);
        Ok(operation::one(self.0.mutate(flatten, id).await?)?)
    }

    async fn list_changed_ranges(
        &self,
        request: Request<ListChangedRangesRequest>,
    ) -> Result<Response<ListChangedRangesResponse>, Status> {
        Ok(Response::new(changes::page(&self.0, request.into_inner()).await?))
    }

    async fn check_volume(
        &self,
        request: Request<CheckVolumeRequest>,
    ) -> Result<Response<Operation>, Status> {
        let message = request.into_inner();
        let id = request_of!("CheckVolume", &message)?;
        let (context, on) = (self.0.clone(), message.name.clone());
        let request = id.as_ref().map(|id| id.id);
        let begin = async move { check::begin(&context, &message, id).await };
        Ok(Response::new(self.0.audited(on, request, begin).await?))
    }

    async fn create_export(&self, request: Request<CreateExportRequest>) -> Result<Response<Export>, Status> {
        let message = request.into_inner();
        let id = request_of!("CreateExport", &message)?;
        let mut fields = Fields::default();
        let volume = fields.take("volume", resource::parse_volume(&message.volume));
        let snapshot = if message.snapshot.is_empty() {
            None
        } else {
            fields.take("snapshot", message.snapshot.parse::<Name>())
        };
        let volume = fields.done(volume)?;
        let ttl = convert::duration("ttl", message.ttl.as_ref(), TTL, TTL_MAX)?;
        let (writable, once, release) = (message.writable, message.once, message.release_on_trim);
        let mutation = Mutation::CreateExport { volume, snapshot, writable, once, release, ttl };
        match self.0.mutate(mutation, id).await? {
            Answer::Export(view) => Ok(Response::new(self.show_export(&view).await)),
            other => Err(unexpected(&other).into()),
        }
    }

    async fn list_exports(
        &self,
        request: Request<ListExportsRequest>,
    ) -> Result<Response<ListExportsResponse>, Status> {
        let ListExportsRequest { page_size, page_token, volume } = request.into_inner();
        match self.0.query(Query::Exports).await? {
            Answer::Exports(mut views) => {
                views.retain(|v| volume.is_empty() || resource::volume(&v.volume) == volume);
                let key = |v: &ExportView| v.record.id.to_string();
                let (views, next_page_token) = page::cut(views, page_size, &page_token, key)?;
                let mut exports = Vec::with_capacity(views.len());
                for view in &views {
                    exports.push(self.show_export(view).await);
                }
                Ok(Response::new(ListExportsResponse { exports, next_page_token }))
            }
            other => Err(unexpected(&other).into()),
        }
    }

    async fn delete_export(
        &self,
        request: Request<DeleteExportRequest>,
    ) -> Result<Response<DeleteExportResponse>, Status> {
        let message = request.into_inner();
        let id = request_of!("DeleteExport", &message)?;
        let export = field("name", resource::parse_export(&message.name))?;
        self.0.mutate(Mutation::DeleteExport { id: export }, id).await?;
        Ok(Response::new(DeleteExportResponse {}))
    }
}
