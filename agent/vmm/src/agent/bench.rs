//! For tests: the whole agent behind its socket, with guests of a few bytes or the mini guest.
//!
//! It runs on a thread of the test. With [`SEALED`] in the environment it runs as `seriod` starts it, as a sealed process: the
//! test program again, which then does nothing else.

use std::cell::Cell;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use prost::Message;
use serio_control::message::{Body, Empty, EndRecord, Launch, VmState, VmStatus};
use serio_control::{Channel, ChannelError};
use tempfile::TempDir;

#[path = "../../tests/guest/echo.rs"]
pub(super) mod echo;
#[path = "../../tests/guest/mod.rs"]
pub(super) mod guest;

/// A process' worth of agent, on a thread.
pub(super) struct Bench {
    pub(super) dir: TempDir,
    agent: Cell<Option<Agent>>,
}

/// Names a directory for traces of system calls, or is empty for none.
pub(super) const SEALED: &str = "SERIO_TEST_SEALED";
/// The control socket's descriptor, for the process that [`SEALED`] makes.
const FD: &str = "SERIO_TEST_CONTROL_FD";
/// Nobody's on this host, nor those after it.
const FIRST_UID: u32 = 1_999_999_000;

enum Agent {
    Thread(JoinHandle<Result<(), super::AgentError>>),
    Process(Child),
}

impl Agent {
    fn start(listener: UnixListener) -> Agent {
        let Some(traces) = std::env::var_os(SEALED) else {
            return Agent::Thread(std::thread::spawn(move || super::serve(listener)));
        };
        fcntl(&listener, FcntlArg::F_SETFD(FdFlag::empty())).expect("inherited");
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let itself = std::env::current_exe().expect("known");
        let mut command = match traces.is_empty() {
            true => Command::new(itself),
            false => {
                let trace = Path::new(&traces).join(format!("{}-{number}", std::process::id()));
                let mut strace = Command::new("strace");
                strace.args(["-f", "-qq", "-Y", "-X", "raw", "-o"]).arg(trace).arg(itself);
                strace
            }
        };
        command.args(["--exact", "agent::bench::a_process_of_its_own", "--ignored", "--nocapture"]);
        command.args(["--test-threads", "1"]).env(FD, listener.as_raw_fd().to_string());
        // The harness has a thread before the process seals itself. A heap of that thread's own would stay, and to shrink
        // one libc opens a file, which kills; the real process has one heap from its first thread on.
        command.env("MALLOC_ARENA_MAX", "1");
        Agent::Process(command.spawn().expect("starts"))
    }

    fn ended(self) {
        match self {
            Agent::Thread(thread) => thread.join().expect("no panic").expect("no error"),
            Agent::Process(mut child) => {
                let status = child.wait().expect("waited for");
                assert!(status.success(), "{status}");
            }
        }
    }
}

/// No test: the agent, as it is started by [`Agent::start`]. With one test thread this is the process' only thread.
#[test]
#[ignore = "it is the process that other tests talk to"]
fn a_process_of_its_own() {
    let Ok(fd) = std::env::var(FD) else { return };
    let control_fd = fd.parse().expect("a number");
    let code = super::main(&crate::cli::AgentArgs { control_fd, first_uid: FIRST_UID });
    std::process::exit(i32::from(code != std::process::ExitCode::SUCCESS));
}

/// The files of a launch, by their place among the descriptors.
pub(super) const KVM: u32 = 0;
pub(super) const KERNEL: u32 = 1;
pub(super) const LOG: u32 = 2;
pub(super) const CONSOLE: u32 = 3;
pub(super) const EXIT: u32 = 4;

impl Bench {
    pub(super) fn new() -> Option<Bench> {
        if let Err(error) = File::options().read(true).write(true).open("/dev/kvm") {
            println!("skipped: /dev/kvm: {error}");
            return None;
        }
        let dir = tempfile::tempdir().expect("a directory");
        let listener = UnixListener::bind(dir.path().join("control")).expect("bound");
        Some(Bench { dir, agent: Cell::new(Some(Agent::start(listener))) })
    }

    /// The same for the mini guest, which is built first: the agent does not wait long for its launch.
    pub(super) fn mini() -> Option<Bench> {
        let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../images/mini/build");
        let output = Command::new(&recipe).output().expect("images/mini/build starts");
        assert!(output.status.success(), "images/mini/build: {}", String::from_utf8_lossy(&output.stderr));
        let bench = Bench::new()?;
        std::fs::copy(String::from_utf8_lossy(&output.stdout).trim(), bench.path("kernel")).expect("copied");
        Some(bench)
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(super) fn connect(&self) -> Channel {
        let channel = Channel::new(UnixStream::connect(self.path("control")).expect("listens"));
        channel.set_timeout(Some(Duration::from_secs(30))).expect("set");
        channel
    }

    pub(super) fn file(&self, name: &str) -> File {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).open(self.path(name)).expect("opened")
    }

