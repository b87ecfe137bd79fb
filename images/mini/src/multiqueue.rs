//! The guest that uses all queue pairs of its first network card, for ever: a frame on each in turn, which a peer on the host's side
//! sends back, and which has to arrive on the same pair. It prints `multiqueue: N rounds of P pairs` now and then, and never
//! negotiates again: whoever saves and restores it sees whether its pairs are still in use.

use crate::cases::net::{round_trip, set_pairs};
use crate::net::Nic;
use crate::suite::{Failure, Machine};
use crate::{mem, println};

const ROUNDS_A_LINE: u64 = 200;

fn rounds(machine: &mut Machine) -> Result<(), Failure> {
    let function = machine.bus()?.virtio(1).first().copied().ok_or("there is no card")?;
    let (mut pairs, mut control) = Nic::open_pairs(function, 32)?.ok_or("the card has one queue pair")?;
    pairs[0].device.driver_ok();
    let count = pairs.len() as u16;
    if set_pairs(&mut control, count)? != 0 {
        return Err("the device refuses its own number of pairs".into());
    }
    pairs.iter_mut().for_each(Nic::fill);
    for round in 0u64.. {
        let mark = mem::mark();
        for (at, pair) in pairs.iter_mut().enumerate() {
            round_trip(pair, round * 16 + at as u64)?;
        }
        mem::rewind(mark);
        if round % ROUNDS_A_LINE == 0 {
            println!("multiqueue: {round} rounds of {count} pairs");
        }
    }
    Ok(())
}

/// Goes on until something is wrong; says what.
pub fn run(machine: &mut Machine) {
    match rounds(machine) {
        Ok(()) => {}
        Err(Failure::Failed(reason) | Failure::Skipped(reason)) => println!("multiqueue: failed: {reason}"),
    }
}
