//! What a tenant's disk says about its boot: a small ext4 disk with the input's bytes strewn over it, or with the input as
//! its grub.cfg.
#![no_main]

use std::{process::Command, sync::OnceLock};

use libfuzzer_sys::fuzz_target;
use serio_bootdisk::{Memory, find_with_budget};

/// What the grub.cfg of the disk is full of.
const MARK: &[u8] = b"################################";
const SCRIPT_BYTES: usize = 3072;

/// A disk, and where its grub.cfg lies.
fn disk() -> &'static (Vec<u8>, usize) {
    static DISK: OnceLock<(Vec<u8>, usize)> = OnceLock::new();
    DISK.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a folder");
        let tree = folder.path().join("tree");
        let disk = folder.path().join("disk");
        std::fs::create_dir_all(tree.join("boot/grub")).expect("a folder");
        let mut kernel = vec![0; 5000];
        kernel[0x202..0x206].copy_from_slice(b"HdrS");
        std::fs::write(tree.join("vmlinuz"), kernel).expect("a file");
        std::fs::write(tree.join("boot/grub/grub.cfg"), vec![b'#'; SCRIPT_BYTES]).expect("a file");
        let mut make = Command::new("/usr/sbin/mke2fs");
        make.args(["-q", "-t", "ext4", "-b", "1024", "-O", "^metadata_csum", "-J", "size=1", "-d"]);
        let made = make.arg(&tree).arg(&disk).arg("4096k").status().expect("mke2fs of e2fsprogs");
        assert!(made.success());
        let bytes = std::fs::read(&disk).expect("a disk");
        let at = bytes.windows(MARK.len()).position(|part| part == MARK).expect("its grub.cfg");
        (bytes, at)
    })
}

fuzz_target!(|data: &[u8]| {
    let (whole, script) = disk();
    let mut bytes = whole.clone();
    match data.split_first() {
        Some((0..=127, text)) => {
            let text = &text[..text.len().min(SCRIPT_BYTES)];
            let place = &mut bytes[*script..script + SCRIPT_BYTES];
            place.fill(b'\n');
            place[..text.len()].copy_from_slice(text);
        }
        Some((_, patches)) => {
            for patch in patches.chunks_exact(5) {
                let at = u32::from_le_bytes([patch[0], patch[1], patch[2], 0]) as usize % bytes.len();
                bytes[at] = patch[3];
                let next = (at + 1) % bytes.len();
                bytes[next] = patch[4];
            }
        }
        None => {}
    }
    if let Ok(found) = find_with_budget(Box::new(Memory(bytes)), 16 << 20) {
        let _ = found.write_kernel(&mut std::io::sink(), 1 << 20);
        let _ = found.write_initrd(&mut std::io::sink(), 1 << 20);
    }
});
