//! What is done to volumes while their VMs run and after: growing, points, clones, going back, snapshots of a whole vdc at one
//! instant, changed blocks, rot, and a daemon that restarts under a copy.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use serio_tests::{
    bed::{Host, eventually, on_host, run},
    guest::Console,
    volumes::{copy, export, folder, number, unexport_all},
};

/// Deterministic bytes that nothing else has.
fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut word = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(bytes);
    while out.len() < bytes {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        out.extend_from_slice(&word.to_le_bytes());
    }
    out.truncate(bytes);
    out
}

/// Writes to a stopped volume, over a writable export.
#[track_caller]
fn write(host: &Host, volume: &str, pieces: &[(u64, Vec<u8>)]) {
    let uri = export(host, &[volume, "--writable"]);
    let folder = tempfile::tempdir().expect("a folder can be made");
    let mut script =
        format!("import nbd\nh = nbd.NBD()\nh.set_uri_allow_local_file(True)\nh.connect_uri({uri:?})\n");
    for (index, (offset, bytes)) in pieces.iter().enumerate() {
        let file = folder.path().join(index.to_string());
        fs::write(&file, bytes).expect("a file can be written");
        script += &format!("h.pwrite(open({:?}, 'rb').read(), {offset})\n", file.display().to_string());
    }
    script += "h.flush()\nh.shutdown()\n";
    // Not nbdsh: that takes any python3 of the PATH, and its module is with the system's.
    run(host.command("/usr/bin/python3").args(["-c", &script])).ok();
    unexport_all(host);
}

#[test]
fn a_disk_grows_under_its_guest_is_cloned_and_goes_back() {
    on_host("e2e", &[], |host| {
        let vdc = host.vdc("grow");
        let vm = vdc.run_tiny("web", &["--disk-size", "128MiB"]);
        let (root, clone) = (vdc.at("web-root"), vdc.at("copy"));
        vdc.wait_ready(&vm);
        let mut console = Console::open(host, &vm);
        console.ask(
            "echo first > /data/note; head -c 3000000 /dev/urandom > /data/big; sync; echo done-$((40+2))",
            "\ndone-42",
        );
        host.serio(&["volume", "snapshot", &root, "--name", "one"]).ok();
        console.ask("echo second > /data/note; sync; echo done-$((40+3))", "\ndone-43");
        host.serio(&["volume", "snapshot", &root, "--name", "two"]).ok();
        console.ask("echo third > /data/note; sync; echo done-$((40+4))", "\ndone-44");

        host.serio(&["volume", "resize", &root, "64MiB"]).refused(2, &["128"]);
        host.serio(&["volume", "resize", &root, "256MiB"]).ok();
        eventually(30, "the guest sees the new size", || {
            console.ask("echo sectors-$(cat /sys/block/vda/size)", "\nsectors-") == "524288"
        });

        // The first point goes while the guest reads and writes; what it reads stays what it was.
        let sum = console.ask("echo sum-$(md5sum < /data/big)", "\nsum-");
        console.line("(while :; do head -c 500000 /dev/urandom > /data/churn; sync; done) &");
        host.serio(&["volume", "delete-snapshot", &format!("{root}@one")]).ok();
        let points = host.json(&["volume", "snapshots", &root]);
        assert_eq!(points.as_array().map(Vec::len), Some(1), "{points}");
        let again = console.ask(
            "kill %1; sync; echo 3 > /proc/sys/vm/drop_caches; echo sum-$(md5sum < /data/big)",
            "\nsum-",
        );
        assert_eq!(again, sum);

        // The clone of a point has its own future.
        host.serio(&["volume", "clone", &format!("{root}@two"), &clone]).ok();
        let other = vdc.run_tiny("other", &["--volume", &clone]);
        vdc.wait_ready(&other);
        let mut second = Console::open(host, &other);
        second.line("mkdir /c; mount -t ext4 /dev/vdb /c");
        assert_eq!(second.ask("echo note-$(cat /c/note)", "\nnote-"), "second");
        second.ask("echo clone > /c/note; umount /c; echo done-$((40+5))", "\ndone-45");
        assert_eq!(console.ask("echo note-$(cat /data/note)", "\nnote-"), "third");

        // Back to the point: refused while it runs, then what came later is gone.
        let back = ["volume", "rollback", &format!("{root}@two")];
        host.serio(&back).refused(4, &["web"]);
        host.serio(&["vm", "stop", &vm, "--force"]).ok();
        host.serio(&back).ok();
        let bytes = copy(host, &[&root]);
        let image = tempfile::NamedTempFile::new().expect("a file can be made");
        fs::write(&image, &bytes[..128 << 20]).expect("a file can be written");
        assert_eq!(note(image.path()), "second");
        for volume in [&root, &clone] {
            host.exec(&["serio-volumed", "check", &folder(host, volume)]).ok();
        }
    });
}

