//! `serio-vmm run` as its user sees it, with guests of a few bytes on this machine's KVM.

mod guest;

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use tempfile::TempDir;

struct Bench {
    dir: TempDir,
}

impl Bench {
    /// `None` where KVM cannot be used.
    fn new() -> Option<Bench> {
        if let Err(error) = serio_hv::Kvm::open() {
            println!("skipped: {error}");
            return None;
        }
        Some(Bench { dir: tempfile::tempdir().expect("a directory") })
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, bytes).expect("written");
        path
    }

    fn command(&self, code: &[&[u8]], args: &[&str]) -> Command {
        let kernel = self.file("kernel", &guest::elf(&code.concat()));
        let mut command = Command::new(env!("CARGO_BIN_EXE_serio-vmm"));
        command.arg("run").arg("--kernel").arg(kernel).args(args);
        if !args.contains(&"--memory") {
            command.args(["--memory", "16MiB"]);
        }
        command.current_dir(self.dir.path()).stdin(Stdio::null());
        command
    }

    fn run(&self, code: &[&[u8]], args: &[&str]) -> Output {
        self.command(code, args).output().expect("runs")
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn what_the_guest_prints_is_seen_and_power_off_is_success() {
    let Some(bench) = Bench::new() else { return };
    for cpus in ["1", "4"] {
        let output = bench.run(&[&guest::print("hello\n"), &guest::power_off()], &["--cpus", cpus]);
        assert_eq!(text(&output.stdout), "hello\n");
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        assert!(output.stderr.is_empty());
    }
}

#[test]
fn a_reset_boots_again_or_exits() {
    let Some(bench) = Bench::new() else { return };
    let code = [&guest::print("boot\n")[..], &guest::reset()];
    let output = bench.run(&code, &["--on-reset", "exit"]);
    assert_eq!((text(&output.stdout).as_str(), output.status.code()), ("boot\n", Some(0)));

    let disk = bench.file("disk.raw", &[0; 65536]);
    let mut child = bench
        .command(&code, &["--disk", disk.to_str().expect("text")])
        .stdout(Stdio::piped())
        .spawn()
        .expect("runs");
    let mut seen = vec![0u8; 3 * 5];
    child.stdout.take().expect("piped").read_exact(&mut seen).expect("three boots");
    assert_eq!(text(&seen), "boot\nboot\nboot\n");
    child.kill().expect("ours");
    child.wait().expect("ours");
}

#[test]
fn a_guest_that_breaks_ends_with_a_reason() {
    let Some(bench) = Bench::new() else { return };
    let output = bench.run(&[&guest::print("x"), &guest::crash()], &["--cpus", "2"]);
    assert_eq!(output.status.code(), Some(1));
    let reason = text(&output.stderr);
    assert!(reason.contains("triple fault") || reason.contains("KVM internal error"), "{reason}");
    assert!(reason.contains("rip 0x100"), "where it was: {reason}");
}

#[test]
fn what_is_typed_reaches_the_guest() {
    let Some(bench) = Bench::new() else { return };
    let mut command = bench.command(&[&guest::echo(&guest::power_off())], &[]);
    let mut child: Child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("runs");
    let mut input = child.stdin.take().expect("piped");
    // Far more than the FIFO and the waiting bytes: nothing may be lost.
    let typed: Vec<u8> = (0..20_000u32).map(|i| b'a' + (i % 16) as u8).chain([b'q']).collect();
    let copy = typed.clone();
    let writer = std::thread::spawn(move || input.write_all(&copy));
    let output = child.wait_with_output().expect("ends");
    writer.join().expect("no panic").expect("all taken");
    assert!(output.stdout == typed, "{} of {} bytes came back", output.stdout.len(), typed.len());
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn a_signal_ends_it_with_a_reason() {
    let Some(bench) = Bench::new() else { return };
    let mut child = bench
        .command(&[&guest::print("up"), &guest::spin()], &["--cpus", "2"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("runs");
    child.stdout.as_mut().expect("piped").read_exact(&mut [0; 2]).expect("is up");
    let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("ours");
    let output = child.wait_with_output().expect("ends");
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("stopped on request"));
}

#[test]
fn wrong_input_names_the_field_and_the_remedy() {
    let Some(bench) = Bench::new() else { return };
    let code = [&guest::power_off()[..]];
    let script = bench.file("script", b"#!/bin/sh\necho this is no kernel\n");
    let empty = bench.file("empty.raw", b"");
    let disk = bench.file("disk.raw", &[0; 65536]);
    let (script, empty, disk) =
        (script.to_str().expect("text"), empty.to_str().expect("text"), disk.to_str().expect("text"));
    let twice = ["--disk", disk, "--disk", disk];
    for (args, code_expected, words) in [
        (&["--disk", "/nonexistent"][..], 1, &["disk", "/nonexistent", "No such file"][..]),
        (&["--disk", empty], 1, &["disk", "empty"]),
        (&["--disk", "/proc"], 1, &["disk", "/proc"]),
        (&twice, 1, &["disk", "in use"]),
        (&["--initrd", "/nonexistent"], 1, &["initrd", "/nonexistent"]),
        (&["--memory", "1000TiB"], 1, &["memory", "ask for less"]),
        (&["--memory", "16777217"], 1, &["memory", "4096"]),
        (&["--memory", "64KiB"], 1, &["memory", "2MiB"]),
        (&["--cpus", "0"], 2, &["--cpus"]),
        (&["--cpus", "1000"], 2, &["--cpus"]),
        (&["--net", "no-such-tap-name"], 2, &["--net"]),
        (&["--unknown"], 2, &["--unknown"]),
    ] {
        let output = bench.run(&code, args);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code_expected), "{args:?}: {said}");
        assert!(words.iter().all(|word| said.contains(word)), "{args:?}: {said}");
        assert!(output.stdout.is_empty(), "{args:?}");
    }
    let long = "x".repeat(3000);
    let output = bench.run(&code, &["--cmdline", &long]);
    assert!(text(&output.stderr).contains("cmdline"), "{}", text(&output.stderr));

    let output = Command::new(env!("CARGO_BIN_EXE_serio-vmm"))
        .args(["run", "--kernel", script, "--memory", "16MiB"])
        .output()
        .expect("runs");
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("kernel"), "{}", text(&output.stderr));
}

#[test]
fn more_than_three_gib_boots() {
    let Some(bench) = Bench::new() else { return };
    let output = bench.run(&[&guest::print("big\n"), &guest::power_off()], &["--memory", "5GiB"]);
    // A host with less refuses it by name.
    let said = text(&output.stderr);
    if said.contains("ask for less") {
        println!("skipped: {said}");
        return;
    }
    assert_eq!((text(&output.stdout).as_str(), output.status.code()), ("big\n", Some(0)), "{said}");
}
