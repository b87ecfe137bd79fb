//! The ledger against a naive one that keeps a list and adds everything up anew.

use proptest::prelude::*;

use super::*;

const GIB: u64 = 1 << 30;

fn capacity() -> Capacity {
    let node = |id| NumaTotal { id, cpus: 4, memory_bytes: 9 * GIB, reserved_bytes: GIB };
    let mut capacity = Capacity::of(&[node(0), node(1)], 2.0, 100 * GIB);
    capacity.generation = 7;
    capacity
}

fn amount(vcpus: u64, gib: u64, storage: u64) -> Quota {
    Quota { vcpus, memory_bytes: gib * GIB, storage_bytes: storage * GIB }
}

fn ask(name: &str, amount: Quota) -> Ask {
    let want =
        Want { key: name.to_owned(), resource: format!("vdcs/a/vms/{name}"), amount, ..Want::default() };
    Ask { want, ttl_ms: 1000, expected_generation: 0, token: format!("t-{name}") }
}

fn wished(name: &str, amount: Quota, wish: Wish) -> Ask {
    let mut ask = ask(name, amount);
    ask.want.wish = wish;
    ask
}

const NONE: Quota = Quota { vcpus: 0, memory_bytes: 0, storage_bytes: 0 };

#[test]
fn totals_less_what_is_kept_times_the_ratio() {
    let capacity = capacity();
    assert_eq!(capacity.total, amount(16, 16, 100));
    assert_eq!(capacity.nodes[1], NumaLimit { id: 1, vcpus: 8, memory_bytes: 8 * GIB });
    assert_eq!(Capacity::of(&[], f64::NAN, 0).total, NONE);
}

#[test]
fn a_promise_lives_until_its_ttl_or_for_good_once_committed() {
    let mut ledger = Ledger::new(capacity());
    ledger.reserve(0, &NONE, ask("a", amount(1, 1, 1))).unwrap();
    ledger.reserve(0, &NONE, ask("b", amount(1, 1, 1))).unwrap();
    ledger.commit(999, "t-a").unwrap();
    assert_eq!(ledger.next_expiry(), Some(1000));
    assert_eq!(ledger.commit(1000, "t-b").unwrap_err(), Veto::Expired { token: "t-b".into() });
    assert_eq!(ledger.release(1000, "t-b").unwrap_err(), Veto::Expired { token: "t-b".into() });
    assert_eq!(ledger.open(None), amount(1, 1, 1));
    ledger.commit(5000, "t-a").unwrap();
    ledger.release(5000, "t-a").unwrap();
    assert_eq!(ledger.release(5000, "t-a").unwrap_err(), Veto::UnknownToken { token: "t-a".into() });
    assert_eq!(ledger.open(None), NONE);
}

#[test]
fn a_key_has_one_promise_and_one_content() {
    let mut ledger = Ledger::new(capacity());
    ledger.reserve(0, &NONE, ask("a", amount(1, 1, 0))).unwrap();
    let again = Ask { token: "t-other".into(), ..ask("a", amount(1, 1, 0)) };
    let promise = ledger.reserve(400, &NONE, again).unwrap();
    assert_eq!((promise.token.as_str(), promise.left(400)), ("t-a", 600));
    let other = ledger.reserve(400, &NONE, ask("a", amount(2, 1, 0))).unwrap_err();
    assert!(matches!(other, Veto::Invalid { what: "key", .. }), "{other}");
    // A token is never used twice, not even after its end.
    ledger.expire(1000);
    let old = ledger.reserve(1000, &NONE, ask("a", amount(1, 1, 0))).unwrap_err();
    assert!(matches!(old, Veto::Invalid { what: "token", .. }), "{old}");
}

#[test]
fn what_is_short_is_said_with_all_numbers() {
    let mut ledger = Ledger::new(Capacity { vm_overhead_bytes: 10 << 20, ..capacity() });
    let full = ledger.reserve(0, &amount(0, 9, 0), ask("a", amount(1, 7, 0))).unwrap_err();
    let Veto::Full(short) = &full else { panic!("{full}") };
    assert_eq!((short.resource, short.numa_node), (Resource::Memory, None));
    assert_eq!((short.asked, short.limit, short.used), (7 * GIB + (10 << 20), 16 * GIB, 9 * GIB));
    assert_eq!(
        full.to_string(),
        "memory: 7178MiB asked, 7GiB available: the capacity of this node is 16GiB, of which 9GiB is promised; ask for less, or \
         use another node"
    );
    // Storage alone has no VMM.
    ledger.reserve(0, &amount(0, 16, 0), ask("disk", amount(0, 0, 100))).unwrap();
    let stale = ledger.reserve(0, &NONE, Ask { expected_generation: 6, ..ask("b", amount(1, 1, 0)) });
    assert_eq!(stale.unwrap_err(), Veto::Stale { expected: 6, current: 7 });
}

