//! Bus 0: finds the function behind an ECAM or a BAR access.
//!
//! One function a device number, function number 0 only; the host bridge is device 0. Called from all vcpu
//! threads: each device number has its own lock, and a small table says where each BAR lies. Functions come and go while
//! the guest runs: a device number without one reads as ones.
//!
//! Lock order: homes, then device number, then table. A BAR access reads the table, lets it go, locks the function and asks
//! it again, because the guest may have moved the BAR in between.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};

use super::host_bridge::HostBridge;
use crate::state::{BusRestoreError, BusSuspendError, FunctionState, RestoreError, SuspendError};

/// Device numbers of a bus.
const DEVICES: usize = 32;
/// Bytes of a function's space in ECAM.
const FUNCTION_BYTES: u64 = 4096;

/// One PCI function, called under its lock.
pub trait PciFunction: Send {
    /// Reads configuration space.
    fn config_read(&mut self, offset: u16, out: &mut [u8]);
    /// Writes configuration space.
    fn config_write(&mut self, offset: u16, data: &[u8]);
    /// Bytes of BAR 0; 0: there is none.
    fn bar_size(&self) -> u32;
    /// Sets where BAR 0 lies after a reset.
    fn place_bar(&mut self, address: u32);
    /// The range that BAR 0 answers to now.
    fn decoded(&self) -> Option<Range<u64>>;
    /// Reads in BAR 0.
    fn bar_read(&mut self, offset: u64, out: &mut [u8]);
    /// Writes in BAR 0.
    fn bar_write(&mut self, offset: u64, data: &[u8]);
    /// The machine was reset: as after power-on.
    fn reset(&mut self);
    /// Stops so that [`PciFunction::resume`] goes on where it was. Twice is once.
    fn suspend(&mut self) -> Result<(), SuspendError>;
    /// Goes on, if it is suspended.
    fn resume(&mut self);
    /// All it remembers. Asked while it is suspended.
    fn save(&self) -> FunctionState;
    /// Takes over what was saved, after power-on; it is suspended then.
    fn restore(&mut self, state: &FunctionState) -> Result<(), RestoreError>;
    /// What does not work, if something does not.
    fn failure(&self) -> Option<Failure> {
        None
    }
}

/// A device that does not work until its driver resets it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Its number on the bus.
    pub slot: usize,
    /// The device type (virtio 1.2 §5).
    pub device_id: u16,
    /// Why.
    pub reason: String,
}

/// A function could not be put on the bus.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    /// All device numbers are taken.
    #[error("the PCI bus is full: a VM has at most {} devices", DEVICES - 1)]
    Full,
    /// It is no number for a device, or another device has it.
    #[error("there is no place for a device at 00:{slot:02x}.0")]
    Taken {
        /// The device number.
        slot: u8,
    },
    /// The window has no room for the BAR.
    #[error("the PCI window {window:#x?} has no room for {size:#x} more bytes")]
    Window {
        /// The window of the bus.
        window: Range<u32>,
        /// What was asked for.
        size: u32,
    },
}

type Slot = Option<Box<dyn PciFunction>>;

/// The root bus with its functions.
pub struct PciBus {
    slots: [Mutex<Slot>; DEVICES],
    decoded: RwLock<[Option<Range<u64>>; DEVICES]>,
    /// Where the BAR of each function lies after a reset.
    homes: Mutex<[Option<Range<u32>>; DEVICES]>,
    window: Range<u32>,
}

impl PciBus {
    /// A bus with its host bridge. BARs are placed in `window`, below 4 GiB; the guest may move them.
    #[must_use]
    pub fn new(window: Range<u32>) -> Self {
        let bridge =
            |slot| -> Slot { (slot == 0).then(|| Box::new(HostBridge::new()) as Box<dyn PciFunction>) };
        Self {
            slots: std::array::from_fn(|slot| Mutex::new(bridge(slot))),
            decoded: RwLock::default(),
            homes: Mutex::default(),
            window,
        }
    }

