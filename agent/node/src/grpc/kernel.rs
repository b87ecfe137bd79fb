//! Says whether a file is a kernel that can be booted, by its head. Pure.

/// Bytes of the head that are looked at.
pub(super) const HEAD_BYTES: usize = 0x206;

/// "HdrS" of the Linux boot protocol, at 0x202 (Documentation/arch/x86/boot.rst, "header").
const BZIMAGE: (usize, &[u8]) = (0x202, b"HdrS");
/// The beginning of a 64-bit little-endian ELF file.
const ELF: (usize, &[u8]) = (0, b"\x7fELF\x02\x01");

/// Whether `head`, the first [`HEAD_BYTES`] (or all, of a shorter file), is of a bzImage or a 64-bit vmlinux.
pub(super) fn is_kernel(head: &[u8]) -> bool {
    [BZIMAGE, ELF].iter().any(|(at, magic)| head.get(*at..).is_some_and(|rest| rest.starts_with(magic)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_and_others() {
        let mut bzimage = vec![0; HEAD_BYTES];
        bzimage[0x202..].copy_from_slice(b"HdrS");
        assert!(is_kernel(&bzimage));
        assert!(is_kernel(b"\x7fELF\x02\x01\x01"));
        assert!(!is_kernel(b"\x7fELF\x01\x01") && !is_kernel(b"") && !is_kernel(b"#!/bin/sh\n"));
        assert!(!is_kernel(&bzimage[..0x204]));
    }
}
