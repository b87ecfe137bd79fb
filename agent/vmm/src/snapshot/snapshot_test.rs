//! Both files without a VM: what goes in comes out, and nothing damaged does.

use std::os::unix::fs::{FileExt, MetadataExt};

use proptest::prelude::*;
use serio_hv::vm_memory::{Bytes, GuestAddress};
use serio_hv::{VcpuState, VmState};
use serio_virtio::FunctionState;

use super::*;
use crate::machine::PlatformState;

fn machine() -> MachineState {
    let vcpu = |at: u8| VcpuState { regs: vec![at; 144], lapic: vec![7; 1024], ..VcpuState::default() };
    let function = |at: u8| FunctionState { config: vec![at; 256], virtio: None };
    MachineState {
        vcpus: vec![vcpu(1), vcpu(2)],
        vm: VmState { irqchips: vec![vec![3; 520]; 3], clock_ns: Some(12_345), saved_at_ns: Some(67) },
        functions: vec![function(4), function(5), function(6)],
        platform: PlatformState { serial_input: b"typed".to_vec(), ..PlatformState::default() },
    }
}

/// As older programs saved it.
fn plain() -> Snapshot {
    Snapshot { memory_bytes: 1 << 30, machine: machine(), sums: None, link: None, base: None }
}

/// One that holds what changed since another.
fn diff() -> Snapshot {
    let pages = PageSet::of_words(vec![6, 0, 1 << 63], 1 << 30);
    let (bytes, crc) = format::encode(&plain());
    assert_eq!(format::decode(&bytes).expect("whole"), plain());
    let link = Some(Link { id: [2; 16], crc });
    Snapshot { link, base: Some((Link { id: [1; 16], crc: 77 }, pages)), ..plain() }
}

#[test]
fn a_state_comes_back_as_it_was() {
    let encode = |snapshot: &Snapshot| format::encode(snapshot).0;
    let back = |snapshot: &Snapshot| format::decode(&encode(snapshot)).expect("whole");
    assert_eq!(back(&plain()), plain());
    assert_eq!(back(&diff()), diff());
    // Who does not know diffs refuses it, and says so.
    assert_eq!((encode(&plain())[36], encode(&diff())[36]), (1, 2));
    let mut sums = Sums::of_zeros(1 << 30);
    sums.add(5 << 20, &[7; 4096]);
    let with_sums = Snapshot { sums: Some(sums), ..plain() };
    assert_eq!(back(&with_sums), with_sums);
    // As many as another memory would have.
    let said =
        format::decode(&encode(&Snapshot { memory_bytes: 1 << 29, ..with_sums })).expect_err("refused");
    assert!(said.to_string().contains("number of checksums"), "{said}");
}

