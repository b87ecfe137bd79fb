//! virtio-net over a tap of our own, with a peer on the host's side that sends each frame back.

use crate::echo::Echo;
use crate::run::{Entry, kvm_usable, run};
use std::process::Command;

/// A tap that goes when the test ends.
pub(crate) struct Tap(String);

impl Tap {
    /// With one queue, or as many as are asked for. None: not possible here. Interface names are short.
    pub(crate) fn make(prefix: &str, several: bool) -> Option<Tap> {
        let tap = Tap(format!("{prefix}{}", std::process::id()));
        let ip = |arguments: &[&str]| {
            Command::new("ip").args(arguments).output().is_ok_and(|out| out.status.success())
        };
        let mut add = vec!["tuntap", "add", "dev", &tap.0, "mode", "tap"];
        add.extend(several.then_some("multi_queue"));
        (ip(&add) && ip(&["link", "set", &tap.0, "up"])).then_some(tap)
    }

    /// Its interface's name.
    pub(crate) fn name(&self) -> &str {
        &self.0
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "del", &self.0]).output();
    }
}

/// All cases of a card, with so many vcpus.
fn frames_go_out_and_come_back(prefix: &str, several: bool, cpus: u32) {
    if !kvm_usable() {
        return;
    }
    let Some(tap) = Tap::make(prefix, several) else {
        println!("skipped: no tap can be made here (root and /dev/net/tun)");
        return;
    };
    let echo = Echo::on(tap.name());
    let cpus_argument = format!("--cpus={cpus}");
    let done = run(
        Entry::Pvh,
        "mini.test=net,virtio,pci mini.peer=echo",
        &["--memory=64MiB", &cpus_argument, "--net", &tap.0],
    );
    drop(echo);
    done.assert_passed();
    done.assert_ok(&["net.mac", "net.transmit", "net.echo", "net.echo-burst"]);
    if several && cpus > 1 {
        done.assert_ok(&["net.pairs"]);
    } else {
        let text = done.text();
        assert!(text.contains("skipped net.pairs: one queue pair"), "{text}");
    }
}

#[test]
fn over_one_queue_pair() {
    frames_go_out_and_come_back("mini", false, 1);
}

#[test]
fn over_two_queue_pairs() {
    frames_go_out_and_come_back("mnit", true, 2);
}

#[test]
fn over_four_queue_pairs_of_five_vcpus() {
    frames_go_out_and_come_back("mnif", true, 5);
}

/// Somebody else made it: who has only one queue gets one pair, and one vcpu uses one of several.
#[test]
fn over_taps_that_were_made_otherwise() {
    frames_go_out_and_come_back("mnio", false, 2);
    frames_go_out_and_come_back("mnis", true, 1);
}
