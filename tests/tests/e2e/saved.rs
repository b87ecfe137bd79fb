//! A whole VM is saved while fio writes and verifies, and goes on: itself, as a clone beside it, in its place again, and on another
//! host.

use serio_tests::{
    bed::{Host, Vdc, on_host, testbed},
    guest::{Console, fio, import_storm},
};

/// fio on half of the second data disk, so slow that all of the case happens under it; then its exit code.
const WORK: &str = "(half 7 0 --do_verify=1 --verify_fatal=1 --loops=2 --rate_iops=60 >/tmp/v 2>&1; \
                    printf '\\nfio-ended=%d\\n' $?) &";

/// A VM with two volumes in which fio writes and verifies.
fn verifies(host: &Host, vdc: &Vdc<'_>) -> (String, Console) {
    let vm = vdc.at("web");
    let mut create = vec!["vm", "run", &vm, "--image", "storm", "--memory", "192MiB", "--restart", "never"];
    let volumes = [vdc.at("one"), vdc.at("two")];
    for volume in &volumes {
        host.serio(&["volume", "create", volume, "--size", "4MiB"]).ok();
        create.extend(["--volume", volume]);
    }
    host.serio(&create).ok();
    let mut console = Console::open(host, &vm);
    host.wait_for_shell(&vm);
    console.ask("echo kept > /tmp/note; echo typed-$((40+2))", "\ntyped-42");
    console.line(WORK);
    console.ask(
        "while [ \"$(awk '{print $7}' /sys/block/vdc/stat)\" = 0 ]; do sleep 0.1; done; echo runs-$((40+3))",
        "\nruns-43",
    );
    (vm, console)
}

/// fio has found each byte as it wrote it.
fn ended(console: &Console) {
    let whole = |text: &str| text.split_once("\nfio-ended=").is_some_and(|(_, rest)| rest.contains('\n'));
    console.wait(180, "fio ends", whole);
    assert!(console.text().contains("\nfio-ended=0\n"), "{}", console.text());
}

/// The rest of the writing, and all of the verifying, happens on another host: its disks came along, byte by byte, as its memory did.
#[test]
fn a_vm_saved_under_a_verifier_goes_on_on_another_host() {
    if !fio() {
        println!("skipped: fio is not made (images/fio/build)");
        return;
    }
    on_host("e2e", &[], |here| {
        on_host("there", &[], |there| {
            import_storm(here);
            import_storm(there);
            let folder = tempfile::tempdir().expect("a directory");
            let file = folder.path().join("web.vm");
            let file = file.to_str().expect("text");
            let (from, to) = (here.vdc("leaves"), there.vdc("arrives"));
            let (vm, console) = verifies(here, &from);
            here.serio(&["vm", "snapshot", &vm, "--name", "live"]).ok();
            here.serio(&["vm", "snapshot", "export", &format!("{vm}@live"), file]).ok();
            there.serio(&["vm", "snapshot", "import", file, "--vdc", &to.name]).ok();
            let moved = to.at("web");
            assert_eq!(there.state(&moved), "STOPPED");
            there.serio(&["vm", "restore", &moved, "live"]).ok();
            let mut second = Console::open(there, &moved);
            assert_eq!(second.ask("echo note-$(cat /tmp/note)", "\nnote-"), "kept");
            ended(&second);
            ended(&console);
        });
    });
    testbed(&["down", "there"]).ok();
}

#[test]
fn a_vm_saved_under_a_verifier_goes_on_and_so_does_its_clone() {
    if !fio() {
        println!("skipped: fio is not made (images/fio/build)");
        return;
    }
    on_host("e2e", &[], |host| {
        import_storm(host);
        let vdc = host.vdc("saved");
        let clone = vdc.at("web-again");
        let (vm, console) = verifies(host, &vdc);

        host.serio(&["vm", "pause", &vm]).ok();
        assert_eq!(host.state(&vm), "PAUSED");
        host.serio(&["vm", "resume", &vm]).ok();
        host.serio(&["vm", "snapshot", &vm, "--name", "live"]).ok();
        host.serio(&["vm", "restore", &vm, "live", "--as", "web-again"]).ok();
        let mut second = Console::open(host, &clone);
        // Its memory is that of the first, its disks are its own: both verify what each has written.
        assert_eq!(second.ask("echo note-$(cat /tmp/note)", "\nnote-"), "kept");
        ended(&second);
        ended(&console);

        host.serio(&["vm", "restore", &vm, "live"]).refused(4, &["stop"]);
        host.serio(&["vm", "stop", &vm, "--force"]).ok();
        // Two hours later, as far as the host knows: the guest that goes on knows it too, at once.
        let set = |by: i64| host.shell(&format!("date -s @$(( $(date +%s) + {by} ))"));
        set(7200).ok();
        host.serio(&["vm", "restore", &vm, "live"]).ok();
        let mut third = Console::open(host, &vm);
        let time = |text: &str| text.trim().parse::<i64>().expect("seconds since 1970");
        let theirs = time(&third.ask("echo time-$(date +%s)", "\ntime-"));
        let ours = time(&host.shell("date +%s").ok());
        // The next case finds the host as it was.
        set(-7200).ok();
        assert!((0..60).contains(&(ours - theirs)), "the guest's clock shows {theirs}, the host's {ours}");
        assert_eq!(third.ask("echo note-$(cat /tmp/note)", "\nnote-"), "kept");
        ended(&third);
        host.serio(&["vm", "stop", &clone, "--force"]).ok();
        host.serio(&["vm", "delete-snapshot", &vm, "live"]).ok();
    });
}
