//! The tables: groups of calls that belong together, and which kind of thread has which groups.
//!
//! A test of `serio-vmm` traces its processes and fails when a call of a table is not made there, unless it is `rare`. Adding
//! a call: to the group of the thing that needs it, with the reason; a new group when it is for one kind only.

use super::Allowed;
use super::ioctls::{
    DEVICES, HOST, MACHINE, NONBLOCK, REGISTERS, RUN, SAVED, STATE, STEER, TAP, TTY, VHOST, VHOST_LAUNCH,
};
use crate::Kind;

/// `allow!(SYS_read, "why")`
macro_rules! allow {
    ($call:ident, $why:expr) => {
        Allowed::new(libc::$call, stringify!($call), $why)
    };
}

const EXEC: u64 = libc::PROT_EXEC as u64;
const DEBUG: &str = "builds with debug assertions ask whether a descriptor is open before they close it";
const PANIC: &str = "a panic: says what and where, and ends the process by SIGABRT";
/// What libc's pthread_create passes, and no more: a thread, never a process.
const THREAD: &[(&str, u64)] = &[(
    "a thread",
    (libc::CLONE_VM
        | libc::CLONE_FS
        | libc::CLONE_FILES
        | libc::CLONE_SIGHAND
        | libc::CLONE_THREAD
        | libc::CLONE_SYSVSEM
        | libc::CLONE_SETTLS
        | libc::CLONE_PARENT_SETTID
        | libc::CLONE_CHILD_CLEARTID) as u64,
)];
/// The value of this signal is fixed by the kernel: the first that libc leaves to programs.
const KICK: &[(&str, u64)] = &[("SIGRTMIN", 34)];
const ABORT: &[(&str, u64)] = &[("SIGABRT", libc::SIGABRT as u64)];

/// What any thread does: locks, memory, its end.
const ALWAYS: &[Allowed] = &[
    allow!(SYS_futex, "locks, channels, joining threads").rare("a thread that never waits"),
    allow!(SYS_mmap, "the allocator's large pieces; never code")
        .without(2, EXEC)
        .rare("when they are asked for"),
    allow!(SYS_munmap, "the allocator's large pieces, stacks of ended threads").rare("when they are freed"),
    allow!(SYS_mprotect, "the allocator grows its heap; never code").without(2, EXEC).rare("when it grows"),
    allow!(SYS_mremap, "the allocator grows large pieces in place")
        .rare("a vector of more than 128 KiB grows"),
    allow!(SYS_brk, "the allocator's first heap").rare("the first heap grows"),
    allow!(SYS_madvise, "the stack of an ending thread is given back").rare("at the end of a thread"),
    allow!(SYS_close, "descriptors that are done with").rare("when they are"),
    allow!(SYS_rt_sigprocmask, "a thread ends").rare("at the end of a thread"),
    allow!(SYS_sigaltstack, "a thread ends").rare("at the end of a thread"),
    allow!(SYS_exit, "a thread ends").rare("at the end of a thread"),
    allow!(SYS_exit_group, "the process ends").rare("by whichever thread ends it"),
    allow!(SYS_fcntl, "whether a descriptor is open")
        .one_of(1, &[("F_GETFD", libc::F_GETFD as u64)])
        .rare(DEBUG),
    allow!(SYS_write, "words for the log, eventfds").rare("something went wrong, or somebody is woken"),
    allow!(SYS_sched_yield, "a short wait for another thread").rare("it is not done at once"),
    allow!(SYS_restart_syscall, "a wait goes on after the process was stopped").rare("SIGSTOP and SIGCONT"),
    allow!(SYS_rt_sigreturn, "a kick that came when its vcpu was over").rare("at the end of a VM"),
    allow!(SYS_clock_gettime, "the time").rare("hosts whose clock cannot be read without a call"),
    allow!(SYS_getpid, "an abort").rare(PANIC),
    allow!(SYS_gettid, "an abort").rare(PANIC),
    allow!(SYS_tgkill, "an abort").one_of(2, ABORT).rare(PANIC),
];

