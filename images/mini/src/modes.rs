//! What the command line asks for: cases, a measurement, or one of the modes with which others test their
//! handling of a guest.

use crate::acpi::{self, Acpi};
use crate::boot::Boot;
use crate::mem::Dma;
use crate::pci::Bus;
use crate::suite::{self, Machine};
use crate::{
    apic, bench, blk, cases, churn, clock, cpu, grow, mem, multiqueue, net, pair, plug, println, serial,
    virtio, writer,
};

/// Does what the command line asks for, then powers off.
pub fn run(boot: Boot) -> ! {
    let test = alloc::string::String::from(boot.option("mini.test").unwrap_or("all"));
    if boot.option("mini.bench") == Some("first") {
        cpu::stop()
    }
    println!("mini: started by {:?}, {}", boot.protocol, boot.cmdline);
    match test.as_str() {
        "triple" => {
            println!("mini: triple fault");
            cpu::triple_fault()
        }
        "spin" => {
            println!("mini: spinning");
            loop {
                core::hint::spin_loop();
            }
        }
        "halt" => {
            println!("mini: halted");
            cpu::stop()
        }
        _ => {}
    }
    if let Some(ms) = boot.number("mini.wait_ms") {
        virtio::set_patience(ms);
    }
    apic::init();
    let acpi = acpi::find(&boot);
    let ecam = boot.number("mini.ecam");
    let bus = acpi.as_ref().and_then(|acpi| Bus::enumerate(acpi, ecam));
    let mut machine = Machine { boot, acpi, bus };
    match test.as_str() {
        "poweroff" => {}
        "heartbeat" => heartbeat(),
        "writer" => writer::run(&machine),
        "pair" => pair::run(&mut machine),
        "multiqueue" => multiqueue::run(&mut machine),
        "churn" => churn::run(&mut machine),
        "grow" => grow::run(&mut machine),
        "plug" => plug::run(&mut machine),
        "echo" => echo(),
        "memory" => memory(&machine),
        "cable" => cable(&machine),
        "reset" => reset_once(&mut machine),
        _ => match machine.boot.option("mini.bench").map(alloc::string::String::from) {
            Some(choice) => bench::run(&mut machine, &choice),
            None if test.starts_with("hostile") => {
                cases::hostile::run(&mut machine, &test);
            }
            None => {
                suite::run(&mut machine, &test);
            }
        },
    }
    println!("mini: power off");
    power_off(machine.acpi.as_ref())
}

fn power_off(acpi: Option<&Acpi>) -> ! {
    if let Some(acpi) = acpi {
        acpi.power_off();
        clock::delay_us(500_000);
    }
    println!("mini: no power-off, the processor stops");
    cpu::stop()
}

/// Something went wrong in the guest itself: its last line says what; the machine is reset, or stops.
pub fn give_up() -> ! {
    println!("mini: gave up");
    cpu::triple_fault()
}

/// A line each 100 ms for ever: a counter that shows whether the guest was stopped or started again.
fn heartbeat() -> ! {
    let start = clock::now_ns();
    for count in 1u64.. {
        sleep_until(start + count * 100_000_000);
        println!("heartbeat {count} {} ms", (clock::now_ns() - start) / 1_000_000);
    }
    cpu::stop()
}

/// Leaves the processor to others until the clock says `end_ns`.
pub fn sleep_until(end_ns: u64) {
    while clock::now_ns() < end_ns {
        let seen = cpu::interrupt_count(apic::vector::TIMER);
        apic::timer_after_ns(5_000_000);
        cpu::wait_for_interrupt(apic::vector::TIMER, seen);
    }
}

/// Takes all its memory, a MiB each 20 ms (`mini.pace_ms`), and says so.
fn memory(machine: &Machine) {
    const MIB: u64 = 1 << 20;
    let pace_ns = machine.boot.number("mini.pace_ms").unwrap_or(20) * 1_000_000;
    let mut taken = 0u64;
    for range in machine.boot.ram() {
        let start = range.start.max(mem::heap_end()).next_multiple_of(MIB);
        for at in (start..(range.start + range.len).min(4 << 30)).step_by(MIB as usize) {
            if at + MIB > range.start + range.len {
                break;
            }
            (0..MIB).step_by(4096).for_each(|page| cpu::write64(at + page, !at));
            taken += 1;
            println!("memory: {taken} MiB");
            sleep_until(clock::now_ns() + pace_ns);
        }
    }
    println!("memory: all");
    cpu::stop()
}

/// Uses the first network card for ever, and says when its link changes.
fn cable(machine: &Machine) {
    let function = machine.bus.as_ref().and_then(|bus| bus.virtio(1).first().copied());
    let nic =
        function.ok_or_else(|| "there is none".into()).and_then(|function| net::Nic::open(function, 64));
    let nic = match nic {
        Ok(nic) => nic,
        Err(reason) => return println!("cable: {reason}"),
    };
    let mut shown = None;
    loop {
        let up = nic.link_is_up();
        if shown != Some(up) {
            println!("cable: {}", if up { "up" } else { "down" });
            shown = Some(up);
        }
        sleep_until(clock::now_ns() + 20_000_000);
    }
}

/// Sends serial input back, until an end-of-transmission byte.
fn echo() {
    println!("mini: echo");
    loop {
        if cpu::inb(0x3f8 + 5) & 1 == 0 {
            core::hint::spin_loop();
            continue;
        }
        match cpu::inb(0x3f8) {
            4 => return,
            byte => serial::put(byte),
        }
    }
}

/// Resets the machine the first time, goes on the second. What tells them apart is a word on the first disk
/// or, without one, in RAM.
fn reset_once(machine: &mut Machine) {
    const MARK: u64 = 0x7365_7269_6f21_7273;
    let place = Dma::new(512);
    let disk = machine.bus.as_ref().and_then(|bus| bus.virtio(2).first().copied());
    let mut disk = disk.and_then(|function| blk::Disk::open(function, 16).ok());
    let low = Dma::at(0x9000, 512);
    let marked = match &mut disk {
        Some(disk) => disk.read(1, place).is_ok() && place.get64(0) == MARK,
        None => low.get64(0) == MARK,
    };
    if marked {
        println!("mini: back after reset");
        return;
    }
    place.set64(0, MARK);
    low.set64(0, MARK);
    if let Some(disk) = &mut disk
        && let Err(reason) = disk.write(1, place).and_then(|()| disk.flush())
    {
        println!("mini: {reason}");
    }
    println!("mini: resetting");
    if let Some(acpi) = &machine.acpi {
        acpi.reset();
        clock::delay_us(500_000);
    }
    println!("mini: no reset");
}
