//! The checker is checked: histories that are right, and one for each way of being wrong.

use std::time::Duration;

use crate::judge::{
    At, Call, Held, History,
    Life::{self, Committed, Released, Releasing, Reserved},
    NodeLog, Op, Request, violations,
};

const fn at(ms: u64) -> At {
    Duration::from_millis(ms)
}

fn op(call: Call, from: u64, to: u64, life: Life) -> Op {
    Op { call, invoked: at(from), answer: Some((at(to), life)) }
}

fn lost(call: Call, from: u64) -> Op {
    Op { call, invoked: at(from), answer: None }
}

fn request(ops: &[Op]) -> Request {
    Request { vcpus: 4, ops: ops.to_vec(), places: vec![("x".into(), "t".into())] }
}

fn history(key: &str, ops: &[Op]) -> History {
    History::from([(key.to_owned(), request(ops))])
}

fn held(key: &str, token: &str, committed: bool) -> Held {
    Held { key: key.into(), token: token.into(), vcpus: 4, committed }
}

/// Looks at x, which has 8 vcpus: each takes a millisecond.
fn seen(looks: &[(u64, &[Held])]) -> NodeLog {
    let mut node = NodeLog::new("x", 8);
    looks.iter().for_each(|(from, list)| node.look((at(*from), at(from + 1)), list));
    node
}

fn guilty(history: &History, nodes: &[NodeLog], word: &str) {
    let found = violations(history, nodes).join("; ");
    assert!(found.contains(word), "wanted {word}, found: {found}");
}

fn innocent(history: &History, nodes: &[NodeLog]) {
    assert_eq!(violations(history, nodes), Vec::<String>::new());
}

#[test]
fn what_a_region_may_do() {
    let place = op(Call::Place, 0, 10, Reserved);
    let commit = op(Call::Commit, 20, 30, Committed);
    for ops in [
        vec![],
        vec![lost(Call::Place, 0)],
        vec![place, commit, op(Call::Release, 40, 50, Released)],
        vec![place, commit, op(Call::Release, 40, 50, Releasing), op(Call::Read, 60, 70, Released)],
        // It expired.
        vec![place, op(Call::Commit, 20, 30, Released), op(Call::Read, 60, 70, Releasing)],
        vec![place, op(Call::Place, 60, 70, Released)],
        // The answer was lost, and it was done, or not, or late.
        vec![place, lost(Call::Commit, 20), op(Call::Place, 60, 70, Committed)],
        vec![
            place,
            lost(Call::Commit, 20),
            op(Call::Place, 60, 70, Reserved),
            op(Call::Read, 80, 90, Committed),
        ],
        vec![lost(Call::Place, 0), place, commit],
        // Two at once, in either order.
        vec![place, op(Call::Commit, 20, 90, Committed), op(Call::Release, 30, 40, Released)],
    ] {
        innocent(&history("a", &ops), &[]);
    }
}

#[test]
fn what_no_order_of_calls_explains() {
    let place = op(Call::Place, 0, 10, Reserved);
    let commit = op(Call::Commit, 20, 30, Committed);
    for ops in [
        // Acknowledged, and over without a release.
        vec![place, commit, op(Call::Read, 60, 70, Released)],
        vec![place, commit, op(Call::Place, 60, 70, Reserved)],
        // Given back, and there again.
        vec![place, commit, op(Call::Release, 40, 50, Released), op(Call::Read, 60, 70, Committed)],
        vec![place, op(Call::Commit, 20, 30, Released), op(Call::Commit, 40, 50, Committed)],
        // The record is gone.
        vec![place, commit, op(Call::Read, 60, 70, Life::None)],
        // Done before it was asked for.
        vec![place, op(Call::Place, 15, 18, Committed), commit],
    ] {
        guilty(&history("a", &ops), &[], "no order of calls");
    }
}

#[test]
fn what_nodes_must_not_show() {
    let kept = [op(Call::Place, 0, 10, Reserved), op(Call::Commit, 20, 30, Committed)];
    let over = [kept[0], kept[1], op(Call::Release, 40, 50, Released)];
    let a = held("a", "t", true);
    let always: &[Held] = std::slice::from_ref(&a);
    innocent(&history("a", &kept), &[seen(&[(12, &[held("a", "t", false)]), (25, always), (60, always)])]);
    innocent(&history("a", &over), &[seen(&[(25, always), (45, &[]), (60, &[])])]);
    // What nobody committed may be elsewhere for a while.
    let mut elsewhere = NodeLog::new("y", 8);
    elsewhere.look((at(5), at(6)), &[held("a", "u", false)]);
    innocent(&history("a", &kept), &[seen(&[(60, always)]), elsewhere]);

    let cases: [(&[Op], NodeLog, &str); 9] = [
        (&kept, seen(&[(60, &[a.clone(), held("a", "u", true)])]), "doubled"),
        (&kept, seen(&[(60, &[])]), "lost"),
        (&kept, seen(&[(25, always), (60, &[])]), "lost"),
        (&kept, seen(&[(25, always), (60, &[]), (70, always)]), "came back"),
        (&over, seen(&[(60, always)]), "still held"),
        (&kept, seen(&[(60, &[a.clone(), held("stranger", "u", false)])]), "nobody asked for"),
        (&kept[..1], seen(&[(60, always)]), "nobody had committed"),
        (&kept, seen(&[(60, &[held("a", "u", true)])]), "its client was told"),
        (
            &[op(Call::Place, 50, 60, Reserved)],
            seen(&[(5, &[held("a", "t", false)])]),
            "before anybody asked",
        ),
    ];
    for (ops, node, word) in cases {
        guilty(&history("a", ops), &[node], word);
    }
    let mut elsewhere = NodeLog::new("y", 8);
    elsewhere.look((at(60), at(61)), &[held("a", "u", true)]);
    guilty(&history("a", &kept), &[seen(&[(60, always)]), elsewhere], "doubled");
    let mut told = history("a", &kept);
    told.get_mut("a").unwrap().places.push(("y".into(), "u".into()));
    guilty(&told, &[], "was told to be at");
}

#[test]
fn no_node_promises_more_than_it_has() {
    let one = |key: &str, token: &str, ops: &[Op]| {
        let mut request = request(ops);
        request.places = vec![("x".into(), token.into())];
        (key.to_owned(), request)
    };
    let kept = |from: u64, to: u64| {
        [
            op(Call::Place, from, from + 5, Reserved),
            op(Call::Commit, from + 10, from + 15, Committed),
            lost(Call::Release, to),
        ]
    };
    // Each certainly there from its placement to its release: the third fits only after the first.
    let three = |third: u64| {
        History::from([
            one("a", "t", &kept(0, 100)),
            one("b", "u", &kept(0, 300)),
            one("c", "v", &kept(third, 300)),
        ])
    };
    innocent(&three(95), &[seen(&[])]);
    guilty(&three(50), &[seen(&[])], "promised 12 of 8");
    // Nobody was told, but it was seen before and after.
    let mut two = History::from([one("a", "t", &kept(0, 300)), one("b", "u", &kept(0, 300))]);
    two.insert("c".into(), Request { vcpus: 4, ops: vec![lost(Call::Place, 0)], places: Vec::new() });
    let all = [held("a", "t", true), held("b", "u", true), held("c", "w", false)];
    guilty(&two, &[seen(&[(40, &all)])], "over capacity: 12 of 8");
    // Seen once, before the others were there: that fits.
    innocent(&two, &[seen(&[(2, &all[2..])])]);
}
