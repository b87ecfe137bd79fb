//! The seam to whatever holds the bytes. This crate knows no volumes; `serio-volumed` implements these traits.

use std::{fs::File, io, os::fd::BorrowedFd, sync::Arc};

/// What a client is told about an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportInfo {
    /// Its name; clients must give exactly this.
    pub name: String,
    /// For people; may be empty.
    pub description: String,
    /// Size, bytes.
    pub size_bytes: u64,
    /// Changes are refused.
    pub read_only: bool,
    /// Of a read-only export: TRIM is taken all the same, for what need not be read from it any more.
    pub releases: bool,
    /// Zeroes never cost as much as writing them. Where this is unknown, clients that insist are refused.
    pub fast_zeroes: bool,
    /// Metadata contexts, by position: `base:allocation` first.
    pub contexts: Vec<String>,
}

/// Memory of one request.
pub trait Payload {
    /// The bytes.
    fn bytes(&self) -> &[u8];
    /// The bytes, to be filled.
    fn bytes_mut(&mut self) -> &mut [u8];
    /// Makes it `len` bytes long, reusing its memory where that suffices. What it holds is unspecified.
    fn resize(&mut self, len: usize);
}

/// One operation. A backend may assume that its range lies within the export.
#[derive(Debug)]
pub enum Command<P> {
    /// Fill the payload from `offset`.
    Read {
        /// First byte.
        offset: u64,
        /// As long as what is read.
        payload: P,
    },
    /// Write the payload at `offset`.
    Write {
        /// First byte.
        offset: u64,
        /// What is written.
        payload: P,
        /// Durable before the answer.
        fua: bool,
    },
    /// What was answered before is durable after, on every connection of the export.
    Flush,
    /// The range is not needed any more.
    Trim {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// The range reads as zeros.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Space may be freed.
        may_hole: bool,
    },
}

/// Where a run of an export's bytes is.
#[derive(Debug, Clone)]
pub enum Run {
    /// In a file, from `offset`, `len` bytes.
    File {
        /// The file; it need not be looked at again, whatever becomes of the export.
        file: Arc<File>,
        /// First byte in it.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Nowhere: so many zeros.
    Zeros {
        /// Bytes.
        len: u64,
    },
}

/// Operations of one connection: submitted, kicked, reaped by its thread.
pub trait Queue {
    /// Memory of requests.
    type Payload: Payload;

    /// Memory for a request of `len` bytes.
    fn payload(&mut self, len: usize) -> Self::Payload;
    /// Takes an operation. The connection never has more under way than [`Backend::open`] was told.
    fn submit(&mut self, tag: u64, command: Command<Self::Payload>);
    /// Starts what was submitted.
    fn kick(&mut self);
    /// Gives back what is done, with an errno of the host if it failed.
    fn reap(&mut self, each: impl FnMut(u64, Result<(), i32>, Option<Self::Payload>));
    /// Readable when [`Queue::reap`] has something to do.
    fn event_fd(&self) -> BorrowedFd<'_>;
    /// Appends where the bytes of a range are, in order, and has them read ahead; false when they cannot be sent as they
    /// lie in files, or should not, and then `runs` means nothing. What is written to the range until the runs were sent
    /// may or may not be seen.
    fn runs(&mut self, offset: u64, len: u64, runs: &mut Vec<Run>) -> bool {
        let _ = (offset, len, runs);
        false
    }
    /// Calls `each(length, flags)` for the extents of a range in a context, in order, until it returns false.
    fn status(&mut self, context: usize, offset: u64, len: u64, each: impl FnMut(u64, u32) -> bool);
}

/// An export.
pub trait Backend: Send + Sync + 'static {
    /// See [`Queue`].
    type Queue: Queue;

    /// What clients are told.
    fn info(&self) -> ExportInfo;
    /// A queue for one connection with at most `depth` operations under way.
    fn open(&self, depth: u16) -> io::Result<Self::Queue>;
}
