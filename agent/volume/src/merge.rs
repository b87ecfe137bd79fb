//! Deleting a snapshot of a stopped volume: its layer is merged into the next newer one, and leaves the chain.
//!
//! ```text
//! before     p ──► k "s" ──► j        1  window by window: blocks that j has not and k has: copied to j's data, synced,
//! during     p ──► k ──► j ⊇ k           then j's map names them, synced. Every point reads as before at any moment.
//! after      p ──► j                  2  commit: one header slot. p: "my successor is j"; or, if k was the bottom,
//!                 (k: leftover)          j: "I have no parent". Then j's parent becomes p, and k's files may go.
//! ```
//!
//! Nothing is ever taken from k, and j's blocks are never overwritten: who has a point open goes on reading from the
//! descriptors and the map that he has. Interrupted anywhere, the volume is whole; asked again, the merge goes on
//! where j's map says that it was. The head is locked meanwhile.

use std::{io, sync::Arc};

use nix::fcntl::FallocateFlags;

use crate::{
    chain::walk,
    crypto::{self, SectorCipher, VdcSecret},
    error::{DeleteError, OpenError},
    header::{BLOCK_BYTES, Header, HeaderState},
    layer,
    map::{BlockMap, PAGE_BYTES, State},
    media::{Lock, Media},
    sealed::commit_merged,
    volume::{Access, VolumeFiles},
};

/// Blocks between two commits of the map: 256 MiB, so that an interrupted merge repeats little.
const WINDOW_BLOCKS: u64 = 65_536;
/// Bytes that are copied at a time.
const PART_BYTES: u64 = 1 << 20;

/// A snapshot that was deleted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deleted {
    /// The layer that left the chain: its two files may be removed.
    pub layer: u64,
    /// Bytes copied to the layer above it by this call.
    pub copied_bytes: u64,
}

impl VolumeFiles {
    /// Deletes the snapshot `name` of a stopped volume, whose files are open for writing: all other points and the head
    /// keep their bytes. See the head of `merge.rs` for what an interruption leaves.
    pub fn delete_snapshot(&self, name: &str) -> Result<Deleted, DeleteError> {
        self.delete_snapshot_with_key(name, None)
    }

    /// Like [`VolumeFiles::delete_snapshot`], with the key of the vdc when the volume may be encrypted: what one layer's
    /// data key opens is written under the other's.
    pub fn delete_snapshot_with_key(
        &self,
        name: &str,
        key: Option<&VdcSecret>,
    ) -> Result<Deleted, DeleteError> {
        let files: io::Result<Vec<_>> = self
            .layers
            .iter()
            .map(|l| Ok((Media::new(l.data.try_clone()?), Media::new(l.map.try_clone()?))))
            .collect();
        delete(&files.map_err(io_error("duplicate a descriptor"))?, name, key, WINDOW_BLOCKS)
    }
}

fn io_error(what: &'static str) -> impl Fn(io::Error) -> DeleteError {
    move |source| DeleteError::Io { what, source }
}

pub(crate) fn delete(
    files: &[(Media, Media)],
    name: &str,
    key: Option<&VdcSecret>,
    window_blocks: u64,
) -> Result<Deleted, DeleteError> {
    if files.is_empty() {
        return Err(OpenError::Empty.into());
    }
    let chain = walk(files, Access::ReadWrite, None)?;
    let ciphers = crypto::ciphers(chain.iter().map(|(_, header)| header), key)?;
    let (top, head) = chain.last().expect("a walk has at least the bottom");
    let lock = &files[*top].0;
    let in_use = || DeleteError::Open(OpenError::InUse { layer: head.layer });
    if !lock.try_lock(Lock::Exclusive).map_err(io_error("lock the head"))? {
        return Err(in_use());
    }
    // Between our look and our lock somebody may have taken a snapshot, or deleted one, and gone.
    let result = match walk(files, Access::ReadWrite, None) {
        Ok(again) if again == chain => merge(files, &chain, &ciphers, name, window_blocks),
        _ => Err(in_use()),
    };
    lock.unlock();
    result
}

fn merge(
    files: &[(Media, Media)],
    chain: &[(usize, Header)],
    ciphers: &[Option<Arc<SectorCipher>>],
    name: &str,
    window_blocks: u64,
) -> Result<Deleted, DeleteError> {
    let named = |h: &Header| h.state != HeaderState::Head && h.snapshot == name && !name.is_empty();
    let at = chain.iter().position(|(_, header)| named(header));
    let Some((at, (from, into))) = at.and_then(|at| Some((at, (chain.get(at)?, chain.get(at + 1)?)))) else {
        return Err(OpenError::NoSuchSnapshot(name.to_owned()).into());
    };
    if at == 0 && into.1.key.is_some() {
        let why = "the bottom of an encrypted volume is plain, and stays what it is".into();
        return Err(OpenError::Chain(why).into());
    }
    let cipher = |at: usize| ciphers.get(at).and_then(Option::as_deref);
    let map =
        |(index, header): &(usize, Header)| BlockMap::load(&files[*index].1, header.blocks(), header.layer);
    for (index, header) in [from, into] {
        if files[*index].0.len().map_err(io_error("measure a data file"))? < header.size_bytes {
            let why = format!("the data file of layer {} was cut", header.layer);
            return Err(OpenError::Chain(why).into());
        }
    }
    let mut merge = Merge {
        from: &files[from.0].0,
        from_map: if at == 0 { None } else { Some(map(from)?) },
        from_cipher: cipher(at),
        from_bytes: from.1.size_bytes,
        into: &files[into.0].0,
        into_cipher: cipher(at + 1),
        into_map_file: &files[into.0].1,
        into_header: &into.1,
        into_map: map(into)?,
        into_bytes: into.1.size_bytes,
        buffer: vec![0; PART_BYTES as usize],
        copied_bytes: 0,
        touched: false,
    };
    merge.run(window_blocks).map_err(io_error("copy to the layer above"))?;

    let commit = io_error("take the layer out of the chain");
    let rewrite = |(index, header): &(usize, Header), change: &dyn Fn(&mut Header)| {
        let mut changed = header.clone();
        change(&mut changed);
        changed.sequence = changed.sequence.wrapping_add(1);
        layer::write_header(&files[*index].1, &changed)
    };
    let below = at.checked_sub(1).and_then(|i| chain.get(i));
    if let Some(below) = below {
        let successor = into.1.layer;
        rewrite(below, &|h| h.state = HeaderState::Sealed { successor }).map_err(&commit)?;
    }
    // For a new bottom this is the commit point. Else it only tidies: the walk accepts both parents.
    let parent = below.map(|(_, header)| header.layer);
    rewrite(into, &|h| h.parent = parent).map_err(&commit)?;
    Ok(Deleted { layer: from.1.layer, copied_bytes: merge.copied_bytes })
}

