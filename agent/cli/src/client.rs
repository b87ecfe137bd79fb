//! The connection to an agent or a scheduler: a Unix socket, or TLS with a certificate on both sides.
//!
//! Owns: what `--host` may be, the TLS files, deadlines, the one retry, and the telling of "nobody there" from "refused".
//! Of several schedulers (`region`) it goes to the one that leads.
//! Invariant: a request carries the same `request_id` when it is sent again, so that sending twice does once.

use std::{
    error::Error,
    fmt,
    future::Future,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use hyper_util::rt::TokioIo;
use serio_types::Route;
use tokio::net::UnixStream;
use tonic::{
    Code, Request, Response, Status,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity, Uri},
};

mod region;

use crate::{args::Global, error::Failure};

/// How long a connection may take to come about.
const CONNECT_MS_MAX: u64 = 5_000;
/// How often a peer that says nothing is asked whether it is there.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// How long it may take to answer: the question waits behind all that an upload has put into the socket, megabytes on a slow line.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(60);
/// Before the one retry: a restarted agent listens again by then.
const RETRY_AFTER_MS: u64 = 300;
/// gRPC on a node, when the URL names no port.
const AGENT_PORT: u16 = 7440;

/// Where to connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A socket on this machine.
    Unix(PathBuf),
    /// TLS.
    Https {
        /// Name or address; an IPv6 address in brackets.
        host: String,
        /// TCP.
        port: u16,
    },
    /// In the clear: loopback only, for a scheduler started with --insecure.
    Http {
        /// A loopback address.
        host: String,
        /// TCP.
        port: u16,
    },
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let example = "write unix:/run/serio/seriod.sock or https://HOST:7440";
        if let Some(path) = text.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            return if path.is_empty() {
                Err(format!("`{text}` names no socket: {example}"))
            } else {
                Ok(Self::Unix(path.into()))
            };
        }
        if text.starts_with('/') {
            return Ok(Self::Unix(text.into()));
        }
        let uri: Uri = text.parse().map_err(|_| format!("`{text}` is not a host: {example}"))?;
        let host = uri
            .host()
            .filter(|h| !h.is_empty())
            .ok_or_else(|| format!("`{text}` is not a host: {example}"))?;
        if uri.path().len() > 1 || uri.query().is_some() {
            return Err(format!("`{text}` has a path: {example}"));
        }
        if uri.port_u16().is_none() && uri.authority().is_some_and(|authority| authority.as_str() != host) {
            return Err(format!("`{text}` has a port that is none: {example}"));
        }
        let (host, port) = (host.to_owned(), uri.port_u16().unwrap_or(AGENT_PORT));
        match uri.scheme_str() {
            Some("https") => Ok(Self::Https { host, port }),
            Some("http") if is_loopback(&host) => Ok(Self::Http { host, port }),
            Some("http") => {
                Err(format!("`{text}` is not encrypted, which only this machine itself may be: use https://"))
            }
            _ => Err(format!("`{text}` has no known scheme: {example}")),
        }
    }
}

fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || bare.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Https { host, port } => write!(f, "https://{host}:{port}"),
            Self::Http { host, port } => write!(f, "http://{host}:{port}"),
        }
    }
}

/// A connection.
#[derive(Debug, Clone)]
pub struct Client {
    channel: Channel,
    target: Target,
    timeout: Option<Duration>,
    /// Where else to go, from here on.
    route: Route,
    global: Arc<Global>,
}

impl Client {
    /// Connects as the global flags say; of several hosts to the first that is there.
    pub async fn connect(global: &Global) -> Result<Self, Failure> {
        let targets = region::targets(&global.host).map_err(Failure::Usage)?;
        let urls = targets.iter().map(ToString::to_string).collect();
        let mut route = Route::new(urls).ok_or_else(|| Failure::Usage("--host names nobody".to_owned()))?;
        let mut last = None;
        for target in targets {
            match open(global, &target).await {
                Ok(channel) => {
                    let (timeout, global) = (global.timeout(), Arc::new(global.clone()));
                    return Ok(Self { channel, target, timeout, route, global });
                }
                Err(failure) => last = Some(failure),
            }
            route.failed();
        }
        Err(last.unwrap_or_else(|| Failure::Usage("--host names nobody".to_owned())))
    }

