//! Clones: a new volume over sealed layers that it shares with another one, or over an image. Nothing is copied but maps.
//!
//! ```text
//!  volume A   0.data ◄──map── 1.data ◄──map── 2.data (head)          s1 = layer 1
//!               ║ link         ║ link
//!  volume B   0.data ◄──map'─ 1.data ◄──map'─ 2.data (its own head)  a clone of A at s1, in its own directory
//! ```
//!
//! The caller links the *data* files of the point's layers into the new directory, under the same numbers, and makes empty map
//! files and the files of a head beside them. Here the maps get the source's bits and new headers: another volume, no
//! snapshots' names. So each volume is complete in itself, and may merge or delete its layers without asking anybody.
//!
//! The checksums of the layers are copied, too, under the map's lock: the clone's scrub has nothing to compute anew.
//!
//! Why sharing is safe: all volumes that share a data file agree about what each block *should* read as at that layer, and
//! nobody ever writes anything else there. README.md, "Sharing", has the argument.
//!
//! The header of the bottom is written last: until then the directory holds no volume. Sources are only read, and may be in use.

use std::{fs::File, io, ops::Range};

use crate::{
    chain::walk,
    crypto::{KeyError, VdcSecret},
    error::CloneError,
    header::{Header, HeaderState, MAP_OFFSET},
    layer,
    map::PAGE_BYTES,
    media::Media,
    sealed::MapLock,
    stack::LAYERS_MAX,
    sums::Region,
    volume::{Access, LayerFiles, VolumeFiles, now_s},
};

/// Bytes of a map that are copied at a time.
const PART_BYTES: u64 = 256 << 10;

/// The files and the identity of a volume that is made from another one, or from an image.
#[derive(Debug)]
pub struct NewVolume {
    /// Its identity.
    pub volume: [u8; 16],
    /// Its size, bytes: at least that of the source.
    pub size_bytes: u64,
    /// An empty file for the map of each of the source's layers, in the same order.
    pub maps: Vec<File>,
    /// The files of its head: layer `top + 1`, where `top` is the number of the source's highest layer (0 of an image).
    pub head: LayerFiles,
    /// The key of the vdc whose volumes are encrypted: its head is, with a data key of its own.
    pub key: Option<VdcSecret>,
}

/// As [`NewVolume`], of files or simulated ones.
pub(crate) struct NewMedia {
    pub(crate) volume: [u8; 16],
    pub(crate) size_bytes: u64,
    pub(crate) maps: Vec<Media>,
    pub(crate) head: (Media, Media),
    pub(crate) key: Option<VdcSecret>,
}

impl From<NewVolume> for NewMedia {
    fn from(new: NewVolume) -> NewMedia {
        NewMedia {
            volume: new.volume,
            size_bytes: new.size_bytes,
            maps: new.maps.into_iter().map(Media::new).collect(),
            head: (Media::new(new.head.data), Media::new(new.head.map)),
            key: new.key,
        }
    }
}

impl VolumeFiles {
    /// Makes `new` a volume that starts as this one was at the snapshot `name`. This one is only read, and may be in use.
    ///
    /// Layers of these files that the snapshot does not need get no header, so their new map files may be removed.
    pub fn clone_point(&self, name: &str, new: NewVolume) -> Result<(), CloneError> {
        clone_point(&self.media().map_err(io_error("duplicate a descriptor"))?, name, &new.into())
    }
}

/// Makes `new` a volume that starts with the bytes of `image`, a file that never changes.
pub fn clone_image(image: &File, new: NewVolume) -> Result<(), CloneError> {
    let image = Media::new(image.try_clone().map_err(io_error("duplicate a descriptor"))?);
    let size_bytes = image.len().map_err(io_error("measure the image"))?;
    let bottom = Header {
        volume: new.volume,
        layer: 0,
        size_bytes,
        parent: None,
        state: HeaderState::Sealed { successor: 1 },
        snapshot: String::new(),
        time_s: now_s(),
        generation: 0,
        sequence: 0,
        key: None,
    };
    make(&[(None, 0, bottom)], &new.into())
}

fn io_error(what: &'static str) -> impl Fn(io::Error) -> CloneError {
    move |source| CloneError::Io { what, source }
}

pub(crate) fn clone_point(files: &[(Media, Media)], name: &str, new: &NewMedia) -> Result<(), CloneError> {
    let chain = walk(files, Access::ReadOnly, Some(name))?;
    for (index, header) in &chain {
        // A file that was cut would be found out by whoever opens the clone, much later.
        if files[*index].0.len().map_err(io_error("measure a data file"))? < header.size_bytes {
            return Err(CloneError::Cut(header.layer));
        }
    }
    let shared: Vec<_> =
        chain.into_iter().map(|(index, header)| (Some(&files[index].1), index, header)).collect();
    make(&shared, new)
}

