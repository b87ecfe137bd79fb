//! VdcService's methods about keys: rotate, erase. Each is in the audit log before it is answered.

use std::time::{SystemTime, UNIX_EPOCH};

use serio_api::v1::{
    EraseVdcRequest, EraseVdcResponse, Receipt, RotateVdcKeyRequest, RotateVdcKeyResponse, Vdc,
};
use serio_types::resource;
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::{
    auth,
    convert::field,
    vdc::{VdcApi, one},
};
use crate::{
    audit::{Action, AuditLog},
    error::{Error, chain},
    state::command::{Mutation, Query},
};

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// Writes a line; who asked is not answered without it.
fn record(
    audit: &AuditLog,
    who: &str,
    what: &str,
    on: &str,
    detail: &[(&str, &str)],
) -> Result<Receipt, Error> {
    let time_ms = now_ms();
    let receipt = audit
        .append(&Action { time_ms, who, what, on, detail })
        .map_err(|e| Error::Failed { doing: "writing the audit log", why: chain(&e) })?;
    let seconds = i64::try_from(time_ms / 1000).unwrap_or(0);
    let nanos = i32::try_from(time_ms % 1000).unwrap_or(0) * 1_000_000;
    Ok(Receipt {
        number: receipt.number,
        time: Some(pbjson_types::Timestamp { seconds, nanos }),
        who: who.to_owned(),
        hash: receipt.hash,
    })
}

pub(super) fn uid_of(vdc: &Vdc) -> Result<Uuid, Error> {
    let uid = vdc.uid.parse();
    uid.map_err(|_| Error::Failed { doing: "reading the vdc's uid", why: vdc.uid.clone() })
}

pub(super) async fn rotate(
    api: &VdcApi,
    request: Request<RotateVdcKeyRequest>,
) -> Result<Response<RotateVdcKeyResponse>, Status> {
    let who = auth::who(request.extensions());
    let name = field("name", resource::parse_vdc(&request.get_ref().name))?;
    let vdc = one(api.0.query(Query::Vdcs(Some(name))).await?)?.into_inner();
    let rotated = api.0.keys.rotate(uid_of(&vdc)?).await.map_err(|e| Error::from_keys(&vdc.name, &e))?;
    let detail = [("key_id", &*rotated.key_id), ("from_kek", &*rotated.from), ("to_kek", &*rotated.to)];
    let receipt = record(&api.0.audit, &who, "RotateVdcKey", &vdc.name, &detail)?;
    Ok(Response::new(RotateVdcKeyResponse {
        key_id: rotated.key_id,
        from_kek: rotated.from,
        to_kek: rotated.to,
        receipt: Some(receipt),
    }))
}

pub(super) async fn erase(
    api: &VdcApi,
    request: Request<EraseVdcRequest>,
) -> Result<Response<EraseVdcResponse>, Status> {
    let who = auth::who(request.extensions());
    let name = field("name", resource::parse_vdc(&request.get_ref().name))?;
    let uid: Uuid = field("uid", request.get_ref().uid.parse())?;
    // A task: a caller that goes away leaves the key whole or destroyed, and the log says which.
    let context = api.0.clone();
    let erased = tokio::spawn(async move {
        // From here on nothing of the vdc starts; after a crash the next start destroys the key.
        let vdc = one(context.mutate(Mutation::EraseVdc { name, uid }, None).await?)?.into_inner();
        record(&context.audit, &who, "EraseVdc", &vdc.name, &[("uid", &vdc.uid)])?;
        let destroyed = context.keys.destroy(uid).await.map_err(|e| Error::from_keys(&vdc.name, &e))?;
        let Some(destroyed) = destroyed else {
            return Err(Error::precondition(vdc.name, "was erased before: the audit log has the receipt"));
        };
        let detail =
            [("uid", &*vdc.uid), ("key_id", &*destroyed.key_id), ("destroyed_blake3", &*destroyed.blake3)];
        let receipt = record(&context.audit, &who, "VdcErased", &vdc.name, &detail)?;
        Ok(EraseVdcResponse {
            vdc: Some(vdc),
            key_id: destroyed.key_id,
            destroyed_blake3: destroyed.blake3,
            receipt: Some(receipt),
        })
    });
    Ok(Response::new(erased.await.unwrap_or(Err(Error::Ending))?))
}
