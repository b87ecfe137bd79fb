//! Volumes that grow, are cloned or go back; and what has changed between two points.
//!
//! Owns: the files that the jobs are given, the hard links of shared layers. Never: their content.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serio_control::{
    ChannelError,
    frame::DESCRIPTORS_MAX,
    message::{Body, ChangedRanges, CloneVolume, ListChanges, ResizeVolume, RollbackVolume},
};
use uuid::Uuid;

use super::{
    FileError, Inner, JobError, Supervisor, TalkError, VmHandle, VolumeInfo,
    files::{self, Descriptors},
    jobs,
    merge::remove_leftovers,
    rundir,
};

/// For growing a volume of a running VM: headers are written and synced.
const RESIZE_WAIT: Duration = Duration::from_secs(60);

/// What a clone starts from.
#[derive(Debug, Clone)]
pub enum CloneSource {
    /// An image's raw file.
    Image(PathBuf),
    /// A volume's snapshot.
    Snapshot {
        /// The volume.
        volume: Uuid,
        /// The snapshot.
        name: String,
    },
}

/// A question for what has changed.
#[derive(Debug, Clone)]
pub struct ChangesAsk {
    /// The volume.
    pub volume: Uuid,
    /// The earlier snapshot.
    pub from: String,
    /// The later one; empty: the head of a stopped volume.
    pub to: String,
    /// Where to go on.
    pub offset: u64,
    /// At most so many ranges.
    pub ranges_max: u32,
}

impl Supervisor {
    /// Grows a volume, through its VM if one runs.
    ///
    /// # Errors
    /// [`JobError`].
    pub async fn resize_volume(
        &self,
        volume: Uuid,
        size_bytes: u64,
        vm: Option<VmHandle>,
    ) -> Result<(), JobError> {
        let job = resize(Arc::clone(&self.inner), volume, size_bytes, vm);
        tokio::spawn(job).await.unwrap_or(Err(JobError::Ending))
    }

    /// Makes a volume that shares what its source has; nothing is left on failure.
    ///
    /// # Errors
    /// [`JobError`]; [`JobError::Link`] when its files cannot be shared.
    pub async fn clone_volume(
        &self,
        uid: Uuid,
        size_bytes: u64,
        source: CloneSource,
    ) -> Result<(), JobError> {
        let job = clone(Arc::clone(&self.inner), uid, size_bytes, source);
        tokio::spawn(job).await.unwrap_or(Err(JobError::Ending))
    }

    /// Takes a stopped volume back to a snapshot; says what its headers say then.
    ///
    /// # Errors
    /// [`JobError`].
    pub async fn rollback_volume(
        &self,
        volume: Uuid,
        snapshot: String,
        discard_later: bool,
    ) -> Result<VolumeInfo, JobError> {
        let job = rollback(Arc::clone(&self.inner), volume, snapshot, discard_later);
        tokio::spawn(job).await.unwrap_or(Err(JobError::Ending))
    }

    /// A page of what has changed between two points.
    ///
    /// # Errors
    /// [`JobError`].
    pub async fn list_changes(&self, ask: ChangesAsk) -> Result<ChangedRanges, JobError> {
        let mut descriptors = Descriptors::default();
        descriptors.push_volume(&self.inner.volume_dir(ask.volume), ask.volume, true)?;
        let body = Body::ListChanges(ListChanges {
            volume_id: ask.volume.to_string(),
            from: ask.from,
            to: ask.to,
            offset: ask.offset,
            ranges_max: ask.ranges_max,
        });
        match jobs::run(&self.inner, body, descriptors).await? {
            Body::ChangedRanges(page) => Ok(page),
            _ => Err(TalkError::from(ChannelError::Unexpected).into()),
        }
    }
}

async fn resize(
    inner: Arc<Inner>,
    volume: Uuid,
    size_bytes: u64,
    vm: Option<VmHandle>,
) -> Result<(), JobError> {
    let _entered = inner.enter_sure(volume).await?;
    // A VMM has the key already.
    let key = if vm.is_some() { None } else { inner.key_of(volume).await? };
    let body = Body::ResizeVolume(ResizeVolume { volume_id: volume.to_string(), size_bytes, key });
    match vm {
        Some(vm) => jobs::done(&vm.ask(body, &[], RESIZE_WAIT).await?),
        None => {
            let info = jobs::inspect(&inner, volume).await?;
            let mut descriptors = Descriptors::default();
            descriptors.push_chain(&inner.volume_dir(volume), &info.chain, false)?;
            jobs::done(&jobs::run(&inner, body, descriptors).await?)
        }
    }
}

