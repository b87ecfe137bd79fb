//! The sensors, below a given root of sysfs.
//!
//! In this order, and never two of them added up that measure the same:
//!
//! | method | read | covers | error |
//! |---|---|---|---|
//! | `hwmon power_meter` | power1_average, integrated | the whole host, as its power supply is fed | as exact as two looks: what changed in between is missed |
//! | `rapl psys` | energy_uj of the zone psys | the board: processors, memory, chipset | counted by the hardware, ±5 %; no disks, fans, supply |
//! | `rapl package` | energy_uj of packages and their dram | processors, and memory where it has a zone | likewise |
//! | `hwmon energy` | energy*_input | what the chip says, for amd_energy the sockets | counted by the hardware |
//! | `hwmon power` | power*_input, integrated | what the chips say | as exact as two looks |
//!
//! A counter that ran backwards has wrapped at `max_energy_range_uj`; where there is no such range it was reset, and what it
//! shows since is all that is sure. Two wraps between two looks cannot be seen: look often (a range lasts minutes at least).

use std::{collections::BTreeMap, fs, path::PathBuf, time::Duration};

/// How energy is measured here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// ACPI's power meter.
    PowerMeter,
    /// RAPL's zone of the platform.
    RaplPsys,
    /// RAPL's packages and their memory.
    RaplPackage,
    /// Chips that count energy.
    HwmonEnergy,
    /// Chips that show power.
    HwmonPower,
}

impl Method {
    /// Its name, what it covers, and its error, for the person.
    #[must_use]
    pub const fn describe(self) -> &'static str {
        match self {
            Self::PowerMeter => {
                "hwmon power_meter: the whole host; power integrated between looks, what changed in between is missed"
            }
            Self::RaplPsys => {
                "rapl psys: processors, memory and chipset, counted within 5 %; without disks, fans and power supply"
            }
            Self::RaplPackage => {
                "rapl package: processors, and memory where it has a zone, counted within 5 %; without disks, fans and power supply"
            }
            Self::HwmonEnergy => "hwmon energy: what the chips count, for amd_energy the sockets",
            Self::HwmonPower => {
                "hwmon power: what the chips show; integrated between looks, what changed in between is missed"
            }
        }
    }
}

/// What was taken since the last look, microjoules.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sample {
    /// By all that the sensor covers.
    pub total_uj: u64,
    /// Of that, by memory, where it has a sensor of its own.
    pub memory_uj: Option<u64>,
}

/// A file that is read.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Zone {
    path: PathBuf,
    /// Of a counter: where it wraps; 0: nowhere that is known.
    range_uj: u64,
    is_memory: bool,
}

/// Reads the sensors; knows what they showed last.
#[derive(Debug)]
pub struct Reader {
    sys: PathBuf,
    found: Option<(Method, Vec<Zone>)>,
    last: BTreeMap<PathBuf, u64>,
}

/// Chips whose power is of one part that may not even run guests.
const NOT_THE_HOST: &[&str] = &["amdgpu", "nouveau", "i915", "xe", "nvme", "ucsi", "BAT", "AC"];

impl Reader {
    /// Looks for sensors below `sys` (`/sys`).
    #[must_use]
    pub fn new(sys: impl Into<PathBuf>) -> Self {
        let mut reader = Self { sys: sys.into(), found: None, last: BTreeMap::new() };
        reader.found = reader.find();
        reader
    }

    /// How it is measured; `None`: it is not.
    #[must_use]
    pub fn method(&self) -> Option<Method> {
        self.found.as_ref().map(|(method, _)| *method)
    }

    /// What was taken since the last look, `elapsed` ago. `None` without a sensor, and at the first look.
    pub fn sample(&mut self, elapsed: Duration) -> Option<Sample> {
        let (method, zones) = self.found.clone()?;
        let mut sample = Sample::default();
        let mut memory = 0_u64;
        let mut known = false;
        for zone in &zones {
            let Some(now) = number(&zone.path) else {
                // It comes back as one that is seen for the first time.
                self.last.remove(&zone.path);
                continue;
            };
            let Some(then) = self.last.insert(zone.path.clone(), now) else { continue };
            known = true;
            let taken = match method {
                Method::PowerMeter | Method::HwmonPower => integral(then, now, elapsed),
                Method::RaplPsys | Method::RaplPackage | Method::HwmonEnergy => {
                    advance(then, now, zone.range_uj)
                }
            };
            sample.total_uj = sample.total_uj.saturating_add(taken);
            if zone.is_memory {
                memory = memory.saturating_add(taken);
            }
        }
        if zones.iter().any(|zone| zone.is_memory) {
            sample.memory_uj = Some(memory);
        }
        known.then_some(sample)
    }

