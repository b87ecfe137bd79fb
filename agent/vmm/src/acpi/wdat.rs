//! The WDAT ("Hardware Watchdog Timers Design Specification", Microsoft 2006): a program of register accesses by which any
//! operating system drives a watchdog that it has no driver for.

use acpi_tables::Aml;
use acpi_tables::sdt::Sdt;

use super::{OEM, OEM_REVISION, OEM_TABLE};
use crate::layout;
use crate::machine::watchdog::{COUNT_MAX, COUNT_MIN, FORGET, PERIOD_MS, PET, RAN_OUT, RUNNING, START, STOP};

const HEADER_BYTES: u32 = 36;
/// The table's own header behind that, which says its length.
const WATCHDOG_HEADER_BYTES: u32 = 32;
const FLAG_ENABLED: u8 = 1;

/// What is done with a register.
#[derive(Clone, Copy)]
#[repr(u8)]
enum How {
    /// Reads it and compares.
    Compare = 0,
    /// Reads a number.
    ReadCount = 1,
    /// Writes a fixed value.
    Write = 2,
    /// Writes a number.
    WriteCount = 3,
}

const CONTROL: u16 = layout::WATCHDOG_PORT;
const COUNT: u16 = layout::WATCHDOG_PORT + 4;

/// Action, what it does, with which register, value, mask.
const PROGRAM: [(u8, How, u16, u32, u32); 11] = [
    (1, How::Write, CONTROL, PET, u32::MAX),       // reset the countdown
    (4, How::ReadCount, COUNT, 0, u32::MAX),       // what is left
    (5, How::ReadCount, COUNT, 0, u32::MAX),       // what it counts down from
    (6, How::WriteCount, COUNT, 0, u32::MAX),      // set that
    (8, How::Compare, CONTROL, RUNNING, RUNNING),  // is it running?
    (9, How::Write, CONTROL, START, u32::MAX),     // let it run
    (10, How::Compare, CONTROL, 0, RUNNING),       // is it stopped?
    (11, How::Write, CONTROL, STOP, u32::MAX),     // stop it
    (16, How::Compare, CONTROL, 0, 0),             // does it reboot? always
    (32, How::Compare, CONTROL, RAN_OUT, RAN_OUT), // did it run out before this boot?
    (33, How::Write, CONTROL, FORGET, u32::MAX),   // forget that
];

/// Builds the table.
pub(super) fn wdat() -> impl Aml {
    let mut body = Vec::with_capacity(320);
    body.extend(WATCHDOG_HEADER_BYTES.to_le_bytes());
    // No PCI device: segment, bus, device, function, reserved.
    body.extend([0xff, 0, 0xff, 0xff, 0xff, 0, 0, 0]);
    for value in [PERIOD_MS, COUNT_MAX, COUNT_MIN] {
        body.extend(value.to_le_bytes());
    }
    body.extend([FLAG_ENABLED, 0, 0, 0]);
    body.extend((PROGRAM.len() as u32).to_le_bytes());
    for (action, how, port, value, mask) in PROGRAM {
        body.extend([action, how as u8, 0, 0]);
        // A generic address (ACPI 6.5 §5.2.3.2): system I/O, 32 bits wide from bit 0, accessed as doublewords.
        body.extend([1, 32, 0, 3]);
        body.extend(u64::from(port).to_le_bytes());
        body.extend(value.to_le_bytes());
        body.extend(mask.to_le_bytes());
    }
    let mut sdt = Sdt::new(*b"WDAT", HEADER_BYTES, 1, OEM, OEM_TABLE, OEM_REVISION);
    sdt.append_slice(&body);
    sdt
}
