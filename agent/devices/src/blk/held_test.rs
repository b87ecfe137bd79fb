//! A disk whose host's disk is full: a request waits, the others do not, and none is lost or done twice.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use super::*;
use crate::Trouble;

/// Longer than any wait on a busy machine; only a hang meets it.
const HANG: Duration = Duration::from_secs(60);
const BYTES: [u8; 512] = [0x6b; 512];

/// A small file system of its own, gone when dropped.
struct Mount(tempfile::TempDir);

impl Mount {
    /// In memory, without io_uring.
    fn new() -> Option<Mount> {
        Mount::of(&["-t", "tmpfs", "-o", "size=64k", "serio-test"])
    }

    /// One that is reached by io_uring, and takes no write at once.
    fn ext4() -> Option<Mount> {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        let mut make = Command::new("mke2fs");
        make.args(["-q", "-F", "-t", "ext4", "-O", "^has_journal", "-m", "0"]).arg(image.path());
        match make.output() {
            Ok(done) if done.status.success() => Mount::of(&["-o", "loop", image.path().to_str().unwrap()]),
            other => {
                println!("skipped: no file system can be made here: {other:?}");
                None
            }
        }
    }

    fn of(arguments: &[&str]) -> Option<Mount> {
        let dir = tempfile::tempdir().unwrap();
        match Command::new("mount").args(arguments).arg(dir.path()).output() {
            Ok(done) if done.status.success() => Some(Mount(dir)),
            other => {
                println!("skipped: no file system can be mounted here: {other:?}");
                None
            }
        }
    }

