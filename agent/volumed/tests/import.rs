//! `serio-volumed import` and `export`: what qemu-img makes is read, what we write qemu-img accepts, and an interrupted
//! import goes on.
#![forbid(unsafe_code)]

mod common;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use common::{BIN, Serving, have, image, noise, run, volumed};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;

fn text(path: &Path) -> &str {
    path.to_str().expect("text")
}

/// A raw disk whose last cluster is cut short, in a directory.
fn disk(temp: &TempDir) -> (PathBuf, Vec<u8>) {
    let mut content = image();
    content.extend(noise(70_144, 3));
    let path = temp.path().join("disk.raw");
    fs::write(&path, &content).expect("write");
    (path, content)
}

fn qemu_img(args: &[&str]) {
    run("qemu-img", args);
}

/// What a volume holds, through an export.
fn content_of(volume: &Path) -> Vec<u8> {
    let output = volumed(&["export", text(volume), "-"]);
    output.stdout
}

fn fails(args: &[&str]) -> String {
    let output = Command::new(BIN).args(args).output().expect("serio-volumed");
    assert!(!output.status.success(), "{args:?} succeeded");
    String::from_utf8(output.stderr).expect("text")
}

#[test]
fn images_of_qemu_img_come_in_as_they_are() {
    if !have("qemu-img") {
        return;
    }
    let temp = TempDir::new().expect("tempdir");
    let (raw, content) = disk(&temp);
    let sum = blake3::hash(&content).to_hex().to_string();
    for (i, (format, options)) in [
        ("raw", &[][..]),
        ("qcow2", &[]),
        ("qcow2", &["-o", "compat=0.10"]),
        ("qcow2", &["-o", "cluster_size=512"]),
        ("qcow2", &["-o", "cluster_size=2M,refcount_bits=1"]),
        ("qcow2", &["-o", "refcount_bits=64,lazy_refcounts=on"]),
        ("qcow2", &["-o", "extended_l2=on,cluster_size=128k"]),
        ("qcow2", &["-o", "preallocation=metadata"]),
        ("qcow2", &["-c"]),
        ("qcow2", &["-c", "-o", "compression_type=zstd"]),
        ("vmdk", &[]),
        ("vmdk", &["-o", "subformat=streamOptimized"]),
        ("vmdk", &["-o", "zeroed_grain=on"]),
    ]
    .into_iter()
    .enumerate()
    {
        let image = temp.path().join(format!("{i}.{format}"));
        let mut args = vec!["convert", "-O", format];
        args.extend(options);
        args.extend([text(&raw), text(&image)]);
        qemu_img(&args);
        let volume = temp.path().join(format!("v{i}"));
        let args = ["import", text(&volume), text(&image), "--format", format, "--blake3", &sum];
        let said = String::from_utf8(volumed(&args).stdout).expect("text");
        assert!(said.contains(&sum), "{format} {options:?}: {said}");
        assert!(content_of(&volume) == content, "{format} {options:?}");
        // Sparse stays sparse: the disk has some 5 MiB of data in 32.
        let data = fs::metadata(volume.join("00000000.data")).expect("data");
        let allocated = std::os::unix::fs::MetadataExt::blocks(&data) * 512;
        assert!(allocated < 8 << 20, "{format} {options:?}: {allocated} bytes allocated");
        volumed(&["check", text(&volume)]);
    }
}

#[test]
fn what_is_exported_qemu_img_accepts() {
    if !have("qemu-img") {
        return;
    }
    let temp = TempDir::new().expect("tempdir");
    let (raw, content) = disk(&temp);
    let volume = temp.path().join("vol");
    volumed(&["import", text(&volume), text(&raw)]);
    volumed(&["snapshot", text(&volume), "one"]);
    for format in ["raw", "qcow2", "vmdk"] {
        let image = temp.path().join(format!("out.{format}"));
        let point = format!("{}@one", volume.display());
        let args = ["export", &point, text(&image), "--format", format];
        let said = String::from_utf8(volumed(&args).stderr).expect("text");
        assert!(said.contains(&blake3::hash(&content).to_hex().to_string()), "{said}");
        if format != "raw" {
            qemu_img(&["check", "-f", format, text(&image)]);
        }
        qemu_img(&["compare", "-f", "raw", "-F", format, text(&raw), text(&image)]);
        // And back again.
        let again = temp.path().join(format!("again-{format}"));
        volumed(&["import", text(&again), text(&image), "--format", format]);
        assert!(content_of(&again) == content, "{format}");
        assert!(fails(&args).contains("is there already"));
    }
}

