//! Memory: the heap, buffers for devices, the identity mapping, and the four functions that a compiler
//! expects of any platform.
//!
//! The heap only grows: the guest lives for seconds, and a buffer that is never reused cannot hide a device
//! that writes too late. Addresses are physical addresses everywhere (identity mapped, 2 MiB pages, all of it
//! open to CPL3).

use crate::cpu;
use core::alloc::{GlobalAlloc, Layout};
use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};

unsafe extern "C" {
    static image_end: u8;
    static mut pml4: [u64; 512];
}

static HEAP_NEXT: AtomicU64 = AtomicU64::new(0);
static HEAP_END: AtomicU64 = AtomicU64::new(0);

/// The first address behind this program.
pub fn image_end_address() -> u64 {
    (&raw const image_end) as u64
}

/// Gives the heap its memory: from the end of the image to `end`.
pub fn init_heap(end: u64) {
    HEAP_NEXT.store(image_end_address(), Ordering::Relaxed);
    HEAP_END.store(end, Ordering::Relaxed);
}

/// Where the heap ends: nothing below may be scribbled on by memory cases.
pub fn heap_end() -> u64 {
    HEAP_END.load(Ordering::Relaxed)
}

/// How much of the heap is used now, for [`rewind`].
pub fn mark() -> u64 {
    HEAP_NEXT.load(Ordering::Relaxed)
}

/// Gives back what was allocated since the mark, zeroed when it is taken again. Only where nothing of it is in use any
/// more, by this program or by a device.
pub fn rewind(mark: u64) {
    HEAP_NEXT.store(mark, Ordering::Relaxed);
}

struct Bump;

// SAFETY: hands out disjoint ranges of RAM that nothing else uses; null when exhausted.
unsafe impl GlobalAlloc for Bump {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let align = layout.align() as u64;
        let start = HEAP_NEXT.load(Ordering::Relaxed).next_multiple_of(align);
        let end = start + layout.size() as u64;
        if end > heap_end() {
            return core::ptr::null_mut();
        }
        HEAP_NEXT.store(end, Ordering::Relaxed);
        start as *mut u8
    }
    unsafe fn dealloc(&self, _memory: *mut u8, _layout: Layout) {}
}

#[global_allocator]
static HEAP: Bump = Bump;

/// A range of guest memory shared with a device: read and written only through volatile accesses.
#[derive(Clone, Copy, Debug)]
pub struct Dma {
    /// Guest-physical address.
    pub address: u64,
    /// Length in bytes.
    pub len: u64,
}

impl Dma {
    /// New zeroed memory, aligned to 4 KiB.
    pub fn new(len: u64) -> Self {
        let layout = Layout::from_size_align(len as usize, 4096).expect("a power of two");
        // SAFETY: the size is not zero at any caller.
        let memory = unsafe { HEAP.alloc(layout) };
        assert!(!memory.is_null(), "out of memory for a buffer of {len} bytes");
        let dma = Self { address: memory as u64, len };
        dma.fill(0);
        dma
    }

    /// A range that the caller found free, for example above 4 GiB.
    pub fn at(address: u64, len: u64) -> Self {
        Self { address, len }
    }

    fn check(&self, offset: u64, len: u64) -> u64 {
        assert!(offset + len <= self.len, "access at {offset} of a buffer of {} bytes", self.len);
        self.address + offset
    }

