//! A volume behind the NBD server's seam ([`serio_nbd::Backend`]).
//!
//! Metadata contexts: `base:allocation`, and `qemu:dirty-bitmap:NAME` for each snapshot NAME below what is exported:
//! what has changed since, for incremental copies.

use std::{
    fs::File,
    io::{self, IoSliceMut},
    num::NonZeroU64,
    os::fd::BorrowedFd,
    sync::Arc,
};

use rustix::{
    fs::{Advice, fadvise},
    io::{ReadWriteFlags, preadv2},
};
use serio_nbd::{
    Backend, Command, ExportInfo, Payload, Queue, Run,
    wire::{STATE_DIRTY, STATE_HOLE, STATE_ZERO},
};
use serio_volume::{Buffers, FileRun, IoError, IoQueue, Op, Release, Volume};

/// Extents of changes that are looked up at once.
const CHANGES_MAX: usize = 512;

/// Runs of one read that is sent from files; a more fragmented one is copied.
const RUNS_MAX: usize = 64;
/// Runs of data are at least so long on average, or the read is copied: each costs a call.
const RUN_BYTES_MIN: u64 = 16 << 10;

/// A volume that is exported.
#[derive(Debug)]
pub struct VolumeExport {
    volume: Volume,
    info: ExportInfo,
    /// The snapshots behind the contexts, from the second context on.
    since: Arc<[String]>,
    release: Option<Arc<Release>>,
}

impl VolumeExport {
    /// TRIM gives back what only this point holds.
    #[must_use]
    pub fn releasing(mut self, release: Release) -> VolumeExport {
        self.release = Some(Arc::new(release));
        self.info.releases = true;
        self
    }

    /// Exports `volume` as `name`; it is read-only if the volume is.
    pub fn new(volume: Volume, name: &str, description: &str) -> VolumeExport {
        let known = volume.snapshots().into_iter().map(|s| s.name);
        let since: Arc<[String]> = known.filter(|name| volume.knows_changes_since(name)).collect();
        let bitmaps = since.iter().map(|name| format!("qemu:dirty-bitmap:{name}"));
        let info = ExportInfo {
            name: name.to_owned(),
            description: description.to_owned(),
            size_bytes: volume.size_bytes(),
            read_only: volume.is_read_only(),
            releases: false,
            // With a map zeroes are marks in it; what a raw file's file system does is unknown.
            fast_zeroes: volume.head_header().is_some(),
            contexts: std::iter::once("base:allocation".to_owned()).chain(bitmaps).collect(),
        };
        VolumeExport { volume, info, since, release: None }
    }
}

impl Backend for VolumeExport {
    type Queue = ExportQueue;

    fn info(&self) -> ExportInfo {
        self.info.clone()
    }

    fn open(&self, depth: u16) -> io::Result<ExportQueue> {
        let (queue, since) = (self.volume.queue(depth)?, Arc::clone(&self.since));
        let (volume, release) = (self.volume.clone(), self.release.clone());
        Ok(ExportQueue { queue, volume, since, found: Vec::new(), release, refused: Vec::new() })
    }
}

/// Memory of a request.
#[derive(Debug)]
pub struct Memory(Buffers);

impl Payload for Memory {
    fn bytes(&self) -> &[u8] {
        // Always owned memory here.
        self.0.as_slice().unwrap_or_default()
    }
    fn bytes_mut(&mut self) -> &mut [u8] {
        self.0.as_mut_slice().unwrap_or_default()
    }
    fn resize(&mut self, len: usize) {
        self.0.resize_owned(len);
    }
}

/// One connection's queue.
#[derive(Debug)]
pub struct ExportQueue {
    queue: IoQueue,
    volume: Volume,
    since: Arc<[String]>,
    found: Vec<FileRun>,
    release: Option<Arc<Release>>,
    /// Releases that failed: tags, and why. They are answered when their turn comes.
    refused: Vec<(u64, i32)>,
}

