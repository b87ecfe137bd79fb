//! The files of volumes: which there are, opened to be passed on. seriod never reads or writes their bytes; a sealed layer
//! that cannot be shared is copied by the kernel.
//!
//! A volume is `STATE/volumes/<uuid>/`, a layer `{k:08}.data` and `{k:08}.map`. Which of them are in the chain is
//! said by their headers, which only the process that opens the volume reads.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use serio_control::{
    frame::DESCRIPTORS_MAX,
    message::{LayerFds, Nic},
};
use uuid::Uuid;

use crate::net;

use super::{
    DevicePlan, NicPlan,
    error::{FileError, JobError, VolumeFilesError},
    machine, rundir,
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

    /// A card on these queues of its tap.
    pub(super) fn push_nic(&mut self, plan: &NicPlan, taps: Vec<OwnedFd>, limits: &DevicePlan) -> Nic {
        let mut taps = taps.into_iter().map(|tap| self.push(tap));
        Nic {
            mac: plan.mac.to_vec(),
            // A tap has at least one.
            tap_fd: taps.next().unwrap_or(u32::MAX),
            more_tap_fds: taps.collect(),
            mtu: plan.mtu,
            limits: limits.nic(plan.mac).and_then(machine::limits),
            vhost_fds: Vec::new(),
        }
    }

    /// Lets the kernel move the packets of a card that was pushed, if the host can and the frame has room.
    pub(super) fn push_vhosts(&mut self, nic: &mut Nic) {
        let pairs = nic.more_tap_fds.len() + 1;
        if self.list.len() + pairs <= DESCRIPTORS_MAX {
            nic.vhost_fds = net::vhosts(pairs).into_iter().map(|vhost| self.push(vhost)).collect();
        }
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

    /// Opens these layers.
    pub(super) fn push_chain(&mut self, dir: &Path, chain: &[u64], read_only: bool) -> Result<(), FileError> {
        chain.iter().try_for_each(|number| self.push_layer(dir, *number, read_only).map(drop))
    }

    /// Opens these layers for a check: data to be read, maps to be written, since checksums are kept there.
    pub(super) fn push_for_check(&mut self, dir: &Path, chain: &[u64]) -> Result<(), FileError> {
        for number in chain {
            let (data, map) = layer_paths(dir, *number);
            self.push(open(&data, true)?);
            self.push(open(&map, false)?);
        }
        Ok(())
    }

    /// Opens these layers for releases from one of them: nothing else can be written.
    pub(super) fn push_for_release(
        &mut self,
        dir: &Path,
        chain: &[u64],
        layer: Option<u64>,
    ) -> Result<(), FileError> {
        chain.iter().try_for_each(|number| self.push_layer(dir, *number, layer != Some(*number)).map(drop))
    }

    /// The same descriptors once more.
    pub(super) fn duplicate(&self) -> Result<Self, FileError> {
        let list = self.list.iter().map(OwnedFd::try_clone).collect::<Result<_, _>>();
        Ok(Self { list: list.map_err(FileError::at("duplicate", "a descriptor"))? })
    }

    fn push_layer(&mut self, dir: &Path, number: u64, read_only: bool) -> Result<LayerFds, FileError> {
        let (data, map) = layer_paths(dir, number);
        // The bottom of a clone is an image's file, or another volume's: nobody may write it, so nobody can.
        let lent = number == 0 && !read_only && is_shared(dir, number)?;
        let data_fd = self.push(open(&data, read_only || lent)?);
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
pub(super) fn layer_paths(dir: &Path, number: u64) -> (PathBuf, PathBuf) {
    (dir.join(format!("{number:08}.data")), dir.join(format!("{number:08}.map")))
}

/// The layers that have both files, in order. A lone file is a leftover of a snapshot that did not happen.
fn layer_numbers(dir: &Path, volume: Uuid) -> Result<Vec<u64>, VolumeFilesError> {
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
pub(super) fn new_layer(dir: &Path, number: u64) -> Result<(File, File), FileError> {
    let (data, map) = layer_paths(dir, number);
    for path in [&data, &map] {
        rundir::remove(path)?;
    }
    let files = (rundir::create_new(&data)?, rundir::create_new(&map)?);
    // A header that names a layer must never outlive the layer's files.
    rundir::sync_parent(&data).map_err(FileError::at("sync", dir))?;
    Ok(files)
}

fn layer_number(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".data")?;
    (digits.len() == 8 && digits.bytes().all(|b| b.is_ascii_digit())).then(|| digits.parse().ok())?
}

/// Opens the files of a layer that [`new_layer`] made.
pub(super) fn open_layer(dir: &Path, number: u64) -> Result<(File, File), FileError> {
    let (data, map) = layer_paths(dir, number);
    Ok((open(&data, false)?, open(&map, false)?))
}

/// The numbers of all layers of which there is a file, also of leftovers.
pub(super) fn all_numbers(dir: &Path) -> Result<Vec<u64>, FileError> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(dir).map_err(FileError::at("read", dir))? {
        let name = entry.map_err(FileError::at("read", dir))?.file_name();
        let Some(stem) =
            name.to_str().and_then(|n| n.strip_suffix(".data").or_else(|| n.strip_suffix(".map")))
        else {
            continue;
        };
        numbers.extend(layer_number(&format!("{stem}.data")));
    }
    numbers.sort_unstable();
    numbers.dedup();
    Ok(numbers)
}

/// Whether another volume, or an image, has the data file of a layer too.
pub(super) fn is_shared(dir: &Path, number: u64) -> Result<bool, FileError> {
    let (data, _) = layer_paths(dir, number);
    Ok(fs::metadata(&data).map_err(FileError::at("look at", &data))?.nlink() > 1)
}

/// Puts an empty data file of the same length in the place of one of which nothing is read any more. Whoever has the old
/// one open, or shares it, keeps it.
pub(super) fn empty_data(dir: &Path, number: u64) -> Result<(), FileError> {
    let (data, _) = layer_paths(dir, number);
    let fresh = dir.join(format!("{number:08}.empty"));
    rundir::remove(&fresh)?;
    let replace = || -> io::Result<()> {
        let len = fs::metadata(&data)?.len();
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&fresh)?;
        file.set_len(len)?;
        file.sync_all()?;
        fs::rename(&fresh, &data)?;
        rundir::sync_parent(&data)
    };
    replace().map_err(FileError::at("replace", &data))
}

/// Bytes that a volume's files take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Allocated {
    /// Of its own.
    pub own_bytes: u64,
    /// Of files that others have too.
    pub shared_bytes: u64,
}

