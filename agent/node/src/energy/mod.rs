//! Energy: what the host has taken, and whose it was.
//!
//! ```text
//!   /sys/class/powercap, /sys/class/hwmon ─▶ sensor::Reader ─▶ microjoules since the last look ─▶ share ─▶ VMs, host, idle
//! ```
//!
//! Owns: the readers, the arithmetic of sharing out, the carbon intensity. Never: a guess. A host without a sensor has no
//! energy, and everybody is told "not measured". The root of sysfs is a parameter.

mod sensor;
mod share;

#[cfg(test)]
mod energy_test;

use std::{fs, path::PathBuf};

use serde::Deserialize;

pub use sensor::{Method, Reader, Sample};
pub use share::{Consumer, Host, Shares, share};

/// What an operator sets.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EnergySettings {
    /// The part of what a sensor for the whole host shows that is shared out by memory, 0 to 1; the rest is by processor time.
    pub memory_share: f64,
    /// Grams of CO2 for a kWh; 0: not known.
    pub carbon_grams_per_kwh: f64,
    /// A file that holds that number, written by whoever asks the grid; it goes before the fixed one. None when empty.
    pub carbon_file: PathBuf,
}

impl Default for EnergySettings {
    fn default() -> Self {
        Self { memory_share: 0.25, carbon_grams_per_kwh: 0.0, carbon_file: PathBuf::new() }
    }
}

impl EnergySettings {
    /// Grams of CO2 for a kWh now; `None` when nobody knows.
    #[must_use]
    pub fn carbon_intensity(&self) -> Option<f64> {
        let sane = |grams: &f64| grams.is_finite() && *grams > 0.0 && *grams < 10_000.0;
        let from_file = || {
            if self.carbon_file.as_os_str().is_empty() {
                return None;
            }
            fs::read_to_string(&self.carbon_file).ok()?.trim().parse::<f64>().ok().filter(sane)
        };
        from_file().or_else(|| Some(self.carbon_grams_per_kwh).filter(sane))
    }
}

/// Microjoules in a kWh.
const KWH_UJ: f64 = 3.6e12;

/// Milligrams of CO2 of so much energy.
#[must_use]
#[allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a saturating cast of a number that is not negative; parts of a milligram do not matter"
)]
pub fn carbon_mg(microjoules: u64, grams_per_kwh: f64) -> u64 {
    (microjoules as f64 / KWH_UJ * grams_per_kwh * 1000.0).round() as u64
}
