//! Resets in flight, double kicks, storms of notifications.

use super::On::{Devices, Queues};
use super::stage::{SIZE, Stage};
use super::{Must, Row, row};
use crate::mem::Dma;
use crate::suite::Outcome;
use crate::virtio::status;
use crate::{clock, cpu, ensure};

pub const ROWS: &[Row] = &[
    row("double-kick", Queues, Must::Go, double_kick),
    row("notify-storm", Queues, Must::Go, notify_storm),
    row("notify-storm-after-a-break", Queues, Must::Break, storm_after_break),
    row("ring-kept-full", Queues, Must::Go, kept_full),
    row("reset-in-flight", Queues, Must::Survive, reset_in_flight),
    row("reset-in-flight-leaves-memory-alone", Queues, Must::Survive, quiet_after_reset),
    row("decoding-off-in-flight", Queues, Must::Survive, decoding_off_in_flight),
    row("reset-storm", Devices, Must::Go, reset_storm),
    row("start-and-reset-storm", Devices, Must::Go, start_storm),
    row("reset-after-a-break", Devices, Must::Go, reset_after_break),
    row("feature-storm", Devices, Must::Go, feature_storm),
    row("isr-storm", Devices, Must::Go, isr_storm),
];

fn double_kick(s: &mut Stage) -> Outcome {
    s.start(0)?;
    let (parts, _) = s.honest();
    for round in 1..50u16 {
        s.lay(0, &parts)?;
        s.offer(0)?;
        let queue = s.queue()?;
        queue.kick();
        queue.kick();
        if s.is_eager() {
            ensure!(clock::poll(3000, || s.used() == round), "{} answers to {round}", s.used());
        } else if round >= SIZE {
            break;
        }
    }
    Ok(())
}

fn notify_storm(s: &mut Stage) -> Outcome {
    s.start(0)?;
    for _ in 0..3000 {
        s.queue()?.kick();
    }
    s.answers()
}

fn storm_after_break(s: &mut Stage) -> Outcome {
    s.start(0)?;
    let queue = s.queue()?;
    queue.available.set16(2, SIZE + 1);
    for _ in 0..1000 {
        queue.kick();
    }
    Ok(())
}

/// As many chains at a time as there are descriptors for, for a while.
fn kept_full(s: &mut Stage) -> Outcome {
    s.start(0)?;
    if !s.is_eager() {
        return Ok(());
    }
    let (parts, _) = s.honest();
    let count = SIZE / parts.len() as u16;
    for index in 0..count {
        s.lay(index * parts.len() as u16, &parts)?;
    }
    let mut offered = 0u16;
    for _ in 0..50 {
        for index in 0..count {
            s.queue()?.offer(index * parts.len() as u16);
            offered = offered.wrapping_add(1);
        }
        s.queue()?.kick();
        ensure!(clock::poll(3000, || s.used() == offered), "{} answers of {offered}", s.used());
    }
    Ok(())
}

fn fill(s: &mut Stage) -> Outcome {
    let (parts, _) = s.honest();
    for index in 0..SIZE / parts.len() as u16 {
        s.lay(index * parts.len() as u16, &parts)?;
        s.queue()?.offer(index * parts.len() as u16);
    }
    s.queue()?.kick();
    Ok(())
}

fn reset_in_flight(s: &mut Stage) -> Outcome {
    for _ in 0..30 {
        s.restart(0)?;
        fill(s)?;
        s.device.set_status(0);
        ensure!(s.device.status() == 0, "status {:#x} right after a reset", s.device.status());
    }
    Ok(())
}

/// What the device was to write into is given away after the reset: nothing changes it any more.
fn quiet_after_reset(s: &mut Stage) -> Outcome {
    for _ in 0..10 {
        s.restart(0)?;
        fill(s)?;
        s.device.reset()?;
        let (parts, data) = s.honest();
        let buffer = Dma::at(parts[data].0, u64::from(parts[data].1));
        buffer.fill(0x77);
        let used = s.used();
        clock::delay_us(300);
        let changed = (0..buffer.len).find(|at| buffer.get8(*at) != 0x77);
        ensure!(changed.is_none(), "byte {changed:?} was written after the reset");
        ensure!(s.used() == used, "the used ring went on after the reset");
    }
    Ok(())
}

fn decoding_off_in_flight(s: &mut Stage) -> Outcome {
    for _ in 0..10 {
        s.restart(0)?;
        fill(s)?;
        s.device.function.set_command(crate::pci::COMMAND_MEMORY, false);
        s.device.function.set_command(crate::pci::COMMAND_MEMORY, true);
    }
    Ok(())
}

fn reset_storm(s: &mut Stage) -> Outcome {
    s.start(0)?;
    for _ in 0..300 {
        s.device.set_status(0);
    }
    s.restart(0)?;
    s.answers()
}

fn start_storm(s: &mut Stage) -> Outcome {
    for _ in 0..30 {
        s.restart(0)?;
    }
    s.answers()
}

fn reset_after_break(s: &mut Stage) -> Outcome {
    for _ in 0..10 {
        s.restart(0)?;
        s.queue()?.available.set16(2, SIZE + 1);
        s.queue()?.kick();
        if s.is_eager() {
            let broken = clock::poll(2000, || s.device.status() & status::NEEDS_RESET != 0);
            ensure!(broken, "DEVICE_NEEDS_RESET is not set");
        }
    }
    s.restart(0)?;
    s.answers()
}

fn feature_storm(s: &mut Stage) -> Outcome {
    for round in 0..300u64 {
        s.device.set_driver_features(round.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        s.device.set_status(11);
    }
    s.restart(0)?;
    s.answers()
}

fn isr_storm(s: &mut Stage) -> Outcome {
    s.start(0)?;
    for _ in 0..500 {
        cpu::read8(s.device.isr);
        cpu::write8(s.device.isr, 0xff);
    }
    s.answers()
}
