//! Disks over several files, as qemu-img makes them, and descriptions that lie.

use std::{
    fs::{self, File},
    path::Path,
    process::Command,
};

use crate::{Format, FormatError, Image, NoBackings, allowed::Allowed, open, source::Source};

const SIZE_MAX: u64 = 1 << 40;

fn opened(path: &Path, names: &[&str]) -> Result<Box<dyn Image + Send>, FormatError> {
    let file = File::open(path).unwrap();
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let mut allowed = Allowed::new(&names, path, &file, SIZE_MAX).unwrap();
    open(Source::new(file).unwrap(), Format::Vmdk, SIZE_MAX, &mut allowed)
}

fn refused(path: &Path, names: &[&str]) -> String {
    opened(path, names).err().expect("refused").to_string()
}

/// The disk: some data at its start, on both sides of the border at 2 GiB, and at its end.
fn disk(path: &Path, size: u64) -> Vec<(u64, Vec<u8>)> {
    use std::os::unix::fs::FileExt;
    let file = File::create(path).unwrap();
    file.set_len(size).unwrap();
    let part =
        |at: u64, seed: u8| (at, (0..200_000_u32).map(|i| (i % 251) as u8 ^ seed).collect::<Vec<u8>>());
    // Parts of qemu-img's are of 2 GiB less some sectors, so this lies on both sides whatever they are.
    let parts = vec![part(0, 1), part((2 << 30) - 100_000, 2), part(size - 200_000, 3)];
    for (at, bytes) in &parts {
        file.write_all_at(bytes, *at).unwrap();
    }
    parts
}

#[test]
fn disks_over_several_files_are_read_when_each_is_allowed() {
    if Command::new("qemu-img").arg("--version").output().is_err() {
        eprintln!("skipped: qemu-img is not installed");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("disk.raw");
    let size = (2 << 30) + (64 << 20);
    let parts = disk(&raw, size);
    for (kind, files) in [
        ("twoGbMaxExtentSparse", vec!["d-s001.vmdk", "d-s002.vmdk"]),
        ("monolithicFlat", vec!["d-flat.vmdk"]),
        ("twoGbMaxExtentFlat", vec!["d-f001.vmdk", "d-f002.vmdk"]),
    ] {
        let path = dir.path().join("d.vmdk");
        let made = Command::new("qemu-img")
            .args(["convert", "-f", "raw", "-O", "vmdk", "-o", &format!("subformat={kind}")])
            .args([&raw, &path])
            .output()
            .unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        assert!(refused(&path, &files[1..]).contains(&format!("`{}`, which was not allowed", files[0])));
        assert!(matches!(
            open(Source::new(File::open(&path).unwrap()).unwrap(), Format::Vmdk, SIZE_MAX, &mut NoBackings),
            Err(FormatError::NotAllowed(_))
        ));
        let mut image = opened(&path, &files).unwrap();
        assert_eq!(image.size_bytes(), size, "{kind}");
        let (mut at, mut data) = (0, 0);
        while at < size {
            let run = image.run(at).unwrap();
            data += if run.zero { 0 } else { run.len };
            at += run.len;
        }
        assert!(at == size && (600_000..2_000_000).contains(&data), "{kind}: {data} bytes of data");
        for (at, bytes) in &parts {
            let mut got = vec![0; bytes.len()];
            image.read(*at, &mut got).unwrap();
            assert!(got == *bytes, "{kind} at {at}");
        }
        // A part by itself is no disk, and a part that is cut short is noticed before anything is read.
        if kind.ends_with("Sparse") {
            assert!(refused(&dir.path().join(files[0]), &[]).contains("give the description"));
        } else {
            File::options().write(true).open(dir.path().join(files[0])).unwrap().set_len(1 << 20).unwrap();
            assert!(refused(&path, &files).contains("too few"));
        }
        fs::remove_file(dir.path().join(files[0])).unwrap();
        assert!(refused(&path, &files).contains(&format!("cannot open `{}`", files[0])));
    }
}

#[test]
fn descriptions_that_lie_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d.vmdk");
    fs::write(dir.path().join("flat"), [0; 4096]).unwrap();
    let text = |kind: &str, extents: &str| {
        format!("# Disk DescriptorFile\nversion=1\nparentCID=ffffffff\ncreateType=\"{kind}\"\n{extents}\n")
    };
    let refusal = |kind: &str, extents: &str| {
        fs::write(&path, text(kind, extents)).unwrap();
        refused(&path, &["flat"])
    };
    for (kind, extents, words) in [
        ("monolithicFlat", "", "names no extent"),
        ("vmfs", "RW 8 VMFS \"flat\"", "it is a `vmfs`"),
        ("monolithicFlat", "RW 8 VMFS \"flat\"", "has the extent"),
        ("monolithicFlat", "RW 9 FLAT \"flat\" 0", "too few"),
        ("monolithicFlat", "RW 8 FLAT \"flat\" 1", "too few"),
        ("monolithicFlat", "RW 8 FLAT \"flat\" 18446744073709551615", "has the extent"),
        ("monolithicFlat", "RW 18446744073709551615 FLAT \"flat\" 0", "has the extent"),
        ("monolithicFlat", "RW 0 FLAT \"flat\" 0", "has the extent"),
        ("monolithicFlat", "RW 8 FLAT \"fl\"at\" 0", "has the extent"),
        ("monolithicFlat", "RW 4294967296 ZERO", "are the most that is allowed"),
        ("monolithicFlat", "RW 8 FLAT \"/etc/passwd\" 0", "not allowed"),
        ("monolithicFlat", "NOACCESS 8 FLAT \"flat\" 0", "may not be accessed"),
        ("twoGbMaxExtentSparse", "RW 8 SPARSE \"flat\"", "does not start with KDMV"),
        ("monolithicFlat", &"RW 8 ZERO\n".repeat(600), "more than 512 files"),
    ] {
        let said = refusal(kind, extents);
        assert!(said.contains(words), "{extents}: {said}");
    }
    fs::write(&path, text("monolithicFlat", "RW 4 FLAT \"flat\" 4\nRW 2 ZERO")).unwrap();
    assert_eq!(opened(&path, &["flat"]).unwrap().size_bytes(), 6 * 512);
    fs::write(&path, text("monolithicFlat", "").replace("ffffffff", "12345678")).unwrap();
    assert!(refused(&path, &[]).contains("it leans on the file"));
}
