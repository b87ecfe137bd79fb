//! Kernels as guests bring them: bzImage, vmlinux by PVH and by the 64-bit entry, or neither.
#![no_main]

use std::{fs::File, io::Write};

use libfuzzer_sys::fuzz_target;

const MEMORY: u64 = 32 << 20;

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(bytes).expect("its bytes");
    file
}

/// What the fuzzer would have to guess: the marks by which a format is known.
fn marked(data: &[u8]) -> Vec<u8> {
    let Some((kind, data)) = data.split_first() else { return Vec::new() };
    let mut kernel = data.to_vec();
    if kind % 3 == 1 {
        // "The Linux/x86 Boot Protocol": boot_flag and header.
        kernel.resize(kernel.len().max(0x400), 0);
        kernel[0x1fe..0x200].copy_from_slice(&0xaa55u16.to_le_bytes());
        kernel[0x202..0x206].copy_from_slice(b"HdrS");
    } else if kind % 3 == 2 {
        kernel.resize(kernel.len().max(0x200), 0);
        kernel[..7].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1]);
        // ET_EXEC, EM_X86_64, EV_CURRENT; the program headers follow the ELF header.
        kernel[16..24].copy_from_slice(&[2, 0, 62, 0, 1, 0, 0, 0]);
        kernel[32..40].copy_from_slice(&64u64.to_le_bytes());
        kernel[54..56].copy_from_slice(&56u16.to_le_bytes());
        kernel[57] = 0;
    }
    kernel
}

fuzz_target!(|data: &[u8]| {
    let kernel = &marked(data);
    let memory = serio_hv::create_memory(MEMORY).expect("memory");
    let source = serio_vmm::boot::BootSource {
        kernel: file(kernel),
        initrd: Some(file(&[7; 5000])),
        cmdline: "console=ttyS0".into(),
    };
    let _ = serio_vmm::boot::load(&memory, MEMORY, &source, 0xe_0000);
});
