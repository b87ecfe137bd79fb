//! Time: the TSC, with its frequency from kvm-clock where that exists.

use crate::cpu;
use crate::mem::Dma;
use core::sync::atomic::{AtomicU64, Ordering};

static TSC_HZ: AtomicU64 = AtomicU64::new(1_000_000_000);

const MSR_KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;

/// Finds the TSC's frequency; false if there is no kvm-clock (then 1 GHz is assumed, as under emulation).
pub fn init() -> bool {
    let page = Dma::new(4096);
    if !cpu::write_msr(MSR_KVM_SYSTEM_TIME_NEW, page.address | 1) {
        return false;
    }
    let (multiplier, shift) = (u128::from(page.get32(24)), i32::from(page.get8(28) as i8));
    cpu::write_msr(MSR_KVM_SYSTEM_TIME_NEW, 0);
    if multiplier == 0 {
        return false;
    }
    // ns = ((tsc << shift) * multiplier) >> 32
    let hz = (1_000_000_000u128 << 32) / multiplier;
    let hz = if shift >= 0 { hz >> shift } else { hz << -shift };
    TSC_HZ.store(hz as u64, Ordering::Relaxed);
    true
}

/// TSC ticks a second.
pub fn tsc_hz() -> u64 {
    TSC_HZ.load(Ordering::Relaxed)
}

/// Nanoseconds since the TSC was zero.
pub fn now_ns() -> u64 {
    (u128::from(cpu::tsc()) * 1_000_000_000 / u128::from(tsc_hz())) as u64
}

/// Polls `ready` until it says so or `ms` have gone by; the answer is whether it did.
pub fn poll(ms: u64, mut ready: impl FnMut() -> bool) -> bool {
    let end = now_ns() + ms * 1_000_000;
    loop {
        if ready() {
            return true;
        }
        if now_ns() > end {
            return false;
        }
        core::hint::spin_loop();
    }
}

/// Spins for some microseconds.
pub fn delay_us(us: u64) {
    let end = now_ns() + us * 1000;
    while now_ns() < end {
        core::hint::spin_loop();
    }
}
