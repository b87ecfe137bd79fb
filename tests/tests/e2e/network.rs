//! Two VMs that talk over the network of their vdc, while the host's kernel moves the packets, and while it may not.

use serio_tests::{
    bed::{Host, eventually, image, long, on_host, testbed},
    guest::Console,
};

/// A number of a VM's card, as Prometheus gets it.
fn metric(host: &Host, vm: &str, family: &str, label: &str) -> u64 {
    let (_, name) = vm.split_once('/').expect("VDC/NAME");
    let text = host.shell("wget -qO- http://127.0.0.1:7441/metrics").ok();
    let vm = format!("vm=\"{name}\"");
    let line =
        text.lines().find(|line| line.starts_with(family) && line.contains(&vm) && line.contains(label));
    let number = line.and_then(|line| line.rsplit(' ').next()?.parse().ok());
    number.unwrap_or_else(|| panic!("no {family} of {vm} in\n{text}"))
}

/// How many queue pairs of a VM's first card the kernel has.
fn in_kernel(host: &Host, vm: &str) -> u64 {
    metric(host, vm, "serio_vm_nic_pairs_in_kernel", "")
}

/// Whether the kernel can do it there; says so if not.
fn has_vhost_net(host: &Host) -> bool {
    let node = host.json(&["node", "show"]);
    if node["vhostNet"] != "used" {
        println!("skipped: the host has no vhost-net ({})", node["vhostNet"]);
    }
    node["vhostNet"] == "used"
}

/// Sends 2 MB from one guest to the other, at 192.168.7.3, and compares.
fn talk(from: &mut Console, to: &mut Console, round: u32) {
    let port = 5000 + round;
    to.line(&format!("nc -l -p {port} > /tmp/got &"));
    let listens =
        format!("until grep -q ':{port:04X} ' /proc/net/tcp*; do :; done; echo listens{round}-$((0+0))");
    to.ask(&listens, &format!("\nlistens{round}-"));
    let send = format!("head -c 2000000 /dev/urandom > /tmp/out; nc 192.168.7.3 {port} < /tmp/out; ");
    let sent = from.ask(&format!("{send} echo sent{round}-$(md5sum < /tmp/out)"), &format!("\nsent{round}-"));
    let got = to.ask(&format!("wait; echo got{round}-$(md5sum < /tmp/got)"), &format!("\ngot{round}-"));
    assert_eq!(got, sent, "round {round}");
}

/// The guest moves its card's interrupts about, for a while. It masks a vector for each move: what the kernel signals meanwhile must not be
/// lost.
fn move_interrupts(guest: &mut Console) {
    let lines = "$(awk -F: '/virtio.*put/ { print $1 }' /proc/interrupts)";
    guest.line(&format!(
        "for i in $(seq 300); do for n in {lines}; do echo $((i % 2 + 1)) > /proc/irq/$n/smp_affinity; done; done &"
    ));
}

/// A card that comes is the kernel's at once, and one that goes takes nothing with it.
fn a_card_comes_and_goes(host: &Host, vm: &str, guest: &mut Console) {
    let mac = "52:54:00:00:77:01";
    host.serio(&["vm", "nic", "add", vm, &format!("mac={mac}")]).ok();
    let added = format!("device=\"{mac}\"");
    let pairs = || metric(host, vm, "serio_vm_nic_pairs_in_kernel", &added);
    guest.line("until [ -e /sys/class/net/eth1 ]; do :; done; ip link set eth1 up");
    eventually(60, "the kernel has the new card", || pairs() == 2);
    host.serio(&["vm", "nic", "remove", vm, mac]).ok();
}

