//! Images that lie: valid ones with damaged headers and tables end in a refusal, or in a disk that can be read to its end;
//! never in a panic, a hang, a huge allocation, or a read outside the file.
//!
//! `SERIO_HOSTILE_SEEDS=20000 cargo nextest run -p serio-formats hostile_test` for more of them.

use std::{fs::File, io::Write, os::unix::fs::FileExt, path::Path, process::Command};

use super::{Format, FormatError, Image, NoBackings, Run, open, qcow2_out, source::Source, vmdk_out};

/// The largest disk that is let through: a damaged size must not make the test slow.
const SIZE_MAX: u64 = 256 << 20;

/// xorshift: the same damage for the same seed.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, max: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % max.max(1)
    }
}

fn content() -> Vec<u8> {
    let mut dice = Dice(0x1234_5678_9abc_def1);
    let mut content = vec![0; 1 << 20];
    for (start, len) in [(0, 70_000), (300_000, 5_000), (900_000, 148_576)] {
        // Compressible by half, so that compressed clusters are.
        content[start..start + len].iter_mut().for_each(|b| *b = dice.roll(16) as u8);
    }
    content
}

fn read_all(image: &mut dyn Image) -> Result<Vec<u8>, FormatError> {
    let size = image.size_bytes();
    let (mut all, mut at) = (Vec::new(), 0);
    while at < size {
        let Run { len, zero } = image.run(at)?;
        assert!(len > 0, "a run without end");
        let len = len.min(size - at);
        // A huge hole costs nothing.
        if !zero {
            let mut part = vec![0; len.min(1 << 20) as usize];
            image.read(at, &mut part)?;
            all.extend(&part);
            at += part.len() as u64;
        } else {
            all.resize(all.len() + len.min(2 << 20) as usize, 0);
            at += len;
        }
    }
    Ok(all)
}

fn open_file(file: &File, format: Format) -> Result<Box<dyn Image + Send>, FormatError> {
    let source = Source::new(file.try_clone().expect("clone")).expect("source");
    open(source, format, SIZE_MAX, &mut NoBackings)
}

/// An image and its format; whether its clusters are compressed, so that damage shows only when they are read.
struct Sample {
    what: String,
    file: File,
    bytes: Vec<u8>,
    format: Format,
    packed: bool,
}

fn ours(format: Format) -> Sample {
    let file = tempfile::tempfile().expect("file");
    let content = content();
    let grains = content.chunks(qcow2_out::CLUSTER as usize).enumerate();
    if format == Format::Qcow2 {
        let mut writer = qcow2_out::Writer::new(&file, content.len() as u64);
        grains.for_each(|(i, g)| writer.put(i as u64 * qcow2_out::CLUSTER, g).expect("put"));
        writer.finish().expect("finish");
    } else {
        let mut writer = vmdk_out::Writer::new(&file, content.len() as u64).expect("begin");
        grains.for_each(|(i, g)| writer.put(i as u64 * vmdk_out::GRAIN, g).expect("put"));
        writer.finish().expect("finish");
    }
    sample(format!("our {format}"), file, format, false)
}

fn sample(what: String, file: File, format: Format, packed: bool) -> Sample {
    let len = file.metadata().expect("metadata").len();
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, 0).expect("read");
    Sample { what, file, bytes, format, packed }
}

