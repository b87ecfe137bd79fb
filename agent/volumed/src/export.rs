//! A volume behind the NBD server's seam ([`serio_nbd::Backend`]).

use std::{io, os::fd::BorrowedFd};

use serio_nbd::{
    Backend, Command, ExportInfo, Payload, Queue,
    wire::{STATE_HOLE, STATE_ZERO},
};
use serio_volume::{Buffers, IoQueue, Op, Volume};

/// A volume that is exported.
#[derive(Debug)]
pub struct VolumeExport {
    volume: Volume,
    info: ExportInfo,
}

impl VolumeExport {
    /// Exports `volume` as `name`; it is read-only if the volume is.
    pub fn new(volume: Volume, name: &str, description: &str) -> VolumeExport {
        let info = ExportInfo {
            name: name.to_owned(),
            description: description.to_owned(),
            size_bytes: volume.size_bytes(),
            read_only: volume.is_read_only(),
            // With a map zeroes are marks in it; what a raw file's file system does is unknown.
            fast_zeroes: volume.head_header().is_some(),
            contexts: vec!["base:allocation".to_owned()],
        };
        VolumeExport { volume, info }
    }
}

impl Backend for VolumeExport {
    type Queue = ExportQueue;

    fn info(&self) -> ExportInfo {
        self.info.clone()
    }

    fn open(&self, depth: u16) -> io::Result<ExportQueue> {
        Ok(ExportQueue { queue: self.volume.queue(depth)?, volume: self.volume.clone() })
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
            Command::Trim { offset, len } => Op::Discard { offset, len },
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
        self.queue.reap(|tag, result, buffers| {
            let payload = (!buffers.is_empty()).then_some(Memory(buffers));
            each(tag, result.map_err(|e| e.errno()), payload);
        });
    }

    fn event_fd(&self) -> BorrowedFd<'_> {
        self.queue.event_fd()
    }

    fn status(&mut self, _context: usize, offset: u64, len: u64, mut each: impl FnMut(u64, u32) -> bool) {
        self.volume.extents(offset, len, |extent| {
            each(extent.len, if extent.hole { STATE_HOLE | STATE_ZERO } else { 0 })
        });
    }
}
