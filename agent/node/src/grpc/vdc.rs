//! VdcService.

use serio_api::v1::{
    CreateVdcRequest, CreateVdcSnapshotRequest, DeleteVdcRequest, DeleteVdcResponse,
    DeleteVdcSnapshotRequest, EraseVdcRequest, EraseVdcResponse, GetVdcRequest, GetVdcSnapshotRequest,
    ListUsageRequest, ListUsageResponse, ListVdcSnapshotsRequest, ListVdcSnapshotsResponse, ListVdcsRequest,
    ListVdcsResponse, Operation, PointClass, Quota, RotateVdcKeyRequest, RotateVdcKeyResponse, Share,
    UpdateVdcRequest, Vdc, VdcSnapshot, vdc_service_server::VdcService,
};
use serio_types::{Name, VdcLimits, VdcName, resource};
use tonic::{Request, Response, Status};

use super::{
    Context,
    convert::{self, Fields, field, request_of},
    keys, operation, page, unexpected, usage,
};
use crate::{
    error::Error,
    state::command::{Answer, Consistency, LimitsChange, Mutation, Query, VdcSnapshotView, VdcView},
};

/// A cap on processor time beyond that is a typing error.
const BURST_MAX: u32 = 102_400;

/// The service.
#[derive(Debug, Clone)]
pub(super) struct VdcApi(pub(super) Context);

impl VdcApi {
    async fn snapshots(&self, vdc: Name) -> Result<Vec<VdcSnapshotView>, Error> {
        match self.0.query(Query::VdcSnapshots(vdc)).await? {
            Answer::VdcSnapshots(views) => Ok(views),
            other => Err(unexpected(&other)),
        }
    }
}

/// The caps in a quota, and a share, checked.
fn limits(quota: Option<Quota>, share: Option<Share>) -> Result<VdcLimits, Error> {
    let (quota, share) = (quota.unwrap_or_default(), share.unwrap_or_default());
    let mut fields = Fields::default();
    if share.weight > VdcLimits::WEIGHT_MAX {
        fields.wrong("share.weight", format!("is more than {}", VdcLimits::WEIGHT_MAX));
    }
    if share.burst_percent > BURST_MAX {
        fields.wrong("share.burst_percent", format!("is more than {BURST_MAX}, which is 1024 processors"));
    }
    fields.done(Some(VdcLimits {
        weight: share.weight,
        burst_percent: share.burst_percent,
        iops: quota.iops,
        bandwidth_bytes: quota.bandwidth_bytes_per_second,
        snapshots: quota.snapshots,
    }))
}

pub(super) fn one(answer: Answer) -> Result<Response<Vdc>, Error> {
    match answer {
        Answer::Vdc(view) => Ok(Response::new(convert::vdc(&view))),
        Answer::Vdcs(views) => match views.as_slice() {
            [view] => Ok(Response::new(convert::vdc(view))),
            _ => Err(unexpected(&Answer::Vdcs(views))),
        },
        other => Err(unexpected(&other)),
    }
}

#[tonic::async_trait]
impl VdcService for VdcApi {
    async fn create_vdc(&self, request: Request<CreateVdcRequest>) -> Result<Response<Vdc>, Status> {
        let message = request.into_inner();
        let id = request_of!("CreateVdc", &message)?;
        let name = field("vdc_id", message.vdc_id.parse())?;
        let quota = convert::quota(message.quota)?;
        let limits = limits(message.quota, message.share)?;
        let encrypted = message.encrypted;
        if encrypted {
            // Before there is a vdc that could have no volumes.
            self.0.keys.check().await.map_err(|e| Error::from_keys(&resource::vdc(&name), &e))?;
        }
        let vdc = one(self.0.mutate(Mutation::CreateVdc { name, quota, limits, encrypted }, id).await?)?;
        if encrypted {
            let (name, uid) = (&vdc.get_ref().name, keys::uid_of(vdc.get_ref())?);
            self.0.keys.ensure(uid).await.map_err(|e| Error::from_keys(name, &e))?;
        }
        Ok(vdc)
    }

    async fn get_vdc(&self, request: Request<GetVdcRequest>) -> Result<Response<Vdc>, Status> {
        let name = field("name", resource::parse_vdc(&request.get_ref().name))?;
        Ok(one(self.0.query(Query::Vdcs(Some(name))).await?)?)
    }

    async fn list_vdcs(
        &self,
        request: Request<ListVdcsRequest>,
    ) -> Result<Response<ListVdcsResponse>, Status> {
        let ListVdcsRequest { page_size, page_token } = request.into_inner();
        match self.0.query(Query::Vdcs(None)).await? {
            Answer::Vdcs(views) => {
                let key = |v: &VdcView| v.record.name.to_string();
                let (views, next_page_token) = page::cut(views, page_size, &page_token, key)?;
                let vdcs = views.iter().map(convert::vdc).collect();
                Ok(Response::new(ListVdcsResponse { vdcs, next_page_token }))
            }
            other => Err(unexpected(&other).into()),
        }
    }