#[test]
fn a_plan_is_stale_when_the_capacity_has_changed_and_not_when_its_use_has() {
    let mut ledger = Ledger::new(capacity());
    let planned = |ledger: &mut Ledger, name: &str, expected_generation| {
        ledger.reserve(0, &NONE, Ask { expected_generation, ..ask(name, amount(1, 1, 0)) }).map(drop)
    };
    // Inventories follow each other with what was promised, and with other numbers of no matter here.
    for generation in 8..=9 {
        ledger.set_capacity(Capacity { generation, ..capacity() });
    }
    assert_eq!(planned(&mut ledger, "a", 7), Ok(()));
    assert_eq!(planned(&mut ledger, "b", 9), Ok(()));
    assert_eq!(planned(&mut ledger, "c", 10), Err(Veto::Stale { expected: 10, current: 9 }));
    ledger.set_capacity(Capacity { generation: 10, vm_overhead_bytes: 1 << 20, ..capacity() });
    assert_eq!(planned(&mut ledger, "d", 9), Err(Veto::Stale { expected: 9, current: 10 }));
    assert_eq!(planned(&mut ledger, "d", 10), Ok(()));
    // Another life of the inventory.
    ledger.set_capacity(Capacity { generation: 3, vm_overhead_bytes: 1 << 20, ..capacity() });
    assert_eq!(planned(&mut ledger, "e", 3), Ok(()));
}

#[test]
fn a_wish_for_one_numa_node_is_kept() {
    let mut ledger = Ledger::new(capacity());
    let node = |ledger: &mut Ledger, name: &str, gib, wish| {
        ledger.reserve(0, &NONE, wished(name, amount(1, gib, 0), wish)).map(|p| p.numa_node)
    };
    assert_eq!(node(&mut ledger, "a", 3, Wish::Node(1)), Ok(Some(1)));
    assert_eq!(node(&mut ledger, "b", 4, Wish::OneNode), Ok(Some(1)), "the fullest that holds it");
    assert_eq!(node(&mut ledger, "c", 2, Wish::OneNode), Ok(Some(0)));
    let Err(Veto::Full(short)) = node(&mut ledger, "d", 7, Wish::OneNode) else { panic!("fits nowhere") };
    assert_eq!((short.numa_node, short.available()), (Some(0), 6 * GIB), "the roomier one is named");
    assert_eq!(node(&mut ledger, "d", 7, Wish::Any), Ok(None));
    // 9 on nodes, 7 anywhere: all is promised.
    assert!(matches!(node(&mut ledger, "e", 1, Wish::Node(0)), Err(Veto::Full(_))));
    assert!(matches!(node(&mut ledger, "f", 0, Wish::Node(9)), Err(Veto::Invalid { what: "numa_node", .. })));
}

#[test]
fn a_vm_takes_its_promise_and_gives_it_back() {
    let mut ledger = Ledger::new(capacity());
    ledger.reserve(0, &NONE, ask("web", amount(2, 4, 10))).unwrap();
    let vm = "vdcs/a/vms/web";
    let other = ledger.take(0, "t-web", "u1", ("vdcs/a/vms/db", &amount(1, 1, 1))).unwrap_err();
    assert_eq!(other.to_string(), "reservation: is for vdcs/a/vms/web, not for vdcs/a/vms/db");
    let large = ledger.take(0, "t-web", "u1", (vm, &amount(2, 5, 1))).unwrap_err();
    assert_eq!(large.to_string(), "reservation: promises 4GiB of memory, the VM needs 5GiB: reserve anew");
    ledger.take(0, "t-web", "u1", (vm, &amount(2, 4, 10))).unwrap();
    assert_eq!((ledger.open(None), ledger.taken()), (NONE, amount(2, 4, 10)));
    let twice = ledger.take(0, "t-web", "u2", (vm, &amount(2, 4, 10))).unwrap_err();
    assert_eq!(twice, Veto::Taken { token: "t-web".into(), vm: "u1".into() });
    assert_eq!(ledger.release(0, "t-web").unwrap_err(), twice);
    // Taken is committed: its ttl is over, and so it is after an undo.
    assert!(ledger.expire(1 << 40).is_empty());
    assert_eq!(ledger.undo("u1").as_deref(), Some("t-web"));
    assert_eq!(ledger.open(None), amount(2, 4, 10));
    ledger.take(1 << 40, "t-web", "u2", (vm, &amount(1, 1, 1))).unwrap();
    assert_eq!(ledger.freed("u2").as_deref(), Some("t-web"));
    assert_eq!((ledger.freed("u2"), ledger.promises().count()), (None, 0));
}

