//! What goes in comes out; nothing damaged, cut or forged does.

use proptest::prelude::*;

use super::*;

/// Parts of so many bytes, with their data.
type Parts = Vec<(u64, Vec<(u64, Vec<u8>)>)>;

fn write(manifest: &[u8], parts: &Parts) -> Vec<u8> {
    let mut writer = Writer::new(Vec::new(), manifest).expect("written");
    for (size, records) in parts {
        for (offset, data) in records {
            writer.data(*offset, data).expect("written");
        }
        writer.end_part(*size).expect("written");
    }
    writer.finish().expect("written")
}

/// As it is read: the manifest, and the parts as they are.
fn read(bytes: &[u8], sizes: &[u64]) -> Result<(Vec<u8>, Vec<Vec<u8>>), ReadError> {
    let (mut reader, manifest) = Reader::new(bytes)?;
    let (mut parts, mut data) = (Vec::new(), Vec::new());
    for size in sizes {
        let mut part = vec![0; usize::try_from(*size).expect("small")];
        reader.begin_part(*size);
        while let Some(offset) = reader.next(&mut data)? {
            let at = usize::try_from(offset).expect("small");
            part[at..at + data.len()].copy_from_slice(&data);
        }
        parts.push(part);
    }
    reader.finish().map(|()| (manifest, parts))
}

fn sizes(parts: &Parts) -> Vec<u64> {
    parts.iter().map(|(size, _)| *size).collect()
}

fn small() -> Parts {
    vec![
        (5000, vec![(0, vec![7; 100]), (4000, vec![8; 1000])]),
        (0, Vec::new()),
        (9, vec![(3, b"end".to_vec())]),
    ]
}

fn whole(parts: &Parts) -> Vec<Vec<u8>> {
    let of = |(size, records): &(u64, Vec<(u64, Vec<u8>)>)| {
        let mut part = vec![0; *size as usize];
        for (offset, data) in records {
            part[*offset as usize..][..data.len()].copy_from_slice(data);
        }
        part
    };
    parts.iter().map(of).collect()
}

proptest! {
    #[test]
    fn what_goes_in_comes_out(manifest in prop::collection::vec(any::<u8>(), 0..300), picks in prop::collection::vec(prop::collection::vec((0..2000u64, prop::collection::vec(any::<u8>(), 1..500)), 0..6), 0..4)) {
        let parts: Parts = picks.into_iter().map(|records| {
            let mut end = 0;
            let placed = records.into_iter().map(|(gap, data)| {
                let offset = end + gap;
                end = offset + data.len() as u64;
                (offset, data)
            }).collect();
            (end, placed)
        }).map(|(size, records): (u64, Vec<(u64, Vec<u8>)>)| (records.last().map_or(size, |(at, data)| at + data.len() as u64 + 10), records)).collect();
        let (found, read) = read(&write(&manifest, &parts), &sizes(&parts)).expect("whole");
        prop_assert_eq!(found, manifest);
        prop_assert_eq!(read, whole(&parts));
    }

    /// Whatever it is, it is read or refused.
    #[test]
    fn any_bytes(tail in prop::collection::vec(any::<u8>(), 0..300), flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let _ = read(&tail, &[10, 20]);
        let mut bytes = write(b"{}", &small());
        for (at, value) in flips {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        bytes.extend(tail);
        let _ = read(&bytes, &sizes(&small()));
    }
}

#[test]
fn any_changed_bit_and_any_cut_is_noticed() {
    let bytes = write(b"{\"a\": 1}", &small());
    let sizes = sizes(&small());
    assert_eq!(read(&bytes, &sizes).expect("whole").1, whole(&small()));
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut broken = bytes.clone();
            broken[at] ^= 1 << bit;
            assert!(read(&broken, &sizes).is_err(), "bit {bit} of byte {at}");
        }
        let cut = read(&bytes[..at], &sizes).expect_err("cut");
        assert!(matches!(cut, ReadError::Short { .. }), "cut at {at}: {cut}");
    }
    let longer = [bytes.clone(), vec![0]].concat();
    assert!(matches!(read(&longer, &sizes), Err(ReadError::Longer)));
}

#[test]
fn parts_of_other_archives_other_orders_and_other_sizes_are_refused() {
    let part = |byte| (100, vec![(0, vec![byte; 100])]);
    let one = write(b"one", &vec![part(1), part(2)]);
    let other = write(b"two", &vec![part(1), part(2)]);
    let head = HEAD_BYTES + HASH_BYTES + 3;
    let mixed = [&one[..head], &other[head..]].concat();
    assert!(read(&mixed, &[100, 100]).expect_err("of another").to_string().contains("part 1"));
    let body = &one[head..];
    let (first, second) = body.split_at(body.len() / 2);
    let swapped = [&one[..head], second, first].concat();
    assert!(read(&swapped, &[100, 100]).is_err());
    for sizes in [&[99, 100][..], &[101, 100], &[100, 50], &[100, 1 << 20]] {
        assert!(matches!(read(&one, sizes), Err(ReadError::Order { .. })), "{sizes:?}");
    }
    assert!(matches!(read(&one, &[100]), Err(ReadError::Longer)));
    assert!(matches!(read(&one, &[100, 100, 0]), Err(ReadError::Short { .. })));
}

/// With right hashes: records that lie over each other, outside, or are too long.
#[test]
fn records_where_none_can_be_are_refused_before_they_are_read() {
    let at = |records: &[(u64, u32)]| {
        let mut bytes = write(b"", &Vec::new());
        for (offset, len) in records {
            bytes.extend(record_head(*offset, *len));
            bytes.extend(vec![0; (*len).min(2 << 20) as usize]);
        }
        read(&bytes, &[8 << 20]).expect_err("refused")
    };
    for records in [
        &[(0, 10), (9, 1)][..],
        &[(10, 10), (0, 5)],
        &[(8 << 20, 1)],
        &[((8 << 20) - 1, 2)],
        &[(u64::MAX, 2)],
        &[(0, (1 << 20) + 1)],
        &[(0, u32::MAX)],
        &[(7, 0)],
    ] {
        assert!(matches!(at(records), ReadError::Order { part: 1, .. }), "{records:?}");
    }
}

#[test]
fn heads_are_judged_by_name() {
    let bytes = write(b"manifest", &Vec::new());
    let with = |at: usize, value: u8| {
        let mut other = bytes.clone();
        other[at] = value;
        Reader::new(other.as_slice()).map(|_| ()).expect_err("refused").to_string()
    };
    assert!(with(0, b'x').contains("no snapshot of a VM"));
    assert!(with(8, 2).contains("version 2, 1 is known"));
    assert!(with(15, 1).contains("the most"));
    assert!(with(48, b'M').contains("manifest"));
    assert!(Writer::new(Vec::new(), &vec![0; MANIFEST_BYTES_MAX + 1]).is_err());
    let large = vec![1; MANIFEST_BYTES_MAX];
    assert_eq!(read(&write(&large, &Vec::new()), &[]).expect("whole").0, large);
    // Longer than a record, and cut into several.
    let long = vec![(3 << 20, vec![(5, vec![9; (2 << 20) + 7])])];
    assert_eq!(read(&write(b"", &long), &sizes(&long)).expect("whole").1, whole(&long));
}
