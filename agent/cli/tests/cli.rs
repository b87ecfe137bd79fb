//! The binary against a node that answers as the test wants: exit codes, texts, JSON, streams, certificates.
#![allow(clippy::unwrap_used, reason = "the helpers of a test may panic as the test does")]

mod fake;

use std::{path::PathBuf, process::Stdio};

use fake::Fake;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{io::AsyncWriteExt, process::Command};

/// A node, and a way to run the command against it.
struct Case {
    dir: TempDir,
    node: Fake,
}

struct Ran {
    code: i32,
    stdout: String,
    stderr: String,
}

impl Case {
    fn new() -> Self {
        let case = Self { dir: tempfile::tempdir().unwrap(), node: Fake::default() };
        case.node.serve(&case.path("node.sock"));
        case
    }

    fn path(&self, file: &str) -> PathBuf {
        self.dir.path().join(file)
    }

    async fn run(&self, arguments: &[&str]) -> Ran {
        self.run_with(arguments, "", &[]).await
    }

    async fn run_with(&self, arguments: &[&str], input: &str, environment: &[(&str, String)]) -> Ran {
        let mut command = Command::new(env!("CARGO_BIN_EXE_serio"));
        command.args(arguments).env_remove("SERIO_CA").env_remove("SERIO_CERT").env_remove("SERIO_KEY");
        command.env("SERIO_HOST", format!("unix:{}", self.path("node.sock").display()));
        command.envs(environment.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        // A command that does not read its input may be gone already.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes()).await;
        let out = child.wait_with_output().await.unwrap();
        Ran {
            code: out.status.code().unwrap(),
            stdout: String::from_utf8(out.stdout).unwrap(),
            stderr: String::from_utf8(out.stderr).unwrap(),
        }
    }
}

const QUOTA: [&str; 6] = ["--vcpus", "4", "--memory", "4GiB", "--storage", "20GiB"];

async fn create(case: &Case, name: &str, more: &[&str]) -> Ran {
    case.run(&[&["vdc", "create", name], &QUOTA[..], more].concat()).await
}

#[tokio::test]
async fn json_is_the_mapping_of_the_api() {
    let case = Case::new();
    let ran = case.run(&["vdc", "list", "-o", "json"]).await;
    let list: Value = serde_json::from_str(&ran.stdout).unwrap();
    let quota = json!({ "vcpus": 4, "memoryBytes": "4294967296", "storageBytes": "21474836480" });
    assert_eq!((ran.code, list.as_array().unwrap().len()), (0, 2));
    assert_eq!((&list[0]["name"], &list[0]["quota"]), (&json!("vdcs/ardesio"), &quota));
    assert_eq!(list[0]["createTime"], "2023-11-14T22:13:20+00:00");
    let ran = case.run(&["vdc", "show", "ardesio", "-o", "yaml"]).await;
    assert!(ran.stdout.contains("memoryBytes: '4294967296'"), "{}", ran.stdout);
    let ran = case.run(&["vm", "list", "-o", "json"]).await;
    assert_eq!(ran.stdout, "[]\n");
}

#[tokio::test]
async fn tables_are_plain() {
    let case = Case::new();
    let ran = case.run(&["vdc", "list"]).await;
    let expected = "NAME     VCPUS  MEMORY       STORAGE     CREATED\n\
                    ardesio  1/4    256MiB/4GiB  1GiB/20GiB  2023-11-14 22:13:20Z\n\
                    b        1/4    256MiB/4GiB  1GiB/20GiB  2023-11-14 22:13:20Z\n";
    assert_eq!(ran.stdout, expected);
    let ran = case.run(&["vdc", "update", "ardesio", "--vcpus", "8"]).await;
    assert_eq!(ran.stdout, "updated vdc ardesio: 8 vcpus, 4GiB memory, 20GiB storage\n");
}

#[tokio::test]
async fn answers_have_their_exit_codes() {
    let case = Case::new();
    for (arguments, code, text) in [
        (&["vdc", "show", "none"][..], 3, "error: cannot show vdc none: vdcs/none does not exist\n"),
        (
            &["vm", "start", "ardesio/web"],
            4,
            "error: cannot start vm ardesio/web: vdcs/ardesio has 0 of 4 vcpus left",
        ),
        (&["vm", "reboot", "ardesio/web"], 4, "the VM is stopped"),
        (&["vm", "resume", "ardesio/web"], 4, "is not paused"),
        (&["image", "delete", "tiny"], 4, "changed meanwhile"),
        (&["vdc", "delete", "ardesio"], 4, "the role auditor may not"),
        (&["image", "show", "tiny"], 1, "the disk is on fire"),
        (&["vm", "show", "ardesio/web"], 1, "want a scheduler"),
        (&["node", "list"], 1, "want a scheduler"),
        (&["vm", "show", "ardesio"], 2, "not of the form VDC/NAME"),
        (&["--host", "node-a", "vm", "list"], 2, "https://"),
        (&["--host", "unix:/nowhere", "vm", "list"], 5, "cannot reach unix:/nowhere: No such file"),
        (&["--host", "http://127.0.0.1:1", "vm", "list"], 5, "Connection refused"),
    ] {
        let ran = case.run(arguments).await;
        assert_eq!(ran.code, code, "{arguments:?}: {}", ran.stderr);
        assert!(ran.stderr.contains(text), "{arguments:?}: {}", ran.stderr);
        assert_eq!(ran.stdout, "", "{arguments:?}");
    }
    let ran = create(&case, "taken", &[]).await;
    assert_eq!(ran.code, 4);
    let ran = create(&case, "bad", &[]).await;
    assert_eq!(
        (ran.code, ran.stderr.as_str()),
        (2, "error: cannot create vdc bad: the quota is wrong\n  field quota.vcpus: 0 is not in 1 to 4096\n")
    );
}

#[tokio::test]
async fn a_restarting_node_is_asked_once_more_with_the_same_id() {
    let case = Case::new();
    assert_eq!(create(&case, "flaky", &[]).await.code, 0);
    let ids = std::mem::take(&mut case.node.seen.lock().unwrap().request_ids);
    assert_eq!(ids.len(), 2);
    assert_eq!(ids[0], ids[1]);
    assert_eq!(ids[0].len(), 36);
    assert_eq!(create(&case, "down", &[]).await.code, 5);
    assert_eq!(case.node.seen.lock().unwrap().request_ids.len(), 2);
}

#[tokio::test]
async fn long_work_is_waited_for_or_left_alone() {
    let case = Case::new();
    let ran = case.run(&["vdc", "delete-snapshot", "ardesio", "monday"]).await;
    assert_eq!(
        (ran.code, ran.stdout.as_str()),
        (0, "deleted vdc snapshot ardesio@monday\n"),
        "{}",
        ran.stderr
    );
    let ran = case.run(&["vdc", "delete-snapshot", "ardesio", "monday", "--async"]).await;
    assert_eq!((ran.code, ran.stdout.as_str()), (0, "began operation monday\n"));
    let ran = case.run(&["vdc", "delete-snapshot", "ardesio", "broken"]).await;
    assert_eq!(
        (ran.code, ran.stderr.as_str()),
        (1, "error: operations/broken failed: the disk is on fire\n")
    );
    // A host that restarts meanwhile is asked again.
    let ran = case.run(&["vdc", "delete-snapshot", "ardesio", "flaky", "-o", "json"]).await;
    let value: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!((ran.code, &value["state"]), (0, &json!("OPERATION_STATE_DONE")));
    let ran = case.run(&["vdc", "delete-snapshot", "ardesio", "endless", "--timeout", "200ms"]).await;
    assert_eq!(ran.code, 130);
    assert!(ran.stderr.contains("serio operation cancel endless"), "{}", ran.stderr);
    let ran = case.run(&["operation", "list", "--volume", "a/web"]).await;
    let expected = "ID  KIND             TARGET          STATE    DONE  BEGUN\n\
                    1   delete-snapshot  volume a/web@s  running  25%   -\n";
    assert_eq!(ran.stdout, expected);
    let ran = case.run(&["operation", "cancel", "operations/1"]).await;
    assert_eq!(ran.stdout, "the operation was cancelled\n");
    let ran = case.run(&["vdc", "snapshot", "ardesio", "--name", "monday", "--consistency", "app"]).await;
    let expected = "sealed 1 volumes of vdc ardesio as monday\nardesio/web-root@monday is crash-consistent only: no agent answers\n";
    assert_eq!(ran.stdout, expected);
}

#[tokio::test]
async fn patience_ends() {
    let case = Case::new();
    let ran = create(&case, "slow", &["--timeout", "200ms"]).await;
    assert_eq!(ran.code, 1);
    assert!(
        ran.stderr.contains("no answer within 0.2 s") && ran.stderr.contains("--timeout"),
        "{}",
        ran.stderr
    );
}

#[tokio::test]
async fn a_vm_as_typed() {
    let case = Case::new();
    std::fs::write(case.path("key.pub"), "ssh-ed25519 AAAA me\n").unwrap();
    let key = case.path("key.pub");
    let ran = case
        .run(&[
            "vm",
            "run",
            "ardesio/web",
            "--image",
            "tiny",
            "--vcpus",
            "2",
            "--memory",
            "256MiB",
            "--disk-size",
            "1GiB",
            "--volume",
            "ardesio/data",
            "--nic",
            "address=192.168.7.10/24",
            "--ssh-key",
            key.to_str().unwrap(),
            "--restart",
            "always",
            "--cpu",
            "x86-64-v3",
            "--hugepages",
            "2MiB",
        ])
        .await;
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let request = case.node.seen.lock().unwrap().vm.take().unwrap();
    assert!(request.start && request.parent == "vdcs/ardesio" && request.vm_id == "web");
    let spec = request.spec.unwrap();
    assert_eq!((spec.vcpus, spec.memory_bytes, spec.root_disk_bytes), (2, 256 << 20, 1 << 30));
    assert_eq!((spec.cpu_baseline.as_str(), spec.page_bytes), ("x86-64-v3", 2 << 20));
    assert_eq!(
        (spec.image.as_str(), spec.volumes),
        ("images/tiny", vec!["vdcs/ardesio/volumes/data".to_owned()])
    );
    assert_eq!(spec.cloud_init.unwrap().ssh_keys, ["ssh-ed25519 AAAA me"]);
    assert_eq!(case.run(&["vm", "create", "ardesio/web", "--image", "tiny"]).await.code, 0);
    let request = case.node.seen.lock().unwrap().vm.take().unwrap();
    assert!(!request.start && request.spec.unwrap().cloud_init.is_none());
    let update = ["vm", "update", "ardesio/web", "--disk-iops", "9", "--restart", "never", "--vsock"];
    assert_eq!(case.run(&update).await.stdout, "updated vm ardesio/web\n");
    let request = case.node.seen.lock().unwrap().update.take().unwrap();
    assert_eq!(request.fields, ["vsock", "disk_limits.operations_per_second", "restart_policy"]);
    let spec = request.spec.unwrap();
    assert!(spec.vsock && spec.disk_limits.unwrap().operations_per_second == 9);
    assert_eq!(case.run(&["vm", "update", "ardesio/web"]).await.code, 2);
    let saved = case.run(&["vm", "snapshot", "ardesio/web", "--name", "before"]).await;
    assert!(saved.stdout.starts_with("saved vm ardesio/web as before: 1MiB of memory"), "{}", saved.stdout);
    let copy = case.run(&["vm", "restore", "ardesio/web", "before", "--as", "copy"]).await;
    assert_eq!((copy.code, copy.stdout.as_str()), (0, "vm ardesio/copy is running\n"));
    assert_eq!(case.run(&["vm", "delete-snapshot", "ardesio/web", "none"]).await.code, 3);
    let paused = case.run(&["vm", "pause", "ardesio/web"]).await;
    assert_eq!((paused.code, paused.stdout.as_str()), (0, "vm ardesio/web is paused\n"));
    assert_eq!(case.run(&["vm", "stop", "ardesio/web", "--timeout", "90s"]).await.code, 0);
    let stop = case.node.seen.lock().unwrap().stop.take().unwrap();
    assert_eq!((stop.timeout.unwrap().seconds, stop.force), (90, false));
}

#[tokio::test]
async fn disks_and_cards_that_come_and_go() {
    let case = Case::new();
    let added = case.run(&["vm", "disk", "add", "ardesio/web", "ardesio/data"]).await;
    assert_eq!((added.code, added.stdout.as_str()), (0, "vm ardesio/web has volume ardesio/data\n"));
    let remove = ["vm", "disk", "remove", "ardesio/web", "ardesio/data", "--timeout", "7s"];
    assert_eq!(case.run(&remove).await.code, 4);
    let card = case.run(&["vm", "nic", "add", "ardesio/web", "mac=52:54:00:00:00:07"]).await;
    assert_eq!((card.code, card.stdout.as_str()), (0, "vm ardesio/web has card 52:54:00:00:00:07\n"));
    let remove = ["vm", "nic", "remove", "ardesio/web", "52:54:00:00:00:07", "--timeout", "7s"];
    assert_eq!(case.run(&remove).await.code, 4);
    assert_eq!(case.run(&["vm", "nic", "remove", "ardesio/web", "7"]).await.code, 2);
}

#[tokio::test]
async fn the_console_under_a_script() {
    let case = Case::new();
    let steps = [
        "vm",
        "console",
        "ardesio/web",
        "--until",
        "login: $",
        "--send",
        r"hello\n",
        "--until",
        "^you said hello$",
    ];
    let ran = case.run(&steps).await;
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(
        ran.stdout.starts_with("history 16384\r\nlogin: hello\r\nyou said hello\r\n"),
        "{:?}",
        ran.stdout
    );
    let ran = case.run(&["vm", "console", "ardesio/web", "--until", "never", "--timeout", "300ms"]).await;
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("did not print `never` within 0.3 s"), "{}", ran.stderr);
    let ran = case.run(&["vm", "console", "ardesio/web", "--send", r"off\n", "--until", "never"]).await;
    assert!(ran.code == 1 && ran.stderr.contains("ended before"), "{}", ran.stderr);
    let ran = case.run(&["vm", "console", "ardesio/web", "--until", "("]).await;
    assert_eq!(ran.code, 2);
}

