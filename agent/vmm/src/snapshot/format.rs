//! The file `state`, byte by byte. All numbers are little-endian, `crc` is CRC-32C.
//!
//! ```text
//!   header    0 "SERIOVM\0"   8 u32 version (1)   12 u32 sections   16 u64 bytes of the file
//!            24 u32 zero     28 u32 crc of the bytes before it
//!   section   0 u32 kind      4 u32 version        8 u32 instance   12 u32 crc of the payload
//!            16 u64 bytes of the payload          24 u32 zero       28 u32 crc of the 28 bytes before it
//!            32 the payload, and zeros up to a multiple of 8
//!
//!   kind  instance         payload: a protobuf message, version 1
//!     1   0                Config below: how many bytes of memory, how many of the following, the memory's checksums
//!     2   vcpu number      serio_hv::VcpuState
//!     3   0                serio_hv::VmState
//!     4   device number    serio_virtio::FunctionState
//!     5   0                machine::PlatformState
//!     6   0                of a diff only: the pages that it holds ([`super::pages`])
//! ```
//!
//! Each kind has its version: it grows when an older program would misread it, and the two before it are still read. Fields that
//! older programs may pass over are just added to the message. The configuration of a diff has version 2: who does not know
//! diffs would take its holes for zeros. Kinds come in ascending order, instances too, without gaps.

use prost::Message;
use serio_hv::{VcpuState, VmState};
use serio_virtio::FunctionState;

use super::pages::{PageSet, SavedPages};
use super::sums::{CHUNK_BYTES, Sums};
use super::{Link, Snapshot};
use crate::machine::{MachineState, PlatformState};

/// More than a state of 254 vcpus, 32 devices and 2 TiB of memory has, all of whose pages have changed.
pub(super) const BYTES_MAX: u64 = 96 << 20;

const MAGIC: [u8; 8] = *b"SERIOVM\0";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 32;
/// Bytes of a header that its own checksum covers.
const COVERED_BYTES: usize = 28;

const CONFIG: u32 = 1;
const VCPU: u32 = 2;
const VM: u32 = 3;
const FUNCTION: u32 = 4;
const PLATFORM: u32 = 5;
const PAGES: u32 = 6;
/// The version of each kind, as written here, and the oldest that is read.
const KIND_VERSION: u32 = 1;
/// Of the configuration of a diff.
const DIFF_VERSION: u32 = 2;
const KIND_VERSION_MIN: u32 = 1;

/// What has to be known first.
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct Config {
    #[prost(uint64, tag = "1")]
    memory_bytes: u64,
    #[prost(uint32, tag = "2")]
    vcpus: u32,
    #[prost(uint32, tag = "3")]
    functions: u32,
    /// Bytes of memory that each of the sums covers; 0: there are none.
    #[prost(uint64, tag = "4")]
    sum_bytes: u64,
    /// See [`super::sums`].
    #[prost(fixed32, repeated, packed = "true", tag = "5")]
    sums: Vec<u32>,
    /// Sixteen bytes: who this is; empty where nobody goes on from it.
    #[prost(bytes = "vec", tag = "6")]
    id: Vec<u8>,
    /// Of a diff: who it goes on from, and the checksum of its sections 2 to 5.
    #[prost(bytes = "vec", tag = "7")]
    base_id: Vec<u8>,
    #[prost(fixed32, tag = "8")]
    base_crc: u32,
}

/// A file that is no state of a VM, or a damaged one.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// Another kind of file.
    #[error("this is no saved state of a VM: it does not begin with its mark")]
    Magic,
    /// Written by a later program.
    #[error("{what} has version {found}, {known} is known here: use the newer serio-vmm that saved it")]
    Version {
        /// What.
        what: String,
        /// Its version.
        found: u32,
        /// The newest known.
        known: u32,
    },
    /// Bits have changed.
    #[error("the saved state is damaged: the checksum of {what} at byte {offset} is wrong")]
    Checksum {
        /// What.
        what: String,
        /// Where.
        offset: usize,
    },
    /// It ends too early.
    #[error("the saved state is damaged: it ends at byte {bytes}, within {what}")]
    Short {
        /// What is cut.
        what: String,
        /// The file's length.
        bytes: usize,
    },
    /// Something is in a wrong place, missing or twice.
    #[error("the saved state is damaged: {what} at byte {offset}")]
    Order {
        /// What.
        what: String,
        /// Where.
        offset: usize,
    },
    /// A payload with a right checksum that cannot be read.
    #[error("the saved state makes no sense: {what} at byte {offset}")]
    Message {
        /// Which.
        what: String,
        /// Where.
        offset: usize,
        /// Why.
        #[source]
        source: prost::DecodeError,
    },
}

