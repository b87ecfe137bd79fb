//! Primitives that go through memory of the driver's own: those on encrypted files, and those past the page cache whose
//! memory or place is not made for that.
//!
//! ```text
//! write: buffers ──copy──► piece ──(encrypt)──► kernel
//! read:  kernel ──► piece ──(decrypt)──copy──► buffers          a piece is 128 KiB at most, see pool.rs
//! ```
//!
//! A guest's memory is never encrypted in place: the guest could look at what the disk gets, or change it in between. A
//! read may begin and end anywhere, and is widened to whole units; a write has whole units already (`plan.rs` completes
//! them). What the kernel does in part is carried on here, since half a unit can be neither decrypted nor named by an
//! offset. The caller sees a primitive of whole files' bytes that either succeeds or fails; of one that is longer than a piece it sees
//! the count of the first piece, and asks for the rest.
//!
//! When the pool is used up a primitive waits its turn here, counted as under way.

use std::{collections::VecDeque, sync::Arc};

use super::{
    Answer, Driver, Io, Span,
    memory::Buffers,
    pool::{PIECE_MAX, Pool},
    segments,
};
use crate::crypto::{SectorCipher, UNIT_BYTES};

/// A write of so many bytes is worth a system call of its own: encrypting takes about ten times as long.
const EARLY_BYTES: u64 = 64 << 10;

/// A primitive that the kernel has, with its piece.
struct Transit {
    slot: u32,
    token: u32,
    /// What was asked, cut to what the piece holds.
    io: Io,
    piece: Buffers,
    /// Where the piece's bytes lie in the file.
    offset: u64,
    len: usize,
    done: usize,
}

/// What the driver knows of encryption.
#[derive(Default)]
pub(super) struct Crypt {
    /// For each of the driver's files: its cipher, and whether it goes past the page cache.
    files: Vec<(Option<Arc<SectorCipher>>, bool)>,
    pool: Pool,
    transits: Vec<Transit>,
    waiting: VecDeque<(u32, u32, Io)>,
    /// Something was issued while answers were looked at.
    pub(super) restarted: bool,
}

impl Crypt {
    pub(super) fn set_files(&mut self, files: Vec<(Option<Arc<SectorCipher>>, bool)>) {
        self.files = files;
    }

    fn cipher(&self, file: u32) -> Option<&Arc<SectorCipher>> {
        self.files.get(file as usize)?.0.as_ref()
    }

    pub(super) fn is_direct(&self, file: u32) -> bool {
        self.files.get(file as usize).is_some_and(|(_, direct)| *direct)
    }

    /// Whether the primitive carries bytes of an encrypted file.
    pub(super) fn concerns(&self, io: &Io) -> bool {
        match io {
            Io::Read { file, .. } | Io::Write { file, .. } => self.cipher(*file).is_some(),
            Io::SyncData { .. } | Io::Allocate { .. } => false,
        }
    }
}

impl Driver {
    /// Like [`Driver::issue`], of a primitive that needs a piece; it was counted.
    pub(super) fn issue_by_piece(&mut self, slot: u32, token: u32, io: &Io) {
        // Who waits already comes first.
        if !self.crypt.waiting.is_empty() || !self.start_piece(slot, token, io) {
            self.crypt.waiting.push_back((slot, token, *io));
        }
    }

    /// False when the pool has no piece for it now.
    fn start_piece(&mut self, slot: u32, token: u32, io: &Io) -> bool {
        let (Io::Read { file, offset, mut span } | Io::Write { file, offset, mut span }) = *io else {
            return true;
        };
        let start = offset - offset % UNIT_BYTES;
        // Whole units that fit a piece: the rest is asked for again, as after any short count.
        span.truncate(start + PIECE_MAX as u64 - offset);
        let len = (offset + span.len()).next_multiple_of(UNIT_BYTES) - start;
        let Some(mut piece) = self.crypt.pool.take(len as usize) else { return false };
        let io = match io {
            Io::Read { .. } => Io::Read { file, offset, span },
            _ => {
                assert_eq!(
                    (start, len),
                    (offset, span.len()),
                    "the plan completes units before they are written"
                );
                self.fill_piece(slot, &span, file, offset, &mut piece);
                Io::Write { file, offset, span }
            }
        };
        self.crypt.transits.push(Transit {
            slot,
            token,
            io,
            piece,
            offset: start,
            len: len as usize,
            done: 0,
        });
        self.carry(self.crypt.transits.len() - 1);
        if matches!(io, Io::Write { .. }) && len >= EARLY_BYTES {
            // The disk takes it while the next one is encrypted.
            self.submit();
        }
        true
    }