    fn find(&self) -> Option<(Method, Vec<Zone>)> {
        let chips = self.chips();
        let meters: Vec<Zone> =
            chips.iter().filter(|(name, _)| name == "power_meter").flat_map(power).collect();
        let (psys, packages) = self.rapl();
        let energy: Vec<Zone> = chips.iter().flat_map(|chip| inputs(chip, "energy", "_input")).collect();
        let of_host = |name: &str| !NOT_THE_HOST.iter().any(|not| name.starts_with(not));
        let shown: Vec<Zone> = chips.iter().filter(|(name, _)| of_host(name)).flat_map(power).collect();
        [
            (Method::PowerMeter, meters),
            (Method::RaplPsys, psys),
            (Method::RaplPackage, packages),
            (Method::HwmonEnergy, energy),
            (Method::HwmonPower, shown),
        ]
        .into_iter()
        .find(|(_, zones)| zones.iter().any(|zone| number(&zone.path).is_some()))
    }

    /// The zones psys, and those of packages with their memory.
    fn rapl(&self) -> (Vec<Zone>, Vec<Zone>) {
        let base = self.sys.join("class/powercap");
        let (mut psys, mut packages) = (Vec::new(), Vec::new());
        for dir in names(&base) {
            // `intel-rapl:0` is a package, `intel-rapl:0:1` a part of it. The -mmio zones count the same a second time.
            let Some(numbers) = dir.strip_prefix("intel-rapl:") else { continue };
            let path = base.join(&dir);
            let name = text(&path.join("name"));
            let zone = Zone {
                path: path.join("energy_uj"),
                range_uj: number(&path.join("max_energy_range_uj")).unwrap_or(0),
                is_memory: name == "dram",
            };
            match (numbers.contains(':'), name.as_str()) {
                (false, "psys") => psys.push(zone),
                (false, _) | (true, "dram") => packages.push(zone),
                // Parts that are within their package.
                (true, _) => {}
            }
        }
        (psys, packages)
    }

    /// Name and directory of each chip.
    fn chips(&self) -> Vec<(String, PathBuf)> {
        let base = self.sys.join("class/hwmon");
        let chip = |dir: String| (text(&base.join(&dir).join("name")), base.join(dir));
        names(&base).into_iter().map(chip).collect()
    }
}

/// Files `energy1_input` of a chip. Of amd_energy only the sockets: the cores are within them.
fn inputs((name, dir): &(String, PathBuf), kind: &str, end: &str) -> Vec<Zone> {
    let wanted = |file: &String| {
        let number = file.strip_prefix(kind).and_then(|rest| rest.strip_suffix(end));
        let Some(number) = number.filter(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit())) else {
            return false;
        };
        let label = text(&dir.join(format!("{kind}{number}_label")));
        name != "amd_energy" || label.starts_with("Esocket")
    };
    let files = names(dir).into_iter().filter(wanted);
    files.map(|file| Zone { path: dir.join(file), range_uj: 0, is_memory: false }).collect()
}

fn power(chip: &(String, PathBuf)) -> Vec<Zone> {
    let input = inputs(chip, "power", "_input");
    if input.is_empty() { inputs(chip, "power", "_average") } else { input }
}

fn names(dir: &std::path::Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort_unstable();
    names
}

fn text(path: &std::path::Path) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

fn number(path: &std::path::Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// What a counter counted from `then` to `now` (Documentation/power/powercap: it wraps to 0 after its range).
pub(super) fn advance(then: u64, now: u64, range: u64) -> u64 {
    match now.checked_sub(then) {
        Some(more) => more,
        None => range.checked_sub(then).map_or(now, |rest| rest.saturating_add(now)),
    }
}

/// Microwatts at both ends of a time, as a trapezoid.
fn integral(then: u64, now: u64, elapsed: Duration) -> u64 {
    let middle = (u128::from(then) + u128::from(now)) / 2;
    u64::try_from(middle * elapsed.as_micros() / 1_000_000).unwrap_or(u64::MAX)
}
