//! The clock of a PC (MC146818, ports 0x70 and 0x71): the host's time, in UTC, for guests without kvm-clock and for
//! `hwclock`.
//!
//! ```text
//!   0 2 4      seconds, minutes, hours, in BCD     10  control A: never updating   13  control D: battery is good
//!   6 7 8 9    day of week, day, month, year       11  control B: 24 hours, BCD    50  century
//!   1 3 5      alarm: kept, never rings (no interrupt is wired)                    the rest is memory, kept until reset
//! ```
//!
//! A guest that sets the time changes nothing: the clock is the host's. Reads never block and never fail.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// Registers, all of which the guest may address.
const REGISTERS: usize = 128;
/// Control A: 32 kHz, no update in progress. B: 24 hours, BCD, nothing enabled. D: the battery is good.
const CONTROL_A: u8 = 0x26;
const CONTROL_B: u8 = 0x02;
const CONTROL_D: u8 = 0x80;
/// Where the FADT says that the century is.
pub const CENTURY_REGISTER: u8 = 50;

/// The clock's two ports.
#[derive(Debug)]
pub struct Rtc {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    index: u8,
    memory: [u8; REGISTERS],
}

impl Default for Rtc {
    fn default() -> Rtc {
        Rtc { state: Mutex::new(State { index: 0, memory: [0; REGISTERS] }) }
    }
}

impl Rtc {
    /// What its memory held, and which register was chosen. The time is the host's, whatever it was.
    #[must_use]
    pub fn restored(index: u8, memory: &[u8]) -> Rtc {
        let rtc = Rtc::default();
        rtc.select(index);
        for (slot, byte) in rtc.lock().memory.iter_mut().zip(memory) {
            *slot = *byte;
        }
        rtc
    }

    /// For [`Rtc::restored`].
    pub fn save(&self) -> (u8, Vec<u8>) {
        let state = self.lock();
        (state.index, state.memory.to_vec())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest chooses a register. Bit 7 masks NMIs on real machines, of which there are none here.
    pub fn select(&self, index: u8) {
        self.lock().index = index & 0x7f;
    }

    /// The guest reads the chosen register.
    pub fn read(&self) -> u8 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let state = self.lock();
        let kept = state.memory.get(usize::from(state.index)).copied().unwrap_or(0);
        register(state.index, now).unwrap_or(kept)
    }

    /// The guest writes the chosen register. Time and control stay what they are.
    pub fn write(&self, value: u8) {
        let mut state = self.lock();
        let index = usize::from(state.index);
        if let Some(slot) = state.memory.get_mut(index) {
            *slot = value;
        }
    }
}

/// A register that the clock itself fills, `seconds` after 1970; `None`: memory.
fn register(index: u8, seconds: u64) -> Option<u8> {
    let (days, of_day) = (seconds / 86_400, seconds % 86_400);
    let date = Date::of(days);
    let value = match index {
        0 => of_day % 60,
        2 => of_day / 60 % 60,
        4 => of_day / 3600,
        // 1970 began on a Thursday; Sunday is 1.
        6 => return Some(((days.wrapping_add(4)) % 7) as u8 + 1),
        7 => date.day,
        8 => date.month,
        9 => date.year % 100,
        10 => return Some(CONTROL_A),
        11 => return Some(CONTROL_B),
        12 => return Some(0),
        13 => return Some(CONTROL_D),
        CENTURY_REGISTER => date.year / 100 % 100,
        _ => return None,
    };
    // All of them are below 100.
    Some((((value / 10) << 4) | (value % 10)) as u8)
}

/// A day of the Gregorian calendar.
struct Date {
    year: u64,
    month: u64,
    day: u64,
}

impl Date {
    /// The day so many days after 1 January 1970.
    fn of(days: u64) -> Date {
        let mut year = 1970u64;
        let mut rest = days;
        // Whole cycles of 400 years first, so that no number of days takes long.
        const CYCLE_DAYS: u64 = 146_097;
        year = year.saturating_add((rest / CYCLE_DAYS).saturating_mul(400));
        rest %= CYCLE_DAYS;
        let leap =
            |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
        while rest >= 365 + u64::from(leap(year)) {
            rest = rest.saturating_sub(365 + u64::from(leap(year)));
            year = year.saturating_add(1);
        }
        let february = 28 + u64::from(leap(year));
        let mut month = 1;
        for len in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
            if rest < len {
                break;
            }
            rest = rest.saturating_sub(len);
            month += 1;
        }
        Date { year, month, day: rest.saturating_add(1) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Year, month, day, hour, minute, second, day of week, as a driver reads them.
    fn read(seconds: u64) -> [u64; 7] {
        [CENTURY_REGISTER, 9, 8, 7, 4, 2, 0, 6]
            .map(|index| u64::from(register(index, seconds).expect("the clock's")))
            .map(|bcd| (bcd >> 4) * 10 + (bcd & 15))
            .into_iter()
            .collect::<Vec<_>>()
            .try_into()
            .map(|[century, year, month, day, hour, minute, second, weekday]: [u64; 8]| {
                [century * 100 + year, month, day, hour, minute, second, weekday]
            })
            .expect("eight")
    }

    #[test]
    fn known_moments() {
        assert_eq!(read(0), [1970, 1, 1, 0, 0, 0, 5]);
        assert_eq!(read(951_782_399), [2000, 2, 28, 23, 59, 59, 2]);
        assert_eq!(read(951_868_799), [2000, 2, 29, 23, 59, 59, 3]);
        assert_eq!(read(1_709_251_200), [2024, 3, 1, 0, 0, 0, 6]);
        assert_eq!(read(4_107_542_400), [2100, 3, 1, 0, 0, 0, 2]);
    }

    proptest! {
        #[test]
        fn the_next_second_is_the_next(seconds in 0u64..8_000_000_000) {
            prop_assert!(read(seconds)[..6] < read(seconds + 1)[..6]);
        }

        #[test]
        fn memory_is_kept_and_any_saved_one_is_taken(index in any::<u8>(), memory in prop::collection::vec(any::<u8>(), 0..200)) {
            let rtc = Rtc::restored(index, &memory);
            let (index, mut saved) = rtc.save();
            prop_assert_eq!(saved.len(), REGISTERS);
            let again = Rtc::restored(index, &saved);
            prop_assert_eq!(again.save(), (index, saved.clone()));
            again.select(100);
            prop_assert_eq!(again.read(), saved.remove(100));
        }

        #[test]
        fn any_access_is_answered(index in any::<u8>(), value in any::<u8>(), seconds in any::<u64>()) {
            let rtc = Rtc::default();
            rtc.select(index);
            rtc.write(value);
            let own = register(index & 0x7f, seconds).is_some();
            prop_assert!(own || rtc.read() == value);
        }
    }
}
