//! The guest agent's port. Nobody listens at the other end.

use crate::ensure;
use crate::port::Port;
use crate::suite::{Case, Machine, Outcome};
use alloc::vec::Vec;

pub const CASES: &[Case] = &[
    Case { group: "port", name: "handshake", run: handshake },
    Case { group: "port", name: "unheard", run: unheard },
    Case { group: "port", name: "open-close", run: open_close },
];

const NAME: &str = "org.qemu.guest_agent.0";

fn handshake(machine: &mut Machine) -> Outcome {
    for _ in 0..3 {
        Port::open(machine, NAME)?.device.reset()?;
    }
    Ok(())
}

/// What nobody hears is taken all the same, as much as there is.
fn unheard(machine: &mut Machine) -> Outcome {
    let mut port = Port::open(machine, NAME)?;
    for round in 0..500 {
        port.send(&[round as u8; 4000])?;
    }
    let mut got = Vec::new();
    ensure!(!port.poll(&mut got)?, "{} bytes from nobody", got.len());
    Ok(port.device.reset()?)
}

fn open_close(machine: &mut Machine) -> Outcome {
    let mut port = Port::open(machine, NAME)?;
    for round in 0..100 {
        port.set_open(round % 2 == 1)?;
    }
    port.send(b"still here")?;
    Ok(port.device.reset()?)
}
