//! Sealing the volumes of many processes at one instant.
//!
//! ```text
//!   enter all gates, read headers, make the new layers' files         nothing is held yet
//!   PrepareSnapshot to each VMM, at once: freeze        each within FREEZE_MAX; only if that is asked
//!   HoldSnapshot to each VMM, at once         ── held ──┐             from the first answer on
//!   stopped volumes are sealed by jobs                  │ HOLD_MAX
//!   FinishSnapshot{commit} to each VMM        ── let go ┘
//! ```
//! Past [`HOLD_MAX`] everybody is let go and the whole has failed; a VMM lets go by itself too, should we die. What was
//! sealed of a whole that failed is the state's business: it has it merged away.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use serio_control::{
    ChannelError,
    message::{
        Body, FinishSnapshot, HoldSnapshot, NewHead, PointClass, PrepareSnapshot, Prepared, PreparedVolume,
        SnapshotStopped, VdcKey,
    },
};
use tokio::{
    task::JoinSet,
    time::{Instant, timeout_at},
};
use uuid::Uuid;

use super::{
    Inner, JobError, Supervisor, TalkError, VmHandle,
    files::{self, Descriptors},
    gate::{self, Entered},
    jobs,
};

/// How long writes may be held.
const HOLD_MAX: Duration = Duration::from_secs(3);
/// How long a guest's agent may take to freeze. The other guests, frozen too, wait for it, but are not held.
const FREEZE_MAX: Duration = Duration::from_secs(2);
/// How long the end of a VM is waited for that does not answer any more.
const END_WAIT: Duration = Duration::from_millis(500);
/// How long a VMM may take to seal or let go once it was told.
const FINISH_WAIT: Duration = Duration::from_secs(60);

/// A volume to be sealed.
#[derive(Debug, Clone)]
pub struct VdcPart {
    /// The volume.
    pub volume: Uuid,
    /// For messages: `ardesio/web-root`.
    pub label: String,
    /// The VM that has it open.
    pub vm: Option<VmHandle>,
}

/// Volumes to be sealed at one instant.
#[derive(Debug, Clone)]
pub struct VdcSnapshotPlan {
    /// The snapshot's name in each volume.
    pub name: String,
    /// Ask the guests' agents to freeze.
    pub app: bool,
    /// Rather fail than take one that did not freeze.
    pub app_required: bool,
    /// The volumes.
    pub parts: Vec<VdcPart>,
}

/// A volume that was sealed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SealedVolume {
    /// The volume.
    pub volume: Uuid,
    /// It is application-consistent.
    pub app: bool,
    /// Why not, although that was asked; or empty.
    pub reason: String,
}

/// A volume with the files of its new head.
pub(super) struct Ready {
    pub(super) part: VdcPart,
    chain: Vec<u64>,
    pub(super) number: u64,
}

/// A VM with its volumes.
struct Host {
    vm: VmHandle,
    volumes: Vec<Uuid>,
    labels: String,
    body: PrepareSnapshot,
    descriptors: Descriptors,
}

impl Supervisor {
    /// Seals volumes at one instant. On an error some may be sealed nevertheless.
    ///
    /// # Errors
    /// [`JobError`].
    pub async fn snapshot_vdc(&self, plan: VdcSnapshotPlan) -> Result<Vec<SealedVolume>, JobError> {
        let job = snapshot(Arc::clone(&self.inner), plan);
        tokio::spawn(job).await.unwrap_or(Err(JobError::Ending))
    }
}

async fn snapshot(inner: Arc<Inner>, plan: VdcSnapshotPlan) -> Result<Vec<SealedVolume>, JobError> {
    let mut entered = inner.enter_all(plan.parts.iter().map(|p| p.volume)).await;
    for (volume, gate) in &mut entered {
        gate::settle_doubt(gate, *volume)?;
    }
    let mut ready = Vec::new();
    for part in plan.parts.clone() {
        match make_ready(&inner, part).await {
            Ok(one) => ready.push(one),
            Err(error) => {
                drop_unused(&inner, &ready, &entered).await;
                return Err(error);
            }
        }
    }
    let sealed = seal_all(&inner, &plan, &ready, &mut entered).await;
    if sealed.is_err() {
        drop_unused(&inner, &ready, &entered).await;
    }
    sealed
}

pub(super) async fn make_ready(inner: &Inner, part: VdcPart) -> Result<Ready, JobError> {
    let info = jobs::inspect(inner, part.volume).await?;
    let number = info.next_number();
    // Made now, opened when needed: nothing slow stands between hold and release.
    files::new_layer(&inner.volume_dir(part.volume), number)?;
    Ok(Ready { part, chain: info.chain, number })
}

/// Takes away the new layers that no chain has; not those that a VMM may still be at.
pub(super) async fn drop_unused(inner: &Inner, ready: &[Ready], entered: &[(Uuid, Entered)]) {
    for one in ready {
        let doubt =
            entered.iter().any(|(volume, gate)| *volume == one.part.volume && gate.in_doubt.is_some());
        if !doubt {
            jobs::drop_unused_layer(inner, one.part.volume, one.number).await;
        }
    }
}

