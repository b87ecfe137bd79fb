//! The header of a map file: two slots of 4 KiB, of which the newer valid one counts.
//!
//! ```text
//! map file  0       4096    8192                       8192 + ceil(blocks / 4)
//!           │ slot 0 │ slot 1 │ 2 bits per 4 KiB block … │
//! ```
//!
//! An update writes the slot that does *not* count, with `sequence + 1`, and syncs: a torn write leaves the
//! other slot as it was, so a header is always old or new. Pure: bytes in, values out. All integers are
//! little-endian. `agent/volume/README.md` has the table.

use crate::crypto::{CIPHER_XTS, WRAPPED_BYTES_MAX, WrappedKey};

/// Grain of the map, bytes.
pub const BLOCK_BYTES: u64 = 4096;
/// Where the bits start in a map file.
pub const MAP_OFFSET: u64 = 2 * SLOT_BYTES as u64;
/// Largest volume: 64 TiB, so that a map stays below 4 GiB of bits whatever a header claims.
pub const SIZE_BYTES_MAX: u64 = 1 << 46;
/// Longest snapshot name, bytes.
pub const NAME_BYTES_MAX: usize = 255;

pub(crate) const SLOT_BYTES: usize = 4096;
const MAGIC: [u8; 8] = *b"SERIOMAP";
const VERSION: u32 = 1;
const NO_LAYER: u64 = u64::MAX;
const STATE_HEAD: u32 = 1;
const STATE_SEALED: u32 = 2;
/// Where the wrapped data key stands in a slot, well behind the longest name.
const KEY_OFFSET: usize = 512;
const CIPHER_NONE: u32 = 0;

/// Whether a layer is still written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeaderState {
    /// The writable top of its chain.
    Head,
    /// Immutable; `successor` lies above it.
    Sealed {
        /// Number of the layer above.
        successor: u64,
    },
}

/// What a layer says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// The volume that the layer belongs to.
    pub volume: [u8; 16],
    /// Number of the layer, which is also the name of its files.
    pub layer: u64,
    /// Size of the volume at this layer, bytes.
    pub size_bytes: u64,
    /// Number of the layer below, none at the bottom.
    pub parent: Option<u64>,
    /// Head, or sealed with its successor.
    pub state: HeaderState,
    /// Name of the snapshot that this sealed layer is the top of; empty if none.
    pub snapshot: String,
    /// When it was sealed (a head: created), seconds since 1970.
    pub time_s: u64,
    /// The fencing generation of the last writer.
    pub generation: u64,
    /// Counts updates of this header.
    pub sequence: u64,
    /// The data key of an encrypted layer, wrapped; `None` for a plain one.
    pub key: Option<WrappedKey>,
}

/// Why bytes are not a header.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Shorter than two slots.
    #[error("the map file is shorter than its header")]
    Short,
    /// Another kind of file.
    #[error("it does not start with SERIOMAP: not a map file, or never initialized")]
    Magic,
    /// Neither slot has a right checksum.
    #[error("the checksum of the header is wrong in both slots")]
    Checksum,
    /// A newer format.
    #[error("format version {0} is newer than this program knows ({VERSION})")]
    Version(u32),
    /// A field that cannot be.
    #[error("the header's {field} cannot be {value}")]
    Field {
        /// Which.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// The name is not UTF-8 or too long.
    #[error("the snapshot name in the header is damaged")]
    Name,
    /// It could not be read.
    #[error("the map file cannot be read (errno {0})")]
    Read(i32),
}

impl Header {
    /// Number of blocks of the layer.
    pub fn blocks(&self) -> u64 {
        self.size_bytes.div_ceil(BLOCK_BYTES)
    }

    /// Which slot an update with this sequence goes to.
    pub(crate) fn slot_offset(&self) -> u64 {
        (self.sequence % 2) * SLOT_BYTES as u64
    }

    /// Bytes of the layer's map file, header and padding included.
    pub(crate) fn map_file_bytes(&self) -> u64 {
        MAP_OFFSET + self.blocks().div_ceil(4).next_multiple_of(crate::map::PAGE_BYTES as u64)
    }

