//! Damaged and hostile disks: nothing panics, nothing reads for ever.

use std::{fs, path::Path, rc::Rc};

use crate::{
    FindError, Memory, ReadAt, find_with_budget,
    image_test::{MIB, Tree, have},
};

/// Damaged disks of one kind.
const ROUNDS: u64 = 2500;
const BUDGET_BYTES: u64 = 32 << 20;

struct Random(u64);

impl Random {
    fn next(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % below.max(1) as u64) as usize
    }
}

/// A disk with some bytes changed, and perhaps cut.
struct Patched {
    whole: Rc<Vec<u8>>,
    len: usize,
    patches: Vec<(usize, u8)>,
}

impl ReadAt for Patched {
    fn size_bytes(&self) -> u64 {
        self.len as u64
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = self.whole.get(..self.len).and_then(|whole| whole.get(at..at.checked_add(buf.len())?));
        buf.copy_from_slice(bytes.ok_or(std::io::ErrorKind::UnexpectedEof)?);
        for (place, value) in &self.patches {
            if let Some(byte) = place.checked_sub(at).and_then(|place| buf.get_mut(place)) {
                *byte = *value;
            }
        }
        Ok(())
    }
}

fn search(disk: Patched) {
    if let Ok(found) = find_with_budget(Box::new(disk), BUDGET_BYTES) {
        // Read too, whatever it is.
        let _ = found.write_kernel(&mut std::io::sink(), 1 << 20);
        let _ = found.write_initrd(&mut std::io::sink(), 1 << 20);
    }
}

/// Where there is something: blocks that are not all zeros.
fn used(disk: &[u8]) -> Vec<usize> {
    let blocks = disk.chunks(1024).enumerate();
    blocks.filter(|(_, block)| block.iter().any(|byte| *byte != 0)).map(|(index, _)| index * 1024).collect()
}

fn mutate(disk: &Path, seed: u64) {
    let whole = Rc::new(fs::read(disk).expect("a disk"));
    let places = used(&whole);
    let mut random = Random(seed);
    for _ in 0..ROUNDS {
        let mut damaged = Patched { whole: Rc::clone(&whole), len: whole.len(), patches: Vec::new() };
        for _ in 0..=random.next(12) {
            // Mostly where structures are: near the beginning.
            let near = random.next(3) > 0;
            let at = places[random.next(if near { places.len().min(24) } else { places.len() })]
                + random.next(1024);
            let value = [0, 0xff, 0x80, 1, random.next(256) as u8][random.next(5)];
            damaged.patches.extend((0..1 + random.next(4)).map(|by| (at + by, value)));
        }
        if random.next(50) == 0 {
            damaged.len = random.next(whole.len());
        }
        search(damaged);
    }
}

#[test]
fn ten_thousand_damaged_disks_are_survived() {
    if !have(&["mke2fs"]) {
        return;
    }
    let grub = b"search --set=root --label root\nmenuentry a { linux /vmlinuz a ; initrd /initrd }\n";
    let tree = Tree::new(&[
        ("/boot/grub/grub.cfg", grub),
        ("/vmlinuz", &crate::image_test::kernel(1)),
        ("/initrd", &[7; 3000]),
        ("/boot/grub/grubenv", b"# GRUB Environment Block\nsaved_entry=0\n"),
    ]);
    // With checksums little gets past them: most rounds do without.
    for (seed, more) in [
        (1, ["-O", "^metadata_csum,^64bit"]),
        (2, ["-O", "^metadata_csum,^extents,^64bit"]),
        // Of this one the journal is to be replayed: see below.
        (3, ["-O", "^metadata_csum"]),
        (4, ["-O", "metadata_csum"]),
    ] {
        let folder = tempfile::tempdir().expect("a folder");
        let disk = folder.path().join("disk.raw");
        tree.ext4(&disk, 0, 4 * MIB, &[&more[..], &["-b", "1024", "-J", "size=1"]].concat());
        if seed == 3 {
            let mut bytes = fs::read(&disk).expect("a disk");
            bytes[1024 + 0x60] |= 4;
            fs::write(&disk, bytes).expect("a disk");
        }
        mutate(&disk, seed);
    }
}

#[test]
fn a_superblock_of_many_groups_costs_nothing() {
    if !have(&["mke2fs"]) {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let disk = folder.path().join("disk.raw");
    Tree::entries().ext4(&disk, 0, 8 * MIB, &["-O", "^metadata_csum"]);
    let mut bytes = fs::read(&disk).expect("a disk");
    // 2^63 blocks in groups of one.
    bytes[1024 + 0x20..1024 + 0x24].copy_from_slice(&1_u32.to_le_bytes());
    bytes[1024 + 0x150..1024 + 0x154].copy_from_slice(&0x7fff_ffff_u32.to_le_bytes());
    let found = find_with_budget(Box::new(Memory(bytes)), BUDGET_BYTES);
    assert!(matches!(found, Err(FindError::Read { .. })), "{found:?}");
}

#[test]
fn a_budget_ends_a_search() {
    if !have(&["mke2fs"]) {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let disk = folder.path().join("disk.raw");
    Tree::entries().ext4(&disk, 0, 8 * MIB, &[]);
    let bytes = fs::read(&disk).expect("a disk");
    for budget in [0, 1000, 10_000, 50_000] {
        let found = find_with_budget(Box::new(Memory(bytes.clone())), budget);
        assert!(found.is_err(), "{budget}");
    }
}