#[tokio::test]
async fn the_console_on_a_pipe() {
    let case = Case::new();
    let ran = case.run_with(&["vm", "console", "ardesio/web", "--history", "0"], "ls\noff\n", &[]).await;
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
    assert_eq!(ran.stdout, "history 0\r\nlogin: ls\r\nyou said ls\r\n# off\r\n");
    // The end of the input does not detach; the time does.
    let ran = case.run_with(&["vm", "console", "ardesio/web", "--timeout", "300ms"], "ls\n", &[]).await;
    assert!(ran.code == 0 && ran.stdout.ends_with("you said ls\r\n# "), "{:?}", ran.stdout);
}

#[tokio::test]
async fn the_log_and_its_last_lines() {
    let case = Case::new();
    for (arguments, text) in [
        (&["vm", "log", "ardesio/web"][..], fake::LOG),
        (&["vm", "log", "ardesio/web", "--tail", "2"], "two\r\nthree\r\n"),
        (&["vm", "log", "ardesio/web", "--tail", "1", "--follow"], "three\r\n"),
        (&["vm", "log", "ardesio/web", "--tail", "0", "--follow"], ""),
    ] {
        let ran = case.run(arguments).await;
        assert_eq!((ran.code, ran.stdout.as_str()), (0, text), "{arguments:?}");
    }
}

