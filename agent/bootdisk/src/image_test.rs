//! Whole disks, made by the tools that make them in life: mke2fs, sfdisk, mkfs.vfat, debugfs.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::TempDir;

use crate::{FindError, Found, KernelKind, find};

pub(crate) const MIB: u64 = 1 << 20;

/// Whether these tools are there; says so when not.
pub(crate) fn have(tools: &[&str]) -> bool {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let missing = tools.iter().find(|tool| !path.split(':').any(|dir| Path::new(dir).join(tool).is_file()));
    if let Some(tool) = missing {
        println!("skipped: {tool} is not installed");
    }
    missing.is_none()
}

pub(crate) fn run(command: &mut Command) {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let output = command.env("PATH", path).output().expect("it starts");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A kernel as far as anyone looks, and of more than one block.
pub(crate) fn kernel(mark: u8) -> Vec<u8> {
    let mut bytes = vec![mark; 70_000];
    bytes[..2].copy_from_slice(b"MZ");
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    bytes
}

/// Files of a file system to be made.
pub(crate) struct Tree(pub(crate) TempDir);

impl Tree {
    pub(crate) fn new(files: &[(&str, &[u8])]) -> Self {
        let tree = Self(tempfile::tempdir().expect("a folder"));
        for (path, bytes) in files {
            let path = tree.0.path().join(path.trim_start_matches('/'));
            fs::create_dir_all(path.parent().expect("inside")).expect("a folder");
            fs::write(path, bytes).expect("a file");
        }
        tree
    }

    /// What Debian has: entries, and links at the root.
    pub(crate) fn entries() -> Self {
        let conf = |version: &str| {
            format!(
                "title Debian {version}\nversion {version}\nlinux /boot/vmlinuz-{version}\ninitrd /boot/initrd-{version}\noptions root=LABEL=root ro\n"
            )
        };
        let (old, new) = (conf("6.1.0-9"), conf("6.1.0-18"));
        Self::new(&[
            ("/boot/vmlinuz-6.1.0-9", &kernel(9)),
            ("/boot/vmlinuz-6.1.0-18", &kernel(18)),
            ("/boot/initrd-6.1.0-9", b"old initrd"),
            ("/boot/initrd-6.1.0-18", &[7; 5001]),
            ("/boot/loader/entries/a.conf", old.as_bytes()),
            ("/boot/loader/entries/b.conf", new.as_bytes()),
        ])
    }

    /// An ext4 file system at an offset of a disk.
    pub(crate) fn ext4(&self, disk: &Path, offset: u64, bytes: u64, more: &[&str]) {
        let file = File::options().create(true).truncate(false).write(true).open(disk).expect("a disk");
        let len = file.metadata().expect("its size").len().max(offset + bytes);
        file.set_len(len).expect("a size");
        let mut command = Command::new("mke2fs");
        command.args(["-q", "-F", "-t", "ext4", "-L", "root"]).args(more);
        command.arg("-E").arg(format!("offset={offset}")).arg("-d").arg(self.0.path());
        run(command.arg(disk).arg(format!("{}k", bytes / 1024)));
    }
}

pub(crate) fn look(disk: &Path) -> Result<Found, FindError> {
    find(Box::new(File::open(disk).expect("a disk")))
}

fn check_newest(disk: &Path, partition: u32, what: &str) {
    let found = look(disk).unwrap_or_else(|e| panic!("{what}: {e}: {:?}", std::error::Error::source(&e)));
    assert_eq!((found.entry.version.as_str(), found.entry.partition), ("6.1.0-18", partition), "{what}");
    assert_eq!(found.kind, KernelKind::BzImage);
    assert_eq!(found.entry.cmdline_with_console(), "root=LABEL=root ro console=ttyS0");
    let (mut out, mut initrd) = (Vec::new(), Vec::new());
    found.write_kernel(&mut out, 1 << 20).expect("a kernel");
    found.write_initrd(&mut initrd, 1 << 20).expect("an initrd");
    assert!(out == kernel(18) && initrd == [7; 5001], "{what}");
    assert!(found.write_kernel(&mut out, 69_999).is_err(), "it is bounded");
}

fn folder() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let disk = folder.path().join("disk.raw");
    (folder, disk)
}

#[test]
fn every_kind_of_ext4_is_read() {
    if !have(&["mke2fs"]) {
        return;
    }
    let tree = Tree::entries();
    let many: [&[&str]; 11] = [
        &[],
        &["-b", "1024"],
        &["-b", "2048"],
        &["-O", "^metadata_csum,^64bit"],
        &["-O", "^has_journal,^extents,^64bit"],
        &["-O", "^flex_bg,meta_bg,^resize_inode", "-b", "1024", "-g", "1024"],
        &["-O", "^flex_bg,meta_bg,^resize_inode,^64bit,^metadata_csum", "-b", "1024", "-g", "512"],
        &["-O", "mmp,ea_inode,dir_nlink"],
        &["-O", "sparse_super2", "-b", "1024"],
        &["-O", "bigalloc"],
        &["-I", "128", "-O", "^metadata_csum"],
    ];
    for more in many {
        let (_folder, disk) = folder();
        tree.ext4(&disk, 0, 32 * MIB, more);
        check_newest(&disk, 0, &format!("{more:?}"));
    }
}

