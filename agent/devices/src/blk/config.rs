//! What a disk offers: feature bits and configuration space (virtio 1.2 §5.2.3, §5.2.4).

use super::QUEUE_SIZE;

const F_SEG_MAX: u32 = 2;
const F_RO: u32 = 5;
const F_BLK_SIZE: u32 = 6;
pub(super) const F_FLUSH: u32 = 9;
const F_TOPOLOGY: u32 = 10;
const F_MQ: u32 = 12;
const F_DISCARD: u32 = 13;
const F_WRITE_ZEROES: u32 = 14;

/// The protocol's unit, whatever the disk's block size is.
pub(super) const SECTOR_BYTES: u64 = 512;
/// The most sectors of a discard or write-zeroes: 1 GiB.
pub(super) const RANGE_SECTORS_MAX: u32 = 1 << 21;
/// The volume's grain as a power of two of sectors, and in sectors: 4096 bytes.
const GRAIN_EXPONENT: u8 = 3;
const GRAIN_SECTORS: u16 = 8;

const BYTES: usize = 60;

pub(super) fn features(read_only: bool, queues: usize) -> u64 {
    let bit = |on: bool, bit: u32| if on { 1u64 << bit } else { 0 };
    bit(true, F_SEG_MAX)
        | bit(true, F_BLK_SIZE)
        | bit(true, F_FLUSH)
        | bit(true, F_TOPOLOGY)
        | bit(queues > 1, F_MQ)
        | bit(read_only, F_RO)
        | bit(!read_only, F_DISCARD)
        | bit(!read_only, F_WRITE_ZEROES)
}

/// `struct virtio_blk_config`.
pub(super) fn render(size_bytes: u64, queues: usize) -> [u8; BYTES] {
    let mut image = [0; BYTES];
    let mut put = |at: usize, value: &[u8]| {
        for (byte, value) in image.iter_mut().skip(at).zip(value) {
            *byte = *value;
        }
    };
    put(0, &(size_bytes / SECTOR_BYTES).to_le_bytes());
    // A request also has a header and a status descriptor.
    put(12, &u32::from(QUEUE_SIZE.saturating_sub(2)).to_le_bytes());
    put(20, &512u32.to_le_bytes());
    put(24, &[GRAIN_EXPONENT, 0]);
    put(26, &GRAIN_SECTORS.to_le_bytes());
    put(32, &[1]);
    put(34, &u16::try_from(queues).unwrap_or(u16::MAX).to_le_bytes());
    put(36, &RANGE_SECTORS_MAX.to_le_bytes());
    put(40, &1u32.to_le_bytes());
    put(44, &u32::from(GRAIN_SECTORS).to_le_bytes());
    put(48, &RANGE_SECTORS_MAX.to_le_bytes());
    put(52, &1u32.to_le_bytes());
    put(56, &[1]);
    image
}
