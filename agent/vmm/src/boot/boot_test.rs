//! Loading files that are right, wrong, hostile, and too big.

use std::io::Write;

use serio_hv::create_memory;

use super::*;

const MIB: u64 = 1 << 20;
const RSDP: u64 = 0xe_0000;

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(bytes).expect("written");
    file
}

/// An ELF with one PT_LOAD at `physical` and, if asked, a PVH note.
fn elf(physical: u64, code: &[u8], memory_bytes: u64, pvh: Option<u32>) -> Vec<u8> {
    let mut notes = Vec::new();
    if let Some(entry) = pvh {
        // A note of somebody else first, with an odd length.
        notes.extend_from_slice(&[4, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0]);
        notes.extend_from_slice(b"GNU\0abc\0");
        notes.extend_from_slice(&[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
        notes.extend_from_slice(b"Xen\0");
        notes.extend_from_slice(&entry.to_le_bytes());
    }
    let mut out = vec![0u8; 64];
    out[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    out[16] = 2;
    out[18] = 62;
    out[24..32].copy_from_slice(&physical.to_le_bytes());
    out[32] = 64;
    out[54] = 56;
    out[56] = 2;
    let data_at = 64 + 2 * 56u64;
    for (kind, offset, place, len, memory) in [
        (1u32, data_at, physical, code.len() as u64, memory_bytes),
        (4, data_at + code.len() as u64, 0, notes.len() as u64, notes.len() as u64),
    ] {
        out.extend_from_slice(&kind.to_le_bytes());
        out.extend_from_slice(&7u32.to_le_bytes());
        for value in [offset, place, place, len, memory, 4096] {
            out.extend_from_slice(&value.to_le_bytes());
        }
    }
    out.extend_from_slice(code);
    out.extend_from_slice(&notes);
    out
}

/// A bzImage of `kernel_bytes`, that wants `init_size` at 16 MiB.
fn bzimage(kernel_bytes: usize, init_size: u32) -> Vec<u8> {
    let mut out = vec![0u8; 512 * 2 + kernel_bytes];
    out[0x1f1] = 1;
    out[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    out[0x202..0x206].copy_from_slice(b"HdrS");
    out[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
    out[0x211] = 1;
    out[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    out[0x230..0x234].copy_from_slice(&0x20_0000u32.to_le_bytes());
    out[0x234] = 1;
    out[0x236] = 1;
    out[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes());
    out[0x258..0x260].copy_from_slice(&(16 * MIB).to_le_bytes());
    out[0x260..0x264].copy_from_slice(&init_size.to_le_bytes());
    out[1024..].fill(0x90);
    out
}

fn boot(
    kernel: &[u8],
    initrd: Option<&[u8]>,
    cmdline: &str,
    memory_bytes: u64,
) -> Result<BootRegisters, BootError> {
    boot_in(&create_memory(memory_bytes).expect("memory"), kernel, initrd, cmdline, memory_bytes)
}

fn boot_in(
    memory: &GuestMemory,
    kernel: &[u8],
    initrd: Option<&[u8]>,
    cmdline: &str,
    memory_bytes: u64,
) -> Result<BootRegisters, BootError> {
    let source = BootSource { kernel: file(kernel), initrd: initrd.map(file), cmdline: cmdline.to_owned() };
    load(memory, memory_bytes, &source, RSDP)
}

#[test]
fn an_elf_with_the_note_starts_by_pvh() {
    let memory = create_memory(64 * MIB).expect("memory");
    let kernel = elf(2 * MIB, b"code", 8192, Some(0x20_0010));
    let registers = boot_in(&memory, &kernel, Some(b"initrd"), "console=ttyS0", 64 * MIB).expect("boots");
    assert_eq!((registers.mode, registers.entry, registers.rbx), (BootMode::Protected, 0x20_0010, 0x6000));
    let read = |at| memory.read_obj::<u32>(GuestAddress(at)).expect("RAM");
    assert_eq!(read(0x6000), 0x336e_c578);
    assert_eq!((read(0x6004), read(0x600c)), (1, 1), "version, modules");
    let initrd_at = read(0x6100);
    assert_eq!(u64::from(initrd_at), 64 * MIB - 4096);
    assert_eq!(&read(u64::from(initrd_at)).to_le_bytes(), b"init");
    assert_eq!(&read(2 * MIB).to_le_bytes(), b"code");
    assert_eq!(&read(layout::CMDLINE).to_le_bytes(), b"cons");
}

#[test]
fn an_elf_without_the_note_starts_by_linux_entry() {
    let registers = boot(&elf(16 * MIB, b"code", 8192, None), None, "", 64 * MIB).expect("boots");
    assert_eq!(registers.mode, BootMode::Long { page_table: layout::PAGE_TABLES });
    assert_eq!((registers.entry, registers.rsi), (16 * MIB, layout::ZERO_PAGE));
}

#[test]
fn a_bzimage_lies_where_it_prefers_or_where_there_is_room() {
    let roomy = boot(&bzimage(4096, 8 * MIB as u32), None, "", 64 * MIB).expect("boots");
    assert_eq!(roomy.entry, 16 * MIB + 0x200);
    let tight = boot(&bzimage(4096, 8 * MIB as u32), None, "", 16 * MIB).expect("boots");
    assert_eq!(tight.entry, 2 * MIB + 0x200);
    let error = boot(&bzimage(4096, 32 * MIB as u32), None, "", 16 * MIB).expect_err("too small");
    assert_eq!(error.field(), "memory");
}

#[test]
fn the_zero_page_tells_where_things_are() {
    let memory = create_memory(64 * MIB).expect("memory");
    boot_in(&memory, &bzimage(4096, 8 * MIB as u32), Some(&[7; 5000]), "quiet", 64 * MIB).expect("boots");
    let read = |at| memory.read_obj::<u32>(GuestAddress(layout::ZERO_PAGE + at)).expect("RAM");
    assert_eq!(u64::from(read(0x70)), RSDP);
    assert_eq!(read(0x228), layout::CMDLINE as u32);
    assert_eq!((u64::from(read(0x218)), read(0x21c)), (64 * MIB - 8192, 5000));
    assert_eq!(read(0x1e8) & 0xff, 4, "entries of the memory map");
}

#[test]
fn an_initrd_that_does_not_fit_is_refused() {
    let kernel = bzimage(4096, 8 * MIB as u32);
    let error = boot(&kernel, Some(&vec![0; 60 << 20]), "", 64 * MIB).expect_err("too big");
    assert!(matches!(error, BootError::TooBig { field: "initrd", .. }), "{error}");
}

#[test]
fn cmdlines_are_bounded() {
    let kernel = bzimage(4096, MIB as u32);
    assert!(boot(&kernel, None, &"a".repeat(2047), 64 * MIB).is_ok());
    let error = boot(&kernel, None, &"a".repeat(2048), 64 * MIB).expect_err("too long");
    assert_eq!(error.field(), "cmdline");
    assert!(matches!(boot(&kernel, None, "a\0b", 64 * MIB), Err(BootError::CmdlineZero)));
}

#[test]
fn files_that_are_no_kernel_name_the_field() {
    let mut elf32 = elf(2 * MIB, b"x", 1, None);
    elf32[4] = 1;
    for bytes in [&b""[..], b"#!/bin/sh\n", &[0; 4096], &elf32, b"\x7fELF"] {
        let error = boot(bytes, None, "", 64 * MIB).expect_err("no kernel");
        assert!(matches!(error, BootError::UnknownFormat), "{error}");
        assert_eq!(error.field(), "kernel");
    }
}

#[test]
fn damaged_kernels_are_errors_not_panics() {
    let good_elf = elf(2 * MIB, &[0x90; 300], 8192, Some(0x20_0000));
    let good_bz = bzimage(4096, MIB as u32);
    for good in [&good_elf, &good_bz] {
        for cut in 0..good.len() {
            // Shorter files may be right by accident, but never a panic.
            let _ = boot(&good[..cut], None, "", 4 * MIB);
        }
        // Every header byte set to extremes.
        for at in 0..good.len().min(700) {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut bad = good.to_vec();
                bad[at] = value;
                let _ = boot(&bad, None, "", 4 * MIB);
            }
        }
    }
    for physical in [0, 0x6000, u64::MAX - 4, 63 * MIB + 4095 * 1024, 3 << 30, 5 << 30] {
        assert!(boot(&elf(physical, b"x", MIB, None), None, "", 64 * MIB).is_err(), "{physical:#x}");
    }
}

#[test]
fn notes_end_without_looping() {
    assert_eq!(elf::find_pvh_entry(&[]), None);
    assert_eq!(elf::find_pvh_entry(&[0xff; 64]), None);
    assert_eq!(elf::find_pvh_entry(&[0; 64]), None);
}