    pub(super) fn request() -> Launch {
        Launch {
            vm_id: "7d3c".into(),
            name: "ardesio/web".into(),
            vcpus: 2,
            memory_bytes: 16 << 20,
            kvm_fd: KVM,
            kernel_fd: KERNEL,
            log_fd: LOG,
            console_fd: CONSOLE,
            exit_fd: EXIT,
            ..Launch::default()
        }
    }

    pub(super) fn launch_with(
        &self,
        code: &[&[u8]],
        change: impl FnOnce(&mut Launch),
        more: &[File],
    ) -> Result<Channel, String> {
        std::fs::write(self.path("kernel"), guest::elf(&code.concat())).expect("written");
        self.launch_kernel(change, more)
    }

    /// Launches the mini guest, which [`Bench::mini`] has put there, with one vcpu.
    pub(super) fn launch_mini(
        &self,
        cmdline: &str,
        change: impl FnOnce(&mut Launch),
        more: &[File],
    ) -> Channel {
        let set = |launch: &mut Launch| {
            launch.cmdline = cmdline.to_owned();
            launch.vcpus = 1;
            launch.memory_bytes = 64 << 20;
            change(launch);
        };
        self.launch_kernel(set, more).expect("launched")
    }

    /// Launches what lies in the file `kernel`.
    pub(super) fn launch_as_is(
        &self,
        change: impl FnOnce(&mut Launch),
        more: &[File],
    ) -> Result<Channel, String> {
        self.launch_kernel(change, more)
    }

    fn launch_kernel(&self, change: impl FnOnce(&mut Launch), more: &[File]) -> Result<Channel, String> {
        let console = UnixListener::bind(self.path("console")).expect("bound");
        let kvm = File::options().read(true).write(true).open("/dev/kvm").expect("is there");
        let (kernel, log, exit) = (self.file("kernel"), self.file("log"), self.file("exit"));
        let mut fds: Vec<BorrowedFd<'_>> =
            vec![kvm.as_fd(), kernel.as_fd(), log.as_fd(), console.as_fd(), exit.as_fd()];
        fds.extend(more.iter().map(|file| file.as_fd()));
        let mut request = Bench::request();
        change(&mut request);
        let mut channel = self.connect();
        match channel.call(Body::Launch(request), &fds) {
            Ok(Body::Done(_)) => Ok(channel),
            Ok(other) => panic!("{other:?}"),
            Err(ChannelError::Refused(failed)) => Err(format!("{}: {}", failed.field, failed.message)),
            Err(error) => panic!("{error:?}"),
        }
    }

    pub(super) fn launch(&self, code: &[&[u8]]) -> Channel {
        self.launch_with(code, |_| {}, &[]).expect("launched")
    }

    /// Waits for the agent's end: then nobody has its files open.
    pub(super) fn agent_ended(&self) {
        self.agent.take().expect("asked once").ended();
    }

    /// The agent's end, and what it left behind: the exit record and the log.
    pub(super) fn finish(self) -> (EndRecord, String) {
        self.agent_ended();
        let record = std::fs::read(self.dir.path().join("exit")).expect("a record");
        let log = std::fs::read(self.dir.path().join("log")).unwrap_or_default();
        (EndRecord::decode(&*record).expect("a record"), String::from_utf8_lossy(&log).into_owned())
    }
}

pub(super) fn status(channel: &mut Channel) -> VmStatus {
    match channel.call(Body::Status(Empty {}), &[]).expect("answered") {
        Body::VmStatus(status) => status,
        other => panic!("{other:?}"),
    }
}

pub(super) fn done(channel: &mut Channel, body: Body) {
    assert!(matches!(channel.call(body, &[]).expect("done"), Body::Done(_)));
}

/// Waits for the event that says the VM is over.
pub(super) fn wait_end(channel: &mut Channel) -> VmStatus {
    loop {
        let event = match channel.take_event() {
            Some(event) => event,
            None => channel.receive().expect("told").0.body.expect("a body"),
        };
        if let Body::VmChanged(status) = event
            && status.state == i32::from(VmState::Ended)
        {
            return status;
        }
    }
}