/// Waiting for peers, and talking with them over sockets that others have made.
const TALK: &[Allowed] = &[
    allow!(SYS_poll, "waits for a peer or an event"),
    allow!(SYS_recvmsg, "requests, with their descriptors"),
    allow!(SYS_sendmsg, "answers"),
    allow!(SYS_setsockopt, "how long a peer may take")
        .one_of(2, &[("SO_RCVTIMEO", libc::SO_RCVTIMEO as u64), ("SO_SNDTIMEO", libc::SO_SNDTIMEO as u64)]),
    allow!(SYS_recvfrom, "requests").rare("a read without descriptors"),
    allow!(SYS_read, "eventfds"),
    allow!(SYS_ioctl, "a listener or a peer that blocks or not").one_of(1, NONBLOCK),
];

/// The one who lets peers in.
const DOOR: &[Allowed] = &[
    allow!(SYS_poll, "waits for all at once"),
    allow!(SYS_accept4, "peers come in"),
    allow!(SYS_ioctl, "peers that do not block").one_of(1, NONBLOCK),
];

/// The console of a VM and its log, the end record.
const CONSOLE: &[Allowed] = &[
    allow!(SYS_read, "eventfds, signals, keys"),
    allow!(SYS_sendto, "output to clients of the console"),
    allow!(SYS_recvfrom, "keys from clients of the console").rare("they may be read by `read` too"),
    allow!(SYS_pwrite64, "the log, the end record"),
    allow!(SYS_pread64, "the log turns over").rare("a log longer than its bound"),
    allow!(SYS_ftruncate, "the end record, the log turns over"),
    allow!(SYS_fdatasync, "the end record survives a power cut"),
    allow!(SYS_statx, "how long the log is"),
    allow!(SYS_lseek, "the log turns over").rare("a log longer than its bound"),
    allow!(SYS_signalfd4, "signals as a descriptor, after the seal"),
    allow!(SYS_eventfd2, "bells"),
];

/// A VM on a person's terminal.
const TERMINAL: &[Allowed] = &[
    allow!(SYS_poll, "waits for keys, output, signals and the end"),
    allow!(SYS_read, "eventfds, signals, keys"),
    allow!(SYS_ioctl, "KVM: which registers a vcpu of this host has").one_of(1, REGISTERS),
    allow!(SYS_ioctl, "the terminal is raw while the guest runs").one_of(1, TTY).rare("it is a terminal"),
    allow!(SYS_rt_sigaction, "the signal that takes vcpus out of the guest"),
    allow!(SYS_sysinfo, "whether the host has the memory at all"),
    allow!(SYS_statx, "how long a disk is").rare("a VM with disks"),
    allow!(SYS_fcntl, "who may write a disk: locks; descriptors for several owners")
        .one_of(1, &[LOCK, DUPLICATE])
        .rare("a VM with disks"),
    allow!(SYS_clock_nanosleep, "whether they let go of it").rare("a disk that somebody else has"),
];

/// What the host can do, at the first launch.
const ASK_KVM: &[Allowed] = &[
    allow!(SYS_ioctl, "KVM: what this host can do").one_of(1, HOST),
    allow!(SYS_rt_sigaction, "the signal that takes vcpus out of the guest"),
    allow!(SYS_sysinfo, "whether the host has the memory at all"),
];

/// A VM is made: at a launch, and again after a reset.
const MAKE_VM: &[Allowed] = &[
    allow!(SYS_ioctl, "KVM: the VM and its vcpus").one_of(1, MACHINE),
    allow!(SYS_ioctl, "KVM: doorbells and interrupts of devices that stop with their machine")
        .one_of(1, DEVICES)
        .rare("the end of a machine whose guest has used its devices"),
    allow!(SYS_memfd_create, "guest memory"),
    allow!(SYS_ftruncate, "guest memory"),
    allow!(SYS_fcntl, "guest memory never shrinks").one_of(1, &[("F_ADD_SEALS", libc::F_ADD_SEALS as u64)]),
    allow!(SYS_pread64, "the kernel and the initrd"),
    allow!(SYS_lseek, "how long they are"),
    allow!(SYS_read, "the kernel and the initrd"),
    allow!(SYS_statx, "how long they are").rare("a launch"),
    allow!(SYS_eventfd2, "bells of devices"),
    allow!(SYS_getrandom, "the generation identifier").rare("each boot of a VM"),
    allow!(SYS_getpid, "who we are, for a kick").rare("the VM is ended from outside"),
    allow!(SYS_tgkill, "takes a vcpu out of the guest").one_of(2, KICK).rare("the VM is ended from outside"),
];

