//! `serio-vmm run`: a VM with its console on this terminal.
//!
//! One thread, this one, waits for everything: output of the guest, keys, signals, the end. A reset makes a new machine
//! from the same files, with the volumes still open, so that nobody else takes them in between.
//!
//! It opens what its command line names, and then seals itself as the process that seriod starts does: the guest may be
//! anybody's. Not with `--vsock`: a guest's connections go to sockets that are looked for by their names.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::Uid;
use serio_hv::Kvm;
use serio_sandbox::{Kind, Start};

use crate::agent::{DESCRIPTORS_MAX, THREADS_MAX};
use crate::boot::BootSource;
use crate::cli::{OnReset, RunArgs};
use crate::console::Output;
use crate::devices::{Devices, Files};
use crate::end::{End, EndSlot, chain};
use crate::machine::{self, Handle, MachineConfig, MachineError};
use crate::terminal::{Keys, RawTerminal, Wish};

/// Users of single processes that root starts by hand; seriod's own begin at another number.
const FIRST_UID: u32 = 0x7800_0000;
/// How often a guest that does not take its input is offered it again.
const INPUT_RETRY_MS: u16 = 20;

/// Why a VM could not be run, for its user.
#[derive(Debug, thiserror::Error)]
enum RunError {
    /// The host lacks what the CPU baseline has.
    #[error("cpu")]
    Baseline(#[from] serio_hv::MissingFeatures),
    #[error("{field} {path}: cannot open it")]
    Open {
        field: &'static str,
        path: String,
        #[source]
        source: std::io::Error,
    },
    #[error("memory: {}", too_much_memory(*.asked, *.total))]
    Memory { asked: u64, total: u64 },
    #[error(transparent)]
    Device(#[from] crate::devices::DeviceError),
    #[error(transparent)]
    Sandbox(#[from] serio_sandbox::SandboxError),
    #[error(transparent)]
    Kvm(#[from] serio_hv::OpenError),
    #[error("{}", field_prefix(.0))]
    Machine(#[source] MachineError),
    #[error("cannot {what}")]
    Host {
        what: &'static str,
        #[source]
        source: std::io::Error,
    },
}

/// What is wrong with a guest larger than its host, in whole MiB.
pub(crate) fn too_much_memory(asked_bytes: u64, total_bytes: u64) -> String {
    format!(
        "{} MiB are more than the {} MiB that this host has; ask for less",
        asked_bytes >> 20,
        total_bytes >> 20
    )
}

fn field_prefix(error: &MachineError) -> String {
    match error.field() {
        "" => "the VM could not be started".to_owned(),
        field => field.to_owned(),
    }
}

impl RunError {
    fn host<E: Into<std::io::Error>>(what: &'static str) -> impl FnOnce(E) -> RunError {
        move |source| RunError::Host { what, source: source.into() }
    }
}

/// Runs the VM to its end; says on standard error why, unless the guest powered off.
pub fn main(args: RunArgs) -> ExitCode {
    match run(args) {
        Ok(End::PowerOff) => ExitCode::SUCCESS,
        Ok(End::Reset) => ExitCode::SUCCESS,
        Ok(end) => {
            eprintln!("serio-vmm: {end}");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("serio-vmm: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn open(field: &'static str, path: &Path) -> Result<File, RunError> {
    let named = |source| RunError::Open { field, path: path.display().to_string(), source };
    let file = File::open(path).map_err(named)?;
    if file.metadata().map_err(named)?.is_dir() {
        return Err(named(std::io::ErrorKind::IsADirectory.into()));
    }
    Ok(file)
}

fn run(args: RunArgs) -> Result<End, RunError> {
    // Before any thread exists, so that all of them inherit the mask and signals arrive only at our descriptor.
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT] {
        signals.add(signal);
    }
    signals.thread_block().map_err(RunError::host("block signals"))?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
        .map_err(RunError::host("receive signals"))?;

    let files = Files::open(&args)?;
    let config = MachineConfig {
        vcpus: args.cpus,
        memory_bytes: args.memory.bytes(),
        boot: BootSource {
            kernel: open("kernel", &args.kernel)?,
            initrd: args.initrd.as_deref().map(|path| open("initrd", path)).transpose()?,
            cmdline: args.cmdline.clone(),
        },
        watchdog: args.watchdog,
        pages: args.pages,
    };
    let mut kvm = Kvm::open()?;
    if args.vsock.is_none() {
        seal()?;
    }
    check_memory(args.memory.bytes())?;
    let devices = Arc::new(Devices::of_files(&args, files)?);
    kvm.set_baseline(args.cpu)?;
    let stdin = std::io::stdin();
    let mut seat = Seat { raw: None, keys: Keys::default(), input_open: !args.no_serial_input, signals };
    loop {
        let end = seat.boot(&kvm, &config, &devices, &stdin)?;
        if end != End::Reset || args.on_reset == OnReset::Exit {
            return Ok(end);
        }
    }
}

/// Refuses what the host does not have at all: backing is lazy, so nothing else would notice before it is too late.
pub(crate) fn host_memory_bytes() -> Option<u64> {
    nix::sys::sysinfo::sysinfo().ok().map(|info| info.ram_total())
}

/// From here on the process is what it has open.
fn seal() -> Result<(), RunError> {
    let missing = serio_sandbox::seal_at_start(&Start {
        keep: None,
        uid: if Uid::effective().is_root() { serio_sandbox::own_uid(FIRST_UID) } else { 0 },
        descriptors_max: DESCRIPTORS_MAX,
        threads_max: THREADS_MAX,
        main: Kind::Run,
    })?;
    // Who is not root stays who it is: that is no news.
    let missing: Vec<&str> = missing.into_iter().filter(|what| *what != "a user of its own").collect();
    if !missing.is_empty() {
        eprintln!("serio-vmm: sealed, but for what this host did not allow: {}", missing.join(", "));
    }
    Ok(())
}

fn check_memory(asked: u64) -> Result<(), RunError> {
    match host_memory_bytes() {
        Some(total) if asked > total => Err(RunError::Memory { asked, total }),
        _ => Ok(()),
    }
}

/// The user's side: terminal, keys, signals. Stays over resets.
struct Seat {
    raw: Option<RawTerminal>,
    keys: Keys,
    /// Standard input may still bring something.
    input_open: bool,
    signals: SignalFd,
}

impl Seat {
    fn boot(
        &mut self,
        kvm: &Kvm,
        config: &MachineConfig,
        devices: &Arc<Devices>,
        stdin: &std::io::Stdin,
    ) -> Result<End, RunError> {
        let output = Arc::new(Output::new().map_err(RunError::host("make an eventfd"))?);
        let end = Arc::new(EndSlot::new().map_err(RunError::host("make an eventfd"))?);
        let machine =
            machine::boot(kvm, config, devices, output.clone(), end.clone()).map_err(RunError::Machine)?;
        // Only now: until here errors are told on a terminal as the user left it.
        if self.input_open && self.raw.is_none() {
            self.raw = RawTerminal::enter(stdin);
        }
        let waited = self.attend(machine.handle(), &output, &end, stdin);
        show(&output.take());
        output.close();
        if waited.is_err() {
            machine.handle().stop(End::Stopped);
        }
        let why = machine.join();
        waited?;
        Ok(why)
    }

    /// Passes bytes and signals until the VM is over.
    fn attend(
        &mut self,
        machine: &Handle,
        output: &Output,
        end: &EndSlot,
        stdin: &std::io::Stdin,
    ) -> Result<(), RunError> {
        loop {
            let room = machine.input_room();
            let listen = self.input_open && room > 0;
            let timeout = match self.input_open && room == 0 {
                true => PollTimeout::from(INPUT_RETRY_MS),
                false => PollTimeout::NONE,
            };
            let mut fds = vec![wait(output.as_fd()), wait(end.as_fd()), wait(self.signals.as_fd())];
            if listen {
                fds.push(wait(stdin.as_fd()));
            }
            match poll(&mut fds, timeout) {
                Err(nix::errno::Errno::EINTR) => continue,
                other => other.map_err(RunError::host("wait"))?,
            };
            let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
            drop(fds);
            let is = |index: usize| ready.get(index).copied().unwrap_or(false);
            if is(0) {
                show(&output.take());
            }
            if is(1) {
                return Ok(());
            }
            if is(2) && self.signals.read_signal().ok().flatten().is_some() {
                machine.stop(End::Stopped);
            }
            if is(3) {
                self.read_keys(machine, room);
            }
        }
    }

    fn read_keys(&mut self, machine: &Handle, room: usize) {
        let mut bytes = vec![0u8; room.min(1024)];
        // Not through `Stdin`: its buffer would hide bytes from poll.
        let count = nix::unistd::read(std::io::stdin(), &mut bytes).unwrap_or(0);
        if count == 0 {
            self.input_open = false;
            return;
        }
        bytes.truncate(count);
        if self.raw.is_none() {
            machine.type_in(&bytes);
            return;
        }
        let (bytes, wish) = self.keys.typed(&bytes);
        machine.type_in(&bytes);
        match wish {
            Some(Wish::Quit) => machine.stop(End::Stopped),
            // Its eventfd cannot be full: the kernel empties it at once.
            Some(Wish::PowerButton) => drop(machine.power_button()),
            None => {}
        }
    }
}

fn wait(fd: BorrowedFd<'_>) -> PollFd<'_> {
    PollFd::new(fd, PollFlags::POLLIN)
}

/// Shows the guest's output. Who closed our standard output does not want it; the guest runs on.
#[allow(clippy::disallowed_methods, reason = "a terminal: what was typed must be seen at once")]
fn show(bytes: &[u8]) {
    let mut stdout = std::io::stdout().lock();
    let _ = stdout.write_all(bytes);
    let _ = stdout.flush();
}
