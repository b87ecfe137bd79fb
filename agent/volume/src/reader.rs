//! Reading a sealed data file from the disk, at a pace: what a scrub is for lies there, not in the page cache.
//!
//! O_DIRECT reads see what the disk has, and take nothing away from what guests have cached. A file system without it
//! (mostly one in memory) is read through the cache, and what was read is dropped behind. The flag belongs to the open
//! file, so it is taken back in the end.

use std::{
    io,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use crate::{header::BLOCK_BYTES, media::Media};

/// Longest sleep between two looks at `cancel`.
const NAP: Duration = Duration::from_millis(50);

/// Bytes a second, and whether to go on at all.
pub(crate) struct Pace<'a> {
    bytes_per_s: u64,
    cancel: &'a AtomicBool,
    start: Instant,
    read_bytes: u64,
}

impl<'a> Pace<'a> {
    /// `bytes_per_s` 0: as fast as it goes.
    pub(crate) fn new(bytes_per_s: u64, cancel: &'a AtomicBool) -> Pace<'a> {
        Pace { bytes_per_s, cancel, start: Instant::now(), read_bytes: 0 }
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancel.load(Ordering::Relaxed)
    }

    /// Counts, and sleeps until so many may have been read.
    fn spend(&mut self, bytes: u64) {
        self.read_bytes = self.read_bytes.saturating_add(bytes);
        while self.bytes_per_s > 0 && !self.is_cancelled() {
            let due = Duration::from_secs_f64(self.read_bytes as f64 / self.bytes_per_s as f64);
            let early = due.saturating_sub(self.start.elapsed());
            if early.is_zero() {
                break;
            }
            std::thread::sleep(early.min(NAP));
        }
    }
}

/// See the head of this file.
pub(crate) struct Reader<'a> {
    media: &'a Media,
    direct: bool,
    /// With room to start at a multiple of a block.
    memory: Vec<u8>,
}

impl<'a> Reader<'a> {
    /// Reads of at most `bytes_max`.
    pub(crate) fn new(media: &'a Media, bytes_max: u64) -> Reader<'a> {
        let direct = media.set_direct(true);
        let bytes = bytes_max.next_multiple_of(BLOCK_BYTES) + BLOCK_BYTES;
        Reader { media, direct, memory: vec![0; bytes as usize] }
    }

    /// Reads the bytes `[offset, offset + len)`, for [`Reader::bytes`]; `offset` is a multiple of a block.
    pub(crate) fn read(&mut self, offset: u64, len: u64, pace: &mut Pace<'_>) -> io::Result<()> {
        let skip = self.skip();
        let whole = len.next_multiple_of(BLOCK_BYTES) as usize;
        let memory = self.memory.get_mut(skip..skip + whole).ok_or(io::ErrorKind::InvalidInput)?;
        let mut at = 0;
        while at < len as usize {
            match self.media.read_at(&mut memory[at..], offset + at as u64) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => at += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // Refused for its alignment: this file system wants more, or has read a part and cannot go on there.
                Err(e) if self.direct && e.raw_os_error() == Some(libc::EINVAL) => {
                    self.direct = self.media.set_direct(false);
                }
                Err(e) => return Err(e),
            }
        }
        if !self.direct {
            self.media.forget_cached(offset, len);
        }
        pace.spend(len);
        Ok(())
    }

    /// The first `len` bytes of what was read last.
    pub(crate) fn bytes(&self, len: u64) -> &[u8] {
        let skip = self.skip();
        self.memory.get(skip..skip + len as usize).unwrap_or_default()
    }

    fn skip(&self) -> usize {
        self.memory.as_ptr().align_offset(BLOCK_BYTES as usize)
    }
}

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        self.media.set_direct(false);
    }
}
