//! What changes the layers of a volume directory: clones, rollbacks, merges. For stand-alone tools and tests, as `dir.rs`.
//!
//! A clone is made beside its directory, under the name `.NAME.UUID.partial`, and renamed when it is complete and synced:
//! after a crash there is the whole clone or, to be removed by hand, that directory.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::Path,
};

use crate::{
    chain::walk,
    clones::{NewVolume, clone_image},
    dir::{VolumeDir, VolumeDirError},
    error::{CloneError, RollbackError},
    media::Media,
    merge::MergeProgress,
    rollback::{RolledBack, Stopped},
    volume::{Access, LayerFiles, Volume},
};

/// Gives a file a second name, as [`std::fs::hard_link`] does; or makes a copy where that cannot be.
pub type Share<'a> = &'a mut dyn FnMut(&Path, &Path) -> io::Result<()>;

impl VolumeDir {
    /// Makes this a volume that starts as `source` was at its snapshot `name`, sharing its data files. `size_bytes`: of the
    /// new volume, if it is to be larger. The source may be in use.
    pub fn clone_point(
        &self,
        source: &VolumeDir,
        name: &str,
        size_bytes: Option<u64>,
        share: Share<'_>,
    ) -> Result<(), VolumeDirError> {
        let all =
            source.files(Access::ReadOnly)?.media().map_err(self.io("open", source.path().to_owned()))?;
        let chain = walk(&all, Access::ReadOnly, Some(name)).map_err(source.open_error())?;
        let numbers: Vec<u64> = chain.iter().map(|(_, header)| header.layer).collect();
        let least = chain.last().map_or(0, |(_, top)| top.size_bytes);
        let files = source.files_of(&numbers)?;
        self.build(|new, volume| {
            let mut maps = Vec::new();
            for number in &numbers {
                maps.push(new.fresh_file(*number, "map")?);
                new.share(&source.file(*number, "data"), *number, share)?;
            }
            let head = new.fresh_layer(numbers.last().map_or(0, |top| top.saturating_add(1)))?;
            new.sync()?;
            let plan = NewVolume {
                volume,
                size_bytes: size_bytes.unwrap_or(least),
                maps,
                head,
                key: self.key.clone(),
            };
            files.clone_point(name, plan).map_err(self.clone_error())
        })
    }

    /// Makes this a volume that starts with the bytes of `image`, a raw file that is shared and must never change.
    pub fn clone_image(
        &self,
        image: &Path,
        size_bytes: Option<u64>,
        share: Share<'_>,
    ) -> Result<(), VolumeDirError> {
        let file = File::open(image).map_err(self.io("open", image.to_owned()))?;
        let least = Media::new(file.try_clone().map_err(self.io("open", image.to_owned()))?)
            .len()
            .map_err(self.io("measure", image.to_owned()))?;
        self.build(|new, volume| {
            new.share(image, 0, share)?;
            let maps = vec![new.fresh_file(0, "map")?];
            let head = new.fresh_layer(1)?;
            new.sync()?;
            let plan = NewVolume {
                volume,
                size_bytes: size_bytes.unwrap_or(least),
                maps,
                head,
                key: self.key.clone(),
            };
            clone_image(&file, plan).map_err(self.clone_error())
        })
    }

    /// Puts a volume that nobody has open back to a snapshot; the files of the layers above it are removed.
    pub fn rollback(&self, name: &str, discard_later: bool) -> Result<RolledBack, VolumeDirError> {
        let error = |source| VolumeDirError::Rollback { path: self.path().to_owned(), source };
        let files =
            self.files(Access::ReadWrite)?.media().map_err(self.io("open", self.path().to_owned()))?;
        // Locked before the new files are made: their number must not become that of somebody's head meanwhile.
        let stopped = Stopped::lock(files).map_err(error)?;
        let next = stopped.next().map_err(error)?;
        let LayerFiles { data, map } = self.fresh_layer(next)?;
        // The names must outlive a crash before a header names them.
        self.sync()?;
        let went = match stopped.rollback(
            name,
            (Media::new(data), Media::new(map)),
            discard_later,
            self.key.as_ref(),
        ) {
            Ok(went) => went,
            Err(source) => {
                // After an error of the host nobody knows whether a header names them.
                if !matches!(source, RollbackError::Io { .. }) {
                    self.remove_layer(next)?;
                }
                return Err(error(source));
            }
        };
        for layer in &went.left {
            self.remove_layer(*layer)?;
        }
        self.sync()?;
        Ok(went)
    }

