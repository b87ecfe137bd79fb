//! `serio-vmm agent`: a VM for `seriod`, driven over its control socket.
//!
//! ```text
//!   control listener ──► a thread a connection ──► requests ──► State (lock) ──► the running VM
//!   this thread: output → log, console clients · keys → VM · end → reboot or exit record · deadline of the Launch
//! ```
//!
//! - The process seals itself first of all; everything the VM uses arrives as descriptors with `Launch`.
//! - A client that vanishes, talks garbage or is slow costs its connection, never the VM. Nothing here blocks on a
//!   client but that client's own thread, and that for a bounded time.
//! - The process ends in one of three ways: with its VM (an exit record is written first), without ever having got a
//!   `Launch`, or killed.

mod connection;
mod console;
mod counters;
mod cut;
mod launch;
mod limits;
mod log;
mod merge;
mod plug;
mod requests;
mod save;
mod state;

#[cfg(test)]
mod agent_test;
#[cfg(test)]
mod bench;
#[cfg(test)]
mod counters_test;
#[cfg(test)]
mod cut_test;
#[cfg(test)]
mod diff_test;
#[cfg(test)]
mod merge_test;
#[cfg(test)]
mod mini_test;
#[cfg(test)]
mod net_test;
#[cfg(test)]
mod plug_test;
#[cfg(test)]
mod save_test;
#[cfg(test)]
mod sealed_test;

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use serio_control::LAUNCH_WAIT;
use serio_control::message::{EndKind, EndRecord, OnReset};

use serio_sandbox::{Kind, Start};

use crate::cli::AgentArgs;
use crate::end::{End, chain};
use crate::machine::hotplug::REMIND;
use connection::Connections;
use console::ConsoleHub;
use launch::Launched;
use state::State;

/// What a VM may have open: its devices' files, eventfds and queues, with room to spare.
pub(crate) const DESCRIPTORS_MAX: u64 = 4096;
/// Vcpus, and a few for each device.
pub(crate) const THREADS_MAX: u64 = 1024;
/// How long connections have at the end to send their last event.
const FAREWELL: Duration = Duration::from_millis(500);
/// How often a guest that does not take its input is offered it again.
const INPUT_RETRY_MS: u16 = 20;

/// Why the process cannot do its work at all.
#[derive(Debug, thiserror::Error)]
enum AgentError {
    #[error(transparent)]
    Sandbox(#[from] serio_sandbox::SandboxError),
    #[error("cannot {what}")]
    Host {
        what: &'static str,
        #[source]
        source: std::io::Error,
    },
}

impl AgentError {
    fn host<E: Into<std::io::Error>>(what: &'static str) -> impl FnOnce(E) -> AgentError {
        move |source| AgentError::Host { what, source: source.into() }
    }
}

/// A line in the process' own log, which is its standard error.
fn say(line: impl std::fmt::Display) {
    eprintln!("serio-vmm: {line}");
}

/// Serves one VM to its end.
pub fn main(args: &AgentArgs) -> ExitCode {
    match start(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn start(args: &AgentArgs) -> Result<(), AgentError> {
    let listener = UnixListener::from(serio_sandbox::take_descriptor(args.control_fd)?);
    let missing = serio_sandbox::seal_at_start(&Start {
        keep: Some(&[args.control_fd]),
        uid: serio_sandbox::own_uid(args.first_uid),
        descriptors_max: DESCRIPTORS_MAX,
        threads_max: THREADS_MAX,
        main: Kind::Agent,
    })?;
    if !missing.is_empty() {
        say(format_args!("sealed, but for what this host did not allow: {}", missing.join(", ")));
    }
    serve(listener)
}

/// The life of the process behind its control socket.
fn serve(listener: UnixListener) -> Result<(), AgentError> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        signals.add(signal);
    }
    // Before any other thread exists: all of them inherit it.
    signals.thread_block().map_err(AgentError::host("block signals"))?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
        .map_err(AgentError::host("receive signals"))?;
    listener.set_nonblocking(true).map_err(AgentError::host("use the control socket"))?;
    let state = Arc::new(State::new().map_err(AgentError::host("make an eventfd"))?);
    let mut agent =
        Agent { listener, signals, connections: Connections::new(state.clone()), state, vm: None };
    let result = agent.attend();
    agent.connections.wait_all(FAREWELL);
    result
}

/// What the main thread owns.
struct Agent {
    listener: UnixListener,
    signals: SignalFd,
    connections: Connections,
    state: Arc<State>,
    vm: Option<Vm>,
}

/// The VM, once launched.
struct Vm {
    launched: Launched,
    console: ConsoleHub,
    /// When the guest is told again of devices that it has not looked at.
    remind_at: Option<Instant>,
}

/// What woke the main thread.
#[derive(Default)]
struct Ready {
    wake: bool,
    listener: bool,
    signal: bool,
    output: bool,
    end: bool,
    troubles: bool,
    console: Vec<bool>,
}

impl Agent {
    fn attend(&mut self) -> Result<(), AgentError> {
        let deadline = Instant::now() + LAUNCH_WAIT;
        loop {
            if let Some(vm) = &mut self.vm
                && vm.remind_at.is_none()
                && vm.launched.handle().is_reminding()
            {
                vm.remind_at = Some(Instant::now() + REMIND);
            }
            let ready = self.wait(deadline)?;
            if ready.listener {
                self.connections.accept(&self.listener);
            }
            if ready.wake {
                self.state.clear_wake();
                self.adopt();
            }
            if ready.signal && self.signals.read_signal().ok().flatten().is_some() {
                say("asked to end by a signal");
                self.state.stop(End::Stopped);
            }
            if let Some(vm) = &mut self.vm {
                if ready.output {
                    vm.console.spread(&vm.launched.output.take());
                }
                vm.console.attend(&ready.console, &vm.launched.handle());
                if vm.remind_at.is_some_and(|at| Instant::now() >= at) {
                    vm.launched.handle().remind();
                    vm.remind_at = None;
                }
                if ready.troubles {
                    let _ = vm.launched.troubles.read();
                    self.state.changed();
                }
            }
            if ready.end {
                self.ended();
            }
            if self.state.is_over() {
                return Ok(());
            }
            if self.vm.is_none() && Instant::now() >= deadline && self.state.give_up_waiting() {
                say("no Launch came in time: ending");
                return Ok(());
            }
        }
    }

