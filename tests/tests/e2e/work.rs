//! Two Debian guests at work: their processors, memory, disks and the network between them, under what tenants use to measure
//! these; then one powers itself off. Only with `--long`.

use std::fs;

use serio_tests::bed::{eventually, on_debian_host};

/// Writes, verifies, copies and presses, then says how it ended, and powers off.
const WORK: &str = r#"#cloud-config
write_files:
  - path: /work
    permissions: "0755"
    content: |
      #!/bin/sh
      set -ex
      data=/dev/$(lsblk --nodeps --noheadings --bytes --output NAME,SIZE | awk '$2 == 134217728 { print $1 }')
      fio --name=verify --filename="$data" --size=64m --rw=randwrite --bs=4k --iodepth=8 --ioengine=libaio \
        --direct=1 --verify=crc32c --do_verify=1 --verify_fatal=1
      # What a package manager does: many small files, renamed into place, and synced.
      cp -a /usr/lib/python3 /var/tmp/new && sync && mv /var/tmp/new /var/tmp/old && diff -r /usr/lib/python3 /var/tmp/old
      stress-ng --cpu 2 --vm 1 --vm-bytes 64m --io 1 --timeout 20s --metrics-brief
      iperf3 --client 192.168.7.10 --time 5
      iperf3 --client 192.168.7.10 --time 5 --reverse
runcmd:
  - [ sh, -c, "/work > /dev/ttyS0 2>&1; echo work-ended=$? > /dev/ttyS0; poweroff" ]
"#;
const SERVER: &str =
    "#cloud-config\nruncmd:\n  - [ sh, -c, \"iperf3 --server --daemon; echo server-is-up > /dev/ttyS0\" ]\n";

#[test]
fn two_guests_work_and_one_powers_off() {
    on_debian_host(|host| {
        host.import_debian("debian-disk", &[]);
        let vdc = host.vdc("work");
        let (server, client, data) = (vdc.at("server"), vdc.at("client"), vdc.at("data"));
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, words: &str| {
            let path = folder.path().join(name);
            fs::write(&path, words).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let (serves, works) = (file("server", SERVER), file("client", WORK));
        let guest = |vm: &str, nic: &str, user_data: &str, more: &[&str]| {
            let words = ["vm", "run", vm, "--image", "debian-disk", "--memory", "768MiB", "--nic", nic];
            host.serio(&[&words[..], &["--user-data", user_data], more].concat()).ok();
        };
        guest(&server, "address=192.168.7.10/24", &serves, &[]);
        host.wait_for_guest(&server, &["server-is-up"]);
        host.serio(&["volume", "create", &data, "--size", "128MiB"]).ok();
        guest(&client, "address=192.168.7.11/24", &works, &["--volume", &data]);
        let said = host.wait_for_guest(&client, &["work-ended=[0-9]+"]);
        assert!(said.contains("work-ended=0"), "{}", host.serio(&["vm", "log", &client]).ok());
        eventually(300, "it has powered off", || host.state(&client) == "STOPPED");
        let shown = host.json(&["vm", "show", &client]);
        assert_eq!(shown["status"]["lastEnd"]["kind"], "power-off", "{shown}");
        for line in said.lines().filter(|line| line.contains("sender") || line.contains("receiver")) {
            println!("{line}");
        }
    });
}
