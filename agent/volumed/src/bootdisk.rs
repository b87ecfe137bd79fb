//! The job that finds what a volume boots with. What it reads is a tenant's: by now the process is sealed, another user
//! without a way to open anything, so that nothing but this job can suffer from it.

use std::{cell::RefCell, fs::File, io, os::fd::OwnedFd, sync::atomic::Ordering};

use serio_bootdisk::{FindError, Found, ReadAt, fs::FsError};
use serio_control::message::{Body, Code, Failed, FindKernel, FoundKernel};
use serio_volume::{Access, Buffers, IoQueue, Op, Volume};

use crate::{
    copy::Progress,
    jobs::{JobResult, failed, invalid, io_code, layers, open_failed},
    layers::secret,
};

/// Reads are made in whole blocks of the volume, so that small ones cost little.
const PIECE_BYTES: u64 = 64 * 1024;

/// A volume behind the finder's seam; keeps the piece that was read last.
struct VolumeBytes {
    size: u64,
    queue: RefCell<IoQueue>,
    piece: RefCell<(u64, Buffers)>,
}

impl VolumeBytes {
    fn new(volume: &Volume) -> io::Result<Self> {
        let piece = RefCell::new((u64::MAX, Buffers::owned(0)));
        Ok(Self { size: volume.size_bytes(), queue: RefCell::new(volume.queue(1)?), piece })
    }

    /// Copies what is in one piece.
    fn read_piece(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let start = offset / PIECE_BYTES * PIECE_BYTES;
        let mut piece = self.piece.borrow_mut();
        if piece.0 != start {
            let len = usize::try_from(PIECE_BYTES.min(self.size - start)).map_err(io::Error::other)?;
            let op = Op::Read { offset: start, buffers: Buffers::owned(len) };
            let (result, buffers) = self.queue.borrow_mut().run(op);
            result.map_err(io::Error::other)?;
            *piece = (start, buffers);
        }
        let at = usize::try_from(offset - start).map_err(io::Error::other)?;
        let bytes = piece.1.as_slice().and_then(|bytes| bytes.get(at..at.checked_add(buf.len())?));
        buf.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

impl ReadAt for VolumeBytes {
    fn size_bytes(&self) -> u64 {
        self.size
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        if offset.checked_add(buf.len() as u64).is_none_or(|end| end > self.size) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let (mut at, mut left) = (offset, buf);
        while !left.is_empty() {
            let room = usize::try_from(PIECE_BYTES - at % PIECE_BYTES).map_err(io::Error::other)?;
            let (part, rest) = left.split_at_mut(room.min(left.len()));
            self.read_piece(part, at)?;
            at += part.len() as u64;
            left = rest;
        }
        Ok(())
    }
}

/// Finds, and copies out.
pub fn find_kernel(ask: &FindKernel, mut descriptors: Vec<OwnedFd>, progress: &Progress) -> JobResult {
    if descriptors.len() < 2 {
        return Err(invalid("descriptors", "the files for the kernel and the initrds are missing"));
    }
    let rest = descriptors.split_off(2);
    let mut outputs = descriptors.into_iter().map(File::from);
    let (Some(mut kernel), Some(mut initrd)) = (outputs.next(), outputs.next()) else {
        return Err(invalid("descriptors", "the files for the kernel and the initrds are missing"));
    };
    let key = secret(ask.key.as_ref())?;
    let volume = Volume::open_with_key(layers(rest)?, Access::ReadOnly, key.as_ref()).map_err(open_failed)?;
    let bytes = VolumeBytes::new(&volume).map_err(|e| failed(io_code(&e), "", &e))?;
    let found = serio_bootdisk::find(Box::new(bytes)).map_err(find_failed)?;
    let moved = |bytes: u64| {
        progress.done.fetch_add(bytes, Ordering::Relaxed);
    };
    let kernel_bytes = found.write_kernel(&mut kernel, ask.kernel_bytes_max).map_err(find_failed)?;
    moved(kernel_bytes);
    let initrd_bytes = found.write_initrd(&mut initrd, ask.initrd_bytes_max).map_err(find_failed)?;
    moved(initrd_bytes);
    Ok(Body::FoundKernel(answer(found, kernel_bytes, initrd_bytes)))
}

fn answer(found: Found, kernel_bytes: u64, initrd_bytes: u64) -> FoundKernel {
    let cmdline = found.entry.cmdline_with_console();
    let entry = found.entry;
    FoundKernel {
        kernel_path: entry.kernel.path,
        version: entry.version,
        title: entry.title,
        source: entry.source,
        partition: entry.partition,
        cmdline,
        kernel_bytes,
        initrd_bytes,
        initrd_paths: entry.initrds.into_iter().map(|file| file.path).collect(),
    }
}

fn find_failed(error: FindError) -> Failed {
    match &error {
        FindError::Read { source: FsError::Write(source), .. } => failed(io_code(source), "", &error),
        _ => failed(Code::Precondition, "kernel", &error),
    }
}
