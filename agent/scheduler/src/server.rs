//! The gRPC server: TLS on both sides, health, reflection, limits.

use std::{future::Future, io, path::PathBuf, time::Duration};

use serio_api::v1::scheduler_service_server::SchedulerServiceServer;
use tokio::net::TcpListener;
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig, server::TcpIncoming};

use crate::{auth::Policy, config::Security, owner::Handle, service::Service};

/// A complete list of allocations fits; more is refused.
const MESSAGE_BYTES_MAX: usize = 8 << 20;
/// Streams of one connection: an agent needs one, a client a few.
const STREAMS_MAX: u32 = 64;
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why the server does not serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A certificate or key cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The reflection service refuses our own descriptors.
    #[error("the descriptors of the interface are broken")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// The transport fails, or the certificates are none.
    #[error("the gRPC server")]
    Transport(#[from] tonic::transport::Error),
}

/// Serves on that socket until `ended`, then ends the agents' streams, which do not end by themselves.
pub async fn serve(
    listener: TcpListener,
    security: &Security,
    owner: Handle,
    ended: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let advertised = listener.local_addr().map(|address| address.to_string()).unwrap_or_default();
    serve_as(listener, advertised, security, owner, ended).await
}

/// The same, where others reach it under another address.
pub async fn serve_as(
    listener: TcpListener,
    advertised: String,
    security: &Security,
    owner: Handle,
    ended: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let (policy, builder) = match security {
        Security::Insecure => (Policy::Insecure, Server::builder()),
        Security::Tls(folder) => (Policy::Certificates, Server::builder().tls_config(tls(folder)?)?),
    };
    let service = SchedulerServiceServer::new(Service::new(owner.clone(), policy, advertised))
        .max_decoding_message_size(MESSAGE_BYTES_MAX);
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<SchedulerServiceServer<Service>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(serio_api::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    builder
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .max_concurrent_streams(STREAMS_MAX)
        .add_service(service)
        .add_service(health_service)
        .add_service(reflection)
        // Answers are small and many: none waits for the peer's acknowledgement of the one before.
        .serve_with_incoming_shutdown(TcpIncoming::from(listener).with_nodelay(Some(true)), async {
            ended.await;
            owner.end().await;
        })
        .await?;
    Ok(())
}

fn tls(folder: &std::path::Path) -> Result<ServerTlsConfig, ServeError> {
    let read = |file: &str| {
        let path = folder.join(file);
        std::fs::read(&path).map_err(|source| ServeError::Read { path, source })
    };
    Ok(ServerTlsConfig::new()
        .identity(Identity::from_pem(read("server-cert.pem")?, read("server-key.pem")?))
        .client_ca_root(Certificate::from_pem(read("ca-cert.pem")?)))
}
