//! A request that the volume works on: what is needed to answer it, and to ask again.

use std::time::Instant;

use serio_volume::{Buffers, Op};
use vm_memory::GuestAddress;

use super::request::Request;
use crate::count::DiskOp;

/// What it counts as, and its bytes.
pub(super) fn kind_of(op: &Op) -> (DiskOp, u64) {
    match op {
        Op::Read { buffers, .. } => (DiskOp::Read, buffers.len()),
        Op::Write { buffers, .. } => (DiskOp::Write, buffers.len()),
        Op::Discard { len, .. } | Op::WriteZeroes { len, .. } => (DiskOp::Discard, *len),
        _ => (DiskOp::Flush, 0),
    }
}

/// A request that the volume works on.
#[derive(Clone, Copy)]
pub(super) struct Slot {
    pub(super) head: u16,
    pub(super) status: GuestAddress,
    /// Bytes that count as written into the chain, the status included.
    pub(super) written: u32,
    pub(super) op: DiskOp,
    /// Bytes of data.
    pub(super) bytes: u64,
    /// When it was taken off the ring; all that were taken at once have the same.
    pub(super) begun: Instant,
    pub(super) request: Request,
    /// It was held, and asked again.
    pub(super) tried: bool,
}

impl Slot {
    /// The same once more; the buffers back if it is not one that needs room.
    pub(super) fn redo(&self, buffers: Buffers, write_through: bool) -> Result<Op, Buffers> {
        Ok(match self.request {
            Request::Write { offset } => Op::Write { offset, buffers, fua: write_through },
            Request::Flush => Op::Flush,
            Request::Discard { offset, len } => Op::Discard { offset, len },
            Request::WriteZeroes { offset, len, unmap } => Op::WriteZeroes { offset, len, unmap },
            Request::Read { .. } | Request::GetId | Request::Refused { .. } => return Err(buffers),
        })
    }
}
