//! What an operation becomes: pure decisions, from a stack and a range to primitives, and from the kernel's answers
//! to what follows.

use nix::fcntl::FallocateFlags;

use crate::{
    error::IoError,
    header::BLOCK_BYTES,
    map::State,
    shared::Claim,
    stack::{Source, Stack},
    uring::{Body, BouncePart, Io, PIECE_MAX, Span},
};

/// Something that is done at once, in memory.
pub(crate) enum Fill {
    /// Zero a part of the buffers.
    Buffers { start: u64, len: u64 },
    /// Zero a part of a bounce block.
    Bounce(BouncePart),
}

/// A range of bytes of the volume.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Range {
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

impl Range {
    pub(crate) fn end(&self) -> u64 {
        self.offset + self.len
    }

    /// Whether it consists of whole units.
    pub(crate) fn is_aligned(&self, unit_bytes: u64) -> bool {
        self.offset.is_multiple_of(unit_bytes) && self.end().is_multiple_of(unit_bytes)
    }

    /// The blocks that it touches.
    pub(crate) fn touched(&self) -> Claim {
        let first = self.offset / BLOCK_BYTES;
        Claim { first, count: self.end().div_ceil(BLOCK_BYTES) - first }
    }

    /// The blocks that it covers whole; the volume's last block counts as whole when it is covered to its end.
    pub(crate) fn covered(&self, size_bytes: u64) -> Claim {
        let first = self.offset.div_ceil(BLOCK_BYTES);
        let end = if self.end() == size_bytes {
            size_bytes.div_ceil(BLOCK_BYTES)
        } else {
            self.end() / BLOCK_BYTES
        };
        Claim { first, count: end.saturating_sub(first) }
    }
}

pub(crate) fn punch() -> i32 {
    (FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE).bits()
}

pub(crate) fn zero_range() -> i32 {
    (FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE).bits()
}

/// A read: one primitive for each run of blocks with one source.
pub(crate) fn read(stack: &Stack, range: Range, ios: &mut Vec<Io>, mut fill: impl FnMut(Fill)) {
    stack.byte_runs(range.offset, range.len, |source, at, len| {
        let start = at - range.offset;
        match source {
            Source::Layer(index) => {
                let span = Span::buffers(start, len);
                ios.extend(cut(stack, Io::Read { file: index as u32, offset: at, span }));
            }
            Source::Zero => fill(Fill::Buffers { start, len }),
        }
    });
}

/// A primitive as the driver may get it: one on an encrypted file in pieces, so that several are under way at once.
pub(crate) fn cut(stack: &Stack, io: Io) -> impl Iterator<Item = Io> + use<> {
    let encrypted = |file: u32| stack.layers.get(file as usize).is_some_and(|layer| layer.cipher.is_some());
    let piece_max = match io {
        Io::Read { file, .. } | Io::Write { file, .. } if encrypted(file) => PIECE_MAX as u64,
        _ => u64::MAX,
    };
    let mut rest = Some(io);
    std::iter::from_fn(move || {
        let mut piece = rest.take()?;
        let mut after = piece;
        if let Io::Read { offset, span, .. } | Io::Write { offset, span, .. } = &mut after {
            let room = piece_max - *offset % piece_max;
            if span.len() > room {
                span.advance(room);
                *offset += room;
                if let Io::Read { span, .. } | Io::Write { span, .. } = &mut piece {
                    span.truncate(room);
                }
                rest = Some(after);
            }
        }
        Some(piece)
    })
}

/// The write of `body` to `range` in a head with layers below. Blocks at its ends that are covered in part and
/// are not data in the head are completed from a bounce block, and so are sectors of an encrypted head: `copy_up` gets
/// the reads that fill it first.
pub(crate) fn write(
    stack: &Stack,
    range: Range,
    body: Body,
    first_bounce: u8,
    copy_up: &mut Vec<Io>,
    mut fill: impl FnMut(Fill),
) -> Io {
    let head = stack.head();
    let mut span = Span { head: BouncePart::default(), body, tail: BouncePart::default() };
    let mut offset = range.offset;
    let state = |block| head.map.as_ref().map_or(State::Data, |map| map.run(block, 1).0);
    let first = range.offset / BLOCK_BYTES;
    let last = (range.end() - 1) / BLOCK_BYTES;
    let last_len = (head.size_bytes - last * BLOCK_BYTES).min(BLOCK_BYTES) as u32;
    let first_from = (range.offset % BLOCK_BYTES) as u32;
    let after_from = (range.end() - last * BLOCK_BYTES) as u32;
    // Of a block that the head has, what was there stays there, but for sectors that can only be encrypted whole.
    let unit = head.unit_bytes() as u32;
    let before = if state(first) == State::Data { first_from % unit } else { first_from };
    let after =
        if state(last) == State::Data { after_from.next_multiple_of(unit) } else { last_len } - after_from;
    let mut filled = None;
    if before > 0 {
        complete(stack, first, first_bounce, copy_up, &mut fill);
        filled = Some(first);
        span.head = BouncePart { which: first_bounce, start: first_from - before, len: before };
        offset -= u64::from(before);
    }
    if after > 0 {
        let which =
            if filled == Some(last) { first_bounce } else { first_bounce + u8::from(filled.is_some()) };
        if filled != Some(last) {
            complete(stack, last, which, copy_up, &mut fill);
        }
        span.tail = BouncePart { which, start: after_from, len: after };
    }
    Io::Write { file: stack.head_index() as u32, offset, span }
}