#[test]
fn a_drain_refuses_what_is_new_and_keeps_what_is() {
    let mut ledger = Ledger::new(capacity());
    ledger.reserve(0, &NONE, ask("a", amount(1, 1, 0))).unwrap();
    assert!(ledger.drain("").is_err());
    ledger.drain("new disks").unwrap();
    let drained = Veto::Drained { reason: "new disks".into() };
    assert_eq!(ledger.reserve(0, &NONE, ask("b", amount(1, 1, 0))).unwrap_err(), drained);
    assert_eq!(ledger.take(0, "t-a", "u", ("vdcs/a/vms/a", &NONE)).unwrap_err(), drained);
    assert!(ledger.reserve(0, &NONE, ask("a", amount(1, 1, 0))).is_ok(), "a repetition");
    ledger.commit(0, "t-a").unwrap();
    ledger.undrain();
    ledger.reserve(0, &NONE, ask("b", amount(1, 1, 0))).unwrap();
}

#[test]
fn a_fence_ends_what_is_older_and_stays() {
    let mut ledger = Ledger::new(capacity());
    let under = |name: &str, fence| {
        let mut ask = ask(name, amount(1, 1, 0));
        ask.want.fence = fence;
        ask
    };
    for (name, fence) in [("old", 1), ("vm", 1), ("new", 5)] {
        ledger.reserve(0, &NONE, under(name, fence)).unwrap();
    }
    ledger.take(0, "t-vm", "u", ("vdcs/a/vms/vm", &NONE)).unwrap();
    let ended = ledger.fence(5).unwrap();
    assert_eq!(ended, Ended { tokens: vec!["t-old".into()], vms: vec!["u".into()] });
    let fenced = Veto::Fenced { asked: 4, in_force: 5 };
    assert_eq!(ledger.fence(4).unwrap_err(), fenced);
    assert_eq!(ledger.reserve(0, &NONE, under("x", 4)).unwrap_err(), fenced);
    assert!(ledger.commit(0, "t-old").is_err());
    assert!(matches!(ledger.fence_one("t-new", 5), Err(Veto::Fenced { .. })));
    assert_eq!(ledger.fence_one("t-new", 6).unwrap().tokens, ["t-new"]);
    assert_eq!(ledger.fence_generation(), 5);
}

#[test]
fn dr_held_is_counted_apart_and_both_fill_the_node() {
    let mut ledger = Ledger::new(capacity());
    let mut held = ask("dr", amount(1, 10, 0));
    held.want.class = Class::DrHeld;
    ledger.reserve(0, &NONE, held).unwrap();
    assert_eq!(ledger.open(Some(Class::DrHeld)), amount(1, 10, 0));
    assert_eq!(ledger.open(Some(Class::Normal)), NONE);
    assert!(ledger.reserve(0, &NONE, ask("a", amount(1, 7, 0))).is_err());
    ledger.reserve(0, &NONE, ask("a", amount(1, 6, 0))).unwrap();
    assert_eq!(ledger.open(None), amount(2, 16, 0));
}

#[test]
fn what_was_kept_over_a_restart_is_as_before() {
    let mut ledger = Ledger::new(capacity());
    for name in ["a", "b"] {
        ledger.reserve(0, &NONE, ask(name, amount(1, 1, 0))).unwrap();
        ledger.commit(0, &format!("t-{name}")).unwrap();
    }
    ledger.take(0, "t-b", "u", ("vdcs/a/vms/b", &NONE)).unwrap();
    ledger.drain("r").unwrap();
    let mut next = Ledger::new(capacity());
    ledger.fence(0).unwrap();
    let kept = ledger.promises().cloned().collect();
    next.restore(kept, ledger.drained().map(str::to_owned), ledger.fence_generation());
    assert_eq!(next, ledger);
    // The key is known again: a repetition is no second promise, even while the node is drained.
    assert_eq!(next.reserve(9000, &NONE, ask("a", amount(1, 1, 0))).unwrap().token, "t-a");
}

