//! Memory for what is encrypted: taken for one primitive, given back when it is done, and never more than a limit.
//!
//! Pieces come in powers of two from 4 KiB to [`PIECE_MAX`], each size with its list of idle ones. When the limit would
//! be passed, idle pieces of other sizes are let go first; if that is not enough, who asks has to wait until something is given back.
//! In a steady state nothing is allocated.

use super::memory::Buffers;

/// The largest piece, bytes.
pub(crate) const PIECE_MAX: usize = 128 << 10;
/// All pieces of a queue together, bytes: enough for its depth of 4 KiB each, or for a sequential stream of large ones.
const POOL_BYTES_MAX: usize = 8 << 20;
const PIECE_MIN_LOG2: u32 = 12;
const SIZES: usize = (PIECE_MAX.trailing_zeros() - PIECE_MIN_LOG2 + 1) as usize;

/// See the head of this file.
#[derive(Default)]
pub(super) struct Pool {
    idle: [Vec<Buffers>; SIZES],
    /// Bytes of all pieces, idle or not.
    bytes: usize,
    /// Bytes of those that are in use.
    used: usize,
}

/// Index of the smallest size that holds `len`.
fn size_of(len: usize) -> usize {
    let log2 = len.max(1).next_power_of_two().trailing_zeros();
    (log2.saturating_sub(PIECE_MIN_LOG2) as usize).min(SIZES - 1)
}

fn bytes_of(size: usize) -> usize {
    1 << (PIECE_MIN_LOG2 as usize + size)
}

impl Pool {
    /// A piece of at least `len` bytes ([`PIECE_MAX`] at most); none when too much is in use.
    pub(super) fn take(&mut self, len: usize) -> Option<Buffers> {
        assert!(len <= PIECE_MAX, "what is encrypted comes in pieces");
        let size = size_of(len);
        if let Some(piece) = self.idle[size].pop() {
            self.used += bytes_of(size);
            return Some(piece);
        }
        if self.used + bytes_of(size) > POOL_BYTES_MAX {
            return None;
        }
        for other in 0..SIZES {
            while self.bytes + bytes_of(size) > POOL_BYTES_MAX && self.idle[other].pop().is_some() {
                self.bytes -= bytes_of(other);
            }
        }
        self.bytes += bytes_of(size);
        self.used += bytes_of(size);
        Some(Buffers::owned(bytes_of(size)))
    }

    /// Takes back what [`Pool::take`] gave.
    pub(super) fn give(&mut self, piece: Buffers) {
        let size = size_of(piece.len() as usize);
        self.used -= bytes_of(size);
        self.idle[size].push(piece);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_used_again_and_bounded() {
        let mut pool = Pool::default();
        let piece = pool.take(5000).expect("room");
        let at = piece.as_slice().map(<[u8]>::as_ptr);
        assert_eq!(piece.len(), 8192);
        pool.give(piece);
        assert_eq!(pool.take(8192).expect("room").as_slice().map(<[u8]>::as_ptr), at);

        let mut pool = Pool::default();
        let small: Vec<_> = (0..POOL_BYTES_MAX / 4096).map(|_| pool.take(512).expect("room")).collect();
        assert!(pool.take(1).is_none(), "the limit");
        small.into_iter().for_each(|piece| pool.give(piece));
        let large: Vec<_> =
            (0..POOL_BYTES_MAX / PIECE_MAX).map(|_| pool.take(PIECE_MAX).expect("room")).collect();
        assert_eq!((pool.bytes, pool.used), (POOL_BYTES_MAX, POOL_BYTES_MAX), "idle pieces made room");
        assert!(pool.take(1).is_none(), "the limit again");
        drop(large);
    }
}
