//! The agent in a sealed process: what it calls is what its tables allow, no more and no less.
//!
//! The other tests of the agent run again with a process of its own each, traced by `strace`; the calls of each thread after
//! it has got its filter are held against the table of its kind.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serio_sandbox::{Allowed, Arguments, Kind, allowed};

use super::bench::SEALED;

/// A call with its arguments, as strace writes it.
type Call = (String, Vec<String>);

/// By the beginning of a thread's name.
const KINDS: &[(&str, Kind)] = &[
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

fn kind(name: &str) -> Option<Kind> {
    KINDS.iter().find(|(start, _)| name.starts_with(start)).map(|(_, kind)| *kind)
}

/// `12<name> call(a, b) = 0` in its parts. A line that goes on with a call, or tells of a signal, is none.
fn parse(line: &str) -> Option<(&str, &str, Call)> {
    let (pid, rest) = line.split_once('<')?;
    let (name, rest) = rest.split_once("> ")?;
    let (call, rest) = rest.split_once('(')?;
    if call.contains(' ') {
        return None;
    }
    let arguments = rest.split(") ").next().unwrap_or(rest).split(" <unfinished").next().unwrap_or(rest);
    let arguments = arguments.trim_end_matches(')').split(", ").map(str::to_owned).collect();
    Some((pid, name, (call.to_owned(), arguments)))
}

/// Adds what one trace shows.
fn read(trace: &str, used: &mut BTreeMap<Kind, BTreeSet<Call>>) {
    let lines: Vec<(&str, &str, Call)> = trace.lines().filter_map(parse).collect();
    // Where each thread gets its filter. Threads but the first two are the maker's until then.
    let mut sealed_at = BTreeMap::new();
    let mut not_made = BTreeSet::new();
    for (at, (pid, name, (call, _))) in lines.iter().enumerate() {
        match call.as_str() {
            "seccomp" => drop(sealed_at.insert(*pid, at)),
            "landlock_restrict_self" => drop(not_made.insert(*pid)),
            _ => {}
        }
        if call == "seccomp" && *name == "maker" {
            not_made.insert(*pid);
        }
    }
    for (at, (pid, name, call)) in lines.iter().enumerate() {
        let Some(sealed) = sealed_at.get(pid) else { continue };
        let kind = match at > *sealed {
            true => kind(name),
            false => (!not_made.contains(pid)).then_some(Kind::Maker),
        };
        if let Some(kind) = kind {
            used.entry(kind).or_default().insert(call.clone());
        }
    }
}

fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

fn value(call: &Call, place: u8) -> Option<u64> {
    number(call.1.get(usize::from(place))?)
}

fn matches(rule: &Allowed, call: &Call) -> bool {
    let named = rule.name.strip_prefix("SYS_") == Some(call.0.as_str());
    named
        && match rule.arguments {
            // strace writes the arguments of clone in an order of its own.
            _ if call.0 == "clone" => true,
            Arguments::Any => true,
            Arguments::OneOf(place, values) => {
                value(call, place).is_some_and(|value| values.iter().any(|(_, one)| *one == value))
            }
            Arguments::Without(place, bits) => value(call, place).is_some_and(|value| value & bits == 0),
        }
}

/// What of a rule no call has used: the rule, or some of its values.
fn unused(rule: &Allowed, calls: &BTreeSet<Call>) -> Vec<String> {
    let named = |call: &&Call| rule.name.strip_prefix("SYS_") == Some(call.0.as_str());
    match rule.arguments {
        Arguments::OneOf(place, values) if rule.name != "SYS_clone" => values
            .iter()
            .filter(|(_, one)| !calls.iter().filter(named).any(|call| value(call, place) == Some(*one)))
            .map(|(name, _)| format!("{}({name})", rule.name))
            .collect(),
        _ if calls.iter().any(|call| named(&call)) => Vec::new(),
        _ => vec![rule.name.to_owned()],
    }
}

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
            "agent::plug_test::a_disk_comes",
            "--test-threads",
            "1",
        ])
        .env(SEALED, traces.path());
    let output = tests.output().expect("runs");
    let mut used = BTreeMap::new();
    let mut killed = String::new();
    for entry in std::fs::read_dir(traces.path()).expect("there") {
        let text = std::fs::read(entry.expect("an entry").path()).expect("read");
        let text = String::from_utf8_lossy(&text);
        read(&text, &mut used);
        if text.contains("killed by SIGSYS") {
            killed.push_str("a process was killed by its filter\n");
        }
    }
    if used.is_empty() {
        println!("skipped: no usable /dev/kvm, or strace may not trace here");
        return;
    }
    let wrong = compare(&used) + &killed;
    assert!(wrong.is_empty(), "{wrong}");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
}

fn compare(used: &BTreeMap<Kind, BTreeSet<Call>>) -> String {
    let mut wrong = String::new();
    for (kind, calls) in used {
        let rules: Vec<&Allowed> = allowed(*kind).collect();
        for call in calls.iter().filter(|call| !rules.iter().any(|rule| matches(rule, call))) {
            wrong.push_str(&format!(
                "{kind:?} calls what its filter forbids: {}({})\n",
                call.0,
                call.1.join(", ")
            ));
        }
        // The maker has the union of all kinds: what is not used here is used by one of them, or is said there.
        for rule in rules.iter().filter(|rule| rule.rare.is_none() && *kind != Kind::Maker) {
            for call in unused(rule, calls) {
                wrong.push_str(&format!("{kind:?} may call {call} ({}), and never does\n", rule.why));
            }
        }
    }
    wrong
}
