//! virtio-net over a tap of our own, with a peer on the host's side that sends each frame back.

use crate::run::{Entry, kvm_usable, run};
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, recvfrom, sendto, setsockopt,
    socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The local experimental EtherType that the guest uses.
const TYPE: [u8; 2] = [0x88, 0xb5];

/// A tap that goes when the test ends.
pub(crate) struct Tap(String);

impl Tap {
    /// None: not possible here. Interface names are short.
    pub(crate) fn make(prefix: &str) -> Option<Tap> {
        let tap = Tap(format!("{prefix}{}", std::process::id()));
        let ip = |arguments: &[&str]| {
            Command::new("ip").args(arguments).output().is_ok_and(|out| out.status.success())
        };
        let made = ip(&["tuntap", "add", "dev", &tap.0, "mode", "tap"]);
        (made && ip(&["link", "set", &tap.0, "up"])).then_some(tap)
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

/// Sends frames of our type that arrive on one interface back to where they came from, until told to stop.
fn echo(peer: &OwnedFd, index: usize, stop: &AtomicBool) {
    let mut frame = [0u8; 4096];
    while !stop.load(Ordering::Relaxed) {
        // Ends by itself after 100 ms without a frame.
        let Ok((len, Some(from))) = recvfrom::<LinkAddr>(peer.as_raw_fd(), &mut frame) else { continue };
        if from.ifindex() == index && len >= 14 && frame[12..14] == TYPE {
            let (destination, rest) = frame.split_at_mut(6);
            destination.swap_with_slice(&mut rest[..6]);
            let _ = sendto(peer.as_raw_fd(), &frame[..len], &from, MsgFlags::empty());
        }
    }
}

#[test]
fn frames_go_out_and_come_back() {
    if !kvm_usable() {
        return;
    }
    let Some(tap) = Tap::make("mini") else {
        println!("skipped: no tap can be made here (root and /dev/net/tun)");
        return;
    };
    let index = nix::net::if_::if_nametoindex(tap.0.as_str()).expect("it was just made") as usize;
    let peer = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll);
    let peer = peer.expect("root may open packet sockets");
    setsockopt(&peer, sockopt::ReceiveTimeout, &TimeVal::milliseconds(100)).expect("a valid time");
    let stop = Arc::new(AtomicBool::new(false));
    let echoing = {
        let stop = stop.clone();
        std::thread::spawn(move || echo(&peer, index, &stop))
    };
    let done = run(
        Entry::Pvh,
        "mini.test=net,virtio,pci mini.peer=echo",
        &["--memory=64MiB", "--cpus=1", "--net", &tap.0],
    );
    stop.store(true, Ordering::Relaxed);
    echoing.join().expect("the peer does not panic");
    done.assert_passed();
    done.assert_ok(&["net.mac", "net.transmit", "net.echo", "net.echo-burst"]);
}
