//! The store over real files: what was written comes back, and what is not usable is refused.

use serio_types::{Desired, Generation, Quota, RestartPolicy, VdcLimits, VmSpec};

use super::*;
use crate::record::*;

fn vdc(name: &str) -> VdcRecord {
    VdcRecord {
        uid: Uuid::new_v4(),
        name: name.parse().unwrap(),
        generation: Generation::FIRST,
        create_time: Millis(1),
        quota: Quota { vcpus: 4, memory_bytes: 1 << 32, storage_bytes: 1 << 40 },
        limits: VdcLimits { weight: 7, snapshots: 3, ..VdcLimits::default() },
        encryption: Encryption::Encrypted,
    }
}

fn vm(vdc: Uuid, volume: Uuid) -> VmRecord {
    VmRecord {
        uid: Uuid::new_v4(),
        vdc,
        name: "web".parse().unwrap(),
        generation: Generation(7),
        create_time: Millis(2),
        spec: VmSpec {
            vcpus: 2.try_into().unwrap(),
            memory: (64 << 20).try_into().unwrap(),
            image: "tiny".parse().unwrap(),
            root_disk: None,
            volumes: vec!["data".parse().unwrap()],
            nics: vec![serio_types::NicSpec {
                mac: Some("52:54:00:12:34:56".parse().unwrap()),
                ..Default::default()
            }],
            cmdline: Some("quiet".to_owned().try_into().unwrap()),
            cloud_init: Some(serio_types::CloudInit::default()),
            restart_policy: RestartPolicy::Always,
            boot: serio_types::BootFrom::Disk,
            machine: serio_types::MachineSpec { vsock: true, mtu: 9000, ..Default::default() },
        },
        root_volume: volume,
        desired: Desired::Running,
        run: Run::Killing,
        start_time: Some(Millis(5)),
        last_end: Some(End { time: Millis(6), kind: EndWord::GuestError, reason: "triple fault".to_owned() }),
        restarts: 3,
        kernel: Some(serio_types::BootedKernel { path: "/vmlinuz".to_owned(), ..Default::default() }),
        restore: Some(Uuid::new_v4()),
    }
}

fn volume(vdc: Uuid) -> VolumeRecord {
    VolumeRecord {
        uid: Uuid::new_v4(),
        vdc,
        name: "web-root".parse().unwrap(),
        generation: Generation::FIRST,
        create_time: Millis(3),
        state: Made::Creating,
        size_bytes: 1 << 30,
        source_image: Some("tiny".parse().unwrap()),
        source_snapshot: Some("vdcs/a/volumes/b/snapshots/c".to_owned()),
        unsure: true,
        vm: None,
    }
}

fn operation(volume: Uuid) -> OperationRecord {
    OperationRecord {
        uid: Uuid::new_v4(),
        kind: OperationKind::DeleteSnapshot,
        target: "vdcs/ardesio/volumes/web-root/snapshots/before".to_owned(),
        subject: Some(volume),
        point: Some("before".parse().unwrap()),
        state: OperationState::Running,
        done_bytes: 1,
        total_bytes: 2,
        error: String::new(),
        create_time: Millis(4),
        end_time: None,
    }
}

#[test]
fn what_was_written_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.db");
    let (mut store, empty) = Store::open(&path).unwrap();
    assert_eq!(empty, Contents::default());
    let (vdc, node) = (vdc("ardesio"), Uuid::new_v4());
    let volume = volume(vdc.uid);
    let vm = vm(vdc.uid, volume.uid);
    let snapshot = SnapshotRecord {
        volume: volume.uid,
        name: "before".parse().unwrap(),
        number: 1,
        create_time: Millis(9),
        state: Made::Ready,
        size_bytes: 5,
        group: Some(Uuid::new_v4()),
        class: PointClass::App,
        reason: "r".to_owned(),
    };
    let operation = operation(volume.uid);
    let (spec, bases) = (vm.spec.clone(), vec![Uuid::new_v4(), Uuid::new_v4()]);
    let vdc_snapshot = VdcSnapshotRecord {
        saved: Some(Box::new(SavedVm { vm: vm.uid, spec, memory_bytes: 7, paused_ns: 9, bases })),
        uid: Uuid::new_v4(),
        vdc: vdc.uid,
        name: "monday".parse().unwrap(),
        create_time: Millis(8),
        state: Made::Creating,
    };
    store
        .commit(&[
            Change::Node(node),
            Change::Vdc(vdc.clone()),
            Change::Vm(Box::new(vm.clone())),
            Change::Volume(volume.clone()),
            Change::Snapshot(snapshot.clone()),
            Change::Operation(operation.clone()),
            Change::VdcSnapshot(vdc_snapshot.clone()),
        ])
        .unwrap();
    drop(store);
    let (mut store, contents) = Store::open(&path).unwrap();
    assert_eq!(contents.node, Some(node));
    assert_eq!((contents.vdcs, contents.vms), (vec![vdc.clone()], vec![vm.clone()]));
    assert_eq!((contents.volumes, contents.snapshots), (vec![volume.clone()], vec![snapshot]));
    assert_eq!(
        (&contents.operations, &contents.vdc_snapshots),
        (&vec![operation.clone()], &vec![vdc_snapshot.clone()])
    );
    // A vdc with VMs cannot go, whatever the caller thinks; the whole commit is refused.
    assert!(
        store.commit(&[Change::Delete(Key::Volume(volume.uid)), Change::Delete(Key::Vdc(vdc.uid))]).is_err()
    );
    store
        .commit(&[
            Change::Delete(Key::Operation(operation.uid)),
            Change::Delete(Key::VdcSnapshot(vdc_snapshot.uid)),
            Change::Delete(Key::Vm(vm.uid)),
            Change::Delete(Key::Volume(volume.uid)),
            Change::Delete(Key::Vdc(vdc.uid)),
        ])
        .unwrap();
    drop(store);
    let (_, contents) = Store::open(&path).unwrap();
    assert_eq!(contents, Contents { node: Some(node), ..Contents::default() });
}

