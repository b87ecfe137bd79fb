//! OperationService.

use std::pin::Pin;

use serio_api::v1::{
    CancelOperationRequest, GetOperationRequest, ListOperationsRequest, ListOperationsResponse, Operation,
    WatchOperationRequest, operation_service_server::OperationService,
};
use serio_store::record::OperationRecord;
use serio_types::resource;
use tokio_stream::Stream;
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::{
    Context,
    convert::{self, field},
    follow::{Follower, follow},
    page, unexpected,
};
use crate::{
    error::Error,
    state::command::{Answer, Command, Query},
};

/// Messages that wait for a slow watcher; then it hears less often.
const BEHIND_MAX: usize = 4;

/// The service.
#[derive(Debug, Clone)]
pub(super) struct OperationApi(pub(super) Context);

fn parse(name: &str) -> Result<Uuid, Error> {
    let id = field("name", resource::parse_operation(name))?;
    Uuid::parse_str(id.as_str())
        .map_err(|_| Error::invalid("name", format!("`{name}` is not of the form operations/UUID")))
}

/// An answer that is an operation.
pub(super) fn one(answer: Answer) -> Result<Response<Operation>, Error> {
    match answer {
        Answer::Operation(record) => Ok(Response::new(convert::operation(&record))),
        other => Err(unexpected(&other)),
    }
}

impl OperationApi {
    async fn find(&self, uid: Uuid) -> Result<OperationRecord, Error> {
        match self.0.query(Query::Operation(uid)).await? {
            Answer::Operation(record) => Ok(record),
            other => Err(unexpected(&other)),
        }
    }

    /// Sends an operation whenever it moves on, until it has ended or nobody listens.
    async fn follow(self, uid: Uuid, client: Follower<Operation>) {
        let mut versions = self.0.state.operations();
        let mut told = None;
        loop {
            versions.mark_unchanged();
            let record = match self.find(uid).await {
                Ok(record) => record,
                Err(error) => return client.end(error),
            };
            let ended = record.end_time.is_some();
            if told.as_ref() != Some(&record) {
                let behind = || Error::Behind { how: String::new() };
                if client.send(convert::operation(&record), behind).await.is_err() {
                    return;
                }
                told = Some(record);
            }
            if ended {
                return;
            }
            tokio::select! {
                changed = versions.changed() => if changed.is_err() { return },
                () = client.closed() => return,
            }
        }
    }
}

#[tonic::async_trait]
impl OperationService for OperationApi {
    type WatchOperationStream = Pin<Box<dyn Stream<Item = Result<Operation, Status>> + Send>>;

    async fn get_operation(
        &self,
        request: Request<GetOperationRequest>,
    ) -> Result<Response<Operation>, Status> {
        let record = self.find(parse(&request.get_ref().name)?).await?;
        Ok(Response::new(convert::operation(&record)))
    }

    async fn list_operations(
        &self,
        request: Request<ListOperationsRequest>,
    ) -> Result<Response<ListOperationsResponse>, Status> {
        let ListOperationsRequest { target_prefix, running_only, page_size, page_token } =
            request.into_inner();
        match self.0.query(Query::Operations { target_prefix, running_only }).await? {
            Answer::Operations(all) => {
                let newest = |r: &OperationRecord| page::newest_first(r.uid.as_u128());
                let (all, next_page_token) = page::cut(all, page_size, &page_token, newest)?;
                let operations = all.iter().map(convert::operation).collect();
                Ok(Response::new(ListOperationsResponse { operations, next_page_token }))
            }
            other => Err(unexpected(&other).into()),
        }
    }

    async fn watch_operation(
        &self,
        request: Request<WatchOperationRequest>,
    ) -> Result<Response<Self::WatchOperationStream>, Status> {
        let uid = parse(&request.get_ref().name)?;
        self.find(uid).await?;
        let (client, stream) = follow(BEHIND_MAX);
        tokio::spawn(self.clone().follow(uid, client));
        Ok(Response::new(Box::pin(stream)))
    }

    async fn cancel_operation(
        &self,
        request: Request<CancelOperationRequest>,
    ) -> Result<Response<Operation>, Status> {
        let uid = parse(&request.get_ref().name)?;
        let state = self.0.state.clone();
        let cancel = async move { state.ask(Command::CancelOperation(uid)).await };
        Ok(one(self.0.audited(format!("operations/{uid}"), None, cancel).await?)?)
    }
}
