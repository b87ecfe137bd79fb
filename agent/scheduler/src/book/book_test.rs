//! The life of placements.

use proptest::prelude::*;
use serio_api::v1::PlaceRequest;

use super::*;

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn reserved(id: &str, node: &str, ttl_ms: u32) -> Placement {
    let request = PlaceRequest {
        request_id: id.into(),
        vdc: "v".into(),
        resource: format!("vdcs/v/vms/{id}"),
        anti_affinity_group: "g".into(),
        ttl_ms,
        ..PlaceRequest::default()
    };
    Placement {
        name: format!("placements/{id}"),
        request: Some(request),
        node: format!("nodes/{node}"),
        token: format!("t-{id}"),
        state: PlacementState::Reserved.into(),
        ..Placement::default()
    }
}

const fn at(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn state(book: &Book, id: &str) -> PlacementState {
    book.get(&name(id)).unwrap().state()
}

#[test]
fn what_is_not_committed_is_released_until_the_node_says_so_then_forgotten() {
    let mut book = Book::default();
    book.insert(at(0), name("p"), reserved("p", "a", 10_000));
    assert_eq!(book.due(at(11)), []);
    assert_eq!(book.due(at(12)), [Due::Release(name("p"))]);
    assert_eq!(state(&book, "p"), PlacementState::Releasing);
    assert_eq!(book.due(at(13)), []);
    // The node did not answer: again and again.
    assert_eq!(book.due(at(17)), [Due::Release(name("p"))]);
    assert_eq!(book.due(at(22)), [Due::Release(name("p"))]);
    assert!(book.end(at(23), &name("p"), ""));
    assert_eq!(book.get(&name("p")).unwrap().reason, "it was not committed within its ttl");
    assert_eq!(book.due(at(622)), []);
    assert_eq!(book.due(at(623)), [Due::Forgotten(name("p"))]);
    assert!(book.is_empty() && book.by_node.is_empty() && book.timers.is_empty());
}

#[test]
fn what_is_committed_stays_until_the_node_does_not_list_it() {
    let mut book = Book::default();
    for id in ["p", "q"] {
        book.insert(at(0), name(id), reserved(id, "a", 10_000));
    }
    assert!(book.set(at(1), &name("p"), PlacementState::Committed, ""));
    assert!(!book.set(at(1), &name("p"), PlacementState::Committed, ""));
    let keys = BTreeSet::from(["p".to_owned()]);
    assert_eq!(book.listed(at(2), &name("a"), &keys), []);
    assert_eq!(book.holder("vdcs/v/vms/p"), Some(&name("a")));
    // What is only reserved may come with the next list.
    assert_eq!(book.listed(at(3), &name("a"), &BTreeSet::new()), [name("p")]);
    assert_eq!((state(&book, "p"), state(&book, "q")), (PlacementState::Released, PlacementState::Reserved));
    assert_eq!(book.holder("vdcs/v/vms/p"), None);
    assert_eq!(book.group("v", "g"), [name("a")]);
    assert_eq!(book.group("v", "other"), []);
}

#[test]
fn a_fence_ends_what_the_node_had_and_only_that() {
    let mut book = Book::default();
    book.insert(at(0), name("p"), reserved("p", "a", 10_000));
    book.insert(at(0), name("q"), reserved("q", "b", 10_000));
    assert_eq!(book.fenced(at(1), &name("a")), [name("p")]);
    assert_eq!((state(&book, "p"), state(&book, "q")), (PlacementState::Released, PlacementState::Reserved));
    assert_eq!(book.fenced(at(1), &name("a")), []);
}

#[test]
fn after_a_restart_the_ttl_runs_anew() {
    let saved = vec![(name("p"), reserved("p", "a", 10_000))];
    let mut book = Book::restore(at(100), saved);
    assert_eq!(book.due(at(111)), []);
    assert_eq!(book.due(at(112)), [Due::Release(name("p"))]);
}

/// What happens to a book.
#[derive(Debug, Clone)]
enum Change {
    /// Which, where, for what, of which group.
    Insert(u8, u8, u8, u8),
    Copy(u8, Option<(u8, u8, u8)>),
    Set(u8, PlacementState),
    Listed(u8, BTreeSet<u8>),
    Fenced(u8),
    Later(u64),
}

fn any_change() -> impl Strategy<Value = Change> {
    let state = prop_oneof![
        Just(PlacementState::Reserved),
        Just(PlacementState::Committed),
        Just(PlacementState::Releasing),
        Just(PlacementState::Released),
    ];
    prop_oneof![
        4 => (0..8u8, 0..3u8, 0..5u8, 0..3u8).prop_map(|(id, node, what, group)| Change::Insert(id, node, what, group)),
        1 => (0..8u8, prop::option::of((0..3u8, 0..5u8, 0..3u8))).prop_map(|(id, new)| Change::Copy(id, new)),
        3 => (0..8u8, state).prop_map(|(id, state)| Change::Set(id, state)),
        1 => (0..3u8, prop::collection::btree_set(0..8u8, 0..4)).prop_map(|(node, keys)| Change::Listed(node, keys)),
        1 => (0..3u8).prop_map(Change::Fenced),
        2 => (0..700u64).prop_map(Change::Later),
    ]
}

fn id(number: u8) -> Name {
    name(&format!("p{number}"))
}

fn some(number: u8, (node, what, group): (u8, u8, u8)) -> Placement {
    let mut placement = reserved(id(number).as_str(), &format!("n{node}"), 10_000);
    let request = placement.request.as_mut().unwrap();
    request.resource = format!("vdcs/v/vms/{what}");
    request.anti_affinity_group = if group == 0 { String::new() } else { format!("g{group}") };
    placement
}

fn change(book: &mut Book, now: Duration, change: Change) {
    match change {
        Change::Insert(number, node, what, group) => {
            book.insert(now, id(number), some(number, (node, what, group)));
        }
        Change::Copy(number, new) => book.copy(now, id(number), new.map(|new| some(number, new))),
        Change::Set(number, state) => drop(book.set(now, &id(number), state, "")),
        Change::Listed(node, keys) => {
            let keys = keys.into_iter().map(|number| id(number).to_string()).collect();
            book.listed(now, &name(&format!("n{node}")), &keys);
        }
        Change::Fenced(node) => drop(book.fenced(now, &name(&format!("n{node}")))),
        Change::Later(_) => drop(book.due(now)),
    }
}

/// As they were before there was an index: a look at everything that is not over.
fn by_scan<'a>(
    book: &'a Book,
    wanted: impl Fn(&PlaceRequest) -> bool + 'a,
) -> impl Iterator<Item = &'a Name> {
    let open = |entry: &&Entry| entry.placement.state() != PlacementState::Released;
    let wanted = move |entry: &&Entry| entry.placement.request.as_ref().is_some_and(&wanted);
    book.entries.values().filter(open).filter(wanted).map(|entry| &entry.node)
}

