//! Volumes served over NBD: a `serio-volumed` process per export, which survives seriod and is found again.
//!
//! Owns: `RUN/exports/<id>.{sock,ctl,meta,log,user}` and the process. Never: what a client must show (`nbd`).
//!
//! `<id>.user` is the fingerprint of the first certificate that used the export over the network: no other may from then
//! on. It is kept in a file since clients come again after a restart of seriod.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use serio_control::{
    ChannelError,
    message::{Body, Empty, Export},
};

use super::{
    AdoptError, ExportPlan, ExportReport, Inner, JobError, TalkError,
    files::Descriptors,
    jobs::{self, peer},
    launch::living,
    link,
    rundir::{self, Meta},
    spawn::{self, Watched},
    vm,
};

/// For `Export`: it opens the layers and reads their maps.
const EXPORT_WAIT: Duration = Duration::from_secs(30);
/// For `Status`.
const ANSWER_WAIT: Duration = Duration::from_secs(5);
/// How long it may take to end after `Stop`.
const STOP_GRACE: Duration = Duration::from_secs(2);
/// Longest id, so that the socket's path stays within Unix's 107 bytes.
const ID_BYTES_MAX: usize = 40;

/// The files of an export.
#[derive(Debug, Clone)]
pub(super) struct ExportFiles {
    /// NBD.
    sock: PathBuf,
    control: PathBuf,
    meta: PathBuf,
    log: PathBuf,
    user: PathBuf,
}

impl ExportFiles {
    /// `None` when the id would not make a file name.
    pub(super) fn new(inner: &Inner, id: &str) -> Option<Self> {
        let fine = !id.is_empty()
            && id.len() <= ID_BYTES_MAX
            && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        let at = |end: &str| inner.exports_dir().join(format!("{id}.{end}"));
        fine.then(|| Self {
            sock: at("sock"),
            control: at("ctl"),
            meta: at("meta"),
            log: at("log"),
            user: at("user"),
        })
    }

    fn remove(&self) {
        // `meta` last: while it is there the process can be found.
        for path in [&self.sock, &self.control, &self.log, &self.user, &self.meta] {
            rundir::remove_quietly(path);
        }
    }
}

/// A running export. Cheap to clone; dropping it does nothing to the export.
#[derive(Debug, Clone)]
pub struct ExportHandle {
    files: Arc<ExportFiles>,
    watched: Watched,
    user: Arc<Mutex<Option<String>>>,
}

impl ExportHandle {
    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.watched.process().pid()
    }

    /// The NBD socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.files.sock
    }

    /// Whether the holder of the certificate with this fingerprint may use it: the first who asks, for good.
    ///
    /// # Errors
    /// The file that keeps who was first cannot be written: then nobody is.
    pub fn admit(&self, fingerprint: &str) -> io::Result<bool> {
        // It is replaced whole.
        let mut user = self.user.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(user) = &*user {
            return Ok(user == fingerprint);
        }
        let temporary = self.files.user.with_extension("user-new");
        fs::write(&temporary, fingerprint)?;
        fs::rename(&temporary, &self.files.user)?;
        *user = Some(fingerprint.to_owned());
        Ok(true)
    }

    /// Asks it.
    ///
    /// # Errors
    /// [`TalkError`].
    pub async fn report(&self) -> Result<ExportReport, TalkError> {
        match link::ask(&self.files.control, peer(self.pid()), Body::Status(Empty {}), ANSWER_WAIT).await? {
            Body::JobStatus(status) => Ok(ExportReport { clients: status.clients }),
            _ => Err(ChannelError::Unexpected.into()),
        }
    }

    /// Ends it and removes its files; its clients are disconnected.
    pub async fn stop(&self) {
        let asked = link::ask(&self.files.control, peer(self.pid()), Body::Stop(Empty {}), ANSWER_WAIT);
        let ended = tokio::select! {
            _ = self.watched.exit() => true,
            answer = asked => answer.is_ok() && self.watched.exit_within(STOP_GRACE).await.is_some(),
        };
        if !ended {
            self.watched.kill().await;
        }
        self.files.remove();
    }

    /// Resolves when the process is gone; with how.
    pub async fn ended(&self) -> String {
        let exit = self.watched.exit().await;
        vm::with_tail(&format!("serio-volumed {exit}"), &self.files.log)
    }
}

