//! A volume: opened from its files, shared by its queues. What changes its layers has files of its own: `snapshot.rs`,
//! `resize.rs`, `merge.rs`.

use std::{
    fs::File,
    io,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use crate::{
    chain::walk,
    crypto::{self, SectorCipher, VdcSecret},
    error::{CreateError, OpenError},
    header::{Header, HeaderState},
    keeper::Keeper,
    layer::{self, Layer},
    map::BlockMap,
    media::{Lock, Media},
    queue::IoQueue,
    shared::Core,
    stack::{Extent, Stack},
};

/// Times that an open starts over because the head was sealed under its eyes.
const OPEN_TRIES_MAX: u32 = 4;
/// How long an open waits for a lock: the kernel gives up that of a killed process a moment after its end.
const LOCK_WAIT_MS: u64 = 300;

/// What may be done with a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Read and write: at most one process at a time.
    ReadWrite,
    /// Read only. Of a head that nobody writes, or of a sealed layer, whoever writes above it.
    ReadOnly,
}

/// The two files of a layer.
#[derive(Debug)]
pub struct LayerFiles {
    /// The blocks, each at its own offset.
    pub data: File,
    /// The header and two bits a block.
    pub map: File,
}

/// The files of a volume, oldest layer first. Leftovers of a snapshot that did not commit may be among them.
#[derive(Debug)]
pub struct VolumeFiles {
    /// The layers.
    pub layers: Vec<LayerFiles>,
}

/// A snapshot of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Its name.
    pub name: String,
    /// The sealed layer that is its top.
    pub layer: u64,
    /// When, seconds since 1970.
    pub time_s: u64,
    /// Size of the volume then, bytes.
    pub size_bytes: u64,
}

/// A virtual disk. Clones share it.
#[derive(Clone)]
pub struct Volume {
    pub(crate) core: Arc<Core>,
    /// Of a writable layered volume. Declared here so that the thread ends with the last clone.
    keeper: Option<Arc<Keeper>>,
}

impl std::fmt::Debug for Volume {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Volume({} bytes, {} layers)", self.size_bytes(), self.layer_count())
    }
}

impl Volume {
    /// A plain raw file or block device as a volume: its size is the file's, it has no snapshots.
    pub fn open_raw(file: File, access: Access) -> Result<Volume, OpenError> {
        use std::os::unix::fs::FileTypeExt;
        let io = |what| move |source| OpenError::Io { what, source };
        let kind = file.metadata().map_err(io("look at the file"))?.file_type();
        if !(kind.is_file() || kind.is_block_device()) {
            return Err(OpenError::NotADisk("it is neither a regular file nor a block device".into()));
        }
        let media = Media::new(file);
        let size_bytes = media.len().map_err(io("measure the file"))?;
        if size_bytes == 0 {
            return Err(OpenError::NotADisk("it is empty".into()));
        }
        take_lock(&media, access, 0)?;
        let stack = Stack { layers: vec![Arc::new(Layer::raw(media, size_bytes))] };
        let core = Core::new(stack, access == Access::ReadOnly);
        Ok(Volume { core: Arc::new(core), keeper: None })
    }

    /// A volume from its layers. A head that is marked sealed is followed to its successor; files beyond the
    /// chain are ignored. Read-only, the chain may end at a sealed layer whose successor was not given.
    pub fn open(files: VolumeFiles, access: Access) -> Result<Volume, OpenError> {
        Volume::open_with_key(files, access, None)
    }

    /// Like [`Volume::open`], with the key of the vdc when the volume may be encrypted. A missing or wrong key is
    /// [`OpenError::Key`] before anything is locked, read or written but headers; a plain volume needs none.
    pub fn open_with_key(
        files: VolumeFiles,
        access: Access,
        key: Option<&VdcSecret>,
    ) -> Result<Volume, OpenError> {
        Volume::open_keyed(files.into_media(), access, None, key)
    }

    /// A volume as it was at the snapshot `name`, read-only.
    pub fn open_snapshot(files: VolumeFiles, name: &str) -> Result<Volume, OpenError> {
        Volume::open_snapshot_with_key(files, name, None)
    }

    /// Like [`Volume::open_snapshot`], with the key of the vdc when the volume may be encrypted.
    pub fn open_snapshot_with_key(
        files: VolumeFiles,
        name: &str,
        key: Option<&VdcSecret>,
    ) -> Result<Volume, OpenError> {
        Volume::open_keyed(files.into_media(), Access::ReadOnly, Some(name), key)
    }

    #[cfg(test)]
    pub(crate) fn open_media(
        files: Vec<(Media, Media)>,
        access: Access,
        snapshot: Option<&str>,
    ) -> Result<Volume, OpenError> {
        Volume::open_keyed(files, access, snapshot, Some(&crypto::test_secret()))
    }