#[test]
fn a_large_sparse_disk_goes_out_and_in() {
    if !have("qemu-img") {
        return;
    }
    let temp = TempDir::new().expect("tempdir");
    let raw = temp.path().join("disk.raw");
    let file = fs::File::create(&raw).expect("create");
    file.set_len(3 << 30).expect("size");
    // In each L2 table of 512 MiB a little, and the last bytes.
    for i in 0..6_u64 {
        std::os::unix::fs::FileExt::write_all_at(&file, &noise(5000, i), i << 29 | 12_345).expect("write");
    }
    std::os::unix::fs::FileExt::write_all_at(&file, &noise(10, 9), (3 << 30) - 10).expect("write");
    let volume = temp.path().join("vol");
    volumed(&["import", text(&volume), text(&raw)]);
    for format in ["qcow2", "vmdk"] {
        let image = temp.path().join(format!("out.{format}"));
        volumed(&["export", text(&volume), text(&image), "--format", format]);
        qemu_img(&["check", "-f", format, text(&image)]);
        qemu_img(&["compare", "-f", "raw", "-F", format, text(&raw), text(&image)]);
        assert!(fs::metadata(&image).expect("image").len() < 16 << 20);
    }
}

#[test]
fn backing_files_only_by_name() {
    if !have("qemu-img") {
        return;
    }
    let temp = TempDir::new().expect("tempdir");
    let (raw, mut content) = disk(&temp);
    let (base, top) = (temp.path().join("base.qcow2"), temp.path().join("top.qcow2"));
    qemu_img(&["convert", "-O", "qcow2", text(&raw), text(&base)]);
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", text(&top), "40M"]);
    run(
        "qemu-io",
        &["-c", "write -P 7 1M 64k", "-c", "write -z 2M 128k", "-c", "write -P 9 39M 4k", text(&top)],
    );
    content[1 << 20..][..64 << 10].fill(7);
    content[2 << 20..][..128 << 10].fill(0);
    content.resize(40 << 20, 0);
    content[39 << 20..][..4096].fill(9);
    let volume = temp.path().join("vol");
    let args = ["import", text(&volume), text(&top), "--format", "qcow2"];
    let refused = fails(&args);
    assert!(refused.contains("`base.qcow2`, which was not allowed"), "{refused}");
    assert!(!volume.exists(), "something was written");
    volumed(&[&args[..], &["--backing", "base.qcow2"]].concat());
    assert!(content_of(&volume) == content);
    // One that comes back to itself, one that names no format.
    qemu_img(&["rebase", "-u", "-b", "top.qcow2", "-F", "qcow2", text(&base)]);
    let second = temp.path().join("second");
    let allowed = ["--backing", "base.qcow2", "--backing", "top.qcow2"];
    let args = [&["import", text(&second), text(&top), "--format", "qcow2"], &allowed[..]].concat();
    assert!(fails(&args).contains("come back to"));
    assert!(!second.exists());
}

#[test]
fn refusals_leave_nothing() {
    let temp = TempDir::new().expect("tempdir");
    let (raw, content) = disk(&temp);
    let volume = temp.path().join("vol");
    let import = |more: &[&str]| fails(&[&["import", text(&volume)], more].concat());
    assert!(import(&[text(&raw), "--format", "qcow2"]).contains("does not start with QFI"));
    assert!(import(&[text(&raw), "--format", "vmdk"]).contains("does not start with KDMV"));
    assert!(import(&[text(&raw), "--format", "vhdx"]).contains("raw, qcow2 and vmdk"));
    assert!(import(&["/nowhere/x"]).contains("cannot open the image"));
    assert!(import(&["nbd://x/%zz"]).contains("not an NBD URI"));
    assert!(import(&[text(&raw), "--size", "1MiB"]).contains("smaller than the image"));
    assert!(!volume.exists());
    assert!(import(&[text(&raw), "--blake3", "00"]).contains("not the one that was meant"));
    // What was read is not a volume, and the right image goes on from there.
    assert!(fails(&["info", text(&volume)]).contains("not usable"));
    volumed(&["import", text(&volume), text(&raw), "--size", "64MiB"]);
    assert!(content_of(&volume)[..content.len()] == content);
    assert!(import(&[text(&raw)]).contains("holds a volume already"));
}

