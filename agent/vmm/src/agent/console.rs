//! Who sees what the guest prints: the log, and the clients of the console socket, who may also type.
//!
//! Nothing here blocks. A client that does not read is disconnected once it is [`BACKLOG_BYTES_MAX`] behind.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};

use nix::poll::{PollFd, PollFlags};
use nix::sys::socket::{MsgFlags, recv};

use super::log::SerialLog;
use crate::machine::Handle;

/// Clients at once.
const CLIENTS_MAX: usize = 16;
/// How far a client may be behind.
const BACKLOG_BYTES_MAX: usize = 256 * 1024;

/// All receivers of the output.
pub(super) struct ConsoleHub {
    listener: Option<UnixListener>,
    clients: Vec<Client>,
    log: SerialLog,
}

struct Client {
    stream: UnixStream,
    backlog: VecDeque<u8>,
    gone: bool,
}

impl ConsoleHub {
    pub(super) fn new(listener: Option<UnixListener>, log: Option<File>) -> ConsoleHub {
        ConsoleHub { listener, clients: Vec::new(), log: SerialLog::new(log) }
    }

    pub(super) fn has_clients(&self) -> bool {
        !self.clients.is_empty()
    }

    /// What to wait for: the listener, then each client. Keys only while the guest takes them (`room`).
    pub(super) fn interests(&self, room: bool) -> Vec<PollFd<'_>> {
        let listener = self.listener.iter().map(|l| PollFd::new(l.as_fd(), PollFlags::POLLIN));
        let clients = self.clients.iter().map(|client| {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::POLLIN, room);
            flags.set(PollFlags::POLLOUT, !client.backlog.is_empty());
            PollFd::new(client.stream.as_fd(), flags)
        });
        listener.chain(clients).collect()
    }

    /// Acts on what [`ConsoleHub::interests`] was told, in the same order.
    pub(super) fn attend(&mut self, ready: &[bool], machine: &Handle) {
        let first = usize::from(self.listener.is_some());
        for (client, _) in self.clients.iter_mut().zip(ready.iter().skip(first)).filter(|(_, ready)| **ready)
        {
            client.read(machine);
            client.push(&[]);
        }
        self.clients.retain(|client| !client.gone);
        if self.listener.is_some() && ready.first().copied().unwrap_or(false) {
            self.accept();
        }
    }

    /// Gives `bytes` to everyone.
    pub(super) fn spread(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.log.write(bytes);
        self.clients.iter_mut().for_each(|client| client.push(bytes));
        self.clients.retain(|client| !client.gone);
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) => return super::say(format_args!("a console client was not accepted: {error}")),
        };
        if self.clients.len() >= CLIENTS_MAX {
            return super::say(format_args!(
                "a console client was refused: {CLIENTS_MAX} are connected already"
            ));
        }
        match stream.set_nonblocking(true) {
            Ok(()) => self.clients.push(Client { stream, backlog: VecDeque::new(), gone: false }),
            Err(error) => super::say(format_args!("a console client was not accepted: {error}")),
        }
    }
}

impl Client {
    fn read(&mut self, machine: &Handle) {
        let mut bytes = vec![0u8; machine.input_room().min(1024)];
        if bytes.is_empty() {
            // No room for keys, so what woke us may be the client's end: see, without taking anything.
            let peeked = recv(self.stream.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT);
            self.gone |= peeked == Ok(0);
            return;
        }
        match self.stream.read(&mut bytes) {
            Ok(0) => self.gone = true,
            Ok(count) => machine.type_in(bytes.get(..count).unwrap_or_default()),
            Err(error) if is_transient(&error) => {}
            Err(_) => self.gone = true,
        }
    }

    /// Sends what waits, then `bytes`; keeps what the client does not take yet.
    fn push(&mut self, bytes: &[u8]) {
        self.backlog.extend(bytes);
        while !self.backlog.is_empty() {
            let (front, _) = self.backlog.as_slices();
            match self.stream.write(front) {
                Ok(0) => break,
                Ok(count) => drop(self.backlog.drain(..count)),
                Err(error) if is_transient(&error) => break,
                Err(_) => {
                    self.gone = true;
                    return;
                }
            }
        }
        if self.backlog.len() > BACKLOG_BYTES_MAX {
            super::say("a console client was disconnected: it did not read");
            self.gone = true;
        }
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
