//! Placement, by cases and by properties.

use proptest::prelude::*;

use super::*;

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

/// A node of `milano` with 10 vcpus, 100 of memory and of storage, one of overhead.
fn view() -> NodeView {
    NodeView {
        site: "milano".into(),
        failure_domain: "rack-1".into(),
        baseline: "x86-64-v3".into(),
        overhead: 1,
        allocatable: Need { vcpus: 10, memory: 100, storage: 100 },
        ..NodeView::default()
    }
}

fn filled(view: NodeView, vcpus: u64) -> NodeView {
    let need = Need { vcpus, ..Need::default() };
    let promise = view::Promise { resource: "r".into(), need, dr_held: false };
    NodeView { promised: need, promises: vec![promise], ..view }
}

fn wish(vcpus: u64, memory: u64) -> Wish {
    Wish { need: Need { vcpus, memory, storage: 0 }, ..Wish::default() }
}

fn fresh<'a>(name: &'a Name, view: &'a NodeView) -> Candidate<'a> {
    let pending = Need::default();
    Candidate { name, view, pending, freshness: NodeFreshness::Fresh, connected: true, fenced: false }
}

fn ask(wish: &Wish, nodes: &[(Name, NodeView)]) -> Plan {
    let question = Question { wish, members: &Members::default(), refused: &[], seed: 1 };
    plan(&question, nodes.iter().map(|(name, view)| fresh(name, view)))
}

fn left(plan: &Plan, filter: &str) -> u32 {
    plan.filters.iter().find(|count| count.filter == filter).unwrap().nodes
}

#[test]
fn each_filter_counts_what_it_leaves() {
    let views = [
        ("elsewhere", NodeView { site: "roma".into(), ..view() }),
        ("old", NodeView { baseline: "x86-64-v2".into(), ..view() }),
        ("bare", NodeView { images: Default::default(), ..view() }),
        ("small", NodeView { allocatable: Need { vcpus: 1, ..view().allocatable }, ..view() }),
        ("draining", NodeView { draining: true, ..view() }),
        ("good", view()),
    ];
    let nodes: Vec<(Name, NodeView)> = views
        .into_iter()
        .map(|(text, mut view)| {
            if text != "bare" {
                view.images.insert("tiny".into());
            }
            (name(text), view)
        })
        .collect();
    let wish =
        Wish { site: "milano".into(), baseline: "x86-64-v3".into(), image: "tiny".into(), ..wish(2, 10) };
    let plan = ask(&wish, &nodes);
    assert_eq!(plan.nodes, [name("good")]);
    let counts =
        ["connected", "draining", "site", "baseline", "image", "fit"].map(|filter| left(&plan, filter));
    assert_eq!(counts, [6, 5, 4, 3, 2, 1]);
    assert!(
        plan.counts().starts_with("connected 6, fresh 6, fenced 6, draining 5, site 4"),
        "{}",
        plan.counts()
    );
}

#[test]
fn only_nodes_that_live_and_can_be_asked() {
    let (a, view) = (name("a"), view());
    let good = fresh(&a, &view);
    let states = [
        ("fresh", Candidate { freshness: NodeFreshness::Suspect, ..good }),
        ("connected", Candidate { connected: false, ..good }),
        ("fenced", Candidate { fenced: true, ..good }),
        ("fit", Candidate { pending: Need { vcpus: 9, ..Need::default() }, ..good }),
    ];
    let wish = wish(2, 10);
    let question = Question { wish: &wish, members: &Members::default(), refused: &[], seed: 1 };
    assert_eq!(plan(&question, std::iter::once(good)).nodes, std::slice::from_ref(&a));
    for (filter, state) in states {
        let plan = plan(&question, std::iter::once(state));
        assert!(plan.nodes.is_empty(), "{filter}");
        assert_eq!(left(&plan, filter), 0, "{filter}");
    }
    let refused = [a.clone()];
    let again = Question { refused: &refused, ..question };
    assert!(plan(&again, std::iter::once(good)).nodes.is_empty());
}

#[test]
fn the_overhead_of_the_vmm_counts() {
    let nodes = [(name("a"), view())];
    assert_eq!(ask(&wish(1, 99), &nodes).nodes.len(), 1);
    assert!(ask(&wish(1, 100), &nodes).nodes.is_empty());
}