    /// Where this goes.
    #[must_use]
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// The transport, for streams.
    #[must_use]
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// The deadline that was asked for.
    #[must_use]
    pub fn timeout(&self) -> Option<Duration> {
        self.timeout
    }

    /// The same with another deadline.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Option<Duration>) -> Self {
        self.timeout = timeout;
        self
    }

    /// One request, one answer: with the deadline, and once more when the agent went away in between. Every request
    /// that is sent here reads only or carries a `request_id`.
    pub async fn call<Q, A, F, R>(&self, doing: &str, request: Q, send: F) -> Result<A, Failure>
    where
        Q: Clone,
        F: Fn(Channel, Request<Q>) -> R,
        R: Future<Output = Result<Response<A>, Status>>,
    {
        let both = async {
            match self.send(&request, &send).await {
                Err(status) if self.goes_elsewhere(&status) => self.elsewhere(status, &request, &send).await,
                Err(status) if status.code() == Code::Unavailable || is_broken(&status) => {
                    tokio::time::sleep(Duration::from_millis(RETRY_AFTER_MS)).await;
                    self.send(&request, &send).await
                }
                first => first,
            }
        };
        let answer = match self.timeout {
            None => both.await,
            Some(limit) => tokio::time::timeout(limit, both).await.unwrap_or_else(|_| {
                Err(Status::deadline_exceeded(format!(
                    "no answer within {} s; ask for more time with --timeout",
                    limit.as_secs_f64()
                )))
            }),
        };
        answer.map_err(|status| self.failure(doing, status))
    }

    async fn send<Q, A, F, R>(&self, request: &Q, send: &F) -> Result<A, Status>
    where
        Q: Clone,
        F: Fn(Channel, Request<Q>) -> R,
        R: Future<Output = Result<Response<A>, Status>>,
    {
        send(self.channel.clone(), Request::new(request.clone())).await.map(Response::into_inner)
    }

    /// What a status means to the user: one that the transport made up is "unreachable", not an answer.
    #[must_use]
    pub fn failure(&self, doing: &str, status: Status) -> Failure {
        if is_broken(&status) {
            let reason = crate::error::chain(status.source());
            return unreachable(&self.target, reason.trim_start_matches(": ").to_owned().into());
        }
        Failure::Api { doing: doing.to_owned(), status: Box::new(status) }
    }
}

/// Whether another try may find what this one did not: the connection broke, or the agent is going.
#[must_use]
pub fn is_cut(status: &Status) -> bool {
    status.code() == Code::Unavailable || is_broken(status)
}

/// The connection broke: the status was made up on this side. What a host answers has no source.
fn is_broken(status: &Status) -> bool {
    status.source().is_some()
        && matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Internal)
}

/// The transport's error without the words "transport error" in front.
fn root(error: tonic::transport::Error) -> crate::error::Source {
    let text = crate::error::chain(error.source());
    if text.is_empty() { error.into() } else { text.trim_start_matches(": ").to_owned().into() }
}

fn unreachable(target: &Target, source: crate::error::Source) -> Failure {
    let reason = source.to_string().to_lowercase();
    let hint = match target {
        Target::Unix(path) if reason.contains("permission denied") => {
            format!("{} is for root and the group `serio`: add yourself with `usermod -aG serio $USER`, and log in again", path.display())
        }
        Target::Unix(_) => {
            "start the agent (`systemctl start seriod`), or name another with --host or SERIO_HOST; `serio doctor` looks closer".to_owned()
        }
        // BadSignature: an authority of the same name with another key.
        _ if ["unknownissuer", "unknown issuer", "badsignature"].iter().any(|what| reason.contains(what)) => {
            "the host's certificate is not signed by the authority in SERIO_CA: is it the right file?".to_owned()
        }
        _ if reason.contains("notvalidforname") || reason.contains("not valid for name") => {
            "the host's certificate is for another name: reach it by that name, or issue one with --host".to_owned()
        }
        // With TLS 1.3 a refused client learns it after the handshake: often only that the connection is gone.
        Target::Https { .. }
            if ["alert", "certificate", "canceled", "broken pipe", "reset", "closed"].iter().any(|what| reason.contains(what)) =>
        {
            "the TLS handshake failed: are SERIO_CERT and SERIO_KEY signed by the host's authority, not expired, and is the clock right?".to_owned()
        }
        _ => "is the host up, does it listen there ([grpc] listen in seriod.toml), and does a firewall let you through?".to_owned(),
    };
    Failure::Unreachable { host: target.to_string(), source, hint }
}

