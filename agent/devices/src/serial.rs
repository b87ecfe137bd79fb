//! COM1: a 16550 whose output goes to a [`SerialSink`] and whose input is fed as its small FIFO empties.
//! Its registers are those of vm-superio; nothing here knows where the bytes are shown or kept.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serio_hv::IrqLine;
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, SerialState, Trigger};

/// Typed bytes that may wait for the guest; more are dropped, as by a real line without flow control.
const INPUT_BYTES_MAX: usize = 4096;

/// Where a serial port's output goes. Called on vcpu threads, one byte at a time.
pub trait SerialSink: Send + Sync {
    /// The guest sent `byte`. May wait: the guest then waits, as on a slow line.
    fn push(&self, byte: u8);
}

/// Registers in a saved state.
const REGISTERS: usize = 9;

/// A serial port as it was.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SavedSerial {
    /// Divisor (low, high), interrupt enable, interrupt identification, line control, line status, modem control, modem
    /// status, scratch.
    pub registers: Vec<u8>,
    /// What the guest has not read of the FIFO.
    pub fifo: Vec<u8>,
    /// What waits behind it.
    pub input: Vec<u8>,
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

    /// A port that goes on where another one was saved. `None`: no port has such a state.
    pub fn restored(
        interrupt: IrqLine,
        output: Arc<dyn SerialSink>,
        saved: &SavedSerial,
    ) -> Option<SerialPort> {
        let registers = <[u8; REGISTERS]>::try_from(saved.registers.as_slice()).ok()?;
        let [low, high, enable, identification, line, line_status, modem, modem_status, scratch] = registers;
        let state = SerialState {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: enable,
            interrupt_identification: identification,
            line_control: line,
            line_status,
            modem_control: modem,
            modem_status,
            scratch,
            in_buffer: saved.fifo.clone(),
        };
        let uart = Serial::from_state(&state, Interrupt(interrupt), NoEvents, Sink(output)).ok()?;
        let input = saved.input.iter().copied().take(INPUT_BYTES_MAX).collect();
        Some(SerialPort { state: Mutex::new(State { uart, input }) })
    }

    /// Its registers, and what waits for the guest.
    pub fn save(&self) -> SavedSerial {
        let state = self.lock();
        let uart = state.uart.state();
        let registers = vec![
            uart.baud_divisor_low,
            uart.baud_divisor_high,
            uart.interrupt_enable,
            uart.interrupt_identification,
            uart.line_control,
            uart.line_status,
            uart.modem_control,
            uart.modem_status,
            uart.scratch,
        ];
        SavedSerial { registers, fifo: uart.in_buffer, input: state.input.iter().copied().collect() }
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