    /// The bytes of one slot.
    pub fn encode(&self) -> [u8; SLOT_BYTES] {
        assert!(self.snapshot.len() <= NAME_BYTES_MAX, "names are checked before they are written");
        let mut fields = Vec::with_capacity(SLOT_BYTES);
        fields.extend_from_slice(&MAGIC);
        fields.extend_from_slice(&VERSION.to_le_bytes());
        let (state, successor) = match self.state {
            HeaderState::Head => (STATE_HEAD, NO_LAYER),
            HeaderState::Sealed { successor } => (STATE_SEALED, successor),
        };
        fields.extend_from_slice(&state.to_le_bytes());
        fields.extend_from_slice(&self.volume);
        for number in [
            self.layer,
            self.size_bytes,
            self.parent.unwrap_or(NO_LAYER),
            successor,
            self.time_s,
            self.generation,
            self.sequence,
        ] {
            fields.extend_from_slice(&number.to_le_bytes());
        }
        fields.extend_from_slice(&(self.snapshot.len() as u16).to_le_bytes());
        fields.extend_from_slice(self.snapshot.as_bytes());
        if let Some(key) = &self.key {
            assert!(key.wrapped.len() <= WRAPPED_BYTES_MAX, "our own wrapping is shorter");
            fields.resize(KEY_OFFSET, 0);
            fields.extend_from_slice(&CIPHER_XTS.to_le_bytes());
            fields.extend_from_slice(&(key.wrapped.len() as u32).to_le_bytes());
            fields.extend_from_slice(&key.vdc_key);
            fields.extend_from_slice(&key.wrapped);
        }
        fields.resize(SLOT_BYTES - 4, 0);
        let crc = crc32c::crc32c(&fields);
        fields.extend_from_slice(&crc.to_le_bytes());
        fields.try_into().expect("exactly one slot was filled")
    }

    /// The newer valid header of the first 8 KiB of a map file.
    pub fn decode(bytes: &[u8]) -> Result<Header, HeaderError> {
        let (Some(first), Some(second)) = (bytes.get(..SLOT_BYTES), bytes.get(SLOT_BYTES..2 * SLOT_BYTES))
        else {
            return Err(HeaderError::Short);
        };
        match (decode_slot(first), decode_slot(second)) {
            (Ok(a), Ok(b)) => Ok(if a.sequence >= b.sequence { a } else { b }),
            (Ok(a), Err(_)) => Ok(a),
            (Err(_), Ok(b)) => Ok(b),
            // The more telling of the two: a slot that was never written only says so.
            (Err(HeaderError::Magic), Err(e)) | (Err(e), Err(_)) => Err(e),
        }
    }
}

/// Reads fields in order; `None` past the end.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }
    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }
    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }
    fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_le_bytes)
    }
}

fn decode_slot(slot: &[u8]) -> Result<Header, HeaderError> {
    let (body, crc) = slot.split_last_chunk::<4>().ok_or(HeaderError::Short)?;
    let mut fields = Fields(body);
    if fields.take::<8>() != Some(MAGIC) {
        return Err(HeaderError::Magic);
    }
    if crc32c::crc32c(body) != u32::from_le_bytes(*crc) {
        return Err(HeaderError::Checksum);
    }
    let key = decode_key(body).ok_or(HeaderError::Short)?;
    let header = Header { key: key?, ..decode_fields(&mut fields).ok_or(HeaderError::Short)?? };
    let plain = header.key.is_none();
    // What is encrypted is encrypted in whole blocks, and the bottom has no map that could say which blocks are.
    if !plain && !header.size_bytes.is_multiple_of(BLOCK_BYTES) {
        return Err(HeaderError::Field { field: "size", value: header.size_bytes });
    }
    if !plain && header.parent.is_none() {
        return Err(HeaderError::Field { field: "parent", value: NO_LAYER });
    }
    Ok(header)
}

/// `None` when the slot is too short.
fn decode_key(body: &[u8]) -> Option<Result<Option<WrappedKey>, HeaderError>> {
    let mut fields = Fields(body.get(KEY_OFFSET..)?);
    let wrong = |field, value| Some(Err(HeaderError::Field { field, value: u64::from(value) }));
    match fields.u32()? {
        CIPHER_NONE => return Some(Ok(None)),
        CIPHER_XTS => {}
        other => return wrong("cipher", other),
    }
    let len = fields.u32()?;
    let vdc_key = fields.take::<16>()?;
    let wrapped = fields.0.get(..len as usize).filter(|wrapped| wrapped.len() <= WRAPPED_BYTES_MAX);
    let Some(wrapped) = wrapped else { return wrong("length of the wrapped key", len) };
    Some(Ok(Some(WrappedKey { vdc_key, wrapped: wrapped.to_vec() })))
}