    fn wait(&self, deadline: Instant) -> Result<Ready, AgentError> {
        let mut fds = vec![
            readable(self.state.wake()),
            readable(self.listener.as_fd()),
            readable(self.signals.as_fd()),
        ];
        let mut timeout = PollTimeout::NONE;
        match &self.vm {
            Some(vm) => {
                let room = vm.launched.handle().input_room() > 0;
                fds.push(readable(vm.launched.output.as_fd()));
                fds.push(readable(vm.launched.end.as_fd()));
                fds.push(readable(vm.launched.troubles.as_fd()));
                fds.extend(vm.console.interests(room));
                if !room && vm.console.has_clients() {
                    timeout = PollTimeout::from(INPUT_RETRY_MS);
                } else if let Some(at) = vm.remind_at {
                    let left = at.saturating_duration_since(Instant::now()).as_millis().saturating_add(1);
                    timeout = PollTimeout::from(u16::try_from(left).unwrap_or(u16::MAX));
                }
            }
            None => {
                let left = deadline.saturating_duration_since(Instant::now()).as_millis().saturating_add(1);
                timeout = PollTimeout::from(u16::try_from(left).unwrap_or(u16::MAX));
            }
        }
        match poll(&mut fds, timeout) {
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(Ready::default()),
            Err(error) => return Err(AgentError::host("wait")(error)),
        }
        let mut ready = fds.iter().map(|fd| fd.any().unwrap_or(false));
        let mut next = || ready.next().unwrap_or(false);
        let (wake, listener, signal, output) = (next(), next(), next(), next());
        let (end, troubles) = (next(), next());
        Ok(Ready { wake, listener, signal, output, end, troubles, console: ready.collect() })
    }

    /// Takes over what a `Launch` has started.
    fn adopt(&mut self) {
        if let Some(mut launched) = self.state.take_launched() {
            let console = ConsoleHub::new(launched.console.take(), launched.log.take());
            self.vm = Some(Vm { launched, console, remind_at: None });
        }
    }

    /// The vcpus are at their end, or about to be: boots again, or finishes.
    fn ended(&mut self) {
        let Some(vm) = &mut self.vm else { return };
        vm.console.spread(&vm.launched.output.take());
        // A vcpu that waits for room in its output shall not wait for us.
        vm.launched.output.close();
        let again = vm.launched.on_reset == OnReset::Reboot;
        if !(again && vm.launched.end.get() == Some(End::Reset)) {
            // I/O that a held volume keeps from ending would keep the machine from ending.
            self.state.cuts().abandon(&vm.launched.devices);
            self.state.merges().abandon();
        }
        let end = vm.launched.join();
        vm.console.spread(&vm.launched.output.take());
        let mut record = end.record();
        if end == End::Reset && again {
            // Nothing comes between the machine that is over and the next one.
            let _alone = self.state.plugging();
            match vm.launched.boot_again() {
                Ok(handle) => {
                    say("the guest was reset and boots again");
                    self.state.rebooted(handle);
                    return;
                }
                Err(error) => {
                    let reason = format!("the guest could not boot again: {}", chain(&error));
                    record = EndRecord { kind: EndKind::HostError.into(), reason };
                }
            }
        }
        say(format_args!("the VM is over: {}", record.reason));
        launch::write_exit_record(&vm.launched.exit, &record);
        self.state.ended(record);
    }
}

fn readable(fd: BorrowedFd<'_>) -> PollFd<'_> {
    PollFd::new(fd, PollFlags::POLLIN)
}
