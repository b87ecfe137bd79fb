//! Two hosts of a region: they reach each other, one scheduler sees both, and places on them.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde_json::Value;
use serio_tests::bed::{Host, eventually, missing, on_host, testbed};

fn record<'a>(nodes: &'a Value, name: &str) -> Option<&'a Value> {
    nodes
        .as_array()?
        .iter()
        .find(|node| node["name"].as_str().is_some_and(|n| n.rsplit('/').next() == Some(name)))
}

#[test]
fn two_hosts_and_one_scheduler() {
    if let Some(why) = missing() {
        println!("skipped: {why}");
        return;
    }
    testbed(&["scheduler", "up", "--no-build"]).ok();
    let url = testbed(&["scheduler", "url"]).ok();
    let url = url.trim();
    on_host("left", &["--scheduler", "machine"], |left| {
        on_host("right", &["--scheduler", "machine"], |right| {
            left.exec(&["ping", "-c", "1", "-W", "10", &shared_address(right)]).ok();
            right.exec(&["ping", "-c", "1", "-W", "10", &shared_address(left)]).ok();

            let nodes = || left.json(&["--host", url, "node", "list"]);
            eventually(60, "the scheduler knows both", || {
                let nodes = nodes();
                ["left", "right"].iter().all(|name| {
                    record(&nodes, name).is_some_and(|node| {
                        node["freshness"] == "NODE_FRESHNESS_FRESH" && !node["inventory"].is_null()
                    })
                })
            });

            // What one node promises, the scheduler learns, and of that node only.
            let vdc = left.vdc("region");
            vdc.run_tiny("web", &[]);
            eventually(30, "the scheduler knows the allocation", || allocated(&nodes(), "left") >= 192 << 20);
            assert_eq!(allocated(&nodes(), "right"), 0);
            drop(vdc);
            eventually(30, "the scheduler knows that it is gone", || allocated(&nodes(), "left") == 0);

            // The scheduler remembers placements of earlier runs.
            let run = fresh_name();
            let named = |name: &str| format!("{name}-{run}");
            let town = named("town");
            let asks = |args: &[&str]| left.json(&[&["--host", url], args].concat());
            places(&asks, &nodes, &run);
            a_vm_takes_its_place(left, &asks, &nodes, &named("web"));
            somebody_sets_the_clock(left, &asks, &nodes, &named("clock"));

            // A site is lost: the scheduler sees it, and what was promised there is promised to nobody else until somebody
            // says that it is dead. It comes back from the same disk, and ends what it had.
            let (first, second) = (named("db-1"), named("db-2"));
            let on_right = ["place", &town, "--vcpus", "1", "--memory", "64MiB", "--vm", "db", "--commit"];
            let at = |args: &[&str]| left.serio(&[&["--host", url], args].concat());
            at(&[&on_right[..], &["--request-id", &first, "--site", "site-right"]].concat()).ok();
            at(&["node", "fence", "right", "--proof", "none"]).refused(4, &["right"]);
            testbed(&["kill", "right"]).ok();
            let freshness = |wanted: &str| {
                record(&nodes(), "right")
                    .is_some_and(|node| node["freshness"] == format!("NODE_FRESHNESS_{wanted}"))
            };
            eventually(90, "the scheduler has lost it", || freshness("LOST"));
            let again = [&on_right[..], &["--request-id", &second]].concat();
            at(&again).refused(4, &["right"]);
            at(&["node", "fence", "right", "--proof", "the case has ended its process"]).ok();
            let placed = left.json(&[&["--host", url], &again[..]].concat());
            assert_eq!(placed["node"], "nodes/left", "{placed}");
            let right = Host::up("right", &["--scheduler", "machine"]);
            right.serio(&["image", "show", "tiny"]).ok();
            eventually(60, "it is back", || freshness("FRESH"));
            eventually(30, "it has ended what it had", || allocated(&nodes(), "right") == 0);
            at(&["place", "release", &second]).ok();
            eventually(30, "nothing is left of it", || allocated(&nodes(), "left") == 0);
        });
        testbed(&["down", "right"]).ok();
    });
    testbed(&["down", "left"]).ok();
}

/// A name that no run had before.
fn fresh_name() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is right");
    format!("{:x}-{:x}", std::process::id(), since.as_millis())
}

/// Two of a group, each on a node of its own; kept, shown, asked what would fit, given back.
fn places(scheduler: &dyn Fn(&[&str]) -> Value, nodes: &dyn Fn() -> Value, run: &str) {
    let (town, ids) = (format!("town-{run}"), [format!("web-1-{run}"), format!("web-2-{run}")]);
    let place = |id: &str| {
        let words =
            ["place", &town, "--vcpus", "1", "--memory", "64MiB", "--group", "web", "--request-id", id];
        scheduler(&words)
    };
    let (one, two) = (place(&ids[0]), place(&ids[1]));
    assert_eq!(one["state"], "PLACEMENT_STATE_RESERVED", "{one}");
    assert!(one["node"] != two["node"], "{one} {two}");
    assert_eq!(place(&ids[0])["token"], one["token"], "asked again, it is the same");
    for id in &ids {
        assert_eq!(scheduler(&["place", "commit", id])["state"], "PLACEMENT_STATE_COMMITTED");
    }
    eventually(30, "both nodes have one", || {
        ["left", "right"].iter().all(|name| allocated(&nodes(), name) >= 64 << 20)
    });
    let fits = scheduler(&["capacity", "what-if", "--without", "site-right"]);
    assert_eq!(fits["fitting"].as_u64().unwrap_or(0) + fits["notFitting"].as_u64().unwrap_or(0), 1, "{fits}");
    for id in &ids {
        scheduler(&["place", "release", id]);
    }
    eventually(30, "both have given it back", || {
        ["left", "right"].iter().all(|name| allocated(&nodes(), name) == 0)
    });
    let listed = scheduler(&["place", "list", "--vdc", &town]);
    let over = |placement: &Value| placement["state"] == "PLACEMENT_STATE_RELEASED";
    assert!(listed.as_array().is_some_and(|all| all.len() == 2 && all.iter().all(over)), "{listed}");
}

