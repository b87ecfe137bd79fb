//! The processor: ports, device memory, time stamp, and the services of the CPL0 shim.
//!
//! Everything here runs at CPL3 (with all ports open); what needs more goes through `service_gate`. Device memory
//! is only touched by the plain moves below: a compiler's choice of instruction could be one that an
//! emulator does not know.

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU64, Ordering};

global_asm!(include_str!("boot.s"));
global_asm!(include_str!("interrupt.s"));

unsafe extern "C" {
    static interrupt_counts: [AtomicU64; 256];
    static interrupt_stubs: [u8; 4096];
    static mut idt: [[u32; 4]; 256];
    static fault_vector: AtomicU64;
    static fault_error: AtomicU64;
    static fault_rip: AtomicU64;
    static fault_cs: AtomicU64;
    static fault_address: AtomicU64;
    static x2apic_on: AtomicU64;
}

macro_rules! port {
    ($write:ident, $read:ident, $type:ty, $register:tt, $move_out:literal, $move_in:literal) => {
        /// Writes an I/O port.
        #[allow(dead_code, reason = "not every width is written")]
        pub fn $write(port: u16, value: $type) {
            // SAFETY: a port write touches no memory of ours.
            unsafe { asm!($move_out, in("dx") port, in($register) value, options(nostack, preserves_flags)) }
        }
        /// Reads an I/O port.
        #[allow(dead_code, reason = "not every width is read")]
        pub fn $read(port: u16) -> $type {
            let value;
            // SAFETY: a port read touches no memory of ours.
            unsafe { asm!($move_in, in("dx") port, out($register) value, options(nostack, preserves_flags)) }
            value
        }
    };
}
port!(outb, inb, u8, "al", "out dx, al", "in al, dx");
port!(outw, inw, u16, "ax", "out dx, ax", "in ax, dx");
port!(outl, inl, u32, "eax", "out dx, eax", "in eax, dx");

macro_rules! device_memory {
    ($write:ident, $read:ident, $type:ty, $class:ident, $store:literal, $load:literal) => {
        /// Writes device memory.
        pub fn $write(address: u64, value: $type) {
            // SAFETY: callers pass addresses of device windows, which alias no Rust object.
            unsafe { asm!($store, in(reg) address, in($class) value, options(nostack, preserves_flags)) }
        }
        /// Reads device memory.
        pub fn $read(address: u64) -> $type {
            let value;
            // SAFETY: as for the write.
            unsafe { asm!($load, in(reg) address, out($class) value, options(nostack, preserves_flags)) }
            value
        }
    };
}
device_memory!(write8, read8, u8, reg_byte, "mov [{0}], {1}", "mov {1}, [{0}]");
device_memory!(write16, read16, u16, reg, "mov [{0}], {1:x}", "mov {1:x}, [{0}]");
device_memory!(write32, read32, u32, reg, "mov [{0}], {1:e}", "mov {1:e}, [{0}]");
device_memory!(write64, read64, u64, reg, "mov [{0}], {1}", "mov {1}, [{0}]");

/// The time stamp counter.
pub fn tsc() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reads a counter.
    unsafe { asm!("lfence", "rdtsc", out("eax") low, out("edx") high, options(nostack, preserves_flags)) }
    (u64::from(high) << 32) | u64::from(low)
}

/// Stops this processor for good: the machine idles, the virtual machine stays.
pub fn stop() -> ! {
    // SAFETY: the service does not return.
    unsafe { asm!("call service_gate", in("r8") 5u64, options(noreturn)) }
}

/// Reads a model-specific register, or says that it faults.
pub fn read_msr(index: u32) -> Option<u64> {
    let (low, high, fault): (u32, u32, u64);
    // SAFETY: a fault inside the service goes on at `service_fault`, on the same CPL0 stack, which sets r9.
    unsafe {
        asm!("mov qword ptr [fault_fixup], offset service_fault", "xor r9d, r9d", "call service_gate",
            "mov qword ptr [fault_fixup], 0",
            inout("r8") 1u64 => _, out("r9") fault, in("ecx") index, out("eax") low, out("edx") high);
    }
    (fault == 0).then_some((u64::from(high) << 32) | u64::from(low))
}

