//! How a process gives up what it does not need.
//!
//! ```text
//!   start   ──► at_start   no new privileges, no core dumps or debuggers, only known descriptors
//!   launch  ──► seal       another user, resource limits; after it nothing is opened any more
//! ```
//!
//! Owns the order of these steps. Each one is final: nothing here gives anything back. What belongs into [`seal`] next,
//! behind the same call, are an empty root, namespaces and a system-call filter per thread.
//!
//! The only `unsafe` is in `sys.rs`.
#![deny(unsafe_code)]

mod kind;
#[allow(unsafe_code)]
mod sys;
pub mod threads;

pub use kind::Kind;

use std::os::fd::{OwnedFd, RawFd};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{Gid, Uid};

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
}

fn step<E: Into<std::io::Error>>(what: &'static str) -> impl FnOnce(E) -> SandboxError {
    move |source| SandboxError::Step { what, source: source.into() }
}

/// Takes over a descriptor that this process was started with, once.
pub fn take_descriptor(number: RawFd) -> Result<OwnedFd, SandboxError> {
    sys::take_descriptor(number)
}

/// First thing in a process: closes all descriptors but the standard streams and `keep`, gives up gaining privileges,
/// and lets neither core dumps nor debuggers of the same user see its memory.
pub fn at_start(keep: &[RawFd]) -> Result<(), SandboxError> {
    sys::close_others(keep).map_err(step("close unknown descriptors"))?;
    nix::sys::prctl::set_no_new_privs().map_err(step("give up new privileges"))?;
    nix::sys::prctl::set_dumpable(false).map_err(step("forbid core dumps"))
}

/// What a process keeps when it is sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seal {
    /// The user and group that it becomes; 0 stays what it is.
    pub uid: u32,
    /// How many descriptors it may have open.
    pub descriptors_max: u64,
}

/// Everything is open: from now on the process is another user with limits, for ever.
pub fn seal(seal: &Seal) -> Result<(), SandboxError> {
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(step("forbid core dumps"))?;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(step("read the limit of open files"))?;
    let descriptors = seal.descriptors_max.min(hard);
    setrlimit(Resource::RLIMIT_NOFILE, descriptors, descriptors).map_err(step("limit open files"))?;
    if seal.uid != 0 {
        become_user(seal.uid)?;
        // A change of user makes a process dumpable again.
        nix::sys::prctl::set_dumpable(false).map_err(step("forbid core dumps"))?;
    }
    Ok(())
}

/// Groups first, then the group, then the user: after the last nothing of it can be undone.
fn become_user(id: u32) -> Result<(), SandboxError> {
    let (uid, gid) = (Uid::from_raw(id), Gid::from_raw(id));
    nix::unistd::setgroups(&[])
        .map_err(step("drop supplementary groups: only root can become another user"))?;
    nix::unistd::setresgid(gid, gid, gid).map_err(step("change the group"))?;
    nix::unistd::setresuid(uid, uid, uid).map_err(step("change the user"))
}