async fn rollback(
    inner: Arc<Inner>,
    volume: Uuid,
    snapshot: String,
    discard_later: bool,
) -> Result<VolumeInfo, JobError> {
    let _entered = inner.enter_sure(volume).await?;
    let key = inner.key_of(volume).await?;
    let info = jobs::inspect(&inner, volume).await?;
    let dir = inner.volume_dir(volume);
    let number = info.next_number();
    let (data, map) = files::new_layer(&dir, number)?;
    let mut descriptors = Descriptors::default();
    descriptors.push_chain(&dir, &info.chain, false)?;
    descriptors.push(data);
    descriptors.push(map);
    let body =
        Body::RollbackVolume(RollbackVolume { volume_id: volume.to_string(), snapshot, discard_later, key });
    let answer = jobs::run(&inner, body, descriptors).await;
    // The process is gone, whatever it did: the headers say, and what they do not name goes.
    let info = jobs::inspect(&inner, volume).await;
    if let Ok(info) = &info {
        remove_leftovers(&dir, info)?;
    }
    jobs::done(&answer?)?;
    info
}

/// Each layer is three descriptors of a message (its data, its map, the clone's map), and the head is two.
const CLONED_LAYERS_MAX: usize = (DESCRIPTORS_MAX - 2) / 3;

async fn clone(inner: Arc<Inner>, uid: Uuid, size_bytes: u64, source: CloneSource) -> Result<(), JobError> {
    let dir = inner.volume_dir(uid);
    files::new_volume_dir(&dir, uid)?;
    let made = fill_clone(&inner, &dir, uid, size_bytes, source).await;
    if made.is_err() {
        rundir::remove_quietly(&dir);
    }
    made
}

async fn fill_clone(
    inner: &Inner,
    dir: &Path,
    uid: Uuid,
    size_bytes: u64,
    source: CloneSource,
) -> Result<(), JobError> {
    let mut descriptors = Descriptors::default();
    // Held until the clone is whole: the source's layers stay as they are meanwhile.
    let (_entered, image, snapshot, layers) = match source {
        CloneSource::Image(path) => {
            let data = files::layer_paths(dir, 0).0;
            link(&path, &data)?;
            descriptors.push(files::open(&data, true)?);
            (None, true, String::new(), vec![0])
        }
        CloneSource::Snapshot { volume, name } => {
            let entered = inner.enter_sure(volume).await?;
            if let Some(keys) = inner.keys.get() {
                keys.assign_like(uid, volume).await?;
            }
            let from = inner.volume_dir(volume);
            let layers = layers_of(inner, volume, &name).await?;
            if layers.len() > CLONED_LAYERS_MAX {
                return Err(JobError::TooManyLayers { count: layers.len(), max: CLONED_LAYERS_MAX });
            }
            for layer in &layers {
                share(files::layer_paths(&from, *layer).0, files::layer_paths(dir, *layer).0).await?;
            }
            descriptors.push_chain(&from, &layers, true)?;
            (Some(entered), false, name, layers)
        }
    };
    for layer in &layers {
        descriptors.push(rundir::create_new(&files::layer_paths(dir, *layer).1)?);
    }
    let head = layers.last().map_or(0, |top| top.saturating_add(1));
    let (data, map) = files::new_layer(dir, head)?;
    descriptors.push(data);
    descriptors.push(map);
    let (volume_id, key) = (uid.to_string(), inner.key_of(uid).await?);
    let body = Body::CloneVolume(CloneVolume { volume_id, size_bytes, image, snapshot, key });
    jobs::done(&jobs::run(inner, body, descriptors).await?)?;
    rundir::sync_parent(dir).map_err(FileError::at("sync", dir))?;
    Ok(())
}

/// The layers up to a snapshot, oldest first.
async fn layers_of(inner: &Inner, volume: Uuid, snapshot: &str) -> Result<Vec<u64>, JobError> {
    let info = jobs::inspect(inner, volume).await?;
    let top = info.snapshots.iter().find(|s| s.name == snapshot).map(|s| s.layer);
    let top = top.ok_or_else(|| JobError::NoSnapshot { volume, name: snapshot.to_owned() })?;
    Ok(info.chain.into_iter().filter(|layer| *layer <= top).collect())
}

fn link(from: &Path, to: &Path) -> Result<(), JobError> {
    fs::hard_link(from, to).map_err(|source| JobError::Link { path: from.to_owned(), source })
}

/// A sealed layer for one more volume: the same file under another name, or, where the file system gives it no more names, a
/// copy of it.
async fn share(from: PathBuf, to: PathBuf) -> Result<(), JobError> {
    match link(&from, &to) {
        Err(error) if is_unlinkable(&error) => {
            tracing::warn!(layer = %from.display(), "it is copied: {}", crate::error::chain(&error));
            let copied = tokio::task::spawn_blocking(move || {
                files::copy_sparse(&from, &to).map_err(FileError::at("copy a layer to", &to))
            });
            copied
                .await
                .unwrap_or_else(|_| Err(FileError::at("copy", "a layer")(io::ErrorKind::Other.into())))?;
            Ok(())
        }
        other => other,
    }
}

/// Whether sharing failed in a way that copying helps against: another file system, one without links, too many links.
#[must_use]
pub fn is_unlinkable(error: &JobError) -> bool {
    let JobError::Link { source, .. } = error else { return false };
    [libc::EXDEV, libc::EMLINK, libc::EOPNOTSUPP, libc::EPERM]
        .iter()
        .any(|e| source.raw_os_error() == Some(*e))
}
