//! Checks and scrubs of volumes by `serio-volumed`, and what they found last, kept beside the volume's files.
//!
//! Owns: `scrub.json` in a volume's directory: gone with the volume, replaced whole. Never: when a scrub is due.
//!
//! A check that reads data takes hours and so never enters the volume's gate: it looks at sealed layers only, which others
//! may use, merge and share meanwhile. A quick one looks at a stopped volume's head too, and has the volume for itself.

use std::{
    fs, io,
    io::Write,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use serio_control::{
    ChannelError,
    message::{Body, CheckVolume, ScrubPlace, VolumeReport},
};
use tokio::sync::watch;
use uuid::Uuid;

use super::{
    FileError, JobError, Supervisor, TalkError,
    files::Descriptors,
    jobs::{self, Job},
    rundir,
};

/// Between two looks at a check's progress.
const LOOK: Duration = Duration::from_millis(500);
/// Problems that are kept; all are counted.
const PROBLEMS_MAX: usize = 100;
/// What a page of a layer's map is about, bytes of the volume.
const PAGE_BYTES: u64 = 64 << 20;
/// An older scrub that was interrupted is begun anew.
const RESUME_MAX_MS: i64 = 14 * 24 * 3600 * 1000;
/// A larger file is not ours.
const RECORD_BYTES_MAX: u64 = 1 << 20;

/// What to check.
#[derive(Debug, Clone, Copy)]
pub struct CheckAsk {
    /// The volume.
    pub volume: Uuid,
    /// Read sealed data and compare.
    pub data: bool,
    /// Compute the checksums that are missing.
    pub add_sums: bool,
    /// Bytes read a second; 0: as fast as it goes.
    pub bytes_per_s: u64,
    /// Go on where the last one with this was interrupted, and note how far this one is.
    pub resume: bool,
}

/// How far a scrub is that has not ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct UnderWay {
    /// When it began, milliseconds since 1970.
    pub began_ms: i64,
    /// All below this layer is right,
    pub layer: u64,
    /// and of this layer all before this page of its map.
    pub page: u64,
}

/// What is known of a volume's soundness.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ScrubRecord {
    /// The last check without data.
    pub check: Option<CheckRecord>,
    /// The last one that compared all sealed data.
    pub scrub: Option<CheckRecord>,
    /// When all sealed layers had their checksums, milliseconds since 1970.
    pub summed_ms: i64,
    /// One that is not at its end, or was interrupted.
    pub under_way: Option<UnderWay>,
}

/// What one check found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CheckRecord {
    /// When it ended, milliseconds since 1970.
    pub time_ms: i64,
    /// The first problems.
    pub problems: Vec<ProblemRecord>,
    /// How many in all.
    pub problem_count: u64,
    /// Space that nothing names.
    pub leaked_bytes: u64,
    /// Bytes compared with their checksum.
    pub compared_bytes: u64,
    /// Bytes that got one.
    pub added_bytes: u64,
    /// Remarks.
    pub notes: Vec<String>,
}

/// A problem.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProblemRecord {
    /// What, where, what to do.
    pub message: String,
    /// First byte, when bytes are affected.
    pub offset: Option<u64>,
    /// How many.
    pub len: u64,
    /// The points that read them; the head is empty.
    pub points: Vec<String>,
}

impl CheckRecord {
    /// Of a report, as of now.
    #[must_use]
    pub fn new(time_ms: i64, report: VolumeReport) -> Self {
        let problems = report.problems.into_iter().take(PROBLEMS_MAX).map(|p| ProblemRecord {
            message: p.message,
            offset: p.offset,
            len: p.len,
            points: p.points,
        });
        Self {
            time_ms,
            problems: problems.collect(),
            problem_count: report.problem_count,
            leaked_bytes: report.leaked_bytes,
            compared_bytes: report.compared_bytes,
            added_bytes: report.added_bytes,
            notes: report.notes,
        }
    }

    /// In one sentence; None when all is well.
    #[must_use]
    pub fn complaint(&self) -> Option<String> {
        let first = self.problems.first().map(|p| p.message.as_str()).unwrap_or_default();
        match self.problem_count {
            0 => None,
            1 => Some(first.to_owned()),
            n => Some(format!("{n} problems, the first: {first}")),
        }
    }
}

