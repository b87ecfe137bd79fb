//! The scrubber: walks over the volumes, one at a time, when they are due.

use std::{
    collections::HashMap,
    str::FromStr,
    time::{Duration, Instant},
};

use serde::{Deserialize, Deserializer};
use uuid::Uuid;

use super::Checks;
use crate::{
    clock::wall,
    state::command::{Answer, Command, Query, SnapshotView, VolumeView},
    supervise::{CheckAsk, ScrubRecord},
};

/// Between two looks at what is due.
const TICK: Duration = Duration::from_secs(60);
/// A volume whose check failed (its files are being moved, the disk is full) is let alone for so long.
const AGAIN: Duration = Duration::from_secs(3600);

/// A span of time as an operator writes it: `30d`, `12h`, `10m`, `45s`; `0` is never.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Every(pub Duration);

/// Why text is no span of time.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is not a span of time: write a number with d, h, m or s, such as 30d, or 0 for never")]
pub struct EveryError(String);

impl FromStr for Every {
    type Err = EveryError;

    fn from_str(text: &str) -> Result<Self, EveryError> {
        let wrong = || EveryError(text.to_owned());
        if text == "0" {
            return Ok(Self(Duration::ZERO));
        }
        let unit = text.chars().last().ok_or_else(wrong)?;
        let seconds: u64 = match unit {
            'd' => 24 * 60 * 60,
            'h' => 60 * 60,
            'm' => 60,
            's' => 1,
            _ => return Err(wrong()),
        };
        let number = text.strip_suffix(unit).and_then(|n| n.parse::<u64>().ok()).ok_or_else(wrong)?;
        // Beyond a century of them nobody means it, and sums of times could overflow.
        let span =
            number.checked_mul(seconds).filter(|s| *s <= 100 * 366 * 24 * 60 * 60).ok_or_else(wrong)?;
        Ok(Self(Duration::from_secs(span)))
    }
}

impl<'de> Deserialize<'de> for Every {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// What the operator set.
#[derive(Debug, Clone, Copy)]
pub struct ScrubSettings {
    /// A volume is scrubbed so long after its last scrub; zero: never.
    pub every: Duration,
    /// Bytes read a second; 0: as fast as it goes.
    pub bytes_per_s: u64,
}

/// What a volume is due for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Due {
    /// All sealed data are compared.
    Scrub,
    /// A snapshot has no checksums yet.
    Sums,
}

/// Whether a volume is due. Pure. Times are milliseconds since 1970.
fn due(
    record: &ScrubRecord,
    created: i64,
    newest_snapshot: Option<i64>,
    now: i64,
    every: Duration,
) -> Option<Due> {
    let every_ms = i64::try_from(every.as_millis()).unwrap_or(i64::MAX);
    let last = record.scrub.as_ref().map_or(created, |scrub| scrub.time_ms);
    // What was done in the future was done by a clock that was wrong: nobody knows when, and nobody waits until then.
    let of_the_future = |time: i64| time > now;
    if every_ms > 0 && (of_the_future(last) || now.saturating_sub(last) >= every_ms) {
        return Some(Due::Scrub);
    }
    let added_to = |time: i64| time > record.summed_ms || of_the_future(record.summed_ms);
    newest_snapshot.is_some_and(added_to).then_some(Due::Sums)
}

