//! Who may call what. On the Unix socket: root, seriod's own user, the group `serio`. On TCP: the role that the client's
//! certificate carries as its subject's OU; a certificate of another CA does not come so far.
//!
//! | role | may |
//! |---|---|
//! | `control-plane` | everything |
//! | `auditor`, `peer-agent` | read: Get, List, Watch, ReadLog |
//! | other | only ask for health |

use std::{
    fs,
    sync::Arc,
    task::{Context, Poll},
};

use tonic::{
    body::Body,
    codegen::{BoxFuture, Service, http},
    transport::server::{TcpConnectInfo, TlsConnectInfo, UdsConnectInfo},
};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::error::Error;

/// Whose files show who belongs to it.
const GROUP: &str = "serio";

/// What a caller may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Everything.
    ControlPlane,
    /// Read.
    Reader,
    /// Nothing but health.
    Nobody,
}

/// The role that a certificate carries.
#[must_use]
pub fn role_of(certificate: &[u8]) -> Role {
    let Ok((_, certificate)) = X509Certificate::from_der(certificate) else { return Role::Nobody };
    let mut units = certificate.subject().iter_organizational_unit().filter_map(|unit| unit.as_str().ok());
    units
        .find_map(|unit| match unit {
            "control-plane" => Some(Role::ControlPlane),
            "auditor" | "peer-agent" => Some(Role::Reader),
            _ => None,
        })
        .unwrap_or(Role::Nobody)
}

/// What a method asks for: the path is `/serio.v1.VmService/GetVm`.
fn allowed(role: Role, path: &str) -> bool {
    let Some((service, method)) = path.trim_start_matches('/').split_once('/') else { return false };
    if service.starts_with("grpc.health.") {
        return true;
    }
    match role {
        Role::ControlPlane => true,
        Role::Reader => {
            service.starts_with("grpc.reflection.")
                || ["Get", "List", "Watch", "ReadLog"].iter().any(|read| method.starts_with(read))
        }
        Role::Nobody => false,
    }
}

/// The line of the group in /etc/group. Read by hand: the static binary has no name service.
fn group_line(text: &str) -> Option<(u32, Vec<&str>)> {
    let mut fields = text
        .lines()
        .map(|line| line.split(':'))
        .find_map(|mut fields| (fields.next() == Some(GROUP)).then_some(fields))?;
    let id = fields.nth(1)?.parse().ok()?;
    Some((id, fields.next().unwrap_or_default().split(',').filter(|name| !name.is_empty()).collect()))
}

/// The id of the group `serio`, if the host has it.
#[must_use]
pub fn group_id() -> Option<u32> {
    group_line(&fs::read_to_string("/etc/group").ok()?).map(|(id, _)| id)
}

fn is_member(uid: u32, gid: u32) -> bool {
    let groups = fs::read_to_string("/etc/group").unwrap_or_default();
    let Some((group, members)) = group_line(&groups) else { return false };
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
    if peer.uid() == 0 || peer.uid() == own || is_member(peer.uid(), peer.gid()) {
        Role::ControlPlane
    } else {
        Role::Nobody
    }
}

fn caller(extensions: &http::Extensions) -> Role {
    if let Some(info) = extensions.get::<UdsConnectInfo>() {
        return unix_role(info);
    }
    let certificates =
        extensions.get::<TlsConnectInfo<TcpConnectInfo>>().and_then(TlsConnectInfo::peer_certs);
    let certificates: Option<Arc<Vec<_>>> = certificates;
    certificates.and_then(|all| all.first().map(|first| role_of(first))).unwrap_or(Role::Nobody)
}

/// Who calls, for the audit log: a user of this host, or the subject of a certificate.
#[must_use]
pub fn who(extensions: &http::Extensions) -> String {
    if let Some(peer) = extensions.get::<UdsConnectInfo>().and_then(|info| info.peer_cred) {
        return format!("uid {}", peer.uid());
    }
    let tls = extensions.get::<TlsConnectInfo<TcpConnectInfo>>();
    let certificates = tls.and_then(TlsConnectInfo::peer_certs);
    let subject = certificates.as_ref().and_then(|all| {
        let (_, certificate) = X509Certificate::from_der(all.first()?).ok()?;
        Some(certificate.subject().to_string())
    });
    let address = tls.and_then(|info| info.get_ref().remote_addr());
    match (subject, address) {
        (Some(subject), Some(address)) => format!("{subject} from {}", address.ip()),
        (Some(subject), None) => subject,
        _ => "unknown".to_owned(),
    }
}

/// Stands before all services.
#[derive(Debug, Clone, Copy)]
pub struct GateLayer;

impl<S> tower::Layer<S> for GateLayer {
    type Service = Gate<S>;
    fn layer(&self, inner: S) -> Gate<S> {
        Gate(inner)
    }
}

/// Refuses callers that may not.
#[derive(Debug, Clone)]
pub struct Gate<S>(S);

impl<S> Service<http::Request<Body>> for Gate<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>> + Send,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = BoxFuture<S::Response, S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let role = caller(request.extensions());
        let path = request.uri().path();
        if allowed(role, path) {
            return Box::pin(self.0.call(request));
        }
        let what = path.rsplit('/').next().unwrap_or_default();
        let why = format!(
            "{what} needs a certificate with the role control-plane (or auditor, for reading) in its OU, or on the Unix socket \
             root or a member of the group {GROUP}"
        );
        let refused = Error::Forbidden(why).status().into_http();
        Box::pin(async move { Ok(refused) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_and_methods() {
        assert!(allowed(Role::ControlPlane, "/serio.v1.VmService/StopVm"));
        assert!(allowed(Role::Reader, "/serio.v1.VmService/ListVms"));
        assert!(allowed(Role::Reader, "/serio.v1.VmService/ReadLog"));
        assert!(!allowed(Role::Reader, "/serio.v1.VmService/AttachConsole"));
        assert!(!allowed(Role::Reader, "/serio.v1.ImageService/ImportImage"));
        assert!(!allowed(Role::Nobody, "/serio.v1.VmService/ListVms"));
        assert!(allowed(Role::Nobody, "/grpc.health.v1.Health/Check"));
        assert!(!allowed(Role::ControlPlane, "nonsense"));
    }

    #[test]
    fn the_group_file() {
        assert_eq!(group_line("root:x:0:\nserio:x:998:ann,bob\n"), Some((998, vec!["ann", "bob"])));
        assert_eq!(group_line("serio:x:998:\n"), Some((998, vec![])));
        assert_eq!(group_line("serios:x:998:\n"), None);
        assert_eq!(group_line(""), None);
    }

    #[test]
    fn garbage_is_nobody() {
        assert_eq!(role_of(b"no certificate"), Role::Nobody);
    }
}