/// A channel to it, as the global flags say.
async fn open(global: &Global, target: &Target) -> Result<Channel, Failure> {
    let channel = match target {
        Target::Unix(path) => connect_unix(path).await,
        Target::Https { .. } => connect_tcp(target, Some(tls(global, target)?)).await,
        Target::Http { .. } => connect_tcp(target, None).await,
    };
    channel.map_err(|error| unreachable(target, root(error)))
}

async fn connect_unix(path: &Path) -> Result<Channel, tonic::transport::Error> {
    let path = path.to_owned();
    // The URI is not used for the connection; it becomes the :authority.
    Endpoint::from_static("http://localhost")
        .connect_timeout(Duration::from_millis(CONNECT_MS_MAX))
        .connect_with_connector(tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        }))
        .await
}

async fn connect_tcp(
    target: &Target,
    tls: Option<ClientTlsConfig>,
) -> Result<Channel, tonic::transport::Error> {
    let mut endpoint = Endpoint::from_shared(target.to_string())?
        .connect_timeout(Duration::from_millis(CONNECT_MS_MAX))
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT);
    if let Some(tls) = tls {
        endpoint = endpoint.tls_config(tls)?;
    }
    endpoint.connect().await
}

fn tls(global: &Global, target: &Target) -> Result<ClientTlsConfig, Failure> {
    let missing: Vec<&str> =
        [("SERIO_CA", &global.ca), ("SERIO_CERT", &global.cert), ("SERIO_KEY", &global.key)]
            .into_iter()
            .filter_map(|(name, value)| value.is_none().then_some(name))
            .collect();
    let (Some(ca), Some(cert), Some(key)) = (&global.ca, &global.cert, &global.key) else {
        return Err(Failure::Usage(format!(
            "{target} wants certificates on both sides, and {} is not set\n  to do: name the files with --ca, --cert and \
             --key or SERIO_CA, SERIO_CERT and SERIO_KEY; `serio pki issue` makes them",
            missing.join(", ")
        )));
    };
    let Target::Https { host, .. } = target else {
        return Ok(ClientTlsConfig::new());
    };
    Ok(ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(read(ca)?))
        .identity(Identity::from_pem(read(cert)?, read(key)?))
        .domain_name(host.trim_start_matches('[').trim_end_matches(']')))
}

fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    std::fs::read(path).map_err(|error| Failure::local(format!("cannot read {}", path.display()), error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_host_may_be() {
        let https = |host: &str, port| Target::Https { host: host.to_owned(), port };
        for (text, target) in [
            ("unix:/run/serio/seriod.sock", Target::Unix("/run/serio/seriod.sock".into())),
            ("unix:///run/x", Target::Unix("/run/x".into())),
            ("/run/x", Target::Unix("/run/x".into())),
            ("https://node-a", https("node-a", 7440)),
            ("https://10.0.0.1:1", https("10.0.0.1", 1)),
            ("https://[::1]:7450/", https("[::1]", 7450)),
            ("http://127.0.0.1:7450", Target::Http { host: "127.0.0.1".into(), port: 7450 }),
        ] {
            assert_eq!(text.parse::<Target>().as_ref(), Ok(&target), "{text}");
        }
        for text in [
            "",
            "unix:",
            "node-a",
            "node-a:7440",
            "http://10.0.0.1",
            "https://a/b",
            "ftp://a",
            "https://a:99999",
        ] {
            assert!(text.parse::<Target>().is_err(), "{text}");
        }
    }
}
