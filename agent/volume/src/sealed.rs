//! Changing the map of a layer that is sealed: a merge into it, or a release of what a point holds. Sealed maps are
//! otherwise constant, so there may be several who change or read one at a time: a VMM that merges, a scrub that adds
//! checksums, an export that releases. Whoever changes holds the *map's lock* (on the map file, exclusive), shortly:
//!
//! ```text
//! lock ─► read the pages ─► edit ─► forget the sums of what differs, sync ─► write the pages, sync ─► unlock
//! ```
//!
//! - The pages are read under the lock and only what the caller means is changed in them: who has loaded an older map
//!   into memory cannot undo what another has written meanwhile.
//! - The sums go first, durably. A crash in between leaves right bits without sums, never sums of other bits.
//! - Who adds sums takes the same lock, and looks at the bits again under it (`scrub.rs`).

use std::{
    io,
    time::{Duration, Instant},
};

use crate::{
    header::{Header, HeaderState, MAP_OFFSET},
    map::PAGE_BYTES,
    media::{Lock, Media},
    sums::{Bits, CHUNK_BITS, Region},
};

/// The lock is held for some milliseconds at a time: for two syncs.
const LOCK_WAIT: Duration = Duration::from_secs(30);
/// Who only reads can do without.
const SHARE_WAIT: Duration = Duration::from_millis(100);

/// The lock of a map file; given back when dropped.
pub(crate) struct MapLock<'a>(&'a Media);

impl<'a> MapLock<'a> {
    /// Waits for it. The file must be open for writing.
    pub(crate) fn take(map: &'a Media) -> io::Result<MapLock<'a>> {
        let start = Instant::now();
        while !map.try_lock(Lock::Exclusive)? {
            if start.elapsed() > LOCK_WAIT {
                return Err(io::Error::from_raw_os_error(libc::ETIMEDOUT));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(MapLock(map))
    }

    /// A share of it, with which nobody changes the map; none if somebody does for longer than a moment.
    pub(crate) fn share(map: &'a Media) -> io::Result<Option<MapLock<'a>>> {
        let start = Instant::now();
        while !map.try_lock(Lock::Shared)? {
            if start.elapsed() > SHARE_WAIT {
                return Ok(None);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(Some(MapLock(map)))
    }
}

impl Drop for MapLock<'_> {
    fn drop(&mut self) {
        self.0.unlock();
    }
}

/// Edits pages of the map of a sealed layer, durably. `edit(page, bits)` changes the bits in place.
pub(crate) fn edit_map(
    map: &Media,
    header: &Header,
    pages: impl IntoIterator<Item = u64>,
    edit: impl FnMut(u64, &mut Bits),
) -> io::Result<()> {
    edit_locked(&MapLock::take(map)?, header, pages, edit)
}

/// As [`edit_map`], for who holds the lock already.
pub(crate) fn edit_locked(
    held: &MapLock<'_>,
    header: &Header,
    pages: impl IntoIterator<Item = u64>,
    mut edit: impl FnMut(u64, &mut Bits),
) -> io::Result<()> {
    let (region, map) = (Region::of(header), held.0);
    let (mut new, mut forget) = (Vec::new(), Vec::new());
    for page in pages {
        let old = region.bits(map, page)?;
        let mut bits = old;
        edit(page, &mut bits);
        let chunks = differing(&old, &bits);
        if chunks != 0 {
            new.push((page, bits));
            forget.push((page, chunks));
        }
    }
    if new.is_empty() {
        return Ok(());
    }
    region.forget(map, &forget)?;
    for (page, bits) in &new {
        map.write_all_at(bits, MAP_OFFSET + page * PAGE_BYTES as u64)?;
    }
    map.sync_data()
}

/// Writes pages of a map after a merge has filled blocks in: as they are given for a head, which has one writer; for a
/// sealed layer only where the file says absent, since that is all that a merge fills.
pub(crate) fn commit_merged(map: &Media, header: &Header, pages: &[(u64, Bits)]) -> io::Result<()> {
    if pages.is_empty() {
        return Ok(());
    }
    if header.state == HeaderState::Head {
        for (offset, page) in pages {
            map.write_all_at(page, *offset)?;
        }
        return map.sync_data();
    }
    let index = |offset: u64| offset.saturating_sub(MAP_OFFSET) / PAGE_BYTES as u64;
    edit_map(map, header, pages.iter().map(|(offset, _)| index(*offset)), |page, bits| {
        let merged = pages.iter().find(|(offset, _)| index(*offset) == page);
        for (byte, merged) in bits.iter_mut().zip(merged.iter().flat_map(|(_, merged)| merged)) {
            let there = *byte | ((*byte >> 1) & 0x55) | ((*byte & 0x55) << 1);
            *byte |= merged & !there;
        }
    })
}

/// One bit for each chunk whose states differ.
fn differing(old: &Bits, new: &Bits) -> u128 {
    let pairs = old.chunks_exact(CHUNK_BITS).zip(new.chunks_exact(CHUNK_BITS));
    pairs.enumerate().fold(0, |mask, (i, (old, new))| mask | (u128::from(old != new) << i))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sums::{ChunkSum, RegionHeader, Stored, SumsPage};

    fn header(state: HeaderState) -> Header {
        Header {
            volume: [1; 16],
            layer: 3,
            size_bytes: 1 << 27,
            parent: Some(2),
            state,
            snapshot: String::new(),
            time_s: 0,
            generation: 0,
            sequence: 0,
            key: None,
        }
    }

    #[test]
    fn a_merge_fills_only_what_is_absent_and_forgets_only_what_it_changes() {
        let map = Media::new(tempfile::tempfile().expect("tempfile"));
        let header = header(HeaderState::Sealed { successor: 4 });
        let region = Region::of(&header);
        let mut old = [0; PAGE_BYTES];
        (old[0], old[40]) = (0b00_10_01_00, 0b01);
        map.write_all_at(&old, MAP_OFFSET).expect("write");
        region.write_header(&map, RegionHeader { complete: true, generation: 0 }).expect("write");
        let sums = SumsPage { bits: Some([1; 24]), ..SumsPage::all(ChunkSum::Sum([2; 24])) };
        region.write_page(&map, 0, &sums).expect("write");

        let mut merged = [0; PAGE_BYTES];
        // An older view of the blocks that are there, and news of the others.
        (merged[0], merged[40]) = (0b10_01_10_01, 0b01);
        commit_merged(&map, &header, &[(MAP_OFFSET, merged)]).expect("commit");
        let now = region.bits(&map, 0).expect("read");
        assert_eq!((now[0], now[40]), (0b10_10_01_01, 0b01));
        let Stored::Page(sums) = region.page(&map, 0).expect("read") else { panic!("a page") };
        assert_eq!((sums.bits, sums.chunks[0]), (None, ChunkSum::Missing));
        assert_eq!(sums.chunks[1], ChunkSum::Sum([2; 24]), "it did not change");
        assert!(!region.header(&map).expect("read").expect("there").complete);

        let again = [(MAP_OFFSET, merged)];
        commit_merged(&map, &header, &again).expect("nothing to do");
        assert_eq!(region.header(&map).expect("read").expect("there").generation, 1);
    }
}
