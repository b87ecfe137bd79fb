//! Diffs without a VM: what a chain holds is what the memory was, and nothing that does not belong together is opened.

use std::os::unix::fs::{FileExt, MetadataExt};

use proptest::prelude::*;
use serio_hv::vm_memory::{Bytes, GuestAddress};

use super::chain::Layer;
use super::*;
use crate::machine::PlatformState;

const PAGES: u64 = 700;
const BYTES: u64 = PAGES * 4096;

fn machine(at: u8) -> MachineState {
    let platform = PlatformState { serial_input: vec![at], ..PlatformState::default() };
    MachineState { vcpus: Vec::new(), vm: serio_hv::VmState::default(), functions: Vec::new(), platform }
}

fn all(memory: &GuestMemory) -> Vec<u8> {
    let mut bytes = vec![0; BYTES as usize];
    memory.read_slice(&mut bytes, GuestAddress(0)).expect("RAM");
    bytes
}

/// Saves a memory: all of it, or these pages since that one.
fn save(memory: &GuestMemory, id: u8, since: Option<(Link, &PageSet)>) -> (Layer, u64) {
    let files = (tempfile::tempfile().expect("a file"), tempfile::tempfile().expect("a file"));
    let point = Point { id: Some([id; 16]), since };
    let written = write(memory, machine(id), point, (&files.0, &files.1)).expect("written");
    let snapshot = read(&files.0).expect("whole");
    assert_eq!(snapshot.link, written.link);
    ((snapshot, files.1), written.memory_bytes)
}

fn set(pages: impl IntoIterator<Item = u64>) -> PageSet {
    let mut words = vec![0; PAGES.div_ceil(64) as usize];
    pages.into_iter().for_each(|page| words[page as usize / 64] |= 1 << (page % 64));
    PageSet::of_words(words, BYTES)
}

fn again(layer: &Layer) -> Layer {
    (layer.0.clone(), layer.1.try_clone().expect("cloned"))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    /// Runs of pages are filled or zeroed, five times; each time the chain is what the memory is, and stays so.
    #[test]
    fn a_chain_is_the_memory_page_for_page(steps in prop::collection::vec(prop::collection::vec((0..PAGES, 1..80u64, any::<u8>()), 1..6), 5)) {
        let memory = serio_hv::create_memory(BYTES).expect("memory");
        memory.write_slice(&[9; 100 * 4096], GuestAddress(50 * 4096)).expect("RAM");
        let (full, _) = save(&memory, 0, None);
        let mut layers = vec![full];
        let mut was = vec![all(&memory)];
        for (id, step) in (1u8..).zip(steps) {
            let mut changed = Vec::new();
            for (from, len, value) in step {
                let to = (from + len).min(PAGES);
                let fill = vec![value & 0x83; ((to - from) * 4096) as usize];
                memory.write_slice(&fill, GuestAddress(from * 4096)).expect("RAM");
                changed.extend(from..to);
            }
            let pages = set(changed);
            let base = layers[0].0.link.expect("it has one");
            let (layer, written) = save(&memory, id, Some((base, &pages)));
            prop_assert!(written <= pages.count() * 4096);
            layer.0.sums.as_ref().expect("made").check(&layer.1, Some(&pages), || true).expect("as written");
            layers.insert(0, layer);
            was.insert(0, all(&memory));
        }
        for (first, was) in was.iter().enumerate() {
            let opened = chain::open(&layers[first..]).expect("opened");
            prop_assert!(&all(&opened) == was, "from {first} on");
        }
    }
}

#[test]
fn what_does_not_belong_together_is_refused() {
    let memory = serio_hv::create_memory(BYTES).expect("memory");
    let ((full, _), (stranger, _)) = (save(&memory, 1, None), save(&memory, 2, None));
    let base = full.0.link.expect("it has one");
    let (diff, _) = save(&memory, 3, Some((base, &set([1]))));
    let refused = |layers: &[&Layer]| {
        let layers: Vec<Layer> = layers.iter().map(|layer| again(layer)).collect();
        chain::open(&layers).expect_err("refused").to_string()
    };
    chain::open(&[again(&diff), again(&full)]).expect("they do");
    let said = refused(&[&diff]);
    assert!(said.contains("01010101") && said.contains("missing"), "{said}");
    let said = refused(&[&diff, &stranger]);
    assert!(said.contains("01010101") && said.contains("02020202") && said.contains("another one"), "{said}");
    assert!(refused(&[&full, &full]).contains("is whole"));
    assert!(refused(&[&diff, &diff, &full]).contains("another one"));
    assert!(refused(&vec![&diff; 33]).contains("33 snapshots"));
    assert!(chain::open(&[]).is_err());
    // The same id, of another machine.
    let mut forged = again(&full);
    forged.0.link.as_mut().expect("it has one").crc ^= 1;
    assert!(refused(&[&diff, &forged]).contains("another one"));
    let smaller = serio_hv::create_memory(BYTES / 2).expect("memory");
    let mut other = save(&smaller, 1, None).0;
    other.0.link = Some(base);
    assert!(refused(&[&diff, &other]).contains("bytes of memory"));
}

/// What lies in a diff's file outside of its pages is nobody's; what is one of them and has changed is noticed.
#[test]
fn a_diff_is_sparse_and_its_damage_is_noticed() {
    let memory = serio_hv::create_memory(BYTES).expect("memory");
    memory.write_slice(&vec![7; BYTES as usize], GuestAddress(0)).expect("RAM");
    let (full, _) = save(&memory, 1, None);
    memory.write_slice(&[0; 40 * 4096], GuestAddress(100 * 4096)).expect("RAM");
    let pages = set((100..140).chain([300]));
    let (diff, written) = save(&memory, 2, Some((full.0.link.expect("it has one"), &pages)));
    assert_eq!(written, 4096, "zeros are in the list only");
    assert!(diff.1.metadata().expect("known").blocks() * 512 < 64 << 10);
    let opened = || all(&chain::open(&[again(&diff), again(&full)]).expect("opened"));
    assert!(opened() == all(&memory));
    let check = || diff.0.sums.as_ref().expect("made").check(&diff.1, Some(&pages), || true);
    diff.1.write_all_at(&[3; 4096], 200 * 4096).expect("written");
    check().expect("nobody's");
    assert!(opened() == all(&memory));
    diff.1.write_all_at(&[3], 120 * 4096).expect("written");
    assert!(matches!(check(), Err(CheckError::Damaged { .. })));
    diff.1.write_all_at(&[0], 120 * 4096).expect("written");
    diff.1.write_all_at(&[3], 300 * 4096).expect("written");
    assert!(matches!(check(), Err(CheckError::Damaged { .. })));
}
