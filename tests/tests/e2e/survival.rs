//! `seriod` is killed at any moment: no VM notices, nothing is lost, nothing is there twice.

use std::{collections::BTreeSet, thread, time::Duration};

use serio_tests::bed::{Host, long, on_host};

/// A small generator, so that a failing run can be repeated from the seed that it prints.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }
}

#[test]
fn killed_seriod_finds_its_vms_again() {
    let rounds = if long() { 100 } else { 8 };
    let seed = std::env::var("SERIO_SEED")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or_else(|| u64::from(std::process::id()));
    println!("seed {seed} (SERIO_SEED={seed} repeats it), {rounds} rounds");
    on_host("e2e", &[], |host| {
        let mut dice = Dice(seed);
        let vdc = host.vdc("kill");
        let vms: Vec<String> = ["a", "b", "c"].iter().map(|name| vdc.run_tiny(name, &[])).collect();
        vdc.wait_ready(&vms[0]);
        // It writes all the time; what it wrote must be there at the end, in order.
        host.type_line(
            &vms[0],
            "(i=0; while :; do i=$((i+1)); echo $i >> /data/count; sync; sleep 1; done) & echo started-$((1+1))",
            "started-2",
        );
        let pid = host.pid(&vms[0]);
        for round in 0..rounds {
            // Something is under way when the blow falls; whether it succeeds is not the question.
            let victim = &vms[1 + dice.roll(2) as usize];
            let verb: &[&str] = if dice.roll(2) == 0 { &["stop", "--force"] } else { &["start"] };
            let mut under_way = host.command("serio").args(["vm"]).args(verb).arg(victim).spawn_quietly();
            thread::sleep(Duration::from_millis(dice.roll(600)));
            host.kill_seriod();
            let _ = under_way.wait();
            host.start_seriod();
            agree(host, &vms, round);
            assert_eq!(
                host.pid(&vms[0]),
                pid,
                "round {round}: the VM that nobody touched has another process"
            );
        }
        host.type_line(
            &vms[0],
            "seq $(wc -l < /data/count) | cmp - /data/count && echo in-order=$((1+1))",
            "in-order=2",
        );
    });
}

trait SpawnQuietly {
    fn spawn_quietly(&mut self) -> std::process::Child;
}

impl SpawnQuietly for std::process::Command {
    fn spawn_quietly(&mut self) -> std::process::Child {
        use std::process::Stdio;
        self.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("serio starts")
    }
}

/// The state that the API shows and the processes of the host are the same: no orphan, no lost VM, no double start.
#[track_caller]
fn agree(host: &Host, vms: &[String], round: u32) {
    // What was under way when it was killed is finished or undone first.
    serio_tests::bed::eventually(60, "every VM is in a lasting state", || {
        vms.iter().all(|vm| matches!(host.state(vm).as_str(), "RUNNING" | "STOPPED" | "FAILED"))
    });
    let listed = host.json(&["vm", "list"]);
    let known: BTreeSet<u64> = listed
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|vm| vm["status"]["pid"].as_u64())
        .filter(|pid| *pid > 0)
        .collect();
    let running = listed
        .as_array()
        .into_iter()
        .flatten()
        .filter(|vm| vm["status"]["state"] == "VM_STATE_RUNNING")
        .count();
    assert_eq!(known.len(), running, "round {round}: a running VM without a process of its own: {listed}");
    let found = host.shell("pidof serio-vmm || true").ok();
    let found: BTreeSet<u64> = found.split_whitespace().filter_map(|pid| pid.parse().ok()).collect();
    assert_eq!(
        found, known,
        "round {round}: the processes of the host and the state of seriod disagree: {listed}"
    );
    for vm in vms {
        assert!(
            listed.as_array().into_iter().flatten().any(|v| v["name"].as_str() == Some(&resource(vm))),
            "round {round}: {vm} is lost"
        );
    }
}

fn resource(vm: &str) -> String {
    let (vdc, name) = vm.split_once('/').expect("VDC/NAME");
    format!("vdcs/{vdc}/vms/{name}")
}
