//! What the loader left for us: command line, memory map and the ACPI root, by PVH (`hvm_start_info`) or by
//! the Linux boot protocol (`boot_params`).

use crate::mem::{self, bytes_at};
use alloc::string::String;
use alloc::vec::Vec;

/// Which boot protocol started us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// PVH, 32-bit entry.
    Pvh,
    /// Linux, 64-bit entry.
    Linux,
}

/// A range of the memory map.
#[derive(Clone, Copy, Debug)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// The E820 type: 1 is RAM.
    pub kind: u32,
}

/// The loader's hand-over, copied.
pub struct Boot {
    /// How we were started.
    pub protocol: Protocol,
    /// Kernel command line.
    pub cmdline: String,
    /// Where the ACPI root pointer was said to be; 0 = not said.
    pub rsdp: u64,
    /// The memory map.
    pub ranges: Vec<Range>,
}

fn u32_at(address: u64) -> u32 {
    crate::cpu::read32(address)
}

fn u64_at(address: u64) -> u64 {
    crate::cpu::read64(address)
}

/// The memory map entries: address of the first, size of one, count.
fn map_of(kind: u32, info: u64) -> (u64, u64, u64) {
    if kind == 0 {
        (u64_at(info + 40), 24, u64::from(u32_at(info + 48)))
    } else {
        (info + 0x2d0, 20, u64::from(crate::cpu::read8(info + 0x1e8)))
    }
}

/// Reads the hand-over. The heap does not exist before: it starts in the RAM range that holds this image.
pub fn read(kind: u32, info: u64) -> Boot {
    let (first, size, count) = map_of(kind, info);
    let image_end = mem::image_end_address();
    let mut end = image_end + (8 << 20);
    for index in 0..count {
        let entry = first + index * size;
        let (start, len) = (u64_at(entry), u64_at(entry + 8));
        if u32_at(entry + 16) == 1 && start <= image_end && image_end < start + len {
            // Half of it: the memory cases want some to probe.
            end = image_end + ((start + len - image_end) / 2).min(64 << 20);
        }
    }
    mem::init_heap(end);
    let ranges = (0..count)
        .map(|index| first + index * size)
        .map(|entry| Range { start: u64_at(entry), len: u64_at(entry + 8), kind: u32_at(entry + 16) })
        .collect();
    let (protocol, cmdline, rsdp) = if kind == 0 {
        (Protocol::Pvh, u64_at(info + 24), u64_at(info + 32))
    } else {
        let low = u64::from(u32_at(info + 0x228));
        (Protocol::Linux, low | u64::from(u32_at(info + 0xc8)) << 32, u64_at(info + 0x70))
    };
    Boot { protocol, cmdline: text_at(cmdline), rsdp, ranges }
}

fn text_at(address: u64) -> String {
    if address == 0 {
        return String::new();
    }
    let bytes = bytes_at(address, 4096);
    let len = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..len]).into_owned()
}

impl Boot {
    /// The value of `key=value` on the command line, the last one if it is there more than once.
    pub fn option(&self, key: &str) -> Option<&str> {
        self.cmdline
            .split_whitespace()
            .filter_map(|word| word.split_once('='))
            .filter(|(name, _)| *name == key)
            .map(|(_, value)| value)
            .next_back()
    }

    /// `key=number`.
    pub fn number(&self, key: &str) -> Option<u64> {
        self.option(key)?.parse().ok()
    }

    /// The ranges of RAM.
    pub fn ram(&self) -> impl Iterator<Item = Range> + '_ {
        self.ranges.iter().copied().filter(|range| range.kind == 1)
    }
}