struct Merge<'a> {
    from: &'a Media,
    /// None at the bottom, whose file answers for every block; then `into` must too, in the end.
    from_map: Option<BlockMap>,
    from_cipher: Option<&'a SectorCipher>,
    from_bytes: u64,
    into: &'a Media,
    into_cipher: Option<&'a SectorCipher>,
    into_map_file: &'a Media,
    into_header: &'a Header,
    into_map: BlockMap,
    into_bytes: u64,
    buffer: Vec<u8>,
    copied_bytes: u64,
    /// Whether the data file has changed since its last sync.
    touched: bool,
}

impl Merge<'_> {
    fn run(&mut self, window_blocks: u64) -> io::Result<()> {
        let blocks = self.into_bytes.div_ceil(BLOCK_BYTES);
        let mut at = 0;
        while at < blocks {
            let end = blocks.min(at + window_blocks);
            self.window(at, end)?;
            self.commit()?;
            at = end;
        }
        Ok(())
    }

    fn window(&mut self, mut at: u64, end: u64) -> io::Result<()> {
        while at < end {
            let (mut state, mut run) = self.into_map.run(at, end - at);
            if state == State::Absent {
                (state, run) = self.below(at, run);
                match state {
                    State::Absent => {}
                    State::Data => self.copy(at, run)?,
                    State::Zero => self.zero(at, run)?,
                }
                if state != State::Absent {
                    self.into_map.set(at, run, state);
                }
            } else if state == State::Zero {
                self.zero(at, run)?;
            }
            at += run;
        }
        Ok(())
    }

    /// What the layer that goes says about `block`, and for how many blocks.
    fn below(&self, block: u64, max: u64) -> (State, u64) {
        let blocks = self.from_bytes.div_ceil(BLOCK_BYTES);
        if block >= blocks {
            // The volume was smaller then, and what it has grown by is zeros, whatever lies below.
            return (State::Zero, max);
        }
        let max = max.min(blocks - block);
        if let Some(map) = &self.from_map {
            return map.run(block, max);
        }
        let start = block * BLOCK_BYTES;
        let (len, hole) = self.from.extent_at(start, (start + max * BLOCK_BYTES).min(self.from_bytes));
        match (hole, len / BLOCK_BYTES) {
            (true, whole @ 1..) => (State::Zero, whole),
            // Partly a hole, or the end of the volume: copied like data.
            _ => (State::Data, len.div_ceil(BLOCK_BYTES).clamp(1, max)),
        }
    }

    fn copy(&mut self, block: u64, count: u64) -> io::Result<()> {
        let (mut at, end) = (block * BLOCK_BYTES, ((block + count) * BLOCK_BYTES).min(self.into_bytes));
        while at < end {
            let len = (end - at).min(PART_BYTES);
            let part = &mut self.buffer[..len as usize];
            // The last block of a smaller layer ends early, and zeros follow.
            let (there, beyond) = part.split_at_mut(self.from_bytes.saturating_sub(at).min(len) as usize);
            layer::read_at(self.from, self.from_cipher, there, at)?;
            beyond.fill(0);
            layer::write_at(self.into, self.into_cipher, part, at)?;
            self.touched = true;
            self.copied_bytes += len;
            at += len;
        }
        Ok(())
    }

    /// The file of a bottom must have zeros itself; above it the map's word is enough.
    fn zero(&mut self, block: u64, count: u64) -> io::Result<()> {
        if self.from_map.is_some() {
            return Ok(());
        }
        let (mut at, end) = (block * BLOCK_BYTES, ((block + count) * BLOCK_BYTES).min(self.into_bytes));
        if self.into.extent_at(at, end) == (end - at, true) {
            return Ok(());
        }
        self.touched = true;
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match self.into.fallocate(punch, at, end - at) {
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
            other => return other,
        }
        self.buffer.fill(0);
        while at < end {
            let len = (end - at).min(PART_BYTES);
            self.into.write_all_at(&self.buffer[..len as usize], at)?;
            at += len;
        }
        Ok(())
    }

    /// Data before the map that names them.
    fn commit(&mut self) -> io::Result<()> {
        if std::mem::take(&mut self.touched) {
            self.into.sync_data()?;
        }
        let mut pages: Vec<(u64, [u8; PAGE_BYTES])> = Vec::new();
        self.into_map.take_dirty(&mut pages);
        // A sealed layer's checksums go before its map changes.
        commit_merged(self.into_map_file, self.into_header, &pages)
    }
}