/// `shared`, bottom first: the source's map file (none of an image), the position of the new one, the source's header.
fn make(shared: &[(Option<&Media>, usize, Header)], new: &NewMedia) -> Result<(), CloneError> {
    let Some((_, _, top)) = shared.last() else { return Err(CloneError::Maps) };
    if shared.len() >= LAYERS_MAX {
        return Err(CloneError::TooManyLayers(shared.len()));
    }
    if new.size_bytes < top.size_bytes {
        return Err(CloneError::Size { size: new.size_bytes, least: top.size_bytes });
    }
    let number = top.layer.checked_add(1).filter(|n| *n < u64::MAX).ok_or(CloneError::Maps)?;
    let key = match (&top.key, &new.key) {
        (None, None) => None,
        (Some(key), None) => return Err(CloneError::Key(KeyError::Missing { id: key.vdc_key })),
        (source, Some(secret)) => {
            if let Some(source) = source {
                // Another vdc's key would make a volume that no single key opens.
                secret.unwrap_key(source, top.layer)?;
            }
            Some(secret.new_data_key(number)?.0)
        }
    };
    let head = Header {
        volume: new.volume,
        layer: number,
        size_bytes: new.size_bytes,
        parent: Some(top.layer),
        state: HeaderState::Head,
        snapshot: String::new(),
        time_s: now_s(),
        generation: 0,
        sequence: 0,
        key,
    };
    let mut above = head.layer;
    let mut bottom = None;
    let mut written = Vec::new();
    // All is written before the first sync: a file system's journal then mostly turns once for all of them.
    for (at, (map, index, source)) in shared.iter().enumerate().rev() {
        let below = at.checked_sub(1).and_then(|below| shared.get(below));
        let header = Header {
            volume: new.volume,
            parent: below.map(|(_, _, below)| below.layer),
            state: HeaderState::Sealed { successor: above },
            snapshot: String::new(),
            sequence: 0,
            ..source.clone()
        };
        above = header.layer;
        let to = new.maps.get(*index).ok_or(CloneError::Maps)?;
        let has_sums = fill_map(*map, to, &header)?;
        if header.parent.is_none() {
            if has_sums {
                // Before the header: a sums page that a crash has lost would say that all is empty there.
                written.push(to);
            }
            bottom = Some((to, header));
            continue;
        }
        to.write_all_at(&header.encode(), header.slot_offset()).map_err(io_error("write a new header"))?;
        written.push(to);
    }
    layer::initialize(&new.head.0, &new.head.1, &head, false)?;
    for map in written {
        map.sync_data().map_err(io_error("sync a new map file"))?;
    }
    if let Some((map, header)) = bottom {
        layer::write_header(map, &header).map_err(io_error("write the header of the bottom"))?;
    }
    new.head.0.unlock();
    Ok(())
}

/// Makes a map file what it is in the source, but for its header; whether it has checksums.
fn fill_map(from: Option<&Media>, to: &Media, header: &Header) -> Result<bool, CloneError> {
    to.set_len(0).map_err(io_error("empty a new map file"))?;
    to.set_len(header.map_file_bytes()).map_err(io_error("size a new map file"))?;
    from.map_or(Ok(false), |from| copy_map(from, to, header)).map_err(io_error("copy a map"))
}

/// Copies what the map of a sealed layer says, and its checksums if nobody changes them now; whether it has some.
fn copy_map(from: &Media, to: &Media, header: &Header) -> io::Result<bool> {
    let held = MapLock::share(from)?;
    if header.parent.is_some() {
        // Whoever merges into that layer meanwhile only adds bits, and whether one is seen or not is the same: what it
        // names lies below too.
        copy_pages(from, to, MAP_OFFSET..header.map_file_bytes())?;
    }
    let region = Region::of(header);
    if held.is_none() || region.header(from)?.is_none() {
        return Ok(false);
    }
    to.set_len(region.range().end)?;
    copy_pages(from, to, region.range())?;
    Ok(true)
}

/// Copies a part of a map file, but not its holes, nor pages of zeros.
fn copy_pages(from: &Media, to: &Media, range: Range<u64>) -> io::Result<()> {
    let end = range.end.min(from.len()?);
    let mut buffer = vec![0; PART_BYTES as usize];
    let mut at = range.start;
    while at < end {
        let (len, hole) = from.extent_at(at, end);
        let len = len.max(1);
        if hole {
            at += len;
            continue;
        }
        let stop = at + len;
        while at < stop {
            let part = &mut buffer[..(stop - at).min(PART_BYTES) as usize];
            from.read_exact_at(part, at)?;
            for (page, offset) in part.chunks(PAGE_BYTES).zip((at..).step_by(PAGE_BYTES)) {
                if page.iter().any(|byte| *byte != 0) {
                    to.write_all_at(page, offset)?;
                }
            }
            at += part.len() as u64;
        }
    }
    Ok(())
}
