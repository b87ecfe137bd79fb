//! A volume from its start, in grains of 64 KiB: which are zeros is asked of its maps, the others are read ahead.

use std::collections::{BTreeMap, VecDeque};

use serio_formats::GRAIN;
use serio_volume::{Buffers, IoError, Op, Volume};

/// Reads under way.
const DEPTH: u16 = 8;
/// Grains of one read.
const PIECE_GRAINS: u64 = 16;
/// Extents are looked up for so much at once.
const WINDOW_BYTES: u64 = 1 << 30;

/// Why a volume cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// No queue.
    #[error("cannot open a queue of the volume")]
    Queue(#[source] std::io::Error),
    /// A read failed.
    #[error("cannot read the volume at {offset}")]
    Read {
        /// First byte of the piece.
        offset: u64,
        /// Why.
        #[source]
        source: IoError,
    },
}

/// A stretch of the volume, in whole grains but for the last one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stretch {
    offset: u64,
    len: u64,
    zero: bool,
}

/// What is handed on.
#[derive(Debug)]
pub enum Piece<'a> {
    /// So many zeros.
    Zeros(u64),
    /// These bytes; at most 1 MiB.
    Data(&'a [u8]),
}

/// Hands the whole volume on, in order.
pub fn read<E: From<ReadError>>(
    volume: &Volume,
    mut each: impl FnMut(u64, Piece<'_>) -> Result<(), E>,
) -> Result<(), E> {
    let mut queue = volume.queue(DEPTH).map_err(ReadError::Queue)?;
    let (mut asked, mut next) = (0, 0);
    let mut ahead: VecDeque<Stretch> = VecDeque::new();
    // Stretches that are being read or wait for their turn, and what came for them.
    let mut order: VecDeque<Stretch> = VecDeque::new();
    let mut came: BTreeMap<u64, Result<Buffers, IoError>> = BTreeMap::new();
    let mut flying = 0;
    while next < volume.size_bytes() {
        while flying < DEPTH && order.len() < 4 * usize::from(DEPTH) {
            if ahead.is_empty() && asked < volume.size_bytes() {
                ahead = stretches(volume, asked).into();
                asked = asked.saturating_add(WINDOW_BYTES).min(volume.size_bytes());
            }
            let Some(stretch) = ahead.pop_front() else { break };
            order.push_back(stretch);
            if !stretch.zero {
                let buffers = Buffers::owned(stretch.len as usize);
                let op = Op::Read { offset: stretch.offset, buffers };
                queue
                    .submit(stretch.offset, op)
                    .expect("no more are submitted than the queue was opened for");
                flying += 1;
            }
        }
        queue.kick();
        queue.reap(|tag, result, buffers| {
            flying -= 1;
            came.insert(tag, result.map(|()| buffers));
        });
        while let Some(stretch) = order.front().copied() {
            if stretch.zero {
                each(stretch.offset, Piece::Zeros(stretch.len))?;
            } else {
                let Some(result) = came.remove(&stretch.offset) else { break };
                let buffers = result.map_err(|source| ReadError::Read { offset: stretch.offset, source })?;
                each(stretch.offset, Piece::Data(buffers.as_slice().unwrap_or_default()))?;
            }
            order.pop_front();
            next = stretch.offset.saturating_add(stretch.len);
        }
        if order.front().is_some_and(|first| !first.zero) && flying > 0 && came.is_empty() {
            queue.wait();
        }
    }
    Ok(())
}

/// The stretches of a window: a grain is zero if all of it is.
fn stretches(volume: &Volume, start: u64) -> Vec<Stretch> {
    let grain = GRAIN as u64;
    let end = start.saturating_add(WINDOW_BYTES).min(volume.size_bytes());
    let mut has_data = vec![false; (end - start).div_ceil(grain) as usize];
    let mut at = start;
    volume.extents(start, end - start, |extent| {
        let stop = at.saturating_add(extent.len).min(end);
        if !extent.hole && stop > at {
            let (first, last) = ((at - start) / grain, (stop - 1 - start) / grain);
            has_data.get_mut(first as usize..=last as usize).unwrap_or_default().fill(true);
        }
        at = stop;
        true
    });
    let mut found = Vec::new();
    let mut index = 0;
    for alike in has_data.chunk_by(|a, b| a == b) {
        let zero = alike.first() == Some(&false);
        let pieces = if zero { alike.len() as u64 } else { PIECE_GRAINS };
        let mut left = alike.len() as u64;
        while left > 0 {
            let grains = left.min(pieces);
            let offset = start + index * grain;
            let len = (grains * grain).min(end - offset);
            found.push(Stretch { offset, len, zero });
            index += grains;
            left -= grains;
        }
    }
    found
}
