//! Who calls. On the Unix socket: root, seriod's own user and the group `serio` are the control plane, the group
//! `serio-audit` audits. On TCP: the role that the client's certificate carries as its subject's OU; a certificate of another
//! CA does not come so far. What a role may is in [`super::policy`].

use std::{
    fs,
    sync::Arc,
    task::{Context, Poll},
};

use tonic::{
    Status,
    body::Body,
    codegen::{BoxFuture, Service, http},
    transport::server::{TcpConnectInfo, TlsConnectInfo, UdsConnectInfo},
};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{
    answers::{Answering, Flow},
    bounded::Link,
    intake::Intake,
    places::{Peer, Place, Places},
    policy::{self, Access, Role},
};
use crate::{
    audit::{self, Caller, Trail},
    error::Error,
    nbd::Rationed,
};

/// Of a connection with TLS.
pub(super) type TlsInfo = TlsConnectInfo<Link<TcpConnectInfo>>;

/// Whose members drive the node.
pub(super) const GROUP: &str = "serio";
/// Whose members may read everything.
pub(super) const AUDITORS: &str = "serio-audit";

/// The role that a certificate carries.
#[must_use]
pub fn role_of(certificate: &[u8]) -> Role {
    let Ok((_, certificate)) = X509Certificate::from_der(certificate) else { return Role::Nobody };
    let mut units = certificate.subject().iter_organizational_unit().filter_map(|unit| unit.as_str().ok());
    units.find_map(Role::of_unit).unwrap_or(Role::Nobody)
}

/// The line of the group in /etc/group. Read by hand: the static binary has no name service.
fn group_line<'a>(text: &'a str, group: &str) -> Option<(u32, Vec<&'a str>)> {
    let mut fields = text
        .lines()
        .map(|line| line.split(':'))
        .find_map(|mut fields| (fields.next() == Some(group)).then_some(fields))?;
    let id = fields.nth(1)?.parse().ok()?;
    Some((id, fields.next().unwrap_or_default().split(',').filter(|name| !name.is_empty()).collect()))
}

/// The id of a group, if the host has it.
#[must_use]
pub fn group_id(group: &str) -> Option<u32> {
    group_line(&fs::read_to_string("/etc/group").ok()?, group).map(|(id, _)| id)
}

fn is_member(group: &str, uid: u32, gid: u32) -> bool {
    let groups = fs::read_to_string("/etc/group").unwrap_or_default();
    let Some((group, members)) = group_line(&groups, group) else { return false };
    if gid == group {
        return true;
    }
    let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
    users.lines().any(|line| {
        let mut fields = line.split(':');
        let (name, id) = (fields.next(), fields.nth(1));
        id.and_then(|id| id.parse().ok()) == Some(uid) && name.is_some_and(|name| members.contains(&name))
    })
}

fn unix_role(info: &UdsConnectInfo) -> Role {
    let Some(peer) = info.peer_cred else { return Role::Nobody };
    let own = nix::unistd::geteuid().as_raw();
    if peer.uid() == 0 || peer.uid() == own || is_member(GROUP, peer.uid(), peer.gid()) {
        Role::ControlPlane
    } else if is_member(AUDITORS, peer.uid(), peer.gid()) {
        Role::Auditor
    } else {
        Role::Nobody
    }
}

fn role(extensions: &http::Extensions) -> Role {
    if let Some(info) = extensions.get::<UdsConnectInfo>() {
        return unix_role(info);
    }
    let certificates = extensions.get::<TlsInfo>().and_then(TlsConnectInfo::peer_certs);
    let certificates: Option<Arc<Vec<_>>> = certificates;
    certificates.and_then(|all| all.first().map(|first| role_of(first))).unwrap_or(Role::Nobody)
}

/// Who calls, for the audit log: a user of this host, or the subject of a certificate.
#[must_use]
pub fn who(extensions: &http::Extensions) -> String {
    if let Some(peer) = extensions.get::<UdsConnectInfo>().and_then(|info| info.peer_cred) {
        return format!("uid {}", peer.uid());
    }
    let tls = extensions.get::<TlsInfo>();
    let certificates = tls.and_then(TlsConnectInfo::peer_certs);
    let subject = certificates.as_ref().and_then(|all| {
        let (_, certificate) = X509Certificate::from_der(all.first()?).ok()?;
        Some(certificate.subject().to_string())
    });
    let address = tls.and_then(|info| info.get_ref().info.remote_addr());
    match (subject, address) {
        (Some(subject), Some(address)) => format!("{subject} from {}", address.ip()),
        (Some(subject), None) => subject,
        _ => "unknown".to_owned(),
    }
}

tokio::task_local! {
    /// Who makes the call that this task is about.
    static CALLER: Caller;
}

/// Who makes the call that the caller of this function serves. Not in tasks that it spawned.
#[must_use]
pub fn current() -> Caller {
    CALLER.try_with(Clone::clone).unwrap_or_else(|_| Caller::own(""))
}

/// Stands before all services.
#[derive(Debug, Clone)]
pub struct GateLayer(Arc<Door>);