fn name(kind: u32, instance: u32) -> String {
    match kind {
        CONFIG => "the configuration".to_owned(),
        VCPU => format!("vcpu {instance}"),
        VM => "the interrupt controllers".to_owned(),
        FUNCTION => format!("the PCI device 00:{instance:02x}.0"),
        PLATFORM => "the platform".to_owned(),
        PAGES => "the list of pages".to_owned(),
        other => format!("a section of kind {other}"),
    }
}

/// A header with its checksum.
fn seal(covered: &[&[u8]]) -> Vec<u8> {
    let mut bytes = covered.concat();
    bytes.resize(COVERED_BYTES, 0);
    let crc = crc32c::crc32c(&bytes);
    bytes.extend(crc.to_le_bytes());
    bytes
}

fn version_of(kind: u32, diff: bool) -> u32 {
    if kind == CONFIG && diff { DIFF_VERSION } else { KIND_VERSION }
}

fn add(sections: &mut Vec<u8>, (kind, version): (u32, u32), instance: u32, payload: &[u8]) {
    sections.extend(seal(&[
        &kind.to_le_bytes(),
        &version.to_le_bytes(),
        &instance.to_le_bytes(),
        &crc32c::crc32c(payload).to_le_bytes(),
        &(payload.len() as u64).to_le_bytes(),
    ]));
    sections.extend(payload);
    sections.resize(sections.len().next_multiple_of(8), 0);
}

/// The file for this, and the checksum of its machine, whatever its `link` says of that.
pub(super) fn encode(snapshot: &Snapshot) -> (Vec<u8>, u32) {
    let machine = &snapshot.machine;
    let count = |len: usize| u32::try_from(len).unwrap_or(u32::MAX);
    let (vcpus, functions) = (count(machine.vcpus.len()), count(machine.functions.len()));
    let one = |kind| (kind, KIND_VERSION);
    let mut sections = Vec::new();
    for (instance, vcpu) in (0..).zip(&machine.vcpus) {
        add(&mut sections, one(VCPU), instance, &vcpu.encode_to_vec());
    }
    add(&mut sections, one(VM), 0, &machine.vm.encode_to_vec());
    for (instance, function) in (0..).zip(&machine.functions) {
        add(&mut sections, one(FUNCTION), instance, &function.encode_to_vec());
    }
    add(&mut sections, one(PLATFORM), 0, &machine.platform.encode_to_vec());
    let crc = crc32c::crc32c(&sections);
    let base = snapshot.base.as_ref();
    if let Some((_, pages)) = base {
        add(&mut sections, one(PAGES), 0, &pages.save().encode_to_vec());
    }
    let config = Config {
        memory_bytes: snapshot.memory_bytes,
        vcpus,
        functions,
        sum_bytes: snapshot.sums.as_ref().map_or(0, |_| CHUNK_BYTES),
        sums: snapshot.sums.as_ref().map_or_else(Vec::new, |sums| sums.chunks().to_vec()),
        id: snapshot.link.map_or_else(Vec::new, |link| link.id.to_vec()),
        base_id: base.map_or_else(Vec::new, |(link, _)| link.id.to_vec()),
        base_crc: base.map_or(0, |(link, _)| link.crc),
    };
    let mut first = Vec::new();
    add(&mut first, (CONFIG, version_of(CONFIG, base.is_some())), 0, &config.encode_to_vec());
    let total = vcpus.saturating_add(functions).saturating_add(if base.is_some() { 4 } else { 3 });
    let bytes = (sections.len().saturating_add(first.len()).saturating_add(HEADER_BYTES)) as u64;
    let mut file = seal(&[&MAGIC, &VERSION.to_le_bytes(), &total.to_le_bytes(), &bytes.to_le_bytes()]);
    file.extend(first);
    file.extend(sections);
    (file, crc)
}

