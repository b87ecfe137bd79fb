//! `audit`: who asked for which change; and whether the log is as it was written, by the node or offline.

use std::time::{SystemTime, UNIX_EPOCH};

use pbjson_types::Timestamp;
use serio_api::v1::{
    AuditEntry, VerifyAuditRequest, VerifyAuditResponse, WatchAuditRequest,
    node_service_client::NodeServiceClient,
};

use crate::{
    args::{AuditArgs, AuditVerb, VerifyArgs},
    client::Client,
    error::Failure,
    names, output,
    output::Output,
};

pub(super) async fn run(client: &Client, args: AuditArgs, output: Output) -> Result<(), Failure> {
    if let Some(AuditVerb::Verify(_)) = args.verb {
        let seen = client
            .call("verify the audit log", VerifyAuditRequest {}, |channel, request| async move {
                NodeServiceClient::new(channel).verify_audit(request).await
            })
            .await?;
        return told(&seen, output);
    }
    let doing = "read the audit log";
    let since = args.last.map(|last| SystemTime::now().checked_sub(last.0).unwrap_or(UNIX_EPOCH));
    let request = WatchAuditRequest {
        from: args.from,
        follow: args.follow,
        who: args.who.unwrap_or_default(),
        what: args.what.unwrap_or_default(),
        resource_prefix: args.on.unwrap_or_default(),
        since: since.map(timestamp),
        until: None,
        failed_only: args.failed,
    };
    let answer = NodeServiceClient::new(client.channel()).watch_audit(request).await;
    let mut stream = answer.map_err(|status| client.failure(doing, status))?.into_inner();
    let mut kept = Vec::new();
    while let Some(entry) = stream.message().await.map_err(|status| client.failure(doing, status))? {
        if args.follow {
            output.item(&entry, || line(&entry))?;
        } else {
            kept.push(entry);
        }
    }
    if args.follow {
        return Ok(());
    }
    output.list(&kept, &["NUMBER", "TIME", "WHO", "CALL", "ON", "RESULT"], row)
}

fn timestamp(time: SystemTime) -> Timestamp {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
    Timestamp { seconds, nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0) }
}

/// A row whose columns are as wide as most lines want: what comes later is not known.
fn line(entry: &AuditEntry) -> String {
    let [number, time, who, what, on, result] = row(entry).try_into().unwrap_or_default();
    output::clean(&format!("{number:<6}  {time}  {who:<8}  {what:<18}  {on:<24}  {result}"))
}

fn row(entry: &AuditEntry) -> Vec<String> {
    let result = match entry.of {
        0 => "asked".to_owned(),
        of => format!("{} ({of})", entry.result),
    };
    vec![
        entry.number.to_string(),
        output::time(entry.time.as_ref()),
        entry.who.clone(),
        entry.what.clone(),
        names::with_noun(&entry.resource),
        result,
    ]
}

fn told(seen: &VerifyAuditResponse, output: Output) -> Result<(), Failure> {
    let sentence = if seen.broken.is_empty() {
        let begin = match seen.first {
            0 | 1 => String::new(),
            first => format!(" (from {first} on: older ones are not kept any more)"),
        };
        format!(
            "{} lines are as they were written{begin}\nreceipt: {}:{}",
            seen.lines, seen.last, seen.last_hash
        )
    } else {
        format!("the audit log is NOT as it was written: {}", seen.broken)
    };
    output.done(seen, &sentence)?;
    if seen.broken.is_empty() { Ok(()) } else { Err(Failure::Silent(1)) }
}

/// Checks files without a node.
pub(super) fn verify_files(args: &VerifyArgs, output: Output) -> Result<(), Failure> {
    let unreadable = |error: serio_audit::AuditError| Failure::local("cannot verify the audit log", error);
    let mut files = Vec::new();
    for path in &args.paths {
        files.extend(serio_audit::files_of(path).map_err(unreadable)?);
    }
    let mut wanted = Vec::new();
    for receipt in &args.receipt {
        let parsed =
            receipt.split_once(':').and_then(|(number, hash)| Some((number.parse::<u64>().ok()?, hash)));
        let parsed = parsed.ok_or_else(|| Failure::Usage(format!("`{receipt}` is not NUMBER:HASH")))?;
        wanted.push((parsed.0, parsed.1.to_owned(), false));
    }
    let seen = serio_audit::verify(&files, |entry, hash| {
        for (number, wanted, found) in &mut wanted {
            *found |= *number == entry.n && wanted.as_str() == hash;
        }
    });
    let mut shown = match seen {
        Ok(seen) => VerifyAuditResponse {
            lines: seen.lines,
            first: seen.first,
            last: seen.last,
            last_hash: seen.hash,
            broken: String::new(),
        },
        Err(error @ serio_audit::AuditError::Broken { .. }) => {
            VerifyAuditResponse { broken: error.to_string(), ..VerifyAuditResponse::default() }
        }
        Err(error) => return Err(unreadable(error)),
    };
    if shown.broken.is_empty()
        && let Some((number, ..)) = wanted.iter().find(|(_, _, found)| !found)
    {
        shown.broken = format!("line {number} is not there with the hash of its receipt");
    }
    told(&shown, output)
}
