//! The inventory, by cases and by properties.

use proptest::prelude::*;
use serio_api::v1::Allocation;

use super::*;

fn at(seconds: u64) -> Moment {
    Moment {
        since_start: Duration::from_secs(seconds),
        wall: Timestamp { seconds: 1_700_000_000 + i64::try_from(seconds).unwrap(), nanos: 0 },
    }
}

fn hello(id: &str) -> Hello {
    Hello { node_id: id.into(), node_uid: format!("uid-{id}"), boot_id: "boot-1".into(), ..Hello::default() }
}

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn step(inventory: &mut Inventory, seconds: u64, input: Input) -> Vec<Output> {
    let mut out = Vec::new();
    inventory.step(at(seconds), input, &mut out);
    out
}

fn lease(sequence: u64, seconds: u32) -> Lease {
    Lease { sequence, ttl_ms: seconds * 1000 }
}

const ONE: SessionId = SessionId(1);
const TWO: SessionId = SessionId(2);

#[test]
fn fresh_suspect_lost() {
    let mut nodes = Inventory::default();
    step(&mut nodes, 0, Input::Hello(ONE, hello("a")));
    step(&mut nodes, 0, Input::Lease(ONE, lease(1, 5)));
    let a = name("a");
    let state = |nodes: &Inventory, ms| nodes.freshness(Duration::from_millis(ms), &a);
    assert_eq!(state(&nodes, 4_999), NodeFreshness::Fresh);
    assert_eq!(state(&nodes, 5_000), NodeFreshness::Suspect);
    assert_eq!(state(&nodes, 34_999), NodeFreshness::Suspect);
    assert_eq!(state(&nodes, 35_000), NodeFreshness::Lost);
    step(&mut nodes, 40, Input::Lease(ONE, lease(2, 5)));
    assert_eq!(state(&nodes, 44_000), NodeFreshness::Fresh);
}

#[test]
fn the_wall_clock_says_nothing_of_freshness() {
    let mut nodes = Inventory::default();
    let a = name("a");
    let mut inputs = vec![Input::Hello(ONE, hello("a"))];
    inputs.extend((1..20).map(|sequence| Input::Lease(ONE, lease(sequence, 5))));
    for (input, seconds) in inputs.into_iter().zip(0_u64..) {
        // An hour forward, a day back, each second.
        let jump = if seconds % 2 == 0 { 3600 } else { -86_400 };
        let wall = Timestamp { seconds: 1_700_000_000 + jump, nanos: 0 };
        let now = Moment { since_start: Duration::from_secs(seconds), wall };
        nodes.step(now, input, &mut Vec::new());
        assert_eq!(nodes.get(now.since_start, &a).unwrap().last_seen, Some(wall), "for people");
    }
    let state = |seconds| nodes.freshness(Duration::from_secs(seconds), &a);
    use NodeFreshness::{Fresh, Lost, Suspect};
    assert_eq!([state(23), state(24), state(53), state(54)], [Fresh, Suspect, Suspect, Lost]);
}

#[test]
fn a_lease_is_bounded_and_old_ones_do_not_count() {
    let mut nodes = Inventory::default();
    step(&mut nodes, 0, Input::Hello(ONE, hello("a")));
    step(&mut nodes, 0, Input::Lease(ONE, Lease { sequence: 7, ttl_ms: u32::MAX }));
    assert_eq!(nodes.freshness(LEASE_MAX, &name("a")), NodeFreshness::Suspect);
    step(&mut nodes, 50, Input::Lease(ONE, lease(7, 60)));
    assert_eq!(nodes.freshness(LEASE_MAX, &name("a")), NodeFreshness::Suspect);
}

#[test]
fn welcome_says_what_is_known() {
    let mut nodes = Inventory::default();
    let out = step(&mut nodes, 0, Input::Hello(ONE, hello("a")));
    assert_eq!(
        out,
        [
            Output::Note(name("a"), Note::New),
            Output::Save(name("a")),
            Output::Welcome { session: ONE, inventory_generation: 0, allocations_digest: String::new() }
        ]
    );
    step(&mut nodes, 1, Input::Inventory(ONE, NodeInventory { generation: 4, ..NodeInventory::default() }));
    let whole = Allocations { digest: "d".into(), complete: true, allocations: vec![] };
    step(&mut nodes, 1, Input::Allocations(ONE, whole));
    step(&mut nodes, 2, Input::Gone(ONE));
    let out = step(&mut nodes, 3, Input::Hello(TWO, hello("a")));
    assert!(
        out.contains(&Output::Welcome {
            session: TWO,
            inventory_generation: 4,
            allocations_digest: "d".into()
        }),
        "{out:?}"
    );
}

