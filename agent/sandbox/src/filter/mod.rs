//! System-call filters: one table per kind of thread, kept as data with a reason per call.
//!
//! ```text
//!   table::of(kind): [Allowed] ──seccompiler──► BPF program (made once, when the first thread of its kind starts)
//! ```
//!
//! Owns: what a rule is, and its enforcement. The tables are in `table.rs`. What no rule allows kills the whole process with
//! SIGSYS: a thread that does what it was not written for is not to be trusted with a guest's memory for one call more.
//!
//! What a call costs: calls without a rule for their arguments are answered from a bitmap that the kernel keeps, whatever
//! the length of the filter. Only `ioctl`, `mmap` and their like run the program.

mod ioctls;
mod table;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::OnceLock;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use crate::{Kind, SandboxError};

/// One system call that a kind of thread may make.
#[derive(Debug, Clone, Copy)]
pub struct Allowed {
    /// Its number on x86-64.
    pub number: i64,
    /// Its name, as libc has it: `SYS_read`.
    pub name: &'static str,
    /// With which arguments.
    pub arguments: Arguments,
    /// Who needs it, and for what.
    pub why: &'static str,
    /// Not seen in an ordinary run: when it happens.
    pub rare: Option<&'static str>,
}

/// What the arguments of an allowed call may be.
#[derive(Debug, Clone, Copy)]
pub enum Arguments {
    /// Anything: it can do no harm that the process could not do to itself.
    Any,
    /// One of these values, each with its name, at this place (from 0).
    OneOf(u8, &'static [(&'static str, u64)]),
    /// At this place (from 0), none of these bits.
    Without(u8, u64),
}

impl Allowed {
    const fn new(number: i64, name: &'static str, why: &'static str) -> Allowed {
        Allowed { number, name, arguments: Arguments::Any, why, rare: None }
    }

    const fn one_of(mut self, place: u8, values: &'static [(&'static str, u64)]) -> Allowed {
        self.arguments = Arguments::OneOf(place, values);
        self
    }

    const fn without(mut self, place: u8, bits: u64) -> Allowed {
        self.arguments = Arguments::Without(place, bits);
        self
    }

    const fn rare(mut self, when: &'static str) -> Allowed {
        self.rare = Some(when);
        self
    }

    fn rules(&self) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
        let rule = |place, operator, value| {
            let condition = SeccompCondition::new(place, SeccompCmpArgLen::Dword, operator, value)?;
            SeccompRule::new(vec![condition])
        };
        match self.arguments {
            Arguments::Any => Ok(Vec::new()),
            Arguments::OneOf(place, values) => {
                values.iter().map(|(_, value)| rule(place, SeccompCmpOp::Eq, *value)).collect()
            }
            Arguments::Without(place, bits) => Ok(vec![rule(place, SeccompCmpOp::MaskedEq(bits), 0)?]),
        }
    }
}

/// All that a thread of this kind may call. A call may be there twice, with different arguments.
pub fn allowed(kind: Kind) -> impl Iterator<Item = &'static Allowed> {
    table::of(kind).iter().flat_map(|group| group.iter())
}

/// Gives up, for the calling thread and those that it will make, all that `kind` does not need.
pub(crate) fn enforce(kind: Kind) -> Result<(), SandboxError> {
    static PROGRAMS: [OnceLock<BpfProgram>; Kind::ALL.len()] = [const { OnceLock::new() }; Kind::ALL.len()];
    // The discriminants are the places in `ALL`.
    let Some(slot) = PROGRAMS.get(kind as usize) else { return Err(SandboxError::NoTable(kind)) };
    if slot.get().is_none() {
        // Two may make the same program at once: the second is dropped.
        let _ = slot.set(compile(kind).map_err(SandboxError::Filter)?);
    }
    let Some(program) = slot.get() else { return Err(SandboxError::NoTable(kind)) };
    if kind == Kind::Maker {
        seccompiler::apply_filter(&no_clone3().map_err(SandboxError::Filter)?)
            .map_err(SandboxError::Apply)?;
    }
    seccompiler::apply_filter(program).map_err(SandboxError::Apply)
}

fn program(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    matching: SeccompAction,
) -> Result<BpfProgram, seccompiler::BackendError> {
    SeccompFilter::new(rules, otherwise, matching, TargetArch::x86_64)?.try_into()
}

fn compile(kind: Kind) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for call in allowed(kind) {
        let more = call.rules()?;
        let known = rules.entry(call.number);
        match known {
            Entry::Vacant(entry) => drop(entry.insert(more)),
            // No rule for the arguments allows all: it wins.
            Entry::Occupied(mut entry) if more.is_empty() => entry.get_mut().clear(),
            Entry::Occupied(entry) if entry.get().is_empty() => {}
            Entry::Occupied(mut entry) => {
                for rule in more {
                    if !entry.get().contains(&rule) {
                        entry.get_mut().push(rule);
                    }
                }
            }
        }
    }
    program(rules, SeccompAction::KillProcess, SeccompAction::Allow)
}

/// The arguments of clone3 are in memory, where no filter sees them: libc is told that there is none, and calls clone.
fn no_clone3() -> Result<BpfProgram, seccompiler::BackendError> {
    let rules = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    program(rules, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_has_a_filter_and_each_call_a_reason() {
        for (place, kind) in Kind::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, place, "{kind:?}");
            let program = compile(kind).expect("valid rules");
            assert!(program.len() < 1000, "{kind:?}: {}", program.len());
            for call in allowed(kind) {
                assert!(call.why.len() > 4 && call.rare.is_none_or(|when| when.len() > 6), "{}", call.name);
            }
        }
    }

    #[test]
    fn nothing_opens_executes_connects_or_traces() {
        let never = [
            libc::SYS_open,
            libc::SYS_openat,
            libc::SYS_openat2,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_ptrace,
            libc::SYS_fork,
            libc::SYS_vfork,
            libc::SYS_mount,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_process_vm_readv,
            libc::SYS_process_vm_writev,
            libc::SYS_bpf,
            libc::SYS_kill,
        ];
        for kind in Kind::ALL {
            for call in allowed(kind) {
                assert!(!never.contains(&call.number), "{kind:?} may call {}", call.name);
            }
        }
    }

    #[test]
    fn the_maker_may_whatever_its_threads_may() {
        // A thread has both filters: what the maker's forbids, its own cannot allow.
        let maker: Vec<&Allowed> = allowed(Kind::Maker).collect();
        let covers = |rule: &Allowed, value: Option<u64>| match (rule.arguments, value) {
            (Arguments::Any, _) => true,
            (Arguments::OneOf(_, values), Some(value)) => values.iter().any(|(_, one)| *one == value),
            (Arguments::Without(..), None) => true,
            _ => false,
        };
        for kind in Kind::ALL {
            for call in allowed(kind) {
                let values = match call.arguments {
                    Arguments::OneOf(_, values) => values.iter().map(|(_, value)| Some(*value)).collect(),
                    _ => vec![None],
                };
                for value in values {
                    let named = maker.iter().filter(|rule| rule.number == call.number);
                    let may = named.filter(|rule| covers(rule, value)).count() > 0;
                    assert!(may, "{kind:?} may call {} with {value:x?}", call.name);
                }
            }
        }
    }
}