/// `/note` of an ext4 image.
#[track_caller]
fn note(image: &Path) -> String {
    let image = image.to_str().expect("the path is text");
    let checked = run(Command::new("e2fsck").args(["-fp", image]));
    assert!(checked.code < 4, "{checked}");
    run(Command::new("debugfs").args(["-R", "cat /note", image])).ok().trim().to_owned()
}

/// Two VMs count in turn, each on its own disk: the second never ahead of the first. A snapshot of the vdc shows the same.
#[test]
fn a_vdc_is_cut_at_one_instant() {
    on_host("e2e", &[], |host| {
        let vdc = host.vdc("cut");
        let names = ["a", "b"];
        let disks = names.map(|name| vdc.at(&format!("{name}-data")));
        let vms = [0, 1].map(|at: usize| {
            host.serio(&["volume", "create", &disks[at], "--size", "1MiB"]).ok();
            vdc.run_tiny(names[at], &["--volume", &disks[at]])
        });
        let mut consoles = vms.clone().map(|vm| {
            vdc.wait_ready(&vm);
            Console::open(host, &vm)
        });
        let mut cuts = Vec::new();
        let mut count = 0;
        for point in 0..3 {
            let name = format!("p{point}");
            let mut cut = host.command("serio");
            cut.args(["vdc", "snapshot", &vdc.name, "--name", &name]);
            let mut under_way = cut.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("serio starts");
            let first = count;
            // It goes on counting until the snapshot is there, and a little longer.
            let mut ended = None;
            while ended.is_none_or(|at: Instant| at.elapsed() < Duration::from_millis(300)) {
                count += 1;
                for console in &mut consoles {
                    let line = format!(
                        "printf %08d {count} | dd of=/dev/vdb conv=fsync,notrunc 2>/dev/null; echo at-$(({count}+0))"
                    );
                    console.ask(&line, &format!("\nat-{count}"));
                }
                if ended.is_none() && under_way.try_wait().expect("it can be waited for").is_some() {
                    ended = Some(Instant::now());
                }
            }
            assert!(under_way.wait().expect("it can be waited for").success(), "serio vdc snapshot failed");
            cuts.push((name, first, count));
        }
        for (name, first, last) in cuts {
            let [a, b] = disks.clone().map(|disk| {
                let bytes = copy(host, &[&disk, "--snapshot", &name]);
                let digits: String = bytes[..8].iter().map(|byte| char::from(*byte)).collect();
                digits.trim_matches('\0').parse::<u64>().unwrap_or(0)
            });
            println!("{name}: counted from {first} to {last}; the point has {a} and {b}");
            assert!(a == b || a == b + 1, "{name} is no single instant: the first has {a}, the second {b}");
            assert!((first..=last).contains(&a), "{name}: {a} is not of its time");
        }
        let listed = host.json(&["vdc", "snapshots", &vdc.name]);
        assert_eq!(listed.as_array().map(Vec::len), Some(3), "{listed}");
        host.serio(&["vdc", "delete-snapshot", &vdc.name, "p0"]).ok();
        let listed = host.json(&["vdc", "snapshots", &vdc.name]);
        assert_eq!(listed.as_array().map(Vec::len), Some(2), "{listed}");
    });
}

/// The ranges that the API says have changed, and those that compare unequal.
#[test]
fn changed_ranges_are_what_cmp_finds() {
    on_host("e2e", &[], |host| {
        let vdc = host.vdc("changes");
        let volume = vdc.at("data");
        let size = 16 << 20;
        host.serio(&["volume", "create", &volume, "--size", "16MiB"]).ok();
        write(host, &volume, &[(0, noise(1, 1 << 20)), (5 << 20, noise(2, 300_000))]);
        host.serio(&["volume", "snapshot", &volume, "--name", "a"]).ok();
        let between = [
            (4096, noise(3, 4096)),
            (70_000, noise(4, 9_000)),
            ((5 << 20) + 512, noise(5, 512)),
            (size - 700, noise(6, 700)),
        ];
        write(host, &volume, &between);
        host.serio(&["volume", "snapshot", &volume, "--name", "b"]).ok();
        write(host, &volume, &[(9 << 20, noise(7, 5000))]);

        let (a, b) = (copy(host, &[&volume, "--snapshot", "a"]), copy(host, &[&volume, "--snapshot", "b"]));
        let head = copy(host, &[&volume]);
        for (to, bytes) in [(Some("b"), &b), (None, &head)] {
            let mut args = vec!["volume", "changes", &volume, "--from", "a"];
            args.extend(to.iter().flat_map(|to| ["--to", to]));
            let listed = host.json(&args);
            let mut said: Vec<u64> = Vec::new();
            for range in listed.as_array().expect("a list") {
                let (offset, len) = (number(&range["offsetBytes"]), number(&range["lengthBytes"]));
                said.extend((offset / 4096..(offset + len).div_ceil(4096)).collect::<Vec<_>>());
            }
            let differ: Vec<u64> = (0..size / 4096)
                .filter(|block| {
                    let at = *block as usize * 4096;
                    a[at..at + 4096] != bytes[at..at + 4096]
                })
                .collect();
            assert_eq!(said, differ, "from a to {to:?}: {listed}");
        }
    });
}

