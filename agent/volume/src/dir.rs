//! A volume directory: `00000000.data`, `00000000.map`, `00000001.data`, … For stand-alone tools and tests; the
//! agents get their files as descriptors instead.

use std::{
    fs::{self, File, OpenOptions},
    io,
    path::{Path, PathBuf},
};

use crate::{
    crypto::{VdcSecret, create_encrypted},
    error::{CloneError, CreateError, DeleteError, OpenError, RollbackError, SnapshotError},
    merge::Deleted,
    stack::LAYERS_MAX,
    volume::{Access, LayerFiles, SnapshotInfo, Volume, VolumeFiles, create_layer},
};

/// Why something with a volume directory failed.
#[derive(Debug, thiserror::Error)]
pub enum VolumeDirError {
    /// The directory or a file in it.
    #[error("cannot {what} {path}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// The answer.
        #[source]
        source: io::Error,
    },
    /// There is a volume already.
    #[error("{0} holds a volume already: choose another directory, or remove it")]
    Exists(PathBuf),
    /// No layer is there.
    #[error("{0} is not a volume directory: it has no map file such as 00000000.map")]
    NotAVolume(PathBuf),
    /// Opening it.
    #[error("cannot open the volume in {path}")]
    Open {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: OpenError,
    },
    /// Creating it.
    #[error("cannot create a volume in {path}")]
    Create {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: CreateError,
    },
    /// Deleting a snapshot.
    #[error("cannot delete a snapshot of the volume in {path}")]
    Delete {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: DeleteError,
    },
    /// Making a clone.
    #[error("cannot make a clone in {path}")]
    Clone {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: CloneError,
    },
    /// Going back to a snapshot.
    #[error("cannot roll back the volume in {path}")]
    Rollback {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: RollbackError,
    },
    /// Taking a snapshot.
    #[error("cannot take a snapshot of the volume in {path}")]
    Snapshot {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: SnapshotError,
    },
}

/// See the head of this file.
#[derive(Debug, Clone)]
pub struct VolumeDir {
    path: PathBuf,
    pub(crate) key: Option<VdcSecret>,
    direct: bool,
}

impl VolumeDir {
    /// The directory at `path`, which need not exist yet.
    pub fn new(path: impl Into<PathBuf>) -> VolumeDir {
        VolumeDir { path: path.into(), key: None, direct: false }
    }

    /// The same directory, with the key of the vdc: what is created in it is encrypted, and what is encrypted can be
    /// opened.
    pub fn with_key(self, key: VdcSecret) -> VolumeDir {
        VolumeDir { key: Some(key), ..self }
    }

    /// The same directory; volumes that are opened for writing go past the page cache, see [`Volume::go_direct`].
    pub fn with_direct(self, direct: bool) -> VolumeDir {
        VolumeDir { direct, ..self }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn file(&self, layer: u64, suffix: &str) -> PathBuf {
        self.path.join(format!("{layer:08}.{suffix}"))
    }

    pub(crate) fn io(&self, what: &'static str, path: PathBuf) -> impl FnOnce(io::Error) -> VolumeDirError {
        move |source| VolumeDirError::Io { what, path, source }
    }

    /// Makes the directory and the empty files of layer 0. The caller may fill the data file, then calls
    /// [`VolumeDir::commit`]; until then the directory holds no volume.
    pub fn begin(&self) -> Result<LayerFiles, VolumeDirError> {
        fs::create_dir_all(&self.path).map_err(self.io("create", self.path.clone()))?;
        // A map without a header is what an interrupted import left; a volume has one.
        if self.numbers()?.iter().any(|n| self.file(*n, "map").metadata().is_ok_and(|m| m.len() > 0)) {
            return Err(VolumeDirError::Exists(self.path.clone()));
        }
        let files = self.open_layer(0, true, true)?;
        files.data.set_len(0).map_err(self.io("empty", self.file(0, "data")))?;
        self.sync()?;
        Ok(files)
    }

    /// Takes back what [`VolumeDir::begin`] made, unless it is a volume by now: its files, and the directory if nothing else is
    /// in it.
    pub fn give_up(&self) -> Result<(), VolumeDirError> {
        let [map, data] = ["map", "data"].map(|suffix| self.file(0, suffix));
        if fs::metadata(&map).is_ok_and(|meta| meta.len() > 0) {
            return Ok(());
        }
        for path in [map, data] {
            match fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(self.io("remove", path)(e)),
                _ => {}
            }
        }
        // Refused where something else is in it.
        let _ = fs::remove_dir(&self.path);
        Ok(())
    }

    /// Makes what [`VolumeDir::begin`] gave, and the caller filled, a volume of `size_bytes`.
    pub fn commit(&self, files: &LayerFiles, size_bytes: u64) -> Result<(), VolumeDirError> {
        create_layer(files, size_bytes, *uuid::Uuid::new_v4().as_bytes(), true)
            .map_err(|source| VolumeDirError::Create { path: self.path.clone(), source })
    }

    /// An empty volume of `size_bytes`; encrypted if there is a key, and then this is a multiple of 4096.
    pub fn create(&self, size_bytes: u64) -> Result<(), VolumeDirError> {
        let files = self.begin()?;
        let Some(key) = &self.key else { return self.commit(&files, size_bytes) };
        let head = self.open_layer(1, true, true)?;
        self.sync()?;
        create_encrypted(&files, &head, size_bytes, *uuid::Uuid::new_v4().as_bytes(), key)
            .map_err(|source| VolumeDirError::Create { path: self.path.clone(), source })
    }

