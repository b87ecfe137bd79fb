//! The agent in a sealed process: what it calls is what its tables allow, no more and no less.
//!
//! The other tests of the agent run again with a process of its own each, traced by `strace`; the calls of each thread after
//! it has got its filter are held against the table of its kind.

use std::process::Command;

use serio_sandbox::Kind;

use super::bench::SEALED;

#[path = "../../tests/calls/mod.rs"]
mod calls;

/// By the beginning of a thread's name.
const KINDS: &calls::Kinds = &[
    ("agent::", Kind::Agent),
    ("control", Kind::Control),
    ("vcpu", Kind::Vcpu),
    ("blk", Kind::Blk),
    ("net", Kind::Net),
    ("ports", Kind::Ports),
    ("console", Kind::Ports),
    ("rng", Kind::Device),
    ("balloon", Kind::Device),
    ("vsock", Kind::Device),
    ("watchdog", Kind::Device),
    ("volume-keeper", Kind::Keeper),
    ("cut", Kind::Cut),
    ("merge", Kind::Merge),
    ("check", Kind::Check),
    ("maker", Kind::Maker),
];

#[test]
fn each_thread_calls_what_its_table_says() {
    if std::env::var_os(SEALED).is_some() {
        return;
    }
    if Command::new("strace").arg("-V").output().is_err() {
        println!("skipped: strace is not installed");
        return;
    }
    let traces = tempfile::tempdir().expect("a directory");
    let mut tests = Command::new(std::env::current_exe().expect("known"));
    tests
        .args([
            "agent::agent_test::",
            "agent::mini_test::",
            "agent::diff_test::a_chain",
            "agent::save_test::a_vm_saved",
            "agent::net_test::",
            "agent::plug_test::a_disk_comes",
            "--test-threads",
            "1",
        ])
        .env(SEALED, traces.path());
    let output = tests.output().expect("runs");
    let mut used = calls::Used::new();
    let mut killed = String::new();
    for entry in std::fs::read_dir(traces.path()).expect("there") {
        let text = std::fs::read(entry.expect("an entry").path()).expect("read");
        let text = String::from_utf8_lossy(&text);
        calls::read(KINDS, &text, &mut used);
        if text.contains("killed by SIGSYS") {
            killed.push_str("a process was killed by its filter\n");
        }
    }
    if used.is_empty() {
        println!("skipped: no usable /dev/kvm, or strace may not trace here");
        return;
    }
    let wrong = calls::compare(&used) + &killed;
    assert!(wrong.is_empty(), "{wrong}");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
}
