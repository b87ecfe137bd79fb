//! What every virtio device must do, whatever its type.

use crate::pci::Function;
use crate::suite::{Case, Failure, Machine, Outcome};
use crate::virtio::{NO_VECTOR, VERSION_1, Virtio, common, status};
use crate::{clock, cpu, ensure, skip};
use alloc::vec::Vec;

pub const CASES: &[Case] = &[
    Case { group: "virtio", name: "structures", run: structures },
    Case { group: "virtio", name: "status", run: status_machine },
    Case { group: "virtio", name: "features", run: features },
    Case { group: "virtio", name: "unoffered-feature", run: unoffered_feature },
    Case { group: "virtio", name: "queues", run: queues },
    Case { group: "virtio", name: "absent-queue", run: absent_queue },
    Case { group: "virtio", name: "reset-clears", run: reset_clears },
    Case { group: "virtio", name: "config-generation", run: config_generation },
    Case { group: "virtio", name: "isr", run: isr },
    Case { group: "virtio", name: "bad-ring", run: bad_ring },
];

/// Runs a check on every virtio device; its reason gets the device's number.
fn each(machine: &mut Machine, check: impl Fn(&Virtio) -> Outcome) -> Outcome {
    let functions: Vec<Function> = machine
        .bus()?
        .functions
        .iter()
        .copied()
        .filter(|function| function.virtio_type().is_some())
        .collect();
    if functions.is_empty() {
        skip!("no virtio device");
    }
    for function in functions {
        let device = Virtio::open(function)?;
        device.reset()?;
        check(&device).map_err(|failure| match failure {
            Failure::Failed(reason) => Failure::Failed(alloc::format!(
                "device {} (type {:?}): {reason}",
                function.device,
                function.virtio_type()
            )),
            skipped @ Failure::Skipped(_) => skipped,
        })?;
        device.reset()?;
    }
    Ok(())
}

fn structures(machine: &mut Machine) -> Outcome {
    each(machine, |device| {
        ensure!(
            device.notify_multiplier == 0 || device.notify_multiplier.is_power_of_two(),
            "doorbell distance {}",
            device.notify_multiplier
        );
        ensure!(device.num_queues() >= 1, "no queues");
        Ok(())
    })
}

fn status_machine(machine: &mut Machine) -> Outcome {
    each(machine, |device| {
        let steps = [status::ACKNOWLEDGE, status::ACKNOWLEDGE | status::DRIVER];
        for step in steps {
            device.set_status(step);
            ensure!(device.status() == step, "wrote {step:#x}, read {:#x}", device.status());
        }
        device.reset()?;
        ensure!(device.status() == 0, "after reset {:#x}", device.status());
        Ok(())
    })
}

fn features(machine: &mut Machine) -> Outcome {
    each(machine, |device| {
        let offered = device.device_features();
        ensure!(offered & VERSION_1 != 0, "VERSION_1 is not offered: {offered:#x}");
        ensure!(device.negotiate(0)? == VERSION_1, "VERSION_1 alone is not enough");
        Ok(())
    })
}

fn unoffered_feature(machine: &mut Machine) -> Outcome {
    each(machine, |device| {
        let offered = device.device_features();
        let Some(bit) = (40..63).find(|bit| offered >> bit & 1 == 0) else { return Ok(()) };
        device.set_status(status::ACKNOWLEDGE | status::DRIVER);
        device.set_driver_features(VERSION_1 | 1 << bit);
        device.set_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
        ensure!(device.status() & status::FEATURES_OK == 0, "bit {bit} was not offered, and is accepted");
        Ok(())
    })
}

fn queues(machine: &mut Machine) -> Outcome {
    each(machine, |device| {
        for index in 0..device.num_queues() {
            let size = device.queue_size_max(index);
            ensure!(size == 0 || size.is_power_of_two() && size <= 32768, "queue {index} of {size} entries");
            ensure!(
                cpu::read16(device.common + common::QUEUE_ENABLE) == 0,
                "queue {index} is live after reset"
            );
        }
        Ok(())
    })
}

fn absent_queue(machine: &mut Machine) -> Outcome {
    each(machine, |device| {
        for index in [device.num_queues(), 0x7fff, 0xffff] {
            ensure!(device.queue_size_max(index) == 0, "queue {index} exists");
        }
        Ok(())
    })
}

fn reset_clears(machine: &mut Machine) -> Outcome {
    each(machine, |device| {
        device.negotiate(0)?;
        device.queue(0, 8, NO_VECTOR)?;
        device.driver_ok();
        device.reset()?;
        cpu::write16(device.common + common::QUEUE_SELECT, 0);
        ensure!(cpu::read16(device.common + common::QUEUE_ENABLE) == 0, "queue 0 is still live");
        Ok(())
    })
}

fn config_generation(machine: &mut Machine) -> Outcome {
    each(machine, |device| {
        device.negotiate(0)?;
        let read = || cpu::read8(device.common + common::CONFIG_GENERATION);
        ensure!(read() == read(), "it changes by itself");
        cpu::write16(device.common + common::CONFIG_MSIX_VECTOR, NO_VECTOR);
        let vector = cpu::read16(device.common + common::CONFIG_MSIX_VECTOR);
        ensure!(vector == NO_VECTOR, "the configuration's MSI-X entry reads {vector:#x}");
        Ok(())
    })
}

fn isr(machine: &mut Machine) -> Outcome {
    each(machine, |device| {
        cpu::read8(device.isr);
        let value = cpu::read8(device.isr);
        ensure!(value == 0, "after reset and a read it says {value:#x}");
        Ok(())
    })
}

/// A chain that goes in a circle: the device stops and says so; a reset brings it back.
fn bad_ring(machine: &mut Machine) -> Outcome {
    let rng = machine.bus()?.virtio(4);
    let blk = machine.bus()?.virtio(2);
    let Some(&function) = rng.first().or(blk.first()) else { skip!("no virtio-rng or virtio-blk") };
    let device = Virtio::open(function)?;
    device.negotiate(0)?;
    let mut queue = device.queue(0, 8, NO_VECTOR)?;
    device.driver_ok();
    queue.set_descriptor(0, queue.used.address, 16, 1 | 2, 1);
    queue.set_descriptor(1, queue.used.address, 16, 1 | 2, 0);
    queue.offer(0);
    queue.kick();
    let stopped = clock::poll(2000, || device.status() & status::NEEDS_RESET != 0);
    device.reset()?;
    device.negotiate(0)?;
    device.queue(0, 8, NO_VECTOR)?;
    device.driver_ok();
    let after = device.status();
    device.reset()?;
    ensure!(stopped, "a circular chain, and DEVICE_NEEDS_RESET is not set");
    ensure!(
        after & status::DRIVER_OK != 0 && after & status::NEEDS_RESET == 0,
        "status {after:#x} after the reset"
    );
    Ok(())
}
