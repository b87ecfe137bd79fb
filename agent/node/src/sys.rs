//! The system calls that have no safe wrapper: what a child does between fork and exec, making a tap,
//! the state of the clock.
//!
//! Owns: these few lines of unsafe code. Never: decisions; each function does one thing for its caller.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd},
        unix::{fs::OpenOptionsExt, process::CommandExt},
    },
    process::{Child, Command},
};

use tokio::io::{Interest, unix::AsyncFd};

use crate::health::observe::Clock;

/// What the kernel says of its clock (adjtimex(2)); `None` when it does not.
#[must_use]
pub fn kernel_clock() -> Option<Clock> {
    // SAFETY: a timex is plain numbers, for each of which zero is a value.
    let mut timex: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a live timex that nobody else has; with modes 0 the kernel changes nothing and only writes there.
    let state = unsafe { libc::adjtimex(&raw mut timex) };
    let is_synced = timex.status & libc::STA_UNSYNC == 0;
    (state >= 0).then_some(Clock { is_synced, error_us: timex.maxerror })
}

/// Milliseconds since the host's boot, sleep included (CLOCK_BOOTTIME, clock_gettime(2)): a clock that nobody sets.
#[must_use]
pub fn since_boot_ms() -> i64 {
    // SAFETY: a timespec is plain numbers, for each of which zero is a value.
    let mut now: libc::timespec = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a live timespec that nobody else has, and the kernel only writes there.
    let _always_there = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut now) };
    now.tv_sec.saturating_mul(1000).saturating_add(now.tv_nsec / 1_000_000)
}

/// Starts a program in a session of its own (a signal to seriod's terminal or group does not reach it), with one
/// descriptor more than the standard three, under the same number as here.
///
/// # Errors
/// The program cannot be run.
pub fn spawn_in_session(command: &mut Command, passed: BorrowedFd<'_>) -> io::Result<Child> {
    let number = passed.as_raw_fd();
    // SAFETY: the closure runs in the child between fork and exec and only makes two system calls that are
    // async-signal-safe (setsid, fcntl); it allocates nothing and takes no lock. `passed` outlives the spawn.
    unsafe {
        command.pre_exec(move || {
            if libc::setsid() < 0 {
                return Err(io::Error::last_os_error());
            }
            // Everything else is close-on-exec: this one is meant for the program.
            if libc::fcntl(number, libc::F_SETFD, 0) < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    command.spawn()
}

/// Makes a tap with so many queues, no packet information header and a virtio-net header. It is gone when the last descriptor of
/// it is closed.
///
/// # Errors
/// The name is too long or taken, /dev/net/tun is missing, or the kernel's.
pub fn make_tap(name: &str, queues: u32) -> io::Result<Vec<OwnedFd>> {
    let several = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    // The first makes it: else its further queues could be had by whoever knows its name, or be those of another VM's.
    let flags = |queue| several | if queue == 0 { libc::IFF_TUN_EXCL } else { 0 };
    (0..queues.max(1)).map(|queue| open_queue(name, flags(queue))).collect()
}

fn open_queue(name: &str, more_flags: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: an all-zero ifreq is a valid value of this plain C struct.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.is_empty() || name.len() >= request.ifr_name.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "an interface's name has 1 to 15 bytes"));
    }
    for (slot, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *slot = byte as libc::c_char;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | more_flags;
    // The field has 16 bits, and the highest is one of the flags.
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    let tun: File = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")?;
    // SAFETY: TUNSETIFF reads and writes one ifreq at the pointer, which lives until the call returns.
    let done = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(tun.into()) }
}

/// Waits for a descriptor to become readable with the runtime's epoll.
///
/// # Errors
/// The descriptor cannot be waited for, or there is no runtime.
pub fn watch_readable(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is an open descriptor that nobody else closes, and `AsyncFd` keeps it until it has
    // deregistered it.
    Ok(unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }?)
}