#[test]
fn another_digest_is_asked_for_once() {
    let mut nodes = Inventory::default();
    step(&mut nodes, 0, Input::Hello(ONE, hello("a")));
    let digest = |text: &str| Allocations { digest: text.into(), ..Allocations::default() };
    assert_eq!(step(&mut nodes, 1, Input::Allocations(ONE, digest("x"))), [Output::AskAllocations(ONE)]);
    assert_eq!(step(&mut nodes, 2, Input::Allocations(ONE, digest("x"))), []);
    let list = vec![Allocation { id: "v".into(), vcpus: 2, ..Allocation::default() }];
    let whole = Allocations { digest: "x".into(), allocations: list, complete: true };
    assert_eq!(step(&mut nodes, 3, Input::Allocations(ONE, whole.clone())), [Output::Save(name("a"))]);
    assert_eq!(step(&mut nodes, 4, Input::Allocations(ONE, digest("x"))), []);
    assert_eq!(nodes.get(Duration::ZERO, &name("a")).unwrap().allocations, Some(whole));
    assert_eq!(step(&mut nodes, 5, Input::Allocations(ONE, digest("y"))), [Output::AskAllocations(ONE)]);
}

#[test]
fn a_newer_connection_replaces_the_older() {
    let mut nodes = Inventory::default();
    step(&mut nodes, 0, Input::Hello(ONE, hello("a")));
    let mut other = hello("a");
    other.node_uid = "else".into();
    let out = step(&mut nodes, 1, Input::Hello(TWO, other));
    assert!(out.contains(&Output::Close(ONE, CloseReason::Replaced(name("a")))), "{out:?}");
    assert!(
        out.contains(&Output::Note(name("a"), Note::OtherUid { before: "uid-a".into(), now: "else".into() })),
        "{out:?}"
    );
    // What the older one still says changes nothing, nor does its end.
    step(&mut nodes, 2, Input::Lease(ONE, lease(1, 60)));
    assert_eq!(nodes.freshness(Duration::from_secs(2), &name("a")), NodeFreshness::Suspect);
    step(&mut nodes, 2, Input::Gone(ONE));
    step(&mut nodes, 3, Input::Lease(TWO, lease(1, 60)));
    assert_eq!(nodes.freshness(Duration::from_secs(4), &name("a")), NodeFreshness::Fresh);
}

#[test]
fn a_reboot_is_noted() {
    let mut nodes = Inventory::default();
    step(&mut nodes, 0, Input::Hello(ONE, hello("a")));
    let mut again = hello("a");
    again.boot_id = "boot-2".into();
    assert!(step(&mut nodes, 1, Input::Hello(TWO, again)).contains(&Output::Note(name("a"), Note::Rebooted)));
}

#[test]
fn hostile_agents_are_closed() {
    let mut nodes = Inventory::default();
    assert!(matches!(
        step(&mut nodes, 0, Input::Lease(ONE, lease(1, 1)))[..],
        [Output::Close(ONE, CloseReason::NoHello)]
    ));
    for bad in [hello("../etc"), hello(""), Hello { site: "x".repeat(999), ..hello("a") }] {
        assert!(matches!(
            step(&mut nodes, 0, Input::Hello(ONE, bad))[..],
            [Output::Close(ONE, CloseReason::BadHello { .. })]
        ));
    }
    step(&mut nodes, 0, Input::Hello(ONE, hello("a")));
    let many = Allocations {
        allocations: vec![Allocation::default(); ALLOCATIONS_MAX + 1],
        complete: true,
        ..Allocations::default()
    };
    let out = step(&mut nodes, 0, Input::Allocations(ONE, many));
    assert!(matches!(out.last(), Some(Output::Close(ONE, CloseReason::TooManyAllocations(_)))), "{out:?}");
    step(&mut nodes, 0, Input::Hello(TWO, hello("a")));
    let twice = step(&mut nodes, 0, Input::Hello(TWO, hello("b")));
    assert!(matches!(twice.last(), Some(Output::Close(TWO, CloseReason::NoHello))), "{twice:?}");
}