    /// Puts a function on the first free device number, and returns this number.
    pub fn add(&self, function: Box<dyn PciFunction>) -> Result<u8, BusError> {
        let free = (0u8..).zip(&self.slots).find(|(_, slot)| lock(slot).is_none());
        let (slot, _) = free.ok_or(BusError::Full)?;
        self.insert(slot, function)?;
        Ok(slot)
    }

    /// Puts a function on that device number, as after power-on.
    pub fn insert(&self, slot: u8, mut function: Box<dyn PciFunction>) -> Result<(), BusError> {
        let taken = BusError::Taken { slot };
        let index = usize::from(slot);
        let mut homes = self.homes.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(mut place) = self.slots.get(index).map(lock).filter(|place| place.is_none()) else {
            return Err(taken);
        };
        let size = function.bar_size();
        if size > 0 {
            let home = self.room(&homes[..], size)?;
            function.place_bar(home.start);
            if let Some(entry) = homes.get_mut(index) {
                *entry = Some(home);
            }
        }
        self.note(index, function.decoded());
        *place = Some(function);
        Ok(())
    }

    /// Takes a function off the bus. Stopping it, which its end does, is left to the caller.
    pub fn remove(&self, slot: u8) -> Option<Box<dyn PciFunction>> {
        let index = usize::from(slot);
        let mut homes = self.homes.lock().unwrap_or_else(PoisonError::into_inner);
        let function = lock(self.slots.get(index)?).take()?;
        self.note(index, None);
        if let Some(home) = homes.get_mut(index) {
            *home = None;
        }
        Some(function)
    }

    /// The first aligned place in the window that no BAR has as its home.
    fn room(&self, homes: &[Option<Range<u32>>], size: u32) -> Result<Range<u32>, BusError> {
        let full = || BusError::Window { window: self.window.clone(), size };
        let mut from = self.window.start;
        loop {
            let start = from.checked_next_multiple_of(size).ok_or_else(full)?;
            let end = start.checked_add(size).filter(|end| *end <= self.window.end).ok_or_else(full)?;
            match homes.iter().flatten().find(|home| home.start < end && start < home.end) {
                None => return Ok(start..end),
                // Further with each round, and there are few.
                Some(home) => from = home.end,
            }
        }
    }

    /// How many functions there are, the host bridge included.
    pub fn functions(&self) -> usize {
        self.slots.iter().filter(|slot| lock(slot).is_some()).count()
    }

    /// Reads ECAM at `offset` from its start. What is not there reads as ones.
    pub fn ecam_read(&self, offset: u64, out: &mut [u8]) {
        out.fill(0xff);
        if let Some((slot, register)) = self.at(offset, out.len()) {
            self.with(slot, |function| function.config_read(register, out));
        }
    }

    /// Writes ECAM at `offset` from its start.
    pub fn ecam_write(&self, offset: u64, data: &[u8]) {
        if let Some((slot, register)) = self.at(offset, data.len()) {
            self.with(slot, |function| {
                function.config_write(register, data);
                self.note(slot, function.decoded());
            });
        }
    }

    /// Reads guest physical memory at `address`. `false`: no BAR is there, `out` is left alone.
    pub fn mmio_read(&self, address: u64, out: &mut [u8]) -> bool {
        self.access(address, |function, offset| function.bar_read(offset, out))
    }

    /// Writes guest physical memory at `address`. `false`: no BAR is there.
    pub fn mmio_write(&self, address: u64, data: &[u8]) -> bool {
        self.access(address, |function, offset| function.bar_write(offset, data))
    }

    /// The machine was reset: all devices stop, all registers are as after power-on.
    pub fn reset(&self) {
        for slot in 0..DEVICES {
            self.with(slot, |function| {
                function.reset();
                self.note(slot, function.decoded());
            });
        }
    }

