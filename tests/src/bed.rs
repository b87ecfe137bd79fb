//! Testbed hosts for tests: boot one, talk to its `seriod` with the CLI from outside, run commands in it.
//!
//! Owns: the calls of `scripts/testbed`, what a test may ask of them, the retry of a case whose *host* died by itself (a kernel
//! under software emulation sometimes does; that says nothing about Serio and is reported as what it is).
//! Never: talks to a service except through the binary `serio`, as a user would.
//!
//! A host stays up after a test, so that the next one starts at once; `scripts/testbed down` ends it. Each case begins on an
//! empty node and works in a vdc of its own, so no case depends on another; they run one at a time (.config/nextest.toml).

use std::{
    env, fmt,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    path::PathBuf,
    process::{Command, Output, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use serde_json::Value;

/// The root of the repository.
#[must_use]
pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the workspace").to_owned()
}

/// The target folder that cargo uses.
#[must_use]
pub fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// A freshly built binary of the profile under test.
#[must_use]
pub fn binary(name: &str) -> PathBuf {
    let profile = env::var("SERIO_PROFILE").unwrap_or_else(|_| "dev".to_owned());
    let folder = if profile == "dev" { "debug" } else { &profile };
    target().join("x86_64-unknown-linux-gnu").join(folder).join(name)
}

/// A file of a made image, as `tiny/vmlinuz`.
#[must_use]
pub fn image(path: &str) -> String {
    target().join("images").join(path).to_str().expect("the path is text").to_owned()
}

/// Whether the slow cases were asked for (`scripts/test --long`).
#[must_use]
pub fn long() -> bool {
    env::var("SERIO_TEST_LONG").is_ok_and(|value| !value.is_empty())
}

/// What a command did.
pub struct Done {
    /// The command, for messages.
    pub what: String,
    /// Its exit code; 128 and more for a signal.
    pub code: i32,
    /// Its output.
    pub out: String,
    /// Its error output.
    pub err: String,
}

impl Done {
    fn new(what: String, output: Output) -> Self {
        use std::os::unix::process::ExitStatusExt;
        let code = output.status.code().unwrap_or_else(|| 128 + output.status.signal().unwrap_or(0));
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).replace('\r', "");
        Self { what, code, out: text(output.stdout), err: text(output.stderr) }
    }

    /// Its output, if it succeeded.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, 0, "{self}");
        self.out
    }

    /// Its error output, if it ended with that exit code and its message has all these words.
    #[track_caller]
    pub fn refused(self, code: i32, words: &[&str]) -> String {
        assert_eq!(self.code, code, "{self}");
        let said = self.err.to_lowercase();
        for word in words {
            assert!(said.contains(&word.to_lowercase()), "the message should speak of {word:?}\n{self}");
        }
        self.err
    }
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}\nexit code {}\n--- output\n{}\n--- errors\n{}",
            self.what, self.code, self.out, self.err
        )
    }
}

/// Runs a command to its end, with nothing on its standard input.
#[track_caller]
pub fn run(command: &mut Command) -> Done {
    let what = format!("{command:?}");
    let output =
        command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("cannot run {what}: {error}"));
    Done::new(what, output)
}

/// `scripts/testbed` with these arguments.
#[track_caller]
pub fn testbed(args: &[&str]) -> Done {
    run(Command::new(root().join("scripts/testbed")).args(args))
}

/// Waits until it is so; panics with what was waited for when it does not come in time.
#[track_caller]
pub fn eventually(seconds: u64, what: &str, mut so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(seconds);
    while !so() {
        assert!(Instant::now() < deadline, "{what}: not within {seconds} s");
        // What is waited for needs the processor too, the more of it the longer it may take.
        std::thread::sleep(Duration::from_millis(100 + seconds));
    }
}

/// A running testbed host.
pub struct Host {
    /// Its name.
    pub name: String,
    environment: Vec<(String, String)>,
}

impl Host {
    /// Boots it if it does not run; `options` are those of `testbed up`.
    #[track_caller]
    pub fn up(name: &str, options: &[&str]) -> Self {
        let mut args = vec!["up", name, "--no-build"];
        args.extend_from_slice(options);
        testbed(&args).ok();
        let environment = testbed(&["env", name]).ok();
        let environment = environment
            .lines()
            .filter_map(|line| line.strip_prefix("export ")?.split_once('='))
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect();
        Self { name: name.to_owned(), environment }
    }

