//! The Python client that `scripts/api python` makes, against a real seriod with a real VMM and the mini guest: its example
//! makes a vdc and a VM, is refused what is too much, watches the events, reads the capacity and cleans up.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use common::{Seriod, import_image, mini_guest};

/// Where the client is installed; `Err` says what makes it.
fn python() -> Result<PathBuf, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let python = target.join("api/python/bin/python");
    if python.exists() {
        Ok(python)
    } else {
        Err("the Python client is not made: scripts/api python".to_owned())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_example_makes_a_vm_and_watches_it() {
    let mut seriod = Seriod::new("");
    let ready = python().and_then(|python| Ok((python, mini_guest()?)));
    let (python, kernel) = match ready.and_then(|ready| seriod.with_programs().map(|()| ready)) {
        Ok(ready) => ready,
        Err(why) => {
            eprintln!("skipped: {why}");
            return;
        }
    };
    seriod.start();
    import_image(seriod.connect().await.unwrap(), "mini", "mini.test=heartbeat", &kernel, &[0; 1 << 20])
        .await;
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../clients/python/examples/first_vm.py");
    let socket = seriod.dir.path().join("run/seriod.sock");
    let mut command = Command::new(python);
    command.arg(example).args(["--image", "mini", "--memory", "32", "--target"]).arg(socket);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    for line in [
        "made vdcs/first\n",
        "made vdcs/first/vms/vm VM_STATE_RUNNING\n",
        "the node has promised 32 MiB\n",
        "refused as it should be: RESOURCE_EXHAUSTED: ",
        "vdcs/first/vms/vm deleted: ",
        "deleted vdcs/first\n",
    ] {
        assert!(said.contains(line), "no {line:?} in:\n{said}");
    }
    assert!(seriod.vmms().is_empty(), "a VMM was left");
}