#[derive(Debug, Clone)]
enum Step {
    Reserve { name: u8, amount: Quota, wish: Wish, ttl: u64, fence: u64 },
    Commit(u8),
    Release(u8),
    Take(u8),
    Undo(u8),
    Free(u8),
    Wait(u64),
    Drain(bool),
    Fence(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let name = || 0_u8..12;
    let wish = prop_oneof![Just(Wish::Any), Just(Wish::OneNode), (0_u32..3).prop_map(Wish::Node)];
    let amount = (0_u64..6, 0_u64..6, 0_u64..40).prop_map(|(v, m, s)| amount(v, m, s));
    prop_oneof![
        6 => (name(), amount, wish, 1_u64..50, 0_u64..4)
            .prop_map(|(name, amount, wish, ttl, fence)| Step::Reserve { name, amount, wish, ttl, fence }),
        4 => name().prop_map(Step::Commit),
        2 => name().prop_map(Step::Release),
        4 => name().prop_map(Step::Take),
        1 => name().prop_map(Step::Undo),
        2 => name().prop_map(Step::Free),
        3 => (0_u64..40).prop_map(Step::Wait),
        1 => any::<bool>().prop_map(Step::Drain),
        1 => (0_u64..4).prop_map(Step::Fence),
    ]
}

/// A promise as the oracle keeps it: no index, no stage machine.
#[derive(Debug, Clone, PartialEq)]
struct Row {
    token: String,
    name: u8,
    amount: Quota,
    wish: Wish,
    node: Option<u32>,
    until: Option<u64>,
    taken: bool,
    fence: u64,
}

#[derive(Debug, Default)]
struct Oracle {
    rows: Vec<Row>,
    drained: bool,
    fence: u64,
}

const OVERHEAD: u64 = 64 << 20;

impl Oracle {
    fn row(&mut self, name: u8) -> Option<&mut Row> {
        self.rows.iter_mut().find(|row| row.name == name)
    }

    /// What lies on a node, or everywhere.
    fn used(&self, node: Option<u32>) -> (u64, u64, u64) {
        let rows = self.rows.iter().filter(|row| node.is_none() || row.node == node);
        rows.fold((0, 0, 0), |(vcpus, memory, storage), row| {
            let overhead = if row.amount.vcpus > 0 { OVERHEAD } else { 0 };
            (
                vcpus + row.amount.vcpus,
                memory + row.amount.memory_bytes + overhead,
                storage + row.amount.storage_bytes,
            )
        })
    }

    fn within(&self) -> bool {
        let (vcpus, memory, storage) = self.used(None);
        let whole = vcpus <= 16 && memory <= 16 * GIB && storage <= 100 * GIB;
        whole && (0..2).all(|id| matches!(self.used(Some(id)), (v, m, _) if v <= 8 && m <= 8 * GIB))
    }

