//! One open layer: its two files, what its header says, and its map.

use std::{
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::{
    crypto::{SectorCipher, UNIT_BYTES},
    error::CreateError,
    header::{BLOCK_BYTES, Header, HeaderError, HeaderState, MAP_OFFSET, SIZE_BYTES_MAX, SLOT_BYTES},
    map::BlockMap,
    media::{Lock, Media},
};

/// An open layer.
pub(crate) struct Layer {
    pub(crate) data: Media,
    /// None for a plain raw file.
    pub(crate) map_file: Option<Media>,
    /// None at the bottom, which answers for every block by its data file alone.
    pub(crate) map: Option<BlockMap>,
    /// Of an encrypted layer: its data file is read and written through this, by the driver or by [`Layer::read_at`].
    pub(crate) cipher: Option<Arc<SectorCipher>>,
    pub(crate) size_bytes: u64,
    pub(crate) blocks: u64,
    /// Past the page cache, in whole units: see `direct.rs`.
    direct: AtomicBool,
    header: Mutex<Option<Header>>,
}

impl Layer {
    /// `cipher` is that of the header's data key.
    pub(crate) fn new(
        data: Media,
        map_file: Media,
        header: Header,
        map: Option<BlockMap>,
        cipher: Option<Arc<SectorCipher>>,
    ) -> Layer {
        assert_eq!(
            header.key.is_some(),
            cipher.is_some(),
            "an encrypted layer is never opened as a plain one"
        );
        Layer {
            data,
            direct: AtomicBool::new(false),
            map_file: Some(map_file),
            map,
            cipher,
            size_bytes: header.size_bytes,
            blocks: header.blocks(),
            header: Mutex::new(Some(header)),
        }
    }

    /// A plain raw file.
    pub(crate) fn raw(data: Media, size_bytes: u64) -> Layer {
        let blocks = size_bytes.div_ceil(crate::header::BLOCK_BYTES);
        let direct = AtomicBool::new(false);
        Layer {
            data,
            map_file: None,
            map: None,
            cipher: None,
            size_bytes,
            blocks,
            direct,
            header: Mutex::new(None),
        }
    }

    /// What its data file is written in: whole sectors if it is encrypted or direct, else single bytes.
    pub(crate) fn unit_bytes(&self) -> u64 {
        if self.cipher.is_some() || self.is_direct() { UNIT_BYTES } else { 1 }
    }

    /// Whether its data file is read and written past the page cache: see `direct.rs`.
    pub(crate) fn is_direct(&self) -> bool {
        self.direct.load(Ordering::Acquire)
    }

    /// Goes past the page cache, if it is a head above others and the file system can. Nothing may be under way.
    pub(crate) fn go_direct(&self) {
        let fits = self.map.is_some()
            && self.size_bytes.is_multiple_of(BLOCK_BYTES)
            && self.header().is_some_and(|header| header.state == HeaderState::Head);
        let direct = fits && self.data.set_direct(true) && self.data.takes_direct(UNIT_BYTES as usize);
        self.direct.store(true, Ordering::Release);
        if !direct {
            self.end_direct();
        }
    }

    /// Goes through the page cache again. Nothing may be under way.
    pub(crate) fn end_direct(&self) {
        if self.direct.swap(false, Ordering::AcqRel) {
            self.data.set_direct(false);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Header>> {
        // The header is replaced whole, so a panic elsewhere leaves it right.
        self.header.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the header says; None for a plain raw file.
    pub(crate) fn header(&self) -> Option<Header> {
        self.lock().clone()
    }

    /// Whether the data file holds the bytes as they are read, so that they may be sent from it: it is not encrypted.
    pub(crate) fn is_plain(&self) -> bool {
        self.lock().as_ref().is_none_or(|header| header.key.is_none())
    }

    /// Writes a changed header over the slot that does not count, and syncs: afterwards the change is durable.
    pub(crate) fn update_header(&self, change: impl FnOnce(&mut Header)) -> io::Result<()> {
        let mut guard = self.lock();
        let (Some(header), Some(file)) = (guard.as_mut(), &self.map_file) else {
            return Err(io::Error::from(io::ErrorKind::Unsupported));
        };
        let mut changed = header.clone();
        change(&mut changed);
        changed.sequence = changed.sequence.wrapping_add(1);
        write_header(file, &changed)?;
        *header = changed;
        Ok(())
    }
}

/// Reads a part of a layer's data file through its cipher.
pub(crate) fn read_at(
    data: &Media,
    cipher: Option<&SectorCipher>,
    bytes: &mut [u8],
    offset: u64,
) -> io::Result<()> {
    data.read_exact_at(bytes, offset)?;
    if let Some(cipher) = cipher {
        cipher.decrypt(offset, bytes);
    }
    Ok(())
}

/// Writes a part of a layer's data file through its cipher; `bytes` are what was written afterwards.
pub(crate) fn write_at(
    data: &Media,
    cipher: Option<&SectorCipher>,
    bytes: &mut [u8],
    offset: u64,
) -> io::Result<()> {
    if let Some(cipher) = cipher {
        cipher.encrypt(offset, bytes);
    }
    data.write_all_at(bytes, offset)
}

/// Writes one slot and syncs it.
pub(crate) fn write_header(file: &Media, header: &Header) -> io::Result<()> {
    file.write_all_at(&header.encode(), header.slot_offset())?;
    file.sync_data()
}

/// Reads the newer valid header of a map file.
pub(crate) fn read_header(file: &Media) -> Result<Header, HeaderError> {
    let errno = |e: io::Error| HeaderError::Read(e.raw_os_error().unwrap_or(libc::EIO));
    if file.len().map_err(errno)? < MAP_OFFSET {
        return Err(HeaderError::Short);
    }
    let mut bytes = [0; 2 * SLOT_BYTES];
    file.read_exact_at(&mut bytes, 0).map_err(errno)?;
    Header::decode(&bytes)
}

/// Makes both files those of an empty head and syncs them. What they held is lost. `keep_data` leaves the bytes
/// of the data file (an import wrote them) and only sets its length.
pub(crate) fn initialize(
    data: &Media,
    map_file: &Media,
    header: &Header,
    keep_data: bool,
) -> Result<(), CreateError> {
    if header.size_bytes == 0 || header.size_bytes > SIZE_BYTES_MAX {
        return Err(CreateError::Size(header.size_bytes));
    }
    if header.key.is_some() && !header.size_bytes.is_multiple_of(BLOCK_BYTES) {
        return Err(CreateError::Unaligned(header.size_bytes));
    }
    let io = |what| move |source| CreateError::Io { what, source };
    if !data.try_lock(Lock::Exclusive).map_err(io("lock the new data file"))? {
        return Err(CreateError::InUse);
    }
    // A snapshot's leftover that a clone has too must not be emptied under it.
    match data.links().map_err(io("look at the new data file"))? {
        0 | 1 => {}
        names => return Err(CreateError::Shared(names)),
    }
    if !keep_data {
        data.set_len(0).map_err(io("empty the new data file"))?;
    }
    data.set_len(header.size_bytes).map_err(io("size the new data file"))?;
    data.sync_data().map_err(io("sync the new data file"))?;
    map_file.set_len(0).map_err(io("empty the new map file"))?;
    map_file.set_len(header.map_file_bytes()).map_err(io("size the new map file"))?;
    // Last: the header is what makes the files a layer.
    write_header(map_file, header).map_err(io("write the new header"))
}
