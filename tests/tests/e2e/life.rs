//! A VM from its first start to its end, and what must be left of it.

use serio_tests::bed::{Host, eventually, on_host};

#[test]
fn a_vm_lives_and_its_disk_remembers() {
    on_host("e2e", &[], |host| {
        let vdc = host.vdc("life");
        let vm = vdc.run_tiny("web", &["--disk-size", "1GiB"]);
        vdc.wait_ready(&vm);
        assert_eq!(host.state(&vm), "RUNNING");
        host.type_line(&vm, "echo kept > /data/note; sync; echo done-$((40+2))", "done-42");
        // The host has it; a guest is offered none, whatever baseline it has or has not.
        host.exec(&["grep", "-q", "-w", "svm\\|vmx", "/proc/cpuinfo"]).ok();
        let line = "grep -w -e svm -e vmx /proc/cpuinfo || echo no-nest$((1+0))";
        host.type_line(&vm, line, "^no-nest1");

        host.serio(&["vm", "stop", &vm]).ok();
        assert_eq!(host.state(&vm), "STOPPED");
        let shown = host.json(&["vm", "show", &vm]);
        assert_eq!(shown["status"]["lastEnd"]["kind"], "power-off", "{shown}");
        let log = host.serio(&["vm", "log", &vm]).ok();
        assert!(log.contains("power button: shutting down"), "{log}");

        host.serio(&["vm", "start", &vm]).ok();
        eventually(180, "the guest is up again", || {
            let done = host.serio(&[
                "vm",
                "console",
                &vm,
                "--history",
                "0B",
                "--send",
                "cat /data/note\\n",
                "--until",
                "^kept",
                "--timeout",
                "5s",
            ]);
            done.code == 0
        });
        host.serio(&["vm", "stop", &vm, "--force"]).ok();
        assert_eq!(host.state(&vm), "STOPPED");
        host.serio(&["vm", "delete", &vm]).ok();
        host.serio(&["vm", "show", &vm]).refused(3, &["web"]);
        nothing_is_left(host);
    });
}

/// No process, no cgroup, no folder of a VM that is gone.
fn nothing_is_left(host: &Host) {
    let vms = host.json(&["vm", "list"]);
    let expected = vms.as_array().map_or(0, Vec::len);
    let running = vms
        .as_array()
        .into_iter()
        .flatten()
        .filter(|vm| vm["status"]["pid"].as_u64().unwrap_or(0) > 0)
        .count();
    let processes = host.shell("pidof serio-vmm | wc -w").ok();
    assert_eq!(processes.trim(), running.to_string(), "orphaned VMMs: {vms}");
    let folders = host.shell("ls /var/lib/serio/vms | wc -l").ok();
    assert_eq!(folders.trim(), expected.to_string(), "folders of VMs that are gone");
    let folders = host.shell("ls /run/serio/vms | wc -l").ok();
    assert_eq!(folders.trim(), running.to_string(), "run folders of VMs that are gone");
}

#[test]
fn a_vmm_that_dies_is_noticed_and_started_again_if_wanted() {
    on_host("e2e", &[], |host| {
        let vdc = host.vdc("death");
        let stays = vdc.run_tiny("stays", &["--restart", "never"]);
        let pid = host.pid(&stays);
        assert_ne!(pid, 0);
        host.exec(&["kill", "-9", &pid.to_string()]).ok();
        eventually(30, "the death is recorded", || host.state(&stays) == "FAILED");
        let shown = host.json(&["vm", "show", &stays]);
        assert_eq!(shown["status"]["lastEnd"]["kind"], "died", "{shown}");
        assert_ne!(shown["status"]["lastEnd"]["reason"], "", "{shown}");

        let returns = vdc.run_tiny("returns", &["--restart", "on-failure"]);
        let pid = host.pid(&returns);
        host.exec(&["kill", "-9", &pid.to_string()]).ok();
        eventually(60, "it runs again", || host.state(&returns) == "RUNNING" && host.pid(&returns) != pid);
        let shown = host.json(&["vm", "show", &returns]);
        assert_eq!(shown["status"]["restarts"], 1, "{shown}");
    });
}

#[test]
fn several_processors_disks_and_queue_pairs() {
    on_host("e2e", &[], |host| {
        let vdc = host.vdc("smp");
        let extra = vdc.at("extra");
        host.serio(&["volume", "create", &extra, "--size", "64MiB"]).ok();
        let devices: [&str; 6] =
            ["--disk-size", "128MiB", "--volume", &extra, "--nic", "address=192.168.7.2/24"];
        let vm = vdc.run_tiny("two", &[&["--vcpus", "2"], &devices[..]].concat());
        vdc.wait_ready(&vm);
        host.type_line(&vm, "echo cpus=$(grep -c ^processor /proc/cpuinfo)", "^cpus=2");
        host.type_line(
            &vm,
            "echo vda=$(cat /sys/block/vda/size) vdb=$(cat /sys/block/vdb/size)",
            "^vda=262144 vdb=131072",
        );
        // The guest uses a pair for each of its processors, and the host steers to as many.
        host.type_line(&vm, "echo pairs=$(ls /sys/class/net/eth0/queues | grep -c rx)", "^pairs=2");
        let steered = host.shell("ls -d /sys/class/net/srt*/queues/rx-* | wc -l").ok();
        assert_eq!(steered.trim(), "2");
        let written = "dd if=/dev/urandom of=/dev/vdb bs=1M count=4 oflag=direct 2>/dev/null; \
                       a=$(dd if=/dev/vdb bs=1M count=4 iflag=direct 2>/dev/null | md5sum); \
                       echo 3 > /proc/sys/vm/drop_caches; b=$(head -c 4194304 /dev/vdb | md5sum); [ \"$a\" = \"$b\" ] && echo same=yes";
        host.type_line(&vm, written, "^same=yes");
    });
}