#[test]
fn the_number_of_nodes_is_bounded() {
    let mut nodes = Inventory::default();
    for number in 0..NODES_MAX as u64 {
        step(&mut nodes, 0, Input::Hello(SessionId(number), hello(&format!("n{number}"))));
    }
    let one_more = SessionId(u64::MAX);
    assert_eq!(
        step(&mut nodes, 0, Input::Hello(one_more, hello("x"))),
        [Output::Close(one_more, CloseReason::TooManyNodes)]
    );
    // One of the old may come back.
    assert!(
        step(&mut nodes, 0, Input::Hello(one_more, hello("n0")))
            .iter()
            .any(|o| matches!(o, Output::Welcome { .. }))
    );
}

#[test]
fn only_a_lost_node_is_forgotten() {
    let mut nodes = Inventory::default();
    let (a, soon, late) = (name("a"), Duration::from_secs(1), Duration::from_secs(100));
    assert_eq!(nodes.forget(late, &a), Err(ForgetError::Unknown(a.clone())));
    step(&mut nodes, 0, Input::Hello(ONE, hello("a")));
    assert_eq!(nodes.forget(soon, &a), Err(ForgetError::NotLost(a.clone())));
    // Connected but silent: it may still speak.
    assert_eq!(nodes.forget(late, &a), Err(ForgetError::NotLost(a.clone())));
    step(&mut nodes, 0, Input::Gone(ONE));
    assert_eq!(nodes.forget(late, &a), Ok(()));
    assert!(nodes.list(late, "").is_empty());
}

#[test]
fn after_a_restart_nodes_are_suspect_then_lost() {
    let durable = Durable { hello: Hello { site: "milano".into(), ..hello("a") }, ..Durable::default() };
    let mut nodes = Inventory::restore([(name("a"), durable)]);
    assert_eq!(nodes.freshness(Duration::ZERO, &name("a")), NodeFreshness::Suspect);
    assert_eq!(nodes.freshness(SUSPECT, &name("a")), NodeFreshness::Lost);
    assert_eq!((nodes.list(SUSPECT, "milano").len(), nodes.list(SUSPECT, "roma").len()), (1, 0));
    step(&mut nodes, 60, Input::Hello(ONE, hello("a")));
    step(&mut nodes, 60, Input::Lease(ONE, lease(1, 5)));
    assert_eq!(nodes.freshness(Duration::from_secs(61), &name("a")), NodeFreshness::Fresh);
}

/// Promises to few, by few reservations.
fn any_list() -> impl Strategy<Value = Vec<Allocation>> {
    let one = (0..5u32, 0..3u32).prop_map(|(resource, key)| Allocation {
        resource: format!("vdcs/v/vms/{resource}"),
        key: format!("k{key}"),
        ..Allocation::default()
    });
    prop::collection::vec(one, 0..4)
}

/// What changes who holds what.
#[derive(Debug, Clone)]
enum Change {
    Input(Input),
    Fence(String),
    Forget(String),
    Copy(String, Option<Vec<Allocation>>),
}

fn any_change() -> impl Strategy<Value = Change> {
    prop_oneof![
        6 => any_input().prop_map(Change::Input),
        1 => "[abc]".prop_map(Change::Fence),
        1 => "[abc]".prop_map(Change::Forget),
        1 => ("[abc]", prop::option::of(any_list())).prop_map(|(id, list)| Change::Copy(id, list)),
    ]
}

fn durable(id: &str, allocations: Vec<Allocation>) -> Durable {
    let allocations = Some(Allocations { allocations, complete: true, ..Allocations::default() });
    Durable { hello: hello(id), allocations, ..Durable::default() }
}

fn change(nodes: &mut Inventory, seconds: u64, change: Change) {
    match change {
        Change::Input(input) => drop(step(nodes, seconds, input)),
        Change::Fence(id) => drop(nodes.fence(at(seconds), &name(&id), "it is dead")),
        Change::Forget(id) => drop(nodes.forget(at(seconds).since_start, &name(&id))),
        Change::Copy(id, list) => {
            let node = list.map(|list| durable(&id, list));
            // As who learns from a leader: nobody is connected to it.
            let session = nodes.session(&name(&id));
            session.map(|session| step(nodes, seconds, Input::Gone(session)));
            nodes.copy(at(seconds).since_start, name(&id), node);
        }
    }
}