fn samples() -> Vec<Sample> {
    let mut samples = vec![ours(Format::Qcow2), ours(Format::Vmdk)];
    let temp = tempfile::tempdir().expect("tempdir");
    let raw = temp.path().join("raw");
    File::create(&raw).and_then(|mut f| f.write_all(&content())).expect("write");
    for options in [
        &["-O", "qcow2"][..],
        &["-O", "qcow2", "-o", "compat=0.10,cluster_size=512"],
        &["-O", "qcow2", "-o", "extended_l2=on,cluster_size=16k,refcount_bits=1"],
        &["-O", "qcow2", "-c", "-o", "cluster_size=4k"],
        &["-O", "qcow2", "-c", "-o", "compression_type=zstd"],
        &["-O", "vmdk"],
        &["-O", "vmdk", "-o", "subformat=streamOptimized"],
    ] {
        let image = temp.path().join(format!("image{}", samples.len()));
        let made = Command::new("qemu-img").arg("convert").args(options).arg(&raw).arg(&image).status();
        if !made.is_ok_and(|status| status.success()) {
            println!("skipped: qemu-img {options:?}");
            continue;
        }
        let format = options[1].parse().expect("format");
        let packed = options.iter().any(|o| *o == "-c" || o.contains("stream"));
        samples.push(sample(format!("{options:?}"), reopen(&image), format, packed));
    }
    samples
}

fn reopen(path: &Path) -> File {
    File::options().read(true).write(true).open(path).expect("open")
}

#[test]
fn samples_are_read_as_they_are() {
    for sample in samples() {
        let mut image = open_file(&sample.file, sample.format).expect(&sample.what);
        assert!(read_all(image.as_mut()).expect(&sample.what) == content(), "{}", sample.what);
    }
}

/// Places where a damaged number does most: the header, and wherever the file has what looks like a table entry.
fn place(sample: &Sample, dice: &mut Dice) -> usize {
    let len = sample.bytes.len() as u64;
    if dice.roll(2) == 0 {
        return dice.roll(len.min(112)) as usize;
    }
    for _ in 0..200 {
        let at = dice.roll(len) as usize & !7;
        let word = sample.bytes.get(at..at + 8).unwrap_or_default();
        // An entry of a table: few bytes that are not zero, among zeros.
        if (1..4).contains(&word.iter().filter(|b| **b != 0).count()) {
            return at + dice.roll(8) as usize;
        }
    }
    dice.roll(len) as usize
}

#[test]
fn damaged_images_are_refused_or_read() {
    let seeds = std::env::var("SERIO_HOSTILE_SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(400);
    let (mut refused, mut read) = (0, 0);
    for sample in samples() {
        for seed in 1..=seeds {
            let mut dice = Dice(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed));
            let mut places = Vec::new();
            for _ in 0..=dice.roll(3) {
                let at = place(&sample, &mut dice).min(sample.bytes.len() - 1);
                let value = match dice.roll(4) {
                    0 => 0xff,
                    1 => sample.bytes[at] ^ 1 << dice.roll(8),
                    2 => sample.bytes[dice.roll(sample.bytes.len() as u64) as usize],
                    _ => dice.roll(256) as u8,
                };
                sample.file.write_all_at(&[value], at as u64).expect("damage");
                places.push(at);
            }
            match open_file(&sample.file, sample.format) {
                Err(_) => refused += 1,
                Ok(mut image) => match read_all(image.as_mut()) {
                    Ok(_) => read += 1,
                    Err(FormatError::Malformed { .. }) if sample.packed => refused += 1,
                    // What was validated can be read.
                    Err(e) => panic!("{}, seed {seed}, bytes {places:?}: {e:?}", sample.what),
                },
            }
            for at in places {
                sample.file.write_all_at(&sample.bytes[at..=at], at as u64).expect("repair");
            }
        }
    }
    println!("{refused} refused, {read} read");
    assert!(
        refused > seeds && read > seeds / 10,
        "{refused} refused, {read} read: the damage is not what it should be"
    );
}

#[test]
fn cut_images_are_refused_or_read() {
    for sample in samples() {
        let len = sample.bytes.len() as u64;
        let mut dice = Dice(77);
        for cut in (0..40).map(|_| dice.roll(len)).chain([0, 1, 3, 71, 103, 511, 512, len - 1]) {
            sample.file.set_len(cut).expect("cut");
            if let Ok(mut image) = open_file(&sample.file, sample.format) {
                let result = read_all(image.as_mut());
                assert!(result.is_ok() || sample.packed, "{}, cut at {cut}: {:?}", sample.what, result.err());
            }
            sample.file.set_len(len).expect("grow");
            sample.file.write_all_at(&sample.bytes, 0).expect("repair");
        }
    }
}

