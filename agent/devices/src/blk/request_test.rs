//! The parser alone, against the plainest statement of what it must never let through.

use proptest::prelude::*;
use serio_hv::GuestMemory;
use serio_virtio::testing::{Buffer, DriverQueue, memory};
use vm_memory::Bytes;

use super::*;

const HEADER: u64 = 0x8000;
const DATA: u64 = 0x1_0000;

/// Offers a request in pieces and parses it.
fn parsed(
    memory: &GuestMemory,
    bytes: &[u8],
    cut: u32,
    writable: u32,
    limits: &Limits,
) -> Result<Parsed, Malformed> {
    let mut driver = DriverQueue::new(memory, 0x1000, 8);
    memory.write_slice(&[0; 4], GuestAddress(driver.driver)).unwrap();
    memory.write_slice(bytes, GuestAddress(HEADER)).unwrap();
    let len = u32::try_from(bytes.len()).unwrap();
    let cut = cut.min(len);
    let buffers = [
        Buffer::readable(HEADER, cut),
        Buffer::readable(HEADER + u64::from(cut), len - cut),
        Buffer::writable(DATA, writable),
    ];
    driver.offer(&buffers).unwrap();
    let mut chain = Chain::default();
    assert!(driver.queue(false).pop(&mut chain).unwrap());
    parse(&mut chain, memory, limits)
}

fn request(kind: u32, sector: u64, rest: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes(), rest].concat()
}

#[test]
fn what_is_read_only_or_outside_is_refused_before_the_volume_sees_it() {
    let memory = memory(1 << 20);
    let limits = Limits { size_bytes: 1 << 20, read_only: false };
    let sealed = Limits { read_only: true, ..limits };
    let refused = |status| Request::Refused { status };
    let case = |kind, sector, rest: &[u8], writable, limits: &Limits| {
        parsed(&memory, &request(kind, sector, rest), 7, writable, limits).unwrap().request
    };
    assert_eq!(case(T_IN, 2047, &[], 513, &limits), Request::Read { offset: 2047 * 512 });
    assert_eq!(case(T_IN, 2048, &[], 513, &limits), refused(S_IOERR));
    assert_eq!(case(T_IN, 2047, &[], 1025, &limits), refused(S_IOERR));
    assert_eq!(case(T_OUT, 5, &[0; 512], 1, &limits), Request::Write { offset: 5 * 512 });
    assert_eq!(case(T_OUT, 5, &[0; 512], 1, &sealed), refused(S_IOERR));
    let range = |sector: u64, sectors: u32, flags: u32| {
        [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
    };
    let whole = range(0, 2048, 1);
    let zeroes = Request::WriteZeroes { offset: 0, len: 1 << 20, unmap: true };
    assert_eq!(case(T_WRITE_ZEROES, 0, &whole, 1, &limits), zeroes);
    assert_eq!(case(T_WRITE_ZEROES, 0, &whole, 1, &sealed), refused(S_IOERR));
    assert_eq!(case(T_DISCARD, 0, &whole, 1, &limits), refused(S_UNSUPP), "unmap is no flag of a discard");
    assert_eq!(case(T_DISCARD, 0, &range(1, 2048, 0), 1, &limits), refused(S_IOERR));
    assert_eq!(case(T_DISCARD, 0, &range(0, RANGE_SECTORS_MAX + 1, 0), 1, &limits), refused(S_IOERR));
    assert_eq!(
        case(T_DISCARD, 0, &range(8, 8, 0).repeat(2), 1, &limits),
        refused(S_UNSUPP),
        "one range only"
    );
    assert_eq!(case(T_GET_ID, 0, &[], 21, &sealed), Request::GetId);
    assert_eq!(parsed(&memory, &request(T_FLUSH, 0, &[])[..15], 3, 1, &limits), Err(Malformed));
    assert_eq!(parsed(&memory, &request(T_FLUSH, 0, &[]), 3, 0, &limits), Err(Malformed));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever the bytes say: what passes lies on the disk, and writes only where writing is allowed.
    #[test]
    fn what_passes_is_allowed(
        kind in prop_oneof![Just(0u32), Just(1), Just(4), Just(8), Just(11), Just(13), any::<u32>()],
        sector in prop_oneof![0u64..2100, any::<u64>()],
        rest in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..40),
            (0u64..2100, 0u32..2100, 0u32..3).prop_map(|(at, count, flags)| {
                [&at.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
            }),
            Just(vec![0; 512]),
        ],
        cut in 0u32..600, writable in prop_oneof![Just(1u32), Just(513), Just(1025), 0u32..2000],
        sectors in 0u64..2100, read_only in any::<bool>(),
    ) {
        let memory = memory(1 << 20);
        let limits = Limits { size_bytes: sectors * 512, read_only };
        let Ok(parsed) = parsed(&memory, &request(kind, sector, &rest), cut, writable, &limits) else {
            prop_assert!(writable == 0);
            return Ok(());
        };
        prop_assert_eq!(parsed.status, GuestAddress(DATA + u64::from(writable) - 1));
        let written = u64::try_from(rest.len()).unwrap();
        let (offset, len, changes) = match parsed.request {
            Request::Read { offset } => (offset, u64::from(writable) - 1, false),
            Request::Write { offset } => (offset, written, true),
            Request::Discard { offset, len } | Request::WriteZeroes { offset, len, .. } => (offset, len, true),
            Request::Flush | Request::GetId | Request::Refused { .. } => (0, 0, false),
        };
        prop_assert!(u128::from(offset) + u128::from(len) <= u128::from(limits.size_bytes));
        prop_assert!(offset % 512 == 0 && len % 512 == 0);
        prop_assert!(!(changes && read_only));
    }
}
