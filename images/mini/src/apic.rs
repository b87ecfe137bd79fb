//! Interrupt controllers: the local APIC (by memory or by registers, as the machine has it switched), the
//! IO-APIC, and starting other processors.

use crate::cpu;
use crate::mem::{self, Dma};
use core::sync::atomic::{AtomicBool, Ordering};

const LOCAL: u64 = 0xfee0_0000;
static X2APIC: AtomicBool = AtomicBool::new(false);

/// Vectors in use.
pub mod vector {
    /// The local timer.
    pub const TIMER: u8 = 0x30;
    /// Serial port.
    pub const SERIAL: u8 = 0x31;
    /// Between processors.
    pub const CALL: u8 = 0x32;
    /// First of those for devices.
    pub const DEVICE: u8 = 0x40;
}

unsafe extern "C" {
    static ap_trampoline: u8;
    static ap_trampoline_end: u8;
    static ap_online: core::sync::atomic::AtomicU64;
}

/// Reads a register of the local APIC (its offset in the memory page).
pub fn read(register: u32) -> u32 {
    if X2APIC.load(Ordering::Relaxed) {
        cpu::read_msr(0x800 + register / 16).unwrap_or(0) as u32
    } else {
        cpu::read32(LOCAL + u64::from(register))
    }
}

/// Writes a register of the local APIC.
pub fn write(register: u32, value: u32) {
    if X2APIC.load(Ordering::Relaxed) {
        cpu::write_msr(0x800 + register / 16, u64::from(value));
    } else {
        cpu::write32(LOCAL + u64::from(register), value);
    }
}

/// Switches the local APIC on as the machine has it, and lets interrupts in.
pub fn init() {
    mem::map(LOCAL, 4096);
    adopt_mode();
    // The two legacy controllers, if there are any, stay silent.
    cpu::outb(0x21, 0xff);
    cpu::outb(0xa1, 0xff);
    write(0x80, 0);
    write(0xf0, 0x1ff);
    cpu::interrupts(true);
}

fn adopt_mode() {
    let on = cpu::read_msr(0x1b).is_some_and(|base| base & 0x400 != 0);
    X2APIC.store(on, Ordering::Relaxed);
    cpu::acknowledge_by_register(on);
}

/// Whether the local APIC is in x2APIC mode.
pub fn is_x2apic() -> bool {
    X2APIC.load(Ordering::Relaxed)
}

/// Switches to x2APIC mode; false if the machine refuses.
pub fn enable_x2apic() -> bool {
    let Some(base) = cpu::read_msr(0x1b) else { return false };
    let done = cpu::write_msr(0x1b, base | 0xc00);
    adopt_mode();
    done && is_x2apic()
}

/// This processor's APIC id.
pub fn id() -> u32 {
    if is_x2apic() { read(0x20) } else { read(0x20) >> 24 }
}

/// One timer interrupt after so many nanoseconds (KVM's APIC bus runs at 1 GHz).
pub fn timer_after_ns(ns: u32) {
    write(0x3e0, 0b1011);
    write(0x320, u32::from(vector::TIMER));
    write(0x380, ns);
}

/// Sends an inter-processor interrupt: the low half of the command register and a destination.
pub fn send(command: u32, destination: u32) {
    if is_x2apic() {
        cpu::write_msr(0x830, u64::from(destination) << 32 | u64::from(command));
    } else {
        cpu::write32(LOCAL + 0x310, destination << 24);
        cpu::write32(LOCAL + 0x300, command);
    }
}

/// Copies the start code for other processors below 1 MiB; the answer is the page number to start them at.
pub fn place_trampoline() -> u32 {
    const PAGE: u64 = 8;
    let start = (&raw const ap_trampoline) as u64;
    let len = (&raw const ap_trampoline_end) as u64 - start;
    Dma::at(PAGE * 4096, 4096).copy_in(0, mem::bytes_at(start, len as usize));
    PAGE as u32
}

/// How many other processors have arrived.
pub fn others_online() -> u64 {
    // SAFETY: a counter in the shim.
    unsafe { ap_online.load(Ordering::SeqCst) }
}

/// Routes a line of the IO-APIC to a vector of this processor.
pub fn route_line(io_apic: u64, pin: u32, vector: u8, masked: bool) {
    mem::map(io_apic, 4096);
    let set = |register: u32, value: u32| {
        cpu::write32(io_apic, register);
        cpu::write32(io_apic + 16, value);
    };
    set(0x11 + 2 * pin, id() << 24);
    set(0x10 + 2 * pin, u32::from(vector) | u32::from(masked) << 16);
}
