//! Primitives on encrypted files, and those past the page cache whose memory or place is not made for that.
//!
//! ```text
//! write:          buffers ──encrypt──► piece ──► kernel        a piece is 128 KiB at most, see pool.rs
//! read:           kernel ──► buffers ──decrypt──► buffers
//! read in part:   kernel ──► piece ──(decrypt)──copy──► buffers
//! ```
//!
//! What is written is never encrypted in the guest's memory: the guest could look at what the disk gets, or change it in
//! between. A read of whole units lands where it was asked for, and is decrypted there, so that its
//! bytes come into the processor once: until it is answered the guest may see what its own disk has, and change it, which changes what it
//! reads. Either way the cipher takes a register's bytes out of foreign memory once, works in its own, and puts the result down once
//! ([`Units`]): there is no other copy, and no reference to a guest's memory. Units that lie in two segments go by way of
//! a copy. Another read is widened to whole units in a piece; a write has whole units already (`plan.rs` completes
//! them). What the kernel does in part is carried on here, since half a unit can be neither decrypted nor named by an
//! offset. The caller sees a primitive of whole files' bytes that either succeeds or fails; of one that is longer than a piece it sees
//! the count of the first piece, and asks for the rest.
//!
//! **The disk works meanwhile.** Writes are submitted as soon as [`EARLY_BYTES`] are encrypted. Answers that are not decrypted yet wait
//! in the driver while the caller takes those that are and submits what follows them ([`TURN_BYTES`]).
//!
//! When the pool is used up a primitive waits its turn here, counted as under way.

use std::{collections::VecDeque, sync::Arc};

use super::{
    Answer, Driver, Io, Span,
    memory::Buffers,
    pool::{PIECE_MAX, Pool},
    segments,
};
use crate::crypto::{Four, Place, REGISTER, SectorCipher, UNIT_BYTES};

/// Writes of so many bytes are worth a system call of their own: encrypting takes about ten times as long.
const EARLY_BYTES: u64 = 64 << 10;
/// After so many bytes that were decrypted what is done is given back first.
const TURN_BYTES: usize = 64 << 10;
/// Bytes that are copied and go through the cipher together where copies are needed: they stay in the processor's nearest caches.
const GROUP_BYTES: usize = 32 << 10;
const UNIT: usize = UNIT_BYTES as usize;

/// A primitive that the kernel has.
struct Transit {
    slot: u32,
    token: u32,
    /// What was asked, cut to what the piece holds.
    io: Io,
    /// Where its bytes are, if not in the slot's buffers.
    piece: Option<Buffers>,
    /// Where its bytes lie in the file.
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
    /// What a group is decrypted in whose units lie in two segments.
    scratch: Vec<u8>,
    /// Bytes that were encrypted since the last submission.
    pub(super) unsent: u64,
    /// Bytes that were decrypted in this turn.
    pub(super) decrypted: usize,
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

    /// Whether so much was decrypted that others come first.
    pub(super) fn has_had_its_turn(&self) -> bool {
        self.decrypted >= TURN_BYTES
    }
}

/// Whole units on their way through the cipher, between memory to which there may be no reference.
///
/// Whoever makes one sees to it that both are valid for `count` units while it lives.
struct Units {
    from: *const u8,
    to: *mut u8,
    count: usize,
}

impl Place for Units {
    #[inline(always)]
    fn load(&self, unit: usize, register: usize) -> Four {
        assert!(unit < self.count && register < UNIT / REGISTER, "inside");
        let mut four = Four::default();
        let to = four.as_mut_ptr().cast::<u8>();
        // SAFETY: the register lies inside `count` units, which are valid; `four` is our own. A guest that changes its memory
        // meanwhile only decides which of its bytes are taken.
        unsafe {
            std::ptr::copy_nonoverlapping(self.from.add(unit * UNIT + register * REGISTER), to, REGISTER)
        };
        four.map(u64::from_le)
    }

