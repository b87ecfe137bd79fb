//! A saved state of a VM from anybody: read or refused, never a panic. Checksums are made right first, so that what lies behind
//! them is reached.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = serio_vmm::snapshot::decode(bytes);
    let mut bytes = bytes.to_vec();
    mend(&mut bytes);
    let _ = serio_vmm::snapshot::decode(&bytes);
});

/// Puts magic, length and checksums where the format wants them, section by section.
fn mend(bytes: &mut [u8]) {
    let len = bytes.len() as u64;
    let Some(header) = bytes.get_mut(..32) else { return };
    header[..8].copy_from_slice(b"SERIOVM\0");
    header[8..12].copy_from_slice(&1u32.to_le_bytes());
    header[16..24].copy_from_slice(&len.to_le_bytes());
    let crc = crc32c::crc32c(&header[..28]);
    header[28..].copy_from_slice(&crc.to_le_bytes());
    let mut at = 32;
    while let Some(section) = bytes.get_mut(at..).filter(|rest| rest.len() >= 32) {
        let (header, rest) = section.split_at_mut(32);
        header[4..8].copy_from_slice(&1u32.to_le_bytes());
        // A short payload, so that many sections fit.
        let payload = usize::from(header[16]).min(rest.len());
        header[16..28].fill(0);
        header[16] = payload as u8;
        let crc = crc32c::crc32c(&rest[..payload]);
        header[12..16].copy_from_slice(&crc.to_le_bytes());
        let crc = crc32c::crc32c(&header[..28]);
        header[28..].copy_from_slice(&crc.to_le_bytes());
        at += 32 + payload.next_multiple_of(8);
    }
}
