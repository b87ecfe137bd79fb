//! Recorded sysfs trees, and the property that the parts are the whole.

use std::{fs, path::Path, time::Duration};

use proptest::prelude::*;
use uuid::Uuid;

use super::*;

fn put(root: &Path, path: &str, text: &str) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, format!("{text}\n")).unwrap();
}

const SECOND: Duration = Duration::from_secs(1);

/// As a server with two packages shows it.
fn rapl() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (zone, name, energy) in [
        ("intel-rapl:0", "package-0", "262143000000"),
        ("intel-rapl:0:0", "core", "5"),
        ("intel-rapl:0:1", "dram", "1000000"),
        ("intel-rapl:1", "package-1", "7000000"),
        ("intel-rapl-mmio:0", "package-0", "9"),
    ] {
        put(dir.path(), &format!("class/powercap/{zone}/name"), name);
        put(dir.path(), &format!("class/powercap/{zone}/energy_uj"), energy);
        put(dir.path(), &format!("class/powercap/{zone}/max_energy_range_uj"), "262143328850");
    }
    dir
}

#[test]
fn packages_and_memory_are_counted_once_and_wrap() {
    let dir = rapl();
    let mut reader = Reader::new(dir.path());
    assert_eq!(reader.method(), Some(Method::RaplPackage));
    assert_eq!(reader.sample(SECOND), None, "nothing to compare with yet");
    put(dir.path(), "class/powercap/intel-rapl:0/energy_uj", "1000");
    put(dir.path(), "class/powercap/intel-rapl:0:0/energy_uj", "900000");
    put(dir.path(), "class/powercap/intel-rapl:0:1/energy_uj", "1500000");
    put(dir.path(), "class/powercap/intel-rapl:1/energy_uj", "7000100");
    let sample = reader.sample(SECOND).unwrap();
    assert_eq!(sample, Sample { total_uj: 328_850 + 1000 + 500_000 + 100, memory_uj: Some(500_000) });
    // One that cannot be read any more (a processor taken out) costs its own part.
    fs::remove_file(dir.path().join("class/powercap/intel-rapl:1/energy_uj")).unwrap();
    assert_eq!(reader.sample(SECOND).unwrap().total_uj, 0);
}

#[test]
fn the_platform_goes_before_its_packages_and_the_meter_before_both() {
    let dir = rapl();
    put(dir.path(), "class/powercap/intel-rapl:2/name", "psys");
    put(dir.path(), "class/powercap/intel-rapl:2/energy_uj", "5");
    assert_eq!(Reader::new(dir.path()).method(), Some(Method::RaplPsys));
    put(dir.path(), "class/hwmon/hwmon0/name", "power_meter");
    put(dir.path(), "class/hwmon/hwmon0/power1_average", "100000000");
    let mut reader = Reader::new(dir.path());
    assert_eq!(reader.method(), Some(Method::PowerMeter));
    assert_eq!(reader.sample(SECOND), None);
    put(dir.path(), "class/hwmon/hwmon0/power1_average", "200000000");
    // 100 W, then 200 W, over two seconds: 300 J.
    assert_eq!(reader.sample(2 * SECOND), Some(Sample { total_uj: 300_000_000, memory_uj: None }));
}

#[test]
fn chips() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(Reader::new(dir.path()).method(), None);
    put(dir.path(), "class/hwmon/hwmon0/name", "amdgpu");
    put(dir.path(), "class/hwmon/hwmon0/power1_input", "5");
    put(dir.path(), "class/hwmon/hwmon1/name", "coretemp");
    put(dir.path(), "class/hwmon/hwmon1/temp1_input", "40000");
    assert_eq!(Reader::new(dir.path()).method(), None, "a graphics card is not the host");
    assert_eq!(Reader::new(dir.path()).sample(SECOND), None);
    put(dir.path(), "class/hwmon/hwmon2/name", "ina226");
    put(dir.path(), "class/hwmon/hwmon2/power1_input", "5000000");
    assert_eq!(Reader::new(dir.path()).method(), Some(Method::HwmonPower));
    put(dir.path(), "class/hwmon/hwmon3/name", "amd_energy");
    put(dir.path(), "class/hwmon/hwmon3/energy1_label", "Ecore000");
    put(dir.path(), "class/hwmon/hwmon3/energy1_input", "1");
    put(dir.path(), "class/hwmon/hwmon3/energy2_label", "Esocket0");
    put(dir.path(), "class/hwmon/hwmon3/energy2_input", "100");
    let mut reader = Reader::new(dir.path());
    assert_eq!((reader.method(), reader.sample(SECOND)), (Some(Method::HwmonEnergy), None));
    put(dir.path(), "class/hwmon/hwmon3/energy1_input", "50");
    put(dir.path(), "class/hwmon/hwmon3/energy2_input", "30");
    assert_eq!(reader.sample(SECOND).unwrap().total_uj, 30, "reset: what it shows since");
}

#[test]
fn the_carbon_intensity_is_a_file_s_or_the_configured_one() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("grid");
    let settings = EnergySettings {
        carbon_grams_per_kwh: 250.0,
        carbon_file: file.clone(),
        ..EnergySettings::default()
    };
    assert_eq!(settings.carbon_intensity(), Some(250.0));
    fs::write(&file, "31.5\n").unwrap();
    assert_eq!(settings.carbon_intensity(), Some(31.5));
    for odd in ["", "NaN", "-3", "inf", "coal"] {
        fs::write(&file, odd).unwrap();
        assert_eq!(settings.carbon_intensity(), Some(250.0), "{odd:?}");
    }
    assert_eq!(EnergySettings::default().carbon_intensity(), None);
    assert_eq!(carbon_mg(3_600_000_000_000, 250.0), 250_000);
}

proptest! {
    #[test]
    fn the_parts_are_the_whole(
        total in any::<u64>(),
        memory in proptest::option::of(any::<u64>()),
        host in (any::<u64>(), any::<u64>(), any::<u64>()),
        memory_share in -1.0_f64..2.0,
        vms in proptest::collection::vec((any::<u64>(), any::<u64>()), 0..20),
    ) {
        let consumers: Vec<Consumer> = vms
            .into_iter()
            .map(|(cpu_us, memory_bytes)| Consumer { vm: Uuid::new_v4(), cpu_us, memory_bytes })
            .collect();
        let sample = Sample { total_uj: total, memory_uj: memory };
        let host = Host { capacity_us: host.0, busy_us: host.1, memory_bytes: host.2 };
        let shares = share(sample, host, memory_share, &consumers);
        let sum: u128 = shares.vms.iter().map(|(_, uj)| u128::from(*uj)).sum();
        prop_assert_eq!(sum + u128::from(shares.host) + u128::from(shares.idle), u128::from(total));
    }
}

#[test]
fn a_busy_vm_pays_for_what_it_ran() {
    let vm = Uuid::new_v4();
    let consumer = Consumer { vm, cpu_us: 1_000_000, memory_bytes: 1 << 30 };
    let host = Host { capacity_us: 4_000_000, busy_us: 2_000_000, memory_bytes: 4 << 30 };
    let sample = Sample { total_uj: 1000, memory_uj: Some(200) };
    let shares = share(sample, host, 0.9, &[consumer]);
    assert_eq!(shares, Shares { vms: vec![(vm, 200 + 50)], host: 200, idle: 550 });
}