/// Taking vcpus out of the guest.
const KICKS: &[Allowed] =
    &[allow!(SYS_getpid, "who we are"), allow!(SYS_tgkill, "takes a vcpu out of the guest").one_of(2, KICK)];

const LOCK: (&str, u64) = ("F_OFD_SETLK", libc::F_OFD_SETLK as u64);
const DUPLICATE: (&str, u64) = ("F_DUPFD_CLOEXEC", libc::F_DUPFD_CLOEXEC as u64);

/// Volumes are opened, or get a new head. Each file was opened by somebody else.
const OPEN: &[Allowed] = &[
    allow!(SYS_pread64, "headers and maps"),
    allow!(SYS_statx, "how long a file is"),
    allow!(SYS_ftruncate, "new layers, growing"),
    allow!(SYS_fcntl, "who may write: locks; descriptors for several owners").one_of(1, &[LOCK, DUPLICATE]),
];

/// A head is written past the page cache.
const DIRECT: &[Allowed] = &[allow!(SYS_fcntl, "a head is written past the page cache")
    .one_of(1, &[("F_GETFL", libc::F_GETFL as u64), ("F_SETFL", libc::F_SETFL as u64)])
    .rare("volumes for which it is asked")];

/// The state of a whole VM.
const SAVE: &[Allowed] = &[
    allow!(SYS_ioctl, "KVM: the state of the VM and its vcpus")
        .one_of(1, SAVED)
        .rare("a snapshot of the whole VM"),
    allow!(SYS_pwrite64, "the files of a snapshot").rare("a snapshot of the whole VM"),
    allow!(SYS_pread64, "the files of a snapshot").rare("a snapshot of the whole VM"),
    allow!(SYS_fdatasync, "the files of a snapshot").rare("a snapshot of the whole VM"),
    allow!(SYS_fsync, "the files of a snapshot").rare("a snapshot of the whole VM"),
    allow!(SYS_fallocate, "memory that the guest gave back").rare("a snapshot of the whole VM"),
];

/// A snapshot: a new head.
const SEAL: &[Allowed] = &[
    allow!(SYS_statx, "how long a file is"),
    allow!(SYS_ftruncate, "the new head"),
    allow!(SYS_fcntl, "who may write the new head: a lock").one_of(1, &[LOCK]),
];

/// A layer goes into the one below.
const MERGE: &[Allowed] = &[allow!(SYS_statx, "how long a file is")];

/// The memory of a restored VM is held against its checksums.
const CHECK: &[Allowed] = &[allow!(SYS_pread64, "the saved memory"), allow!(SYS_lseek, "where it has data")];

/// Damaged memory ends the machine.
const DAMAGE: &[Allowed] = &[
    allow!(SYS_getpid, "who we are").rare("saved memory that is damaged"),
    allow!(SYS_tgkill, "takes a vcpu out of the guest").one_of(2, KICK).rare("saved memory that is damaged"),
];

/// The last owner of a volume closes it.
const CLOSE: &[Allowed] =
    &[allow!(SYS_fcntl, "the lock is given back").one_of(1, &[LOCK]).rare("a layer or a volume is let go")];

/// Bytes of volumes.
const FILES: &[Allowed] = &[
    allow!(SYS_pwrite64, "headers and maps"),
    allow!(SYS_pread64, "headers and maps").rare("layers whose maps are not in memory"),
    allow!(SYS_preadv, "blocks").rare("a merge, a copy"),
    allow!(SYS_pwritev, "blocks").rare("a merge, a copy"),
    allow!(SYS_preadv2, "blocks").rare("a merge, a copy"),
    allow!(SYS_pwritev2, "blocks").rare("a merge, a copy"),
    allow!(SYS_fdatasync, "data before what promises them").rare("volumes that nobody wrote"),
    allow!(SYS_fsync, "new files with their length").rare("a new layer"),
    allow!(SYS_ftruncate, "a file that is let go").rare("a merge that ends"),
    allow!(SYS_fallocate, "discard, zeroes").rare("a guest discards, a merge lets go"),
    allow!(SYS_lseek, "where data are").rare("images and sparse layers"),
    allow!(SYS_fadvise64, "what was read for a sum need not stay in the page cache")
        .rare("a merge, a scrub, a check"),
    allow!(SYS_clock_nanosleep, "a moment until others are done").rare("they are not done at once"),
    allow!(SYS_getrandom, "new keys and identities").rare("a new encrypted layer"),
];

