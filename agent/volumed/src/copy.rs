//! Bytes into files: a reflink where the file system can, else a copy that keeps holes; and a stream, where blocks
//! of zeros become holes.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use rustix::fs::{SeekFrom, copy_file_range, ioctl_ficlone, seek};
use serio_formats::is_zero;
use serio_volume::ScrubPlace;

/// Grain at which zeros of a stream become holes, bytes.
const GRAIN: usize = 64 << 10;
const BUFFER_BYTES: usize = 1 << 20;
/// Bytes of one copy_file_range, so that progress moves.
const PIECE_BYTES: u64 = 64 << 20;

/// How far a copy is.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes done.
    pub done: AtomicU64,
    /// Bytes in all; 0 if unknown.
    pub total: AtomicU64,
    /// Of a scrub: all before it is right.
    pub scrubbed: Mutex<Option<ScrubPlace>>,
}

impl Progress {
    fn add(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// Why a copy failed.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The stream ended early, or went on.
    #[error(
        "{arrived} bytes arrived, {expected} were announced: the source changed or the transfer broke off"
    )]
    Length {
        /// Bytes that were announced.
        expected: u64,
        /// Bytes that came; at least so many, if too many.
        arrived: u64,
    },
    /// Larger than allowed.
    #[error("the image is larger than {0} bytes, the most that is allowed")]
    TooLarge(u64),
    /// Nothing came.
    #[error("the image is empty")]
    Empty,
    /// The host answered an error.
    #[error("cannot {what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The answer.
        #[source]
        source: io::Error,
    },
}

fn at<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> CopyError {
    move |source| CopyError::Io { what, source: source.into() }
}

/// Makes `to` (empty) a copy of `from`: shared blocks if the file system can, else only the data are copied and
/// holes stay holes. Nothing is synced.
pub fn clone_file(from: &File, to: &File, progress: &Progress) -> Result<u64, CopyError> {
    let mut end = from;
    let len = io::Seek::seek(&mut end, io::SeekFrom::End(0)).map_err(at("measure the source"))?;
    progress.total.store(len, Ordering::Relaxed);
    if ioctl_ficlone(to, from).is_ok() {
        progress.add(len);
        return Ok(len);
    }
    to.set_len(len).map_err(at("size the copy"))?;
    let mut position = 0;
    while position < len {
        let data = match seek(from, SeekFrom::Data(position)) {
            Ok(data) => data.min(len),
            // Only a hole is left.
            Err(rustix::io::Errno::NXIO) => len,
            // A file system that knows no holes: all is data.
            Err(_) => position,
        };
        progress.add(data - position);
        position = data;
        if position < len {
            let hole = seek(from, SeekFrom::Hole(position)).map_or(len, |hole| hole.clamp(position + 1, len));
            copy_range(from, to, position, hole - position, progress)?;
            position = hole;
        }
    }
    Ok(len)
}

fn copy_range(from: &File, to: &File, offset: u64, len: u64, progress: &Progress) -> Result<(), CopyError> {
    let (mut in_at, mut out_at) = (offset, offset);
    let end = offset + len;
    while in_at < end {
        let want = (end - in_at).min(PIECE_BYTES) as usize;
        match copy_file_range(from, Some(&mut in_at), to, Some(&mut out_at), want) {
            Ok(0) => return Err(CopyError::Length { expected: end, arrived: in_at }),
            Ok(n) => progress.add(n as u64),
            Err(rustix::io::Errno::INTR) => {}
            // Another file system or kind of file: by hand.
            Err(_) => return copy_by_hand(from, to, in_at, end, progress),
        }
    }
    Ok(())
}

fn copy_by_hand(from: &File, to: &File, start: u64, end: u64, progress: &Progress) -> Result<(), CopyError> {
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut position = start;
    while position < end {
        let want = (end - position).min(BUFFER_BYTES as u64) as usize;
        let part = buffer.get_mut(..want).unwrap_or_default();
        let n = from.read_at(part, position).map_err(at("read the source"))?;
        if n == 0 {
            return Err(CopyError::Length { expected: end, arrived: position });
        }
        to.write_all_at(part.get(..n).unwrap_or_default(), position).map_err(at("write the copy"))?;
        position += n as u64;
        progress.add(n as u64);
    }
    Ok(())
}

