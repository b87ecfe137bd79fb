//! Operations: those named `broken` fail, `endless` go on, `flaky` break the stream once, others get done.

use serio_api::v1::{
    CancelOperationRequest, GetOperationRequest, ListOperationsRequest, ListOperationsResponse, Operation,
    OperationState, WatchOperationRequest, operation_service_server::OperationService,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::{Fake, Pinned};

#[tonic::async_trait]
impl OperationService for Fake {
    type WatchOperationStream = Pinned<Operation>;

    async fn get_operation(
        &self,
        request: Request<GetOperationRequest>,
    ) -> Result<Response<Operation>, Status> {
        let name = request.into_inner().name;
        Ok(Response::new(Operation { name, state: OperationState::Running.into(), ..Operation::default() }))
    }

    async fn list_operations(
        &self,
        _: Request<ListOperationsRequest>,
    ) -> Result<Response<ListOperationsResponse>, Status> {
        let operation = |id: &str, target: &str| Operation {
            name: format!("operations/{id}"),
            kind: "delete-snapshot".into(),
            target: target.into(),
            state: OperationState::Running.into(),
            done_bytes: 1,
            total_bytes: 4,
            ..Operation::default()
        };
        let operations = vec![
            operation("1", "vdcs/a/volumes/web/snapshots/s"),
            operation("2", "vdcs/a/volumes/web-root/snapshots/s"),
        ];
        Ok(Response::new(ListOperationsResponse { operations, ..Default::default() }))
    }

    async fn watch_operation(
        &self,
        request: Request<WatchOperationRequest>,
    ) -> Result<Response<Self::WatchOperationStream>, Status> {
        let name = request.into_inner().name;
        let (sender, receiver) = mpsc::channel(4);
        let state = |state: OperationState, error: &str| Operation {
            name: name.clone(),
            state: state.into(),
            error: error.into(),
            ..Operation::default()
        };
        sender.send(Ok(state(OperationState::Running, ""))).await.unwrap();
        match name.as_str() {
            "operations/endless" => drop(tokio::spawn(async move { sender.closed().await })),
            "operations/broken" => {
                sender.send(Ok(state(OperationState::Failed, "the disk is on fire"))).await.unwrap();
            }
            "operations/flaky" if std::mem::replace(&mut self.seen.lock().unwrap().flaky, true) => {
                sender.try_send(Ok(state(OperationState::Done, ""))).unwrap();
            }
            "operations/flaky" => {}
            _ => sender.send(Ok(state(OperationState::Done, ""))).await.unwrap(),
        }
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn cancel_operation(
        &self,
        request: Request<CancelOperationRequest>,
    ) -> Result<Response<Operation>, Status> {
        let name = request.into_inner().name;
        Ok(Response::new(Operation { name, state: OperationState::Cancelled.into(), ..Operation::default() }))
    }
}