    /// Copies what a write's span has into its piece, and encrypts it if that is due.
    fn fill_piece(&mut self, slot: u32, span: &Span, file: u32, offset: u64, piece: &mut Buffers) {
        if span.head.len + span.tail.len > 0 {
            self.bounce(slot);
        }
        let bytes = piece.as_mut_slice().and_then(|bytes| bytes.get_mut(..span.len() as usize));
        let bytes = bytes.expect("a piece is owned memory that was taken for this length");
        let mut at = 0;
        for segment in segments(&self.cargo[slot as usize], &self.zeros, span) {
            let target = &mut bytes[at..at + segment.iov_len];
            // SAFETY: the segment lies in memory that the slot's cargo (or the driver's zeros) keeps alive and to which no
            // reference exists; the piece is the driver's own, so they do not overlap. A guest that changes its memory
            // meanwhile only decides which of its bytes are written.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    segment.iov_base.cast::<u8>(),
                    target.as_mut_ptr(),
                    target.len(),
                );
            }
            at += segment.iov_len;
        }
        if let Some(cipher) = self.crypt.cipher(file) {
            cipher.encrypt(offset, bytes);
        }
    }

    /// Decrypts what a read has brought if that is due, and copies what was asked for into its span.
    fn empty_piece(&mut self, transit: &mut Transit) {
        let Io::Read { file, offset, span } = transit.io else { return };
        let bytes = transit.piece.as_mut_slice().and_then(|bytes| bytes.get_mut(..transit.len));
        let bytes = bytes.expect("a piece is owned memory that was taken for this length");
        if let Some(cipher) = self.crypt.cipher(file) {
            cipher.decrypt(transit.offset, bytes);
        }
        if span.head.len + span.tail.len > 0 {
            self.bounce(transit.slot);
        }
        let mut at = (offset - transit.offset) as usize;
        for segment in segments(&self.cargo[transit.slot as usize], &self.zeros, &span) {
            let source = &bytes[at..at + segment.iov_len];
            // SAFETY: as in `fill_piece`, the other way round. The zeros are never in the span of a read.
            unsafe {
                std::ptr::copy_nonoverlapping(source.as_ptr(), segment.iov_base.cast::<u8>(), source.len());
            }
            at += segment.iov_len;
        }
    }

    /// Hands what is left of a transit to the kernel.
    fn carry(&mut self, index: usize) {
        self.make_room();
        let transit = &mut self.crypt.transits[index];
        let (slot, token, mut io) = (transit.slot, transit.token, transit.io);
        if let Io::Read { offset, .. } | Io::Write { offset, .. } = &mut io {
            *offset = transit.offset + transit.done as u64;
        }
        let left = (transit.len - transit.done) as u64;
        let first = self.arena.len();
        self.arena.extend(transit.piece.parts(transit.done as u64, left));
        let count = self.arena.len() - first;
        // The piece stays in the transit, and that with the driver, until the kernel has answered.
        self.push(slot, token, &io, first, count);
    }

    /// Looks at an answer; `None` when it is not the last word. Answers of plain files pass through.
    pub(super) fn settle(&mut self, answer: Answer) -> Option<Answer> {
        let mine = |transit: &Transit| transit.slot == answer.slot && transit.token == answer.token;
        let Some(index) = self.crypt.transits.iter().position(mine) else { return Some(answer) };
        let transit = &mut self.crypt.transits[index];
        if answer.result > 0 {
            transit.done = (transit.done + answer.result as usize).min(transit.len);
        }
        let again = answer.result == -libc::EINTR || answer.result == -libc::EAGAIN;
        if again || (answer.result > 0 && transit.done < transit.len) {
            self.crypt.restarted = true;
            self.carry(index);
            return None;
        }
        let mut transit = self.crypt.transits.swap_remove(index);
        let mut result = answer.result;
        if transit.done == transit.len {
            self.empty_piece(&mut transit);
            if let Io::Read { span, .. } | Io::Write { span, .. } = transit.io {
                result = span.len() as i32;
            }
        }
        self.crypt.pool.give(transit.piece);
        while let Some((slot, token, io)) = self.crypt.waiting.pop_front() {
            if !self.start_piece(slot, token, &io) {
                self.crypt.waiting.push_front((slot, token, io));
                break;
            }
            self.crypt.restarted = true;
        }
        Some(Answer { result, ..answer })
    }
}
