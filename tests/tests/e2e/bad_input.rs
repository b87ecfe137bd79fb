//! Bad input: a clear error that names the field and the remedy, the right exit code, nothing half-made left behind.

use std::{fs, process::Command};

use serio_tests::bed::{Host, image, on_host, run, testbed};

/// How many of each there are, in the API and on the disk.
fn counts(host: &Host) -> Vec<usize> {
    let mut counts: Vec<usize> = ["vm", "volume", "image", "vdc"]
        .iter()
        .map(|noun| host.json(&[noun, "list"]).as_array().map_or(0, Vec::len))
        .collect();
    let folders = host.shell("cd /var/lib/serio && ls volumes images vms | wc -l").ok();
    counts.push(folders.trim().parse().expect("wc prints a number"));
    counts
}

#[test]
fn what_cannot_be_is_refused_and_leaves_nothing() {
    on_host("e2e", &[], |host| {
        let vdc = host.vdc("bad");
        let vm = vdc.at("x");
        let folder = tempfile::tempdir().unwrap();
        let text = folder.path().join("text");
        fs::write(&text, "this is no kernel\n".repeat(1000)).unwrap();
        let (text, disk) = (text.to_str().unwrap(), image("tiny/tiny.raw"));
        let before = counts(host);

        let run = |options: &[&str]| host.serio(&[&["vm", "run", &vm, "--image", "tiny"], options].concat());
        run(&["--vcpus", "0"]).refused(2, &["vcpus"]);
        run(&["--vcpus", "1000"]).refused(2, &["vcpus"]);
        run(&["--memory", "1MiB"]).refused(2, &["memory"]);
        run(&["--memory", "1TiB"]).refused(4, &["memory"]);
        run(&["--disk-size", "1TiB"]).refused(4, &["storage"]);
        run(&["--disk-size", "1MiB"]).refused(2, &["disk", "64MiB"]);
        run(&["--volume", &vdc.at("nothing")]).refused(3, &["nothing"]);
        host.serio(&["vm", "run", &vm, "--image", "nothing"]).refused(3, &["nothing"]);
        host.serio(&["vm", "run", "nobody/x", "--image", "tiny"]).refused(3, &["nobody"]);
        host.serio(&["vm", "run", "Bad_Name/x", "--image", "tiny"]).refused(2, &["Bad_Name"]);
        host.serio(&["vm", "show", &vm]).refused(3, &["x"]);
        host.serio(&["vm", "start", &vm]).refused(3, &["x"]);
        host.serio(&["vdc", "create", &vdc.name, "--vcpus", "1", "--memory", "1GiB", "--storage", "1GiB"])
            .refused(4, &["exists"]);
        host.serio(&["vdc", "show", "nobody"]).refused(3, &["nobody"]);

        let import = |options: &[&str]| host.serio(&[&["image", "import", "bad"], options].concat());
        import(&["--disk", "/nothing", "--format", "raw"]).refused(1, &["/nothing"]);
        import(&["--disk", &disk, "--format", "vhd"]).refused(2, &["format"]);
        import(&["--disk", &disk, "--format", "raw", "--kernel", text]).refused(2, &["kernel"]);
        assert_eq!(counts(host), before, "something half-made was left behind");
    });
}

#[test]
fn a_disk_in_use_is_not_given_away() {
    on_host("e2e", &[], |host| {
        let vdc = host.vdc("inuse");
        let data = vdc.at("data");
        host.serio(&["volume", "create", &data, "--size", "16MiB"]).ok();
        vdc.run_tiny("one", &["--volume", &data]);
        let before = counts(host);
        let two = vdc.at("two");
        host.serio(&["vm", "run", &two, "--image", "tiny", "--memory", "192MiB", "--volume", &data])
            .refused(4, &["data", "one"]);
        host.serio(&["volume", "delete", &data]).refused(4, &["one"]);
        host.serio(&["volume", "export", &data, "--writable"]).refused(4, &["one"]);
        assert_eq!(counts(host), before, "something half-made was left behind");
    });
}

#[test]
fn a_wrong_certificate_is_refused() {
    on_host("e2e", &[], |host| {
        let folder = tempfile::tempdir().unwrap();
        let pki = folder.path().to_str().unwrap();
        host.serio(&["pki", "init", pki, "--name", "Another CA"]).ok();
        host.serio(&["pki", "issue", pki, "stranger", "--role", "control-plane"]).ok();
        let of = |file: &str| format!("{pki}/stranger/{file}");
        let stranger =
            host.serio(&["--cert", &of("client-cert.pem"), "--key", &of("client-key.pem"), "vm", "list"]);
        assert_eq!(stranger.code, 5, "{stranger}");
        let distrusted = host.serio(&["--ca", &of("ca-cert.pem"), "vm", "list"]);
        assert_eq!(distrusted.code, 5, "{distrusted}");
        let none = run(Command::new(serio_tests::bed::binary("serio")).args([
            "--host",
            host.variable("SERIO_HOST"),
            "vm",
            "list",
        ]));
        assert_ne!(none.code, 0, "{none}");
    });
}

#[test]
fn garbage_on_any_socket_costs_only_that_connection() {
    on_host("e2e", &[], |host| {
        let vdc = host.vdc("garbage");
        let vm = vdc.run_tiny("web", &[]);
        let pid = host.pid(&vm);
        let seriod = host.exec(&["service", "seriod", "status"]).ok();
        // The TCP ports from inside, then every Unix socket there is; nc of busybox speaks only TCP, `local:` is its Unix form.
        host.shell("for port in 7440 10809; do for n in 1 2 3; do head -c 70000 /dev/urandom | timeout 5 nc -w 2 127.0.0.1 $port; done; done >/dev/null 2>&1; true").ok();
        host.shell(
            "find /run/serio -type s | while read -r socket; do for n in 1 2 3; do head -c 70000 /dev/urandom | \
             timeout 5 nc local:$socket; done; done >/dev/null 2>&1; true",
        )
        .ok();
        assert_eq!(host.exec(&["service", "seriod", "status"]).ok(), seriod, "seriod was restarted or died");
        assert_eq!((host.state(&vm).as_str(), host.pid(&vm)), ("RUNNING", pid));
        vdc.wait_ready(&vm);
    });
}

#[test]
fn a_full_state_disk_is_said_and_nothing_is_left() {
    on_host("e2e", &[], |host| {
        let vdc = host.vdc("full");
        let before = counts(host);
        // Most of it at once, the last block by block.
        host.shell(
            "cd /var/lib/serio && free=$(df -k . | awk 'END {print $(NF-2)}') && fallocate -l $((free - 4096))k ballast; \
             dd if=/dev/zero of=ballast2 bs=4k 2>/dev/null; true",
        )
        .ok();
        let volume = host.serio(&["volume", "create", &vdc.at("data"), "--image", "tiny"]);
        let answers = host.serio(&["node", "show"]);
        host.shell("rm /var/lib/serio/ballast /var/lib/serio/ballast2").ok();
        assert!(matches!(volume.code, 1 | 4), "{volume}");
        let said = volume.err.to_lowercase();
        assert!(said.contains("space") || said.contains("full"), "{volume}");
        answers.ok();
        assert_eq!(counts(host), before, "something half-made was left behind");
        assert_eq!(testbed(&["health", &host.name]).code, 0);
    });
}
