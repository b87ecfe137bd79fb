//! Interrupts: the local timer, the serial line through the IO-APIC, MSI-X of a virtio device.

use crate::apic::{self, vector};
use crate::mem::Dma;
use crate::pci::Msix;
use crate::suite::{Case, Failure, Machine, Outcome};
use crate::virtio::{NO_VECTOR, Queue, Segment, VERSION_1, Virtio};
use crate::{clock, cpu, ensure, skip};
use alloc::format;

pub const CASES: &[Case] = &[
    Case { group: "irq", name: "timer", run: timer },
    Case { group: "irq", name: "x2apic", run: x2apic },
    Case { group: "irq", name: "serial-line", run: serial_line },
    Case { group: "irq", name: "msix", run: msix },
    Case { group: "irq", name: "msix-mask", run: msix_mask },
    Case { group: "irq", name: "msix-function-mask", run: msix_function_mask },
    Case { group: "irq", name: "msix-none", run: msix_none },
    Case { group: "irq", name: "msix-bad-vector", run: msix_bad_vector },
];

fn arrives(vector: u8, seen: u64, ms: u64) -> bool {
    clock::poll(ms, || cpu::interrupt_count(vector) > seen)
}

fn timer(_: &mut Machine) -> Outcome {
    for _ in 0..3 {
        let seen = cpu::interrupt_count(vector::TIMER);
        apic::timer_after_ns(2_000_000);
        ensure!(arrives(vector::TIMER, seen, 2000), "no interrupt from the local timer");
    }
    Ok(())
}

/// Switches over for the rest of the run: there is no way back but through "off".
fn x2apic(machine: &mut Machine) -> Outcome {
    if cpu::cpuid(1, 0)[2] & (1 << 21) == 0 {
        skip!("no x2APIC");
    }
    ensure!(apic::is_x2apic() || apic::enable_x2apic(), "x2APIC mode is refused");
    timer(machine)
}

fn serial_line(machine: &mut Machine) -> Outcome {
    let Some((io_apic, first)) = machine.acpi()?.io_apic() else { skip!("no IO-APIC") };
    let pin = 4 - first.min(4);
    apic::route_line(io_apic, pin, vector::SERIAL, false);
    let seen = cpu::interrupt_count(vector::SERIAL);
    cpu::outb(0x3f8 + 4, 0x0b);
    cpu::outb(0x3f8 + 1, 2);
    let arrived = arrives(vector::SERIAL, seen, 1000);
    cpu::outb(0x3f8 + 1, 0);
    apic::route_line(io_apic, pin, vector::SERIAL, true);
    ensure!(arrived, "no interrupt when the transmitter is empty");
    Ok(())
}

/// A device with which one request can be made: rng (fill a buffer) or blk (read a sector).
struct Subject {
    device: Virtio,
    msix: Msix,
    is_rng: bool,
}

impl Subject {
    fn find(machine: &mut Machine) -> Result<Self, Failure> {
        let (rng, blk) = (machine.bus()?.virtio(4), machine.bus()?.virtio(2));
        let Some(&function) = rng.first().or(blk.first()) else { skip!("no virtio-rng or virtio-blk") };
        let device = Virtio::open(function)?;
        let Some(msix) = Msix::find(device.function) else { return Err("no MSI-X capability".into()) };
        Ok(Self { device, msix, is_rng: !rng.is_empty() })
    }
    /// Live, with queue 0 at that entry.
    fn start(&self, entry: u16) -> Result<Queue, Failure> {
        self.device.negotiate(VERSION_1)?;
        let queue = self.device.queue(0, 16, entry)?;
        self.device.driver_ok();
        Ok(queue)
    }
    fn request(&self, queue: &mut Queue) -> Result<(), Failure> {
        let buffer = Dma::new(4096);
        let (data, last) = (Segment::into(buffer.part(512, 512)), Segment::into(buffer.part(1024, 1)));
        if self.is_rng {
            queue.request(&[data])?;
        } else {
            queue.request(&[Segment::out(buffer.part(0, 16)), data, last])?;
        }
        Ok(())
    }
    fn stop(&self) -> Outcome {
        self.msix.enable(false, false);
        Ok(self.device.reset()?)
    }
}

fn msix(machine: &mut Machine) -> Outcome {
    let subject = Subject::find(machine)?;
    subject.msix.enable(true, false);
    let entry = subject.msix.count - 1;
    subject.msix.route(entry, apic::id(), vector::DEVICE);
    let mut queue = subject.start(entry)?;
    for round in 0..10 {
        let seen = cpu::interrupt_count(vector::DEVICE);
        subject.request(&mut queue)?;
        ensure!(arrives(vector::DEVICE, seen, 2000), "round {round}: done, but no interrupt");
    }
    // Asleep: the interrupt is what wakes the processor.
    let seen = cpu::interrupt_count(vector::DEVICE);
    subject.request(&mut queue)?;
    cpu::wait_for_interrupt(vector::DEVICE, seen);
    subject.msix.route(entry, apic::id(), vector::DEVICE + 1);
    let seen = cpu::interrupt_count(vector::DEVICE + 1);
    subject.request(&mut queue)?;
    let rerouted = arrives(vector::DEVICE + 1, seen, 2000);
    subject.stop()?;
    ensure!(rerouted, "no interrupt on the new vector");
    Ok(())
}

fn masked(machine: &mut Machine, set: impl Fn(&Msix, bool), what: &str) -> Outcome {
    let subject = Subject::find(machine)?;
    subject.msix.enable(true, false);
    let target = vector::DEVICE + 2;
    subject.msix.route(0, apic::id(), target);
    let mut queue = subject.start(0)?;
    set(&subject.msix, true);
    let seen = cpu::interrupt_count(target);
    subject.request(&mut queue)?;
    let early = arrives(target, seen, 20);
    let pending = clock::poll(500, || subject.msix.is_pending(0));
    set(&subject.msix, false);
    let late = arrives(target, seen, 2000);
    let still = subject.msix.is_pending(0);
    subject.stop()?;
    ensure!(!early, "an interrupt arrived through the {what}");
    ensure!(pending, "the pending bit is not set behind the {what}");
    ensure!(late, "nothing arrived after the {what} was lifted");
    ensure!(!still, "the pending bit stays");
    Ok(())
}

fn msix_mask(machine: &mut Machine) -> Outcome {
    masked(machine, |msix, on| msix.mask(0, on), "entry's mask")
}

fn msix_function_mask(machine: &mut Machine) -> Outcome {
    masked(machine, |msix, on| msix.enable(true, on), "function's mask")
}

fn msix_none(machine: &mut Machine) -> Outcome {
    let subject = Subject::find(machine)?;
    subject.msix.enable(true, false);
    let target = vector::DEVICE + 3;
    for entry in 0..subject.msix.count {
        subject.msix.route(entry, apic::id(), target);
    }
    let mut queue = subject.start(NO_VECTOR)?;
    let seen = cpu::interrupt_count(target);
    subject.request(&mut queue)?;
    let arrived = arrives(target, seen, 20);
    subject.stop()?;
    ensure!(!arrived, "an interrupt, though the queue has no vector");
    Ok(())
}

fn msix_bad_vector(machine: &mut Machine) -> Outcome {
    let subject = Subject::find(machine)?;
    subject.device.negotiate(VERSION_1)?;
    let refused = subject.device.queue(0, 16, subject.msix.count).is_err();
    subject.stop()?;
    ensure!(refused, "{}", format!("entry {} is taken, of {}", subject.msix.count, subject.msix.count));
    Ok(())
}
