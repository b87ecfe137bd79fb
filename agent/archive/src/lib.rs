//! The container in which a VM's snapshot goes to another host: written and read once, from its start, so that it needs no room
//! of its own on either side and passes through any pipe.
//!
//! All numbers are little-endian, all hashes BLAKE3. Byte by byte:
//!
//! ```text
//!   head      0 "SERIOARC"    8 u32 version (1)   12 u32 bytes of the manifest
//!            16 hash of the 16 bytes before it and of the manifest
//!            48 the manifest: JSON, which says how many parts follow and how large each is
//!   part      records in ascending order, none over another, then its end:
//!    record   0 u64 offset in the part   8 u32 bytes, 1 to 1 MiB   12 the bytes
//!    end      0 u64 bytes of the part    8 u32 0                   12 hash
//! ```
//! What no record covers is zero. The hash of a part is that of: the hash before it (of the part before, of the first part the
//! head's), then all bytes of the part's records and of its end's first 12. So each stands for all that came before it, and no
//! part can come from another archive. Nothing follows the end of the last part.
//!
//! A program reads its own version only: whoever changes the meaning of a byte, or of a field of the manifest, counts it up.
//!
//! **It is not encrypted.** It holds a guest's memory and disks in the clear: keys, passwords, everything.
//!
//! Owns: these bytes. Never: the meaning of the manifest, files, sockets. What is read is hostile: nothing is allocated by what
//! it says but a manifest of [`MANIFEST_BYTES_MAX`] and a record of [`RECORD_BYTES_MAX`].
#![forbid(unsafe_code)]

mod reader;
mod writer;

#[cfg(test)]
mod archive_test;

pub use reader::{ReadError, Reader};
pub use writer::Writer;

/// The largest manifest.
pub const MANIFEST_BYTES_MAX: usize = 4 << 20;
/// The most data of one record.
pub const RECORD_BYTES_MAX: usize = 1 << 20;

const MAGIC: [u8; 8] = *b"SERIOARC";
const VERSION: u32 = 1;
/// Up to the hash.
const HEAD_BYTES: usize = 16;
/// Of a record or an end: offset and length.
const RECORD_HEAD_BYTES: usize = 12;
const HASH_BYTES: usize = 32;

/// The first bytes of the head.
fn head(manifest_bytes: u32) -> [u8; HEAD_BYTES] {
    let mut head = [0; HEAD_BYTES];
    let fields = MAGIC
        .iter()
        .chain(&VERSION.to_le_bytes())
        .chain(&manifest_bytes.to_le_bytes())
        .copied()
        .collect::<Vec<u8>>();
    head.iter_mut().zip(fields).for_each(|(byte, value)| *byte = value);
    head
}

/// The first bytes of a record, or of a part's end.
fn record_head(offset: u64, bytes: u32) -> [u8; RECORD_HEAD_BYTES] {
    let [a, b, c, d, e, f, g, h] = offset.to_le_bytes();
    let [i, j, k, l] = bytes.to_le_bytes();
    [a, b, c, d, e, f, g, h, i, j, k, l]
}