/// Calls that are answered at a time, and those of one peer.
const CALLS_MAX: usize = 512;
const CALLS_OF_PEER_MAX: usize = 256;
/// Streams that follow something, and those of one peer.
const FOLLOWERS_MAX: usize = 1024;
const FOLLOWERS_OF_PEER_MAX: usize = 512;

/// What all gates of a listener share.
#[derive(Debug)]
struct Door {
    trail: Trail,
    refused: Rationed,
    intake: Intake,
    calls: Arc<Places>,
    followers: Arc<Places>,
}

impl GateLayer {
    /// One that writes refused changes to the audit log, so many a second.
    #[must_use]
    pub fn new(trail: Trail) -> Self {
        Self(Arc::new(Door {
            trail,
            refused: Rationed::default(),
            intake: Intake::default(),
            calls: Places::new(CALLS_MAX, CALLS_OF_PEER_MAX),
            followers: Places::new(FOLLOWERS_MAX, FOLLOWERS_OF_PEER_MAX),
        }))
    }
}

impl<S> tower::Layer<S> for GateLayer {
    type Service = Gate<S>;
    fn layer(&self, inner: S) -> Gate<S> {
        Gate { inner, door: Arc::clone(&self.0) }
    }
}

/// Refuses callers that may not; to others' calls it says who they are.
#[derive(Debug, Clone)]
pub struct Gate<S> {
    inner: S,
    door: Arc<Door>,
}

/// Whether a call may last for as long as its caller likes.
fn follows(method: &str) -> bool {
    method.starts_with("Watch") || matches!(method, "ReadLog" | "AttachConsole")
}

/// What the listeners say of a connection, under the names by which it is looked up; and what waits to be sent on it.
fn unlink(extensions: &mut http::Extensions) -> Option<Arc<Flow>> {
    // Two layers of it lie around a connection: the one with its place, and the one that counts.
    if let Some(Link { info, flow }) = extensions.remove::<Link<Link<UdsConnectInfo>>>() {
        extensions.insert(info.info);
        return flow;
    }
    let Link { info, flow } = extensions.remove::<Link<TlsInfo>>()?;
    extensions.insert(info);
    flow
}

impl Door {
    /// A place for a call; asking for health needs none.
    fn place(&self, access: Access, method: &str, peer: Peer) -> Result<Option<Place>, Status> {
        if access == Access::Health {
            return Ok(None);
        }
        let (places, what) = match follows(method) {
            true => (&self.followers, "streams that follow something"),
            false => (&self.calls, "calls under way"),
        };
        places.take(peer).map(Some).map_err(|taken| {
            let why =
                format!("there are too many {what}: {taken}; end some, or read their answers, and try again");
            Status::resource_exhausted(why)
        })
    }

    /// What a caller reads who may not; a change that was tried is written down.
    async fn refuse(&self, caller: Caller, access: Option<Access>) -> Error {
        let why = format!(
            "{} needs {}: in the OU of a certificate, or on the Unix socket as root or a member of the group {GROUP} \
             (for reading: {AUDITORS})",
            caller.what,
            access.map_or("a method that this agent has", Access::who),
        );
        let error = Error::Forbidden(why);
        if access == Some(Access::Change)
            && let Some(more) = self.refused.may()
        {
            let detail = if more > 0 { vec![("not_written", more.to_string())] } else { Vec::new() };
            match self.trail.asked(caller, String::new(), detail).await {
                Ok(asked) => self.trail.ended(asked, audit::result(&Err::<(), _>(error.clone()))).await,
                Err(error) => tracing::warn!("a refusal is not in the audit log: {error}"),
            }
        }
        error
    }
}

impl<S> Service<http::Request<Body>> for Gate<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>> + Send,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = BoxFuture<S::Response, S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let flow = unlink(request.extensions_mut());
        let role = role(request.extensions());
        let path = request.uri().path();
        let access = policy::access(path);
        let caller = || Caller {
            who: who(request.extensions()),
            role: role.as_str(),
            what: path.rsplit('/').next().unwrap_or_default().to_owned(),
        };
        match access {
            Some(access) if access.allows(role) => {
                let caller = caller();
                let place = match self.door.place(access, &caller.what, Peer::of_call(request.extensions())) {
                    Ok(place) => place,
                    Err(status) => return Box::pin(async move { Ok(status.into_http()) }),
                };
                let request = request.map(|body| self.door.intake.metered(body));
                let answer = CALLER.scope(caller, self.inner.call(request));
                Box::pin(async move { Ok(answer.await?.map(|body| Answering::body(body, flow, place))) })
            }
            _ => {
                let (door, caller) = (Arc::clone(&self.door), caller());
                Box::pin(async move { Ok(door.refuse(caller, access).await.status().into_http()) })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_group_file() {
        assert_eq!(group_line("root:x:0:\nserio:x:998:ann,bob\n", GROUP), Some((998, vec!["ann", "bob"])));
        assert_eq!(group_line("serio:x:998:\n", GROUP), Some((998, vec![])));
        assert_eq!(group_line("serios:x:998:\nserio-audit:x:7:\n", GROUP), None);
        assert_eq!(group_line("", GROUP), None);
    }

    #[test]
    fn garbage_is_nobody() {
        assert_eq!(role_of(b"no certificate"), Role::Nobody);
    }
}
