//! Merging layers away, in a VMM or in a job, with progress, giving way to whoever wants the volume.
//!
//! Owns: which layer is next, the asking, and the removal of files that the chain has no more. Never: how it is done
//! safely (the engine does), or when (the state says).
//!
//! ```text
//!   headers ──▶ a layer to go? ──no──▶ files that the chain has not are removed ──▶ Done
//!      ▲            │ yes
//!      └── merged ──┤
//!                   └── somebody enters, or it is cancelled ──▶ Interrupted
//! ```

use std::{path::Path, time::Duration};

use serio_control::{
    ChannelError,
    message::{Body, Code, Empty, FinishSnapshot, JobStatus, MergeLayer, MergeQuery, MergeState},
};
use tokio::sync::watch;
use uuid::Uuid;

use super::{
    Inner, JobError, Supervisor, TalkError, VmHandle, VolumeInfo,
    files::{self, Descriptors},
    gate,
    jobs::{self, Job},
    link, rundir,
};

/// Between two looks at a merge's progress.
const LOOK: Duration = Duration::from_millis(300);
/// For a question to a VMM about its merge.
const ANSWER_WAIT: Duration = Duration::from_secs(10);
/// How long a VMM may take to stop a merge: one window is written and synced.
const STOP_WAIT: Duration = Duration::from_secs(60);

/// What shall go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MergeGoal {
    /// The layer of that snapshot.
    Snapshot(String),
    /// All layers that were inherited from another volume or an image.
    Inherited,
}

/// How it ended.
#[derive(Debug)]
pub enum MergeEnd {
    /// What should go is gone, and its files too.
    Done,
    /// It gave way or was cancelled; asked again, it goes on.
    Interrupted,
    /// Whoever has the volume cannot be asked now.
    Busy(String),
    /// It cannot be done.
    Failed(JobError),
}

/// A merge to be done.
#[derive(Debug)]
pub struct MergePlan {
    /// The volume.
    pub volume: Uuid,
    /// What shall go.
    pub goal: MergeGoal,
    /// Who has the head; a job if nobody.
    pub vm: Option<VmHandle>,
    /// Turns true when it shall end.
    pub cancelled: watch::Receiver<bool>,
}

/// How one layer's merge ended.
enum Step {
    /// It is out of the chain.
    Merged,
    /// It is the bottom of an encrypted volume: nothing of its data is read any more, but it stays in the chain.
    Emptied,
    /// Half-way.
    Stopped,
}

impl Supervisor {
    /// Merges layers away. `progress` hears bytes done and in all, a few times a second.
    pub async fn merge(&self, plan: MergePlan, progress: impl Fn(u64, u64) + Sync) -> MergeEnd {
        let inner = &self.inner;
        let gate = inner.volume_gate(plan.volume);
        let (mut entered, mut wanted) = gate.enter_humbly().await;
        if let Err(doubt) = gate::settle_doubt(&mut entered, plan.volume) {
            return MergeEnd::Busy(doubt.to_string());
        }
        let mut cancelled = plan.cancelled.clone();
        let stop = async {
            tokio::select! {
                _ = wanted.wait_for(|count| *count > 0) => {}
                Ok(_) = cancelled.wait_for(|cancelled| *cancelled) => {}
            }
        };
        tokio::pin!(stop);
        match merge_all(inner, &plan, &progress, stop).await {
            Ok(Step::Merged | Step::Emptied) => MergeEnd::Done,
            Ok(Step::Stopped) => MergeEnd::Interrupted,
            Err(error) => end_of(&plan, error).await,
        }
    }
}

/// What an error means for the whole.
async fn end_of(plan: &MergePlan, error: JobError) -> MergeEnd {
    match error.refusal().map(serio_control::message::Failed::code) {
        Some(Code::InUse) => MergeEnd::Busy(crate::error::chain(&error)),
        Some(_) => MergeEnd::Failed(error),
        None => match (&plan.vm, &error) {
            // It hung up: the VM ends, or it hangs.
            (Some(vm), JobError::Talk(_)) => match vm.exit_within(Duration::from_secs(1)).await {
                true => MergeEnd::Interrupted,
                false => MergeEnd::Busy(crate::error::chain(&error)),
            },
            _ => MergeEnd::Failed(error),
        },
    }
}

async fn merge_all(
    inner: &Inner,
    plan: &MergePlan,
    progress: &(impl Fn(u64, u64) + Sync),
    mut stop: impl Future<Output = ()> + Unpin,
) -> Result<Step, JobError> {
    if let (Some(vm), MergeGoal::Snapshot(name)) = (&plan.vm, &plan.goal) {
        // A seal that an earlier seriod began may be on its way: after this it has happened, or never will.
        let release = FinishSnapshot { snapshot_id: name.clone(), commit: false };
        let _ = vm.ask(Body::FinishSnapshot(release), &[], ANSWER_WAIT).await;
    }
    let dir = inner.volume_dir(plan.volume);
    // A VMM has the key already.
    let key = if plan.vm.is_some() { None } else { inner.key_of(plan.volume).await? };
    let mut before = None;
    loop {
        let info = jobs::inspect(inner, plan.volume).await?;
        let Some(layer) = next_layer(&dir, &plan.goal, &info)? else {
            remove_leftovers(&dir, &info)?;
            return Ok(Step::Merged);
        };
        if before.replace(layer) == Some(layer) {
            let reason = format!("layer {layer} is still in the chain after it was merged");
            return Err(JobError::Died { reason });
        }
        let body = MergeLayer {
            volume_id: plan.volume.to_string(),
            layer,
            bytes_per_s: inner.settings.merge_bytes_per_s,
            key: key.clone(),
        };
        let step = match &plan.vm {
            Some(vm) => in_vmm(vm, body, progress, &mut stop).await?,
            None => in_job(inner, &dir, &info, body, progress, &mut stop).await?,
        };
        match step {
            Step::Stopped => return Ok(Step::Stopped),
            Step::Merged => {}
            Step::Emptied => {
                files::empty_data(&dir, layer)?;
                if matches!(plan.goal, MergeGoal::Snapshot(_)) {
                    remove_leftovers(&dir, &jobs::inspect(inner, plan.volume).await?)?;
                    return Ok(Step::Emptied);
                }
            }
        }
    }
}