/// `None` when the slot is too short, which its length rules out.
fn decode_fields(fields: &mut Fields<'_>) -> Option<Result<Header, HeaderError>> {
    let version = fields.u32()?;
    if version != VERSION {
        return Some(Err(HeaderError::Version(version)));
    }
    let state = fields.u32()?;
    let volume = fields.take::<16>()?;
    let layer = fields.u64()?;
    let size_bytes = fields.u64()?;
    let parent = fields.u64()?;
    let successor = fields.u64()?;
    let time_s = fields.u64()?;
    let generation = fields.u64()?;
    let sequence = fields.u64()?;
    let name_len = usize::from(fields.u16()?);
    let wrong = |field, value| Some(Err(HeaderError::Field { field, value }));
    if layer == NO_LAYER {
        return wrong("layer", layer);
    }
    if size_bytes == 0 || size_bytes > SIZE_BYTES_MAX {
        return wrong("size", size_bytes);
    }
    // A chain only ever goes up in numbers, so that walking it ends.
    if parent != NO_LAYER && parent >= layer {
        return wrong("parent", parent);
    }
    let state = match state {
        STATE_HEAD if successor == NO_LAYER => HeaderState::Head,
        STATE_SEALED if successor != NO_LAYER && successor > layer => HeaderState::Sealed { successor },
        STATE_HEAD | STATE_SEALED => return wrong("successor", successor),
        other => return wrong("state", u64::from(other)),
    };
    let name = fields.0.get(..name_len).filter(|_| name_len <= NAME_BYTES_MAX);
    let Some(snapshot) = name.and_then(|name| std::str::from_utf8(name).ok()) else {
        return Some(Err(HeaderError::Name));
    };
    Some(Ok(Header {
        volume,
        layer,
        size_bytes,
        parent: (parent != NO_LAYER).then_some(parent),
        state,
        snapshot: snapshot.to_owned(),
        time_s,
        generation,
        sequence,
        key: None,
    }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header() -> Header {
        Header {
            volume: *b"0123456789abcdef",
            layer: 7,
            size_bytes: 1 << 30,
            parent: Some(3),
            state: HeaderState::Sealed { successor: 9 },
            snapshot: "before".into(),
            time_s: 1_700_000_000,
            generation: 4,
            sequence: 2,
            key: None,
        }
    }

    fn file(a: &Header, b: &Header) -> Vec<u8> {
        let mut file = vec![0; 2 * SLOT_BYTES];
        for h in [a, b] {
            let at = h.slot_offset() as usize;
            file[at..at + SLOT_BYTES].copy_from_slice(&h.encode());
        }
        file
    }

    #[test]
    fn the_newer_slot_counts_and_a_torn_one_does_not() {
        let old = header();
        let new = Header { sequence: 3, state: HeaderState::Sealed { successor: 11 }, ..header() };
        let mut bytes = file(&old, &new);
        assert_eq!(Header::decode(&bytes), Ok(new));
        bytes[SLOT_BYTES + 100] ^= 1;
        assert_eq!(Header::decode(&bytes), Ok(old));
        bytes[100] ^= 1;
        assert_eq!(Header::decode(&bytes), Err(HeaderError::Checksum));
        assert_eq!(Header::decode(&bytes[..SLOT_BYTES]), Err(HeaderError::Short));
        assert_eq!(Header::decode(&[0; 2 * SLOT_BYTES]), Err(HeaderError::Magic));
    }

    #[test]
    fn a_wrapped_key_stands_behind_the_longest_name() {
        let key = WrappedKey { vdc_key: [7; 16], wrapped: (0..=255).collect() };
        let encrypted = Header { snapshot: "n".repeat(NAME_BYTES_MAX), key: Some(key), ..header() };
        let slot = encrypted.encode();
        assert_eq!(slot[512..520], [1, 0, 0, 0, 0, 1, 0, 0]);
        assert_eq!((slot[520], slot[536 + 255], slot[536 + 256]), (7, 255, 0));
        let bytes = [slot, [0; SLOT_BYTES]].concat();
        assert_eq!(Header::decode(&bytes), Ok(encrypted.clone()));
        for bad in [
            Header { parent: None, ..encrypted.clone() },
            Header { size_bytes: (1 << 30) + 511, ..encrypted.clone() },
        ] {
            let bytes = [bad.encode(), [0; SLOT_BYTES]].concat();
            assert!(matches!(Header::decode(&bytes), Err(HeaderError::Field { .. })));
        }
        for (at, value) in [(512, 2), (516, 1), (519, 0xff)] {
            let mut slot = slot;
            slot[at] = value;
            let crc = crc32c::crc32c(&slot[..SLOT_BYTES - 4]);
            slot[SLOT_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
            let bytes = [slot, [0; SLOT_BYTES]].concat();
            assert!(matches!(Header::decode(&bytes), Err(HeaderError::Field { .. })), "byte {at}");
        }
    }

    #[test]
    fn chains_only_go_up() {
        for bad in [
            Header { parent: Some(7), ..header() },
            Header { state: HeaderState::Sealed { successor: 7 }, ..header() },
            Header { size_bytes: 0, ..header() },
            Header { size_bytes: SIZE_BYTES_MAX + 1, ..header() },
        ] {
            let mut bytes = vec![0; 2 * SLOT_BYTES];
            bytes[..SLOT_BYTES].copy_from_slice(&bad.encode());
            assert!(matches!(Header::decode(&bytes), Err(HeaderError::Field { .. })), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(mut bytes in proptest::collection::vec(any::<u8>(), 0..9000), seal: bool) {
            if seal && bytes.len() >= 2 * SLOT_BYTES {
                // A right magic and checksum, so that the fields behind them are reached.
                bytes[..8].copy_from_slice(&MAGIC);
                bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
                let crc = crc32c::crc32c(&bytes[..SLOT_BYTES - 4]);
                bytes[SLOT_BYTES - 4..SLOT_BYTES].copy_from_slice(&crc.to_le_bytes());
            }
            let _ = Header::decode(&bytes);
        }
    }
}
