//! Changes that a server has answered and no flush has covered yet. Pure.
//!
//! A server that is killed may lose them (the protocol promises nothing before a flush is answered), so a client that
//! connects again sends them once more, before anything else. They are kept until a flush is answered that was sent
//! after their own answer; when they grow past a bound, the engine flushes by itself.
//!
//! Sent again, writes keep the order of their submission wherever two of them overlap: of two that the caller ordered by
//! waiting for the first, the second still wins. Two that were under way together have no order anyway.

use std::collections::VecDeque;

use super::window::Op;

/// One change.
#[derive(Debug)]
pub(super) struct Change {
    pub(super) sequence: u64,
    pub(super) op: Op,
    /// The count of answers when its own came.
    answered: u64,
}

/// See the head of this file.
#[derive(Debug, Default)]
pub(super) struct Kept {
    changes: VecDeque<Change>,
    bytes: usize,
    answers: u64,
}

impl Kept {
    pub(super) fn push(&mut self, sequence: u64, op: Op) {
        self.answers += 1;
        self.bytes += op.memory();
        self.changes.push_back(Change { sequence, op, answered: self.answers });
    }

    /// What a flush that is sent now covers.
    pub(super) fn mark(&self) -> u64 {
        self.answers
    }

    /// A flush with this mark was answered.
    pub(super) fn flushed(&mut self, mark: u64) {
        // Pushed in the order of their answers.
        while self.changes.front().is_some_and(|change| change.answered <= mark) {
            if let Some(change) = self.changes.pop_front() {
                self.bytes -= change.op.memory();
            }
        }
    }

    /// Takes all, in the order of their submission.
    pub(super) fn take(&mut self) -> Vec<Change> {
        let mut changes: Vec<Change> = std::mem::take(&mut self.changes).into();
        self.bytes = 0;
        changes.sort_by_key(|change| change.sequence);
        changes
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn len(&self) -> usize {
        self.changes.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(offset: u64) -> Op {
        Op::Write { offset, data: vec![1; 10].into() }
    }

    #[test]
    fn a_flush_covers_what_was_answered_before_it_was_sent() {
        let mut kept = Kept::default();
        kept.push(2, write(0));
        let mark = kept.mark();
        kept.push(1, write(10));
        assert_eq!((kept.len(), kept.bytes()), (2, 20));
        kept.flushed(mark);
        assert_eq!((kept.len(), kept.bytes()), (1, 10));
        kept.push(0, write(20));
        assert_eq!(kept.take().iter().map(|c| c.sequence).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(kept.len(), 0);
        kept.flushed(kept.mark());
    }
}
