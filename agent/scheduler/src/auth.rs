//! Who may call: by the role in the client's certificate (the OU of its subject), which TLS has verified by then.
//! Which node an agent may speak for: the one that its certificate names (the CN).

use std::sync::Arc;

use tonic::{Request, Status};
use x509_parser::prelude::{FromDer, X509Certificate};

/// The roles, as they stand in a subject's OU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A node's agent.
    Node,
    /// A node's agent, towards other agents; also that of an agent here.
    PeerAgent,
    /// Everything.
    ControlPlane,
    /// Reads.
    Auditor,
}

impl Role {
    /// By its text.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "node" => Self::Node,
            "peer-agent" => Self::PeerAgent,
            "control-plane" => Self::ControlPlane,
            "auditor" => Self::Auditor,
            _ => return None,
        })
    }
}

/// Those who connect as agents.
pub const AGENTS: &[Role] = &[Role::Node, Role::PeerAgent];
/// Those who read.
pub const READERS: &[Role] = &[Role::ControlPlane, Role::Auditor];
/// Anyone with a role.
pub const EVERYONE: &[Role] = &[Role::ControlPlane, Role::Auditor, Role::Node, Role::PeerAgent];
/// Those who change.
pub const WRITERS: &[Role] = &[Role::ControlPlane];

/// How callers are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// By certificates.
    Certificates,
    /// Not at all: loopback, for tests and first steps.
    Insecure,
}

/// The node that a caller may speak for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Speaker {
    /// The one its certificate names.
    Node(String),
    /// Whichever it says: nobody is known without certificates.
    Anyone,
}

impl Speaker {
    /// Refuses an agent that says it is another node than its certificate does.
    ///
    /// # Errors
    /// `PERMISSION_DENIED`.
    pub fn speaks_for(&self, node_id: &str) -> Result<(), Status> {
        match self {
            Self::Node(name) if name != node_id => Err(Status::permission_denied(format!(
                "the certificate names the node `{name}`, the agent says it is `{node_id}`: \
                 issue one for it (serio pki issue DIR {node_id} --role node), or correct node_name"
            ))),
            Self::Node(_) | Self::Anyone => Ok(()),
        }
    }
}

/// Whom the caller's certificate lets it speak for; nobody's name when it has none.
pub fn speaker<T>(policy: Policy, request: &Request<T>) -> Speaker {
    if policy == Policy::Insecure {
        return Speaker::Anyone;
    }
    let chain = request.peer_certs().unwrap_or_default();
    let name = chain.first().and_then(|first| common_name(first));
    Speaker::Node(name.unwrap_or_default())
}

/// Refuses a caller whose certificate has none of the roles.
pub fn check<T>(policy: Policy, request: &Request<T>, allowed: &[Role]) -> Result<(), Status> {
    if policy == Policy::Insecure {
        return Ok(());
    }
    let chain = request.peer_certs().unwrap_or_else(|| Arc::new(Vec::new()));
    let Some(first) = chain.first() else {
        return Err(Status::unauthenticated(
            "no client certificate: issue one (serio pki issue) and name it in SERIO_CERT and SERIO_KEY",
        ));
    };
    let units = units(first);
    if units.iter().filter_map(|unit| Role::parse(unit)).any(|role| allowed.contains(&role)) {
        return Ok(());
    }
    let wanted: Vec<&str> = allowed.iter().map(|role| role_text(*role)).collect();
    Err(Status::permission_denied(format!(
        "the certificate has the role `{}`, and this call wants {}: issue one with --role {}",
        units.join(", "),
        wanted.join(" or "),
        wanted.first().unwrap_or(&"control-plane"),
    )))
}

const fn role_text(role: Role) -> &'static str {
    match role {
        Role::Node => "node",
        Role::PeerAgent => "peer-agent",
        Role::ControlPlane => "control-plane",
        Role::Auditor => "auditor",
    }
}

/// The OUs of a certificate's subject; none of a certificate that cannot be read.
fn units(der: &[u8]) -> Vec<String> {
    let Ok((_, certificate)) = X509Certificate::from_der(der) else { return Vec::new() };
    certificate
        .subject()
        .iter_organizational_unit()
        .filter_map(|unit| unit.as_str().ok().map(str::to_owned))
        .collect()
}

/// The first CN of a certificate's subject.
fn common_name(der: &[u8]) -> Option<String> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let name = certificate.subject().iter_common_name().next()?;
    name.as_str().ok().map(str::to_owned)
}
