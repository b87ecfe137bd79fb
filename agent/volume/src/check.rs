//! The verifier of a volume: headers, chain, sizes, maps against data files. Reads only; any bytes are answered, and
//! memory is bounded by the number of files.
//!
//! What is damage and what is not:
//! - **Problem**: the volume does not open, or reads something that nobody wrote: damaged headers in the chain, a layer
//!   that is missing or belongs elsewhere, a data or map file that was cut, map states that do not exist, a map that
//!   is not what its checksums say, two layers in one file.
//! - **Leak**: space that is allocated where the map says absent or zero. A crash leaves some (written, never flushed);
//!   no read ever shows it. Counted in bytes by what the file system calls data.
//!   Data files that have several names are shared with clones, whose maps may name that space: it is not counted.
//! - **Leftover**: files that the chain does not name, of a snapshot that did not commit.
//!
//! A head that somebody writes changes under our eyes, and its map lags behind: then only its header is checked, and
//! the report says so. A head that nobody writes is locked for reading meanwhile, so writers wait.

use std::{collections::HashMap, fs::File, io};

use crate::{
    chain,
    error::OpenError,
    header::{Header, HeaderError, HeaderState, SLOT_BYTES},
    layer,
    media::{Lock, Media},
    scan::{self, Scan},
    stack::LAYERS_MAX,
    sums::{self, Bits, PAGE_COVERS, Region, Stored, Sum},
    volume::VolumeFiles,
};

/// What `check` found wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// No file was given, or the first is not a bottom.
    #[error("there is no bottom layer: {0}")]
    NoBottom(String),
    /// A header in the chain, or what may be one.
    #[error("map file number {index} (oldest is 0): {source}")]
    Header {
        /// Position in the list that was given.
        index: usize,
        /// Why.
        source: HeaderError,
    },
    /// A sealed layer whose successor is not to be found, so what lies above it is lost.
    #[error("layer {layer} is sealed, and its successor {successor} {why}")]
    Successor {
        /// The sealed layer.
        layer: u64,
        /// The layer that it names.
        successor: u64,
        /// What is wrong with that one.
        why: &'static str,
    },
    /// Two sealed layers carry one snapshot name.
    #[error("layers {first} and {second} are both the snapshot `{name}`")]
    SnapshotTwice {
        /// The name.
        name: String,
        /// The older layer.
        first: u64,
        /// The newer layer.
        second: u64,
    },
    /// More layers than a stack may have.
    #[error("the chain has more than {LAYERS_MAX} layers")]
    TooManyLayers,
    /// A file is shorter than its header promises.
    #[error("the {file} file of layer {layer} has {len} bytes, its header promises {expected}")]
    Cut {
        /// Number of the layer.
        layer: u64,
        /// Which of its files.
        file: &'static str,
        /// Its length, bytes.
        len: u64,
        /// What it should have, bytes.
        expected: u64,
    },
    /// The map names data past the end of the data file.
    #[error("the map of layer {layer} names {bytes} bytes of data past the end of the data file")]
    MissingData {
        /// Number of the layer.
        layer: u64,
        /// How many.
        bytes: u64,
    },
    /// The map has states that do not exist.
    #[error(
        "the map of layer {layer} is damaged: {blocks} blocks have no valid state, first at map byte {at}"
    )]
    Map {
        /// Number of the layer.
        layer: u64,
        /// Blocks.
        blocks: u64,
        /// Offset of the first in the map file (of its word), bytes.
        at: u64,
    },
    /// The map has bits behind its last block.
    #[error("the map of layer {layer} has bits past the volume's last block, first near map byte {at}")]
    MapBeyond {
        /// Number of the layer.
        layer: u64,
        /// Offset in the map file, bytes.
        at: u64,
    },
    /// The map of a sealed layer is not the one that was sealed.
    #[error(
        "the map of layer {layer} has rotted: it does not match its checksum for bytes {offset}+{len} of the volume; restore them from a backup"
    )]
    MapRot {
        /// Number of the layer.
        layer: u64,
        /// First byte of the volume that its page speaks of.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Two layers whose data or maps are in one file.
    #[error("layers {first} and {second} are in one {file} file: what is written to one changes the other")]
    OneFile {
        /// A layer.
        first: u64,
        /// A later one.
        second: u64,
        /// Which of their files.
        file: &'static str,
    },
    /// A map or a head's data under a second name: another volume may change it.
    #[error("the {file} file of layer {layer} has {names} names: it must belong to this volume alone")]
    Shared {
        /// Number of the layer.
        layer: u64,
        /// Which of its files.
        file: &'static str,
        /// Names in the file system.
        names: u64,
    },
    /// The host answered an error.
    #[error("cannot read the files of layer {layer}: errno {errno}")]
    Read {
        /// Number of the layer.
        layer: u64,
        /// The errno.
        errno: i32,
    },
}