#[test]
fn a_commit_is_whole_or_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.db");
    let (mut store, _) = Store::open(&path).unwrap();
    let (a, b) = (vdc("same"), vdc("same"));
    assert!(store.commit(&[Change::Vdc(a), Change::Vdc(b)]).is_err());
    drop(store);
    assert_eq!(Store::open(&path).unwrap().1, Contents::default());
}

#[test]
fn events_are_bounded_and_requests_expire() {
    let dir = tempfile::tempdir().unwrap();
    let (mut store, _) = Store::open(&dir.path().join("state.db")).unwrap();
    let events: Vec<Change> = (1..=EVENTS_MAX + 5)
        .map(|number| {
            Change::Event(EventRecord {
                number,
                time: Millis(0),
                resource: "r".to_owned(),
                kind: "k".to_owned(),
                message: "m".to_owned(),
            })
        })
        .collect();
    store.commit(&events).unwrap();
    assert_eq!(store.events(0, 3).unwrap().iter().map(|e| e.number).collect::<Vec<_>>(), [6, 7, 8]);
    let request = |time| RequestRecord {
        id: Uuid::new_v4(),
        method: "CreateVm".to_owned(),
        digest: "d".to_owned(),
        resource: "vdcs/a/vms/b".to_owned(),
        time: Millis(time),
    };
    let (old, new) = (request(0), request(REQUEST_KEPT_MS + 1));
    store.commit(&[Change::Request(old.clone())]).unwrap();
    assert_eq!(store.request(old.id).unwrap(), Some(old.clone()));
    store.commit(&[Change::Request(new.clone())]).unwrap();
    assert_eq!(store.request(old.id).unwrap(), None);
    assert_eq!(store.request(new.id).unwrap(), Some(new));
}

#[test]
fn a_newer_schema_is_refused_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.db");
    let (store, _) = Store::open(&path).unwrap();
    store.connection.pragma_update(None, "user_version", 99).unwrap();
    drop(store);
    let error = Store::open(&path).unwrap_err();
    assert!(matches!(error, StoreError::Newer { found: 99, .. }));
    assert!(error.to_string().contains("install the newer seriod"), "{error}");
}

#[test]
fn a_damaged_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.db");
    std::fs::write(&path, "this is no database, though long enough to look like one".repeat(100)).unwrap();
    assert!(matches!(Store::open(&path), Err(StoreError::Damaged { .. })));
    assert!(matches!(Store::open(&dir.path().join("no/state.db")), Err(StoreError::Access { .. })));
}

#[test]
fn a_full_disk_says_so_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.db");
    let (mut store, _) = Store::open(&path).unwrap();
    let pages: u32 = store.connection.pragma_query_value(None, "page_count", |row| row.get(0)).unwrap();
    store.connection.pragma_update(None, "max_page_count", pages).unwrap();
    let changes: Vec<Change> = (0..1000).map(|i| Change::Vdc(vdc(&format!("v{i}")))).collect();
    let error = store.commit(&changes).unwrap_err();
    assert!(error.is_full(), "{error:?}");
    drop(store);
    assert_eq!(Store::open(&path).unwrap().1, Contents::default());
}

#[test]
fn what_was_ordered_comes_back_and_goes_with_its_vm() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.db");
    let (mut store, _) = Store::open(&path).unwrap();
    let vm = Uuid::now_v7();
    let reservation = |token: &str, vm| ReservationRecord {
        token: token.to_owned(),
        key: format!("key of {token}"),
        resource: "vdcs/a/vms/web".to_owned(),
        amount: Quota { vcpus: 1, memory_bytes: 2, storage_bytes: 3 },
        class: ReservationClass::DrHeld,
        wish: NumaWish::OneNode,
        numa_node: Some(1),
        fence_generation: 4,
        vm,
    };
    let orders = OrdersRecord { drain_reason: Some("new disks".to_owned()), fence_generation: 4 };
    let kept = [reservation("a", None), reservation("b", None)];
    let mut changes: Vec<Change> = kept.iter().cloned().map(|r| Change::Reservation(Box::new(r))).collect();
    changes.push(Change::Reservation(Box::new(reservation("b", Some(vm)))));
    let clock = |boot_ms| ClockRecord { boot_id: "a boot".to_owned(), boot_ms, steady: Millis(7) };
    changes.extend([Change::Orders(orders.clone()), Change::Fenced(vm, 4)]);
    changes.extend([Change::Clock(clock(1)), Change::Clock(clock(2))]);
    store.commit(&changes).unwrap();
    let contents = Store::open(&path).unwrap().1;
    assert_eq!(contents.reservations, [reservation("a", None), reservation("b", Some(vm))]);
    assert_eq!((contents.orders, contents.fenced), (orders, vec![(vm, 4)]));
    assert_eq!(contents.clock, Some(clock(2)));
    let gone = [Change::Delete(Key::Vm(vm)), Change::Delete(Key::Reservation("a".to_owned()))];
    store.commit(&gone).unwrap();
    let contents = Store::open(&path).unwrap().1;
    assert!(contents.reservations.is_empty() && contents.fenced.is_empty());
}