#[tokio::test]
async fn an_image_arrives_without_its_holes() {
    use std::os::unix::fs::FileExt;
    let case = Case::new();
    let disk = std::fs::File::create(case.path("disk.raw")).unwrap();
    disk.set_len(32 << 20).unwrap();
    disk.write_all_at(b"data", 20 << 20).unwrap();
    std::fs::write(case.path("vmlinuz"), b"kernel").unwrap();
    let (disk, kernel) = (case.path("disk.raw"), case.path("vmlinuz"));
    let files = ["--disk", disk.to_str().unwrap(), "--kernel", kernel.to_str().unwrap(), "--format"];
    let ran = case.run(&[&["image", "import", "tiny"], &files[..], &["raw"]].concat()).await;
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
    assert!(ran.stdout.starts_with("imported image tiny: 32MiB"), "{}", ran.stdout);
    {
        let seen = case.node.seen.lock().unwrap();
        assert_eq!(seen.disk, std::fs::read(&disk).unwrap());
        assert_eq!(seen.kernel, b"kernel");
        assert!(seen.chunk_bytes <= 1 << 20, "{} bytes sent", seen.chunk_bytes);
    }
    let ran = case.run(&[&["image", "import", "tiny"], &files[..], &["qcow2"]].concat()).await;
    assert!(ran.code == 2 && ran.stderr.contains("write raw"), "{}", ran.stderr);
    let ran = case.run(&["image", "import", "tiny", "--disk", "/nowhere.raw", "--format", "raw"]).await;
    assert!(ran.code == 1 && ran.stderr.contains("cannot read /nowhere.raw: No such file"), "{}", ran.stderr);
}

