//! The readers on a written-out host.

use std::{fs, path::Path};

use super::*;

fn put(root: &Path, path: &str, text: &str) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

/// A host with two nodes, one card, a bridge, and no PSI.
pub(super) fn recorded() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    for (id, cpus, kib) in [(0, "0-3,8\n", 4_194_304), (1, "4-7\n", 2_097_152)] {
        let node = format!("sys/devices/system/node/node{id}");
        put(root, &format!("{node}/cpulist"), cpus);
        put(
            root,
            &format!("{node}/meminfo"),
            &format!("Node {id} MemTotal:       {kib} kB\nNode {id} MemFree: 1 kB\n"),
        );
        put(root, &format!("{node}/hugepages/hugepages-2048kB/nr_hugepages"), "10\n");
        put(root, &format!("{node}/hugepages/hugepages-2048kB/free_hugepages"), "4\n");
    }
    put(root, "sys/class/net/eth0/device/vendor", "0x1af4");
    put(root, "sys/class/net/eth0/address", "52:54:00:12:34:56\n");
    put(root, "sys/class/net/eth0/speed", "-1\n");
    put(root, "sys/class/net/eth0/operstate", "up\n");
    put(root, "sys/class/net/srv-1/address", "52:54:00:12:34:57\n");
    let flags = "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3 abm avx avx2 bmi1 bmi2 f16c fma movbe xsave";
    put(root, "proc/cpuinfo", &format!("processor\t: 0\nmodel name\t: Good CPU\nflags\t\t: fpu {flags}\n"));
    put(root, "proc/meminfo", "MemTotal: 6291456 kB\nMemAvailable:    2048 kB\n");
    put(root, "proc/stat", "cpu  100 0 100 700 50 0 0 50 90 0\n");
    put(
        root,
        "proc/77/smaps_rollup",
        "Rss: 70000 kB\nPss_Anon:  1000 kB\nPss_File:  24 kB\nPss_Shmem: 65000 kB\n",
    );
    put(root, "proc/sys/kernel/random/boot_id", "b00t\n");
    dir
}

pub(super) fn settings(dir: &Path, url: Option<String>) -> ReporterSettings {
    ReporterSettings {
        node_name: "a".into(),
        node_uid: "u".into(),
        site: "s".into(),
        failure_domain: "f".into(),
        state_dir: dir.to_owned(),
        scheduler_urls: url.into_iter().collect(),
        tls_dir: None,
        usage_interval: Duration::from_millis(20),
        lease_interval: Duration::from_millis(10),
        reserve_memory: 3 << 20,
        overcommit_vcpu: 1.5,
        first_generation: 1000,
    }
}

pub(super) fn allocation(id: &str) -> Allocation {
    Allocation { id: id.into(), vcpus: 3, memory_bytes: 6 << 30, ..Default::default() }
}

#[test]
fn a_host_is_read() {
    let root = recorded();
    let snapshot = Snapshot {
        allocations: vec![allocation("x")],
        images: vec!["tiny".into(), "debian".into()],
        provisioned_bytes: 5,
        running: vec![(77, 64 << 20), (78, 1)],
        ..Snapshot::default()
    };
    let (_sender, receiver) = watch::channel(snapshot);
    let reporter = Reporter::with_host(settings(root.path(), None), receiver, Host::new(root.path()));
    let Report { inventory, usage, allocations, link } = reporter.current();
    let cpus: Vec<_> = inventory.numa_nodes.iter().map(|node| node.cpus.unwrap()).collect();
    assert_eq!((cpus[0].total, cpus[0].allocatable, cpus[1].total, cpus[1].allocatable), (5, 7, 4, 6));
    assert_eq!(cpus[0].allocated + cpus[1].allocated, 3);
    let memory = inventory.numa_nodes[0].memory.unwrap();
    assert_eq!((memory.total, memory.reserved, memory.allocated), (4 << 30, (2 << 20) + (20 << 20), 4 << 30));
    let huge = inventory.numa_nodes[1].hugepages.unwrap();
    assert_eq!((huge.total, huge.allocated), (20 << 20, 12 << 20));
    assert_eq!(inventory.nics.len(), 1, "a bridge is no card: {:?}", inventory.nics);
    assert_eq!(
        (inventory.nics[0].name.as_str(), inventory.nics[0].speed_mbps, inventory.nics[0].up),
        ("eth0", 0, true)
    );
    assert_eq!((inventory.cpu_model.as_str(), inventory.cpu_baseline.as_str()), ("Good CPU", "x86-64-v3"));
    assert_eq!(
        (inventory.images, inventory.vm_overhead_bytes),
        (vec!["debian".into(), "tiny".into()], 1024 << 10)
    );
    let pool = &inventory.storage_pools[0];
    assert!(pool.physical_bytes >= pool.used_bytes && pool.used_bytes > 0 && pool.provisioned_bytes == 5);
    assert_eq!((usage.cpu_busy, usage.steal, usage.cpu_pressure), (0.2, Some(0.05), None));
    assert_eq!((usage.memory_available_bytes, usage.vms_running), (2 << 20, 2));
    assert!(allocations.complete && allocations.digest == digest(&[allocation("x")]));
    assert_eq!(link, SchedulerLink::default());
}

#[test]
fn this_host_and_an_empty_one_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let (_sender, receiver) = watch::channel(Snapshot::default());
    let here = Reporter::new(settings(dir.path(), None), receiver.clone()).current();
    assert!(here.inventory.numa_nodes.iter().any(|node| node.cpus.unwrap().total > 0));
    assert!(here.usage.memory_available_bytes > 0 && here.usage.cpu_busy > 0.0);
    let none = Reporter::with_host(settings(dir.path(), None), receiver, Host::new(dir.path())).current();
    assert_eq!(none.inventory.cpu_baseline, "x86-64-v1");
    assert_eq!(none.inventory.numa_nodes.len(), 1);
}

#[test]
fn only_what_matters_is_a_change() {
    let root = recorded();
    let (sender, receiver) = watch::channel(Snapshot::default());
    let reporter = Reporter::with_host(settings(root.path(), None), receiver, Host::new(root.path()));
    let generation = || reporter.current().inventory.generation;
    let first = generation();
    reporter.shared.read_inventory();
    assert_eq!(generation(), first);
    put(root.path(), "sys/class/net/eth0/operstate", "down\n");
    reporter.shared.read_inventory();
    assert_eq!(generation(), first + 1);
    sender.send_replace(Snapshot { allocations: vec![allocation("x")], ..Snapshot::default() });
    reporter.shared.read_inventory();
    assert_eq!(generation(), first + 2);
}
