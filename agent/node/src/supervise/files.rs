//! The files of volumes: which there are, opened to be passed on. seriod never reads or writes their bytes.
//!
//! A volume is `STATE/volumes/<uuid>/`, a layer `{k:08}.data` and `{k:08}.map`. Which of them are in the chain is
//! said by their headers, which only the process that opens the volume reads.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
};

use serio_control::message::LayerFds;
use uuid::Uuid;

use super::{
    error::{FileError, VolumeFilesError},
    rundir,
};

/// Descriptors for one frame, numbered as they are pushed.
#[derive(Debug, Default)]
pub(super) struct Descriptors {
    list: Vec<OwnedFd>,
}

impl Descriptors {
    /// Its number in the frame.
    pub(super) fn push(&mut self, descriptor: impl Into<OwnedFd>) -> u32 {
        let number = self.list.len() as u32;
        self.list.push(descriptor.into());
        number
    }

    pub(super) fn as_slice(&self) -> &[OwnedFd] {
        &self.list
    }

    /// Opens all layers of a volume, oldest first.
    pub(super) fn push_volume(
        &mut self,
        dir: &Path,
        volume: Uuid,
        read_only: bool,
    ) -> Result<Vec<LayerFds>, VolumeFilesError> {
        let numbers = layer_numbers(dir, volume)?;
        numbers.into_iter().map(|number| Ok(self.push_layer(dir, number, read_only)?)).collect()
    }

    /// Opens the layers 0 to `count`, without it, for writing.
    pub(super) fn push_layers(&mut self, dir: &Path, count: u32) -> Result<(), FileError> {
        (0..count).try_for_each(|number| self.push_layer(dir, number, false).map(drop))
    }

    fn push_layer(&mut self, dir: &Path, number: u32, read_only: bool) -> Result<LayerFds, FileError> {
        let (data, map) = layer_paths(dir, number);
        let data_fd = self.push(open(&data, read_only)?);
        let map_fd = Some(self.push(open(&map, read_only)?));
        Ok(LayerFds { data_fd, map_fd })
    }
}

/// Opens a file that there is, for a guest's disk, kernel or the like.
pub(super) fn open(path: &Path, read_only: bool) -> Result<File, FileError> {
    let file =
        OpenOptions::new().read(true).write(!read_only).open(path).map_err(FileError::at("open", path))?;
    let meta = file.metadata().map_err(FileError::at("look at", path))?;
    if meta.is_file() {
        return Ok(file);
    }
    Err(FileError::at("use", path)(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file")))
}

/// The data and map of a layer.
pub(super) fn layer_paths(dir: &Path, number: u32) -> (PathBuf, PathBuf) {
    (dir.join(format!("{number:08}.data")), dir.join(format!("{number:08}.map")))
}

/// The layers that have both files, in order. A lone file is a leftover of a snapshot that did not happen.
fn layer_numbers(dir: &Path, volume: Uuid) -> Result<Vec<u32>, VolumeFilesError> {
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(VolumeFilesError::Missing { volume, path: dir.to_owned() });
        }
        other => other.map_err(FileError::at("read", dir))?,
    };
    let mut numbers = Vec::new();
    for entry in entries {
        let name = entry.map_err(FileError::at("read", dir))?.file_name();
        let Some(number) = name.to_str().and_then(layer_number) else { continue };
        if layer_paths(dir, number).1.exists() {
            numbers.push(number);
        }
    }
    if numbers.is_empty() {
        return Err(VolumeFilesError::Missing { volume, path: dir.to_owned() });
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Makes the empty files of a new layer. Leftovers of a snapshot that did not happen are taken away first: the caller
/// knows from the headers that the chain does not have this layer, and that no process is at it.
pub(super) fn new_layer(dir: &Path, number: u32) -> Result<(File, File), FileError> {
    let (data, map) = layer_paths(dir, number);
    for path in [&data, &map] {
        rundir::remove(path)?;
    }
    let files = (rundir::create_new(&data)?, rundir::create_new(&map)?);
    // A header that names a layer must never outlive the layer's files.
    rundir::sync_parent(&data).map_err(FileError::at("sync", dir))?;
    Ok(files)
}

fn layer_number(name: &str) -> Option<u32> {
    let digits = name.strip_suffix(".data")?;
    (digits.len() == 8 && digits.bytes().all(|b| b.is_ascii_digit())).then(|| digits.parse().ok())?
}

/// Bytes that the files of a directory take on disk.
pub(super) fn allocated_bytes(dir: &Path) -> Result<u64, FileError> {
    let mut sum: u64 = 0;
    for entry in fs::read_dir(dir).map_err(FileError::at("read", dir))? {
        let meta = entry.and_then(|entry| entry.metadata()).map_err(FileError::at("look at", dir))?;
        // st_blocks counts 512 bytes whatever the file system's blocks are (stat(2)).
        sum = sum.saturating_add(meta.blocks().saturating_mul(512));
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_come_in_order_and_leftovers_do_not_count() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Uuid::new_v4();
        assert!(matches!(layer_numbers(dir.path(), volume), Err(VolumeFilesError::Missing { .. })));
        for name in
            ["00000010.data", "00000010.map", "00000002.data", "00000002.map", "00000003.data", "x.data"]
        {
            fs::write(dir.path().join(name), b"").unwrap();
        }
        fs::write(dir.path().join("0000000é.data"), b"").unwrap();
        assert_eq!(layer_numbers(dir.path(), volume).unwrap(), [2, 10]);
        let mut descriptors = Descriptors::default();
        let layers = descriptors.push_volume(dir.path(), volume, true).unwrap();
        assert_eq!(layers.len(), 2);
        assert_eq!(layers[1], LayerFds { data_fd: 2, map_fd: Some(3) });
        assert_eq!(descriptors.as_slice().len(), 4);
    }

    #[test]
    fn only_regular_files_are_passed_on() {
        let dir = tempfile::tempdir().unwrap();
        assert!(open(dir.path(), true).unwrap_err().to_string().starts_with("cannot use"));
        assert!(open(Path::new("/dev/null"), false).is_err());
        assert!(open(&dir.path().join("none"), true).is_err());
    }
}
