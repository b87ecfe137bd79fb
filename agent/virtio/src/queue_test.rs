//! The walker against rings that a driver built right, and wrong on purpose.

use proptest::prelude::*;

use super::*;
use crate::testing::{Buffer, DriverQueue, memory};

#[test]
fn a_chain_is_copied_and_given_back() {
    let memory = memory(1 << 20);
    let mut driver = DriverQueue::new(&memory, 0x1000, 8);
    let mut queue = driver.queue(false);
    let mut chain = Chain::default();
    assert!(!queue.pop(&mut chain).unwrap());
    let buffers = [Buffer::readable(0x8000, 16), Buffer::writable(0x9000, 512), Buffer::writable(0xa000, 1)];
    for _ in 0..50 {
        let head = driver.offer(&buffers).unwrap();
        assert!(queue.pop(&mut chain).unwrap());
        assert_eq!(chain.head(), head);
        assert_eq!((chain.readable_len(), chain.writable_len()), (16, 513));
        queue.push_used(head, 513).unwrap();
        assert_eq!(driver.used(), Some((head, 513)));
        assert!(!queue.pop(&mut chain).unwrap());
    }
}

#[test]
fn an_indirect_chain_reads_the_same() {
    let memory = memory(1 << 20);
    let mut driver = DriverQueue::new(&memory, 0x1000, 4);
    let mut queue = driver.queue(true);
    let buffers: Vec<_> = (0..100).map(|at| Buffer::writable(0x10000 + at * 0x100, 0x100)).collect();
    driver.offer_indirect(0x40000, &buffers).unwrap();
    let mut chain = Chain::default();
    assert!(queue.pop(&mut chain).unwrap());
    assert_eq!(chain.writable().len(), 100);
    assert_eq!(chain.writable()[99], Segment { address: GuestAddress(0x10000 + 99 * 0x100), len: 0x100 });
    let mut again = Chain::default();
    queue.take_again(chain.head(), &mut again).unwrap();
    assert_eq!((again.readable(), again.writable()), (chain.readable(), chain.writable()));
}

#[test]
fn broken_chains_are_named_and_nothing_else_happens() {
    let memory = memory(1 << 20);
    let next = 1u16;
    let write = 2u16;
    let indirect = 4u16;
    type Break = fn(&DriverQueue, u16, u16, u16);
    let cases: [(&str, Break); 6] = [
        ("loop", |d, next, _, _| d.write_descriptor(d.descriptors, 0, (0x8000, 8), next, 0)),
        ("index", |d, next, _, _| d.write_descriptor(d.descriptors, 0, (0x8000, 8), next, 77)),
        ("table outside", |d, _, _, indirect| {
            d.write_descriptor(d.descriptors, 0, (1 << 40, 32), indirect, 0)
        }),
        ("table of odd size", |d, _, _, indirect| {
            d.write_descriptor(d.descriptors, 0, (0x8000, 17), indirect, 0)
        }),
        ("table in a table", |d, _, _, indirect| {
            d.write_descriptor(0x8000, 0, (0x8000, 32), indirect, 0);
            d.write_descriptor(d.descriptors, 0, (0x8000, 32), indirect, 0);
        }),
        ("order", |d, next, write, _| {
            d.write_descriptor(d.descriptors, 0, (0x8000, 8), next | write, 1);
            d.write_descriptor(d.descriptors, 1, (0x8000, 8), 0, 0);
        }),
    ];
    for (name, case) in cases {
        let mut driver = DriverQueue::new(&memory, 0x1000, 8);
        let mut queue = driver.queue(false);
        memory.write_slice(&[0; 4], GuestAddress(driver.driver)).unwrap();
        case(&driver, next, write, indirect);
        driver.offer_head(0);
        let error = queue.pop(&mut Chain::default());
        assert!(
            matches!(error, Err(QueueError::BrokenChain { .. } | QueueError::Order { .. })),
            "{name}: {error:?}"
        );
    }
}

#[test]
fn an_impossible_index_and_an_endless_table_are_refused() {
    let memory = memory(1 << 20);
    let mut driver = DriverQueue::new(&memory, 0x1000, 8);
    let mut queue = driver.queue(false);
    let buffers: Vec<_> = (0..2000).map(|_| Buffer::readable(0x8000, 1)).collect();
    driver.offer_indirect(0x40000, &buffers).unwrap();
    assert!(matches!(queue.pop(&mut Chain::default()), Err(QueueError::TooLong { .. })));
    for _ in 0..9 {
        driver.offer_head(0);
    }
    assert!(matches!(queue.pop(&mut Chain::default()), Err(QueueError::Ring(_))));
}