    /// The `serio` command, with the connection set; what the caller adds wins.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let path = binary(program);
        let mut command = Command::new(if path.exists() { path } else { program.into() });
        command.envs(self.environment.iter().map(|(key, value)| (key, value)));
        command
    }

    /// A variable of its environment file.
    #[must_use]
    pub fn variable(&self, name: &str) -> &str {
        self.environment.iter().find(|(key, _)| key == name).map_or("", |(_, value)| value)
    }

    /// `serio` from outside.
    #[track_caller]
    pub fn serio(&self, args: &[&str]) -> Done {
        run(self.command("serio").args(args))
    }

    /// `serio … -o json` from outside.
    #[track_caller]
    pub fn json(&self, args: &[&str]) -> Value {
        let text = self.serio(&[args, &["-o", "json"]].concat()).ok();
        serde_json::from_str(&text)
            .unwrap_or_else(|error| panic!("serio {args:?} printed no JSON: {error}\n{text}"))
    }

    /// A command in the host.
    #[track_caller]
    pub fn exec(&self, command: &[&str]) -> Done {
        testbed(&[&["exec", &self.name, "--"], command].concat())
    }

    /// A shell script in the host.
    #[track_caller]
    pub fn shell(&self, script: &str) -> Done {
        self.exec(&["sh", "-c", script])
    }

    /// Kills `seriod` and returns when it is gone.
    pub fn kill_seriod(&self) {
        self.exec(&["service", "seriod", "kill"]).ok();
    }

    /// Starts `seriod` and returns when it answers.
    pub fn start_seriod(&self) {
        self.exec(&["service", "seriod", "start"]).ok();
        eventually(60, "seriod answers", || self.serio(&["node", "show"]).code == 0);
    }

    /// Brings the image `tiny` to the node, once.
    pub fn import_tiny(&self) {
        if self.serio(&["image", "show", "tiny"]).code == 0 {
            return;
        }
        let (disk, kernel, initrd) =
            (image("tiny/tiny.raw"), image("tiny/vmlinuz"), image("tiny/initrd.img"));
        self.serio(&[
            "image",
            "import",
            "tiny",
            "--disk",
            &disk,
            "--format",
            "raw",
            "--kernel",
            &kernel,
            "--initrd",
            &initrd,
            "--cmdline",
            "console=ttyS0 quiet",
        ])
        .ok();
    }

    /// Brings the disk of the image `debian` to the node as `name`, once; further options as typed.
    pub fn import_debian(&self, name: &str, options: &[&str]) {
        if self.serio(&["image", "show", name]).code == 0 {
            return;
        }
        let disk = image("debian/debian.qcow2");
        self.serio(&[&["image", "import", name, "--disk", &disk, "--format", "qcow2"], options].concat())
            .ok();
    }

    /// Deletes what an earlier case left that was ended in its middle.
    pub fn clear(&self) {
        let exports = self.json(&["volume", "exports"]);
        for name in exports.as_array().into_iter().flatten().filter_map(|export| export["name"].as_str()) {
            self.serio(&["volume", "unexport", name]).ok();
        }
        let listed = self.json(&["vdc", "list"]);
        for name in listed.as_array().into_iter().flatten().filter_map(|vdc| vdc["name"].as_str()) {
            let name = name.trim_start_matches("vdcs/").to_owned();
            drop(Vdc { host: self, name });
        }
    }

    /// The state of a VM as the API spells it, without `VM_STATE_`.
    #[track_caller]
    pub fn state(&self, vm: &str) -> String {
        let vm = self.json(&["vm", "show", vm]);
        vm["status"]["state"].as_str().unwrap_or("none").trim_start_matches("VM_STATE_").to_owned()
    }

    /// The process of a VM.
    #[track_caller]
    pub fn pid(&self, vm: &str) -> u64 {
        self.json(&["vm", "show", vm])["status"]["pid"].as_u64().unwrap_or(0)
    }

    /// Types a line on a VM's console and waits for the output to match.
    #[track_caller]
    pub fn type_line(&self, vm: &str, line: &str, until: &str) -> String {
        let line = format!("{line}\\n");
        let args =
            ["vm", "console", vm, "--history", "0B", "--send", &line, "--until", until, "--timeout", "60s"];
        self.serio(&args).ok()
    }

    /// Waits for the prompt of the guest `tiny`: what is typed before its shell reads is lost.
    #[track_caller]
    pub fn wait_for_shell(&self, vm: &str) {
        let until = ["--until", "tiny: ready", "--until", "tiny# "];
        self.serio(&[&["vm", "console", vm], &until[..], &["--timeout", "180s"]].concat()).ok();
    }

    /// Waits for each of `untils` (regular expressions), one after the other, on the console of a guest that boots for minutes; what was
    /// printed. A kernel that dies on the way ends the attempt: [`on_debian_host`].
    #[track_caller]
    pub fn wait_for_guest(&self, vm: &str, untils: &[&str]) -> String {
        let mut args = ["vm", "console", vm, "--timeout", "3600s"].map(str::to_owned).to_vec();
        // A kernel says twice that it dies, and nobody waits for three things.
        assert!(untils.len() <= 2, "{untils:?}");
        for until in untils {
            args.extend(["--until".to_owned(), format!("{until}|{GUEST_DEATH}")]);
        }
        let said = self.serio(&args.iter().map(String::as_str).collect::<Vec<_>>()).ok();
        if said.contains(GUEST_DEATH) {
            std::panic::panic_any(GuestDied(self.serio(&["vm", "log", vm]).out));
        }
        said
    }

    /// A vdc for one case, with room for what cases do.
    #[track_caller]
    pub fn vdc(&self, label: &str) -> Vdc<'_> {
        self.vdc_with(label, &[])
    }

    /// The same, with further options as typed.
    #[track_caller]
    pub fn vdc_with(&self, label: &str, options: &[&str]) -> Vdc<'_> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("{label}-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let create = ["vdc", "create", &name, "--vcpus", "8", "--memory", "2GiB", "--storage", "20GiB"];
        self.serio(&[&create[..], options].concat()).ok();
        Vdc { host: self, name }
    }
}

