//! Requests as they come in, checked once.

use serio_api::v1::{FenceNodeRecordRequest, ListPlacementsRequest, PlaceRequest, PutRecoveryPlanRequest};
use serio_types::{Name, VdcName, resource};

use crate::{error::OrderError, placement::what_if::Member};

/// Uncommitted, when the caller does not say.
const TTL_MS: u32 = 60_000;
const TTL_MS_MAX: u32 = 600_000;
/// Characters of names that are not looked at further.
const TEXT_CHARS_MAX: usize = 256;
const PROOF_CHARS_MAX: usize = 4096;
const DOCUMENT_BYTES_MAX: usize = 256 << 10;
const PAGE: usize = 100;
const PAGE_MAX: usize = 1000;

fn invalid(field: &'static str, problem: impl Into<String>) -> OrderError {
    OrderError::Invalid { field, problem: problem.into() }
}

/// `nodes/a` for the collection `nodes`, or why not.
pub(super) fn name(collection: &str, text: &str) -> Result<Name, OrderError> {
    let rest = text.strip_prefix(collection).and_then(|rest| rest.strip_prefix('/'));
    match rest.map(str::parse::<Name>) {
        Some(Ok(name)) => Ok(name),
        Some(Err(error)) => Err(invalid("name", error.to_string())),
        None => Err(invalid("name", format!("`{text}` is not of the form {collection}/NAME"))),
    }
}

/// With what was left out.
pub(super) fn place(mut request: PlaceRequest) -> Result<(Name, PlaceRequest), OrderError> {
    let id: Name = request
        .request_id
        .parse()
        .map_err(|error: serio_types::NameError| invalid("request_id", error.to_string()))?;
    let vdc: Name =
        request.vdc.parse().map_err(|error: serio_types::NameError| invalid("vdc", error.to_string()))?;
    if request.resource.is_empty() {
        // A node promises to a VM, by name.
        request.resource = resource::vm(&VdcName { vdc, name: id.clone() });
    }
    resource::parse_vm(&request.resource).map_err(|error| invalid("resource", error.to_string()))?;
    let texts = [
        ("anti_affinity_group", &request.anti_affinity_group),
        ("site", &request.site),
        ("cpu_baseline", &request.cpu_baseline),
        ("image", &request.image),
    ];
    for (field, text) in texts {
        if text.chars().count() > TEXT_CHARS_MAX || text.chars().any(char::is_control) {
            return Err(invalid(field, format!("at most {TEXT_CHARS_MAX} printable characters")));
        }
    }
    if request.vcpus == 0 {
        return Err(invalid("vcpus", "0: at least 1"));
    }
    if request.memory_bytes == 0 {
        return Err(invalid("memory_bytes", "0: say how much"));
    }
    if request.ttl_ms > TTL_MS_MAX {
        return Err(invalid("ttl_ms", format!("{} is more than {TTL_MS_MAX}", request.ttl_ms)));
    }
    if request.ttl_ms == 0 {
        request.ttl_ms = TTL_MS;
    }
    Ok((id, request))
}

/// A node, and why it is dead.
pub(super) fn fence(request: FenceNodeRecordRequest) -> Result<(Name, String), OrderError> {
    let node = name("nodes", &request.name)?;
    let proof = request.proof.trim();
    if proof.is_empty() {
        return Err(invalid("proof", "empty: write down what shows that the node cannot write any more"));
    }
    if proof.chars().count() > PROOF_CHARS_MAX {
        return Err(invalid("proof", format!("more than {PROOF_CHARS_MAX} characters")));
    }
    Ok((node, proof.to_owned()))
}

/// A vdc, its plan, and the version that it replaces.
pub(super) fn plan(request: PutRecoveryPlanRequest) -> Result<(Name, Vec<u8>, u64), OrderError> {
    let vdc = name("plans", &request.name)?;
    if request.document.len() > DOCUMENT_BYTES_MAX {
        return Err(invalid("document", format!("more than {DOCUMENT_BYTES_MAX} bytes")));
    }
    Ok((vdc, request.document, request.expected_version))
}

/// A page of a list.
pub(super) struct Page {
    pub(super) vdc: String,
    pub(super) after: Option<Name>,
    pub(super) size: usize,
}

pub(super) fn page(request: ListPlacementsRequest) -> Result<Page, OrderError> {
    let after = match request.page_token.as_str() {
        "" => None,
        token => Some(name("placements", token).map_err(|_| invalid("page_token", "not from here"))?),
    };
    let size = match usize::try_from(request.page_size) {
        Ok(0) => PAGE,
        Ok(size) => size.min(PAGE_MAX),
        Err(_) => return Err(invalid("page_size", "below 0")),
    };
    Ok(Page { vdc: request.vdc, after, size })
}

/// A site that somebody has ever reported from.
pub(super) fn site(site: &str, nodes: &[Member]) -> Result<(), OrderError> {
    if nodes.iter().any(|node| node.view.site == site) {
        return Ok(());
    }
    Err(OrderError::Unknown(format!("a node at site `{site}`")))
}
