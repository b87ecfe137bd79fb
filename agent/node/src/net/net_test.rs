//! Bridges and taps, in a network namespace that each test makes for itself.

use std::{future::Future, process::Command, thread};

use super::*;

/// Runs a test in a new network namespace: on a thread of its own, since a namespace is a thread's.
fn in_namespace<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    let ran = thread::spawn(move || {
        if let Err(error) = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET) {
            eprintln!("skipped: no network namespace can be made here ({error})");
            return;
        }
        if let Err(error) = sys::make_tap("probe0", 1) {
            eprintln!("skipped: no tap can be made here ({error})");
            return;
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test());
    });
    ran.join().unwrap();
}

/// What a stranger's tool says, in this thread's namespace.
fn ip(arguments: &[&str]) -> String {
    let output = Command::new("ip").args(arguments).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_tap_joins_its_bridge_and_both_go() {
    in_namespace(|| async {
        let net = Net::default();
        let bridge = bridge_name(Uuid::new_v4());
        let (first, second) = (tap_name(Uuid::new_v4(), 0), tap_name(Uuid::new_v4(), 1));
        let tap = net.attach(&bridge, &first, 1400, 2).await.unwrap();
        let other = net.attach(&bridge, &second, 1500, 1).await.unwrap();
        let link = ip(&["-d", "link", "show", &first]);
        if !link.is_empty() {
            assert!(link.contains("mtu 1400") && link.contains(&format!("master {bridge}")), "{link}");
            assert!(
                link.contains("UP") && link.contains("vnet_hdr on") && link.contains("persist off"),
                "{link}"
            );
            assert!(link.contains("multi_queue numqueues 2"), "{link}");
            assert!(!ip(&["-d", "link", "show", &second]).contains("multi_queue"));
            assert!(!ip(&["addr", "show", &bridge]).contains("inet6"));
        }
        assert_eq!((tap.len(), other.len()), (2, 1));
        let mut tap = tap.into_iter();
        drop(tap.next());
        assert!(index(&first).is_some(), "its other queue is open");
        drop(tap);
        assert_eq!(index(&first), None, "the tap ends with its last descriptor");
        net.release(std::slice::from_ref(&bridge)).await;
        assert!(index(&bridge).is_some(), "a bridge with a port stays");
        drop(other);
        net.release(&[bridge.clone(), bridge.clone()]).await;
        assert_eq!(index(&bridge), None);
    });
}

#[test]
fn a_tap_that_is_taken_is_refused_and_nothing_is_left() {
    in_namespace(|| async {
        let net = Net::default();
        // Of one that may have several queues nobody gets one more either: they would be another VM's packets.
        for (held, queues) in [(1, 1), (2, 2), (1, 2), (2, 1)] {
            let _held = sys::make_tap("taken", held).unwrap();
            let error = net.attach("srv-00000001", "taken", 1500, queues).await.unwrap_err();
            assert!(matches!(error, NetError::Tap { .. }), "{error}");
            assert_eq!(index("srv-00000001"), None);
        }
        let error = net.attach("srv-00000001", "much-too-long-a-name", 1500, 1).await.unwrap_err();
        assert!(matches!(error, NetError::Tap { .. }), "{error}");
        assert_eq!(index("srv-00000001"), None);
    });
}

#[test]
fn links_of_others_are_left_alone() {
    in_namespace(|| async {
        let net = Net::default();
        let _tap = sys::make_tap("br-other", 1).unwrap();
        net.release(&["br-other".to_owned(), "nonexistent".to_owned()]).await;
        assert!(index("br-other").is_some());
    });
}

#[test]
fn names_fit_the_kernel() {
    // IFNAMSIZ is 16 with the terminating zero.
    assert!(bridge_name(Uuid::max()).len() < 16);
    assert!(tap_name(Uuid::max(), 99).len() < 16);
}

#[test]
fn a_vmm_names_no_tap_but_its_own() {
    let (vm, other) = (Uuid::now_v7(), Uuid::now_v7());
    assert!(is_tap_of(vm, &tap_name(vm, 0)) && is_tap_of(vm, &tap_name(vm, 12)));
    let own = tap_name(vm, 0);
    let (ours, _) = own.split_once('-').unwrap();
    for name in [
        &tap_name(other, 0),
        "",
        "lo",
        "../x",
        ours,
        &format!("{ours}-"),
        &format!("{own}/../lo"),
        &format!("{ours}-a"),
    ] {
        assert!(!is_tap_of(vm, name), "{name}");
    }
}
