//! Control messages of a device with ports, a console's bytes, and requests for random numbers, that make no sense.

use super::On::Only;
use super::stage::{Kind, Stage, WRITE};
use super::{Must, Row, row};
use crate::mem::Dma;
use crate::suite::Outcome;
use crate::{clock, ensure};

const PORTS: super::On = Only(Kind::Ports);
const CONSOLE: super::On = Only(Kind::Console);
const RNG: super::On = Only(Kind::Rng);

pub const ROWS: &[Row] = &[
    row("control-message-too-short", PORTS, Must::Settle, |s| bytes(s, 7)),
    row("control-message-of-nothing", PORTS, Must::Settle, |s| bytes(s, 0)),
    row("control-message-of-a-mib", PORTS, Must::Go, |s| bytes(s, 1 << 20)),
    row("control-message-writable", PORTS, Must::Settle, control_writable),
    row("ready-a-thousand-times", PORTS, Must::Go, |s| message(s, u32::MAX, 0, 1, 1000)),
    row("ready-with-nonsense", PORTS, Must::Go, |s| message(s, 7, 0, 0xffff, 20)),
    row("port-ready-for-port-0", PORTS, Must::Go, |s| message(s, 0, 3, 1, 20)),
    row("port-ready-for-no-port", PORTS, Must::Go, |s| message(s, 2, 3, 1, 20)),
    row("port-ready-far-away", PORTS, Must::Go, |s| message(s, u32::MAX, 3, 1, 20)),
    row("port-open-for-no-port", PORTS, Must::Go, |s| message(s, 99, 6, 1, 20)),
    row("port-open-a-thousand-times", PORTS, Must::Go, |s| message(s, 1, 6, 1, 1000)),
    row("port-name-by-the-driver", PORTS, Must::Go, |s| message(s, 1, 7, 1, 20)),
    row("port-removed-by-the-driver", PORTS, Must::Go, |s| message(s, 1, 2, 1, 20)),
    row("every-event", PORTS, Must::Go, every_event),
    row("answers-without-room", PORTS, Must::Survive, no_room),
    row("random-of-a-mib", RNG, Must::Go, |s| random(s, 1 << 20)),
    row("random-of-one-byte", RNG, Must::Go, |s| random(s, 1)),
    row("random-into-what-is-readable", RNG, Must::Settle, random_readable),
    row("console-line-of-a-mib", CONSOLE, Must::Go, console_long),
    row("console-writable-output", CONSOLE, Must::Settle, console_writable),
];

fn bytes(s: &mut Stage, len: u32) -> Outcome {
    s.start(0)?;
    let buffer = Dma::new(u64::from(len.max(1)));
    s.lay(0, &[(buffer.address, len, 0)])?;
    s.offer(0)?;
    ensure!(clock::poll(3000, || s.used() == 1), "it does not come back");
    s.answers()
}

fn control_writable(s: &mut Stage) -> Outcome {
    s.start(0)?;
    let buffer = Dma::new(64);
    s.lay(0, &[(buffer.address, 64, WRITE)])?;
    s.offer(0)
}

fn tell(s: &mut Stage, id: u32, event: u16, value: u16) -> Outcome {
    let buffer = Dma::new(8);
    buffer.set32(0, id);
    buffer.set16(4, event);
    buffer.set16(6, value);
    let before = s.used();
    s.lay(0, &[(buffer.address, 8, 0)])?;
    s.offer(0)?;
    ensure!(clock::poll(3000, || s.used() != before), "a control message does not come back");
    Ok(())
}

fn message(s: &mut Stage, id: u32, event: u16, value: u16, times: u32) -> Outcome {
    s.start(0)?;
    for _ in 0..times {
        let mark = crate::mem::mark();
        tell(s, id, event, value)?;
        crate::mem::rewind(mark);
    }
    s.answers()
}

fn every_event(s: &mut Stage) -> Outcome {
    s.start(0)?;
    for event in (0..16).chain([0x7fff, 0xffff]) {
        for id in [0, 1, 2, u32::MAX] {
            tell(s, id, event, 0)?;
            tell(s, id, event, 1)?;
        }
    }
    s.answers()
}

/// What the device has to say does not fit into what is posted for it.
fn no_room(s: &mut Stage) -> Outcome {
    s.start(0)?;
    let buffer = Dma::new(64).address;
    let queue = s.queues.get_mut(2).ok_or("no queue for its messages")?;
    for at in 0..8u16 {
        queue.set_descriptor(at, buffer, u32::from(at), WRITE, 0);
        queue.offer(at);
    }
    queue.kick();
    for (id, event) in [(u32::MAX, 0), (1, 3), (1, 6), (u32::MAX, 0), (1, 3)] {
        // It may have given up.
        if tell(s, id, event, 1).is_err() {
            break;
        }
    }
    Ok(())
}

fn random(s: &mut Stage, len: u32) -> Outcome {
    s.start(0)?;
    let buffer = Dma::new(u64::from(len));
    s.lay(0, &[(buffer.address, len, WRITE)])?;
    s.offer(0)?;
    ensure!(clock::poll(3000, || s.used() == 1), "no answer");
    let written = s.first_used_len();
    ensure!((1..=u64::from(len)).contains(&written), "{written} of {len} bytes");
    s.answers()
}

fn random_readable(s: &mut Stage) -> Outcome {
    s.start(0)?;
    let buffer = Dma::new(64);
    s.lay(0, &[(buffer.address, 64, 0)])?;
    s.offer(0)?;
    clock::poll(100, || s.used() == 1);
    ensure!((0..64).all(|at| buffer.get8(at) == 0), "it wrote where it may only read");
    Ok(())
}

fn console_long(s: &mut Stage) -> Outcome {
    s.start(0)?;
    let buffer = Dma::new(1 << 20);
    buffer.fill(b'.');
    s.lay(0, &[(buffer.address, 1 << 20, 0)])?;
    s.offer(0)?;
    ensure!(clock::poll(5000, || s.used() == 1), "it does not come back");
    s.answers()
}

fn console_writable(s: &mut Stage) -> Outcome {
    s.start(0)?;
    let buffer = Dma::new(64);
    s.lay(0, &[(buffer.address, 64, WRITE)])?;
    s.offer(0)?;
    clock::poll(100, || s.used() == 1);
    ensure!((0..64).all(|at| buffer.get8(at) == 0), "the output's buffer was written");
    Ok(())
}