/// A queue's ring, set up by whoever makes the queue and used by who has it.
const RING_SETUP: &[Allowed] = &[
    allow!(SYS_io_uring_setup, "a ring for each queue of a disk"),
    allow!(SYS_io_uring_register, "its files and its bell"),
    allow!(SYS_fstatfs, "files in memory need no ring"),
    allow!(SYS_eventfd2, "its bell"),
];

const RING_USE: &[Allowed] = &[
    allow!(SYS_io_uring_enter, "reads and writes of the guest"),
    allow!(SYS_io_uring_register, "files of a new layer").rare("a snapshot"),
];

/// Without a ring.
const INLINE: &[Allowed] = &[
    allow!(SYS_preadv, "reads of the guest").rare("volumes in memory, a host without io_uring"),
    allow!(SYS_pwritev, "writes of the guest").rare("volumes in memory, a host without io_uring"),
    allow!(SYS_preadv2, "reads of the guest").rare("volumes in memory, a host without io_uring"),
    allow!(SYS_pwritev2, "writes of the guest").rare("volumes in memory, a host without io_uring"),
    allow!(SYS_pread64, "reads of the guest").rare("volumes in memory, a host without io_uring"),
    allow!(SYS_pwrite64, "writes of the guest").rare("volumes in memory, a host without io_uring"),
    allow!(SYS_fdatasync, "flushes of the guest").rare("volumes in memory, a host without io_uring"),
    allow!(SYS_fallocate, "discards of the guest").rare("volumes in memory, a host without io_uring"),
];

const VCPU: &[Allowed] = &[
    allow!(SYS_ioctl, "the guest runs").one_of(1, RUN),
    allow!(SYS_ioctl, "KVM: interrupts and doorbells as drivers of the guest ask").one_of(1, DEVICES),
    allow!(SYS_ioctl, "KVM: where the guest was when it cannot go on")
        .one_of(1, STATE)
        .rare("a crash of the guest"),
];

/// A device starts: as a driver of the guest asks, or again after a pause.
const START: &[Allowed] = &[
    allow!(SYS_ioctl, "a tap takes what the guest's driver asks")
        .one_of(1, TAP)
        .rare("a VM with a network card"),
    allow!(SYS_ioctl, "a tap begins with one queue").one_of(1, STEER).rare("a card of several queue pairs"),
    allow!(SYS_eventfd2, "bells of a device that starts"),
    allow!(SYS_timerfd_create, "when a limit, which may come later, lets the next request start"),
    allow!(SYS_epoll_create1, "what a device's thread sleeps on"),
    allow!(SYS_epoll_ctl, "what a device's thread sleeps on"),
    allow!(SYS_fcntl, "descriptors for several owners")
        .one_of(1, &[DUPLICATE])
        .rare("devices that share a bell"),
    allow!(SYS_read, "bells that a reset clears").rare("a driver resets its device"),
];

const BLK: &[Allowed] =
    &[allow!(SYS_epoll_wait, "waits for the guest and for the disk"), allow!(SYS_read, "bells")];

/// How much a disk or a card may do.
const LIMIT: &[Allowed] = &[
    allow!(SYS_timerfd_settime, "when the next request may start").rare("a disk or a card with a limit"),
    allow!(SYS_read, "the timer").rare("a disk or a card with a limit"),
];

const SLEEP: &[Allowed] = &[allow!(SYS_epoll_wait, "waits for the guest and for the host")];

const EPOLL_CHANGE: &[Allowed] =
    &[allow!(SYS_epoll_ctl, "waits for room or no longer").rare("the other side is full, or gone")];

const NET: &[Allowed] = &[
    allow!(SYS_readv, "packets from the tap").rare("a VM with a network card"),
    allow!(SYS_writev, "packets to the tap").rare("a VM with a network card"),
    allow!(SYS_read, "bells").rare("a VM with a network card"),
    allow!(SYS_ioctl, "the guest uses more or fewer queue pairs")
        .one_of(1, STEER)
        .rare("a card of several queue pairs"),
    allow!(SYS_ioctl, "the kernel moves the packets, or does no longer")
        .one_of(1, VHOST)
        .rare("a host with vhost-net"),
];

