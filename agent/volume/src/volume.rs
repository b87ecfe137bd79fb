//! A volume: opened from its files, shared by its queues, snapshotted.

use std::{
    fs::File,
    io,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use crate::{
    chain::walk,
    error::{CreateError, IoError, OpenError, SnapshotError},
    header::{Header, HeaderState, NAME_BYTES_MAX},
    keeper::{self, Keeper},
    layer::{self, Layer},
    map::BlockMap,
    media::{Lock, Media},
    queue::IoQueue,
    shared::{Core, lock},
    stack::{Extent, LAYERS_MAX, Stack},
};

/// How long a snapshot waits for I/O under way. The guest's new I/O waits as long.
const DRAIN_MS_MAX: u64 = 5_000;
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
    core: Arc<Core>,
    /// Of a writable layered volume. Declared here so that the thread ends with the last clone.
    keeper: Option<Arc<Keeper>>,
}

impl std::fmt::Debug for Volume {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Volume({} bytes, {} layers)", self.core.size_bytes, self.core.stack().layers.len())
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
        let core = Core::new(stack, size_bytes, access == Access::ReadOnly);
        Ok(Volume { core: Arc::new(core), keeper: None })
    }

    /// A volume from its layers. A head that is marked sealed is followed to its successor; files beyond the
    /// chain are ignored. Read-only, the chain may end at a sealed layer whose successor was not given.
    pub fn open(files: VolumeFiles, access: Access) -> Result<Volume, OpenError> {
        let layers = files.layers.into_iter().map(|l| (Media::new(l.data), Media::new(l.map)));
        Volume::open_media(layers.collect(), access, None)
    }

    /// A volume as it was at the snapshot `name`, read-only.
    pub fn open_snapshot(files: VolumeFiles, name: &str) -> Result<Volume, OpenError> {
        let layers = files.layers.into_iter().map(|l| (Media::new(l.data), Media::new(l.map)));
        Volume::open_media(layers.collect(), Access::ReadOnly, Some(name))
    }

    pub(crate) fn open_media(
        files: Vec<(Media, Media)>,
        access: Access,
        snapshot: Option<&str>,
    ) -> Result<Volume, OpenError> {
        if files.is_empty() {
            return Err(OpenError::Empty);
        }
        for _ in 0..OPEN_TRIES_MAX {
            let chain = walk(&files, access, snapshot)?;
            let (top, header) = chain.last().expect("a walk has at least the bottom");
            if header.state == HeaderState::Head {
                take_lock(&files[*top].0, access, header.layer)?;
                // Between our look and our lock somebody may have taken a snapshot and gone.
                if layer::read_header(&files[*top].1) != Ok(header.clone()) {
                    continue;
                }
            }
            return Volume::assemble(&files, chain, access);
        }
        Err(OpenError::InUse { layer: 0 })
    }

    fn assemble(
        files: &[(Media, Media)],
        chain: Vec<(usize, Header)>,
        access: Access,
    ) -> Result<Volume, OpenError> {
        let mut layers = Vec::with_capacity(chain.len());
        for (index, header) in chain {
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
            layers.push(Arc::new(Layer::new(data, map_file, header, map)));
        }
        let stack = Stack { layers };
        let size_bytes = stack.head().size_bytes;
        let core = Arc::new(Core::new(stack, size_bytes, access == Access::ReadOnly));
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

    /// Size, bytes. Not always a multiple of 512.
    pub fn size_bytes(&self) -> u64 {
        self.core.size_bytes
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
        let end = offset.saturating_add(len).min(self.core.size_bytes);
        if offset < end {
            self.core.stack().extents(offset, end - offset, each);
        }
    }

    /// A queue that may have `depth` operations under way (1 to 4096). One for each virtqueue or connection.
    pub fn queue(&self, depth: u16) -> io::Result<IoQueue> {
        IoQueue::new(Arc::clone(&self.core), self.keeper.clone(), depth.clamp(1, 4096))
    }

    /// Seals the head under the name `name` and goes on in `new_head`, whose files are emptied and become layer
    /// `head + 1`: the caller named them so and has synced their directory.
    ///
    /// Waits for I/O under way in every queue, so it must not be called by a thread that has to reap one.
    /// After a crash at any point the volume opens either as before or with the snapshot, see README.md.
    pub fn snapshot(&self, new_head: LayerFiles, name: &str) -> Result<SnapshotInfo, SnapshotError> {
        self.snapshot_media((Media::new(new_head.data), Media::new(new_head.map)), name)
    }

    pub(crate) fn snapshot_media(
        &self,
        new_head: (Media, Media),
        name: &str,
    ) -> Result<SnapshotInfo, SnapshotError> {
        self.check_snapshot(name)?;
        self.core.close();
        let result = self.drain().and_then(|()| self.seal_and_switch(new_head, name));
        self.core.open();
        result
    }

    fn check_snapshot(&self, name: &str) -> Result<(), SnapshotError> {
        let bad = |why| Err(SnapshotError::Name { name: name.to_owned(), why });
        if self.core.read_only {
            return Err(SnapshotError::ReadOnly);
        }
        if self.core.is_poisoned() {
            return Err(SnapshotError::Poisoned);
        }
        if self.head_header().is_none() {
            return Err(SnapshotError::Raw);
        }
        if name.is_empty() || name.len() > NAME_BYTES_MAX {
            return bad("it must have 1 to 255 bytes");
        }
        if self.snapshots().iter().any(|s| s.name == name) {
            return bad("a snapshot of this volume has it already");
        }
        match self.layer_count() {
            n if n >= LAYERS_MAX => Err(SnapshotError::TooManyLayers(n)),
            _ => Ok(()),
        }
    }

    /// Waits until nothing is inside the gate.
    fn drain(&self) -> Result<(), SnapshotError> {
        let start = Instant::now();
        let mut pause = Duration::from_micros(20);
        while !self.core.is_drained() {
            if start.elapsed() > Duration::from_millis(DRAIN_MS_MAX) {
                return Err(SnapshotError::NotDrained(DRAIN_MS_MAX));
            }
            // Snapshots are rare: looking often for a short time beats a wake-up on every completion.
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(1));
        }
        Ok(())
    }

    /// The order of the syncs is the crash argument.
    fn seal_and_switch(
        &self,
        (data, map_file): (Media, Media),
        name: &str,
    ) -> Result<SnapshotInfo, SnapshotError> {
        let io_error = |what| move |source| SnapshotError::Io { what, source };
        // 1. What the snapshot will promise is on disk.
        keeper::commit(&self.core).map_err(|e| match e {
            IoError::Host { what, errno } => io_error(what)(io::Error::from_raw_os_error(errno)),
            _ => SnapshotError::Poisoned,
        })?;
        let _no_commit = lock(&self.core.commit);
        let old = self.core.stack();
        let Some(sealed) = old.head().header() else { return Err(SnapshotError::Raw) };
        // 2. The new head is complete and names its parent. Nobody names it yet.
        let header = Header {
            layer: sealed.layer + 1,
            parent: Some(sealed.layer),
            state: HeaderState::Head,
            snapshot: String::new(),
            time_s: now_s(),
            sequence: 0,
            ..sealed.clone()
        };
        layer::initialize(&data, &map_file, &header, false)?;
        // 3. The commit point: one header slot, written and synced.
        let time_s = now_s();
        let seal = old.head().update_header(|h| {
            h.state = HeaderState::Sealed { successor: header.layer };
            h.snapshot = name.to_owned();
            h.time_s = time_s;
        });
        if let Err(e) = seal {
            // Whether it is on disk is unknown: only a reopening tells.
            self.core.poison();
            return Err(io_error("seal the head")(e));
        }
        // 4. From here on new I/O goes to the new head.
        let map = BlockMap::new(header.blocks());
        let mut layers = old.layers.clone();
        layers.push(Arc::new(Layer::new(data, map_file, header, Some(map))));
        self.core.replace_stack(Stack { layers });
        Ok(SnapshotInfo { name: name.to_owned(), layer: sealed.layer, time_s, size_bytes: sealed.size_bytes })
    }
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
    /// Reads the headers only.
    pub fn inspect(&self) -> Result<Inspection, OpenError> {
        let clone = |f: &File| {
            f.try_clone()
                .map(Media::new)
                .map_err(|source| OpenError::Io { what: "duplicate a descriptor", source })
        };
        let files: Result<Vec<_>, OpenError> =
            self.layers.iter().map(|l| Ok((clone(&l.data)?, clone(&l.map)?))).collect();
        let files = files?;
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
    };
    layer::initialize(data, map_file, &header, keep_data)
}

fn now_s() -> u64 {
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
