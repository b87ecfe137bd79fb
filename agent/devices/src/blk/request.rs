//! From a descriptor chain to what the guest wants (virtio 1.2 §5.2.6): pure, but for reading the header.
//!
//! ```text
//! readable: header (type u32, reserved u32, sector u64) [data to write | ranges]
//! writable: [data to read] status u8
//! ```
//!
//! A chain without room for header and status cannot even be answered: [`Malformed`], the ring is broken.
//! Everything else that is wrong has an answer: [`Request::Refused`].

use serio_hv::GuestRam;
use serio_virtio::Chain;
use serio_volume::Volume;
use vm_memory::GuestAddress;

use super::config::{RANGE_SECTORS_MAX, SECTOR_BYTES};

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

pub(super) const S_OK: u8 = 0;
pub(super) const S_IOERR: u8 = 1;
pub(super) const S_UNSUPP: u8 = 2;

const HEADER_BYTES: usize = 16;
const RANGE_BYTES: usize = 16;
const FLAG_UNMAP: u32 = 1;

/// What the disk allows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) size_bytes: u64,
    pub(super) read_only: bool,
}

impl Limits {
    pub(super) fn of(volume: &Volume) -> Self {
        // Whole sectors: what is behind the last one cannot be named.
        let size = volume.size_bytes();
        Self { size_bytes: size - size % SECTOR_BYTES, read_only: volume.is_read_only() }
    }
}

/// What to do. Data segments stay in the chain: writable for `Read` and `GetId`, readable for `Write`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    Read { offset: u64 },
    Write { offset: u64 },
    Flush,
    Discard { offset: u64, len: u64 },
    WriteZeroes { offset: u64, len: u64, unmap: bool },
    GetId,
    Refused { status: u8 },
}

/// A request and where its answer goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Parsed {
    pub(super) request: Request,
    pub(super) status: GuestAddress,
}

/// No header, or nowhere to answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Malformed;

/// Takes header and status off the chain, and leaves the data.
pub(super) fn parse(chain: &mut Chain, memory: &GuestRam, limits: &Limits) -> Result<Parsed, Malformed> {
    let mut header = [0u8; HEADER_BYTES];
    chain.take_header(memory, &mut header).ok_or(Malformed)?;
    let status = chain.take_last_byte().ok_or(Malformed)?;
    let [k0, k1, k2, k3, _, _, _, _, s0, s1, s2, s3, s4, s5, s6, s7] = header;
    let kind = u32::from_le_bytes([k0, k1, k2, k3]);
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let request = match kind {
        T_IN => data(sector, chain.writable_len(), limits, false),
        T_OUT => data(sector, chain.readable_len(), limits, true),
        T_FLUSH => Ok(Request::Flush),
        T_GET_ID => Ok(Request::GetId),
        T_DISCARD | T_WRITE_ZEROES => range(chain, memory, limits, kind == T_DISCARD),
        _ => Err(S_UNSUPP),
    };
    Ok(Parsed { request: request.unwrap_or_else(|status| Request::Refused { status }), status })
}

fn data(sector: u64, len: u64, limits: &Limits, write: bool) -> Result<Request, u8> {
    if write && limits.read_only {
        return Err(S_IOERR);
    }
    let offset = checked_range(sector, len, limits)?;
    Ok(if write { Request::Write { offset } } else { Request::Read { offset } })
}

fn range(chain: &mut Chain, memory: &GuestRam, limits: &Limits, discard: bool) -> Result<Request, u8> {
    if limits.read_only {
        return Err(S_IOERR);
    }
    let mut range = [0u8; RANGE_BYTES];
    chain.take_header(memory, &mut range).ok_or(S_IOERR)?;
    if chain.readable_len() != 0 {
        // More than the one range that we announced.
        return Err(S_UNSUPP);
    }
    let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = range;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
    let flags = u32::from_le_bytes([f0, f1, f2, f3]);
    let allowed = if discard { 0 } else { FLAG_UNMAP };
    if flags & !allowed != 0 {
        return Err(S_UNSUPP);
    }
    if sectors > RANGE_SECTORS_MAX {
        return Err(S_IOERR);
    }
    let len = u64::from(sectors).checked_mul(SECTOR_BYTES).ok_or(S_IOERR)?;
    let offset = checked_range(sector, len, limits)?;
    Ok(if discard {
        Request::Discard { offset, len }
    } else {
        Request::WriteZeroes { offset, len, unmap: flags & FLAG_UNMAP != 0 }
    })
}

/// The byte offset of `sector`, if `len` whole sectors from there lie on the disk.
fn checked_range(sector: u64, len: u64, limits: &Limits) -> Result<u64, u8> {
    if !len.is_multiple_of(SECTOR_BYTES) {
        return Err(S_IOERR);
    }
    let offset = sector.checked_mul(SECTOR_BYTES).ok_or(S_IOERR)?;
    let end = offset.checked_add(len).ok_or(S_IOERR)?;
    if end > limits.size_bytes { Err(S_IOERR) } else { Ok(offset) }
}

#[cfg(test)]
#[path = "request_test.rs"]
mod tests;