const PORTS: &[Allowed] = &[
    allow!(SYS_readv, "a console's input").rare("a VM with a console of files"),
    allow!(SYS_writev, "a console's output").rare("a VM with a console of files"),
    allow!(SYS_read, "a console's input, bells").rare("a VM with a console of files"),
];

const DEVICE: &[Allowed] = &[
    allow!(SYS_getrandom, "entropy for the guest").rare("a guest that asks for entropy"),
    allow!(SYS_read, "bells, timers").rare("a device with a timer"),
    allow!(SYS_timerfd_settime, "a device's time").rare("a device with a timer"),
    allow!(SYS_fallocate, "memory that the guest gives back").rare("a guest with a balloon"),
    allow!(SYS_recvmsg, "a host's socket").rare("a VM with vsock"),
    allow!(SYS_sendmsg, "a host's socket").rare("a VM with vsock"),
    allow!(SYS_recvfrom, "a host's socket").rare("a VM with vsock"),
    allow!(SYS_sendto, "a host's socket").rare("a VM with vsock"),
    allow!(SYS_readv, "a host's socket").rare("a VM with vsock"),
    allow!(SYS_writev, "a host's socket").rare("a VM with vsock"),
    allow!(SYS_shutdown, "a host's socket").rare("a VM with vsock"),
    allow!(SYS_accept4, "a program of the host calls the guest").rare("a VM with vsock"),
    allow!(SYS_ioctl, "sockets that do not block").one_of(1, NONBLOCK).rare("a VM with vsock"),
];

/// A watchdog that runs out ends the machine.
const BITE: &[Allowed] = &[
    allow!(SYS_getpid, "who we are").rare("a guest that does not pet its watchdog"),
    allow!(SYS_tgkill, "takes a vcpu out of the guest")
        .one_of(2, KICK)
        .rare("a guest that does not pet its watchdog"),
];

const KEEPER: &[Allowed] = &[
    allow!(SYS_pwrite64, "pages of the map"),
    allow!(SYS_fdatasync, "data, then the map"),
    allow!(SYS_clock_nanosleep, "a moment until others are done").rare("they are not done at once"),
];

/// Jobs of `serio-volumed`: bytes come in by a pipe or a file, and are copied.
const JOB: &[Allowed] = &[
    allow!(SYS_write, "whole copies without holes").rare("file systems without reflinks"),
    allow!(SYS_read, "images that come by a pipe"),
    allow!(SYS_copy_file_range, "copies by the kernel").rare("file systems without reflinks"),
    allow!(SYS_sendfile, "copies by the kernel").rare("file systems without reflinks"),
    allow!(SYS_ioctl, "copies that share blocks").one_of(1, &[("FICLONE", 0x4004_9409)]),
    allow!(SYS_ioctl, "a control connection or a listener that blocks or not").one_of(1, NONBLOCK),
    allow!(SYS_eventfd2, "bells"),
    allow!(SYS_epoll_create1, "what a client of another server sleeps on").rare("bases over NBD"),
];

/// The NBD server and its clients.
const NBD: &[Allowed] = &[
    allow!(SYS_poll, "waits for clients and for the disk"),
    allow!(SYS_accept4, "clients come in"),
    allow!(SYS_recvfrom, "requests"),
    allow!(SYS_sendto, "answers"),
    allow!(SYS_readv, "data from clients"),
    allow!(SYS_writev, "data to clients"),
    allow!(SYS_sendfile, "data to clients").rare("volumes in memory"),
    allow!(SYS_sendmsg, "answers").rare("long answers"),
    allow!(SYS_recvmsg, "requests").rare("long requests"),
    allow!(SYS_read, "bells"),
    allow!(SYS_shutdown, "a client that must go").rare("all places are taken"),
    allow!(SYS_ioctl, "clients that do not block").one_of(1, NONBLOCK),
    allow!(SYS_setsockopt, "buffers of a client").one_of(
        2,
        &[
            ("SO_SNDBUF", libc::SO_SNDBUF as u64),
            ("SO_RCVBUF", libc::SO_RCVBUF as u64),
            ("SO_SNDBUFFORCE", libc::SO_SNDBUFFORCE as u64),
        ],
    ),
];