    /// Opens the volume.
    pub fn open(&self, access: Access) -> Result<Volume, VolumeDirError> {
        let volume = Volume::open_with_key(self.files(access)?, access, self.key.as_ref())
            .map_err(self.open_error())?;
        if self.direct {
            // Only a wish: it works through the page cache, too.
            let _ = volume.go_direct();
        }
        Ok(volume)
    }

    /// Opens the volume at a snapshot, read-only.
    pub fn open_snapshot(&self, name: &str) -> Result<Volume, VolumeDirError> {
        Volume::open_snapshot_with_key(self.files(Access::ReadOnly)?, name, self.key.as_ref())
            .map_err(self.open_error())
    }

    pub(crate) fn open_error(&self) -> impl FnOnce(OpenError) -> VolumeDirError {
        let path = self.path.clone();
        move |source| VolumeDirError::Open { path, source }
    }

    /// The files of all layers, oldest first.
    pub fn files(&self, access: Access) -> Result<VolumeFiles, VolumeDirError> {
        let mut layers = Vec::new();
        for layer in self.numbers()? {
            layers.push(self.open_layer(layer, access == Access::ReadWrite, false)?);
        }
        if layers.is_empty() {
            return Err(VolumeDirError::NotAVolume(self.path.clone()));
        }
        Ok(VolumeFiles { layers })
    }

    /// The files of these layers, for reading.
    pub(crate) fn files_of(&self, numbers: &[u64]) -> Result<VolumeFiles, VolumeDirError> {
        let layers: Result<_, _> =
            numbers.iter().map(|layer| self.open_layer(*layer, false, false)).collect();
        Ok(VolumeFiles { layers: layers? })
    }

    /// Numbers of the layers that have a map file, ascending. They have gaps where snapshots were deleted.
    pub(crate) fn numbers(&self) -> Result<Vec<u64>, VolumeDirError> {
        let entries = match fs::read_dir(&self.path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(VolumeDirError::NotAVolume(self.path.clone()));
            }
            other => other.map_err(self.io("list", self.path.clone()))?,
        };
        let mut numbers = Vec::new();
        for entry in entries {
            let name = entry.map_err(self.io("list", self.path.clone()))?.file_name();
            let number = name.to_str().and_then(|n| n.strip_suffix(".map")?.parse().ok());
            // Only names that we would give: `1.map` is somebody else's.
            numbers.extend(number.filter(|n| self.file(*n, "map").file_name() == Some(&name)));
        }
        numbers.sort_unstable();
        // A chain has so many at most; twice that leaves room for leftovers, and descriptors are not endless.
        numbers.truncate(2 * LAYERS_MAX);
        Ok(numbers)
    }

    /// Deletes a snapshot of a volume that nobody has open, and removes the files of its layer.
    pub fn delete_snapshot(&self, name: &str) -> Result<Deleted, VolumeDirError> {
        let deleted = self
            .files(Access::ReadWrite)?
            .delete_snapshot_with_key(name, self.key.as_ref())
            .map_err(|source| VolumeDirError::Delete { path: self.path.clone(), source })?;
        self.remove_layer(deleted.layer)?;
        self.sync()?;
        Ok(deleted)
    }

    fn open_layer(&self, layer: u64, write: bool, create: bool) -> Result<LayerFiles, VolumeDirError> {
        let open = |suffix| -> Result<File, VolumeDirError> {
            let path = self.file(layer, suffix);
            OpenOptions::new()
                .read(true)
                .write(write)
                .create(create)
                .truncate(false)
                .open(&path)
                .map_err(self.io("open", path))
        };
        Ok(LayerFiles { data: open("data")?, map: open("map")? })
    }

    /// New, empty files for a layer. What has their names is a leftover, which a clone may share: it loses this name only.
    pub(crate) fn fresh_layer(&self, layer: u64) -> Result<LayerFiles, VolumeDirError> {
        self.remove_layer(layer)?;
        Ok(LayerFiles { data: self.fresh_file(layer, "data")?, map: self.fresh_file(layer, "map")? })
    }

    pub(crate) fn fresh_file(&self, layer: u64, suffix: &str) -> Result<File, VolumeDirError> {
        let path = self.file(layer, suffix);
        File::create_new(&path)
            .and_then(|_| OpenOptions::new().read(true).write(true).open(&path))
            .map_err(self.io("create", path))
    }

    /// Removes the files of a layer, if they are there.
    pub(crate) fn remove_layer(&self, layer: u64) -> Result<(), VolumeDirError> {
        // The map first: a layer is there if its map is.
        for suffix in ["map", "data"] {
            let path = self.file(layer, suffix);
            match fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(self.io("remove", path)(e)),
                _ => {}
            }
        }
        Ok(())
    }

    /// Takes a snapshot of a volume of this directory that the caller has open for writing.
    pub fn snapshot(&self, volume: &Volume, name: &str) -> Result<SnapshotInfo, VolumeDirError> {
        let next = volume.head_header().map_or(0, |h| h.layer.saturating_add(1));
        let files = self.fresh_layer(next)?;
        // The names must outlive a crash before the sealed header names them.
        self.sync()?;
        volume
            .snapshot(files, name)
            .map_err(|source| VolumeDirError::Snapshot { path: self.path.clone(), source })
    }

    pub(crate) fn sync(&self) -> Result<(), VolumeDirError> {
        File::open(&self.path).and_then(|dir| dir.sync_all()).map_err(self.io("sync", self.path.clone()))
    }
}
