//! A whole Debian guest with its agent: what a guest of tenants looks like. Only with `--long`: it boots for minutes.

use std::{fs, process::Command};

use serio_tests::{
    bed::{image, on_debian_host, run},
    volumes::copy,
};

/// The root is the only partition, from 1 MiB on.
const ROOT: usize = 1 << 20;

/// Whether the file system's journal has something to replay: the flag goes when it is unmounted, or frozen.
#[track_caller]
fn needs_recovery(disk: &[u8]) -> bool {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let root = folder.path().join("root.raw");
    fs::write(&root, &disk[ROOT..]).expect("a file can be written");
    let features = run(Command::new("dumpe2fs").arg("-h").arg(&root)).ok();
    features.lines().any(|line| line.starts_with("Filesystem features:") && line.contains("needs_recovery"))
}

#[test]
fn its_file_systems_are_frozen_for_a_snapshot_that_asks() {
    on_debian_host(|host| {
        let (kernel, initrd) = (image("debian/vmlinuz"), image("debian/initrd.img"));
        let cmdline = "root=LABEL=root ro console=ttyS0";
        host.import_debian("debian", &["--kernel", &kernel, "--initrd", &initrd, "--cmdline", cmdline]);
        let vdc = host.vdc("debian");
        let vm = vdc.at("web");
        let folder = tempfile::tempdir().unwrap();
        let user_data = folder.path().join("user-data");
        // It goes on writing: without a freeze the journal of any point has something to replay.
        let words = "#cloud-config\nruncmd:\n  - [ sh, -c, \"systemctl start qemu-guest-agent; echo churn-started > /dev/ttyS0; \
                     (while :; do date >> /churn; sync; echo churn: $(stat -c %s /churn) bytes > /dev/ttyS0; sleep 1; done) &\" ]\n";
        fs::write(&user_data, words).unwrap();
        let user_data = user_data.to_str().unwrap();
        host.serio(&["vm", "run", &vm, "--image", "debian", "--memory", "1GiB", "--user-data", user_data])
            .ok();
        host.wait_for_guest(&vm, &["churn-started"]);
        for (name, options, class) in [
            ("crash", &[][..], "POINT_CLASS_CRASH"),
            ("app", &["--consistency", "app", "--require-app"][..], "POINT_CLASS_APP"),
        ] {
            host.serio(&[&["vdc", "snapshot", &vdc.name, "--name", name], options].concat()).ok();
            let listed = host.json(&["vdc", "snapshots", &vdc.name]);
            let point = listed.as_array().into_iter().flatten().find(|point| {
                point["name"].as_str().is_some_and(|found| found.ends_with(&format!("/{name}")))
            });
            assert_eq!(point.map(|point| &point["class"]), Some(&class.into()), "{listed}");
            let disk = copy(host, &[&vdc.at("web-root"), "--snapshot", name]);
            assert_eq!(needs_recovery(&disk), name == "crash", "{name}: the journal says otherwise");
        }
        // It was thawed: it goes on writing, and says so once more.
        host.serio(&[
            "vm",
            "console",
            &vm,
            "--history",
            "0B",
            "--until",
            "churn: [0-9]+ bytes",
            "--timeout",
            "120s",
        ])
        .ok();
    });
}