/// A thread is made.
const THREADS: &[Allowed] = &[
    allow!(SYS_clone, "a new thread, never a process").one_of(0, THREAD),
    allow!(SYS_clone3, "libc is told that there is none, and calls clone"),
    allow!(SYS_rseq, "a new thread"),
    allow!(SYS_set_robust_list, "a new thread"),
    allow!(SYS_sched_getaffinity, "a new thread finds its stack"),
    allow!(SYS_gettid, "a new thread"),
    allow!(SYS_prlimit64, "a new thread finds its stack").rare("by the way that libc does it"),
    allow!(SYS_prctl, "a new thread has a name").one_of(0, &[("PR_SET_NAME", libc::PR_SET_NAME as u64)]),
];

/// And gets its filter.
const SEALING: &[Allowed] = &[
    allow!(SYS_prctl, "before a filter")
        .one_of(0, &[("PR_SET_NO_NEW_PRIVS", libc::PR_SET_NO_NEW_PRIVS as u64)]),
    allow!(SYS_seccomp, "a new thread's own filter").one_of(0, &[("SECCOMP_SET_MODE_FILTER", 1)]),
];

/// The groups of each kind.
pub(super) fn of(kind: Kind) -> &'static [&'static [Allowed]] {
    match kind {
        Kind::Agent => &[DOOR, CONSOLE, MAKE_VM, SAVE, CLOSE, ALWAYS],
        Kind::Run => &[TERMINAL, MAKE_VM, TAP_LAUNCH, ALWAYS],
        Kind::Control => {
            &[TALK, OPEN, DIRECT, SAVE, FILES, ASK_KVM, MAKE_VM, START, RING_SETUP, KICKS, TAP_LAUNCH, ALWAYS]
        }
        Kind::Vcpu => &[VCPU, START, SAVE, RING_SETUP, KICKS, ALWAYS],
        Kind::Blk => &[BLK, LIMIT, RING_USE, INLINE, EPOLL_CHANGE, ALWAYS],
        Kind::Net => &[SLEEP, LIMIT, EPOLL_CHANGE, NET, ALWAYS],
        Kind::Ports => &[SLEEP, EPOLL_CHANGE, PORTS, ALWAYS],
        Kind::Device => &[SLEEP, EPOLL_CHANGE, DEVICE, BITE, ALWAYS],
        Kind::Keeper => &[KEEPER, ALWAYS],
        Kind::Cut => &[SEAL, DIRECT, FILES, CLOSE, ALWAYS],
        Kind::Merge => &[MERGE, DIRECT, FILES, CLOSE, ALWAYS],
        Kind::Check => &[CHECK, DAMAGE, ALWAYS],
        Kind::Jobs => &[DOOR, ALWAYS],
        Kind::Job => &[TALK, OPEN, DIRECT, FILES, RING_SETUP, RING_USE, JOB, ALWAYS],
        Kind::Nbd => &[NBD, OPEN, DIRECT, FILES, RING_SETUP, RING_USE, THREADS, ALWAYS],
        Kind::Maker => &[
            THREADS,
            SEALING,
            DIRECT,
            SAVE,
            VCPU,
            START,
            BLK,
            RING_USE,
            RING_SETUP,
            INLINE,
            SLEEP,
            LIMIT,
            EPOLL_CHANGE,
            NET,
            PORTS,
            DEVICE,
            KEEPER,
            DOOR,
            CONSOLE,
            TERMINAL,
            TALK,
            FILES,
            MAKE_VM,
            TAP_LAUNCH,
            KICKS,
            ASK_KVM,
            OPEN,
            SEAL,
            MERGE,
            CHECK,
            CLOSE,
            JOB,
            NBD,
            ALWAYS,
        ],
    }
}

/// A tap that was passed is looked at.
const TAP_LAUNCH: &[Allowed] = &[
    allow!(SYS_ioctl, "what a tap is, and its header").one_of(1, TAP).rare("a VM with a network card"),
    allow!(SYS_ioctl, "what the kernel's network device knows")
        .one_of(1, VHOST_LAUNCH)
        .rare("a host with vhost-net"),
];
