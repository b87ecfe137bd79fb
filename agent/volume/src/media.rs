//! One file of a layer, as the engine sees it: a host file, or in tests a simulated disk that can crash.

use std::{fs::File, io, os::unix::fs::FileExt, sync::Arc};

use nix::{
    fcntl::{FallocateFlags, FcntlArg, OFlag, PosixFadviseAdvice, fallocate, fcntl, posix_fadvise},
    sys::statfs::{TMPFS_MAGIC, fstatfs},
};

#[cfg(test)]
use crate::sim_disk::SimFile;

/// A file of a layer.
#[derive(Debug, Clone)]
pub(crate) enum Media {
    /// A regular file or block device.
    File(Arc<File>),
    /// A simulated disk: the same engine code runs on it, and it can lose power.
    #[cfg(test)]
    Sim(Arc<SimFile>),
}

/// Which lock on a data file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lock {
    /// The only writer.
    Exclusive,
    /// One of the readers of a head that nobody writes.
    Shared,
}

impl Lock {
    fn kind(self) -> libc::c_int {
        match self {
            Lock::Exclusive => libc::F_WRLCK,
            Lock::Shared => libc::F_RDLCK,
        }
    }
}

impl Media {
    pub(crate) fn new(file: File) -> Media {
        Media::File(Arc::new(file))
    }

    /// Whether the file lies in memory (tmpfs): a call on it never waits for a device.
    pub(crate) fn is_in_memory(&self) -> bool {
        match self {
            Media::File(file) => fstatfs(file).is_ok_and(|fs| fs.filesystem_type() == TMPFS_MAGIC),
            #[cfg(test)]
            Media::Sim(_) => false,
        }
    }