/// What an import found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Imported {
    /// Size of the disk, bytes: what came, up to the next multiple of 512.
    pub size_bytes: u64,
    /// Checksum of what came.
    pub blake3: [u8; 32],
}

/// Reads a raw image to its end into `to` (empty), leaving holes for zeros. `expected`: bytes that must come, 0 if
/// unknown. Syncs `to`.
pub fn import_raw(
    mut from: impl Read,
    to: &File,
    expected: u64,
    size_max: u64,
    progress: &Progress,
) -> Result<Imported, CopyError> {
    progress.total.store(expected, Ordering::Relaxed);
    if expected > size_max {
        return Err(CopyError::TooLarge(size_max));
    }
    let mut hash = blake3::Hasher::new();
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut position = 0;
    loop {
        let n = fill(&mut from, &mut buffer)?;
        let Some(part) = buffer.get(..n).filter(|part| !part.is_empty()) else { break };
        let arrived = position + n as u64;
        if expected > 0 && arrived > expected {
            return Err(CopyError::Length { expected, arrived });
        }
        if arrived > size_max {
            return Err(CopyError::TooLarge(size_max));
        }
        hash.update(part);
        for grain in part.chunks(GRAIN) {
            if !is_zero(grain) {
                to.write_all_at(grain, position).map_err(at("write the disk"))?;
            }
            position += grain.len() as u64;
            progress.add(grain.len() as u64);
        }
    }
    if expected > 0 && position != expected {
        return Err(CopyError::Length { expected, arrived: position });
    }
    if position == 0 {
        return Err(CopyError::Empty);
    }
    // A guest sees whole sectors only (virtio 1.2 §5.2.4: capacity in 512-byte sectors).
    let size_bytes = position.next_multiple_of(512);
    to.set_len(size_bytes).map_err(at("size the disk"))?;
    to.sync_all().map_err(at("sync the disk"))?;
    Ok(Imported { size_bytes, blake3: *hash.finalize().as_bytes() })
}

/// Reads until the buffer is full or the stream ends: a pipe gives little at a time.
fn fill(from: &mut impl Read, buffer: &mut [u8]) -> Result<usize, CopyError> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match from.read(rest) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(at("read the image")(e)),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn zeros_of_a_stream_become_holes() {
        let mut image = vec![0; 3 << 20];
        image[2 << 20] = 1;
        image.push(9);
        let file = tempfile::tempfile().expect("file");
        let progress = Progress::default();
        let done = import_raw(&image[..], &file, image.len() as u64, 1 << 30, &progress).expect("import");
        assert_eq!(done.size_bytes, (3 << 20) + 512);
        assert_eq!(done.blake3, *blake3::hash(&image).as_bytes());
        assert!(file.metadata().expect("metadata").blocks() * 512 < 1 << 20);
        let mut got = vec![0; image.len()];
        file.read_exact_at(&mut got, 0).expect("read");
        assert!(got == image);

        let copy = tempfile::tempfile().expect("file");
        assert_eq!(clone_file(&file, &copy, &progress).expect("copy"), done.size_bytes);
        copy.read_exact_at(&mut got, 0).expect("read");
        assert!(got == image);
        assert!(copy.metadata().expect("metadata").blocks() * 512 < 1 << 20);
    }

    #[test]
    fn lengths_are_checked() {
        let file = || tempfile::tempfile().expect("file");
        let import =
            |bytes: &[u8], expected, max| import_raw(bytes, &file(), expected, max, &Progress::default());
        assert!(matches!(import(&[1; 10], 11, 100), Err(CopyError::Length { expected: 11, arrived: 10 })));
        assert!(matches!(import(&[1; 10], 9, 100), Err(CopyError::Length { .. })));
        assert!(matches!(import(&[1; 10], 0, 9), Err(CopyError::TooLarge(9))));
        assert!(matches!(import(&[1; 10], 10, 9), Err(CopyError::TooLarge(9))));
        assert!(matches!(import(&[], 0, 9), Err(CopyError::Empty)));
    }
}
