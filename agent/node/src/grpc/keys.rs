//! VdcService's methods about keys: rotate, erase. Each has a line of its own in the audit log, before it is answered, and the
//! line is what a repeated request is answered from: it is there for as long as the log is.

use serio_api::v1::{
    Encryption, EraseVdcRequest, EraseVdcResponse, Receipt, RotateVdcKeyRequest, RotateVdcKeyResponse, Vdc,
};
use serio_audit::Entry;
use serio_types::{Name, resource};
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::{
    Context, audit, auth,
    convert::{field, request_of},
    vdc::{VdcApi, one},
};
use crate::{
    audit::{Caller, Detail},
    error::{Error, chain},
    state::command::{self, Mutation, Query},
};

/// The line that says that a key was wrapped anew.
const ROTATED: &str = "VdcKeyRotated";
/// The line that says that a key was destroyed.
pub(crate) const ERASED: &str = "VdcErased";

/// Writes a line; who asked is not answered without it.
async fn record(
    context: &Context,
    (caller, what): (&Caller, &str),
    on: &str,
    detail: Detail,
) -> Result<Receipt, Error> {
    let caller = Caller { what: what.to_owned(), ..caller.clone() };
    let receipt = context.audit.note(&caller, on, detail).await?;
    let time = audit::timestamp(&receipt.time);
    Ok(Receipt { number: receipt.number, time, who: caller.who, hash: receipt.hash })
}

/// The line that an earlier call of the same request has left, as its receipt and its details.
async fn written_before(
    context: &Context,
    request: Option<&command::Request>,
    what: &'static str,
) -> Result<Option<(Receipt, Entry)>, Error> {
    let Some(request) = request else { return Ok(None) };
    let (id, digest) = (request.id.to_string(), request.digest.clone());
    let same = move |entry: &Entry| entry.what == what && entry.detail.get("request_id") == Some(&id);
    let Some((entry, hash)) = context.audit.find(same).await? else { return Ok(None) };
    if entry.detail.get("request") != Some(&digest) {
        return Err(Error::invalid("request_id", "was used for another request: use a new UUID for each"));
    }
    let time = audit::timestamp(&entry.time);
    Ok(Some((Receipt { number: entry.n, time, who: entry.who.clone(), hash }, entry)))
}

fn with_request(request: Option<&command::Request>, mut detail: Detail) -> Detail {
    if let Some(request) = request {
        detail.push(("request_id", request.id.to_string()));
        detail.push(("request", request.digest.clone()));
    }
    detail
}

fn value(entry: &Entry, name: &str) -> String {
    entry.detail.get(name).cloned().unwrap_or_default()
}

pub(super) fn uid_of(vdc: &Vdc) -> Result<Uuid, Error> {
    let uid = vdc.uid.parse();
    uid.map_err(|_| Error::Failed { doing: "reading the vdc's uid", why: vdc.uid.clone() })
}

/// A vdc is deleted: its key goes, for nothing is encrypted under it any more. A file that stays harms nobody.
pub(super) async fn forget(context: &Context, vdc: &Vdc) {
    let Ok(uid) = uid_of(vdc) else { return };
    let gone = match vdc.encryption() {
        Encryption::Encrypted => context.keys.destroy(uid).await.map(drop),
        _ => Ok(()),
    };
    let gone = match gone {
        Ok(()) => context.keys.forget(uid).await,
        failed => failed,
    };
    if let Err(error) = gone {
        tracing::warn!(vdc = vdc.name, "files of its key stay: {}", chain(&error));
    }
}

pub(super) async fn rotate(
    api: &VdcApi,
    request: Request<RotateVdcKeyRequest>,
) -> Result<Response<RotateVdcKeyResponse>, Status> {
    let message = request.into_inner();
    let id = request_of!("RotateVdcKey", &message)?;
    let name = field("name", resource::parse_vdc(&message.name))?;
    let (context, caller, request) = (api.0.clone(), auth::current(), id.as_ref().map(|id| id.id));
    let work = async move { rotate_once(&context, &caller, name, id).await };
    Ok(Response::new(api.0.audited(message.name, request, work).await?))
}

async fn rotate_once(
    context: &Context,
    caller: &Caller,
    name: Name,
    request: Option<command::Request>,
) -> Result<RotateVdcKeyResponse, Error> {
    if let Some((receipt, entry)) = written_before(context, request.as_ref(), ROTATED).await? {
        return Ok(RotateVdcKeyResponse {
            key_id: value(&entry, "key_id"),
            from_kek: value(&entry, "from_kek"),
            to_kek: value(&entry, "to_kek"),
            receipt: Some(receipt),
        });
    }
    let vdc = one(context.query(Query::Vdcs(Some(name))).await?)?.into_inner();
    let rotated = context.keys.rotate(uid_of(&vdc)?).await.map_err(|e| Error::from_keys(&vdc.name, &e))?;
    let detail = vec![
        ("key_id", rotated.key_id.clone()),
        ("from_kek", rotated.from.clone()),
        ("to_kek", rotated.to.clone()),
    ];
    let detail = with_request(request.as_ref(), detail);
    let receipt = record(context, (caller, ROTATED), &vdc.name, detail).await?;
    Ok(RotateVdcKeyResponse {
        key_id: rotated.key_id,
        from_kek: rotated.from,
        to_kek: rotated.to,
        receipt: Some(receipt),
    })
}

pub(super) async fn erase(
    api: &VdcApi,
    request: Request<EraseVdcRequest>,
) -> Result<Response<EraseVdcResponse>, Status> {
    let message = request.into_inner();
    let id = request_of!("EraseVdc", &message)?;
    let name = field("name", resource::parse_vdc(&message.name))?;
    let uid: Uuid = field("uid", message.uid.parse())?;
    let (context, caller, request) = (api.0.clone(), auth::current(), id.as_ref().map(|id| id.id));
    // A caller that goes away leaves the key whole or destroyed, and the log says which.
    let work = async move { erase_once(&context, &caller, (name, uid), id).await };
    Ok(Response::new(api.0.audited(message.name, request, work).await?))
}

async fn erase_once(
    context: &Context,
    caller: &Caller,
    (name, uid): (Name, Uuid),
    request: Option<command::Request>,
) -> Result<EraseVdcResponse, Error> {
    if let Some((receipt, entry)) = written_before(context, request.as_ref(), ERASED).await? {
        let vdc = one(context.query(Query::Vdcs(Some(name))).await?)?.into_inner();
        return Ok(EraseVdcResponse {
            vdc: Some(vdc),
            key_id: value(&entry, "key_id"),
            destroyed_blake3: value(&entry, "destroyed_blake3"),
            receipt: Some(receipt),
        });
    }
    // From here on nothing of the vdc starts; after a crash the next start destroys the key.
    let vdc = one(context.apply(Mutation::EraseVdc { name, uid }, None).await?)?.into_inner();
    let destroyed = context.keys.destroy(uid).await.map_err(|e| Error::from_keys(&vdc.name, &e))?;
    let Some(destroyed) = destroyed else {
        return Err(Error::precondition(vdc.name, "was erased before: the audit log has the receipt"));
    };
    let detail = vec![
        ("uid", vdc.uid.clone()),
        ("key_id", destroyed.key_id.clone()),
        ("destroyed_blake3", destroyed.blake3.clone()),
    ];
    let detail = with_request(request.as_ref(), detail);
    let receipt = record(context, (caller, ERASED), &vdc.name, detail).await?;
    Ok(EraseVdcResponse {
        vdc: Some(vdc),
        key_id: destroyed.key_id,
        destroyed_blake3: destroyed.blake3,
        receipt: Some(receipt),
    })
}