/// Reads a file of at most [`BYTES_MAX`] bytes.
pub(super) fn decode(bytes: &[u8]) -> Result<Snapshot, FormatError> {
    if !bytes.starts_with(&MAGIC) {
        return Err(FormatError::Magic);
    }
    let mut reader = Reader { bytes, at: 0 };
    let header = reader.header("its header")?;
    let version = u32_at(header, 8);
    if version != VERSION {
        return Err(FormatError::Version {
            what: "the saved state".to_owned(),
            found: version,
            known: VERSION,
        });
    }
    if u64_at(header, 16) != bytes.len() as u64 {
        return Err(FormatError::Short { what: "the last section".to_owned(), bytes: bytes.len() });
    }
    let config: Config = reader.section(CONFIG, 0)?;
    let sums = sums_of(&config)?;
    let machine_at = reader.at;
    let mut vcpus: Vec<VcpuState> = Vec::new();
    for instance in 0..config.vcpus {
        vcpus.push(reader.section(VCPU, instance)?);
    }
    let vm: VmState = reader.section(VM, 0)?;
    let mut functions: Vec<FunctionState> = Vec::new();
    for instance in 0..config.functions {
        functions.push(reader.section(FUNCTION, instance)?);
    }
    let platform: PlatformState = reader.section(PLATFORM, 0)?;
    let crc = crc32c::crc32c(bytes.get(machine_at..reader.at).unwrap_or_default());
    let base = match id_of(&config.base_id)? {
        None => None,
        Some(id) => {
            let offset = reader.at;
            let saved: SavedPages = reader.section(PAGES, 0)?;
            let pages = PageSet::restore(&saved, config.memory_bytes).ok_or_else(|| FormatError::Order {
                what: "pages that such a memory does not have".to_owned(),
                offset,
            })?;
            Some((Link { id, crc: config.base_crc }, pages))
        }
    };
    if reader.at != bytes.len() {
        return Err(FormatError::Order {
            what: "something follows the last section".to_owned(),
            offset: reader.at,
        });
    }
    let link = id_of(&config.id)?.map(|id| Link { id, crc });
    let machine = MachineState { vcpus, vm, functions, platform };
    Ok(Snapshot { memory_bytes: config.memory_bytes, machine, sums, link, base })
}

fn sums_of(config: &Config) -> Result<Option<Sums>, FormatError> {
    let wrong = |what: String| FormatError::Order { what, offset: HEADER_BYTES };
    match config.sum_bytes {
        0 => Ok(None),
        CHUNK_BYTES => match Sums::of_saved(config.sums.clone(), config.memory_bytes) {
            Some(sums) => Ok(Some(sums)),
            None => Err(wrong("another number of checksums than the memory has parts".to_owned())),
        },
        bytes => Err(wrong(format!("checksums of {bytes} bytes of memory each, which are not known here"))),
    }
}

fn id_of(bytes: &[u8]) -> Result<Option<[u8; 16]>, FormatError> {
    let wrong = || FormatError::Order { what: "an id of another length".to_owned(), offset: HEADER_BYTES };
    if bytes.is_empty() { Ok(None) } else { bytes.try_into().map(Some).map_err(|_| wrong()) }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, what: &str, len: usize) -> Result<&'a [u8], FormatError> {
        let end = self.at.checked_add(len);
        let part = end.and_then(|end| self.bytes.get(self.at..end));
        let short = || FormatError::Short { what: what.to_owned(), bytes: self.bytes.len() };
        let part = part.ok_or_else(short)?;
        self.at = self.at.saturating_add(len);
        Ok(part)
    }

    fn header(&mut self, what: &str) -> Result<&'a [u8], FormatError> {
        let offset = self.at;
        let header = self.take(what, HEADER_BYTES)?;
        let (covered, _) = header.split_at(COVERED_BYTES.min(header.len()));
        if crc32c::crc32c(covered) != u32_at(header, COVERED_BYTES) {
            return Err(FormatError::Checksum { what: what.to_owned(), offset });
        }
        Ok(header)
    }

    /// The next section, which has to be this one.
    fn section<M: Message + Default>(&mut self, kind: u32, instance: u32) -> Result<M, FormatError> {
        let offset = self.at;
        let what = name(kind, instance);
        let header = self.header(&what)?;
        if (u32_at(header, 0), u32_at(header, 8)) != (kind, instance) {
            let found = name(u32_at(header, 0), u32_at(header, 8));
            return Err(FormatError::Order { what: format!("{found} in the place of {what}"), offset });
        }
        let version = u32_at(header, 4);
        // A diff says so before its other fields are known; what has no base there is read as a full one.
        let known = version_of(kind, true);
        if !(KIND_VERSION_MIN..=known).contains(&version) {
            return Err(FormatError::Version { what, found: version, known });
        }
        let len = usize::try_from(u64_at(header, 16)).unwrap_or(usize::MAX);
        let payload = self.take(&what, len)?;
        if crc32c::crc32c(payload) != u32_at(header, 12) {
            return Err(FormatError::Checksum { what, offset });
        }
        let padding = len.next_multiple_of(8).saturating_sub(len);
        self.take(&what, padding)?;
        M::decode(payload).map_err(|source| FormatError::Message { what, offset, source })
    }
}

/// Of a header, which is long enough.
fn u32_at(header: &[u8], at: usize) -> u32 {
    let mut bytes = [0; 4];
    for (byte, value) in bytes.iter_mut().zip(header.iter().skip(at)) {
        *byte = *value;
    }
    u32::from_le_bytes(bytes)
}

fn u64_at(header: &[u8], at: usize) -> u64 {
    u64::from(u32_at(header, at)) | u64::from(u32_at(header, at.saturating_add(4))) << 32
}