impl Checks {
    /// Scrubs for ever.
    pub async fn scrub_now_and_then(self, settings: ScrubSettings) {
        let mut failed: HashMap<Uuid, Instant> = HashMap::new();
        // Who asks for scrubs that often waits no longer than that for them.
        let wait = if settings.every.is_zero() { TICK } else { TICK.min(settings.every) };
        let mut tick = tokio::time::interval(wait);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            let Ok(Answer::Volumes(views)) = self.state.ask(Command::Query(Query::Volumes(None))).await
            else {
                continue;
            };
            failed.retain(|uid, since| {
                since.elapsed() < AGAIN && views.iter().any(|view| view.record.uid == *uid)
            });
            for view in views.iter().filter(|view| !failed.contains_key(&view.record.uid)).collect::<Vec<_>>()
            {
                let Some(due) = self.due(view, settings).await else { continue };
                if !Box::pin(self.scrub_one(view, due, settings)).await {
                    failed.insert(view.record.uid, Instant::now());
                }
            }
        }
    }

    async fn due(&self, view: &VolumeView, settings: ScrubSettings) -> Option<Due> {
        let snapshots = Command::Query(Query::Snapshots(view.name.clone()));
        let newest = match self.state.ask(snapshots).await {
            Ok(Answer::Snapshots(views)) => {
                views.iter().map(|SnapshotView { record, .. }| record.create_time.0).max()
            }
            // It is being made or deleted.
            _ => return None,
        };
        let (supervisor, uid) = (self.supervisor.clone(), view.record.uid);
        let record = tokio::task::spawn_blocking(move || supervisor.scrub_record(uid)).await.ok()?;
        due(&record, view.record.create_time.0, newest, wall().0, settings.every)
    }

    /// Whether it could be done.
    async fn scrub_one(&self, view: &VolumeView, due: Due, settings: ScrubSettings) -> bool {
        let bytes_per_s = settings.bytes_per_s;
        if due == Due::Sums {
            let added = self.add_sums(view, bytes_per_s).await;
            if let Err(error) = &added {
                tracing::warn!(volume = %view.name, error = error as &dyn std::error::Error, "no checksums were added");
            }
            return added.is_ok();
        }
        let ask = CheckAsk { volume: view.record.uid, data: true, add_sums: true, bytes_per_s, resume: true };
        let before = wall().0;
        match self.prepare(view, ask, None).await {
            Ok((_, Some(work))) => work.await,
            Ok((_, None)) | Err(_) => return false,
        }
        // The operation has told why, if it has not been done.
        self.supervisor.scrub_record(view.record.uid).scrub.is_some_and(|scrub| scrub.time_ms >= before)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::supervise::CheckRecord;

    #[test]
    fn spans_of_time() {
        let seconds = |text: &str| text.parse::<Every>().map(|every| every.0.as_secs()).ok();
        assert_eq!(
            [seconds("30d"), seconds("12h"), seconds("10m"), seconds("45s"), seconds("0")],
            [Some(2_592_000), Some(43_200), Some(600), Some(45), Some(0)]
        );
        for wrong in ["", "d", "1", "-1d", "1.5h", "1w", "99999999999999d", "é"] {
            assert_eq!(seconds(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn what_is_due() {
        let day = Duration::from_secs(86_400);
        let ms = 86_400_000;
        let none = ScrubRecord::default();
        assert_eq!(due(&none, 0, None, ms - 1, day), None);
        assert_eq!(due(&none, 0, None, ms, day), Some(Due::Scrub));
        assert_eq!(due(&none, 0, None, 1000 * ms, Duration::ZERO), None, "never");
        assert_eq!(due(&none, 0, Some(5), ms - 1, day), Some(Due::Sums));
        let scrubbed = ScrubRecord {
            scrub: Some(CheckRecord { time_ms: 10 * ms, ..CheckRecord::default() }),
            summed_ms: 10 * ms,
            ..none
        };
        assert_eq!(due(&scrubbed, 0, Some(5), 11 * ms - 1, day), None);
        assert_eq!(due(&scrubbed, 0, Some(10 * ms + 1), 11 * ms - 1, day), Some(Due::Sums));
        assert_eq!(due(&scrubbed, 0, Some(5), 11 * ms, day), Some(Due::Scrub));
        assert_eq!(due(&scrubbed, 0, Some(5), 0, day), Some(Due::Scrub), "the clock was set back");
        assert_eq!(due(&scrubbed, 0, Some(5), 0, Duration::ZERO), Some(Due::Sums), "the clock was set back");
        assert_eq!(due(&scrubbed, 0, None, 0, Duration::ZERO), None, "there is nothing to be summed up");
    }
}
