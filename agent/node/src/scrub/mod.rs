//! Checks of volumes as operations, and the scrubber, which checks each volume now and then by itself.
//!
//! ```text
//! CheckVolume ──begin──▶ operation "check-volume" ─▶ serio-volumed ─▶ report ─▶ scrub.json, event "damaged"
//! scrubber, each minute: a volume's last scrub is older than scrub_interval: as above, one at a time
//!                        a snapshot is newer than the last checksums: these are added, without an operation
//! ```
//!
//! Owns: when a volume is scrubbed, what is told of it. Never: bytes of volumes, the state of anything else.

mod scrubber;

use serio_control::message::VolumeReport;
use serio_store::record::{OperationKind, OperationRecord};
use serio_types::resource;
use tokio::sync::watch;
use uuid::Uuid;

pub use scrubber::{Every, ScrubSettings};

use crate::{
    clock::wall,
    error::Error,
    state::{
        Handles,
        command::{Answer, Command, Request, VolumeView},
        owner::Client,
    },
    supervise::{CheckAsk, CheckRecord, JobError, Supervisor},
};

/// Checks volumes. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Checks {
    /// Asks the state.
    pub state: Client,
    /// Whether an operation shall end.
    pub handles: Handles,
    /// Starts the jobs.
    pub supervisor: Supervisor,
}

impl Checks {
    /// Begins to check a volume; goes on when the caller goes away.
    ///
    /// # Errors
    /// The operation cannot be recorded.
    pub async fn begin(
        &self,
        view: &VolumeView,
        ask: CheckAsk,
        request: Option<Request>,
    ) -> Result<OperationRecord, Error> {
        let (begun, work) = self.prepare(view, ask, request).await?;
        if let Some(work) = work {
            tokio::spawn(work);
        }
        Ok(begun)
    }

    /// Records the operation; the future does it. None: it was begun before, by the same request.
    async fn prepare(
        &self,
        view: &VolumeView,
        ask: CheckAsk,
        request: Option<Request>,
    ) -> Result<(OperationRecord, Option<impl Future<Output = ()> + Send + 'static>), Error> {
        let target = resource::volume(&view.name);
        let begin = Command::BeginOperation {
            kind: OperationKind::CheckVolume,
            target: target.clone(),
            subject: Some(ask.volume),
            request,
        };
        let record = match self.state.ask(begin).await? {
            Answer::Operation(record) => record,
            Answer::BegunBefore(record) => return Ok((record, None)),
            _ => return Err(Error::Ending),
        };
        let (checks, uid) = (self.clone(), record.uid);
        let work = async move {
            let end = checks.check(uid, &target, ask).await;
            checks.handles.forget_operation(uid);
            // The state is ending: the operation is found unended by the next seriod.
            let _ = checks.state.ask(Command::EndOperation(uid, end)).await;
        };
        Ok((record, Some(work)))
    }

    async fn check(&self, operation: Uuid, target: &str, ask: CheckAsk) -> Result<(), Error> {
        let cancelled = self.handles.cancelled(operation);
        let progress = |done, total| self.state.progress(operation, done, total);
        match self.supervisor.check_volume(ask, cancelled, progress).await {
            Ok(Some(report)) => {
                self.keep(target, ask, report).await;
                Ok(())
            }
            Ok(None) => Err(Error::Failed { doing: "checking", why: "it was cancelled".to_owned() }),
            Err(error) => Err(Error::from_job("checking the volume", &error)),
        }
    }

    /// Adds the checksums that are missing, without an operation.
    async fn add_sums(&self, view: &VolumeView, bytes_per_s: u64) -> Result<(), JobError> {
        let ask =
            CheckAsk { volume: view.record.uid, data: false, add_sums: true, bytes_per_s, resume: false };
        let (_never, never) = watch::channel(false);
        if let Some(report) = self.supervisor.check_volume(ask, never, |_, _| {}).await? {
            self.keep(&resource::volume(&view.name), ask, report).await;
        }
        Ok(())
    }

    /// Keeps what was found, and raises an event when that is news.
    async fn keep(&self, target: &str, ask: CheckAsk, report: VolumeReport) {
        let time = wall().0;
        let mut record = self.supervisor.scrub_record(ask.volume);
        let before = record.scrub.as_ref().or(record.check.as_ref()).and_then(CheckRecord::complaint);
        if ask.add_sums {
            record.summed_ms = time;
        }
        let found = CheckRecord::new(time, report);
        let complaint = found.complaint();
        if ask.resume {
            record.under_way = None;
        }
        let place = if ask.data { &mut record.scrub } else { &mut record.check };
        *place = Some(found);
        if let Err(error) = self.supervisor.keep_scrub_record(ask.volume, &record) {
            tracing::warn!(volume = %ask.volume, error = &error as &dyn std::error::Error, "what a check found is not kept");
        }
        let Some(complaint) = complaint else { return };
        tracing::error!(volume = target, "the volume is damaged: {complaint}");
        if before.as_ref() != Some(&complaint) {
            let note = Command::Note { resource: target.to_owned(), kind: "damaged", message: complaint };
            let _ = self.state.ask(note).await;
        }
    }
}
