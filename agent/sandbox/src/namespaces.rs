//! Leaving the host: an empty root, namespaces of its own, another user.
//!
//! ```text
//!   root:   mount, net, ipc, uts namespaces ─► empty root ─► uid ─► user namespace (only itself) ─► no capabilities
//!   others: user, mount, net, ipc, uts namespaces at once ─► empty root ─► no capabilities
//! ```
//!
//! Called while the process has one thread. The process numbers stay the host's: whoever started it finds it again by them.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;

use nix::fcntl::{OFlag, open, openat};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid, chdir, pivot_root};

use crate::{SandboxError, step};

/// What remains when the host's kernel, or the rights of a person, do not allow more.
pub(crate) type Missing = Vec<&'static str>;

/// See the head of this file. `uid` 0 stays who it is.
pub(crate) fn leave_host(uid: u32) -> Result<Missing, SandboxError> {
    // The root will be empty, and the map of users is written afterwards.
    let proc = open("/proc/self", OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()).ok();
    let spaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS;
    if Uid::effective().is_root() {
        unshare(spaces).map_err(step("make namespaces"))?;
        empty_root().map_err(step("make an empty root"))?;
        if uid != 0 {
            become_user(uid)?;
        }
        let alone = unshare(CloneFlags::CLONE_NEWUSER);
        return Ok(match alone {
            Ok(()) => map_self(proc.as_ref(), uid, uid),
            Err(_) => vec!["a user namespace"],
        });
    }
    let (user, group) = (Uid::effective().as_raw(), Gid::effective().as_raw());
    if unshare(spaces | CloneFlags::CLONE_NEWUSER).is_err() {
        return Ok(vec!["namespaces", "an empty root", "a user of its own"]);
    }
    let mut missing = map_self(proc.as_ref(), user, group);
    if empty_root().is_err() {
        missing.push("an empty root");
    }
    missing.push("a user of its own");
    Ok(missing)
}

/// Groups first, then the group, then the user: after the last nothing of it can be undone.
fn become_user(id: u32) -> Result<(), SandboxError> {
    let (uid, gid) = (Uid::from_raw(id), Gid::from_raw(id));
    nix::unistd::setgroups(&[]).map_err(step("drop supplementary groups"))?;
    nix::unistd::setresgid(gid, gid, gid).map_err(step("change the group"))?;
    nix::unistd::setresuid(uid, uid, uid).map_err(step("change the user"))?;
    // Changing the user made the files in /proc/self root's; they are needed once more.
    nix::sys::prctl::set_dumpable(true).map_err(step("own its entry in /proc"))
}

/// In its user namespace the process is itself, and nobody else exists.
fn map_self(proc: Option<&OwnedFd>, uid: u32, gid: u32) -> Missing {
    let write = |name: &str, text: String| -> io::Result<()> {
        let proc = proc.ok_or(io::ErrorKind::NotFound)?;
        let file = openat(proc, name, OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())?;
        File::from(file).write_all(text.as_bytes())
    };
    let mapped = write("setgroups", "deny".to_owned())
        .and_then(|()| write("gid_map", format!("{gid} {gid} 1")))
        .and_then(|()| write("uid_map", format!("{uid} {uid} 1")));
    // Without a map it is the overflow user there, who owns even less.
    if mapped.is_err() { vec!["a map of its user namespace"] } else { Vec::new() }
}

/// A file system with nothing in it, not even room, takes the place of the root; the old one is let go.
fn empty_root() -> nix::Result<()> {
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    // Any directory that surely exists: it is only hidden here, and gone a moment later.
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("none"), "/proc", Some("tmpfs"), safe, Some("mode=0555,size=4k,nr_inodes=2"))?;
    chdir("/proc")?;
    // The old root comes to lie on the new one, and is taken off.
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    chdir("/")?;
    mount(none, "/", none, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | safe, none)
}
