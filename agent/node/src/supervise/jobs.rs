//! Work on volumes that no VM has open: one `serio-volumed` process per job, gone when it is done.
//!
//! Owns: the process's life, and the files that it is given. Never: their content.
//!
//! A job that shows no progress for [`STALL_MAX`] is killed, so that a broken disk does not collect processes.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use serio_control::{
    ChannelError,
    message::{Body, Code, CreateVolume, Empty, ImportImage, InspectVolume, JobStatus, SnapshotStopped},
};
use tokio::{io::AsyncWriteExt, net::unix::pipe, sync::mpsc, time::Instant};
use uuid::Uuid;

use super::{
    FileError, ImportedImage, Inner, JobError, PointInfo, TalkError, VolumeInfo,
    files::{self, Descriptors},
    link::{self, Link},
    rundir,
    spawn::{self, Watched},
    vm,
};

/// For connecting, and for `Status`.
const ANSWER_WAIT: Duration = Duration::from_secs(10);
/// The longest job; one that moves on is not broken off before.
const JOB_MAX: Duration = Duration::from_secs(60 * 24 * 3600);
/// Between two looks at a job's progress.
const LOOK: Duration = Duration::from_secs(10);
/// Without progress for so long, a job is killed.
const STALL_MAX: Duration = Duration::from_secs(600);
/// How long the process may take to end after its answer.
const END_GRACE: Duration = Duration::from_secs(5);
/// Largest image, bytes: the largest volume.
const IMAGE_BYTES_MAX: u64 = 1 << 46;
/// A gap is filled by pieces of so many zeros.
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// The process of a job, killed when the job is dropped half-way.
pub(super) struct Job {
    watched: Watched,
    socket: PathBuf,
    log: PathBuf,
}

impl Drop for Job {
    fn drop(&mut self) {
        if self.watched.exit_now().is_none() {
            self.watched.process().kill();
        }
        rundir::remove_quietly(&self.socket);
        rundir::remove_quietly(&self.log);
    }
}

impl Job {
    pub(super) async fn start(inner: &Inner) -> Result<Self, JobError> {
        let id = Uuid::new_v4();
        let socket = inner.jobs_dir().join(format!("{id}.sock"));
        let log = inner.jobs_dir().join(format!("{id}.log"));
        let control = rundir::listen(&socket)?;
        let spawned =
            spawn::spawn(&inner.settings.volumed_path, inner.settings.first_uid, control, &log).await;
        match spawned {
            Ok(watched) => Ok(Self { watched, socket, log }),
            Err(error) => {
                rundir::remove_quietly(&socket);
                rundir::remove_quietly(&log);
                Err(error.into())
            }
        }
    }

    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(super) fn peer(&self) -> String {
        peer(self.watched.process().pid())
    }

