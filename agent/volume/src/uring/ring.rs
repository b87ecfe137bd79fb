//! One io_uring: registered files, a registered eventfd, batched submission.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use io_uring::{IoUring, opcode, types};
use libc::iovec;

use super::{Answer, Io};
use crate::media::Media;

/// Registered files a ring; layers beyond are used by plain descriptors.
const FIXED_FILES: u32 = 64;

/// One submission entry. A macro, since the two kinds of file are two types without a public trait.
macro_rules! entry {
    ($file:expr, $io:expr, $iovecs:expr) => {
        match ($io, $iovecs) {
            (Io::Read { offset, .. }, [one]) => {
                opcode::Read::new($file, one.iov_base.cast(), bytes_of(one)).offset(*offset).build()
            }
            (Io::Write { offset, .. }, [one]) => {
                opcode::Write::new($file, one.iov_base.cast(), bytes_of(one)).offset(*offset).build()
            }
            (Io::Read { offset, .. }, many) => {
                opcode::Readv::new($file, many.as_ptr(), many.len() as u32).offset(*offset).build()
            }
            (Io::Write { offset, .. }, many) => {
                opcode::Writev::new($file, many.as_ptr(), many.len() as u32).offset(*offset).build()
            }
            (Io::SyncData { .. }, _) => opcode::Fsync::new($file).flags(types::FsyncFlags::DATASYNC).build(),
            (Io::Allocate { mode, offset, len, .. }, _) => {
                opcode::Fallocate::new($file, *len).offset(*offset).mode(*mode).build()
            }
        }
    };
}

/// Length of a single segment, capped: what exceeds the cap comes back as a short count and is asked again.
fn bytes_of(segment: &iovec) -> u32 {
    segment.iov_len.min(1 << 30) as u32
}

pub(super) struct Ring {
    ring: IoUring,
    fixed: u32,
}

impl Ring {
    /// A ring for `slots` operations of which each may have a few primitives under way.
    pub(super) fn new(slots: u32, event: BorrowedFd<'_>) -> io::Result<Ring> {
        let entries = slots.next_power_of_two().clamp(8, 4096);
        let mut builder = IoUring::builder();
        builder.setup_clamp().setup_cqsize(entries * 8);
        // Answers are taken when this queue's thread enters the kernel anyway: nobody has to interrupt it for each. Since Linux 5.19.
        let polite = builder.clone().setup_coop_taskrun().setup_taskrun_flag().build(entries);
        let ring = polite.or_else(|_| builder.build(entries))?;
        // Without these two features of Linux 5.5 memory and completions would need other care.
        if !(ring.params().is_feature_submit_stable() && ring.params().is_feature_nodrop()) {
            return Err(io::Error::from_raw_os_error(libc::ENOSYS));
        }
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        let fixed = ring.submitter().register_files_sparse(FIXED_FILES).map_or(0, |()| FIXED_FILES);
        Ok(Ring { ring, fixed })
    }

    pub(super) fn set_files(&mut self, files: &[Media]) {
        let mut fds = vec![-1; self.fixed as usize];
        for (slot, media) in fds.iter_mut().zip(files) {
            *slot = raw(media);
        }
        if self.fixed > 0 && self.ring.submitter().register_files_update(0, &fds).is_err() {
            // Not an error for the user: plain descriptors do the same a little slower.
            self.fixed = 0;
        }
    }

    pub(super) fn is_full(&mut self) -> bool {
        self.ring.submission().is_full()
    }

    /// Queues one primitive; there must be room.
    ///
    /// # Safety
    /// `iovecs` must stay in place until the next submission has succeeded, and what they point to until the
    /// answer was polled.
    pub(super) unsafe fn push(&mut self, slot: u32, token: u32, io: &Io, iovecs: &[iovec], files: &[Media]) {
        let file = match *io {
            Io::Read { file, .. }
            | Io::Write { file, .. }
            | Io::SyncData { file }
            | Io::Allocate { file, .. } => file,
        };
        let entry = if file < self.fixed {
            entry!(types::Fixed(file), io, iovecs)
        } else {
            entry!(types::Fd(raw(&files[file as usize])), io, iovecs)
        };
        let entry = entry.user_data((u64::from(slot) << 32) | u64::from(token));
        // SAFETY: the caller vouches for the memory.
        unsafe { self.ring.submission().push(&entry) }.expect("the driver makes room first");
    }

    /// Submits; true when the submission queue is empty afterwards.
    pub(super) fn submit(&mut self) -> bool {
        if self.ring.submission().is_empty() {
            return true;
        }
        // EINTR, EAGAIN, EBUSY: what was not taken stays queued for the next call.
        let _ = self.ring.submit();
        self.ring.submission().is_empty()
    }

    /// Submits until the kernel has taken everything. It takes all but under memory pressure, and then again soon.
    pub(super) fn submit_all(&mut self) {
        while !self.submit() {
            std::thread::yield_now();
        }
    }

    /// Waits for one answer.
    pub(super) fn wait(&mut self) -> io::Result<()> {
        loop {
            match self.ring.submit_and_wait(1) {
                Ok(_) => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Whether there is an answer, or one that comes with the next system call. Makes none itself.
    pub(super) fn has_answer(&mut self) -> bool {
        !self.ring.completion().is_empty() || self.ring.submission().taskrun()
    }

    pub(super) fn poll(&mut self, answers: &mut impl Extend<Answer>) {
        answers.extend(self.ring.completion().map(|entry| Answer {
            slot: (entry.user_data() >> 32) as u32,
            token: entry.user_data() as u32,
            result: entry.result(),
        }));
    }
}

fn raw(media: &Media) -> i32 {
    match media {
        Media::File(file) => file.as_raw_fd(),
        #[cfg(test)]
        Media::Sim(_) => -1,
    }
}
