//! Disks as strangers' tools see them: qemu-img, nbdinfo and nbdcopy, over mutual TLS.

use std::{fs, path::Path, process::Command};

use serde_json::Value;
use serio_tests::bed::{Host, on_host, run};

fn tool(name: &str) -> bool {
    ["/usr/bin", "/usr/sbin", "/sbin"].iter().any(|folder| Path::new(folder).join(name).exists())
}

fn uri(host: &Host, args: &[&str]) -> String {
    let printed = host.serio(&[&["volume", "export"], args].concat()).ok();
    printed.split_whitespace().find(|word| word.starts_with("nbd")).expect("an NBD URI is printed").to_owned()
}

/// The content of a file in an ext4 image, after its journal was replayed.
fn file_in(image: &Path, file: &str) -> String {
    let image = image.to_str().expect("the path is text");
    let checked = run(Command::new("e2fsck").args(["-fp", image]));
    assert!(checked.code < 4, "{checked}");
    run(Command::new("debugfs").args(["-R", &format!("cat {file}"), image])).ok()
}

#[test]
fn a_point_of_a_running_disk_stays_what_it_was() {
    if !tool("nbdcopy") || !tool("qemu-img") {
        println!("skipped: libnbd-bin or qemu-utils is not installed");
        return;
    }
    on_host("e2e", &[], |host| {
        let vdc = host.vdc("export");
        let vm = vdc.run_tiny("web", &["--disk-size", "256MiB"]);
        vdc.wait_ready(&vm);
        host.type_line(&vm, "echo first > /data/note; sync; echo done-$((40+2))", "done-42");
        let volume = vdc.at("web-root");
        host.serio(&["volume", "snapshot", &volume, "--name", "before"]).ok();
        host.type_line(&vm, "echo second > /data/note; sync; echo done-$((40+3))", "done-43");
        host.serio(&["volume", "snapshot", &volume, "--name", "after"]).ok();

        let folder = tempfile::tempdir().unwrap();
        for (point, content) in [("before", "first"), ("after", "second")] {
            let uri = uri(host, &[&volume, "--snapshot", point]);
            let copy = folder.path().join(point);
            let info = run(host.command("nbdinfo").args(["--json", &uri])).ok();
            let info: Value = serde_json::from_str(&info).unwrap();
            assert_eq!(info["exports"][0]["export-size"], 256 << 20, "{info}");
            run(host.command("nbdcopy").arg(&uri).arg(&copy)).ok();
            assert_eq!(file_in(&copy, "/note").trim(), content);
        }
        // Sealed: another copy is the same, whatever the guest does meanwhile; and another tool sees the same bytes.
        let again = folder.path().join("again");
        let uri = uri(host, &[&volume, "--snapshot", "before"]);
        run(host.command("nbdcopy").arg(&uri).arg(&again)).ok();
        assert_eq!(file_in(&again, "/note").trim(), "first");
        // In use: a head is open in one process at a time.
        host.serio(&["volume", "export", &volume]).refused(4, &["web"]);
        let exports = host.json(&["volume", "exports"]);
        for export in exports.as_array().into_iter().flatten() {
            host.serio(&["volume", "unexport", export["name"].as_str().unwrap()]).ok();
        }
    });
}

#[test]
fn a_stopped_disk_is_served_to_qemu_img() {
    if !tool("nbdcopy") || !tool("qemu-img") {
        println!("skipped: libnbd-bin or qemu-utils is not installed");
        return;
    }
    on_host("e2e", &[], |host| {
        let vdc = host.vdc("stopped");
        let volume = vdc.at("data");
        host.serio(&["volume", "create", &volume, "--image", "tiny"]).ok();
        let uri = uri(host, &[&volume]);
        let folder = tempfile::tempdir().unwrap();
        let copy = folder.path().join("copy");
        run(host.command("nbdcopy").arg(&uri).arg(&copy)).ok();
        let original = fs::read(serio_tests::bed::image("tiny/tiny.raw")).unwrap();
        assert!(
            fs::read(&copy).unwrap() == original,
            "the copy differs from the image that the volume was made from"
        );

        // qemu-img takes the certificates as an object, and the URI's parts.
        let (address, token) = uri.split_once("://").unwrap().1.split_once('/').unwrap();
        let token = token.split('?').next().unwrap();
        let (server, port) = address.rsplit_once(':').unwrap();
        let pki = Path::new(host.variable("SERIO_CERT")).parent().unwrap().display();
        let object = format!("tls-creds-x509,id=tls,endpoint=client,dir={pki}");
        let file = format!(
            "driver=nbd,server.type=inet,server.host={server},server.port={port},export={token},tls-creds=tls"
        );
        run(host.command("qemu-img").args(["info", "--object", &object, "--image-opts", &file])).ok();

        // Without a certificate nobody learns anything.
        let plain = uri.replace("nbds://", "nbd://").split('?').next().unwrap().to_owned();
        assert_ne!(run(Command::new("nbdinfo").arg(&plain)).code, 0, "an export was served without TLS");
        host.serio(&["volume", "unexport", host.json(&["volume", "exports"])[0]["name"].as_str().unwrap()])
            .ok();
    });
}
