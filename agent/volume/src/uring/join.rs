//! Neighbouring writes of one submission, handed to the kernel in one piece.
//!
//! ```text
//! issued:    w0 ├────┤ w1 ├────┤ w2 ├────┤   each begins where the one before ends, in the same file
//! run:          ├────────────────────────┤   one entry of the ring, once the next one does not fit or at the submission
//! answer:       ██████████████▓▓░░░░░░░░░░   dealt out in order: w0 and w1 in part, w2 nothing
//! ```
//!
//! Many file systems take no write into the page cache at once (ext4 and block devices, never): the kernel hands each to a thread of the
//! ring, one at a time for a file, and each answer wakes the queue's thread, perhaps on the very processor that copies. A guest that
//! writes in sequence has many neighbours in one submission, and one piece saves most of that. No write waits for a neighbour: a run
//! ends with its submission.
//!
//! - Each write stays an operation of its own: what it claims, its answer, and what follows it. One that got less than all is asked
//!   again by its owner, as after any short count, and by itself from then on. So an error is told to the one that it is for.
//! - Only neighbours in the order in which they were issued: nothing is sorted or searched, and a write that is no neighbour costs a comparison.
//! - Past the page cache nothing is joined: there the kernel has all of them under way at once, and joins what the disk takes in one piece itself.

use super::{Answer, Driver, Io, SEGMENTS_MAX, Span};

/// The longest run, bytes. Shorter ones cost more answers; longer ones leave larger folios in the page cache, in which each small
/// write takes longer afterwards, and would join what guests have made as large as they want it (Linux: 1.25 MiB).
const RUN_BYTES_MAX: u64 = 2 << 20;
/// Stands in an answer where the slot does: it is for a run, the token is its number.
pub(super) const OF_A_RUN: u32 = u32::MAX;

/// A write, or several.
#[derive(Clone, Copy)]
pub(super) struct Run {
    pub(super) file: u32,
    pub(super) offset: u64,
    pub(super) len: u64,
    /// Its iovecs in the arena.
    pub(super) first: usize,
    pub(super) count: usize,
}

/// A write of a run.
#[derive(Clone, Copy)]
struct Member {
    slot: u32,
    token: u32,
    len: u64,
}

/// The run that is not handed over yet, and those that the kernel has.
#[derive(Default)]
pub(super) struct Joins {
    open: Option<Run>,
    members: Vec<Member>,
    /// By number.
    under_way: Vec<Vec<Member>>,
    idle: Vec<u32>,
}

impl Joins {
    /// Takes a write into the open run; false: it is no neighbour, or too much.
    pub(super) fn extend(&mut self, (slot, token): (u32, u32), write: &Run) -> bool {
        let Some(open) = &mut self.open else { return false };
        let fits = open.file == write.file
            && open.offset + open.len == write.offset
            && open.first + open.count == write.first
            && open.count + write.count <= SEGMENTS_MAX
            && open.len + write.len <= RUN_BYTES_MAX;
        if fits {
            open.len += write.len;
            open.count += write.count;
            self.members.push(Member { slot, token, len: write.len });
        }
        fits
    }

    /// Opens a run with one write; there must be none.
    pub(super) fn begin(&mut self, (slot, token): (u32, u32), write: Run) {
        self.members.push(Member { slot, token, len: write.len });
        self.open = Some(write);
    }

    /// Ends the open run: its slot and token for the kernel.
    pub(super) fn end(&mut self) -> Option<((u32, u32), Run)> {
        let run = self.open.take()?;
        if let [only] = *self.members {
            self.members.clear();
            return Some(((only.slot, only.token), run));
        }
        let number = self.idle.pop().unwrap_or_else(|| {
            self.under_way.push(Vec::new());
            self.under_way.len() as u32 - 1
        });
        std::mem::swap(&mut self.members, &mut self.under_way[number as usize]);
        Some(((OF_A_RUN, number), run))
    }

    /// Deals out what was done of a run: `each` answer, and whether it is the whole of its write.
    pub(super) fn deal(&mut self, answer: Answer, mut each: impl FnMut(Answer, bool)) {
        let mut left = u64::from(answer.result.max(0).cast_unsigned());
        for Member { slot, token, len } in self.under_way[answer.token as usize].drain(..) {
            let done = left.min(len);
            left -= done;
            // Runs of several are shorter than what a result can say.
            let result = if done > 0 { done as i32 } else { -libc::EAGAIN };
            each(Answer { slot, token, result }, done == len);
        }
        self.idle.push(answer.token);
    }
}

impl Driver {
    /// Hands a primitive over, with its `count` iovecs from `first` on in the arena: a write to a run, all else to the engine.
    pub(super) fn push(&mut self, (slot, token): (u32, u32), io: &Io, first: usize, count: usize) {
        let joins = |file| !self.cargo[slot as usize].alone && !self.crypt.is_direct(file);
        match *io {
            Io::Write { file, offset, .. } if joins(file) => {
                let len = self.arena[first..first + count].iter().map(|part| part.iov_len as u64).sum();
                let write = Run { file, offset, len, first, count };
                if !self.joins.extend((slot, token), &write) {
                    self.end_run();
                    self.joins.begin((slot, token), write);
                }
            }
            _ => {
                self.end_run();
                self.start((slot, token), io, first, count);
            }
        }
    }

    /// Gives the open run to the engine, if there is one.
    pub(super) fn end_run(&mut self) {
        if let Some((whose, Run { file, offset, len, first, count })) = self.joins.end() {
            // Engines look at the iovecs, not at the span.
            self.start(whose, &Io::Write { file, offset, span: Span::buffers(0, len) }, first, count);
        }
    }

    /// Puts the answers of a run's writes in place of its own.
    pub(super) fn deal(&mut self, answer: Answer) {
        let (answered, cargo) = (&mut self.answered, &mut self.cargo);
        self.joins.deal(answer, |answer, whole| {
            cargo[answer.slot as usize].alone |= !whole;
            answered.push_back(answer);
        });
    }
}

#[cfg(test)]
#[path = "join_test.rs"]
mod tests;