fn hosts(inner: &Inner, plan: &VdcSnapshotPlan, ready: &[Ready]) -> Result<Vec<Host>, JobError> {
    let mut hosts: BTreeMap<u32, Host> = BTreeMap::new();
    for one in ready {
        let Some(vm) = &one.part.vm else { continue };
        let host = hosts.entry(vm.pid()).or_insert_with(|| Host {
            vm: vm.clone(),
            volumes: Vec::new(),
            labels: String::new(),
            body: PrepareSnapshot {
                snapshot_id: plan.name.clone(),
                snapshot: plan.name.clone(),
                volumes: Vec::new(),
                freeze: plan.app,
                freeze_timeout_ms: u32::try_from(FREEZE_MAX.as_millis()).unwrap_or(u32::MAX),
                hold_ms: u32::try_from(HOLD_MAX.as_millis()).unwrap_or(u32::MAX),
                freeze_first: plan.app,
            },
            descriptors: Descriptors::default(),
        });
        let (data, map) = files::open_layer(&inner.volume_dir(one.part.volume), one.number)?;
        let head = NewHead { data_fd: host.descriptors.push(data), map_fd: host.descriptors.push(map) };
        host.volumes.push(one.part.volume);
        host.labels = [host.labels.as_str(), one.part.label.as_str()].join(" ").trim().to_owned();
        host.body.volumes.push(PreparedVolume { volume_id: one.part.volume.to_string(), head: Some(head) });
    }
    Ok(hosts.into_values().collect())
}

async fn seal_all(
    inner: &Arc<Inner>,
    plan: &VdcSnapshotPlan,
    ready: &[Ready],
    entered: &mut [(Uuid, Entered)],
) -> Result<Vec<SealedVolume>, JobError> {
    let hosts = hosts(inner, plan, ready)?;
    // Before anybody waits: a key may come from a command.
    let mut keys = BTreeMap::new();
    for one in ready.iter().filter(|one| one.part.vm.is_none()) {
        keys.insert(one.part.volume, inner.key_of(one.part.volume).await?);
    }
    let prepared = prepare_all(plan, &hosts).await;
    let sealed = match &prepared {
        Ok((deadline, _)) => seal_stopped(inner, plan, (ready, keys), *deadline).await,
        Err(_) => Ok(()),
    };
    let commit = prepared.is_ok() && sealed.is_ok();
    let finished = finish_all(plan, &hosts, commit, entered).await;
    let (_, classes) = prepared?;
    sealed?;
    finished?;
    let class_of =
        |volume: Uuid| hosts.iter().position(|h| h.volumes.contains(&volume)).and_then(|at| classes.get(at));
    let sealed = ready.iter().map(|one| {
        let class = class_of(one.part.volume);
        let app = class.is_some_and(|c| c.class() == PointClass::App);
        let reason = match class {
            _ if app || !plan.app => String::new(),
            Some(class) => class.reason.clone(),
            None => "no VM runs that could freeze it".to_owned(),
        };
        SealedVolume { volume: one.part.volume, app, reason }
    });
    Ok(sealed.collect())
}

/// Has every VMM hold its writes, all guests frozen before the first is held. With when they must be let go, and what each said.
async fn prepare_all(plan: &VdcSnapshotPlan, hosts: &[Host]) -> Result<(Instant, Vec<Prepared>), JobError> {
    let mut frozen = Vec::new();
    let mut deadline = None;
    if plan.app {
        let until = Instant::now() + FREEZE_MAX + HOLD_MAX;
        let all: Vec<usize> = (0..hosts.len()).collect();
        let (first, said) = ask_all(plan, hosts, (&all, Step::Prepare), until).await?;
        // One of an earlier version holds already.
        deadline = first.filter(|_| said.iter().any(|(_, said)| !said.waits)).map(|first| first + HOLD_MAX);
        frozen = said;
    }
    let step = if plan.app { Step::Hold } else { Step::Prepare };
    let waiting = frozen.iter().filter(|(_, said)| said.waits).map(|(at, _)| *at);
    let to_hold: Vec<usize> = if plan.app { waiting.collect() } else { (0..hosts.len()).collect() };
    let until = deadline.unwrap_or_else(|| Instant::now() + HOLD_MAX);
    let (first, held) = ask_all(plan, hosts, (&to_hold, step), until).await?;
    let deadline = first.map_or(until, |first| until.min(first + HOLD_MAX));
    let mut said: BTreeMap<usize, Prepared> = frozen.into_iter().collect();
    said.extend(held);
    Ok((deadline, said.into_values().collect()))
}

/// What VMMs are asked.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    Prepare,
    Hold,
}

