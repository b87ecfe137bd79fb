//! A vdc whose volumes are encrypted: its guest notices nothing, its bytes are nowhere, and without its key it is gone.

use std::{fs, process::Command};

use serio_tests::{
    bed::{on_host, run},
    guest::Console,
    volumes::{copy, folder},
};

const MARK: &str = "the-burgomasters-secret-recipe";

#[test]
fn what_an_encrypted_vdc_wrote_is_gone_with_its_key() {
    on_host("e2e", &[], |host| {
        let vdc = host.vdc_with("secret", &["--encrypted"]);
        let vm = vdc.run_tiny("safe", &["--disk-size", "96MiB"]);
        let root = vdc.at("safe-root");
        vdc.wait_ready(&vm);
        let mut console = Console::open(host, &vm);
        let line =
            format!("for i in $(seq 2000); do echo {MARK} $i; done > /data/note; sync; echo done-$((40+2))");
        console.ask(&line, "\ndone-42");
        host.serio(&["volume", "snapshot", &root, "--name", "one"]).ok();

        // Not in any file of the volume, though whoever may export it reads it.
        // Without the zeros: grep takes a hole for one very long line.
        let look = format!(
            "sync; for f in {}/*; do tr -d '\\000' <$f | grep -q {MARK} && echo $f; done; true",
            folder(host, &root)
        );
        let found = host.shell(&look).ok();
        assert_eq!(found.trim(), "", "plain bytes lie on the host's disk");
        let bytes = copy(host, &[&root, "--snapshot", "one"]);
        assert!(
            bytes.windows(MARK.len()).any(|window| window == MARK.as_bytes()),
            "the export is not decrypted"
        );

        // The wrapping key changes under the running VM; a restart opens the disk with it.
        host.serio(&["vdc", "rotate-key", &vdc.name]).ok();
        assert!(console.ask("echo last-$(tail -n 1 /data/note)", "\nlast-").contains(MARK));
        host.serio(&["vm", "stop", &vm, "--force"]).ok();
        host.kill_seriod();
        host.start_seriod();
        let again = copy(host, &[&root]);
        let image = tempfile::NamedTempFile::new().expect("a file can be made");
        fs::write(&image, again).expect("a file can be written");
        let path = image.path().to_str().expect("the path is text");
        let checked = run(Command::new("e2fsck").args(["-fp", path]));
        assert!(checked.code < 4, "{checked}");

        host.serio(&["vdc", "erase", &vdc.name]).refused(2, &["yes"]);
        let receipt = host.serio(&["vdc", "erase", &vdc.name, "--yes"]).ok();
        println!("{receipt}");
        assert_ne!(host.serio(&["vm", "start", &vm]).code, 0, "an erased vdc starts");
        assert_ne!(host.serio(&["volume", "export", &root]).code, 0, "an erased vdc is exported");
    });
}