    async fn update_vdc(&self, request: Request<UpdateVdcRequest>) -> Result<Response<Vdc>, Status> {
        let message = request.into_inner();
        let id = request_of!("UpdateVdc", &message)?;
        let name = field("name", resource::parse_vdc(&message.name))?;
        let quota = convert::quota(message.quota)?;
        let limits = LimitsChange {
            limits: limits(message.quota, message.share)?,
            keep_share: message.share.is_none(),
        };
        let expected_generation = message.expected_generation;
        let mutation = Mutation::UpdateVdc { name, quota, limits, expected_generation };
        Ok(one(self.0.mutate(mutation, id).await?)?)
    }

    async fn delete_vdc(
        &self,
        request: Request<DeleteVdcRequest>,
    ) -> Result<Response<DeleteVdcResponse>, Status> {
        let message = request.into_inner();
        let id = request_of!("DeleteVdc", &message)?;
        let name = field("name", resource::parse_vdc(&message.name))?;
        let vdc = self.0.query(Query::Vdcs(Some(name.clone()))).await.and_then(one);
        let mutation = Mutation::DeleteVdc { name }.at(message.expected_generation);
        self.0.mutate(mutation, id).await?;
        if let Ok(vdc) = vdc {
            keys::forget(&self.0, vdc.get_ref()).await;
        }
        Ok(Response::new(DeleteVdcResponse {}))
    }

    async fn rotate_vdc_key(
        &self,
        request: Request<RotateVdcKeyRequest>,
    ) -> Result<Response<RotateVdcKeyResponse>, Status> {
        keys::rotate(self, request).await
    }

    async fn erase_vdc(
        &self,
        request: Request<EraseVdcRequest>,
    ) -> Result<Response<EraseVdcResponse>, Status> {
        keys::erase(self, request).await
    }

    async fn create_vdc_snapshot(
        &self,
        request: Request<CreateVdcSnapshotRequest>,
    ) -> Result<Response<VdcSnapshot>, Status> {
        let message = request.into_inner();
        let id = request_of!("CreateVdcSnapshot", &message)?;
        let mut fields = Fields::default();
        let vdc = fields.take("vdc", resource::parse_vdc(&message.vdc));
        let name = fields.take("snapshot_id", message.snapshot_id.parse::<Name>());
        let app = match PointClass::try_from(message.consistency) {
            Ok(PointClass::App) => true,
            Ok(PointClass::Unspecified | PointClass::Crash) => false,
            Err(_) => {
                fields.wrong("consistency", format!("{} is unknown", message.consistency));
                false
            }
        };
        if message.require_app && !app {
            fields.wrong("require_app", "only goes with consistency POINT_CLASS_APP");
        }
        let (vdc, name) = fields.done(vdc.zip(name))?;
        let consistency = Consistency { app, required: message.require_app };
        let mutation = Mutation::CreateVdcSnapshot { name: VdcName { vdc, name }, consistency };
        match self.0.mutate(mutation, id).await? {
            Answer::VdcSnapshot(view) => Ok(Response::new(convert::vdc_snapshot(&view))),
            other => Err(unexpected(&other).into()),
        }
    }

    async fn get_vdc_snapshot(
        &self,
        request: Request<GetVdcSnapshotRequest>,
    ) -> Result<Response<VdcSnapshot>, Status> {
        let name = field("name", resource::parse_vdc_snapshot(&request.get_ref().name))?;
        let all = self.snapshots(name.vdc.clone()).await?;
        let found = all.iter().find(|view| view.name == name);
        let found = found.ok_or_else(|| Error::not_found(resource::vdc_snapshot(&name)))?;
        Ok(Response::new(convert::vdc_snapshot(found)))
    }

    async fn list_vdc_snapshots(
        &self,
        request: Request<ListVdcSnapshotsRequest>,
    ) -> Result<Response<ListVdcSnapshotsResponse>, Status> {
        let message = request.into_inner();
        let vdc = field("vdc", resource::parse_vdc(&message.vdc))?;
        let key = |v: &VdcSnapshotView| page::oldest_first(v.record.create_time.0, v.record.name.as_str());
        let all = self.snapshots(vdc).await?;
        let (all, next_page_token) = page::cut(all, message.page_size, &message.page_token, key)?;
        let snapshots = all.iter().map(convert::vdc_snapshot).collect();
        Ok(Response::new(ListVdcSnapshotsResponse { snapshots, next_page_token }))
    }

    async fn list_usage(
        &self,
        request: Request<ListUsageRequest>,
    ) -> Result<Response<ListUsageResponse>, Status> {
        Ok(Response::new(usage::list(&self.0, request.into_inner()).await?))
    }

    async fn delete_vdc_snapshot(
        &self,
        request: Request<DeleteVdcSnapshotRequest>,
    ) -> Result<Response<Operation>, Status> {
        let message = request.into_inner();
        let id = request_of!("DeleteVdcSnapshot", &message)?;
        let name = field("name", resource::parse_vdc_snapshot(&message.name))?;
        Ok(operation::one(self.0.mutate(Mutation::DeleteVdcSnapshot { name }, id).await?)?)
    }
}