/// Asks some VMMs at once; when the first answered, and what each said.
async fn ask_all(
    plan: &VdcSnapshotPlan,
    hosts: &[Host],
    (which, step): (&[usize], Step),
    until: Instant,
) -> Result<(Option<Instant>, Vec<(usize, Prepared)>), JobError> {
    let mut asked = JoinSet::new();
    for (at, host) in which.iter().filter_map(|at| Some((*at, hosts.get(*at)?))) {
        let (body, descriptors) = match step {
            Step::Prepare => (Body::PrepareSnapshot(host.body.clone()), host.descriptors.duplicate()?),
            Step::Hold => {
                (Body::HoldSnapshot(HoldSnapshot { snapshot_id: plan.name.clone() }), Descriptors::default())
            }
        };
        let vm = host.vm.clone();
        asked.spawn(async move {
            (at, vm.ask(body, descriptors.as_slice(), FREEZE_MAX + HOLD_MAX + HOLD_MAX).await)
        });
    }
    let mut said: Vec<(usize, Prepared)> = Vec::new();
    let mut first = None;
    while !asked.is_empty() {
        let Ok(next) = timeout_at(until, asked.join_next()).await else {
            let late = which.iter().filter(|at| !said.iter().any(|(other, _)| other == *at));
            let who = late.filter_map(|at| hosts.get(*at)).map(|host| host.labels.as_str());
            return Err(JobError::Late { who: who.collect::<Vec<_>>().join(", "), waited: HOLD_MAX });
        };
        let Some(Ok((at, answer))) = next else { return Err(JobError::Ending) };
        let Some(host) = hosts.get(at) else { continue };
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => return Err(why_not(host, error).await),
        };
        let Body::Prepared(prepared) = answer else {
            return Err(TalkError::from(ChannelError::Unexpected).into());
        };
        first = first.or_else(|| Some(Instant::now()));
        if plan.app_required && prepared.class() != PointClass::App {
            return Err(JobError::NotApp { who: host.labels.clone(), why: prepared.reason });
        }
        said.push((at, prepared));
    }
    Ok((first, said))
}

/// A VMM did not do it: perhaps its VM has just ended, which is nobody's fault.
async fn why_not(host: &Host, error: TalkError) -> JobError {
    if error.refusal().is_none() && host.vm.exit_within(END_WAIT).await {
        return JobError::VmEnded { who: host.labels.clone() };
    }
    error.into()
}

/// Seals the volumes that nobody has open.
async fn seal_stopped(
    inner: &Arc<Inner>,
    plan: &VdcSnapshotPlan,
    (ready, mut keys): (&[Ready], BTreeMap<Uuid, Option<VdcKey>>),
    deadline: Instant,
) -> Result<(), JobError> {
    let mut jobs_under_way = JoinSet::new();
    for one in ready.iter().filter(|one| one.part.vm.is_none()) {
        let dir = inner.volume_dir(one.part.volume);
        let mut descriptors = Descriptors::default();
        descriptors.push_chain(&dir, &one.chain, false)?;
        let (data, map) = files::open_layer(&dir, one.number)?;
        descriptors.push(data);
        descriptors.push(map);
        let body = Body::SnapshotStopped(SnapshotStopped {
            volume_id: one.part.volume.to_string(),
            snapshot: plan.name.clone(),
            key: keys.remove(&one.part.volume).flatten(),
        });
        let (inner, label) = (Arc::clone(inner), one.part.label.clone());
        jobs_under_way.spawn(async move {
            match timeout_at(deadline, jobs::run(&inner, body, descriptors)).await {
                Ok(answer) => jobs::done(&answer?),
                Err(_) => Err(JobError::Late { who: label, waited: HOLD_MAX }),
            }
        });
    }
    // All are waited for: a job that is still at its files must not be overtaken by what follows a failure.
    let mut result = Ok(());
    while let Some(sealed) = jobs_under_way.join_next().await {
        result = result.and(sealed.unwrap_or(Err(JobError::Ending)));
    }
    result
}

/// Tells every VMM to seal, or to let go.
async fn finish_all(
    plan: &VdcSnapshotPlan,
    hosts: &[Host],
    commit: bool,
    entered: &mut [(Uuid, Entered)],
) -> Result<(), JobError> {
    let mut asked = JoinSet::new();
    for (at, host) in hosts.iter().enumerate() {
        let vm = host.vm.clone();
        let body = Body::FinishSnapshot(FinishSnapshot { snapshot_id: plan.name.clone(), commit });
        asked.spawn(async move { (at, vm.ask(body, &[], FINISH_WAIT).await) });
    }
    let mut result = Ok(());
    while let Some(answer) = asked.join_next().await {
        let Ok((at, answer)) = answer else { return Err(JobError::Ending) };
        let refused = answer.as_ref().is_err_and(|e| e.refusal().is_some());
        if !matches!(answer, Ok(Body::Done(_)))
            && !refused
            && let Some(host) = hosts.get(at)
        {
            // Not a word: until it is dead it may be sealing.
            for (_, gate) in entered.iter_mut().filter(|(volume, _)| host.volumes.contains(volume)) {
                gate.in_doubt = Some(host.vm.watched().clone());
            }
        }
        if commit {
            let done = match (answer, hosts.get(at)) {
                (Ok(body), _) => jobs::done(&body),
                (Err(error), Some(host)) => Err(why_not(host, error).await),
                (Err(error), None) => Err(error.into()),
            };
            result = result.and(done);
        }
    }
    result
}