/// Each kind of lie is named.
#[test]
fn lies_are_named() {
    let sample = ours(Format::Qcow2);
    let l1 = qcow2_out::CLUSTER;
    let entry = u64::from_be_bytes(sample.bytes[l1 as usize..][..8].try_into().expect("entry"));
    let l2 = entry & 0xff_ffff_ff00;
    let table = u64::from_be_bytes(sample.bytes[48..56].try_into().expect("table"));
    let why = |at: u64, bytes: &[u8]| {
        sample.file.write_all_at(bytes, at).expect("damage");
        let error = match open_file(&sample.file, Format::Qcow2) {
            Ok(_) => panic!("{at:#x} {bytes:?} was taken"),
            Err(error) => error.to_string(),
        };
        sample.file.write_all_at(&sample.bytes, 0).expect("repair");
        error
    };
    let says = |error: String, part: &str| assert!(error.contains(part), "{error}");
    says(why(4, &9_u32.to_be_bytes()), "version 9");
    says(why(20, &40_u32.to_be_bytes()), "2^40");
    says(why(24, &u64::MAX.to_be_bytes()), "the most that is allowed");
    says(why(24, &0_u64.to_be_bytes()), "has 0 bytes");
    says(why(32, &1_u32.to_be_bytes()), "encrypted");
    says(why(36, &0_u32.to_be_bytes()), "L1 table of 0 entries");
    says(why(36, &u32::MAX.to_be_bytes()), "L1 table of 4294967295 entries");
    says(why(40, &(1_u64 << 60).to_be_bytes()), "outside the file");
    says(why(48, &l1.to_be_bytes()), "used for something else");
    says(why(56, &u32::MAX.to_be_bytes()), "refcount table");
    says(why(72, &2_u64.to_be_bytes()), "corrupt");
    says(why(72, &4_u64.to_be_bytes()), "another file");
    says(why(72, &(1_u64 << 40).to_be_bytes()), "unknown features");
    says(why(96, &9_u32.to_be_bytes()), "refcounts of 2^9");
    says(why(8, &[0, 0, 0, 0, 0, 0, 0, 104, 0, 0, 8, 0]), "name of its backing file");
    // An L1 entry that points to the L1 table itself; a cluster that is used twice; one outside; one that is not counted.
    says(why(l1, &(l1 | 1 << 63).to_be_bytes()), "used for something else");
    says(why(l2, &sample.bytes[l2 as usize + 8..][..8]), "used for something else");
    says(why(l2, &(1_u64 << 50 | 1 << 63).to_be_bytes()), "not one of the file");
    says(why(l2, &(1_u64 << 57).to_be_bytes()), "reserved bits");
    says(why(table - qcow2_out::CLUSTER, &[0, 0]), "refcount is 0");
    says(why(table, &[0; 8]), "refcount is 0");
    says(why(table, &[0xff; 8]), "refcount block");

    let vmdk = ours(Format::Vmdk);
    let why = |at: u64, bytes: &[u8]| {
        vmdk.file.write_all_at(bytes, at).expect("damage");
        let error = open_file(&vmdk.file, Format::Vmdk).err().expect("refused").to_string();
        vmdk.file.write_all_at(&vmdk.bytes, 0).expect("repair");
        error
    };
    says(why(12, &u64::MAX.to_be_bytes()), "the most that is allowed");
    says(why(20, &3_u64.to_le_bytes()), "grains of 3 sectors");
    says(why(44, &0_u32.to_le_bytes()), "tables of 0 entries");
    says(why(56, &(1_u64 << 40).to_le_bytes()), "outside the file");
    says(why(73, b"\r\n"), "damaged by a transfer");
    says(why(512 + 45 + 10, b"12345678"), "leans on the file");
}
