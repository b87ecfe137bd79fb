//! A Debian guest that boots from its own disk, installs another kernel and reboots into it. Only with `--long`.

use std::fs;

use serio_tests::bed::{eventually, on_debian_host};

#[test]
fn a_guest_boots_from_its_disk_and_reboots_into_the_kernel_that_it_installed() {
    on_debian_host(|host| {
        host.import_debian("debian-disk", &[]);
        let vdc = host.vdc("own-kernel");
        let vm = vdc.at("web");
        let folder = tempfile::tempdir().unwrap();
        let user_data = folder.path().join("user-data");
        // What a package of a kernel does: its files, and an entry; then the guest reboots by itself.
        let words = "#cloud-config\nruncmd:\n  - [ sh, -ec, \"cp /boot/vmlinuz-* /boot/vmlinuz-99; cp /boot/initrd.img-* /boot/initrd.img-99; \
                     sed 's/^version .*/version 99/; s/img-.*/img-99/; s/vmlinuz-.*/vmlinuz-99/; s/^options .*/& serio.second=1/' \
                     /boot/loader/entries/debian.conf > /boot/loader/entries/debian-99.conf; sync; \
                     echo installed-another-kernel > /dev/ttyS0; systemctl reboot\" ]\n";
        fs::write(&user_data, words).unwrap();
        let user_data = user_data.to_str().unwrap();
        host.serio(&[
            "vm",
            "run",
            &vm,
            "--image",
            "debian-disk",
            "--memory",
            "1GiB",
            "--user-data",
            user_data,
        ])
        .ok();
        let first = host.json(&["vm", "show", &vm]);
        let path = |shown: &serde_json::Value| {
            shown["status"]["kernel"]["path"].as_str().unwrap_or_default().to_owned()
        };
        assert!(path(&first).starts_with("/boot/vmlinuz-6"), "{first}");
        host.wait_for_guest(&vm, &["installed-another-kernel"]);
        eventually(900, "it boots the kernel that it installed", || {
            path(&host.json(&["vm", "show", &vm])) == "/boot/vmlinuz-99"
        });
        // What its first boot printed is in the log too.
        host.wait_for_guest(&vm, &["serio.second=1", "login:"]);
        let second = host.json(&["vm", "show", &vm]);
        assert_eq!(second["status"]["restarts"].as_u64().unwrap_or(0), 0, "{second}");
    });
}