    /// Writes one byte.
    pub fn set8(&self, offset: u64, value: u8) {
        cpu::write8(self.check(offset, 1), value);
    }
    /// Reads one byte.
    pub fn get8(&self, offset: u64) -> u8 {
        cpu::read8(self.check(offset, 1))
    }
    /// Writes 16 bits.
    pub fn set16(&self, offset: u64, value: u16) {
        cpu::write16(self.check(offset, 2), value);
    }
    /// Reads 16 bits.
    pub fn get16(&self, offset: u64) -> u16 {
        cpu::read16(self.check(offset, 2))
    }
    /// Writes 32 bits.
    pub fn set32(&self, offset: u64, value: u32) {
        cpu::write32(self.check(offset, 4), value);
    }
    /// Reads 32 bits.
    pub fn get32(&self, offset: u64) -> u32 {
        cpu::read32(self.check(offset, 4))
    }
    /// Writes 64 bits.
    pub fn set64(&self, offset: u64, value: u64) {
        cpu::write64(self.check(offset, 8), value);
    }
    /// Reads 64 bits.
    pub fn get64(&self, offset: u64) -> u64 {
        cpu::read64(self.check(offset, 8))
    }
    /// Sets every byte.
    pub fn fill(&self, value: u8) {
        // SAFETY: the whole range belongs to this buffer.
        unsafe { memset(self.address as *mut u8, i32::from(value), self.len as usize) };
    }
    /// Copies bytes in.
    pub fn copy_in(&self, offset: u64, bytes: &[u8]) {
        let to = self.check(offset, bytes.len() as u64);
        // SAFETY: checked above; a DMA buffer never overlaps a Rust slice.
        unsafe { memcpy(to as *mut u8, bytes.as_ptr(), bytes.len()) };
    }
    /// A part of it.
    pub fn part(&self, offset: u64, len: u64) -> Self {
        Self { address: self.check(offset, len), len }
    }
    /// The first offset at which two buffers differ.
    pub fn first_difference(&self, other: &Self) -> Option<u64> {
        (0..self.len.min(other.len)).find(|&offset| self.get8(offset) != other.get8(offset))
    }
}

/// Reads bytes at a physical address (tables that the machine's makers left in memory).
pub fn bytes_at(address: u64, len: usize) -> &'static [u8] {
    // SAFETY: callers pass what the boot protocol or a checksummed table named; these do not change.
    unsafe { core::slice::from_raw_parts(address as *const u8, len) }
}

/// Makes `len` bytes from `address` accessible, by the GiB.
pub fn map(address: u64, len: u64) {
    const GIB: u64 = 1 << 30;
    let mut changed = false;
    for gib in address / GIB..=(address + len.max(1) - 1) / GIB {
        // SAFETY: one processor changes the tables, and only adds to them.
        let top = unsafe { &mut pml4[(gib >> 9) as usize & 511] };
        if *top == 0 {
            *top = Dma::new(4096).address | 7;
        }
        let middle = Dma::at(*top & !0xfff, 4096);
        if middle.get64((gib & 511) * 8) == 0 {
            let low = Dma::new(4096);
            for page in 0..512 {
                low.set64(page * 8, (gib * GIB + page * (2 << 20)) | 0x87);
            }
            middle.set64((gib & 511) * 8, low.address | 7);
            changed = true;
        }
    }
    if changed {
        cpu::flush_translations();
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    // SAFETY: the caller's contract.
    unsafe { asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _, inout("rcx") len => _) }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= len {
        // SAFETY: the caller's contract; copying upwards is right here.
        return unsafe { memcpy(to, from, len) };
    }
    // SAFETY: copies downwards, then restores the direction flag.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rdi") to.wrapping_add(len).wrapping_sub(1) => _,
            inout("rsi") from.wrapping_add(len).wrapping_sub(1) => _, inout("rcx") len => _);
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, len: usize) -> *mut u8 {
    // SAFETY: the caller's contract.
    unsafe { asm!("rep stosb", inout("rdi") to => _, in("al") value as u8, inout("rcx") len => _) }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, len: usize) -> i32 {
    for index in 0..len {
        // SAFETY: the caller's contract; volatile, or this would become a call of itself.
        let (a, b) = unsafe { (left.add(index).read_volatile(), right.add(index).read_volatile()) };
        if a != b {
            return i32::from(a) - i32::from(b);
        }
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, len: usize) -> i32 {
    // SAFETY: the same contract.
    unsafe { memcmp(left, right, len) }
}
