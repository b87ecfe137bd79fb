//! Showing the audit log: lines that fit a filter, as a stream, and whether the chain is whole.

use pbjson_types::Timestamp;
use serio_api::v1::{AuditEntry, VerifyAuditResponse, WatchAuditRequest};
use serio_audit::{AuditError, Entry, Reader};
use tokio::task::spawn_blocking;

use super::follow::Follower;
use crate::{
    audit::Trail,
    error::{Error, chain},
};

/// Lines that are looked at between two moments in which others get a turn.
const BATCH: usize = 512;
/// Lines of these that are kept for a client: few, for many may watch.
const FOUND_MAX: usize = 16;

/// The time of a line.
pub(super) fn timestamp(text: &str) -> Option<Timestamp> {
    serde_json::from_value(serde_json::Value::String(text.to_owned())).ok()
}

fn nanos(time: &Timestamp) -> i128 {
    i128::from(time.seconds) * 1_000_000_000 + i128::from(time.nanos)
}

fn shown(entry: Entry, hash: String) -> AuditEntry {
    AuditEntry {
        number: entry.n,
        time: timestamp(&entry.time),
        who: entry.who,
        role: entry.role,
        what: entry.what,
        resource: entry.on,
        of: entry.of.unwrap_or_default(),
        result: entry.result.unwrap_or_default(),
        detail: entry.detail.into_iter().collect(),
        hash,
        previous_hash: entry.prev,
    }
}

fn fits(wanted: &WatchAuditRequest, entry: &AuditEntry) -> bool {
    let at = entry.time.as_ref().map(nanos);
    entry.who.contains(&wanted.who)
        && (wanted.what.is_empty() || entry.what == wanted.what)
        && entry.resource.starts_with(&wanted.resource_prefix)
        && wanted.since.as_ref().is_none_or(|since| at >= Some(nanos(since)))
        && wanted.until.as_ref().is_none_or(|until| at <= Some(nanos(until)))
        && (!wanted.failed_only || !matches!(entry.result.as_str(), "" | "OK"))
}

/// Some lines; `true`: there may be more now.
fn some(reader: &mut Reader, wanted: &WatchAuditRequest) -> Result<(Vec<AuditEntry>, bool), AuditError> {
    let mut found = Vec::new();
    for _ in 0..BATCH {
        let Some((entry, hash)) = reader.next_entry()? else { return Ok((found, false)) };
        let entry = shown(entry, hash);
        if fits(wanted, &entry) {
            found.push(entry);
        }
        if found.len() == FOUND_MAX {
            break;
        }
    }
    Ok((found, true))
}

/// Sends the lines that are wanted; with `follow` until the client goes.
pub(super) async fn send(trail: Trail, wanted: WatchAuditRequest, client: Follower<AuditEntry>) {
    let mut newest = trail.newest();
    let mut reader = trail.reader(wanted.from);
    loop {
        newest.mark_unchanged();
        let filter = wanted.clone();
        let batch = spawn_blocking(move || {
            let batch = some(&mut reader, &filter);
            (reader, batch)
        });
        let Ok((back, batch)) = batch.await else { return };
        reader = back;
        let (entries, more) = match batch {
            Ok(batch) => batch,
            Err(error) => {
                let error = Error::Failed { doing: "reading the audit log", why: chain(&error) };
                return client.end(error);
            }
        };
        for entry in entries {
            let next = entry.number;
            if client.send(entry, || Error::behind(next)).await.is_err() {
                return;
            }
        }
        if more {
            continue;
        }
        if !wanted.follow {
            return;
        }
        tokio::select! {
            changed = newest.changed() => if changed.is_err() { return },
            () = client.closed() => return,
        }
    }
}

/// Whether the lines follow each other.
pub(super) async fn verify(trail: &Trail) -> Result<VerifyAuditResponse, Error> {
    Ok(match trail.verify().await? {
        Ok(seen) => VerifyAuditResponse {
            lines: seen.lines,
            first: seen.first,
            last: seen.last,
            last_hash: seen.hash,
            broken: String::new(),
        },
        Err(error @ AuditError::Broken { .. }) => {
            VerifyAuditResponse { broken: chain(&error), ..VerifyAuditResponse::default() }
        }
        Err(error) => return Err(Error::Failed { doing: "reading the audit log", why: chain(&error) }),
    })
}