    /// Asks for the work and waits for its answer, for the process's death, or for a stall.
    pub(super) async fn ask(&self, body: Body, descriptors: Descriptors) -> Result<Body, JobError> {
        let mut link = Link::connect(&self.socket, self.peer(), ANSWER_WAIT).await?;
        let answer = tokio::select! {
            biased;
            answer = link.call(body, descriptors.as_slice(), JOB_MAX) => answer,
            exit = self.watched.exit() => {
                return Err(JobError::Died { reason: vm::with_tail(&exit.to_string(), &self.log) });
            }
            waited = self.stall() => Err(TalkError::Silent { process: self.peer(), waited }),
        };
        match answer {
            Ok(body) => Ok(body),
            // It hung up: its death says more than the closed socket does.
            Err(error) if error.refusal().is_none() => {
                match self.watched.exit_within(Duration::from_secs(1)).await {
                    Some(exit) => Err(JobError::Died { reason: vm::with_tail(&exit.to_string(), &self.log) }),
                    None => Err(error.into()),
                }
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Resolves when the job has made no progress for too long.
    async fn stall(&self) -> Duration {
        let mut seen = None;
        let mut since = Instant::now();
        while since.elapsed() < STALL_MAX {
            tokio::time::sleep(LOOK).await;
            let asked = link::ask(&self.socket, self.peer(), Body::Status(Empty {}), ANSWER_WAIT).await;
            if let Ok(Body::JobStatus(status)) = asked
                && seen != Some(status.done_bytes)
            {
                seen = Some(status.done_bytes);
                since = Instant::now();
            }
        }
        since.elapsed()
    }

    /// Ends it half-way; returns when it is gone.
    pub(super) async fn kill(&self) {
        self.watched.kill().await;
    }

    /// The work is done: the process ends by itself.
    pub(super) async fn finish(&self) {
        if self.watched.exit_within(END_GRACE).await.is_none() {
            self.watched.kill().await;
        }
    }
}

/// A volume process's name in messages.
pub(super) fn peer(pid: u32) -> String {
    format!("serio-volumed (process {pid})")
}

/// A process for one piece of work, from its start to its end.
pub(super) async fn run(inner: &Inner, body: Body, descriptors: Descriptors) -> Result<Body, JobError> {
    let job = Job::start(inner).await?;
    let answer = job.ask(body, descriptors).await;
    if answer.is_ok() {
        job.finish().await;
    }
    answer
}

/// Whether an answer says that it is done.
pub(super) fn done(answer: &Body) -> Result<(), JobError> {
    match answer {
        Body::Done(_) | Body::JobStatus(_) | Body::VolumeInfo(_) => Ok(()),
        _ => Err(TalkError::from(ChannelError::Unexpected).into()),
    }
}

/// Makes a volume's directory and content; removes it when that fails.
pub(super) async fn create_volume(
    inner: Arc<Inner>,
    uid: Uuid,
    size_bytes: u64,
    from_image: Option<PathBuf>,
) -> Result<(), JobError> {
    let dir = inner.volume_dir(uid);
    files::new_volume_dir(&dir, uid)?;
    let made = fill_volume(&inner, &dir, uid, size_bytes, from_image).await;
    if made.is_err() {
        rundir::remove_quietly(&dir);
    }
    made
}

async fn fill_volume(
    inner: &Inner,
    dir: &Path,
    uid: Uuid,
    size_bytes: u64,
    from_image: Option<PathBuf>,
) -> Result<(), JobError> {
    let key = inner.key_of(uid).await?;
    let mut descriptors = Descriptors::default();
    // Of an encrypted volume the bottom is plain, and stays empty or an image's.
    for layer in 0..=u64::from(key.is_some()) {
        let (data, map) = files::new_layer(dir, layer)?;
        descriptors.push(data);
        descriptors.push(map);
    }
    if let Some(image) = &from_image {
        descriptors.push(files::open(image, true)?);
    }
    let body = Body::CreateVolume(CreateVolume {
        volume_id: uid.to_string(),
        size_bytes,
        from_image: from_image.is_some(),
        key,
    });
    done(&run(inner, body, descriptors).await?)?;
    rundir::sync_parent(dir).map_err(FileError::at("sync", dir))?;
    Ok(())
}

/// Removes a volume: first from its name, so that half of one is never seen.
pub(super) fn delete_volume(inner: &Inner, uid: Uuid) -> Result<(), JobError> {
    let dir = inner.volume_dir(uid);
    let gone = inner.volumes_dir().join(format!(".deleted-{uid}"));
    match fs::rename(&dir, &gone) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        other => {
            other.map_err(FileError::at("remove", &dir))?;
            rundir::sync_parent(&dir).map_err(FileError::at("sync", &dir))?;
        }
    }
    rundir::remove(&gone)?;
    if let Some(keys) = inner.keys.get() {
        keys.unassign(uid);
    }
    inner.forget_volume(uid);
    Ok(())
}

/// Asks what the headers of a volume say.
pub(super) async fn inspect(inner: &Inner, volume: Uuid) -> Result<VolumeInfo, JobError> {
    let mut descriptors = Descriptors::default();
    descriptors.push_volume(&inner.volume_dir(volume), volume, true)?;
    let body = Body::InspectVolume(InspectVolume { volume_id: volume.to_string() });
    let Body::VolumeInfo(info) = run(inner, body, descriptors).await? else {
        return Err(TalkError::from(ChannelError::Unexpected).into());
    };
    let snapshots = info.snapshots.into_iter();
    Ok(VolumeInfo {
        size_bytes: info.size_bytes,
        snapshots: snapshots
            .map(|s| PointInfo { name: s.name, layer: s.layer.into(), create_time: s.create_time })
            .collect(),
        chain: info.chain,
    })
}

/// Seals the head of a stopped volume.
pub(super) async fn snapshot_stopped(inner: Arc<Inner>, volume: Uuid, name: String) -> Result<(), JobError> {
    let _entered = inner.enter_sure(volume).await?;
    let key = inner.key_of(volume).await?;
    let info = inspect(&inner, volume).await?;
    let dir = inner.volume_dir(volume);
    let number = info.next_number();
    let new = files::new_layer(&dir, number)?;
    let mut descriptors = Descriptors::default();
    descriptors.push_chain(&dir, &info.chain, false)?;
    descriptors.push(new.0);
    descriptors.push(new.1);
    let body = Body::SnapshotStopped(SnapshotStopped { volume_id: volume.to_string(), snapshot: name, key });
    let answer = run(&inner, body, descriptors).await;
    if answer.is_err() {
        // The process is gone, whatever it did: the headers say.
        drop_unused_layer(&inner, volume, number).await;
    }
    done(&answer?)
}

/// After a refused snapshot: takes the new layer's files away if the chain does not have them.
pub(super) async fn drop_unused_layer(inner: &Inner, volume: Uuid, number: u64) {
    if !inspect(inner, volume).await.is_ok_and(|info| !info.chain.contains(&number)) {
        return;
    }
    let (data, map) = files::layer_paths(&inner.volume_dir(volume), number);
    rundir::remove_quietly(&map);
    rundir::remove_quietly(&data);
}

/// Reads an image in through a pipe.
pub(super) async fn import_image(
    inner: Arc<Inner>,
    dest: PathBuf,
    format: String,
    expected_bytes: u64,
    data: mpsc::Receiver<(u64, Bytes)>,
) -> Result<ImportedImage, JobError> {
    let file = rundir::create_new(&dest)?;
    keep_image(&dest, feed_image(&inner, file, format, expected_bytes, data).await)
}

/// Reads an image file of any format in.
pub(super) async fn convert_image(
    inner: Arc<Inner>,
    dest: PathBuf,
    format: String,
    from: PathBuf,
) -> Result<ImportedImage, JobError> {
    let source = files::open(&from, true)?;
    let expected_bytes = source.metadata().map_err(FileError::at("look at", &from))?.len();
    let mut descriptors = Descriptors::default();
    descriptors.push(source);
    descriptors.push(rundir::create_new(&dest)?);
    let body = Body::ImportImage(ImportImage { format, expected_bytes, size_bytes_max: IMAGE_BYTES_MAX });
    keep_image(&dest, run(&inner, body, descriptors).await.and_then(imported))
}

fn imported(answer: Body) -> Result<ImportedImage, JobError> {
    let Body::JobStatus(JobStatus { size_bytes, blake3, .. }) = answer else {
        return Err(TalkError::from(ChannelError::Unexpected).into());
    };
    let blake3 = blake3.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(ImportedImage { size_bytes, blake3 })
}

/// Syncs the name of an image's disk, or removes what did not become one.
fn keep_image(dest: &Path, image: Result<ImportedImage, JobError>) -> Result<ImportedImage, JobError> {
    let synced = image.and_then(|image| {
        rundir::sync_parent(dest).map_err(FileError::at("sync", dest))?;
        Ok(image)
    });
    if synced.is_err() {
        rundir::remove_quietly(dest);
    }
    synced
}

async fn feed_image(
    inner: &Inner,
    file: fs::File,
    format: String,
    expected_bytes: u64,
    data: mpsc::Receiver<(u64, Bytes)>,
) -> Result<ImportedImage, JobError> {
    let (reader, writer) = io::pipe().map_err(FileError::at("make", "a pipe"))?;
    let writer = pipe::Sender::from_owned_fd(writer.into()).map_err(FileError::at("use", "a pipe"))?;
    let mut descriptors = Descriptors::default();
    descriptors.push(reader);
    descriptors.push(file);
    let body = Body::ImportImage(ImportImage { format, expected_bytes, size_bytes_max: IMAGE_BYTES_MAX });
    let job = Job::start(inner).await?;
    let asked = job.ask(body, descriptors);
    tokio::pin!(asked);
    // The answer may come before the end: a refusal. Then feeding stops too.
    let answer = tokio::select! {
        answer = &mut asked => answer,
        fed = feed(writer, expected_bytes, data) => {
            fed?;
            asked.await
        }
    };
    let image = imported(answer?)?;
    job.finish().await;
    Ok(image)
}

/// Writes the chunks, and zeros where there are none. Dropping the pipe is its end.
async fn feed(
    mut pipe: pipe::Sender,
    expected: u64,
    mut data: mpsc::Receiver<(u64, Bytes)>,
) -> Result<(), JobError> {
    let mut next = 0;
    while let Some((offset, bytes)) = data.recv().await {
        let end = offset.checked_add(bytes.len() as u64).filter(|end| *end <= expected);
        let (Some(end), Some(gap)) = (end, offset.checked_sub(next)) else {
            return Err(JobError::Order { offset, next, end: expected });
        };
        let fed = async {
            let mut gap = gap;
            while gap > 0 {
                let piece = gap.min(ZEROS.len() as u64);
                pipe.write_all(ZEROS.get(..piece as usize).unwrap_or_default()).await?;
                gap -= piece;
            }
            pipe.write_all(&bytes).await
        };
        match fed.await {
            Ok(()) => next = end,
            // The reader went away: its answer, or its death, says why.
            Err(_) => return Ok(()),
        }
    }
    if next == expected { Ok(()) } else { Err(JobError::BrokenOff { received: next, expected }) }
}

/// Whether a refusal says that something is open elsewhere.
#[must_use]
pub fn is_in_use(error: &JobError) -> bool {
    error.refusal().is_some_and(|failed| failed.code() == Code::InUse)
}
