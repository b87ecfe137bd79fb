//! A disk image into a file: data where there are data, holes where there are zeros, a checksum of the whole.

use std::{fs::File, io, os::unix::fs::FileExt, sync::atomic::Ordering};

use serio_formats::{FormatError, GRAIN, Image, is_zero};

use crate::copy::{Imported, Progress};

/// Bytes that are read at once: several pieces of an NBD client are under way then.
const BUFFER_BYTES: u64 = 8 << 20;
static ZEROS: [u8; 1 << 20] = [0; 1 << 20];

/// Why a conversion failed.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// The image.
    #[error("cannot read the image")]
    Image(#[from] FormatError),
    /// The host.
    #[error("cannot {what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The answer.
        #[source]
        source: io::Error,
    },
    /// Somebody asked to stop. What was said by the last step is on disk.
    #[error("stopped half-way")]
    Stopped,
}

fn at(what: &'static str) -> impl FnOnce(io::Error) -> ConvertError {
    move |source| ConvertError::Io { what, source }
}

/// A checksum of a disk that is read in order.
#[derive(Debug, Clone)]
pub struct Sum(Option<blake3::Hasher>);

impl Sum {
    /// Of nothing yet. Without `wanted`, nothing is ever computed.
    pub fn new(wanted: bool) -> Sum {
        Sum(wanted.then(blake3::Hasher::new))
    }
    /// The next bytes.
    pub fn data(&mut self, bytes: &[u8]) {
        if let Some(hasher) = &mut self.0 {
            hasher.update(bytes);
        }
    }
    /// So many zeros; `Err` when `stop` says so meanwhile.
    pub fn zeros(&mut self, len: u64, mut stop: impl FnMut() -> bool) -> Result<(), ConvertError> {
        let Some(hasher) = &mut self.0 else { return Ok(()) };
        let mut left = len;
        while left > 0 {
            let part = left.min(ZEROS.len() as u64) as usize;
            hasher.update(ZEROS.get(..part).unwrap_or_default());
            left -= part as u64;
            if stop() {
                return Err(ConvertError::Stopped);
            }
        }
        Ok(())
    }
    /// What it is now.
    pub fn value(&self) -> Option<[u8; 32]> {
        self.0.as_ref().map(|hasher| *hasher.finalize().as_bytes())
    }
}

/// What the caller does between two steps.
pub trait Steps {
    /// All below `done` is in the file (not synced). `Err` ends the conversion.
    fn step(&mut self, done: u64, sum: &Sum) -> Result<(), ConvertError>;
    /// Whether to stop soon.
    fn stops(&self) -> bool;
}

/// Nobody stops it, nobody counts.
#[derive(Debug, Clone, Copy)]
pub struct Unwatched;

impl Steps for Unwatched {
    fn step(&mut self, _: u64, _: &Sum) -> Result<(), ConvertError> {
        Ok(())
    }
    fn stops(&self) -> bool {
        false
    }
}

/// Where a conversion begins: at 0, or where an earlier one came to.
#[derive(Debug, Clone)]
pub struct Start {
    /// First byte that is not done.
    pub offset: u64,
    /// The checksum of what is.
    pub sum: Sum,
}

/// Puts the image into `to`, in which all from `start` on is a hole or was written by an earlier attempt at the same image.
/// Sizes and syncs it.
pub fn convert(
    image: &mut dyn Image,
    to: &File,
    start: Start,
    progress: &Progress,
    steps: &mut dyn Steps,
) -> Result<Imported, ConvertError> {
    let size = image.size_bytes();
    let Start { mut offset, mut sum } = start;
    progress.total.store(size, Ordering::Relaxed);
    progress.done.store(offset, Ordering::Relaxed);
    let size_bytes = size.next_multiple_of(512);
    to.set_len(size_bytes).map_err(at("size the disk"))?;
    let mut buffer = Vec::new();
    while offset < size {
        let run = image.run(offset)?;
        let left = size.saturating_sub(offset);
        let len = if run.zero { run.len.min(left) } else { run.len.min(left).min(BUFFER_BYTES) };
        if run.zero {
            sum.zeros(len, || steps.stops())?;
        } else {
            buffer.resize(len as usize, 0);
            image.read(offset, &mut buffer)?;
            sum.data(&buffer);
            write_sparse(to, offset, &buffer)?;
        }
        offset = offset.saturating_add(len);
        progress.done.store(offset, Ordering::Relaxed);
        steps.step(offset, &sum)?;
        if steps.stops() {
            return Err(ConvertError::Stopped);
        }
    }
    to.sync_all().map_err(at("sync the disk"))?;
    Ok(Imported { size_bytes, blake3: sum.value().unwrap_or_default() })
}

/// Writes what is not zeros, in stretches as long as they are.
fn write_sparse(to: &File, offset: u64, data: &[u8]) -> Result<(), ConvertError> {
    let grains = data.chunks(GRAIN).map(is_zero).collect::<Vec<bool>>();
    let mut at_grain = 0;
    for stretch in grains.chunk_by(|a, b| a == b) {
        let start = at_grain * GRAIN;
        at_grain += stretch.len();
        if stretch.first() == Some(&false) {
            let end = (at_grain * GRAIN).min(data.len());
            let part = data.get(start..end).unwrap_or_default();
            to.write_all_at(part, offset.saturating_add(start as u64)).map_err(at("write the disk"))?;
        }
    }
    Ok(())
}

/// The checksum of the first `len` bytes of a file, holes without reading them.
pub fn sum_of(file: &File, len: u64, progress: &Progress) -> Result<Sum, ConvertError> {
    let mut sum = Sum::new(true);
    let read = || -> io::Result<File> { file.try_clone() };
    let source = serio_formats::source::Source::new(read().map_err(at("read the disk"))?)
        .map_err(at("read the disk"))?;
    let mut image = serio_formats::raw::RawFile::open(source)?;
    let (mut offset, mut buffer) = (0, Vec::new());
    progress.total.store(len, Ordering::Relaxed);
    while offset < len {
        let run = image.run(offset)?;
        let left = len.saturating_sub(offset);
        let n = if run.zero { run.len.min(left) } else { run.len.min(left).min(BUFFER_BYTES) };
        if run.zero {
            sum.zeros(n, || false)?;
        } else {
            buffer.resize(n as usize, 0);
            image.read(offset, &mut buffer)?;
            sum.data(&buffer);
        }
        offset = offset.saturating_add(n);
        progress.done.store(offset, Ordering::Relaxed);
    }
    Ok(sum)
}
