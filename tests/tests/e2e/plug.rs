//! Disks that come and go while a stock Linux runs: it notices by itself, uses them, and lets go of them.

use serio_tests::{
    bed::{eventually, on_host},
    guest::Console,
};

#[test]
fn a_disk_comes_to_a_running_linux_is_used_and_leaves() {
    on_host("e2e", &[], |host| {
        let vdc = host.vdc("plug");
        let vm = vdc.run_tiny("web", &["--disk-size", "128MiB"]);
        let data = vdc.at("data");
        vdc.wait_ready(&vm);
        let mut console = Console::open(host, &vm);
        host.serio(&["volume", "create", &data, "--size", "96MiB"]).ok();

        host.serio(&["vm", "disk", "add", &vm, &data]).ok();
        eventually(60, "the guest sees the disk", || {
            console.ask("echo size-$(cat /sys/block/vdb/size 2>/dev/null || echo none)", "\nsize-")
                == "196608"
        });
        let wrote = "head -c 3000000 /dev/urandom > /tmp/new; cat /tmp/new > /dev/vdb; sync; ";
        let sum = console.ask(&format!("{wrote} echo sum-$(md5sum < /tmp/new)"), "\nsum-");
        let reads = "echo 3 > /proc/sys/vm/drop_caches; echo back-$(head -c 3000000 /dev/vdb | md5sum)";
        assert_eq!(console.ask(reads, "\nback-"), sum, "what is read is what was written");
        host.serio(&["vm", "disk", "add", &vm, &data]).refused(4, &["in use"]);

        host.serio(&["vm", "disk", "remove", &vm, &data]).ok();
        let left = console.ask("echo left-$(ls /sys/block | grep -c vdb)", "\nleft-");
        assert_eq!(left, "0", "the guest has let go of it");
        host.serio(&["vm", "disk", "remove", &vm, &data]).refused(4, &["not attached"]);

        // Again, and with what was written; a reset keeps it.
        host.serio(&["vm", "disk", "add", &vm, &data]).ok();
        eventually(60, "the guest sees the disk again", || {
            console.ask("echo size-$(cat /sys/block/vdb/size 2>/dev/null || echo none)", "\nsize-")
                == "196608"
        });
        assert_eq!(console.ask(reads, "\nback-"), sum, "it is the same disk");
        let shown = host.json(&["volume", "show", &data]);
        assert!(shown.to_string().contains("web"), "the volume says who has it: {shown}");
    });
}

#[test]
fn a_card_comes_to_a_running_linux_and_leaves() {
    on_host("e2e", &[], |host| {
        let vdc = host.vdc("plug");
        let vm = vdc.run_tiny("web", &[]);
        vdc.wait_ready(&vm);
        let mut console = Console::open(host, &vm);
        let count = "echo cards-$(ls /sys/class/net | grep -vc '^lo$')";
        assert_eq!(console.ask(count, "\ncards-"), "0");
        host.serio(&["vm", "nic", "add", &vm, "mac=52:54:00:00:77:01"]).ok();
        eventually(60, "the guest sees the card", || console.ask(count, "\ncards-") == "1");
        let up = "cd /sys/class/net; for n in *; do [ $n = lo ] || ip link set $n up; done; cd /; echo mac-$(cat /sys/class/net/e*/address)";
        assert_eq!(console.ask(up, "\nmac-"), "52:54:00:00:77:01");
        // A reset keeps it.
        let before = console.text().len();
        host.serio(&["vm", "reboot", &vm]).ok();
        console.wait(180, "the guest is there again", |text| {
            let booted = text.get(before..).and_then(|new| new.split_once("tiny: ready"));
            booted.is_some_and(|(_, rest)| rest.contains("tiny# "))
        });
        assert_eq!(console.ask(count, "\ncards-"), "1");
        host.serio(&["vm", "nic", "remove", &vm, "52:54:00:00:77:01"]).ok();
        assert_eq!(console.ask(count, "\ncards-"), "0", "the guest has let go of it");
        host.serio(&["vm", "nic", "remove", &vm, "52:54:00:00:77:01"]).refused(4, &["no card"]);
    });
}