/// The number of the layer that goes next; none when all that should go is gone.
fn next_layer(dir: &Path, goal: &MergeGoal, info: &VolumeInfo) -> Result<Option<u64>, JobError> {
    match goal {
        MergeGoal::Snapshot(name) => Ok(info.snapshots.iter().find(|s| s.name == *name).map(|s| s.layer)),
        MergeGoal::Inherited => {
            // Inherited layers have no names here; one with a name was lent by this volume to others. From the top
            // down, so that each is merged into a file of the volume's own.
            let sealed = info.chain.iter().rev().skip(1);
            for layer in sealed.filter(|layer| info.snapshots.iter().all(|s| s.layer != **layer)) {
                if files::is_shared(dir, *layer)? {
                    return Ok(Some(*layer));
                }
            }
            Ok(None)
        }
    }
}

/// Removes the files of layers that the chain has not. Only for who is inside the gate.
pub(super) fn remove_leftovers(dir: &Path, info: &VolumeInfo) -> Result<(), JobError> {
    for number in files::all_numbers(dir)? {
        if !info.chain.contains(&number) {
            let (data, map) = files::layer_paths(dir, number);
            // The map first: a lone data file is known to be a leftover.
            rundir::remove(&map)?;
            rundir::remove(&data)?;
        }
    }
    Ok(())
}

/// Asks a job of its own.
async fn in_job(
    inner: &Inner,
    dir: &Path,
    info: &VolumeInfo,
    body: MergeLayer,
    progress: &(impl Fn(u64, u64) + Sync),
    stop: &mut (impl Future<Output = ()> + Unpin),
) -> Result<Step, JobError> {
    let mut descriptors = Descriptors::default();
    descriptors.push_chain(dir, &info.chain, false)?;
    let job = Job::start(inner).await?;
    let ended = {
        let asked = job.ask(Body::MergeLayer(body), descriptors);
        tokio::pin!(asked);
        loop {
            tokio::select! {
                answer = &mut asked => break Some(answer),
                () = &mut *stop => break None,
                () = tokio::time::sleep(LOOK) => {
                    if let Some((done, total)) = job.progress().await {
                        progress(done, total);
                    }
                }
            }
        }
    };
    match ended {
        None => {
            // Its lock goes with it; what it has synced stays.
            job.kill().await;
            Ok(Step::Stopped)
        }
        Some(answer) => {
            let answer = answer?;
            job.finish().await;
            match answer {
                Body::MergeState(state) if state.stays => Ok(Step::Emptied),
                Body::MergeState(_) => Ok(Step::Merged),
                other => jobs::done(&other).map(|()| Step::Merged),
            }
        }
    }
}

/// Asks the VMM, and looks how far it is.
async fn in_vmm(
    vm: &VmHandle,
    body: MergeLayer,
    progress: &(impl Fn(u64, u64) + Sync),
    stop: &mut (impl Future<Output = ()> + Unpin),
) -> Result<Step, JobError> {
    let (volume_id, layer) = (body.volume_id.clone(), body.layer);
    let mut state = merge_state(vm.ask(Body::MergeLayer(body), &[], ANSWER_WAIT).await?)?;
    let mut stopping: Option<tokio::time::Instant> = None;
    loop {
        if state.layer == layer && state.done {
            return Ok(if state.stays { Step::Emptied } else { Step::Merged });
        }
        if !state.running {
            return match state.error.as_str() {
                _ if stopping.is_some() => Ok(Step::Stopped),
                // It forgot: begun again by whoever asks next.
                "" => Ok(Step::Stopped),
                why => {
                    Err(JobError::Died { reason: format!("the VMM could not merge layer {layer}: {why}") })
                }
            };
        }
        progress(state.done_bytes, state.total_bytes);
        if stopping.is_some_and(|since| since.elapsed() > STOP_WAIT) {
            return Err(TalkError::Silent { process: vm.peer(), waited: STOP_WAIT }.into());
        }
        tokio::select! {
            () = &mut *stop, if stopping.is_none() => stopping = Some(tokio::time::Instant::now()),
            () = tokio::time::sleep(if stopping.is_some() { LOOK / 10 } else { LOOK }) => {}
        }
        let query = MergeQuery { volume_id: volume_id.clone(), cancel: stopping.is_some() };
        state = merge_state(vm.ask(Body::MergeQuery(query), &[], ANSWER_WAIT).await?)?;
    }
}

fn merge_state(answer: Body) -> Result<MergeState, JobError> {
    match answer {
        Body::MergeState(state) => Ok(state),
        _ => Err(TalkError::from(ChannelError::Unexpected).into()),
    }
}

impl Job {
    /// How far it is, if it says.
    pub(super) async fn progress(&self) -> Option<(u64, u64)> {
        self.status().await.map(|status| (status.done_bytes, status.total_bytes))
    }

    /// What it says of itself.
    pub(super) async fn status(&self) -> Option<JobStatus> {
        let asked = link::ask(self.socket(), self.peer(), Body::Status(Empty {}), Duration::from_secs(1));
        match asked.await {
            Ok(Body::JobStatus(status)) => Some(status),
            _ => None,
        }
    }
}
