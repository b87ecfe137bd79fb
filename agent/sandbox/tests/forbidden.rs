//! Each kind of thread is killed, with its whole process, when it opens, connects, executes or traces;
//! a panic still says what happened.
//!
//! What is killed is this test program itself, started again with [`CASE`] in its environment.
#![forbid(unsafe_code)]

use std::ffi::CString;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};

use nix::libc::{SIGABRT, SIGSYS};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use serio_sandbox::{Kind, Start, threads};

/// A kind's place in `Kind::ALL`, a space, and what its thread does.
const CASE: &str = "SERIO_SANDBOX_CASE";

fn act(what: &str) {
    match what {
        "open" => drop(std::fs::File::open("/dev/null")),
        "socket" => drop(socket(AddressFamily::Inet, SockType::Stream, SockFlag::empty(), None)),
        "execve" => drop(nix::unistd::execv(c"/bin/true", &[CString::from(c"true")])),
        "ptrace" => drop(nix::sys::ptrace::traceme()),
        "panic" => {
            let _ = std::panic::catch_unwind(|| panic!("on purpose"));
            std::process::abort();
        }
        "nothing" => {}
        other => panic!("no case: {other}"),
    }
}

/// Starts itself for one case.
fn run(kind: usize, what: &str) -> (ExitStatus, String) {
    let mut command = Command::new(std::env::current_exe().expect("known"));
    command.args(["--exact", "the_process", "--ignored", "--nocapture", "--test-threads", "1"]);
    let output = command.env(CASE, format!("{kind} {what}")).output().expect("runs");
    (output.status, String::from_utf8_lossy(&output.stderr).into_owned())
}

/// No test: the process of a case.
#[test]
#[ignore = "it is the process that other tests start"]
fn the_process() {
    let Ok(case) = std::env::var(CASE) else { return };
    let (kind, what) = case.split_once(' ').expect("two words");
    let kind = Kind::ALL[kind.parse::<usize>().expect("a number")];
    let seal = Start {
        keep: Some(&[]),
        uid: 1_999_999_000,
        descriptors_max: 64,
        threads_max: 64,
        main: Kind::Agent,
    };
    serio_sandbox::seal_at_start(&seal).expect("sealed");
    let what = what.to_owned();
    match kind {
        // It is this thread.
        Kind::Agent => act(&what),
        // Threads are made for others only.
        kind => {
            threads::spawn(kind, "case", 128 << 10, move || act(&what)).expect("made").join().expect("over")
        }
    }
    std::process::exit(0);
}

#[test]
fn opening_connecting_executing_and_tracing_kill_the_process_in_each_kind_of_thread() {
    if !nix::unistd::Uid::effective().is_root() {
        println!("skipped: only root can become another user");
        return;
    }
    for (place, kind) in Kind::ALL.into_iter().enumerate() {
        let (status, said) = run(place, "nothing");
        assert!(status.success(), "{kind:?}: {status}: {said}");
        for what in ["open", "socket", "execve", "ptrace"] {
            let (status, said) = run(place, what);
            assert_eq!(status.signal(), Some(SIGSYS), "{kind:?} {what}: {status}: {said}");
        }
        let (status, said) = run(place, "panic");
        assert_eq!(status.signal(), Some(SIGABRT), "{kind:?}: {status}: {said}");
        assert!(said.contains("on purpose"), "{kind:?}: {said}");
    }
}