#[test]
fn vms_are_packed_and_empty_hosts_sleep() {
    let nodes =
        [(name("empty"), view()), (name("half"), filled(view(), 5)), (name("some"), filled(view(), 2))];
    for seed in 0..100 {
        let wish = wish(2, 10);
        let question = Question { wish: &wish, members: &Members::default(), refused: &[], seed };
        let plan = plan(&question, nodes.iter().map(|(name, view)| fresh(name, view)));
        assert_eq!(plan.nodes, [name("half"), name("some"), name("empty")], "seed {seed}");
    }
}

#[test]
fn alike_nodes_are_chosen_between_by_chance() {
    let nodes: Vec<(Name, NodeView)> = (0..10).map(|n| (name(&format!("n{n}")), view())).collect();
    let wish = wish(2, 10);
    let first = |seed| {
        let question = Question { wish: &wish, members: &Members::default(), refused: &[], seed };
        plan(&question, nodes.iter().map(|(name, view)| fresh(name, view))).nodes.remove(0)
    };
    let chosen: std::collections::BTreeSet<Name> = (0..100).map(first).collect();
    assert!(chosen.len() >= 8, "{chosen:?}");
    assert_eq!(first(7), first(7));
}

#[test]
fn members_of_a_group_are_apart() {
    let other = NodeView { failure_domain: "rack-2".into(), ..view() };
    let nodes = [(name("a"), filled(view(), 5)), (name("b"), filled(view(), 5)), (name("c"), other)];
    let wish = wish(2, 10);
    let members = Members { nodes: vec![name("a")] };
    let question = Question { wish: &wish, members: &members, refused: &[], seed: 1 };
    let plan = plan(&question, nodes.iter().map(|(name, view)| fresh(name, view)));
    assert_eq!(plan.nodes, [name("c"), name("b")], "another rack first, the same node never");
    assert_eq!(left(&plan, "anti-affinity"), 2);
}

#[test]
fn baselines_contain_the_lower_ones() {
    let cases = [
        ("x86-64-v3", "x86-64-v2", true),
        ("x86-64-v2", "x86-64-v3", false),
        ("x86-64-v3", "", true),
        ("", "", true),
        ("", "x86-64-v1", false),
        ("icelake", "icelake", true),
        ("icelake", "x86-64-v3", false),
    ];
    for (has, wanted, suffices) in cases {
        assert_eq!(baseline_suffices(has, wanted), suffices, "{has} {wanted}");
    }
}

proptest! {
    #[test]
    fn what_is_planned_fits_and_counts_fall(
        rooms in prop::collection::vec((0_u64..20, 0_u64..200, 0_u64..20, 0_u64..200), 0..40),
        wish in (1_u64..20, 1_u64..200),
        seed: u64,
    ) {
        let nodes: Vec<(Name, NodeView)> = rooms.iter().enumerate().map(|(n, (vcpus, memory, used, taken))| {
            let allocatable = Need { vcpus: *vcpus, memory: *memory, storage: 0 };
            let promised = Need { vcpus: *used, memory: *taken, storage: 0 };
            (name(&format!("n{n}")), NodeView { allocatable, promised, overhead: 3, ..NodeView::default() })
        }).collect();
        let wish = super::tests::wish(wish.0, wish.1);
        let question = Question { wish: &wish, members: &Members::default(), refused: &[], seed };
        let plan = plan(&question, nodes.iter().map(|(name, view)| fresh(name, view)));
        let fitting = nodes.iter().filter(|(_, view)| {
            wish.need.vcpus + view.promised.vcpus <= view.allocatable.vcpus
                && wish.need.memory + 3 + view.promised.memory <= view.allocatable.memory
        });
        let fitting: Vec<&Name> = fitting.map(|(name, _)| name).collect();
        prop_assert_eq!(plan.nodes.len(), fitting.len().min(CANDIDATES_MAX));
        prop_assert!(plan.nodes.iter().all(|name| fitting.contains(&name)));
        prop_assert!(plan.filters.windows(2).all(|pair| pair[0].nodes >= pair[1].nodes));
    }
}
