//! virtio-net. Frames of the local experimental type 0x88b5; a peer on the host's side of the tap sends each
//! of them back with source and destination swapped (`mini.peer=echo` says that there is one).

use crate::mem::Dma;
use crate::net::{HEADER, Nic};
use crate::suite::{Case, Failure, Machine, Outcome};
use crate::virtio::{Queue, Result, Segment};
use crate::{clock, ensure, skip};

pub const CASES: &[Case] = &[
    Case { group: "net", name: "mac", run: mac },
    Case { group: "net", name: "transmit", run: transmit },
    Case { group: "net", name: "echo", run: echo },
    Case { group: "net", name: "echo-burst", run: echo_burst },
    Case { group: "net", name: "pairs", run: pairs },
];

const TYPE: [u8; 2] = [0x88, 0xb5];

fn open(machine: &mut Machine) -> core::result::Result<Nic, Failure> {
    let Some(&function) = machine.bus()?.virtio(1).first() else { skip!("no virtio-net") };
    Ok(Nic::open(function, 64)?)
}

impl Nic {
    /// A frame of `len` bytes with a number in it.
    pub fn frame(&self, len: u64, number: u64) -> Dma {
        let frame = Dma::new(HEADER + len);
        frame.copy_in(HEADER, &[0xff; 6]);
        frame.copy_in(HEADER + 6, &self.mac);
        frame.copy_in(HEADER + 12, &TYPE);
        frame.copy_in(HEADER + 14, &number.to_le_bytes());
        for at in 22..len {
            frame.set8(HEADER + at, (at as u8).wrapping_mul(31) ^ number as u8);
        }
        frame
    }
    /// Sends a frame, and waits until the device has it.
    pub fn send(&mut self, frame: Dma) -> Result<()> {
        self.transmit.request(&[Segment::out(frame)]).map(|_| ())
    }
    /// The next frame of our type, as (number, whole and right); others are dropped.
    pub fn next(&mut self, ms: u64) -> Option<(u64, bool)> {
        let mut answer = None;
        clock::poll(ms, || {
            while let Some((head, len)) = self.receive.take() {
                let Some(buffer) = self.buffers[usize::from(head)].take() else { continue };
                answer = check(&buffer, u64::from(len));
                self.post(buffer);
                self.receive.kick();
                if answer.is_some() {
                    return true;
                }
            }
            false
        });
        answer
    }
}

fn check(buffer: &Dma, len: u64) -> Option<(u64, bool)> {
    if len < HEADER + 22 || [buffer.get8(HEADER + 12), buffer.get8(HEADER + 13)] != TYPE {
        return None;
    }
    let number = u64::from_le_bytes(core::array::from_fn(|at| buffer.get8(HEADER + 14 + at as u64)));
    let right =
        (22..len - HEADER).all(|at| buffer.get8(HEADER + at) == (at as u8).wrapping_mul(31) ^ number as u8);
    Some((number, right && buffer.get8(HEADER + 6) == 0xff))
}

fn mac(machine: &mut Machine) -> Outcome {
    let wanted = machine.boot.option("mini.mac").map(alloc::string::String::from);
    let nic = open(machine)?;
    let text = nic.mac.map(|byte| alloc::format!("{byte:02x}")).join(":");
    nic.device.reset()?;
    ensure!(nic.mac[0] & 1 == 0 && nic.mac != [0; 6], "{text} is no station's address");
    if let Some(wanted) = wanted {
        ensure!(wanted == text, "{text}, the command line says {wanted}");
    }
    Ok(())
}

fn transmit(machine: &mut Machine) -> Outcome {
    let mut nic = open(machine)?;
    for number in 0..100 {
        let frame = nic.frame(60 + number * 14, number);
        nic.send(frame)?;
    }
    Ok(nic.device.reset()?)
}

fn echo(machine: &mut Machine) -> Outcome {
    if machine.boot.option("mini.peer") != Some("echo") {
        skip!("no peer that echoes");
    }
    let mut nic = open(machine)?;
    for (number, len) in [60u64, 61, 128, 590, 1500, 1514].into_iter().enumerate() {
        let number = number as u64 + 1000;
        let frame = nic.frame(len, number);
        // The host's side may still be coming up: send again until the first comes back. Echoes of what was sent
        // before may still arrive.
        let mut answer = None;
        for _ in 0..20 {
            nic.send(frame)?;
            answer = nic.next(500);
            while answer.is_some_and(|(got, _)| got != number) {
                answer = nic.next(500);
            }
            if answer.is_some() {
                break;
            }
        }
        ensure!(
            answer == Some((number, true)),
            "{len} bytes: sent {number}, got {answer:?} (number, intact)"
        );
    }
    Ok(nic.device.reset()?)
}

