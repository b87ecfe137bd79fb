//! Checking and scrubbing a volume, for both ways to ask: the job of `seriod` and `serio-volumed check`. Turns what
//! `serio_volume` finds into the words and numbers of [`VolumeReport`].

use std::sync::{
    PoisonError,
    atomic::{AtomicBool, Ordering},
};

use serio_control::message::{Body, CheckVolume, VolumeProblem, VolumeReport};
use serio_volume::{
    CheckReport, OpenError, Problem, Rot, RotKind, ScrubOptions, ScrubPlace, ScrubReport, VolumeFiles,
};

use crate::{copy::Progress, jobs};

/// Problems that are listed; all are counted.
const PROBLEMS_MAX: usize = 1000;

/// What to do beyond headers, maps and sizes.
#[derive(Debug, Clone, Copy, Default)]
pub struct Depth {
    /// Read all sealed data and compare.
    pub data: bool,
    /// Compute the checksums that are missing.
    pub add_sums: bool,
    /// Compare from here on.
    pub from: Option<ScrubPlace>,
    /// Bytes read a second; 0: as fast as it goes.
    pub bytes_per_s: u64,
    /// Lock and compare the head too, if nobody writes it: who wants to open it has to wait then.
    pub head: bool,
}

/// Checks, and scrubs if asked. A volume whose chain cannot be followed is not scrubbed: the check says why.
pub fn examine(
    files: &VolumeFiles,
    depth: Depth,
    cancel: &AtomicBool,
    progress: &Progress,
) -> Result<(CheckReport, Option<ScrubReport>), OpenError> {
    let look = || if depth.head { files.check() } else { files.check_sealed() };
    let check = || look().map_err(|source| OpenError::Io { what: "duplicate a descriptor", source });
    if !depth.data && !depth.add_sums {
        return Ok((check()?, None));
    }
    let options = ScrubOptions {
        compare: depth.data,
        add_sums: depth.add_sums,
        from: depth.from,
        bytes_per_s: depth.bytes_per_s,
        cancel,
    };
    let scrubbed = files.scrub(&options, |now| {
        progress.total.store(now.total, Ordering::Relaxed);
        progress.done.store(now.done, Ordering::Relaxed);
        *progress.scrubbed.lock().unwrap_or_else(PoisonError::into_inner) = Some(now.sound);
    });
    // After it, so that the report knows of the checksums that were added.
    let checked = check()?;
    match scrubbed {
        Ok(scrubbed) => Ok((checked, Some(scrubbed))),
        Err(_) if !checked.is_clean() => Ok((checked, None)),
        Err(error) => Err(error),
    }
}

/// Both findings as one report.
pub fn report(checked: &CheckReport, scrubbed: Option<&ScrubReport>) -> VolumeReport {
    let rot = scrubbed.map(|s| s.rot.as_slice()).unwrap_or_default();
    // The scrub tells the same more exactly.
    let is_told = |problem: &Problem| match problem {
        Problem::MapRot { layer, offset, len } => rot.iter().any(|rot| {
            (rot.layer, rot.kind) == (*layer, RotKind::Map) && (*offset..offset + len).contains(&rot.offset)
        }),
        _ => false,
    };
    let mut problems: Vec<VolumeProblem> =
        checked.problems.iter().filter(|problem| !is_told(problem)).map(problem_of).collect();
    let rot_count = scrubbed.map_or(0, |s| s.rot_count);
    let problem_count = problems.len() as u64 + rot_count;
    problems.extend(rot.iter().map(rot_of));
    problems.truncate(PROBLEMS_MAX);
    VolumeReport {
        problems,
        problem_count,
        leaked_bytes: checked.leaked_bytes(),
        compared_bytes: scrubbed.map_or(0, |s| s.compared_bytes),
        added_bytes: scrubbed.map_or(0, |s| s.added_bytes),
        notes: notes(checked, scrubbed),
    }
}

