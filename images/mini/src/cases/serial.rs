//! The 16550 at 0x3f8.

use crate::cpu::{inb, outb};
use crate::suite::{Case, Machine, Outcome};
use crate::{clock, ensure};

pub const CASES: &[Case] = &[
    Case { group: "serial", name: "scratch", run: scratch },
    Case { group: "serial", name: "line-status", run: line_status },
    Case { group: "serial", name: "divisor", run: divisor },
];

const PORT: u16 = 0x3f8;

fn scratch(_: &mut Machine) -> Outcome {
    for value in [0x00, 0x5a, 0xa5, 0xff] {
        outb(PORT + 7, value);
        ensure!(inb(PORT + 7) == value, "scratch register: wrote {value:#x}, read {:#x}", inb(PORT + 7));
    }
    Ok(())
}

fn line_status(_: &mut Machine) -> Outcome {
    ensure!(
        clock::poll(1000, || inb(PORT + 5) & 0x60 == 0x60),
        "the transmitter never empties: {:#x}",
        inb(PORT + 5)
    );
    Ok(())
}

fn divisor(_: &mut Machine) -> Outcome {
    let old = inb(PORT + 3);
    outb(PORT + 3, old | 0x80);
    outb(PORT, 1);
    outb(PORT + 1, 0);
    let (low, high) = (inb(PORT), inb(PORT + 1));
    outb(PORT + 3, old & 0x7f);
    ensure!((low, high) == (1, 0), "divisor latch: wrote 1, read {low:#x} {high:#x}");
    Ok(())
}