/// As it was before there was an index: a look at everything.
fn holder_by_scan<'a>(nodes: &'a Inventory, resource: &str, key: &str) -> Option<&'a Name> {
    let by_another = |node: &Node| node.view.resources.get(resource).is_some_and(|found| found != key);
    let mut all = nodes.nodes.iter();
    all.find(|(_, node)| node.fence_due().is_none() && by_another(node)).map(|(name, _)| name)
}

/// Any input of three sessions and three nodes.
fn any_input() -> impl Strategy<Value = Input> {
    let session = (0..4u64).prop_map(SessionId);
    prop_oneof![
        (session.clone(), "[abc]").prop_map(|(s, id)| Input::Hello(s, hello(&id))),
        (session.clone(), 0..9u64).prop_map(|(s, generation)| Input::Inventory(
            s,
            NodeInventory { generation, ..Default::default() }
        )),
        (session.clone(), 0..5u64, 0..20u32).prop_map(|(s, n, ttl)| Input::Lease(s, lease(n, ttl))),
        (session.clone(), "[xy]", any::<bool>(), any_list()).prop_map(|(s, digest, complete, list)| {
            let allocations = if complete { list } else { vec![] };
            Input::Allocations(s, Allocations { digest, complete, allocations })
        }),
        session.prop_map(Input::Gone),
    ]
}

proptest! {
    /// One session a node, both directions agree; whoever is closed or gone is not kept; what changed is saved.
    #[test]
    fn sessions_and_saves(inputs in prop::collection::vec((any_input(), 0..20u64), 0..60)) {
        let mut nodes = Inventory::default();
        let mut disk: BTreeMap<Name, Durable> = BTreeMap::new();
        let mut seconds = 0;
        for (input, pause) in inputs {
            seconds += pause;
            let out = step(&mut nodes, seconds, input);
            for output in &out {
                match output {
                    Output::Close(session, _) => prop_assert!(!nodes.sessions.contains_key(session)),
                    Output::Save(name) => {
                        disk.insert(name.clone(), nodes.durable(name).unwrap().clone());
                    }
                    _ => {}
                }
            }
            for (session, name) in &nodes.sessions {
                prop_assert_eq!(nodes.session(name), Some(*session));
            }
            prop_assert_eq!(nodes.nodes.iter().filter(|(_, n)| n.session.is_some()).count(), nodes.sessions.len());
            // But for the time of the last word, the disk knows everything.
            prop_assert_eq!(disk.len(), nodes.nodes.len());
            for (name, kept) in &disk {
                let now = nodes.durable(name).unwrap();
                prop_assert_eq!((&kept.hello, &kept.inventory, &kept.allocations), (&now.hello, &now.inventory, &now.allocations));
            }
        }
    }

    /// Who holds something is found in the index as by a look at everything, whatever happened before.
    #[test]
    fn holders_are_found(
        restored in prop::collection::btree_map("[abc]", any_list(), 0..3),
        changes in prop::collection::vec((any_change(), 0..40u64), 0..60),
    ) {
        let mut nodes = Inventory::restore(restored.into_iter().map(|(id, list)| (name(&id), durable(&id, list))));
        let mut seconds = 0;
        for (one, pause) in changes {
            nodes.nodes.check();
            seconds += pause;
            change(&mut nodes, seconds, one);
            for resource in (0..5).map(|number| format!("vdcs/v/vms/{number}")) {
                for key in ["k0", "k1", "other"] {
                    prop_assert_eq!(nodes.holder(&resource, key), holder_by_scan(&nodes, &resource, key));
                }
            }
        }
        nodes.nodes.check();
    }

    /// Freshness only ever falls while nothing is heard.
    #[test]
    fn silence_never_freshens(ttl in 0..100u32, pauses in prop::collection::vec(0..50_000u64, 1..20)) {
        let mut nodes = Inventory::default();
        step(&mut nodes, 0, Input::Hello(ONE, hello("a")));
        step(&mut nodes, 0, Input::Lease(ONE, lease(1, ttl)));
        let (mut now, mut before) = (Duration::ZERO, 0);
        for pause in pauses {
            now += Duration::from_millis(pause);
            let state = nodes.freshness(now, &name("a")) as i32;
            prop_assert!(state >= before);
            before = state;
        }
    }
}
