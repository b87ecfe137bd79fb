//! One process that we started or found again: a pidfd, so that its number can never mean another process.
//!
//! Owns: the pidfd, the identity check, the wait, the reaping of our own children. Never: why it should end.

use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use tokio::io::unix::AsyncFd;

/// A process, alive or not yet reaped.
#[derive(Debug)]
pub(super) struct Process {
    pid: u32,
    start_ticks: u64,
    fd: AsyncFd<OwnedFd>,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Exit {
    /// By itself, with this status.
    Code(i32),
    /// By this signal.
    Signal(i32),
    /// Another process reaped it (it was not our child).
    Unknown,
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exited with status {code}"),
            Self::Signal(9) => {
                f.write_str("killed by signal 9 (SIGKILL: by hand, or the host ran out of memory)")
            }
            Self::Signal(libc::SIGSYS) => f.write_str(
                "killed by signal 31 (SIGSYS): it called something its filter forbids, so a guest may have broken into it, \
                 or it has a mistake; the kernel's log has the number of the call (`dmesg | grep type=1326`)",
            ),
            Self::Signal(signal) => write!(f, "killed by signal {signal}"),
            Self::Unknown => f.write_str("died without a word"),
        }
    }
}

/// What `/proc/PID/stat` says of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stat {
    /// `R`, `S`, `Z`, …
    state: u8,
    /// Field 22: clock ticks after boot.
    start_ticks: u64,
}

fn stat(pid: u32) -> Option<Stat> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The name in field 2 may hold anything, so fields count from after its last `)`.
fn parse_stat(text: &str) -> Option<Stat> {
    let mut fields = text.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = *fields.next()?.as_bytes().first()?;
    // `state` is field 3; the start time is field 22.
    let start_ticks = fields.nth(18)?.parse().ok()?;
    Some(Stat { state, start_ticks })
}

impl Process {
    /// A child of ours that nobody has waited for.
    pub(super) fn child(pid: u32) -> io::Result<Self> {
        let fd = open_pidfd(pid)?;
        let stat = stat(pid).ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat cannot be read")))?;
        Ok(Self { pid, start_ticks: stat.start_ticks, fd: crate::sys::watch_readable(fd)? })
    }

    /// The process of that number, if it is still the one that started at `start_ticks` and runs `program`.
    pub(super) fn find(pid: u32, start_ticks: u64, program: &Path) -> io::Result<Option<Self>> {
        let fd = match open_pidfd(pid) {
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
            other => other?,
        };
        // Looked at after the pidfd is held: what is read now is about the same process, or an older dead one.
        let same =
            stat(pid).is_some_and(|stat| stat.start_ticks == start_ticks && !b"ZX".contains(&stat.state));
        if !same || !runs(pid, program) {
            return Ok(None);
        }
        Ok(Some(Self { pid, start_ticks, fd: crate::sys::watch_readable(fd)? }))
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    pub(super) fn start_ticks(&self) -> u64 {
        self.start_ticks
    }

    /// SIGKILL. Nothing happens if it is dead already.
    pub(super) fn kill(&self) {
        if let Err(error) = pidfd_send_signal(self.fd.get_ref(), Signal::KILL)
            && error != rustix::io::Errno::SRCH
        {
            tracing::warn!(pid = self.pid, %error, "a process could not be killed");
        }
    }

    /// Resolves when it is dead; a child of ours is reaped. May be called by several at once: only one of them
    /// hears the status.
    pub(super) async fn wait(&self) -> Exit {
        if self.fd.readable().await.is_err() {
            return Exit::Unknown;
        }
        match waitid(WaitId::PidFd(self.fd.get_ref().as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG)
        {
            Ok(Some(status)) => match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => Exit::Code(code),
                (None, Some(signal)) => Exit::Signal(signal),
                (None, None) => Exit::Unknown,
            },
            Ok(None) | Err(_) => Exit::Unknown,
        }
    }
}

fn open_pidfd(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "not a process number"))?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

/// Whether the process runs that program (a newer file of the same name may lie there by now).
fn runs(pid: u32, program: &Path) -> bool {
    let Ok(exe) = fs::read_link(format!("/proc/{pid}/exe")) else { return false };
    let name = exe.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let name = name.strip_suffix(" (deleted)").unwrap_or(&name);
    // The path in seriod.toml may be a symbolic link.
    let program = fs::canonicalize(program).unwrap_or_else(|_| program.to_owned());
    program.file_name().is_some_and(|expected| expected.to_string_lossy() == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{ChildStdin, Command, Stdio};

    /// Its number; it is reaped by pidfd, which is what is tested.
    #[allow(clippy::zombie_processes, reason = "see above")]
    fn spawn(command: &mut Command) -> u32 {
        command.spawn().unwrap().id()
    }

    #[test]
    fn a_name_with_brackets_and_spaces_does_not_shift_the_fields() {
        let text = "7 (a) b) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4242 1 2";
        assert_eq!(parse_stat(text), Some(Stat { state: b'S', start_ticks: 4242 }));
        for cut in 0..text.len() {
            let _ = parse_stat(&text[..cut]);
        }
    }

    /// A process that lives until what it reads from is dropped.
    #[allow(clippy::zombie_processes, reason = "reaped by pidfd, which is what is tested")]
    fn cat() -> (u32, ChildStdin) {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        (child.id(), child.stdin.take().unwrap())
    }

    #[tokio::test]
    async fn a_child_is_found_killed_and_reaped() {
        let (child, _open) = cat();
        let process = Process::child(child).unwrap();
        let cat_path = fs::read_link(format!("/proc/{}/exe", child));
        // Between fork and exec it is still us: wait until it is cat.
        let mut exe = cat_path.unwrap();
        while exe == std::env::current_exe().unwrap() {
            exe = fs::read_link(format!("/proc/{}/exe", child)).unwrap();
        }
        let start = process.start_ticks();
        assert!(Process::find(child, start, &exe).unwrap().is_some());
        assert!(Process::find(child, start + 1, &exe).unwrap().is_none(), "another start time");
        assert!(Process::find(child, start, Path::new("/bin/other")).unwrap().is_none());
        process.kill();
        assert_eq!(process.wait().await, Exit::Signal(9));
        assert_eq!(process.wait().await, Exit::Unknown, "reaped once");
        assert!(Process::find(child, start, &exe).unwrap().is_none());
        process.kill();
    }

    #[tokio::test]
    async fn the_status_is_heard() {
        let child = spawn(Command::new("sh").args(["-c", "exit 3"]));
        let process = Process::child(child).unwrap();
        assert_eq!(process.wait().await, Exit::Code(3));
    }
}