#[tokio::test]
async fn certificates_made_here_open_a_node() {
    let case = Case::new();
    for authority in ["pki", "other"] {
        let folder = case.path(authority);
        let folder = folder.to_str().unwrap();
        assert_eq!(case.run(&["pki", "init", folder]).await.code, 0);
        let ran =
            case.run(&["pki", "issue", folder, "me", "--role", "control-plane", "--host", "127.0.0.1"]).await;
        assert_eq!(ran.code, 0, "{}", ran.stderr);
    }
    let port = case.node.serve_tls(&case.path("pki/me")).await;
    let environment = |ca: &str, me: &str, host: &str| {
        let file = |name: String| case.path(&name).display().to_string();
        [
            ("SERIO_HOST", format!("https://{host}:{port}")),
            ("SERIO_CA", file(format!("{ca}/ca-cert.pem"))),
            ("SERIO_CERT", file(format!("{me}/me/client-cert.pem"))),
            ("SERIO_KEY", file(format!("{me}/me/client-key.pem"))),
        ]
    };
    let list = ["vdc", "list", "-o", "json"];
    assert_eq!(case.run_with(&list, "", &environment("pki", "pki", "127.0.0.1")).await.code, 0);
    for (ca, me, host, hint) in [
        ("other", "pki", "127.0.0.1", "SERIO_CA"),
        ("pki", "other", "127.0.0.1", "SERIO_CERT"),
        ("pki", "pki", "localhost", "another name"),
    ] {
        let ran = case.run_with(&list, "", &environment(ca, me, host)).await;
        assert_eq!(ran.code, 5, "{ca} {me} {host}: {}", ran.stderr);
        assert!(ran.stderr.contains(hint), "{ca} {me} {host}: {}", ran.stderr);
    }
    let ran = case.run_with(&list, "", &[("SERIO_HOST", format!("https://127.0.0.1:{port}"))]).await;
    assert!(ran.code == 2 && ran.stderr.contains("SERIO_CA, SERIO_CERT, SERIO_KEY"), "{}", ran.stderr);
}

