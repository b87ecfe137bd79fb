//! The guest that others cut: it writes a counter to its first disk, then to its second, for ever, as fast as it goes,
//! and is its own guest agent meanwhile.
//!
//! Round N writes N into block 1 of the first disk, and when that is answered into block 1 of the second. So at any
//! instant the second is never ahead, and at most one behind. It prints `pair: N` now and then. A freeze that comes over
//! the agent's port stops the rounds behind a whole one (both disks are equal then), `pair: frozen at N`; a thaw lets them go on.

use crate::blk::Disk;
use crate::mem::Dma;
use crate::port::Port;
use crate::suite::{Failure, Machine};
use crate::virtio::Result;
use crate::{clock, modes, println};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

const BLOCK: u64 = 4096;
const ROUNDS_A_LINE: u64 = 200;

/// What the agent is asked, and whether it has frozen.
struct Agent {
    port: Port,
    line: Vec<u8>,
    frozen: bool,
}

impl Agent {
    /// Answers what has come; says whether the rounds may go on.
    fn attend(&mut self, count: u64) -> Result<bool> {
        if self.port.poll(&mut self.line)? {
            while let Some(end) = self.line.iter().position(|byte| *byte == b'\n') {
                let line = String::from_utf8_lossy(self.line.get(..end).unwrap_or_default()).into_owned();
                self.line.drain(..=end);
                self.answer(&line, count)?;
            }
        }
        Ok(!self.frozen)
    }

    fn answer(&mut self, line: &str, count: u64) -> Result<()> {
        let was = self.frozen;
        let answer = if line.contains("guest-sync-delimited") {
            let id: String = line.chars().filter(char::is_ascii_digit).collect();
            // The delimiter is no text.
            self.port.send(&[0xff])?;
            format!("{{\"return\": {id}}}\n")
        } else if line.contains("guest-fsfreeze-status") {
            format!("{{\"return\": \"{}\"}}\n", if was { "frozen" } else { "thawed" })
        } else if line.contains("guest-fsfreeze-freeze") {
            self.frozen = true;
            println!("pair: frozen at {count}");
            "{\"return\": 2}\n".into()
        } else if line.contains("guest-fsfreeze-thaw") {
            self.frozen = false;
            println!("pair: thawed at {count}");
            format!("{{\"return\": {}}}\n", if was { 2 } else { 0 })
        } else {
            "{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"what?\"}}\n".into()
        };
        self.port.send(answer.as_bytes())
    }
}

fn write(disk: &mut Disk, block: Dma, count: u64) -> Result<()> {
    (0..BLOCK).step_by(8).for_each(|at| block.set64(at, count));
    disk.write(BLOCK / 512, block)
}

fn rounds(machine: &mut Machine) -> core::result::Result<(), Failure> {
    let functions = machine.bus()?.virtio(2);
    let [first, second, ..] = functions.as_slice() else { return Err("fewer than two disks".into()) };
    let (mut first, mut second) = (Disk::open(*first, 16)?, Disk::open(*second, 16)?);
    let port = Port::open(machine, "org.qemu.guest_agent.0")?;
    let mut agent = Agent { port, line: Vec::new(), frozen: false };
    let block = Dma::new(BLOCK);
    first.read(BLOCK / 512, block)?;
    let mut count = block.get64(0);
    println!("pair: found {count}");
    loop {
        if !agent.attend(count)? {
            modes::sleep_until(clock::now_ns() + 1_000_000);
            continue;
        }
        count += 1;
        write(&mut first, block, count)?;
        write(&mut second, block, count)?;
        if count % ROUNDS_A_LINE == 0 {
            println!("pair: {count}");
        }
    }
}

/// Writes until something is wrong; says what.
pub fn run(machine: &mut Machine) {
    match rounds(machine) {
        Ok(()) => {}
        Err(Failure::Failed(reason) | Failure::Skipped(reason)) => println!("pair: failed {reason}"),
    }
}