    pub(crate) fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        match self {
            Media::File(file) => file.read_exact_at(bytes, offset),
            #[cfg(test)]
            Media::Sim(sim) => sim.read_exact_at(bytes, offset),
        }
    }

    pub(crate) fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        match self {
            Media::File(file) => file.write_all_at(bytes, offset),
            #[cfg(test)]
            Media::Sim(sim) => sim.write_all_at(bytes, offset),
        }
    }

    pub(crate) fn sync_data(&self) -> io::Result<()> {
        match self {
            Media::File(file) => file.sync_data(),
            #[cfg(test)]
            Media::Sim(sim) => sim.sync_data(),
        }
    }

    pub(crate) fn set_len(&self, len: u64) -> io::Result<()> {
        match self {
            Media::File(file) => file.set_len(len),
            #[cfg(test)]
            Media::Sim(sim) => sim.set_len(len),
        }
    }

    pub(crate) fn len(&self) -> io::Result<u64> {
        match self {
            Media::File(file) => file_len(file),
            #[cfg(test)]
            Media::Sim(sim) => Ok(sim.len()),
        }
    }

    /// How many names the file has: more than one, and other volumes share it.
    pub(crate) fn links(&self) -> io::Result<u64> {
        match self {
            Media::File(file) => Ok(std::os::unix::fs::MetadataExt::nlink(&file.metadata()?)),
            #[cfg(test)]
            Media::Sim(_) => Ok(1),
        }
    }

    /// Reads up to `bytes.len()` bytes; fewer only at the end of the file or on a whim of the system.
    pub(crate) fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        match self {
            Media::File(file) => file.read_at(bytes, offset),
            #[cfg(test)]
            Media::Sim(sim) => {
                let len = bytes.len().min(sim.len().saturating_sub(offset) as usize);
                sim.read_exact_at(&mut bytes[..len], offset).map(|()| len)
            }
        }
    }

    /// Whether this descriptor goes past the page cache.
    #[cfg(test)]
    pub(crate) fn is_direct(&self) -> bool {
        match self {
            Media::File(file) => fcntl(file, FcntlArg::F_GETFL)
                .is_ok_and(|flags| OFlag::from_bits_retain(flags).contains(OFlag::O_DIRECT)),
            #[cfg(test)]
            Media::Sim(_) => false,
        }
    }

    /// Whether a descriptor that goes past the page cache takes any place and any memory that are multiples of `unit` bytes.
    /// Tried by a read: the file is at least two units long.
    pub(crate) fn takes_direct(&self, unit: usize) -> bool {
        let mut memory = vec![0; 4 * unit];
        // A multiple of the unit, and of nothing larger.
        let start = memory.as_ptr().align_offset(2 * unit) + unit;
        let Some(bytes) = memory.get_mut(start..start + unit) else { return false };
        self.read_at(bytes, unit as u64).is_ok_and(|n| n == unit)
    }

    /// Makes reads go past the page cache, or not; whether that is so now.
    pub(crate) fn set_direct(&self, direct: bool) -> bool {
        match self {
            Media::File(file) => set_direct(file, direct).is_ok() && direct,
            #[cfg(test)]
            Media::Sim(_) => false,
        }
    }

    /// Tells the system that a range will not be read again soon.
    pub(crate) fn forget_cached(&self, offset: u64, len: u64) {
        match self {
            // Only advice.
            Media::File(file) => drop(posix_fadvise(
                file,
                offset.cast_signed(),
                len.cast_signed(),
                PosixFadviseAdvice::POSIX_FADV_DONTNEED,
            )),
            #[cfg(test)]
            Media::Sim(_) => {}
        }
    }

    /// Device, number on it, and names of the file: two with the same first two are one file.
    pub(crate) fn identity(&self) -> io::Result<(u64, u64, u64)> {
        use std::os::unix::fs::MetadataExt;
        match self {
            Media::File(file) => file.metadata().map(|m| (m.dev(), m.ino(), m.nlink())),
            #[cfg(test)]
            Media::Sim(sim) => Ok((0, Arc::as_ptr(sim) as u64, 1)),
        }
    }

    /// Whether the file system can make holes. Asked behind the end, where nothing can be lost.
    pub(crate) fn can_punch(&self) -> bool {
        let behind = self.len().map_or(0, |len| len.next_multiple_of(4096));
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match self {
            Media::File(_) => {
                let punched = self.fallocate(punch, behind, 4096);
                !punched.is_err_and(|e| e.raw_os_error() == Some(libc::EOPNOTSUPP))
            }
            #[cfg(test)]
            Media::Sim(_) => true,
        }
    }

    /// `fallocate` with `mode`; also what [`crate::uring`] does inline.
    pub(crate) fn fallocate(&self, mode: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        match self {
            Media::File(file) => Ok(fallocate(file, mode, offset.cast_signed(), len.cast_signed())?),
            #[cfg(test)]
            Media::Sim(sim) => sim.zero(offset, len),
        }
    }

    /// How many bytes from `at` (up to `end`) are alike, and whether they are a hole. A file system that does not
    /// know says data.
    pub(crate) fn extent_at(&self, at: u64, end: u64) -> (u64, bool) {
        match self {
            Media::File(file) => extent_at(file, at, end),
            #[cfg(test)]
            Media::Sim(_) => (end - at, false),
        }
    }

    /// Takes an open-file-description lock on the whole file. `false`: held elsewhere. The lock goes with the
    /// last descriptor of this open file, wherever that is.
    pub(crate) fn try_lock(&self, lock: Lock) -> io::Result<bool> {
        match self {
            Media::File(file) => set_lock(file, lock.kind()),
            #[cfg(test)]
            Media::Sim(_) => Ok(true),
        }
    }

    /// Gives the lock back at once: a ring that is torn down keeps its files open for some milliseconds more.
    pub(crate) fn unlock(&self) {
        match self {
            // It fails only for a closed descriptor.
            Media::File(file) => drop(set_lock(file, libc::F_UNLCK)),
            #[cfg(test)]
            Media::Sim(_) => {}
        }
    }
}

fn set_lock(file: &File, kind: libc::c_int) -> io::Result<bool> {
    let range = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    match fcntl(file, FcntlArg::F_OFD_SETLK(&range)) {
        Ok(_) => Ok(true),
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

fn set_direct(file: &File, direct: bool) -> nix::Result<()> {
    let mut flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    flags.set(OFlag::O_DIRECT, direct);
    fcntl(file, FcntlArg::F_SETFL(flags)).map(drop)
}

fn extent_at(file: &File, at: u64, end: u64) -> (u64, bool) {
    use nix::unistd::{Whence, lseek64};
    // lseek moves the file's position, which nobody uses: all I/O here names its offset.
    let seek = |whence| lseek64(file, at.cast_signed(), whence);
    match seek(Whence::SeekData) {
        Ok(data) if data.cast_unsigned() > at => (data.cast_unsigned().min(end) - at, true),
        Ok(_) => match seek(Whence::SeekHole) {
            Ok(hole) if hole.cast_unsigned() > at => (hole.cast_unsigned().min(end) - at, false),
            _ => (end - at, false),
        },
        // No data from here to the end of the file.
        Err(nix::errno::Errno::ENXIO) => (end - at, true),
        Err(_) => (end - at, false),
    }
}

/// Length of a regular file or of a block device, whose metadata say zero.
fn file_len(file: &File) -> io::Result<u64> {
    let metadata = file.metadata()?;
    if metadata.is_file() {
        return Ok(metadata.len());
    }
    use std::io::{Seek, SeekFrom};
    let mut file = file;
    file.seek(SeekFrom::End(0))
}