/// A layer of the chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerReport {
    /// What it says about itself.
    pub header: Header,
    /// False for a head that somebody else writes: its map and data were not compared.
    pub compared: bool,
    /// One of the header's two slots is damaged; the other counts. A crash can leave that behind.
    pub torn_header: bool,
    /// Bytes that the map calls data; at the bottom, bytes that are no holes.
    pub data_bytes: u64,
    /// Bytes that the map calls zero.
    pub zero_bytes: u64,
    /// Bytes allocated in the data file where no read looks; 0 if clones share the file.
    pub leaked_bytes: u64,
    /// The data file has more names: clones share it.
    pub shared: bool,
    /// Whether a sealed layer has all its checksums; none: it has not begun to have any.
    pub summed: Option<bool>,
}

/// What a volume is made of, and what is wrong with it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// What is wrong: empty for a clean volume.
    pub problems: Vec<Problem>,
    /// The chain as far as it could be followed, bottom first.
    pub layers: Vec<LayerReport>,
    /// Positions in the list that was given of layers that the chain does not name.
    pub leftovers: Vec<usize>,
    /// Bytes allocated in the data files of leftovers.
    pub leftover_bytes: u64,
}

impl CheckReport {
    /// Whether nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.problems.is_empty()
    }

    /// Size of the volume at the top of the chain, bytes.
    pub fn size_bytes(&self) -> u64 {
        self.layers.last().map_or(0, |layer| layer.header.size_bytes)
    }

    /// Bytes of data in all layers.
    pub fn data_bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.data_bytes).sum()
    }

    /// Bytes leaked in all layers.
    pub fn leaked_bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.leaked_bytes).sum()
    }
}

impl VolumeFiles {
    /// Verifies the volume; see the head of `check.rs`. `Err` only when a descriptor cannot be duplicated.
    pub fn check(&self) -> io::Result<CheckReport> {
        self.check_layers(true)
    }

    /// As [`VolumeFiles::check`], but the head is neither locked nor compared: nobody who wants to open it has to wait.
    pub fn check_sealed(&self) -> io::Result<CheckReport> {
        self.check_layers(false)
    }

    fn check_layers(&self, head: bool) -> io::Result<CheckReport> {
        let clone = |file: &File| file.try_clone().map(Media::new);
        let files: io::Result<Vec<_>> =
            self.layers.iter().map(|l| Ok((clone(&l.data)?, clone(&l.map)?))).collect();
        Ok(check_layers(&files?, head))
    }
}

#[cfg(test)]
pub(crate) fn check_media(files: &[(Media, Media)]) -> CheckReport {
    check_layers(files, true)
}

fn check_layers(files: &[(Media, Media)], head: bool) -> CheckReport {
    let mut report = CheckReport::default();
    let headers: Vec<_> = files.iter().map(|(_, map)| layer::read_header(map)).collect();
    let chain = follow(&headers, &mut report.problems);
    for (index, header) in &chain {
        let Some((data, map)) = files.get(*index) else { continue };
        let look = head || header.state != HeaderState::Head;
        report.layers.push(check_layer(data, map, header, look, &mut report.problems));
    }
    check_apart(files, &chain, &mut report.problems);
    for (index, (data, _)) in files.iter().enumerate() {
        if chain.iter().all(|(i, _)| *i != index) {
            report.leftovers.push(index);
            report.leftover_bytes += scan::allocated(data, 0, data.len().unwrap_or(0));
        }
    }
    report
}