/// Writes a model-specific register; false if that faults.
pub fn write_msr(index: u32, value: u64) -> bool {
    let fault: u64;
    // SAFETY: as `read_msr`.
    unsafe {
        asm!("mov qword ptr [fault_fixup], offset service_fault", "xor r9d, r9d", "call service_gate",
            "mov qword ptr [fault_fixup], 0",
            inout("r8") 2u64 => _, out("r9") fault, in("ecx") index, in("eax") value as u32,
            in("edx") (value >> 32) as u32);
    }
    fault == 0
}

/// CPUID as CPL0 sees it: `[eax, ebx, ecx, edx]`.
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let (a, b, c, d): (u32, u64, u32, u32);
    // SAFETY: rbx belongs to the compiler, so it is kept by hand.
    unsafe {
        asm!("mov r9, rbx", "call service_gate", "xchg r9, rbx", in("r8") 8u64, inout("eax") leaf => a,
            out("r9") b, inout("ecx") subleaf => c, out("edx") d);
    }
    [a, b as u32, c, d]
}

/// Sleeps until an interrupt, unless the count of `vector` is no longer `seen`.
pub fn wait_for_interrupt(vector: u8, seen: u64) {
    let counter = interrupt_counter(vector);
    // SAFETY: the service reads the counter and sleeps.
    unsafe { asm!("call service_gate", in("r8") 0u64, in("rdi") counter, in("rsi") seen) }
}

/// Lets interrupts in, or holds them back.
pub fn interrupts(on: bool) {
    let service = if on { 6u64 } else { 7 };
    // SAFETY: changes the interrupt flag only; handlers count and return.
    unsafe { asm!("call service_gate", in("r8") service) }
}

/// Drops cached translations.
pub fn flush_translations() {
    // SAFETY: reloads the same tables.
    unsafe { asm!("call service_gate", in("r8") 4u64, out("rax") _) }
}

/// How often `vector` has arrived.
pub fn interrupt_count(vector: u8) -> u64 {
    interrupt_counter(vector).load(Ordering::SeqCst)
}

fn interrupt_counter(vector: u8) -> &'static AtomicU64 {
    // SAFETY: a table of 256 counters in the shim, indexed by a u8.
    unsafe { &interrupt_counts[usize::from(vector)] }
}

/// Tells the interrupt stubs how to acknowledge: by register (x2APIC) or by memory.
pub fn acknowledge_by_register(on: bool) {
    // SAFETY: a word in the shim.
    unsafe { x2apic_on.store(u64::from(on), Ordering::SeqCst) }
}

/// Fills the interrupt table: every vector to its stub, software interrupts open to CPL3.
pub fn install_interrupt_table() {
    let stubs = (&raw const interrupt_stubs) as u64;
    for vector in 0..256u64 {
        let stub = stubs + vector * 16;
        let entry = [0x10 << 16 | (stub as u32 & 0xffff), (stub as u32 & 0xffff_0000) | 0xee00, 0, 0];
        // SAFETY: one processor, interrupts off; the table has 256 entries.
        unsafe { idt[vector as usize] = entry }
    }
}

/// Ends in a triple fault: the table is emptied, then an undefined instruction has nowhere to go.
pub fn triple_fault() -> ! {
    // SAFETY: the end.
    unsafe {
        asm!("call service_gate", in("r8") 3u64);
        idt = [[0; 4]; 256];
        asm!("ud2", options(noreturn))
    }
}

/// Where and why the last unexpected fault happened: vector, error, instruction, selector, address.
pub fn last_fault() -> [u64; 5] {
    // SAFETY: words in the shim, written by the fault stub before this runs.
    unsafe {
        [
            fault_vector.load(Ordering::SeqCst),
            fault_error.load(Ordering::SeqCst),
            fault_rip.load(Ordering::SeqCst),
            fault_cs.load(Ordering::SeqCst),
            fault_address.load(Ordering::SeqCst),
        ]
    }
}