/// A vdc that is deleted, with all that is in it, when the case ends.
pub struct Vdc<'a> {
    host: &'a Host,
    /// Its name.
    pub name: String,
}

impl Vdc<'_> {
    /// The name of something in it.
    #[must_use]
    pub fn at(&self, name: &str) -> String {
        format!("{}/{name}", self.name)
    }

    /// Runs a VM from `tiny`; further options as typed. Returns its name.
    #[track_caller]
    pub fn run_tiny(&self, name: &str, options: &[&str]) -> String {
        let vm = self.at(name);
        let mut args = vec!["vm", "run", &vm, "--image", "tiny", "--memory", "192MiB"];
        args.extend_from_slice(options);
        self.host.serio(&args).ok();
        vm
    }

    /// Waits for the guest's shell.
    #[track_caller]
    pub fn wait_ready(&self, vm: &str) {
        self.host.wait_for_shell(vm);
    }

    fn names(&self, noun: &str) -> Vec<String> {
        let listed = self.host.serio(&[noun, "list", &self.name, "-o", "json"]);
        let list: Vec<Value> = serde_json::from_str(&listed.out).unwrap_or_default();
        let last = |item: &Value| item["name"].as_str().and_then(|n| n.rsplit('/').next().map(str::to_owned));
        list.iter().filter_map(last).collect()
    }
}

impl Drop for Vdc<'_> {
    fn drop(&mut self) {
        // Best effort: a case that failed must not take the room of the next one.
        for vm in self.names("vm") {
            self.host.serio(&["vm", "delete", &self.at(&vm), "--force"]);
        }
        for volume in self.names("volume") {
            self.host.serio(&["volume", "delete", &self.at(&volume)]);
        }
        let done = self.host.serio(&["vdc", "delete", &self.name]);
        if done.code != 0 && !std::thread::panicking() {
            panic!("something was left behind in the vdc: {done}");
        }
    }
}

/// Why there can be no testbed here.
#[must_use]
pub fn missing() -> Option<&'static str> {
    let path = env::var_os("PATH").unwrap_or_default();
    if !env::split_paths(&path).any(|folder| folder.join("qemu-system-x86_64").exists()) {
        return Some("qemu-system-x86_64 is not installed");
    }
    if !target().join("images/tiny/initrd.img").exists() {
        return Some("the image tiny is not made: images/tiny/build");
    }
    None
}

const GUEST_DEATH: &str = "Kernel panic - not syncing";
/// With the console's text.
struct GuestDied(String);

/// Runs a slow case on the host of the Debian guests, if it was asked for and their image is made.
///
/// Under an emulated SVM a guest's kernel was seen to die minutes into its boot, of an interrupt that came again in an entry that masks
/// them; whose fault that is, is not proved. An attempt that ends so says all that the kernel did, and is made again, three times at most.
pub fn on_debian_host(case: impl Fn(&Host)) {
    if !long() {
        println!("skipped: a Debian guest boots for minutes: scripts/test --long");
    } else if !PathBuf::from(image("debian/debian.qcow2")).exists() {
        println!("skipped: the image debian is not made: images/debian/build");
    } else {
        on_host("debian", &["--memory", "4096"], |host| {
            for left in (0..3).rev() {
                let Err(panic) = catch_unwind(AssertUnwindSafe(|| case(host))) else { return };
                let Some(GuestDied(text)) = panic.downcast_ref() else { resume_unwind(panic) };
                println!("the guest's kernel died; {left} attempts are left:\n{text}");
                assert!(left > 0, "it died each time");
            }
        });
    }
}

/// Runs a case on a host. When the case fails because the host's kernel died by itself, says so and tries once more.
pub fn on_host(name: &str, options: &[&str], case: impl Fn(&Host)) {
    if let Some(why) = missing() {
        println!("skipped: {why}");
        return;
    }
    let attempt = || {
        catch_unwind(AssertUnwindSafe(|| {
            let host = Host::up(name, options);
            host.clear();
            host.import_tiny();
            case(&host);
        }))
    };
    if let Err(panic) = attempt() {
        let health = testbed(&["health", name]);
        if health.code != 3 {
            let log = testbed(&["log", name, "seriod"]).out;
            let tail: Vec<&str> = log.lines().rev().take(40).collect();
            eprintln!("--- the end of the log of seriod on {name}");
            tail.iter().rev().for_each(|line| eprintln!("{line}"));
            resume_unwind(panic);
        }
        println!(
            "the testbed host died by itself, which is no failure of Serio: {}; once more",
            health.out.trim()
        );
        testbed(&["kill", name]).ok();
        if let Err(panic) = attempt() {
            resume_unwind(panic);
        }
    }
}