#[tokio::test]
async fn completions_for_three_shells() {
    let case = Case::new();
    for shell in ["bash", "zsh", "fish"] {
        let ran = case.run(&["completion", shell]).await;
        assert!(ran.code == 0 && ran.stdout.contains("serio"), "{shell}");
    }
}

#[tokio::test]
async fn usage_is_read_page_by_page() {
    let case = Case::new();
    let ran = case.run(&["vdc", "usage", "ardesio", "--from", "1970-01-01"]).await;
    let expected = [
        "FROM                  VCPU H  CPU H  MEMORY GIB H  STORAGE GIB H  READ  WRITTEN  NET IN  NET OUT  ENERGY",
        "1970-01-01 00:00:00Z  2.000   0.000  1.000         0.000          0B    0B       0B      0B       not measured",
        "1970-01-01 01:00:00Z  2.000   0.000  1.000         0.000          0B    0B       0B      0B       not measured",
    ];
    assert_eq!(ran.stdout.lines().map(str::trim_end).collect::<Vec<_>>(), expected);
    let ran = case.run(&["vdc", "usage", "ardesio", "--csv"]).await;
    assert_eq!(ran.stdout.lines().count(), 3);
    assert!(
        ran.stdout.contains("\nardesio,,1970-01-01T01:00:00Z,1970-01-01T02:00:00Z,0,7200,"),
        "{}",
        ran.stdout
    );
    let ran = case.run(&["vdc", "usage", "ardesio", "--from", "yesterday"]).await;
    assert_eq!(ran.code, 2, "{}", ran.stderr);
}

