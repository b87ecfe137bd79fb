//! Chance with a seed: the same seed, the same faults (as far as the machine's timing allows).

use std::time::Duration;

/// Splitmix64.
#[derive(Debug, Clone)]
pub struct Chance(u64);

impl Chance {
    /// Of a seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Another one, for somebody else.
    #[must_use]
    pub fn fork(&mut self) -> Self {
        Self(self.any())
    }

    /// Any number.
    #[must_use]
    pub fn any(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Less than that; 0 for 0.
    #[must_use]
    pub fn below(&mut self, bound: u64) -> u64 {
        self.any().checked_rem(bound).unwrap_or(0)
    }

    /// One in so many.
    #[must_use]
    pub fn one_in(&mut self, many: u64) -> bool {
        self.below(many) == 0
    }

    /// At most that.
    #[must_use]
    pub fn up_to(&mut self, most: Duration) -> Duration {
        Duration::from_millis(self.below(u64::try_from(most.as_millis()).unwrap_or(u64::MAX)))
    }

    /// Between half of that and one and a half; a year for zero.
    #[must_use]
    pub fn about(&mut self, mean: Duration) -> Duration {
        if mean.is_zero() {
            return Duration::from_secs(365 * 86_400);
        }
        (mean / 2).saturating_add(self.up_to(mean))
    }
}