    pub(crate) fn open_keyed(
        files: Vec<(Media, Media)>,
        access: Access,
        snapshot: Option<&str>,
        key: Option<&VdcSecret>,
    ) -> Result<Volume, OpenError> {
        let ciphers =
            |chain: &mut Vec<(usize, Header)>| crypto::ciphers(chain.iter().map(|(_, header)| header), key);
        Volume::open_with(files, access, snapshot, key, ciphers)
    }

    /// For who asks the maps only, and has no key: what lies in encrypted layers would be read as it is stored.
    pub(crate) fn open_unread(files: VolumeFiles, snapshot: Option<&str>) -> Result<Volume, OpenError> {
        Volume::open_with(files.into_media(), Access::ReadOnly, snapshot, None, |chain| {
            chain.iter_mut().for_each(|(_, header)| header.key = None);
            Ok(vec![None; chain.len()])
        })
    }

    fn open_with(
        files: Vec<(Media, Media)>,
        access: Access,
        snapshot: Option<&str>,
        key: Option<&VdcSecret>,
        ciphers_of: impl Fn(&mut Vec<(usize, Header)>) -> Result<Vec<Option<Arc<SectorCipher>>>, OpenError>,
    ) -> Result<Volume, OpenError> {
        if files.is_empty() {
            return Err(OpenError::Empty);
        }
        for _ in 0..OPEN_TRIES_MAX {
            let mut chain = walk(&files, access, snapshot)?;
            let (top, header) = chain.last().cloned().expect("a walk has at least the bottom");
            let ciphers = ciphers_of(&mut chain)?;
            if header.state == HeaderState::Head {
                take_lock(&files[top].0, access, header.layer)?;
                // Between our look and our lock somebody may have taken a snapshot and gone.
                if layer::read_header(&files[top].1) != Ok(header) {
                    continue;
                }
            }
            let layers = assemble(&files, chain, ciphers)?;
            return Volume::start(Stack { layers }, access, key.cloned());
        }
        Err(OpenError::InUse { layer: 0 })
    }

    fn start(stack: Stack, access: Access, secret: Option<VdcSecret>) -> Result<Volume, OpenError> {
        let core = Arc::new(Core::new(stack, access == Access::ReadOnly).with_secret(secret));
        let keeper = match access {
            Access::ReadOnly => None,
            Access::ReadWrite => Some(Arc::new(
                Keeper::start(&core)
                    .map_err(|source| OpenError::Io { what: "start the keeper thread", source })?,
            )),
        };
        Ok(Volume { core, keeper })
    }

    pub(crate) fn stack(&self) -> Arc<Stack> {
        self.core.stack()
    }

    /// Size, bytes. Not always a multiple of 512. It grows by [`Volume::resize`].
    pub fn size_bytes(&self) -> u64 {
        self.core.size_bytes()
    }

    /// Whether changes are refused.
    pub fn is_read_only(&self) -> bool {
        self.core.read_only
    }

    /// Whether a sync has failed: writes and flushes are refused until the volume is reopened.
    pub fn is_poisoned(&self) -> bool {
        self.core.is_poisoned()
    }

    /// Number of layers.
    pub fn layer_count(&self) -> usize {
        self.core.stack().layers.len()
    }

    /// What the head says about itself; None for a plain raw file.
    pub fn head_header(&self) -> Option<Header> {
        self.core.stack().head().header()
    }

    /// The snapshots, oldest first.
    pub fn snapshots(&self) -> Vec<SnapshotInfo> {
        let stack = self.core.stack();
        stack.layers.iter().filter_map(|layer| snapshot_of(&layer.header()?)).collect()
    }

    /// Calls `each` with the extents of a range in order, until it returns false. The range is cut to the volume.
    pub fn extents(&self, offset: u64, len: u64, each: impl FnMut(Extent) -> bool) {
        let stack = self.core.stack();
        let end = offset.saturating_add(len).min(stack.head().size_bytes);
        if offset < end {
            stack.extents(offset, end - offset, each);
        }
    }

    /// A queue that may have `depth` operations under way (1 to 4096). One for each virtqueue or connection.
    pub fn queue(&self, depth: u16) -> io::Result<IoQueue> {
        IoQueue::new(Arc::clone(&self.core), self.keeper.clone(), depth.clamp(1, 4096))
    }
}