    /// Takes all the room that is left.
    fn fill(&self) -> PathBuf {
        let path = self.0.path().join("fill");
        let mut file = std::fs::File::create(&path).unwrap();
        while file.write_all(&[1; 4096]).is_ok() {}
        path
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

struct Full {
    disk: Disk,
    trouble: Trouble,
    bell: Receiver<()>,
    fill: PathBuf,
    // Dropped last.
    _mount: Mount,
}

/// An empty disk on one with room for so many bytes more.
fn nearly_full(mount: Mount, room: u64) -> Full {
    let file = tempfile::NamedTempFile::new_in(mount.0.path()).unwrap();
    file.as_file().set_len(DISK_BYTES as u64).unwrap();
    let (sender, bell) = channel();
    let trouble = Trouble::new(move || sender.send(()).unwrap_or_default());
    let given = trouble.clone();
    let fill = mount.fill();
    let filled = std::fs::File::options().write(true).open(&fill).unwrap();
    filled.set_len(filled.metadata().unwrap().len() - room).unwrap();
    let disk = Disk::of(file, Access::ReadWrite, FLUSH, |blk| blk.with_trouble(given));
    Full { disk, trouble, bell, fill, _mount: mount }
}

/// An empty disk on a full one, with a write that waits.
fn full() -> Option<(Full, u16)> {
    let mut full = nearly_full(Mount::new()?, 0);
    let head = full.write(0, HEADER + 0x1000);
    full.wait_trouble(true);
    Some((full, head))
}

impl Full {
    /// Offers a write of one sector.
    fn write(&mut self, sector: u64, at: u64) -> u16 {
        let disk = &mut self.disk;
        disk.header(at, 1, sector);
        disk.memory.write_obj(0xeeu8, GuestAddress(at + 64)).unwrap();
        disk.memory.write_slice(&BYTES, GuestAddress(DATA)).unwrap();
        let (data, status) = (Buffer::readable(DATA, 512), Buffer::writable(at + 64, 1));
        let head = disk.driver.offer(&[Buffer::readable(at, 16), data, status]).unwrap();
        disk.kick();
        head
    }

    fn wait_trouble(&self, wanted: bool) {
        while self.trouble.reason().is_some() != wanted {
            self.bell.recv_timeout(HANG).expect("the bell rings");
        }
    }

    fn make_room(&self) {
        std::fs::remove_file(Path::new(&self.fill)).unwrap();
    }
}

#[test]
fn a_write_without_room_waits_and_others_do_not() {
    let Some((mut full, first)) = full() else { return };
    let reason = full.trouble.reason().unwrap();
    assert!(reason.starts_with("held: the host's disk is full") && reason.contains("28"), "{reason}");
    // What needs no room.
    assert_eq!(full.disk.run(0, 9, &[Buffer::writable(DATA + 4096, 512)]), (0, 513));
    assert_eq!(full.disk.run(4, 0, &[]), (0, 1));
    let second = full.write(40, HEADER + 0x2000);
    assert_eq!(full.disk.run(0, 9, &[Buffer::writable(DATA + 4096, 512)]), (0, 513));
    assert_eq!((full.disk.status(HEADER + 0x1000), full.disk.status(HEADER + 0x2000)), (0xee, 0xee));
    full.make_room();
    let mut heads = std::collections::BTreeSet::from([first, second]);
    full.disk.wait_first(&mut heads);
    full.disk.wait_first(&mut heads);
    full.wait_trouble(false);
    assert_eq!((full.disk.status(HEADER + 0x1000), full.disk.status(HEADER + 0x2000)), (0, 0));
    let now = full.disk.contents();
    assert_eq!((&now[..512], &now[40 * 512..41 * 512]), (&BYTES[..], &BYTES[..]));
    assert!(!full.disk.rig.needs_reset());
}

/// Eight neighbouring writes at once that fill the disk, of which the host has room for less than half.
fn neighbours_without_room(mount: Mount) -> usize {
    let mut full = nearly_full(mount, 3 << 12);
    let header = |i: u64| HEADER + i * 0x100;
    let mut heads = std::collections::BTreeSet::new();
    for i in 0..8u64 {
        let (disk, data) = (&mut full.disk, DATA + (i << 12));
        disk.header(header(i), 1, i * 8);
        disk.memory.write_obj(0xeeu8, GuestAddress(header(i) + 64)).unwrap();
        disk.memory.write_slice(&[i as u8 + 1; 4096], GuestAddress(data)).unwrap();
        let (request, status) = (Buffer::readable(header(i), 16), Buffer::writable(header(i) + 64, 1));
        let table = 0x30_0000 + i * 0x100;
        heads.insert(
            disk.driver.offer_indirect(table, &[request, Buffer::readable(data, 4096), status]).unwrap(),
        );
    }
    full.disk.kick();
    full.wait_trouble(true);
    // What got through is answered by now, and told before this.
    full.disk.header(HEADER + 0x1000, 4, 0);
    let (request, status) = (Buffer::readable(HEADER + 0x1000, 16), Buffer::writable(HEADER + 0x1040, 1));
    let flush = full.disk.driver.offer(&[request, status]).unwrap();
    full.disk.kick();
    heads.insert(flush);
    while heads.contains(&flush) {
        full.disk.wait_first(&mut heads);
    }
    let done: Vec<_> = (0..8).map(|i| full.disk.status(header(i))).collect();
    assert!(done.iter().all(|status| [0, 0xee].contains(status)), "{done:?}");
    full.make_room();
    while !heads.is_empty() {
        full.disk.wait_first(&mut heads);
    }
    full.wait_trouble(false);
    assert!((0..8).all(|i| full.disk.status(header(i)) == 0));
    let want: Vec<u8> = (0..8).flat_map(|i| [i + 1; 4096]).collect();
    assert!(full.disk.contents() == want);
    assert!(full.disk.driver.used().is_none() && !full.disk.rig.needs_reset());
    done.iter().filter(|status| **status == 0).count()
}

#[test]
fn of_neighbours_each_waits_for_its_own_room() {
    if let Some(mount) = Mount::new() {
        assert_eq!(neighbours_without_room(mount), 3);
    }
    if let Some(mount) = Mount::ext4() {
        assert!((1..8).contains(&neighbours_without_room(mount)));
    }
}

#[test]
fn a_held_write_survives_a_suspension_and_a_restore() {
    let Some((mut full, head)) = full() else { return };
    for round in 0..3 {
        let queues = full.disk.blk.suspend().unwrap();
        assert_eq!(full.trouble.reason(), None, "nobody waits");
        let state = full.disk.blk.save();
        assert_eq!((state.version, state.bytes.len()), (STATE_WITH_HELD, 8 + HELD_BYTES));
        if round == 1 {
            // As in another process.
            let volume = full.disk.blk.volume.clone();
            let config = BlkConfig { serial: "disk-0".to_owned(), queues: 1 };
            full.disk.blk = Blk::new(volume, &config).with_trouble(full.trouble.clone());
            full.disk.blk.restore(&state).unwrap();
        }
        if round == 2 {
            full.make_room();
        }
        full.disk.blk.activate(full.disk.rig.again(queues, FLUSH)).unwrap();
        full.wait_trouble(round < 2);
    }
    assert_eq!(full.disk.wait(), (head, 1));
    assert_eq!(full.disk.contents()[..512], BYTES);
    let queues = full.disk.blk.suspend().unwrap();
    assert_eq!((queues.len(), full.disk.blk.save().version), (1, STATE_VERSION));
    assert!(full.disk.driver.used().is_none(), "once only");
}

#[test]
fn a_reset_forgets_what_is_held() {
    let Some((mut full, _)) = full() else { return };
    full.disk.blk.reset();
    assert_eq!(full.trouble.reason(), None);
    assert!(full.disk.driver.used().is_none());
    assert_eq!(full.disk.blk.save().version, STATE_VERSION);
}

#[test]
fn a_state_that_makes_no_sense_is_refused() {
    let told = [0u8; 8];
    for held in [&[0, 0, 1][..], &[0, 0, 1, 0, 0, 0, 1, 0], &[9, 0, 1, 0], &[0; 4 * 257]] {
        let bytes = [&told[..], held].concat();
        let mut disk = Disk::new(Access::ReadWrite, FLUSH);
        assert!(disk.blk.restore(&DeviceState::new(STATE_WITH_HELD, bytes)).is_err(), "{held:?}");
    }
    // A head that no ring has breaks the ring only.
    let mut disk = Disk::new(Access::ReadWrite, FLUSH);
    let queues = disk.blk.suspend().unwrap();
    let state = DeviceState::new(STATE_WITH_HELD, [&told[..], &[0, 0, 0xff, 0xff]].concat());
    disk.blk.restore(&state).unwrap();
    disk.blk.activate(disk.rig.again(queues, FLUSH)).unwrap();
    while !disk.rig.needs_reset() {
        std::thread::yield_now();
    }
    disk.blk.reset();
}
