//! COM1: a 16550 whose output goes to a [`SerialSink`] and whose input is fed as its small FIFO empties.
//! Its registers are those of vm-superio; nothing here knows where the bytes are shown or kept.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serio_hv::IrqLine;
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};

/// Typed bytes that may wait for the guest; more are dropped, as by a real line without flow control.
const INPUT_BYTES_MAX: usize = 4096;

/// Where a serial port's output goes. Called on vcpu threads, one byte at a time.
pub trait SerialSink: Send + Sync {
    /// The guest sent `byte`. May wait: the guest then waits, as on a slow line.
    fn push(&self, byte: u8);
}

/// The serial port.
pub struct SerialPort {
    state: Mutex<State>,
}

struct State {
    uart: Serial<Interrupt, NoEvents, Sink>,
    input: VecDeque<u8>,
}

struct Interrupt(IrqLine);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.trigger()
    }
}

struct Sink(Arc<dyn SerialSink>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        bytes.iter().for_each(|byte| self.0.push(*byte));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl SerialPort {
    /// A port with its interrupt and its output.
    pub fn new(interrupt: IrqLine, output: Arc<dyn SerialSink>) -> SerialPort {
        let uart = Serial::new(Interrupt(interrupt), Sink(output));
        SerialPort { state: Mutex::new(State { uart, input: VecDeque::new() }) }
    }

    /// The guest reads register `offset`.
    pub fn read(&self, offset: u8) -> u8 {
        let mut state = self.lock();
        let value = state.uart.read(offset);
        state.feed();
        value
    }

    /// The guest writes register `offset`.
    pub fn write(&self, offset: u8, value: u8) {
        let mut state = self.lock();
        // What can fail is the interrupt (the VM is going away) or a full loop-back FIFO: a byte lost on the line.
        let _ = state.uart.write(offset, value);
        state.feed();
    }

    /// Somebody typed. Bytes beyond what may wait are dropped.
    pub fn type_in(&self, bytes: &[u8]) {
        let mut state = self.lock();
        let room = INPUT_BYTES_MAX.saturating_sub(state.input.len());
        state.input.extend(bytes.iter().take(room));
        state.feed();
    }

    /// How many bytes may be typed now without losing one.
    pub fn input_room(&self) -> usize {
        INPUT_BYTES_MAX.saturating_sub(self.lock().input.len())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Moves waiting input into the FIFO, as much as fits.
    fn feed(&mut self) {
        let room = self.uart.fifo_capacity().min(self.input.len());
        if room == 0 {
            return;
        }
        let bytes: Vec<u8> = self.input.iter().copied().take(room).collect();
        // In loop-back mode nothing is taken; the bytes stay for later.
        if let Ok(taken) = self.uart.enqueue_raw_bytes(&bytes) {
            self.input.drain(..taken.min(room));
        }
    }
}