fn echo_burst(machine: &mut Machine) -> Outcome {
    if machine.boot.option("mini.peer") != Some("echo") {
        skip!("no peer that echoes");
    }
    let mut nic = open(machine)?;
    let count = 32u64;
    for number in 2000..2000 + count {
        let frame = nic.frame(1000, number);
        nic.transmit.add(&[Segment::out(frame)]).ok_or("the queue is full")?;
    }
    nic.transmit.kick();
    let mut back = 0;
    while let Some((number, right)) = nic.next(2000) {
        ensure!(right, "frame {number} came back damaged");
        back += u64::from(number >= 2000);
        if back == count {
            break;
        }
    }
    nic.device.reset()?;
    ensure!(back == count, "{back} of {count} frames came back");
    Ok(())
}

/// How many pairs the driver uses from now on (virtio 1.3 §5.1.6.5.5); what the device answers.
pub fn set_pairs(control: &mut Queue, pairs: u16) -> Result<u8> {
    let command = Dma::new(8);
    offer_pairs(control, command, pairs)?;
    control.kick();
    control.wait(5000)?;
    Ok(command.get8(4))
}

fn offer_pairs(control: &mut Queue, command: Dma, pairs: u16) -> Result<()> {
    command.copy_in(0, &[4, 0]);
    command.set16(2, pairs);
    command.set8(4, 0xee);
    let parts = [Segment::out(command.part(0, 4)), Segment::into(command.part(4, 1))];
    control.add(&parts).map(|_| ()).ok_or_else(|| "the control queue is full".into())
}

/// Sends a frame on a pair until it comes back there: the host's side may still be coming up.
pub fn round_trip(pair: &mut Nic, number: u64) -> Result<()> {
    let frame = pair.frame(200, number);
    for _ in 0..20 {
        pair.send(frame)?;
        loop {
            match pair.next(500) {
                Some((got, true)) if got == number => return Ok(()),
                Some((got, false)) => return Err(alloc::format!("frame {got} came back damaged")),
                Some(_) => {}
                None => break,
            }
        }
    }
    Err(alloc::format!("frame {number} does not come back"))
}

fn pairs(machine: &mut Machine) -> Outcome {
    let Some(&function) = machine.bus()?.virtio(1).first() else { skip!("no virtio-net") };
    let Some((mut pairs, mut control)) = Nic::open_pairs(function, 32)? else { skip!("one queue pair") };
    let all = pairs.len() as u16;
    // A command before DRIVER_OK is for later.
    let early = Dma::new(8);
    offer_pairs(&mut control, early, all)?;
    control.kick();
    clock::delay_us(20_000);
    ensure!(!control.has_used() && early.get8(4) == 0xee, "a command was obeyed before DRIVER_OK");
    let device = pairs[0].device.clone();
    device.driver_ok();
    control.kick();
    control.wait(5000)?;
    ensure!(early.get8(4) == 0, "{all} pairs: answer {}", early.get8(4));
    for wrong in [0, all + 1, 0x8000, 0xffff] {
        let answer = set_pairs(&mut control, wrong)?;
        ensure!(answer == 1, "{wrong} pairs of {all}: answer {answer}");
    }
    if machine.boot.option("mini.peer") == Some("echo") {
        pairs.iter_mut().for_each(Nic::fill);
        for number in 3000u64..3040 {
            // The host answers where it was last spoken to.
            let pair = number as usize % pairs.len();
            round_trip(&mut pairs[pair], number)?;
        }
        for pairs_now in (1..all).rev() {
            let answer = set_pairs(&mut control, pairs_now)?;
            ensure!(answer == 0, "{pairs_now} pairs: answer {answer}");
            for pair in 0..usize::from(pairs_now) {
                round_trip(&mut pairs[pair], 4000 + 10 * u64::from(pairs_now) + pair as u64)?;
            }
            let unused = pairs.iter_mut().skip(pairs_now.into());
            let got = unused.filter_map(|pair| pair.next(0)).count();
            ensure!(got == 0, "{got} frames came to pairs that are not in use");
        }
    }
    Ok(device.reset()?)
}
