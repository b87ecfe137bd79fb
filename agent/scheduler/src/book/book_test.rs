//! The life of placements.

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