/// Has a part of a file read ahead unless its ends are in memory already, as all between them mostly is then.
fn read_ahead(file: &File, offset: u64, len: u64) {
    let mut byte = [0];
    let mut is_here = |at| {
        let mut buffers = [IoSliceMut::new(&mut byte)];
        // A file system that cannot tell is let alone.
        preadv2(file, &mut buffers, at, ReadWriteFlags::NOWAIT) != Err(rustix::io::Errno::AGAIN)
    };
    if !(is_here(offset) && is_here(offset.saturating_add(len.saturating_sub(1)))) {
        // Only advice: the read itself says what is wrong.
        let _ = fadvise(file, offset, NonZeroU64::new(len), Advice::WillNeed);
    }
}

impl ExportQueue {
    /// What has changed since a snapshot. All, should it be gone meanwhile: too much is copied then, never too little.
    fn changes(&self, since: &str, offset: u64, len: u64, each: &mut impl FnMut(u64, u32) -> bool) {
        let (mut at, end) = (offset, offset.saturating_add(len));
        while at < end {
            let found = self.volume.changed_extents(since, at, end - at, CHANGES_MAX).unwrap_or_default();
            if found.is_empty() {
                each(end - at, STATE_DIRTY);
                return;
            }
            for extent in found {
                if !each(extent.len, if extent.dirty { STATE_DIRTY } else { 0 }) {
                    return;
                }
                at = extent.offset.saturating_add(extent.len);
            }
        }
    }
}

impl Queue for ExportQueue {
    type Payload = Memory;

    fn payload(&mut self, len: usize) -> Memory {
        Memory(Buffers::owned(len))
    }

    fn submit(&mut self, tag: u64, command: Command<Memory>) {
        let op = match command {
            Command::Read { offset, payload } => Op::Read { offset, buffers: payload.0 },
            Command::Write { offset, payload, fua } => Op::Write { offset, buffers: payload.0, fua },
            Command::Flush => Op::Flush,
            Command::Trim { offset, len } => match &self.release {
                None => Op::Discard { offset, len },
                Some(release) => {
                    if let Err(error) = release.release(&self.volume, offset, len) {
                        self.refused.push((tag, error.errno()));
                    }
                    // It is durable already; this only has it answered.
                    Op::Flush
                }
            },
            Command::WriteZeroes { offset, len, may_hole } => {
                Op::WriteZeroes { offset, len, unmap: may_hole }
            }
        };
        self.queue.submit(tag, op).expect("the server never exceeds the depth that it opened the queue with");
    }

    fn kick(&mut self) {
        self.queue.kick();
    }

    fn reap(&mut self, mut each: impl FnMut(u64, Result<(), i32>, Option<Memory>)) {
        let refused = &mut self.refused;
        self.queue.reap(|tag, mut result, buffers| {
            if let Some(at) = refused.iter().position(|(refused, _)| *refused == tag) {
                let (_, errno) = refused.swap_remove(at);
                result = Err(IoError::Host { what: "release", errno });
            }
            let payload = (!buffers.is_empty()).then_some(Memory(buffers));
            each(tag, result.map_err(|e| e.errno()), payload);
        });
    }

    fn event_fd(&self) -> BorrowedFd<'_> {
        self.queue.event_fd()
    }

    fn runs(&mut self, offset: u64, len: u64, runs: &mut Vec<Run>) -> bool {
        self.found.clear();
        if !self.queue.runs(offset, len, RUNS_MAX, &mut self.found) {
            return false;
        }
        let (mut pieces, mut bytes) = (0, 0);
        for run in self.found.drain(..) {
            runs.push(match run {
                FileRun::Zeros { len } => Run::Zeros { len },
                FileRun::File { file, offset, len } => {
                    (pieces, bytes) = (pieces + 1, bytes + len);
                    Run::File { file, offset, len }
                }
            });
        }
        if bytes < pieces * RUN_BYTES_MIN {
            return false;
        }
        for run in runs.iter() {
            if let Run::File { file, offset, len } = run {
                read_ahead(file, *offset, *len);
            }
        }
        true
    }

    fn status(&mut self, context: usize, offset: u64, len: u64, mut each: impl FnMut(u64, u32) -> bool) {
        match context.checked_sub(1).and_then(|i| self.since.get(i)) {
            Some(since) => self.changes(since, offset, len, &mut each),
            None => self.volume.extents(offset, len, |extent| {
                each(extent.len, if extent.hole { STATE_HOLE | STATE_ZERO } else { 0 })
            }),
        }
    }
}
