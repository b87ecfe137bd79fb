//! How a process gives up what it does not need.
//!
//! ```text
//!   start ─► only known descriptors ─► limits ─► namespaces, empty root, user ─► no capabilities ─► Landlock ─► filters
//! ```
//!
//! - All of it happens in [`seal_at_start`], while the process has one thread. One that is started by seriod does so first thing, and gets
//!   what it needs from outside later, as descriptors over a socket that it was started with; one that a person starts opens it before.
//! - Owns the order of these steps. Each one is final: nothing here gives anything back.
//! - Threads of a sealed process are made by [`threads::spawn`], each with the filter of its [`Kind`].
//! - A process that seals nothing (tests, a command for a person) makes its threads by the same function, without filters.
//!
//! The only `unsafe` is in `sys.rs`.
#![deny(unsafe_code)]

mod filter;
mod kind;
mod namespaces;
#[allow(unsafe_code)]
mod sys;
pub mod threads;

use std::os::fd::{OwnedFd, RawFd};

use landlock::{ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, RulesetError, RulesetStatus, Scope};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

pub use filter::{Allowed, Arguments, allowed};
pub use kind::Kind;

/// Why a process could not be sealed. It must not go on then.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The number names no open descriptor.
    #[error("descriptor {number} is not open: pass it to the process")]
    NoDescriptor {
        /// The number.
        number: RawFd,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The number is one of the standard streams, or was taken before.
    #[error("descriptor {0} belongs to somebody else: pass another one, from 3 up, once")]
    Taken(RawFd),
    /// A step failed.
    #[error("cannot {what}")]
    Step {
        /// Which step.
        what: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A table of system calls does not make a filter: a mistake in it.
    #[error("cannot make a system-call filter")]
    Filter(#[source] seccompiler::BackendError),
    /// A kind of thread without a table.
    #[error("there is no table of system calls for {0:?}: this is a mistake in serio-sandbox")]
    NoTable(Kind),
    /// The kernel does not take a filter.
    #[error("the kernel takes no system-call filter: it needs CONFIG_SECCOMP_FILTER")]
    Apply(#[source] seccompiler::Error),
    /// Landlock is there and refuses.
    #[error("cannot give up the file system by Landlock")]
    Landlock(#[from] RulesetError),
}

fn step<E: Into<std::io::Error>>(what: &'static str) -> impl FnOnce(E) -> SandboxError {
    move |source| SandboxError::Step { what, source: source.into() }
}

/// Takes over a descriptor that this process was started with, once.
pub fn take_descriptor(number: RawFd) -> Result<OwnedFd, SandboxError> {
    sys::take_descriptor(number)
}

/// The user of this process alone: as long as it lives nobody else on this host has its number, so nothing has to be
/// given out or written down. 0 stays 0: no user of its own.
#[must_use]
pub fn own_uid(first: u32) -> u32 {
    match first {
        0 => 0,
        first => first.saturating_add(std::process::id()),
    }
}

/// What a process keeps when it is sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Start<'a> {
    /// The descriptors that it keeps, besides the standard streams; `None`: all, because it has opened them itself.
    pub keep: Option<&'a [RawFd]>,
    /// The user and group that it becomes when it starts as root; 0 stays who it is.
    pub uid: u32,
    /// How many descriptors it may have open.
    pub descriptors_max: u64,
    /// How many threads it may have. Held only for a user of its own, since the kernel counts per user.
    pub threads_max: u64,
    /// What the calling thread, the first of its process, is.
    pub main: Kind,
}

/// While the process has one thread: gives up all but what is named, for ever. Returns what this host or this user did not allow to
/// be given up, in words for a log; for root on a usual host that is nothing.
pub fn seal_at_start(seal: &Start<'_>) -> Result<Vec<&'static str>, SandboxError> {
    if let Some(keep) = seal.keep {
        sys::close_others(keep).map_err(step("close unknown descriptors"))?;
    }
    std::panic::set_hook(Box::new(tell_panic));
    sys::use_one_heap();
    limit(seal)?;
    let mut missing = namespaces::leave_host(seal.uid)?;
    sys::drop_capabilities().map_err(step("drop capabilities"))?;
    nix::sys::prctl::set_no_new_privs().map_err(step("give up new privileges"))?;
    if !forget_files()? {
        missing.push("Landlock");
    }
    // Neither core dumps nor debuggers of the same user see its memory. Changes of user and capabilities reset it.
    nix::sys::prctl::set_dumpable(false).map_err(step("forbid core dumps"))?;
    threads::start_maker()?;
    filter::enforce(seal.main)?;
    Ok(missing)
}

fn limit(seal: &Start<'_>) -> Result<(), SandboxError> {
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(step("forbid core dumps"))?;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(step("read the limit of open files"))?;
    let descriptors = seal.descriptors_max.min(hard);
    setrlimit(Resource::RLIMIT_NOFILE, descriptors, descriptors).map_err(step("limit open files"))?;
    setrlimit(Resource::RLIMIT_MSGQUEUE, 0, 0).map_err(step("limit message queues"))?;
    if seal.uid != 0 {
        setrlimit(Resource::RLIMIT_NPROC, seal.threads_max, seal.threads_max)
            .map_err(step("limit threads"))?;
    }
    Ok(())
}

/// Landlock without a rule: no file can be opened, no port used, no process outside signalled. `false`: the kernel has
/// none of it.
fn forget_files() -> Result<bool, SandboxError> {
    let abi = ABI::V6;
    let status = Ruleset::default()
        .handle_access(AccessFs::from_all(abi))?
        .handle_access(AccessNet::from_all(abi))?
        .scope(Scope::from_all(abi))?
        .create()?
        .restrict_self()?;
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}

/// The message only: a trace of calls would have to open files, and die of that.
fn tell_panic(info: &std::panic::PanicHookInfo<'_>) {
    let thread = std::thread::current();
    eprintln!("thread '{}': {info}", thread.name().unwrap_or("?"));
}
