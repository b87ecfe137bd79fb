//! The gRPC border: protobuf in, checked specs inside, protobuf out.
//!
//! Owns: the servers (Unix socket, TCP with mutual TLS), who calls ([`auth`]) and who may ([`policy`]), conversion ([`convert`]), and one
//! file per service. Never: decisions about resources (those are the state's), files other than logs and the parts
//! of an image in import, and the files of a VM that goes to another node ([`archive`]).
//!
//! Limits: a message is at most 4 MiB, an image's chunk 1 MiB; connections, calls and streams are so many and of one peer so many
//! ([`places`]), unfinished messages have so much room and time ([`intake`]),
//! answers that wait to be read so much room ([`answers`]); whoever follows something and does not read is
//! told where to go on ([`follow`]); header sizes, the time of a TLS handshake and of a greeting are bounded; a peer that does not
//! answer keep-alives, or takes nothing, is dropped.

mod answers;
mod archive;
mod audit;
pub mod auth;
mod bounded;
pub mod certificates;
mod changes;
mod check;
mod console;
pub mod convert;
mod fields;
mod follow;
mod image;
mod image_disk;
mod intake;
mod kernel;
mod keys;
mod machine;
mod node;
mod operation;
mod page;
mod places;
pub mod policy;
pub mod server;
mod uploads;
pub mod usage;
mod vdc;
mod vm;
mod volume;

pub use archive::Moves;

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use serio_api::{FILE_DESCRIPTOR_SET, v1};
use serio_types::Name;
use tonic::service::Routes;
use uuid::Uuid;

use crate::{
    audit::{Detail, Trail, result as audit_result},
    capacity::Reporter,
    direct::DirectIo,
    error::Error,
    health::Health,
    keys::Keys,
    meter::Meter,
    state::{
        Handles,
        command::{Answer, Command, Mutation, Query, Request},
        owner::Client,
    },
    supervise::Supervisor,
};

/// What all services need. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Context {
    /// Asks the state.
    pub state: Client,
    /// What runs.
    pub handles: Handles,
    /// Imports images, looks at files.
    pub supervisor: Supervisor,
    /// What the node has.
    pub reporter: Reporter,
    /// Who the node is.
    pub node: Arc<NodeInfo>,
    /// Of encrypted vdcs.
    pub keys: Keys,
    /// What was done, and by whom.
    pub audit: Trail,
    /// What is wrong with the node.
    pub health: Health,
    /// What is used.
    pub meter: Meter,
    /// VMs that go to other nodes, or come from them.
    pub moves: Moves,
}

/// Who the node is.
#[derive(Debug, Clone)]
pub struct NodeInfo {
    /// "a".
    pub name: Name,
    /// Made once.
    pub uid: String,
    /// Of the host's boot.
    pub boot_id: String,
    /// The data centre.
    pub site: String,
    /// What fails together.
    pub failure_domain: String,
    /// Of this process.
    pub start_time: SystemTime,
    /// The same, by a clock that nobody sets.
    pub started: Instant,
    /// The state directory: images are written below it.
    pub state_dir: PathBuf,
    /// Which disks go past the page cache.
    pub direct_io: DirectIo,
    /// Whether the kernel may move the packets of cards by itself.
    pub vhost_net: bool,
    /// What is written into NBD URIs; none without an NBD listener.
    pub nbd: Option<String>,
}

/// For so long after a start a change waits for what the start has still to look at, and so often is it tried.
const SETTLING: Duration = Duration::from_secs(60);
const BUSY_WAIT: Duration = Duration::from_secs(10);
const BUSY_AGAIN: Duration = Duration::from_millis(50);

impl Context {
    /// A change, in the audit log before it is begun and when it has ended, whether its caller still waits or not.
    async fn mutate(&self, mutation: Mutation, request: Option<Request>) -> Result<Answer, Error> {
        let on = mutation.resource();
        let id = request.as_ref().map(|request| request.id);
        let this = self.clone();
        self.audited(on, id, async move { this.apply(mutation, request).await }).await
    }

    /// A change, once it can be: soon after a start what it is about may still be looked at.
    async fn apply(&self, mutation: Mutation, request: Option<Request>) -> Result<Answer, Error> {
        self.health.admit(&mutation)?;
        let settling = self.node.started.elapsed() < SETTLING;
        let patience = Instant::now() + BUSY_WAIT;
        loop {
            let answer = self.state.ask(Command::Mutate(mutation.clone(), request.clone())).await;
            // Refused means that nothing was done, so it may be asked again.
            if !settling || !matches!(answer, Err(Error::Busy { .. })) || Instant::now() >= patience {
                return answer;
            }
            tokio::time::sleep(BUSY_AGAIN).await;
        }
    }

    /// Does work that is in the audit log; it goes on when the caller goes away.
    async fn audited<T: Send + 'static>(
        &self,
        on: String,
        request: Option<Uuid>,
        work: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<T, Error> {
        let detail: Detail = request.map(|id| ("request_id", id.to_string())).into_iter().collect();
        let asked = self.audit.asked(auth::current(), on, detail).await?;
        let trail = self.audit.clone();
        let done = tokio::spawn(async move {
            let result = work.await;
            let word = audit_result(&result);
            trail.ended(asked, word).await;
            result
        });
        done.await.unwrap_or(Err(Error::Ending))
    }

    async fn query(&self, query: Query) -> Result<Answer, Error> {
        self.state.ask(Command::Query(query)).await
    }
}

/// An answer of another kind than the question's: our mistake, told to the caller rather than by a panic.
fn unexpected(answer: &Answer) -> Error {
    let kind = format!("{answer:?}");
    Error::Failed {
        doing: "answering",
        why: format!("an unexpected answer: {}", kind.split('(').next().unwrap_or_default()),
    }
}

/// All services, with health and reflection.
///
/// # Errors
/// The reflection's descriptors are damaged, which a test would have found.
pub async fn routes(context: &Context) -> Result<Routes, tonic_reflection::server::Error> {
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<v1::node_service_server::NodeServiceServer<node::NodeApi>>().await;
    health.set_serving::<v1::vdc_service_server::VdcServiceServer<vdc::VdcApi>>().await;
    health.set_serving::<v1::vm_service_server::VmServiceServer<vm::VmApi>>().await;
    health.set_serving::<v1::volume_service_server::VolumeServiceServer<volume::VolumeApi>>().await;
    health.set_serving::<v1::image_service_server::ImageServiceServer<image::ImageApi>>().await;
    health
        .set_serving::<v1::operation_service_server::OperationServiceServer<operation::OperationApi>>()
        .await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    let mut routes = Routes::builder();
    routes
        .add_service(health_service)
        .add_service(reflection)
        .add_service(v1::node_service_server::NodeServiceServer::new(node::NodeApi(context.clone())))
        .add_service(v1::vdc_service_server::VdcServiceServer::new(vdc::VdcApi(context.clone())))
        .add_service(v1::vm_service_server::VmServiceServer::new(vm::VmApi(context.clone())))
        .add_service(v1::volume_service_server::VolumeServiceServer::new(volume::VolumeApi(context.clone())))
        .add_service(v1::operation_service_server::OperationServiceServer::new(operation::OperationApi(
            context.clone(),
        )))
        .add_service(v1::image_service_server::ImageServiceServer::new(image::ImageApi::new(
            context.clone(),
        )));
    Ok(routes.routes().prepare())
}