#[test]
fn a_rotten_block_is_named_with_its_points() {
    on_host("e2e", &[], |host| {
        let vdc = host.vdc("rot");
        let volume = vdc.at("data");
        host.serio(&["volume", "create", &volume, "--size", "8MiB"]).ok();
        write(host, &volume, &[(1 << 20, noise(1, 1 << 20))]);
        host.serio(&["volume", "snapshot", &volume, "--name", "good"]).ok();
        host.serio(&["volume", "check", &volume, "--data"]).ok();
        // One bit, behind everybody's back.
        let file = host.shell(&format!("ls {}/*.data | sort | head -n 1", folder(host, &volume))).ok();
        let offset = (1 << 20) + 123_456;
        host.shell(&format!("printf X | dd of={} bs=1 seek={offset} conv=notrunc 2>/dev/null", file.trim()))
            .ok();
        let found = host.serio(&["volume", "check", &volume, "--data"]);
        assert_eq!(found.code, 1, "{found}");
        let said = format!("{}{}", found.out, found.err);
        assert!(said.contains("good"), "the point that reads it should be named\n{found}");
        let range = said.split_once("bytes ").and_then(|(_, rest)| rest.split_once(' ')?.0.split_once('+'));
        let (start, len) = range
            .map(|(start, len)| (start.parse().unwrap_or(0), len.parse().unwrap_or(0)))
            .unwrap_or((0, 0));
        assert!((start..start + len).contains(&offset), "{found}");
    });
}

#[test]
fn a_copy_goes_on_when_seriod_is_killed_under_it() {
    on_host("e2e", &[], |host| {
        let vdc = host.vdc("outlive");
        let volume = vdc.at("data");
        host.serio(&["volume", "create", &volume, "--size", "24MiB"]).ok();
        write(host, &volume, &[(0, noise(1, 12 << 20)), (20 << 20, noise(2, 4 << 20))]);
        host.serio(&["volume", "snapshot", &volume, "--name", "p"]).ok();
        let whole = copy(host, &[&volume, "--snapshot", "p"]);
        let uri = export(host, &[&volume, "--snapshot", "p"]);
        let (address, token) = uri.split_once("://").unwrap().1.split_once('/').unwrap();
        let (server, port) = address.rsplit_once(':').unwrap();
        let pki = Path::new(host.variable("SERIO_CERT")).parent().unwrap().display();
        let source = format!(
            "driver=nbd,server.type=inet,server.host={server},server.port={port},export={},tls-creds=tls,reconnect-delay=100",
            token.split('?').next().unwrap()
        );
        let target = tempfile::NamedTempFile::new().expect("a file can be made");
        let mut convert = host.command("qemu-img");
        convert.args([
            "convert",
            "-r",
            "4M",
            "--object",
            &format!("tls-creds-x509,id=tls,endpoint=client,dir={pki}"),
        ]);
        convert.args(["--image-opts", &source, "-O", "raw"]).arg(target.path()).stdin(Stdio::null());
        let mut under_way = convert.spawn().expect("qemu-img starts");
        eventually(60, "some of it is copied", || {
            fs::metadata(target.path()).is_ok_and(|meta| {
                use std::os::unix::fs::MetadataExt;
                meta.blocks() * 512 > 1 << 20
            })
        });
        host.kill_seriod();
        thread::sleep(Duration::from_millis(500));
        assert!(
            under_way.try_wait().expect("it can be waited for").is_none(),
            "it was done before the blow: nothing was tested"
        );
        host.start_seriod();
        assert!(under_way.wait().expect("it can be waited for").success(), "qemu-img failed");
        assert!(fs::read(target.path()).unwrap() == whole, "the copy differs");
        unexport_all(host);
    });
}
