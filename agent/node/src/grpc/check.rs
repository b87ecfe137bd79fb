//! Checks of volumes: begun here, shown with the volume.

use serio_api::v1::{CheckVolumeRequest, Operation, Volume, VolumeCheck, VolumeProblem};
use serio_store::record::Millis;
use serio_types::resource;

use super::{
    Context,
    convert::{self, field},
    unexpected,
};
use crate::{
    error::Error,
    scrub::Checks,
    state::command::{Answer, Query, Request},
    supervise::{CheckAsk, CheckRecord, ScrubRecord},
};

/// Begins a check.
pub(super) async fn begin(
    context: &Context,
    message: &CheckVolumeRequest,
    request: Option<Request>,
) -> Result<Operation, Error> {
    let name = field("name", resource::parse_volume(&message.name))?;
    let view = match context.query(Query::Volume(name)).await? {
        Answer::Volumes(mut views) if views.len() == 1 => views.pop().ok_or(Error::Ending)?,
        other => return Err(unexpected(&other)),
    };
    let checks = Checks {
        state: context.state.clone(),
        handles: context.handles.clone(),
        supervisor: context.supervisor.clone(),
    };
    let ask = CheckAsk {
        volume: view.record.uid,
        data: message.data,
        add_sums: message.data,
        bytes_per_s: message.bytes_per_second,
        // Who asks wants all of it to be looked at now.
        resume: false,
    };
    Ok(convert::operation(&checks.begin(&view, ask, request).await?))
}

/// A volume with what its last checks found.
pub(super) fn shown(volume: Volume, found: ScrubRecord) -> Volume {
    Volume { last_check: found.check.map(check), last_scrub: found.scrub.map(check), ..volume }
}

fn check(found: CheckRecord) -> VolumeCheck {
    let problem = |p: crate::supervise::ProblemRecord| VolumeProblem {
        message: p.message,
        offset_bytes: p.offset.unwrap_or_default(),
        length_bytes: p.len,
        points: p.points,
    };
    VolumeCheck {
        time: Some(convert::timestamp(Millis(found.time_ms))),
        problems: found.problems.into_iter().map(problem).collect(),
        problem_count: found.problem_count,
        leaked_bytes: found.leaked_bytes,
        compared_bytes: found.compared_bytes,
        added_bytes: found.added_bytes,
        notes: found.notes,
    }
}