/// The layers of a chain, with the ciphers of those that are encrypted.
fn assemble(
    files: &[(Media, Media)],
    chain: Vec<(usize, Header)>,
    ciphers: Vec<Option<Arc<SectorCipher>>>,
) -> Result<Vec<Arc<Layer>>, OpenError> {
    let mut layers = Vec::with_capacity(chain.len());
    for ((index, header), cipher) in chain.into_iter().zip(ciphers) {
        let (data, map_file) = files[index].clone();
        let len = data.len().map_err(|source| OpenError::Io { what: "measure a data file", source })?;
        if len < header.size_bytes {
            return Err(OpenError::Chain(format!(
                "the data file of layer {} has {len} bytes, its header promises {}",
                header.layer, header.size_bytes
            )));
        }
        let map = match header.parent {
            None => None,
            Some(_) => Some(BlockMap::load(&map_file, header.blocks(), header.layer)?),
        };
        layers.push(Arc::new(Layer::new(data, map_file, header, map, cipher)));
    }
    Ok(layers)
}

/// What the headers of a volume say, without opening or locking it: also while another process writes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inspection {
    /// Size of the volume at the top of the chain, bytes.
    pub size_bytes: u64,
    /// Layers in the chain; further files are leftovers.
    pub layers: usize,
    /// Their numbers, oldest first.
    pub chain: Vec<u64>,
    /// The snapshots, oldest first.
    pub snapshots: Vec<SnapshotInfo>,
    /// The volume's identity.
    pub volume: [u8; 16],
}

impl VolumeFiles {
    fn into_media(self) -> Vec<(Media, Media)> {
        self.layers.into_iter().map(|l| (Media::new(l.data), Media::new(l.map))).collect()
    }

    /// The same files once more.
    pub(crate) fn media(&self) -> io::Result<Vec<(Media, Media)>> {
        let clone = |f: &File| f.try_clone().map(Media::new);
        self.layers.iter().map(|l| Ok((clone(&l.data)?, clone(&l.map)?))).collect()
    }

    /// Reads the headers only.
    pub fn inspect(&self) -> Result<Inspection, OpenError> {
        let files =
            self.media().map_err(|source| OpenError::Io { what: "duplicate a descriptor", source })?;
        if files.is_empty() {
            return Err(OpenError::Empty);
        }
        let chain = walk(&files, Access::ReadWrite, None)?;
        let (_, top) = chain.last().expect("a walk has at least the bottom");
        let (size_bytes, volume) = (top.size_bytes, top.volume);
        let snapshots = chain.iter().filter_map(|(_, header)| snapshot_of(header)).collect();
        let numbers = chain.iter().map(|(_, header)| header.layer).collect();
        Ok(Inspection { size_bytes, layers: chain.len(), chain: numbers, snapshots, volume })
    }
}

fn snapshot_of(header: &Header) -> Option<SnapshotInfo> {
    let named = header.state != HeaderState::Head && !header.snapshot.is_empty();
    named.then(|| SnapshotInfo {
        name: header.snapshot.clone(),
        layer: header.layer,
        time_s: header.time_s,
        size_bytes: header.size_bytes,
    })
}

/// Makes two files the bottom layer (number 0) of a new volume and syncs them. With `keep_data` the bytes of the
/// data file, which the caller imported, become the volume's content; else it is empty. The header is written
/// last, so that a crash leaves no half volume behind.
pub fn create_layer(
    files: &LayerFiles,
    size_bytes: u64,
    volume: [u8; 16],
    keep_data: bool,
) -> Result<(), CreateError> {
    let clone = |f: &File| f.try_clone().map(Media::new);
    let io = |source| CreateError::Io { what: "duplicate a descriptor", source };
    create_media(
        &clone(&files.data).map_err(io)?,
        &clone(&files.map).map_err(io)?,
        size_bytes,
        volume,
        keep_data,
    )
}

pub(crate) fn create_media(
    data: &Media,
    map_file: &Media,
    size_bytes: u64,
    volume: [u8; 16],
    keep_data: bool,
) -> Result<(), CreateError> {
    let header = Header {
        volume,
        layer: 0,
        size_bytes,
        parent: None,
        state: HeaderState::Head,
        snapshot: String::new(),
        time_s: now_s(),
        generation: 0,
        sequence: 0,
        key: None,
    };
    layer::initialize(data, map_file, &header, keep_data)
}

pub(crate) fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

fn take_lock(data: &Media, access: Access, layer: u64) -> Result<(), OpenError> {
    let kind = match access {
        Access::ReadWrite => Lock::Exclusive,
        Access::ReadOnly => Lock::Shared,
    };
    let start = Instant::now();
    loop {
        match data.try_lock(kind) {
            Ok(true) => return Ok(()),
            Ok(false) if start.elapsed() < Duration::from_millis(LOCK_WAIT_MS) => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Ok(false) => return Err(OpenError::InUse { layer }),
            Err(source) => return Err(OpenError::Io { what: "lock the data file", source }),
        }
    }
}
