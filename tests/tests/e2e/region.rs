//! Two hosts of a region: they reach each other, and one scheduler sees both.

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

            // A site is lost: the scheduler sees it, and sees it come back from the same disk.
            testbed(&["kill", "right"]).ok();
            eventually(60, "the scheduler misses it", || {
                record(&nodes(), "right").is_some_and(|node| node["freshness"] != "NODE_FRESHNESS_FRESH")
            });
            let right = Host::up("right", &["--scheduler", "machine"]);
            right.serio(&["image", "show", "tiny"]).ok();
            eventually(60, "it is back", || {
                record(&nodes(), "right").is_some_and(|node| node["freshness"] == "NODE_FRESHNESS_FRESH")
            });
        });
        testbed(&["down", "right"]).ok();
    });
    testbed(&["down", "left"]).ok();
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