fn table(disk: &Path, script: &str) {
    let mut child = Command::new("/usr/sbin/sfdisk")
        .arg("-q")
        .arg(disk)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("sfdisk");
    std::io::Write::write_all(&mut child.stdin.take().expect("piped"), script.as_bytes()).expect("it reads");
    assert!(child.wait().expect("it ends").success(), "{script}");
}

#[test]
fn partitions_are_found_in_every_table() {
    if !have(&["mke2fs", "sfdisk"]) {
        return;
    }
    let tree = Tree::entries();
    // The second partition of three begins at 8 MiB.
    let gpt = "label: gpt\nstart=2048,size=2048\nstart=16384,size=65536\nsize=2048\n";
    let mbr = "label: dos\nstart=2048,size=2048,type=83\nstart=16384,size=65536,type=83\n";
    let logical = "label: dos\nstart=2048,size=2048,type=83\nstart=4096,type=5\nstart=6144,size=2048,type=83\nstart=16384,size=65536,type=83\n";
    for (script, number) in [(gpt, 2), (mbr, 2), (logical, 6)] {
        let (_folder, disk) = folder();
        tree.ext4(&disk, 8 * MIB, 32 * MIB, &[]);
        File::options().write(true).open(&disk).and_then(|file| file.set_len(64 * MIB)).expect("a size");
        table(&disk, script);
        check_newest(&disk, number, script);
        if script == gpt {
            let file = File::options().write(true).open(&disk).expect("a disk");
            file.write_all_at(&[0xff; 8], 512 + 40).expect("a write");
            check_newest(&disk, number, "by the backup");
            file.write_all_at(&[0xff; 8], 64 * MIB - 512 + 40).expect("a write");
            assert!(matches!(look(&disk), Err(FindError::Table)));
        }
    }
}

#[test]
fn links_and_a_boot_partition_of_its_own() {
    if !have(&["mke2fs", "sfdisk"]) {
        return;
    }
    let grub = b"search --no-floppy --label --set=root boot\nmenuentry Own { linux /vmlinuz root=/dev/vda2 ; initrd /early /initrd.img }\n";
    let boot = Tree::new(&[
        ("/grub/grub.cfg", grub),
        ("/vmlinuz-6.1", &kernel(1)),
        ("/initrd-6.1", b"late"),
        ("/early", b"early"),
    ]);
    let link =
        |to: &str, from: &str| std::os::unix::fs::symlink(to, boot.0.path().join(from)).expect("a link");
    link("vmlinuz-6.1", "vmlinuz");
    let long = format!("{}initrd-6.1", "./".repeat(40));
    link(&long, "initrd.img");
    link("/loop2", "loop1");
    link("loop1", "loop2");
    let (_folder, disk) = folder();
    boot.ext4(&disk, MIB, 8 * MIB, &["-L", "boot"]);
    Tree::new(&[("/etc/fstab", b"x")]).ext4(&disk, 9 * MIB, 8 * MIB, &[]);
    File::options().write(true).open(&disk).and_then(|file| file.set_len(20 * MIB)).expect("a size");
    table(&disk, "label: gpt\nstart=2048,size=16384\nstart=18432,size=16384\n");
    let found = look(&disk).expect("found");
    assert_eq!((found.entry.title.as_str(), found.entry.partition), ("Own", 1));
    let mut initrd = Vec::new();
    assert_eq!(found.write_initrd(&mut initrd, 100).expect("initrds"), 12);
    assert_eq!(initrd, b"early\0\0\0late", "each from a multiple of four on");
    assert!(found.write_initrd(&mut initrd, 11).is_err());
}

