//! The verbs of `volume` that work on layers: grow, clone, go back, merge, compare.

use serio_api::v1::{
    ChangedRange, CloneVolumeRequest, DeleteSnapshotRequest, FlattenVolumeRequest, ListChangedRangesRequest,
    ResizeVolumeRequest, RollbackVolumeRequest, volume_service_client::VolumeServiceClient,
};

use super::{operation, request_id};
use crate::{
    args::{ChangesArgs, CloneArgs, DeleteSnapshotArgs, FlattenArgs, Format, ResizeArgs, RollbackArgs},
    client::Client,
    error::Failure,
    names, output,
    output::Output,
};

/// Ranges of a page.
const PAGE: u32 = 4096;

pub(super) async fn delete_snapshot(
    client: &Client,
    args: DeleteSnapshotArgs,
    output: Output,
) -> Result<(), Failure> {
    let name = names::snapshot(&args.snapshot.volume, &args.snapshot.snapshot);
    let request = DeleteSnapshotRequest { request_id: request_id(), name };
    let begun = client
        .call(&format!("delete snapshot {}", args.snapshot), request, |channel, request| async move {
            VolumeServiceClient::new(channel).delete_snapshot(request).await
        })
        .await?;
    let sentence = format!("deleted snapshot {}", args.snapshot);
    operation::follow(client, begun, args.wait.no_wait, &sentence, output).await
}

pub(super) async fn resize(client: &Client, args: ResizeArgs, output: Output) -> Result<(), Failure> {
    let request = ResizeVolumeRequest {
        request_id: request_id(),
        name: names::volume(&args.name),
        size_bytes: args.size.bytes(),
        ..Default::default()
    };
    let volume = client
        .call(&format!("resize volume {}", args.name), request, |channel, request| async move {
            VolumeServiceClient::new(channel).resize_volume(request).await
        })
        .await?;
    output.done(&volume, &format!("resized volume {}: {}", args.name, output::size(volume.size_bytes)))
}

pub(super) async fn clone(client: &Client, args: CloneArgs, output: Output) -> Result<(), Failure> {
    if args.name.vdc != args.source.volume.vdc {
        let (of, to) = (&args.source.volume.vdc, &args.name.vdc);
        return Err(Failure::Usage(format!(
            "a clone stays in its vdc: name it {of}/{}, not {to}/{}",
            args.name.name, args.name.name
        )));
    }
    let request = CloneVolumeRequest {
        request_id: request_id(),
        source: names::snapshot(&args.source.volume, &args.source.snapshot),
        volume_id: args.name.name.to_string(),
        size_bytes: args.size.map_or(0, |s| s.bytes()),
    };
    let volume = client
        .call(&format!("clone snapshot {}", args.source), request, |channel, request| async move {
            VolumeServiceClient::new(channel).clone_volume(request).await
        })
        .await?;
    output.done(&volume, &format!("cloned volume {}: {}", args.name, output::size(volume.size_bytes)))
}

pub(super) async fn rollback(client: &Client, args: RollbackArgs, output: Output) -> Result<(), Failure> {
    let request = RollbackVolumeRequest {
        request_id: request_id(),
        snapshot: names::snapshot(&args.snapshot.volume, &args.snapshot.snapshot),
        discard_later: args.discard_later,
        ..Default::default()
    };
    let volume = client
        .call(&format!("go back to snapshot {}", args.snapshot), request, |channel, request| async move {
            VolumeServiceClient::new(channel).rollback_volume(request).await
        })
        .await?;
    let (name, point) = (&args.snapshot.volume, &args.snapshot.snapshot);
    output.done(&volume, &format!("volume {name} is as it was at {point}"))
}

pub(super) async fn flatten(client: &Client, args: FlattenArgs, output: Output) -> Result<(), Failure> {
    let request = FlattenVolumeRequest {
        request_id: request_id(),
        name: names::volume(&args.name),
        ..Default::default()
    };
    let begun = client
        .call(&format!("flatten volume {}", args.name), request, |channel, request| async move {
            VolumeServiceClient::new(channel).flatten_volume(request).await
        })
        .await?;
    let sentence = format!("volume {} shares nothing any more", args.name);
    operation::follow(client, begun, args.wait.no_wait, &sentence, output).await
}

/// All pages, one after the other: a table as they come, or one array.
pub(super) async fn changes(client: &Client, args: ChangesArgs, output: Output) -> Result<(), Failure> {
    let doing = format!("list what has changed in volume {}", args.name);
    let mut request = ListChangedRangesRequest {
        volume: names::volume(&args.name),
        from_snapshot: args.from.to_string(),
        to_snapshot: args.to.as_ref().map(ToString::to_string).unwrap_or_default(),
        page_size: PAGE,
        page_token: String::new(),
    };
    let mut ranges: Vec<ChangedRange> = Vec::new();
    loop {
        let page = client
            .call(&doing, request.clone(), |channel, request| async move {
                VolumeServiceClient::new(channel).list_changed_ranges(request).await
            })
            .await?;
        ranges.extend(page.ranges);
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    output.list(&ranges, &["OFFSET", "LENGTH", "CONTENT"], |range| {
        let content = if range.zero { "zero" } else { "data" };
        vec![range.offset_bytes.to_string(), range.length_bytes.to_string(), content.to_owned()]
    })?;
    if output.format() == Format::Table {
        let bytes = ranges.iter().map(|r| r.length_bytes).fold(0_u64, u64::saturating_add);
        eprintln!("{} ranges, {}", ranges.len(), output::size(bytes));
    }
    Ok(())
}
