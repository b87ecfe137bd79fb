//! Guests of a few bytes, as ELF files with a PVH note: enough to see that a VM runs, speaks and ends.
#![allow(dead_code, reason = "each test binary uses some of them")]

/// Where they are loaded.
const BASE: u32 = 0x10_0000;

/// Wraps flat 32-bit code, which starts at its first byte, into an ELF.
pub(crate) fn elf(code: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    for word in [4u32, 4, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(BASE.to_le_bytes());
    let mut out = vec![0u8; 64];
    out[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    out[16] = 2;
    out[18] = 62;
    out[24..28].copy_from_slice(&BASE.to_le_bytes());
    out[32] = 64;
    out[54] = 56;
    out[56] = 2;
    let data_at = 64 + 2 * 56u64;
    let code_len = code.len() as u64;
    let base = u64::from(BASE);
    for (kind, offset, place, len, memory) in [
        (1u32, data_at, base, code_len, code_len.next_multiple_of(4096)),
        (4, data_at + code_len, 0, note.len() as u64, note.len() as u64),
    ] {
        out.extend(kind.to_le_bytes());
        out.extend(7u32.to_le_bytes());
        for value in [offset, place, place, len, memory, 4096] {
            out.extend(value.to_le_bytes());
        }
    }
    out.extend(code);
    out.extend(note);
    out
}

/// `out PORT, VALUE`.
pub(crate) fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee]
}

/// Prints on COM1.
pub(crate) fn print(text: &str) -> Vec<u8> {
    text.bytes().flat_map(|byte| out(0x3f8, byte)).collect()
}

/// Powers off by ACPI's sleep control register; then `jmp $`.
pub(crate) fn power_off() -> Vec<u8> {
    [out(0x600, 0x34), spin()].concat()
}

/// Resets by ACPI's reset register; then `jmp $`.
pub(crate) fn reset() -> Vec<u8> {
    [out(0x602, 0xfe), spin()].concat()
}

/// `jmp $`.
pub(crate) fn spin() -> Vec<u8> {
    vec![0xeb, 0xfe]
}

/// `ud2` without an interrupt table: the processor gives up.
pub(crate) fn crash() -> Vec<u8> {
    vec![0x0f, 0x0b]
}

/// Sends back what is typed; `q` ends it by `then`.
pub(crate) fn echo(then: &[u8]) -> Vec<u8> {
    let mut code = vec![
        0x66, 0xba, 0xfd, 0x03, // mov dx, 0x3fd (line status)
        0xec, // in al, dx
        0xa8, 0x01, // test al, 1
        0x74, 0xf7, // jz: back to the start
        0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8 (data)
        0xec, // in al, dx
        0xee, // out dx, al
        0x3c, b'q', // cmp al, 'q'
        0x75, 0xed, // jne: back to the start
    ];
    code.extend(then);
    code
}
