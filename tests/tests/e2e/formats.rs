//! Images as other programs write them.

use std::{fs, process::Command};

use serio_tests::{
    bed::{image, on_host, run},
    guest::Console,
    volumes::copy,
};

#[test]
fn images_of_other_formats_have_the_same_bytes_and_boot() {
    on_host("e2e", &[], |host| {
        let vdc = host.vdc("formats");
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name).to_str().expect("the path is text").to_owned();
        let (raw, kernel, initrd) = (image("tiny/tiny.raw"), image("tiny/vmlinuz"), image("tiny/initrd.img"));
        let original = fs::read(&raw).unwrap();
        for format in ["qcow2", "vmdk"] {
            let (name, file) = (format!("tiny-{format}"), at(format));
            run(Command::new("qemu-img").args(["convert", "-f", "raw", "-O", format, &raw, &file])).ok();
            let import = [
                "image", "import", &name, "--disk", &file, "--format", format, "--kernel", &kernel,
                "--initrd", &initrd,
            ];
            host.serio(&[&import[..], &["--cmdline", "console=ttyS0 quiet"]].concat()).ok();
            let volume = vdc.at(format);
            host.serio(&["volume", "create", &volume, "--image", &name]).ok();
            assert!(copy(host, &[&volume]) == original, "{format}: the bytes differ");
        }
        let vm = vdc.at("web");
        host.serio(&["vm", "run", &vm, "--image", "tiny-qcow2", "--memory", "192MiB"]).ok();
        vdc.wait_ready(&vm);
        let mut console = Console::open(host, &vm);
        assert_eq!(
            console.ask("echo mounts-$(grep -c '/dev/vda /data ext4' /proc/mounts)", "\nmounts-"),
            "1"
        );

        // Half a file, and one that says that it is something else: refused, and nothing is left.
        let half = at("half");
        let bytes = fs::read(at("qcow2")).unwrap();
        fs::write(&half, &bytes[..bytes.len() / 2]).unwrap();
        for (file, format) in [(&half, "qcow2"), (&at("qcow2"), "vmdk")] {
            let refused = host.serio(&["image", "import", "bad", "--disk", file, "--format", format]);
            assert!(matches!(refused.code, 1 | 2), "{refused}");
            host.serio(&["image", "show", "bad"]).refused(3, &["bad"]);
        }
    });
}
