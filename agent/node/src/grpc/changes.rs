//! What has changed between two points of a volume, page by page. Read from the headers and maps by a process that has
//! no part in the state: nothing is changed, and sealed layers are never written behind its back in a way that matters.

use serio_api::v1::{ChangedRange, ListChangedRangesRequest, ListChangedRangesResponse};
use serio_types::{Name, resource};

use super::{
    Context,
    convert::{Fields, field},
    unexpected,
};
use crate::{
    error::Error,
    state::command::{Answer, Query, VolumeView},
    supervise::ChangesAsk,
};

/// Ranges of a page, unless said, and at most.
const PAGE: u32 = 1000;
const PAGE_MAX: u32 = 4096;

/// One page.
pub(super) async fn page(
    context: &Context,
    message: ListChangedRangesRequest,
) -> Result<ListChangedRangesResponse, Error> {
    let mut fields = Fields::default();
    let volume = fields.take("volume", resource::parse_volume(&message.volume));
    let from = fields.take("from_snapshot", message.from_snapshot.parse::<Name>());
    let to = match message.to_snapshot.as_str() {
        "" => None,
        name => fields.take("to_snapshot", name.parse::<Name>()),
    };
    let offset = match message.page_token.as_str() {
        "" => 0,
        token => token.parse::<u64>().unwrap_or_else(|_| {
            fields.wrong("page_token", "is not one that this call gave");
            0
        }),
    };
    let (volume, from) = fields.done(volume.zip(from))?;
    let view = match context.query(Query::Volume(volume)).await? {
        Answer::Volumes(mut views) if views.len() == 1 => views.pop().ok_or(Error::Ending)?,
        other => return Err(unexpected(&other)),
    };
    check_order(&view, &from, to.as_ref())?;
    let ranges_max = match message.page_size {
        0 => PAGE,
        asked => asked.min(PAGE_MAX),
    };
    let ask = ChangesAsk {
        volume: view.record.uid,
        from: from.into(),
        to: to.map(String::from).unwrap_or_default(),
        offset,
        ranges_max,
    };
    let page = context.supervisor.list_changes(ask).await;
    let page = page.map_err(|e| Error::from_job("listing what has changed", &e))?;
    let range = |r: serio_control::message::ChangedRange| ChangedRange {
        offset_bytes: r.offset,
        length_bytes: r.len,
        zero: r.zero,
    };
    Ok(ListChangedRangesResponse {
        ranges: page.ranges.into_iter().map(range).collect(),
        next_page_token: page.next_offset.map(|offset| offset.to_string()).unwrap_or_default(),
    })
}

/// Both points are there, the earlier one first.
fn check_order(view: &VolumeView, from: &Name, to: Option<&Name>) -> Result<(), Error> {
    let at = |name: &Name| {
        let found = view.snapshots.iter().position(|s| s == name);
        found.ok_or_else(|| Error::not_found(resource::snapshot(&view.name, name)))
    };
    let first = at(from)?;
    if let Some(to) = to
        && at(to)? <= first
    {
        return field("to_snapshot", Err(NotLater { from: from.clone(), to: to.clone() }));
    }
    Ok(())
}

/// Why two snapshots are not a span.
#[derive(Debug, thiserror::Error)]
#[error("{to} is not later than {from}: name the earlier one as from_snapshot")]
struct NotLater {
    from: Name,
    to: Name,
}
