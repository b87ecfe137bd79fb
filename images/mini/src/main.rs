//! The mini guest: a program that is its own operating system, and probes the machine it runs on.
//!
//! One ELF boots by PVH and by the Linux 64-bit entry. A small CPL0 shim (`boot.s`, `interrupt.s`) sets up long
//! mode and drops to CPL3, where all of this runs: on hosts whose KVM interprets CPL0, only CPL3 has native
//! speed. See README.md for the command line.

#![no_std]
#![no_main]

extern crate alloc;

mod acpi;
mod apic;
mod bench;
mod blk;
mod boot;
mod cases;
mod churn;
mod clock;
mod cpu;
mod grow;
mod mem;
mod modes;
mod multiqueue;
mod net;
mod pair;
mod pci;
mod plug;
mod port;
mod serial;
mod suite;
mod virtio;
mod writer;

/// Entered from the shim at CPL3, interrupts off, the first GiB mapped.
#[unsafe(no_mangle)]
extern "C" fn mini_main(kind: u32, info: u64) -> ! {
    cpu::install_interrupt_table();
    let boot = boot::read(kind, info);
    mem::map(0, 4 << 30);
    clock::init();
    modes::run(boot)
}

/// Entered from the shim at CPL3, on a stack of its own, after a fault that nobody expected.
#[unsafe(no_mangle)]
extern "C" fn mini_fault() -> ! {
    let [vector, error, at, selector, address] = cpu::last_fault();
    println!("mini: fault {vector} error {error:#x} at {selector:#x}:{at:#x} address {address:#x}");
    modes::give_up()
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo) -> ! {
    println!("mini: {info}");
    modes::give_up()
}