    /// Stops all devices when what was asked of them is done. No vcpu may run. After an error some are stopped, some not:
    /// [`PciBus::resume`] sets all in motion that can be.
    pub fn suspend(&self) -> Result<(), BusSuspendError> {
        self.each(|slot, function| function.suspend().map_err(|source| BusSuspendError { slot, source }))
    }

    /// Lets suspended devices go on.
    pub fn resume(&self) {
        let _: Result<(), std::convert::Infallible> = self.each(|_, function| {
            function.resume();
            Ok(())
        });
    }

    /// The devices that do not work. A device that is being reset is waited for.
    pub fn failures(&self) -> Vec<Failure> {
        let mut failures = Vec::new();
        let _: Result<(), std::convert::Infallible> = self.each(|slot, function| {
            failures.extend(function.failure().map(|failure| Failure { slot, ..failure }));
            Ok(())
        });
        failures
    }

    /// The state of all functions that there are, in the order of their numbers. Only while suspended.
    pub fn save(&self) -> Vec<FunctionState> {
        let mut states = Vec::with_capacity(DEVICES);
        let _: Result<(), std::convert::Infallible> = self.each(|_, function| {
            states.push(function.save());
            Ok(())
        });
        states
    }

    /// Gives all functions of a new bus what was saved. They are suspended then; after an error the bus is of no use.
    pub fn restore(&self, states: &[FunctionState]) -> Result<(), BusRestoreError> {
        let (saved, made) = (states.len(), self.functions());
        if saved != made {
            return Err(BusRestoreError::Count { saved, made });
        }
        let mut states = states.iter();
        self.each(|slot, function| {
            let Some(state) = states.next() else { return Ok(()) };
            function.restore(state).map_err(|source| BusRestoreError::Function { slot, source })?;
            self.note(slot, function.decoded());
            Ok(())
        })
    }

    fn each<E>(&self, mut act: impl FnMut(usize, &mut dyn PciFunction) -> Result<(), E>) -> Result<(), E> {
        self.slots.iter().enumerate().try_for_each(|(slot, place)| match &mut *lock(place) {
            Some(function) => act(slot, &mut **function),
            None => Ok(()),
        })
    }

    /// Still under the function's lock, so that the table never falls behind.
    fn note(&self, slot: usize, range: Option<Range<u64>>) {
        let mut decoded = self.decoded.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = decoded.get_mut(slot) {
            *entry = range;
        }
    }

    fn at(&self, offset: u64, len: usize) -> Option<(usize, u16)> {
        let number = usize::try_from(offset / FUNCTION_BYTES).ok()?;
        // Bus, device and function number in one: only function 0 of bus 0 exists.
        let slot = number.checked_div(8).filter(|slot| number.is_multiple_of(8) && *slot < DEVICES)?;
        let register = offset % FUNCTION_BYTES;
        let end = register.checked_add(u64::try_from(len).ok()?)?;
        (end <= FUNCTION_BYTES).then_some((slot, u16::try_from(register).ok()?))
    }

    fn with(&self, slot: usize, act: impl FnOnce(&mut dyn PciFunction)) {
        if let Some(function) = self.slots.get(slot).map(lock).as_deref_mut().and_then(Option::as_mut) {
            act(&mut **function);
        }
    }

    fn access(&self, address: u64, act: impl FnOnce(&mut dyn PciFunction, u64)) -> bool {
        let slot = {
            let decoded = self.decoded.read().unwrap_or_else(PoisonError::into_inner);
            decoded.iter().position(|range| range.as_ref().is_some_and(|range| range.contains(&address)))
        };
        let mut answered = false;
        if let Some(slot) = slot {
            self.with(slot, |function| {
                let range = function.decoded().filter(|range| range.contains(&address));
                if let Some(offset) = range.and_then(|range| address.checked_sub(range.start)) {
                    act(function, offset);
                    answered = true;
                }
            });
        }
        answered
    }
}

/// A function is whole after each call, and a panic ends the process anyway.
fn lock(slot: &Mutex<Slot>) -> MutexGuard<'_, Slot> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}