#[test]
fn the_kernel_moves_packets_until_something_speaks_against_it() {
    on_host("e2e", &[], |host| {
        if !has_vhost_net(host) {
            return;
        }
        let vdc = host.vdc("net");
        let run = |name: &str, address: &str| {
            let nic = format!("address={address}/24");
            let vm = vdc.run_tiny(name, &["--vcpus", "2", "--nic", &nic, "--restart", "always"]);
            vdc.wait_ready(&vm);
            (Console::open(host, &vm), vm)
        };
        let (mut one, first) = run("one", "192.168.7.2");
        let (mut two, second) = run("two", "192.168.7.3");
        eventually(10, "the kernel has both", || {
            (in_kernel(host, &first), in_kernel(host, &second)) == (2, 2)
        });
        let sent = || metric(host, &first, "serio_vm_nic_bytes_total", "direction=\"send\"");
        let before = sent();
        talk(&mut one, &mut two, 1);
        assert!(sent() - before >= 2_000_000, "what the kernel moves is counted at the tap");

        move_interrupts(&mut two);
        move_interrupts(&mut one);
        talk(&mut one, &mut two, 20);
        assert_eq!((in_kernel(host, &first), in_kernel(host, &second)), (2, 2));

        // Limits hold, and those without them are as fast as before.
        host.serio(&["vm", "update", &second, "--nic-bandwidth", "100MiB"]).ok();
        eventually(10, "the limited card is served by its own threads", || in_kernel(host, &second) == 0);
        assert_eq!(in_kernel(host, &first), 2);
        talk(&mut one, &mut two, 2);
        host.serio(&["vm", "update", &second, "--nic-bandwidth", "0B"]).ok();
        eventually(10, "the kernel has it again", || in_kernel(host, &second) == 2);
        talk(&mut one, &mut two, 3);

        for round in 4..6 {
            host.serio(&["vm", "pause", &second]).ok();
            host.serio(&["vm", "resume", &second]).ok();
            eventually(10, "the kernel goes on with it", || in_kernel(host, &second) == 2);
            talk(&mut one, &mut two, round);
        }

        // From its first snapshot on the next one holds what has changed since, and the kernel keeps no account of that.
        host.serio(&["vm", "snapshot", &second, "--name", "live"]).ok();
        assert_eq!(in_kernel(host, &second), 0);
        talk(&mut one, &mut two, 6);

        host.serio(&["vm", "reboot", &second]).ok();
        eventually(180, "the guest is up again, in the kernel's hands", || in_kernel(host, &second) == 2);
        vdc.wait_ready(&second);
        talk(&mut one, &mut two, 7);
        host.serio(&["vm", "stop", &second, "--force"]).ok();
        host.serio(&["vm", "restore", &second, "live"]).ok();
        assert_eq!(in_kernel(host, &second), 0);
        let mut two = Console::open(host, &second);
        talk(&mut one, &mut two, 8);

        a_card_comes_and_goes(host, &first, &mut one);
        talk(&mut one, &mut two, 9);
        host.serio(&["vm", "stop", &first]).ok();
        let shown = host.json(&["vm", "show", &first]);
        assert_eq!(shown["status"]["lastEnd"]["kind"], "power-off", "{shown}");
    });
}

/// The table of misuses, with the kernel behind the rings of the card: what it finds broken breaks the card, and nothing else.
#[test]
fn a_hostile_guest_and_the_kernel() {
    on_host("e2e", &[], |host| {
        if !has_vhost_net(host) {
            return;
        }
        testbed(&["push", "e2e", &image("mini/mini.elf")]).ok();
        // All of it takes minutes here.
        let part = if long() { "0/1" } else { "1/16" };
        // The kernel's worker is a thread of the process that it works for.
        let run = format!(
            "(until ip link set hostile0 up 2>/dev/null; do sleep 0.1; done) & \
             (until grep -qs '^vhost-' /proc/[0-9]*/task/*/comm; do sleep 0.1; done; echo in-the-kernel) & \
             serio-vmm run --kernel /usr/local/bin/mini.elf --cmdline 'mini.test=hostile mini.vectors=1 mini.part={part}' \
             --memory 64MiB --cpus 2 --on-reset exit --net hostile0; echo ended=$?"
        );
        let said = host.shell(&run).ok();
        let cases =
            said.lines().filter(|line| line.starts_with("ok hostile.") && line.contains(".net")).count();
        println!("{cases} cases on the card");
        assert!(cases >= if long() { 300 } else { 10 }, "{said}");
        assert!(said.lines().any(|line| line == "in-the-kernel"), "the kernel has never had the rings");
        assert!(said.contains(" 0 failed") && said.lines().any(|line| line == "ended=0"), "{said}");
    });
}