/// Fills a bounce block with what `block` reads as now.
fn complete(stack: &Stack, block: u64, which: u8, copy_up: &mut Vec<Io>, fill: &mut impl FnMut(Fill)) {
    let source = stack.resolve(stack.layers.len(), block, 1).0;
    fill(Fill::Bounce(BouncePart { which, start: 0, len: BLOCK_BYTES as u32 }));
    if let Source::Layer(index) = source {
        let offset = block * BLOCK_BYTES;
        // What lies past the end of a smaller layer stays zero.
        let len = (stack.layers[index].size_bytes - offset).min(BLOCK_BYTES) as u32;
        copy_up.push(Io::Read { file: index as u32, offset, span: Span::bounce(which, 0, len) });
    }
}

/// What an answer of the kernel means.
pub(crate) enum Verdict {
    Done,
    /// Interrupted, short, or to be done another way: issue the primitive, which was changed, again.
    Again,
    Failed(IoError),
}

/// Reads the kernel's answer to a primitive. `excused`: a hole that cannot be made is no failure, since the map
/// says zero or nothing was promised.
pub(crate) fn judge(io: &mut Io, result: i32, excused: bool) -> Verdict {
    if result == -libc::EINTR || result == -libc::EAGAIN {
        return Verdict::Again;
    }
    let failed = |what| Verdict::Failed(IoError::Host { what, errno: -result });
    match io {
        Io::Read { .. } if result < 0 => failed("read"),
        Io::Write { .. } if result < 0 => failed("write"),
        Io::Read { offset, span, .. } | Io::Write { offset, span, .. } => {
            span.advance(result as u64);
            *offset += result as u64;
            match (span.len(), result) {
                (0, _) => Verdict::Done,
                (_, 0) => Verdict::Failed(IoError::Truncated),
                _ => Verdict::Again,
            }
        }
        Io::SyncData { .. } if result < 0 => failed("sync"),
        Io::Allocate { .. } if result >= 0 => Verdict::Done,
        Io::Allocate { .. } if result == -libc::EOPNOTSUPP && excused => Verdict::Done,
        Io::Allocate { file, offset, len, .. } if result == -libc::EOPNOTSUPP => {
            let span = Span { body: Body::Zeros { len: *len }, ..Span::buffers(0, 0) };
            *io = Io::Write { file: *file, offset: *offset, span };
            Verdict::Again
        }
        Io::Allocate { .. } => failed("hole"),
        Io::SyncData { .. } => Verdict::Done,
    }
}

/// The hole that frees the space of whole blocks.
pub(crate) fn punch_blocks(file: u32, blocks: Claim) -> Option<Io> {
    (blocks.count > 0).then(|| Io::Allocate {
        file,
        mode: punch(),
        offset: blocks.first * BLOCK_BYTES,
        len: blocks.count * BLOCK_BYTES,
    })
}

/// Zeros in whole blocks of the head that keep or get their space.
pub(crate) fn zero_blocks(stack: &Stack, blocks: Claim) -> Option<Io> {
    let offset = blocks.first * BLOCK_BYTES;
    // Not past the volume's end: where a file system cannot, they are written, which would make the file longer.
    let end = ((blocks.first + blocks.count) * BLOCK_BYTES).min(stack.head().size_bytes);
    let file = stack.head_index() as u32;
    (blocks.count > 0).then(|| Io::Allocate { file, mode: zero_range(), offset, len: end - offset })
}

/// The parts of a range outside the blocks that it covers, each with the bounce block that it may use.
pub(crate) fn edges(range: Range, covered: Claim) -> impl Iterator<Item = (Range, u8)> {
    let parts = if covered.count == 0 {
        // It may touch two blocks, and then `write` uses both bounce blocks.
        [range, Range { offset: range.end(), len: 0 }]
    } else {
        let (start, end) = (covered.first * BLOCK_BYTES, (covered.first + covered.count) * BLOCK_BYTES);
        let left = Range { offset: range.offset, len: start - range.offset };
        [left, Range { offset: end, len: range.end().saturating_sub(end) }]
    };
    parts.into_iter().zip(0..).filter(|(part, _)| part.len > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn covered_blocks() {
        let size = 10 * BLOCK_BYTES + 100;
        let covered = |offset, len| Range { offset, len }.covered(size);
        assert_eq!(covered(0, size), Claim { first: 0, count: 11 });
        assert_eq!(covered(1, 2 * BLOCK_BYTES), Claim { first: 1, count: 1 });
        assert_eq!(covered(1, 100).count, 0);
        assert_eq!(covered(10 * BLOCK_BYTES, 100), Claim { first: 10, count: 1 });
        assert_eq!(covered(10 * BLOCK_BYTES, 99).count, 0);
    }
}