    #[inline(always)]
    fn store(&mut self, unit: usize, register: usize, four: Four) {
        assert!(unit < self.count && register < UNIT / REGISTER, "inside");
        let four = four.map(u64::to_le);
        let from = four.as_ptr().cast::<u8>();
        // SAFETY: as in `load`.
        unsafe {
            std::ptr::copy_nonoverlapping(from, self.to.add(unit * UNIT + register * REGISTER), REGISTER)
        };
    }
}

/// Bytes `[at, at + len)` of a span.
fn part_of(span: &Span, at: usize, len: usize) -> Span {
    let mut part = *span;
    part.advance(at as u64);
    part.truncate(len as u64);
    part
}

impl Driver {
    /// Like [`Driver::issue`], of a primitive that is for this file; it was counted. `crooked`: not into the slot's buffers.
    pub(super) fn issue_by_piece(&mut self, (slot, token): (u32, u32), io: &Io, crooked: bool) {
        if !crooked && self.start_in_place(slot, token, io) {
            return;
        }
        // Who waits already comes first.
        if !self.crypt.waiting.is_empty() || !self.start_piece(slot, token, io) {
            self.crypt.waiting.push_back((slot, token, *io));
        }
    }

    /// A read of whole units of an encrypted file goes to the slot's buffers; false: it is not one.
    fn start_in_place(&mut self, slot: u32, token: u32, io: &Io) -> bool {
        let Io::Read { offset, span, .. } = *io else { return false };
        if !offset.is_multiple_of(UNIT_BYTES) || !span.len().is_multiple_of(UNIT_BYTES) {
            return false;
        }
        let len = span.len() as usize;
        self.crypt.transits.push(Transit { slot, token, io: *io, piece: None, offset, len, done: 0 });
        self.carry(self.crypt.transits.len() - 1);
        true
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
        let (piece, len) = (Some(piece), len as usize);
        self.crypt.transits.push(Transit { slot, token, io, piece, offset: start, len, done: 0 });
        self.carry(self.crypt.transits.len() - 1);
        if matches!(io, Io::Write { .. }) {
            self.crypt.unsent += len as u64;
            if self.crypt.unsent >= EARLY_BYTES {
                // The disk takes it while the next one is encrypted.
                self.submit();
            }
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
        let cipher = self.crypt.cipher(file);
        if let Some(cipher) = cipher.filter(|_| self.has_whole_units(slot, span)) {
            let mut at = 0;
            for segment in segments(&self.cargo[slot as usize], &self.zeros, span) {
                let to = &mut bytes[at..at + segment.iov_len];
                let from = segment.iov_base.cast_const().cast();
                let mut units = Units { from, to: to.as_mut_ptr(), count: to.len() / UNIT };
                cipher.encrypt_at(offset + at as u64, to.len(), &mut units);
                at += segment.iov_len;
            }
            return;
        }
        for (i, group) in bytes.chunks_mut(GROUP_BYTES).enumerate() {
            let at = i * GROUP_BYTES;
            self.copy_out(slot, &part_of(span, at, group.len()), group);
            if let Some(cipher) = cipher {
                cipher.encrypt(offset + at as u64, group);
            }
        }
    }

    /// Whether no unit of a span lies in two segments.
    fn has_whole_units(&self, slot: u32, span: &Span) -> bool {
        segments(&self.cargo[slot as usize], &self.zeros, span).all(|part| part.iov_len.is_multiple_of(UNIT))
    }

    /// Copies the memory of a span, of whole blocks if it has some, which must be there.
    fn copy_out(&self, slot: u32, span: &Span, to: &mut [u8]) {
        let mut at = 0;
        for segment in segments(&self.cargo[slot as usize], &self.zeros, span) {
            let target = &mut to[at..at + segment.iov_len];
            // SAFETY: the segment lies in memory that the slot's cargo (or the driver's zeros) keeps alive and to which no
            // reference exists; the target is the driver's own, so they do not overlap. A guest that changes its memory
            // meanwhile only decides which of its bytes are copied.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    segment.iov_base.cast::<u8>(),
                    target.as_mut_ptr(),
                    target.len(),
                );
            }
            at += segment.iov_len;
        }
    }

    /// The other way round.
    fn copy_in(&mut self, slot: u32, span: &Span, from: &[u8]) {
        let mut at = 0;
        for segment in segments(&self.cargo[slot as usize], &self.zeros, span) {
            let source = &from[at..at + segment.iov_len];
            // SAFETY: as in `copy_out`. The zeros are never in the span of a read.
            unsafe {
                std::ptr::copy_nonoverlapping(source.as_ptr(), segment.iov_base.cast::<u8>(), source.len());
            }
            at += segment.iov_len;
        }
    }

    /// Decrypts what a read has brought if that is due, and has it where it was asked for.
    fn take_in(&mut self, transit: &mut Transit) {
        let Io::Read { file, offset, span } = transit.io else { return };
        if span.head.len + span.tail.len > 0 {
            self.bounce(transit.slot);
        }
        let cipher = self.crypt.cipher(file).map(Arc::clone);
        if cipher.is_some() {
            self.crypt.decrypted += transit.len;
        }
        let Some(piece) = &mut transit.piece else {
            return self.decrypt_in_place(transit, &span, cipher.as_deref());
        };
        let bytes = piece.as_mut_slice().and_then(|bytes| bytes.get_mut(..transit.len));
        let bytes = bytes.expect("a piece is owned memory that was taken for this length");
        if let Some(cipher) = cipher {
            cipher.decrypt(transit.offset, bytes);
        }
        let from = (offset - transit.offset) as usize;
        self.copy_in(transit.slot, &span, &bytes[from..from + span.len() as usize]);
    }

    /// Where it was asked for, or group by group out of there and back again.
    fn decrypt_in_place(&mut self, transit: &Transit, span: &Span, cipher: Option<&SectorCipher>) {
        let Some(cipher) = cipher else { return };
        if self.has_whole_units(transit.slot, span) {
            let mut offset = transit.offset;
            for segment in segments(&self.cargo[transit.slot as usize], &self.zeros, span) {
                let (to, len) = (segment.iov_base.cast::<u8>(), segment.iov_len);
                cipher.decrypt_at(offset, len, &mut Units { from: to, to, count: len / UNIT });
                offset += len as u64;
            }
            return;
        }
        let mut scratch = std::mem::take(&mut self.crypt.scratch);
        scratch.resize(GROUP_BYTES, 0);
        for at in (0..transit.len).step_by(GROUP_BYTES) {
            let group = &mut scratch[..GROUP_BYTES.min(transit.len - at)];
            let part = part_of(span, at, group.len());
            self.copy_out(transit.slot, &part, group);
            cipher.decrypt(transit.offset + at as u64, group);
            self.copy_in(transit.slot, &part, group);
        }
        self.crypt.scratch = scratch;
    }

    /// Hands what is left of a transit to the kernel.
    fn carry(&mut self, index: usize) {
        self.make_room();
        let transit = &self.crypt.transits[index];
        let (slot, token, mut io) = (transit.slot, transit.token, transit.io);
        if let Io::Read { offset, .. } | Io::Write { offset, .. } = &mut io {
            *offset = transit.offset + transit.done as u64;
        }
        let left = transit.len - transit.done;
        // The piece stays in the transit, and that with the driver, until the kernel has answered.
        let (first, count) = match (&transit.piece, &transit.io) {
            (None, Io::Read { span, .. }) => {
                let rest = part_of(span, transit.done, left);
                self.gather(slot, &rest)
            }
            (piece, _) => {
                let first = self.arena.len();
                let piece = piece.iter().flat_map(|piece| piece.parts(transit.done as u64, left as u64));
                self.arena.extend(piece);
                (first, self.arena.len() - first)
            }
        };
        self.push((slot, token), &io, first, count);
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
            self.take_in(&mut transit);
            if let Io::Read { span, .. } | Io::Write { span, .. } = transit.io {
                result = span.len() as i32;
            }
        }
        let Some(piece) = transit.piece else { return Some(Answer { result, ..answer }) };
        self.crypt.pool.give(piece);
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