#[tokio::test]
async fn a_vms_snapshot_goes_into_a_file_of_its_owner_and_back() {
    use std::os::unix::fs::PermissionsExt;
    let case = Case::new();
    let file = case.path("web.vm");
    let path = file.to_str().unwrap();
    let exported = case.run(&["vm", "snapshot", "export", "ardesio/web@before", path]).await;
    assert_eq!((exported.code, exported.stderr.as_str()), (0, ""));
    assert!(exported.stdout.contains("not encrypted"), "{}", exported.stdout);
    assert_eq!(std::fs::read(&file).unwrap(), b"an archive");
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    // What is there is not touched.
    let again = case.run(&["vm", "snapshot", "export", "ardesio/web@before", path]).await;
    assert!(again.code == 1 && again.stderr.contains("cannot create"), "{}", again.stderr);
    assert_eq!(std::fs::read(&file).unwrap(), b"an archive");
    // What broke off is no file.
    let other = case.path("cut.vm");
    let cut = case.run(&["vm", "snapshot", "export", "ardesio/web@cut", other.to_str().unwrap()]).await;
    assert!(cut.code == 1 && cut.stderr.contains("the disk is gone"), "{}", cut.stderr);
    assert!(!other.exists());
    let piped = case.run(&["vm", "snapshot", "export", "ardesio/web@before", "-"]).await;
    assert_eq!((piped.code, piped.stdout.as_str()), (0, "an archive"));

    let import = ["vm", "snapshot", "import", path, "--vdc", "hall", "--name", "web2"];
    let imported = case.run(&import).await;
    assert_eq!(imported.code, 0, "{}", imported.stderr);
    assert!(imported.stdout.contains("serio vm restore hall/web2 before"), "{}", imported.stdout);
    let import = ["vm", "snapshot", "import", "-", "--vdc", "hall", "--name", "web2"];
    assert_eq!(case.run_with(&import, "an archive", &[]).await.code, 0);
    let broken = case.run_with(&import, "an arch", &[]).await;
    assert!(broken.code == 2 && broken.stderr.contains("broke off"), "{} {}", broken.code, broken.stderr);
    assert_eq!(case.run(&["vm", "snapshot", "import", "/nonexistent/web.vm"]).await.code, 1);
}