proptest! {
    #[test]
    fn holders_and_groups_are_found(changes in prop::collection::vec(any_change(), 0..80)) {
        let (mut book, mut now) = (Book::default(), Duration::ZERO);
        for one in changes {
            if let Change::Later(seconds) = one {
                now += Duration::from_secs(seconds);
            }
            change(&mut book, now, one);
            for resource in (0..5).map(|number| format!("vdcs/v/vms/{number}")) {
                prop_assert_eq!(book.holder(&resource), by_scan(&book, |r| r.resource == resource).next());
            }
            for group in ["g1", "g2"] {
                let nodes: BTreeSet<Name> =
                    by_scan(&book, |r| r.vdc == "v" && r.anti_affinity_group == group).cloned().collect();
                prop_assert_eq!(book.group("v", group), nodes.into_iter().collect::<Vec<_>>());
            }
            for node in (0..4).map(|number| name(&format!("n{number}"))) {
                let theirs = |(_, entry): &(&Name, &Entry)| {
                    entry.node == node && entry.placement.state() != PlacementState::Released
                };
                let scanned: Vec<Name> =
                    book.entries.iter().filter(theirs).map(|(id, _)| id.clone()).collect();
                let found: Vec<Name> = book.of_node(&node).into_iter().map(|(id, _)| id).collect();
                prop_assert_eq!(found, scanned);
            }
        }
        // Nothing is left of what is forgotten.
        for number in 0..8 {
            book.copy(now, id(number), None);
        }
        prop_assert!(book.is_empty() && book.by_resource.is_empty() && book.by_group.is_empty());
        prop_assert!(book.by_node.is_empty() && book.timers.is_empty());
    }
}
