//! The kernel of a VM: files of its image, or what its root volume boots with.
//!
//! The volume is the tenant's, so its bytes are read by a job of `serio-volumed`, another user by then, into files in
//! memory that only we name. It is killed when it takes too long: a hostile volume costs one start of its own VM.

use std::{os::fd::OwnedFd, path::Path, time::Duration};

use rustix::fs::{MemfdFlags, memfd_create};
use serio_control::{
    ChannelError,
    message::{Body, FindKernel, FoundKernel},
};
use serio_types::BootedKernel;
use uuid::Uuid;

use super::{
    FileError, Inner, JobError, LaunchError, TalkError,
    files::{self, Descriptors},
    jobs,
};

/// How long the search and the copies may take, on a slow disk of a busy host.
const FIND_WAIT: Duration = Duration::from_secs(180);
const KERNEL_BYTES_MAX: u64 = 256 << 20;
const INITRD_BYTES_MAX: u64 = 512 << 20;
/// The user that the job becomes: nobody.
const NOBODY: u32 = 65_534;

/// What a VMM loads.
pub(super) struct Kernel {
    pub(super) kernel: OwnedFd,
    pub(super) initrd: Option<OwnedFd>,
}

impl Kernel {
    /// Of files.
    pub(super) fn open(kernel: &Path, initrd: Option<&Path>) -> Result<Self, LaunchError> {
        Ok(Self {
            kernel: files::open(kernel, true).map_err(LaunchError::Kernel)?.into(),
            initrd: match initrd {
                Some(path) => Some(files::open(path, true).map_err(LaunchError::Initrd)?.into()),
                None => None,
            },
        })
    }
}

fn memory_file(name: &str) -> Result<OwnedFd, FileError> {
    memfd_create(name, MemfdFlags::CLOEXEC).map_err(|e| FileError::at("make", "a file in memory")(e.into()))
}

fn duplicate(file: &OwnedFd) -> Result<OwnedFd, FileError> {
    file.try_clone().map_err(FileError::at("duplicate", "a descriptor"))
}

/// Of a volume that no process has open; the caller keeps it so. A `cmdline` replaces the one that is found.
pub(super) async fn find(
    inner: &Inner,
    volume: Uuid,
    cmdline: &str,
) -> Result<(Kernel, BootedKernel), JobError> {
    let (kernel, initrd) = (memory_file("kernel")?, memory_file("initrd")?);
    let mut descriptors = Descriptors::default();
    descriptors.push(duplicate(&kernel)?);
    descriptors.push(duplicate(&initrd)?);
    descriptors.push_volume(&inner.volume_dir(volume), volume, true)?;
    let body = Body::FindKernel(FindKernel {
        volume_id: volume.to_string(),
        key: inner.key_of(volume).await?,
        kernel_bytes_max: KERNEL_BYTES_MAX,
        initrd_bytes_max: INITRD_BYTES_MAX,
        uid: if rustix::process::geteuid().is_root() { NOBODY } else { 0 },
    });
    // Dropped half-way, the job is killed.
    let found = match tokio::time::timeout(FIND_WAIT, jobs::run(inner, body, descriptors)).await {
        Ok(found) => found?,
        Err(_) => {
            let process = "serio-volumed, which looked for a kernel on the root disk,".to_owned();
            return Err(TalkError::Silent { process, waited: FIND_WAIT }.into());
        }
    };
    let Body::FoundKernel(found) = found else {
        return Err(TalkError::from(ChannelError::Unexpected).into());
    };
    for file in [&kernel, &initrd] {
        // The job has left the position at the end, and it goes with the descriptor.
        rustix::fs::seek(file, rustix::fs::SeekFrom::Start(0))
            .map_err(|e| FileError::at("rewind", "a file in memory")(e.into()))?;
    }
    let initrd = (found.initrd_bytes > 0).then_some(initrd);
    let booted = booted(found, cmdline);
    tracing::info!(%volume, kernel = booted.path, source = booted.source, "a kernel was found");
    Ok((Kernel { kernel, initrd }, booted))
}

/// The texts are the tenant's: what a terminal would obey is left out, and they are kept short.
fn booted(found: FoundKernel, cmdline: &str) -> BootedKernel {
    let plain = |text: String| text.chars().filter(|c| !c.is_control()).take(256).collect();
    BootedKernel {
        path: plain(found.kernel_path),
        version: plain(found.version),
        title: plain(found.title),
        source: plain(found.source),
        partition: found.partition,
        cmdline: if cmdline.is_empty() { found.cmdline } else { cmdline.to_owned() },
    }
}
