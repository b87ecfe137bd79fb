//! `serio-vmm run` seals itself: what its main thread calls from then on is what its table allows, no more and no less.

mod calls;
mod guest;

use std::process::{Command, Stdio};

use serio_sandbox::Kind;

const KINDS: &calls::Kinds = &[("serio-vmm", Kind::Run)];

#[test]
fn a_vm_of_a_person_is_sealed() {
    if let Err(error) = serio_hv::Kvm::open() {
        println!("skipped: {error}");
        return;
    }
    if Command::new("strace").arg("-V").output().is_err() {
        println!("skipped: strace is not installed");
        return;
    }
    let folder = tempfile::tempdir().expect("a directory");
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("disk"), [0; 65536]).expect("written");
    let mut used = calls::Used::new();
    let ends = [(guest::power_off().to_vec(), 0), (guest::crash().to_vec(), 1)];
    for (end, code) in ends {
        let kernel = guest::elf(&[&guest::print("up\n")[..], &end].concat());
        std::fs::write(path("kernel"), kernel).expect("written");
        let mut strace = Command::new("strace");
        strace.args(["-f", "-qq", "-Y", "-X", "raw", "-o"]).arg(path("trace"));
        strace.arg(env!("CARGO_BIN_EXE_serio-vmm")).args(["run", "--memory", "16MiB", "--cpus", "2"]);
        strace.arg("--kernel").arg(path("kernel")).arg("--disk").arg(path("disk"));
        let output = strace.stdin(Stdio::null()).output().expect("runs");
        let (said, why) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert_eq!((said.as_ref(), output.status.code()), ("up\n", Some(code)), "{why}");
        let trace = std::fs::read(path("trace")).expect("read");
        let trace = String::from_utf8_lossy(&trace);
        assert!(!trace.contains("SIGSYS"), "{trace}");
        // An empty root, an own user, no way to files: each of them was really made.
        for step in ["unshare(", "pivot_root(", "landlock_restrict_self(", "seccomp("] {
            assert!(trace.lines().any(|line| line.contains(step) && line.ends_with("= 0")), "no {step}");
        }
        calls::read(KINDS, &trace, &mut used);
    }
    let wrong = calls::compare(&used);
    assert!(used.contains_key(&Kind::Run) && wrong.is_empty(), "{wrong}");
}
