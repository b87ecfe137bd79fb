//! The text that Prometheus reads.

use std::{
    io::Write as _,
    process::{Command, Stdio},
};

use serio_control::message::{DiskCounters, FailedDevice, NicCounters, VcpuCounters};

use super::*;

fn counts() -> VmCounts {
    let op = OpCounters { done: 5, bytes: 20_480, errors: 1, buckets: vec![1, 2, 0, 3], sum_us: 250 };
    let packets = PacketCounters { packets: 7, bytes: 700, drops: 2 };
    let disk = DiskCounters {
        volume_id: "a \"b\"".to_owned(),
        reads: Some(op.clone()),
        writes: Some(op),
        ..DiskCounters::default()
    };
    let nic = NicCounters {
        mac: "52:54:00:12:34:56".to_owned(),
        received: Some(packets),
        sent: Some(PacketCounters::default()),
        pairs_in_kernel: 2,
        ..NicCounters::default()
    };
    let counters = VmCounters {
        vcpus: vec![VcpuCounters { port_writes: 9, ..VcpuCounters::default() }],
        disks: vec![disk],
        nics: vec![nic],
        failed: vec![FailedDevice::default()],
    };
    VmCounts { counters, times: VcpuTimes { run_ns: 2_500_000_000, steal_ns: 1_000 } }
}

#[test]
fn each_number_has_its_line_with_whose_it_is() {
    let named = |vm: &str| NamedCounts { vdc: "ardesio".to_owned(), vm: vm.to_owned(), counts: counts() };
    let text = render(&[named("web"), named("db")]);
    for line in [
        r#"serio_vm_exits_total{vdc="ardesio",vm="web",vcpu="0",kind="port_write"} 9"#,
        r#"serio_vm_vcpu_run_seconds_total{vdc="ardesio",vm="db"} 2.5"#,
        r#"serio_vm_vcpu_steal_seconds_total{vdc="ardesio",vm="db"} 0.000001"#,
        r#"serio_vm_disk_bytes_total{vdc="ardesio",vm="web",device="a \"b\"",op="read"} 20480"#,
        r#"serio_vm_disk_request_seconds_bucket{vdc="ardesio",vm="web",device="a \"b\"",op="read",le="0.000032"} 3"#,
        r#"serio_vm_disk_request_seconds_bucket{vdc="ardesio",vm="web",device="a \"b\"",op="read",le="+Inf"} 6"#,
        r#"serio_vm_disk_request_seconds_count{vdc="ardesio",vm="web",device="a \"b\"",op="write"} 6"#,
        r#"serio_vm_nic_drops_total{vdc="ardesio",vm="web",device="52:54:00:12:34:56",direction="receive"} 2"#,
        r#"serio_vm_nic_pairs_in_kernel{vdc="ardesio",vm="web",device="52:54:00:12:34:56"} 2"#,
        r#"serio_vm_devices_failed{vdc="ardesio",vm="db"} 1"#,
    ] {
        assert!(text.lines().any(|one| one == line), "no {line} in\n{text}");
    }
    assert_eq!(text.matches("# TYPE serio_vm_disk_request_seconds histogram").count(), 1);
    assert!(render(&[]).is_empty());
    check_by_promtool(&text);
}

#[test]
fn packets_are_counted_at_the_tap_while_it_is_there() {
    let dir = tempfile::tempdir().expect("a directory");
    let statistics = dir.path().join("srt12345678-0/statistics");
    std::fs::create_dir_all(&statistics).expect("made");
    let numbers =
        [("tx_packets", 11), ("tx_bytes", 12), ("tx_dropped", 13), ("rx_packets", 21), ("rx_bytes", 22)];
    for (name, number) in numbers {
        std::fs::write(statistics.join(name), format!("{number}\n")).expect("written");
    }
    let packets = |packets, bytes, drops| Some(PacketCounters { packets, bytes, drops });
    let mut nic =
        NicCounters { tap: "srt12345678-0".to_owned(), sent: packets(7, 700, 2), ..NicCounters::default() };
    count_at_tap(dir.path(), &mut nic);
    assert_eq!((nic.received, nic.sent), (None, packets(7, 700, 2)), "one number is missing");
    std::fs::write(statistics.join("rx_dropped"), "23\n").expect("written");
    count_at_tap(dir.path(), &mut nic);
    assert_eq!((nic.received, nic.sent), (packets(11, 12, 13), packets(21, 22, 23)));
}

fn check_by_promtool(text: &str) {
    let tool = Command::new("promtool").args(["check", "metrics"]).stdin(Stdio::piped()).spawn();
    let mut tool = match tool {
        Ok(tool) => tool,
        Err(error) => {
            println!("skipped: promtool cannot be run: {error}");
            return;
        }
    };
    tool.stdin.take().expect("piped").write_all(text.as_bytes()).expect("read");
    assert!(tool.wait().expect("waited for").success());
}

#[test]
fn the_kernels_times_of_a_thread_are_read() {
    let times = parse_schedstat("123 45 6\n").expect("numbers");
    assert_eq!((times.run_ns, times.steal_ns), (123, 45));
    assert_eq!((parse_schedstat(""), parse_schedstat("1 x 2"), parse_schedstat("7")), (None, None, None));
    assert_eq!(vcpu_times(std::process::id()), VcpuTimes::default(), "no thread here is a vcpu");
}