/// Starts an export; nothing of it is left when that fails.
pub(super) async fn start(inner: Arc<Inner>, plan: ExportPlan) -> Result<ExportHandle, JobError> {
    let files = ExportFiles::new(&inner, &plan.id).ok_or_else(|| JobError::ExportId(plan.id.clone()))?;
    let started = try_start(&inner, &plan, &files).await;
    match started {
        Ok(watched) => Ok(ExportHandle { files: Arc::new(files), watched, user: Arc::default() }),
        Err(error) => {
            files.remove();
            Err(error)
        }
    }
}

async fn try_start(inner: &Inner, plan: &ExportPlan, files: &ExportFiles) -> Result<Watched, JobError> {
    let read_only = plan.snapshot.is_some() || !plan.writable;
    let key = inner.key_of(plan.volume).await?;
    let mut descriptors = Descriptors::default();
    descriptors.push(rundir::listen(&files.sock)?);
    let dir = inner.volume_dir(plan.volume);
    match &plan.snapshot {
        Some(point) if plan.release => {
            let info = jobs::inspect(inner, plan.volume).await?;
            let layer = info.snapshots.iter().find(|s| s.name == *point).map(|s| s.layer);
            descriptors.push_for_release(&dir, &info.chain, layer)?;
        }
        _ => drop(descriptors.push_volume(&dir, plan.volume, read_only)?),
    }
    let control = rundir::listen(&files.control)?;
    let watched =
        spawn::spawn(&inner.settings.volumed_path, inner.settings.first_uid, control, &files.log).await?;
    let meta = Meta {
        pid: watched.process().pid(),
        start_ticks: watched.process().start_ticks(),
        boot_id: rundir::boot_id(),
        generation: 0,
        plan: String::new(),
        bridges: Vec::new(),
    };
    let body = Body::Export(Export {
        volume_id: plan.volume.to_string(),
        export_name: plan.export_name.clone(),
        snapshot: plan.snapshot.clone().unwrap_or_default(),
        read_only,
        uid: 0,
        key,
        once: plan.once,
        release: plan.release,
    });
    let served = match rundir::write_meta(&files.meta, &meta) {
        Ok(()) => ask(files, &watched, body, &descriptors).await,
        Err(error) => Err(error.into()),
    };
    match served {
        Ok(()) => Ok(watched),
        Err(error) => {
            watched.kill().await;
            Err(error)
        }
    }
}

async fn ask(
    files: &ExportFiles,
    watched: &Watched,
    body: Body,
    descriptors: &Descriptors,
) -> Result<(), JobError> {
    let peer = peer(watched.process().pid());
    let asked = link::ask_with(&files.control, peer, body, descriptors.as_slice(), EXPORT_WAIT);
    let died =
        |exit: super::process::Exit| JobError::Died { reason: vm::with_tail(&exit.to_string(), &files.log) };
    let answer = tokio::select! {
        biased;
        answer = asked => answer,
        exit = watched.exit() => return Err(died(exit)),
    };
    match answer {
        Ok(Body::Done(_) | Body::JobStatus(_)) => Ok(()),
        Ok(_) => Err(TalkError::from(ChannelError::Unexpected).into()),
        Err(error) if error.refusal().is_none() => match watched.exit_within(Duration::from_secs(1)).await {
            Some(exit) => Err(died(exit)),
            None => Err(error.into()),
        },
        Err(error) => Err(error.into()),
    }
}

/// Finds an export again; what is left of one that is gone is removed.
pub(super) async fn adopt(inner: &Inner, id: &str) -> Result<Option<ExportHandle>, AdoptError> {
    let Some(files) = ExportFiles::new(inner, id) else { return Ok(None) };
    let Some((_, process)) = living(&files.meta, &inner.settings.volumed_path)? else {
        files.remove();
        return Ok(None);
    };
    let user = match fs::read_to_string(&files.user) {
        Ok(fingerprint) => Some(fingerprint),
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        Err(error) => {
            // Somebody was first, and nobody knows who.
            tracing::warn!(id, %error, "whose an export is cannot be read: no client from the network gets it any more");
            Some(String::new())
        }
    };
    let watched = Watched::new(process, files.log.clone());
    Ok(Some(ExportHandle { files: Arc::new(files), watched, user: Arc::new(Mutex::new(user)) }))
}

/// Ends what may run of an export and removes its files.
pub(super) async fn clean(inner: &Inner, id: &str) {
    match adopt(inner, id).await {
        Ok(Some(handle)) => handle.stop().await,
        Ok(None) => {}
        Err(error) => {
            tracing::warn!(id, error = &error as &dyn std::error::Error, "an export cannot be ended")
        }
    }
}