/// Starts an import that the server slows down, and ends it with a signal once the journal says that it is on its way.
fn interrupted(volume: &Path, uri: &str, signal: Signal) -> String {
    let mut child = Command::new(BIN)
        .args(["import", text(volume), uri])
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("serio-volumed");
    let data = volume.join("00000000.data");
    let started = std::time::Instant::now();
    while fs::metadata(&data).map_or(0, |m| std::os::unix::fs::MetadataExt::blocks(&m)) < 4096 {
        assert!(started.elapsed().as_secs() < 60, "nothing is written");
        std::thread::yield_now();
    }
    kill(Pid::from_raw(child.id() as i32), signal).expect("signal");
    let mut said = String::new();
    std::io::Read::read_to_string(&mut child.stderr.take().expect("stderr"), &mut said).expect("stderr");
    assert!(!child.wait().expect("wait").success());
    said
}

/// Ctrl-C while a pipe is silent, a pipe that brings nothing, and a disk that is another: no volume, and no half of one.
#[test]
fn what_a_pipe_does_not_bring_whole_leaves_nothing() {
    let temp = TempDir::new().expect("tempdir");
    let volume = temp.path().join("vol");
    let begin = |more: &[&str]| {
        let mut command = Command::new(BIN);
        command.args(["import", text(&volume), "-"]).args(more);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("start")
    };
    let ends = |child: std::process::Child| {
        let output = child.wait_with_output().expect("wait");
        assert_eq!(output.status.code(), Some(1));
        let said = String::from_utf8(output.stderr).expect("text");
        assert!(said.contains("begins anew"), "{said}");
        assert!(!volume.exists(), "{said}");
        said
    };
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let mut child = begin(&[]);
        let mut pipe = child.stdin.take().expect("stdin");
        std::io::Write::write_all(&mut pipe, &noise(3 << 20, 1)).expect("write");
        let data = volume.join("00000000.data");
        while fs::metadata(&data).map_or(0, |m| m.len()) == 0 {
            assert!(child.try_wait().expect("wait").is_none(), "it ended");
            std::thread::yield_now();
        }
        kill(Pid::from_raw(child.id() as i32), signal).expect("signal");
        // Nothing more comes, and the pipe stays open.
        let said = ends(child);
        assert!(said.contains("interrupted"), "{said}");
    }
    assert!(ends(begin(&[])).contains("the image is empty"));
    let mut child = begin(&["--blake3", "00"]);
    std::io::Write::write_all(&mut child.stdin.take().expect("stdin"), &noise(4096, 1)).expect("write");
    assert!(ends(child).contains("not the one that was meant"));
    // What was there before stays.
    fs::create_dir(&volume).expect("mkdir");
    fs::write(volume.join("note"), "mine").expect("write");
    let child = begin(&[]);
    assert_eq!(child.wait_with_output().expect("wait").status.code(), Some(1));
    assert_eq!(fs::read_dir(&volume).expect("read").count(), 1);
}

