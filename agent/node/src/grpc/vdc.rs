//! VdcService.

use serio_api::v1::{
    CreateVdcRequest, DeleteVdcRequest, DeleteVdcResponse, GetVdcRequest, ListVdcsRequest, ListVdcsResponse,
    UpdateVdcRequest, Vdc, vdc_service_server::VdcService,
};
use serio_types::resource;
use tonic::{Request, Response, Status};

use super::{
    Context,
    convert::{self, field, request_of},
    unexpected,
};
use crate::{
    error::Error,
    state::command::{Answer, Mutation, Query},
};

/// The service.
#[derive(Debug, Clone)]
pub(super) struct VdcApi(pub(super) Context);

fn one(answer: Answer) -> Result<Response<Vdc>, Error> {
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
        Ok(one(self.0.mutate(Mutation::CreateVdc { name, quota }, id).await?)?)
    }

    async fn get_vdc(&self, request: Request<GetVdcRequest>) -> Result<Response<Vdc>, Status> {
        let name = field("name", resource::parse_vdc(&request.get_ref().name))?;
        Ok(one(self.0.query(Query::Vdcs(Some(name))).await?)?)
    }

    async fn list_vdcs(&self, _: Request<ListVdcsRequest>) -> Result<Response<ListVdcsResponse>, Status> {
        match self.0.query(Query::Vdcs(None)).await? {
            Answer::Vdcs(views) => {
                Ok(Response::new(ListVdcsResponse { vdcs: views.iter().map(convert::vdc).collect() }))
            }
            other => Err(unexpected(&other).into()),
        }
    }

    async fn update_vdc(&self, request: Request<UpdateVdcRequest>) -> Result<Response<Vdc>, Status> {
        let message = request.into_inner();
        let id = request_of!("UpdateVdc", &message)?;
        let name = field("name", resource::parse_vdc(&message.name))?;
        let quota = convert::quota(message.quota)?;
        let mutation = Mutation::UpdateVdc { name, quota, expected_generation: message.expected_generation };
        Ok(one(self.0.mutate(mutation, id).await?)?)
    }

    async fn delete_vdc(
        &self,
        request: Request<DeleteVdcRequest>,
    ) -> Result<Response<DeleteVdcResponse>, Status> {
        let message = request.into_inner();
        let id = request_of!("DeleteVdc", &message)?;
        let name = field("name", resource::parse_vdc(&message.name))?;
        self.0.mutate(Mutation::DeleteVdc { name }, id).await?;
        Ok(Response::new(DeleteVdcResponse {}))
    }
}