/// What a VM was promised on a node is its own once it is created there with the token: counted once, and gone with it.
fn a_vm_takes_its_place(
    node: &Host,
    scheduler: &dyn Fn(&[&str]) -> Value,
    nodes: &dyn Fn() -> Value,
    id: &str,
) {
    const MEMORY: u64 = 192 << 20;
    let vdc = node.vdc("promised");
    let there = ["--site", "site-left", "--request-id", id, "--vm", "web", "--storage", "1GiB"];
    let promise = scheduler(
        &[&["place", &vdc.name, "--vcpus", "1", "--memory", "192MiB", "--commit"], &there[..]].concat(),
    );
    let token = promise["token"].as_str().expect("a promise has a token").to_owned();
    let vm = vdc.at("web");
    let create = ["vm", "create", &vm, "--image", "tiny", "--memory", "192MiB", "--reservation", &token];
    node.serio(&create).ok();
    let ours = || allocated(&nodes(), "left");
    eventually(30, "it is counted once", || (MEMORY..2 * MEMORY).contains(&ours()));
    node.serio(&["vm", "create", &vdc.at("other"), "--image", "tiny", "--reservation", &token])
        .refused(4, &["reservation"]);
    // It is the VM's now.
    scheduler(&["place", "release", id]);
    let shown = || scheduler(&["place", "show", id]);
    eventually(30, "the node has said who has it", || {
        shown()["reason"] == "a VM has taken it: delete the VM"
    });
    assert_eq!(shown()["state"], "PLACEMENT_STATE_COMMITTED");
    assert!((MEMORY..2 * MEMORY).contains(&ours()), "it is still counted once");
    node.serio(&["vm", "delete", &vm]).ok();
    eventually(30, "with the VM what it had is gone", || ours() == 0);
    scheduler(&["place", "release", id]);
    eventually(30, "nothing is left to release", || shown()["state"] == "PLACEMENT_STATE_RELEASED");
}

/// Setting a host's clock ends no promise, no VM and no lease, and nobody pays for the time that never was.
fn somebody_sets_the_clock(
    node: &Host,
    scheduler: &dyn Fn(&[&str]) -> Value,
    nodes: &dyn Fn() -> Value,
    id: &str,
) {
    const DAY_S: i64 = 24 * 3600;
    let (vdc, began) = (node.vdc("clock"), Instant::now());
    let vm = vdc.run_tiny("goes-on", &[]);
    let pid = node.pid(&vm);
    for (name, jump) in [("day-on", DAY_S), ("day-back", -DAY_S)] {
        let id = format!("{id}-{name}");
        let there = ["--site", "site-left", "--request-id", &id];
        scheduler(&[&["place", &vdc.name, "--vcpus", "1", "--memory", "64MiB"], &there[..]].concat());
        node.shell(&format!("date -s @$(( $(date +%s) + {jump} ))")).ok();
        let listed = nodes();
        let left = record(&listed, "left").expect("the node is known");
        assert_eq!(left["freshness"], "NODE_FRESHNESS_FRESH", "{name}: {left}");
        assert_eq!(scheduler(&["place", "show", &id])["state"], "PLACEMENT_STATE_RESERVED", "{name}");
        assert_eq!(scheduler(&["place", "commit", &id])["state"], "PLACEMENT_STATE_COMMITTED", "{name}");
        scheduler(&["place", "release", &id]);
        assert_eq!((node.state(&vm).as_str(), node.pid(&vm)), ("RUNNING", pid), "{name}");
    }
    let billed = || {
        let usage = node.json(&["vdc", "usage", &vdc.name, "--by", "month"]);
        usage.as_array().into_iter().flatten().filter_map(|span| span["vcpuSeconds"].as_f64()).sum::<f64>()
    };
    eventually(180, "the meter has looked", || billed() > 0.0);
    let (bill, lasted) = (billed(), began.elapsed().as_secs_f64());
    println!(
        "the clock was set a day on and back: {bill:.0} s of a vcpu are billed, the VM is {lasted:.0} s old"
    );
    assert!(bill < lasted + 60.0, "{bill} s are billed of {lasted}");
}

fn shared_address(host: &Host) -> String {
    let line = host.shell("ip -4 addr show eth1 | grep -o '10\\.77\\.0\\.[0-9]*' | head -n 1").ok();
    line.trim().to_owned()
}

/// Bytes of memory that the scheduler counts as allocated on a node.
fn allocated(nodes: &Value, name: &str) -> u64 {
    let number = |value: &Value| value.as_u64().or_else(|| value.as_str()?.parse().ok()).unwrap_or(0);
    record(nodes, name)
        .and_then(|node| node["allocations"]["allocations"].as_array())
        .map_or(0, |list| list.iter().map(|allocation| number(&allocation["memoryBytes"])).sum())
}