    /// Layers that a volume of this directory has inherited, as clones do, from the highest to the lowest: each is read
    /// only through the one above. When all are merged ([`Volume::merge`]), the volume shares nothing that it was made from.
    /// A snapshot's layer is not among them, although a clone of that snapshot may share its data.
    pub fn inherited(&self, volume: &Volume) -> Result<Vec<u64>, VolumeDirError> {
        let stack = volume.stack();
        let mut found = Vec::new();
        for (at, layer) in stack.layers.iter().enumerate().rev().skip(1) {
            let Some(header) = layer.header().filter(|h| h.snapshot.is_empty()) else { continue };
            // The name, not the open file: an earlier merge may have put an empty one in its place.
            let path = self.file(header.layer, "data");
            let links = path.metadata().map_err(self.io("look at", path))?.nlink();
            // The bottom of an encrypted volume that is its own is empty, and stays.
            let stays = at == 0 && stack.layers.get(1).is_some_and(|l| l.cipher.is_some()) && links == 1;
            if !stays {
                found.push(header.layer);
            }
        }
        Ok(found)
    }

    /// Lets the files of a layer go that a merge is done with, as `progress` says.
    pub fn settle(&self, layer: u64, progress: &MergeProgress) -> Result<(), VolumeDirError> {
        if progress.done && progress.stays {
            return self.empty_bottom(layer);
        }
        if progress.done {
            self.remove_layer(layer)?;
            self.sync()?;
        }
        Ok(())
    }

    /// Puts an empty file in place of the bottom's data, which others may share: nothing of it is read any more.
    fn empty_bottom(&self, layer: u64) -> Result<(), VolumeDirError> {
        let path = self.file(layer, "data");
        let new = self.file(layer, "data.new");
        let io = self.io("replace", path.clone());
        let replace = || {
            let file = File::create(&new)?;
            file.set_len(path.metadata()?.len())?;
            file.sync_all()?;
            fs::rename(&new, &path)
        };
        replace().map_err(io)?;
        self.sync()
    }

    fn clone_error(&self) -> impl FnOnce(CloneError) -> VolumeDirError {
        let path = self.path().to_owned();
        move |source| VolumeDirError::Clone { path, source }
    }

    fn share(&self, from: &Path, layer: u64, share: Share<'_>) -> Result<(), VolumeDirError> {
        share(from, &self.file(layer, "data")).map_err(self.io("share", from.to_owned()))
    }

    /// Makes the volume in a directory beside this one, and gives it its name when it is complete.
    fn build(
        &self,
        make: impl FnOnce(&VolumeDir, [u8; 16]) -> Result<(), VolumeDirError>,
    ) -> Result<(), VolumeDirError> {
        let Some(name) = self.path().file_name().and_then(|n| n.to_str()) else {
            let source = io::Error::from(io::ErrorKind::InvalidFilename);
            return Err(self.io("make", self.path().to_owned())(source));
        };
        // An empty directory is replaced by the rename; one with anything in it is somebody's.
        if self.path().read_dir().is_ok_and(|mut entries| entries.next().is_some()) {
            return Err(VolumeDirError::Exists(self.path().to_owned()));
        }
        let id = uuid::Uuid::new_v4();
        let partial = VolumeDir::new(self.path().with_file_name(format!(".{name}.{id}.partial")));
        fs::create_dir_all(partial.path()).map_err(self.io("create", partial.path().to_owned()))?;
        let made = make(&partial, *id.as_bytes()).and_then(|()| {
            fs::rename(partial.path(), self.path()).map_err(self.io("make", self.path().to_owned()))
        });
        if made.is_err() {
            // The reason is told; that its remains could not be removed would only hide it.
            let _ = fs::remove_dir_all(partial.path());
            return made;
        }
        let parent = self.path().parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(parent).and_then(|dir| dir.sync_all()).map_err(self.io("sync", parent.to_owned()))
    }
}