#[test]
fn any_changed_bit_and_any_cut_is_noticed_and_says_where() {
    let diff = diff();
    let (bytes, _) = format::encode(&diff);
    for at in 0..bytes.len() {
        let mut broken = bytes.clone();
        broken[at] ^= 0x10;
        match format::decode(&broken) {
            // Only what fills up to eight bytes is not covered.
            Ok(again) => assert!(Snapshot { link: diff.link, ..again } == diff, "byte {at}"),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
        assert!(format::decode(&bytes[..at]).is_err(), "cut at {at}");
    }
    let (bytes, _) = format::encode(&plain());
    let mut broken = bytes.clone();
    let within = 32 + 32 + 16 + 32 + 100;
    broken[within] ^= 1;
    let said = format::decode(&broken).expect_err("refused").to_string();
    assert!(said.contains("the checksum of vcpu 0 at byte 80 is wrong"), "{said}");
    let said = format::decode(&bytes[..within]).expect_err("refused").to_string();
    assert!(said.contains("ends at byte 212"), "{said}");
    let mut longer = bytes;
    longer.push(0);
    assert!(format::decode(&longer).is_err());
    assert!(matches!(format::decode(b"#!/bin/sh"), Err(FormatError::Magic)));
}

proptest! {
    /// With right checksums too: whatever the payload says, it is read or refused.
    #[test]
    fn any_bytes(tail in prop::collection::vec(any::<u8>(), 0..200), flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8)) {
        let (mut bytes, _) = format::encode(&diff());
        for (at, value) in flips {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        bytes.extend(tail);
        let _ = format::decode(&bytes);
    }
}

#[test]
fn memory_is_written_sparsely_and_mapped_again() {
    let bytes = 64 << 20;
    let memory = serio_hv::create_memory(bytes).expect("memory");
    memory.write_slice(&[1; 5000], GuestAddress(0x1_0ffe)).expect("RAM");
    memory.write_slice(&[0; 1 << 20], GuestAddress(8 << 20)).expect("RAM");
    memory.write_slice(b"the end", GuestAddress(bytes - 7)).expect("RAM");
    let dir = tempfile::tempdir().expect("a directory");
    let open = |name: &str| {
        File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(dir.path().join(name))
            .expect("opened")
    };
    let (state_file, memory_file) = (open("state"), open("memory"));
    // Something older, and longer.
    memory_file.set_len(2 * bytes).expect("set");
    memory::replace(&state_file, &[9; 100_000]).expect("written");
    let written = write(&memory, machine(), Point::default(), (&state_file, &memory_file)).expect("written");
    sync((&state_file, &memory_file)).expect("synced");
    assert_eq!(written.memory_bytes, 4 * 4096, "three pages for the first, one for the last, none for zeros");
    let about = memory_file.metadata().expect("known");
    assert_eq!(about.len(), bytes);
    assert!(about.blocks() * 512 < 1 << 20, "{} blocks", about.blocks());

    let snapshot = read(&state_file).expect("whole");
    assert_eq!((snapshot.memory_bytes, &snapshot.machine), (bytes, &machine()));
    let open_again = |file: &File| chain::open(&[(snapshot.clone(), file.try_clone().expect("cloned"))]);
    let (one, two) = (open_again(&memory_file).expect("mapped"), open_again(&memory_file).expect("mapped"));
    one.write_slice(b"mine", GuestAddress(bytes - 7)).expect("RAM");
    let tail = |memory: &GuestMemory| {
        let mut bytes_read = [0; 7];
        memory.read_slice(&mut bytes_read, GuestAddress(bytes - 7)).expect("RAM");
        bytes_read
    };
    assert_eq!((&tail(&one), &tail(&two), &tail(&memory)), (b"mineend", b"the end", b"the end"));
    // A restored VM is saved again, with what it has changed.
    let again = open("again");
    write(&one, machine(), Point::default(), (&open("state2"), &again)).expect("written");
    let third = open_again(&again).expect("mapped");
    assert_eq!(&tail(&third), b"mineend");
    let mut first: [u8; 3] = [0; 3];
    third.read_slice(&mut first, GuestAddress(0x1_0ffd)).expect("RAM");
    assert_eq!(first, [0, 1, 1]);

    memory_file.set_len(bytes - 4096).expect("set");
    assert!(matches!(open_again(&memory_file), Err(ReadError::Memory(_))));
}

/// One changed bit anywhere, a page that is lost and one that was none: each is noticed, and the place is named.
#[test]
fn damaged_memory_is_noticed() {
    const PLACES: [u64; 5] = [0x1_0ffe, (2 << 20) - 1, 2 << 20, 9 << 20, (64 << 20) - 1];
    let bytes = 64 << 20;
    let memory = serio_hv::create_memory(bytes).expect("memory");
    for at in PLACES {
        memory.write_slice(&[1], GuestAddress(at)).expect("RAM");
    }
    let (state_file, memory_file) =
        (tempfile::tempfile().expect("a file"), tempfile::tempfile().expect("a file"));
    write(&memory, machine(), Point::default(), (&state_file, &memory_file)).expect("written");
    let snapshot = read(&state_file).expect("whole");
    let sums = snapshot.sums.expect("just made");
    let check = || sums.check(&memory_file, None, || true);
    check().expect("as saved");
    // A copy without holes is the same memory.
    memory_file.write_all_at(&[0; 8192], 30 << 20).expect("written");
    check().expect("as saved");
    for at in PLACES.into_iter().chain([0, 30 << 20, 40 << 20]) {
        let mut byte = [0];
        memory_file.read_exact_at(&mut byte, at).expect("read");
        for bit in [1, 0x80] {
            memory_file.write_all_at(&[byte[0] ^ bit], at).expect("written");
            match check() {
                Err(CheckError::Damaged { offset }) => assert_eq!(offset, at & !((2 << 20) - 1)),
                other => panic!("{at:#x}: {other:?}"),
            }
        }
        memory_file.write_all_at(&byte, at).expect("written");
        check().expect("as saved");
    }
    // Two pages change places.
    memory_file.write_all_at(&[0; 4096], 0x1_0000).expect("written");
    memory_file.write_all_at(&[1], 0x2_0ffe).expect("written");
    assert!(matches!(check(), Err(CheckError::Damaged { offset: 0 })));
    sums.check(&memory_file, None, || false).expect("given up");
    memory_file.set_len(9 << 20).expect("set");
    assert!(check().is_err());
}