/// Bytes that the files of a directory take on disk.
pub(super) fn allocated_bytes(dir: &Path) -> Result<Allocated, FileError> {
    let mut sum = Allocated::default();
    for entry in fs::read_dir(dir).map_err(FileError::at("read", dir))? {
        let meta = entry.and_then(|entry| entry.metadata()).map_err(FileError::at("look at", dir))?;
        // st_blocks counts 512 bytes whatever the file system's blocks are (stat(2)).
        let bytes = meta.blocks().saturating_mul(512);
        let part =
            if meta.is_file() && meta.nlink() > 1 { &mut sum.shared_bytes } else { &mut sum.own_bytes };
        *part = part.saturating_add(bytes);
    }
    Ok(sum)
}

/// The directory of a new volume.
pub(super) fn new_volume_dir(dir: &Path, uid: Uuid) -> Result<(), JobError> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Err(JobError::Exists(uid)),
        other => Ok(other.map_err(FileError::at("create", dir))?),
    }
}

/// Copies a file that nobody writes, holes as holes, and syncs it.
pub(super) fn copy_sparse(from: &Path, to: &Path) -> io::Result<()> {
    use std::os::fd::AsFd;

    use rustix::fs::{SeekFrom, seek};

    let source = File::open(from)?;
    let target = rundir::create_new(to).map_err(|error| error.source)?;
    let len = source.metadata()?.len();
    target.set_len(len)?;
    let mut at = 0;
    while at < len {
        let start = match seek(source.as_fd(), SeekFrom::Data(at)) {
            Ok(start) => start,
            // Only a hole is left.
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = seek(source.as_fd(), SeekFrom::Hole(start))?.min(len);
        let (mut from_at, mut to_at) = (start, start);
        while from_at < end {
            let want = usize::try_from(end - from_at).unwrap_or(usize::MAX).min(1 << 30);
            let copied =
                rustix::fs::copy_file_range(&source, Some(&mut from_at), &target, Some(&mut to_at), want)?;
            if copied == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        at = end;
    }
    target.sync_all()
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