/// The chain as the headers have it, as far as it goes, and what is wrong with it.
fn follow(headers: &[Result<Header, HeaderError>], problems: &mut Vec<Problem>) -> Vec<(usize, Header)> {
    let mut chain = match chain::bottom(headers) {
        Ok(bottom) => vec![bottom],
        Err(OpenError::Header { index, source }) => {
            problems.push(Problem::Header { index, source });
            return Vec::new();
        }
        Err(e) => {
            problems.push(Problem::NoBottom(e.to_string()));
            return Vec::new();
        }
    };
    while let Some((_, top)) = chain.last()
        && let HeaderState::Sealed { successor } = top.state
    {
        let twin =
            chain.iter().rev().skip(1).find(|(_, h)| !h.snapshot.is_empty() && h.snapshot == top.snapshot);
        if let Some((_, twin)) = twin {
            let name = twin.snapshot.clone();
            problems.push(Problem::SnapshotTwice { name, first: twin.layer, second: top.layer });
        }
        if chain.len() > LAYERS_MAX {
            problems.push(Problem::TooManyLayers);
            break;
        }
        match successor_of(top, successor, headers) {
            Ok(next) => chain.push(next),
            Err(why) => {
                problems.push(Problem::Successor { layer: top.layer, successor, why });
                // The missing one is probably among the damaged.
                for (index, header) in headers.iter().enumerate() {
                    if let Err(source) = header {
                        problems.push(Problem::Header { index, source: source.clone() });
                    }
                }
                break;
            }
        }
    }
    chain
}

fn successor_of(
    top: &Header,
    successor: u64,
    headers: &[Result<Header, HeaderError>],
) -> Result<(usize, Header), &'static str> {
    let mut why = "is missing";
    for (index, header) in headers.iter().enumerate() {
        let Ok(header) = header else { continue };
        if header.layer != successor {
            continue;
        }
        why = match (header.volume == top.volume, chain::stands_on(header, top.layer)) {
            (true, true) => return Ok((index, header.clone())),
            (true, false) => "stands on another layer",
            (false, _) => "belongs to another volume",
        };
    }
    Err(why)
}

fn check_layer(
    data: &Media,
    map: &Media,
    header: &Header,
    look: bool,
    problems: &mut Vec<Problem>,
) -> LayerReport {
    let is_head = header.state == HeaderState::Head;
    // Sealed layers never change. An error means that the file system has no locks: then nobody can tell.
    let locked = look && is_head && data.try_lock(Lock::Shared).unwrap_or(false);
    // Between our look and our lock its writer may have gone on: then it is the writer's, as before.
    let compared = !is_head || (locked && layer::read_header(map).as_ref() == Ok(header));
    let mut report = LayerReport {
        header: header.clone(),
        compared,
        torn_header: is_torn(map),
        data_bytes: 0,
        zero_bytes: 0,
        leaked_bytes: 0,
        shared: data.identity().is_ok_and(|(_, _, names)| names > 1),
        summed: None,
    };
    let result = match compared {
        true => compare(data, map, &mut report, problems),
        false => Ok(()),
    };
    if let Err(e) = result.and_then(|()| compare_sums(map, &mut report, problems)) {
        problems.push(Problem::Read { layer: header.layer, errno: e.raw_os_error().unwrap_or(libc::EIO) });
    }
    if locked {
        data.unlock();
    }
    report
}

