//! What a vdc is promised, held to and billed, on a host with cgroup v2: its share of a busy processor, its caps, and the meter.

use std::time::{Duration, Instant};

use serde_json::Value;
use serio_tests::bed::{Host, eventually, on_host};

/// Long enough that a scheduler's slices even out, on a host whose seconds are slow.
const LOOK: Duration = Duration::from_secs(15);

/// A file of the vdc's cgroup.
#[track_caller]
fn group_file(host: &Host, vdc: &str, file: &str) -> String {
    host.shell(&format!("cat /sys/fs/cgroup/serio.slice/vdcs/{vdc}/{file}")).ok()
}

/// Writes that reached a disk, of all disks.
#[track_caller]
fn writes(host: &Host, vdc: &str) -> f64 {
    let text = group_file(host, vdc, "io.stat");
    text.split_whitespace().filter_map(|word| word.strip_prefix("wios=")?.parse::<f64>().ok()).sum()
}

#[track_caller]
fn cpu_seconds(host: &Host, vdc: &str) -> f64 {
    let text = group_file(host, vdc, "cpu.stat");
    let used = text.lines().find_map(|line| line.strip_prefix("usage_usec ")?.parse().ok());
    Duration::from_micros(used.expect("the group counts its processor time")).as_secs_f64()
}

/// What the host's own clock shows: the testbed's seconds are not this machine's.
#[track_caller]
fn host_seconds(host: &Host) -> f64 {
    let text = host.shell("cat /proc/uptime").ok();
    text.split_whitespace().next().and_then(|word| word.parse().ok()).expect("the host has an uptime")
}

/// How much each gets of one processor over a while.
fn taken(host: &Host, vdcs: &[&str]) -> Vec<f64> {
    let look = || (host_seconds(host), vdcs.iter().map(|vdc| cpu_seconds(host, vdc)).collect::<Vec<_>>());
    let (began, before) = look();
    let since = Instant::now();
    eventually(60, "a while has passed", || since.elapsed() >= LOOK);
    let (ended, after) = look();
    before.iter().zip(after).map(|(before, after)| (after - before) / (ended - began)).collect()
}

#[track_caller]
fn update(host: &Host, vdc: &str, options: &[&str]) {
    host.serio(&[&["vdc", "update", vdc], options].concat()).ok();
}

/// The sum of a number over all hours that were metered.
#[track_caller]
fn billed(host: &Host, vdc: &str, number: &str) -> f64 {
    let hours = host.json(&["vdc", "usage", vdc]);
    let value = |hour: &Value| hour[number].as_f64().or_else(|| hour[number].as_str()?.parse().ok());
    hours.as_array().into_iter().flatten().filter_map(value).sum()
}

#[test]
fn busy_neighbours_get_their_shares_and_pay_for_what_they_took() {
    on_host("e2e", &[], |host| {
        let (town, village) =
            (host.vdc_with("town", &["--weight", "300"]), host.vdc_with("village", &["--weight", "100"]));
        let vms = [town.run_tiny("busy", &[]), village.run_tiny("busy", &[])];
        for (vdc, vm) in [&town, &village].iter().zip(&vms) {
            vdc.wait_ready(vm);
        }
        for vm in &vms {
            host.type_line(vm, "(while :; do :; done) & echo busy-$((1+1))", "busy-2");
        }

        let shares = taken(host, &[&town.name, &village.name]);
        println!("weights 300 and 100, both busy: {:.2} and {:.2} of the processor", shares[0], shares[1]);
        let ratio = shares[0] / shares[1];
        assert!((2.4..3.6).contains(&ratio), "three to one was promised: {shares:?}");

        update(host, &town.name, &["--burst", "20"]);
        let shares = taken(host, &[&town.name, &village.name]);
        println!("the first capped at 20 %: {:.2} and {:.2} of the processor", shares[0], shares[1]);
        assert!(shares[0] < 0.23 && shares[0] > 0.12, "the cap is a fifth: {shares:?}");
        assert!(shares[1] > shares[0] * 2.0, "what one may not take the other gets: {shares:?}");
        update(host, &town.name, &["--burst", "0"]);

        // A look of the meter comes once a minute; what was taken before it is billed by then, and never more than was taken.
        let spent = cpu_seconds(host, &town.name);
        eventually(180, "the meter has seen it", || billed(host, &town.name, "cpuSeconds") >= spent);
        // The VMM's first moments are its process's, not yet its group's.
        let (bill, spent) = (billed(host, &town.name, "cpuSeconds"), cpu_seconds(host, &town.name) + 2.0);
        println!("billed {bill:.1} s of processor time, taken {spent:.1} s");
        assert!(bill <= spent, "{bill} s were billed, {spent} s taken");
        assert!(billed(host, &town.name, "vcpuSeconds") >= bill * 0.9, "a vcpu's time holds what it took");
    });
}

#[test]
fn a_disk_is_no_faster_than_its_vdc_may_be() {
    on_host("e2e", &[], |host| {
        let vdc = host.vdc("slow");
        let vm = vdc.run_tiny("writer", &[]);
        vdc.wait_ready(&vm);
        let line = "(while :; do dd if=/dev/zero of=/data/f bs=4k count=16 conv=fsync 2>/dev/null; done) & echo writes-$((1+1))";
        host.type_line(&vm, line, "writes-2");
        let rate = || {
            let look = || (host_seconds(host), writes(host, &vdc.name));
            let (began, before) = look();
            let since = Instant::now();
            eventually(60, "a while has passed", || since.elapsed() >= LOOK);
            let (ended, after) = look();
            (after - before) / (ended - began)
        };
        let free = rate();
        update(host, &vdc.name, &["--iops", "10"]);
        let capped = rate();
        println!("writes a second that reach the disk: {free:.1} free, {capped:.1} of 10 capped");
        assert!(free > 15.0, "the guest is too slow to tell: {free}");
        assert!(capped <= 12.0, "10 a second are allowed");
        assert!(capped > 2.0, "it goes on");
        update(host, &vdc.name, &["--iops", "0"]);
        let written = writes(host, &vdc.name);
        eventually(180, "the meter has counted them", || billed(host, &vdc.name, "writeOps") >= written);
    });
}