fn problem_of(problem: &Problem) -> VolumeProblem {
    let layer = match problem {
        Problem::Successor { layer, .. }
        | Problem::Cut { layer, .. }
        | Problem::MissingData { layer, .. }
        | Problem::Map { layer, .. }
        | Problem::MapBeyond { layer, .. }
        | Problem::MapRot { layer, .. }
        | Problem::Shared { layer, .. }
        | Problem::Read { layer, .. } => Some(*layer),
        _ => None,
    };
    let (offset, len) = match problem {
        Problem::MapRot { offset, len, .. } => (Some(*offset), *len),
        _ => (None, 0),
    };
    VolumeProblem { message: problem.to_string(), layer, offset, len, points: Vec::new() }
}

fn rot_of(rot: &Rot) -> VolumeProblem {
    VolumeProblem {
        message: rot_words(rot),
        layer: Some(rot.layer),
        offset: Some(rot.offset),
        len: rot.len,
        points: rot.points.clone(),
    }
}

/// What is wrong with a range, and who reads it.
pub fn rot_words(rot: &Rot) -> String {
    let Rot { layer, offset, len, kind, points } = rot;
    let what = match kind {
        RotKind::Data => "are not what was sealed: their checksum is wrong".to_owned(),
        RotKind::Map => "cannot be trusted: the layer's map there is not what was sealed".to_owned(),
        RotKind::Unreadable(errno) => format!("cannot be read: the disk answers errno {errno}"),
    };
    let readers = match points.is_empty() {
        true => "no point reads them".to_owned(),
        false => format!("read by {}; restore them from a backup", point_names(points)),
    };
    format!("bytes {offset}+{len} of layer {layer} {what}; {readers}")
}

/// The names of points for people; the head has none.
pub fn point_names(points: &[String]) -> String {
    let name = |point: &String| match point.as_str() {
        "" => "the volume as it is now".to_owned(),
        // A name may hold anything; a terminal must not obey it.
        name => format!("snapshot {}", name.escape_debug()),
    };
    points.iter().map(name).collect::<Vec<_>>().join(", ")
}

fn notes(checked: &CheckReport, scrubbed: Option<&ScrubReport>) -> Vec<String> {
    let mut notes = Vec::new();
    let mut note = |count: u64, text: String| {
        if count > 0 {
            notes.push(text);
        }
    };
    let leaked = checked.leaked_bytes();
    note(
        leaked,
        format!("{leaked} bytes are allocated that nothing reads; a crash leaves such, no data are lost"),
    );
    let (files, bytes) = (checked.leftovers.len() as u64, checked.leftover_bytes);
    note(
        files,
        format!(
            "{files} layers ({bytes} bytes) are not part of the chain: an unfinished or a deleted snapshot"
        ),
    );
    for layer in checked.layers.iter().filter(|layer| layer.torn_header) {
        note(
            1,
            format!("one of the two headers of layer {} is damaged; a crash leaves such", layer.header.layer),
        );
    }
    if let Some(scrubbed) = scrubbed {
        let missing = scrubbed.missing_bytes;
        note(missing, format!("{missing} bytes of sealed data have no checksum yet and were not compared"));
        let damaged = scrubbed.damaged_sums;
        note(damaged, format!("{damaged} pages of checksums are damaged: those data could not be compared"));
        note(u64::from(scrubbed.cancelled), "it was ended early: not everything was compared".to_owned());
    }
    notes
}

/// The job of `seriod`.
pub fn check_volume(ask: &CheckVolume, files: &VolumeFiles, progress: &Progress) -> jobs::JobResult {
    // A scrub may come at any time, and no VM's start shall fail for it.
    let head = !ask.data && !ask.add_sums;
    let from = ask.from.map(|place| ScrubPlace { layer: place.layer, page: place.page });
    let depth = Depth { data: ask.data, add_sums: ask.add_sums, from, bytes_per_s: ask.bytes_per_s, head };
    // A job that is not wanted any more is killed: what it has added by then stays.
    let never = AtomicBool::new(false);
    let (checked, scrubbed) = examine(files, depth, &never, progress).map_err(jobs::open_failed)?;
    Ok(Body::VolumeReport(report(&checked, scrubbed.as_ref())))
}