fn compare(
    data: &Media,
    map: &Media,
    report: &mut LayerReport,
    problems: &mut Vec<Problem>,
) -> io::Result<()> {
    let header = &report.header;
    let (layer, data_len, map_len) = (header.layer, data.len()?, map.len()?);
    let mut cut = |file, len, expected| {
        if len < expected {
            problems.push(Problem::Cut { layer, file, len, expected });
        }
    };
    cut("data", data_len, header.size_bytes);
    if header.parent.is_none() {
        // The bottom answers by its data file alone; its map is not asked.
        report.data_bytes = scan::allocated(data, 0, data_len.min(header.size_bytes));
    } else {
        cut("map", map_len, scan::map_file_bytes(header));
        let Scan { data_bytes, zero_bytes, leaked_bytes, damaged, damaged_at, beyond_at, missing_bytes } =
            scan::scan(map, data, data_len, header)?;
        if damaged > 0 {
            problems.push(Problem::Map { layer, blocks: damaged, at: damaged_at });
        }
        if let Some(at) = beyond_at {
            problems.push(Problem::MapBeyond { layer, at });
        }
        if missing_bytes > 0 {
            problems.push(Problem::MissingData { layer, bytes: missing_bytes });
        }
        (report.data_bytes, report.zero_bytes, report.leaked_bytes) = (data_bytes, zero_bytes, leaked_bytes);
    }
    // Past the volume's end nothing is ever read.
    report.leaked_bytes += scan::allocated(data, report.header.size_bytes, data_len);
    if report.shared {
        report.leaked_bytes = 0;
    }
    Ok(())
}

/// The map of a sealed layer against the checksums of its pages.
fn compare_sums(map: &Media, report: &mut LayerReport, problems: &mut Vec<Problem>) -> io::Result<()> {
    let (header, region) = (&report.header, Region::of(&report.header));
    if header.state == HeaderState::Head {
        return Ok(());
    }
    report.summed = region.header(map)?.map(|sums| sums.complete);
    if report.summed.is_none() || region.bottom {
        return Ok(());
    }
    for page in 0..region.pages {
        // A merge may be changing it: then another look shows something else.
        if let Some(wrong) = wrong_page(&region, map, page)?
            && wrong_page(&region, map, page)? == Some(wrong)
        {
            let offset = page * PAGE_COVERS;
            let len = PAGE_COVERS.min(header.size_bytes.saturating_sub(offset));
            problems.push(Problem::MapRot { layer: header.layer, offset, len });
        }
    }
    Ok(())
}

/// A page of bits that its sum does not match, and that sum. The sum is read first: who changes bits drops it before.
fn wrong_page(region: &Region, map: &Media, page: u64) -> io::Result<Option<(Bits, Option<Sum>)>> {
    let stored = region.page(map, page)?;
    let bits = region.bits(map, page)?;
    let empty = bits.iter().all(|b| *b == 0);
    Ok(match stored {
        Stored::Page(sums) => {
            let sum = sums.bits.filter(|sum| *sum != sums::of_bits(&bits));
            sum.map(|sum| (bits, Some(sum)))
        }
        Stored::Nothing if !empty && region.header(map)?.is_some_and(|header| header.complete) => {
            Some((bits, None))
        }
        _ => None,
    })
}

/// Whether each file is one layer's, and those that are written this volume's.
fn check_apart(files: &[(Media, Media)], chain: &[(usize, Header)], problems: &mut Vec<Problem>) {
    let mut seen: HashMap<(u64, u64), (u64, &'static str)> = HashMap::new();
    for (index, header) in chain {
        let Some((data, map)) = files.get(*index) else { continue };
        for (media, file) in [(data, "data"), (map, "map")] {
            let Ok((device, number, names)) = media.identity() else { continue };
            if let Some((first, file)) = seen.insert((device, number), (header.layer, file)) {
                problems.push(Problem::OneFile { first, second: header.layer, file });
            }
            let is_private = file == "map" || header.state == HeaderState::Head;
            if is_private && names > 1 {
                problems.push(Problem::Shared { layer: header.layer, file, names });
            }
        }
    }
}

/// Whether a slot holds something that is no header. A slot that was never written is zeros.
fn is_torn(map: &Media) -> bool {
    let mut slots = [0; 2 * SLOT_BYTES];
    if map.read_exact_at(&mut slots, 0).is_err() {
        return false;
    }
    slots.chunks(SLOT_BYTES).any(|slot| {
        let mut alone = [0; 2 * SLOT_BYTES];
        alone[..SLOT_BYTES].copy_from_slice(slot);
        slot.iter().any(|b| *b != 0) && Header::decode(&alone).is_err()
    })
}
