//! Guests that carry a test's own programs, and their consoles as a test reads and types them.
//!
//! Owns: the image `storm` (tiny's kernel and initrd, with `storm` and `fio` in a second archive behind it: an initrd may have
//! several), the life of a `serio vm console` process.
//! Threads: one a console, which reads until the process ends.

use std::{
    fs,
    io::{Read, Write},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Child, ChildStdin, Command, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use crate::bed::{Host, binary, image, run};

/// Whether the guests of the image `storm` have fio; without it `images/fio/build` was not run, or could not.
#[must_use]
pub fn fio() -> bool {
    Path::new(&image("fio/fio")).exists()
}

/// `half SEED 0|1 OPTION…`: fio on one half of the second data disk. Short, because lines are typed at a slow serial port.
const HALF: &str = "#!/bin/sh
seed=$1 half=$2
shift 2
size=$(($(cat /sys/block/vdc/size) * 256))
exec fio --name=half --filename=/dev/vdc --offset=$((half * size)) --size=$size --rw=randwrite --bs=4k --direct=1 \\
	--ioengine=psync --verify=crc32c --randseed=$seed \"$@\"
";

/// Brings the image `storm` to the node, once.
#[track_caller]
pub fn import_storm(host: &Host) {
    if host.serio(&["image", "show", "storm"]).code == 0 {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder can be made");
    let programs = folder.path().join("tree/bin");
    fs::create_dir_all(&programs).expect("a folder can be made");
    run(Command::new("strip").arg("-o").arg(programs.join("storm")).arg(binary("storm"))).ok();
    if fio() {
        fs::copy(image("fio/fio"), programs.join("fio")).expect("fio can be copied");
        let half = programs.join("half");
        fs::write(&half, HALF).expect("a file can be written");
        fs::set_permissions(half, fs::Permissions::from_mode(0o755)).expect("a file can be made a program");
    }
    let initrd = folder.path().join("initrd.img");
    let script = "cp \"$1\" \"$2\" && cd \"$3\" && find . | cpio --quiet -R 0:0 -o -H newc >>\"$2\"";
    let (tiny, tree) = (image("tiny/initrd.img"), folder.path().join("tree"));
    run(Command::new("sh").args(["-ec", script, "sh", &tiny]).arg(&initrd).arg(tree)).ok();
    let (disk, kernel) = (folder.path().join("disk"), image("tiny/vmlinuz"));
    fs::write(&disk, vec![0; 1 << 20]).expect("a file can be written");
    let mut import = host.command("serio");
    import.args(["image", "import", "storm", "--format", "raw", "--cmdline", "console=ttyS0 quiet"]);
    run(import.args(["--kernel", &kernel, "--initrd"]).arg(&initrd).arg("--disk").arg(&disk)).ok();
}

/// A console that is read from now on.
pub struct Console {
    process: Child,
    stdin: ChildStdin,
    text: Arc<Mutex<String>>,
}

impl Console {
    /// Attaches to a running VM; what was printed before is not seen.
    #[track_caller]
    pub fn open(host: &Host, vm: &str) -> Self {
        let mut command = host.command("serio");
        command.args(["vm", "console", vm, "--history", "0B", "--timeout", "1h"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut process = command.spawn().expect("serio starts");
        let stdin = process.stdin.take().expect("it is piped");
        let mut stdout = process.stdout.take().expect("it is piped");
        let text = Arc::new(Mutex::new(String::new()));
        let to = Arc::clone(&text);
        thread::spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(length @ 1..) = stdout.read(&mut chunk) {
                let piece = String::from_utf8_lossy(&chunk[..length]).replace('\r', "");
                to.lock().expect("no holder of this lock panics").push_str(&piece);
            }
        });
        Self { process, stdin, text }
    }

    /// Types a line.
    #[track_caller]
    pub fn line(&mut self, line: &str) {
        self.stdin.write_all(format!("{line}\n").as_bytes()).expect("the console process reads");
    }

    /// Types a line and returns the rest of the line that begins with `answer` in what comes then.
    #[track_caller]
    pub fn ask(&mut self, line: &str, answer: &str) -> String {
        let before = self.text().len();
        self.line(line);
        let rest = |text: &str| {
            let (_, rest) = text.get(before..)?.split_once(answer)?;
            Some(rest.split_once('\n')?.0.to_owned())
        };
        self.wait(120, answer.trim(), |text| rest(text).is_some());
        rest(&self.text()).expect("it was there just now")
    }

    /// What came so far.
    #[must_use]
    pub fn text(&self) -> String {
        self.text.lock().expect("no holder of this lock panics").clone()
    }

    /// Waits until what came satisfies `so`; panics with its end when it does not in time.
    #[track_caller]
    pub fn wait(&self, seconds: u64, what: &str, so: impl Fn(&str) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(seconds);
        while !so(&self.text()) {
            let text = self.text();
            let end: Vec<&str> = text.lines().rev().take(30).collect();
            let end: Vec<&str> = end.into_iter().rev().collect();
            assert!(
                Instant::now() < deadline,
                "{what}: not within {seconds} s; the console ends:\n{}",
                end.join("\n")
            );
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Ends it; what it has read.
    #[must_use]
    pub fn close(mut self) -> String {
        let _ = self.process.kill();
        let _ = self.process.wait();
        self.text()
    }
}
