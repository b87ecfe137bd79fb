//! virtio-rng.

use crate::mem::Dma;
use crate::suite::{Case, Machine, Outcome};
use crate::virtio::{NO_VECTOR, Segment, Virtio};
use crate::{ensure, skip};

pub const CASES: &[Case] =
    &[Case { group: "rng", name: "bytes", run: bytes }, Case { group: "rng", name: "many", run: many }];

fn bytes(machine: &mut Machine) -> Outcome {
    let Some(&function) = machine.bus()?.virtio(4).first() else { skip!("no virtio-rng") };
    let device = Virtio::open(function)?;
    device.negotiate(0)?;
    let mut queue = device.queue(0, 8, NO_VECTOR)?;
    device.driver_ok();
    let (one, two) = (Dma::new(256), Dma::new(256));
    for buffer in [one, two] {
        let len = queue.request(&[Segment::into(buffer)])?;
        ensure!((1..=256).contains(&len), "{len} bytes for a buffer of 256");
        let set = (0..u64::from(len)).filter(|&at| buffer.get8(at) != 0).count();
        ensure!(set > len as usize / 2, "{set} of {len} bytes are not zero");
    }
    device.reset()?;
    ensure!(one.first_difference(&two).is_some(), "the same bytes twice");
    Ok(())
}

fn many(machine: &mut Machine) -> Outcome {
    let Some(&function) = machine.bus()?.virtio(4).first() else { skip!("no virtio-rng") };
    let device = Virtio::open(function)?;
    device.negotiate(0)?;
    let mut queue = device.queue(0, 8, NO_VECTOR)?;
    device.driver_ok();
    let buffer = Dma::new(64);
    for round in 0..1000 {
        let len = queue.request(&[Segment::into(buffer)])?;
        ensure!((1..=64).contains(&len), "round {round}: {len} bytes");
    }
    Ok(device.reset()?)
}