impl Supervisor {
    /// Checks a volume; also while it is in use. `None`: it was cancelled. `progress` hears bytes done and in all.
    ///
    /// # Errors
    /// [`JobError`].
    pub async fn check_volume(
        &self,
        ask: CheckAsk,
        mut cancelled: watch::Receiver<bool>,
        progress: impl Fn(u64, u64),
    ) -> Result<Option<VolumeReport>, JobError> {
        let inner = &self.inner;
        let long = ask.data || ask.add_sums;
        let _entered = if long { None } else { Some(inner.enter_sure(ask.volume).await?) };
        let info = jobs::inspect(inner, ask.volume).await?;
        let mut descriptors = Descriptors::default();
        descriptors.push_for_check(&inner.volume_dir(ask.volume), &info.chain)?;
        let mut under_way = self.under_way(ask);
        let from = under_way.filter(|at| at.layer > 0 || at.page > 0);
        let body = Body::CheckVolume(CheckVolume {
            volume_id: ask.volume.to_string(),
            data: ask.data,
            add_sums: ask.add_sums,
            bytes_per_s: ask.bytes_per_s,
            from: from.map(|at| ScrubPlace { layer: at.layer, page: at.page }),
        });
        let job = Job::start(inner).await?;
        let stop = async move {
            // Nobody can cancel it any more: then it runs to its end.
            if cancelled.wait_for(|cancelled| *cancelled).await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        tokio::pin!(stop);
        let answer = {
            let asked = job.ask(body, descriptors);
            tokio::pin!(asked);
            loop {
                tokio::select! {
                    answer = &mut asked => break Some(answer),
                    () = &mut stop => break None,
                    () = tokio::time::sleep(LOOK) => {
                        if let Some(status) = job.status().await {
                            progress(status.done_bytes, status.total_bytes);
                            if let (Some(at), Some(place)) = (&mut under_way, status.scrubbed) {
                                self.note(ask.volume, at, place);
                            }
                        }
                    }
                }
            }
        };
        match answer {
            None => {
                // What it has added by now stays.
                job.kill().await;
                Ok(None)
            }
            Some(Ok(Body::VolumeReport(mut report))) => {
                job.finish().await;
                if let Some(at) = from {
                    let place = at.page.saturating_mul(PAGE_BYTES);
                    report.notes.push(format!(
                        "it went on at byte {place} of layer {}: what lies before was compared by an earlier one, which was interrupted",
                        at.layer
                    ));
                }
                Ok(Some(report))
            }
            Some(Ok(_)) => Err(TalkError::from(ChannelError::Unexpected).into()),
            Some(Err(error)) => Err(error),
        }
    }

    /// Where to begin, if that is to be noted at all.
    fn under_way(&self, ask: CheckAsk) -> Option<UnderWay> {
        if !(ask.resume && ask.data) {
            return None;
        }
        let now = crate::clock::wall().0;
        let kept = self.scrub_record(ask.volume).under_way;
        // What was right long ago may have rotted since, and a clock may have been set back.
        let recent = kept.filter(|at| (0..RESUME_MAX_MS).contains(&now.saturating_sub(at.began_ms)));
        Some(recent.unwrap_or(UnderWay { began_ms: now, ..UnderWay::default() }))
    }

    /// Notes how far a scrub is, when it has come to another page.
    fn note(&self, volume: Uuid, at: &mut UnderWay, place: ScrubPlace) {
        if (at.layer, at.page) == (place.layer, place.page) {
            return;
        }
        (at.layer, at.page) = (place.layer, place.page);
        let record = ScrubRecord { under_way: Some(*at), ..self.scrub_record(volume) };
        // It is only about work that would be done twice.
        if let Err(error) = self.keep_scrub_record(volume, &record) {
            tracing::debug!(%volume, error = &error as &dyn std::error::Error, "how far a scrub is cannot be kept");
        }
    }

    fn scrub_path(&self, volume: Uuid) -> PathBuf {
        self.inner.volume_dir(volume).join("scrub.json")
    }

    /// What is known of a volume's soundness; nothing when the file is missing or damaged.
    #[must_use]
    pub fn scrub_record(&self, volume: Uuid) -> ScrubRecord {
        read(&self.scrub_path(volume)).unwrap_or_default()
    }

    /// Keeps what is known, unless the volume is gone.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn keep_scrub_record(&self, volume: Uuid, record: &ScrubRecord) -> Result<(), FileError> {
        let path = self.scrub_path(volume);
        write(&path, record).map_err(FileError::at("write", &path))
    }
}

fn read(path: &Path) -> Option<ScrubRecord> {
    let short = fs::metadata(path).is_ok_and(|meta| meta.len() <= RECORD_BYTES_MAX);
    short.then(|| serde_json::from_slice(&fs::read(path).ok()?).ok())?
}

fn write(path: &Path, record: &ScrubRecord) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = fs::File::create(&new)?;
    file.write_all(&serde_json::to_vec(record)?)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    rundir::sync_parent(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_kept_and_a_damaged_one_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("scrub.json");
        assert_eq!(read(&path), None);
        let report = VolumeReport { problem_count: 2, ..VolumeReport::default() };
        let record = ScrubRecord { scrub: Some(CheckRecord::new(7, report)), ..ScrubRecord::default() };
        write(&path, &record).unwrap();
        assert_eq!(read(&path), Some(record));
        fs::write(&path, b"{\"scrub\": 3}").unwrap();
        assert_eq!(read(&path), None);
        fs::write(&path, b"{\"more\": 3}").unwrap();
        assert_eq!(read(&path), Some(ScrubRecord::default()), "a newer seriod's words are left out");
    }
}