    /// Whether a row would fit, on one of the nodes if it wishes so.
    fn fits(&mut self, row: Row) -> bool {
        let nodes = match row.wish {
            Wish::Any => vec![None],
            Wish::OneNode => vec![Some(0), Some(1)],
            Wish::Node(id) if id < 2 => vec![Some(id)],
            Wish::Node(_) => Vec::new(),
        };
        nodes.into_iter().any(|node| {
            self.rows.push(Row { node, ..row.clone() });
            let within = self.within();
            self.rows.pop();
            within
        })
    }
}

/// Does a step on both; the answers must agree.
fn both(ledger: &mut Ledger, oracle: &mut Oracle, now: &mut u64, count: usize, step: Step) {
    let token_of =
        |oracle: &mut Oracle, name| oracle.row(name).map_or("none".to_owned(), |row| row.token.clone());
    match step {
        Step::Reserve { .. } => reserve(ledger, oracle, *now, count, step),
        Step::Commit(name) => {
            let token = token_of(oracle, name);
            assert_eq!(ledger.commit(*now, &token).is_ok(), oracle.row(name).is_some());
            oracle.row(name).into_iter().for_each(|row| row.until = None);
        }
        Step::Release(name) => {
            let token = token_of(oracle, name);
            let yes = oracle.row(name).is_some_and(|row| !row.taken);
            assert_eq!(ledger.release(*now, &token).is_ok(), yes);
            oracle.rows.retain(|row| row.name != name || !yes);
        }
        Step::Take(name) => {
            let token = token_of(oracle, name);
            let yes = !oracle.drained && oracle.row(name).is_some_and(|row| !row.taken);
            let resource = format!("vdcs/a/vms/{name}");
            let said = ledger.take(*now, &token, &format!("vm{name}"), (&resource, &NONE));
            assert_eq!(said.is_ok(), yes, "{said:?}");
            if let Some(row) = oracle.row(name).filter(|_| yes) {
                (row.taken, row.until) = (true, None);
            }
        }
        Step::Undo(name) => {
            let row = oracle.row(name).filter(|row| row.taken);
            assert_eq!(ledger.undo(&format!("vm{name}")), row.as_ref().map(|row| row.token.clone()));
            row.into_iter().for_each(|row| row.taken = false);
        }
        Step::Free(name) => {
            let token = oracle.row(name).filter(|row| row.taken).map(|row| row.token.clone());
            assert_eq!(ledger.freed(&format!("vm{name}")), token);
            oracle.rows.retain(|row| row.name != name || !row.taken);
        }
        Step::Wait(ms) => {
            *now += ms;
            let late = ledger.expire(*now).len();
            let before = oracle.rows.len();
            oracle.rows.retain(|row| row.until.is_none_or(|until| until > *now));
            assert_eq!(before - oracle.rows.len(), late);
        }
        Step::Drain(_) | Step::Fence(_) => drain_or_fence(ledger, oracle, step),
    }
}

fn reserve(ledger: &mut Ledger, oracle: &mut Oracle, now: u64, count: usize, step: Step) {
    let Step::Reserve { name, amount, wish, ttl, fence } = step else { return };
    let mut ask = wished(&name.to_string(), amount, wish);
    (ask.ttl_ms, ask.want.fence, ask.token) = (ttl, fence, format!("t{count}"));
    let outside = ledger.taken();
    let said = ledger.reserve(now, &outside, ask).cloned();
    let row = Row {
        token: format!("t{count}"),
        name,
        amount,
        wish,
        node: said.as_ref().ok().and_then(|p| p.numa_node),
        until: Some(now + ttl),
        taken: false,
        fence,
    };
    let allowed = amount != NONE && fence >= oracle.fence;
    match oracle.row(name).cloned() {
        Some(known) => {
            let same = allowed && known.amount == amount && known.wish == wish && known.fence <= fence;
            assert_eq!(said.map(|p| p.token).ok(), same.then_some(known.token));
        }
        None => {
            let yes = allowed && !oracle.drained && oracle.fits(row.clone());
            assert_eq!(said.is_ok(), yes, "{said:?}");
            oracle.rows.extend(yes.then_some(row));
        }
    }
}

fn drain_or_fence(ledger: &mut Ledger, oracle: &mut Oracle, step: Step) {
    match step {
        Step::Drain(yes) => {
            if yes {
                ledger.drain("why").unwrap()
            } else {
                ledger.undrain()
            }
            oracle.drained = yes;
        }
        Step::Fence(generation) => {
            let said = ledger.fence(generation);
            assert_eq!(said.is_ok(), generation >= oracle.fence);
            if let Ok(ended) = said {
                oracle.fence = generation;
                let (old, kept): (Vec<Row>, _) =
                    oracle.rows.drain(..).partition(|row| row.fence < generation);
                assert_eq!(ended.tokens.len() + ended.vms.len(), old.len());
                // A VM is its owner's to end: here it stays until it is freed.
                oracle.rows = kept;
                oracle.rows.extend(old.into_iter().filter(|row| row.taken));
            }
        }
        _ => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn never_over_capacity_and_no_promise_lost_or_doubled(steps in proptest::collection::vec(step(), 1..120)) {
        let mut ledger = Ledger::new(Capacity { vm_overhead_bytes: OVERHEAD, ..capacity() });
        let (mut oracle, mut now) = (Oracle::default(), 0);
        for (count, step) in steps.into_iter().enumerate() {
            both(&mut ledger, &mut oracle, &mut now, count, step);
            prop_assert!(oracle.within());
            let mut mine: Vec<_> = ledger
                .promises()
                .map(|p| (p.token.clone(), p.want.amount, p.numa_node, matches!(p.stage, Stage::Taken(_))))
                .collect();
            let mut rows: Vec<_> =
                oracle.rows.iter().map(|r| (r.token.clone(), r.amount, r.node, r.taken)).collect();
            mine.sort_by(|a, b| a.0.cmp(&b.0));
            rows.sort_by(|a, b| a.0.cmp(&b.0));
            prop_assert_eq!(mine, rows);
            prop_assert_eq!(ledger.keys.len(), ledger.promises.len());
        }
    }
}
