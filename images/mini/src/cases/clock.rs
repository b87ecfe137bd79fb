//! The PC's clock, the watchdog behind the WDAT, the generation identifier's page, and the balloon.

use crate::mem::{Dma, bytes_at};
use crate::suite::{Case, Machine, Outcome};
use crate::virtio::{NO_VECTOR, Segment, Virtio};
use crate::{clock, cpu, ensure, skip};

pub const CASES: &[Case] = &[
    Case { group: "clock", name: "date", run: date },
    Case { group: "clock", name: "every-register", run: every_register },
    Case { group: "watchdog", name: "runs-and-stops", run: runs_and_stops },
    Case { group: "watchdog", name: "bites", run: bites },
    Case { group: "generation", name: "is-random", run: is_random },
    Case { group: "balloon", name: "inflate", run: inflate },
    Case { group: "balloon", name: "report", run: report },
    Case { group: "balloon", name: "nonsense", run: balloon_nonsense },
];

fn register(index: u8) -> u64 {
    cpu::outb(0x70, index);
    u64::from(cpu::inb(0x71))
}

fn number(index: u8) -> u64 {
    let bcd = register(index);
    (bcd >> 4) * 10 + (bcd & 15)
}

fn date(_: &mut Machine) -> Outcome {
    let read = || (number(50) * 100 + number(9), number(8), number(7), number(4), number(2), number(0));
    let first = read();
    let (year, month, day, hour, minute, second) = first;
    ensure!((2024..2100).contains(&year), "the year is {year}");
    let sane =
        (1..=12).contains(&month) && (1..=31).contains(&day) && hour < 24 && minute < 60 && second < 60;
    ensure!(sane, "{first:?} is no date");
    ensure!(clock::poll(3000, || read() != first), "the clock stands at {first:?}");
    Ok(())
}

/// Time cannot be set; memory keeps what is written; the control registers never say "updating".
fn every_register(_: &mut Machine) -> Outcome {
    for index in 0..=255u8 {
        cpu::outb(0x70, index);
        cpu::outb(0x71, 0xa5);
        let plain = matches!(index & 0x7f, 14..=49 | 51..=127);
        ensure!(!plain || register(index) == 0xa5, "register {index} forgot");
        cpu::outb(0x71, 0);
    }
    ensure!(number(50) == 20 && register(10) & 0x80 == 0 && register(13) == 0x80, "control registers");
    Ok(())
}

const CONTROL: u16 = 0x608;
const COUNT: u16 = 0x60c;

fn runs_and_stops(machine: &mut Machine) -> Outcome {
    let Some(table) = machine.acpi()?.table(b"WDAT") else { skip!("no WDAT") };
    ensure!(table.bytes.len() > 68, "a WDAT of {} bytes", table.bytes.len());
    ensure!(cpu::inl(CONTROL) & 1 == 0, "it runs before anybody started it");
    cpu::outl(COUNT, 100);
    cpu::outl(CONTROL, 1);
    ensure!(cpu::inl(CONTROL) & 1 == 1, "it does not run");
    ensure!(clock::poll(2000, || cpu::inl(COUNT) < 99), "it does not count: {}", cpu::inl(COUNT));
    cpu::outl(CONTROL, 2);
    ensure!(cpu::inl(COUNT) >= 98, "a pet did not help: {}", cpu::inl(COUNT));
    cpu::outl(CONTROL, 0);
    ensure!(cpu::inl(CONTROL) & 1 == 0, "it does not stop");
    // Other widths and values change nothing.
    cpu::outb(CONTROL, 1);
    cpu::outl(CONTROL, 0xffff_ffff);
    ensure!(cpu::inl(CONTROL) & 1 == 0, "started by nonsense");
    Ok(())
}

fn bites(machine: &mut Machine) -> Outcome {
    if machine.boot.option("mini.watchdog") != Some("bites") {
        skip!("mini.watchdog=bites was not asked for");
    }
    cpu::outl(COUNT, 10);
    cpu::outl(CONTROL, 1);
    clock::delay_us(20_000_000);
    Err("it did not bite".into())
}

fn is_random(_: &mut Machine) -> Outcome {
    let id = bytes_at(0xf_e000, 16);
    let zeros = id.iter().filter(|byte| **byte == 0).count();
    ensure!(zeros < 8, "{id:x?} is not random");
    crate::println!("mini: generation {id:x?}");
    Ok(())
}

fn balloon(machine: &mut Machine, features: u64) -> Result<Virtio, crate::suite::Failure> {
    let Some(&function) = machine.bus()?.virtio(5).first() else { skip!("no virtio-balloon") };
    let device = Virtio::open(function)?;
    ensure!(device.device_features() & 0x26 == 0x26, "features {:#x}", device.device_features());
    device.negotiate(features)?;
    Ok(device)
}

fn inflate(machine: &mut Machine) -> Outcome {
    let device = balloon(machine, 0)?;
    let (mut inflate, mut deflate) = (device.queue(0, 8, NO_VECTOR)?, device.queue(1, 8, NO_VECTOR)?);
    device.driver_ok();
    let (pages, list) = (Dma::new(16 * 4096), Dma::new(64));
    pages.fill(0x77);
    for at in 0..16u64 {
        list.set32(at * 4, (pages.address / 4096 + at) as u32);
    }
    let first = list.part(0, 32);
    inflate.request(&[Segment::out(first)])?;
    for at in 0..16u64 {
        let (byte, wanted) = (pages.get8(at * 4096 + 5), if at < 8 { 0 } else { 0x77 });
        ensure!(byte == wanted, "page {at} has {byte:#x}");
    }
    deflate.request(&[Segment::out(first)])?;
    pages.fill(0x55);
    ensure!(pages.get8(5) == 0x55, "a page that was taken again does not keep what is written");
    Ok(device.reset()?)
}

fn report(machine: &mut Machine) -> Outcome {
    let device = balloon(machine, 1 << 5)?;
    let _inflate = device.queue(0, 8, NO_VECTOR)?;
    let _deflate = device.queue(1, 8, NO_VECTOR)?;
    let mut reporting = device.queue(2, 8, NO_VECTOR)?;
    device.driver_ok();
    let pages = Dma::new(32 * 4096);
    pages.fill(0x33);
    reporting
        .request(&[Segment::into(pages.part(0, 8 * 4096)), Segment::into(pages.part(20 * 4096, 4096))])?;
    for at in 0..32u64 {
        let wanted = if at < 8 || at == 20 { 0 } else { 0x33 };
        ensure!(pages.get8(at * 4096 + 9) == wanted, "page {at} has {:#x}", pages.get8(at * 4096 + 9));
    }
    Ok(device.reset()?)
}

fn balloon_nonsense(machine: &mut Machine) -> Outcome {
    let device = balloon(machine, 0)?;
    let (mut inflate, mut deflate) = (device.queue(0, 8, NO_VECTOR)?, device.queue(1, 8, NO_VECTOR)?);
    device.driver_ok();
    let list = Dma::new(4096);
    for at in 0..1024u64 {
        // Past RAM, in the hole, at the very end.
        list.set32(at * 4, 0xffff_ffff - (at as u32) * 0x1001);
    }
    inflate.request(&[Segment::out(list)])?;
    inflate.request(&[Segment::out(list.part(1, 7))])?;
    inflate.request(&[Segment::into(list)])?;
    deflate.request(&[Segment::out(list)])?;
    ensure!(device.status() & 64 == 0, "the device needs a reset");
    Ok(device.reset()?)
}
