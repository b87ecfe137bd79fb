//! Processors: the clock, and starting the others.

use crate::apic::{self, vector};
use crate::clock;
use crate::cpu;
use crate::suite::{Case, Machine, Outcome};
use crate::{ensure, skip};

pub const CASES: &[Case] = &[
    Case { group: "cpu", name: "tsc", run: tsc },
    Case { group: "cpu", name: "kvm-clock", run: kvm_clock },
    Case { group: "cpu", name: "start-others", run: start_others },
];

fn tsc(_: &mut Machine) -> Outcome {
    let mut last = cpu::tsc();
    for _ in 0..10_000 {
        let now = cpu::tsc();
        ensure!(now >= last, "the time stamp counter went back from {last} to {now}");
        last = now;
    }
    Ok(())
}

fn kvm_clock(_: &mut Machine) -> Outcome {
    if !clock::init() {
        skip!("no kvm-clock");
    }
    let mhz = clock::tsc_hz() / 1_000_000;
    ensure!((100..10_000).contains(&mhz), "kvm-clock says that the TSC runs at {mhz} MHz");
    Ok(())
}

fn start_others(machine: &mut Machine) -> Outcome {
    let processors = machine.acpi()?.processors();
    if processors.len() < 2 {
        skip!("one processor");
    }
    let others = processors.len() as u64 - 1;
    let page = apic::place_trampoline();
    if apic::others_online() == 0 {
        for &id in processors.iter().filter(|&&id| id != apic::id()) {
            apic::send(0x4500, id);
            clock::delay_us(10_000);
            apic::send(0x4600 | page, id);
            clock::poll(100, || apic::others_online() == others);
        }
    }
    ensure!(
        clock::poll(2000, || apic::others_online() == others),
        "{} of {others} other processors arrived",
        apic::others_online()
    );
    let seen = cpu::interrupt_count(vector::CALL);
    apic::send(0xc4000 | u32::from(vector::CALL), 0);
    ensure!(
        clock::poll(2000, || cpu::interrupt_count(vector::CALL) == seen + others),
        "{} of {others} answered an interrupt",
        cpu::interrupt_count(vector::CALL) - seen
    );
    Ok(())
}
