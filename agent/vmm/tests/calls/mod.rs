//! Traces of sealed processes, held against the tables of their filters.

use std::collections::{BTreeMap, BTreeSet};

use serio_sandbox::{Allowed, Arguments, Kind, allowed};

/// A call with its arguments, as strace writes it.
pub(crate) type Call = (String, Vec<String>);

/// What each kind of thread has called.
pub(crate) type Used = BTreeMap<Kind, BTreeSet<Call>>;

/// Kinds of threads, by the beginning of their names.
pub(crate) type Kinds = [(&'static str, Kind)];

fn kind(kinds: &Kinds, name: &str) -> Option<Kind> {
    kinds.iter().find(|(start, _)| name.starts_with(start)).map(|(_, kind)| *kind)
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
pub(crate) fn read(kinds: &Kinds, trace: &str, used: &mut Used) {
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
            true => kind(kinds, name),
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

/// What is called and forbidden, and what is allowed and never called.
pub(crate) fn compare(used: &Used) -> String {
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