#[test]
fn a_journal_is_laid_over() {
    if !have(&["mke2fs", "debugfs"]) {
        return;
    }
    for features in ["metadata_csum,64bit", "^metadata_csum,^64bit", "^metadata_csum,64bit"] {
        let (_folder, disk) = folder();
        Tree::entries().ext4(&disk, 0, 32 * MIB, &["-O", features]);
        check_newest(&disk, 0, features);
        // A block of the journal that says: the newest entry's directory block is this one.
        let debugfs = |commands: &str| {
            let file = disk.with_extension("commands");
            fs::write(&file, commands).expect("a file");
            run(Command::new("debugfs").arg("-w").arg("-f").arg(&file).arg(&disk));
        };
        let blocks =
            Command::new("/usr/sbin/debugfs").args(["-R", "blocks /boot/loader/entries"]).arg(&disk).output();
        let blocks = String::from_utf8(blocks.expect("it runs").stdout).expect("text");
        let block: u64 = blocks.split_whitespace().next().expect("a block").parse().expect("a number");
        // The block as it is goes into the journal; in its place there is nothing that could be read.
        let file = File::options().read(true).write(true).open(&disk).expect("a disk");
        let size =
            if fs::metadata(&disk).expect("its size").len() >= 512 * MIB { 4096 } else { block_bytes(&file) };
        let mut content = vec![0; size];
        file.read_exact_at(&mut content, block * size as u64).expect("a read");
        let copy = disk.with_extension("block");
        fs::write(&copy, &content).expect("a file");
        let sums = if features.starts_with('^') { "" } else { "-c" };
        debugfs(&format!("jo {sums}\njw -b {block} {}\njc\n", copy.display()));
        let file = File::options().write(true).open(&disk).expect("a disk");
        file.write_all_at(&vec![0xff; size], block * size as u64).expect("a write");
        check_newest(&disk, 0, &format!("{features}, from the journal"));
    }
}

fn block_bytes(disk: &File) -> usize {
    let mut log = [0; 4];
    disk.read_exact_at(&mut log, 1024 + 0x18).expect("a superblock");
    1024 << u32::from_le_bytes(log)
}

#[test]
fn fat_is_read_and_firmware_only_is_said() {
    if !have(&["mkfs.vfat", "mcopy", "mmd", "mke2fs"]) {
        return;
    }
    let (folder, disk) = folder();
    File::create(&disk).and_then(|file| file.set_len(40 * MIB)).expect("a disk");
    run(Command::new("mkfs.vfat").args(["-F", "32"]).arg(&disk));
    let put = |from: &[u8], to: &str| {
        let file = folder.path().join("file");
        fs::write(&file, from).expect("a file");
        run(Command::new("mcopy").arg("-o").arg("-i").arg(&disk).arg(&file).arg(format!("::{to}")));
    };
    run(Command::new("mmd").arg("-i").arg(&disk).args([
        "::EFI",
        "::EFI/BOOT",
        "::loader",
        "::loader/entries",
    ]));
    put(b"MZ", "/EFI/BOOT/BOOTX64.EFI");
    match look(&disk) {
        Err(error @ FindError::UefiOnly { .. }) => {
            assert!(error.to_string().contains("UEFI-only"), "{error}")
        }
        other => panic!("{other:?}"),
    }
    put(&kernel(3), "/EFI/vmlinuz-long-name-6.1");
    put(b"linux /EFI/vmlinuz-long-name-6.1\noptions quiet console=tty0\n", "/loader/entries/arch.conf");
    let found = look(&disk).expect("found");
    assert_eq!(
        (found.entry.version.as_str(), found.entry.cmdline_with_console().as_str()),
        ("long-name-6.1", "quiet console=tty0")
    );
    let mut out = Vec::new();
    found.write_kernel(&mut out, MIB).expect("a kernel");
    assert_eq!(out, kernel(3));
    let unified: &[u8] = &[b"MZ".as_slice(), &[0; 2000]].concat();
    put(unified, "/EFI/vmlinuz-long-name-6.1");
    assert!(matches!(look(&disk), Err(FindError::UefiOnly { .. })));
}

#[test]
fn what_cannot_be_read_is_named() {
    let xfs = crate::Memory([b"XFSB".as_slice(), &vec![0; 1 << 20]].concat());
    let error = find(Box::new(xfs)).expect_err("no kernel").to_string();
    assert!(error.contains("XFS") && error.contains("ext4"), "{error}");
    let error = find(Box::new(crate::Memory(vec![0; 1 << 20]))).expect_err("no kernel").to_string();
    assert!(error.contains("no file system"), "{error}");
    assert!(find(Box::new(crate::Memory::default())).is_err());
    if !have(&["mke2fs"]) {
        return;
    }
    for (files, want) in [
        (Tree::new(&[("/boot/loader/entries/a.conf", b"linux /gone\n")]), "/gone"),
        (Tree::new(&[("/boot/loader/entries/a.conf", b"linux /k\n"), ("/k", b"text")]), "no kernel"),
        (
            Tree::new(&[("/boot/loader/entries/a.conf", b"linux /k\noptions a\x07b\n"), ("/k", &kernel(1))]),
            "control",
        ),
        (Tree::new(&[("/boot/loader/entries/a.conf", b"uki /EFI/a.efi\n")]), "UEFI-only"),
        (Tree::new(&[("/boot/grub/grub.cfg", b"if true; then\n")]), "grub.cfg"),
        (Tree::new(&[("/boot/grub/grub.cfg", b"menuentry a { linux /gone }\n")]), "/gone"),
    ] {
        let (_folder, disk) = folder();
        files.ext4(&disk, 0, 8 * MIB, &[]);
        let error = look(&disk).expect_err(want).to_string();
        assert!(error.contains(want), "{want}: {error}");
    }
}