/// `serio-volumed export VOL - | head`: an error, not a death by signal or a panic.
#[test]
fn a_reader_that_goes_away_is_told() {
    let temp = TempDir::new().expect("tempdir");
    let (raw, _) = disk(&temp);
    let volume = temp.path().join("vol");
    volumed(&["import", text(&volume), text(&raw)]);
    let mut child = Command::new(BIN)
        .args(["export", text(&volume), "-"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start");
    let mut first = [0; 512];
    let mut pipe = child.stdout.take().expect("stdout");
    std::io::Read::read_exact(&mut pipe, &mut first).expect("read");
    drop(pipe);
    let output = child.wait_with_output().expect("wait");
    let said = String::from_utf8(output.stderr).expect("text");
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("cannot export to -") && said.contains("roken pipe"), "{said}");
}

#[test]
fn an_interrupted_import_goes_on() {
    if !have("nbdkit") {
        return;
    }
    let temp = TempDir::new().expect("tempdir");
    let content = noise(48 << 20, 5);
    let raw = temp.path().join("disk.raw");
    fs::write(&raw, &content).expect("write");
    let socket = temp.path().join("s");
    let mut server = Command::new("nbdkit")
        .args(["-f", "-U", text(&socket), "--filter=delay", "file", text(&raw), "rdelay=60ms"])
        .stderr(Stdio::null())
        .spawn()
        .expect("nbdkit");
    while std::os::unix::net::UnixStream::connect(&socket).is_err() {
        std::thread::yield_now();
    }
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let volume = temp.path().join("vol");
    let said = interrupted(&volume, &uri, Signal::SIGINT);
    assert!(said.contains("the same command goes on"), "{said}");
    assert!(volume.join("import.journal").exists());
    let other = fails(&["import", text(&volume), text(&raw)]);
    assert!(other.contains("unfinished import of another image"), "{other}");
    // Killed without a word: what was kept before counts.
    interrupted(&volume, &uri, Signal::SIGKILL);
    let output = volumed(&["import", text(&volume), &uri]);
    let said = String::from_utf8(output.stderr).expect("text");
    assert!(said.contains("going on at") && !said.contains("going on at 0 MiB"), "{said}");
    assert!(
        String::from_utf8(output.stdout)
            .expect("text")
            .contains(&blake3::hash(&content).to_hex().to_string())
    );
    assert!(content_of(&volume) == content);
    assert!(!volume.join("import.journal").exists());
    server.kill().expect("kill");
    server.wait().expect("wait");
}

#[test]
fn over_nbd_and_through_pipes() {
    let temp = TempDir::new().expect("tempdir");
    let (raw, content) = disk(&temp);
    let (one, two) = (temp.path().join("one"), temp.path().join("two"));
    volumed(&["import", text(&one), text(&raw)]);
    volumed(&["create", text(&two), "--size", "33MiB"]);
    {
        let serving = Serving::start(&two, &temp.path().join("s"), &[]);
        volumed(&["export", text(&one), &serving.uri()]);
        // Again, over what is there.
        volumed(&["export", text(&one), &serving.uri(), "--resume"]);
        let three = temp.path().join("three");
        volumed(&["import", text(&three), &serving.uri()]);
        assert!(content_of(&three)[..content.len()] == content);
        let data = fs::metadata(three.join("00000000.data")).expect("data");
        assert!(std::os::unix::fs::MetadataExt::blocks(&data) * 512 < 8 << 20);
    }
    let mut child = Command::new(BIN)
        .args(["import", text(&temp.path().join("four")), "-"])
        .stdin(fs::File::open(&raw).expect("open"))
        .spawn()
        .expect("serio-volumed");
    assert!(child.wait().expect("wait").success());
    assert!(content_of(&temp.path().join("four")) == content);
}

#[test]
fn an_interrupted_export_goes_on() {
    let temp = TempDir::new().expect("tempdir");
    let (raw, content) = disk(&temp);
    let volume = temp.path().join("vol");
    volumed(&["import", text(&volume), text(&raw)]);
    // Half of it, and something that does not belong there.
    let out = temp.path().join("out.raw");
    let mut half = content[..3 << 20].to_vec();
    half[5000] ^= 1;
    half.resize(8 << 20, 7);
    fs::write(&out, &half).expect("write");
    volumed(&["export", text(&volume), text(&out), "--resume"]);
    assert!(fs::read(&out).expect("read") == content);
    // Over another, longer file.
    fs::write(&out, noise(40 << 20, 8)).expect("write");
    volumed(&["export", text(&volume), text(&out), "--force"]);
    assert!(fs::read(&out).expect("read") == content);
}
