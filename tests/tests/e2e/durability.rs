//! Nothing flushed is lost: the VMM is killed under its guest, and the power of the whole host is cut, again and again.
//!
//! The guest has two disks. `storm` writes the first one from four threads, with zeroes, FUA and flushes, until it dies; what it printed
//! as safe must be on the disk afterwards, and every other sector is old or new, judged by `serio_tests::storm`. On the second one fio
//! writes one half with checksums and flushes, then writes on in the other half until it dies with the machine; after the next start
//! fio itself verifies the flushed half. Snapshots are taken under way, so that the maps are at stake as well as the data.
//!
//! Kills of the VMM leave the host's page cache: what they test is the order of data and maps, locks, and reopening. A killed
//! host loses its page cache too; what it had synced is in the disk's file of the emulator.

use std::{thread, time::Duration};

use serio_tests::{
    bed::{Host, eventually, long, on_host, testbed},
    guest::{Console, fio, import_storm},
    storm::{Log, Model, SECTOR},
    volumes::{copy, folder},
};

const DISK_BYTES: u64 = 8 << 20;
const FIO_BYTES: u64 = 4 << 20;
/// Flushes of the storm before a snapshot, and after it before the blow may fall.
const FLUSHES: usize = 6;

/// How a round ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Blow {
    /// `kill -9` of the VMM.
    Vmm,
    /// The host's QEMU is killed.
    Power,
}

/// Writes or verifies one half of the second disk: what was written in a round is verified with its number.
fn fio_line(round: u64, half: u64, options: &str) -> String {
    format!("half {} {half} {options}", round + 1)
}

struct Case {
    vm: String,
    data: String,
    volumes: Vec<String>,
    model: Model,
}

impl Case {
    fn new(host: &Host) -> Self {
        import_storm(host);
        let vdc = "durable";
        host.serio(&["vdc", "create", vdc, "--vcpus", "2", "--memory", "1GiB", "--storage", "4GiB"]).ok();
        let at = |name: &str| format!("{vdc}/{name}");
        let (vm, data, second) = (at("storm"), at("data"), at("fio"));
        for (volume, bytes) in [(&data, DISK_BYTES), (&second, FIO_BYTES)] {
            host.serio(&["volume", "create", volume, "--size", &format!("{}MiB", bytes >> 20)]).ok();
        }
        let create = ["vm", "create", &vm, "--image", "storm", "--memory", "192MiB", "--restart", "never"];
        host.serio(&[&create[..], &["--volume", &data, "--volume", &second]].concat()).ok();
        let volumes = vec![data.clone(), second];
        Self { vm, data, volumes, model: Model::new(DISK_BYTES / SECTOR as u64) }
    }

    /// fio verifies what it flushed a round ago, and flushes more.
    fn fio(&self, console: &mut Console, round: u64) {
        if !fio() {
            return;
        }
        if let Some(before) = round.checked_sub(1) {
            let verify =
                fio_line(before, before % 2, "--verify_only --verify_fatal=1 >/tmp/v 2>&1; echo verified=$?");
            if console.ask(&verify, "\nverified=") != "0" {
                console.ask("cat /tmp/v; echo end-$((1+1))", "\nend-2");
                panic!("round {round}: fio finds damage\n{}", console.text());
            }
        }
        let write =
            fio_line(round, round % 2, "--do_verify=0 --fsync=64 --end_fsync=1 >/tmp/w 2>&1; echo wrote=$?");
        assert_eq!(console.ask(&write, "\nwrote="), "0", "{}", console.text());
        let on =
            fio_line(round + 1000, (round + 1) % 2, "--do_verify=0 --rate_iops=50 --time_based --runtime=1h");
        console.line(&format!("{on} >/dev/null 2>&1 &"));
    }

    /// One round: start, verify, write, a snapshot under way, the blow.
    fn round(&mut self, host: &Host, round: u64, blow: Blow) {
        host.serio(&["vm", "start", &self.vm]).ok();
        let mut console = Console::open(host, &self.vm);
        console.wait(180, "the guest's prompt", |text| {
            text.split_once("tiny: ready").is_some_and(|(_, since)| since.contains("tiny# "))
        });
        self.fio(&mut console, round);
        console.line(&format!("storm /dev/vdb {round}"));
        let flushes = |text: &str| Log::new(round, text).flushes;
        console.wait(120, "the storm says what is safe", |text| flushes(text) >= FLUSHES);
        host.serio(&["volume", "snapshot", &self.data, "--name", &format!("r{round}")]).ok();
        let before = flushes(&console.text());
        console.wait(120, "the storm goes on after a snapshot", |text| flushes(text) >= before + FLUSHES);
        // Not a wait for something: the moment of the blow itself, another one each round.
        thread::sleep(Duration::from_millis(round * 377 % 1000));
        match blow {
            Blow::Vmm => {
                host.exec(&["kill", "-9", &host.pid(&self.vm).to_string()]).ok();
                eventually(30, "the death is recorded", || host.state(&self.vm) == "FAILED");
            }
            Blow::Power => testbed(&["kill", &host.name]).ok().truncate(0),
        }
        let log = Log::new(round, &console.close());
        println!(
            "round {round}, {blow:?}: {} flushes, steps {:?} and {} more are safe",
            log.flushes,
            log.safe,
            log.durable.len()
        );
        self.model.ran(&log);
    }

    /// What the disks hold afterwards, and whether the volumes are sound.
    fn judge(&mut self, host: &Host, round: u64, blow: Blow) {
        eventually(60, "the VM is known to have ended", || {
            matches!(host.state(&self.vm).as_str(), "FAILED" | "STOPPED")
        });
        for volume in &self.volumes {
            let check = host.exec(&["serio-volumed", "check", &folder(host, volume)]);
            assert_eq!(check.code, 0, "round {round}, after {blow:?}: {check}");
        }
        match self.model.judge(&copy(host, &[&self.data]), blow == Blow::Power) {
            Ok(stamped) => println!("round {round}: {stamped} sectors are stamped, none is wrong"),
            Err(wrong) => panic!("round {round}, after {blow:?}: {wrong}"),
        }
    }
}

#[test]
fn nothing_flushed_is_lost() {
    let blows: Vec<Blow> = if long() {
        [[Blow::Vmm; 25], [Blow::Power; 25]].concat()
    } else {
        vec![Blow::Vmm, Blow::Power, Blow::Power]
    };
    if !fio() {
        println!("fio is not made (images/fio/build): only the storm writes");
    }
    on_host("e2e", &[], |host| {
        let mut case = Case::new(host);
        let mut again;
        let mut host = host;
        for (round, blow) in (0..).zip(&blows) {
            case.round(host, round, *blow);
            if *blow == Blow::Power {
                again = Host::up(&host.name, &[]);
                host = &again;
            }
            case.judge(host, round, *blow);
        }
        host.clear();
    });
}
