//! The packing of a lost site, by cases and by a property.

use proptest::prelude::*;

use super::*;

fn node(text: &str, site: &str, memory: u64, promises: &[(&str, u64, bool)]) -> Member {
    let mut view = NodeView {
        site: site.into(),
        allocatable: Need { vcpus: 100, memory, storage: 0 },
        ..NodeView::default()
    };
    for (resource, memory, dr_held) in promises {
        let need = Need { vcpus: 1, memory: *memory, storage: 0 };
        view.promised = view.promised.plus(need);
        if *dr_held {
            view.dr_held = view.dr_held.plus(need);
        }
        view.promises.push(Promise { resource: (*resource).into(), need, dr_held: *dr_held });
    }
    Member {
        name: text.parse().unwrap(),
        view: Arc::new(view),
        freshness: NodeFreshness::Fresh,
        fenced: false,
    }
}

#[test]
fn what_was_held_for_recovery_is_room_and_the_rest_is_said() {
    let nodes = [
        node("a", "milano", 100, &[("big", 60, false), ("small", 20, false), ("copy", 30, true)]),
        node("b", "roma", 100, &[("own", 40, false), ("held", 60, true)]),
        node("c", "roma", 30, &[("other", 15, false)]),
        Member { freshness: NodeFreshness::Lost, ..node("d", "roma", 1000, &[]) },
    ];
    let answer = without_site("milano", &nodes);
    let fits: Vec<(&str, &str)> =
        answer.fits.iter().map(|fit| (fit.resource.as_str(), fit.node.as_str())).collect();
    assert_eq!(fits, [("big", "nodes/b"), ("small", "")]);
    assert_eq!((answer.fitting, answer.not_fitting), (1, 1));
    assert!(
        answer.fits[1].reason.contains("20 bytes of memory, no node has more than 15"),
        "{:?}",
        answer.fits[1]
    );
    let site = &answer.sites[0];
    assert_eq!(
        (site.site.as_str(), site.nodes, site.memory_dr_held, site.memory_allocated),
        ("roma", 2, 60, 115)
    );
    // The other way round nothing of milano's own copy is looked for.
    let answer = without_site("roma", &nodes);
    assert_eq!(answer.fits.iter().map(|fit| fit.resource.as_str()).collect::<Vec<_>>(), ["own", "other"]);
}

#[test]
fn a_region_of_one_site_has_no_way_out() {
    let answer = without_site("milano", &[node("a", "milano", 100, &[("web", 1, false)])]);
    assert_eq!(answer.fits[0].reason, "no node at another site can take anything");
}

proptest! {
    #[test]
    fn no_node_takes_more_than_it_has(
        lost in prop::collection::vec(1_u64..50, 0..40),
        rooms in prop::collection::vec((0_u64..100, 0_u64..50), 0..10),
    ) {
        let promises: Vec<(&str, u64, bool)> = lost.iter().map(|memory| ("r", *memory, false)).collect();
        let mut nodes = vec![node("gone", "a", 10_000, &promises)];
        for (n, (memory, used)) in rooms.iter().enumerate() {
            nodes.push(node(&format!("n{n}"), "b", *memory, &[("own", *used, false)]));
        }
        let answer = without_site("a", &nodes);
        prop_assert_eq!(answer.fits.len(), lost.len());
        for (n, (memory, used)) in rooms.iter().enumerate() {
            let here = format!("nodes/n{n}");
            let taken: u64 = answer.fits.iter().filter(|fit| fit.node == here).map(|fit| fit.memory_bytes).sum();
            prop_assert!(taken <= memory.saturating_sub(*used));
        }
    }
}