#[test]
fn the_driver_decides_on_interrupts() {
    let memory = memory(1 << 20);
    let mut driver = DriverQueue::new(&memory, 0x1000, 8);
    let mut queue = driver.queue(false);
    let mut chain = Chain::default();
    driver.offer(&[Buffer::writable(0x8000, 1)]).unwrap();
    assert!(queue.pop(&mut chain).unwrap());
    queue.push_used(chain.head(), 0).unwrap();
    assert!(queue.interrupt_wanted().unwrap());
    memory.write_obj(AVAIL_NO_INTERRUPT.to_le(), GuestAddress(driver.driver)).unwrap();
    assert!(!queue.interrupt_wanted().unwrap());

    let mut driver = DriverQueue::new(&memory, 0x20000, 8);
    let mut queue = driver.queue(true);
    driver.set_used_event(2);
    let mut interrupts = Vec::new();
    for _ in 0..4 {
        driver.offer(&[Buffer::writable(0x8000, 1)]).unwrap();
        assert!(queue.pop(&mut chain).unwrap());
        queue.push_used(chain.head(), 0).unwrap();
        interrupts.push(queue.interrupt_wanted().unwrap());
    }
    assert_eq!(interrupts, [false, false, true, false], "only the third crosses the event index");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// However the driver cuts its bytes up, header and status byte are the same.
    #[test]
    fn framing_does_not_matter(cuts in prop::collection::vec(0u32..9, 1..12), want in 0usize..40) {
        let memory = memory(1 << 16);
        let mut chain = Chain::default();
        let mut content = Vec::new();
        let mut at = 0x100u64;
        for (number, len) in (0u8..).zip(&cuts) {
            let bytes: Vec<u8> = (0..*len).map(|byte| number.wrapping_mul(16) ^ u8::try_from(byte).unwrap()).collect();
            memory.write_slice(&bytes, GuestAddress(at)).unwrap();
            chain.push(false, Segment { address: GuestAddress(at), len: *len }).unwrap();
            content.extend(bytes);
            at += 0x100;
        }
        let mut header = vec![0; want];
        let got = chain.take_header(&memory, &mut header);
        prop_assert_eq!(got.is_some(), want <= content.len());
        if got.is_some() {
            prop_assert_eq!(&header, &content[..want]);
            prop_assert_eq!(chain.readable_len(), u64::try_from(content.len() - want).unwrap());
        }
    }

    /// Any bytes as descriptors: an answer, never a panic, and never more segments than the bound.
    #[test]
    fn any_descriptors(table in prop::collection::vec(any::<u8>(), 16 * 8), flags in prop::collection::vec(0u16..8, 8),
                       next in prop::collection::vec(0u16..9, 8), head in 0u16..9, small in any::<bool>()) {
        let memory = memory(1 << 16);
        let mut driver = DriverQueue::new(&memory, 0x1000, 8);
        let mut queue = driver.queue(false);
        memory.write_slice(&table, GuestAddress(driver.descriptors)).unwrap();
        for index in 0..8u16 {
            let at = usize::from(index);
            let address = if small { u64::from(table[at]) * 16 + 0x1000 } else { u64::MAX - u64::from(table[at]) };
            let len = u32::from(table[at]) * 16;
            driver.write_descriptor(driver.descriptors, index, (address, len), flags[at], next[at]);
        }
        driver.offer_head(head);
        let (mut chain, mut again) = (Chain::default(), Chain::default());
        let popped = queue.pop(&mut chain);
        let taken_again = queue.take_again(head, &mut again);
        if popped.is_ok() {
            prop_assert!(taken_again.is_ok(), "{:?}", taken_again);
            prop_assert_eq!((again.head(), again.readable(), again.writable()), (chain.head(), chain.readable(), chain.writable()));
            prop_assert!(chain.readable().len() + chain.writable().len() <= SEGMENTS_MAX);
            prop_assert!(chain.readable_len() + chain.writable_len() <= u64::from(u32::MAX));
            let _ = chain.take_last_byte();
            let _ = chain.take_header(&memory, &mut [0; 16]);
        }
    }
}
