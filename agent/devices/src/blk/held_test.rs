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
    fn new() -> Option<Mount> {
        let dir = tempfile::tempdir().unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=64k", "serio-test"]).arg(dir.path());
        match mount.output() {
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

/// An empty disk on a full one, with a write that waits.
fn full() -> Option<(Full, u16)> {
    let mount = Mount::new()?;
    let file = tempfile::NamedTempFile::new_in(mount.0.path()).unwrap();
    file.as_file().set_len(DISK_BYTES as u64).unwrap();
    let (sender, bell) = channel();
    let trouble = Trouble::new(move || sender.send(()).unwrap_or_default());
    let given = trouble.clone();
    let fill = mount.fill();
    let disk = Disk::of(file, Access::ReadWrite, FLUSH, |blk| blk.with_trouble(given));
    let mut full = Full { disk, trouble, bell, fill, _mount: mount };
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
