//! `volume check`: begins a check, waits for it, and shows what it found.

use serio_api::v1::{
    CheckVolumeRequest, GetVolumeRequest, OperationState, Volume, VolumeCheck,
    volume_service_client::VolumeServiceClient,
};

use super::operation;
use crate::{
    args::{CheckArgs, Format},
    client::Client,
    error::Failure,
    names, output,
    output::Output,
};

/// Problems that are printed.
const SHOWN_MAX: usize = 20;

pub(super) async fn run(client: &Client, args: CheckArgs, output: Output) -> Result<(), Failure> {
    let request = CheckVolumeRequest {
        name: names::volume(&args.name),
        data: args.data,
        bytes_per_second: args.pace.map_or(0, |pace| pace.bytes()),
        ..Default::default()
    };
    let begun = client
        .call(&format!("check volume {}", args.name), request, |channel, request| async move {
            VolumeServiceClient::new(channel).check_volume(request).await
        })
        .await?;
    if args.wait.no_wait {
        return operation::follow(client, begun, true, "", output).await;
    }
    let ended = operation::ended(client, begun).await?;
    if ended.state() != OperationState::Done {
        return operation::told(&ended, "", output);
    }
    let request = GetVolumeRequest { name: names::volume(&args.name) };
    let volume = client
        .call(&format!("show volume {}", args.name), request, |channel, request| async move {
            VolumeServiceClient::new(channel).get_volume(request).await
        })
        .await?;
    let found = if args.data { volume.last_scrub } else { volume.last_check };
    let Some(found) = found else {
        return Err(Failure::plain(format!("volume {} was checked, but what was found is lost", args.name)));
    };
    if output.format() == Format::Table {
        output::text(&text(&args, &found))?;
    } else {
        output.value(&found)?;
    }
    match found.problem_count {
        0 => Ok(()),
        _ => Err(Failure::Silent(1)),
    }
}

fn text(args: &CheckArgs, found: &VolumeCheck) -> String {
    let mut lines: Vec<String> =
        found.problems.iter().take(SHOWN_MAX).map(|p| format!("problem: {}", p.message)).collect();
    let more = found.problem_count.saturating_sub(lines.len() as u64);
    if more > 0 {
        lines.push(format!("problem: and {more} more"));
    }
    lines.extend(found.notes.iter().map(|note| format!("note: {note}")));
    let read = match args.data {
        true => format!(
            ": {} compared with their checksums, {} got theirs",
            output::size(found.compared_bytes),
            output::size(found.added_bytes)
        ),
        false => String::new(),
    };
    lines.push(match found.problem_count {
        0 => format!("volume {} is sound{read}", args.name),
        1 => format!("volume {} has 1 problem{read}", args.name),
        n => format!("volume {} has {n} problems{read}", args.name),
    });
    lines.iter().map(|line| format!("{line}\n")).collect()
}

/// What the last checks of a volume found, in a line each, for `volume show`.
pub(super) fn lines(volume: &Volume) -> [(&'static str, String); 2] {
    let line = |found: &Option<VolumeCheck>| match found {
        None => String::new(),
        Some(found) => {
            let time = output::time(found.time.as_ref());
            match (found.problem_count, found.problems.first()) {
                (0, _) => format!("{time}, sound"),
                (1, Some(only)) => format!("{time}, DAMAGED: {}", only.message),
                (n, Some(first)) => format!("{time}, DAMAGED: {n} problems, the first: {}", first.message),
                (n, None) => format!("{time}, DAMAGED: {n} problems"),
            }
        }
    };
    [("checked", line(&volume.last_check)), ("scrubbed", line(&volume.last_scrub))]
}
